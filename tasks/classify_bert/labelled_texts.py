"""Rows of any table as texts with labels. Used by train.py."""

import re
from collections import Counter
from collections.abc import Iterable

from datasets import Dataset

from shared import UserError, one_spelling
from shared.data.cleaning import clean_text, malformed

# Of labels, as a table writes it: `['a', 'b']`, `[0, 1]`, `{"a": 1}`
LIST = re.compile(r"""\s*(?:\[\s*["'].*["']\s*\]|\[(?:\s*\d+\s*,)+\s*\d+\s*\]|\{\s*["'].*:.*\})\s*""", re.S)


def hides_labels(labels: dict[str, Iterable]) -> bool:
    """Whether -1 is what the Hub's data sets put in test splits whose labels are kept secret: a split holds nothing else, and the
    training split none.

    Args:
        labels: of each split.
    """
    found = {split: {str(label) for label in each} for split, each in labels.items()}
    return {"-1"} in found.values() and "-1" not in found.get("train", ())


def named(splits: dict, column: str) -> dict:
    """The splits, with names in the place of numbers where a split knows the names of its classes (`ClassLabel`), or another one
    does and it has numbers alone. Files of their own number the same names differently: each that lacks a class, from there on.
    """
    own = {split: getattr(rows.features[column], "names", None) for split, rows in splits.items()}
    known = next(filter(None, own.values()), None)
    if known is None:
        return splits

    def words(rows, names: list[str]):
        for row in rows:
            label = row[column]
            number = str(label).removesuffix(".0")
            if number == "-1":  # the Hub's, for none
                label = None
            elif number.isdecimal() and number not in names and int(number) < len(names):
                label = names[int(number)]
            yield {**row, column: label}

    return {split: words(rows, own[split] or known) for split, rows in splits.items()}


def to_row(row: dict, places: dict[str, str], until: str | None = None, hidden: bool = False) -> dict | str:
    """One row as `{"text", "label"}`, both text, or the reason for dropping it (see `shared.data.cleaning.clean_rows`).

    Args:
        hidden: -1 is no label, see `hides_labels`.

    Raises:
        UserError: a label that is a list or a dictionary.
    """
    text, label = row[places["text"]], row[places["label"]]
    if reason := malformed(text, places["text"]):
        return f"bad: {reason}"
    if isinstance(label, list | dict) or isinstance(label, str) and LIST.fullmatch(label):
        raise UserError(
            f"the label of {text[:40]!r} is {str(label)[:60]}: this task gives each text one class. Write one, as text or number."
        )
    if label is None or label != label or str(label) == "-1" and hidden:  # NaN: an empty cell
        return "no label"
    if isinstance(label, float) and label.is_integer():  # pandas makes floats of whole numbers beside an empty cell
        label = int(label)
    label = clean_text(str(label)).strip()
    label = label.partition(until)[0].strip() if until else label
    return {"text": clean_text(text), "label": label} if label and clean_text(text) else "bad: empty"


def likely_one(labels) -> str:
    """Which labels differ in case alone ("BILLING" beside "billing"), in blanks and hyphens between letters, in the place of a
    Vietnamese tone, or as 1 and 1.0; empty if none."""
    alike = {}
    for label in sorted(labels):
        plain = re.sub(r"^(-?\d+)\.0+$", r"\1", one_spelling(label.casefold()))
        alike.setdefault(re.sub(r"(?<=\w)[\s_-]+(?=\w)|_", "", plain) or label, []).append(label)
    groups = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    return f"likely one class, counted as several: {'; '.join(groups[:5])}" if groups else ""


def spelled_tokens(texts: Iterable[str], tokenizer) -> str:
    """How many texts spell a control token ("a [SEP] b"), empty if none: transformers reads it as such, deploy/ as characters."""
    spelled = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    counts = Counter(token for text in texts for token in set(spelled.findall(text)))
    return ", ".join(f"{token} in {count:,}" for token, count in counts.most_common())


def number_labels(splits: dict, classes: list[str], source: str) -> tuple[dict, dict[str, int]]:
    """The splits with each label as its place in `classes`, without the rows of other labels, and how many of each were left out.

    Raises:
        UserError: nothing is left of a split, with what its labels are and should be.
    """
    number, numbered, left_out = {label: i for i, label in enumerate(classes)}, {}, {}
    for split, rows in splits.items():
        kept = [{"text": row["text"], "label": number[row["label"]]} for row in rows if row["label"] in number]
        if not kept:
            found, learnt = (", ".join(map(repr, list(dict.fromkeys(each))[:5])) for each in (rows["label"], classes))
            raise UserError(
                f"{source}: no row of the {split} split has a label that is learnt: found {found}; learnt {learnt}. "
                "Write them alike."
            )
        numbered[split], left_out[split] = Dataset.from_list(kept), len(rows) - len(kept)
    return numbered, left_out


def refuse_measures(source: str, labels) -> None:
    """For labels that are no classes but quantities, 3.75 and the like.

    Raises:
        UserError: more than 20 distinct labels, most of them numbers with decimals.
    """
    decimals = [label for label in labels if re.fullmatch(r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?", label)]
    if len(labels) > 20 and len(decimals) > len(labels) / 2:
        raise UserError(
            f"{source}: {len(labels):,} labels such as {decimals[0]}: quantities, not classes. This task does no regression; "
            "write classes, such as low and high."
        )
