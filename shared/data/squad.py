"""SQuAD's own files, and answers as tools and tables write them. Used by tasks that read questions about texts.

An answer is a place in its context, so contexts are taken as they are: cleaning would move them.
"""

import ast
import json
import re
import unicodedata
from itertools import accumulate
from pathlib import Path

import regex

from shared import UserError, one_spelling
from shared.data.cleaning import malformed
from shared.data.files import kind_of, read_json


def read_official(path: str) -> list[dict] | None:
    """Rows of SQuAD's own JSON (1.1 or 2.0: articles, paragraphs, questions) in the Hub's columns; None if it is another file.

    `plausible_answers` of questions without an answer are not read: they are wrong answers.

    Raises:
        UserError: it has articles, but not in that format.
    """
    file = Path(path).expanduser()
    if not file.is_file() or kind_of(file) != ".json":
        return None
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
    if not any(isinstance(article, dict) and "paragraphs" in article for article in content["data"]):
        return None  # rows under `data`: a table
    try:
        return [
            {
                "id": str(question.get("id", "")),
                "title": article.get("title") or "",
                "context": paragraph["context"],
                "question": question["question"],
                "answers": _answers(question),
            }
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not SQuAD's JSON: {type(error).__name__} {error} in an article of `data`.") from error


def _answers(question: dict) -> dict[str, list]:
    """None where the question is marked as one without; a place that a tool left out is None, see `find_in`."""
    answers = [] if question.get("is_impossible") else question["answers"]
    return {
        "text": [answer["text"] for answer in answers],
        "answer_start": [answer.get("answer_start") for answer in answers],
    }


def find_in(context: str, text: str, start=None) -> tuple[int, int] | None:
    """Where an answer stands in its context: first and last + 1 character; None if it does not, or nothing says at which place.

    Args:
        start: its place as the file gives it: characters, or the units of UTF-16 (JavaScript, Java, most annotation tools) or
            UTF-8. Where the answer stands at none of these, it is the nearest to it; without a place, the only one.
    """
    text = text if text in context else text.strip()  # annotated with a blank that the context does not have
    spans = [(found.start(1), found.end(1)) for found in re.finditer(f"(?=({re.escape(text)}))", context)]
    if not spans:  # in another spelling: `a` + U+0301 for `á`, `hoà` for `hòa`
        letters = regex.findall(r"\X", context)
        composed = [unicodedata.normalize("NFC", letter) for letter in letters]
        begins = list(accumulate(map(len, composed), initial=0))
        original = dict(zip(begins, accumulate(map(len, letters), initial=0), strict=True))
        plain = re.escape(one_spelling(text))
        found = [(hit.start(1), hit.end(1)) for hit in re.finditer(f"(?=({plain}))", one_spelling("".join(composed)))]
        spans = [(original[a], original[b]) for a, b in found if a in original and b in original]
    start = str(start).strip().removesuffix(".0")  # a table may hold the text `12.0`
    start = int(start) if start.isdecimal() else None
    if len(spans) < 2 or start is None:
        return spans[0] if len(spans) == 1 else None
    units = (
        lambda place: place,
        lambda place: len(context[:place].encode("utf-16-le", "surrogatepass")) // 2,
        lambda place: len(context[:place].encode("utf8", "surrogatepass")),
    )
    exact = (span for count in units for span in spans if count(span[0]) == start)
    return next(exact, None) or min(spans, key=lambda span: abs(span[0] - start))


def number_text(number: float) -> str:
    """`1700` for 1700 and 1700.0: pandas makes floats of whole numbers where a cell of the column is empty."""
    whole = isinstance(number, float) and number.is_integer()
    return f"{number:.0f}" if whole else str(number)  # of an int the former would round what is beyond 2**53


def parse_answers(text: str):
    """What a cell of a table says: the text itself, or the list or dict whose repr or JSON it is, as pandas writes them."""
    try:
        found = ast.literal_eval(re.sub(r"array\((\[.*?\])(?:, dtype=[^)]*)?\)", r"\1", text, flags=re.DOTALL))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        try:
            found = json.loads(text)
        except ValueError:
            return text
    if isinstance(found, dict) and "text" in found:
        return found
    if isinstance(found, list) and all(
        isinstance(part, str) or isinstance(part, dict) and "text" in part for part in found
    ):
        return found
    return text


def read_answers(context: str, answers, start=None, column: str = "answers") -> dict | str:
    """`text` and `answer_start`, two lists, of answers as they stand in the context (see `find_in`), or the reason for dropping
    the row (see `shared.data.cleaning.clean_rows`). Without an answer both are empty.

    Args:
        answers: the Hub's `{"text": [...], "answer_start": [...]}`, a list of `{"text", "answer_start"}`, a text, a number or a
            list of them, or the repr of these in a cell of a table.
        start: the place of an answer that is a text, or a list of places, where another column gives them.
        column: where the answers stand, for the reason.
    """
    if isinstance(answers, str) and answers[:1] in ("{", "[") and answers not in context:
        answers = parse_answers(answers)
    if isinstance(answers, int | float) and not isinstance(answers, bool):
        answers = "" if answers != answers else number_text(answers)  # NaN: an empty cell
    if isinstance(start, str) and start.lstrip().startswith("["):
        start = re.findall(r"\d+", start)
    starts = start if isinstance(start, list) else [start]
    if isinstance(answers, dict):
        if answers and "text" not in answers:
            return f'bad: an answer without "text"\n{column} = {repr(answers)[:60]}'
        texts, starts = answers.get("text") or [], answers.get("answer_start")
        texts = texts if isinstance(texts, list) else [texts]
        starts = starts if isinstance(starts, list) else [starts]
    elif isinstance(answers, str):
        texts = [answers] if answers else []
    elif isinstance(answers, list) or answers is None:
        texts = [a.get("text") if isinstance(a, dict) else a for a in answers or []]
        if any(isinstance(a, dict) for a in answers or []):
            starts = [a.get("answer_start") if isinstance(a, dict) else None for a in answers]
    else:
        return f"bad: {malformed(answers, column)}"
    texts = [number_text(text) if type(text) in (int, float) else text for text in texts]
    if not all(isinstance(text, str) for text in texts):
        return f"bad: {malformed(answers, column)}"
    starts = [*starts, *[None] * (len(texts) - len(starts))]
    found = {"text": [], "answer_start": []}
    for text, place in zip(texts, starts, strict=False):
        if text.strip() and (span := find_in(context, text, place)):
            found["text"].append(context[span[0] : span[1]])
            found["answer_start"].append(span[0])
    if any(text.strip() for text in texts) and not found["text"]:
        return "bad: answer not in its context, or more than once and without answer_start"
    return found
