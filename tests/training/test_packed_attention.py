"""shared/training/packed_attention.py on GPUs that are not here: what torch's attention is given, how often lengths are read."""

from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shared.training.packed_attention import PACKED, packed_attention

GROUPED = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, num_hidden_layers=3, attn_implementation=PACKED, **GROUPED)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("attend", [packed_attention, sdpa_attention_forward])
@pytest.mark.parametrize(
    ("capability", "dtype", "heads"),
    [
        ((7, 5), torch.float16, 4),
        ((8, 0), torch.bfloat16, 2),
        ((8, 0), torch.float32, 4),
        ((8, 0), "autocast", 2),
    ],
)
def test_grouped_heads_are_repeated_where_only_the_math_kernel_takes_them(
    attend, capability, dtype, heads, llama, monkeypatch
):
    """SmolLM2 and Llama 3 on a T4 must not get the quadratic kernel, nor in fp32 on any other. Under autocast rotated keys come
    in fp32, and are cast in torch's attention."""
    given = []

    def attention(query, key, value, enable_gqa=False, **kwargs):
        given.append((key.shape[1], value.shape[1], enable_gqa))
        return torch.empty_like(query)

    monkeypatch.setattr("shared.training.packed_attention._capability", lambda device: capability)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    mixed = dtype == "autocast"
    query, key = (torch.empty(1, n, 8, 16, dtype=torch.float32 if mixed else dtype) for n in (4, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        attend(llama.model.layers[0].self_attn, query, key, key, None)
    assert given == [(heads, heads, heads == 2)]


def test_the_lengths_of_a_row_are_read_once_for_all_layers(llama, monkeypatch):
    """Each reading is a wait for the GPU. The result is that of the texts alone."""
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self) or tolist(self))
    texts = [torch.arange(n) + n for n in (5, 3, 9)]
    starts = torch.tensor([0, 5, 8, 17])
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    with torch.no_grad():
        row = llama(torch.cat(texts)[None], position_ids=positions, cu_seq_lens_q=starts, use_cache=False).logits
        assert len(reads) == 1
        alone = torch.cat([llama(text[None], use_cache=False).logits for text in texts], 1)
    torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-4)


def flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """What torch.nn.attention.varlen documents, (tokens, heads, head_dim), by a mask of the whole row."""
    assert query.dtype == torch.bfloat16 and query.shape == key.shape == value.shape
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32 and max_q == max_k == cu_seq_q.diff().max()
    text = torch.repeat_interleave(torch.arange(len(cu_seq_q) - 1), cu_seq_q.diff())
    later = torch.arange(len(query))[:, None] - torch.arange(len(query))[None]
    left, right = (len(query) if size == -1 else size for size in window_size)
    seen = (text[:, None] == text[None]) & (later <= left) & (later >= -right)
    rows = (x.transpose(0, 1) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 3, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_one_call_for_all_texts_where_flash_attention_can(causal, window, monkeypatch):
    """Under autocast from compute capability 8.0 on: the same outputs and gradients as a call for each text."""
    layer = SimpleNamespace(num_key_value_groups=2, is_causal=causal)
    window = window if causal else None
    starts, calls = torch.tensor([0, 5, 8, 17]), []

    def attend(capability, dropout=0.0):
        calls.clear()
        monkeypatch.setattr("shared.training.packed_attention._capability", lambda device: capability)
        torch.manual_seed(0)
        given = [torch.randn(1, heads, 17, 16, requires_grad=True) for heads in (4, 2, 2)]
        options = {"cu_seq_lens_q": starts, "sliding_window": window, "scaling": 0.3, "dropout": dropout}
        with torch.autocast("cpu", torch.bfloat16):
            out = packed_attention(layer, *given, None, **options)[0]
        out.float().square().sum().backward()
        return [out, *(x.grad for x in given)], bool(calls)

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return flash(*args, **kwargs)

    counted.__signature__ = signature(varlen_attn)
    monkeypatch.setattr("shared.training.packed_attention.varlen_attn", counted)
    each, flashed = attend((7, 5))
    assert not flashed and not attend((8, 0), dropout=0.1)[1]
    one, flashed = attend((8, 0))
    assert flashed and one[0].shape == (1, 17, 4, 16)
    torch.testing.assert_close(one, each, atol=0.05, rtol=0.05)
    monkeypatch.setattr("shared.training.packed_attention.varlen_attn", lambda query, key, is_causal=False: None)
    assert not attend((8, 0))[1]  # PyTorch 2.10's
