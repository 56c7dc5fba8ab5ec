"""What a run leaves beside the model: results, loss curve, samples, model card. Called by each task at its end."""

import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np

from shared.metrics import bootstrap_ratio, ci95

SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def write_json(path: str | Path, content) -> None:
    """Writes JSON so that the file is whole or absent. Raises ValueError on NaN: a metric that is none must not look like one."""
    path = Path(path)
    staged = path.with_name(f".{path.name}")
    staged.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf8")
    os.replace(staged, path)


def write_samples(path: str | Path, samples: list[dict]) -> None:
    """samples.jsonl: `prompt`, `base`, `trained`, `reference` in each row."""
    with open(path, "w", encoding="utf8") as lines:
        lines.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)


def plot_loss(log_history: list[dict], path: str | Path) -> None:
    """loss.png from `trainer.state.log_history`: training loss at each log, validation loss at each evaluation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), dpi=100)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axis.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def did_it_help(base: dict, trained: dict) -> dict:
    """Compares two models on the same rows.

    Args:
        base, trained: `{"nll": [...], "tokens": [...]}`, a row each, in the same order.

    Returns:
        `line` for people, `loss_difference`, its paired bootstrap `loss_difference_ci95` (Koehn 2004), `better_rows` (share).
    """
    nll = np.stack([base["nll"], trained["nll"]], axis=1)
    tokens = np.asarray(trained["tokens"])
    before, after = nll.sum(0) / tokens.sum()
    low, high = ci95(np.diff(bootstrap_ratio(nll, tokens), axis=1))
    better = float(np.mean(nll[:, 1] < nll[:, 0]))
    change = np.exp(after - before) - 1
    verdict = "Yes" if high < 0 else "No" if low > 0 else "Not clearly"
    line = (
        f"Did it help? {verdict}: test perplexity {np.exp(before):.2f} -> {np.exp(after):.2f} ({change:+.1%}, 95 % interval "
        f"{np.exp(low) - 1:+.1%} to {np.exp(high) - 1:+.1%}); better on {better:.0%} of {len(tokens)} rows."
    )
    return {
        "line": line,
        "loss_difference": float(after - before),
        "loss_difference_ci95": [low, high],
        "better_rows": better,
    }


def quote(text: str, most: int = 400) -> str:
    """Text from a model or a user as an inert markdown blockquote: no HTML, no links, no images, no headings, no fences."""
    text = text if len(text) <= most else text[:most] + " …"
    text = re.sub(r"([\\`*_\[\]<>#|~!-])", r"\\\1", text.replace("&", "&amp;")).replace("\\<", "&lt;").replace("\\>", "&gt;")
    return "\n".join(f"> {line}" for line in text.splitlines()) or "> (nothing)"


def write_card(
    folder: str | Path,
    *,
    title: str,
    base_model: str,
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
) -> None:
    """README.md of the output folder: a model card whose metrics are `EvalResult`s, valid by huggingface_hub's own classes.

    Args:
        hub_base: Hub id of the base model, None where it has none.
        license: inherited from the base; None stays unknown.
        metrics: `test_*` and `base_*` values; a `*_ci95` is shown beside its value.
        training: facts about the run, shown as they are; `command` repeats it.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    names = [key.removeprefix("test_") for key in metrics if key.startswith("test_") and isinstance(metrics[key], float)]
    kinds = {"perplexity": "perplexity", "accuracy": "accuracy", "loss": "loss"}
    data = ModelCardData(
        license=license,
        library_name=library,
        pipeline_tag=pipeline,
        base_model=hub_base,
        datasets=[dataset] if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else None,
        tags=["lm-taskbook"],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type=pipeline,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split="test",
                metric_type=kinds.get(name, name),
                metric_name=f"test {name}",
                metric_value=round(metrics[f"test_{name}"], 4),
            )
            for name in names
        ],
    )

    def cell(key):
        interval = metrics.get(f"{key}_ci95")
        return (f"{metrics[key]:.3f}" if key in metrics else "") + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")

    table = "\n".join(f"| {name} | {cell(f'base_{name}')} | {cell(f'test_{name}')} |" for name in names)
    talk = "\n\n".join(
        "\n\n".join(f"**{who}**\n\n{quote(sample[key])}" for who, key in _speakers(sample)) for sample in samples
    )
    facts = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in training.items() if key != "command")
    checks = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in preflight.items())
    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "datasets"))
    body = f"""
# {title}

{base_model} fine-tuned on {dataset}.

**{line}**

| test split | before | after |
|---|---|---|
{table}

In parentheses: 95 % bootstrap intervals over rows.

![loss](loss.png)

## Use

```python
{usage}
```

## Training

```
{training["command"]}
```

{facts}
- packages: {packages}

## What was checked before the first step

{checks}

## Replies before and after

{talk}

## Limits

{limits}
"""
    content = SECRET.sub("hf_***", f"---\n{data.to_yaml()}\n---\n{body}")
    ModelCard(content).save(Path(folder) / "README.md")


def _speakers(sample: dict) -> list[tuple[str, str]]:
    names = (("Prompt", "prompt"), ("Before", "base"), ("After", "trained"), ("Reference", "reference"))
    return [(who, key) for who, key in names if key in sample]
