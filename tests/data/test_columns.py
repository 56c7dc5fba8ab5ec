"""shared/data/columns.py: one parser of `--columns` for all tasks, and hints that are right or say nothing."""

import pytest

from shared import UserError
from shared.data.columns import find_columns, missing, read_mapping

TABLE = ["ticket_id", "utterance", "stars", "status"]


def test_the_mapping_comes_first_then_the_name():
    found = find_columns("mine", [*TABLE, "text"], ["label=stars"], ("text", "label"), ("status",))
    assert found == {"text": "text", "label": "stars", "status": "status"}
    inside = ["text=instances.0.input"]
    assert read_mapping(inside, ["text"], ["instances"]) == {"text": "instances.0.input"}
    with pytest.raises(
        UserError, match="lies inside the column instances"
    ):  # the tasks that call it cannot look inside
        find_columns("mine", ["instances"], inside, ["text"])


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        (["text"], r"--columns text: write name=column, the name one of text, label"),
        (["text="], "--columns text=: write name=column"),
        (["lable=stars"], r"--columns lable=stars: no name lable\. Did you mean label\?"),
        (["price=stars"], r"--columns price=stars: no name price\. Names: text, label"),
        (["label=star"], r"--columns label=star: no column star\. Did you mean stars\?"),
        (["text=stars", "label=stars"], "each name takes one column, and each column has one name"),
        (["text=stars", "text=status"], "each name takes one column"),
    ],
)
def test_mistakes_say_what_is_meant(mapping, words):
    with pytest.raises(UserError, match=words):
        find_columns("mine", TABLE, mapping, ("text", "label"))


@pytest.mark.parametrize(
    ("needed", "columns", "row", "hint"),
    [
        (("text", "label"), ["Review", "category", "id"], None, "--columns text=Review label=category"),
        (("text", "label"), ["id", "utterance", "status"], None, "--columns text=... label=..."),
        (("text", "label"), ["id", "utterance"], {"id": 7, "utterance": "long"}, "--columns text=utterance label=..."),
        (
            ("prompt", "completion"),
            ["question", "rejected", "status"],
            None,
            "--columns prompt=question completion=...",
        ),
        (("context", "question", "answers"), ["context", "q", "reply_id"], None, "--columns question=q answers=..."),
        (("document", "summary"), ["talk", "title"], {"talk": "x" * 50, "title": "t"}, "document=talk summary=title"),
    ],
)
def test_hints_are_guessed_by_name_or_content_or_not_at_all(needed, columns, row, hint):
    said = str(missing("mine", needed, columns, row=row))
    assert said.startswith(f"mine: found the columns {', '.join(columns)}; expected {' and '.join(needed)}.")
    assert said.endswith(hint)


def test_a_hint_keeps_what_is_mapped():
    with pytest.raises(UserError, match="--columns chosen=stars prompt=utterance rejected=...$"):
        find_columns("mine", TABLE, ["chosen=stars", "prompt=utterance"], ("chosen", "rejected"), ("prompt",))
