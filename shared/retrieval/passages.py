"""Documents cut into passages at headings and paragraphs, each with its place. Pure functions, called by index.py and tasks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import regex

MOST_WORDS = 120  # of a passage: about 160 tokens of English, which small encoders were trained on
# Chinese, Japanese and four scripts of South East Asia write no blanks: each character counts. The marks of the latter and of
# all other scripts belong to the letter before them.
_ALONE, _MARKED = r"[\p{Han}\p{Hiragana}\p{Katakana}]", r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
WORD = regex.compile(rf"(?V1){_ALONE}|{_MARKED}\p{{M}}*|[[\w\p{{M}}]--{_ALONE}--{_MARKED}]+")
HEADING = re.compile(r"#{1,6}[ \t]+\S.*|(={2,6})[^=].*\1")  # Markdown, MediaWiki
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")  # docs:prose sets qualified names above what it says of them
UNDERLINE = re.compile(r"={3,}|-{3,}")
FENCE = re.compile(r"(`{3,})[^`]*|(~{3,}).*")  # as CommonMark has it, any indentation allowed
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

    A heading begins a passage and belongs to it; one without a text below it begins that of the next heading, or ends the last
    one. All words of a document are in exactly one passage.
    """
    found: list[Passage] = []
    pending: list[tuple[int, int, int]] = []  # start, end, words
    heading, only_heading, line, counted = "", False, 1, 0

    def flush() -> None:
        nonlocal line, counted
        if pending:
            start, end = pending[0][0], pending[-1][1]
            line, counted = line + document.count("\n", counted, start), start
            found.append(Passage(document[start:end], heading, start, line))
        pending.clear()

    for start, end, title in _paragraphs(document):
        if title is not None:
            count = len(WORD.findall(document, start, end))
            if not only_heading or sum(words for *_, words in pending) + count > most_words:
                flush()
            heading, only_heading = title, True
            pending.append((start, end, count))
            continue
        for first, last, count in _pieces(document, start, end, most_words):
            if pending and not only_heading and sum(words for *_, words in pending) + count > most_words:
                flush()
            pending.append((first, last, count))
            only_heading = False
    if only_heading and found:
        found[-1] = replace(found[-1], text=document[found[-1].start : pending[-1][1]])
    else:
        flush()
    return found


def _paragraphs(document: str) -> Iterator[tuple[int, int, str | None]]:
    """Start and end of each paragraph, without blanks around it; for a heading also what it says."""
    lines = []  # start, end and text, without blanks around it
    for match in re.finditer(r"[^\n]*\n|[^\n]+", document):
        first = match.start() + len(match[0]) - len(match[0].lstrip())
        lines.append((first, match.start() + len(match[0].rstrip()), match[0].strip()))
    fences = _fences([line for *_, line in lines])
    begin = end = count = at = 0
    while at < len(lines):
        first, last, line = lines[at]
        here = at
        at = fences.get(here, here) + 1
        if count == 1 and here not in fences and (UNDERLINE.fullmatch(line) or _is_underline(line, lines[here - 1][2])):
            yield begin, last, document[begin:end].strip()
            count = 0
        elif here not in fences and (HEADING.fullmatch(line) or _is_name(lines, here)):
            if count:
                yield begin, end, None
            yield first, last, line.strip("#= \t")
            count = 0
        elif line:
            if not count:
                begin = first
            count += at - here
            end = lines[at - 1][1]
        elif count:
            yield begin, end, None
            count = 0
    if count:
        yield begin, end, None


def _is_underline(line: str, above: str) -> bool:
    """Whether a line is a `~~~~~` that reStructuredText sets below a heading of about its length, and no fence."""
    return len(line) >= 3 and not line.strip("~") and abs(len(line) - len(above)) <= 2


def _is_name(lines: list[tuple[int, int, str]], at: int) -> bool:
    """Whether a line is a qualified name as docs:prose sets it, above a text, and none in a list of names or in a text."""
    if not NAME.fullmatch(lines[at][2]) or at and lines[at - 1][2]:
        return False
    below = next((lines[i][2] for i in range(at + 1, len(lines)) if lines[i][2]), "")
    return bool(below) and not any(kind.fullmatch(below) for kind in (HEADING, NAME, UNDERLINE))


def _fences(lines: list[str]) -> dict[int, int]:
    """First and last line of each block of code: a comment in it is no heading, an empty line no end. One that nothing ends is
    none, or the headings below it would be lost.
    """
    found: dict[int, int] = {}
    never: dict[str, int] = {}  # from which length on nothing below ends a fence of this character
    at = 0
    while at < len(lines):
        mark = FENCE.fullmatch(lines[at])
        if mark and not (at and _is_underline(lines[at], lines[at - 1])):
            sign = mark[1] or mark[2]
            end = None
            if len(sign) < never.get(sign[0], len(sign) + 1):
                below = range(at + 1, len(lines))
                end = next((i for i in below if lines[i].startswith(sign) and not lines[i].strip(sign[0])), None)
            if end is None:
                never[sign[0]] = min(len(sign), never.get(sign[0], len(sign)))
            else:
                found[at] = at = end
        at += 1
    return found


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
