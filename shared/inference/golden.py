"""The golden set of an exported model: a few prompts and what the model made of them, kept beside it. Used by model.py and
shared/export/measure.py.
"""

import json
from pathlib import Path

from shared import UserError
from shared.publish.hub import EXPORT
from shared.publish.results import file_digest

GOLDEN = "golden.json"
GOLDEN_TOKENS = 6  # of each output in it
SAME = 0.9  # share of golden outputs that must repeat: another CPU rounds otherwise, and a near tie may then flip


def formats(folder: Path) -> set[str]:
    """The formats with a golden set that an export lists; of one that was interrupted, and lists nothing, all.

    One that is not listed may be of another model: a repository on the Hub keeps what is no longer pushed.

    Raises:
        UserError: a damaged export.json.
    """
    found = {path.parent.name for path in folder.glob(f"*/{GOLDEN}")}
    if not (folder / EXPORT).is_file():
        return found
    try:
        return found & set(json.loads((folder / EXPORT).read_text("utf8"))["artifacts"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder / EXPORT}: lists no formats ({type(error).__name__}: {error}). Export again."
        ) from error


def verify(model) -> None:
    """Compares a `model.Model` with the golden set of its folder: the files are those that were exported, prompts are
    tokenized and rendered as before, and the outputs are the same.

    Raises:
        UserError: no golden set; a file that has changed since; other token ids of a prompt; other stop tokens; more than a
            tenth of other outputs.
    """
    path = model.folder / GOLDEN
    golden = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    if not golden:
        raise UserError(f"{model.folder}: no {GOLDEN}, so nothing to compare with; shared/export/export.py writes one.")
    if sorted(model.stop_ids) != sorted(golden["stop_ids"]):
        raise UserError(
            f"{model.folder}: texts end at token {list(model.stop_ids)}, at export at {golden['stop_ids']}."
        )
    try:
        _repeat(model, golden["items"])
    except UserError:
        raise
    except Exception as error:  # a template's or a tokenizer's own, for a file that is damaged
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise UserError(
            f"{model.folder}: its golden prompts cannot be read any more ({type(error).__name__}: {reason}). Export again."
        ) from error
    # A flipped bit in a weight mostly changes none of these outputs
    for name, digest in golden.get("sha256", {}).items():
        if not (model.folder / name).is_file() or file_digest(model.folder / name) != digest:
            raise UserError(f"{model.folder}: {name} is not the file that was exported. Export again.")


def _repeat(model, items: list[dict]) -> None:
    for item in items:
        if model.prompt_ids(item["prompt"]) != item["input_ids"]:
            raise UserError(
                f"{model.folder}: the tokenizer or its template has changed: other tokens for {str(item['prompt'])[:60]!r}."
            )
    outputs = golden_outputs(model, [item["prompt"] for item in items])
    same = sum(out == item["output"] for out, item in zip(outputs, items, strict=True))
    if same < SAME * len(items):
        raise UserError(
            f"{model.folder}: only {same} of {len(items)} golden outputs are repeated: the weights or a library have changed. "
            "Export again and compare."
        )


def golden_outputs(model, prompts: list) -> list:
    """What a model makes of golden prompts: token ids, or a place in the context. One by one: padding rounds otherwise."""
    if model.task == "text-generation":
        return [model.generate([model.prompt_ids(p)], max_new_tokens=GOLDEN_TOKENS)[0] for p in prompts]
    if model.task == "fill-mask":
        return [[guess["token"] for guess in model.fill(p)][:1] for p in prompts]
    if model.task == "text-classification":
        return [[model.classify([p])[0][0]["label"]] for p in prompts]
    if model.task == "summarization":
        return [model.summary_ids([p], GOLDEN_TOKENS)[0] for p in prompts]
    found = [model.answer(p["question"], p["context"], cut=True) for p in prompts]
    return [[a["start"], a["end"]] for a in found]
