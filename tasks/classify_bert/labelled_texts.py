"""Rows of any table as texts with labels. Used by train.py."""

from shared import UserError
from shared.data.cleaning import clean_text, malformed


def find_columns(columns: list[str], mapping: list[str]) -> dict[str, str]:
    """Where `text` and `label` are found, those two names unless `--columns text=... label=...` says otherwise.

    Raises:
        UserError: found / expected / how to map.
    """
    places = {"text": "text", "label": "label"} | dict(pair.partition("=")[::2] for pair in mapping)
    if set(places) != {"text", "label"} or not set(places.values()) <= set(columns):
        raise UserError(
            f"no columns {' and '.join(map(str, places.values()))}: found {', '.join(columns)}; expected text and label. "
            f"Map yours, for example --columns text={columns[0]} label={columns[-1]}."
        )
    return places


def to_row(row: dict, places: dict[str, str], names: list[str] | None = None, until: str | None = None) -> dict | str:
    """One row as `{"text", "label"}`, both text, or the reason for dropping it (see `shared.data.cleaning.clean_rows`).

    Args:
        names: of the classes, where the data set stores numbers and knows their names.
    """
    text, label = row[places["text"]], row[places["label"]]
    if reason := malformed(text):
        return f"bad: {reason}"
    if label is None or label == -1:  # what the Hub's data sets put in test splits whose labels are kept secret
        return "no label"
    label = names[label] if names else str(label).strip()
    label = label.partition(until)[0].strip() if until else label
    return {"text": clean_text(text), "label": label} if label and clean_text(text) else "bad: empty"
