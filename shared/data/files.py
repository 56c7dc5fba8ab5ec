"""Rows of a file on this disk as a stream of dictionaries, one reader for all tasks: read right, or one line that says what and
where. Called by load.py.

Cells of .csv, .tsv and .xlsx are text as written: `None`, `NA` and `007` are words, only an empty cell is missing.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shared import UserError

PIECE = 400_000  # characters: a longer line of a .txt becomes several texts, each well below cleaning.LONGEST
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # UTF-32's mark begins with UTF-16's
SURROGATE = re.compile(r"[\ud800-\udfff]")


def kind_of(path: Path) -> str:
    """`.csv` for `data.csv` and `data.csv.gz`, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return (suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else suffixes[-1]) if suffixes else ""


def read_rows(path: str | Path) -> Iterator[dict]:
    """Streams the rows of a file.

    Raises:
        UserError: with the line or row, and the remedy.
    """
    path = Path(path)
    try:
        yield from READERS[kind_of(path)](path)
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(path, error)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from error


def read_json(path: Path):
    """The whole of a .json file, or None where it is none as a whole: lines of JSON, or damaged.

    Raises:
        UserError: neither UTF-8 nor UTF-16.
    """
    try:
        with open_text(path) as file:
            return json.load(file, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(path, error)) from error
    except ValueError:
        return None


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """A file, gzipped or not, as characters: UTF-8, or UTF-16 and 32 where its first bytes say so."""
    stream = gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")  # noqa: SIM115
    encoding = encoding_of(stream.read(4096))
    stream.seek(0)
    return io.TextIOWrapper(stream, encoding, newline=newline)


def encoding_of(head: bytes) -> str:
    """Python's name of the encoding that the first bytes of a text say: UTF-16 or 32, else UTF-8, which it need not be."""
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and len(head) > 3:
        zeros = [head[i::2].count(0) / len(head[i::2]) for i in (0, 1)]
        if max(zeros) > 0.4 and min(zeros) < 0.1:  # UTF-16 without a mark: every other byte of English text is 0
            encoding = "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    return encoding


def describe(path: Path) -> str:
    """How a file is read, in words: its kind, what stands between its cells, its encoding, its size."""
    kind, said = kind_of(path), []
    if kind in (".csv", ".tsv"):
        with open_text(path, newline="") as file:
            said.append(f"cells between {_separator(path, next(file, ''))[0]!r}")
    if kind not in (".xlsx", ".parquet"):
        with open_text(path) as file:
            said.append(file.encoding.upper().replace("-SIG", " with a mark"))
    return ", ".join([kind.removeprefix("."), *said, f"{path.stat().st_size:,} bytes"])


def _separator(path: Path, first: str) -> tuple[str, bool]:
    """What stands between the cells, and whether the first line says so and is no header: Excel's `sep=;`."""
    if declared := re.fullmatch(r'"?sep=(.)"?\s*', first):
        return declared[1], True
    choices = "\t,;|" if kind_of(path) == ".tsv" else ",;\t|"
    cells = {each: len(next(csv.reader([first], delimiter=each), [])) for each in choices}
    return max(choices, key=lambda each: (cells[each] > 1, -choices.index(each))), False


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    place = ""
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf8")
            except UnicodeDecodeError as found:
                place = f"line {number}: not UTF-8 (byte 0x{line[found.start]:02x})"
                break
    if not place:
        return f"{path}: its first bytes say {error.encoding}, but it is not: {error.reason}."
    return (
        f"{path}, {place}. Convert it from the encoding it was saved in, for example "
        f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8{kind_of(path)}"
    )


def _no_number(_name: str) -> None:
    """NaN and Infinity, which Python writes though JSON has none: a missing value."""


def _whole(value):
    """A value of JSON without halves of characters ("\\ud83d" alone), which no file can hold: U+FFFD stands for them."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value) if SURROGATE.search(value) else value
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return {_whole(key): _whole(part) for key, part in value.items()} if isinstance(value, dict) else value


def _json_lines(path: Path) -> Iterator[dict]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not (line := line.strip().removeprefix("\ufeff")):
                continue
            try:
                row = json.loads(line, parse_constant=_no_number)
            except (ValueError, RecursionError) as error:
                cut = " The file ends there: it may have been cut." if next(lines, None) is None else ""
                raise UserError(f"{path}, line {number}: not JSON: {str(error)[:120]}.{cut}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected an object {{...}}, found {type(row).__name__}.")
            yield _whole(row) if "\\u" in line else row


def _json(path: Path) -> Iterator[dict]:
    content = read_json(path)
    if content is None:
        yield from _json_lines(path)
        return
    if isinstance(content, dict) and len(lists := [v for v in content.values() if isinstance(v, list)]) == len(content):
        if len(content) == 1 and all(isinstance(row, dict) for row in lists[0]):
            content = lists[0]  # {"data": [...]}
        elif len({len(values) for values in lists}) == 1 and not any(isinstance(v, dict) for v in lists[0]):
            content = [dict(zip(content, values, strict=True)) for values in zip(*lists, strict=True)]
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of objects, found {type(content).__name__}.")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: expected an object {{...}}, found {type(row).__name__}.")
        yield _whole(row)


def _table(path: Path) -> Iterator[dict]:
    """Comma, semicolon, tab or bar between cells: whichever makes a header of several columns."""
    csv.field_size_limit(1 << 30)
    with open_text(path, newline="") as file:
        lines, seen = iter(file), []

        def kept():
            for line in lines:
                seen.append(line)
                yield line

        first = next(lines, "")
        separator, declared = _separator(path, first)
        first = next(lines, "") if declared else first
        reader = csv.reader(kept(), delimiter=separator)
        header = next(csv.reader([first], delimiter=separator), [])
        if not header:
            raise UserError(f"{path}: no header in its first line: expected the names of the columns.")
        header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(header)]
        if doubles := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(f"{path}: two columns are named {doubles[0]}. Rename one in the first line.")
        number = 2
        for cells in reader:
            if len(seen) > 1:
                try:
                    list(csv.reader(seen, delimiter=separator, strict=True))
                except csv.Error as error:
                    raise UserError(
                        f"{path}, line {number}: a quotation mark opens a cell and swallows {len(seen) - 1:,} further lines "
                        f"({error}). Close it, or write it twice where it is part of the text."
                    ) from error
            if len(cells) > len(header) and any(cells[len(header) :]):
                raise UserError(
                    f"{path}, line {number}: {len(cells)} cells, but the header has {len(header)} "
                    f"({', '.join(header)}). Put text that holds {separator!r} between quotation marks."
                )
            if cells:
                cells = [*cells, *[""] * (len(header) - len(cells))]
                yield {name: cell or None for name, cell in zip(header, cells, strict=False)}
            number += len(seen)
            seen.clear()


def _excel(path: Path) -> Iterator[dict]:
    from zipfile import BadZipFile

    from openpyxl import load_workbook

    try:
        with open(path, "rb") as file:
            sheets = load_workbook(file, read_only=True, data_only=True)
            rows = sheets.worksheets[0].iter_rows(values_only=True)
            header = [str(cell).strip() if cell is not None else "" for cell in next(rows, ())]
            if not any(header):
                raise UserError(f"{path}: no header in the first row of its first sheet.")
            for cells in rows:
                if any(cell is not None for cell in cells):
                    yield {
                        name: None if cell is None else str(cell)
                        for name, cell in zip(header, cells, strict=False)
                        if name
                    }
    except (BadZipFile, KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: not an Excel workbook (.xlsx): {error}. Save it as .csv in UTF-8.") from error


def _parquet(path: Path) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
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
        for line in lines:
            if line.strip():
                for piece in pieces([line.rstrip("\n")]):
                    yield {"text": piece}


READERS: dict[str, Callable[[Path], Iterator[dict]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".xlsx": _excel,
    ".parquet": _parquet,
    ".txt": _text,
}
