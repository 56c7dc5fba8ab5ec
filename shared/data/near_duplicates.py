"""Texts that say nearly the same: MinHash with banding, in 216 bytes a text. Used by splits, corpora and docs."""

import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from shared import one_spelling
from shared.data.cleaning import NO_BLANKS, CleaningReport, clean_rows

# Where a script puts no blanks between words every character counts as one.
WORD = re.compile(rf"[{NO_BLANKS}]|[^\W{NO_BLANKS}]+")


def shingles(text: str) -> list[str]:
    """The word 5-grams of a text in lower case without punctuation; all its words where it has fewer than five."""
    words = WORD.findall(one_spelling(text.casefold())) or [ascii(text.strip())]
    if len(words) < 5:
        return [" ".join(words)]
    return [*map(" ".join, zip(words, words[1:], words[2:], words[3:], words[4:], strict=False))]


def signature(text: str) -> np.ndarray:
    """MinHash of the shingles: 120 values, of each the lowest 8 bits (b-bit minwise hashing, Li and König 2010).

    Two signatures agree in a share J + (1 - J) / 256 of the places, J being the Jaccard similarity.
    """
    from rensa import RMinHash

    sketch = RMinHash(num_perm=NearDuplicates.HASHES, seed=1)
    sketch.update(shingles(text))
    return np.array(sketch.digest(), dtype=np.uint32).astype(np.uint8)


class NearDuplicates:
    """Finds texts whose word 5-grams have a Jaccard similarity of 0.8 or more: MinHash with banding (Broder 1997).

    12 bands of 5 out of 120 hash values propose a pair of similarity 0.8 with probability 1 - (1 - 0.8^5)^12 = 0.99.
    A proposed pair counts if its signatures agree in 74 % of the places: 0.8 less two standard errors (0.026 measured),
    so pairs between 0.7 and 0.8 are often found too.

    Memory: 216 bytes a text, whatever its length, for the next power of two of texts: 0.9 GB for 2 to 4 million, half as
    much again while it grows. A hash table without keys: for each band the newest text of a slot (`heads`), for each text
    the one before it in its slot (`before`); what else fell into the slot is told apart by its signature.
    """

    HASHES, BANDS, ROWS, AGREE = 120, 12, 5, 0.74
    BUCKET = 8  # texts looked at in a slot: more (a page template on every row) would make the work quadratic
    NONE = 2**32 - 1

    def __init__(self):
        # Random odd factors turn the values of a band into one 64-bit key, whose highest bits are the slot.
        self.factors = np.random.default_rng(1).integers(1, 2**63, (self.BANDS, self.ROWS), dtype=np.uint64) * 2 + 1
        self.size = 0
        self.signatures = np.empty((0, self.HASHES), np.uint8)
        self._grow(1024)

    def _slots(self, signatures: np.ndarray) -> np.ndarray:
        """The slot of each band, `(..., bands)`, of signatures `(..., hashes)`."""
        bands = signatures[..., : self.BANDS * self.ROWS].reshape(*signatures.shape[:-1], self.BANDS, self.ROWS)
        keys = (bands * self.factors).sum(axis=-1, dtype=np.uint64)
        return (keys >> np.uint64(64 - int(self.capacity).bit_length() + 1)).astype(np.int64)

    def _grow(self, capacity: int) -> None:
        """Room for `capacity` texts, a power of two; the slots are laid anew, since there are more of them."""
        self.capacity, old = capacity, self.signatures
        self.signatures = np.empty((capacity, self.HASHES), np.uint8)
        self.signatures[: self.size] = old[: self.size]
        del old
        self.heads = np.full((self.BANDS, capacity), self.NONE, np.uint32)
        self.before = np.full((self.BANDS, capacity), self.NONE, np.uint32)
        for start in range(0, self.size, 8192):
            stop = min(self.size, start + 8192)
            slots = self._slots(self.signatures[start:stop])
            for band in range(self.BANDS):
                order = np.argsort(slots[:, band], kind="stable")
                slot, number = slots[order, band], (order + start).astype(np.uint32)
                first = np.r_[True, slot[1:] != slot[:-1]]
                self.before[band, number] = np.where(
                    first, self.heads[band, slot], np.r_[np.uint32(self.NONE), number[:-1]]
                )
                self.heads[band, slot] = number  # of several with one slot numpy keeps the last, the newest

    def candidates(self, slots: list[int]) -> list[int]:
        """Numbers of the texts in the slots (one a band), at most the BUCKET newest of each."""
        found, heads, before = set(), memoryview(self.heads), memoryview(self.before)
        for band, slot in enumerate(slots):
            number = heads[band, slot]
            for _ in range(self.BUCKET):
                if number == self.NONE:
                    break
                found.add(number)
                number = before[band, number]
        return sorted(found)

    def _near(self, signature: np.ndarray) -> tuple[list[int], list[int]]:
        """Numbers of the near-duplicates of a signature, and its slots."""
        slots = self._slots(signature).tolist()
        near = self.candidates(slots)
        agree = (self.signatures[near] == signature).sum(axis=1) >= self.AGREE * self.HASHES
        return [number for number, enough in zip(near, agree.tolist(), strict=True) if enough], slots

    def add(self, text: str, only_new: bool = False) -> list[int]:
        """Adds a text; returns the numbers (order of adding, from 0) of its near-duplicates among those added before.

        With `only_new`, a text that has near-duplicates is not added.
        """
        return self.add_signature(signature(text), only_new)

    def near(self, text: str) -> list[int]:
        """As `add`, of a text that is not added."""
        return self._near(signature(text))[0]

    def add_signature(self, signature: np.ndarray, only_new: bool = False) -> list[int]:
        """Like `add`, for a text whose `signature` was computed before, for instance in another process."""
        found, slots = self._near(signature)
        if found and only_new:
            return found
        if self.size == self.capacity:
            self._grow(2 * self.capacity)
            slots = self._slots(signature)
        self.signatures[self.size] = signature
        bands = range(self.BANDS)
        self.before[:, self.size] = self.heads[bands, slots]
        self.heads[bands, slots] = self.size
        self.size += 1
        return found


def drop_near_duplicates(rows: Iterable, text_of: Callable[[dict], str], report: CleaningReport) -> Iterator[dict]:
    """Streams clean rows and drops each whose text is an exact or near-duplicate of one kept before.

    A pass of its own, so `report` is to be a new one: it counts what this pass reads.
    """
    index = NearDuplicates()

    def convert(row):
        return "near-duplicate" if index.add(text_of(row), only_new=True) else row

    return clean_rows(rows, convert, report)
