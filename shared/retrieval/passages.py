"""Documents cut into passages at headings and paragraphs, each with its place. Pure functions, called by index.py and tasks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import regex

MOST_WORDS = 120  # of a passage: about 160 tokens of English, which small encoders were trained on
# Chinese and Japanese write no blanks: each character counts. The marks of other scripts belong to the letter before them.
WORD = regex.compile(r"(?V1)[\p{Han}\p{Hiragana}\p{Katakana}]|[[\w\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}]]+")
# Markdown, MediaWiki, and the qualified names that docs:prose sets above what it says of them
HEADING = re.compile(r"#{1,6}[ \t]+\S.*|(={2,6})[^=].*\1|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
UNDERLINE = re.compile(r"={3,}|-{3,}")
FENCE = re.compile(r"`{3,}|~{3,}")
SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n")


@dataclass(frozen=True)
class Passage:
    """A part of a document: `document[start : start + len(text)] == text`, from line `line` (of 1) on, under `heading`."""

    text: str
    heading: str
    start: int
    line: int


def cut(document: str, most_words: int = MOST_WORDS) -> list[Passage]:
    """Passages of at most `most_words` words in their order: whole paragraphs where they fit, else sentences, else words.

    A heading begins a passage and belongs to it; one without a text below it is left out. All words of all else are in exactly
    one passage.
    """
    found: list[Passage] = []
    pending: list[tuple[int, int, int]] = []  # start, end, words
    heading, only_heading, line, counted = "", False, 1, 0

    def flush() -> None:
        nonlocal line, counted
        if pending and not only_heading:
            start, end = pending[0][0], pending[-1][1]
            line, counted = line + document.count("\n", counted, start), start
            found.append(Passage(document[start:end], heading, start, line))
        pending.clear()

    for start, end, title in _paragraphs(document):
        if title is not None:
            flush()
            heading, only_heading = title, True
            pending.append((start, end, len(WORD.findall(document, start, end))))
            continue
        for first, last, count in _pieces(document, start, end, most_words):
            if pending and not only_heading and sum(words for *_, words in pending) + count > most_words:
                flush()
            pending.append((first, last, count))
            only_heading = False
    flush()
    return found


def _paragraphs(document: str) -> Iterator[tuple[int, int, str | None]]:
    """Start and end of each paragraph, without blanks around it; for a heading also what it says."""
    begin = end = lines = 0
    fence = None
    for match in re.finditer(r"[^\n]*\n|[^\n]+", document):
        line = match[0].strip()
        first, last = match.start() + len(match[0]) - len(match[0].lstrip()), match.start() + len(match[0].rstrip())
        mark = FENCE.match(line)
        if fence or mark:  # a comment in a block of code is no heading, an empty line in it no end
            if fence is None:
                fence = mark[0]
            elif line == fence:
                fence = None
            if not lines:
                begin = first
            lines += 1
            end = max(last, begin)
        elif not line:
            if lines:
                yield begin, end, None
            lines = 0
        elif lines == 1 and UNDERLINE.fullmatch(line):
            yield begin, last, document[begin:end].strip()
            lines = 0
        elif HEADING.fullmatch(line):
            if lines:
                yield begin, end, None
            yield first, last, line.strip("#= \t")
            lines = 0
        else:
            if not lines:
                begin = first
            lines += 1
            end = last
    if lines:
        yield begin, end, None


def _pieces(document: str, start: int, end: int, most_words: int) -> Iterator[tuple[int, int, int]]:
    """Start, end and words of a paragraph, or of its sentences where it is too long, cut at words where these are, too."""
    count = len(WORD.findall(document, start, end))
    if count <= most_words:
        if count:
            yield start, end, count
        return
    ends = [match.start() for match in SENTENCE_END.finditer(document, start, end)]
    for first, last in zip([start, *ends], [*ends, end], strict=True):
        words = [match.span() for match in WORD.finditer(document, first, last)]
        for i in range(0, len(words), most_words):
            part = words[i : i + most_words]
            left = first if i == 0 else part[0][0]
            right = last if i + most_words >= len(words) else words[i + most_words][0]
            left += len(document[left:right]) - len(document[left:right].lstrip())
            yield left, left + len(document[left:right].rstrip()), len(part)
