"""shared/data/docs.py: a package with every trap, and the real build from what is installed here, made once a session."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from shared import UserError
from shared.data import docs, docs_questions, docs_text, splits
from shared.data.load import load_data

MODULE = '''"""A module that must be read and never run."""
raise RuntimeError("executed")

def scale(values, factor=2):
    """Multiplies every value by a constant factor and returns a new list of them.

    The order of the values is kept, and the list that was given is not touched by this function at all.

    .. versionadded:: 1.2
       Nobody wants to read this.

    Args:
        values (list of float): The numbers to multiply. They may be negative.
        factor (int, optional): What each of them is multiplied with. Defaults to 2.

    Returns:
        list: The products in the order of the numbers.

    Raises:
        OverflowError: If a product is too large for a float.

    Examples:
        >>> scale([1, 2])
        [2, 4]
    """

class Shelf:
    """Holds things.

    Parameters
    ----------
    depth : float
        How far the boards reach from the wall, measured in centimetres along the upper side of the lowest board.
    maker : str, default "unknown"
        Name of the workshop that built the shelf, as it is written on the small brass plate below the lowest board.
    """

    if True:
        @property
        def twice(self):
            """The first of two with this name, of which the second one is a setter."""

        @twice.setter
        def twice(self, value):
            """Unheard words: the setter has a docstring as well, and it would come under a name that is taken."""

        def template(self):
            """Return the %(name)s of this %(klass)s, which only a decorator makes whole before it is shown."""

        def put(self, thing):
            """Puts a thing on the shelf where :class:`~shelf.Thing` says that there is room for it."""

            def hidden():
                """What is inside of a function is no documentation of anything."""
'''


@pytest.fixture
def package(tmp_path):
    """Sources as `modules` gives them: one good file, one that is no Python 3, one without docstrings."""
    found = []
    for name, text in (("good", MODULE), ("python2", 'print "no"\n"""x"""\n'), ("table", "x = 1\n")):
        (tmp_path / f"{name}.py").write_text(text)
        found.append(("trap", "MIT", f"trap.{name}", tmp_path / f"{name}.py"))
    (tmp_path / "latin.py").write_bytes(b'"""Caf\xe9 without a coding line."""\n')
    return [*found, ("trap", "MIT", "trap.latin", tmp_path / "latin.py")]


@pytest.fixture
def rows(package, tmp_path):
    (tmp_path / "out").mkdir()
    docs.build(package, tmp_path / "out")
    return {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in (tmp_path / "out").iterdir()}


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The three sets of this machine, in its usual cache: built here once, then read."""
    return {name: list(docs.documents(name)) for name in docs.NAMES}


def test_nothing_is_executed_and_what_is_not_python_is_passed_over(rows):
    (document,) = [row for row in rows["prose"] if row["source"].startswith("trap/")]
    assert document["source"] == "trap/trap.good" and document["license"] == "MIT" and document["title"] == "trap.good"
    names = re.findall(r"(?m)^trap\.good\.[\w.]+$", document["text"])
    assert names == ["trap.good.scale", "trap.good.Shelf", "trap.good.Shelf.twice", "trap.good.Shelf.put"]
    assert document["text"].startswith("A module that must be read")


def test_prose_holds_no_markup(rows):
    text = next(row["text"] for row in rows["prose"] if row["source"].startswith("trap/"))
    for noise in (
        ">>>",
        "versionadded",
        "Nobody wants",
        "-----",
        ":class:",
        "Examples",
        "hidden",
        "Unheard",
        "%(name)s",
        "inside of a function",
    ):
        assert noise not in text
    assert "Parameters:\n" in text and "where `shelf.Thing` says" in text


def test_a_summary_is_the_first_sentence_and_its_document_the_rest(rows):
    (pair,) = rows["summaries"]  # the others have too little below their first line
    assert pair["summary"] == "Multiplies every value by a constant factor and returns a new list of them."
    assert pair["source"] == "trap/trap.good.scale"
    assert pair["document"].startswith("The order of the values is kept") and pair["summary"] not in pair["document"]


def test_questions_ask_what_the_docstring_says(package):
    entries = [
        {**row, "raw": row["text"], "text": docs_text.tidy(row["text"])} for row in docs.read_docstrings(package)
    ]
    scale = next(entry for entry in entries if entry["name"] == "trap.good.scale")
    found = docs_questions.facts(scale["raw"])
    assert ("type", "values", "list of float") in found and ("type", "factor", "int") in found
    assert ("default", "factor", "2") in found and ("description", "values", "The numbers to multiply") in found
    assert ("returns", "", "The products in the order of the numbers") in found
    assert ("raises", "OverflowError", "If a product is too large for a float") in found
    context = docs_text.unwrap(scale["text"])
    start = docs_questions.locate(context, "default", "factor", "2", {"values", "factor"})
    assert context[:start].endswith("Defaults to ")
    # The type of another parameter is the same text, further up or down
    start = docs_questions.locate(context, "returned type", "", "list", {"values", "factor"})
    assert context[:start].endswith("Returns:\n")
    assert docs_questions.locate(context, "default", "factor", "7", {"values", "factor"}) == -1
    shelf = next(entry for entry in entries if entry["name"] == "trap.good.Shelf")
    assert ("default", "maker", "unknown") in docs_questions.facts(shelf["raw"])


@pytest.mark.parametrize(
    "text, tidied",
    [
        ("Title\n=====\nBody.", "Title:\nBody."),
        ("See :func:`the text <a.b>` and ``code``.", "See `the text` and `code`."),
        (".. note:: Mind this.\n\nNext.", "Note: Mind this.\n\nNext."),
        (".. math::\n\n    x = 1\n\nNext.", "Next."),
        ("Do it::\n\n    run()", "Do it:\n\n    run()"),
        ("Text.\n\nExamples\n--------\n>>> f()\n1\n\nSee Also\n--------\ng", "Text.\n\nSee Also:\ng"),
        ("Text.\n\n```python\nf()\n```\n\nMore.", "Text.\n\nMore."),
        ("<Tip>\nBeware.\n</Tip>", "Beware."),
        ("Range ... of values", "Range ... of values"),
    ],
)
def test_tidy(text, tidied):
    assert docs_text.tidy(text) == tidied


def test_the_build_is_the_same_every_time(package, tmp_path):
    sources = [source for source in docs.modules() if source[0] in ("accelerate", "datasets", "trl")] + package
    assert len(sources) > 100
    for name in "ab":
        (tmp_path / name).mkdir()
    docs.build(sources, tmp_path / "a")
    # Another process: another order of sets
    script = "import sys; from pathlib import Path; from shared.data import docs\n"
    script += "s = [s for s in docs.modules() if s[0] in ('accelerate', 'datasets', 'trl')]\n"
    script += f"s += [('trap', 'MIT', f'trap.{{n}}', Path({str(tmp_path)!r}) / f'{{n}}.py') for n in "
    script += f"('good', 'python2', 'table', 'latin')]\ndocs.build(s, Path({str(tmp_path / 'b')!r}))\n"
    subprocess.run([sys.executable, "-c", script], check=True)
    for name in ("prose", "summaries", "questions"):
        file = f"{name}.jsonl"
        assert (tmp_path / "a" / file).stat().st_size > 100_000
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_is_read_is_no_test_and_no_copy():
    names = Counter(package for package, *_ in docs.modules())
    assert {"python", "torch", "transformers", "numpy", "tqdm"} <= set(names)
    assert "pytest" not in names and "pip" not in names, "only requirements.txt and what it needs"
    dotted = {module for _, _, module, _ in docs.modules()}
    assert "argparse" in dotted and "torch.nn.modules.linear" in dotted
    assert not [name for name in dotted if re.search(r"(^|\.)(tests?|_vendor)\.", name)]


def test_the_licence_is_what_the_metadata_state():
    for name, expected in (("numpy", "BSD"), ("torch", "Apache-2.0"), ("transformers", "Apache"), ("matplotlib", "Py")):
        assert expected in docs.licence(importlib.metadata.distribution(name))
    packages = docs.packages()
    assert all("\n" not in (docs.licence(package) or "") for package in packages.values())


def test_real_prose(real):
    rows = real["docs:prose"]
    assert 3_000 < len(rows) < 12_000 and 15e6 < sum(len(row["text"]) for row in rows) < 45e6
    assert len({row["sha256"] for row in rows}) == len(rows) == len({row["source"] for row in rows})
    assert sum(row["title"].startswith("Language reference: ") for row in rows) >= 50
    assert all(set(row) == {"text", "source", "title", "license", "sha256"} for row in rows)
    assert sum(row["license"] is not None for row in rows) > 0.95 * len(rows)


def test_real_summaries(real):
    rows = real["docs:summaries"]
    assert 8_000 < len(rows) < 20_000
    for row in rows:
        assert 4 <= len(row["summary"].split()) <= 40 and row["summary"].endswith(".") and "\n" not in row["summary"]
        assert not re.search(r"-----|>>>|::", row["summary"])
    assert sum(">>>" in row["document"] for row in rows) < 0.005 * len(rows)


def test_real_questions(real):
    rows = real["docs:questions"]
    assert 15_000 < len(rows) < 60_000
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        answers = row["answers"]
        assert len(answers["text"]) == len(answers["answer_start"]) <= 1
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            assert text and row["context"][start : start + len(text)] == text
            assert len(text.split()) <= 30
        assert 40 <= len(row["context"].split()) <= 400
    assert 0.15 < sum(not row["answers"]["text"] for row in rows) / len(rows) < 0.25
    assert len({(row["title"], row["context"]) for row in rows}) == len({row["title"] for row in rows})


def test_what_has_no_answer_is_not_in_the_context(real):
    for row in real["docs:questions"]:
        if not row["answers"]["text"]:
            function = row["title"]
            asked = [word for word in re.findall(r"[\w.]+", row["question"]) if word.rstrip("?") not in function]
            assert any(word.strip(".").split(".")[-1].lower() not in row["context"].lower() for word in asked), row


def test_questions_on_one_function_land_on_one_side(real):
    import datasets

    rows = real["docs:questions"][:4000]
    data = splits.split_dataset(
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)), lambda row: row["context"]
    )
    titles = {side: set(data[side]["title"]) for side in data}
    assert all(titles.values())
    assert not titles["train"] & titles["test"] and not titles["train"] & titles["validation"]
    assert not titles["validation"] & titles["test"]


@pytest.mark.parametrize("name", docs.NAMES)
def test_load_data(name, real):
    data = load_data(name)
    assert list(data) == ["train"] and len(data["train"]) == len(real[name])
    assert data["train"][0] == real[name][0] and data["train"][-1] == real[name][-1]


def test_an_unknown_name_lists_the_three():
    with pytest.raises(UserError, match="docs:prose, docs:summaries, docs:questions"):
        load_data("docs:poems")
    with pytest.raises(UserError, match="docs:prose"):
        next(docs.documents("docs:"))


def test_a_build_that_was_killed_leaves_nothing_behind(tmp_path, monkeypatch, package):
    monkeypatch.setenv("TASKBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(docs, "modules", lambda: package)
    left_over = tmp_path / "cache" / f".{docs.folder_name()}-x"
    left_over.mkdir(parents=True)
    assert docs.fetch("docs:prose").is_file() and not left_over.exists()
    monkeypatch.setattr(docs, "modules", lambda: pytest.fail("built twice"))
    assert docs.fetch("docs:questions").is_file()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TASKBOOK_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="TASKBOOK_CACHE"):
        docs.fetch("docs:prose")


def test_two_processes_at_once_build_once(tmp_path, package):
    script = f"""
import pathlib, sys
from shared.data import docs, docs_questions, docs_text
def modules():
    with open({str(tmp_path / "builds")!r}, "a") as file:
        file.write("x")
    return [("trap", "MIT", "trap.good", pathlib.Path({str(tmp_path / "good.py")!r}))]
docs.modules = modules
print(docs.fetch("docs:prose"))
"""
    env = os.environ | {"TASKBOOK_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=60)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(said) == 1
    assert (tmp_path / "builds").read_text() == "x"
