"""Nothing that one visitor does keeps the others out: bounds on bodies, headers, texts and prompts; folders that are refused."""

import codecs
import contextlib
import functools
import gzip
import json
import shutil
import socket
import time

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from test_deploy_api import CHAT, Server, wait_for
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deploy.admission import Limits
from deploy.deadline import Deadline
from deploy.generation import Chunk, Sampling
from deploy.inference import Engine, stream
from deploy.schemas import ChatBody, CompletionBody, NotJSON, parse
from shared import UserError
from shared.data.encoding import PlainText, TooLong
from shared.inference.model import load
from shared.inference.positions import longest_input
from shared.publish.hub import pull

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(tiny):
    with Server([tiny / "llama"], limits=Limits(admitted=4, running=1, body_seconds=2)) as running:
        yield running


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{}] * 300}] * 900},
        {f"x{i}": 1 for i in range(80_000)},
        {"messages": [{"role": "wizard"}] * 1000},
        {"messages": [{"role": "user", "content": [{"type": "text"}] * 4000}]},
        {"messages": CHAT, "stop": [0] * 100_000},
        {"messages": CHAT, "metadata": {str(i): i for i in range(64)}},
    ],
)
def test_few_errors_are_built_of_any_body(body):
    with pytest.raises((NotJSON, ValidationError)) as caught:
        parse(ChatBody, json.dumps(body).encode())
    assert caught.type is NotJSON or caught.value.error_count() <= 70


@pytest.mark.parametrize("raw", [b"[" * 500_000, b"1" * 500_000, b"{", b"\xff", b'{"messages": NaN}', b""])
def test_what_is_no_json_is_one_line(raw, server):
    with pytest.raises(NotJSON):
        parse(ChatBody, raw)
    answer = server.http.post("/v1/chat/completions", content=raw[:5000] or b" ")
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


def test_a_byte_order_mark_is_no_text_and_a_compressed_body_is_refused_as_such(server):
    body = {"model": "llama", "messages": CHAT, "max_tokens": 4, "seed": 1}
    raw, post = json.dumps(body).encode(), server.http.post
    plain, marked = (post("/v1/chat/completions", content=each).json() for each in (raw, codecs.BOM_UTF8 + raw))
    assert marked["choices"] == plain["choices"]
    answer = post("/v1/chat/completions", content=gzip.compress(raw), headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415 and "Content-Encoding gzip" in answer.json()["error"]["message"], answer.text
    same = post("/v1/chat/completions", content=raw, headers={"Content-Encoding": "identity"})
    assert same.json()["choices"] == plain["choices"]


def test_ids_of_any_number_end_at_the_first_error():
    with pytest.raises(ValidationError) as caught:
        parse(CompletionBody, json.dumps({"prompt": [0.5] * 100_000}).encode())
    assert caught.value.error_count() < 10


def test_half_a_character_is_422(server):
    for body in ('{"messages": [{"role": "user", "content": "\\ud800"}]}', '{"\\ud800": 1, "messages": []}'):
        answer = server.http.post("/v1/chat/completions", content=body)
        assert answer.status_code == 422 and answer.json()["error"]["message"], answer.text


def test_a_megabyte_of_digits_is_refused_by_its_beginning(tiny):
    from transformers import AutoTokenizer

    text, read = PlainText(AutoTokenizer.from_pretrained(tiny / "llama"), 100), []
    encode = text._encode
    text._encode = lambda part, special: read.append(len(part)) or encode(part, special)
    for call in (text.encode, lambda digits: text.encode_chat([{"role": "user", "content": digits}])):
        read.clear()
        with pytest.raises(TooLong, match="characters"):
            call("7" * 990_000)
        assert sum(read) <= 3200


def test_endless_headers_are_refused(server):
    """64 kB of one header are read, not what follows."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ")
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 20_000_000:
                sent += connection.send(b"x" * 65_536)
            assert connection.recv(20).startswith(b"HTTP/1.1 400")
    assert sent < 20_000_000
    assert server.http.get("/livez").status_code == 200


def test_two_hosts_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert connection.recv(20)[9:12] in (b"400", b"403")


def test_bodies_that_do_not_come_hold_no_slot(server):
    """Forty requests with one byte of their body: the others are served meanwhile, and these end after two seconds."""
    opened = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(40)]
    for connection in opened:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    time.sleep(0.2)
    assert server.service.admitted == 0
    answer = server.http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1})
    assert answer.status_code == 200
    for connection in opened:
        assert connection.recv(20).startswith(b"HTTP/1.1 408")
        connection.close()
    assert server.service.arriving == 0


def test_leaving_stops_the_reading_of_a_prompt(server, monkeypatch):
    """A prompt is read in chunks, once for all of n, and not to its end when nobody waits any more."""
    monkeypatch.setattr("shared.inference.torch_runner.PROMPT_CHUNK", 8)
    model, chunks = server.service.engines["llama"].model._runner.model, []
    forward = model.forward

    @functools.wraps(forward)  # its signature tells that it takes a cache
    def slow(*args, input_ids, **more):
        chunks.append(tuple(input_ids.shape))
        time.sleep(0.1)
        return forward(*args, input_ids=input_ids, **more)

    monkeypatch.setattr(model, "forward", slow)
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 1000}], "max_tokens": 2, "n": 4}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: len(chunks) >= 3, 20)
    wait_for(lambda: server.service.admitted == 0)
    time.sleep(0.5)
    read = len(chunks)
    time.sleep(0.5)
    assert len(chunks) == read < 60 and set(chunks) == {(1, 8)}


def test_chunks_change_no_token(tiny, monkeypatch):
    """Read in chunks, or once for several rows, a prompt gets the reply that it gets whole."""
    model = load(tiny / "llama")
    prompt = list(range(100, 160))
    ask = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    alone = [model.generate([prompt], **ask | {"seed": 3 + i})[0] for i in range(3)]
    monkeypatch.setattr("shared.inference.torch_runner.PROMPT_CHUNK", 7)
    assert model.generate([prompt] * 3, **ask) == alone
    assert model.generate([prompt, prompt[:20]], **ask)[0] == alone[0]


def hostile_tokenizer(pattern):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PlainText(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 100_000)


def test_patterns_and_templates_that_do_not_end():
    """A pattern holds one core until it returns, and takes no other text meanwhile; a template is ended."""
    text, deadline = hostile_tokenizer(r"(a|aa)+x"), Deadline(0.5)
    with pytest.raises(UserError, match="more than 0.5 s"):
        deadline.run(text.encode, ("a" * 25 + "b") * 300)
    with pytest.raises(UserError, match="has not come back"):
        deadline.run(text.encode, "b")
    text._original.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    other = Deadline(0.5)
    with pytest.raises(UserError, match="more than 0.5 s"):
        other.run(text.encode_chat, CHAT)
    wait_for(lambda: not other._given_up[0].is_alive(), 20)
    with pytest.raises(UserError, match="fails on this text"):
        Deadline(20).run(hostile_tokenizer(r"(a|aa|a+)+$x").encode, "a" * 200 + "b")


def test_messages_name_no_path_of_the_server(server, tiny):
    for route, body in (("/answer", {"question": "a", "context": "b"}), ("/v1/embeddings", {"input": "a"})):
        message = server.http.post(route, json=body).json()["error"]["message"]
        assert message.startswith("llama is a model for") and str(tiny) not in message


def damage(folder, file, content):
    (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.mark.parametrize(
    "file, content",
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
        ("config.json", b"{"),
        ("config.json", []),
        ("config.json", {"model_type": "llama"}),
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"vocab_size": 7}),
        ("config.json", {"num_hidden_layers": 3}),
        ("config.json", {"architectures": ["Nonsense"]}),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", {}),
        ("tokenizer_config.json", b"["),
        ("generation_config.json", b"{"),
        ("generation_config.json", {"eos_token_id": "x"}),
    ],
)
def test_a_damaged_folder_is_one_line(tiny, tmp_path, file, content):
    folder = shutil.copytree(tiny / "llama", tmp_path / "model")
    if file == "config.json" and isinstance(content, dict) and len(content) == 1 and "model_type" not in content:
        content = json.loads((folder / file).read_text()) | content
    damage(folder, file, content)
    with pytest.raises(UserError) as caught:
        Engine(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_model_that_lacks_a_layer_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny / "llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "layers.1." not in k},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="lack 9 tensors .*layers.1."):
        load(folder)


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "generation_config.json", "processor_config.json", "config.json"]
)
def test_code_of_a_tokenizer_is_never_asked_for(tiny, tmp_path, file, monkeypatch):
    """Not even where somebody would answer the question with `y`."""
    folder = shutil.copytree(tiny / "llama", tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T:\n    pass\n")
    settings = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    damage(folder, file, settings | {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="code of its own"):
        pull(str(folder))
    monkeypatch.setattr("shared.inference.model.pull", lambda name: folder)
    with contextlib.suppress(UserError):
        load(folder)
    assert not (tmp_path / "ran").exists()


def with_settings(source, folder, **settings):
    """A copy of a model whose generation_config.json says more."""
    shutil.copytree(source, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"stop_strings": ["a"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"is_assistant": True},
        {"num_beams": 0},
    ],
)
def test_ways_to_write_that_are_not_here_are_one_line(tiny_served, tmp_path, settings):
    folder = with_settings(tiny_served["summarization"], tmp_path / "model", **settings)
    with pytest.raises(UserError, match="what its generation_config.json asks for cannot be done here") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_stop_texts_of_a_model_end_its_replies(tiny, tmp_path):
    def greedy(folder):
        sampling = Sampling(max_tokens=12, temperature=0, repetition_penalty=1.3)
        engine = Engine(str(folder))
        chunks = [each for each in stream(lambda emit: engine.chat(CHAT, sampling, emit)) if isinstance(each, Chunk)]
        return "".join(chunk.text for chunk in chunks), chunks[-1].reason

    whole, reason = greedy(tiny / "llama")
    assert reason == "length"
    stop = whole[8:12]
    folder = with_settings(tiny / "llama", tmp_path / "model", stop_strings=[stop])
    assert greedy(folder) == (whole[: whole.find(stop)], "stop")


def test_virtual_tokens_take_room(tiny, tmp_path):
    from peft import PromptEncoderConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny / "gpt2"), config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny / "gpt2").save_pretrained(tmp_path)
    engine = Engine(str(tmp_path))
    assert engine.context == 1024 - 5
    written = list(stream(lambda emit: engine.complete([[1] * 1017], Sampling(max_tokens=2, temperature=0), emit)))
    assert written[-1].completion_tokens == 2
    with pytest.raises(TooLong, match="at most 1,019"):
        engine.complete([[1] * 1017], Sampling(max_tokens=3), print)


def test_a_model_that_sees_pictures_reads_as_much_as_its_text_part(tiny):
    from transformers import AutoTokenizer, Gemma3Config

    tokenizer = AutoTokenizer.from_pretrained(tiny / "gpt2", model_max_length=int(1e30))
    assert longest_input(Gemma3Config(text_config={"max_position_embeddings": 4096}), tokenizer) == 4096
