"""`--columns name=column ...`: where a task's names are found in a user's table. Called by each task."""

import difflib
import logging
from collections.abc import Iterable, Sequence

from shared import UserError

log = logging.getLogger("taskbook")

# What people call the columns that a task expects; only for the hint of an error, nothing is read by a guess
ALSO_CALLED = {
    "text": ("sentence", "content", "body", "review", "document", "message", "comment", "tweet", "title"),
    "label": ("class", "category", "target", "sentiment", "stars", "rating", "intent", "topic"),
    "document": ("article", "text", "body", "content", "dialogue", "source", "input"),
    "summary": ("highlights", "abstract", "tldr", "target", "headline", "title"),
    "context": ("passage", "paragraph", "text", "document", "article", "body"),
    "question": ("query", "q", "prompt"),
    "answers": ("answer", "a", "response", "answer_text"),
    "prompt": ("question", "instruction", "query", "input", "request", "user", "q"),
    "completion": ("answer", "response", "reply", "output", "assistant", "chosen", "a"),
    "chosen": ("preferred", "better", "good", "accepted", "positive"),
    "rejected": ("dispreferred", "worse", "bad", "negative"),
}
LONG = ("text", "document", "context")


def read_mapping(mapping: Sequence[str], names: Iterable[str], columns: Sequence[str]) -> dict[str, str]:
    """`--columns` as a dictionary from the task's names to the table's columns.

    Args:
        mapping: `name=column` each; `instances.0.output` reaches inside a column.
        names: that the task knows. columns: that the table has.

    Raises:
        UserError: not of that form, an unknown name, a column that is not there, two names for one column, a name twice.
    """
    names, found = list(names), {}
    for pair in mapping:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise UserError(f"--columns {pair}: write name=column, the name one of {', '.join(names)}.")
        if name not in names:
            raise UserError(f"--columns {pair}: no name {name}.{_nearest(name, names)} Names: {', '.join(names)}.")
        if column not in columns and column.split(".")[0] not in columns:
            raise UserError(
                f"--columns {pair}: no column {column}.{_nearest(column, columns)} Columns: {', '.join(columns)}."
            )
        if name in found or column in found.values():
            raise UserError(f"--columns {' '.join(mapping)}: each name takes one column, and each column has one name.")
        found[name] = column
    return found


def find_columns(
    source: str,
    columns: Sequence[str],
    mapping: Sequence[str],
    needed: Sequence[str],
    optional: Sequence[str] = (),
    row: dict | None = None,
    inside: bool = False,
) -> dict[str, str]:
    """The column of each name that the task needs, and of each optional one that is there: the one mapped, else that of its name.

    Args:
        source: name of the data, for the error. row: an example, for its hint.
        inside: whether the task reads `instances.0.output`, too.

    Raises:
        UserError: as `read_mapping`, or a column inside another, or a needed one is missing: found / expected / how to map.
    """
    mapped = read_mapping(mapping, [*needed, *optional], columns)
    if not inside:
        refuse_inside(mapped, columns)
    found = {name: name for name in (*needed, *optional) if name in columns and name not in mapped} | mapped
    if not set(needed) <= set(found):
        raise missing(source, needed, columns, row=row, mapped=mapped)
    log_columns(source, found, columns)
    return found


def refuse_inside(mapped: dict[str, str], columns: Sequence[str]) -> None:
    """Raises UserError for a column inside another: for a task that reads whole columns."""
    within = [column for column in mapped.values() if column not in columns]
    if within:
        raise UserError(
            f"--columns: {within[0]} lies inside the column {within[0].split('.')[0]}, and this task reads whole columns. "
            "Give it one of its own."
        )


def log_columns(source: str, found: dict[str, str], columns: Sequence[str]) -> None:
    """Says which columns are read as what, and which are not read."""
    places = ", ".join(f"{column} as {name}" if column != name else name for name, column in found.items())
    used = {column.split(".")[0] for column in found.values()} | {*found.values()}
    unread = ", ".join(column for column in columns if column not in used)
    log.info("%s: columns read: %s%s", source, places, f"; not read: {unread}" if unread else "")


def missing(
    source: str,
    needed: Sequence[str],
    columns: Sequence[str],
    expected: str | None = None,
    row: dict | None = None,
    mapped: dict[str, str] | None = None,
) -> UserError:
    """The error for a table without the columns of the task: found / expected / how to map, guessed by name, or not at all.

    Args:
        needed: names of the task, for the suggested mapping.
        expected: what could stand there instead of `needed`, in words.
        row: an example: its longest text is taken for a text that no name tells.
        mapped: what `--columns` says already, by name of the task.
    """
    guessed = dict(mapped or {})
    for name in (name for name in needed if name not in guessed):
        free = {column.casefold(): column for column in columns if column not in guessed.values()}
        guess = next((free[each] for each in (name, *ALSO_CALLED.get(name, ())) if each in free), None)
        texts = {column: row[column] for column in free.values() if row and isinstance(row.get(column), str | list)}
        if guess is None and name in LONG and texts:
            guess = max(texts, key=lambda column: len(texts[column]))
        guessed[name] = guess or "..."
    asked = " ".join(f"{name}={column}" for name, column in guessed.items() if name != column)
    found = ", ".join(columns[:20]) + (f" and {len(columns) - 20:,} more" if len(columns) > 20 else "")
    return UserError(
        f"{source}: found the columns {found}; expected {expected or ' and '.join(needed)}. "
        f"Map yours: --columns {asked}"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" Did you mean {close[0]}?" if close else ""
