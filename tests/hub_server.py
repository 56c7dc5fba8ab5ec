"""A Hub of ours on 127.0.0.1: what huggingface_hub, transformers and datasets need to push and pull, over real HTTP.

    python tests/hub_server.py [--seed]     prints its address and tokens and serves until Ctrl-C

In tests it is the fixture `hub` (tests/conftest.py), seeded by hub_seed.py. Repositories have the names of URLs: `alice/gpt2` is
a model, `datasets/alice/text` a data set. Refs live in memory, contents in a folder of blobs named by their sha256.
Not there, since no client here asks for it: Xet storage, discussions, spaces that run, moving and duplicating repositories.
"""

import argparse
import base64
import fnmatch
import hashlib
import itertools
import json
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

# What the Hub's .gitattributes sends through LFS; other files go there when they are binary or larger than 10 MB.
LFS_PATTERNS = """
*.7z *.arrow *.avro *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip
*.zst *tfevents*
"""
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS.split())
REGULAR_LIMIT = 10_000_000  # bytes
# huggingface.co/docs/hub/repositories-licenses
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
grok2-community gemma unknown other
"""
REPO_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?")
REPO_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
FRONT_MATTER = re.compile(r"\A\s*---[\r\n]+([\s\S]*?)[\r\n]+---(?:[\r\n]|\Z)")


class Refusal(Exception):
    """An answer other than success: status, the Hub's `X-Error-Code`, and what the body says."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


class Dropped(Exception):
    """The connection ended in the middle of a body: by a fault, or since the client went away."""


@dataclass(frozen=True)
class Entry:
    """One file of one commit; its content lies in the blob named `sha256`."""

    sha256: str
    size: int
    git_oid: str  # sha1 as git names the blob; of the pointer file, where the content is in LFS
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A commit and the complete tree it leaves."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]


def url_name(kind: str, id: str) -> str:
    """`org/name` for a model, `datasets/org/name` for a data set; the kind in singular or plural."""
    return id if kind.startswith("model") else f"{kind.removesuffix('s')}s/{id}"


@dataclass
class Repo:
    """A repository; `kind` is model, dataset or space."""

    kind: str
    id: str
    private: bool = False
    gated: str | bool = False  # False, "auto" or "manual"
    disabled: bool = False
    granted: set[str] = field(default_factory=set)  # users who may read the files of a gated repository
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1 -> sha
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)  # sha256 of what was uploaded through LFS
    created: str = ""

    @property
    def url(self) -> str:
        return url_name(self.kind, self.id)

    def commit(self, revision: str) -> Commit:
        """The commit that a branch, tag, full ref or (abbreviated) sha names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        found = [sha for sha in self.commits if re.fullmatch("[0-9a-f]{7,40}", revision) and sha.startswith(revision)]
        if len(found) != 1:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def history(self, revision: str) -> list[Commit]:
        """The commits of a revision, the newest first."""
        commits = [self.commit(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path?query" the pattern is found in."""

    pattern: str
    times: int = 1
    status: int | None = None
    drop_after: int | None = None  # bytes of the request's body, or of the answer's where the request has none
    delay: float = 0.0  # seconds
    hits: int = 0


MESSAGES = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: you are not allowed to do this",
    409: "Conflict: another operation is in progress",
    412: "A commit has happened since. Please refresh and try again.",
}


def front_matter(text: str) -> dict:
    """The metadata of a card; {} where there is none. Raises yaml.YAMLError."""
    found = FRONT_MATTER.match(text)
    return (yaml.safe_load(found[1]) or {}) if found else {}


def card_errors(text: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) that the Hub would give for a README.md, for the rules that matter to cards written here."""
    try:
        data = front_matter(text)
    except yaml.YAMLError as error:
        return [f"YAML metadata is invalid: {error}"], []
    if not isinstance(data, dict):
        return ["YAML metadata must be an object"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for name, what in (("base_model", "models"), ("datasets", "datasets")):
        values = data.get(name) or []
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not REPO_ID.fullmatch(value) or value.startswith("."):
                errors.append(f'"{name}" with value "{value}" is not valid. Use an id from https://hf.co/{what}.')
    licenses = data.get("license") or []
    for value in licenses if isinstance(licenses, list) else [licenses]:
        if value not in LICENSES.split():
            errors.append(f'"license" must be one of [{", ".join(LICENSES.split())}], it is "{value}"')
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    languages = data.get("language") or []
    for value in languages if isinstance(languages, list) else [languages]:
        if not isinstance(value, str) or not re.fullmatch("[a-z-]+", value):
            errors.append(f'"language" must only contain lowercase characters: "{value}"')
    return errors + _model_index_errors(data.get("model-index")), []


def _model_index_errors(index) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        place = f"model-index[{i}]"
        if not isinstance(model, dict) or not model.get("name"):
            errors.append(f'"{place}.name" is required')
        results = model.get("results") if isinstance(model, dict) else None
        if not isinstance(results, list):
            errors.append(f'"{place}.results" is required')
        for j, result in enumerate(results or []):
            where = f"{place}.results[{j}]"
            for part, names in (("task", ("type",)), ("dataset", ("type", "name"))):
                for name in names:
                    if not isinstance(result.get(part), dict) or not result[part].get(name):
                        errors.append(f'"{where}.{part}.{name}" is required')
            for k, metric in enumerate(result.get("metrics") or [{}]):
                for name in ("type", "value"):
                    if metric.get(name) in (None, ""):
                        errors.append(f'"{where}.metrics[{k}].{name}" is required')
    return errors


def git_oid(kind: str, content: bytes) -> str:
    """The sha1 by which git names an object."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


class Hub:
    """The server and all it holds. `with Hub(folder) as hub:` serves from threads of this process until the block ends.

    Users are alice, of the organisation acme, and bob. `hub.tokens` holds a token for each role: `write` and `read` are
    alice's, who has access to the gated models; `other` is bob's, may write for him and has no access to them.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        for name in ("blobs", "incoming"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.orgs = {"alice": ["acme"], "bob": []}
        self.moved: dict[str, str] = {}  # `gpt2` or `datasets/imdb`, of before there were owners -> `org/name`
        self.tokens = {role: f"hf_{secrets.token_hex(17)}" for role in ("write", "read", "other")}
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, tuple[Repo, str, int]] = {}  # secret of an LFS address -> what may be put there
        self.faults: list[Fault] = []
        self.log: deque[tuple[str, str, int]] = deque(
            maxlen=20_000
        )  # (method, path, status), 0 for a dropped connection
        self.page_size = 1000  # entries of a tree in one answer
        self.part_size = 5_000_000_000  # larger LFS objects are put in parts of this size, as on the Hub
        self.lock = threading.RLock()
        self.counter = itertools.count()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def env_for(self, role: str | None = "write", home: Path | None = None) -> dict[str, str]:
        """Environment for a child process that is to use this Hub: a role of `tokens`, "wrong", or None for no token.

        `home` is its HF_HOME, with the caches; unless named all share one.
        """
        home = Path(home or self.folder / "home")
        token = (self.tokens | {None: "", "wrong": "hf_" + "0" * 34})[role]
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            # Named too, since the user's own would win over HF_HOME, and tiny models do not belong into a real cache.
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @property
    def env(self) -> dict[str, str]:
        """Environment with a token that may write and has access to the gated models."""
        return self.env_for("write")

    @contextmanager
    def fault(self, pattern: str, **what) -> Iterator[Fault]:
        """Within the block, requests that match go wrong as `Fault` says: `hub.fault("PUT /lfs/", status=503, times=2)`."""
        fault = Fault(pattern, **what)
        with self.lock:
            self.faults.append(fault)
        try:
            yield fault
        finally:
            with self.lock:
                self.faults.remove(fault)

    def take_fault(self, request: str) -> Fault:
        """The fault for this request, counted as hit; one that does nothing where there is none."""
        with self.lock:
            for fault in self.faults:
                if fault.hits < fault.times and re.search(fault.pattern, request):
                    fault.hits += 1
                    return fault
        return Fault("")

    def repo(self, name: str) -> Repo:
        """The repository of that name (`datasets/org/name` for a data set). Raises Refusal where there is none."""
        if name not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repos[name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a repository by path."""
        entries = self.repo(name).commit(revision).files
        return {path: self.blob(entry.sha256).read_bytes() for path, entry in entries.items()}

    def commits(self, name: str, revision: str = "main") -> list[Commit]:
        """The commits of a repository, the newest first; the first ever one is the Hub's own."""
        return self.repo(name).history(revision)

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def store(self, content: bytes) -> str:
        """Puts a content among the blobs, whole or not at all; returns its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.blob(sha256).exists():
            incoming = self.incoming()
            incoming.write_bytes(content)
            incoming.replace(self.blob(sha256))
        return sha256

    def incoming(self) -> Path:
        return self.folder / "incoming" / secrets.token_hex(8)

    def entry(self, sha256: str, lfs: bool) -> Entry:
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Entry(sha256, size, git_oid("blob", pointer if lfs else self.blob(sha256).read_bytes()), lfs)

    def create(self, name: str, **settings) -> Repo:
        """A new repository with the commit that the Hub begins with. Raises Refusal if it exists."""
        kind, repo_id = name.split("/", 1) if name.count("/") == 2 else ("models", name)
        with self.lock:
            if name in self.repos:
                raise Refusal(409, f"You already created this {kind[:-1]} repo: {repo_id}")
            repo = self.repos[name] = Repo(kind[:-1], repo_id, created=now(), **settings)
            files = {".gitattributes": self.entry(self.store(GIT_ATTRIBUTES.encode()), lfs=False)}
            self.write(repo, "refs/heads/main", files, "initial commit", "", repo_id.split("/")[0])
            return repo

    def upload(self, name: str, folder: Path, title: str = "Upload", ref: str = "refs/heads/main") -> Commit:
        """Commits a local folder, as a client would, without the network; used for seeding. A ref that is new begins empty."""
        with self.lock:
            repo = self.repo(name)
            files = dict(repo.commit(ref).files) if ref in repo.refs else {}
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    inside, content = path.relative_to(folder).as_posix(), path.read_bytes()
                    lfs = self.wants_lfs(repo, "main", inside, len(content), content[:512])
                    files[inside] = self.entry(self.store(content), lfs)
                    if lfs:
                        repo.objects.add(files[inside].sha256)
            return self.write(repo, ref, files, title, "", repo.id.split("/")[0])

    def write(self, repo: Repo, ref: str, files: dict, title: str, message: str, author: str) -> Commit:
        """Moves a ref to a new commit with this tree; where the tree is the old one nothing changes."""
        head = repo.commits.get(repo.refs.get(ref, ""))
        if head and head.files == files:
            return head
        date, parent = now(), head.sha if head else None
        tree = sorted((path, entry.git_oid) for path, entry in files.items())
        content = json.dumps([parent, tree, title, message, author, date, next(self.counter)]).encode()
        commit = Commit(git_oid("commit", content), parent, title, message, author, date, files)
        repo.commits[commit.sha] = commit
        repo.refs[ref] = commit.sha
        return commit

    def wants_lfs(self, repo: Repo, revision: str, path: str, size: int, sample: bytes) -> bool:
        """The Hub's rule: named in .gitattributes, large, or binary. An empty file never is."""
        attributes = repo.commit(revision).files.get(".gitattributes")
        lines = self.blob(attributes.sha256).read_text("utf8").splitlines() if attributes else []
        patterns = [line.split()[0].replace("**/", "") for line in lines if "filter=lfs" in line]
        named = any(fnmatch.fnmatch(path if "/" in pattern else Path(path).name, pattern) for pattern in patterns)
        return size > 0 and (named or size > REGULAR_LIMIT or b"\0" in sample)


API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
REPO = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)"
REV = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/(?P<kind>models|datasets|spaces)", "list_repos"),
    ("GET", API, "info"),
    ("GET", API + "/revision/" + REV, "info"),
    ("GET", API + r"/auth-check(?P<write>/write)?", "auth_check"),
    ("PUT", API + "/settings", "settings"),
    ("POST", API + "/preupload/" + REV, "preupload"),
    ("POST", API + "/commit/" + REV, "commit"),
    ("GET", API + "/tree/" + REV + r"(?:/(?P<path>.+))?", "tree"),
    ("POST", API + "/paths-info/" + REV, "paths_info"),
    ("GET", API + "/refs", "refs"),
    ("GET", API + "/commits/" + REV, "commits"),
    ("POST", API + r"/branch/(?P<name>[^/]+)", "create_branch"),
    ("DELETE", API + r"/branch/(?P<name>[^/]+)", "delete_branch"),
    ("POST", API + "/super-squash/" + REV, "super_squash"),
    ("POST", API + "/tag/" + REV, "create_tag"),
    ("DELETE", API + r"/tag/(?P<name>[^/]+)", "delete_tag"),
    ("POST", REPO + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", REPO + r"\.git/info/lfs/verify", "lfs_verify"),
    ("PUT", r"/lfs/(?P<secret>\w+)", "lfs_put"),
    ("PUT", r"/lfs/(?P<secret>\w+)/(?P<part>\d+)", "lfs_put"),
    ("POST", r"/lfs/(?P<secret>\w+)", "lfs_complete"),
    ("GET", REPO + "/resolve/" + REV + "/(?P<path>.+)", "resolve"),
    ("HEAD", REPO + "/resolve/" + REV + "/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """One connection. Each route's method gets the parts of the path that ROUTES names."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: with it each answer would wait 40 ms

    def log_message(self, *_):
        """Nothing on stderr; requests are in `hub.log`."""

    def handle_request(self):
        address = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(address.query))
        self.fault = self.hub.take_fault(f"{self.command} {self.path}")
        self.body = self.read_body()
        self.logged = False
        try:
            try:
                time.sleep(self.fault.delay)
                self.user, self.role = self.authenticate()
                if self.fault.status:
                    text = MESSAGES.get(self.fault.status, "a fault that a test asked for")
                    raise Refusal(self.fault.status, text)
                self.route(address.path)
            except Refusal as refusal:
                deque(self.body, maxlen=0)  # what is left unread would be taken for the next request
                self.answer(refusal.body, refusal.status, refusal.headers)
        except (Dropped, ConnectionError):
            self.close_connection = True
            self.log_once(0)

    def log_once(self, status: int):
        if not self.logged:
            self.hub.log.append((self.command, self.path, status))
        self.logged = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def route(self, path: str):
        found = re.fullmatch(r"((?:/api/models|/api/datasets|/datasets|)/)([^/]+)((?:/.*)?)", path)
        if found and (
            moved := self.hub.moved.get(found[1].removeprefix("/api").removeprefix("/models")[1:] + found[2])
        ):
            query = f"?{address}" if (address := urllib.parse.urlsplit(self.path).query) else ""
            deque(self.body, maxlen=0)
            return self.answer({}, 307, {"Location": f"{found[1]}{moved}{found[3]}{query}"})
        for method, pattern, name in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                parts = {key: urllib.parse.unquote(value) for key, value in found.groupdict().items() if value}
                return getattr(self, name)(**parts)
        if (
            re.match(r"/api/(models|datasets|spaces)/[^/]+", path) or "/resolve/" in path
        ):  # such as `gpt2`, without an owner
            raise self.not_found()
        raise Refusal(404, f"Cannot {self.command} {path}")

    def read_body(self) -> Iterator[bytes]:
        """The body in pieces, by length or chunked. Raises Dropped where the connection ends before it does."""
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        left = None if chunked else int(self.headers.get("Content-Length") or 0)
        limit = self.fault.drop_after
        while chunked or left:
            if chunked and not left:
                left = int(self.rfile.readline().split(b";")[0].strip() or b"0", 16)
                if left == 0:
                    self.rfile.readline()
                    return
            piece = self.rfile.read(min(left, 65536 if limit is None else max(1, min(limit, 65536))))
            if not piece:
                raise Dropped
            left -= len(piece)
            if limit is not None and (limit := limit - len(piece)) < 0:
                raise Dropped
            yield piece
            if chunked and not left:
                self.rfile.readline()

    def json(self) -> dict:
        try:
            return json.loads(b"".join(self.body) or b"{}")
        except ValueError as error:
            raise Refusal(400, f"Malformed JSON: {error}") from error

    def answer(self, content, status: int = 200, headers: dict | None = None, size: int | None = None):
        """Sends JSON, or bytes in pieces whose sum is `size`."""
        if size is None:
            content = [json.dumps(content, default=str).encode()]
            size, headers = len(content[0]), {"Content-Type": "application/json; charset=utf-8"} | (headers or {})
        limit = None if self.command in ("POST", "PUT", "HEAD") else self.fault.drop_after
        # Before the client has the answer, so that a test which then looks finds it.
        self.log_once(status if limit is None or limit > size else 0)
        self.send_response(status)
        for name, value in {"Content-Length": size, **headers}.items():
            self.send_header(name, str(value).replace("\n", " "))
        self.end_headers()
        for piece in content if self.command != "HEAD" else ():
            self.wfile.write(piece[:limit])
            if limit is not None and (limit := limit - len(piece)) <= 0:
                raise Dropped

    # Who asks, and what may they do?

    def authenticate(self) -> tuple[str | None, str | None]:
        """(user, role of the token); (None, None) without a token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None, None
        roles = {f"Bearer {token}": role for role, token in self.hub.tokens.items()}
        if header not in roles:
            raise Refusal(401, MESSAGES[401])
        role = roles[header]
        return ("bob", "write") if role == "other" else ("alice", role)

    def not_found(self) -> Refusal:
        status, text = (404, "Repository not found") if self.user else (401, "Invalid username or password.")
        return Refusal(status, text, "RepoNotFound")

    def member(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user, *self.hub.orgs[self.user])

    def require_write(self, namespace: str):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if self.role == "read":
            raise Refusal(403, "You don't have the required permissions: this token is read-only")
        if not self.member(namespace):
            raise Refusal(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def repo(self, id: str, kind: str = "models", write: bool = False, files: bool = False) -> Repo:
        """The repository that the user may see, write to, or read files of."""
        repo = self.hub.repos.get(url_name(kind, id))
        namespace = id.split("/")[0]
        if repo is None or (repo.private and not self.member(namespace)):
            raise self.not_found()
        if repo.disabled:
            raise Refusal(403, "Access to this resource is disabled.")
        if files and repo.gated and self.user not in repo.granted and not self.member(namespace):
            text = f"Access to {repo.kind} {id} is restricted. "
            if self.user is None:
                text += "You must have access to it and be authenticated to access it. Please log in."
            else:
                text += f"Visit {self.hub.url}/{repo.url} to ask for access."
            raise Refusal(403 if self.user else 401, text, "GatedRepo")
        if write:
            self.require_write(namespace)
        return repo

    def base(self) -> str:
        """This server as the client addressed it."""
        return f"http://{self.headers['Host']}"

    # Routes

    def whoami(self):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.hub.orgs[self.user]]
        access = {"displayName": "test", "role": self.role}
        person = {"type": "user", "id": self.user, "name": self.user, "fullname": self.user.title()}
        person |= {"email": f"{self.user}@example.org", "orgs": orgs}
        self.answer(person | {"auth": {"type": "access_token", "accessToken": access}})

    def named_repo(self, body: dict) -> tuple[str, str]:
        """(kind, id) of the body of create and delete."""
        if not isinstance(body.get("name"), str) or not REPO_NAME.fullmatch(body["name"]):
            raise Refusal(400, f"Invalid repo name: {body.get('name')}")
        return body.get("type") or "model", f"{body.get('organization') or self.user or ''}/{body['name']}"

    def create_repo(self):
        body = self.json()
        kind, id = self.named_repo(body)
        self.require_write(id.split("/")[0])
        url = f"{self.base()}/{url_name(kind, id)}"
        try:
            self.hub.create(
                url_name(kind, id), private=body.get("private") is True or body.get("visibility") == "private"
            )
        except Refusal as refusal:
            refusal.body["url"] = url  # read by the client when the repository may exist
            raise
        self.answer({"url": url, "name": id, "id": id})

    def delete_repo(self):
        kind, id = self.named_repo(self.json())
        del self.hub.repos[self.repo(id, kind, write=True).url]
        self.answer({})

    def settings(self, kind, id):
        repo, body = self.repo(id, kind, write=True), self.json()
        if "visibility" in body or "private" in body:
            repo.private = body.get("visibility") == "private" or body.get("private") is True
        repo.gated = body.get("gated", repo.gated)
        self.answer({"private": repo.private, "gated": repo.gated})

    def validate_yaml(self):
        errors, warnings = card_errors(self.json().get("content", ""))
        answer = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        self.answer(answer | ({"error": "; ".join(errors)} if errors else {}), 400 if errors else 200)

    def auth_check(self, kind, id, write=None):
        self.repo(id, kind, write=bool(write), files=True)
        self.answer({})

    def list_repos(self, kind):
        repos = [repo for repo in self.hub.repos.values() if f"{repo.kind}s" == kind]
        repos = [repo for repo in repos if not repo.private or self.member(repo.id.split("/")[0])]
        repos = [repo for repo in repos if self.query.get("author", repo.id.split("/")[0]) == repo.id.split("/")[0]]
        repos = [repo for repo in repos if self.query.get("search", "").lower() in repo.id.lower()]
        self.answer([self.describe(repo, repo.commit("main")) for repo in repos[: int(self.query.get("limit", 1000))]])

    def info(self, kind, id, revision="main"):
        repo = self.repo(id, kind)
        self.answer(self.describe(repo, repo.commit(revision)))

    def describe(self, repo: Repo, commit: Commit) -> dict:
        def content(path):
            return self.hub.blob(commit.files[path].sha256).read_text("utf8") if path in commit.files else ""

        try:
            card = front_matter(content("README.md"))
        except yaml.YAMLError:
            card = {}
        tags = [*card.get("tags", ())]
        for name, prefix in (("license", "license:"), ("datasets", "dataset:"), ("base_model", "base_model:")):
            values = card.get(name) or []
            tags += [f"{prefix}{value}" for value in (values if isinstance(values, list) else [values])]
        about = {
            "_id": git_oid("repo", repo.url.encode())[:24],
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.sha,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": repo.disabled,
            "createdAt": repo.created,
            "lastModified": commit.date,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "cardData": card,
            "siblings": [
                {
                    "rfilename": path,
                    **({"size": e.size, "blobId": e.git_oid} | self.lfs(e) if "blobs" in self.query else {}),
                }
                for path, e in sorted(commit.files.items())
            ],
        }
        if repo.kind == "model":
            config = json.loads(content("config.json") or "{}")
            kept = {key: config[key] for key in ("architectures", "model_type", "auto_map") if key in config}
            about |= {"modelId": repo.id, "config": kept, "model-index": card.get("model-index")}
            about["pipeline_tag"] = card.get("pipeline_tag")
            about["library_name"] = card.get("library_name") or ("transformers" if config else None)
        return about

    @staticmethod
    def lfs(entry: Entry) -> dict:
        """The key `lfs` of a file's description, for files that have it."""
        return (
            {"lfs": {"sha256": entry.sha256, "oid": entry.sha256, "size": entry.size, "pointerSize": 134}}
            if entry.lfs
            else {}
        )

    def preupload(self, kind, id, revision):
        repo, body = self.repo(id, kind, write=True), self.json()
        held = repo.commit(revision).files
        ignore = body.get("gitIgnore")
        if ignore is None and ".gitignore" in held:
            ignore = self.hub.blob(held[".gitignore"].sha256).read_text("utf8")
        patterns = [
            line.strip().strip("/") for line in (ignore or "").splitlines() if line.strip() and line[0] not in "#!"
        ]
        files = []
        for file in body.get("files", ()):
            path = file["path"]
            lfs = self.hub.wants_lfs(repo, revision, path, file["size"], base64.b64decode(file.get("sample", "")))
            parents = [path, *map(str, Path(path).parents)]
            ignored = any(fnmatch.fnmatch(p, g) or fnmatch.fnmatch(Path(p).name, g) for p in parents for g in patterns)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignored}
            files.append(answer | ({"oid": held[path].etag} if path in held else {}))
        self.answer({"files": files, "commitOid": repo.commit(revision).sha})

    def lfs_batch(self, id, kind="models"):
        repo, body = self.repo(id, kind, write=True), self.json()
        objects = []
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            about = {"oid": oid, "size": size}
            if oid not in repo.objects:
                secret = secrets.token_hex(16)
                self.hub.uploads[secret] = (repo, oid, size)
                href = f"{self.base()}/lfs/{secret}"
                upload = {"href": href}
                if size > self.hub.part_size:
                    parts = range(1, -(-size // self.hub.part_size) + 1)
                    upload["header"] = {"chunk_size": str(self.hub.part_size)} | {str(n): f"{href}/{n}" for n in parts}
                verify = {"href": f"{self.base()}/{repo.url}.git/info/lfs/verify"}
                about["actions"] = {"upload": upload, "verify": verify}
            objects.append(about)
        several = any("header" in o.get("actions", {}).get("upload", {}) for o in objects)
        self.answer({"transfer": "multipart" if several else "basic", "objects": objects})

    def lfs_put(self, secret, part=None):
        """Takes a whole object, or a part of one; an object appears among the blobs only once its sha256 is right."""
        if secret not in self.hub.uploads:
            raise Refusal(403, "This address is not signed")
        incoming = self.hub.folder / "incoming" / f"{secret}.{part}" if part else self.hub.incoming()
        unfinished = self.hub.incoming()
        try:
            digest = hashlib.md5()
            with open(unfinished, "wb") as out:
                for piece in self.body:
                    out.write(piece)
                    digest.update(piece)
            unfinished.replace(incoming)
            if not part:
                self.accept(secret, incoming)
        finally:
            unfinished.unlink(missing_ok=True)
        self.answer({}, headers={"ETag": f'"{digest.hexdigest()}"'})

    def lfs_complete(self, secret):
        """Joins the parts of an object."""
        if secret not in self.hub.uploads:
            raise Refusal(403, "This address is not signed")
        joined = self.hub.incoming()
        with open(joined, "wb") as out:
            for number, part in enumerate(self.json()["parts"], 1):
                file = self.hub.folder / "incoming" / f"{secret}.{number}"
                if part["partNumber"] != number or not file.exists():
                    raise Refusal(400, f"Part {number} was not uploaded")
                if part["etag"].strip('"') != hashlib.md5(file.read_bytes()).hexdigest():
                    raise Refusal(400, f"ETag of part {number} does not match")
                out.write(file.read_bytes())
        for file in (self.hub.folder / "incoming").glob(f"{secret}.*"):
            file.unlink()
        self.accept(secret, joined)
        self.answer({})

    def accept(self, secret: str, incoming: Path):
        repo, oid, size = self.hub.uploads[secret]
        with open(incoming, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != oid or incoming.stat().st_size != size:
            incoming.unlink()
            raise Refusal(400, f"The content has sha256 {found}, announced was {oid}")
        incoming.replace(self.hub.blob(oid))
        repo.objects.add(oid)

    def lfs_verify(self, id, kind="models"):
        repo, body = self.repo(id, kind, write=True), self.json()
        if body["oid"] not in repo.objects or self.hub.blob(body["oid"]).stat().st_size != body["size"]:
            raise Refusal(404, f"Object {body['oid']} was not uploaded")
        self.answer({})

    def commit(self, kind, id, revision):
        repo = self.repo(id, kind, write=True)
        try:
            header, *lines = [json.loads(line) for line in b"".join(self.body).splitlines() if line.strip()]
            header = header["value"]
            stored = {}  # before the lock: decoding and writing takes time
            for line in lines:
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    stored[line["value"]["path"]] = self.hub.entry(self.hub.store(content), lfs=False)
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(400, f"Malformed commit: {error!r}") from error
        with self.hub.lock:
            head = repo.commit(revision)
            files = dict(head.files)
            ref = revision if revision in repo.refs else f"refs/heads/{revision}"
            if ref not in repo.refs:
                raise Refusal(404, f"{revision} is not a branch", "RevisionNotFound")
            parent = header.get("parentCommit")
            if parent and not head.sha.startswith(parent):
                raise Refusal(412, MESSAGES[412])
            for line in lines:
                self.apply(repo, files, line["key"], line["value"], stored)
            if "README.md" in files and files["README.md"] != head.files.get("README.md"):
                errors, _ = card_errors(self.hub.blob(files["README.md"].sha256).read_text("utf8"))
                if errors:
                    raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))
            extra = {}
            if self.query.get("create_pr") == "1":
                number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
                ref = f"refs/pr/{number}"
                repo.refs[ref] = head.sha
                extra = {"pullRequestUrl": f"{self.base()}/{repo.url}/discussions/{number}"}
            commit = self.hub.write(repo, ref, files, header["summary"], header.get("description", ""), self.user)
        url = f"{self.base()}/{repo.url}/commit/{commit.sha}"
        self.answer({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": "", **extra})

    def apply(self, repo: Repo, files: dict[str, Entry], key: str, value: dict, stored: dict[str, Entry]):
        """One line of a commit on a tree."""
        path = value["path"]
        if key == "file":
            if self.hub.wants_lfs(repo, "main", path, stored[path].size, b"") and stored[path].size > REGULAR_LIMIT:
                raise Refusal(413, f"{path} is too large for a regular file, use LFS")
            files[path] = stored[path]
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(400, f"{path}: LFS object {value['oid']} was not uploaded")
            files[path] = self.hub.entry(value["oid"], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            inside = path.rstrip("/") + "/"
            gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(inside))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation {key}")

    def items(self, commit: Commit) -> dict[str, dict]:
        """Files and folders of a tree by path, as tree and paths-info describe them."""
        items = {}
        for path, entry in commit.files.items():
            items[path] = {"type": "file", "path": path, "size": entry.size, "oid": entry.git_oid, **self.lfs(entry)}
            for folder in map(str, list(Path(path).parents)[:-1]):
                inside = sorted((p, e.git_oid) for p, e in commit.files.items() if p.startswith(f"{folder}/"))
                oid = git_oid("tree", json.dumps(inside).encode())
                items[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
        return dict(sorted(items.items()))

    def expand(self, repo: Repo, commit: Commit, items: list[dict]) -> list[dict]:
        """Adds the last commit that touched each item."""
        history = repo.history(commit.sha)
        for item in items:
            last = history[-1]
            for newer, older in itertools.pairwise(history):
                old, new = self.items(older).get(item["path"]), self.items(newer)[item["path"]]
                if old is None or old["oid"] != new["oid"]:
                    last = newer
                    break
            item["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
        return items

    def tree(self, kind, id, revision, path=""):
        repo = self.repo(id, kind)
        commit = repo.commit(revision)
        items, path = self.items(commit), path.strip("/")
        if path and items.get(path, {}).get("type") != "directory":
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = self.query.get("recursive", "").lower() in ("true", "1")
        prefix = f"{path}/" if path else ""
        found = [i for p, i in items.items() if p.startswith(prefix) and (deep or "/" not in p.removeprefix(prefix))]
        size, start = int(self.query.get("limit", self.hub.page_size)), int(self.query.get("cursor", 0))
        page = found[start : start + size]
        if self.query.get("expand", "").lower() in ("true", "1"):
            page = self.expand(repo, commit, page)
        headers = {"X-Repo-Commit": commit.sha}
        if start + size < len(found):
            following = urllib.parse.urlencode(self.query | {"cursor": start + size})
            headers["Link"] = f'<{self.base()}{self.path.split("?")[0]}?{following}>; rel="next"'
        self.answer(page, headers=headers)

    def paths_info(self, kind, id, revision):
        repo, content = self.repo(id, kind), b"".join(self.body)
        commit = repo.commit(revision)
        if "json" in self.headers.get("Content-Type", ""):
            form = json.loads(content)
            paths, expand = form.get("paths", []), form.get("expand", False)
        else:
            form = urllib.parse.parse_qs(content.decode())
            paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
        items = self.items(commit)
        found = [items[path.strip("/")] for path in paths if path.strip("/") in items]
        self.answer(self.expand(repo, commit, found) if expand else found)

    def refs(self, kind, id):
        refs = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        places = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        places |= {"refs/convert/": "converts"}
        for ref, sha in self.repo(id, kind).refs.items():
            prefix = next(prefix for prefix in places if ref.startswith(prefix))
            refs[places[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha})
        self.answer(refs)

    def commits(self, kind, id, revision):
        history = self.repo(id, kind).history(revision)
        shared = [{"id": c.sha, "title": c.title, "message": c.message, "date": c.date} for c in history]
        self.answer([about | {"authors": [{"user": c.author}]} for about, c in zip(shared, history, strict=True)])

    def create_branch(self, kind, id, name):
        repo, body = self.repo(id, kind, write=True), self.json()
        if name.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {name}")
        self.create_ref(repo, f"refs/heads/{name}", body.get("startingPoint") or "main")

    def super_squash(self, kind, id, revision):
        """One commit with the tree of a branch in the place of its history."""
        repo, ref, body = self.repo(id, kind, write=True), f"refs/heads/{revision}", self.json()
        with self.hub.lock:
            if ref not in repo.refs:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            files = repo.commit(ref).files
            del repo.refs[ref]
            self.hub.write(repo, ref, files, body["message"], "", self.user)
        self.answer({})

    def create_tag(self, kind, id, revision):
        repo, body = self.repo(id, kind, write=True), self.json()
        self.create_ref(repo, f"refs/tags/{body['tag']}", revision)

    def create_ref(self, repo: Repo, ref: str, revision: str):
        with self.hub.lock:
            if ref in repo.refs:
                raise Refusal(409, f"Reference already exists: {ref}")
            repo.refs[ref] = repo.commit(revision).sha
        self.answer({})

    def delete_branch(self, kind, id, name):
        if name == "main":
            raise Refusal(403, "The branch main cannot be deleted")
        self.delete_ref(kind, id, f"refs/heads/{name}")

    def delete_tag(self, kind, id, name):
        self.delete_ref(kind, id, f"refs/tags/{name}")

    def delete_ref(self, kind: str, id: str, ref: str):
        repo = self.repo(id, kind, write=True)
        if repo.refs.pop(ref, None) is None:
            raise Refusal(404, f"Reference does not exist: {ref}", "RevisionNotFound")
        self.answer({})

    def resolve(self, id, revision, path, kind="models"):
        repo = self.repo(id, kind, files=True)
        commit = repo.commit(revision)
        headers = {"X-Repo-Commit": commit.sha}
        entry = commit.files.get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if entry.lfs:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": entry.size}
        first, last, status = 0, entry.size - 1, 200
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").strip()):
            if found[1]:
                first, last = int(found[1]), min(int(found[2] or last), last)
            else:
                first = max(0, entry.size - int(found[2]))
            if first > last:
                raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{entry.size}"})
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{entry.size}"
        self.answer(self.pieces(entry, first, last + 1), status, headers, size=last + 1 - first)

    def pieces(self, entry: Entry, first: int, end: int) -> Iterator[bytes]:
        with open(self.hub.blob(entry.sha256), "rb") as file:
            file.seek(first)
            while first < end:
                piece = file.read(min(65536, end - first))
                first += len(piece)
                yield piece


def main() -> None:
    """Serves until Ctrl-C, from a temporary folder."""
    parser = argparse.ArgumentParser(description="A Hub on 127.0.0.1 for tests; prints the environment that uses it.")
    parser.add_argument("--seed", action="store_true", help="fill it with the tiny models and data sets of hub_seed.py")
    seeded = parser.parse_args().seed
    folder = Path(tempfile.mkdtemp(prefix="hub-"))
    try:
        with Hub(folder) as hub:
            if seeded:
                import hub_seed

                hub_seed.seed(hub)
            print("\n".join(f"export {name}={value}" for name, value in hub.env.items()))
            print("\n".join(f"# {role:6}{token}" for role, token in hub.tokens.items()))
            print(hub.url, flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        sys.exit(0)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
