"""A corpus of plain text from documents of any source, cleaned and without near-duplicates. Called from the command line.

    python -m shared.corpora docs:prose --output docs.jsonl.gz
    python -m shared.corpora viwiki-latest-pages-articles.xml.bz2 --output viwiki.jsonl.gz
    python -m shared.corpora https://docs.python.org/3/tutorial/ --depth 1 --output tutorial.jsonl.gz
    python -m shared.corpora wikimedia/wikipedia --dataset_config 20231101.vi --output wikipedia.jsonl.gz

A SOURCE is a `docs:` name, a MediaWiki dump, a web page (with --depth the site around it), a local file or folder, or a Hub
dataset. Each line of the output has `text, source, title, license, sha256`, all strings; license is "" where none is stated.
Everything is a stream: memory holds the index of near-duplicates (216 bytes a document) and little else.
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shared import UserError
from shared.corpora.crawl import crawl
from shared.corpora.readers import documents
from shared.corpora.wikitext import wiki_text
from shared.data.charsets import old_vietnamese, to_unicode
from shared.data.cleaning import (
    CONTROL,
    CleaningReport,
    clean_rows,
    document_cleaner,
    languages,
    repetitive,
    words_between,
)
from shared.data.near_duplicates import NearDuplicates, signature

log = logging.getLogger("taskbook")
TAGS = re.compile(r"<(script|style)\b.*?</\1\s*>|<[^>]*>", re.I | re.S)
# Blocks within what the extraction takes for one piece of text: it would join the words of one with those of the next
JOINED = (
    "//div[ancestor::li or ancestor::blockquote or ancestor::pre or ancestor::dt or ancestor::dd]"
    "[not(.//div or .//p or .//ul or .//ol or .//table)]"
)
BATCH = 500_000  # characters sent to another process at once


def with_text(row: dict | str) -> dict | str:
    """A document of `documents` or `crawl` with its `text`, `title` and `license`, not cleaned, or the reason why it has none."""
    if isinstance(row, str):
        return row
    text, title, terms = row.get("text"), row.get("title"), row.get("license")
    if row.get("html"):
        html = row["html"]  # converted first: of TCVN3 the extraction would drop a letter, the soft hyphen
        if not html.isascii() and (old := _old(" ".join(TAGS.sub(" ", html).split())[:5000])):
            html = to_unicode(html, old)
        if len(CONTROL.findall(html)) > 0.05 * len(html):
            return "bad: control characters"
        if "<html" not in html[:5000].lower():  # a part of a page: trafilatura takes it for none
            html = f"<html><body>{html}</body></html>"
        page = _article(html, row["source"])
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
    if isinstance(text, str) and (old := _old(text[:2000])):
        text = to_unicode(text, old)
    return {"text": text, "source": str(row["source"]), "title": str(title or ""), "license": str(terms or "")}


def _article(html: str, url: str):
    """The text and what is said of it, as trafilatura finds them; None where it finds none."""
    from trafilatura import bare_extraction, load_html

    if (tree := load_html(html)) is None:
        return None
    for block in tree.xpath(JOINED):
        if block.xpath("preceding-sibling::node()[normalize-space()]"):
            block.addprevious(block.makeelement("br"))
        if (block.tail or "").strip():
            block.addnext(after := block.makeelement("br"))
            after.tail, block.tail = block.tail or after.tail, None
        block.drop_tag()
    unseen = "//template[not(@shadowrootmode)]"
    return bare_extraction(tree, url=url, with_metadata=True, include_comments=False, prune_xpath=unseen)


def clean_document(row: dict | str, fewest: int, codes: tuple[str, ...]) -> dict | str:
    """A document of `documents` or `crawl` as the row to write, or the reason for dropping it."""
    row = with_text(row)
    if isinstance(row, str):
        return row
    filters = [words_between(fewest), repetitive, *([languages(*codes)] if codes else [])]
    clean = document_cleaner(filters=filters)({"text": row["text"]})
    if isinstance(clean, str):
        return clean
    digest = hashlib.sha256(clean["text"].encode("utf8")).hexdigest()
    return row | clean | {"sha256": digest}


def prepare(row: dict | str, fewest: int, codes: tuple[str, ...]) -> str | tuple[dict, np.ndarray]:
    """`clean_document` and the signature of its text."""
    clean = clean_document(row, fewest, codes)
    return clean if isinstance(clean, str) else (clean, signature(clean["text"]))


def _old(sample: str) -> str | None:
    """`old_vietnamese` of a document, asked only where marks are as frequent as in Vietnamese: it takes a millisecond."""
    if len(sample.encode("utf8", "replace")) < 1.08 * len(sample):
        return None
    if old := old_vietnamese(sample):
        _said(old)
    return old


@functools.cache
def _said(old: str) -> None:
    log.warning("documents in %s, Vietnamese of before Unicode, are converted", old)


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
            with compressed(file, output.suffix == ".gz") as lines, tqdm(unit=" documents", disable=None) as bar:
                for row in clean_rows(pairs, new, unique):
                    lines.write(json_line(row))
                    lengths[length_step(row)] += 1
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


def compressed(file, wanted: bool = True):
    """A file to write to, gzipped if wanted."""
    # Without name and time, so that equal corpora are equal files; level 6 takes twice the time for 4 % less.
    return gzip.GzipFile("", "wb", 3, file, mtime=0) if wanted else contextlib.nullcontext(file)


def json_line(row: dict) -> bytes:
    """A line of the output."""
    return json.dumps(row, ensure_ascii=False).encode("utf8", "backslashreplace") + b"\n"


def length_step(row: dict) -> int:
    """The bar of the histogram that a document counts in, see `plot_lengths`."""
    return int(8 * math.log2(len(row["text"])))


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


def not_negative(value: str) -> int:
    """A number of the command line."""
    if int(value) < 0:
        raise argparse.ArgumentTypeError(f"{value}: expected 0 or more")
    return int(value)


def language_code(value: str) -> str:
    """The code of a language that is told from others: of one that is not, no document would be kept."""
    from py3langid import rank

    if value.lower() not in (codes := sorted(code for code, _ in rank(""))):
        raise argparse.ArgumentTypeError(f"{value}: no code of a language that is known: {' '.join(codes)}")
    return value.lower()


def source_options(program: str, description: str) -> argparse.ArgumentParser:
    """The options of this command and of `shared.corpora.cluster`."""
    parser = argparse.ArgumentParser(
        program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="docs:prose, a dump, a file or folder, https://..., org/name on the Hub",
    )
    add("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="in tables: text=body title=headline ...")
    add("--dataset_config", help="configuration of a Hub dataset, such as 20231101.vi")
    add(
        "--split", default="train", help="split of a data set of the Hub, or saved by `datasets` (default: %(default)s)"
    )
    add("--min_words", type=not_negative, default=50, help="drop shorter documents (default: %(default)s)")
    add(
        "--languages",
        nargs="+",
        default=[],
        metavar="CODE",
        type=language_code,
        help="keep these only, such as: en vi (default: all)",
    )
    return parser


def table_columns(arguments: list[str]) -> dict[str, str]:
    """`--columns text=body` as `{"text": "body"}`. Raises UserError for another form or name."""
    pairs = [pair.partition("=") for pair in arguments]
    for name, _, column in pairs:
        if not column or name not in ("text", "source", "title", "license"):
            raise UserError(f"--columns {name}: expected text=, source=, title= or license= with the name of a column.")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UserError(f"--columns {' '.join(arguments)}: each name takes one column.")
    return {name: column for name, _, column in pairs}


def summary(output: Path, report: CleaningReport) -> str:
    """What the command says at its end."""
    said = f"{output}: {report}; lengths in {histogram_path(output).name}"
    if report.bad > 0.05 * report.read:
        said += f"\nwarning: {report.bad:,} documents were unusable, over 5 %: is this the right source, are these its columns?"
    return said


def main(argv: list[str] | None = None) -> None:
    """The command. Exits with code 2 on a UserError."""
    parser = source_options("python -m shared.corpora", __doc__)
    add = parser.add_argument
    add("--output", required=True, type=Path, help="file to write, .jsonl or .jsonl.gz")
    add(
        "--depth",
        type=not_negative,
        default=0,
        help="links to follow from a web page within its site (default: this page only)",
    )
    add("--max_pages", type=not_negative, default=100, help="pages to request from a site (default: %(default)s)")
    add("--delay", type=float, default=1.0, help="seconds between requests to a site (default: %(default)s)")
    add("--processes", type=int, default=os.cpu_count() or 1, help="that clean (default: one a core, %(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)  # not of the client, which would list each request to the Hub
    state = args.output.with_name(f"{args.output.name}.crawl")
    try:
        columns = table_columns(args.columns)
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {args.output}: cannot be made ({error.strerror}); name another file.") from error

        def rows(source: str):
            if source.startswith(("http://", "https://")):
                return crawl(source, state, depth=args.depth, max_pages=args.max_pages, delay=args.delay)
            options = {"columns": columns, "dataset_config": args.dataset_config, "split": args.split}
            return documents(source, **options, leave_out=args.output)

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
    print(summary(args.output, report))
    if state.exists():
        print(f"Pages are kept in {state.name}: the same command fetches none twice. Delete it to fetch them anew.")
