"""The documents of files, folders, dumps, Hub data sets and `docs:` names, as a stream. Called by build.py."""

import bz2
import contextlib
import csv
import functools
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from shared import UserError
from shared.data.files import pieces
from shared.data.load import PARQUET, hub_arguments

log = logging.getLogger("taskbook")

LARGEST = 5_000_000  # bytes of a page; an article has at most one or two


def documents(source: str, *, columns: dict | None = None, dataset_config: str | None = None, split: str = "train"):
    """Streams the documents of any source but the web, see `crawl`: dicts with `text`, `html` or `wikitext`; `source`, `title`,
    `license` where known. A str instead of a dict is the reason why a document is passed over.

    Args:
        source: `docs:` name, local file or folder, or Hub dataset `org/name[@revision]`.
        columns: where `text`, `source`, `title` and `license` stand in tables, for example `{"text": "body"}`.

    Raises:
        UserError: no such source, an ending that is not read, a column that is missing, a Hub that cannot be reached.
    """
    if source.startswith("docs:"):
        return _docs(source)
    path = Path(source).expanduser()
    if path.exists():
        return _local(path, columns or {})
    if source.startswith((".", "/", "~")) or source.partition("@")[0].count("/") != 1 or _reader(path):
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
    from huggingface_hub.errors import HTTPError

    repo, _, revision = name.partition("@")
    try:
        card = HfApi().dataset_info(repo, revision=revision or None).card_data
        rows = datasets.load_dataset(**hub_arguments(repo, revision or None, config), split=split, streaming=True)
        terms = getattr(card, "license", None) or ""
        terms = terms if isinstance(terms, str) else ", ".join(terms)
        yield from _table(rows, name, columns, terms)
    except (datasets.exceptions.DatasetNotFoundError, HTTPError, OSError) as error:
        said = str(error).strip().splitlines() or [""]
        raise UserError(f"{name}: cannot be read from the Hub: {type(error).__name__}: {said[0]}") from error
    except ValueError as error:  # no such configuration or split: the message lists those there are
        raise UserError(f"{name}: {error} See --dataset_config and --split.") from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{name} is a script, and code from a data set is not run. Most such data sets have a copy in parquet: "
            f"{repo}@{PARQUET}"
        ) from error


def _local(path: Path, columns: dict) -> Iterator[dict | str]:
    for file, name in local_files(path):
        yield from read_file(file, name, columns)


def local_files(path: Path) -> Iterator[tuple[Path, str]]:
    """A file, or all files below a folder but hidden ones, in the order of names; each with its name from the folder on.

    Raises:
        UserError: a single file of a kind that is not read.
    """
    if path.is_file():
        if not _reader(path):
            raise UserError(f"{path}: cannot be read; expected {' '.join(READERS)} (.gz allowed).")
        yield path, path.name
        return
    path = path.absolute()  # "." has a name then
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path.parent)
        if file.is_file() and not any(part.startswith(".") for part in name.parts[1:]):
            yield file, name.as_posix()


def read_file(file: Path, name: str, columns: dict) -> Iterator[dict | str]:
    """The documents of a file, see `documents`; a str where it is of another kind, or from where it is damaged."""
    if not (read := _reader(file)):
        yield "another kind of file"
        return
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            yield from read(stream, name, columns)
    # A damaged file may hold good documents before the damage, and others follow it.
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, ElementTree.ParseError) as error:
        log.warning("%s: damaged, the rest of it is passed over: %s", file, error)
        yield "bad: damaged file"


def _reader(path: Path) -> Callable | None:
    name = path.name.removesuffix(".gz")
    return next((read for ending, read in READERS.items() if name.lower().endswith(ending)), None)


def _text_stream(stream, newline: str | None = None) -> io.TextIOWrapper:
    """Characters of a binary stream: UTF-8, or what a byte order mark or the first 64 kB look like."""
    from trafilatura.utils import detect_encoding

    head = stream.read(1 << 16)
    stream.seek(0)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    else:
        # Without the last line, which may end inside a character
        guesses = detect_encoding(head if len(head) < 1 << 16 else head[: head.rfind(b"\n") + 1] or head[:-3])
        encoding = "utf-8-sig" if guesses[:1] in ([], ["utf-8"]) else guesses[0]
    return io.TextIOWrapper(stream, encoding, errors="replace", newline=newline)


def _parts(chunks: Iterable[str], name: str, title: str) -> Iterator[dict]:
    for number, text in enumerate(pieces(chunks), 1):
        yield {"text": text, "source": f"{name}#{number}" if number > 1 else name, "title": title}


def _txt(stream, name: str, columns: dict) -> Iterator[dict]:
    text = _text_stream(stream)
    return _parts(iter(functools.partial(text.read, 1 << 16), ""), name, Path(name).name)


def _html(stream, name: str, columns: dict) -> Iterator[dict | str]:
    data = stream.read(LARGEST + 1)
    yield f"over {LARGEST:,} bytes" if len(data) > LARGEST else {"html": decode(data), "source": name}


def _pdf(stream, name: str, columns: dict) -> Iterator[dict | str]:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every oddity of every file
    try:
        reader = PdfReader(stream)
        if reader.is_encrypted and not reader.decrypt(""):
            yield "encrypted PDF"
            return
        title = (reader.metadata.title if reader.metadata else None) or Path(name).name
        yield from _parts((page.extract_text() + "\n\n" for page in reader.pages), name, title)
    except Exception as error:  # on damaged files pypdf raises nearly everything
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _jsonl(stream, name: str, columns: dict) -> Iterator[dict | str]:
    def rows():
        for line in _text_stream(stream, newline="\n"):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else "bad: not a JSON object"

    return _table(rows(), name, columns)


def _csv(stream, name: str, columns: dict) -> Iterator[dict | str]:
    csv.field_size_limit(1 << 30)
    return _table(csv.DictReader(_text_stream(stream, newline="")), name, columns)


def _parquet(stream, name: str, columns: dict) -> Iterator[dict | str]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    wanted = [name for name in file.schema_arrow.names if name in _wanted(columns)] or None
    return _table((row for batch in file.iter_batches(64, columns=wanted) for row in batch.to_pylist()), name, columns)


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
            raise UserError(
                f"{name}: no column {column}: found {', '.join(map(str, row))}. Name the one with the text: --columns text=..."
            )
        first = False
        yield {
            "text": row.get(column),
            "source": row.get(columns.get("source", "source")) or row.get("url") or f"{name}#{number}",
            "title": row.get(columns.get("title", "title")),
            "license": row.get(columns.get("license", "license")) or terms,
        }


def _dump(stream, name: str, columns: dict) -> Iterator[dict | str]:
    """The articles of a MediaWiki dump, in the text of the page's last revision in it."""
    root, site, terms, media = None, "", "", ["file", "image", "category"]
    for event, element in ElementTree.iterparse(stream, events=("start", "end")):
        tag = element.tag.rpartition("}")[2]
        if event == "start":
            root = element if root is None else root
        elif tag == "base":
            site = element.text.rpartition("/")[0]
            terms = "cc-by-sa-4.0" if re.search(r"//[\w-]+\.(wikipedia|wiktionary|wikibooks)\.org/", site) else ""
        elif tag == "namespace" and element.get("key") in ("6", "14"):  # files and categories in this language
            media.append(element.text.casefold())
        elif tag == "page":
            title = element.findtext("{*}title")
            texts = element.findall("{*}revision/{*}text")
            if element.find("{*}redirect") is not None:
                yield "redirect"
            elif element.findtext("{*}ns") != "0":
                yield "not an article"
            else:
                source = f"{site}/{quote(title.replace(' ', '_'))}" if site else f"{name}#{title}"
                text = texts[-1].text if texts else None
                yield {"wikitext": text, "media": media, "source": source, "title": title, "license": terms}
            root.clear()  # or every page read so far would stay in memory


def _dump_bz2(stream, name: str, columns: dict) -> Iterator[dict | str]:
    with bz2.open(stream) as xml:
        yield from _dump(xml, name, columns)


READERS = {
    ".txt": _txt,
    ".md": _txt,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".xml.bz2": _dump_bz2,
    ".xml": _dump,
}


def decode(data: bytes, declared: str | None = None) -> str:
    """The characters of a page: UTF-8 if it is, then the charset that header or page declare, then the likeliest one."""
    from trafilatura.utils import decode_file

    meta = re.search(rb"""<meta[^>]+charset=["']?([\w-]+)""", data[:4096], re.I)
    for charset in ("utf-8-sig", declared, meta and meta[1].decode()):
        with contextlib.suppress(LookupError, UnicodeDecodeError, TypeError):
            return data.decode(charset)
    return decode_file(data)
