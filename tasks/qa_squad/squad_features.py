"""Rows of any SQuAD-like file -> questions with their answers; what windows of them teach; baselines, samples. Used by train.py;
needs no torch. Windows and their decoding are in shared/inference/qa_windows.py.

An answer is a place in its context, so contexts are taken as they are: cleaning would move them.
"""

import ast
import json
import re
import unicodedata
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import regex
from datasets import Dataset

from shared import UserError, one_spelling
from shared.data.cleaning import malformed
from shared.data.files import kind_of, read_json
from shared.data.load import load_data
from shared.inference.qa_windows import Windows, gold_answer
from shared.training.show_data import marked

NEEDED = ("context", "question", "answers")
OPTIONAL = ("id", "title", "answer_start")


def read_official(path: str) -> list[dict] | None:
    """Rows of SQuAD's own JSON (1.1 or 2.0: articles, paragraphs, questions) in the Hub's columns; None if it is another file.

    `plausible_answers` of questions without an answer are not read: they are wrong answers.

    Raises:
        UserError: it has articles, but not in that format.
    """
    file = Path(path).expanduser()
    if not file.is_file() or kind_of(file) != ".json":
        return None
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
    if not any(isinstance(article, dict) and "paragraphs" in article for article in content["data"]):
        return None  # rows under `data`: a table
    try:
        return [
            {
                "id": str(question["id"]),
                "title": article.get("title") or "",
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {
                    name: [answer[name] for answer in question["answers"]] for name in ("text", "answer_start")
                },
            }
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not SQuAD's JSON: {type(error).__name__} {error} in an article of `data`.") from error


def read(name: str, config: str | None) -> dict:
    """The splits of any data: SQuAD's own JSON, or as `shared.data.load.load_data`."""
    official = read_official(name)
    return {"train": Dataset.from_list(official)} if official else load_data(name, config)


def find_in(context: str, text: str, start=None) -> tuple[int, int] | None:
    """Where an answer stands in its context: first and last + 1 character; None if it does not, or nothing says at which place.

    Args:
        start: its place as the file gives it: characters, or the units of UTF-16 (JavaScript, Java, most annotation tools) or
            UTF-8. Where the answer stands at none of these, it is the nearest to it; without a place, the only one.
    """
    text = text if text in context else text.strip()  # annotated with a blank that the context does not have
    spans = [(found.start(1), found.end(1)) for found in re.finditer(f"(?=({re.escape(text)}))", context)]
    if not spans:  # in another spelling: `a` + U+0301 for `á`, `hoà` for `hòa`
        letters = regex.findall(r"\X", context)
        composed = [unicodedata.normalize("NFC", letter) for letter in letters]
        begins = list(accumulate(map(len, composed), initial=0))
        original = dict(zip(begins, accumulate(map(len, letters), initial=0), strict=True))
        plain = re.escape(one_spelling(text))
        found = [(hit.start(1), hit.end(1)) for hit in re.finditer(f"(?=({plain}))", one_spelling("".join(composed)))]
        spans = [(original[a], original[b]) for a, b in found if a in original and b in original]
    start = int(start) if str(start).removesuffix(".0").isdecimal() else None
    if len(spans) < 2 or start is None:
        return spans[0] if len(spans) == 1 else None
    units = (
        lambda place: place,
        lambda place: len(context[:place].encode("utf-16-le", "surrogatepass")) // 2,
        lambda place: len(context[:place].encode("utf8", "surrogatepass")),
    )
    exact = (span for count in units for span in spans if count(span[0]) == start)
    return next(exact, None) or min(spans, key=lambda span: abs(span[0] - start))


def number_text(number: float) -> str:
    """`1700` for 1700 and 1700.0: pandas makes floats of whole numbers where a cell of the column is empty."""
    return f"{number:.0f}" if float(number).is_integer() else str(number)


def parse_answers(text: str):
    """What a cell of a table says: the text itself, or the list or dict whose repr or JSON it is, as pandas writes them."""
    try:
        found = ast.literal_eval(re.sub(r"array\((\[.*?\])(?:, dtype=[^)]*)?\)", r"\1", text, flags=re.DOTALL))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        try:
            found = json.loads(text)
        except ValueError:
            return text
    if isinstance(found, dict) and "text" in found:
        return found
    if isinstance(found, list) and all(
        isinstance(part, str) or isinstance(part, dict) and "text" in part for part in found
    ):
        return found
    return text


def to_question(row: dict, places: dict[str, str]) -> dict | str:
    """A row in the Hub's columns, or the reason for dropping it (see `shared.data.cleaning.clean_rows`).

    `answers` may be the Hub's `{"text": [...], "answer_start": [...]}`, a list of `{"text", "answer_start"}`, a text, a number or
    a list of them, or the repr of these in a cell of a table. Each is taken as it stands in the context: see `find_in`.
    """
    values = {name: row.get(column) for name, column in places.items()}
    context, question, answers = (values[name] for name in NEEDED)
    for name in ("context", "question"):
        if reason := malformed(values[name], places[name]):
            return f"bad: {reason}"
    if isinstance(answers, str) and answers[:1] in ("{", "[") and answers not in context:
        answers = parse_answers(answers)
    if isinstance(answers, int | float) and not isinstance(answers, bool):
        answers = "" if answers != answers else number_text(answers)  # NaN: an empty cell
    if isinstance(answers, dict):
        texts, starts = answers.get("text") or [], answers.get("answer_start")
        texts = texts if isinstance(texts, list) else [texts]
        starts = starts if isinstance(starts, list) else [starts]
    elif isinstance(answers, str):
        texts, starts = [answers] if answers else [], [values.get("answer_start")]
    elif isinstance(answers, list) or answers is None:
        pairs = [a if isinstance(a, dict) else {"text": a} for a in answers or []]
        texts, starts = [a.get("text") for a in pairs], [a.get("answer_start") for a in pairs]
    else:
        return f"bad: {malformed(answers, places['answers'])}"
    texts = [number_text(text) if type(text) in (int, float) else text for text in texts]
    if not all(isinstance(text, str) for text in texts):
        return f"bad: {malformed(answers, places['answers'])}"
    starts = [*starts, *[None] * (len(texts) - len(starts))]
    found = {"text": [], "answer_start": []}
    for text, start in zip(texts, starts, strict=False):
        if text.strip() and (span := find_in(context, text, start)):
            found["text"].append(context[span[0] : span[1]])
            found["answer_start"].append(span[0])
    if any(text.strip() for text in texts) and not found["text"]:
        return "bad: answer not in its context, or more than once and without answer_start"
    title = values.get("title")
    return {
        "id": str(values.get("id") or ""),
        "title": title if isinstance(title, str) else "",
        "context": context,
        "question": question.strip(),
        "answers": found,
    }


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
        decoded = row["context"][windows.spans[first, 0] : windows.spans[last, 1]]
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
