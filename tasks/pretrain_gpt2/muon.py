"""Muon for the hidden matrices, AdamW for everything else, as one optimizer. Used by trainer_gpt2.py.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
orthogonal matrix, so that every direction is learned at the same speed; in the scaling of Liu et al. (2025,
arXiv:2502.16982) it takes AdamW's learning rate and weight decay. `torch.optim.Muon` computes in bf16, which CPUs and a T4
emulate (44 times slower than fp32 for 256 x 1024 on a CPU), and takes GPT-2's joint query-key-value matrix for one.
"""

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of Jordan 2024


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The matrix with all singular values brought near 1 (0.7 to 1.2) by the quintic Newton-Schulz iteration, in fp32."""
    a, b, c = QUINTIC
    x = matrix.float() / (matrix.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonAdamW(torch.optim.AdamW):
    """torch's AdamW, except in groups with `muon: n`, n > 0: each of their matrices is n matrices side by side for Muon.

    A group for Muon holds 2-D parameters of shape (in, n * out), as GPT-2's `Conv1D` has them.
    """

    MOMENTUM = 0.95

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, fused=True, **options)
        # Else GradScaler (fp16) would leave it to the fused AdamW to pass over a step with infinite gradients.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure=None):
        """One optimizer step; Muon's gradients are used up and freed."""
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    # The count is not used: AdamW looks for one in each state that a checkpoint holds.
                    state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(parameter)
                state["step"] += 1
                momentum = state["momentum"].lerp_(parameter.grad, 1 - self.MOMENTUM)
                update = parameter.grad.lerp(momentum, self.MOMENTUM)  # Nesterov
                parts = [orthogonalize(part) for part in update.chunk(group["muon"], dim=1)]
                scale = 0.2 * max(parts[0].shape) ** 0.5  # entries as large as AdamW's updates
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(torch.cat(parts, dim=1).to(parameter.dtype), alpha=-group["lr"] * scale)
                parameter.grad = None  # AdamW passes over it
        return super().step(closure)


def parameter_groups(model, muon: bool, weight_decay: float) -> list[dict]:
    """Hidden matrices, decayed, with Muon if asked; embeddings, head, biases and norms, not decayed, always with AdamW."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables.add(id(model.get_output_embeddings().weight))
    joint, single, others = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim == 2 and id(parameter) not in tables
            (others if not matrix else joint if "c_attn" in name else single).append(parameter)
    return [
        {"params": joint, "muon": 3 * muon, "weight_decay": weight_decay},
        {"params": single, "muon": int(muon), "weight_decay": weight_decay},
        {"params": others, "muon": 0, "weight_decay": 0.0},
    ]
