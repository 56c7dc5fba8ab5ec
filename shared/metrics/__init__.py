"""Bootstrap intervals over the rows of a split, and the local `evaluate` modules that lie beside this file.

Called by the modules, the tasks and `shared.publish.card`. Rows are the unit that is drawn: the tokens of one conversation
depend on each other, so intervals over tokens would be far too narrow.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared import UserError


def load(name: str):
    """`evaluate.load` of the folder `name` beside this file; sends no request and runs no code but the file there.

    Raises:
        ValueError: there is no such module; the message lists those there are.
        UserError: `evaluate` has no folder to write to.
    """
    folder = Path(__file__).resolve().parent / name
    if not (folder / f"{name}.py").is_file():
        known = ", ".join(sorted(path.stem for path in folder.parent.glob("*/*.py") if path.stem == path.parent.name))
        raise ValueError(f"No metric {name!r} in {folder.parent.name}/. Known: {known}.")
    check_caches("metrics", "modules")
    import evaluate  # takes seconds

    # In memory: evaluate's default is one Arrow file for all processes of a user, and two runs would meet in it.
    return evaluate.load(str(folder), keep_in_memory=True)


def check_caches(*names: str) -> None:
    """Whether Hugging Face's libraries can write where they put what they make of data and metrics, of local ones, too.

    Args:
        names: of their caches, "datasets", "metrics" or "modules".

    Raises:
        UserError: one cannot be written.
    """
    from huggingface_hub.constants import HF_HOME

    for name in names:
        variable = f"HF_{name.upper()}_CACHE"
        folder = Path(os.environ.get(variable) or Path(HF_HOME) / name).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            denied = None if os.access(folder, os.W_OK) else "Permission denied"
        except OSError as error:
            denied = error.strerror
        if denied:
            raise UserError(
                f"cache not writable: {folder} ({denied}). Set HF_HOME to a folder of yours, or {variable}."
            )


def bootstrap_ratio(numerators, denominators=None, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Sum of numerators / sum of denominators, over rows drawn with replacement (Efron & Tibshirani 1993, ch. 6).

    One statistic serves three: loss (summed nll / tokens), accuracy (correct / tokens) and, without denominators,
    means.

    Args:
        numerators: (rows,).
        denominators: (rows,), 0 or more; rows with 0 hold nothing to measure and are left out. None: 1 for each row.
        resamples: how many times `rows` rows are drawn.
        seed: the same seed and number of rows draw the same rows.

    Returns:
        (resamples,) ratios. Memory grows with rows, not with rows times resamples.

    Raises:
        UserError: no row, or a value that is not finite.
        ValueError: different lengths, a negative denominator, or a score in a row whose denominator is 0.
    """
    columns = _columns(numerators, denominators)
    sums = np.array([counts @ columns for counts in resampled_counts(len(columns), resamples, seed)])
    return sums[:, 0] / sums[:, 1]


def resampled_counts(rows: int, resamples: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
    """Draws `rows` rows with replacement, `resamples` times: (rows,) how often each row was drawn."""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(random.integers(rows, size=rows), minlength=rows)


def ci95(samples) -> list[float]:
    """2.5 and 97.5 percentiles of bootstrap samples: the percentile interval (Efron & Tibshirani 1993, ch. 13)."""
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])]


def means(rows: dict) -> dict:
    """The mean over rows of each list of scores, under its name, and its interval under `<name>_ci95`."""
    found = {}
    for name, scores in rows.items():
        draws = bootstrap_ratio(scores)  # checks the rows, so it comes first
        found |= {name: float(np.mean(scores)), f"{name}_ci95": ci95(draws)}
    return found


def as_lists(references) -> list[list[str]]:
    """References as a list a row, whether a row gives one string or several.

    Raises:
        UserError: no row, or a row without a reference.
    """
    lists = [[row] if isinstance(row, str) else list(row) for row in references]
    if not lists:
        raise UserError("Nothing to measure: no row. Is the split empty?")
    if [] in lists:
        raise UserError(f"Row {lists.index([])} has no reference to compare with: remove it, or give it one.")
    return lists


def paired_difference(
    base, trained, denominators=None, higher_is_better: bool = False, resamples: int = 1000, seed: int = 0
) -> dict:
    """Compares two systems on the same rows by the paired bootstrap (Koehn 2004): both are scored on the same draws.

    Args:
        base, trained: (rows,) numerators of each system, in the same order.
        denominators, resamples, seed: as in `bootstrap_ratio`; the denominators hold for both systems.
        higher_is_better: True for accuracy, ROUGE, F1; False for losses.

    Returns:
        `difference` (trained - base), its `difference_ci95`, `p_value` (two-sided: twice the share of draws on the
        other side of zero, never below 1 / resamples), `better_rows` (share of rows where trained is strictly better),
        `rows` (how many were compared).

    Raises:
        UserError, ValueError: as `bootstrap_ratio`.
    """
    old, new = _columns(base, denominators), _columns(trained, denominators)
    if old.shape != new.shape:
        raise ValueError(f"Not the same rows: {len(old):,} of the base and {len(new):,} of the trained model.")
    # Resampling the difference, not each system, gives exactly 0 for equal rows.
    change, weights = new[:, 0] - old[:, 0], new[:, 1]
    draws = bootstrap_ratio(change, weights, resamples, seed)
    other_side = min(np.mean(draws <= 0), np.mean(draws >= 0))
    return {
        "difference": float(change.sum() / weights.sum()),
        "difference_ci95": ci95(draws),
        "p_value": float(min(1, max(2 * other_side, 1 / resamples))),
        "better_rows": float(np.mean(change > 0 if higher_is_better else change < 0)),
        "rows": len(change),
    }


def macro_f1(predicted, labels, weights=None) -> float:
    """Mean over the classes of F1 = 2 tp / (2 tp + fp + fn); classes that neither occur nor are predicted are left out.

    Args:
        predicted, labels: (rows,) classes, as numbers or by name.
        weights: (rows,) how often each row counts; 1 where not given.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    number = np.unique(np.concatenate([predicted, labels]), return_inverse=True)[1]
    predicted, labels = number[: len(labels)], number[len(labels) :]
    size, hit = int(number.max()) + 1, predicted == labels
    true = np.bincount(labels[hit], weights[hit], size)
    both = np.bincount(predicted, weights, size) + np.bincount(labels, weights, size)
    return float(np.mean(2 * true[both > 0] / both[both > 0]))


def _columns(numerators, denominators) -> np.ndarray:
    """(rows, 2) of float64, checked, without the rows that have a denominator of 0."""
    numerators = np.asarray(numerators, dtype=np.float64)
    denominators = np.ones_like(numerators) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if numerators.ndim != 1 or numerators.shape != denominators.shape:
        raise ValueError(f"Expected two lists of equal length, found {numerators.shape} and {denominators.shape}.")
    columns = np.stack([numerators, denominators], axis=1)
    finite = np.isfinite(columns).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise UserError(
            f"Row {row} of the split scores {numerators[row]} over {denominators[row]}: training diverged, or fp16 "
            "overflowed. Lower --learning_rate, or train without --fp16."
        )
    if (denominators < 0).any():
        raise ValueError(f"Row {int(np.argmin(denominators))} has a negative denominator: {denominators.min()}.")
    if (numerators[denominators == 0] != 0).any():
        raise ValueError(
            "A row scores something over a denominator of 0: nll and token counts are not of the same rows."
        )
    columns = columns[denominators > 0]
    if not len(columns):
        raise UserError(
            f"Nothing to measure: {len(numerators)} rows, none with a token to predict. Is the split empty?"
        )
    return columns
