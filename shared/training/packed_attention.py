"""Attention for several texts in one row without padding, each seeing only itself: `attn_implementation=PACKED`. Used by tasks.

FlashAttention does this, but neither a T4 nor a CPU has it: there each text is a call of its own. A block mask would cost the
squared length of the row.
"""

from inspect import signature

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"


def packed_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, sliding_window=None, **kwargs):
    """Attention inside each text of a packed row, causal where the module is.

    Args:
        query, key, value: (1, heads, tokens, head_dim); key and value may have fewer heads (grouped queries).
        cu_seq_lens_q: (texts + 1,), where each text starts, and the end; absent where rows are padded (generation).
        sliding_window: a causal model's token sees so many tokens, itself included; None: all before it.

    Work grows with the sum of squared lengths of the texts: one call for all where FlashAttention can, else a call each.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs = {name: kwargs[name] for name in ("dropout", "scaling") if name in kwargs}
    lengths = _lengths(cu_seq_lens_q)
    if dtype := flash_dtype(query, kwargs.get("dropout", 0.0)):
        groups = query.shape[1] // key.shape[1]
        q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
        before = -1 if sliding_window is None else sliding_window - 1
        window = (before, 0) if getattr(module, "is_causal", True) else (-1, -1)
        bounds, longest = cu_seq_lens_q.int(), max(lengths)
        scale = kwargs.get("scaling")
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=window)[None], None
    parts = [
        sdpa_attention_forward(module, q, k, v, _window(q, sliding_window), **kwargs)[0]
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def flash_dtype(query: torch.Tensor, dropout: float) -> torch.dtype | None:
    """The dtype in which torch's FlashAttention computes texts of different lengths; None where it does not.

    It needs a GPU of compute capability 8.0, half precision, heads of at most 256 columns, and has no dropout. In PyTorch 2.10
    it has neither scale nor window.
    """
    dtype, gpu = _computed_in(query), _capability(query.device)
    takes = dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256 and not dropout
    return dtype if gpu and gpu >= (8, 0) and takes and "window_size" in signature(varlen_attn).parameters else None


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
    gpu = _capability(key.device)
    quadratic = gpu and (gpu < (8, 0) or _computed_in(key) == torch.float32)
    return not quadratic and _use_gqa_in_sdpa(attention_mask, key, value)


def _computed_in(given: torch.Tensor) -> torch.dtype:
    """Autocast casts inside of torch's attention: rotated keys still come in fp32."""
    device = given.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else given.dtype


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of a GPU of CUDA; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


sdpa_attention.use_gqa_in_sdpa = take_grouped
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
