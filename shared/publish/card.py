"""The model card, in which text from models and data stays text. Called by each task at its end."""

import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from shared.data.files import READERS, kind_of
from shared.publish.compare import short_number
from shared.publish.redact import redact, without_paths
from shared.publish.results import replace_file

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")

# Metric in all_results.json: (Hub's metric type, name in the card).
METRICS = {
    "loss": ("loss", "Loss (nats), lower is better"),
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
    "mrr": ("mrr", "Mean reciprocal rank"),
    "recall_at_1": ("recall", "Right passage first"),
    "recall_at_5": ("recall", "Right passage among the first 5"),
    "recall_at_10": ("recall", "Right passage among the first 10"),
    "document_recall_at_1": ("recall", "Right document first"),
    "document_recall_at_5": ("recall", "Right document among the first 5 passages"),
    "document_recall_at_10": ("recall", "Right document among the first 10 passages"),
    "fused_mrr": ("mrr", "Mean reciprocal rank, together with BM25"),
    "fused_recall_at_1": ("recall", "Right passage first, together with BM25"),
    "fused_recall_at_5": ("recall", "Right passage among the first 5, together with BM25"),
    "fused_recall_at_10": ("recall", "Right passage among the first 10, together with BM25"),
    "margin": ("margin", "Margin of chosen over rejected replies (nats per token)"),
}
NOT_METRICS = ("_ci95", "_threshold", "_rows", "_tokens", "_samples", "_runtime", "_seconds", "_per_second", "_time")


def write_card(folder: str | Path, **facts) -> Path:
    """README.md of a run folder: `model_card` with loss.png embedded where the folder has one."""
    path = Path(folder) / "README.md"
    replace_file(path, model_card(**facts, loss_plot=(Path(folder) / "loss.png").is_file()).encode("utf8"))
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

    title = " ".join(redact(title).split())
    license = license.lower() if license and re.fullmatch(r"[\w.-]+", license) else None
    more_data = more_data or {}
    all_data = list(dict.fromkeys([dataset, *more_data.values()]))
    shown = {name: shown_name(name) for name in all_data}
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
    base_name = base_model and shown_name(base_model)
    kind = "Adapter for" if library == "peft" else "Model fine-tuned from"
    start = f"{kind} `{base_name}`, trained on" if base_name else "Model trained from scratch on"
    command = without_paths(str(training.get("command", "")))
    facts = {name: value for name, value in training.items() if name != "command"}
    facts["packages"] = ", ".join([f"Python {platform.python_version()}", *versions()])
    licence = f"`{license}`" + (", inherited from the base model." if base_name else ".") if license else "Unknown."
    if hub_base and _is_hub_id(hub_base):
        licence += f" Its terms: https://huggingface.co/{hub_base.partition('@')[0]}"
    sections = [
        f"# {_inline(title)}",
        f"{start} {', '.join(f'`{name}`' for name in shown.values())} with LM Taskbook.",
        f"**{redact(line)}**",
        "## Results on the test split",
        _metrics_table(metrics, scratch=base_model is None),
        "In parentheses: 95 % bootstrap intervals over rows.",
        "![Training and validation loss by step](loss.png)" if loss_plot else "",
        "## How to use it",
        _fence(redact(usage).strip(), "python"),
        "## How it was trained",
        _fence(command, "bash") if command else "",
        _facts_table(facts),
        "## Checked before the first step" if preflight else "",
        _facts_table(preflight) if preflight else "",
        "## Samples from the test split" if samples else "",
        *(_sample(number, sample) for number, sample in enumerate(samples[:5], start=1)),
        "## Limits",
        redact(limits),
        "## Licence",
        licence,
    ]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in sections if part) + "\n"
    ModelCard(content)  # fails here and not on the Hub
    return content


def quote(text: str, most: int = 500) -> str:
    """Text of a model or a user as a fenced block of at most `most` characters and 12 lines: it renders as it reads."""
    text = redact(str(text)).strip("\n")
    if not text.strip():
        return "*(nothing)*"
    lines = text[:most].splitlines()
    if len(text) > most or len(lines) > 12:
        lines = lines[:12]
        lines[-1] += " …"
    return _fence("\n".join(lines), "text")


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
    """One line of text, for a heading or a cell of a table, as Markdown that renders as that line."""
    line = line.strip()
    line = re.sub(r"([\\`*_\[\]#|~$^])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    line = line.replace("@", "&#64;").replace("://", "&#58;//")  # GitHub and the Hub link bare addresses and names
    line = re.sub(r"\bwww\.", "www&#46;", line, flags=re.I)
    line = re.sub(r"^([-+=:])", r"\\\1", line)
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)
    return line


def _inline(text) -> str:
    return _escape(" ".join(redact(str(text)).split()))


def _fence(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def _facts_table(facts: dict) -> str:
    rows = []
    for name, value in facts.items():
        value = (
            short_number(value)
            if isinstance(value, float) and abs(value) >= 0.01
            else f"{value:,}"
            if type(value) is int
            else value
        )
        rows.append(f"| {_inline(name.replace('_', ' '))} | {_inline(without_paths(str(value)))} |")
    return "\n".join(["| | |", "|---|---|", *rows])


def metric_systems(metrics: dict) -> dict[str, dict[str, tuple[float, list[float] | None]]]:
    """Value and interval of each test metric of all_results.json, by system: `base`, the trivial ones (`baseline`,
    `baseline_lead1`, ...), `test`."""
    names = _test_metrics(metrics)
    found = {name: {} for name in names}
    for key, value in metrics.items():
        name = max((name for name in names if key.endswith(f"_{name}")), key=len, default=None)  # macro_f1 is no f1
        system = key.removesuffix(f"_{name}")
        if name and isinstance(value, (int, float, np.number)) and re.fullmatch("base|test|baseline(_.+)?", system):
            found[name][system] = (value, metrics.get(f"{key}_ci95"))
    return found


def _metrics_table(metrics: dict, scratch: bool) -> str:
    """Columns: before training, each trivial baseline that has a value, after training."""
    found = metric_systems(metrics)
    baselines = dict.fromkeys(system for numbers in found.values() for system in numbers if "baseline" in system)
    columns = {"base": "before training" if scratch else "base model"}
    columns |= {system: _inline(system.replace("_", " ")) for system in baselines} | {"test": "**this model**"}
    columns = {system: title for system, title in columns.items() if any(system in each for each in found.values())}
    rows = [f"| | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    for name, numbers in found.items():
        cells = (_cell(*numbers.get(system, (None, None))) for system in columns)
        rows.append(f"| {_inline(_metric_name(name))} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(value, interval) -> str:
    if value is None:
        return ""
    return short_number(value) + (f" ({short_number(interval[0])} to {short_number(interval[1])})" if interval else "")


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


def versions() -> list[str]:
    """Name and version of the packages that a result may depend on."""
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
    return not Path(repo).exists() and kind_of(Path(repo)) not in READERS


def shown_name(name: str) -> str:
    """A Hub id, a `pypi:` or a `docs:` name as it is; of a path only its last part, the rest tells about this machine."""
    if _is_hub_id(name):
        return name
    last = name if re.match(r"\w{2,}:\w", name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return " ".join(redact(last).replace("`", "'").split()) or "local"
