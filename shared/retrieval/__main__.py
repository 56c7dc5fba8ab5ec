"""Indexes documents, and finds passages for a question.

    python -m shared.retrieval docs:prose --index docs.sqlite
    python -m shared.retrieval --index docs.sqlite --ask "What does DataLoader return?"

The same command again indexes what has changed, and removes what is gone. A SOURCE is what `python -m shared.corpora` reads from
this machine: a file or folder (txt, md, html, pdf, jsonl, csv, a wiki dump), or a `docs:` name.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

from shared import UserError

log = logging.getLogger("taskbook")


def texts_of(source: str) -> Iterator[dict]:
    """Documents of a source with their text as it stands there; `line` is 0 where lines of the text are not those of the file."""
    from shared.corpora.build import with_text
    from shared.corpora.readers import documents
    from shared.data.cleaning import malformed

    passed_over = Counter()
    for document in documents(source):
        row = with_text(document)
        reason = row.removeprefix("bad: ") if isinstance(row, str) else malformed(row.get("text"))
        if reason:
            passed_over[reason.split("\n")[0]] += 1
        else:
            yield row | {"line": document.get("line", 0)}
    if passed_over:
        log.warning("%s: passed over: %s", source, ", ".join(f"{count:,} {why}" for why, count in passed_over.items()))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m shared.retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="what to index; the index then holds this and nothing else")
    parser.add_argument(
        "--index",
        required=True,
        help="the file of the index, or http(s)://server:port/collection of Qdrant, made where there is none (key: "
        "QDRANT_API_KEY in the environment); or org/name on the Hub, to --ask",
    )
    parser.add_argument(
        "--model",
        help="encoder: a folder, org/name or pypi:name (default: that of the index; of a new one pypi:minilm-l6)",
    )
    parser.add_argument("--ask", help="a question; the passages that answer best are shown, with their places")
    parser.add_argument(
        "--push_to_hub", metavar="NAME", help="push the index, with the text of its documents, as a private data set"
    )
    parser.add_argument("--most", type=int, default=5, help="passages to show (default: 5)")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options) -> None:
    if not options.source and options.ask is None and not options.push_to_hub:
        raise UserError("nothing to do: name a SOURCE to index, or --ask a question.")
    if options.most < 1:
        raise UserError(f"--most {options.most}: nothing would be shown. Give 1 or more.")
    import transformers

    from shared.publish.hub import pull
    from shared.retrieval.answers import encoder_name, find, index_at, is_there, open_index, place
    from shared.retrieval.encoder import Encoder
    from shared.retrieval.hub import on_hub, push
    from shared.retrieval.qdrant import on_qdrant

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.push_to_hub and on_qdrant(options.index):
        raise UserError("--push_to_hub: pushes the file of an index, no collection of Qdrant. Name a file.")
    if not options.source and on_hub(options.index):
        if options.push_to_hub or options.model:
            raise UserError(f"{options.index}: lies on the Hub, where it is only asked. Name the file of an index.")
        index = open_index(options.index)
    elif not options.source and not is_there(options.index):
        raise UserError(f"{options.index}: no such index. Name a SOURCE to make it from.")
    else:
        model = options.model or encoder_name(options.index)
        index = index_at(options.index, Encoder(pull(model)))
        if options.model and options.push_to_hub and not options.source:
            index.note("model", model)  # the same encoder, which was a folder, by its name on the Hub
    if options.source:
        index.note("model", model)
        before = index.fact("whole")
        index.note("whole", "no")  # what answers meanwhile, or after a kill, can say so
        try:
            counts = index.update(tqdm(texts_of(options.source), desc="indexing", unit=" documents", disable=None))
        except UserError:
            index.note("whole", before or "no")
            raise
        index.note("whole", "yes")
        said = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        print(f"{options.index}: {len(index):,} passages; documents: {said}")
    if options.push_to_hub:
        print(f"pushed: {push(index, options.push_to_hub)}")
    if options.ask is not None:
        found, _ = find(index, options.ask, options.most)
        if not found:
            print(f"Nothing in {options.index} has to do with that.")
        for number, passage in enumerate(found, 1):
            where = place(passage.title, passage.heading, passage.source)
            line = f", line {passage.line}" if passage.line else ""
            print(f"[{number}] {where} ({passage.source}{line})\n{passage.text}\n")


if __name__ == "__main__":
    sys.exit(main())
