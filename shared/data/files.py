"""Rows of a file on this disk as a stream of dictionaries, one reader for all tasks: read right, or one line that says what and
where. Called by load.py.

Cells of .csv, .tsv and .xlsx are text as written: `None`, `NA` and `007` are words, only an empty cell is missing.
"""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path

from shared import UserError
from shared.data.charsets import SAMPLE, encoding_of, likely_encoding, old_vietnamese, to_unicode, unix_name
from shared.data.json_tables import rows_of

log = logging.getLogger("taskbook")

PIECE = 400_000  # characters: a longer line of a .txt becomes several texts, each well below cleaning.LONGEST
OTHER_KINDS = {  # by their first bytes, and what to do with them
    b"PK\x03\x04": "a zip archive or an Office document: unpack it, or name it .xlsx if it is Excel's",
    b"\xd0\xcf\x11\xe0": "an old Office document: save it as .xlsx or .csv (UTF-8)",
    b"PAR1": "Parquet: name it .parquet",
    b"%PDF": "a PDF: python -m shared.corpora reads those",
    b"SQLite format 3": "an SQLite database: export the table as .csv",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`",
    b"BZh": "bzip2: unpack it",
    b"\xfd7zXZ": "xz: unpack it",
    b"\x28\xb5\x2f\xfd": "zstandard: unpack it",
}
OBJECT = re.compile(r'\ufeff?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:.*\}\s*$')
UNCOMPUTED = re.compile(  # a cell with a formula alone; text may be an empty result
    rb'<c r="([A-Z]+\d+)"(?![^>]*t="str")[^>]*><f(?:[^>]*/>|[^>]*>[^<]*</f>)(?:<v ?/>|<v></v>|</c>)'
)
MERGED = re.compile(rb'<mergeCell ref="([A-Z]+\d+:[A-Z]+\d+)"')
SURROGATE = re.compile(r"[\ud800-\udfff]")


def kind_of(path: Path) -> str:
    """`.csv` for `data.csv` and `data.csv.gz`, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return (suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else suffixes[-1]) if suffixes else ""


def read_rows(path: str | Path, guess: bool = False) -> Iterator[dict]:
    """Streams the rows of a file.

    Args:
        guess: a .csv or .tsv that is not UTF-8 is read in its likeliest encoding, which is logged, instead of refused.

    Raises:
        UserError: with the line or row, and the remedy.
    """
    path = Path(path)
    with _refusals(path):
        old = sniffed(path)[1]
        read = READERS[kind_of(path)]
        for row in _table(path, guess) if read is _table else read(path):
            yield _each_text(row, functools.partial(to_unicode, old=old)) if old else row


@contextlib.contextmanager
def _refusals(path: Path):
    """What reading a file raises, as one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(path, error)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from error


def read_json(path: Path):
    """The whole of a .json file, or None where it is none as a whole: lines of JSON, or damaged.

    Raises:
        UserError: an encoding that is not read, or a damaged archive.
    """
    with _refusals(path):
        content, old = _each_text(_whole_json(path), _whole), sniffed(path)[1]
    return _each_text(content, functools.partial(to_unicode, old=old)) if old else content


def _whole_json(path: Path):
    try:
        with open_text(path) as file:
            return json.load(file, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        return None


def open_bytes(path: Path) -> io.BufferedIOBase:
    """A file as bytes, unpacked where it is gzip's, whatever its name says."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")  # noqa: SIM115


def open_text(path: Path, newline: str | None = None, guess: bool = False) -> io.TextIOWrapper:
    """A file, gzipped or not, as characters: UTF-8, or UTF-16 and 32 where its first bytes say so.

    Old Vietnamese comes as the Western letters that stand for it: `read_rows` converts it.

    Args:
        guess: another encoding than these is guessed and logged, and what does not fit it replaced; else reading it fails.
    """
    encoding, old, likely = sniffed(path)
    if guess and (old or likely):
        log.info("%s: read as %s", path, old or likely)
    if guess and likely:
        return io.TextIOWrapper(open_bytes(path), likely, "replace", newline)
    return io.TextIOWrapper(open_bytes(path), encoding, "replace" if guess else "strict", newline)


def sniffed(path: Path) -> tuple[str, str | None, str | None]:
    """A file's encoding, the old Vietnamese one of its text (`charsets.OLD`), and if it is none that is read its likely one."""
    state = os.stat(path)
    return _sniff(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(64)
def _sniff(path: Path, size: int, time: int) -> tuple[str, str | None, str | None]:
    if kind_of(path) == ".xlsx":
        cells = (cell for row in islice(_excel(path), 1000) for cell in row.values() if cell)
        return "utf-8", old_vietnamese("\n".join(cells)), None
    with open_bytes(path) as file:
        head = file.read(SAMPLE)
    if kind_of(path) == ".parquet":
        return "utf-8", None, None
    if found := next((name for mark, name in OTHER_KINDS.items() if head.startswith(mark)), None):
        raise UserError(f"{path}: its content is {found}.")
    if (marked := encoding_of(head[:4096])) != "utf-8":
        return marked, None, None
    try:  # incremental: the sample may end within a character
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < SAMPLE)
        escapes = r"\\u00([0-9a-fA-F]{2})"  # in JSON a letter may be ASCII
        return "utf-8", old_vietnamese(re.sub(escapes, lambda found: chr(int(found[1], 16)), text)), None
    except UnicodeDecodeError:
        if old := old_vietnamese(head.decode("latin-1")):
            return "latin-1", old, None
        return "utf-8", None, likely_encoding(head)


def describe(path: Path) -> str:
    """How a file is read, in words: its kind, what stands between its cells, its encoding, its size.

    Raises:
        UserError: as `read_rows`, for what its beginning shows.
    """
    kind, said = kind_of(path), []
    with _refusals(path):
        if kind in (".csv", ".tsv"):
            with open_text(path, newline="") as file:
                said.append(f"cells between {_separator(path, next(file, ''))[0]!r}")
        if kind == ".xlsx":
            with _workbook(path) as book:
                sheets = _visible(book)
                merged = _found_in(sheets[0], MERGED)
            said += [f"sheet {sheets[0].title!r}, the first of {len(sheets)}"] if len(sheets) > 1 else []
            said += [f"of merged cells such as {merged} the first is filled, the others are empty"] if merged else []
        encoding, old, _ = sniffed(path)
    if kind != ".parquet" and (old or kind != ".xlsx"):
        name = encoding.upper().replace("-SIG", " with a mark")
        if old:
            name = f"{old}{' in UTF-8' if encoding == 'utf-8' and kind != '.xlsx' else ''} (Vietnamese before Unicode, converted)"
        said.append(name)
    return ", ".join([kind.removeprefix("."), *said, f"{path.stat().st_size:,} bytes"])


def _separator(path: Path, first: str) -> tuple[str, bool]:
    """What stands between the cells, and whether the first line says so and is no header: Excel's `sep=;`."""
    if declared := re.fullmatch(r'"?sep=(.)"?\s*', first):
        return declared[1], True
    choices = "\t,;|" if kind_of(path) == ".tsv" else ",;\t|"
    cells = {each: len(next(csv.reader([first], delimiter=each), [])) for each in choices}
    return max(choices, key=lambda each: (cells[each] > 1, -choices.index(each))), False


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """What to do with a file that is not in the encoding it was taken for: where, how the line reads in the likeliest one."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf8")
            except UnicodeDecodeError as found:
                place, start = number, found.start
                break
        else:
            return f"{path}: its first bytes say {error.encoding}, but it is not: {error.reason}."
        likely = sniffed(path)[2] or likely_encoding(line + file.read(SAMPLE))
    if sum(byte < 9 or 13 < byte < 32 for byte in line) > 0.05 * len(line):
        return f"{path}: not a text but binary data (line {place}). Save it as one of {' '.join(READERS)}."
    first = max(0, start - 30)
    reads, name = " ".join(line[first : start + 30].decode(likely, "replace").split()), unix_name(likely)
    return (
        f"{path}, line {place}: not UTF-8 (byte 0x{line[start]:02x}). As {name}, the likeliest, it reads {reads!r}. If that is "
        f"right, convert it: iconv -f {name} -t UTF-8 {path.name} > utf8{kind_of(path)}"
    )


def _no_number(_name: str) -> None:
    """NaN and Infinity, which Python writes though JSON has none: a missing value."""


def _each_text(value, function: Callable[[str], str]):
    """A value of JSON with a function applied to each of its texts, names included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_each_text(part, function) for part in value]
    if isinstance(value, dict):
        return {_each_text(key, function): _each_text(part, function) for key, part in value.items()}
    return value


def _whole(text: str) -> str:
    """A text without halves of characters ("\\ud83d" alone), which no file can hold: U+FFFD stands for them."""
    return SURROGATE.sub("\ufffd", text) if SURROGATE.search(text) else text


ONE_DOCUMENT = " It looks like one JSON document, not one a line: name it .json."
CUT = " The file ends there: it may have been cut."


def _no_document(path: Path) -> str:
    """Why a .json file is no JSON document, and where, one whose lines are none either."""
    with open_text(path) as file:
        text = file.read()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        hint = CUT if error.pos >= len(text.rstrip()) else ""
        if error.msg == "Extra data":
            hint = f" Write one document a line: jq -c . {path.name} > rows.jsonl"
        return f"{path}, line {error.lineno}: not JSON: {error.msg}.{hint}"
    except (ValueError, RecursionError) as error:
        return f"{path}: not JSON: {error}."


def _json_lines(path: Path) -> Iterator[dict]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not (line := line.strip().removeprefix("\ufeff")):
                continue
            try:
                row = json.loads(line, parse_constant=_no_number)
            except (ValueError, RecursionError) as error:
                if number == 1 and kind_of(path) == ".json":
                    raise UserError(_no_document(path)) from error
                hint = CUT if next(lines, None) is None else ""
                if number == 1 and _whole_json(path) is not None or line in ("{", "["):
                    hint = ONE_DOCUMENT
                elif re.match(r"\{'\w+': ", line):
                    hint = " It is Python's repr: write each row with json.dumps."
                raise UserError(f"{path}, line {number}: not JSON: {str(error)[:120]}.{hint}") from error
            if not isinstance(row, dict):
                hint = ONE_DOCUMENT if isinstance(row, list) else ""
                raise UserError(f"{path}, line {number}: expected an object {{...}}, found {type(row).__name__}.{hint}")
            yield _each_text(row, _whole) if "\\u" in line else row


def _json(path: Path) -> Iterator[dict]:
    content = _whole_json(path)
    if content is None:
        yield from _json_lines(path)
        return
    if isinstance(content, dict):
        content = rows_of(content)
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of objects, found {type(content).__name__}.")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: expected an object {{...}}, found {type(row).__name__}.")
        yield _each_text(row, _whole)


def _table(path: Path, guess: bool = False) -> Iterator[dict]:
    """Comma, semicolon, tab or bar between cells: whichever makes a header of several columns."""
    csv.field_size_limit(1 << 30)
    with open_text(path, newline="", guess=guess) as file:
        lines, seen = iter(file), []

        def kept():
            for line in lines:
                seen.append(line)
                yield line

        first = next(lines, "")
        separator, declared = _separator(path, first)
        first = next(lines, "") if declared else first
        lines = chain([first], lines)  # the header may go on: a name may hold a line end
        # `text, "label"`: without this the quotation marks would be part of the cell
        blanks = {"delimiter": separator, "skipinitialspace": separator != "\t" and f"{separator} " in first}
        header, number = [], 1 + declared
        for cells in csv.reader(kept(), **blanks):
            if len(seen) > 1 or '\\"' in seen[0] or seen[0].count('"') % 2:
                try:
                    list(csv.reader(seen, **blanks, strict=True))
                except csv.Error as error:
                    if '\\"' in seen[0]:
                        raise UserError(
                            f"{path}, line {number}: a quotation mark within a cell stands behind a backslash ({error}). "
                            'Write it twice ("") instead.'
                        ) from error
                    what = f"and swallows {len(seen) - 1:,} further lines" if len(seen) > 1 else "that does not end"
                    raise UserError(
                        f"{path}, line {number}: a quotation mark opens a cell {what} ({error}). Close it, or write it twice "
                        "where it is part of the text."
                    ) from error
            if not header and not cells:
                raise UserError(f"{path}: no header in its first line: expected the names of the columns.")
            if not header:
                _refuse_doubles(path, header := [_on_one_line(name) or f"Unnamed: {i}" for i, name in enumerate(cells)])
            elif len(cells) > len(header) and any(cells[len(header) :]):
                raise UserError(
                    f"{path}, line {number}: {len(cells)} cells, but the header has {len(header)} "
                    f"({', '.join(header)}). Put text that holds {separator!r} between quotation marks."
                )
            elif cells:
                yield {name: cell or None for name, cell in zip_longest(header, cells[: len(header)])}
            number += len(seen)
            seen.clear()


def _on_one_line(name: str) -> str:
    """The name of a column as `--columns` can say it: in surveys it may be a question of several lines."""
    return re.sub(r"\s*[\r\n]+\s*", " ", name.strip())


def _refuse_doubles(path: Path, header: Iterable[str]) -> None:
    if doubles := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(f"{path}: two columns are named {doubles[0]}. Rename one in the first line.")


@contextlib.contextmanager
def _workbook(path: Path):
    from zipfile import BadZipFile

    from openpyxl import load_workbook

    try:
        with open_bytes(path) as file:
            yield load_workbook(file, read_only=True, data_only=True)
    # the last two of styles and charts that other programs write
    except (BadZipFile, KeyError, IndexError, ValueError, SyntaxError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an Excel workbook (.xlsx): {error}. Save it as .csv in UTF-8.") from error


def _visible(book) -> list:
    return [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"] or book.worksheets


def _found_in(sheet, pattern: re.Pattern) -> str | None:
    """The first group of the first match in the XML of a sheet, where openpyxl does not say what it skips."""
    tail = b""
    with sheet.parent._archive.open(sheet._worksheet_path) as part:
        while piece := part.read(1 << 20):
            if found := pattern.search(tail + piece):
                return found[1].decode()
            tail = (tail + piece)[-10_000:]


def _excel(path: Path) -> Iterator[dict]:
    from openpyxl.utils.escape import unescape

    with _workbook(path) as book:
        sheet = _visible(book)[0]
        # Excel computes formulas when it saves; pandas and openpyxl do not, and take each text that begins with = for one
        if cell := _found_in(sheet, UNCOMPUTED):
            raise UserError(
                f"{path}: cell {cell} of sheet {sheet.title!r} holds a formula without its value. Save the file in Excel or "
                "LibreOffice, or, if it is a text that begins with =, as .csv."
            )
        sheet.reset_dimensions()  # what a file says of its size may be wrong, and rows beyond it were lost
        rows = sheet.iter_rows(values_only=True)
        header = [_on_one_line(str(cell)) if cell is not None else "" for cell in next(rows, ())]
        if not any(header):
            raise UserError(f"{path}: no header in the first row of its first sheet.")
        _refuse_doubles(path, filter(None, header))
        for cells in rows:
            if any(cell is not None for cell in cells):
                # `_x000D_`: how the format writes what XML cannot hold
                cells = (None if cell is None else unescape(str(cell)) for cell in cells)
                yield {name: cell for name, cell in zip_longest(header, cells) if name}


def _parquet(path: Path) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with open_bytes(path) as file:
            for batch in pa.parquet.ParquetFile(file).iter_batches(1000):
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a whole Parquet file: {str(error).splitlines()[0][:150]}") from error


def pieces(chunks: Iterable[str], most: int = PIECE) -> Iterator[str]:
    """Cuts a stream of characters into texts of at most `most`, at an empty line, or else a line end, or else a blank."""
    text = ""
    for chunk in chunks:
        text += chunk
        while len(text) > most:
            cut = next((at for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, most // 2, most)) >= 0), most)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _text(path: Path) -> Iterator[dict]:
    """A row for each line that is not blank; a very long one (a corpus on a single line) in pieces."""
    with open_text(path) as lines:
        for number, line in enumerate(lines):
            if number == 0 and OBJECT.match(line):
                raise UserError(f"{path}: its first line is a JSON object, not a text: name it .jsonl.")
            if line.strip():
                for piece in pieces([line.rstrip("\n")]):
                    yield {"text": piece}


READERS: dict[str, Callable[[Path], Iterator[dict]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".xlsx": _excel,
    ".parquet": _parquet,
    ".txt": _text,
}
