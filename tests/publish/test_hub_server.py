"""tests/hub_server.py and its seed: the real clients push and pull, each refusal is the exception that the real Hub causes."""

import http.client
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import hub_seed
import hub_server
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shared.data.cleaning import repetitive, words_between
from shared.data.near_duplicates import NearDuplicates

LLAMA = "meta-llama/Llama-2-7b-hf"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Hub with nothing on it."""
    with hub_server.Hub(tmp_path_factory.mktemp("bare")) as server:
        yield server


@pytest.fixture
def repo(bare, request):
    """The name of a new repository of alice's, for this test."""
    name = "alice/" + re.sub(r"\W", "-", request.node.name.removeprefix("test_")).strip("-")
    api(bare).create_repo(name)
    return name


def api(hub, role: str | None = "write") -> HfApi:
    """The client in this process, as a role of the Hub's tokens or without a token."""
    return HfApi(endpoint=hub.url, token=hub.tokens[role] if role else False)


def child(hub, code: str, role: str | None = "write", home: Path | None = None) -> str:
    """Runs code in a process that uses the Hub; returns what it prints."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, env=os.environ | hub.env_for(role, home), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def raw(hub, method: str, path: str, body=None, role: str | None = "write", **headers):
    """(response, its body) of a request that no client would send."""
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    headers |= {"Authorization": f"Bearer {hub.tokens[role]}"} if role else {}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def requests(hub, since: int) -> list[str]:
    return [f"{method} {path} {status}" for method, path, status in list(hub.log)[since:]]


def fill(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """A folder as a run leaves it: what is in it by path."""
    files = {
        "config.json": b'{"model_type": "gpt2"}',
        "model.safetensors": bytes(range(256)) * 1200 + bytes([seed]),
        "loss.png": b"\x89PNG\0" + bytes(50),
        "nested/deep/notes.txt": "Xin chào".encode(),
        "empty.txt": b"",
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return files


# Push and pull


def test_a_folder_is_pushed_and_pulled(bare, repo, tmp_path):
    files, client = fill(tmp_path / "run"), api(bare)
    info = client.upload_folder(repo_id=repo, folder_path=tmp_path / "run", commit_message="Trained")
    held = bare.files(repo)
    assert held.pop(".gitattributes") == hub_server.GIT_ATTRIBUTES.encode()
    assert held == files
    assert [commit.title for commit in bare.commits(repo)] == ["Trained", "initial commit"]
    assert info.oid == bare.commits(repo)[0].sha and info.commit_url == f"{bare.url}/{repo}/commit/{info.oid}"
    entries = bare.commits(repo)[0].files
    assert {path for path, entry in entries.items() if entry.lfs} == {"model.safetensors", "loss.png"}
    pulled = Path(client.snapshot_download(repo, cache_dir=tmp_path / "cache"))
    assert {p.relative_to(pulled).as_posix(): p.read_bytes() for p in pulled.rglob("*") if p.is_file()} == bare.files(
        repo
    )
    # git's own names for contents, so that clients can compare without a download
    folder = tmp_path / "run"
    git = subprocess.check_output(["git", "hash-object", folder / "config.json"], text=True, cwd=tmp_path).strip()
    assert entries["config.json"].git_oid == git
    assert client.verify_repo_checksums(repo, local_dir=folder).mismatches == []


def test_pushing_twice_changes_nothing(bare, repo, tmp_path):
    fill(tmp_path)
    first = api(bare).upload_folder(repo_id=repo, folder_path=tmp_path)
    mark = len(bare.log)
    assert api(bare).upload_folder(repo_id=repo, folder_path=tmp_path).oid == first.oid
    assert not [line for line in requests(bare, mark) if "/commit/" in line or "PUT" in line]
    # also for a client that sends the same commit again
    lines = [{"key": "header", "value": {"summary": "again", "description": ""}}]
    lines += [{"key": "file", "value": {"path": "empty.txt", "content": "", "encoding": "base64"}}]
    body = "\n".join(map(json.dumps, lines))
    response, content = raw(bare, "POST", f"/api/models/{repo}/commit/main", body)
    assert response.status == 200 and json.loads(content)["commitOid"] == first.oid
    assert len(bare.commits(repo)) == 2
    fill(tmp_path, seed=1)
    assert api(bare).upload_folder(repo_id=repo, folder_path=tmp_path).oid != first.oid
    assert requests(bare, mark)[-1].startswith(f"POST /api/models/{repo}/commit/main") and len(bare.commits(repo)) == 3


def test_an_ignored_file_is_not_pushed(bare, repo, tmp_path):
    fill(tmp_path)
    (tmp_path / ".gitignore").write_text("# runs\n*.png\nnested/\n")
    api(bare).upload_folder(repo_id=repo, folder_path=tmp_path)
    assert set(bare.files(repo)) == {".gitattributes", ".gitignore", "config.json", "empty.txt", "model.safetensors"}


def test_large_objects_go_in_parts(bare, repo, monkeypatch):
    monkeypatch.setattr(bare, "part_size", 100_000)
    content, mark = os.urandom(450_001), len(bare.log)
    api(bare).upload_file(repo_id=repo, path_in_repo="model.safetensors", path_or_fileobj=content)
    assert bare.files(repo)["model.safetensors"] == content
    assert [line[:9] for line in requests(bare, mark)].count("PUT /lfs/") == 5
    assert list((bare.folder / "incoming").iterdir()) == []


def test_deletes_copies_and_paths(bare, repo, tmp_path):
    client = api(bare)
    files = fill(tmp_path)
    client.upload_folder(repo_id=repo, folder_path=tmp_path)
    copy = CommitOperationCopy("model.safetensors", "copy.safetensors")
    operations = [copy, CommitOperationDelete("nested/", is_folder=True), CommitOperationDelete("empty.txt")]
    client.create_commit(repo, operations, commit_message="Tidy")
    held = bare.files(repo)
    assert set(held) == {".gitattributes", "config.json", "model.safetensors", "copy.safetensors", "loss.png"}
    assert held["copy.safetensors"] == files["model.safetensors"]
    assert set(bare.files(repo, bare.commits(repo)[1].sha)) == set(files) | {".gitattributes"}
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        client.delete_file("absent.txt", repo)
    assert len(bare.commits(repo)) == 3


def test_trees_are_listed_in_pages(bare, repo, tmp_path, monkeypatch):
    files, client = fill(tmp_path), api(bare)
    client.upload_folder(repo_id=repo, folder_path=tmp_path)
    monkeypatch.setattr(bare, "page_size", 2)
    listed = {item.path: item for item in client.list_repo_tree(repo, recursive=True, expand=True)}
    assert set(listed) == set(files) | {".gitattributes", "nested", "nested/deep"}
    assert listed["model.safetensors"].lfs.sha256 == bare.commits(repo)[0].files["model.safetensors"].sha256
    assert listed["empty.txt"].size == 0 and listed["config.json"].lfs is None
    assert listed[".gitattributes"].last_commit.title == "initial commit"
    assert listed["nested"].last_commit.oid == bare.commits(repo)[0].sha
    assert [item.path for item in client.list_repo_tree(repo, "nested")] == ["nested/deep"]
    with pytest.raises(EntryNotFoundError):
        list(client.list_repo_tree(repo, "nowhere"))
    found = client.get_paths_info(repo, ["nested/deep", "config.json", "nowhere"])
    assert [item.path for item in found] == ["nested/deep", "config.json"]
    info = client.model_info(repo, files_metadata=True)
    assert {sibling.rfilename: sibling.size for sibling in info.siblings}["model.safetensors"] == 307_201
    assert client.file_exists(repo, "nested/deep/notes.txt") and not client.file_exists(repo, "nested/deep")


def test_branches_tags_and_pull_requests(bare, repo):
    client = api(bare)
    old = client.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"old").oid
    client.create_tag(repo, tag="v1", tag_message="first")
    client.create_branch(repo, branch="try/this")
    client.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"tried", revision="try/this")
    new = client.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"new").oid
    asked = client.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"asked", create_pr=True)
    assert asked.pr_revision == "refs/pr/1"
    contents = {"v1": b"old", old: b"old", old[:8]: b"old", "try/this": b"tried", "main": b"new", "refs/pr/1": b"asked"}
    for revision, content in contents.items():
        path = hf_hub_download(
            repo, "a.txt", revision=revision, endpoint=bare.url, token=False, cache_dir=bare.folder / "refs"
        )
        assert Path(path).read_bytes() == content, revision
    refs = client.list_repo_refs(repo, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": old}
    assert {ref.name for ref in refs.branches} == {"main", "try/this"} and refs.branches[0].target_commit == new
    assert [commit.title for commit in client.list_repo_commits(repo)][-1] == "initial commit"
    assert client.list_repo_commits(repo, revision="v1")[0].commit_id == old
    for make in (lambda: client.create_tag(repo, tag="v1"), lambda: client.create_branch(repo, branch="try/this")):
        with pytest.raises(HfHubHTTPError) as caught:
            make()
        assert caught.value.response.status_code == 409
    client.create_tag(repo, tag="v1", exist_ok=True)
    client.delete_tag(repo, tag="v1")
    client.delete_branch(repo, branch="try/this")
    assert [ref.name for ref in client.list_repo_refs(repo).branches] == ["main"]
    with pytest.raises(RevisionNotFoundError):
        client.delete_tag(repo, tag="v1")
    with pytest.raises(HfHubHTTPError, match="cannot be deleted"):
        client.delete_branch(repo, branch="main")


# Who may do what


def test_whoami(bare):
    me = api(bare).whoami()
    assert me["name"] == "alice" and [org["name"] for org in me["orgs"]] == ["acme"]
    assert me["auth"]["accessToken"]["role"] == "write"
    assert api(bare, "read").whoami()["auth"]["accessToken"]["role"] == "read"
    assert api(bare, "other").whoami()["name"] == "bob"
    wrong = HfApi(endpoint=bare.url, token="hf_" + "0" * 34)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    api(bare).create_repo("alice/public")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        wrong.model_info("alice/public")  # which without a token would be shown
    assert caught.value.response.status_code == 401 and not isinstance(caught.value, RepositoryNotFoundError)
    assert api(bare, None).model_info("alice/public").id == "alice/public"


def test_private_repositories_are_seen_by_their_owners_alone(bare, tmp_path):
    client, name = api(bare), "acme/secret"
    assert client.create_repo(name, private=True).repo_id == name
    client.upload_file(repo_id=name, path_in_repo="a.txt", path_or_fileobj=b"secret")
    assert client.model_info(name).private and api(bare, "read").model_info(name).private
    assert [model.id for model in client.list_models(author="acme")] == [name]
    for role, status in (("other", 404), (None, 401)):
        stranger = api(bare, role)
        assert list(stranger.list_models(author="acme")) == [] and not stranger.repo_exists(name)
        for ask in (
            lambda s=stranger: s.model_info(name),
            lambda s=stranger: s.hf_hub_download(name, "a.txt", cache_dir=tmp_path),
            lambda s=stranger: s.upload_file(repo_id=name, path_in_repo="b.txt", path_or_fileobj=b"b"),
        ):
            with pytest.raises(RepositoryNotFoundError) as caught:
                ask()
            assert caught.value.response.status_code == status
    client.update_repo_settings(name, private=False)
    assert Path(api(bare, None).hf_hub_download(name, "a.txt", cache_dir=tmp_path)).read_text() == "secret"
    client.delete_repo(name)
    assert not client.repo_exists(name)
    client.delete_repo(name, missing_ok=True)


def test_creating_a_repository(bare, repo):
    client = api(bare)
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        client.create_repo(repo)
    assert caught.value.response.status_code == 409
    assert client.create_repo(repo, exist_ok=True).repo_id == repo
    assert client.create_repo("unnamed-owner").repo_id == "alice/unnamed-owner"
    assert client.create_repo(repo, repo_type="dataset").repo_type == "dataset"  # a name of its own kind
    for role, status in (("read", 403), ("other", 403), (None, 401)):
        with pytest.raises(HfHubHTTPError) as caught:
            api(bare, role).create_repo("acme/mine")
        assert caught.value.response.status_code == status
    assert not client.repo_exists("acme/mine")


@pytest.mark.parametrize("role, status", [("read", 403), ("other", 403), (None, 401)])
def test_without_permission_nothing_is_written(bare, repo, role, status):
    stranger, before = api(bare, role), bare.commits(repo)
    for write in (
        lambda: stranger.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a"),
        lambda: stranger.create_tag(repo, tag="v1"),
        lambda: stranger.update_repo_settings(repo, private=True),
        lambda: stranger.delete_repo(repo),
        lambda: stranger.auth_check(repo, write=True),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            write()
        assert caught.value.response.status_code == status
    assert bare.commits(repo) == before and list(bare.repos[repo].refs) == ["refs/heads/main"]
    assert not bare.repos[repo].private
    stranger.auth_check(repo)


def test_gated_files_need_access(hub, tmp_path):
    for role, status in (("other", 403), (None, 401)):
        stranger = api(hub, role)
        info = stranger.model_info(LLAMA)
        assert info.gated == "manual" and info.card_data.license == "llama2"  # what it is may be read by all
        for ask in (
            lambda s=stranger: s.hf_hub_download(LLAMA, "config.json", cache_dir=tmp_path),
            lambda s=stranger: s.snapshot_download(LLAMA, cache_dir=tmp_path),
            lambda s=stranger: s.auth_check(LLAMA),
        ):
            with pytest.raises(GatedRepoError) as caught:
                ask()
            assert caught.value.response.status_code == status
    api(hub, "read").auth_check(LLAMA)
    pulled = Path(api(hub, "read").snapshot_download(LLAMA, cache_dir=tmp_path))
    assert json.loads((pulled / "config.json").read_text())["model_type"] == "llama"


def test_each_thing_missing_has_its_error(bare, repo, tmp_path):
    client = api(bare)
    client.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a")
    for ask, kind in (
        (lambda: client.model_info("alice/nothing"), RepositoryNotFoundError),
        (lambda: client.model_info("gpt2"), RepositoryNotFoundError),
        (lambda: client.dataset_info(repo), RepositoryNotFoundError),
        (lambda: client.hf_hub_download("alice/nothing", "a.txt", cache_dir=tmp_path), RepositoryNotFoundError),
        (lambda: client.model_info(repo, revision="v9"), RevisionNotFoundError),
        (lambda: client.hf_hub_download(repo, "a.txt", revision="v9", cache_dir=tmp_path), RevisionNotFoundError),
        (lambda: client.snapshot_download(repo, revision="f" * 40, cache_dir=tmp_path), RevisionNotFoundError),
        (lambda: client.create_tag(repo, tag="v1", revision="v9"), RevisionNotFoundError),
        (lambda: upload(client, repo, b"a", revision="v9"), RevisionNotFoundError),
        (lambda: client.hf_hub_download(repo, "b.txt", cache_dir=tmp_path), RemoteEntryNotFoundError),
    ):
        with pytest.raises(kind):
            ask()
    # a missing file is remembered under its commit, which needs the header on the refusal
    folder = tmp_path / f"models--{repo.replace('/', '--')}" / ".no_exist" / bare.commits(repo)[0].sha
    assert [file.name for file in folder.iterdir()] == ["b.txt"]


def upload(client: HfApi, repo: str, content: bytes, path: str = "a.txt", **options):
    return client.upload_file(repo_id=repo, path_in_repo=path, path_or_fileobj=content, **options)


def test_a_stale_parent_is_refused(bare, repo):
    client = api(bare)
    parent = client.model_info(repo).sha
    upload(client, repo, b"first", parent_commit=parent)
    with pytest.raises(HfHubHTTPError) as caught:
        upload(client, repo, b"second", parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert bare.files(repo)["a.txt"] == b"first"


def test_malformed_requests(bare, repo):
    header = {"key": "header", "value": {"summary": "x", "description": ""}}
    never_uploaded = {"key": "lfsFile", "value": {"path": "m.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}}
    for body in ("{", json.dumps({"no": "header"}), json.dumps(header) + "\n" + json.dumps(never_uploaded)):
        response, content = raw(bare, "POST", f"/api/models/{repo}/commit/main", body)
        assert response.status == 400 and json.loads(content)["error"], body
    assert raw(bare, "POST", "/api/repos/create", json.dumps({"name": "../etc"}))[0].status == 400
    with pytest.raises(BadRequestError, match="Invalid reference"):
        api(bare).create_branch(repo, branch="refs/pr/5")
    assert raw(bare, "PUT", "/lfs/" + "0" * 32, b"abc")[0].status == 403
    assert raw(bare, "GET", "/api/no-such-thing")[0].status == 404
    assert len(bare.commits(repo)) == 1


# Cards

CARD = """
import sys
from huggingface_hub import EvalResult, ModelCard, ModelCardData
results = [EvalResult(task_type="text-generation", dataset_type="rajpurkar/squad", dataset_name="SQuAD", metric_type="f1",
                      metric_value=0.5)]
data = ModelCardData(model_name="tiny", eval_results=results, license="mit", base_model="openai-community/gpt2",
                     datasets=["rajpurkar/squad"], tags=["test"], language="en", library_name="transformers")
card = ModelCard(f"---\\n{data.to_yaml()}\\n---\\n\\n# Tiny\\n")
card.validate()
card.push_to_hub(sys.argv[1] if len(sys.argv) > 1 else REPO)
pulled = ModelCard.load(REPO)
assert pulled.data.eval_results[0].metric_value == 0.5 and pulled.content == card.content
"""


def test_a_card_is_pushed_and_pulled(bare, repo):
    child(bare, f"REPO = {repo!r}\n" + CARD)
    info = api(bare).model_info(repo)
    assert (
        info.card_data.base_model == "openai-community/gpt2" and info.card_data.eval_results[0].dataset_name == "SQuAD"
    )
    assert {"license:mit", "dataset:rajpurkar/squad", "base_model:openai-community/gpt2", "test"} <= set(info.tags)
    assert info.library_name == "transformers"


@pytest.mark.parametrize(
    "metadata, message",
    [
        ("license: my-own", '"license" must be one of'),
        ("base_model: ./outputs/x", '"base_model" with value "./outputs/x" is not valid'),
        ("base_model: pypi:minilm-l6", "is not valid"),
        ("datasets: [/data/x.jsonl]", '"datasets" with value'),
        ("tags: one", '"tags" must be an array'),
        ("language: English text", '"language" must only contain'),
        ("model-index: [{name: x}]", '"model-index\\[0\\].results" is required'),
        (
            "model-index: [{name: x, results: [{task: {type: t}, metrics: [{type: f1, value: 1}]}]}]",
            "dataset.name",
        ),
        ("a: [1", "YAML metadata is invalid"),
    ],
)
def test_a_bad_card_is_refused(bare, metadata, message):
    client, name = api(bare), "alice/bad-cards"
    client.create_repo(name, exist_ok=True)
    content = f"---\n{metadata}\n---\n# x\n".encode()
    with pytest.raises(ValueError, match=f"(?s)Invalid metadata in README.md.*{message}"):
        upload(client, name, content, "README.md")
    lines = [{"key": "header", "value": {"summary": "x", "description": ""}}]
    operation = CommitOperationAdd("README.md", content)
    lines += [{"key": "file", "value": {"path": "README.md", "content": operation.b64content().decode()}}]
    response, _ = raw(bare, "POST", f"/api/models/{name}/commit/main", "\n".join(map(json.dumps, lines)))
    assert response.status == 400 and len(bare.commits(name)) == 1


def test_a_card_without_metadata_is_warned_of(bare, repo):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        upload(api(bare), repo, b"# nothing\n", "README.md")
    assert bare.files(repo)["README.md"] == b"# nothing\n"


# Faults


def test_an_upload_survives_an_unavailable_server(bare, repo):
    content = os.urandom(300_000)
    with bare.fault("PUT /lfs/", status=503) as fault:
        upload(api(bare), repo, content, "model.safetensors")
    assert fault.hits == 1 and bare.files(repo)["model.safetensors"] == content


def test_an_upload_survives_a_dropped_connection(bare, repo):
    content = os.urandom(3_000_000)
    with bare.fault("PUT /lfs/", drop_after=100_000) as fault:
        upload(api(bare), repo, content, "model.safetensors")
    assert fault.hits == 1 and bare.files(repo)["model.safetensors"] == content
    assert list((bare.folder / "incoming").iterdir()) == []


def test_half_an_upload_leaves_nothing(bare, repo):
    content = os.urandom(2_000_000)
    oid = hub_server.hashlib.sha256(content).hexdigest()
    batch = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]})

    def address():
        held = json.loads(raw(bare, "POST", f"/{repo}.git/info/lfs/objects/batch", batch)[1])["objects"][0]
        return held.get("actions", {}).get("upload", {}).get("href", "").removeprefix(bare.url)

    blobs, connection = (
        set(os.listdir(bare.folder / "blobs")),
        http.client.HTTPConnection(bare.url.removeprefix("http://")),
    )
    connection.putrequest("PUT", address())
    connection.putheader("Content-Length", str(len(content)))
    connection.endheaders()
    connection.send(content[:700_000])
    until(lambda: list((bare.folder / "incoming").iterdir()))  # it is being written
    connection.close()
    until(lambda: not list((bare.folder / "incoming").iterdir()))
    wrong = raw(bare, "PUT", address(), content[:-1] + b"?")[0]
    assert wrong.status == 400
    assert set(os.listdir(bare.folder / "blobs")) == blobs and address()
    assert raw(bare, "PUT", address(), content)[0].status == 200
    assert address() == "" and bare.blob(oid).read_bytes() == content


def until(true, seconds: float = 5):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


def test_a_failed_commit_loses_nothing(bare, repo, tmp_path):
    files, client = fill(tmp_path), api(bare)
    with bare.fault("POST .*/commit/", drop_after=10), pytest.raises(httpx2.TransportError):
        client.upload_folder(repo_id=repo, folder_path=tmp_path)
    assert set(bare.files(repo)) == {".gitattributes"}
    mark = len(bare.log)
    client.upload_folder(repo_id=repo, folder_path=tmp_path)
    assert set(bare.files(repo)) == set(files) | {".gitattributes"}
    assert not [line for line in requests(bare, mark) if line.startswith("PUT")]  # what was there is not sent again


@pytest.mark.parametrize("status", [401, 403, 409, 412, 500])
def test_refusals_on_demand(bare, repo, status):
    with bare.fault(r"POST /api/models/.*/commit/", status=status), pytest.raises(HfHubHTTPError) as caught:
        upload(api(bare), repo, b"a")
    assert caught.value.response.status_code == status and "a.txt" not in bare.files(repo)
    upload(api(bare), repo, b"a")
    assert bare.files(repo)["a.txt"] == b"a"


def test_a_slow_server(bare, repo):
    begin = time.monotonic()
    with bare.fault("GET /api/models", delay=0.6), pytest.raises(httpx2.TimeoutException):
        api(bare).model_info(repo, timeout=0.2)
    with bare.fault("GET /api/models", delay=0.6):
        api(bare).model_info(repo)
    assert time.monotonic() - begin > 0.8


def test_a_dropped_download_goes_on_where_it_was(bare, repo, tmp_path):
    content = os.urandom(13_000_000)  # the client writes, and so keeps, pieces of 10 MB
    upload(api(bare), repo, content, "model.safetensors")
    mark = len(bare.log)
    with bare.fault(r"GET .*/resolve/", drop_after=12_000_000):
        path = api(bare).hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == content
    assert [line.rsplit(" ", 1)[1] for line in requests(bare, mark) if line.startswith("GET")] == ["0", "206"]


def test_ranges(bare, repo):
    upload(api(bare), repo, b"0123456789", "digits.bin")
    path = f"/{repo}/resolve/main/digits.bin"
    for asked, status, body, about in (
        ("bytes=3-", 206, b"3456789", "bytes 3-9/10"),
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=0-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
    ):
        response, content = raw(bare, "GET", path, Range=asked)
        assert response.status == status and response.headers["Content-Range"] == about, asked
        assert body is None or content == body
    response, content = raw(bare, "HEAD", path)
    assert content == b"" and response.headers["Content-Length"] == response.headers["X-Linked-Size"] == "10"
    sha256 = hub_server.hashlib.sha256(b"0123456789").hexdigest()
    assert response.headers["ETag"] == response.headers["X-Linked-Etag"] == f'"{sha256}"'
    assert response.headers["X-Repo-Commit"] == bare.commits(repo)[0].sha
    assert not [name for name in response.headers if "xet" in name.lower()]


def test_two_writers_at_once(bare, repo):
    start = threading.Barrier(2)

    def write(who: int):
        start.wait()
        for i in range(6):
            upload(api(bare), repo, f"{who} {i}".encode(), f"{who}/{i}.txt")
            upload(api(bare), repo, f"{who} {i}".encode(), "shared.txt")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    held, history = bare.files(repo), bare.commits(repo)
    assert {path for path in held if "/" in path} == {f"{who}/{i}.txt" for who in range(2) for i in range(6)}
    assert held["shared.txt"] in (b"0 5", b"1 5")
    assert len({commit.sha for commit in history}) == len(history) == len(bare.repos[repo].commits)


def test_of_two_writers_with_one_parent_one_wins(bare, repo):
    parent, start = api(bare).model_info(repo).sha, threading.Barrier(4)

    def write(who: int):
        start.wait()
        try:
            return upload(api(bare), repo, str(who).encode(), parent_commit=parent).oid
        except HfHubHTTPError as error:
            return error.response.status_code

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(write, range(4)))
    assert sorted(map(str, results))[:3] == ["412"] * 3 or results.count(412) == 3
    winner = next(i for i, result in enumerate(results) if result != 412)
    assert bare.files(repo)["a.txt"] == str(winner).encode() and len(bare.commits(repo)) == 2


# The seed

MODELS = """
import json, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
heads = {"bert-base": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM,
         "MiniLM": AutoModel, "bge": AutoModel, "e5": AutoModel}
for name in NAMES:
    kind = next((kind for part, kind in heads.items() if part in name), AutoModelForCausalLM)
    model, tokenizer = kind.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    text = "Marfen was founded in 1812 by Ada Belkor.\\n    It's 3,456 km\\tfrom <b>here</b>, or so."
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        out = model(**ids, **({"decoder_input_ids": ids["input_ids"]} if model.config.is_encoder_decoder else {}))[0]
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    print(json.dumps({
        "name": name, "class": type(model).__name__, "dtype": str(model.dtype), "finite": bool(out.isfinite().all()),
        "parameters": model.num_parameters(), "rows": model.get_input_embeddings().num_embeddings, "tokens": len(tokenizer),
        "special": {k: [v, tokenizer.convert_tokens_to_ids(v)] for k, v in special.items()}, "template": tokenizer.chat_template,
        "ids": ids["input_ids"][0].tolist(), "text": text,
        "back": tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True),
        "extra": tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]), "digits": tokenizer.tokenize("2024"),
        "talk": tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
                                              tokenize=False) if tokenizer.chat_template else None,
        "start": getattr(model.config, "decoder_start_token_id", None), "length": tokenizer.model_max_length,
    }))
"""


@pytest.fixture(scope="module")
def loaded(hub):
    """What transformers makes of each seeded model, by name."""
    names = [name for name in hub.repos if not name.startswith(("datasets/", "alice/"))]
    mark = len(hub.log)
    lines = child(hub, f"NAMES = {names!r}\n" + MODELS).splitlines()
    assert not [line for line in requests(hub, mark) if "pytorch_model" in line]
    return {row["name"]: row for row in map(json.loads, lines)}


def test_models_load_by_their_names(hub, loaded):
    classes = {
        "openai-community/gpt2": ("GPT2LMHeadModel", "torch.float32"),
        "google-bert/bert-base-uncased": ("BertForMaskedLM", "torch.float32"),
        "google-t5/t5-small": ("T5ForConditionalGeneration", "torch.float32"),
        "facebook/bart-base": ("BartForConditionalGeneration", "torch.float32"),
        LLAMA: ("LlamaForCausalLM", "torch.float16"),
        "meta-llama/Llama-2-7b-chat-hf": ("LlamaForCausalLM", "torch.float16"),
        "tiiuae/falcon-7b": ("FalconForCausalLM", "torch.bfloat16"),
        "HuggingFaceTB/SmolLM2-135M-Instruct": ("LlamaForCausalLM", "torch.bfloat16"),
        "sentence-transformers/all-MiniLM-L6-v2": ("BertModel", "torch.float32"),
        "BAAI/bge-small-en-v1.5": ("BertModel", "torch.float32"),
        "intfloat/multilingual-e5-small": ("BertModel", "torch.float32"),
    }
    assert {name: (row["class"], row["dtype"]) for name, row in loaded.items()} == classes
    for name, row in loaded.items():
        assert row["finite"] and row["parameters"] < 300_000 and 1000 <= row["tokens"] <= row["rows"] < 2000, row
        assert any(path.endswith(".safetensors") for path in hub.files(name))
        assert "license" in hub_server.front_matter(hub.files(name)["README.md"].decode())
        assert hub_server.card_errors(hub.files(name)["README.md"].decode()) == ([], [])


def test_special_tokens_are_those_of_the_real_models(loaded):
    def ids(name):
        return {key.removesuffix("_token"): number for key, (_, number) in loaded[name]["special"].items()}

    last = loaded["openai-community/gpt2"]["tokens"] - 1
    assert ids("openai-community/gpt2") == {"bos": last, "eos": last, "unk": last}
    bert = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
    assert ids("google-bert/bert-base-uncased") == ids("sentence-transformers/all-MiniLM-L6-v2") == bert
    assert ids("google-t5/t5-small") == {"pad": 0, "eos": 1, "unk": 2}
    t5 = loaded["google-t5/t5-small"]
    assert t5["extra"] == [t5["tokens"] - 1, t5["tokens"] - 100] and (t5["rows"], t5["start"]) == (t5["tokens"] + 28, 0)
    bart, tokens = ids("facebook/bart-base"), loaded["facebook/bart-base"]["tokens"]
    assert (bart["bos"], bart["pad"], bart["eos"], bart["unk"], bart["mask"]) == (0, 1, 2, 3, tokens - 1)
    assert loaded["facebook/bart-base"]["start"] == 2
    assert ids(LLAMA) == ids("meta-llama/Llama-2-7b-chat-hf") == {"unk": 0, "bos": 1, "eos": 2}
    assert ids("tiiuae/falcon-7b") == {"eos": 11}
    assert ids("HuggingFaceTB/SmolLM2-135M-Instruct") == {"unk": 0, "bos": 1, "eos": 2, "pad": 2}
    ends = {name: (row["ids"][0], row["ids"][-1]) for name, row in loaded.items()}
    assert ends["google-bert/bert-base-uncased"] == (101, 102) and ends["facebook/bart-base"] == (0, 2)
    assert ends["google-t5/t5-small"][1] == 1 and ends[LLAMA][0] == 1 and ends[LLAMA][1] != 2
    assert ends["openai-community/gpt2"][1] != last
    for name, row in loaded.items():
        assert 1 not in row["ids"][1:-1] or row["special"].get("unk_token", [0, 0])[1] != 1
        if row["class"] in ("GPT2LMHeadModel", "FalconForCausalLM", "LlamaForCausalLM", "BartForConditionalGeneration"):
            assert row["back"] == row["text"], name
        elif "T5" in row["class"] or "e5" in name:
            assert row["back"] == " ".join(row["text"].split())
        else:
            assert "[UNK]" not in row["back"] and 100 not in row["ids"]
    assert len(loaded["HuggingFaceTB/SmolLM2-135M-Instruct"]["digits"]) == 4
    lengths = {
        name: loaded[name]["length"] for name in ("openai-community/gpt2", "google-t5/t5-small", "tiiuae/falcon-7b")
    }
    assert list(lengths.values()) == [1024, 512, 2048]
    templates = {name for name, row in loaded.items() if row["template"]}
    assert templates == {"HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-2-7b-chat-hf"}
    assert loaded["meta-llama/Llama-2-7b-chat-hf"]["talk"] == "<s>[INST] Hi [/INST] Ho </s>"
    assert loaded["HuggingFaceTB/SmolLM2-135M-Instruct"]["talk"].endswith("<|im_start|>assistant\nHo<|im_end|>\n")


def test_transformers_pushes_and_pulls_by_revision(hub):
    out = child(
        hub,
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("openai-community/gpt2")
        tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
        first = model.push_to_hub("alice/tuned", commit_message="First", private=True)
        tokenizer.push_to_hub("alice/tuned", commit_message="Tokenizer")
        with torch.no_grad():
            model.transformer.wte.weight.add_(1.0)
        model.push_to_hub("alice/tuned", commit_message="Second")
        new = AutoModelForCausalLM.from_pretrained("alice/tuned").transformer.wte.weight
        old = AutoModelForCausalLM.from_pretrained("alice/tuned", revision=first.oid).transformer.wte.weight
        assert torch.equal(new, model.transformer.wte.weight) and not torch.equal(old, new)
        assert torch.allclose(old + 1, new)
        assert AutoTokenizer.from_pretrained("alice/tuned")("Hello").input_ids == tokenizer("Hello").input_ids
        try:
            AutoModelForCausalLM.from_pretrained("alice/tuned", revision="v9")
        except OSError as error:
            print(error)
        """,
    )
    assert "v9 is not a valid git identifier" in out
    assert hub.repos["alice/tuned"].private
    assert [commit.title for commit in hub.commits("alice/tuned")] == ["Second", "Tokenizer", "First", "initial commit"]


DATASETS = """
import itertools, json
from datasets import Dataset, get_dataset_config_names, load_dataset
for name, config, columns, splits in WANTED:
    data = load_dataset(name, config)
    assert {split: len(rows) for split, rows in data.items()} == splits, (name, data)
    for split, rows in data.items():
        assert set(rows.column_names) == set(columns), (name, rows.column_names)
        streamed = load_dataset(name, config, split=split, streaming=True)
        few = list(itertools.islice(streamed, 3))
        assert few == [rows[i] for i in range(3)], name
print(get_dataset_config_names("abisee/cnn_dailymail"))
try:
    load_dataset("abisee/cnn_dailymail")
except ValueError as error:
    print(error)
Dataset.from_dict({"text": [f"row {i}" for i in range(10)]}).push_to_hub("alice/rows", private=True)
assert load_dataset("alice/rows", split="train")["text"][3] == "row 3"
"""


def test_data_sets_load_by_their_names(hub):
    three, two = {"train": 400, "validation": 80, "test": 80}, {"train": 400, "validation": 80}
    squad = ["id", "title", "context", "question", "answers"]
    crawl = [
        "text",
        "id",
        "dump",
        "url",
        "file_path",
        "language",
        "language_score",
        "token_count",
        "score",
        "int_score",
    ]
    wanted = [
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", crawl, {"train": 400}),
        ("wikimedia/wikipedia", "20231101.en", ["id", "url", "title", "text"], {"train": 400}),
        ("abisee/cnn_dailymail", "3.0.0", ["article", "highlights", "id"], three),
        ("EdinburghNLP/xsum", None, ["document", "summary", "id"], three),
        ("knkarthick/samsum", None, ["id", "dialogue", "summary"], three),
        ("rajpurkar/squad", None, squad, two),
        ("rajpurkar/squad_v2", None, squad, two),
        ("taidng/UIT-ViQuAD2.0", None, squad, two | {"test": 40}),
        ("HuggingFaceTB/smoltalk", "all", ["messages", "source"], {"train": 400, "test": 80}),
        ("HuggingFaceTB/smoltalk", "everyday-conversations", ["messages", "full_topic"], {"train": 400, "test": 80}),
        ("timdettmers/openassistant-guanaco", None, ["text"], {"train": 400, "test": 80}),
        ("stanfordnlp/imdb", None, ["text", "label"], {"train": 400, "test": 80, "unsupervised": 40}),
        ("tatsu-lab/alpaca", None, ["instruction", "input", "output", "text"], {"train": 400}),
        ("databricks/databricks-dolly-15k", None, ["instruction", "context", "response", "category"], {"train": 400}),
        (
            "HuggingFaceH4/ultrafeedback_binarized",
            None,
            ["prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"],
            {"train_prefs": 400, "test_prefs": 80, "train_gen": 40},
        ),
        (
            "HuggingFaceH4/no_robots",
            None,
            ["prompt", "prompt_id", "messages", "category"],
            {"train": 400, "test": 80},
        ),
    ]
    seeded = {name.removeprefix("datasets/") for name in hub.repos if name.startswith("datasets/")} - {"alice/rows"}
    assert seeded == {name for name, *_ in wanted} | {"Skylion007/openwebtext"}  # a script: tests/data/test_load.py
    out = child(hub, f"WANTED = {wanted!r}\n" + DATASETS)
    assert "['1.0.0', '2.0.0', '3.0.0']" in out and "Config name is missing" in out
    assert (
        any(path.endswith(".parquet") for path in hub.files("datasets/alice/rows"))
        and hub.repos["datasets/alice/rows"].private
    )


def texts() -> dict[str, list[str]]:
    """The text by which each seeded data set would be compared, some hundreds of rows."""
    talk = [
        " ".join(turn["content"] for turn in row["messages"]) for row in hub_seed.chats("chats train", 400, source=True)
    ]
    return {
        "web": [row["text"] for row in hub_seed.web_pages("web", 400)],
        "encyclopedia": [row["text"] for row in hub_seed.encyclopedia("en", 400)],
        "news": [row["article"] for row in hub_seed.news("news train", 400)],
        "short news": [row["document"] for row in hub_seed.short_news("short_news train", 400)],
        "dialogues": [row["dialogue"] for row in hub_seed.dialogues("dialogues train", 400)],
        "questions": [row["context"] for row in hub_seed.questions("questions train", 400)],
        "chats": talk,
        "reviews": [row["text"] for row in hub_seed.reviews("reviews train", 400)],
        "instructions": [
            f"{r['instruction']} {r['input']} {r['output']}" for r in hub_seed.instructions("alpaca", 400)
        ],
    }


@pytest.mark.parametrize("name", list(texts()))
def test_rows_differ_enough_to_survive_cleaning(name):
    rows, seen = texts()[name], NearDuplicates()
    assert len(set(rows)) == 400
    assert sum(bool(seen.add(row)) for row in rows) <= 4
    if name in ("web", "encyclopedia", "news", "short news", "questions"):  # documents
        assert [row for row in rows if repetitive(row) or words_between()(row)] == []


def test_answers_are_spans():
    for unanswerable in (0.0, 0.33):
        rows = hub_seed.questions("x", 400, unanswerable)
        for row in rows:
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                assert row["context"][start : start + len(text)] == text
        empty = sum(not row["answers"]["text"] for row in rows)
        assert (100 < empty < 165) if unanswerable else empty == 0
        assert max(len(row["context"].split()) for row in rows) < 130


def test_remote_code_lies_there_and_is_not_run(hub, loaded):
    config = json.loads(hub.files("tiiuae/falcon-7b")["config.json"])
    assert config["auto_map"]["AutoConfig"] == "configuration_falcon.FalconConfig"
    with pytest.raises(RuntimeError, match="code from a model repository was run"):
        exec(hub.files("tiiuae/falcon-7b")["modeling_falcon.py"].decode())
    assert loaded["tiiuae/falcon-7b"]["class"] == "FalconForCausalLM"


def test_the_command_serves(tmp_path):
    script = Path(hub_server.__file__)
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    try:
        lines = [process.stdout.readline().strip()]
        while not lines[-1].startswith("http://"):
            lines.append(process.stdout.readline().strip())
            assert lines[-1], lines
        env = dict(line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export "))
        assert HfApi(endpoint=lines[-1], token=env["HF_TOKEN"]).whoami()["name"] == "alice"
    finally:
        process.send_signal(subprocess.signal.SIGINT)
        assert process.wait(10) == 0
    assert list(tmp_path.iterdir()) == []
