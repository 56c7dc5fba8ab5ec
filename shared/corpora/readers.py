"""The documents of files, folders, dumps, Hub data sets and `docs:` names, as a stream. Called by build.py."""

import bz2
import codecs
import contextlib
import json
import logging
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from shared import UserError
from shared.data import files, hub_data
from shared.data.charsets import MARKS, holds_pictures, likely_encoding, old_vietnamese, to_unicode, whole_words
from shared.data.load import load_data, without_media

log = logging.getLogger("taskbook")

LARGEST = 5_000_000  # bytes of a page; an article has at most one or two


class NoColumn(UserError):
    """A table without the column of the text."""


def documents(
    source: str,
    *,
    columns: dict | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    leave_out: Path | None = None,
):
    """Streams the documents of any source but the web, see `crawl`: dicts with `text`, `html` or `wikitext`; `source`, `title`,
    `license` where known; `line`, where in its file a text begins, where it stands there as it is. A str instead of a dict is
    the reason why a document is passed over.

    Args:
        source: `docs:` name, local file or folder, or Hub dataset `[org/]name[@revision]`.
        columns: where `text`, `source`, `title` and `license` stand in tables, for example `{"text": "body"}`.
        leave_out: file of a folder that is not read: what an earlier run wrote there of the others.

    Raises:
        UserError: no such source, an ending that is not read, a column that is missing, a Hub that cannot be reached.
    """
    path = Path(source).expanduser()
    saved = not source.startswith("docs:") and is_saved(path)
    here = source.startswith("docs:") or path.exists()
    if here and (dataset_config or split != "train" and not saved):
        log.warning("%s: read whole: --split and --dataset_config choose from data sets of the Hub", source)
    if source.startswith("docs:"):
        return _docs(source)
    if saved:
        return _saved(path, split, columns or {})
    if path.exists():
        return _local(path, columns or {}, leave_out)
    if source.startswith((".", "/", "~")) or source.partition("@")[0].count("/") > 1 or _reader(path):
        raise UserError(
            f"{source}: no such file or folder. A Hub dataset is written org/name, a page https://..., "
            "the documentation installed here docs:prose."
        )
    return _hub(source, dataset_config, split, columns or {})


def _docs(name: str) -> Iterator[dict]:
    from shared.data import docs

    for number, row in enumerate(docs.documents(name), 1):
        if name == "docs:summaries":
            row = {**row, "text": f"{row['summary']}\n\n{row['document']}"}
        elif name == "docs:questions":  # rows with one context come in turn; what is asked about it is no text
            row = {**row, "text": row["context"]}
        yield {"source": f"{name}#{number}", **row}


def _hub(name: str, config: str | None, split: str, columns: dict) -> Iterator[dict]:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError

    repo, _, revision = name.partition("@")
    try:
        found = HfApi().dataset_info(repo, revision=revision or None)
        data = hub_data.read(found.id, revision or None, config, stream=True)
        if split not in data:
            raise UserError(f"{name}: no split {split}: found {', '.join(data)}. Name one: --split ...")
        terms = getattr(found.card_data, "license", None) or ""
        terms = terms if isinstance(terms, str) else ", ".join(terms)
        yield from _table(without_media(data, name)[split], name, columns, terms)
    except (datasets.exceptions.DatasetNotFoundError, HTTPError, OSError) as error:
        said = str(error).strip().splitlines() or [""]
        if "gated" in said[0]:
            raise UserError(hub_data.gated(name)) from error
        if isinstance(error, RevisionNotFoundError):
            said = [f"it has no revision {revision}."]
        raise UserError(f"{name}: cannot be read from the Hub: {type(error).__name__}: {said[0]}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise hub_data.unreadable(name, error) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{name} is a script, and code from a data set is not run. Most such data sets have a copy in parquet: "
            f"{repo}@{hub_data.PARQUET}"
        ) from error


def is_saved(folder: Path) -> bool:
    """Whether a folder is one that `datasets` saved."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def _saved(folder: Path, split: str, columns: dict) -> Iterator[dict | str]:
    """The rows of a split of a folder that `datasets` saved."""
    data = load_data(str(folder))
    if split not in data:
        raise UserError(f"{folder}: no split {split}: found {', '.join(data)}. Name one: --split ...")
    yield from _table(data[split], folder.name, columns)


def _local(path: Path, columns: dict, leave_out: Path | None) -> Iterator[dict | str]:
    for file, name in local_files(path):
        if leave_out and path.is_dir() and file.resolve() == leave_out.resolve():
            continue
        yield from read_file(file, name, columns, alone=path.is_file())


def local_files(path: Path) -> Iterator[tuple[Path, str]]:
    """A file, or all files below a folder but hidden ones, in the order of names; each with its name from the folder on. Folders
    that links lead to are read as well, each folder once.

    Raises:
        UserError: a single file of a kind that is not read.
    """
    if path.is_file():
        if not _reader(path):
            raise UserError(
                f"{path}: cannot be read; expected {' '.join(READERS)} (.gz allowed). "
                "Unpack an archive, save a document as .pdf or .txt."
            )
        yield path, path.name
        return
    path = path.absolute()  # "." has a name then
    folders, seen, found = deque([path]), set(), []
    while folders:
        folder = folders.popleft()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        try:
            inside = [each for each in folder.iterdir() if not each.name.startswith(".")]
        except PermissionError as error:
            log.warning("%s: cannot be read, passed over: %s", folder, error.strerror)
            continue
        found += [each for each in inside if each.is_file()]
        # Links come after folders in their own place
        folders.extend(each for each in inside if each.is_dir() and each.is_symlink())
        folders.extendleft(each for each in inside if each.is_dir() and not each.is_symlink())
    for file in sorted(found):
        yield file, file.relative_to(path.parent).as_posix()


def read_file(file: Path, name: str, columns: dict, alone: bool = False) -> Iterator[dict | str]:
    """The documents of a file, see `documents`; a str where it is of another kind, or from where it is damaged.

    Raises:
        UserError: with `alone`, or where `columns` are named, a table without the column of the text; with `alone` also what else
            is wrong with a table, and where.
    """
    if not (read := _reader(file)):
        yield "another kind of file"
        return
    try:
        yield from read(file, name, columns)
    except NoColumn:  # one of many files, which may be a list of something else
        if alone or columns:
            raise
        yield "table without a column text"
    except UserError as error:  # one of many files, which is something else than its name says
        if alone:
            raise
        log.warning("passed over: %s", error)
        yield "bad: content of another kind"
    # A damaged file may hold good documents before the damage, and others follow it.
    except (OSError, EOFError, ValueError, zlib.error, ElementTree.ParseError) as error:
        if alone and isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        log.warning("%s: damaged, the rest of it is passed over: %s", file, error)
        yield "bad: damaged file"


def _reader(path: Path) -> Callable | None:
    name = path.name.lower().removesuffix(".gz")
    name = re.sub(r"\.xml-p\d+p\d+(?=\.bz2$|$)", ".xml", name)  # a part of the dump of a large wiki
    return next((read for ending, read in READERS.items() if name.endswith(ending)), None)


def _parts(chunks: Iterable[str], name: str, title: str) -> Iterator[dict]:
    for number, text in enumerate(files.pieces(chunks), 1):
        yield {"text": text, "source": f"{name}#{number}" if number > 1 else name, "title": title}


def _characters(file: Path) -> Iterator[str]:
    """A file in pieces."""
    old = files.sniffed(file)[1]
    with files.open_text(file, guess=True) as text:
        while chunk := text.read(1 << 16):
            yield to_unicode(chunk, old) if old else chunk


def _txt(file: Path, name: str, columns: dict) -> Iterator[dict]:
    if files.sniffed(file)[2]:  # in no encoding of texts: Latin letters may be made of any bytes
        with files.open_bytes(file) as stream:
            head = stream.read(files.SAMPLE)
        if sum(byte < 9 or 13 < byte < 32 for byte in head) > 0.05 * len(head):
            raise UserError(f"{file}: not a text but binary data. Save it as text, or leave it out.")
    line = 1
    for part in _parts(_characters(file), name, Path(name).name):
        yield part | {"line": line}
        line += part["text"].count("\n")


def _html(file: Path, name: str, columns: dict) -> Iterator[dict | str]:
    with files.open_bytes(file) as stream:
        data = stream.read(LARGEST + 1)
    yield f"over {LARGEST:,} bytes" if len(data) > LARGEST else {"html": decode(data), "source": name}


def _pdf(file: Path, name: str, columns: dict) -> Iterator[dict | str]:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every oddity of every file
    bare = 0

    def texts(pages):
        nonlocal bare
        for page in pages:
            text = whole_words(page.extract_text())
            bare += not text.strip() and holds_pictures(page)
            yield text + "\n\n"

    with files.open_bytes(file) as stream:
        try:
            reader = PdfReader(stream)
            if reader.is_encrypted and not reader.decrypt(""):
                yield "PDF with a password"
                return
            title = (reader.metadata.title if reader.metadata else None) or Path(name).name
            some = False
            for part in _parts(texts(reader.pages), name, title):
                some = some or bool(part["text"].strip())
                if some:
                    yield part
            if bare and some:
                log.warning("%s: %d of %d pages are pictures without text (scanned?)", file, bare, len(reader.pages))
            elif not some:
                yield "scanned PDF, pictures without text (needs OCR)" if bare else "PDF without text"
        except Exception as error:  # on damaged files pypdf raises nearly everything
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _jsonl(file: Path, name: str, columns: dict) -> Iterator[dict | str]:
    """Unlike `files.read_rows` it passes over lines that are no objects: collections of the web have some."""

    def rows():
        with files.open_text(file, newline="\n", guess=True) as lines:
            for line in lines:
                try:
                    row = json.loads(line.removeprefix("\ufeff")) if line.strip() else None
                except (ValueError, RecursionError):
                    row = "no object"
                if row is not None:
                    yield row if isinstance(row, dict) else "bad: not a JSON object"

    return _table(rows(), name, columns)


def _cells(file: Path, name: str, columns: dict) -> Iterator[dict | str]:
    """A table as the tasks read it; where they stop, so do the documents of this file."""

    def rows():
        try:
            yield from files.read_rows(file, guess=True)
        except UserError as error:
            raise ValueError(error) from error

    return _table(rows(), name, columns)


def _parquet(file: Path, name: str, columns: dict) -> Iterator[dict | str]:
    import pyarrow.parquet

    with files.open_bytes(file) as stream:
        table = pyarrow.parquet.ParquetFile(stream)
        wanted = [name for name in table.schema_arrow.names if name in _wanted(columns)] or None
        batches = table.iter_batches(64, columns=wanted)
        yield from _table((row for batch in batches for row in batch.to_pylist()), name, columns)


def _wanted(columns: dict) -> set[str]:
    return {"text", "source", "url", "title", "license", *columns.values()}


def _table(rows: Iterable[dict | str], name: str, columns: dict, terms: str = "") -> Iterator[dict | str]:
    """Rows with columns of any names as documents. Raises UserError where the first one lacks the column of the text."""
    first = True
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            yield row
            continue
        column = columns.get("text", "text")
        if first and column not in row:
            raise NoColumn(
                f"{name}: no column {column}: found {', '.join(map(str, row))}. Name the one with the text: "
                "python -m shared.corpora SOURCE --columns text=... --output texts.jsonl"
            )
        if lacking := [column for column in columns.values() if column not in row] if first else []:
            log.warning(
                "%s: its first row has no column %s: found %s", name, ", ".join(lacking), ", ".join(map(str, row))
            )
        first = False
        yield {
            "text": row.get(column),
            "source": row.get(columns.get("source", "source")) or row.get("url") or f"{name}#{number}",
            "title": row.get(columns.get("title", "title")),
            "license": row.get(columns.get("license", "license")) or terms,
        }


def _xml(file: Path, name: str, columns: dict) -> Iterator[dict | str]:
    with files.open_bytes(file) as stream:
        yield from _dump(stream, name)


def _dump(stream, name: str) -> Iterator[dict | str]:
    """The articles of a MediaWiki dump, in the text of the page's last revision in it."""
    root, site, terms, media, others = None, "", "", [], set()
    for event, element in ElementTree.iterparse(stream, events=("start", "end")):
        tag = element.tag.rpartition("}")[2]
        if event == "start":
            if root is None and tag != "mediawiki":
                yield "bad: not a MediaWiki dump"
                return
            root = element if root is None else root
        elif tag == "base":
            site = (element.text or "").rpartition("/")[0]
            terms = "cc-by-sa-4.0" if re.search(r"//[\w-]+\.(wikipedia|wiktionary|wikibooks)\.org/", site) else ""
        elif tag == "namespace" and element.text:
            others.add(element.text)
            media += [element.text] * (element.get("key") in ("6", "14"))  # files and categories in this language
        elif tag == "page":
            title = element.findtext("{*}title")
            texts = element.findall("{*}revision/{*}text")
            if element.find("{*}redirect") is not None:
                yield "redirect"
            elif element.findtext("{*}ns", "1" if (title or "").partition(":")[0] in others else "0") != "0":
                yield "not an article"
            else:
                source = f"{site}/{quote(title.replace(' ', '_'))}" if site else f"{name}#{title}"
                text = texts[-1].text if texts else None
                yield {"wikitext": text, "media": media, "source": source, "title": title, "license": terms}
            root.clear()  # or every page read so far would stay in memory


def _xml_bz2(file: Path, name: str, columns: dict) -> Iterator[dict | str]:
    with bz2.open(file) as stream:
        yield from _dump(stream, name)


READERS = {
    ".txt": _txt,
    ".md": _txt,
    ".rst": _txt,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _cells,
    ".csv": _cells,
    ".tsv": _cells,
    ".xlsx": _cells,
    ".parquet": _parquet,
    ".xml.bz2": _xml_bz2,
    ".xml": _xml,
}


# What browsers read under a narrower name (encoding.spec.whatwg.org): pages use the whole of the wider one
WIDER = {
    **{"big5": "big5hkscs", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"},
    **{"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "tis-620": "cp874"},
    **{"iso2022_jp": "iso2022_jp_ext"},
}
BROWSERS = {"windows-31j": "cp932", "windows-874": "cp874", "windows-949": "cp949"}  # names that Python does not know


def decode(data: bytes, declared: str | None = None) -> str:
    """The characters of a page: as its mark says, UTF-8 if it is, then the charset that header or page declare, then the
    likeliest one."""
    meta = re.search(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)""", data[:4096], re.I)
    xml = re.match(rb"""\s*<\?xml[^>]+encoding\s*=\s*["']([\w.:-]+)""", data[:200])
    charsets = ["utf-8-sig", declared, *(found[1].decode() for found in (meta, xml) if found)]
    if mark := next((name for mark, name in MARKS.items() if data.startswith(mark)), None):
        charsets.insert(0, mark)
    elif b"\x1b$" in data or b"\x1b(" in data:  # ISO-2022-JP is made of ASCII's bytes, and so UTF-8 too
        charsets.append(charsets.pop(0))
        charsets.append("iso2022_jp_ext")
    for charset in filter(None, charsets):
        with contextlib.suppress(LookupError, UnicodeDecodeError):
            charset = charset.lower()
            name = codecs.lookup(BROWSERS.get(charset, charset.removeprefix("x-"))).name
            return data.decode(WIDER.get(name, name))
    if old_vietnamese(western := data.decode("latin-1")):
        return western  # `build.prepare` converts it
    return data.decode(likely_encoding(data), "replace")
