"""In which type a step multiplies. Used by tasks/test_contract.py and gpu/test_gpu_check.py."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.training.plan import operations


class Products(TorchDispatchMode):
    """Counts floating-point operations of matrix products and attention by the type of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.flops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if "linear_cross_entropy" in str(func):  # torch's own counter does not know it: forward and both gradients
            self.flops[tensors[0].dtype] += 6 * tensors[0].numel() * len(tensors[1])
        elif count := operations(func, args, kwargs or {}, out):
            # A CPU's attention that learns its bias, T5's, is made of fp32 products whatever enters it; a GPU's is not
            of_attention = func is torch.ops.aten.bmm.default and not tensors[0].is_cuda
            dtype = torch.bfloat16 if of_attention else tensors[1].dtype  # the first one may be a bias
            self.flops[dtype] += count
        return out

    def half(self) -> float:
        """The share that is computed in half precision."""
        return (self.flops[torch.float16] + self.flops[torch.bfloat16]) / max(1, self.flops.total())
