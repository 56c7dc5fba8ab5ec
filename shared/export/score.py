"""What an exported model is scored on, by which metric, and how much worse than the original it may be. Used by
shared/export/export.py and measure.py.
"""

import json
import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from shared import UserError, metrics
from shared.inference.model import Model

TEST_ROWS = "test.jsonl"  # what a run leaves of its test split; see shared.training.finish.finish
PROMPTS = 20  # of the golden set
ROW_TOKENS = 160  # scored of a row of a language model; the loss settles within them
MASKED_TOKENS = 128  # of a row whose words are masked
LONG_ROWS = 2  # that reach past a model's window, where its test rows do not
OWN = {"text-generation": "docs:prose", "fill-mask": "docs:prose"}
OWN |= {"question-answering": "docs:questions", "summarization": "docs:summaries"}
METRIC = {"text-generation": "perplexity", "fill-mask": "masked_accuracy", "text-classification": "accuracy"}
METRIC |= {"question-answering": "f1", "summarization": "rougeL"}
# Rows are scored until the original's 95 % interval is this wide to either side (perplexity: a share of it), or at most so many
MOST = {
    "text-generation": 8,
    "fill-mask": 48,
    "question-answering": 200,
    "summarization": 24,
    "text-classification": 200,
}
INTERVAL = {"perplexity": 0.05, "masked_accuracy": 2.0, "f1": 3.0, "rougeL": 1.0, "accuracy": 2.0}
# Of right and wrong answers: what is so in 3 of n may be in none of n by chance (rule of three), so that n wants to be large
COUNTED = ("masked_accuracy", "f1", "accuracy")
BLOCK = 8  # rows scored at once, between two looks at the interval
# How much worse than the original a format may be: a share of the perplexity, else points
LOSSES = {"perplexity": 0.01, "masked_accuracy": 0.5, "f1": 0.5, "rougeL": 0.3, "accuracy": 0.5, "macro_f1": 1.0}
INT4_PERPLEXITY = 0.05
EXACT = ("merged", "onnx", "litert")  # compute what the original computes, so that they must write what it writes
SAME_OUTPUTS = 0.95


def test_rows(folder: Path, task: str, dataset: str | None) -> tuple[list[dict], str]:
    """Rows to score, and their name: `dataset`, else the run's own test split, else documentation of the packages here.

    Args:
        dataset: as `shared.data.load.load_data` takes it, its columns named as the task names them: `text`, or `messages`;
            `question`, `context`, `answers`; `document`, `summaries` (or `summary`); `text`, `label` (a class of the model).

    Raises:
        UserError: other columns, or no rows to be had.
    """
    if dataset is None and (folder / TEST_ROWS).is_file():
        # splitlines would break in a row at U+2028
        with (folder / TEST_ROWS).open(encoding="utf8", newline="\n") as lines:
            return [json.loads(line) for line in islice(lines, MOST[task])], "the run's test split"
    from shared.data.load import load_data

    name = dataset or OWN.get(task)
    if name is None:
        raise UserError(
            f"{folder}: no {TEST_ROWS}, so nothing to score {task} on: name rows with text and label, --dataset."
        )
    data = load_data(name)
    rows = data["test"] if "test" in data else data["train"]
    # Far apart: neighbours are of one package
    chosen = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(len(rows), MOST[task]))]
    needed = {"fill-mask": {"text"}, "question-answering": {"question", "context", "answers"}}
    needed["text-classification"] = {"text", "label"}
    columns = set(chosen[0]) if chosen else set()
    if task == "text-generation":
        fits = columns & {"text", "messages"}
    elif task == "summarization":
        fits = "document" in columns and columns & {"summary", "summaries"}
    else:
        fits = needed[task] <= columns
    if not fits:
        raise UserError(
            f"--dataset {name}: found the columns {', '.join(sorted(columns)) or 'of no row'}; {task} is scored on text or "
            "messages; question, context, answers; document, summaries; or text, label."
        )
    if task == "text-classification":
        # A data set that knows its classes' names numbers them in its own order, which need not be the model's
        names = getattr(rows.features["label"], "names", None)
        own = json.loads((folder / "config.json").read_text(encoding="utf8")).get("id2label", {}).values()
        if names and set(names) <= set(own):
            chosen = [row | {"label": names[row["label"]]} for row in chosen]
    return chosen, name


def golden_prompts(rows: list[dict], tokenizer, task: str) -> list:
    """The first prompts of the rows, as `Model.prompt_ids` takes them."""
    prompts = []
    for row in rows[:PROMPTS]:
        if task == "question-answering":
            prompts.append({"question": row["question"], "context": row["context"]})
        elif task == "summarization":
            prompts.append(row["document"])
        elif task == "fill-mask":
            prompts.append(_masked(row["text"].split()[:40], tokenizer))
        elif "messages" in row:
            turns = [i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant" and i]
            prompts.append(row["messages"][: turns[0]] if turns else row["messages"][:1])
        else:
            prompts.append(" ".join(row["text"].split()[:24]))
    return prompts


def _masked(words: list[str], tokenizer) -> str:
    middle = len(words) // 2
    return " ".join([*words[:middle], tokenizer.mask_token, *words[middle + 1 :]])


def window_of(config) -> int | None:
    """How many tokens the windowed layers of a model see; None where all see all that it reads."""
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention")]
    found = min((size for size in sizes if size), default=None)
    return found if found and found + 16 < getattr(config, "max_position_embeddings", 0) else None


def past_the_window(rows: list[dict], prompts: list, tokenizer, config, task: str) -> tuple[list[dict], list]:
    """Rows and prompts with some that are longer than the model's window, made of several rows where none is.

    A graph that forgets the window is right on all shorter ones.
    """
    window = window_of(config)
    if window is None:
        return rows, prompts
    longest = min(window + ROW_TOKENS, config.max_position_embeddings - 16)
    name = {"question-answering": "context", "summarization": "document"}.get(task, "text")
    texts = [row[name] if name in row else "\n".join(turn["content"] for turn in row["messages"]) for row in rows]
    made = []
    for first in range(LONG_ROWS):
        ids, i = [], first
        while len(ids) < longest:  # each text begins with another row
            ids += tokenizer(texts[i % len(texts)] + " ", add_special_tokens=False, verbose=False)["input_ids"] or [0]
            i += 1
        made.append(tokenizer.decode(ids[:longest], skip_special_tokens=True))
    if task in ("text-generation", "fill-mask"):
        rows = [*rows, *({"text": text, "after": window} for text in made)]
    if task == "fill-mask":
        made = [_masked(text.split(), tokenizer) for text in made]
    elif task == "question-answering":
        made = [{"question": row["question"], "context": text} for row, text in zip(rows, made, strict=False)]
    return rows, [*prompts[: PROMPTS - len(made)], *made]


def score(model: Model, rows: list[dict], settle: bool) -> dict:
    """The task's metrics, over the rows or, with `settle`, as many of them as INTERVAL asks for.

    Returns:
        The metrics, the 95 % interval of the first (`<name>_ci95`), `scored_rows`.
    """
    name, of_row = METRIC[model.task], SCORES[model.task]
    kept = [row for row in rows if "after" in row]  # the window is always looked past
    rows = [row for row in rows if "after" not in row]
    parts, done, told = [of_row(model, kept, 0)] if kept else [], 0, time.monotonic()
    for first in range(0, len(rows), BLOCK):
        parts.append(of_row(model, rows[first : first + BLOCK], first))
        done = first + BLOCK
        found = _together(name, parts)
        low, high = found.get(f"{name}_ci95", (0, math.inf))
        half = (high - low) / 2
        if name in COUNTED:  # eight right answers of eight do not say that all are right
            half = max(half, 150 / sum(part[name][1].sum() for part in parts))
        if settle and half <= INTERVAL[name] * (found[name] if name == "perplexity" else 1):
            break
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print(f"         {min(done, len(rows))} of at most {len(rows)} rows, {name} {found[name]:.2f}", flush=True)
    if not parts or not sum(part[name][1].sum() for part in parts):
        raise UserError("the test rows hold nothing that can be scored: give others with --dataset.")
    return _together(name, parts) | {"scored_rows": min(done, len(rows)) + len(kept)}


def settled(rows: list[dict], scored: int) -> list[dict]:
    """The rows on which `score` has settled, for the formats that are compared with it."""
    kept = [row for row in rows if "after" in row]
    return [row for row in rows if "after" not in row][: scored - len(kept)] + kept


def _together(name: str, parts: list[dict]) -> dict:
    """The metrics of all blocks: each block holds by metric the (rows,) numerators and denominators, or what macro-F1 needs."""
    found = {}
    for metric in parts[0]:
        columns = [np.concatenate([part[metric][i] for part in parts]) for i in range(2)]
        if metric == "macro_f1":
            found[metric] = 100 * metrics.macro_f1(*columns)  # in points, like the other counts
            continue
        over, under = columns[0][columns[1] > 0], columns[1][columns[1] > 0]
        value = (lambda ratio: np.exp(np.minimum(ratio, 700))) if "perplexity" in metric else (lambda ratio: ratio)
        found[metric] = float(value(over.sum() / under.sum())) if len(over) else math.nan
        if metric == name and len(over) > 1 and np.isfinite(over).all():
            found[f"{name}_ci95"] = metrics.ci95(value(metrics.bootstrap_ratio(over, under)))
    return found


def _nll(scores: np.ndarray, tokens: np.ndarray) -> float:
    """Nats that (tokens, vocabulary) scores give these token ids, summed."""
    return float(
        torch.nn.functional.cross_entropy(torch.tensor(scores).double(), torch.tensor(tokens), reduction="sum")
    )


def _perplexity(model: Model, rows: list[dict], _: int) -> dict:
    nll, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    for i, row in enumerate(rows):  # `verbose` would warn of long rows, which are cut below
        if "messages" in row:
            encoded = model.tokenizer.apply_chat_template(
                row["messages"],
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            ids, counted = encoded["input_ids"], encoded["assistant_masks"]
            counted = counted if any(counted) else [1] * len(ids)  # a template without marks
        else:
            ids = model.tokenizer(row["text"], verbose=False)["input_ids"]
            counted = [int(place >= row.get("after", 0)) for place in range(len(ids))]
        most = min(ROW_TOKENS + row.get("after", 0), model.context)
        ids, counted = ids[:most], np.array(counted[:most], bool)[1:]
        if counted.any():
            nll[i] = _nll(model.logits([ids])[0][:-1][counted], np.array(ids[1:])[counted])
            tokens[i] = counted.sum()
    return {"perplexity": (nll, tokens)}


def _masked_accuracy(model: Model, rows: list[dict], first: int) -> dict:
    """Share of masked tokens found, in points: 15 % of each row, drawn by its number; each replaced by the mask."""
    right, nll, masked = (np.zeros(len(rows)) for _ in range(3))
    for i, row in enumerate(rows):
        most = min(MASKED_TOKENS + row.get("after", 0), model.context)
        ids = np.array(model.tokenizer(row["text"], truncation=True, max_length=most)["input_ids"])
        usual = np.flatnonzero(~np.isin(ids, model.tokenizer.all_special_ids))
        if not len(usual):
            continue
        places = np.random.default_rng(first + i).choice(usual, max(1, round(0.15 * len(usual))), replace=False)
        asked = ids.copy()
        asked[places] = model.tokenizer.mask_token_id
        scores = model.logits([asked.tolist()])[0][places]
        right[i] = 100 * (scores.argmax(-1) == ids[places]).sum()
        nll[i], masked[i] = _nll(scores, ids[places]), len(places)
    return {"masked_accuracy": (right, masked), "masked_perplexity": (nll, masked)}


def _answers(model: Model, rows: list[dict], _: int) -> dict:
    given = model.answer([row["question"] for row in rows], [row["context"] for row in rows], cut=True)
    golds = [row["answers"]["text"] for row in rows]
    found = metrics.load("squad").compute(predictions=[a["answer"] for a in given], references=golds, per_row=True)
    return {name: (np.array(found["rows"][name]), np.ones(len(rows))) for name in ("f1", "exact_match")}


def _summaries(model: Model, rows: list[dict], _: int) -> dict:
    written = model.summarize([row["document"] for row in rows])
    references = [row.get("summaries") or [row["summary"]] for row in rows]
    found = metrics.load("rouge").compute(predictions=written, references=references, per_row=True)["rows"]
    return {name: (np.array(found[name]), np.ones(len(rows))) for name in ("rougeL", "rouge1", "rouge2")}


def _class(label, names: dict[int, str]) -> str:
    """The class that a row's label means. Classes may be called "1", "2", "3": a number is one of these names before it is the
    number of a class, as tasks/classify_bert reads it.
    """
    if isinstance(label, float) and label.is_integer():  # pandas makes floats of whole numbers beside an empty cell
        label = int(label)
    return str(label) if str(label) in names.values() else names.get(label, str(label))


def _classes(model: Model, rows: list[dict], _: int) -> dict:
    predicted = np.array([found[0]["label"] for found in model.classify([row["text"] for row in rows])])
    names = model.config.id2label
    labels = np.array([_class(row["label"], names) for row in rows])
    if unknown := set(labels) - set(names.values()):
        raise UserError(
            f"the label {str(min(unknown))!r} of the test rows is none of the model's: {', '.join(names.values())}."
        )
    return {"accuracy": (100.0 * (predicted == labels), np.ones(len(rows))), "macro_f1": (predicted, labels)}


# Each gives for some rows, the first of which has this number, by metric the (rows,) numerators and denominators
SCORES: dict[str, Callable[[Model, list[dict], int], dict]] = {
    "text-generation": _perplexity,
    "fill-mask": _masked_accuracy,
    "question-answering": _answers,
    "summarization": _summaries,
    "text-classification": _classes,
}


def no_numbers(found: dict) -> list[str]:
    """Names of the metrics that are infinite or none."""
    return [name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)]


def too_different(task: str, artifact: str, original: dict, found: dict) -> str | None:
    """Why an artifact is refused; None where it is within tolerance."""
    if unreadable := no_numbers(found):
        return f"{unreadable[0]} is no number any more; something in it overflows"
    names = ("accuracy", "macro_f1") if task == "text-classification" else (METRIC[task],)
    for name in names:
        before, after = original[name], found[name]
        if name == "perplexity":
            allowed = INT4_PERPLEXITY if artifact == "int4" else LOSSES[name]
            worse = after / before - 1
            if worse > allowed:
                return (
                    f"perplexity {before:.2f} -> {after:.2f}, {100 * worse:+.1f} %; allowed is +{100 * allowed:.0f} %"
                )
        elif not before - after <= LOSSES[name]:
            return f"{name} {before:.1f} -> {after:.1f}; allowed is -{LOSSES[name]} points"
    if artifact in EXACT and found["identical_outputs"] < SAME_OUTPUTS:
        return f"{100 * found['identical_outputs']:.0f} % of the outputs are the original's; {100 * SAME_OUTPUTS:.0f} % must be"
    return None
