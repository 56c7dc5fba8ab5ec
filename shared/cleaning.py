"""Text cleaning as pure functions, a pass that counts what it drops, near-duplicates. Called by tasks and splits.py."""

import html
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import ftfy
import numpy as np

from shared import UserError

log = logging.getLogger("taskbook")

LINE = re.compile(r"[^\n]*\n|[^\n]+")
PLAIN = re.compile(r"[\t\n\x20-\x7e]*")  # nothing in it that ftfy could mend; nearly all of an English corpus
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff]")
FTFY = ftfy.TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False
)
LONGEST = 1_000_000  # characters of one text; a longer one is a dump, not an example
HIDDEN = re.compile(r"<(!--|script\b|style\b)", re.I)
HIDDEN_END = {
    "!--": re.compile("-->"),
    "script": re.compile(r"</script\s*>", re.I),
    "style": re.compile(r"</style\s*>", re.I),
}
BLOCK = re.compile(
    r"</?(?:p|div|br|hr|li|ul|ol|dl|dt|dd|tr|table|h[1-6]|pre|blockquote|section|article)\b[^<>]*>", re.I
)
TAG = re.compile(r"</?[a-zA-Z!?][^<>]*>")
# Chinese and Japanese put no blanks between words: there every character counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def fix_unicode(text: str) -> str:
    """Mends mojibake (`vÃ©` -> `vé`), normalises to NFC; ftfy with quotes, ligatures, widths and HTML left alone."""
    if PLAIN.fullmatch(text):
        return text
    return "".join(line if PLAIN.fullmatch(line) else ftfy.fix_text(line, FTFY) for line in LINE.findall(text))


def strip_control(text: str) -> str:
    """Removes control and zero-width characters, except tab and newline; a page break becomes a newline.

    Joiners (U+200C, U+200D) stay: Persian spelling and emoji need them.
    """
    return CONTROL.sub("", text.replace("\x0c", "\n"))


def strip_html(text: str) -> str:
    """The words of a page: no tags, comments, scripts, styles; entities decoded; each paragraph on a line of its own.

    For text that is known to be HTML: code with `<T>` in it would suffer. Linear in the length, whatever the input.
    """
    kept, at = [], 0
    for opening in HIDDEN.finditer(text):
        if opening.start() >= at:
            kept.append(text[at : opening.start()])
            closing = HIDDEN_END[opening[1].lower()].search(text, opening.end())
            at = closing.end() if closing else len(text)  # never closed: hidden to the end, as in a browser
    visible = "".join(kept) + text[at:]
    return html.unescape(TAG.sub("", BLOCK.sub("\n", visible)))


def normalize_whitespace(text: str) -> str:
    """No blanks at line ends, at most one empty line in a row; indentation stays, since it means something in code."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def clean_text(text: str) -> str:
    """What is safe for any text: Unicode, control characters, white space."""
    return normalize_whitespace(strip_control(fix_unicode(text)))


def malformed(text) -> str | None:
    """Why something cannot be a text to learn from, or None: wrong type, empty, too long, many control characters."""
    if not isinstance(text, str):
        return "missing" if text is None else "wrong type"
    if not text.strip():
        return "empty"
    if len(text) > LONGEST:
        return "over 1 MB"
    if len(CONTROL.findall(text)) > len(text) / 4:
        return "control characters"
    return None


def duplicate_line_share(text: str) -> float:
    """Share of the non-empty lines that repeat an earlier one, 0 to 1 (Gopher, Rae et al. 2021, table A1)."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def top_ngram_share(text: str, n: int) -> float:
    """Share of the characters that the most frequent n-gram of words covers, 0 to 1 (Gopher, table A1)."""
    words = text.split()
    ngrams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if not ngrams:
        return 0.0
    ngram, count = ngrams.most_common(1)[0]
    return min(1.0, count * len(" ".join(ngram)) / len(text)) if count > 1 else 0.0


def repetitive(text: str) -> str | None:
    """The filter for repetition, at Gopher's limits (Rae et al. 2021, table A1)."""
    if duplicate_line_share(text) > 0.30:
        return "repeated lines"
    # An n-gram covers at most n times what its most covering word does: mostly that spares counting the n-grams.
    words = Counter(text.split())
    cover = max((count * (len(word) + 1) for word, count in words.items()), default=0) / max(1, len(text))
    limits = ((2, 0.20), (3, 0.18), (4, 0.16))
    if any(n * cover > most and top_ngram_share(text, n) > most for n, most in limits):
        return "repeated words"
    return None


def words_between(fewest: int = 50, most: int = 100_000) -> Callable[[str], str | None]:
    """The filter for length in words; Gopher's limits unless told."""

    def wrong_length(text):
        count = len(text.split())
        return "too short" if count < fewest else "too long" if count > most else None

    return wrong_length


def language(text: str) -> str:
    """ISO 639-1 code of the most likely language (py3langid, offline). Unsure below about 20 words."""
    import py3langid

    return py3langid.classify(text)[0]


def languages(*codes: str) -> Callable[[str], str | None]:
    """The filter that keeps texts in one of the languages, for example `languages("en", "vi")`."""

    def other_language(text):
        return None if language(text) in codes else "other language"

    return other_language


@dataclass
class CleaningReport:
    """`read = kept + dropped`, by reason; `bad` counts the rows that were malformed rather than merely unwanted."""

    read: int = 0
    kept: int = 0
    bad: int = 0
    dropped: Counter = field(default_factory=Counter)

    def __str__(self):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.most_common())
        line = f"read {self.read:,} = kept {self.kept:,} + dropped {self.dropped.total():,}"
        return f"{line} ({reasons})" if reasons else line

    def check(self, source: str, most: float = 0.05) -> None:
        """Call when all rows are read.

        Raises:
            UserError: more than `most` of the rows were malformed, so the file is not what it was taken for.
        """
        if self.bad > most * self.read:
            raise UserError(
                f"{source}: {self.bad:,} of {self.read:,} rows are unusable ({self}).\n"
                f"Over {most:.0%} is taken as a mistake in the data or in --columns."
            )


def clean_rows(rows: Iterable, convert: Callable[[dict], dict | str], report: CleaningReport) -> Iterator[dict]:
    """Streams rows through `convert`, which returns the clean row, or the reason for dropping it as a text.

    A reason that begins with `bad: ` says that the row is malformed; see `CleaningReport.check`.
    """
    for row in rows:
        report.read += 1
        result = convert(row)
        if isinstance(result, str):
            report.bad += result.startswith("bad: ")
            report.dropped[result.removeprefix("bad: ")] += 1
        else:
            report.kept += 1
            yield result


def clean_dataset(data, convert: Callable[[dict], dict | str], source: str, features=None) -> tuple:
    """`clean_rows` on each split of a data set.

    Args:
        data: splits by name, each an iterable of rows.
        convert: see `clean_rows`. source: the name of the data, for the log and for errors.
        features: `datasets.Features` of the rows where their values alone do not tell.

    Returns:
        `datasets.DatasetDict` and the report. A split of which nothing is left is empty and has the columns of the others.

    Raises:
        UserError: over 5 % of the rows are bad, or none is left.
    """
    from datasets import Dataset, DatasetDict

    report = CleaningReport()
    kept = {name: list(clean_rows(rows, convert, report)) for name, rows in data.items()}
    report.check(source)
    log.info("%s: %s", source, report)
    if not report.kept:
        raise UserError(f"{source}: no row is left after cleaning ({report}).")
    filled = {name: Dataset.from_list(rows, features=features) for name, rows in kept.items() if rows}
    features = next(iter(filled.values())).features
    empty = Dataset.from_dict({column: [] for column in features}, features=features)
    return DatasetDict({name: filled.get(name, empty) for name in kept}), report


def document_cleaner(column: str = "text", filters: Iterable[Callable[[str], str | None]] = ()) -> Callable:
    """A `convert` for `clean_rows`: plain documents in a column, returned as `{"text": clean text}`.

    Filters get the clean text and return a reason to drop it, or None: `[words_between(), repetitive]`.
    """
    filters = list(filters)

    def convert(row):
        text = row.get(column) if isinstance(row, dict) else row
        reason = malformed(text)
        if reason:
            return f"bad: {reason}"
        text = clean_text(text)
        if not text:
            return "bad: empty"
        reason = next((reason for keep in filters if (reason := keep(text))), None)
        return reason or {"text": text}

    return convert


def shingles(text: str) -> list[str]:
    """The word 5-grams of a text in lower case without punctuation; all its words where it has fewer than five."""
    words = WORD.findall(unicodedata.normalize("NFC", text.casefold())) or [ascii(text.strip())]
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

    def add(self, text: str, only_new: bool = False) -> list[int]:
        """Adds a text; returns the numbers (order of adding, from 0) of its near-duplicates among those added before.

        With `only_new`, a text that has near-duplicates is not added.
        """
        return self.add_signature(signature(text), only_new)

    def add_signature(self, signature: np.ndarray, only_new: bool = False) -> list[int]:
        """Like `add`, for a text whose `signature` was computed before, for instance in another process."""
        slots = self._slots(signature).tolist()
        near = self.candidates(slots)
        agree = (self.signatures[near] == signature).sum(axis=1) >= self.AGREE * self.HASHES
        found = [number for number, enough in zip(near, agree.tolist(), strict=True) if enough]
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
