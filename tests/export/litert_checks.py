"""Files of TensorFlow Lite, next to PyTorch: `make test-litert`, in the environment that litert-torch needs (4.6 GB, so that the
tests of CI do without it). They are exported, measured and verified by ai-edge-litert, then replayed by TensorFlow itself."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from checkout import ROOT
from transformers import AutoTokenizer

from shared.export.export import export
from shared.inference.model import load

WORDS = "the red house of a small town near the old river and its people read books about stars".split()  # noqa: SIM905
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"initializer_range": 0.3, "max_position_embeddings": 128}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
ENDS = {"pad_token_id": 0, "eos_token_id": 102, "decoder_start_token_id": 101, "d_model": 32}
MODELS = {  # class, configuration, of whose tokenizer, what a test row holds beside its text
    "llama": ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 2}, "gpt", "text"),
    "qwen2": ("Qwen2ForCausalLM", SIZES | {"num_key_value_heads": 2}, "gpt", "text"),
    "qwen3": ("Qwen3ForCausalLM", SIZES | {"num_key_value_heads": 2, "head_dim": 32}, "gpt", "text"),
    "mistral": ("MistralForCausalLM", SIZES | {"num_key_value_heads": 2, "sliding_window": None}, "gpt", "text"),
    "neox": ("GPTNeoXForCausalLM", SIZES, "gpt", "text"),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, "gpt", "text"),
    "bert": ("BertForMaskedLM", SIZES, "bert", "text"),
    "roberta": ("RobertaForMaskedLM", SIZES | {"pad_token_id": 0}, "bert", "text"),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 64, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}, "bert", "text"),
    "qa": ("BertForQuestionAnswering", SIZES | {"window_length": 64, "window_stride": 16}, "bert", "question"),
    "classes": ("BertForSequenceClassification", SIZES | {"num_labels": 3}, "bert", "label"),
    "t5": (
        "T5ForConditionalGeneration",
        ENDS | {"d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
        "bert",
        "summary",
    ),
    "bart": ("BartForConditionalGeneration", ENDS | BART | {"max_position_embeddings": 64}, "bert", "summary"),
}


def sentence(seed: int, words: int) -> str:
    """Words in an order of their own."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.mark.parametrize("name", MODELS)
def test_tensorflow_lite_gives_what_pytorch_gives(name, tiny, tiny_bert, tmp_path):
    kind, sizes, tokens, more = MODELS[name]
    folder = tmp_path / "model"
    names = {"model_input_names": ["input_ids", "attention_mask"]} if more == "summary" else {}
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama" if tokens == "gpt" else tiny_bert, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    of_kind = getattr(transformers, kind)
    model = of_kind(of_kind.config_class(**sizes, vocab_size=len(tokenizer))).eval()
    if more == "summary":
        model.generation_config.max_new_tokens, model.generation_config.num_beams = 12, 3
    model.save_pretrained(folder)
    extra = {"text": {}, "label": {"label": "LABEL_0"}}
    extra["question"] = {"question": "where?", "answers": {"text": ["river"], "answer_start": [0]}}
    extra["summary"] = {"summaries": ["the old river"]}
    column = {"question": "context", "summary": "document"}.get(more, "text")
    rows = [extra[more] | {column: sentence(i, 40)} for i in range(4)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    export(str(folder), ["litert"], tmp_path / "out", accept_loss=more == "label")
    found = json.loads((tmp_path / "out" / "export.json").read_text())["artifacts"]["litert"]
    assert found["identical_outputs"] == 1 and "refused" not in found
    original, exported = load(folder), load(tmp_path / "out", "litert")
    text = sentence(9, 30)
    if "CausalLM" in kind or "LMHead" in kind:
        ids = tokenizer(text)["input_ids"]
        np.testing.assert_allclose(original.logits([ids])[0], exported.logits([ids])[0], atol=1e-3)
        prompts = [ids, ids[:2], ids[:33]]  # one piece of a prompt and more, and one token
        assert exported.generate(prompts, max_new_tokens=16) == original.generate(prompts, max_new_tokens=16)
        room = exported.context - len(ids)
        assert len(exported.generate([ids], max_new_tokens=1000)[0]) <= room
    elif more == "summary":
        for beams in (1, 3):
            texts = [text, "stars"]
            assert exported.summary_ids(texts, 9, beams) == original.summary_ids(texts, 9, beams)
    program = (
        "import sys; sys.modules['ai_edge_litert'] = None\n"  # so that TensorFlow's own interpreter is taken
        "from shared.inference.litert_runner import interpreter_of\n"
        "from shared.inference.model import load\n"
        "assert interpreter_of().__module__.startswith('tensorflow')\n"
        "load(sys.argv[1], 'litert').verify()"
    )
    replayed = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True, cwd=ROOT
    )
    assert replayed.returncode == 0, replayed.stderr[-2000:]


def test_the_cell_of_the_notebook(tiny, tmp_path, monkeypatch, capsys):
    """It reads the file with TensorFlow alone, and says what the original says."""
    folder = tmp_path / "outputs" / "chat"
    shutil.copytree(tiny / "llama", folder)
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"text": sentence(i, 40)}) for i in range(4)))
    cells = json.loads((ROOT / "notebooks" / "colab_t4.ipynb").read_text())["cells"]
    lines = "".join(cells[-1]["source"]).replace("asked + 64", "asked + 12")
    code, names = re.subn(r"^( +)!(.*)$", r"\1_exit_code = shell(f'\2')", lines, flags=re.M)
    assert names == 2

    def shell(command: str) -> int:  # the environment that `make litert-env` builds is this one
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = command.replace(".venv-litert/bin/python", sys.executable)
        return 0 if command.startswith("make") else subprocess.run(command, shell=True, env=environment).returncode

    monkeypatch.chdir(tmp_path)
    asked = {"TRAINED": True, "TENSORFLOW": True, "OUTPUT": "outputs/chat", "ASK": ["the old river"]}
    exec(code, asked | {"shell": shell, "AutoTokenizer": AutoTokenizer})
    said = capsys.readouterr().out.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "the old river"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    expected = tokenizer.decode(load(folder).generate([ids], max_new_tokens=12)[0], skip_special_tokens=True)
    at = said.index("> the old river")
    assert "\n".join(said[at + 1 :]) == expected
