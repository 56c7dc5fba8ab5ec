"""NEFTune: noise on the embeddings while training (`--neftune_noise_alpha`, https://arxiv.org/abs/2310.05914). Called by
`checkpoints.train`.

Upstream scales it by the length of a row as the model reads it: padding counts, and of texts packed in one row all of them, so
that a larger micro-batch would mean less noise. Here it is scaled by the tokens of each text, as in the paper.
"""

import torch


def add_noise(trainer) -> list:
    """Handles of the hooks that add it, none where it was not asked for; upstream then adds none."""
    alpha, trainer.neftune_noise_alpha = trainer.neftune_noise_alpha, None
    if alpha is None:
        return []
    model, now = trainer.model, {}

    def read(module, args, inputs):
        starts, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
        if starts is not None:
            now["tokens"] = starts.diff().repeat_interleave(starts.diff())[None]
        else:
            now["tokens"] = None if mask is None else mask.sum(1, keepdim=True).expand_as(mask)

    def noisy(module, given, embedded):
        if not module.training:
            return embedded
        tokens = now.get("tokens")
        if tokens is None or tokens.shape != embedded.shape[:2]:  # a decoder's own, or nothing is padded
            tokens = torch.full(embedded.shape[:2], embedded.shape[1], device=embedded.device)
        most = alpha / (tokens * embedded.shape[2]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * most[..., None].to(embedded.dtype)

    inner = getattr(model, "get_base_model", lambda: model)()
    hooks = model.register_forward_pre_hook(read, with_kwargs=True)
    return [hooks, inner.get_input_embeddings().register_forward_hook(noisy)]
