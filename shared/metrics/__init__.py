"""Local `evaluate` modules, loaded by folder so that nothing is fetched, and bootstrap intervals for them."""

from pathlib import Path

import numpy as np


def load(name: str):
    """`evaluate.load` of the module in the folder `name` beside this file; works offline."""
    import evaluate

    return evaluate.load(str(Path(__file__).parent / name))


def bootstrap_ratio(numerators, denominators, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Ratio of sums over rows drawn with replacement (Efron & Tibshirani 1993): mean loss, accuracy, ...

    Args:
        numerators: (rows,) or (rows, systems) when several systems are compared on the same rows (paired, Koehn 2004).
        denominators: (rows,).

    Returns:
        (resamples,) or (resamples, systems). Memory does not grow with rows times resamples.
    """
    rng = np.random.default_rng(seed)
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    rows, ratios = len(denominators), []
    for _ in range(resamples):
        counts = rng.multinomial(rows, np.full(rows, 1 / rows))
        ratios.append(counts @ numerators / (counts @ denominators))
    return np.array(ratios)


def ci95(samples) -> list[float]:
    """2.5 and 97.5 percentiles of bootstrap samples."""
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])]
