"""Attention for several texts in one row without padding, each seeing only itself: `attn_implementation=PACKED`. Used by tasks.

FlashAttention does this, but neither a T4 nor a CPU has it, and a block mask costs the squared length of the row.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"


def packed_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, sliding_window=None, **kwargs):
    """Attention inside each text of a packed row, causal where the module is.

    Args:
        query, key, value: (1, heads, tokens, head_dim); key and value may have fewer heads (grouped queries).
        cu_seq_lens_q: (texts + 1,), where each text starts, and the end; absent where rows are padded (generation).
        sliding_window: a causal model's token sees so many tokens, itself included; None: all before it.

    Work grows with the sum of squared lengths of the texts.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs = {name: kwargs[name] for name in ("dropout", "scaling") if name in kwargs}
    lengths = _lengths(cu_seq_lens_q)
    parts = [
        sdpa_attention_forward(module, q, k, v, _window(q, sliding_window), **kwargs)[0]
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _lengths(starts: torch.Tensor) -> list[int]:
    """Tokens of each text, read once a batch: on a GPU each reading waits for all that was started, and every layer asks."""
    if not hasattr(starts, "lengths"):
        starts.lengths = starts.diff().tolist()
    return starts.lengths


def _window(query: torch.Tensor, size: int | None) -> torch.Tensor | None:
    """(1, 1, tokens, tokens), True where a token sees another; None where the window holds the whole text."""
    tokens = query.shape[2]
    if size is None or tokens <= size:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return seen.tril_().triu_(1 - size)[None, None]


def packed_mask(batch_size, q_length, kv_length, attention_mask=None, allow_is_causal_skip=True, **kwargs):
    """None for a packed row: transformers finds its texts by their positions, and would build a mask that `packed_attention` does
    not read, of the squared length of the row. As for sdpa where rows are padded, or a text is continued.
    """
    if batch_size == 1 and q_length == kv_length > 1 and attention_mask is None and not allow_is_causal_skip:
        return None
    skip = {"attention_mask": attention_mask, "allow_is_causal_skip": allow_is_causal_skip}
    return sdpa_mask(batch_size, q_length, kv_length, **skip, **kwargs)


_use_gqa_in_sdpa = sdpa_attention.use_gqa_in_sdpa


def take_grouped(attention_mask, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's attention is given the fewer key and value heads of grouped queries; else they are repeated before.

    transformers 5.24 gives them whatever the GPU. Of torch's kernels FlashAttention takes them, in half precision from compute
    capability 8.0 on: a T4, and fp32, would get the MATH kernel, which holds the squared length of the row for each head.
    """
    device = key.device.type  # autocast casts inside of torch's attention: rotated keys still come in fp32
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key.dtype
    gpu = _capability(key.device)
    quadratic = gpu and (gpu < (8, 0) or dtype == torch.float32)
    return not quadratic and _use_gqa_in_sdpa(attention_mask, key, value)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of a GPU of CUDA; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


sdpa_attention.use_gqa_in_sdpa = take_grouped
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
