"""Did training help? Two models, and trivial baselines, on the same test rows. Called by each task."""

import numpy as np

from shared.metrics import paired_difference

FEW_ROWS = 10  # the percentile interval of fewer rows is too narrow to call anything shown


def did_it_help(
    base: dict,
    trained: dict,
    metric: str = "perplexity",
    baselines: dict[str, dict] | None = None,
    before: str = "untrained",
) -> dict:
    """Compares two models on the same rows of the test split, by the paired bootstrap (Koehn 2004).

    Args:
        base, trained: scores, a list each with one entry a row, in the same order. `{"nll", "tokens"}` for perplexity,
            `{"correct", "tokens"}` for accuracy, else `{metric: [...]}`: the mean over rows counts, more is better.
        metric: what is compared. Perplexity is tested as loss.
        baselines: trivial systems by name, scored alike; the line begins with which of them the trained model beats.
        before: what `base` is called beside them.

    Returns:
        `line` for people, `better_rows` (share) and, named after the metric (`loss` for perplexity), `<m>_difference`,
        `<m>_difference_ci95`, `<m>_difference_p_value`; `scores`, what was compared, for scores.json.
    """
    key, weights, higher = {"perplexity": ("nll", "tokens", False), "accuracy": ("correct", "tokens", True)}.get(
        metric, (metric, None, True)
    )
    weights = trained[weights] if weights else None

    def value(system: dict) -> float:
        mean = float(np.sum(system[key]) / (len(system[key]) if weights is None else np.sum(weights)))
        return float(np.exp(mean)) if metric == "perplexity" else mean

    found = paired_difference(base[key], trained[key], weights, higher)
    tested, verdict = "loss" if metric == "perplexity" else metric, _verdict(found, higher)
    low, high = (short_number(end, found["difference_ci95"]) for end in found["difference_ci95"])
    before_value, after = value(base), value(trained)
    # A share of a margin, which may be of either sign, says nothing
    change = f"{(after / before_value - 1) * 100:+.1f} %, " if before_value and metric != "margin" else ""
    why = ""
    if verdict == "Not clearly":
        why = (
            f" Fewer than {FEW_ROWS} rows show nothing." if found["rows"] < FEW_ROWS else " The interval includes zero."
        )
    if same := np.array_equal(base[key], trained[key]):
        verdict, why = (
            "No",
            " Both models score the same in every row: nothing was learned, or the adapter is not active.",
        )
    beside = {verdict: [before]}  # systems by the verdict on the trained model beside them
    for name, scores in (baselines or {}).items():
        against = _verdict(paired_difference(scores[key], trained[key], weights, higher), higher)
        beside.setdefault(against, []).append(name)
    if baselines and not same:
        words = {"Yes": "better than", "Not clearly": "not clearly better than", "No": "worse than"}
        verdict = ", ".join(f"{words[each]} {' and '.join(beside[each])}" for each in words if each in beside)
    line = (
        f"Did it help? {verdict[0].upper()}{verdict[1:]}: test {metric} {short_number(before_value)} -> {short_number(after)} "
        f"({change}95 % interval of the difference in {tested} {low} to {high}), better on {found['better_rows'] * 100:.0f} % of "
        f"{found['rows']:,} rows.{why}"
    )
    for name, scores in (baselines or {}).items():
        line += f" {name[0].upper()}{name[1:]}: {short_number(value(scores))}."
    return {
        "line": line,
        "better_rows": found["better_rows"],
        f"{tested}_difference": found["difference"],
        f"{tested}_difference_ci95": found["difference_ci95"],
        f"{tested}_difference_p_value": found["p_value"],
        "scores": {"metric": metric, "score": list(trained[key]), "weight": None if weights is None else list(weights)},
    }


def _verdict(found: dict, higher_is_better: bool) -> str:
    low, high = found["difference_ci95"]
    if found["rows"] < FEW_ROWS or low <= 0 <= high:
        return "Not clearly"
    return "Yes" if (low > 0) == higher_is_better else "No"


def short_number(value: float, beside: list[float] | None = None) -> str:
    """About three significant digits; as many decimals as the smallest of the numbers `beside` it needs."""
    size = min((abs(x) for x in beside or [value] if x), default=1)
    decimals = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.01 else 5
    return f"{value:,.{decimals}f}"
