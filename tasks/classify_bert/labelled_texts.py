"""Rows of any table as texts with labels. Used by train.py."""

from shared.data.cleaning import clean_text, malformed


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
