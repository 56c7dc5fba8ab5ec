"""Exact match and F1 of extractive answers as SQuAD's official scripts define them: `shared.metrics.load("squad")`.

As evaluate-v2.0.py does, which gives the values of v1.1's script too, but for gold answers of only articles and
punctuation. One addition: both sides are put into one spelling first (`shared.one_spelling`), since Vietnamese is
written with composed letters or not, and as `hoà` or `hòa`. As there, only English articles and ASCII punctuation are
removed (so "an" goes from "an toàn" too), and words end at spaces: a Chinese answer is one word.
"""

import re
import string
from collections import Counter

import datasets
import evaluate
import numpy as np

from shared import UserError, one_spelling  # From: -e .
from shared.metrics import means  # From: -e .

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
INPUTS = """
Args:
    predictions: (rows,) answers; "" says that there is none.
    references: (rows,) lists of gold answers, of which the best counts; an empty list (or one of empty strings): the
        question has no answer.
    no_answer_scores: (rows,) how much speaks for no answer, a probability or a difference of scores. `predictions` then
        hold the best answer of each row, given or not.
    threshold: rows with a higher score count as answered by "".
    per_row: adds `rows`, the scores of each row.

Returns:
    exact_match, f1: means in points, 0 to 100, each with its *_ci95: [low, high], 95 % bootstrap interval over rows.
    has_answer_exact_match, has_answer_f1, no_answer_exact_match, no_answer_f1 and *_ci95: the same over the questions
        with and without an answer, where there are some without.
    best_f1, best_threshold, best_exact_match, best_exact_match_threshold: with `no_answer_scores`, the highest that any
        threshold reaches on these rows. It is chosen on them, so choose on validation and give it for test.
    rows: with `per_row`, {"exact_match": (rows,) list in points, "f1": the same}.

Raises:
    UserError: no row, or a score that is not finite.
    ValueError: not one score a row, or a threshold without scores.
"""


class Squad(evaluate.Metric):
    """Exact match and F1 over rows, with bootstrap intervals and, for SQuAD 2.0, the best no-answer threshold."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Exact match and F1 in points, after SQuAD's normalisation of answers.",
            citation="Rajpurkar et al. 2016, SQuAD; Rajpurkar et al. 2018, Know What You Don't Know",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def _compute(self, predictions, references, no_answer_scores=None, threshold=None, per_row=False):
        # As in the official script, a gold answer of nothing but articles and punctuation does not count.
        golds = [[gold for gold in answers if normalize_answer(gold)] or [""] for answers in references]
        has_answer = np.array([any(answers) for answers in references], dtype=bool)
        rows = {}
        for name, score in (("exact_match", exact_match), ("f1", f1)):
            of_row = [max(score(gold, text) for gold in row) for row, text in zip(golds, predictions, strict=True)]
            rows[name] = 100 * np.array(of_row)
        best = {}
        if no_answer_scores is not None:
            scores = _checked(no_answer_scores, len(predictions))
            best["best_f1"], best["best_threshold"] = best_threshold(rows["f1"], scores, has_answer)
            exact = best_threshold(rows["exact_match"], scores, has_answer)
            best["best_exact_match"], best["best_exact_match_threshold"] = exact
            if threshold is not None:
                rows = {name: np.where(scores > threshold, 100.0 * ~has_answer, row) for name, row in rows.items()}
        elif threshold is not None:
            raise ValueError("A threshold needs no_answer_scores to compare with.")
        found = means(rows)
        if not has_answer.all():
            for prefix, chosen in (("has_answer", has_answer), ("no_answer", ~has_answer)):
                if chosen.any():
                    found |= means({f"{prefix}_{name}": row[chosen] for name, row in rows.items()})
        return found | best | ({"rows": {name: row.tolist() for name, row in rows.items()}} if per_row else {})


def normalize_answer(text: str) -> str:
    """One spelling, lowercase, without ASCII punctuation, English articles and superfluous spaces."""
    text = one_spelling(text).lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


def exact_match(gold: str, answer: str) -> float:
    """1.0 where both are the same after normalisation, else 0.0."""
    return float(normalize_answer(gold) == normalize_answer(answer))


def f1(gold: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words, 0 to 1; without words on one side, 1.0 only if on neither."""
    gold_words, words = normalize_answer(gold).split(), normalize_answer(answer).split()
    if not gold_words or not words:
        return float(gold_words == words)
    same = sum((Counter(gold_words) & Counter(words)).values())
    # 2PR / (P + R) with P = same / words and R = same / gold words.
    return 2 * same / (len(words) + len(gold_words))


def best_threshold(points, scores, has_answer) -> tuple[float, float]:
    """The highest mean that a no-answer threshold reaches, and the lowest such threshold.

    The sweep of the official `find_best_thresh`, with two repairs: rows of equal score pass the threshold together, and
    where scores reach down to zero, "no answer at all" gets a threshold below them instead of 0.

    Args:
        points: (rows,) what each row scores if its answer is given, 0 to 100.
        scores: (rows,) no-answer scores.
        has_answer: (rows,) bool; without an answer a row that is left unanswered scores 100.

    Returns:
        The mean in points, and the threshold: rows with a higher score are left unanswered.
    """
    order = np.argsort(scores, kind="stable")
    points, ranked, unanswered = np.asarray(points)[order], np.asarray(scores)[order], 100.0 * ~has_answer[order]
    totals = np.concatenate([[0.0], np.cumsum(points - unanswered)]) + unanswered.sum()
    lowest = 0.0 if ranked[0] > 0 else ranked[0] - 1
    thresholds = np.concatenate([[lowest], ranked])
    last = np.append(thresholds[1:] != thresholds[:-1], True)  # the last of those with equal scores
    at = int(np.argmax(np.where(last, totals, -np.inf)))
    return float(totals[at] / len(points)), float(thresholds[at])


def _checked(scores, rows: int) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (rows,):
        raise ValueError(f"Expected one no-answer score a row, {rows:,}, found the shape {scores.shape}.")
    if not np.isfinite(scores).all():
        row = int(np.argmin(np.isfinite(scores)))
        raise UserError(
            f"The no-answer score of row {row} is {scores[row]}: the model holds no numbers, training diverged, or fp16 "
            "overflowed."
        )
    return scores
