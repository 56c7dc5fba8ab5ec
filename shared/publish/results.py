"""What a run leaves beside the model: results, loss curve, samples. Called by each task at its end."""

import hashlib
import io
import json
import math
import os
from pathlib import Path

import numpy as np

from shared import UserError
from shared.publish.redact import TOKEN


def write_json(path: str | Path, content) -> None:
    """Writes JSON with sorted keys, whole or not at all.

    Raises:
        UserError: NaN or infinity, named by its key: a result that is none must not look like one.
    """
    content = _plain(content, Path(path).name)
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    replace_file(path, text.encode("utf8", "backslashreplace"))


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
    replace_file(path, "".join(lines).encode("utf8", "backslashreplace"))


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
    replace_file(path, small.getvalue())
    return True


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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: str | Path, content: bytes) -> None:
    """Writes beside the file, then renames: a reader, or a run that is killed, finds the old file or the new one."""
    path = Path(path)
    staged = path.with_name(f".{path.name}")
    staged.write_bytes(content)
    os.replace(staged, path)
