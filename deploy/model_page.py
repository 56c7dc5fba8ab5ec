"""The page of a model: what it is, whether training helped, its numbers beside those of baselines, cost, loss, samples, card.
It reads what a run leaves in its folder, see shared/training/finish.py. Called by app.py.
"""

import json
import re
from itertools import islice
from pathlib import Path

import streamlit as st

from deploy.choices import read_json
from deploy.inference import Engine
from deploy.texts import as_markdown, literally, of_run, t
from shared.publish.card import METRICS, metric_systems
from shared.publish.compare import short_number
from shared.publish.redact import without_paths

SHOWN, CUT = 5, 600  # samples, and characters of each text of them


def model_page(engine: Engine) -> None:
    """What the folder of a model tells."""
    folder, results = engine.folder, read_json(engine.folder / "all_results.json")
    run = results.get("run") or {}
    facts = {
        "task": " · ".join(filter(None, (run.get("task"), engine.task))),
        "from": run.get("model"),
        "data": run.get("data"),
        "artifact": engine.artifact,
        "context": t("tokens", engine.context),
    }
    with st.container(border=True):
        st.markdown("  \n".join(f"{t(key)}: **{literally(str(value))}**" for key, value in facts.items() if value))
    if results:
        show_verdict(str(results.get("line", "")))
        show_metrics(results)
        show_cost(results, run)
    if (folder / "loss.png").is_file():
        st.subheader(t("loss"))
        st.image((folder / "loss.png").read_bytes())
    samples = read_samples(folder / "samples.jsonl")
    if samples:
        st.subheader(t("samples"))
        for number, sample in enumerate(samples):
            show_sample(sample, number == 0)
    forms = read_json(folder / "export.json").get("artifacts", {})  # as shared/export/export.py measured them
    if forms:
        st.subheader(t("artifacts"))
        rows = [
            {t("artifact"): literally(name), "MB": f"{numbers['megabytes']:,.1f}"}
            | {t("latency"): f"{numbers['latency_ms']['1']['p50']:,.1f}"}
            | {t("per_second"): f"{numbers['per_second']['1']:,.1f}"}
            for name, numbers in forms.items()
        ]
        st.table(rows, hide_index=True)
    if not results and not forms:
        st.info(t("no_run"), icon=":material/info:")
    if (folder / "run.yaml").is_file():
        with st.expander(t("settings"), icon=":material/settings:"):
            st.code(without_paths((folder / "run.yaml").read_text("utf8", "replace")), "yaml")
    if (folder / "README.md").is_file():
        text = re.sub(r"\A---\n.*?\n---\n", "", (folder / "README.md").read_text("utf8", "replace"), flags=re.DOTALL)
        with st.expander(t("card"), icon=":material/description:"):
            st.markdown(as_markdown(text))


def show_verdict(line: str) -> None:
    """The line of a run that says whether training helped: green only where it is better than all that it was compared with."""
    verdict, _, rest = line.removeprefix("Did it help? ").partition(": ")
    if not rest:
        return
    helped = verdict == "Yes" or verdict.startswith("Better than ") and "worse" not in verdict and "not " not in verdict
    said = f"**{t('verdict')}** {literally(of_run(f'{verdict}: {rest}'))}"
    (st.success if helped else st.warning)(said, icon=":material/check_circle:" if helped else ":material/error:")


def show_metrics(results: dict) -> None:
    """A table: each metric of the test split before training, of trivial baselines and after, with its intervals."""
    found = metric_systems(results)
    if not found:
        return
    systems = list(dict.fromkeys(system for numbers in found.values() for system in numbers))
    systems = [s for s in ("base", *sorted({*systems} - {"base", "test"}), "test") if s in systems]
    titles = {"base": t("untrained"), "test": t("trained"), "baseline": t("baseline")}
    rows = []
    for name, numbers in found.items():
        title, *lower = METRICS.get(name, ("", name.replace("_", " ").capitalize()))[1].split(", lower")
        row = {t("metric"): literally(of_run(title)) + (f", {t('lower')}" if lower else "")}
        for system in systems:
            title = titles.get(system) or literally(of_run(system.removeprefix("baseline_").replace("_", " ")))
            row[title] = as_cell(*numbers[system]) if system in numbers else ""
        rows.append(row)
    st.subheader(t("metrics"))
    st.table(rows, hide_index=True)
    if isinstance(results.get("test_rows"), int):
        st.caption(t("metrics_more", results["test_rows"]))


def as_cell(value: float, interval: list[float] | None) -> str:
    """A number, and its interval below it."""
    text = f"**{short_number(value)}**"
    return f"{text} ({t('from_to', *map(short_number, interval))})" if interval else text


def show_cost(results: dict, run: dict) -> None:
    """Time, memory, hardware, what was installed."""
    texts = {
        "training_time": ("minutes", "train_minutes"),
        "whole_time": ("minutes", "run_minutes"),
        "memory": ("{:.1f} GB", "peak_memory_gb"),
        "device_hours": ("{:.2f}", "device_hours"),
    }
    numbers = {
        title: t(text, results[key]) if text == "minutes" else text.format(results[key])
        for title, (text, key) in texts.items()
        if isinstance(results.get(key), int | float)
    }
    if not numbers:
        return
    st.subheader(t("cost"))
    with st.container(horizontal=True, gap="small"):
        for title, number in numbers.items():
            st.metric(t(title), number, border=True)
    steps = t("steps", run["steps"]) if isinstance(run.get("steps"), int) else None
    said = [run.get("hardware"), steps, run.get("date"), ", ".join(map(str, run.get("packages") or []))]
    st.caption(literally(" · ".join(str(each) for each in said if each)))


def read_samples(path: Path) -> list[dict]:
    """The first samples of a run, as `shared.publish.results.write_samples` wrote them; damaged lines are passed over."""
    samples = []
    if path.is_file():
        with path.open(encoding="utf8", errors="replace") as lines:
            for line in islice(lines, SHOWN):
                try:
                    sample = json.loads(line)
                except ValueError:
                    continue
                samples += [sample] if isinstance(sample, dict) else []
    return samples


def show_sample(sample: dict, opened: bool) -> None:
    """What was asked, what the model wrote to it before and after training, and the reference."""
    prompt = sample.get("prompt")
    if isinstance(prompt, list):
        prompt = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt if isinstance(turn, dict))
    title = " ".join(str(prompt).split())
    with st.expander(literally(title[:70] + ("…" if len(title) > 70 else "")), expanded=opened):
        st.caption(t("sample_prompt"))
        st.markdown(shortened(prompt))
        shown = [key for key in ("base", "trained", "reference") if sample.get(key) is not None]
        for column, key in zip(st.columns(len(shown) or 1), shown, strict=False):
            with column:
                st.caption(t(f"sample_{key}"))
                st.markdown(shortened(sample[key]))


def shortened(text) -> str:
    """The beginning of a text, as it is, for st.markdown."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return literally(text[:CUT].strip() + (" …" if len(text) > CUT else "")) or f"*{t('nothing')}*"
