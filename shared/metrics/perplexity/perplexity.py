"""Perplexity from summed losses, weighted by tokens over the whole split. An `evaluate` module: `shared.metrics.load("perplexity")`."""

import datasets
import evaluate
import numpy as np

from shared.metrics import bootstrap_ratio, ci95


class Perplexity(evaluate.Metric):
    """exp(summed negative log-likelihood / tokens), with a bootstrap interval over rows."""

    def _info(self):
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood a token, over all tokens of all rows.",
            citation="Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks",
            inputs_description="predictions: summed nll of each row in nats; references: tokens of each row.",
            features=datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        loss = sum(predictions) / sum(references)
        interval = ci95(bootstrap_ratio(predictions, references))
        return {
            "loss": loss,
            "loss_ci95": interval,
            "perplexity": float(np.exp(loss)),
            "perplexity_ci95": [float(x) for x in np.exp(interval)],
        }
