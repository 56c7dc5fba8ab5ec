"""Text cleaning as pure functions, a pass that counts what it drops, near-duplicates. Called by tasks and splits.py."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import ftfy

from shared import UserError

log = logging.getLogger("taskbook")

LINE = re.compile(r"[^\n]*\n|[^\n]+")
PLAIN = re.compile(r"[\t\n\x20-\x7e]*")  # nothing in it that ftfy could mend; nearly all of an English corpus
FENCE_OR_GAP = re.compile(
    r"(?P<fence>^[ \t]*(?P<marks>`{3,})[^`\n]*\n.*?(?:^[ \t]*(?P=marks)`*$|\Z))|\n{3,}", re.M | re.S
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff]")
FTFY = ftfy.TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False
)
# Thai and Lao, Burmese, Khmer, kana, Han
NO_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNSPACED = re.compile(f"[{NO_BLANKS}]+")
LONGEST = 1_000_000  # characters of one text; a longer one is a dump, not an example


def fix_unicode(text: str) -> str:
    """Mends mojibake (`vÃ©` -> `vé`), normalises to NFC; ftfy with quotes, ligatures, widths and HTML left alone."""
    if PLAIN.fullmatch(text):
        return text
    return "".join(line if PLAIN.fullmatch(line) else ftfy.fix_text(line, FTFY) for line in LINE.findall(text))


def strip_control(text: str) -> str:
    """Removes control and zero-width characters and soft hyphens, not tab and newline; a page break becomes a newline.

    Joiners (U+200C, U+200D) stay: Persian spelling and emoji need them.
    """
    return CONTROL.sub("", text.replace("\x0c", "\n"))


def normalize_whitespace(text: str, fences: bool = False) -> str:
    """No blanks at line ends, at most one empty line in a row; indentation stays, since it means something in code.

    Args:
        fences: empty lines within a Markdown fence of code stay, too.
    """
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    text = "\n".join(lines)
    if fences:
        return FENCE_OR_GAP.sub(lambda found: found["fence"] or "\n\n", text).strip("\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def clean_text(text: str, fences: bool = False) -> str:
    """What is safe for any text: Unicode, control characters, white space (`fences`: see `normalize_whitespace`)."""
    return normalize_whitespace(strip_control(fix_unicode(text)), fences)


def malformed(text, column: str = "") -> str | None:
    """Why something cannot be a text to learn from, or None: wrong type, empty, too long, many control characters.

    Args:
        column: of a value of the wrong type, which a second line then shows (see `clean_rows`).
    """
    if text is None:
        return "missing"
    if not isinstance(text, str):
        return f"wrong type\n{column} = {repr(text)[:60]}" if column else "wrong type"
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


def count_words(text: str) -> int:
    """Words between blanks; where a script puts no blanks between words, each letter is one."""
    runs = [] if text.isascii() else UNSPACED.findall(text)
    if not runs:
        return len(text.split())
    letters = sum(character.isalpha() for run in runs for character in run)
    return letters + sum(any(map(str.isalnum, word)) for word in UNSPACED.sub(" ", text).split())


def words_between(fewest: int = 50, most: int = 100_000) -> Callable[[str], str | None]:
    """The filter for length in words (`count_words`); Gopher's limits unless told."""

    def wrong_length(text):
        count = count_words(text)
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
    examples: dict[str, str] = field(default_factory=dict)  # the first row of each reason

    def __str__(self):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.most_common())
        line = f"read {self.read:,} = kept {self.kept:,} + dropped {self.dropped.total():,}"
        return f"{line} ({reasons})" if reasons else line

    def reasons(self) -> list[str]:
        """A line for each reason: how many rows, which share of all, and the first of them."""
        return [
            f"{count:,} of {self.read:,} rows ({count / self.read:.1%}) dropped: {reason}; first {self.examples.get(reason, '')}"
            for reason, count in self.dropped.most_common()
        ]

    def check(self, source: str, most: float = 0.05) -> None:
        """Call when all rows are read.

        Raises:
            UserError: more than `most` of the rows were malformed, so the file is not what it was taken for.
        """
        if self.bad > most * self.read:
            raise UserError(
                f"{source}: {self.bad:,} of {self.read:,} rows are unusable ({self}).\n"
                + "".join(f"{line}\n" for line in self.reasons())
                + f"Over {most:.3g} of all (--max_bad_rows) is taken as a mistake in the data or in --columns."
            )


def clean_rows(
    rows: Iterable, convert: Callable[[dict], dict | str], report: CleaningReport, place: str = "row"
) -> Iterator[dict]:
    """Streams rows through `convert`, which returns the clean row, or the reason for dropping it as a text.

    A reason that begins with `bad: ` says that the row is malformed; see `CleaningReport.check`. In a second line it may say
    where and with which value, for `CleaningReport.examples`.

    Args:
        place: what the number of a row stands behind, for examples and errors.

    Raises:
        UserError: as `convert`, with the number of the row.
    """
    for number, row in enumerate(rows, 1):
        report.read += 1
        try:
            result = convert(row)
        except UserError as error:
            raise UserError(f"{place} {number:,}: {error}") from error
        if isinstance(result, str):
            reason, _, value = result.removeprefix("bad: ").partition("\n")
            report.bad += result.startswith("bad: ")
            report.dropped[reason] += 1
            report.examples.setdefault(reason, f"{place} {number:,}" + (f", {value}" if value else ""))
        else:
            report.kept += 1
            yield result


def clean_dataset(data, convert: Callable[[dict], dict | str], source: str, features=None, most: float = 0.05) -> tuple:
    """`clean_rows` on each split of a data set.

    Args:
        data: splits by name, each an iterable of rows.
        convert: see `clean_rows`. source: the name of the data, for the log and for errors.
        features: `datasets.Features` of the rows where their values alone do not tell.
        most: share of the rows that may be bad.

    Returns:
        `datasets.DatasetDict` and the report. A split of which nothing is left is empty and has the columns of the others.

    Raises:
        UserError: more of the rows are bad, or none is left.
    """
    from datasets import Dataset, DatasetDict

    report = CleaningReport()
    place = "row" if len(data) == 1 else "{} row"
    kept = {name: list(clean_rows(rows, convert, report, place.format(name))) for name, rows in data.items()}
    report.check(source, most)
    log.info("%s: %s", source, report)
    if not report.kept:
        raise UserError("\n".join([f"{source}: no row is left after cleaning ({report}).", *report.reasons()]))
    for line in report.reasons():
        log.info("%s", line)
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
        if reason := malformed(text, column):
            return f"bad: {reason}"
        text = clean_text(text)
        if not text:
            return "bad: empty"
        reason = next((reason for keep in filters if (reason := keep(text))), None)
        return reason or {"text": text}

    return convert
