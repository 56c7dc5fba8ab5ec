"""One table of many runs; two of them in detail.

    python -m shared.compare outputs/*
    python -m shared.compare outputs/chat_sft outputs/other --output compare.md --html compare.html

Reads what each run left (all_results.json, scores.json, run.yaml, samples.jsonl), of the Hub's runs by name, too. Nothing is
loaded or measured again.
"""

import argparse
import base64
import difflib
import hashlib
import html
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from shared import UserError
from shared.compare.readme import fill
from shared.metrics import paired_difference
from shared.publish.compare import FEW_ROWS, short_number
from shared.publish.hub import pull
from shared.publish.results import replace_file

# Metric of all_results.json: its title, and whether more is better.
COLUMNS = {
    "perplexity": ("Perplexity", False),
    "bits_per_byte": ("Bits per byte", False),
    "bleu": ("BLEU", True),
    "rougeL": ("ROUGE-L", True),
    "f1": ("F1", True),
    "exact_match": ("EM", True),
    "accuracy": ("Accuracy", True),
    "macro_f1": ("Macro-F1", True),
    "margin": ("Margin", True),
    "mrr": ("MRR", True),
    "recall_at_5": ("Recall at 5", True),
}
BY_TOKEN = ("perplexity", "accuracy", "margin")  # of language models: numbers of different tokenizers are not compared
PART_OF_A_METRIC = (
    "macro",
    "has_answer",
    "no_answer",
    "best",
    "named",
    "document",
)  # no baseline's name: `baseline_macro_f1` is no F1
LANGUAGE_MODELS = ("bits_per_byte", "perplexity")
BY_PASSAGES = ("mrr", "recall_at_5")  # the more passages are searched, the harder is each to find


def read_run(name: str) -> dict:
    """What a run left, by its folder or its name on the Hub.

    Returns:
        `name`, `folder`, `results` (all_results.json), `rows` (hash of its test rows, None for a run of an older version),
        `tokenizer` (hash) and `weights` (of its test rows in scores.json: how many tokens of each were scored).

    Raises:
        UserError: no such run, or it is not finished.
    """
    folder = Path(name) if Path(name).is_dir() else pull(name, weights=False)
    if not (folder / "all_results.json").is_file():
        raise UserError(f"{name}: no all_results.json; a run writes it at its end.")
    results = _content(folder / "all_results.json")
    # Without what is no part of it: to how many tokens the run cut and filled up its rows
    tokenizer = {**_content(folder / "tokenizer.json"), "truncation": None, "padding": None}
    digest = hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest()
    return {
        "name": Path(os.path.abspath(name)).name if Path(name).is_dir() else name,
        "folder": folder,
        "results": results,
        "rows": results.get("run", {}).get("test_rows_sha256"),
        "tokenizer": digest if (folder / "tokenizer.json").is_file() else None,
        "weights": _scores(folder).get("weight"),
    }


def told_apart(runs: list[dict]) -> list[dict]:
    """The runs, each folder once; those of one name get as much of their path as they differ in."""
    runs = list({run["folder"].resolve(): run for run in runs}.values())
    for depth in range(2, max(len(run["folder"].resolve().parts) for run in runs)):
        names = [run["name"] for run in runs]
        for run in runs:
            if names.count(run["name"]) > 1:
                run["name"] = "/".join(run["folder"].resolve().parts[-depth:])
    return runs


def best_of(runs: list[dict]) -> set[tuple[Path, str]]:
    """(folder, metric) that are the best of several runs on the same test rows; what is counted by token wants one tokenizer,
    and as many tokens of each row: a smaller --max_length scores the beginnings alone.
    """
    best = set()
    for metric, (_, higher) in COLUMNS.items():
        groups = {}
        for run in runs:
            value = run["results"].get(f"test_{metric}")
            rows = run["results"].get("metric_rows_sha256", {}).get(metric, run["rows"])
            key = (rows, run["results"].get("test_rows"), *_unit(run, metric))
            if value is not None and run["rows"] and not (_by_token(run, metric) and not run["tokenizer"]):
                groups.setdefault(key, []).append((value, run["folder"]))
        for group in groups.values():
            if len(group) > 1:
                most = (max if higher else min)(value for value, _ in group)
                best |= {(folder, metric) for value, folder in group if value == most}
    return best


def _by_token(run: dict, metric: str) -> bool:
    return metric in BY_TOKEN and any(f"test_{each}" in run["results"] for each in LANGUAGE_MODELS)


def _unit(run: dict, metric: str) -> tuple:
    """What else but the rows is the same for numbers that can be compared: tokens, or the passages that were searched."""
    results = run["results"]
    tokens = (run["tokenizer"], str(run["weights"]), results.get("test_tokens")) if _by_token(run, metric) else None
    passages = [results.get(each) for each in ("documents", "passages")] if metric in BY_PASSAGES else ()
    return tokens, *passages


def table(runs: list[dict]) -> list[list[str]]:
    """Header and a row for each run, by task: each metric with its interval, before training and trivial baselines behind it."""
    runs = sorted(runs, key=lambda run: (run["results"].get("run", {}).get("task", ""), run["name"]))
    metrics = [metric for metric in COLUMNS if any(f"test_{metric}" in run["results"] for run in runs)]
    best = best_of(runs)
    header = ["Model", "Task", "Data", *(COLUMNS[metric][0] for metric in metrics)]
    rows = [[*header, "Training", "Memory", "Hardware", "Date"]]
    for run in runs:
        results = run["results"]
        about = results.get("run", {})
        cells = []
        for metric in metrics:
            cell = _cell(results, metric)
            cells.append(f"**{cell}**" if (run["folder"], metric) in best else cell)
        from_ = f" (from {about['model']})" if about.get("model") else ""
        minutes, memory = results.get("train_minutes"), results.get("peak_memory_gb")
        rows.append(
            [
                run["name"] + from_,
                about.get("task", ""),
                about.get("data", ""),
                *cells,
                "" if minutes is None else f"{minutes:.1f} min",
                "" if memory is None else f"{memory:.1f} GB",
                about.get("hardware", ""),
                about.get("date", ""),
            ]
        )
    return rows


def _cell(results: dict, metric: str) -> str:
    value = results.get(f"test_{metric}")
    if value is None:
        return ""
    text, interval = short_number(value), results.get(f"test_{metric}_ci95")
    text += f" ({short_number(interval[0])} to {short_number(interval[1])})" if interval else ""
    others = {"before": results.get(f"base_{metric}")}
    for key, found in results.items():
        if key.startswith("baseline_") and key.endswith(metric):
            name = key.removeprefix("baseline_").removesuffix(metric).strip("_")
            if not name.endswith(PART_OF_A_METRIC):
                others[name.replace("_", " ") or "baseline"] = found
    return "; ".join([text, *(f"{name} {short_number(found)}" for name, found in others.items() if found is not None)])


def markdown(rows: list[list[str]]) -> str:
    """The table in Markdown; text of runs stays text. With fewer escapes than a card: it is read in a terminal, too."""
    lines = [[re.sub(r"([\\|<`])", r"\\\1", str(cell)).replace("\n", " ") for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def differences(one: dict, other: dict) -> list[str]:
    """Of two runs, in lines of Markdown: options that differ, a paired test on the same rows, samples that changed."""
    lines = []
    settings = [_settings(run["folder"]) for run in (one, other)]
    for key in sorted({*settings[0], *settings[1]}):
        values = [each.get(key) for each in settings]
        if values[0] != values[1] and key != "output_dir":
            lines.append(f"- `{key}`: {values[0]} in {one['name']}, {values[1]} in {other['name']}")
    lines.append(f"- {_paired(one, other)}")
    samples = [_samples(run["folder"]) for run in (one, other)]
    prompts = {_drawn(sample): sample["trained"] for sample in samples[0]}
    for sample in samples[1]:
        before = prompts.get(_drawn(sample))
        if before is not None and before != sample["trained"]:
            for who, text in (
                (f"asked{_warmth(sample)}", _asked(sample)),
                (one["name"], before),
                (other["name"], sample["trained"]),
            ):
                lines.append(f"- {who}: {' '.join(text.split())[:200]}")
    return lines


def _drawn(sample: dict) -> str:
    """What a sample was drawn for: runs of pretrain_gpt2 go on from each prompt at several temperatures."""
    return json.dumps([sample["prompt"], sample.get("temperature")])


def _warmth(sample: dict) -> str:
    return f" at temperature {sample['temperature']}" if "temperature" in sample else ""


def _content(path: Path, parse=json.loads, kind: type = dict):
    """What stands in a file of a run; nothing where it has none.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = parse(path.read_text("utf8")) if path.is_file() else kind()
        if not isinstance(content, kind):
            raise ValueError(f"expected a {kind.__name__}")
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not readable ({' '.join(str(error).split())}).") from error
    return content


def _settings(folder: Path) -> dict:
    return _content(folder / "run.yaml", lambda text: yaml.safe_load(text) or {})


def _scores(folder: Path) -> dict:
    return _content(folder / "scores.json")


def _samples(folder: Path) -> list[dict]:
    def parse(text: str) -> list[dict]:  # splitlines would break in a sample at U+2028
        samples = [json.loads(line) for line in text.split("\n") if line]
        return [sample | {key: sample[key] for key in ("prompt", "trained")} for sample in samples]

    return _content(folder / "samples.jsonl", parse, list)


def _asked(sample: dict) -> str:
    """The prompt of a sample, of a conversation its last turn."""
    prompt = sample["prompt"]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _paired(one: dict, other: dict) -> str:
    """One line: whether `other` is better than `one`, row by row, where they were scored on the same rows."""
    scores = [_scores(run["folder"]) for run in (one, other)]
    if not all(scores) or one["rows"] != other["rows"] or len(scores[0]["score"]) != len(scores[1]["score"]):
        return "no paired test: they were not scored on the same rows"
    if not one["rows"]:
        return "no paired test: whether they were scored on the same rows is unknown, the runs are of an older version"
    metric = scores[0]["metric"]
    if metric != scores[1]["metric"] or _unit(one, metric)[0] != _unit(other, metric)[0]:
        return "no paired test: another metric, another tokenizer, or rows cut at another length"
    if _unit(one, metric) != _unit(other, metric):
        return "no paired test: not as many passages were searched"
    found = paired_difference(scores[0]["score"], scores[1]["score"], scores[0]["weight"], metric != "perplexity")
    low, high = found["difference_ci95"]
    clear = "clear" if low > 0 or high < 0 else "not clear, the interval includes zero"
    if found["rows"] < FEW_ROWS:
        clear = f"not clear, fewer than {FEW_ROWS} rows show nothing"
    return (
        f"paired test over {found['rows']:,} rows: {other['name']} is better on {found['better_rows']:.0%}; difference in "
        f"{'loss' if metric == 'perplexity' else metric} {short_number(low, [low, high])} to {short_number(high, [low, high])} "
        f"(95 %): {clear}"
    )


def report(runs: list[dict], detail: Iterable[str] = ()) -> str:
    """One HTML file that needs no other: the table, of each run its loss curve, what was checked, samples before and after."""
    parts = [_html_table(table(runs)), *(f"<p>{html.escape(line)}</p>" for line in detail)]
    for run in runs:
        parts.append(f"<h2>{html.escape(run['name'])}</h2><p>{html.escape(run['results'].get('line', ''))}</p>")
        if (curve := run["folder"] / "loss.png").is_file():
            parts.append(
                f'<img alt="loss" src="data:image/png;base64,{base64.b64encode(curve.read_bytes()).decode()}">'
            )
        if facts := _content(run["folder"] / "preflight.json"):
            parts.append(_html_table([["Checked before the first step", ""], *([k, v] for k, v in facts.items())]))
        for sample in _samples(run["folder"])[:10]:
            before, after = str(sample.get("base") or ""), str(sample.get("trained") or "")
            shown = (
                (f"Prompt{html.escape(_warmth(sample))}", html.escape(_asked(sample)[:2000])),
                ("Before", html.escape(before)),
                ("After", _marked(before, after)),
            )
            parts += [f"<p><b>{who}</b><br>{text}</p>" for who, text in shown] + ["<hr>"]
    style = (
        "body{font:16px/1.5 sans-serif;margin:2em auto;max-width:70em;padding:0 1em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top}mark{background:#cfe8cf}"
        "img{max-width:100%}p{white-space:pre-wrap}"
    )
    body = "\n".join(parts)
    return f'<!doctype html><meta charset="utf-8"><title>LM Taskbook</title><style>{style}</style>\n{body}\n'


def _html_table(rows: list[list]) -> str:
    def cell(text, tag: str) -> str:
        shown = re.sub(r"^\*\*(.*)\*\*$", r"<b>\1</b>", html.escape(str(text)))
        return f"<{tag}>{shown}</{tag}>"

    head, *body = rows
    lines = ["".join(cell(each, "th") for each in head), *("".join(cell(each, "td") for each in row) for row in body)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _marked(before: str, after: str) -> str:
    """`after` as HTML, its words that are not in `before` at that place marked."""
    words = [re.findall(r"\s+|\S+", text) for text in (before, after)]
    parts = []
    for what, _, _, start, end in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        text = html.escape("".join(words[1][start:end]))
        parts.append(text if what == "equal" else f"<mark>{text}</mark>" if text else "")
    return "".join(parts)


def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(
        prog="python -m shared.compare",
        description="One table of many runs, by task; the best is marked on the same test rows only. Two are compared in detail.",
    )
    parser.add_argument("runs", nargs="+", help="finished runs: folders such as outputs/*, or names on the Hub")
    parser.add_argument("--output", type=Path, help="write the table as Markdown here, too")
    parser.add_argument("--html", type=Path, help="write one HTML file with curves and samples, which can be mailed")
    parser.add_argument(
        "--readme", nargs="+", type=Path, default=[], help="write the runs' figures into the table of these"
    )
    options = parser.parse_args(argv)
    try:
        many = [name for name in options.runs if not Path(name).exists() or (Path(name) / "all_results.json").is_file()]
        if not many:
            raise UserError(f"{options.runs[0]}: no all_results.json; a run writes it at its end.")
        for name in sorted(set(options.runs) - set(many)):
            print(f"left out: {name}, which holds no finished run", file=sys.stderr)
        runs = told_apart([read_run(name) for name in dict.fromkeys(many)])
        detail = differences(*runs) if len(runs) == 2 else []
        # What models wrote stays text: no tag, no link, no picture
        lines = (re.sub(r"[\\<]|(?<=\])\(", r"\\\g<0>", line) for line in detail)
        text = markdown(table(runs)) + "".join(f"\n{line}" for line in lines) + ("\n" if detail else "")
        print(text, end="")
        try:
            for path, content in ((options.output, text), (options.html, options.html and report(runs, detail))):
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    replace_file(path, content.encode("utf8", "backslashreplace"))
            filled = {path: fill(path.read_text("utf8"), runs) for path in options.readme}
            for path, content in filled.items():
                replace_file(path, content.encode("utf8"))
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; name another file.") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
