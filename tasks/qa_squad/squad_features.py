"""Rows of any SQuAD-like file -> windows of tokens -> scores -> answers. Used by train.py; needs no torch.

An answer is a place in its context, so contexts are taken as they are: cleaning would move them.
"""

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared import UserError
from shared.cleaning import malformed

NEEDED = ("context", "question", "answers")
OPTIONAL = ("id", "title", "answer_start")


def read_official(path: str) -> list[dict] | None:
    """Rows of SQuAD's own JSON (1.1 or 2.0: articles, paragraphs, questions) in the Hub's columns; None if it is another file.

    `plausible_answers` of questions without an answer are not read: they are wrong answers.

    Raises:
        UserError: it has articles, but not in that format.
    """
    file = Path(path).expanduser()
    if not file.is_file() or ".json" not in file.suffixes:
        return None
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf8") as opened:
        try:
            content = json.load(opened)
        except ValueError:  # lines of JSON, or broken: `load_data` says which
            return None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
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


def find_columns(columns: list[str], mapping: list[str]) -> dict[str, str]:
    """Which column holds each of NEEDED and OPTIONAL.

    Raises:
        UserError: found / expected / how to map.
    """
    for pair in mapping:
        name, _, column = pair.partition("=")
        if name not in NEEDED + OPTIONAL or column not in columns:
            raise UserError(
                f"--columns {pair}: write name=column, the name one of {', '.join(NEEDED + OPTIONAL)}, the column one of: "
                f"{', '.join(columns)}."
            )
    places = {name: name for name in NEEDED + OPTIONAL if name in columns} | dict(p.split("=", 1) for p in mapping)
    missing = [name for name in NEEDED if name not in places]
    if missing:
        raise UserError(
            f"no column for {', '.join(missing)}: found {', '.join(columns)}; expected {', '.join(NEEDED)}. Map yours, for "
            f"example --columns {missing[0]}={columns[-1]}."
        )
    return places


def to_question(row: dict, places: dict[str, str]) -> dict | str:
    """A row in the Hub's columns, or the reason for dropping it (see `shared.cleaning.clean_rows`).

    `answers` may be the Hub's `{"text": [...], "answer_start": [...]}`, a list of `{"text", "answer_start"}`, a text or a list
    of texts. An answer that does not stand at its `answer_start` is looked for in the context, and taken where it occurs once.
    """
    values = {name: row.get(column) for name, column in places.items()}
    context, question, answers = (values[name] for name in NEEDED)
    for text in (context, question):
        if reason := malformed(text):
            return f"bad: {reason}"
    if isinstance(answers, dict):
        texts, starts = answers.get("text") or [], answers.get("answer_start") or []
    elif isinstance(answers, str):
        texts, starts = [answers] if answers else [], [values.get("answer_start")]
    elif isinstance(answers, list) or answers is None:
        pairs = [a if isinstance(a, dict) else {"text": a} for a in answers or []]
        texts, starts = [a.get("text") for a in pairs], [a.get("answer_start") for a in pairs]
    else:
        return "bad: wrong type"
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return "bad: wrong type"
    starts = [*starts, *[None] * (len(texts) - len(starts))]
    found = {"text": [], "answer_start": []}
    for text, start in zip(texts, starts, strict=False):
        if not text.strip():
            continue
        if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
            start = context.find(text) if context.count(text) == 1 else -1
        if start >= 0:
            found["text"].append(text)
            found["answer_start"].append(start)
    if any(text.strip() for text in texts) and not found["text"]:
        return "bad: answer not in its context, or more than once and not at answer_start"
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


def gold_answer(answers: dict) -> tuple[str, int] | None:
    """The answer to learn, with its place in characters: what most annotators chose, the first of these; None without one."""
    pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
    return Counter(pairs).most_common(1)[0][0] if pairs else None


@dataclass
class Windows:
    """Windows of many questions, one after the other in flat arrays; item `i` is a dict that a collator takes.

    Attributes:
        ids, types: (tokens,) token and segment ids.
        spans: (tokens, 2) first and last + 1 character in the context; -1 where a token is not of the context.
        starts: (windows + 1,) where each window begins in these arrays.
        row: (windows,) number of its question. Ascending.
        answer: (windows, 2) first and last token of the answer, counted in the window; 0 0, the first token, where the window
            does not hold the whole answer.
        cut_questions: how many questions were cut, since they left no room for the context.
    """

    ids: np.ndarray
    types: np.ndarray
    spans: np.ndarray
    starts: np.ndarray
    row: np.ndarray
    answer: np.ndarray
    cut_questions: int

    def __len__(self):
        return len(self.row)

    def __getitem__(self, i):
        inside = slice(self.starts[i], self.starts[i + 1])
        return {
            "input_ids": self.ids[inside],
            "token_type_ids": self.types[inside],
            "answer": self.answer[i],
            "window": i,
        }


def make_windows(rows: Iterable[dict], tokenizer, max_length: int, doc_stride: int) -> Windows:
    """Question and context in windows of at most `max_length` tokens; neighbours share `doc_stride` tokens of the context.

    Raises:
        UserError: a slow tokenizer, or lengths that leave no room.
    """
    if not tokenizer.is_fast:
        raise UserError("this model's tokenizer gives no character positions; take a model with a fast tokenizer.")
    if doc_stride >= max_length // 2:
        raise UserError(
            f"--doc_stride {doc_stride} is not below half of --max_length {max_length}: windows would not move on."
        )
    most = max_length - doc_stride - tokenizer.num_special_tokens_to_add(pair=True) - 1
    parts, lengths, row_of, answer, cut, number = {"ids": [], "types": [], "spans": []}, [], [], [], 0, 0
    for batch in _batches(rows, 1000):
        asked = [row["question"] for row in batch]
        encoded = tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        long = [i for i, offsets in enumerate(encoded) if len(offsets) > most]
        for i in long:
            asked[i] = asked[i][: encoded[i][most - 1][1]]
        cut += len(long)
        windows = tokenizer(
            asked,
            [row["context"] for row in batch],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        golds = [gold_answer(row["answers"]) for row in batch]
        for i, window in enumerate(windows.encodings):
            spans = np.array(window.offsets, dtype=np.int32)
            spans[np.array([part != 1 for part in window.sequence_ids])] = -1
            row = windows["overflow_to_sample_mapping"][i]
            parts["ids"].append(np.array(window.ids, dtype=np.int32))
            parts["types"].append(np.array(window.type_ids, dtype=np.int8))
            parts["spans"].append(spans)
            lengths.append(len(spans))
            row_of.append(number + row)
            answer.append(_find_answer(spans, golds[row]))
        number += len(batch)
    if not lengths:
        raise UserError("no question to make windows of.")
    return Windows(
        **{name: np.concatenate(arrays) for name, arrays in parts.items()},
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        row=np.array(row_of),
        answer=np.array(answer),
        cut_questions=cut,
    )


def _batches(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _find_answer(spans: np.ndarray, gold: tuple[str, int] | None) -> tuple[int, int]:
    """First and last token that cover the answer; (0, 0) where the window does not hold all of it."""
    if gold is None:
        return 0, 0
    begin, end = gold[1] + len(gold[0]) - len(gold[0].lstrip()), gold[1] + len(gold[0].rstrip())
    inside = np.flatnonzero((spans[:, 0] >= 0) & (spans[:, 1] > spans[:, 0]))  # some tokens stand for no character
    if not len(inside) or spans[inside[0], 0] > begin or spans[inside[-1], 1] < end:
        return 0, 0
    touching = inside[(spans[inside, 0] < end) & (spans[inside, 1] > begin)]
    return (int(touching[0]), int(touching[-1])) if len(touching) else (0, 0)


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
        if decoded != gold[0].strip():
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


def decode(
    windows: Windows, start: np.ndarray, end: np.ndarray, top_n: int = 20, max_answer_length: int = 30
) -> dict[str, np.ndarray]:
    """The best span of each question over all of its windows, and the score of having no answer.

    The rules of transformers' utils_qa.py without its loops: the `top_n` best starts and ends of a window are combined; both in
    the context, the end not before the start, at most `max_answer_length` tokens. Work is done in blocks of windows, so that
    memory does not grow with their number.

    Args:
        start, end: (tokens,) logits, flat as `windows.ids`.

    Returns:
        One entry a question: `first`, `last` (characters of the context, both 0 without a valid span), `score` (sum of the two
        logits; -inf without a valid span), `null` (lowest sum at the first token over its windows), `no_answer` (`null` less
        `score`, finite: above the threshold a question has no answer).
    """
    count, size = len(windows), 512
    lengths = np.diff(windows.starts)
    best = {"score": np.empty(count, np.float32), "first": np.zeros(count, int), "last": np.zeros(count, int)}
    order = np.argsort(lengths, kind="stable")  # blocks of equal lengths have little padding
    for block in (order[i : i + size] for i in range(0, count, size)):
        longest = int(lengths[block].max())
        real = np.arange(longest) < lengths[block, None]
        place = np.where(real, windows.starts[block, None] + np.arange(longest), 0)
        firsts, lasts = (_top(np.where(real, logits[place], -np.inf), top_n) for logits in (start, end))
        s, e = np.take_along_axis(place, firsts, 1), np.take_along_axis(place, lasts, 1)
        # Tokens that are not of the context are put where no rule can be kept.
        first_at = np.where(windows.spans[s, 0] >= 0, firsts, 4 * longest).astype(np.int32)
        last_at = np.where(windows.spans[e, 0] >= 0, lasts, -4 * longest).astype(np.int32)
        length = last_at[:, None, :] - first_at[:, :, None]
        scores = start[s][:, :, None] + end[e][:, None, :]
        # As unsigned numbers, negative lengths are large ones.
        np.putmask(scores, length.view(np.uint32) >= max_answer_length, -np.inf)
        scores = scores.reshape(len(block), -1)
        winner = scores.argmax(1)  # of equal ones the first, as a stable sort does
        each = np.arange(len(block))
        best["score"][block] = scores[each, winner]
        best["first"][block] = windows.spans[s[each, winner // lasts.shape[1]], 0]
        best["last"][block] = windows.spans[e[each, winner % lasts.shape[1]], 1]
    # The best window of each question: by question, then by falling score; of equal ones the first.
    ranked = np.lexsort((-best["score"], windows.row))
    chosen = ranked[np.concatenate([[True], np.diff(windows.row[ranked]) > 0])]
    null = (start + end)[windows.starts[:-1]]
    found = {name: values[chosen] for name, values in best.items()}
    nothing = np.isneginf(found["score"])
    found["first"][nothing] = found["last"][nothing] = 0
    begins = np.flatnonzero(np.concatenate([[True], np.diff(windows.row) > 0]))
    found["null"] = np.minimum.reduceat(null, begins)
    return found | {"no_answer": np.minimum(found["null"] - found["score"], 1e9)}


def _top(values: np.ndarray, n: int) -> np.ndarray:
    """(rows, n) columns of the n largest values of each row, falling."""
    n = min(n, values.shape[1])
    least = np.partition(values, -n, axis=1)[:, -n, None]  # several times as fast as argpartition
    columns = np.flatnonzero(values >= least) % values.shape[1]
    if len(columns) != n * len(values):  # equal values
        columns = np.argpartition(values, -n, axis=1)[:, -n:]
    columns = columns.reshape(-1, n)
    order = np.argsort(-np.take_along_axis(values, columns, 1), axis=1)
    return np.take_along_axis(columns, order, 1)


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
    """For `shared.report.write_samples`: the first questions, each with its context, in which the answer given is marked."""

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
