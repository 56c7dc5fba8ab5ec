"""shared/training/plan.py: live bytes counted by hand, the peak of a known model, 4-bit weights, plans that do not fit."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shared.training import plan


def test_live_bytes_are_those_of_storages_alive_at_the_same_time():
    with plan.LiveBytes() as live:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1
        assert live.now == live.peak == 8000
        seen = b.view(10, 100)[2:4]  # no storage of its own
        del a
        assert live.now == 4000
        c = seen * 2  # 800
        del b, seen
        assert live.now == 800 and live.peak == 8000
        del c
    assert live.now == 0


class Classifier(nn.Module):
    """An embedding that is frozen, and a layer that is trained."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(1000, 2000), nn.Linear(2000, 500, bias=False)
        self.embed.weight.requires_grad_(False)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.out(self.embed(input_ids)))

    def get_output_embeddings(self):
        return None


def test_the_peak_of_a_known_model():
    frozen, trained = 1000 * 2000 * 4, 2000 * 500 * 4
    found = plan.estimate(Classifier(), rows=1, length=1, kept=0, precision=torch.float32)
    assert found["weights"] == frozen + trained
    # weights, gradient and both moments of Adam, and next to nothing else
    assert found["peak"] == pytest.approx(frozen + 4 * trained, rel=0.01)
    assert found["flops"] == 2 * 2 * 2000 * 500  # forward, and the gradient of the layer; none for what is frozen
    # 5,000 tokens: what entered the layer (2,000 wide) and what left it (500): logits and their gradient, log-softmax and its
    many = plan.estimate(Classifier(), rows=50, length=100, kept=0, precision=torch.float32)
    states = frozen + 3 * trained  # there is no gradient yet when the loss is computed
    assert states + 5000 * 4 * (2000 + 2 * 500) < many["peak"] < states + trained + 5000 * 4 * (2000 + 4 * 500)


def llama(**sizes) -> LlamaForCausalLM:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes))


def test_four_bit_weights_count_half_a_byte_but_embeddings_and_head():
    model = llama()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) - 512 * 1000
    rest = sum(p.numel() for p in model.parameters()) - linear
    found = plan.estimate(model, 1, 8, 8, torch.float16, in_4bit=True)
    unpacked = 2 * 512 * 1024  # one matrix at a time, in 16 bits
    assert found["weights"] == pytest.approx(0.53 * linear + 4 * rest + unpacked, rel=0.01)


def planned(model, capsys, batch=32, facts=None, **changes) -> str:
    args = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "world_size": 1,
        "max_steps": -1,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "save_total_limit": 2,
        "output_dir": "outputs/x",
        "fp16": True,
        "bf16": False,
    }
    run_args = SimpleNamespace(hardware="t4", resolved={"fp16": True})
    rows = {"rows": 1000, "tokens": 400_000, "longest_row": 1024} | (facts or {})
    plan.print_plan(model, SimpleNamespace(**args | changes), run_args, **rows)
    return capsys.readouterr().out


def test_a_plan_that_does_not_fit_says_what_to_change(capsys):
    with torch.device("meta"):
        wide = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=1024, n_head=16))
    said = planned(wide, capsys)
    assert "on T4: about" in said and "of 15 GB" in said and "steps 16" in said
    assert "It will not fit. With --gradient_checkpointing true --per_device_train_batch_size 16" in said
    assert "--gradient_accumulation_steps 4 it would take about" in said  # 32 x 2 = 16 x 4
    assert "It will not fit" not in planned(wide, capsys, batch=4)


def test_a_gpu_does_not_hold_the_weights_of_attention(capsys):
    """With dropout a CPU holds them: 2 layers x 8 x 16 heads x 1024 x 1024, as numbers and more than once."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=1024, n_head=16))
    here = plan.estimate(model, 8, 1024, 1, torch.float16)["peak"]
    model.set_attn_implementation("planned")
    gpu = plan.estimate(model, 8, 1024, 1, torch.float16)["peak"]
    assert here - gpu > 2 * 8 * 16 * 1024 * 1024 * 2


def test_a_product_that_names_the_type_of_its_result_is_counted():
    """As trl's DPO on a GPU computes its gradients: (4, 5) x (5, 6)."""
    a, b, out = (torch.empty(shape, device="meta") for shape in ((4, 5), (5, 6), (4, 6)))
    call = torch.ops.aten.addmm.dtype_out
    assert plan.operations(call, (out, a, b, torch.float32), {"out": out}, out) == 2 * 4 * 5 * 6


def test_a_model_that_is_too_large_for_one_row(capsys):
    large = llama(hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    assert "Not even one row at a time would, with gradient checkpointing" in planned(large, capsys, batch=1)


def test_a_loss_in_pieces_takes_the_memory_of_one_and_the_time_of_all(capsys):
    """GPT-2 small on a T4, 2,500 steps of half a million tokens: 6 operations a weight and token, attention besides."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    rows = 2500 * 512
    facts = {"rows": rows, "tokens": rows * 1024, "positions_at_once": 512}
    said = planned(model, capsys, batch=8, facts=facts, gradient_accumulation_steps=64, max_steps=2500)
    expected = rows * 1024 * (6 * 124e6 + 12 * 12 * 768 * 1024) / (plan.OF_DATA_SHEET * 65e12) / 3600
    assert float(re.search(r"([\d.]+) hours of training", said)[1]) == pytest.approx(expected, rel=0.1)
    assert "It will not fit" not in said and float(re.search(r"about ([\d.]+) GB memory", said)[1]) < 15


def test_a_pair_is_two_texts_and_the_reference_reads_them_too(capsys):
    """Logits are held in pieces: trl computes them so on a GPU."""
    facts = {"rows": 10_000_000, "tokens": 8_000_000_000}
    pairs = planned(llama(), capsys, batch=4, facts=facts | {"pairs": True})
    texts = planned(llama(), capsys, batch=8, facts=facts | {"rows": 20_000_000, "positions_at_once": plan.TILES})
    memory = [re.search(r"about ([\d.]+) GB memory", said)[1] for said in (pairs, texts)]
    hours = [float(re.search(r"([\d.]+) hours of training", said)[1]) for said in (pairs, texts)]
    assert memory[0] == memory[1] and hours[0] == pytest.approx(1.5 * hours[1], rel=0.02)
    assert re.search(r"steps [\d,]+", pairs)[0] == re.search(r"steps [\d,]+", texts)[0]
