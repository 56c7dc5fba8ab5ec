"""What a run leaves beside the model: results, loss curve, samples, model card. Called by each task at its end.

A run folder is what gets pushed, so no file written here may hold a token or a path of this machine, and text from
models and data must stay text in the card.
"""

import io
import json
import math
import os
import platform
import re
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from shared import UserError
from shared.metrics import paired_difference

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
FEW_ROWS = 10  # the percentile interval of fewer rows is too narrow to call anything shown

# Metric in all_results.json: (Hub's metric type, name in the card).
METRICS = {
    "loss": ("loss", "Loss (nats per token), lower is better"),
    "perplexity": ("perplexity", "Perplexity, lower is better"),
    "bits_per_byte": ("bits_per_byte", "Bits per byte, lower is better"),
    "accuracy": ("accuracy", "Accuracy"),
    "accuracy_top5": ("accuracy", "Accuracy of the five most likely"),
    "rouge1": ("rouge", "ROUGE-1"),
    "rouge2": ("rouge", "ROUGE-2"),
    "rougeL": ("rouge", "ROUGE-L"),
    "rougeLsum": ("rouge", "ROUGE-Lsum"),
    "bleu": ("bleu", "BLEU"),
    "exact_match": ("exact_match", "Exact match"),
    "f1": ("f1", "F1"),
    "macro_f1": ("f1", "Macro-F1"),
    "has_answer_exact_match": ("exact_match", "Exact match of questions with an answer"),
    "has_answer_f1": ("f1", "F1 of questions with an answer"),
    "no_answer_exact_match": ("exact_match", "Exact match of questions without an answer"),
    "no_answer_f1": ("f1", "F1 of questions without an answer"),
    "best_exact_match": ("exact_match", "Exact match at the best threshold for these rows"),
    "best_f1": ("f1", "F1 at the best threshold for these rows"),
}
NOT_METRICS = ("_ci95", "_threshold", "_rows", "_tokens", "_samples", "_runtime", "_seconds", "_per_second", "_time")

TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")
SECRET_FLAG = re.compile(
    r"(--(?:hub_)?token|--\w*(?:api_key|password)|\b[A-Z_]*(?:TOKEN|API_KEY|PASSWORD|SECRET)(?==))[ =]\S+"
)
ABSOLUTE_PATH = re.compile(
    r"""(["'])(?:file://)?/[^"']*?([^/"']+)/?\1|(?<![\w:/.<])(?:file://)?(?:/|[A-Za-z]:\\)[^\s"'`,;)]+"""
)
UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)  # controls, text direction, surrogates


def write_json(path: str | Path, content) -> None:
    """Writes JSON with sorted keys, whole or not at all.

    Raises:
        UserError: NaN or infinity, named by its key: a result that is none must not look like one.
    """
    content = _plain(content, Path(path).name)
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    _replace(path, text.encode("utf8", "backslashreplace"))


def write_results(folder: str | Path, metrics: dict) -> None:
    """all_results.json of a run: see `write_json`."""
    write_json(Path(folder) / "all_results.json", metrics)


def write_samples(path: str | Path, samples: list[dict]) -> None:
    """samples.jsonl: one object a line with `prompt` (a string or a list of messages), `base`, `trained`, `reference`.

    Raises:
        ValueError: a sample lacks one of these keys. A value may be None: no base model, no reference.
    """
    lines = []
    for number, sample in enumerate(samples):
        missing = {"prompt", "base", "trained", "reference"} - sample.keys()
        if missing:
            raise ValueError(f"Sample {number} has no {', '.join(sorted(missing))}.")
        lines.append(TOKEN.sub("hf_***", json.dumps(sample, ensure_ascii=False)) + "\n")
    # A lone surrogate, cut out of an emoji by truncation, becomes its JSON escape instead of an error.
    _replace(path, "".join(lines).encode("utf8", "backslashreplace"))


def plot_loss(log_history: list[dict], path: str | Path) -> bool:
    """loss.png: training loss at each log, validation loss at each evaluation, learning rate faint behind them.

    Args:
        log_history: `trainer.state.log_history`.

    Returns:
        False, and no file, where no loss was logged: a run shorter than `logging_steps`.
    """
    from matplotlib.figure import Figure  # not pyplot: that would replace the backend of a notebook
    from PIL import Image

    curves = {}
    for key in ("loss", "eval_loss", "learning_rate"):
        logged = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        curves[key] = sorted(point for point in logged if math.isfinite(point[1]))
    if not curves["loss"] and not curves["eval_loss"]:
        return False
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        if curves[key]:
            style = "o" if len(curves[key]) == 1 else style  # a line through one point shows nothing
            axis.plot(*zip(*curves[key], strict=True), style, label=label, markersize=4.5, linewidth=1.4)
    axis.set(xlabel="optimizer step", ylabel="loss")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="upper right")
    if len(curves["learning_rate"]) > 1:
        behind = axis.twinx()
        behind.plot(*zip(*curves["learning_rate"], strict=True), color="0.8", linewidth=1, linestyle="--")
        behind.set_ylabel("learning rate (dashed)", color="0.6")
        behind.tick_params(colors="0.6")
        behind.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        behind.yaxis.get_offset_text().set_color("0.6")
        behind.set_ylim(bottom=0)
        axis.set_zorder(behind.get_zorder() + 1)
        axis.patch.set_visible(False)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")  # Agg: a Figure without pyplot has no window
    Image.open(drawn).convert("RGB").quantize(64).save(small, format="png", optimize=True)  # a third of the bytes
    _replace(path, small.getvalue())
    return True


def did_it_help(
    base: dict, trained: dict, metric: str = "perplexity", baselines: dict[str, dict] | None = None
) -> dict:
    """Compares two models on the same rows of the test split, by the paired bootstrap (Koehn 2004).

    Args:
        base, trained: scores, a list each with one entry a row, in the same order. `{"nll", "tokens"}` for perplexity,
            `{"correct", "tokens"}` for accuracy, else `{metric: [...]}`: the mean over rows counts, more is better.
        metric: what is compared. Perplexity is tested as loss.
        baselines: trivial systems by name, scored alike; the line says whether the trained model beats each.

    Returns:
        `line` for people, `better_rows` (share) and, named after the metric (`loss` for perplexity), `<m>_difference`,
        `<m>_difference_ci95`, `<m>_difference_p_value`.
    """
    key, weights, higher = {"perplexity": ("nll", "tokens", False), "accuracy": ("correct", "tokens", True)}.get(
        metric, (metric, None, True)
    )
    weights = trained[weights] if weights else None

    def value(system: dict) -> float:
        mean = float(np.sum(system[key]) / (len(system[key]) if weights is None else np.sum(weights)))
        return float(np.exp(mean)) if metric == "perplexity" else mean

    found = paired_difference(base[key], trained[key], weights, higher)
    tested, verdict = "loss" if metric == "perplexity" else metric, _verdict(found, higher)
    low, high = (_number(end, found["difference_ci95"]) for end in found["difference_ci95"])
    before, after = value(base), value(trained)
    change = f"{(after / before - 1) * 100:+.1f} %, " if before else ""
    why = ""
    if verdict == "Not clearly":
        why = (
            f" Fewer than {FEW_ROWS} rows show nothing." if found["rows"] < FEW_ROWS else " The interval includes zero."
        )
    if np.array_equal(base[key], trained[key]):
        verdict, why = (
            "No",
            " Both models score the same in every row: nothing was learned, or the adapter is not active.",
        )
    line = (
        f"Did it help? {verdict}: test {metric} {_number(before)} -> {_number(after)} ({change}95 % interval of the "
        f"difference in {tested} {low} to {high}), better on {found['better_rows'] * 100:.0f} % of {found['rows']:,} "
        f"rows.{why}"
    )
    words = {"Yes": "Better than", "No": "Worse than", "Not clearly": "Not clearly better than"}
    for name, scores in (baselines or {}).items():
        against = _verdict(paired_difference(scores[key], trained[key], weights, higher), higher)
        line += f" {words[against]} the {name} baseline ({_number(value(scores))})."
    return {
        "line": line,
        "better_rows": found["better_rows"],
        f"{tested}_difference": found["difference"],
        f"{tested}_difference_ci95": found["difference_ci95"],
        f"{tested}_difference_p_value": found["p_value"],
    }


def write_card(folder: str | Path, **facts) -> Path:
    """README.md of a run folder: `model_card` with loss.png embedded where the folder has one."""
    path = Path(folder) / "README.md"
    _replace(path, model_card(**facts, loss_plot=(Path(folder) / "loss.png").is_file()).encode("utf8"))
    return path


def model_card(
    *,
    title: str,
    base_model: str | None,
    hub_base: str | None,
    dataset: str,
    license: str | None,
    library: str,
    pipeline: str,
    metrics: dict,
    line: str,
    training: dict,
    preflight: dict,
    samples: list[dict],
    usage: str,
    limits: str,
    more_data: dict[str, str] | None = None,
    loss_plot: bool = True,
) -> str:
    """A model card that huggingface_hub's own classes read back, each test metric an `EvalResult`.

    Args:
        base_model: as the user named it (a `pypi:` name, a folder, a Hub id); None: trained from scratch.
        hub_base: Hub id of the base, None where it has none. Only this becomes `base_model:` in the metadata.
        dataset: as the user named it; in the metadata only if it is a Hub id.
        license: inherited from the base, a Hub licence id; None stays unknown.
        library: "peft" for an adapter, else "transformers".
        metrics: all_results.json. `test_<m>`, `base_<m>`, `baseline_<m>` or `baseline_<name>_<m>`, each with or
            without its `*_ci95`; times and counts are left out.
        line: of `did_it_help`.
        training: facts in the order to show; `command` repeats the run.
        preflight: what was found before the first step.
        samples: of `write_samples`; the first five are shown.
        usage: Python code. limits: Markdown of the task.
        more_data: by metric, the data set that it was measured on where that is not `dataset`; these were trained on too.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    title = " ".join(_redact(title).split())
    license = license.lower() if license and re.fullmatch(r"[\w.-]+", license) else None
    more_data = more_data or {}
    all_data = list(dict.fromkeys([dataset, *more_data.values()]))
    shown = {name: name if _is_hub_id(name) else _local_name(name) for name in all_data}
    names = _test_metrics(metrics)
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=re.sub(r"[^\w./-]+", "-", shown[more_data.get(name, dataset)]),
            dataset_name=shown[more_data.get(name, dataset)],
            dataset_split="test",
            metric_type=METRICS.get(name, (name, ""))[0],
            metric_name=_metric_name(name).split(",")[0],
            metric_value=round(float(metrics[f"test_{name}"]), 4),
        )
        for name in names
    ]
    data = ModelCardData(
        base_model=hub_base.partition("@")[0] if hub_base and _is_hub_id(hub_base) else None,
        datasets=[name.partition("@")[0] for name in all_data if _is_hub_id(name)] or None,
        eval_results=results or None,
        library_name=library,
        license=license,
        model_name=title,
        pipeline_tag=pipeline,
        tags=["lm-taskbook"],
    )
    base_name = base_model and (base_model if _is_hub_id(base_model) else _local_name(base_model))
    kind = "Adapter for" if library == "peft" else "Model fine-tuned from"
    start = f"{kind} `{base_name}`, trained on" if base_name else "Model trained from scratch on"
    command = without_paths(str(training.get("command", "")))
    facts = {name: value for name, value in training.items() if name != "command"}
    facts["packages"] = ", ".join([f"Python {platform.python_version()}", *_versions()])
    licence = f"`{license}`" + (", inherited from the base model." if base_name else ".") if license else "Unknown."
    if hub_base and _is_hub_id(hub_base):
        licence += f" Its terms: https://huggingface.co/{hub_base.partition('@')[0]}"
    sections = [
        f"# {_inline(title)}",
        f"{start} {', '.join(f'`{name}`' for name in shown.values())} with LM Taskbook.",
        f"**{_redact(line)}**",
        "## Results on the test split",
        _metrics_table(names, metrics, scratch=base_model is None),
        "In parentheses: 95 % bootstrap intervals over rows.",
        "![Training and validation loss by step](loss.png)" if loss_plot else "",
        "## How to use it",
        _fence(_redact(usage), "python"),
        "## How it was trained",
        _fence(command, "bash") if command else "",
        _facts_table(facts),
        "## Checked before the first step" if preflight else "",
        _facts_table(preflight) if preflight else "",
        "## Samples from the test split" if samples else "",
        *(_sample(number, sample) for number, sample in enumerate(samples[:5], start=1)),
        "## Limits",
        _redact(limits),
        "## Licence",
        licence,
    ]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in sections if part) + "\n"
    ModelCard(content)  # fails here and not on the Hub
    return content


def quote(text: str, most: int = 500) -> str:
    """Text of a model or a user as an inert Markdown blockquote of at most `most` characters and 12 lines.

    It renders as it reads: no HTML, link, image, heading, list, table, fence or formula comes out of it.
    """
    text = _redact(str(text)).strip("\n")
    if not text.strip():
        return "> *(nothing)*"
    lines = text[:most].splitlines()
    if len(text) > most or len(lines) > 12:
        lines = lines[:12]
        lines[-1] += " …"
    # Trailing backslash: a line break inside a paragraph. Blank lines part paragraphs themselves.
    shown = [_escape(line) for line in lines]
    broken = [line + "\\" if line and after else line for line, after in zip(shown, [*shown[1:], ""], strict=True)]
    return "\n".join(f"> {line}".rstrip() for line in broken)


def _sample(number: int, sample: dict) -> str:
    prompt = sample["prompt"]
    if not isinstance(prompt, str):
        turns = [
            turn["content"] if isinstance(turn["content"], str) else json.dumps(turn["content"]) for turn in prompt
        ]
        prompt = "\n".join(f"{turn['role']}: {text}" for turn, text in zip(prompt, turns, strict=True))
    shown = (("Prompt", prompt), ("Before", sample.get("base")), ("After", sample.get("trained")))
    shown += (("Reference", sample.get("reference")),)
    parts = [f"{who}:\n\n{quote(text)}" for who, text in shown if text is not None]
    at = f", temperature {sample['temperature']}" if "temperature" in sample else ""
    return "\n\n".join([f"**Sample {number}**{at}", *parts])


def _escape(line: str) -> str:
    """One line of text as Markdown that renders as that line."""
    line = line.replace("\t", "    ")
    indent = len(line) - len(line.lstrip(" "))
    line = line.strip()
    line = re.sub(r"([\\`*_\[\]#|~$^])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    line = line.replace("@", "&#64;").replace("://", "&#58;//")  # GitHub and the Hub link bare addresses and names
    line = re.sub(r"\bwww\.", "www&#46;", line, flags=re.I)
    line = re.sub(r"^([-+=:])", r"\\\1", line)
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)
    return "&nbsp;" * indent + line  # four spaces would make it a code block


def _inline(text) -> str:
    return _escape(" ".join(_redact(str(text)).split()))


def _fence(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.strip()}\n{marks}"


def _facts_table(facts: dict) -> str:
    rows = []
    for name, value in facts.items():
        value = (
            _number(value)
            if isinstance(value, float) and abs(value) >= 0.01
            else f"{value:,}"
            if type(value) is int
            else value
        )
        rows.append(f"| {_inline(name.replace('_', ' '))} | {_inline(without_paths(str(value)))} |")
    return "\n".join(["| | |", "|---|---|", *rows])


def _metrics_table(names: list[str], metrics: dict, scratch: bool) -> str:
    """Columns: before training, each trivial baseline that has a value, after training."""
    baselines = []
    for key in metrics:
        for name in names:
            if key.startswith("baseline_") and (key == f"baseline_{name}" or key.endswith(f"_{name}")):
                prefix = key.removesuffix(name)
                baselines += [] if prefix in baselines else [prefix]
    columns = {"base_": "before training" if scratch else "base model"}
    columns |= {prefix: _inline(prefix.replace("_", " ").strip()) for prefix in baselines} | {"test_": "**this model**"}
    columns = {
        prefix: title for prefix, title in columns.items() if any(f"{prefix}{name}" in metrics for name in names)
    }
    rows = [f"| | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    for name in names:
        cells = (_cell(metrics.get(f"{prefix}{name}"), metrics.get(f"{prefix}{name}_ci95")) for prefix in columns)
        rows.append(f"| {_inline(_metric_name(name))} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(value, interval) -> str:
    if value is None:
        return ""
    return _number(value) + (f" ({_number(interval[0])} to {_number(interval[1])})" if interval else "")


def _test_metrics(metrics: dict) -> list[str]:
    names = [
        key.removeprefix("test_")
        for key, value in metrics.items()
        if key.startswith("test_") and not key.endswith(NOT_METRICS) and isinstance(value, (int, float, np.number))
    ]
    order = list(METRICS)
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _metric_name(name: str) -> str:
    return METRICS.get(name, ("", name.replace("_", " ").capitalize()))[1]


def _verdict(found: dict, higher_is_better: bool) -> str:
    low, high = found["difference_ci95"]
    if found["rows"] < FEW_ROWS or low <= 0 <= high:
        return "Not clearly"
    return "Yes" if (low > 0) == higher_is_better else "No"


def _number(value: float, beside: list[float] | None = None) -> str:
    """About three significant digits; as many decimals as the smallest of the numbers `beside` it needs."""
    size = min((abs(x) for x in beside or [value] if x), default=1)
    decimals = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.01 else 5
    return f"{value:,.{decimals}f}"


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # a task may not need it
            continue
    return found


def _is_hub_id(name: str) -> bool:
    """Whether `org/name`, or an old name without an owner, can be on the Hub; a path or a file name can not."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    repo = name.partition("@")[0]
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    suffix = Path(repo.removesuffix(".gz")).suffix
    return not Path(repo).exists() and suffix not in (".jsonl", ".json", ".csv", ".parquet", ".txt")


def _local_name(name: str) -> str:
    """A `pypi:` or `docs:` name as it is; of a path only its last part, the rest tells about this machine."""
    last = name if re.match(r"\w{2,}:\w", name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return " ".join(_redact(last).replace("`", "'").split()) or "local"


def _redact(text: str) -> str:
    """Text without Hub tokens, without this machine's folders, without characters that do not show."""
    folders = {os.getcwd(): ".", str(Path.home()): "~", tempfile.gettempdir(): "...", sys.prefix: "..."}
    for folder in sorted(folders, key=len, reverse=True):
        if folder.count(os.sep) and folder != os.sep:
            text = re.sub(re.escape(folder) + r"(?![\w-])", lambda _, short=folders[folder]: short, text)
    return UNSEEN.sub("", TOKEN.sub("hf_***", text))


def without_paths(text: str) -> str:
    """As `_redact`; also without secret flags, and of each absolute path only the last part. For commands and facts."""
    text = SECRET_FLAG.sub(r"\1 ***", _redact(text))

    def last_part(found: re.Match) -> str:
        mark = found[1] or ""
        return mark + ".../" + re.split(r"[/\\]", found[0].strip("\"'").rstrip("/\\"))[-1] + mark

    return ABSOLUTE_PATH.sub(last_part, text)


def _plain(value, place: str):
    """The value with numpy's numbers turned into Python's; UserError for one that is not finite, by its key."""
    if isinstance(value, dict):
        return {str(key): _plain(entry, f"{place}: {key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(entry, f"{place}[{i}]") for i, entry in enumerate(value)]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{place} is {value}: training diverged, or fp16 overflowed. Lower --learning_rate, or leave out --fp16."
        )
    return value


def _replace(path: str | Path, content: bytes) -> None:
    """Writes beside the file, then renames: a reader, or a run that is killed, finds the old file or the new one."""
    path = Path(path)
    staged = path.with_name(f".{path.name}")
    staged.write_bytes(content)
    os.replace(staged, path)
