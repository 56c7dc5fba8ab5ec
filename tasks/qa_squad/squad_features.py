"""Rows of any SQuAD-like file -> questions with their answers; what windows of them teach; baselines, samples. Used by train.py;
needs no torch. Windows and their decoding are in shared/inference/qa_windows.py.

An answer is a place in its context, so contexts are taken as they are: cleaning would move them.
"""

from collections import Counter

import numpy as np
from datasets import Dataset

from shared import UserError
from shared.data.cleaning import malformed
from shared.data.load import load_data
from shared.data.squad import read_answers, read_official
from shared.inference.qa_windows import Windows, gold_answer, past_accents
from shared.training.launch import log
from shared.training.show_data import marked

NEEDED = ("context", "question", "answers")
OPTIONAL = ("id", "title", "answer_start")


def read(name: str, config: str | None) -> dict:
    """The splits of any data: SQuAD's own JSON, or as `shared.data.load.load_data`."""
    official = read_official(name)
    return {"train": Dataset.from_list(official)} if official else load_data(name, config)


def to_question(row: dict, places: dict[str, str]) -> dict | str:
    """A row in the Hub's columns, or the reason for dropping it (see `shared.data.cleaning.clean_rows`).

    Answers are taken as they stand in the context: see `shared.data.squad.read_answers`.
    """
    values = {name: row.get(column) for name, column in places.items()}
    context, question, answers = (values[name] for name in NEEDED)
    for name in ("context", "question"):
        if reason := malformed(values[name], places[name]):
            return f"bad: {reason}"
    found = read_answers(context, answers, values.get("answer_start"), places["answers"])
    if isinstance(found, str):
        return found
    title = values.get("title")
    return {
        "id": str(values.get("id") or ""),
        "title": title if isinstance(title, str) else "",
        "context": context,
        "question": question.strip(),
        "answers": found,
    }


def without_secret(splits: dict) -> dict:
    """Splits without those of held-out questions that have no answer, where `train` has some: those of test splits are often
    kept secret, and each question would count as one without an answer."""
    known = {name for name, rows in splits.items() if any(answers["text"] for answers in rows["answers"])}
    secret = [name for name in splits if name != "train" and "train" in known and name not in known]
    if secret:
        log.warning("no question of %s has an answer: taken for kept secret, the split is not used", ", ".join(secret))
    return {name: rows for name, rows in splits.items() if name not in secret}


def groups(rows, by_title: bool = True) -> list[str]:
    """For each row the text that must stay on one side of a split: all contexts of its title, or its context without one."""
    names = [
        (title if by_title else "") or context for title, context in zip(rows["title"], rows["context"], strict=True)
    ]
    articles: dict[str, dict[str, None]] = {}
    for name, context in zip(names, rows["context"], strict=True):
        articles.setdefault(name, {})[context] = None
    joined = {name: "\n".join(sorted(contexts)) for name, contexts in articles.items()}
    return [joined[name] for name in names]


def show(window: dict, tokenizer) -> str:
    """The text of a window with its answer between brackets; of one without an answer that is the first token."""
    ids, (first, last) = window["input_ids"].tolist(), window["answer"].tolist()
    return marked(tokenizer, ids, [id_ if first <= i <= last else -100 for i, id_ in enumerate(ids)])


def preflight(rows, windows: Windows) -> dict:
    """What these windows would teach; every answer is read back from its tokens (`span_mismatches` lists what differs).

    Raises:
        UserError: no window holds an answer.
    """
    labelled = np.flatnonzero(windows.answer[:, 1] > 0)
    found = dict(
        zip(windows.row[labelled][::-1].tolist(), labelled[::-1].tolist(), strict=True)
    )  # first window of each
    mismatches, answerable, without = [], 0, 0
    for number, row in enumerate(rows):
        gold = gold_answer(row["answers"])
        if gold is None:
            continue
        answerable += 1
        if number not in found:
            without += 1
            continue
        window = found[number]
        first, last = windows.starts[window] + windows.answer[window]
        decoded = row["context"][windows.spans[first, 0] : past_accents(row["context"], windows.spans[last, 1])]
        if decoded.strip() != gold[0].strip():
            mismatches.append({"row": number, "id": row["id"], "answer": gold[0], "tokens": decoded})
    if answerable and not found:
        raise UserError(f"preflight: none of {answerable:,} answers fits a window. Raise --max_length or --doc_stride.")
    questions = int(windows.row[-1]) + 1
    read_back = answerable - without - len(mismatches)
    return {
        "rows": questions,
        "unanswerable_rows": questions - answerable,
        "windows": len(windows),
        "tokens": len(windows.ids),
        "longest_window": int(np.diff(windows.starts).max()),
        "cut_questions": windows.cut_questions,
        "answers_in_no_window": without,
        "answers_read_back": read_back,
        "answers_not_whole_tokens": len(mismatches),
        "span_mismatches": mismatches,
    }


def spans_of(rows, found: dict) -> list[str]:
    """The text of each question's best span, "" where there is no valid one."""
    return [
        context[first:last] for context, first, last in zip(rows["context"], found["first"], found["last"], strict=True)
    ]


def most_frequent_place(train_rows, rows) -> list[str]:
    """The trivial baseline: the words at which most answers of the training rows begin, as many as most of them have."""
    places, words = Counter(), Counter()
    for row in train_rows:
        if gold := gold_answer(row["answers"]):
            places[len(row["context"][: gold[1]].split())] += 1
            words[len(gold[0].split())] += 1
    first, count = (places.most_common(1)[0][0], words.most_common(1)[0][0]) if places else (0, 1)
    return [" ".join(context.split()[first : first + count]) for context in rows["context"]]


def mark(context: str, first: int, last: int, around: int = 200) -> str:
    """The context near a span, with the span between [[ and ]]."""
    if last <= first:
        return context[: 2 * around] + ("..." if len(context) > 2 * around else "")
    left, right = max(0, first - around), min(len(context), last + around)
    before, after = "..." if left else "", "..." if right < len(context) else ""
    return f"{before}{context[left:first]}[[{context[first:last]}]]{context[last:right]}{after}"


def samples(rows, found: dict, base: list[str], given: list[str], most: int = 20) -> list[dict]:
    """For samples.jsonl: the first questions, each with its context, in which the answer given is marked."""

    def shown(answer):
        return answer or "(no answer)"

    return [
        {
            "prompt": f"{row['question']}\n\n{mark(row['context'], first if text else 0, last if text else 0)}",
            "base": shown(before),
            "trained": shown(text),
            "reference": " | ".join(dict.fromkeys(row["answers"]["text"])) or "(no answer)",
            "question": row["question"],
            "context": row["context"],
        }
        for row, first, last, before, text, _ in zip(
            rows, found["first"], found["last"], base, given, range(most), strict=False
        )
    ]
