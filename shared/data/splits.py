"""Training, validation and test rows. Official splits are kept; otherwise 80/10/10 with near-duplicates on one side."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence

from shared import UserError
from shared.data.near_duplicates import NearDuplicates

log = logging.getLogger("taskbook")
LOOKED_AT = 20_000  # rows of an official training split, in search of what the others repeat: about 10 s of long texts
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def cluster(texts: Sequence[str]) -> list[int]:
    """For each text the number of its cluster: texts linked by near-duplicate pairs, directly or through others."""
    parent, index = list(range(len(texts))), NearDuplicates()

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, text in enumerate(texts):
        for j in index.add(text):
            parent[root(i)] = root(j)
    return [root(i) for i in range(len(texts))]


def split_rows(texts: Sequence[str], seed: int = 42) -> dict[str, list[int]]:
    """80/10/10 by cluster of near-duplicates; depends on the texts and the seed, not on the order of the rows.

    Returns:
        Row numbers for `train`, `validation` and `test`, each in an order that depends on the texts and the seed alone.

    Raises:
        UserError: a split would be empty.
    """
    copies: dict[bytes, list[int]] = {}
    for i, text in enumerate(texts):
        copies.setdefault(hashlib.sha256(f"{seed}\0{text}".encode("utf8", "surrogatepass")).digest(), []).append(i)
    # Sorted by hash first: then the clusters found, and the sides, are the same for any order of the rows.
    order = sorted(copies)
    clusters: dict[int, list[int]] = {}
    for digest, label in zip(order, cluster([texts[copies[digest][0]] for digest in order]), strict=True):
        clusters.setdefault(label, []).extend(copies[digest])
    # Small sides are filled first, so that one large cluster lands in the training split.
    sides: dict[str, list[int]] = {name: [] for name in SHARES}
    room = {name: max(1, round(SHARES[name] * len(texts))) for name in ("test", "validation")}
    for rows in clusters.values():
        side = next((name for name in room if len(sides[name]) + len(rows) <= room[name]), "train")
        sides[side] += rows
    for name, rows in sides.items():
        if not rows:
            raise UserError(
                f"The {name} split is empty: {len(texts):,} rows make {len(clusters):,} groups of near-duplicates, "
                "too few or too large to share out.\n"
                "Add rows that differ, or give the data as train, validation and test splits."
            )
    log.info(
        "split %s; %s groups, %s rows are exact or near-duplicates of another and stay on its side",
        " ".join(f"{name} {len(rows):,}" for name, rows in sides.items()),
        f"{len(clusters):,}",
        f"{len(texts) - len(clusters):,}",
    )
    return sides


def first_rows(rows, most: int | None):
    """The first `most` rows of a `datasets.Dataset`; all of them for None."""
    return rows if most is None else rows.select(range(min(most, len(rows))))


def report_repeated(official: dict, text_of: Callable[[dict], str]) -> None:
    """Says how many rows of official splits are near-duplicates of the training split. They stay: the split is not ours."""
    looked_at = {name: first_rows(rows.shuffle(seed=0), LOOKED_AT) for name, rows in official.items()}
    texts = {name: Counter(text_of(row) for row in rows) for name, rows in looked_at.items()}
    index, train = NearDuplicates(), texts.pop("train")
    held_out = [(name, rows) for name, counts in texts.items() for rows in counts.values()]
    for counts in texts.values():
        for text in counts:
            index.add(text)
    repeated = {number for text in train for number in index.near(text)}
    of = f" (in {LOOKED_AT:,} of its rows)" if len(official["train"]) > LOOKED_AT else ""
    for split in texts:
        if found := sum(rows for number, (name, rows) in enumerate(held_out) if name == split and number in repeated):
            log.warning(
                "%s of %s rows of the official %s split are near-duplicates of training rows%s: its metrics flatter",
                *(f"{found:,}", f"{len(looked_at[split]):,}", split, of),
            )


def split_dataset(data, text_of: Callable[[dict], str], seed: int = 42, read: Callable[[dict], str] | None = None):
    """A DatasetDict with `train`, `validation`, `test` from one with at least `train`.

    Official splits are kept, each in an order that the seed draws: files are often sorted, and then the first rows are all of
    one kind. A `test` that is missing is replaced by `validation`; what is still missing is taken from `train`: a tenth of it
    each.

    Args:
        read: what the model reads of a row, where `text_of` is more (the article of a paragraph): what official splits repeat of
            the training split is looked for in it.

    Raises:
        UserError: there is no `train`, or a split is empty.
    """
    import datasets

    if "train" not in data:
        raise UserError(f"no train split: found {', '.join(data)}. Rename the one to learn from to train.")
    official = {name: data[name] for name in SHARES if name in data}
    if "test" not in official and "validation" in official:
        official["test"] = official.pop("validation")
        log.info("no official test split: the official validation split is used as test")
    for name, rows in official.items():
        if not len(rows):
            raise UserError(
                f"The official {name} split has no rows left after cleaning. Remove it to have one taken from train."
            )
    if len(official) > 1:
        report_repeated(official, read or text_of)
    drawn = {}
    if len(official) < len(SHARES):
        train = data["train"]
        sides = split_rows([text_of(row) for row in train], seed)
        if "test" in official:
            sides["train"] += sides.pop("test")
        drawn = {name: train.select(rows) for name, rows in sides.items()}  # in the order of their hashes
        official |= drawn
    return datasets.DatasetDict(
        {name: official[name] if name in drawn else official[name].shuffle(seed=seed) for name in SHARES}
    )
