"""shared/export and shared/inference: every format on tiny models with random weights, used next to PyTorch; the gate, the
golden set, errors. One export a model, for all tests of this file."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
import vllm_folder
from checkout import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from deploy.inference import Engine, Sampling, stream
from shared import UserError
from shared.export import graphs, litert_file, quantize, score
from shared.export.export import card, export, main
from shared.export.formats import FORMATS, impossible, write
from shared.export.measure import in_a_process, start_measuring
from shared.inference.model import Model, load, task_of
from shared.inference.positions import longest_input
from shared.inference.sampling import pick
from shared.inference.torch_runner import load_torch

WORDS = "the red house of a small town near the old river and its people read books about stars".split()  # noqa: SIM905


def sentence(seed: int, words: int = 12) -> str:
    """Words in an order of their own."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def asked(seed: int) -> dict:
    """A user's turn."""
    return {"role": "user", "content": sentence(seed)}


@pytest.fixture(scope="session")
def models(tiny, tiny_bert, tmp_path_factory):
    """Folders of tiny models for every task, each with rows that look like the test split of a run."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    for name in ("llama", "gpt2"):
        shutil.copytree(tiny / name, folder / name)
    # Heads of 16, as onnxruntime-genai asks for
    wide = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3}
    config = transformers.LlamaConfig.from_pretrained(tiny / "llama", **wide)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    shutil.copytree(tiny_bert, folder / "bert")
    vocabulary = AutoTokenizer.from_pretrained(tiny_bert)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=len(vocabulary), window_length=32, window_stride=8, **sizes)
    transformers.BertForQuestionAnswering(config).save_pretrained(folder / "qa")
    ends = {"pad_token_id": 0, "eos_token_id": 102, "decoder_start_token_id": 101, "vocab_size": len(vocabulary)}
    t5 = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2, **ends)
    bart = transformers.BartConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        forced_bos_token_id=101,
        forced_eos_token_id=None,
        **ends,
    )
    for name, kind, config in (("t5", "T5", t5), ("bart", "Bart", bart)):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        model.generation_config.max_new_tokens, model.generation_config.no_repeat_ngram_size = 12, 3
        model.save_pretrained(folder / name)
    for name in ("qa", "t5", "bart"):
        names = None if name == "qa" else ["input_ids", "attention_mask"]
        AutoTokenizer.from_pretrained(tiny_bert, **({"model_input_names": names} if names else {})).save_pretrained(
            folder / name
        )
    contexts = [sentence(i, 60) for i in range(6)]
    rows = {
        "llama": [{"messages": [asked(i), {"role": "assistant", "content": "red"}]} for i in range(6)],
        "gpt2": [{"text": sentence(i, 30)} for i in range(6)],
        "bert": [{"text": sentence(i, 30)} for i in range(6)],
        "qa": [
            {"question": "where?", "context": c, "answers": {"text": ["river"], "answer_start": [0]}} for c in contexts
        ],
        "t5": [{"document": c, "summaries": [sentence(9)]} for c in contexts],
        "bart": [{"document": c, "summaries": [sentence(9)]} for c in contexts],
    }
    classes = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = transformers.BertConfig(vocab_size=len(vocabulary), initializer_range=0.3, **classes, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "classes")
    vocabulary.save_pretrained(folder / "classes")
    texts = [sentence(i, 30) for i in range(30)]
    found = load(folder / "classes").classify(texts)  # all right, so that each other answer is one less
    rows["classes"] = [{"text": text, "label": best[0]["label"]} for text, best in zip(texts, found, strict=True)]
    for name, lines in rows.items():
        (folder / name / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


WANTED = {
    "llama": ["merged", "fp16", "int8", "gguf-q8_0", "onnx", "onnx-int8", "int4"],
    "gpt2": ["gguf", "onnx", "onnx-int8", "int4"],
    "bert": ["int8", "onnx", "onnx-int8"],
    "qa": ["int8", "onnx", "onnx-int8"],
    "t5": ["fp16", "onnx", "onnx-int8"],
    "bart": ["int8", "onnx", "onnx-int8"],
    "classes": ["merged", "fp16", "int8", "onnx", "onnx-int8"],
}


@pytest.fixture(scope="session")
def exports(models):
    """name -> folder of the model's exports, each made when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = models / f"{name}-export"
            export(str(models / name), WANTED[name], made[name], accept_loss=True)
        return made[name]

    return of


PROMPTS = ["the red", "people read books about the stars and the old river near", "a"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_in_onnx_writes_what_pytorch_writes(models, exports, name):
    original, exported = load(models / name), load(exports(name), "onnx")
    prompts = [original.tokenizer(text)["input_ids"] for text in PROMPTS]
    for prompt in prompts:
        np.testing.assert_allclose(original.logits([prompt])[0], exported.logits([prompt])[0], atol=2e-4)
    expected = original.generate(prompts, max_new_tokens=12)
    assert exported.generate(prompts, max_new_tokens=12) == expected
    assert [exported.generate([prompt], max_new_tokens=12)[0] for prompt in prompts] == expected, "padding leaks"
    ids = torch.tensor([prompts[1]])
    plain = original._runner.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0)
    assert plain[0, ids.shape[1] :].tolist()[: len(expected[1])] == expected[1]
    settings = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3}
    drawn = exported.generate(prompts, seed=5, **settings)
    assert drawn == original.generate(prompts, seed=5, **settings) != expected
    assert exported.generate(prompts[1:], seed=6, **settings) == drawn[1:], "other rows change what is drawn"


def test_stop_tokens_callbacks_and_limits(models, exports):
    model = load(exports("gpt2"), "onnx")
    prompts = [model.tokenizer(text)["input_ids"] for text in PROMPTS]
    written = model.generate(prompts, max_new_tokens=10)
    seen = [[], [], []]
    stop = written[1][4]
    first = written[1].index(stop)
    stopped = model.generate(
        prompts, max_new_tokens=10, stop_ids=[stop], on_token=lambda row, token: seen[row].append(token)
    )
    assert stopped[1] == written[1][:first] and seen == stopped
    count = []
    cut = model.generate(
        prompts[:1], max_new_tokens=10, on_token=lambda *_: count.append(1), cancelled=lambda: len(count) == 3
    )
    assert cut == [written[0][:3]]
    with pytest.raises(UserError, match="empty prompt"):
        model.generate([prompts[0], []], max_new_tokens=3)
    with pytest.raises(UserError, match="1,024 tokens; this model reads fewer than 1,024"):
        model.generate([[5] * 1024], max_new_tokens=3)
    assert len(model.generate([[5] * 1022], max_new_tokens=30)[0]) == 2, "the context is full"
    with pytest.raises(UserError, match="does not summarize"):
        model.summarize(["x"])


def test_pick_takes_the_share_that_was_asked_for():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    draw = torch.Generator().manual_seed(0)
    found = [pick(logits, 1.0, 0.7, 1.0, [], draw) for _ in range(400)]
    assert set(found) == {0, 1} and 0.5 < found.count(0) / 400 < 0.75  # 0.5 / 0.8
    assert pick(logits, 0.0, 1.0, 1.0, [], None) == 0 and pick(logits, 0.0, 1.0, 9.0, [1, 2, 3], None) == 0
    assert pick(-logits, 0.0, 1.0, 9.0, [3], None) == 2, "a token that was seen is less likely"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_in_onnx_summarizes_as_pytorch_does(models, exports, name):
    original, exported = load(models / name), load(exports(name), "onnx")
    texts = [sentence(1, 40), "red", sentence(2, 9)]
    for settings in ({}, {"num_beams": 3}, {"max_new_tokens": 5}):
        assert exported.summary_ids(texts, **settings) == original.summary_ids(texts, **settings)
    assert len(exported.summary_ids(texts, 5)[0]) <= 6 and exported.summarize([]) == []


@pytest.mark.parametrize("artifact", [None, "onnx"])
def test_one_summary_a_text_whatever_the_generation_settings_say(models, exports, artifact):
    texts = [sentence(1, 40), "red", sentence(2, 9)]
    for cache in ({"use_cache": False}, {"cache_implementation": "static"}):
        model = load(exports("bart"), artifact) if artifact else load(models / "bart")
        expected = model.summary_ids(texts, num_beams=2)
        model.generation.update(num_beams=2, num_return_sequences=2, return_dict_in_generate=True, **cache)
        assert model.summary_ids(texts) == expected


def test_an_encoder_in_onnx_answers_and_fills_as_pytorch_does(models, exports):
    original, exported = load(models / "qa"), load(exports("qa"), "onnx")
    questions, contexts = ["where?", "who reads?"], [sentence(3, 70), sentence(4, 5)]
    expected, found = original.answer(questions, contexts), exported.answer(questions, contexts)
    for a, b in zip(expected, found, strict=True):
        assert {k: b[k] for k in ("answer", "start", "end")} == {k: a[k] for k in ("answer", "start", "end")}
        assert b["score"] == pytest.approx(a["score"], abs=1e-4) and a["threshold"] is None
        assert contexts[found.index(b)][b["start"] : b["end"]] == b["answer"]
    assert exported.answer(questions[0], contexts[0]) == pytest.approx(found[0])
    exported.config.no_answer_threshold = min(a["no_answer_score"] for a in found) - 1
    assert exported.answer(questions[0], contexts[0])["answer"] == ""
    original, exported = load(models / "bert"), load(exports("bert"), "onnx")
    text = "the red [MASK] near the river"
    a, b = original.fill(text), exported.fill(text)
    assert [x["token"] for x in a] == [x["token"] for x in b] and len(b) == 5
    assert b[0]["score"] == pytest.approx(a[0]["score"], rel=1e-3) and b[0]["token_str"].strip("#") in b[0]["sequence"]
    texts = ["people read [MASK]", text, "[MASK] and [MASK] about stars"]
    for model in (original, exported):  # together or alone
        alone, together = [model.fill(each) for each in texts], model.fill(texts)
        assert [len(each) for each in together] == [5, 5, 2]
        assert [w["token"] for w in together[0]] == [w["token"] for w in alone[0]], "padding leaks"
        assert together[1][0]["score"] == pytest.approx(alone[1][0]["score"], rel=1e-4)
    with pytest.raises(UserError, match=r"holds no \[MASK\]"):
        exported.fill("nothing to fill")


@pytest.mark.parametrize("name", WANTED)
def test_every_format_is_measured_verified_and_the_fastest_is_taken(models, exports, name):
    folder = exports(name)
    result = json.loads((folder / "export.json").read_text())
    assert list(result["artifacts"]) and set(result["artifacts"]) == {"original", *WANTED[name]}
    assert result["test_data"] == "the run's test split" and str(models) not in json.dumps(result)
    card = (folder / "README.md").read_text()
    original = result["artifacts"]["original"]
    for artifact in WANTED[name]:
        numbers = result["artifacts"][artifact]
        assert numbers[score.METRIC[result["task"]]] >= 0 and numbers["peak_memory_gb"] > 0.1
        assert set(numbers["latency_ms"]) == set(numbers["per_second"]) == {"1", "8"}
        assert f"| {artifact}" in card
        if artifact in ("merged", "onnx"):
            assert numbers["identical_outputs"] == 1
            assert "refused" not in numbers
        if artifact == "fp16":
            assert numbers["megabytes"] < 0.6 * original["megabytes"]
        load(folder, artifact).verify()
    order = ("int4", "onnx-int8", "onnx", "int8", "fp16", "merged", "gguf", "gguf-q8_0")
    assert load(folder).artifact == next(each for each in order if each in WANTED[name])
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_beside_a_gpu_a_model_is_measured_in_a_process_that_is_no_fork(models, monkeypatch):
    """A fork of a process that has looked at the GPU cannot use it: an adapter's weights could not be read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # here; in the process there is none
    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", lambda: pytest.fail("there was a fork server"))
    start_measuring()
    rows = [json.loads(line) for line in (models / "classes" / "test.jsonl").read_text().splitlines()]
    prompts = [row["text"] for row in rows[:2]]
    found = in_a_process(str(models / "classes"), None, "text-classification", rows, prompts, False)
    assert found["accuracy"] == 100 and len(found["outputs"]) == 2


def test_an_export_is_served_and_refused_when_it_has_drifted(exports, tmp_path):
    """deploy/ takes the fastest format of a folder: the same tokens as from the model itself, for each task."""
    prompt, context = [asked(1)], sentence(3, 70)
    engine = Engine(str(exports("llama")))
    assert engine.artifact == "int4" and engine.chats
    settings = Sampling(max_tokens=6, temperature=0, repetition_penalty=1)
    pieces = list(stream(lambda emit: engine.chat(prompt, settings, emit)))
    ids = load(exports("llama")).prompt_ids(prompt)
    expected = load(exports("llama")).generate([ids], max_new_tokens=6)[0]
    text = engine.model.tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(piece.text for piece in pieces[:-1]) == text and pieces[-1].completion_tokens == len(expected)
    engine = Engine(str(exports("qa")))
    (answer,) = stream(lambda emit: engine.answer("where?", context, emit))
    assert engine.artifact == "onnx-int8" and answer["answer"] == context[answer["start"] : answer["end"]]
    engine = Engine(str(exports("t5")))
    (summary,) = stream(lambda emit: engine.summarize(context, 5, emit))
    assert engine.artifact == "onnx-int8" and summary["summary"] == engine.model.summarize([context], 5)[0]
    engine = Engine(str(exports("bert")), "onnx")
    (words,) = stream(lambda emit: engine.fill("the ___ near the river", 3, emit))
    assert words == load(exports("bert"), "onnx").fill("the [MASK] near the river", 3)
    drifted = shutil.copytree(exports("bert") / "onnx", tmp_path / "drifted")
    golden = json.loads((drifted / "golden.json").read_text())
    for item in golden["items"]:
        item["output"] = [item["output"][0] + 1]
    (drifted / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(UserError, match="golden outputs are repeated"):
        Engine(str(drifted))


def test_an_export_travels_over_the_hub(exports, hub, tmp_path):
    """Pushed as one commit, pulled by name elsewhere: the same golden outputs."""
    folder = exports("gpt2")
    push = [sys.executable, "-m", "shared.publish.hub", "push", folder, "--repo_id", "alice/exported"]
    pushed = subprocess.run(push, capture_output=True, text=True, cwd=ROOT, env=os.environ | hub.env_for("write"))
    assert pushed.returncode == 0, pushed.stderr
    program = (
        "from shared.inference.model import load; m = load('alice/exported'); m.verify(); print(m.artifact); "
        "load('alice/exported', 'gguf').verify()"
    )
    elsewhere = os.environ | hub.env_for("read", home=tmp_path / "home")
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=elsewhere)
    assert loaded.stdout == "int4\n", loaded.stderr
    files = set(hub.files("alice/exported"))
    assert {
        "export.json",
        "README.md",
        "onnx/model.onnx",
        "int4/golden.json",
        "int4/tokenizer.json",
        "gguf/model.gguf",
    } <= files
    assert "gguf/Modelfile" in files
    assert not [name for name in files if "/." in name or name.startswith(".") and name != ".gitattributes"]


def test_a_card_says_what_was_computed_where(exports):
    result = json.loads((exports("gpt2") / "export.json").read_text())
    assert {numbers["device"] for numbers in result["artifacts"].values()} == {"cpu"} or torch.cuda.is_available()
    for numbers in result["artifacts"].values():
        numbers["device"] = "cpu"
    assert "on CPU. Original is the model in PyTorch, fp32." in card(result)
    result["artifacts"]["original"]["device"] = "cuda"
    assert "original on a GPU, else on CPU. Original is the model in PyTorch, in the precision of its files." in card(
        result
    )


def test_the_snippets_of_readme_and_card(exports, tmp_path, monkeypatch):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "chat_sft-export").symlink_to(exports("gpt2"))
    monkeypatch.chdir(tmp_path)
    for readme in (ROOT / "shared" / "export" / "README.md", exports("gpt2") / "README.md"):
        (snippet,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf8"), re.S)
        used = {}
        exec(snippet.replace("<this folder>", "outputs/chat_sft-export"), used)
        assert used["model"].artifact == "int4"


def test_a_graph_that_reads_outside_its_folder_is_refused(exports, tmp_path):
    """The weights of a graph may lie in a file beside it, whose name the graph holds."""
    folder = shutil.copytree(exports("gpt2") / "onnx", tmp_path / "model")
    graph = onnx.load(folder / "model.onnx")  # its weights too
    onnx.save(graph, folder / "model.onnx", save_as_external_data=True, location="weights")
    load(folder)
    (folder / "weights").rename(tmp_path / "weights")
    with pytest.raises(UserError, match="does not open it"):
        load(folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../weights" if entry.key == "location" else entry.value
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(UserError, match="does not open it"):
        load(folder)


def test_verify_sees_other_weights_tokens_templates_and_stop_ids(exports, tmp_path):
    folder = shutil.copytree(exports("llama") / "merged", tmp_path / "copy")
    load(folder).verify()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-2] + bytes([weights[-2] ^ 1, weights[-1]]))
    with pytest.raises(UserError, match="model.safetensors is not the file that was exported"):
        load(folder).verify()  # one bit: all golden outputs are the same
    (folder / "model.safetensors").write_bytes(weights)
    template = folder / "chat_template.jinja"
    whole = template.read_text()
    template.write_text(whole.replace("helpful", "rude"))
    with pytest.raises(UserError, match="the tokenizer or its template has changed"):
        load(folder).verify()
    template.write_text(whole)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    with pytest.raises(UserError, match=r"end at token \[7, 2\]"):
        load(folder).verify()
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = load_torch(folder, "text-generation")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.normal_(std=3)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="golden outputs are repeated"):
        load(folder).verify()
    (folder / "golden.json").unlink()
    with pytest.raises(UserError, match="no golden.json"):
        load(folder).verify()


def test_one_flipped_bit_is_seen_in_any_file(exports, tmp_path):
    """What the golden outputs miss, the checksums tell; a file of settings may be damaged so that nothing loads."""
    told, unseen = {}, []
    for name in WANTED["llama"]:
        folder = shutil.copytree(exports("llama") / name, tmp_path / name)
        golden = json.loads((folder / "golden.json").read_text())
        files = sorted(golden["sha256"], key=lambda file: (folder / file).stat().st_size)
        assert {path.name for path in folder.iterdir()} - {"golden.json", "README.md"} == set(files)
        for file in files if name == "merged" else files[-1:]:
            whole = (folder / file).read_bytes()
            place = len(whole) // 2 // 4 * 4  # the lowest bits of a weight, where the header is a multiple of four long
            (folder / file).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError) as caught:
                load(folder, name).verify()
            told[name, file] = str(caught.value)
            golden_only = folder / "golden.json"
            golden_only.write_text(json.dumps({**golden, "sha256": {}}))
            try:
                load(folder, name).verify()
                unseen.append((name, file))
            except UserError:
                pass
            golden_only.write_text(json.dumps(golden))
            (folder / file).write_bytes(whole)
    assert ("merged", "model.safetensors") in unseen, "the golden outputs alone would do"
    for pair in unseen:
        assert f"{pair[1]} is not the file that was exported" in told[pair]


def test_the_merged_folder_is_what_vllm_reads(exports, tmp_path):
    folder = shutil.copytree(exports("llama") / "merged", tmp_path / "merged")
    assert vllm_folder.differs(folder) == []
    (folder / "chat_template.jinja").unlink()
    assert vllm_folder.differs(folder) == ["no chat_template.jinja"]
    shutil.copy(exports("llama") / "merged" / "chat_template.jinja", folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {f"base_model.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(vllm_folder.differs(folder)) == 2 * len(tensors)


def test_fp16_leaves_in_fp32_what_overflows(exports):
    with safe_open(exports("t5") / "fp16" / "model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {kind for name, kind in kinds.items() if ".wo." in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".wo." not in name} == {torch.float16}


def test_int8_holds_bytes_and_loads_with_from_pretrained(exports):
    model = transformers.AutoModelForCausalLM.from_pretrained(exports("llama") / "int8", dtype=torch.float32)
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.int8
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def weights_by_bits(folder):
    """Names of the weights of a graph's products by the bits they are held in; 32 are fp32."""
    found = {}
    for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node:
        if node.op_type in ("MatMul", "MatMulInteger", "MatMulNBits") and not node.input[1].endswith("_lowest"):
            bits = {"MatMul": 32, "MatMulInteger": 8}.get(node.op_type)
            bits = bits or next(each.i for each in node.attribute if each.name == "bits")
            found.setdefault(bits, []).append(node.input[1])
    return found


def test_weights_that_rounding_distorts_most_have_more_bits(exports):
    for name, four in (("llama", {"o_proj", "gate_proj", "up_proj"}), ("gpt2", {"attn.c_proj", "mlp.c_fc"})):
        found = weights_by_bits(exports(name) / "int4")
        assert set(found) == {4, 8} and any("lm_head" in weight for weight in found[8])
        assert all(any(part in weight for part in four) for weight in found[4]) and len(found[4]) == 2 * len(four)
        assert set(weights_by_bits(exports(name) / "onnx-int8")) == {8}
    found = weights_by_bits(exports("qa") / "onnx-int8")
    assert len(found[8]) == 2 * 5 and not any("layer.0.output.dense" in weight for weight in found[8])
    kept = [weight for weight in found[32] if "weight" in weight]
    assert len(kept) == 3 and any("qa_outputs" in weight for weight in kept), kept


def test_layers_that_rounding_distorts_stay_in_fp32_where_the_gate_asks(tiny_bert, tmp_path, monkeypatch):
    """What leaves the first layer has an outlier, so little of the rest is left in 8 bits. The labels are the model's own."""
    vocabulary = AutoTokenizer.from_pretrained(tiny_bert)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(vocabulary), initializer_range=0.3, num_labels=3, **sizes)
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight[5] = 30
    for part in (model, vocabulary):
        part.save_pretrained(tmp_path / "model")
    texts = [sentence(i, 30) for i in range(60)]
    found = load(tmp_path / "model").classify(texts)
    rows = [{"text": text, "label": best[0]["label"]} for text, best in zip(texts, found, strict=True)]
    (tmp_path / "model" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(score, "LOSSES", {"accuracy": 5.0, "macro_f1": 7.0})
    found = export(str(tmp_path / "model"), ["onnx-int8"], tmp_path / "out")["artifacts"]
    numbers = found["onnx-int8"]
    assert found["original"]["scored_rows"] == 60 and numbers["accuracy"] >= 95 and "refused" not in numbers
    kept = weights_by_bits(tmp_path / "out" / "onnx-int8")[32]
    for layer in ("0", "1", "2"):
        query = [weight for weight in kept if f"layer.{layer}.attention.self.query" in weight]
        assert bool(query) == (layer in numbers["fp32_layers"]), kept
    assert numbers["fp32_layers"][0] == "0" and len(numbers["fp32_layers"]) < 3
    assert re.search(r"onnx-int8, layers? [\d, ]+ in fp32 \|", (tmp_path / "out" / "README.md").read_text())
    load(tmp_path / "out", "onnx-int8").verify()


@pytest.mark.parametrize("rank", [2, 3])
def test_weights_that_lie_on_sixteen_levels_keep_them_in_four_bits(tmp_path, rank):
    """As those read from a GGUF of type Q4_1 do; what is multiplied are whole numbers, which 8 bits hold."""
    draw = np.random.default_rng(0)
    levels = draw.integers(0, 16, (2, 32, 24))
    levels[:, :2] = [[0], [15]]  # both ends occur in each block
    levels = levels * draw.uniform(0.01, 0.1, (2, 1, 24)) + draw.uniform(-1, 1, (2, 1, 24))
    levels = levels.reshape(64, 24).astype(np.float32)
    between = draw.normal(size=(64, 24)).astype(np.float32)
    weights = {"lm_head": levels, "gate_proj": levels[:, ::-1].copy(), "down_proj": between, "up_proj": between + 1}
    shape = ["batch", "sequence", 64][-rank:]
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], [f"{name}_out"], name) for name in weights],
        "products",
        [helper.make_tensor_value_info("x", real, shape)],
        [helper.make_tensor_value_info(f"{name}_out", real, [*shape[:-1], 24]) for name in weights],
        [onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=10), tmp_path / "model.onnx")
    (tmp_path / "int4").mkdir()
    quantize.quantize(tmp_path / "model.onnx", tmp_path / "int4" / "model.onnx", 4, "text-generation")
    found = weights_by_bits(tmp_path / "int4")
    assert [name.split("_")[0] for name in found[4]] == ["lm", "gate", "up"] and len(found[8]) == 1 and len(found) == 2
    x = draw.integers(-127, 128, (3, 5, 64)[-rank:]).astype(np.float32)
    x[..., ::32] = 127
    session = onnxruntime.InferenceSession(tmp_path / "int4" / "model.onnx")
    for (name, weight), out in zip(weights.items(), session.run(None, {"x": x}), strict=True):
        missed, most = np.abs(out - x @ weight).max(), np.abs(x @ weight).max()
        assert missed < 1e-5 * most if name in ("lm_head", "gate_proj") else 1e-4 * most < missed < 0.1 * most, name


def lora(folder, base, **options):
    """An adapter with weights that change what the base says."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return adapted


def test_adapters_are_merged_and_a_four_bit_base_is_rounded_once(models, tmp_path):
    ids = torch.tensor([[40, 50, 60, 70]])
    adapted = lora(tmp_path / "lora", models / "llama")
    expected = adapted(ids).logits[0].detach().numpy()
    np.testing.assert_allclose(load(tmp_path / "lora").logits(ids.tolist())[0], expected, atol=1e-4)
    export(str(tmp_path / "lora"), ["merged"], tmp_path / "out", dataset=str(models / "llama" / "test.jsonl"))
    merged = load(tmp_path / "out")
    np.testing.assert_allclose(merged.logits(ids.tolist())[0], expected, atol=1e-4)
    assert not np.allclose(load(models / "llama").logits(ids.tolist())[0], expected, atol=1e-2)
    # A base that lies on disk in four bits
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = transformers.AutoModelForCausalLM.from_pretrained(models / "llama", quantization_config=four)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(models / "llama").save_pretrained(tmp_path / "base")
    adapted = lora(tmp_path / "qlora", tmp_path / "base")
    model = load(tmp_path / "qlora")
    assert {p.dtype for p in model._runner.model.parameters()} == {torch.float32}
    # The product of the adapter's matrices is added to the weights as the four bits stand for them
    name = "model.layers.0.mlp.down_proj"
    layer = adapted.get_base_model().get_submodule(name)
    plain = base.get_submodule(name)
    import bitsandbytes

    dequantized = bitsandbytes.functional.dequantize_4bit(plain.weight.data, plain.weight.quant_state).float()
    expected = dequantized + layer.get_delta_weight("default").float()
    found = model._runner.model.get_submodule(name).weight
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), atol=2e-3)


def test_a_format_that_loses_too_much_is_removed(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(score.LOSSES, "masked_accuracy", -1)  # nobody is that much better
    command = [str(models / "bert"), "--to", "merged", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and "refused and removed: merged: masked_accuracy" in captured.err
    assert "| merged (refused) |" in captured.out and not (tmp_path / "out" / "merged").exists()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["artifacts"]["merged"]["refused"]
    with pytest.raises(UserError, match="no onnx"):
        load(models / "bert", "onnx")
    monkeypatch.chdir(tmp_path)
    main([*command[:-2], "--accept_loss"])
    assert load(tmp_path / "outputs" / "bert-export").artifact == "merged"


def test_what_overflows_is_refused_and_the_others_stay(models, tmp_path, monkeypatch, capsys):
    """Weights that fp16 does not hold; and scores that are no numbers, which no option keeps."""
    model = load_torch(models / "gpt2", "text-generation")
    with torch.no_grad():
        model.transformer.wte.weight[7, 3] = 1e5  # of one token, which the test rows need not hold
    with pytest.raises(UserError, match=r"wte\.weight holds numbers that overflow in fp16$"):
        write("fp16", models / "gpt2", model, models / "gpt2", tmp_path / "fp16", "text-generation")

    def overflown(model, target):
        broken = transformers.AutoModelForCausalLM.from_pretrained(models / "gpt2")
        broken.transformer.ln_f.weight.data.fill_(float("inf"))
        broken.save_pretrained(target)

    monkeypatch.setattr("shared.export.formats._save_half", overflown)
    options = ["--to", "merged", "fp16", "--accept_loss", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([str(models / "gpt2"), *options])
    assert "fp16: perplexity is no number any more" in capsys.readouterr().err
    assert not (tmp_path / "out" / "fp16").exists()
    assert set(json.loads((tmp_path / "out" / "export.json").read_text())["artifacts"]) == {"original", "merged"}


def test_formats_of_other_weights_are_removed_and_those_of_the_same_stay(models, tmp_path, capsys):
    """A folder that is exported into again, as after another training: what is left there would be taken for this model."""
    run, out = shutil.copytree(models / "bert", tmp_path / "run"), tmp_path / "out"
    export(str(run), ["fp16"], out)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": sentence(i, 30)}) for i in range(6)))
    added = export(str(run), ["merged"], out, dataset=str(tmp_path / "rows.jsonl"))
    assert list(added["artifacts"]) == ["original", "merged", "fp16"] and "removed from" not in capsys.readouterr().out
    assert added == json.loads((out / "export.json").read_text())
    assert "| fp16, scored on the run's test split |" in (out / "README.md").read_text()
    assert "| merged |" in (out / "README.md").read_text() and load(out, "merged").verify() is None
    torch.manual_seed(1)
    config = transformers.BertConfig.from_pretrained(run)
    transformers.BertForMaskedLM(config).save_pretrained(run)  # trained anew
    trained = export(str(run), ["merged"], out)
    assert list(trained["artifacts"]) == ["original", "merged"] and not (out / "fp16").exists()
    said = f"removed from {out}: merged, fp16, of another model or of weights that have changed since"
    assert said in capsys.readouterr().out.splitlines()
    # What no export.json lists is not taken, though it may lie there: a repository keeps what is no longer pushed
    shutil.copytree(models / "bert", out / "onnx-int8")
    (out / "onnx-int8" / "golden.json").write_text("{}")
    assert load(out).artifact == "merged"
    (out / "export.json").write_text("[]")
    with pytest.raises(UserError, match="export.json: lists no formats"):
        load(out)


def test_an_export_replaces_no_model_and_says_what_cannot_be_made(models, tmp_path):
    run = shutil.copytree(models / "bert", tmp_path / "run")
    before = sorted(run.iterdir())
    for output, said in ((run, "holds config.json"), (tmp_path, "holds run, which is to be exported")):
        with pytest.raises(UserError, match=f"--output {output}: {said}.* name another folder"):
            export(str(run), ["merged"], output)
    assert sorted(run.iterdir()) == before
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=f"--output {output}: cannot be made .*; name another folder"):
            export(str(run), ["merged"], output)


@pytest.mark.parametrize(
    "task, name, artifact, change, refused",
    [
        ("text-generation", "perplexity", "onnx-int8", 0.19, False),
        ("text-generation", "perplexity", "onnx-int8", 0.21, True),
        ("text-generation", "perplexity", "int4", 0.9, False),
        ("text-generation", "perplexity", "int4", 1.1, True),
        ("text-generation", "perplexity", "int4", float("nan"), True),
        ("question-answering", "f1", "onnx-int8", -0.4, False),
        ("question-answering", "f1", "onnx-int8", -0.6, True),
        ("summarization", "rougeL", "onnx-int8", -0.4, True),
        ("summarization", "rougeL", "onnx-int8", -0.2, False),
    ],
)
def test_tolerances(task, name, artifact, change, refused):
    assert bool(score.too_different(task, artifact, {name: 20.0}, {name: 20.0 + change})) == refused


def test_classes_are_the_same_in_onnx_and_gated_by_accuracy_and_macro_f1(models, exports, tmp_path):
    original, exported = load(models / "classes"), load(exports("classes"), "onnx")
    texts = [sentence(i, 5 + 3 * i) for i in range(40)]
    expected, found = ([best[0] for best in model.classify(texts)] for model in (original, exported))
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert len({each["label"] for each in found}) > 1 and exported.classify([]) == []
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-4)
    assert exported.classify(texts[3:4])[0][0]["score"] == pytest.approx(found[3]["score"], abs=1e-4), "padding leaks"
    numbers = json.loads((exports("classes") / "export.json").read_text())["artifacts"]["original"]
    assert numbers["accuracy"] == numbers["macro_f1"] == 100
    before = {"accuracy": 90.0, "macro_f1": 80.0}
    for change, refused in (({}, None), ({"accuracy": 89.4}, "accuracy"), ({"macro_f1": 78.9}, "macro_f1")):
        reason = score.too_different("text-classification", "int8", before, before | change)
        assert reason is None if refused is None else refused in reason
    rows = [{"text": texts[0], "label": "x"}]
    with pytest.raises(UserError, match="the label 'x' of the test rows is none of the model's: a, b, c"):
        score.score(original, rows, False)
    with pytest.raises(UserError, match="name rows with text and label"):
        score.test_rows(tmp_path, "text-classification", None)


def test_classes_that_are_called_by_numbers_are_scored_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "1", "1": "2", "2": "3"}}))
    config = transformers.BertConfig(num_labels=3, id2label={0: "1", 1: "2", 2: "3"})
    model = SimpleNamespace(
        config=config, task="text-classification", classify=lambda texts: [[{"label": t}] for t in texts]
    )
    numbers = [1, 2, 3, 2, 1, 3, 2, 1]
    for labels in (numbers, list(map(str, numbers)), list(map(float, numbers))):
        rows = [{"text": str(number), "label": label} for number, label in zip(numbers, labels, strict=True)]
        assert score.score(model, rows, False)["accuracy"] == 100, labels[0]
    # A data set with names numbers them from 0, and here in another order than the model
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["3", "2", "1"]))
    rows = {"text": list(map(str, numbers)), "label": [3 - number for number in numbers]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows.parquet")
    rows, _ = score.test_rows(tmp_path, "text-classification", str(tmp_path / "rows.parquet"))
    assert score.score(model, rows, False)["accuracy"] == 100
    model.config = transformers.BertConfig(num_labels=4, id2label=dict(enumerate(["zero", "one", "two", "three"])))
    rows = [{"text": ["zero", "one", "two", "three"][number], "label": number} for number in numbers]
    assert score.score(model, rows, False)["accuracy"] == 100, "the number of a class"


@pytest.mark.parametrize("artifact", ["int8", "onnx-int8"])
def test_a_row_in_eight_bits_does_not_depend_on_the_others(models, exports, artifact, monkeypatch):
    """What is multiplied is rounded to one scale, which a row with an outlier would set for all: here each is as alone."""
    texts = [sentence(i, 5 + 3 * i) for i in range(12)]
    model = load(exports("classes"), artifact)
    assert model.classify(texts) == [model.classify([text])[0] for text in texts]
    model = load(exports("qa"), artifact)
    contexts = [sentence(i, 10 + 12 * i) for i in range(8)]  # of one window and of several
    assert model.answer(["where?"] * 8, contexts) == [model.answer("where?", context) for context in contexts]
    model = load(exports("bert"), artifact)
    texts = [f"{text} [MASK]" for text in texts]
    assert model.fill(texts) == [model.fill(text) for text in texts]
    if artifact == "int8":
        alone = np.concatenate([model.embed([text]) for text in texts])
        np.testing.assert_array_equal(model.embed(texts), alone)
    model = load(exports("bart"), artifact)
    alone, rows, write = [model.summarize([context], 12)[0] for context in contexts], [], model._runner.seq2seq

    def written(ids, *more):
        rows.append(len(ids))
        return write(ids, *more)

    monkeypatch.setattr(model._runner, "seq2seq", written)
    assert model.summarize(contexts, 12) == alone and rows == [1] * 8, "these weights would write the same together"


@pytest.mark.parametrize(
    "kind", ["FNet", "ConvBert", "MobileBert", "Nystromformer", "XLNet", "GPT2", "GPT2 without padding"]
)
def test_a_class_does_not_depend_on_padding(kind, tiny, tiny_bert, tmp_path):
    """Next to the model alone: padding would flow into the row, or be taken for its end; a decoder gives its cache, too."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "gpt2" if "GPT2" in kind else tiny_bert)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.5}
    sizes |= {"num_attention_heads": 2, "num_labels": 3}
    if "GPT2" in kind:
        sizes["pad_token_id"] = None if "without" in kind else 5  # not the tokenizer's
    else:
        sizes |= {"intermediate_size": 64, "d_inner": 64, "pad_token_id": 0, "d_head": 16}
    sizes |= {
        "ConvBert": {"embedding_size": 32},
        "MobileBert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        "Nystromformer": {"conv_kernel_size": 9, "segment_means_seq_len": 64, "num_landmarks": 64},
    }.get(kind, {})
    kind, _, _ = kind.partition(" ")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    alone = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    if kind == "MobileBert":  # as in that of the Hub: an embedding of padding, which the last word sees beside it
        alone.get_input_embeddings().weight.data[0].normal_(std=0.5)
    alone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [sentence(i, 3 + 9 * i) for i in range(4)]
    model = load(tmp_path)
    for text, found in zip(texts, model.classify(texts), strict=True):
        with torch.no_grad():
            expected = alone(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1).max()
        assert found[0]["score"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("head", ["SequenceClassification", "QuestionAnswering"])
def test_a_bart_that_sorts_texts_or_answers_is_no_summarizer(head, models, tmp_path):
    """bart-large-mnli is one; its weights lack nothing of a summarizer's but what would be tied to the words' own."""
    config = transformers.AutoConfig.from_pretrained(models / "bart")
    tokenizer = AutoTokenizer.from_pretrained(models / "bart")
    config.num_labels, config.eos_token_id = 3, tokenizer.sep_token_id  # its class is read there
    torch.manual_seed(0)
    alone = getattr(transformers, f"BartFor{head}")(config).eval()
    for part in (alone, tokenizer):
        part.save_pretrained(tmp_path)
    model = load(tmp_path)
    if head == "QuestionAnswering":
        assert model.task == "question-answering" and model.answer("the red house", sentence(1))["answer"]
        return
    texts = [sentence(i, 3 + 9 * i) for i in range(3)]
    for text, found in zip(texts, model.classify(texts), strict=True):
        with torch.no_grad():
            expected = (
                alone(**tokenizer([text], return_tensors="pt", return_token_type_ids=False)).logits[0].softmax(-1)
            )
        assert found[0]["score"] == pytest.approx(float(expected.max()), abs=1e-4)


def test_bigbird_reads_a_long_text_alike_after_a_short_one(tiny_bert, tmp_path):
    """It takes full attention for a text that is too short for its blocks, and of its own accord keeps it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "initializer_range": 0.5, "block_size": 8, "num_random_blocks": 1}
    torch.manual_seed(0)
    transformers.BigBirdForSequenceClassification(transformers.BigBirdConfig(**sizes, pad_token_id=0)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    long, short = sentence(0, 90), sentence(1, 9)
    first, second = load(tmp_path), load(tmp_path)
    expected = [first.classify([long])[0], load(tmp_path).classify([short])[0]]
    second.classify([short])
    assert second.classify([long])[0] == expected[0] != first.classify([sentence(2, 90)])[0]
    assert second.classify([long, short]) == expected
    reason = impossible(tmp_path, "text-classification")["onnx"]
    assert "another one for short texts" in reason


def test_led_reads_no_more_than_it_numbers(models):
    """What it reads and what it writes have lengths of their own names."""
    sizes = {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 32}
    tokenizer = AutoTokenizer.from_pretrained(models / "bart", model_max_length=int(1e30))
    assert longest_input(transformers.LEDConfig(**sizes), tokenizer) == 128


def test_a_model_without_segments_beside_a_tokenizer_that_tells_them(tiny_bert, tmp_path):
    """DistilBERT comes with BERT's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=1, n_heads=2)
    model = transformers.DistilBertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    expected = load(tmp_path / "whole").fill(["a [MASK]", sentence(1, 30) + " [MASK]"])
    write("onnx", tmp_path / "whole", model, tmp_path / "whole", tmp_path / "onnx", "fill-mask")
    found = Model(tmp_path / "onnx", "onnx").fill(["a [MASK]", sentence(1, 30) + " [MASK]"])
    for words, right in zip(found, expected, strict=True):
        assert [word["token"] for word in words] == [word["token"] for word in right]
        assert words[0]["score"] == pytest.approx(right[0]["score"], rel=1e-3)


SMALL = {"hidden_size": 32, "d_model": 32, "intermediate_size": 64, "num_attention_heads": 2, "initializer_range": 0.3}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}


@pytest.mark.parametrize(
    "kind, task, own",
    [
        ("Funnel", "text-classification", {"block_sizes": [1, 1], "n_head": 2, "d_head": 16, "d_inner": 64}),
        ("DeepseekV3", "text-generation", LATENT | {"head_dim": 8, "num_hidden_layers": 1, "first_k_dense_replace": 1}),
    ],
)
def test_a_graph_that_does_not_run_is_refused_in_one_line(kind, task, own, tiny_bert, tmp_path):
    """PyTorch traces both without a word."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), pad_token_id=0, **SMALL | own)
    head = "ForCausalLM" if task == "text-generation" else "ForSequenceClassification"
    torch.manual_seed(0)
    model = getattr(transformers, kind + head)(config).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"ONNX Runtime does not run the graph that PyTorch traced \(\S.*\)$"):
        write("onnx", tmp_path / "whole", model, tmp_path / "whole", tmp_path / "onnx", task)
    assert not (tmp_path / ".graphs").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qa", "classes", "t5", "bart"])
def test_a_graph_that_computes_something_else_is_refused(models, name, tmp_path, monkeypatch):
    """One layer's output is less by a fifth of it, in the graph alone."""
    source, task = models / name, task_of(models / name)
    model = load_torch(source, task).float()
    model.config.use_cache = True
    model.save_pretrained(tmp_path / "whole")
    monkeypatch.setattr("shared.export.formats._genai_builds", lambda _: False)  # so that all are traced here
    right = graphs._prepare

    def wrong(model):
        right(model)
        head = model.get_output_embeddings() or getattr(model, "qa_outputs", None) or model.classifier
        head.weight.data[:, : head.weight.shape[1] // 2 + 1] *= 0.8

    monkeypatch.setattr(graphs, "_prepare", wrong)
    with pytest.raises(UserError, match=r"its graph computes something else than PyTorch \(scores \S+ off"):
        write("onnx", tmp_path / "whole", model, source, tmp_path / "onnx", task)


def test_a_row_with_a_line_separator_stays_one(tmp_path):
    rows = [{"text": f"two{mark}lines", "label": "a"} for mark in "\u2028\x85\x0c"]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "test.jsonl").write_text(lines, encoding="utf8")
    assert score.test_rows(tmp_path, "text-classification", None)[0] == rows


def test_no_more_rows_are_scored_than_the_interval_asks_for(models, monkeypatch, capfd):
    model = load(models / "classes")
    rows = [json.loads(line) for line in (models / "classes" / "test.jsonl").read_text().splitlines()]
    assert score.score(model, rows, False)["scored_rows"] == 30
    found = score.score(model, rows, True)
    assert found["scored_rows"] == 30, "that all of a few are right does not say that all are"
    found = score.score(model, 4 * rows, True)
    assert found["scored_rows"] == 80 and found["accuracy_ci95"] == [100, 100]
    wrong = [row | {"label": "abc"[i % 3]} for i, row in enumerate(rows)]
    assert score.score(model, wrong, True)["scored_rows"] == 30, "so few rows leave it wide"
    assert len(score.settled([*rows, {"after": 1}], 9)) == 9
    monkeypatch.setattr(score.time, "monotonic", iter(range(0, 1000, 6)).__next__)
    score.score(model, wrong, True)
    assert "16 of at most 30 rows, accuracy " in capfd.readouterr().out


def test_impossible_pairs_are_refused_at_once_with_what_is_possible(models, tiny, tmp_path):
    with pytest.raises(UserError, match="cannot become int4: .* Possible: merged, fp16, int8, onnx, onnx-int8"):
        export(str(models / "qa"), ["onnx", "int4"], tmp_path / "out")
    with pytest.raises(UserError, match="cannot become onnx: falcon has attention code of its own"):
        export(str(tiny / "falcon"), ["onnx"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    from peft import PrefixTuningConfig, PromptEncoderConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(models / "gpt2")
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16)
    prompted = get_peft_model(model, config)
    prompted.save_pretrained(tmp_path / "prompted")
    AutoTokenizer.from_pretrained(models / "gpt2").save_pretrained(tmp_path / "prompted")
    assert set(impossible(tmp_path / "prompted", "text-generation")) == set(FORMATS)
    with pytest.raises(UserError, match="virtual tokens .* Possible: none"):
        export(str(tmp_path / "prompted"), ["merged"], tmp_path / "out")
    # Such a run is used as it is
    used = load(tmp_path / "prompted")
    rows = [[40, 50, 60, 70, 80], [90, 91]]
    prompted.eval()
    alone = [
        prompted.generate(
            input_ids=torch.tensor([row]),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=0,
            use_cache=False,  # peft 0.21 looks for the cache by the name that it had before transformers 5.24
        )
        for row in rows
    ]
    written = used.generate(rows, max_new_tokens=6)
    assert written == [out[0].tolist()[-6:] for out in alone]
    PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, base_model_name_or_path=str(models / "gpt2")
    ).save_pretrained(tmp_path / "prompted")
    with pytest.raises(UserError, match="adapters of type PREFIX_TUNING cannot be used here"):
        load(tmp_path / "prompted")


def test_litert_has_an_environment_of_its_own_and_no_windows(models, tmp_path, monkeypatch):
    """What its files give is tested there: tests/export/litert_checks.py."""
    monkeypatch.setattr(litert_file, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="cannot become litert: litert-torch has an environment of its own: make litert-env"
    ):
        export(str(models / "bert"), ["litert"], tmp_path / "out")
    monkeypatch.setattr(litert_file, "find_spec", lambda name: name)
    assert "litert" not in impossible(models / "bert", "fill-mask")
    config = transformers.MistralConfig.from_pretrained(models / "llama", sliding_window=16)
    config.save_pretrained(tmp_path / "mistral")
    shutil.copy(models / "llama" / "tokenizer.json", tmp_path / "mistral")
    assert "its layers see a window" in impossible(tmp_path / "mistral", "text-generation")["litert"]
    for package in ("ai_edge_litert", "tensorflow"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="run by ai-edge-litert or tensorflow: pip install ai-edge-litert"):
        Model(models / "bert", "litert")


def test_other_models_and_data_are_refused(models, tmp_path):
    config = transformers.BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path / "tags")
    with pytest.raises(UserError, match="is a model for token-classification; expected one for text-generation"):
        load(tmp_path / "tags")
    (tmp_path / "rows.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(UserError, match="found the columns words"):
        export(str(models / "gpt2"), ["merged"], tmp_path / "out", dataset=str(tmp_path / "rows.jsonl"))
    folder = tmp_path / "broken"
    (folder / "onnx").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "gpt2" / name, folder / "onnx")
    (folder / "onnx" / "golden.json").write_text("{}")
    (folder / "onnx" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="ONNX Runtime does not open it"):
        load(folder)


@pytest.mark.parametrize("kind", ["xlnet", "bert"])
def test_what_does_not_continue_a_text_is_not_loaded_for_it(kind, tiny_bert, tmp_path):
    """transformers loads both; XLNet wants a permutation for each token, and BERT would see what it is to predict."""
    sizes = {
        "hidden_size": 32,
        "d_model": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    sizes |= {"vocab_size": 30522} | ({"d_inner": 64, "d_head": 16} if kind == "xlnet" else {})
    config = transformers.CONFIG_MAPPING[kind](**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{kind} is no causal language model, so it does not continue a text"):
        load(tmp_path, task="text-generation")


def test_without_a_run_the_documentation_of_this_machine_is_scored(models):
    rows, name = score.test_rows(models, "question-answering", None)
    assert name == "docs:questions" and {"question", "context", "answers"} <= set(rows[0])
