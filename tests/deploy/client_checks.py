"""The API through litellm and through a chat page of Gradio in Chromium: `make test-clients`, in an environment of their own, for
their pins clash with ours (so that the tests of CI do without it). The server is the real one, of .venv, with packaged models."""

import http.server
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

# Neither of them asks anything outside this machine
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}

import gradio
import litellm
import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[2]
CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
CHAT, ENCODER = "pypi:smollm2-135m-instruct", "pypi:minilm-l6"
FIRST, SECOND = "What is the capital of France?", "And of Spain?"
SAID = [{"role": "user", "content": FIRST}]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The server's base URL; it lets two requests in at once."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [ROOT / ".venv" / "bin" / "python", "-m", "deploy.api", "--port", str(port)]
    command += ["--model", CHAT, "--model", ENCODER]
    log = tmp_path_factory.mktemp("api") / "log"
    with log.open("w") as output:
        environment = os.environ | {"TASKBOOK_LIMIT_ADMITTED": "2"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            time.sleep(0.5)
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5)
                break
            except OSError:
                continue
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def ask(url):
    return {"model": f"openai/{CHAT}", "api_base": url, "api_key": "none", "temperature": 0, "max_retries": 0}


def test_litellm_chats(ask):
    ask |= {"max_tokens": 8}
    whole = litellm.completion(messages=SAID, **ask)
    reply = whole.choices[0].message
    assert "Paris" in reply.content and whole.usage.completion_tokens == 7 and whole.choices[0].finish_reason == "stop"
    chunks = litellm.completion(messages=SAID, stream=True, **ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == reply.content
    again = litellm.completion(messages=[*SAID, reply, {"role": "user", "content": SECOND}], **ask)  # its own message
    assert "Spain" in again.choices[0].message.content and again.usage.prompt_tokens > whole.usage.total_tokens
    assert litellm.responses(input=FIRST, **ask).output_text == reply.content


def test_litellm_completes_and_embeds(ask, url):
    ask |= {"max_tokens": 8, "prompt": "The capital of France is"}
    whole = litellm.text_completion(**ask).choices[0].text
    assert "Paris" in whole
    for provider in ("openai", "text-completion-openai"):
        chunks = litellm.text_completion(**ask | {"model": f"{provider}/{CHAT}", "stream": True})
        assert "".join(chunk.choices[0].text or "" for chunk in chunks) == whole
    texts = ["A cat sleeps.", "The cat is asleep.", "Interest rates rose."]
    found = litellm.embedding(input=texts, model=f"openai/{ENCODER}", api_base=url, api_key="none").data
    cat, same, other = (each["embedding"] for each in found)
    assert sum(map(float.__mul__, cat, same)) > sum(map(float.__mul__, cat, other)) + 0.3


def test_what_litellm_says_of_errors(ask):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for field, value in (("tools", [tool]), ("frequency_penalty", 0.5), ("response_format", {"type": "json_object"})):
        with pytest.raises(
            litellm.BadRequestError, match=f"{field}: not offered by this server; leave it out"
        ) as error:
            litellm.completion(messages=SAID, **ask | {field: value})
        assert error.value.status_code == 422
    with pytest.raises(litellm.NotFoundError, match="no model 'other' here"):
        litellm.completion(messages=SAID, **ask | {"model": "openai/other"})
    story = [{"role": "user", "content": "Tell me a long story about a river."}]
    running = [litellm.completion(messages=story, stream=True, **ask | {"max_tokens": 100}) for _ in range(2)]
    with pytest.raises(litellm.ServiceUnavailableError, match="2 requests are being served, which is the limit"):
        litellm.completion(messages=SAID, **ask)
    texts = ["".join(chunk.choices[0].delta.content or "" for chunk in chunks) for chunks in running]
    assert texts[0] == texts[1] and len(texts[0]) > 100


class Greedy(http.server.BaseHTTPRequestHandler):
    """Passes a chat on with temperature 0, which Gradio cannot say, and keeps what came."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        request = urllib.request.Request(
            self.server.url + self.path.removeprefix("/v1"), json.dumps(body | {"temperature": 0}).encode()
        )
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.end_headers()
        while piece := answer.read1():
            self.wfile.write(piece)


def test_a_person_chats_through_a_page_of_gradio(ask, url):
    assert CHROMIUM, "Debian's Chromium is needed: apt-get install chromium"
    greedy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Greedy)
    greedy.bodies, greedy.url = [], url
    threading.Thread(target=greedy.serve_forever, daemon=True).start()
    chat = gradio.load_chat(f"http://127.0.0.1:{greedy.server_port}/v1", model=CHAT, token="none")
    address = chat.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)[1]
    try:
        with sync_playwright() as playwright:
            page = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
            page.goto(address)
            turns = []
            for number, text in enumerate((FIRST, SECOND), 1):
                turns.append({"role": "user", "content": text})
                reply = litellm.completion(messages=turns, **ask).choices[0].message.content
                turns.append({"role": "assistant", "content": reply})
                box = page.get_by_role("textbox").last
                box.fill(text)
                box.press("Enter")
                expect(page.get_by_test_id("bot")).to_have_count(number, timeout=60_000)
                expect(page.get_by_test_id("bot").last).to_have_text(reply, timeout=60_000)
                assert greedy.bodies[-1]["stream"] and len(greedy.bodies[-1]["messages"]) == 2 * number - 1
    finally:
        chat.close()
        greedy.shutdown()
