"""Perplexity from summed losses, weighted by tokens over the whole split: `shared.metrics.load("perplexity")`."""

import datasets
import evaluate
import numpy as np

# evaluate copies this one file to its cache and imports it there, so what it needs comes from the installed package.
# Where that is missing, evaluate says `pip install` and what follows From: below; `shared` on PyPI is not ours.
from shared.metrics import bootstrap_ratio, ci95  # From: -e .

INPUTS = """
Args:
    predictions: (rows,) summed negative log-likelihood of each row, in nats.
    references: (rows,) number of predicted tokens of each row; rows with 0 are left out.

Returns:
    loss: nats a token over all tokens of the split, not a mean over rows or batches.
    loss_ci95, perplexity_ci95: [low, high], 95 % bootstrap intervals over rows.
    perplexity: exp(loss).
"""


class Perplexity(evaluate.Metric):
    """exp(summed negative log-likelihood / tokens), with a bootstrap interval over rows."""

    def _info(self):
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood a token, over all tokens of all rows.",
            citation="Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        draws = bootstrap_ratio(predictions, references)  # checks the rows, so it comes first
        loss, interval = float(np.sum(predictions) / np.sum(references)), ci95(draws)
        # exp is monotone, so the interval of the loss maps onto that of perplexity (Efron & Tibshirani 1993, ch. 13).
        return {
            "loss": loss,
            "loss_ci95": interval,
            "perplexity": float(np.exp(loss)),
            "perplexity_ci95": [float(x) for x in np.exp(interval)],
        }
