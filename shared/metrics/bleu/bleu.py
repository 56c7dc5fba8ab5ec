"""Corpus BLEU-4 by sacrebleu, with its signature: `shared.metrics.load("bleu")`."""

import re
from itertools import zip_longest

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics import BLEU

from shared import one_spelling  # From: -e .
from shared.metrics import as_lists, ci95, resampled_counts  # From: -e .

SCRIPTS = {
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"),
    "kana": re.compile(r"[\u3041-\u30ff]"),
    # Thai, Lao, Burmese, Khmer, Korean
    "char": re.compile(r"[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff\uac00-\ud7af]"),
}
INPUTS = """
Args:
    predictions: (rows,) texts, not tokenized; an empty one counts as a text of no words.
    references: (rows,) strings, or lists of strings; rows may have different numbers of references.

Returns:
    bleu: BLEU-4 of the whole corpus in points, 0 to 100: n-grams are summed over rows, so it is no mean over rows.
    bleu_ci95: [low, high], 95 % bootstrap interval over rows (Koehn 2004).
    signature: sacrebleu's, which makes the number comparable; it names the tokenizer (`tokenizer_for`), and
        ends with `spelling:one` where `shared.one_spelling` changed a text, so that sacrebleu alone would give another number.

Raises:
    UserError: no row, or a row without a reference.
"""


def tokenizer_for(texts) -> str:
    """sacrebleu's tokenizer for the script that most words of the texts are in: 13a, `zh`, or `char` without spaces.

    `char` for Japanese and Korean too: their own (ja-mecab, ko-mecab) need dictionaries, and what is installed must not change a
    number.
    """
    letters = "".join(texts)
    counts = {name: len(script.findall(letters)) for name, script in SCRIPTS.items()}
    spaced = (sum(map(str.isalpha, letters)) - sum(counts.values())) / 5  # about so many letters make a word
    if counts["kana"] > 0.05 * counts["zh"]:  # Japanese writes Han too
        counts = {"char": sum(counts.values())}
    counts = {"13a": spaced} | counts
    return max(counts, key=counts.get)


class Bleu(evaluate.Metric):
    """sacrebleu's corpus BLEU with the tokenizer for the language of the references, with a bootstrap interval over rows."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="BLEU-4 in points, by sacrebleu with its default settings and the tokenizer of the language.",
            citation="Papineni et al. 2002, BLEU; Post 2018, A Call for Clarity in Reporting BLEU Scores",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def add_batch(self, *, predictions=None, references=None):
        """References as strings or lists; `compute` comes here too."""
        # evaluate's own choice between two formats looks at the first row only, and writes a later list as its repr.
        super().add_batch(predictions=predictions, references=as_lists(references))

    def _compute(self, predictions, references):
        # Vietnamese comes in several spellings: letters composed or not, `hoà` or `hòa`
        given = predictions, references
        predictions = [one_spelling(text) for text in predictions]
        references = [[one_spelling(text) for text in row] for row in references]
        tokenizer = tokenizer_for(text for row in references for text in row)
        corpus = BLEU(tokenize=tokenizer)
        # sacrebleu wants a list per reference number, with None where a row has fewer.
        score = corpus.corpus_score(predictions, [list(stream) for stream in zip_longest(*references)])
        sentence, statistics = BLEU(effective_order=True, tokenize=tokenizer), np.empty((len(predictions), 10))
        for row, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
            found = sentence.sentence_score(prediction, texts)
            statistics[row] = [found.sys_len, found.ref_len, *found.counts, *found.totals]
        # sacrebleu's own bootstrap holds resamples x rows in memory; counts of drawn rows give the same sums.
        draws = [_bleu(counts @ statistics) for counts in resampled_counts(len(predictions))]
        spelling = "" if given == (predictions, references) else "|spelling:one"
        return {"bleu": score.score, "bleu_ci95": ci95(draws), "signature": f"{corpus.get_signature()}{spelling}"}


def _bleu(sums: np.ndarray) -> float:
    """BLEU of summed statistics: lengths of prediction and reference, matches and n-grams of orders 1 to 4."""
    length, reference_length, *counts = (int(x) for x in sums)
    return BLEU.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth_method="exp").score
