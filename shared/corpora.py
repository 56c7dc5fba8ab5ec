"""A corpus of plain text from documents of any source, cleaned and without near-duplicates. Called from the command line.

    python -m shared.corpora docs:prose --output docs.jsonl.gz
    python -m shared.corpora viwiki-latest-pages-articles.xml.bz2 --output viwiki.jsonl.gz
    python -m shared.corpora https://docs.python.org/3/tutorial/ --depth 1 --output tutorial.jsonl.gz
    python -m shared.corpora Skylion007/openwebtext --output openwebtext.jsonl.gz

A SOURCE is a `docs:` name, a MediaWiki dump, a web page (with --depth the site around it), a local file or folder, or a Hub
dataset. Each line of the output has `text, source, title, license, sha256`, all strings; license is "" where none is stated.
Everything is a stream: memory holds the index of near-duplicates (216 bytes a document) and little else.
"""

import argparse
import bz2
import contextlib
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import mimetypes
import multiprocessing
import os
import re
import sqlite3
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import quote, urldefrag, urljoin, urlsplit
from xml.etree import ElementTree

import numpy as np
from tqdm import tqdm

from shared import UserError
from shared.cleaning import (
    CleaningReport,
    NearDuplicates,
    clean_rows,
    document_cleaner,
    languages,
    repetitive,
    signature,
    words_between,
)

log = logging.getLogger("taskbook")

PIECE = 400_000  # characters: a longer file becomes several documents, each well below cleaning.LONGEST
BATCH = 500_000  # characters sent to another process at once
AGENT = "lm-taskbook"
LARGEST = 5_000_000  # bytes of a page; an article has at most one or two
TRIES, HOPS = 3, 5
ANSWER, WHOLE = 20.0, 60.0  # seconds without a byte, seconds for a page
LONGEST_WAIT = 120.0  # seconds, however long a server asks to wait
NOT_PAGES = re.compile(r"(image|video|audio|font)/|application/(pdf|zip|x-tar|x-7z|java-archive|octet-stream)")


# Documents: dicts with `text` (or `html` or `wikitext` still to be read) and `source`; a str is the reason why there is none.


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
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or _reader(path):
        raise UserError(
            f"{source}: no such file or folder. A Hub dataset is written org/name, a page https://..., "
            "the documentation installed here docs:prose."
        )
    return _hub(source, dataset_config, split, columns or {})


def _docs(name: str) -> Iterator[dict]:
    from shared import docs

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
        rows = datasets.load_dataset(repo, config, split=split, streaming=True, revision=revision or None)
        terms = getattr(card, "license", None) or ""
        terms = terms if isinstance(terms, str) else ", ".join(terms)
        yield from _table(rows, name, columns, terms)
    except (datasets.exceptions.DatasetNotFoundError, HTTPError, OSError) as error:
        said = str(error).strip().splitlines() or [""]
        raise UserError(f"{name}: cannot be read from the Hub: {type(error).__name__}: {said[0]}") from error
    except ValueError as error:  # no such configuration or split: the message lists those there are
        raise UserError(f"{name}: {error} See --dataset_config and --split.") from error


def _local(path: Path, columns: dict) -> Iterator[dict | str]:
    """The documents of a file, or of all files below a folder that are of a kind that is read, in the order of names."""
    single = path.is_file()
    if single and not _reader(path):
        raise UserError(f"{path}: cannot be read; expected {' '.join(READERS)} (.gz allowed).")
    for file in [path] if single else sorted(path.rglob("*")):
        name = file.relative_to(path.parent if path.name else path.resolve()).as_posix()
        if not file.is_file() or any(part.startswith(".") for part in Path(name).parts[not single :]):
            continue
        if not (read := _reader(file)):
            yield "another kind of file"
            continue
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


# Text from HTML and wikitext: in the workers, since it is most of the work.

UNSEEN = {
    "ref",
    "references",
    "table",
    "gallery",
    "timeline",
    "imagemap",
    "score",
    "templatestyles",
    "indicator",
    "style",
}
SWITCH = re.compile(r"__[^\W\d_]+__")  # __NOTOC__ and its translations
HOLLOW = re.compile(r" ?[(（][\s,;:]*[)）]")  # what removed templates leave: "Hanoi ( ; )"


def wiki_text(wikitext: str, media: Iterable[str] = ("file", "image", "category")) -> str:
    """The prose of a page of a wiki: no templates, tables, references, media; a heading stays if text follows it.

    Args:
        media: namespaces, in lower case and the language of the wiki, whose links show no text: files and categories.
    """
    import mwparserfromhell

    media = tuple(f"{name}:" for name in media)
    sections = [["", ""]]
    for node in mwparserfromhell.parse(wikitext).nodes:
        if isinstance(node, mwparserfromhell.nodes.Heading):
            sections.append([_plain(node.title.nodes, media).strip(), ""])
        else:
            sections[-1][1] += _plain([node], media)
    parts = []
    for heading, body in sections:
        body = HOLLOW.sub("", SWITCH.sub("", body))
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.strip() for line in body.split("\n"))).strip()
        parts += [part for part in (heading, body) if part and body]
    return "\n\n".join(parts)


def _plain(nodes: Iterable, media: tuple[str, ...]) -> str:
    """What a reader sees of parsed wikitext. A walk of our own: strip_code shows references, file options and categories."""
    from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Tag, Text, Wikilink

    shown = []
    for node in nodes:
        if isinstance(node, Text):
            shown.append(str(node))
        elif isinstance(node, Wikilink):
            title, text = str(node.title).strip(), node.text
            # Only files take several options; a bare [[fr:Titre]] is the same article in another language.
            hidden = title.casefold().startswith(media) or (text is not None and "|" in _own_text(text))
            if not hidden and not (text is None and re.match(r"[a-z]{2,3}(-[a-z]+)*:\S", title)):
                shown.append(title.removeprefix(":") if text is None else _plain(text.nodes, media))
        elif isinstance(node, Tag):
            name = str(node.tag).lower()
            if name == "br":
                shown.append("\n")
            elif node.wiki_markup == "*":
                shown.append("-")
            elif name not in UNSEEN and node.contents is not None:
                shown.append(_plain(node.contents.nodes, media))
        elif isinstance(node, ExternalLink):
            shown.append(_plain(node.title.nodes, media) if node.title else "" if node.brackets else str(node.url))
        elif isinstance(node, HTMLEntity):
            shown.append(node.normalize())
    return "".join(shown)


def _own_text(code) -> str:
    """The text of a link's label outside of the templates and links in it."""
    return "".join(str(node) for node in code.nodes if type(node).__name__ == "Text")


def decode(data: bytes, declared: str | None = None) -> str:
    """The characters of a page: UTF-8 if it is, then the charset that header or page declare, then the likeliest one."""
    from trafilatura.utils import decode_file

    meta = re.search(rb"""<meta[^>]+charset=["']?([\w-]+)""", data[:4096], re.I)
    for charset in ("utf-8-sig", declared, meta and meta[1].decode()):
        with contextlib.suppress(LookupError, UnicodeDecodeError, TypeError):
            return data.decode(charset)
    return decode_file(data)


def prepare(row: dict | str, fewest: int, codes: tuple[str, ...]) -> str | tuple[dict, np.ndarray]:
    """A document of `documents` or `crawl` as the line to write and its signature, or the reason for dropping it."""
    if isinstance(row, str):
        return row
    text, title, terms = row.get("text"), row.get("title"), row.get("license")
    if row.get("html"):
        from trafilatura import bare_extraction

        page = bare_extraction(row["html"], url=row["source"], with_metadata=True, include_comments=False)
        if page is None or not page.text:
            return "no text in the page"
        text, title, terms = page.text, page.title, page.license
    elif row.get("wikitext"):
        from mwparserfromhell.parser import ParserError

        try:
            text = wiki_text(row["wikitext"], row["media"])
        except (ParserError, RecursionError):
            return "bad: wikitext cannot be parsed"
        if not text:
            return "no text in the page"
    filters = [words_between(fewest), repetitive, *([languages(*codes)] if codes else [])]
    clean = document_cleaner(filters=filters)({"text": text})
    if isinstance(clean, str):
        return clean
    digest = hashlib.sha256(clean["text"].encode("utf8")).hexdigest()
    clean |= {"source": str(row["source"]), "title": str(title or ""), "license": str(terms or ""), "sha256": digest}
    return clean, signature(clean["text"])


# The web.


class _PassedOver(Exception):
    """Why a page gives no document."""


def _site(url: str) -> str:
    """Host and port; http and https, with and without www, are one site."""
    return urlsplit(url).netloc.lower().removeprefix("www.")


def _normal(url: str, base: str = "") -> str | None:
    """Absolute, percent-encoded, without fragment; None for what is no page on the web."""
    import urllib3

    try:
        url = urllib3.util.parse_url(urldefrag(urljoin(base, url.strip())).url).url
    except ValueError:  # LocationParseError is one too
        return None
    if not url.startswith(("http://", "https://")) or not urlsplit(url).netloc or len(url) > 2000:
        return None
    return url if urlsplit(url).path else f"{url}/"


def _links(html: str, url: str) -> list[str]:
    """Pages of the same site that a page links to, in its order; none where the page asks not to follow them."""
    import lxml.etree
    import lxml.html

    try:
        tree = lxml.html.document_fromstring(
            html.encode("utf8", "replace"), parser=lxml.html.HTMLParser(encoding="utf8")
        )
    except (lxml.etree.LxmlError, ValueError):
        return []
    if tree.xpath("//meta[translate(@name, 'ROBTS', 'robts')='robots'][contains(@content, 'nofollow')]"):
        return []
    base = _normal(next(iter(tree.xpath("//base/@href")), ""), url) or url
    found = (_normal(link, base) for link in tree.xpath("//a[not(contains(@rel, 'nofollow'))]/@href"))
    kind = functools.cache(lambda link: mimetypes.guess_type(urlsplit(link).path)[0] or "")
    return [
        link for link in dict.fromkeys(found) if link and _site(link) == _site(url) and not NOT_PAGES.match(kind(link))
    ]


class _Browser:
    """Requests to one site: one at a time, `delay` seconds apart, only where robots.txt allows."""

    def __init__(self, start: str, delay: float):
        import urllib3
        from protego import Protego  # the standard library's parser knows no wildcards and would fetch what they forbid

        self.site, self.delay, self.last = _site(start), delay, 0.0
        timeout = urllib3.Timeout(connect=ANSWER, read=ANSWER)
        headers = {"User-Agent": AGENT, **urllib3.util.make_headers(accept_encoding=True)}
        self.pool = urllib3.PoolManager(num_pools=2, headers=headers, timeout=timeout, retries=False)
        self.rules = Protego.parse("")
        try:
            text = self.get(urljoin(start, "/robots.txt"))[1]
        except _PassedOver as reason:
            # RFC 9309: a 4xx allows everything, a server that does not answer nothing
            text = "" if re.match("HTTP 4(?!29)", str(reason)) else None
            if text is None:
                raise UserError(
                    f"{self.site}: robots.txt cannot be read ({reason}), so no page is. Try again later."
                ) from None
        self.rules = Protego.parse(text)
        self.delay = max(delay, self.rules.crawl_delay(AGENT) or 0)

    def get(self, url: str) -> tuple[str, str, str]:
        """(final URL, characters, content type) of a page, after redirects within the site.

        Raises:
            _PassedOver: with the reason.
        """
        for _ in range(HOPS):
            if not self.rules.can_fetch(url, AGENT):
                raise _PassedOver("robots.txt")
            status, headers, data = self._request(url)
            if status not in (301, 302, 303, 307, 308):
                kind, _, parameters = headers.get("Content-Type", "text/html").partition(";")
                charset = re.search(r"""charset=["']?([\w-]+)""", parameters, re.I)
                return url, decode(data, charset and charset[1]), kind.strip().lower()
            target = _normal(headers.get("Location", ""), url)
            if not target or _site(target) != self.site:
                raise _PassedOver("redirect off the site")
            url = target
        raise _PassedOver("too many redirects")

    def _request(self, url: str) -> tuple[int, dict, bytes]:
        """One page with retries; the wait doubles each time, or is what the server asks for."""
        import urllib3

        reason, wait = "", self.delay
        for attempt in range(TRIES):
            time.sleep(max(0.0, self.last + wait - time.monotonic()))
            try:
                with self.pool.request("GET", url, redirect=False, preload_content=False) as response:
                    if response.status == 429 or response.status >= 500:
                        reason = f"HTTP {response.status}"
                        asked = response.headers.get("Retry-After", "")
                        wait = min(
                            LONGEST_WAIT, max(self.delay * 2 ** (attempt + 1), float(asked) if asked.isdigit() else 0)
                        )
                        continue
                    if response.status in (301, 302, 303, 307, 308):
                        return response.status, response.headers, b""
                    if response.status != 200:
                        raise _PassedOver(f"HTTP {response.status}")
                    kind = response.headers.get("Content-Type", "text/html").split(";")[0].strip().lower()
                    # Of what type robots.txt is sent matters to nobody, its rules do
                    if kind not in ("text/html", "application/xhtml+xml", "text/plain") and not url.endswith(
                        "/robots.txt"
                    ):
                        raise _PassedOver(f"content of type {kind}")
                    return 200, response.headers, self._body(response)
            except urllib3.exceptions.HTTPError as error:
                reason, wait = f"no answer: {type(error).__name__}", min(LONGEST_WAIT, self.delay * 2 ** (attempt + 1))
            finally:
                self.last = time.monotonic()
        raise _PassedOver(reason)

    @staticmethod
    def _body(response) -> bytes:
        data, deadline = bytearray(), time.monotonic() + WHOLE
        if int(response.headers.get("Content-Length") or 0) > LARGEST:
            raise _PassedOver(f"over {LARGEST:,} bytes")
        # Decompressed, since a small answer may unpack to gigabytes; read1, since read waits until the amount is there.
        while chunk := response.read1(1 << 14):
            data += chunk
            if len(data) > LARGEST:
                raise _PassedOver(f"over {LARGEST:,} bytes")
            if time.monotonic() > deadline:
                raise _PassedOver(f"over {WHOLE:.0f} seconds")
        return bytes(data)


def crawl(
    start: str, state: str | Path, *, depth: int = 0, max_pages: int = 100, delay: float = 1.0
) -> Iterator[dict | str]:
    """Streams a web page and, up to `depth` links away, the pages of its site; breadth first.

    Every answer is kept in `state` (SQLite) before the next request, so after a kill the same call repeats none of them; what
    failed for want of an answer is tried again. Robots.txt is obeyed and read anew at each call.

    Args:
        state: may hold several sites; delete it to fetch the pages anew.
        max_pages: requested in all, failures included.
        delay: seconds between requests; a longer Crawl-delay in robots.txt counts.

    Raises:
        UserError: no valid address, or a site whose robots.txt cannot be read.
    """
    url = _normal(start)
    if not url:
        raise UserError(f"{start}: not the address of a page; expected https://...")
    with contextlib.closing(sqlite3.connect(state, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(
            "CREATE TABLE IF NOT EXISTS pages (number INTEGER PRIMARY KEY, start TEXT, url TEXT, depth INTEGER, "
            "outcome TEXT, final TEXT, kind TEXT, content BLOB, UNIQUE (start, url))"
        )
        db.execute(
            "UPDATE pages SET outcome = NULL WHERE outcome LIKE 'no answer%' OR outcome LIKE 'HTTP 5%' OR outcome = 'HTTP 429'"
        )
        add = "INSERT OR IGNORE INTO pages (start, url, depth) VALUES (?, ?, ?)"
        db.execute(add, (url, url, 0))
        browser, number, requested = None, 0, 0
        following = (
            "SELECT number, url, depth, outcome, final, kind, content FROM pages "
            "WHERE start = ? AND depth <= ? AND number > ? ORDER BY number LIMIT 1"
        )
        while page := db.execute(following, (url, depth, number)).fetchone():
            number, address, level, outcome, final, kind, content = page
            if outcome is None:
                if requested >= max_pages:
                    break
                browser = browser or _Browser(url, delay)
                outcome, final, kind, content, links = _visit(browser, address)
                if outcome == "ok" and final != address:  # the page has two addresses: it must not be fetched twice
                    known = db.execute("SELECT outcome FROM pages WHERE start = ? AND url = ?", (url, final)).fetchone()
                    outcome = "redirect to a page fetched before" if known and known[0] else outcome
                db.execute("BEGIN")
                db.execute(
                    "UPDATE pages SET outcome = ?, final = ?, kind = ?, content = ? WHERE number = ?",
                    (outcome, final, kind, content, number),
                )
                db.executemany(add, [(url, link, level + 1) for link in links])
                if outcome == "ok" and final != address:
                    db.execute(add, (url, final, level))
                    db.execute("UPDATE pages SET outcome = 'seen' WHERE start = ? AND url = ?", (url, final))
                db.execute("COMMIT")
            if outcome == "seen":
                continue
            requested += outcome != "robots.txt"
            if outcome != "ok":
                log.warning("%s: passed over: %s", address, outcome)
                yield outcome
            else:
                text = zlib.decompress(content).decode("utf8", "surrogatepass")
                yield {"text" if kind == "text/plain" else "html": text, "source": final}


def _visit(browser: _Browser, url: str) -> tuple[str, str | None, str | None, bytes | None, list[str]]:
    """Outcome, final URL, content type, compressed characters and links of a page."""
    try:
        final, text, kind = browser.get(url)
    except _PassedOver as reason:
        return str(reason), None, None, None, []
    links = _links(text, final) if kind != "text/plain" else []
    return "ok", final, kind, zlib.compress(text.encode("utf8", "surrogatepass")), links


# The corpus.


def _batches(rows: Iterable[dict | str]) -> Iterator[list]:
    """Rows in lists of about BATCH characters."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += 100 if isinstance(row, str) else sum(len(value) for value in row.values() if isinstance(value, str))
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _each(function: Callable, batch: list) -> list:
    return [function(row) for row in batch]


def ordered_map(function: Callable, rows: Iterable, processes: int) -> Iterator:
    """`map(function, rows)` in several processes, in order, with a bounded number of rows in flight."""
    if processes == 1:
        yield from map(function, rows)
        return
    # spawn: a fork would copy the locks of threads (progress bar, Arrow) in whatever state they are
    context, waiting = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for batch in _batches(rows):
            waiting.append(pool.submit(_each, function, batch))
            if len(waiting) > 2 * processes:  # the pool itself would read the whole source ahead
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def build(
    rows: Iterable[dict | str],
    output: str | Path,
    *,
    min_words: int = 50,
    codes: Iterable[str] = (),
    processes: int = 1,
) -> CleaningReport:
    """Cleans documents, drops near-duplicates, writes `output` (whole or not at all) and a histogram of lengths beside it.

    Args:
        rows: what `documents` and `crawl` yield.
        output: `.jsonl` or `.jsonl.gz`.
        codes: ISO 639-1 codes of the languages to keep; none keeps all.
        processes: that clean; reading, comparing and writing is one more.

    Returns:
        The report: `read = kept + dropped`, by reason.

    Raises:
        UserError: another ending, a folder that cannot be written, or no document left.
    """
    output = Path(output)
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--output {output}: expected a name that ends in .jsonl or .jsonl.gz.")
    partial = output.with_name(f".{output.name}.partial")
    cleaned, unique, index, lengths = CleaningReport(), CleaningReport(), NearDuplicates(), Counter()
    prepared = ordered_map(functools.partial(prepare, fewest=min_words, codes=tuple(codes)), rows, processes)
    pairs = clean_rows(prepared, lambda result: result, cleaned)

    def new(pair):
        return "near-duplicate" if index.add_signature(pair[1], only_new=True) else pair[0]

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            with _compressed(file, output.suffix == ".gz") as lines, tqdm(unit=" documents", disable=None) as bar:
                for row in clean_rows(pairs, new, unique):
                    lines.write(json.dumps(row, ensure_ascii=False).encode("utf8", "backslashreplace") + b"\n")
                    lengths[int(8 * math.log2(len(row["text"])))] += 1
                    if cleaned.read - bar.n >= 50:
                        bar.set_postfix_str(f"{unique.kept:,} kept", refresh=False)
                        bar.update(cleaned.read - bar.n)
                bar.update(cleaned.read - bar.n)
            file.flush()
            os.fsync(file.fileno())
        report = CleaningReport(cleaned.read, unique.kept, cleaned.bad, cleaned.dropped + unique.dropped)
        if not report.kept:
            raise UserError(f"No document is left for {output}: {report}.")
        plot_lengths(lengths, histogram_path(output))
        os.replace(partial, output)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"--output {output}: cannot be written: {error}. Choose another folder.") from error
    finally:
        with contextlib.suppress(OSError):  # as a rule it is not there any more, or could not be made
            partial.unlink()
    return report


def _compressed(file, wanted: bool):
    # Without name and time, so that equal corpora are equal files; level 6 takes twice the time for 4 % less.
    return gzip.GzipFile("", "wb", 3, file, mtime=0) if wanted else contextlib.nullcontext(file)


def histogram_path(output: Path) -> Path:
    """`corpus.png` for `corpus.jsonl.gz`."""
    return output.with_name(output.name.removesuffix(".gz").removesuffix(".jsonl") + ".png")


def plot_lengths(lengths: Counter, path: Path) -> None:
    """Histogram of document lengths on a logarithmic axis; `lengths` counts documents by int(8 log2(characters))."""
    from matplotlib.figure import Figure  # not pyplot: that would replace the backend of a notebook

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    steps = sorted(lengths)
    left, right = ([2 ** ((step + side) / 8) for step in steps] for side in (0, 1))
    axis.bar(left, [lengths[step] for step in steps], [b - a for a, b in zip(left, right, strict=True)], align="edge")
    axis.set_xscale("log")
    axis.set(xlabel="characters of a document", ylabel="documents", title=f"{lengths.total():,} documents")
    axis.grid(alpha=0.25)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    """The command. Exits with code 2 on a UserError."""
    parser = argparse.ArgumentParser(
        "python -m shared.corpora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="docs:prose, a dump, a file or folder, https://..., org/name on the Hub",
    )
    add("--output", required=True, type=Path, help="file to write, .jsonl or .jsonl.gz")
    add("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="in tables: text=body title=headline ...")
    add("--dataset_config", help="configuration of a Hub dataset, such as 20231101.vi")
    add("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    add(
        "--depth", type=int, default=0, help="links to follow from a web page within its site (default: this page only)"
    )
    add("--max_pages", type=int, default=100, help="pages to request from a site (default: %(default)s)")
    add("--delay", type=float, default=1.0, help="seconds between requests to a site (default: %(default)s)")
    add("--min_words", type=int, default=50, help="drop shorter documents (default: %(default)s)")
    add("--languages", nargs="+", default=[], metavar="CODE", help="keep these only, such as: en vi (default: all)")
    add("--processes", type=int, default=os.cpu_count() or 1, help="that clean (default: one a core, %(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    state = args.output.with_name(f"{args.output.name}.crawl")
    try:
        pairs = [pair.partition("=") for pair in args.columns]
        if unknown := [
            name for name, equals, column in pairs if not column or name not in ("text", "source", "title", "license")
        ]:
            raise UserError(
                f"--columns {unknown[0]}: expected text=, source=, title= or license= with the name of a column."
            )
        columns = {name: column for name, _, column in pairs}
        args.output.parent.mkdir(parents=True, exist_ok=True)

        def rows(source: str):
            if source.startswith(("http://", "https://")):
                return crawl(source, state, depth=args.depth, max_pages=args.max_pages, delay=args.delay)
            return documents(source, columns=columns, dataset_config=args.dataset_config, split=args.split)

        streams = [rows(source) for source in args.sources]  # before anything is read: names a source that is not there
        report = build(
            itertools.chain.from_iterable(streams),
            args.output,
            min_words=args.min_words,
            codes=args.languages,
            processes=max(1, args.processes),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.output}: {report}; lengths in {histogram_path(args.output).name}")
    if state.exists():
        print(f"Pages are kept in {state.name}: the same command fetches none twice. Delete it to fetch them anew.")
    if report.bad > 0.05 * report.read:
        print(
            f"warning: {report.bad:,} documents were unusable, over 5 %: is this the right source, are these its columns?"
        )


if __name__ == "__main__":
    main()
