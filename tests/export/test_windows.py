"""Windows and soft caps in exported graphs: ten tiny architectures next to PyTorch on texts longer than the window, what is
refused, and a gate that looks past the window."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from shared import UserError
from shared.export import graphs, score
from shared.export.export import export, main
from shared.export.formats import write
from shared.inference.onnx_runner import OnnxRunner
from shared.inference.sampling import pad_left, positions_of

WINDOW, VOCABULARY = 16, 300
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
SIZES |= {
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
DECODER = SIZES | {"num_hidden_layers": 1, "num_key_value_heads": 2, "sliding_window": WINDOW}
SLIDING = {"layer_types": ["sliding_attention"]}
OPTIONAL = {"use_sliding_window": True, "max_window_layers": 0}
HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
# Those that share their attention's code with none of the others; Gemma 2 has a layer of each kind
CONFIGS = {
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", OPTIONAL),
    "qwen3": ("Qwen3Config", OPTIONAL | {"head_dim": 16}),
    "starcoder2": ("Starcoder2Config", {}),
    "gemma2": ("Gemma2Config", HEADS | CAPS | {"num_hidden_layers": 2}),
    "gemma3": ("Gemma3TextConfig", HEADS | SLIDING),
    "phi3": ("Phi3Config", {}),
    "cohere2": ("Cohere2Config", SLIDING | {"head_dim": 16}),
    "olmo3": ("Olmo3Config", SLIDING),
    "modernbert": (
        "ModernBertConfig",
        {
            "num_hidden_layers": 2,
            "local_attention": WINDOW,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
}


def test_ten_architectures_with_windows_and_caps_match_past_the_window(tmp_path):
    """Logits of a row, of a row padded in a batch, and of tokens added one by one: all as PyTorch's own attention has them."""
    rows = [torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (60, 25)]
    for name, (kind, own) in CONFIGS.items():
        torch.manual_seed(0)
        encoder = name == "modernbert"
        config = getattr(transformers, kind)(**(SIZES if encoder else DECODER) | own)
        auto = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="eager").eval()
        folder = tmp_path / name
        config.save_pretrained(folder)
        ids, mask = pad_left(rows, 0)
        with torch.no_grad():
            if encoder:
                ids, mask = ids.flip(1), mask.flip(1)  # padding on the right, as encoders have it
                expected = model(input_ids=ids, attention_mask=mask).logits
            else:
                expected = model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits
        expected = expected.numpy()
        graphs.export(model, folder, "fill-mask", False) if encoder else graphs.export(
            model, folder, "text-generation", False
        )
        runner = OnnxRunner(folder, "fill-mask" if encoder else "text-generation")
        if encoder:
            (found,) = runner.encode({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
            for i, row in enumerate(rows):
                np.testing.assert_allclose(found[i, : len(row)], expected[i, : len(row)], atol=1e-3, err_msg=name)
            continue
        np.testing.assert_allclose(runner.logits(rows[0]), expected[0], atol=1e-3, err_msg=name)
        decoding = runner.start([row[:-2] for row in rows], 0, 2)
        while decoding.read():
            pass
        for left in (3, 2):
            np.testing.assert_allclose(decoding.logits.numpy(), expected[:, -left], atol=1e-3, err_msg=name)
            decoding.feed(torch.tensor([row[1 - left] for row in rows]))


@pytest.mark.parametrize(
    "kind, own, reason",
    [
        (
            "Llama4TextConfig",
            {"attention_chunk_size": 16, "num_local_experts": 1, "intermediate_size_mlp": 64},
            "chunks",
        ),
        ("Gemma3TextConfig", HEADS | {"use_bidirectional_attention": True}, "see later ones"),
    ],
)
def test_attention_that_no_node_computes_is_refused_by_name(kind, own, reason, tmp_path):
    config = getattr(transformers, kind)(**DECODER | own)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=f"{reason}.* which no node of ONNX Runtime computes"):
        graphs.export(model, tmp_path, "text-generation", False)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_is_one_line_and_not_its_graph(tmp_path, capfd):
    """Embeddings whose base grows with the text."""
    dynamic = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | {"rope_parameters": dynamic})).eval()
    with pytest.raises(UserError, match=r"PyTorch cannot trace it \(.*\)$"):
        graphs.export(model, tmp_path, "text-generation", False)
    assert capfd.readouterr() == ("", "")


def test_experts_are_refused_once_for_all_formats_of_a_graph(tiny, tmp_path, capsys):
    """Tracing changes the model: it is not asked again for the next format, and another kind of format is written."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    sizes = DECODER | {"vocab_size": len(tokenizer), "sliding_window": None, "num_local_experts": 4}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "the cat sat on the mat and looked at the dog"}\n' * 3)
    options = ["--output", str(tmp_path / "out"), "--dataset", str(tmp_path / "rows.jsonl")]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model"), "--to", "onnx", "onnx-int8", "int4", "fp16", *options])
    out, error = capsys.readouterr()
    assert "model cannot become onnx, onnx-int8, int4: its layers choose among experts" in error
    assert "--accept_loss" not in error, "which would not help"
    assert error.count("\n") == 1 and "| fp16 |" in out


def test_padding_is_hidden_however_large_scores_are(tmp_path):
    """Those of MobileBERT are; ONNX Runtime takes 10,000 from them, unless told otherwise."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_hidden_layers=1, hidden_act="relu")
    model = transformers.BertForMaskedLM(config).eval()
    own = model.bert.encoder.layer[0].attention.self
    for part in (own.query, own.key):
        part.weight.data *= 1000
    ids, mask = torch.randint(3, VOCABULARY, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[1, 4:] = mask[1, 4:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits.numpy()
    config.save_pretrained(tmp_path)
    graphs.export(model, tmp_path, "fill-mask", False)
    (found,) = OnnxRunner(tmp_path, "fill-mask").encode({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    np.testing.assert_allclose(found[1, :4], expected[1, :4], atol=1e-3)


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
STRETCHED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "kind, rope, own",
    [
        ("Llama", LINEAR, {}),
        ("Llama", YARN, {}),
        ("Llama", STRETCHED, {}),
        ("Qwen2", YARN, {}),
        ("Mistral", STRETCHED, {}),
        ("SmolLM3", {"rope_type": "default"}, {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}),
    ],
)
def test_scaled_rotary_embeddings_are_in_the_graph(kind, rope, own, tiny, tmp_path):
    """onnxruntime-genai would build these without a word about the scaling, or fail."""
    torch.manual_seed(0)
    own = {"sliding_window": None, "rope_parameters": {"rope_theta": 10000.0, **rope}} | own
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**DECODER | own)).eval()
    AutoTokenizer.from_pretrained(tiny / "llama").save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "whole")
    row = torch.randint(3, VOCABULARY, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([row])).logits[0].numpy()
    write("onnx", tmp_path / "whole", model, tmp_path / "whole", tmp_path / "onnx", "text-generation")
    found = OnnxRunner(tmp_path / "onnx", "text-generation").logits(row)
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.fixture
def mistral(tiny, tmp_path):
    """A run of a Mistral that sees 48 tokens, with short test rows: longer than the window are only several together."""
    config = transformers.MistralConfig(**DECODER | {"sliding_window": 48, "vocab_size": 50257, "head_dim": 16})
    torch.manual_seed(0)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tiny / "gpt2").save_pretrained(tmp_path / "run")
    rows = [{"text": f"house {i} of the town near the river"} for i in range(8)]
    (tmp_path / "run" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "run"


def test_the_gate_looks_past_the_window(mistral, tmp_path, monkeypatch):
    rows, _ = score.test_rows(mistral, "text-generation", None)
    tokenizer = AutoTokenizer.from_pretrained(mistral)
    config = transformers.AutoConfig.from_pretrained(mistral)
    prompts = score.golden_prompts(rows, tokenizer, "text-generation")
    longer, prompts = score.past_the_window(rows, prompts, tokenizer, config, "text-generation")
    assert [row.get("after") for row in longer[len(rows) :]] == [48, 48] and len(prompts) == 10
    assert all(len(tokenizer(prompt)["input_ids"]) > 48 for prompt in prompts[-2:])
    config.sliding_window = None
    assert score.past_the_window(rows, prompts, tokenizer, config, "text-generation") == (rows, prompts)
    export(str(mistral), ["onnx"], tmp_path / "right")
    result = json.loads((tmp_path / "right" / "export.json").read_text())["artifacts"]["onnx"]
    assert result["identical_outputs"] == 1 and result["scored_rows"] == 10

    def forgetful(each, folder, model, *others):
        for layer in model.model.layers:
            layer.self_attn.config.sliding_window = None
        model.save_pretrained(folder)
        write(each, folder, model, *others)

    monkeypatch.setattr("shared.export.export.write", forgetful)
    with pytest.raises(UserError, match="refused and removed: onnx: "):
        export(str(mistral), ["onnx"], tmp_path / "wrong")
    assert not (tmp_path / "wrong" / "onnx").exists()
    shutil.rmtree(tmp_path / "wrong")


def test_fp32_graphs_must_write_what_the_original_writes():
    same = {"perplexity": 20.0, "identical_outputs": 0.9}
    assert "90 % of the outputs" in score.too_different("text-generation", "onnx", same, same)
    assert score.too_different("text-generation", "onnx", same, same | {"identical_outputs": 0.95}) is None
    assert score.too_different("text-generation", "int4", same, same) is None
