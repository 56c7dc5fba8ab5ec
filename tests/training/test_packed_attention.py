"""shared/training/packed_attention.py on GPUs that are not here: what torch's attention is given, how often lengths are read."""

import pytest
import torch
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
