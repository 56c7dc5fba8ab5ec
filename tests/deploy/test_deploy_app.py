"""deploy/app.py: each page with Streamlit's own AppTest, then the whole in a browser, at the width of a desk and of a phone."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import streamlit
import torch
from checkout import ROOT
from finished_run import make_run
from playwright.sync_api import expect, sync_playwright
from streamlit.testing.v1 import AppTest
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from deploy.choices import names_for
from deploy.texts import PAGES, TEXTS, as_markdown, literally
from shared.publish.card import METRICS
from shared.publish.compare import did_it_help
from shared.publish.results import plot_loss, write_json

APP = str(ROOT / "deploy" / "app.py")
PARTS = ("app", "choices", "chat_page", "documents_page", "text_pages", "model_page", "runs_page", "uploads")
SOURCES = [ROOT / "deploy" / f"{name}.py" for name in PARTS]
CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)


def labelled(widgets, key: str, language: str = "en"):
    """The widget with that label."""
    return next(widget for widget in widgets if widget.label == TEXTS[key][language == "vi"])


def test_every_label_has_both_languages():
    for key, (english, vietnamese) in TEXTS.items():
        assert english and vietnamese, key
        assert english.count("{") == vietnamese.count("{") and english.count("|") == vietnamese.count("|"), key
    source = "\n".join(path.read_text("utf8") for path in SOURCES)
    shown = set(re.findall(r"""["'](\w+)["']""", source)) | set(PAGES)
    shown |= {f"{kind}_{name}" for kind, name in (("save", "messages"), ("save", "markdown"))}
    shown |= {f"sample_{name}" for name in ("base", "trained", "reference")}
    assert not set(TEXTS) - shown, "labels that nothing shows"
    assert set(re.findall(r"""\bt\(["'](\w+)["']""", source)) <= set(TEXTS)


def test_the_chat_page(open_page):
    app = open_page("chat", "vi")
    labelled(app.slider, "max_tokens", "vi").set_value(16)
    app.chat_input[0].set_value("<b>Hi</b> ![x](http://192.0.2.1/x.png)").run()
    assert not app.exception and len(app.chat_message) == 2
    assert app.chat_message[0].markdown[0].value == r"\<b\>Hi\</b\> \!\[x\]\(http\://192\.0\.2\.1/x\.png\)"
    assert "token/giây" in app.chat_message[1].caption[0].value
    reply = app.session_state.chat[-1]["replies"][0]
    assert reply["whole"] and 0 < reply["tokens"] <= 16
    labelled(app.button, "again", "vi").click().run()
    assert len(app.session_state.chat) == 2
    labelled(app.button, "edit", "vi").click().run()
    labelled(app.text_area, "edit", "vi").set_value("Bye")
    labelled(app.button, "send", "vi").click().run()
    assert [m["content"] for m in app.session_state.chat] == ["Bye", ""] and len(app.chat_message) == 2
    labelled(app.text_area, "system", "vi").set_value("word " * 3000)
    app.chat_input[0].set_value("More").run()
    assert "tokens" in app.error[0].value and len(app.session_state.chat) == 2, "what did not fit is taken back"
    labelled(app.button, "clear", "vi").click().run()
    assert app.session_state.chat == []


def test_a_model_without_a_template_continues(open_page, tiny):
    app = open_page("chat")
    app.selectbox[0].set_value(str(tiny / "gpt2")).run()
    labelled(app.text_area, "text").set_value("Once *upon*")
    labelled(app.button, "send").click().run()
    assert not app.exception
    assert any(m.value.startswith(r"Once \*upon\***") for m in app.markdown)


def test_an_adapter_stands_beside_its_base(tiny, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny / "llama")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tiny / "llama").save_pretrained(tmp_path / "tuned")
    monkeypatch.setenv("TASKBOOK_MODELS", str(tmp_path / "tuned"))
    app = AppTest.from_file(APP, default_timeout=60).run()
    labelled(app.toggle, "compare").set_value(True)
    labelled(app.slider, "max_tokens").set_value(16)
    labelled(app.slider, "temperature").set_value(0.0)
    app.chat_input[0].set_value("Hi").run()
    assert not app.exception
    tuned, base = app.session_state.chat[-1]["replies"]
    assert tuned["text"] == base["text"] and tuned["text"], "a new adapter changes nothing yet"
    assert [c.value for c in app.chat_message[1].caption if c.value.startswith("**")] == ["**Trained**", "**Base**"]


def test_the_pages_for_texts(open_page):
    app = open_page("summarize")
    labelled(app.slider, "length").set_value(16)
    labelled(app.text_area, "reference").set_value("A short text.")
    labelled(app.button, "summarize").click().run()
    assert not app.exception and [m.label for m in app.metric] == ["ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU"]
    app = open_page("ask", "vi")
    context = "A * b\n\n[c] $d$ :red[e] <i>"
    labelled(app.text_area, "text", "vi").set_value(context)
    labelled(app.text_input, "question", "vi").set_value("What?")
    labelled(app.button, "find", "vi").click().run()
    assert not app.exception
    marked = app.main.markdown[-1].value
    shown = re.sub(r":green-background\[((?:\\.|[^\]])*)\]", r"\1", marked)
    assert shown.replace("  \n", "\n") == literally(context).replace("  \n", "\n"), "the text, and a mark in it"
    labelled(app.text_input, "question", "vi").set_value("word " * 300)
    labelled(app.button, "find", "vi").click().run()
    assert not app.exception and "at most 252" in app.error[0].value, "no part of a question is left out"
    app = open_page("fill")
    labelled(app.button, "guess").click().run()
    assert not app.exception and len(app.get("progress")) == 8
    sorted_page = open_page("classify")
    labelled(sorted_page.button, "sort").click().run()
    assert not sorted_page.exception and len(sorted_page.get("progress")) == 3
    labelled(app.text_input, "sentence").set_value("No blank")
    labelled(app.button, "guess").click().run()
    assert "MASK" in app.error[0].value


def test_the_score_of_a_regression_is_a_value(tiny_served, tmp_path, monkeypatch):
    config = AutoConfig.from_pretrained(tiny_served["text-classification"])
    config.num_labels, config.problem_type = 1, "regression"
    model = AutoModelForSequenceClassification.from_config(config)
    model.classifier.bias.data = torch.tensor([-3.5])
    model.classifier.weight.data.zero_()
    model.save_pretrained(tmp_path / "stars")
    AutoTokenizer.from_pretrained(tiny_served["text-classification"]).save_pretrained(tmp_path / "stars")
    monkeypatch.setenv("TASKBOOK_MODELS", str(tmp_path / "stars"))
    app = AppTest.from_file(APP, default_timeout=60)
    app.query_params["page"] = "classify"
    app.run()
    labelled(app.button, "sort").click().run()
    assert app.main.markdown[-1].value == f"**{literally('LABEL_0')}**  {literally('-3.5')}"
    assert not app.exception and not app.get("progress")


def test_the_model_page_and_names(open_page, tiny_served, tmp_path, monkeypatch):
    numbers = {"megabytes": 12.0, "latency_ms": {"1": {"p50": 3.5}}, "per_second": {"1": 40.0}}
    (tiny_served["text-generation"] / "export.json").write_text(json.dumps({"artifacts": {"onnx": numbers}}))
    app = open_page("model")
    assert app.table[0].value.values.tolist() == [["onnx", "12.0", "3.5", "40.0"]]
    (tiny_served["text-generation"] / "export.json").unlink()
    assert literally("text-generation") in app.main.markdown[-1].value
    monkeypatch.delenv("TASKBOOK_MODELS")
    monkeypatch.chdir(tmp_path)
    assert (
        names_for("text-generation") == names_for(None) == ["pypi:smollm2-135m-instruct"]
        and names_for("fill-mask") == []
    )
    for name, config in (("words", "BertForMaskedLM"), ("chat_sft", "LlamaForCausalLM"), ("gpt", "GPT2LMHeadModel")):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "config.json").write_text(f'{{"architectures": ["{config}"]}}')
    (tmp_path / "outputs" / "unfinished").mkdir()
    (tmp_path / "outputs" / "forms").mkdir()
    (tmp_path / "outputs" / "forms" / "export.json").write_text('{"task": "summarization"}')
    assert names_for("summarization") == ["outputs/forms"]
    assert names_for("fill-mask") == ["outputs/words"]
    assert names_for("text-generation") == ["outputs/chat_sft", "outputs/gpt", "pypi:smollm2-135m-instruct"]
    app = AppTest.from_file(APP, default_timeout=60)
    app.query_params["page"] = "fill"
    app.run()
    assert "reached from other machines" in app.error[0].value, (
        "no address is set, so that others reach it: nobody chooses a model"
    )
    option = streamlit.get_option
    monkeypatch.setattr(streamlit, "get_option", lambda n: "127.0.0.1" if n == "server.address" else option(n))
    app.run()
    assert len(app.error) == 1 and not app.exception, "a folder without weights is one line"
    assert str(tmp_path) not in app.error[0].value.replace("\\", "")


def test_what_a_run_wrote_is_said_in_vietnamese(tiny_bert, tmp_path, monkeypatch):
    """Verdict, metrics, baselines, columns: of their English words none is left, names such as BM25 and Lead-1 are."""
    before, after, half = ([score + i % 3 for i in range(20)] for score in (3.0, 2.0, 2.5))
    names = ("most frequent token", "Lead-1", "BM25 and untrained")
    baselines = dict(zip(names, ([1.0] * 20, before, half), strict=True))
    verdicts = [did_it_help({"f1": before}, {"f1": after}, "f1", {k: {"f1": v} for k, v in baselines.items()})["line"]]
    verdicts += [
        did_it_help({"f1": a}, {"f1": b}, "f1")["line"] for a, b in ((before, before), (after[:3], before[:3]))
    ]
    scores = {
        f"{system}_{name}": 1.5 for system in ("test", "base", "baseline_most_frequent_token") for name in METRICS
    }
    shutil.copytree(tiny_bert, tmp_path / "run")
    monkeypatch.setenv("TASKBOOK_MODELS", str(tmp_path / "run"))
    said = ""
    for verdict in verdicts:
        write_json(tmp_path / "run" / "all_results.json", {"line": verdict, "test_rows": 20, **scores})
        app = AppTest.from_file(APP, default_timeout=60)
        app.query_params["page"] = "model"
        app.run()
        app.segmented_control[0].set_value("vi").run()
        assert not app.exception
        said += " ".join(each.value for each in (*app.success, *app.warning)) + "\n"
    assert "kém hơn mô hình chưa huấn luyện và Lead" in said
    table = app.table[0].value
    said += " ".join([*table.columns, *table.iloc[:, 0]])
    app = AppTest.from_file(APP, default_timeout=60)
    app.query_params["page"] = "runs"
    app.run()
    app.segmented_control[0].set_value("vi").run()
    said += " ".join(app.dataframe[0].value.columns)
    left = set(re.findall(r"[a-z]+", " ".join(name for _, name in METRICS.values()).lower())) | {
        "better",
        "worse",
        "rows",
    }
    left -= {"f", "l", "lsum", "rouge", "bleu", "macro", "bm", "perplexity", "token", "loss", "byte", "recall"}
    assert not left & set(re.findall(r"\w+", said.lower().replace("\\", "")))


def test_all_runs_in_one_table(open_page, tmp_path, monkeypatch):
    """Numbers to sort by, not texts; two runs in detail; a link opens the page of one. No path of the server is shown."""
    same = {"test_perplexity": 12.5, "test_perplexity_ci95": [11.6, 13.3], "base_perplexity": 4149.0}
    names = [make_run(tmp_path / name, **same, scores=[1.0, 2.0, 3.0]) for name in ("long", "other")]
    names.append(make_run(tmp_path / "short", **same | {"test_perplexity": 100.5}, scores=[1.5, 2.5, 3.5]))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    (tmp_path / "damaged" / "all_results.json").write_text("[")
    monkeypatch.setenv("TASKBOOK_MODELS", " ".join([*names, str(tmp_path / "damaged")]))
    app = open_page("runs")
    frame = app.dataframe[0].value
    assert frame["Perplexity"].tolist() == [12.5, 12.5, 100.5] and frame["Training"].tolist() == [1.25] * 3
    assert frame["Model"].tolist() == ["long", "other", "short"]
    assert frame["Open"].tolist() == [f"?page=model&model={name}" for name in ("long", "other", "short")]
    assert "EM" not in frame, "a number that no run has"
    assert "12.5 (11.6 to 13.3); before 4,149" in " ".join(each.value for each in app.main.markdown).replace("\\", "")
    choice = labelled(app.multiselect, "curves_of")
    assert choice.value == ["long", "other", "short"] and not [
        s for s in app.subheader if s.value == TEXTS["two_runs"][0]
    ]
    choice.set_value(["long", "short"]).run()
    said = app.main.markdown[-1].value
    assert not app.exception and "paired test over 3 rows: short is better on 0%" in said
    assert not any(str(tmp_path) in str(each.value) for each in (*app.main.markdown, *app.main.caption))
    (tmp_path / "short" / "scores.json").write_text("[")
    app = open_page("runs")
    assert app.dataframe[0].value["Model"].tolist() == ["long", "other"] and len(app.warning) == 1
    assert "scores\\.json" in app.warning[0].value and str(tmp_path) not in app.warning[0].value.replace("\\", "")
    app = AppTest.from_file(APP, default_timeout=60)
    app.query_params["page"], app.query_params["model"] = "model", "other"
    app.run()
    assert app.sidebar.selectbox[0].value == names[1]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("![x](http://192.0.2.1/x.png)", "!\u2060[x](http://192.0.2.1/x.png)"),
        ("`![x](y)` $5 and $6", "`!\u2060[x](y)` \\$5 and \\$6"),
        ("```\n$a\n```\n$b", "```\n$a\n```\n\\$b"),
        (":red[x] :material/home: at 10:30", "\\:red[x] \\:material/home: at 10:30"),
    ],
)
def test_what_models_write(text, shown):
    assert as_markdown(text) == shown


@pytest.fixture(scope="module")
def address(tiny_served, tmp_path_factory):
    """The application as `make chat` starts it, with tiny models, one of which is a run with a hostile card."""
    card = "---\na: b\n---\n# Card\n![x](http://192.0.2.1/x.png) <img src='http://192.0.2.1/y.png'> <script>window.bad=1</script>"
    run = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(tiny_served["text-generation"], run)
    (run / "README.md").write_text(card)
    numbers = {"test_perplexity": 33.8, "test_perplexity_ci95": [29.8, 38.9], "base_perplexity": 52.7, "test_rows": 60}
    write_json(
        run / "all_results.json",
        numbers | {"baseline_perplexity": 2007.3, "train_minutes": 5.8, "line": "Did it help? Yes: <b>"},
    )
    assert plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], run / "loss.png")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    served = tiny_served | {"text-generation": run}
    environment = os.environ | {"TASKBOOK_MODELS": " ".join(map(str, served.values()))}
    command = [sys.executable, "-m", "streamlit", "run", APP, "--server.port", str(port), "--server.headless", "true"]
    log = tmp_path_factory.mktemp("app") / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(300):
            time.sleep(0.2)
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(url + "_stcore/health", timeout=5)
                break
            except OSError:
                continue
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def chromium():
    assert CHROMIUM, "Debian's Chromium is needed: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_a_person_at_the_page(address, chromium, tmp_path):
    """Chats, stops, regenerates, edits, saves, summarizes, asks a file, looks at a run; nothing is fetched from elsewhere, and a
    second person sees nothing."""
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(40_000)
    expect.set_options(timeout=40_000)
    elsewhere = []
    page.on("request", lambda r: elsewhere.append(r.url) if not re.match(f"{address}|data:|blob:", r.url) else None)

    def button(name):
        return page.get_by_role("button", name=name, exact=False)

    page.goto(address)
    page.get_by_text("Sampling").click()
    page.get_by_role("slider", name="Most new tokens").press("End")
    box = page.get_by_placeholder("Write a message")
    box.fill("My secret is ![x](http://192.0.2.1/z.png) <img src='http://192.0.2.1/w.png'>")
    box.press("Enter")
    for _ in range(3):  # beside a training a browser can be slower than a tiny model
        button("Stop").dispatch_event("click")  # a click would wait until the growing text stands still
        expect(page.get_by_text("stopped")).to_be_visible()
        expect(button("Regenerate")).to_be_visible()
        written = int(re.search(r"(\d+) tokens", page.get_by_test_id("stChatMessage").nth(1).inner_text())[1])
        if written < 1000:
            break
        button("Regenerate").click()
    assert written < 1000
    page.get_by_role("slider", name="Most new tokens").press("Home")  # 16 tokens
    button("Regenerate").click()
    expect(page.get_by_text("stopped")).to_have_count(0)
    expect(page.get_by_text("16 tokens")).to_be_visible()
    button("Edit").click()
    page.get_by_test_id("stForm").get_by_role("textbox").fill("Another one")
    page.get_by_test_id("stForm").get_by_role("button", name="Send").click()
    expect(page.get_by_test_id("stChatMessage")).to_have_count(2)
    expect(page.get_by_test_id("stChatMessage").first).to_contain_text("Another one")
    expect(button("Regenerate")).to_be_visible()
    with page.expect_download() as saving:
        button("Save as JSON").click()
    saving.value.save_as(tmp_path / "chat.jsonl")
    turns = json.loads((tmp_path / "chat.jsonl").read_text("utf8"))["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] and turns[0]["content"] == "Another one"

    other = chromium.new_context(locale="vi-VN").new_page()
    other.goto(address)
    expect(other.get_by_placeholder(TEXTS["say"][1])).to_be_visible(timeout=40_000)
    expect(other.get_by_test_id("stChatMessage")).to_have_count(0)

    tabs = page.get_by_test_id("stButtonGroup")
    tabs.get_by_text("Summarize").click()
    button("Summarize").last.click()
    expect(page.get_by_text("Summary", exact=True)).to_be_visible()
    tabs.get_by_text("Ask a text").click()
    expect(button("Find the answer")).to_be_visible()  # until then the box and the uploader are those of the other tab
    (tmp_path / "note.md").write_text("The shop opens at nine.")
    button("Open a file").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "note.md")
    expect(page.get_by_label("Text", exact=True)).to_have_value("The shop opens at nine.")
    page.keyboard.press("Escape")
    button("Find the answer").click()
    expect(page.get_by_text("Confidence")).to_be_visible()
    tabs.get_by_text("Model").click()
    for text in ("2,007", "33.8 (29.8 to 38.9)", "52.7", "5.8 min", "<b>"):  # words in the document, drawn on no canvas
        expect(page.get_by_test_id("stMain").get_by_text(text)).to_be_visible()
    loss = page.get_by_test_id("stImage").locator("img")
    expect(loss).to_be_visible()
    assert loss.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    page.get_by_text("Card", exact=True).first.click()
    expect(page.get_by_role("heading", name="Card")).to_be_visible()
    assert page.evaluate("window.bad") is None
    assert page.locator("img[src*='192.0.2.1']").count() == 0 and not elsewhere, elsewhere
    page.set_viewport_size({"width": 390, "height": 844})
    for name in PAGES:
        page.goto(f"{address}?page={name}")
        expect(page.get_by_test_id("stAppViewContainer")).to_be_visible()
        page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 390, f"{name} is wider than a phone"
