"""deploy/: files opened on the page, any own message changed, chats saved, examples, what may be chosen, the page of a run."""

import io
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import formats
import pytest
import streamlit
from checkout import ROOT
from packaging.requirements import Requirement
from PIL import Image
from pypdf import PdfReader, PdfWriter
from streamlit.testing.v1 import AppTest
from test_deploy_app import APP, labelled

from deploy import uploads
from deploy.choices import load, refuse_foreign, shown_name, task_of
from deploy.example_texts import EXAMPLES
from deploy.texts import TEXTS, literally
from deploy.uploads import read_upload
from shared import UserError

VIETNAMESE = "Tiếng Việt có dấu. Đây là một đoạn văn ngắn."


def pdf(text: str = "", password: str | None = None, algorithm: str = "AES-256") -> bytes:
    """A page with this text, or a picture of it (no text)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(6, 2)), io.BytesIO()
    figure.text(0.1, 0.5, text)
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(file, format="pdf")
    if password is None:
        return file.getvalue()
    writer, locked = PdfWriter(PdfReader(file)), io.BytesIO()
    writer.encrypt(user_password=password, owner_password="owner", algorithm=algorithm)
    writer.write(locked)
    return locked.getvalue()


def said(key: str) -> str:
    """What the page says after a file's name, up to the first number."""
    return TEXTS[key][0].split("{}")[1].split("{")[0]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", VIETNAMESE.encode(), VIETNAMESE),
        ("a.TXT", b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo"),
        ("lines.txt", b"\xef\xbb\xbf\n\n  one\n \n", "\n\n  one"),
        ("a.md", VIETNAMESE.encode("utf-16"), VIETNAMESE),
        ("a.txt", "plain English words".encode("utf-16-le"), "plain English words"),
        ("a.txt", unicodedata.normalize("NFD", VIETNAMESE).encode(), VIETNAMESE),
        ("a.pdf", pdf("Nine hives"), "Nine hives"),
        ("open.pdf", pdf("Nine hives", password=""), "Nine hives"),
    ],
)
def test_a_file_is_read(name, content, expected):
    assert read_upload(name, content) == expected


@pytest.mark.parametrize(
    "name, content, key",
    [
        ("a.txt", VIETNAMESE.encode("cp1258", "replace") + b"\xd2\xec", "file_encoding"),
        ("a.txt", b"\xff\xfeodd", "file_encoding"),
        ("a.txt", b"MZ\0\1\2" + b"\0" * 9, "file_binary"),
        ("a.md", b" \n\t\n", "file_empty"),
        ("a.txt", b"a" * 500_001, "file_long"),
        ("a.txt", b"a" * (10 << 20) + b"a", "file_large"),
        ("a.docx", b"PK", "file_kind"),
        ("a.pdf", pdf("secret", password="secret"), "file_locked"),
        ("a.pdf", pdf(), "file_scanned"),
        ("a.pdf", pdf("cut short")[:200], "file_damaged"),
        ("a.pdf", b"no PDF at all", "file_damaged"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name, content, key):
    with pytest.raises(UserError) as caught:
        read_upload(name, content)
    assert str(caught.value).startswith(name + said(key)) and "\n" not in str(caught.value)


def half_scanned() -> bytes:
    """A page of text, and two that are pictures."""
    pages, found = io.BytesIO(), io.BytesIO()
    Image.new("L", (40, 40), 99).save(pages, "PDF", save_all=True, append_images=[Image.new("L", (40, 40), 9)])
    writer = PdfWriter(PdfReader(io.BytesIO(pdf("Nine hives"))))
    writer.append(PdfReader(pages))
    writer.write(found)
    return found.getvalue()


def test_pages_without_text_are_named(open_page):
    problems = []
    assert read_upload("half.pdf", half_scanned(), problems) == "Nine hives"
    assert problems == ["half.pdf" + TEXTS["file_part_scanned"][0].format("", 2)]
    read_upload("whole.pdf", pdf("Nine hives"), problems)
    assert len(problems) == 1
    app = open_page("summarize", "vi")
    app.file_uploader[0].set_value(("half.pdf", half_scanned(), "application/pdf")).run()
    assert labelled(app.text_area, "text", "vi").value == "Nine hives"
    assert [each.value for each in app.error] == [literally("half.pdf" + TEXTS["file_part_scanned"][1].format("", 2))]


def test_a_pdf_that_takes_for_ever_is_given_up(monkeypatch):
    monkeypatch.setattr(uploads, "SECONDS", 0.001)
    with pytest.raises(UserError, match="took too long"):
        read_upload("a.pdf", pdf("Nine hives"))


def test_requirements_of_serving_are_enough_for_files():
    """deploy/requirements.txt, installed alone, reads a PDF: what is in neither it nor what it requires is not imported."""
    from importlib.metadata import PackageNotFoundError, packages_distributions, requires

    from packaging.utils import canonicalize_name

    lines = (ROOT / "deploy" / "requirements.txt").read_text().splitlines()
    waiting, wanted = [line for line in lines if line[:1].isalpha()], set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name not in wanted and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            wanted.add(name)
            try:
                waiting += requires(name) or []
            except PackageNotFoundError:  # for another system
                continue
    there = packages_distributions()
    absent = [module for module, owners in there.items() if not wanted & {canonicalize_name(o) for o in owners}]
    program = (
        "import io, sys\n"
        f"sys.modules.update(dict.fromkeys(set({absent!r}) - {{'shared'}}))\n"
        "import deploy.uploads\n"
        "from deploy.pdf_text import text_of_pdf\n"
        f"print(text_of_pdf({pdf('Nine hives', password='')!r})[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "Nine hives", done.stderr[-2000:]


def test_texts_come_out_of_files_wherever_one_is_pasted(open_page, tiny):
    for page in ("summarize", "ask", "classify", "chat"):
        app = open_page(page, "vi")
        if page == "chat":
            app.selectbox[0].set_value(app.selectbox[0].options[-1]).run()  # without a template
        box = labelled(app.text_area, "text", "vi")
        example = next(example.text for example in EXAMPLES if example.language == "vi")
        assert box.value == (example.split(".")[0] if page == "chat" else example)
        assert app.file_uploader[0].allowed_type == [".txt", ".md", ".pdf"]
        app.file_uploader[0].set_value(("a.txt", VIETNAMESE.encode(), "text/plain")).run()
        assert labelled(app.text_area, "text", "vi").value == VIETNAMESE and not app.error and not app.exception
    app.file_uploader[0].set_value(("b.pdf", b"no PDF", "application/pdf")).run()
    assert len(app.error) == 1 and "hỏng" in app.error[0].value and not app.exception
    assert labelled(app.text_area, "text", "vi").value == VIETNAMESE, "what was there stays"
    labelled(app.button, "send", "vi").click().run()
    assert len(app.error) == 1 and any(m.value.startswith("Tiếng Việt") for m in app.markdown)


def test_examples(open_page):
    app = open_page("ask")
    for example in EXAMPLES:
        next(b for b in app.button if b.label == example.title).click().run()
        assert labelled(app.text_area, "text").value == example.text
        assert labelled(app.text_input, "question").value == example.questions[0]
        next(b for b in app.button if b.label == example.questions[-1]).click().run()
        assert labelled(app.text_input, "question").value == example.questions[-1]
    app.segmented_control[0].set_value("vi").run()
    assert labelled(app.text_area, "text", "vi").value == EXAMPLES[2].text, "an example follows the language"
    labelled(app.text_area, "text", "vi").set_value("My own text.").run()
    app.segmented_control[0].set_value("en").run()
    assert labelled(app.text_area, "text").value == "My own text."
    app.button_group[0].set_value("fill").run()
    assert labelled(app.text_input, "sentence").value == TEXTS["sentences"][0].split("|")[0]
    app.button_group[0].set_value("ask").run()
    assert labelled(app.text_area, "text").value == "My own text.", "what was typed stays while another tab is open"
    assert {example.language for example in EXAMPLES} == {"en", "vi"}
    for example in EXAMPLES:
        assert len(example.text.split()) > 80 and len(example.questions) > 2


def test_any_own_message_can_be_changed(open_page):
    app = open_page("chat")
    labelled(app.slider, "max_tokens").set_value(16)
    for text in ("one", " \n", "two", "three"):  # nothing is said by blanks
        app.chat_input[0].set_value(text).run()
    first = app.session_state.chat[1]["replies"][0]["text"]
    edits = [button for button in app.button if button.label == TEXTS["edit"][0]]
    assert len(edits) == 3
    edits[1].click().run()
    assert labelled(app.text_area, "edit").value == "two" and TEXTS["edit_more"][0] in [c.value for c in app.caption]
    labelled(app.button, "cancel").click().run()
    assert [m["content"] for m in app.session_state.chat[::2]] == ["one", "two", "three"]
    [button for button in app.button if button.label == TEXTS["edit"][0]][1].click().run()
    labelled(app.text_area, "edit").set_value("another")
    labelled(app.button, "send").click().run()
    assert not app.exception and [m["content"] for m in app.session_state.chat] == ["one", "", "another", ""]
    assert app.session_state.chat[1]["replies"][0]["text"] == first and len(app.chat_message) == 4
    app.chat_input[0].set_value("more").run()
    assert len(app.session_state.chat) == 6, "the conversation goes on from there"
    [button for button in app.button if button.label == TEXTS["edit"][0]][0].click().run()
    labelled(app.button, "clear").click().run()
    assert app.session_state.chat == [] and app.session_state.edited is None


def test_a_chat_is_saved_so_that_chat_sft_reads_it(open_page, tmp_path, monkeypatch):
    saved = {}

    def download_button(label, data, file_name, **options):
        saved[file_name] = data

    monkeypatch.setattr(streamlit, "download_button", download_button)
    app = open_page("chat")
    labelled(app.slider, "max_tokens").set_value(16)
    labelled(app.text_area, "system").set_value("Be kind.")
    for text in ("Xin chào <|im_end|>", "two\nlines"):
        app.chat_input[0].set_value(text).run()
    assert not app.exception
    (tmp_path / "chats.jsonl").write_bytes(saved["chat.jsonl"] * 2)
    rows = formats.read(str(tmp_path / "chats.jsonl"))["train"]
    read = formats.Reader("rows", formats.columns_of(rows), [])
    kept = [(turn["role"], turn["content"].strip()) for turn in read(rows[0])["messages"]]
    assert len(rows) == 2 and kept == [(turn["role"], turn["content"].strip()) for turn in rows[0]["messages"]]
    replies = [m["replies"][0]["text"] for m in app.session_state.chat[1::2]]
    contents = ["Be kind.", "Xin chào <|im_end|>", replies[0], "two\nlines", replies[1]]
    assert [m["content"] for m in rows[0]["messages"]] == contents
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    text = saved["chat.md"].decode()
    assert text.startswith("# Chat with llama\n") and all(content in text for content in contents)


def test_typed_names_open_no_other_folder(tiny_served, tmp_path, monkeypatch):
    monkeypatch.delenv("TASKBOOK_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "private").mkdir(parents=True)
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    (tmp_path / "outputs" / "link").symlink_to(tmp_path / "elsewhere" / "private")
    (tmp_path / "org" / "name").mkdir(parents=True)
    foreign = (str(tiny_served["fill-mask"]), "org/name", "..", "~/x", "./nowhere", "outputs/../org", "/etc")
    for name in (*foreign, "outputs/link/../../elsewhere", "outputs/link/../private"):
        with pytest.raises(UserError, match="outside outputs/"):
            refuse_foreign(name)
    for name in ("outputs/run", "./outputs/run", "someone/model", "pypi:minilm-l6"):
        refuse_foreign(name)
    monkeypatch.setenv("TASKBOOK_MODELS", f"{tiny_served['fill-mask']}/ pypi:minilm-l6")
    for name in (str(tiny_served["fill-mask"]), "pypi:minilm-l6"):
        refuse_foreign(name)
    for name in ("someone/model", "outputs/run", "pypi:smollm2-135m-instruct"):  # a browser can send what no box offers
        with pytest.raises(UserError, match="not one of those"):
            refuse_foreign(name)


def test_an_adapter_of_the_hub_opens_no_folder_here(tiny, tmp_path, monkeypatch):
    """Somebody types their own adapter's name, whose base is a path of this server."""
    (tmp_path / "pulled").mkdir()
    (tmp_path / "pulled" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tiny / "gpt2")})
    )
    monkeypatch.setattr("deploy.choices.pull", lambda name: tmp_path / "pulled")
    with pytest.raises(UserError, match="outside outputs/"):
        load.__wrapped__("someone/adapter", 0.0)


def test_a_page_that_others_reach_shows_nothing_but_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "secret-run").mkdir(parents=True)
    (tmp_path / "outputs" / "secret-run" / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    option = streamlit.get_option
    for models, where in (("", "0.0.0.0"), ("  ", "192.0.2.1"), ("", "")):
        monkeypatch.setenv("TASKBOOK_MODELS", models)
        monkeypatch.setattr(streamlit, "get_option", lambda n, w=where: w if n == "server.address" else option(n))
        app = AppTest.from_file(APP, default_timeout=60).run()
        assert len(app.error) == 1 and "reached from other machines" in app.error[0].value and not app.exception
        assert not app.selectbox and not app.chat_input, "not even the names of the runs"


def test_no_folder_of_the_server_is_shown(tiny_served, open_page, tmp_path, monkeypatch):
    """Names in the box, the line while it loads, errors, and a run whose configuration is damaged."""
    said, spinner = [], streamlit.spinner
    monkeypatch.setattr(streamlit, "spinner", lambda text: said.append(text) or spinner(text))
    app = open_page("fill")
    assert app.selectbox[0].options == [tiny_served["fill-mask"].name]
    assert said == [f"Loading `{tiny_served['fill-mask'].name}`"]
    assert shown_name("/a/b/run", ["/a/b/run", "/a/c/run"]) == "b/run" and shown_name("pypi:x") == "pypi:x"
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "config.json").write_text('{"architectures": ["BertForMaskedLM"]')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    monkeypatch.setenv("TASKBOOK_MODELS", f"{tmp_path / 'words'} {tmp_path / 'broken'} {tmp_path / 'misspelt'}")
    app = AppTest.from_file(APP, default_timeout=60)
    app.query_params["page"] = "fill"
    app.run()
    assert not app.exception and len(app.error) == 1 and str(tmp_path) not in app.error[0].value.replace("\\", "")
    assert app.selectbox[0].options == ["broken", "misspelt"]


def test_a_damaged_run_still_has_a_page(tiny, tmp_path, monkeypatch):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny / "llama", run)
    (run / "all_results.json").write_text('{"test_loss": 1.0')
    (run / "samples.jsonl").write_text(
        '{"prompt": "ok", "base": null, "trained": "![x](y)", "reference": null}\n{"pro\n[1]\n'
    )
    (run / "run.yaml").write_text(f"dataset: {tmp_path}/data.csv\n")
    monkeypatch.setenv("TASKBOOK_MODELS", str(run))
    app = AppTest.from_file(APP, default_timeout=60)
    app.query_params["page"] = "model"
    app.run()
    assert not app.exception and not app.error and len(app.table) == 0
    assert [expander.label for expander in app.expander] == ["ok", "Settings of the run"]
    assert str(tmp_path) not in app.code[0].value and r"\!\[x\]\(y\)" in [m.value for m in app.markdown]


def test_the_verdict_is_green_only_where_nothing_was_better(monkeypatch):
    from deploy import model_page

    shown = []
    monkeypatch.setattr(model_page.st, "success", lambda said, **_: shown.append("green"))
    monkeypatch.setattr(model_page.st, "warning", lambda said, **_: shown.append("amber"))
    for verdict in (
        *("Yes", "Better than untrained and unigram"),
        *(
            "No",
            "Not clearly",
            "Better than untrained, worse than Lead-1",
            "Better than untrained, not clearly better than x",
        ),
    ):
        model_page.show_verdict(f"Did it help? {verdict}: test loss 2 -> 1.")
    assert shown == ["green"] * 2 + ["amber"] * 4


def test_files_the_server_takes_are_as_large_as_the_page_says():
    config = (Path(APP).parent / ".streamlit" / "config.toml").read_text()
    assert f"maxUploadSize = {uploads.LARGEST_MB} " in config


@pytest.mark.parametrize(
    ("name", "encoder", "task"),
    [
        ("SomeForConditionalGeneration", True, "summarization"),
        ("SomeForConditionalGeneration", False, "text-generation"),
        ("MarianMTModel", True, "summarization"),
    ],
)
def test_what_a_model_is_offered_for(name, encoder, task, tmp_path):
    """Gemma 3, which sees pictures, too, is "for conditional generation" as T5 is, without an encoder."""
    config = {"architectures": [name], "is_encoder_decoder": encoder}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert task_of(tmp_path) == task
