"""deploy/api.py over real connections: OpenAI's client, limits, deadlines, clients that leave, keys, SIGTERM."""

import asyncio
import base64
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest
import schemathesis
import torch
import uvicorn
from checkout import ROOT
from hypothesis import HealthCheck, given, settings, strategies
from schemathesis import GenerationMode
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertTokenizerFast,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from deploy import inference
from deploy.admission import AdmissionMiddleware, Limits
from deploy.api import Service, create_app, main
from deploy.generation import Sampling
from shared import UserError
from shared.data.encoding import TooLong

CHAT = [{"role": "user", "content": "Tell me a story."}]


class Server:
    """The application on a free port of 127.0.0.1, in a thread."""

    def __init__(self, names, **options):
        self.app = create_app([str(name) for name in names], **options)
        self.service = self.app.state.service
        self._uvicorn = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="warning", http="h11"))
        self._thread = threading.Thread(target=self._uvicorn.run)

    def __enter__(self):
        self._thread.start()
        wait_for(lambda: self.service.ready or self.service.error, 60)
        assert self.service.error is None
        self.port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        return self

    def __exit__(self, *_):
        self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def counted(self, name, **labels):
        return self.service.registry.get_sample_value(name, labels) or 0

    def outcomes(self, route="/v1/chat/completions"):
        return {
            o: self.counted("taskbook_done_total", route=route, outcome=o) for o in ("finished", "failed", "cancelled")
        }


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def server(tiny, tiny_served, mill):
    names, limits = [tiny / "gpt2", *tiny_served.values()], Limits(admitted=4, running=2, body=100_000)
    with Server(names, limits=limits, documents=(str(mill),)) as running:
        yield running


def generated(server):
    """Counts the forwards of the chat model, in the returned list's only entry."""
    model, count = server.service.engines["llama"].model, [0]
    runner, start = model._runner, model._runner.start

    def counting(*args):
        decoding = start(*args)
        feed = decoding.feed

        def feed_counted(tokens):
            count[0] += 1
            return feed(tokens)

        decoding.feed = feed_counted
        return decoding

    runner.start = counting
    return count, lambda: setattr(runner, "start", start)


def test_the_official_client_chats(server):
    client = server.client
    assert {"llama", "gpt2", "answers", "summaries"} < {model.id for model in client.models.list()}
    ask = {"model": "llama", "messages": CHAT, "max_tokens": 12, "seed": 7, "temperature": 1.0}
    whole = client.chat.completions.create(**ask)
    usage = whole.usage
    prompt = len(server.service.engines["llama"]._text.encode_chat(CHAT))
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 12, prompt + 12)
    assert whole.choices[0].finish_reason == "length" and whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert streamed == whole.choices[0].message.content and streamed
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage == usage
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[1].choices[0].delta.role is None
    other = client.chat.completions.create(**ask | {"seed": 8})
    assert other.choices[0].message.content != streamed
    stop = streamed[len(streamed) // 2 :][:3]
    stopped = client.chat.completions.create(**ask, stop=[stop, "never"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == streamed[: streamed.find(stop)]
    assert stopped.usage.completion_tokens < 12
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story."}]
    in_parts, in_lines = (
        client.chat.completions.create(**ask | {"messages": [{"role": "user", "content": content}]})
        for content in (parts, "Tell me\na story.")
    )
    assert in_parts.choices[0].message.content == in_lines.choices[0].message.content
    several = client.chat.completions.create(**ask, n=3)
    texts = [choice.message.content for choice in several.choices]
    assert texts[0] == streamed and len(set(texts)) == 3 and several.usage.completion_tokens == 36


def test_letters_written_apart_from_their_accents_are_the_tokens_that_were_learnt(server):
    """A keyboard or macOS may write `e` and its accent apart; what is learnt from is composed (shared/data/cleaning.py)."""
    written = "Thủ đô của nước\nnào là Hà Nội?"
    apart = unicodedata.normalize("NFD", written).replace("\n", "\r\n")
    ask = {"model": "llama", "max_tokens": 1, "temperature": 0}
    chat, complete = server.client.chat.completions, server.client.completions
    counts = [
        chat.create(**ask, messages=[{"role": "user", "content": text}]).usage.prompt_tokens
        for text in (written, apart)
    ]
    counts += [complete.create(**ask, prompt=text).usage.prompt_tokens for text in (written, apart)]
    plain = server.service.engines["llama"]._text
    assert counts[0] == counts[1] and counts[2] == counts[3] == len(plain.encode(written)) != len(plain.encode(apart))


def test_a_stop_text_written_apart_from_its_accents_is_found(tiny):
    engine = inference.Engine(str(tiny / "llama"))
    engine.model.batch = lambda: Dictated(engine._text.encode("Xin chào bạn"))
    for form, word in (("NFD", "chào"), ("NFC", "chào"), ("NFD", "bạn"), ("NFD", "không")):
        sampling = Sampling(max_tokens=20, stop=(unicodedata.normalize(form, word),))
        pieces = list(inference.stream(lambda emit, s=sampling: engine.complete(["A"], s, emit)))
        assert "".join(piece.text for piece in pieces[:-1]) == "Xin chào bạn".partition(word)[0]


def test_an_answer_is_the_same_in_letters_apart_from_their_accents(tmp_path):
    """Of a tokenizer that keeps accents, as multilingual BERT's; its place is that in the text as it came."""
    context = "Phiên chợ nổi họp từ lúc trời còn tối.\nBà Hạnh bán bún ở đầu chợ, gần cây cầu gỗ cũ."
    question = "Ai bán bún ở đầu chợ?"
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    tokenizer.train_from_iterator([context, question], trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    kept = {"do_lower_case": False, "strip_accents": False}
    BertTokenizerFast(tokenizer_object=tokenizer, **kept).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForQuestionAnswering(BertConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    engine = inference.Engine(str(tmp_path))
    for begin in range(0, 60, 10):
        found = []
        for form, newline in (("NFC", "\n"), ("NFD", "\n"), ("NFD", "\r\n")):
            asked, text = (unicodedata.normalize(form, each) for each in (question, context[begin:]))
            text = text.replace("\n", newline)
            found += inference.stream(lambda emit, q=asked, c=text: engine.answer(q, c, emit))
            assert text[found[-1]["start"] : found[-1]["end"]] == found[-1]["answer"] != ""
        numbered = inference.stream(lambda emit, q=asked, c=text: engine.answer_from(q, [c], emit))
        assert next(numbered) == found[-1] | {"number": 1}
        assert len({inference.as_learnt(each["answer"]) for each in found}) == len({e["score"] for e in found}) == 1


def test_a_continuation_keeps_the_blank_before_its_first_word(tiny, tmp_path):
    """Llama 2's decoder drops the first blank of a text; what is continued is no beginning. Characters go on in bytes."""
    specials = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = {piece: i for i, piece in enumerate([*specials, *"▁aelnorstw", "▁s", "▁so", "▁son", "▁now", "no"])}
    tokenizer = Tokenizer(models.BPE(words, [("▁", "s"), ("▁s", "o"), ("▁so", "n"), ("n", "o")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    undone = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(undone)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tiny / "llama", vocab_size=len(words), eos_token_id=1, bos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    engine = inference.Engine(str(tmp_path))
    for prompt, written, wanted in (
        ("so", ["▁now", "▁", "no"], " now no"),
        ("so " * 20, ["no"], "no"),
        ("ဗမာ" * 20, ["▁now", "▁now"], " now now"),  # bytes, three a character
        ([words["<0xC3>"]], ["<0xA9>", "▁now"], "é now"),  # half of a character
        ("so", ["<0x0A>", "<0xF0>", "▁now", "▁now"], "\n\ufffd now now"),  # a line break is a byte, too
    ):
        engine.model.batch = lambda written=written: Dictated([words[piece] for piece in written])
        sampling = Sampling(max_tokens=len(written))
        pieces = list(inference.stream(lambda emit, p=prompt, s=sampling: engine.complete([p], s, emit)))
        assert "".join(piece.text for piece in pieces[:-1]) == wanted


class Dictated:
    """In the place of a model's batch: each row gets these tokens."""

    def __init__(self, tokens):
        self.tokens, self.rows = tokens, []

    def add(self, rows):
        self.rows += rows

    def tokens_read(self, prompts):
        return 1

    def step(self):
        for row in self.rows:
            for token in self.tokens:
                if row.left():
                    break
                row.written.append(token)
                row.on_token(token)
        ended, self.rows = self.rows, []
        return ended


def test_the_official_client_completes(server):
    ask = {"model": "gpt2", "prompt": "Once upon", "max_tokens": 8, "temperature": 0}
    whole = server.client.completions.create(**ask)
    streamed = "".join(chunk.choices[0].text for chunk in server.client.completions.create(**ask, stream=True))
    assert whole.choices[0].text == streamed and whole.usage.completion_tokens == 8


def test_the_official_client_gets_responses(server):
    """A text or a conversation, whole or as events; the output can be sent back; it says what chat says."""
    create = server.client.responses.create
    ask = {"model": "llama", "max_output_tokens": 12, "temperature": 1.0, "extra_body": {"seed": 7}}
    whole = create(input=CHAT[0]["content"], **ask)
    chat = server.client.chat.completions.create(model="llama", messages=CHAT, max_tokens=12, temperature=1.0, seed=7)
    assert whole.output_text == chat.choices[0].message.content and whole.output_text
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    events = list(create(input=CHAT, stream=True, **ask))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events if event.type != "response.output_text.delta"]
    added, done = ["output_item.added", "content_part.added"], ["output_text.done", "content_part.done"]
    assert kinds == ["created", "in_progress", *added, *done, "output_item.done", "incomplete"]
    assert "".join(event.delta for event in events if event.type.endswith("delta")) == whole.output_text
    assert events[-1].response.output_text == events[-4].text == whole.output_text
    assert events[-1].response.usage == whole.usage and events[0].response.id == events[-1].response.id
    with server.client.responses.stream(input=CHAT, **ask) as stream:  # the client's own reading of the events
        assert [e.snapshot for e in stream if e.type == "response.output_text.delta"][-1] == whole.output_text
    said = [*CHAT, *(each.model_dump() for each in whole.output), {"role": "user", "content": "And?"}]
    again = create(input=said, instructions="Be kind.", **ask)
    turns = [{"role": "system", "content": "Be kind."}, CHAT[0]]
    turns += [{"role": "assistant", "content": whole.output_text}, {"role": "user", "content": "And?"}]
    assert again.usage.input_tokens == len(server.service.engines["llama"]._text.encode_chat(turns))
    stop = server.service.engines["llama"].model
    known, stop.stop_ids = stop.stop_ids, tuple(range(stop.config.vocab_size))
    try:
        ended = create(input="Hi", **ask)
    finally:
        stop.stop_ids = known
    assert (ended.status, ended.incomplete_details, ended.output_text) == ("completed", None, "")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tools": [{"type": "web_search"}]}, "tools: "),
        ({"previous_response_id": "resp_1"}, "previous_response_id: "),
        ({"text": {"format": {"type": "json_object"}}}, "text.format: "),
        ({"background": True}, "background: "),
        ({"reasoning": {"effort": "high"}}, "reasoning: "),
        ({"include": ["message.output_text.logprobs"]}, "include: "),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input."),
        ({"input": ""}, "input."),
        ({"truncation": "auto"}, "truncation: "),
    ],
)
def test_what_responses_refuse(server, change, says):
    for stream in (False, True):
        answer = server.http.post("/v1/responses", json={"model": "llama", "input": "Hi", "stream": stream} | change)
        assert answer.status_code == 422 and says in answer.json()["error"]["message"], answer.text


def computed_together(server, model, method, route, bodies):
    """The answers to requests sent at once; asserts that the model was called fewer times than there are requests."""
    calls, original = [], getattr(model, method)

    def slow(texts, *more, **options):
        calls.append(len(texts))
        time.sleep(0.2)
        return original(texts, *more, **options)

    setattr(model, method, slow)
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(lambda body: server.http.post(route, json=body).json(), bodies))
    setattr(model, method, original)
    assert sum(calls) == len(bodies) and len(calls) < len(bodies), calls
    return found


def test_answers_summaries_and_blanks(server, tiny_bert):
    """The routes give what the model itself gives; what waits together is computed together, and alone it is the same."""
    post = server.http.post
    answers = server.service.engines["answers"].model
    texts = [f"The colour of house {i} is green, and [SEP] that of the door is red." for i in range(3)]
    found = [
        post("/answer", json={"model": "answers", "question": "What is green?", "context": text}).json()
        for text in texts
    ]
    for text, answer in zip(texts, found, strict=True):
        assert answer["answer"] == text[answer["start"] : answer["end"]] and 0 <= answer["confidence"] <= 1
    asked = [{"model": "answers", "question": "What is green?", "context": texts[i % 3]} for i in range(4)]
    together = computed_together(server, answers, "answer", "/answer", asked)
    assert [answer["answer"] for answer in together] == [found[i % 3]["answer"] for i in range(4)]
    blanks = [{"model": tiny_bert.name, "text": f"House {i} is [MASK]."} for i in range(4)]
    alone = [post("/fill-mask", json=body).json()["words"] for body in blanks]
    together = computed_together(server, server.service.engines[tiny_bert.name].model, "fill", "/fill-mask", blanks)
    assert [[w["token"] for w in each["words"]] for each in together] == [[w["token"] for w in ws] for ws in alone]
    summary = post("/summarize", json={"model": "summaries", "text": texts[0], "max_tokens": 5}).json()["summary"]
    assert summary == server.service.engines["summaries"].model.summarize([texts[0]], max_new_tokens=5)[0]
    too_long = post("/summarize", json={"model": "summaries", "text": "word " * 600})
    assert too_long.status_code == 400 and "602 tokens" in too_long.json()["error"]["message"]
    lengths = [{"model": "summaries", "text": "red", "max_tokens": most} for most in (512, 513)]  # of 512 positions
    found = [post("/summarize", json=body) for body in lengths]
    assert [each.status_code for each in found] == [200, 400], found
    assert "513 tokens" in found[1].json()["error"]["message"] and "at most 512" in found[1].json()["error"]["message"]
    with pytest.raises(TooLong, match="at most 512"):
        server.service.engines["summaries"].model.summarize(["red"], max_new_tokens=513)
    words = post("/fill-mask", json={"model": tiny_bert.name, "text": "A [MASK] </s> [SEP] day.", "top_k": 3}).json()[
        "words"
    ]
    assert len(words) == 3 and words[0]["score"] >= words[1]["score"] > 0
    none = post("/fill-mask", json={"model": tiny_bert.name, "text": "No blank."})
    assert none.status_code == 400 and "[MASK]" in none.json()["error"]["message"]
    asked = [f"{'word ' * n}who?" for n in (250, 251, 254)]  # of a window of 384, 128 shared, 3 special tokens
    found = [post("/answer", json={"model": "answers", "question": each, "context": texts[0]}) for each in asked]
    assert [each.status_code for each in found] == [200, 400, 400]
    error = found[1].json()["error"]
    assert "253 tokens" in error["message"] and "at most 252" in error["message"] and "\n" not in error["message"]
    assert error["code"] == "context_length_exceeded"
    wrong = post("/answer", json={"model": "llama", "question": "What?", "context": "That."})
    assert wrong.status_code == 400 and "text-generation" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    "change, status, says",
    [
        ({"model": "../../etc"}, 404, "no model '../../etc'"),
        ({"model": None}, 404, "/v1/models"),
        ({"model": "gpt2"}, 400, "no chat template"),
        ({"temperature": -1}, 422, "temperature"),
        ({"top_p": 0}, 422, "top_p"),
        ({"n": 5}, 422, "n:"),
        ({"logprobs": True}, 422, "logprobs"),
        ({"tools": [{"type": "function"}]}, 422, "tools: not offered by this server; leave it out"),
        ({"response_format": {"type": "json_object"}}, 422, "response_format: "),
        ({"nonsense": 1}, 422, "nonsense: not known to this server; leave it out"),
        ({"messages": [CHAT[0] | {"name": "Bo"}]}, 422, "messages.0.name: not known to this server; leave it out"),
        ({"logprobs": 0}, 422, "logprobs: not offered"),  # of completions: the probability of each token
        ({"stop": ["a"] * 5}, 422, "stop"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 422, "messages.0.role"),
        ({"max_tokens": 3000}, 400, "3,000 more are wanted; "),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "tokens"),
    ],
)
def test_what_is_refused_says_why(server, change, status, says):
    body = {"model": "llama", "messages": CHAT, "max_tokens": 4} | change
    for stream in (False, True):
        answer = server.http.post("/v1/chat/completions", json=body | {"stream": stream})
        error = answer.json()["error"]
        assert answer.status_code == status and says in error["message"], answer.text
    wait_for(lambda: server.service.admitted == 0)


def test_a_body_that_is_too_large(server, caplog):
    """By what is announced, or, sent in chunks, by what has come. Bare sockets: the answer comes before the body's end."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    for rest in ("Content-Length: 100001\r\n\r\n", f"Transfer-Encoding: chunked\r\n\r\n186a1\r\n{'x' * 100_001}"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall((head + rest).encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    long = server.http.post("/v1/chat/completions", content=b"x" * 100_001)
    assert long.status_code == 413 and "100,000 bytes" in long.json()["error"]["message"]
    wait_for(lambda: server.service.admitted == 0)
    assert "RuntimeError" not in caplog.text


def test_full_is_503_and_leaving_frees_the_slot(server, caplog):
    """Four are admitted, of which two compute; the rest is sent away; those who leave make room."""
    caplog.set_level("INFO", "uvicorn.access")
    logging.getLogger("uvicorn.access").addHandler(caplog.handler)
    count, restore = generated(server)
    before, accepted = server.outcomes(), server.counted("taskbook_accepted_total", route="/v1/chat/completions")
    long = {"model": "llama", "messages": CHAT, "max_tokens": 2000, "temperature": 0}
    with contextlib.ExitStack() as open_streams, ThreadPoolExecutor(2) as pool:
        streams = [
            open_streams.enter_context(server.http.stream("POST", "/v1/chat/completions", json=long | {"stream": True}))
            for _ in range(2)
        ]
        sockets = []  # two more that wait, not streaming
        for _ in range(2):
            connection = socket.create_connection(("127.0.0.1", server.port))
            body = json.dumps(long).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            sockets.append(connection)
        wait_for(lambda: server.service.admitted == 4)
        refused = server.http.post("/v1/chat/completions", json=long)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert "4 requests are being served" in refused.json()["error"]["message"]
        assert server.http.get("/readyz").status_code == 200
        logging.getLogger("uvicorn.access").removeHandler(caplog.handler)
        assert '"GET /readyz HTTP/1.1" 200' in caplog.text
        assert " 503" not in caplog.text, "a flood is counted, not logged"
        sockets[0].close()  # while it waits: it never starts
        wait_for(lambda: server.service.admitted == 3)
        quick = pool.submit(server.http.post, "/v1/chat/completions", json=long | {"max_tokens": 2})
        wait_for(lambda: server.service.admitted == 4)
        lines = streams[0].iter_lines()
        [next(lines) for _ in range(6)]
        streams[0].close()  # while it streams
        wait_for(lambda: server.service.admitted <= 3)
        sockets[1].close()  # computing by now, or about to
        assert quick.result().status_code == 200, "the freed slot served the one that waited"
        streams[1].close()
    wait_for(lambda: server.service.admitted == 0)
    time.sleep(0.05)
    stopped_at = count[0]
    time.sleep(0.2)
    restore()
    assert count[0] == stopped_at < 4000, "nobody waits any more, and nothing is generated"
    wait_for(lambda: server.service.admitted == 0)
    after = server.outcomes()
    changed = {outcome: after[outcome] - before[outcome] for outcome in after}
    assert changed == {"finished": 1, "failed": 0, "cancelled": 4}
    assert server.counted("taskbook_accepted_total", route="/v1/chat/completions") - accepted == 5
    assert server.counted("taskbook_refused_total", route="/v1/chat/completions") >= 1


def test_a_refusal_does_not_wait_for_work():
    """Of 200 requests at one instant three are admitted, and each refusal is on its way before the first of them begins."""
    happened = []

    async def work(scope, receive, send):
        happened.append("work")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return {"type": "http.request", "body": b"{}"}

    async def send(message):
        if "status" in message:
            happened.append(message["status"])

    async def burst():
        door = AdmissionMiddleware(work, Service([], Limits(admitted=3)), None)
        scope = {"type": "http", "method": "POST", "path": "/answer", "server": ("127.0.0.1", 80)}
        scope["headers"] = [(b"host", b"localhost")]
        await asyncio.gather(*(door(scope, receive, send) for _ in range(200)))

    asyncio.run(burst())
    assert happened == [503] * 197 + ["work", 200] * 3


def test_generation_stops_within_two_tokens(server):
    """From the moment at which the connection closes; the model is slowed down so that tokens can be counted."""
    count, restore = generated(server)
    model = server.service.engines["llama"].model
    start = model._runner.start

    def slow(*args):
        decoding = start(*args)
        feed = decoding.feed
        decoding.feed = lambda tokens: (time.sleep(0.05), feed(tokens))
        return decoding

    model._runner.start = slow
    long = {"model": "llama", "messages": CHAT, "max_tokens": 200, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=long) as stream:
        next(stream.iter_lines())
    at = count[0]
    wait_for(lambda: server.service.admitted == 0)
    time.sleep(0.3)
    restore()
    assert count[0] - at <= 2


def test_fields_that_ask_for_nothing(server):
    """Each gives the reply that there is without it; a stop text may have any length."""
    ask = {"model": "llama", "messages": CHAT, "max_tokens": 6, "seed": 1}

    def reply(**more):
        answer = server.http.post("/v1/chat/completions", json=ask | more)
        assert answer.status_code == 200, (more, answer.text)
        return answer.json()["choices"][0]["message"]["content"]

    plain = reply()
    nothing = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": True,
        "metadata": {"a": "b"},
    }
    nothing |= {"service_tier": "auto", "parallel_tool_calls": True, "logit_bias": {}, "stop": "never that long"}
    nothing |= {"stream_options": {"include_obfuscation": False}}
    assert reply(**nothing) == plain
    assert reply(**dict.fromkeys([*nothing, "temperature", "top_p", "n", "stream", "user", "logprobs"])) == plain
    assert reply(stop="") == reply(stop=[]) == plain
    said = [*CHAT, {"role": "assistant", "content": None}, {"role": "user", "content": "And?"}]
    as_gradio = [turn | {"metadata": None, "options": None} for turn in said]
    assert reply(messages=as_gradio) == reply(messages=said)
    developer, system = ([{"role": role, "content": "Be kind."}, *CHAT] for role in ("developer", "system"))
    assert reply(messages=developer) == reply(messages=system)


def test_several_prompts_texts_or_ids(server):
    """Each prompt of a list gets the reply that it gets alone."""
    model = server.service.engines["gpt2"]
    ask = {"model": "gpt2", "max_tokens": 5, "temperature": 0}
    texts, ids = ["Once upon", "A long time ago, there was"], model._text.encode("Once upon")
    alone = [server.client.completions.create(**ask, prompt=text).choices[0].text for text in texts]
    together = server.client.completions.create(**ask, prompt=texts, n=2)
    assert [c.text for c in together.choices] == [alone[0]] * 2 + [alone[1]] * 2
    assert [c.index for c in together.choices] == [0, 1, 2, 3] and together.usage.completion_tokens == 20
    assert server.client.completions.create(**ask, prompt=ids).choices[0].text == alone[0]
    assert server.client.completions.create(**ask, prompt=[ids]).choices[0].text == alone[0]
    wrong = server.http.post("/v1/completions", json=ask | {"prompt": [60000]})
    assert wrong.status_code == 400 and "50,257" in wrong.json()["error"]["message"]


def test_embeddings_labels_and_one_model(server, tiny_bert):
    """OpenAI's client gets vectors that are the mean of the encoder's states; labels are those of transformers' pipeline."""
    import torch
    from transformers import AutoModel, AutoTokenizer, pipeline

    texts = ["A short text.", "Another, which is a little longer."]
    given = server.client.embeddings.create(model=tiny_bert.name, input=texts)  # base64, and decoded by the client
    tokenizer, encoder = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert)
    for text, each in zip(texts, given.data, strict=True):
        with torch.no_grad():
            mean = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert torch.allclose(torch.tensor(each.embedding), mean / mean.norm(), atol=1e-5)
    assert given.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    floats = server.http.post("/v1/embeddings", json={"model": tiny_bert.name, "input": texts[0]}).json()
    assert floats["data"][0]["embedding"] == pytest.approx(given.data[0].embedding, abs=1e-6)
    ids = server.http.post("/v1/embeddings", json={"model": tiny_bert.name, "input": [1, 2]})
    assert ids.status_code == 422, "ids of another tokenizer would mislead"
    folder = server.service.engines["labels"].folder
    expected = pipeline("text-classification", model=str(folder), top_k=2)(texts[:1])[0]
    found = server.http.post("/classify", json={"model": "labels", "text": texts[0], "top_k": 2}).json()["labels"]
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-4)
    assert server.client.models.retrieve("labels").id == "labels"
    assert server.http.get("/v1/models/nowhere").status_code == 404


def test_embeddings_are_those_of_sentence_transformers_or_refused(tiny_bert, tmp_path):
    from sentence_transformers import SentenceTransformer

    from shared.retrieval.encoder import SETTINGS, save_settings

    folder = shutil.copytree(tiny_bert, tmp_path / "secret" / "encoder")
    save_settings(folder, SETTINGS | {"pooling": "cls"}, 32)
    engine, texts = inference.Engine(str(folder)), ["A short text.", "Another, which is a little longer."]
    (found,) = inference.stream(lambda emit: engine.embed(texts, emit))
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert abs(found["vectors"] - expected).max() < 1e-5
    about = json.loads((folder / "config_sentence_transformers.json").read_text())
    about |= {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(about))
    engine = inference.Engine(str(folder))
    (begun,) = inference.stream(lambda emit: engine.embed(texts, emit))
    again = SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert abs(begun["vectors"] - again).max() < 1e-5 < abs(again - expected).max()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    engine = inference.Engine(str(folder))  # as it was when it was loaded, like its weights
    with pytest.raises(UserError, match="^encoder: its vectors are made of the tokens by lasttoken"):
        next(inference.stream(lambda emit: engine.embed(texts, emit)))


def test_what_holds_no_token_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny / "llama", tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    engine = inference.Engine(str(folder))
    with pytest.raises(UserError, match="there are no tokens for model"):
        engine.chat([{"role": "user", "content": ""}], Sampling(), print)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2)
    GPT2Model(config).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(tiny / "gpt2").save_pretrained(tmp_path / "encoder")
    engine = inference.Engine(str(tmp_path / "encoder"))
    with pytest.raises(UserError, match="there are no tokens for encoder"):
        engine.embed(["A text.", ""], print)


def test_two_models_of_one_name_are_refused(tiny):
    service = Service([str(tiny / "llama"), f"{tiny}/../{tiny.name}/llama"], Limits())
    with pytest.raises(UserError, match="two models are named 'llama'"):
        service.load()


def test_deadlines(tiny):
    limits = Limits(admitted=8, running=1, queue_seconds=0.3, total_seconds=1)
    with Server([tiny / "llama"], limits=limits) as server, ThreadPoolExecutor(2) as pool:
        long = {"messages": CHAT, "max_tokens": 2000}  # one model: it need not be named
        first = pool.submit(server.http.post, "/v1/chat/completions", json=long)
        wait_for(lambda: server.service.admitted == 1)
        time.sleep(0.05)
        second = server.http.post("/v1/chat/completions", json=long)
        assert second.status_code == 504 and "no model was free" in second.json()["error"]["message"]
        assert first.result().status_code == 504 and "longer than" in first.result().json()["error"]["message"]
        with server.http.stream("POST", "/v1/chat/completions", json=long | {"stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert stream.status_code == 200 and "longer than" in json.loads(lines[-1][6:])["error"]["message"]
        wait_for(lambda: server.service.admitted == 0)
        assert server.outcomes() == {"finished": 0, "failed": 3, "cancelled": 0}


def test_a_defect_is_500_and_quotes_nothing(server, caplog):
    runner = server.service.engines["gpt2"].model._runner
    original = runner.start
    runner.start = lambda rows, pad, most: 1 / 0 if most == 3 else original(rows, pad, most)
    try:
        body = {"model": "gpt2", "prompt": "my secret", "max_tokens": 3}
        for stream in (False, True):
            answer = server.http.post("/v1/completions", json=body | {"stream": stream})
            assert answer.status_code == 500 and answer.json()["error"]["message"] == "the server failed."
    finally:
        runner.start = original
    assert server.http.post("/v1/completions", json=body).status_code == 200, "its thread lives on"
    assert "ZeroDivisionError" in caplog.text and "secret" not in caplog.text


def test_key_and_origins(tiny):
    with Server([tiny / "llama"], key="k" * 40, origins=("https://page.example",)) as server:
        chat = {"messages": CHAT, "max_tokens": 1}
        wrong = base64.b64encode(b"me:wrong").decode()
        tried = ("Bearer wrong", "Bearer ü".encode("latin1"), f"Basic {wrong}", "Basic !", "k" * 40)
        for headers in ({}, *({"Authorization": each} for each in tried)):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/docs", "/nowhere"):
                assert server.http.get(path, headers=headers).status_code == 401, path
            assert server.http.post("/v1/chat/completions", json=chat, headers=headers).status_code == 401
        assert server.http.get("/livez").status_code == server.http.get("/readyz").status_code == 200
        browser = {"Authorization": "Basic " + base64.b64encode(b"me:" + b"k" * 40).decode()}
        assert server.http.get("/docs").headers["www-authenticate"].startswith("Basic ")
        for path, status in (("/docs", 200), ("/openapi.json", 200), ("/v1/models", 401)):
            assert server.http.get(path, headers=browser).status_code == status, "a browser sends it unasked"
        assert server.http.get("/v1/models", headers={"Authorization": "bearer " + "k" * 40}).status_code == 200
        right = {"Authorization": "Bearer " + "k" * 40}
        assert server.http.post("/v1/chat/completions", json=chat, headers=right).status_code == 200
        wait_for(lambda: server.service.admitted == 0)
        text = server.http.get("/metrics", headers=right).text
        assert 'taskbook_done_total{outcome="finished",route="/v1/chat/completions"} 1.0' in text
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = [
            server.http.options("/v1/models", headers=ask | {"Origin": origin}).headers.get(
                "access-control-allow-origin"
            )
            for origin in ("https://page.example", "https://evil.example")
        ]
        assert allowed == ["https://page.example", None]
        refused = server.http.get("/v1/models", headers={"Origin": "https://page.example"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://page.example"


def test_without_a_key_only_this_machine_is_answered(server):
    for host in (
        "evil.example",
        "[",
        "",
        "192.0.2.1",
        "localhost.evil.example",
        "evil.example@localhost",
    ):  # a foreign page whose name leads here
        answer = server.http.get("/v1/models", headers={"Host": host})
        assert answer.status_code == 403 and "TASKBOOK_API_KEY" in answer.json()["error"]["message"]
    for host in ("localhost:1", "127.0.0.1", "[::1]", f"[::1]:{server.port}"):
        assert server.http.get("/v1/models", headers={"Host": host}).status_code == 200
    assert (
        "access-control-allow-origin" not in server.http.get("/livez", headers={"Origin": "https://x.example"}).headers
    )


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_fuzzed_requests_are_never_a_defect(server, tiny_bert, mode, monkeypatch):
    """Requests that the schema allows, and such that it does not; about half of them for the model that the route is for."""
    monkeypatch.setattr("deploy.inference.DEFAULT_MAX_TOKENS", 4)
    schema, seen = schemathesis.openapi.from_url(f"{server.url}/openapi.json"), {}
    right = {
        "/v1/chat/completions": "llama",
        "/v1/completions": "gpt2",
        "/v1/responses": "llama",
        "/summarize": "summaries",
        "/answer": "answers",
        "/classify": "labels",
    }
    right["/v1/embeddings"] = tiny_bert.name
    right["/fill-mask"] = tiny_bert.name
    right["/search"] = None
    for operation in (found.ok() for found in schema.get_all_operations()):
        if mode == GenerationMode.NEGATIVE and operation.path not in right:
            continue  # nothing to send that could be wrong

        @given(case=operation.as_strategy(generation_mode=mode), named=strategies.booleans())
        @settings(
            max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        def check(case, named):
            if isinstance(case.body, dict) and named and case.operation.path in right:
                if right[case.operation.path]:
                    case.body["model"] = right[case.operation.path]
                if "documents" in case.body:
                    case.body["documents"] = "mill"
                for most in ("max_tokens", "max_output_tokens"):
                    if isinstance(case.body.get(most), int):
                        case.body[most] = min(case.body[most], 20)
            response = case.call(timeout=60)
            seen.setdefault(case.operation.path, set()).add(response.status_code)
            assert response.status_code < 500, (case.operation.path, case.body, response.text)

        check()
    if mode == GenerationMode.POSITIVE:
        by_chance = ("/fill-mask", "/v1/models/{name}")  # a [MASK], a model's name
        assert len(seen) == 14 and all(200 in seen[path] for path in seen if path not in by_chance), seen
    else:
        assert set(seen) == set(right) and all(422 in seen[path] for path in right), seen
    assert server.http.get("/readyz").status_code == 200
    wait_for(lambda: server.service.admitted == 0)


def test_limits_from_the_environment(monkeypatch):
    monkeypatch.setenv("TASKBOOK_LIMIT_ADMITTED", "7")
    assert Limits.from_environment().admitted == 7
    for wrong in ("many", "-1", "0"):
        monkeypatch.setenv("TASKBOOK_LIMIT_QUEUE_SECONDS", wrong)
        with pytest.raises(UserError, match="QUEUE_SECONDS"):
            Limits.from_environment()


def command(*arguments, **environment):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    environment.pop("TASKBOOK_API_KEY", None) if "TASKBOOK_API_KEY" not in environment else None
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def status(url):
    """Of a GET; None where nobody listens."""
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return None


@pytest.mark.parametrize("how", ["python -m deploy.api", "uvicorn deploy.api:app"])
def test_sigterm_lets_streams_finish(tiny, port, how):
    arguments = (
        ["deploy.api", "--model", str(tiny / "llama")]
        if "-m" in how
        else ["uvicorn", "deploy.api:app", "--http", "h11"]
    )
    process = command(*arguments, "--port", str(port), TASKBOOK_MODELS=str(tiny / "llama"))
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: status(f"{url}/livez") == 200, 60)
        assert status(f"{url}/v1/models") == 200  # before it is ready
        wait_for(lambda: status(f"{url}/readyz") == 200, 60)
        body = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 300, "stream": True, "seed": 1}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: status(f"{url}/readyz") in (503, None), 1)
            lines = [line for line in lines if line]
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        began = time.monotonic()
        assert process.wait(30) == 0 and time.monotonic() - began < 10
    finally:
        process.kill()
        output = process.communicate()[0]
    assert "ready: llama" in output and "secret" not in output


def test_the_commands_of_the_readme(tiny_served, port, tmp_path, capsys):
    """Server, official client and curl as printed, with tiny models where the two runs would be, and a free port."""
    text = (ROOT / "deploy" / "README.md").read_text(encoding="utf8").replace(":8000", f":{port}")
    bash = re.findall(r"```bash\n(.*?)```", text, re.S)
    start, curl = (next(block for block in bash if block.startswith(word)) for word in ("python", "curl"))
    assert sorted(bash) == sorted([start, curl, "make chat\n", "make ask\n"]), "a command that no test runs"
    for name, task in (("chat_sft", "text-generation"), ("qa_squad", "question-answering")):
        shutil.copytree(tiny_served[task], tmp_path / "outputs" / name)
    words = [sys.executable, *start.split()[1:], "--port", str(port)]
    with subprocess.Popen(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: status(f"{url}/readyz") == 200, 60)
            exec(re.search(r"```python\n(.*?)```", text, re.S)[1], {})
            assert capsys.readouterr().out
            answer = subprocess.run(["bash", "-c", f"{curl.rstrip()} -sS"], capture_output=True, text=True, timeout=60)
            assert json.loads(answer.stdout)["start"] >= 0, answer.stdout + answer.stderr
        finally:
            process.send_signal(signal.SIGTERM)


def test_what_cannot_be_served_ends_with_code_2(port, capsys, monkeypatch):
    monkeypatch.delenv("TASKBOOK_API_KEY", raising=False)
    assert main(["--host", "0.0.0.0"]) == 2
    assert "set TASKBOOK_API_KEY" in capsys.readouterr().err
    assert main(["--model", "./nowhere", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert "no such folder" in error and "Traceback" not in error
