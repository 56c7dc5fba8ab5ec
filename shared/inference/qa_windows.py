"""Questions with their contexts in windows of tokens, and the best spans from their scores. Used by tasks/qa_squad to train and
evaluate, by shared/inference/model.py to answer; needs no torch.
"""

import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from shared import UserError
from shared.data.encoding import TooLong

WINDOW, STRIDE = 384, 128  # tokens of a question with its context, where the configuration names none
# A fast tokenizer keeps how it truncates between two calls: another thread's would cut, or not cut, this one's texts
TOKENIZING = threading.Lock()


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

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window."""
        return np.diff(self.starts).tolist()

    def __getitem__(self, i):
        inside = slice(self.starts[i], self.starts[i + 1])
        return {
            "input_ids": self.ids[inside],
            "token_type_ids": self.types[inside],
            "answer": self.answer[i],
            "window": i,
        }


def window_of(config, context: int) -> tuple[int, int]:
    """Most tokens of a window, and how many of its context the next one shares, of a model that reads `context` tokens."""
    length = min(getattr(config, "window_length", WINDOW), context)
    return length, min(getattr(config, "window_stride", STRIDE), length // 2 - 1)


def question_room(tokenizer, max_length: int, doc_stride: int) -> int:
    """Most tokens of a question, so that windows still move on in its context."""
    return max_length - doc_stride - tokenizer.num_special_tokens_to_add(pair=True) - 1


def check_question(tokens: int, most: int) -> None:
    """For questions that somebody asks: what is cut off is mostly what they ask.

    Raises:
        TooLong: more tokens than `question_room` gives.
    """
    if tokens > most:
        raise TooLong(
            f"the question has {tokens:,} tokens; this model reads at most {most:,} of one. Ask it in fewer words."
        )


def make_windows(rows: Iterable[dict], tokenizer, max_length: int, doc_stride: int, cut: bool = True) -> Windows:
    """Question and context in windows of at most `max_length` tokens; neighbours share `doc_stride` tokens of the context.

    Args:
        cut: questions that leave no room for the context are cut, and counted; otherwise refused.

    Raises:
        UserError: a slow tokenizer, or lengths that leave no room.
        TooLong: as `check_question`, unless `cut`.
    """
    if not tokenizer.is_fast:
        raise UserError("this model's tokenizer gives no character positions; take a model with a fast tokenizer.")
    if doc_stride >= max_length // 2:
        raise UserError(
            f"--doc_stride {doc_stride} is not below half of --max_length {max_length}: windows would not move on."
        )
    most = question_room(tokenizer, max_length, doc_stride)
    parts, lengths, row_of, answer, cut_questions, number = {"ids": [], "types": [], "spans": []}, [], [], [], 0, 0
    for batch in _batches(rows, 1000):
        asked = [row["question"] for row in batch]
        with TOKENIZING:
            encoded = tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        long = [i for i, offsets in enumerate(encoded) if len(offsets) > most]
        for i in long:
            if not cut:
                check_question(len(encoded[i]), most)
            asked[i] = asked[i][: encoded[i][most - 1][1]]
        cut_questions += len(long)
        with TOKENIZING:
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
        cut_questions=cut_questions,
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


def past_accents(context: str, end: int) -> int:
    """The end of a token's text with the accents that stand apart from its last letter: tokenizers that compose or drop them
    (XLM-R, BERT) leave them outside."""
    while end < len(context) and unicodedata.combining(context[end]):
        end += 1
    return int(end)


def strip_blanks(found: dict[str, np.ndarray], contexts: Iterable[str]) -> None:
    """Moves `first` and `last` of `decode` in place past blanks: a Metaspace token (XLM-R) holds the one before its word."""
    for i, context in enumerate(contexts):
        if found["last"][i] > found["first"][i]:
            found["last"][i] = past_accents(context, found["last"][i])
        span = context[found["first"][i] : found["last"][i]]
        found["first"][i] += len(span) - len(span.lstrip())
        found["last"][i] = found["first"][i] + len(span.strip())


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
