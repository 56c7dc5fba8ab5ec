"""What this machine computes on: precision by compute capability, speed, memory. Called by launch.py and plan.py."""

import os
import platform
import sys
import time

from shared import UserError


def gpus() -> list[tuple[int, int]]:
    """Compute capability of each GPU of this machine."""
    import torch

    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def choose_precision(gpus: list[tuple[int, int]]) -> str:
    """bf16 from compute capability 8.0 on (Ampere); fp16 on Volta and Turing, such as a T4, which "supports" bf16 by slow
    emulation only; fp32 on older GPUs, whose fp16 is no faster, on CPU and on MPS.

    Args:
        gpus: compute capability of each; the oldest decides, since all processes must compute alike.
    """
    oldest = min(gpus, default=(0, 0))
    return "bf16" if oldest >= (8, 0) else "fp16" if oldest >= (7, 0) else "fp32"


def multiplies_bf16() -> bool | None:
    """Whether this CPU has instructions for bf16 (AVX-512 BF16, AMX, those of Arm), with which it trains faster than in fp32;
    None where PyTorch does not tell."""
    import torch

    found = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has for name, has in found.items() if name.endswith("bf16")) if found else None


def precision_flags(named: set[str], gpus: list[tuple[int, int]]) -> list[str]:
    """Flags of the precision, to stand before all others.

    Args:
        named: which of `bf16` and `fp16` YAML or command line set. Then they decide, and what they do not name is off: trl
            would turn bf16 on, on a CPU too.
    """
    chosen = "fp32" if named else choose_precision(gpus)
    return [part for name in ("bf16", "fp16") for part in (f"--{name}", str(name == chosen).lower())]


def dtype_of(args):
    """The `torch.dtype` that a run with these training arguments computes in."""
    import torch

    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32


def check_precision(fp16: bool, bf16: bool, gpus: list[tuple[int, int]]) -> None:
    """Refuses what this hardware does not have.

    Raises:
        UserError: fp16 without a GPU; bf16 on a GPU older than Ampere.
    """
    if fp16 and not gpus:
        raise UserError("fp16 needs a GPU and none was found: run with `--fp16 false`, or use a laptop configuration.")
    if bf16 and gpus and min(gpus) < (8, 0):
        remedy = "`--bf16 false --fp16 true`" if choose_precision(gpus) == "fp16" else "`--bf16 false`"
        raise UserError(f"bf16 is only emulated, slowly, on this GPU: run with {remedy}.")


def device_type() -> str:
    """`cuda`, `mps` (Apple's GPU, in fp32) or `cpu`: where a run computes, as Trainer chooses."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "true"  # several processes: they cannot share Apple's GPU
    return "mps" if torch.backends.mps.is_available() and not on_cpu else "cpu"


def cores() -> int:
    """Cores that this process may use; those of the machine where the system does not tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def hardware() -> str:
    """One line: what this process computes on."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if device_type() == "mps":
        return f"Apple GPU, MPS ({platform.machine()})"
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def matmul_flops(seconds: float = 1.0, dtype=None) -> float:
    """Floating-point operations per second of a square matrix product here, in fp32 or another `torch.dtype`: the peak of a plan.

    1024 rows fill a CPU's cores and not a GPU's, where 4096 do.
    """
    import torch

    device = device_type()
    size = 4096 if device == "cuda" else 1024
    a, out = (torch.ones(size, size, device=device, dtype=dtype or torch.float32) for _ in range(2))
    torch.matmul(a, a, out=out)[0, 0].item()
    count, start = 0, time.time()
    while time.time() - start < seconds:
        torch.matmul(a, a, out=out)[0, 0].item()
        count += 1
    return count * 2 * size**3 / (time.time() - start)


def peak_memory_gb() -> float:
    """Largest resident memory of this process in GB (Linux counts ru_maxrss in KiB); memory of CUDA's GPU where there is one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
