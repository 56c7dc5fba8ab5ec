"""Summaries and questions about texts as instructions, mixed with chat; their replies and metrics. Used by train.py."""

import hashlib
import json
from collections import Counter

from datasets import interleave_datasets
from replies import reply

from shared import UserError, metrics
from shared.data.cleaning import clean_dataset, clean_text, malformed
from shared.data.load import load_data, named_splits
from shared.data.splits import first_rows, split_dataset
from shared.data.squad import read_answers
from shared.metrics.rouge.rouge import split_sentences
from shared.publish.compare import did_it_help
from shared.training.scoring import score_rows

# How a task is put to the model, and what it says where a text holds no answer.
SUMMARIZE = "Summarize this text in one or two sentences.\n\n{text}"
ANSWER = 'Answer the question in words of the text, or with "No answer." if it does not say.\n\n{text}\n\nQuestion: {question}'
NO_ANSWER = "No answer."
SUMMARIES = (("article", "highlights"), ("document", "summary"), ("dialogue", "summary"))  # columns, the first that fit
POOL = 5000  # rows of a data set that are cleaned and split, where --max_train_rows asks for fewer
ROOM = 160  # tokens of --max_length that are left for instruction, template and summary
MOST_NEW_TOKENS = {"summarization": 100, "question_answering": 32}
METRIC = {"summarization": "rougeL", "question_answering": "f1"}  # by which models are compared


def to_task(row: dict, columns: tuple[str, str] | None) -> dict | str:
    """One row as `{"kind", "text", "question", "references"}`, or the reason for dropping it (see `clean_rows`).

    Args:
        columns: of a text and its summary; None for SQuAD's columns. No reference: the text does not answer the question.
    """
    if columns:
        text, summary = row[columns[0]], row[columns[1]]
        if reason := malformed(text) or malformed(summary):
            return f"bad: {reason}"
        found = {"kind": "summarization", "text": clean_text(text), "question": "", "references": [clean_text(summary)]}
        return found if found["text"] and found["references"][0] else "bad: empty"
    if reason := malformed(row["context"]) or malformed(row["question"]):
        return f"bad: {reason}"
    answers = read_answers(row["context"], row["answers"], row.get("answer_start"))
    if isinstance(answers, str):
        return answers
    references = [text for text in dict.fromkeys(map(clean_text, answers["text"])) if text]
    text, question = clean_text(row["context"]), clean_text(row["question"])
    return {"kind": "question_answering", "text": text, "question": question, "references": references}


def load_part(entry: str, seed: int, pool: int | None):
    """The splits of a data set named `name` or `name configuration`, with the columns of `to_task`.

    Raises:
        UserError: neither summaries nor questions about a text.
    """
    name, _, config = entry.partition(" ")
    data = named_splits(load_data(name, config or None, pool))
    if pool:
        for split, rows in data.items():
            data[split] = first_rows(rows.shuffle(seed), pool)
    found = next(iter(data.values())).column_names
    columns = next((pair for pair in SUMMARIES if set(pair) <= set(found)), None)
    if columns is None and not {"context", "question", "answers"} <= set(found):
        raise UserError(
            f"--mixture {entry}: found the columns {', '.join(found)}; expected context, question and answers, or one of "
            f"{'; '.join(' and '.join(pair) for pair in SUMMARIES)}."
        )
    cleaned, _ = clean_dataset(data, lambda row: to_task(row, columns), name)
    return split_dataset(cleaned, lambda row: row["text"], seed)


def as_conversation(row: dict, tokenizer, max_length: int) -> dict:
    """The row of `to_task` as instruction and reply; a text to summarize is cut so that both fit into `max_length` tokens."""
    if row["kind"] == "summarization":
        ends = tokenizer(row["text"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        most = max(1, max_length - ROOM)
        text = row["text"][: ends[most - 1][1]] if len(ends) > most else row["text"]
        instruction, answer = SUMMARIZE.format(text=text), row["references"][0]
    else:
        instruction = ANSWER.format(text=row["text"], question=row["question"])
        answer = row["references"][0] if row["references"] else NO_ANSWER
    turns = zip(("user", "assistant"), (instruction, answer), strict=True)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def mix(splits, script_args, limits: dict, tokenizer, args):
    """Chat with `--mixture`, drawn row by row in proportion to the weights; it ends where a data set has no more rows.

    Args:
        splits: of the conversations.
        limits: rows that are wanted of each split.

    Returns:
        The splits, `train` and `validation` mixed, `test` the conversations alone; and by kind the test rows of the other
        tasks: `messages`, `references`, `data` (the name of the data set), and `baseline`, a trivial reply: the first three
        sentences (Lead-3), or the most frequent answer of the training rows.

    Raises:
        UserError: a number of weights that does not fit, or two data sets of one kind: their metrics would have one name.
    """
    entries, weights = script_args.mixture, script_args.mixture_weights or [1.0] * (1 + len(script_args.mixture))
    if not entries:
        return splits, {}
    if len(weights) != 1 + len(entries) or min(weights) <= 0:
        raise UserError(
            f"--mixture_weights: expected {1 + len(entries)} numbers above 0, one for --dataset and one for each of --mixture."
        )
    pool = limits["train"] and max(POOL, limits["train"])
    parts = {}
    for entry in entries:
        part = load_part(entry, args.seed, pool)
        kind = part["train"][0]["kind"]
        if kind in parts:
            raise UserError(f"--mixture {entry}: a second data set for {kind}; give one of each kind.")
        parts[kind] = part
    shares = [weight / sum(weights) for weight in weights]
    convert = {"function": as_conversation, "fn_kwargs": {"tokenizer": tokenizer, "max_length": args.max_length}}
    mixed = {"test": splits["test"]}
    for split in ("train", "validation"):
        rows = [first_rows(part[split], limits[split]) for part in parts.values()]
        rows = [part.map(**convert, remove_columns=part.column_names) for part in rows]
        rows = [splits[split], *(part.cast(splits[split].features) for part in rows)]
        mixed[split] = interleave_datasets(rows, shares, seed=args.seed)
    tested = {}
    for entry, (kind, part) in zip(entries, parts.items(), strict=True):
        answers = Counter(row["references"][0] if row["references"] else NO_ANSWER for row in part["train"])
        frequent, rows = answers.most_common(1)[0][0], first_rows(part["test"], limits["test"])
        lead = ["\n".join(split_sentences(text).split("\n")[:3]) for text in rows["text"]]
        rows = rows.map(**convert).add_column("data", [entry.split()[0]] * len(rows))
        tested[kind] = rows.add_column("baseline", lead if kind == "summarization" else [frequent] * len(rows))
    return mixed, tested


def answer(model, chat, tested: dict, served, args, title: str) -> dict[str, list[str]]:
    """Greedy replies to the test rows of each kind, in their order; processes share the work."""
    replies = {}
    for kind, rows in tested.items():
        prompts = [{"messages": messages[:-1]} for messages in rows["messages"]]
        lengths = [len(prompt["messages"][0]["content"]) for prompt in prompts]

        def write_batch(numbers: list[int], prompts=prompts, kind=kind) -> list[str]:
            return reply(model, chat, [prompts[i] for i in numbers], served, MOST_NEW_TOKENS[kind])[0]

        replies[kind] = score_rows(model, lengths, write_batch, args, f"{kind}, {title}")
    return replies


def score(kind: str, replies: list[str], references: list[list[str]], prefix: str) -> tuple[dict, list[float]]:
    """Metrics of a kind under `<prefix>_<name>`, and the rows' values of the one by which models are compared, in points."""
    if kind == "question_answering":
        replies = ["" if text.lower().startswith(NO_ANSWER.lower().rstrip(".")) else text for text in replies]
    metric = metrics.load("rouge" if kind == "summarization" else "squad")
    found = metric.compute(predictions=replies, references=references, per_row=True)
    rows = found.pop("rows")[METRIC[kind]]
    return {f"{prefix}_{name}": value for name, value in found.items()}, rows


def compare(tested: dict, base: dict, trained: dict) -> dict:
    """Each kind by its own metric: the trained model against the base and the trivial baseline, on the same rows.

    Returns:
        `metrics` for all_results.json; `lines` for people (see `did_it_help`); `samples` (see `write_samples`);
        `data`, on which data set each metric was measured; `metric_rows_sha256`, among the metrics, on which of its rows.
    """
    found = {"metrics": {}, "lines": [], "samples": [], "data": {}}
    digests, asked = {}, ("text", "question", "references")
    for kind, rows in tested.items():
        scores = {}
        digest = hashlib.sha256(json.dumps([list(rows[name]) for name in asked]).encode()).hexdigest()
        for prefix, replies in (("base", base[kind]), ("baseline", rows["baseline"]), ("test", trained[kind])):
            values, scores[prefix] = score(kind, replies, rows["references"], prefix)
            found["metrics"] |= values
            names = [name.removeprefix("test_") for name in values]
            found["data"] |= dict.fromkeys(names, rows["data"][0])
            digests |= dict.fromkeys(names, digest)
        metric, trivial = METRIC[kind], "Lead-3" if kind == "summarization" else "most frequent answer"
        base_rows, baseline_rows, rows_of_test = ({metric: scores[prefix]} for prefix in ("base", "baseline", "test"))
        helped = did_it_help(base_rows, rows_of_test, metric, baselines={trivial: baseline_rows})
        found["lines"].append(f"{kind.replace('_', ' ').capitalize()}: {helped.pop('line')}")
        found["metrics"] |= {key: value for key, value in helped.items() if key not in ("better_rows", "scores")}
        found["metrics"][f"test_{kind}_rows"] = len(rows)
        for talk, before, after in zip(rows["messages"][:5], base[kind], trained[kind], strict=False):
            texts = {"prompt": talk[0]["content"], "base": before, "trained": after, "reference": talk[-1]["content"]}
            found["samples"].append(texts | {"messages": talk[:-1]})
    if digests:
        found["metrics"]["metric_rows_sha256"] = digests
    return found
