"""Who speaks in a data set, and conversations out of tables with a row for each message. Used by train.py, before formats.py."""

from collections import Counter
from collections.abc import Iterable

from formats import FORMATS, TEXT, WHO, Reader, columns_of, read, talk_of_people

from shared import UserError
from shared.data.columns import missing, read_mapping
from shared.data.load import load_splits
from shared.training.launch import log

# What people call the columns of a table with a row for each message
MESSAGE = {
    "conversation": (
        *("conversation_id", "conversation", "dialogue_id", "dialog_id", "dialogue", "dialog", "ticket_id", "ticket"),
        *("chat_id", "thread_id", "session_id", "case_id", "call_id"),
    ),
    "speaker": (*WHO, "sender", "participant"),
    "text": (*TEXT, "message", "utterance", "body"),
}
PARENTS = ("parent_id", "parent_message_id")  # of a message, the one that it replies to


def read_roles(pairs: Iterable[str]) -> dict[str, str]:
    """`--roles user=customer assistant=agent` as a dictionary from names, as `formats.role_of` writes them, to roles.

    Raises:
        UserError: not of that form, an unknown role, a name with two roles, or only one of user and assistant.
    """
    found = {}
    for pair in pairs:
        role, _, name = pair.partition("=")
        if role not in ("system", "user", "assistant", "tool") or not name:
            raise UserError(f"--roles {pair}: write role=name, the role one of system, user, assistant, tool.")
        if found.setdefault(name.strip().casefold(), role) != role:
            raise UserError(f"--roles {pair}: {name} has two roles.")
    if found and not {"user", "assistant"} <= {*found.values()}:
        raise UserError("--roles: name both, user=... assistant=...")
    return found


def open_talks(run_args, roles: Iterable[str]) -> tuple[dict, Reader]:
    """The splits of the data, and the reader that turns their rows into conversations; logs how they are read.

    Raises:
        UserError: as `load_splits`, `read_roles`, `one_row_a_talk` and `formats.find_format`.
    """
    named, source = read_roles(roles), run_args.dataset
    splits, mapping = one_row_a_talk(source, load_splits(run_args, read), run_args.columns)
    rows = next(iter(splits.values()))
    columns = list(dict.fromkeys(name for each in splits.values() for name in columns_of(each)))
    people = not named and talk_of_people(source, rows, columns, mapping)
    reader = Reader(source, columns, mapping, people, named)
    reader.filled = hasattr(rows, "column_names")
    reader.read_labels(rows)
    log.info("%s is read as %s", source, reader.formats[0])
    if people:
        log.info(
            "people talk with each other: who speaks first is the user, unless --roles user=... assistant=... says who is"
        )
    if reader.unread:
        log.info("columns that are not read: %s", ", ".join(reader.unread))
    return splits, reader


def one_row_a_talk(source: str, splits: dict, mapping: list[str]) -> tuple[dict, list[str]]:
    """Where each row is a message (`ticket_id, speaker, text`): rows of `messages`, in file order, and the rest of the mapping.

    Raises:
        UserError: no column says to which conversation a message belongs, or one that is different in each row.
    """
    columns = columns_of(next(iter(splits.values())))
    asked = {pair.partition("=")[0] for pair in mapping} & {"speaker", "text"}
    fitting = [name for name, needed in FORMATS.items() if name != "conversation" and set(needed) <= set(columns)]
    if not asked and (mapping and not mapping[0].startswith("conversation=") or fitting):
        return splits, mapping
    places = read_mapping(mapping, MESSAGE, columns)
    plain = {column.strip().casefold().replace(" ", "_"): column for column in reversed(columns)}
    for name, known in MESSAGE.items():
        guess = next((plain[each] for each in known if each in plain and plain[each] not in places.values()), None)
        if name not in places and guess:
            places[name] = guess
    if not {"speaker", "text"} <= places.keys():
        if asked:
            raise missing(source, tuple(MESSAGE), columns)
        return splits, mapping
    first = next(iter(next(iter(splits.values()))), {}).get(places.get("conversation"))
    if isinstance(first, list | dict) or str(first).startswith(("[", "{")):  # a whole conversation in each row
        return splits, mapping
    if "conversation" not in places:
        raise missing(source, tuple(MESSAGE), columns, "one that says which conversation a message belongs to")
    _refuse_trees(source, splits, columns)
    grouped = {split: _grouped(source, rows, places) for split, rows in splits.items()}
    messages = sum(len(talk["messages"]) for talks in grouped.values() for talk in talks)
    count = sum(map(len, grouped.values()))
    if count == messages:
        raise UserError(
            f"{source}: {places['conversation']} differs in each row. Which column says to which conversation a message belongs? "
            "--columns conversation=..."
        )
    log.info(
        "%s: a row is a message (%s); %s of them make %s conversations, in the order of the file",
        *(source, ", ".join(f"{name}: {column}" for name, column in places.items()), f"{messages:,}", f"{count:,}"),
    )
    return grouped, []


def _refuse_trees(source: str, splits: dict, columns: list[str]) -> None:
    """Raises UserError where messages have several replies each (OASST): one behind the other they would be one long reply."""
    for parent in set(PARENTS) & set(columns):
        replies = Counter(row.get(parent) for rows in splits.values() for row in rows)
        del replies[None]
        if several := sum(count > 1 for count in replies.values()):
            raise UserError(
                f"{source}: {several:,} messages have more than one reply ({parent}): a tree, not conversations. Keep one reply "
                "to each, such as the best ranked, or take the data set in a form of conversations (`messages`)."
            )


def _grouped(source: str, rows: Iterable[dict], places: dict[str, str]) -> list[dict]:
    talks: dict[str, list[dict]] = {}
    for number, row in enumerate(rows, 1):
        key, text = row.get(places["conversation"]), row.get(places["text"])
        if text is None or not str(text).strip():
            continue
        if key is None:
            raise UserError(f"{source}, row {number}: no {places['conversation']}, so its message belongs nowhere.")
        talks.setdefault(str(key), []).append({"role": row.get(places["speaker"]), "content": text})
    return [{"messages": messages} for messages in talks.values()]


def log_roles(reader: Reader) -> None:
    """Says who was taken for what, once all rows are read.

    Raises:
        UserError: a name in `--roles` that nobody has.
    """
    absent = reader.roles.keys() - {name.casefold() for name, _ in reader.speakers}
    if absent:
        found = ", ".join(dict.fromkeys(name for name, _ in reader.speakers))
        raise UserError(f"--roles: nobody is called {', '.join(sorted(absent))}; found {found}.")
    if not reader.people and any(name != role for name, role in reader.speakers):
        said = (f"{name} as {role or 'nobody'} ({count:,})" for (name, role), count in reader.speakers.most_common(12))
        log.info("roles: %s", ", ".join(said))
