"""Text cleaning as pure functions, a pass that counts what it drops, and near-duplicate search. Called by the tasks and splits.py."""

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
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff]")
TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>|<!--.*?-->", re.S)
LONGEST = 1_000_000  # characters of one text; a longer one is a dump, not an example


def fix_unicode(text: str) -> str:
    """Mends mojibake (`vÃ©` -> `vé`) and normalises to NFC; ftfy with curly quotes, ligatures and HTML left as they are."""
    return ftfy.fix_text(text, unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False)


def strip_control(text: str) -> str:
    """Removes control and zero-width characters, except tab and newline."""
    return CONTROL.sub("", text)


def strip_html(text: str) -> str:
    """Removes tags and comments and decodes entities. For text that is known to be HTML: code with `<T>` in it would suffer."""
    return html.unescape(TAG.sub("", text))


def normalize_whitespace(text: str) -> str:
    """No blanks at line ends, at most one empty line in a row; indentation stays, since it means something in code."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def clean_text(text: str) -> str:
    """What is safe for any text: Unicode, control characters, white space."""
    return normalize_whitespace(strip_control(fix_unicode(text)))


def duplicate_line_share(text: str) -> float:
    """Share of non-empty lines that stand elsewhere in the text too, 0 to 1 (Gopher, Rae et al. 2021, table A1)."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def top_ngram_share(text: str, n: int = 3) -> float:
    """Share of the characters that the most frequent n-gram of words covers, 0 to 1 (Gopher, Rae et al. 2021, table A1)."""
    words = text.split()
    if len(words) < n + 1:
        return 0.0
    ngram, count = Counter(zip(*(words[i:] for i in range(n)), strict=False)).most_common(1)[0]
    return min(1.0, count * len(" ".join(ngram)) / len(text)) if count > 1 else 0.0


def language(text: str) -> str:
    """ISO 639-1 code of the most likely language (py3langid, whose model lies in its wheel)."""
    import py3langid

    return py3langid.classify(text)[0]


def malformed(text) -> str | None:
    """Why something cannot be a text to learn from, or None: wrong type, empty, too long, mostly control characters."""
    if not isinstance(text, str):
        return "missing" if text is None else "wrong type"
    if not text.strip():
        return "empty"
    if len(text) > LONGEST:
        return "over 1 MB"
    if len(CONTROL.findall(text)) > len(text) / 4:
        return "control characters"
    return None


@dataclass
class CleaningReport:
    """`read = kept + dropped`, by reason; `bad` counts the rows that were malformed rather than merely unwanted."""

    read: int = 0
    kept: int = 0
    bad: int = 0
    dropped: Counter = field(default_factory=Counter)

    def __str__(self):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.most_common())
        return f"read {self.read:,} = kept {self.kept:,} + dropped {self.dropped.total():,}" + (f" ({reasons})" if reasons else "")

    def check(self, source: str, most: float = 0.05) -> None:
        """Raises UserError if more than `most` of the rows were malformed: then the file is not what it was taken for."""
        if self.bad > most * self.read:
            raise UserError(
                f"{source}: {self.bad:,} of {self.read:,} rows are unusable ({self}). Over {most:.0%} is taken as a mistake in the data "
                "or in --columns."
            )


def clean_rows(rows: Iterable[dict], convert: Callable[[dict], dict | str], report: CleaningReport) -> Iterator[dict]:
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


class NearDuplicates:
    """Finds texts whose word 5-grams have a Jaccard similarity of 0.8 or more: MinHash with banding (Broder 1997).

    120 hash functions in 20 bands of 6 rows propose a pair of similarity 0.8 with probability 1 - (1 - 0.8^6)^20 = 0.998. A proposed
    pair counts if its signatures agree in 72 % of the places: 0.8 less two standard errors.
    """

    BANDS, ROWS, AGREE = 20, 6, 0.72

    def __init__(self):
        self.signatures: list[np.ndarray] = []
        self.buckets: dict[bytes, list[int]] = {}

    def add(self, text: str) -> list[int]:
        """Adds a text; returns the numbers (order of adding, from 0) of its near-duplicates among those added before."""
        from rensa import RMinHash

        words = re.findall(r"\w+", text.lower())
        sketch = RMinHash(num_perm=self.BANDS * self.ROWS, seed=1)
        sketch.update([" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))])
        signature = np.array(sketch.digest(), dtype=np.uint32)
        number, found = len(self.signatures), set()
        self.signatures.append(signature)
        for band in range(self.BANDS):
            key = bytes([band]) + signature[band * self.ROWS : (band + 1) * self.ROWS].tobytes()
            # A bucket holds a few members: similar ones are found through any of them, and the work stays linear.
            bucket = self.buckets.setdefault(key, [])
            found.update(bucket)
            if len(bucket) < 8:
                bucket.append(number)
        return sorted(i for i in found if np.mean(self.signatures[i] == signature) >= self.AGREE)


def drop_near_duplicates(rows: Iterable[dict], text_of: Callable[[dict], str], report: CleaningReport) -> Iterator[dict]:
    """Streams rows and drops each whose text is a near-duplicate of an earlier one; counted in `report` as read."""
    index = NearDuplicates()

    def convert(row):
        return "near-duplicate" if index.add(text_of(row)) else row

    return clean_rows(rows, convert, report)
