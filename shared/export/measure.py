"""Is an exported model the same, and what does it cost? Each artifact in a process of its own, next to the original. Used by
shared/export/export.py.
"""

import json
import math
import multiprocessing
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
import transformers

from shared import UserError
from shared.inference.golden import GOLDEN, GOLDEN_TOKENS, file_digest, golden_outputs
from shared.inference.model import Model, load
from shared.inference.torch_runner import TASKS

# transformers imports when it is first asked: here, so that processes start with it, and loading is no importing
for _name in ("AutoConfig", "AutoTokenizer", "GenerationConfig", "GenerationMixin", "PreTrainedModel", *TASKS.values()):
    getattr(transformers, _name)

TEST_ROWS = "test.jsonl"  # what a run leaves of its test split; see shared.training.finish.finish
PROMPTS = 20  # of the golden set
WRITING = ("text-generation", "summarization")
MOST = {"text-generation": 8, "fill-mask": 48, "question-answering": 200, "summarization": 24}  # scored rows
ROW_TOKENS = 160  # scored of a row of a language model; the loss settles within them
OWN = {"text-generation": "docs:prose", "fill-mask": "docs:prose"}
OWN |= {"question-answering": "docs:questions", "summarization": "docs:summaries"}
METRIC = {"text-generation": "perplexity", "fill-mask": "masked_accuracy"}
METRIC |= {"question-answering": "f1", "summarization": "rougeL"}
# How much worse than the original a format may be: a share of the perplexity, else points
LOSSES = {"perplexity": 0.01, "masked_accuracy": 0.5, "f1": 0.5, "rougeL": 0.3}
INT4_PERPLEXITY = 0.05


def test_rows(folder: Path, task: str, dataset: str | None) -> tuple[list[dict], str]:
    """Rows to score, and their name: `dataset`, else the run's own test split, else documentation of the packages here.

    Args:
        dataset: as `shared.data.load.load_data` takes it, its columns named as the task names them: `text`, or `messages`;
            `question`, `context`, `answers`; `document`, `summaries` (or `summary`).

    Raises:
        UserError: other columns.
    """
    if dataset is None and (folder / TEST_ROWS).is_file():
        lines = (folder / TEST_ROWS).read_text(encoding="utf8").splitlines()
        return [json.loads(line) for line in lines][: MOST[task]], "the run's test split"
    from shared.data.load import load_data

    name = dataset or OWN[task]
    data = load_data(name)
    rows = data["test"] if "test" in data else data["train"]
    # Far apart: neighbours are of one package
    chosen = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(len(rows), MOST[task]))]
    needed = {"fill-mask": {"text"}, "question-answering": {"question", "context", "answers"}}
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
            "messages; question, context, answers; or document, summaries."
        )
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
            words = row["text"].split()[:40]
            words[len(words) // 2 : len(words) // 2 + 1] = [tokenizer.mask_token]
            prompts.append(" ".join(words))
        elif "messages" in row:
            turns = [i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant" and i]
            prompts.append(row["messages"][: turns[0]] if turns else row["messages"][:1])
        else:
            prompts.append(" ".join(row["text"].split()[:24]))
    return prompts


def write_golden(folder: Path, artifact: str, prompts: list, outputs: list, ids: list, stop_ids) -> None:
    """golden.json: prompts, their token ids, what this artifact makes of them, a checksum of each file; see `Model.verify`."""
    from shared.publish import results

    items = [{"prompt": p, "input_ids": i, "output": o} for p, i, o in zip(prompts, ids, outputs, strict=True)]
    kept = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (GOLDEN, "README.md"))
    golden = {"artifact": artifact, "stop_ids": list(stop_ids), "items": items}
    results.write_json(folder / GOLDEN, golden | {"sha256": {path.name: file_digest(path) for path in kept}})


def measure(folder: str, artifact: str | None, task: str, rows: list[dict], prompts: list) -> dict:
    """Loads one artifact and measures it; called in a fresh process, whose memory is its own.

    Returns:
        metrics of the task, `load_seconds`, `latency_ms` and `per_second` by batch size, `peak_memory_gb`, `outputs`, `input_ids`
        and `stop_ids` of the golden prompts.
    """
    begun = time.perf_counter()
    model = load(folder, task=task) if artifact is None else Model(Path(folder), artifact, task)
    found = {"load_seconds": round(time.perf_counter() - begun, 2)}
    found |= SCORES[task](model, rows)
    use(model, prompts[:1])  # the first call allocates
    found["input_ids"], found["stop_ids"] = [model.prompt_ids(p) for p in prompts], list(model.stop_ids)
    found["outputs"], found["latency_ms"], found["per_second"] = [], {}, {}
    batches = {
        1: [[p] for p in prompts],
        8: [[prompts[(8 * call + i) % len(prompts)] for i in range(8)] for call in range(2)],
    }
    for size, calls in batches.items():
        times, units = [], 0
        for chosen in calls:
            begun = time.perf_counter()
            outputs = use(model, chosen)
            times.append(time.perf_counter() - begun)
            units += sum(map(len, outputs)) if model.task in WRITING else len(outputs)
            found["outputs"] += outputs if size == 1 else []
        found["latency_ms"][str(size)] = {f"p{p}": round(1000 * float(np.percentile(times, p)), 1) for p in (50, 95)}
        found["per_second"][str(size)] = round(units / sum(times), 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found | {"peak_memory_gb": round(peak / 1e9, 2)}


def use(model: Model, prompts: list) -> list:
    """What `golden_outputs` gives, all prompts as one batch where the model takes one."""
    if model.task == "text-generation":
        return model.generate([model.prompt_ids(p) for p in prompts], max_new_tokens=GOLDEN_TOKENS)
    if model.task == "summarization":
        return model.summary_ids(prompts, GOLDEN_TOKENS)
    if model.task == "question-answering":
        found = model.answer([p["question"] for p in prompts], [p["context"] for p in prompts])
        return [[answer["start"], answer["end"]] for answer in found]
    return golden_outputs(model, prompts)


def _nll(scores: np.ndarray, tokens: np.ndarray) -> float:
    """Nats that (tokens, vocabulary) scores give these token ids, summed."""
    return float(
        torch.nn.functional.cross_entropy(torch.tensor(scores).double(), torch.tensor(tokens), reduction="sum")
    )


def _perplexity(model: Model, rows: list[dict]) -> dict:
    nll, tokens = 0.0, 0
    for row in rows:  # `verbose` would warn of long rows, which are cut below
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
            counted = [1] * len(ids)
        most = min(ROW_TOKENS, model.context)
        ids, counted = ids[:most], np.array(counted[:most], bool)[1:]
        if not counted.any():
            continue
        nll += _nll(model.logits([ids])[0][:-1][counted], np.array(ids[1:])[counted])
        tokens += int(counted.sum())
    if not tokens:
        raise UserError("the test rows hold no token that can be scored: give others with --dataset.")
    return {"perplexity": math.exp(min(nll / tokens, 700)), "scored_tokens": tokens}


def _masked_accuracy(model: Model, rows: list[dict]) -> dict:
    """Share of masked tokens found, in points: 15 % of each row, drawn by its number; each replaced by the mask."""
    right, nll, masked = 0, 0.0, 0
    for number, row in enumerate(rows):
        ids = np.array(model.tokenizer(row["text"], truncation=True, max_length=min(128, model.context))["input_ids"])
        usual = np.flatnonzero(~np.isin(ids, model.tokenizer.all_special_ids))
        if not len(usual):
            continue
        places = np.random.default_rng(number).choice(usual, max(1, round(0.15 * len(usual))), replace=False)
        asked = ids.copy()
        asked[places] = model.tokenizer.mask_token_id
        scores = model.logits([asked.tolist()])[0][places]
        right += int((scores.argmax(-1) == ids[places]).sum())
        nll += _nll(scores, ids[places])
        masked += len(places)
    if not masked:
        raise UserError("the test rows hold no word that can be masked: give others with --dataset.")
    return {
        "masked_accuracy": 100 * right / masked,
        "masked_perplexity": math.exp(nll / masked),
        "scored_tokens": masked,
    }


def _answers(model: Model, rows: list[dict]) -> dict:
    from shared import metrics

    given = model.answer([row["question"] for row in rows], [row["context"] for row in rows])
    golds = [row["answers"]["text"] for row in rows]
    found = metrics.load("squad").compute(predictions=[a["answer"] for a in given], references=golds)
    return {name: found[name] for name in ("f1", "exact_match")} | {"scored_rows": len(rows)}


def _summaries(model: Model, rows: list[dict]) -> dict:
    from shared import metrics

    written = []
    for i in range(0, len(rows), 8):
        written += model.summarize([row["document"] for row in rows[i : i + 8]])
    references = [row.get("summaries") or [row["summary"]] for row in rows]
    found = metrics.load("rouge").compute(predictions=written, references=references)
    return {name: found[name] for name in ("rouge1", "rouge2", "rougeL")} | {"scored_rows": len(rows)}


SCORES = {
    "text-generation": _perplexity,
    "fill-mask": _masked_accuracy,
    "question-answering": _answers,
    "summarization": _summaries,
}


def too_different(task: str, artifact: str, original: dict, found: dict) -> str | None:
    """Why an artifact is refused; None where it is within tolerance."""
    name = METRIC[task]
    before, after = original[name], found[name]
    if name == "perplexity":
        allowed = INT4_PERPLEXITY if artifact == "int4" else LOSSES[name]
        worse = after / before - 1
        if worse > allowed or not math.isfinite(after):
            return f"perplexity {before:.2f} -> {after:.2f}, {100 * worse:+.1f} %; allowed is +{100 * allowed:.0f} %"
    elif before - after > LOSSES[name]:
        return f"{name} {before:.1f} -> {after:.1f}; allowed is -{LOSSES[name]} points"
    return None


def start_measuring() -> None:
    """Starts what the processes of `in_a_process` are forked from. It imports the libraries while something else is done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["shared.export.measure", "shared.metrics", "onnxruntime", "transformers.cache_utils"]
    )
    forkserver.ensure_running()


def in_a_process(*arguments) -> dict:
    """`measure` in a process of its own, started from one that has imported the libraries and nothing else.

    Raises:
        UserError: the artifact cannot be loaded or used.
    """
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        found = pool.apply(measure, arguments)
        pool.close()  # leaving the block alone would kill it, and it would complain
        pool.join()
    return found
