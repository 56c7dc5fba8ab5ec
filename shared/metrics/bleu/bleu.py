"""Corpus BLEU-4 by sacrebleu, with its signature: `shared.metrics.load("bleu")`."""

from itertools import zip_longest

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics import BLEU

from shared.metrics import as_lists, ci95, resampled_counts  # From: -e .

INPUTS = """
Args:
    predictions: (rows,) texts, not tokenized; an empty one counts as a text of no words.
    references: (rows,) strings, or lists of strings; rows may have different numbers of references.

Returns:
    bleu: BLEU-4 of the whole corpus in points, 0 to 100: n-grams are summed over rows, so it is no mean over rows.
    bleu_ci95: [low, high], 95 % bootstrap interval over rows (Koehn 2004).
    signature: sacrebleu's, which makes the number comparable.

Raises:
    UserError: no row, or a row without a reference.
"""


class Bleu(evaluate.Metric):
    """sacrebleu's corpus BLEU with its default tokenizer (13a), with a bootstrap interval over rows."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="BLEU-4 in points, by sacrebleu with its default settings.",
            citation="Papineni et al. 2002, BLEU; Post 2018, A Call for Clarity in Reporting BLEU Scores",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def add_batch(self, *, predictions=None, references=None):
        """References as strings or lists; `compute` comes here too."""
        # evaluate's own choice between two formats looks at the first row only, and writes a later list as its repr.
        super().add_batch(predictions=predictions, references=as_lists(references))

    def _compute(self, predictions, references):
        corpus = BLEU()
        # sacrebleu wants a list per reference number, with None where a row has fewer.
        score = corpus.corpus_score(predictions, [list(stream) for stream in zip_longest(*references)])
        sentence, statistics = BLEU(effective_order=True), np.empty((len(predictions), 10))
        for row, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
            found = sentence.sentence_score(prediction, texts)
            statistics[row] = [found.sys_len, found.ref_len, *found.counts, *found.totals]
        # sacrebleu's own bootstrap holds resamples x rows in memory; counts of drawn rows give the same sums.
        draws = [_bleu(counts @ statistics) for counts in resampled_counts(len(predictions))]
        return {"bleu": score.score, "bleu_ci95": ci95(draws), "signature": str(corpus.get_signature())}


def _bleu(sums: np.ndarray) -> float:
    """BLEU of summed statistics: lengths of prediction and reference, matches and n-grams of orders 1 to 4."""
    length, reference_length, *counts = (int(x) for x in sums)
    return BLEU.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth_method="exp").score
