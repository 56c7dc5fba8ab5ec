"""Weights in 4 bits: all of them, in every architecture, or one line that says so."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from checkout import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from shared import UserError
from shared.training.four_bit import four_bit, packable
from shared.training.plan import quantizable

RUN = SimpleNamespace(fp16=False, bf16=False, gradient_checkpointing=False)


@pytest.fixture(autouse=True)
def path_of_the_task(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tasks" / "chat_sft")


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_all_layers_but_the_head_are_packed_and_the_plan_counts_them(name, tiny):
    import methods

    model = methods.load_model(tiny / name, "qlora", RUN, in_4bit=True)
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.dtype == torch.float32]
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    positions = {model.transformer.wpe.weight} if name == "gpt2" else set()
    assert len(packed) == {"llama": 14, "gpt2": 8, "falcon": 8}[name] and set(matrices) == ends | positions
    planned = methods.load_model(tiny / name, "qlora", RUN, in_4bit=True, empty=True).requires_grad_(False)
    sizes = Counter(layer.in_features * layer.out_features for layer in packed)
    assert Counter(quantizable(planned).values()) == sizes


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_they_compute_as_the_run_does(name, tiny):
    args = SimpleNamespace(fp16=name == "fp16", bf16=name == "bf16")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
    assert four_bit(AutoConfig.from_pretrained(tiny / "llama"), "llama", args).bnb_4bit_compute_dtype == dtype


@pytest.mark.parametrize("empty", [False, True])
def test_experts_that_are_no_linear_layers_are_refused(empty, tmp_path):
    """Also by a plan. transformers would leave them as they are, and say nothing."""
    import methods

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=100, num_key_value_heads=2, num_local_experts=4, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "mixtral")
    assert packable(model)
    with pytest.raises(UserError, match=r"mixtral: only \d+% of its layers' weights can be held in 4 bits"):
        methods.load_model(tmp_path / "mixtral", "qlora", RUN, in_4bit=True, empty=empty)
