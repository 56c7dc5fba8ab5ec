"""Attention for several texts in one row without padding, each seeing only itself: `attn_implementation=PACKED`. Used by tasks.

FlashAttention does this, but neither a T4 nor a CPU has it, and a block mask costs the squared length of the row.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"


def packed_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """Attention inside each text of a packed row, causal where the module is.

    Args:
        query, key, value: (1, heads, tokens, head_dim); key and value may have fewer heads (grouped queries).
        cu_seq_lens_q: (texts + 1,), where each text starts, and the end; absent where rows are padded (generation).

    Work grows with the sum of squared lengths of the texts.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs = {name: kwargs[name] for name in ("dropout", "scaling") if name in kwargs}
    lengths = cu_seq_lens_q.diff().tolist()
    parts = [
        sdpa_attention_forward(module, q, k, v, None, **kwargs)[0]
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=1), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
