"""An index on the Hub: a data set's repository that holds one file. Used by __main__.py and answers.py.

It holds the text of all its documents, so it is pushed by its own command alone, and the repository is made as a private one.
What is pulled is a stranger's file and is treated as data: it must be of our tables and of nothing else, is checked before it
is asked, and is opened for reading alone. Its encoder comes as all models come (shared/publish/hub.py).
"""

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from shared import UserError
from shared.publish.hub import first_line, pull, reason
from shared.publish.redact import TOKEN
from shared.retrieval.encoder import Encoder
from shared.retrieval.index import Index

FILE, CARD = "index.sqlite", "README.md"
MODEL = re.compile(r"pypi:[\w.-]+|\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")  # no folder of a machine


def on_hub(name: str | Path) -> bool:
    """Whether that names a repository: `org/name[@revision]`, and not a file that is there or, by its ending, could be."""
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", str(name))
    return bool(is_name) and not Path(name).exists() and Path(name).suffix not in (".sqlite", ".sqlite3", ".db")


def push(index: Index, repo_id: str) -> str:
    """Pushes a copy of an index, without what was removed from it, with a card, as one commit.

    Returns:
        Address of the repository's state after the push.

    Raises:
        UserError: the index is not complete, its encoder is a folder here, it holds a token, the repository holds something else,
            or the Hub said no.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    facts = dict(index.connection.execute("SELECT name, value FROM facts"))
    if facts.get("whole") != "yes":
        raise UserError(f"{index.path}: not all of its documents are in it. Index them first.")
    model = facts.get("model", "")
    if Path(model).exists() or not MODEL.fullmatch(model):
        raise UserError(
            f"{index.path}: its encoder {model} is a folder of this machine. Push that run, and name it: --model org/name."
        )
    for source, line, text in index.connection.execute("SELECT source, line, text FROM passages"):
        if TOKEN.search(text):
            raise UserError(
                f"{source}, below line {line}: what looks like a Hub token (hf_...). Remove it, and revoke it."
            )
    if not get_token():
        raise UserError("--push_to_hub: no token. Log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    with TemporaryDirectory() as folder:
        copy = Path(folder) / FILE
        _copy(index, copy)
        try:
            api, kind = HfApi(), {"repo_type": "dataset"}
            repo_id = api.create_repo(repo_id, private=True, exist_ok=True, **kind).repo_id
            if others := {*api.list_repo_files(repo_id, **kind)} - {".gitattributes", FILE, CARD}:
                raise UserError(f"{repo_id} holds {min(others)}: it is something else. Choose another name.")
            card = _card(index, repo_id, model).encode("utf8")
            files = [CommitOperationAdd(FILE, str(copy)), CommitOperationAdd(CARD, card)]
            return api.create_commit(repo_id, files, commit_message="Upload an index", **kind).commit_url
        except HfHubHTTPError as error:
            raise UserError(f"Not pushed: {reason(error, repo_id)}") from error
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"Not pushed: {first_line(error)}") from error


def _copy(index: Index, path: Path) -> None:
    """What is in an index now: pages of a database, and lists of words, keep what was removed until they are written anew."""
    try:
        index.connection.execute("VACUUM INTO ?", (str(path),))
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("INSERT INTO words (words) VALUES ('optimize')")
            connection.commit()
            connection.execute("VACUUM")
    except sqlite3.Error as error:
        raise UserError(f"{index.path}: cannot be copied ({error}).") from error


def _card(index: Index, repo_id: str, model: str) -> str:
    documents = index.connection.execute("SELECT count(*) FROM documents").fetchone()[0]
    return f"""---
license: unknown
viewer: false
tags:
- lm-taskbook
- retrieval
---

# {repo_id.rpartition("/")[2]}

An index of {documents:,} documents in {len(index):,} passages, with their words and their vectors, made by LM Taskbook's
`python -m shared.retrieval`. It holds the whole text of these documents. Under which licences they stand is not known here.

Its encoder is `{model}`.

```bash
python -m shared.retrieval --index {repo_id} --ask "..."
```
"""


def open_pulled(name: str) -> Index:
    """The index of `org/name[@revision]`, downloaded into the Hub's cache, used offline from there.

    Raises:
        UserError: none there, no access, no index of this version, damaged, or its encoder is gone or another one.
    """
    path = _download(name)
    check(path, name)
    with closing(Index(path, read_only=True).connection) as connection:
        model = dict(connection.execute("SELECT name, value FROM facts")).get("model")
    if not isinstance(model, str) or not MODEL.fullmatch(model) or Path(model).exists():
        raise UserError(f"{name}: its encoder has no name on the Hub and none of pypi:, so it is not opened.")
    index = Index(path, Encoder(pull(model)), read_only=True)
    odd = "SELECT count(*) FROM passages WHERE vector IS NOT NULL AND (typeof(vector) != 'blob' OR length(vector) != ?)"
    if index.connection.execute(odd, (2 * index.encoder.width,)).fetchone()[0]:
        raise UserError(f"{name}: holds vectors that are not its encoder's.")
    return index


def check(path: Path, name: str) -> None:
    """Raises UserError where a file is no index: not SQLite, other tables than ours (a trigger, a view), damaged, odd values."""
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise UserError(f"{name}: its {FILE} is no SQLite file.")
    typed = {"text": ("source", "title", "heading", "text"), "integer": ("id", "line", "start")}
    odd = " OR ".join(f"typeof({column}) != '{kind}'" for kind, columns in typed.items() for column in columns)
    schema = "SELECT type, name, tbl_name, sql FROM sqlite_master"
    with closing(Index(":memory:").connection) as ours:
        expected = set(ours.execute(schema))
    try:
        address = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            if set(connection.execute(schema)) != expected:
                raise UserError(f"{name}: holds other tables than an index of this version. It is not opened.")
            if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise UserError(f"{name}: the index is damaged.")
            if connection.execute(f"SELECT count(*) FROM passages WHERE {odd}").fetchone()[0]:
                raise UserError(f"{name}: holds passages that are none.")
    except sqlite3.Error as error:
        raise UserError(f"{name}: no index, or a damaged one ({error}).") from error


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repo, FILE, repo_type="dataset", revision=revision or None))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name}: no such index on this machine or on the Hub, or a private one: log in with `hf auth login`. "
            "A file is written with its folder and ending."
        ) from error
    except RemoteEntryNotFoundError as error:
        raise UserError(f"{name}: this data set holds no {FILE}, so no index.") from error
    except HfHubHTTPError as error:
        raise UserError(f"{name}: {reason(error, repo)}") from error
    except OSError as error:
        raise UserError(
            f"{name}: the Hub cannot be reached, and the index is not in its cache ({first_line(error)})."
        ) from error
