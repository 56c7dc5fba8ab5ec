"""Training, validation and test rows. Official splits are kept; otherwise 80/10/10 with near-duplicates on one side."""

import hashlib
import logging
from collections.abc import Callable, Sequence

from shared import UserError
from shared.cleaning import NearDuplicates

log = logging.getLogger("taskbook")
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
        Row numbers for `train`, `validation` and `test`, each in an order that depends on the texts alone.

    Raises:
        UserError: a split would be empty.
    """
    # Sorted by hash first: then the clusters found, and the sides, are the same for any order of the rows.
    hashes = [hashlib.sha256(f"{seed}\0{text}".encode("utf8", "surrogatepass")).digest() for text in texts]
    order = sorted(range(len(texts)), key=hashes.__getitem__)
    clusters: dict[int, list[int]] = {}
    for position, label in enumerate(cluster([texts[i] for i in order])):
        clusters.setdefault(label, []).append(order[position])
    sides = {name: [] for name in SHARES}
    # Small sides are filled first, so that one large cluster lands in the training split.
    for rows in sorted(clusters.values(), key=lambda rows: hashes[rows[0]]):
        room = [name for name in ("test", "validation") if len(sides[name]) + len(rows) <= max(1, round(SHARES[name] * len(texts)))]
        sides[room[0] if room else "train"] += rows
    for name, rows in sides.items():
        if not rows:
            raise UserError(f"The {name} split is empty: {len(texts)} rows in {len(clusters)} groups of near-duplicates are too few.")
        rows.sort(key=hashes.__getitem__)
    log.info(
        "split %s; %s rows are near-duplicates of another, kept on its side",
        " ".join(f"{name} {len(rows):,}" for name, rows in sides.items()),
        f"{len(texts) - len(clusters):,}",
    )
    return sides


def split_dataset(data, text_of: Callable[[dict], str], seed: int = 42):
    """A DatasetDict with `train`, `validation`, `test`.

    Official splits are kept; a `test` that is missing is replaced by `validation`, and what is still missing is taken from `train`.
    """
    import datasets

    if "test" not in data and "validation" in data:
        data = datasets.DatasetDict(train=data["train"], test=data["validation"])
    sides = split_rows([text_of(row) for row in data["train"]], seed)
    if "test" not in data:
        return datasets.DatasetDict({name: data["train"].select(rows) for name, rows in sides.items()})
    if "validation" in data:
        return data
    rest = data["train"].select(sides["train"] + sides["test"])
    return datasets.DatasetDict(train=rest, validation=data["train"].select(sides["validation"]), test=data["test"])
