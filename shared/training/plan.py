"""What `--dry_run` prints: parameters, memory, disk and time of a run, here or on a GPU, and what to change if it does not fit.

Called by each `tasks/*/train.py` once data and model are there. The estimate runs two optimizer steps with fake tensors, which
have shapes and no contents, and counts the storages that are alive at the same time: nothing is computed or allocated.
benchmarks/plan_memory.py compares it with measured peaks; the README of tasks/chat_sft has the ratios.
"""

import inspect
import math
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from shared.training.four_bit import packable
from shared.training.hardware import dtype_of, matmul_flops
from shared.training.packed_attention import PACKED

BUFFERS = 0.1e9  # bytes of the libraries once they train on a CPU, above what the planning process holds
GAPS = 1.1  # of what training holds beside the weights: rows of different lengths leave gaps in the heap of a CPU's process
UTILISATION = 0.4  # share of the peak that training reaches; 0.4 to 0.5 was measured on 2 CPU cores, never on a GPU
OF_DATA_SHEET = 0.33  # the same of a data sheet's peak, which no card holds for hours: an estimate, not measured
TILES = 512  # positions whose logits take about what trl's DPO holds of them on a GPU
NF4 = 0.53  # bytes a weight: 4 bits, and doubly quantized scales (Dettmers et al. 2023)


@dataclass(frozen=True)
class Hardware:
    """One device: usable memory in bytes, peak floating-point operations a second, and the precision it computes in."""

    memory: float
    flops: float
    precision: torch.dtype


# NVIDIA's data sheets: dense tensor-core peak in the precision named. Memory: what is left beside the CUDA context.
GPUS = {
    "t4": Hardware(15.0e9, 65e12, torch.float16),
    "l4": Hardware(22.5e9, 121e12, torch.bfloat16),
    "a100": Hardware(79e9, 312e12, torch.bfloat16),
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages that are alive, `now` and at most (`peak`), and floating-point operations, `flops`.

    Not `FlopCounterMode`: it keeps tensors alive that gradient checkpointing would free (torch 2.13).
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.seen = weakref.WeakKeyDictionary()

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor until it is freed; a second tensor on the same storage adds nothing."""
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = self.seen[storage] = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += operations(func, args, kwargs, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


# torch 2.13 counts the attention of GPUs and not the CPU's, in which a plan is computed
for _part in ("", "_backward"):
    _gpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{_part}")
    flop_registry.setdefault(
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{_part}"), flop_registry[_gpu]
    )


def without_dropout(*args, dropout=0.0, **kwargs):
    """Attention as a GPU's kernels do it: they do not hold the matrix of weights for the dropout, which the CPU's do."""
    return sdpa_attention_forward(*args, **kwargs)


AttentionInterface.register("planned", without_dropout)
AttentionMaskInterface.register("planned", sdpa_mask)


def quantizable(model) -> dict[int, int]:
    """The frozen matrices that QLoRA holds in 4 bits: number of weights by `id`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {id(m.weight): m.weight.numel() for m in packable(inner) if not m.weight.requires_grad}


def operations(func, args: tuple, kwargs: dict, out) -> float:
    """Floating-point operations of a call that PyTorch dispatches; 0 for what its own counter does not know."""
    count = flop_registry.get(func.overloadpacket)
    if count is None:
        return 0
    if "scaled_dot_product" in str(func):  # torch 2.11 wants as many heads of keys and values as of queries
        key = 1 + ("backward" in str(func))
        shapes = [(len(each), args[key - 1].shape[1], *each.shape[2:]) for each in args[key : key + 2]]
        args = (*args[:key], *(torch.empty(shape, device="meta") for shape in shapes), *args[key + 2 :])
    # The type of the result, which torch 2.11 takes for its shape, counts for nothing
    args = [each for each in args if not isinstance(each, torch.dtype)]
    return count(*args, **kwargs, out_val=out)


def make_fake(model, mode: FakeTensorMode, dtypes: dict[int, torch.dtype]) -> list[torch.Tensor]:
    """Replaces parameters and buffers by fake ones of the same shape on the CPU, some of another type by their `id`; tied ones
    stay tied.
    """
    made = {}
    with mode:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, old in store.items():
                    if old is not None and id(old) not in made:
                        new = torch.empty(old.shape, dtype=dtypes.get(id(old), old.dtype))
                        if isinstance(old, torch.nn.Parameter):
                            new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                        made[id(old)] = new
                    store[name] = None if old is None else made[id(old)]
    return list(made.values())


def one_loss(model, rows: int, length: int, target_length: int, kept: int) -> torch.Tensor:
    """The loss of one micro-batch of zeros, built for what kind of model it is: causal, masked, seq2seq, spans, classes or
    vectors.

    Args:
        kept: positions of each row whose logits exist; 0 where there is no vocabulary.
    """
    ids = torch.zeros((rows, length), dtype=torch.long)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.config.is_encoder_decoder:
        targets = torch.zeros((rows, target_length), dtype=torch.long)
        logits = model(input_ids=ids, decoder_input_ids=targets, use_cache=False).logits
    elif "logits_to_keep" in inspect.signature(inner.forward).parameters:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
    elif kept and inner.get_output_embeddings() is not None:  # masked language model
        hidden = inner.base_model(input_ids=ids).last_hidden_state[:, :kept]
        transform = getattr(getattr(getattr(inner, "cls", None), "predictions", None), "transform", torch.nn.Identity())
        logits = inner.get_output_embeddings()(transform(hidden))
    else:
        output = model(input_ids=ids)
        if hasattr(output, "last_hidden_state"):  # an encoder without a head: one vector a row
            logits = output.last_hidden_state.sum(1)
        else:
            logits = (
                output.logits if hasattr(output, "logits") else torch.stack([output.start_logits, output.end_logits])
            )
    logits = logits.float().flatten(0, -2)
    return torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def estimate(model, rows: int, length: int, kept: int, precision: torch.dtype, target_length=0, in_4bit=False) -> dict:
    """Bytes alive at the peak of an optimizer step with AdamW, and floating-point operations of one micro-batch.

    The model becomes a fake one: it cannot be used afterwards, but for another estimate.

    Args:
        model: on any device, `meta` included; frozen parameters stay frozen.
        rows, length, target_length: of the micro-batch in rows and tokens; the target's for seq2seq models.
        kept: see `one_loss`.
        precision: float32, or what autocast computes in.
        in_4bit: frozen matrices are held as 4-bit NF4 (QLoRA).

    Returns:
        `{"weights": bytes, "peak": bytes, "flops": of one micro-batch}`.
    """
    # Prompt learning holds token ids that are no buffer
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    small = quantizable(model) if in_4bit else {}
    tensors = make_fake(model, mode, dict.fromkeys(small, precision))  # as they are when they are used
    model.train()
    with mode:
        optimizer = torch.optim.AdamW([tensor for tensor in tensors if tensor.requires_grad], fused=True)
        for tensor in tensors:
            live.add(tensor)
        weights = live.now
        with live:
            for _ in range(2):  # the second step finds the optimizer's state there
                with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
                    loss = one_loss(model, rows, length, target_length, kept)
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
    # Counted as unpacked; in fact one matrix is, at a time
    saved = sum(small.values()) * (precision.itemsize - NF4) - precision.itemsize * max(small.values(), default=0)
    return {"weights": weights - saved, "peak": live.peak - saved, "flops": live.flops / 2}


def print_plan(
    model,
    args,
    run_args,
    *,
    rows: int,
    tokens: int,
    longest_row: int,
    supervised_share: float = 1.0,
    longest_target: int = 0,
    positions_at_once: int | None = None,
    in_4bit: bool = False,
    pairs: bool = False,
    texts: int = 1,
    smaller: str = "a smaller model",
    **_,
) -> None:
    """What `--dry_run` shows: the resolved configuration, and what the run would take, here or on `--hardware`.

    Args:
        model: as it would be trained; weights on the meta device do. It cannot be used afterwards.
        rows, tokens: of the training split.
        longest_row, longest_target: tokens of the longest row; the peak is that of a micro-batch of such rows.
        supervised_share: share of the positions whose logits are computed; 0 where there is no vocabulary.
        positions_at_once: how many of them exist at the same time, where the loss is computed in pieces.
        in_4bit: see `estimate`.
        pairs: a row is a pair of texts (DPO), `longest_row` the longer of them and `tokens` those of both; a frozen reference
            reads them once more, half of the work of a step that trains an adapter. On a GPU trl computes their logits in tiles.
        texts: of a row; `longest_row` is then the longest of them, and `tokens` those of all.
        smaller: what else needs less memory in this task, in words.
    """
    here = run_args.hardware == "this"
    on_cpu = here and not torch.cuda.is_available()
    if not here:
        device = GPUS[run_args.hardware]
    elif on_cpu:
        device = Hardware(psutil.virtual_memory().total, matmul_flops(), torch.float32)
    else:
        memory, dtype = torch.cuda.get_device_properties(0).total_memory, dtype_of(args)
        device = Hardware(memory, matmul_flops(dtype=dtype), dtype)
    # Python, libraries and the data, as a run would hold them; the model is counted as it trains
    loaded = sum(each.nbytes for each in (*model.parameters(), *model.buffers()) if not each.is_meta)
    held = psutil.Process().memory_info().rss - loaded
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    micro, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    texts = 2 if pairs else texts
    if pairs and not on_cpu:
        positions_at_once = TILES
    per_step = micro * accumulated * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(rows / per_step * args.num_train_epochs)

    def needed(batch: int, checkpointing: bool) -> dict:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        kept = math.ceil(supervised_share * longest_row)
        kept = min(kept, math.ceil(positions_at_once / batch / texts)) if positions_at_once else kept
        found = estimate(model, batch * texts, longest_row, kept, device.precision, longest_target, in_4bit)
        if on_cpu:
            found["peak"] += held + BUFFERS + (GAPS - 1) * (found["peak"] - found["weights"])
        return found

    if not on_cpu and model.config._attn_implementation in ("sdpa", PACKED):
        model.set_attn_implementation("planned")
    found = needed(micro, args.gradient_checkpointing)
    flops = found["flops"]
    if positions_at_once:  # the memory is that of one piece, the work that of all
        kept = math.ceil(supervised_share * longest_row)
        flops = estimate(model, micro * texts, longest_row, kept, device.precision, longest_target, in_4bit)["flops"]
    mean_length = tokens / rows / texts / (longest_row + longest_target)
    flops *= 1.5 if pairs else 1
    reached = (UTILISATION if here else OF_DATA_SHEET) * device.flops
    seconds = steps * accumulated * flops * min(1, mean_length) / reached
    disk = 12 * trained * ((args.save_total_limit or 3) + 1)
    free = shutil.disk_usage(_existing(Path(args.output_dir))).free
    print(yaml.safe_dump(run_args.resolved, allow_unicode=True), end="")
    print(f"rows {rows:,}  tokens {tokens:,}  steps {steps:,}  parameters trained {trained:,} of {total:,}")
    where = "this machine" if here else run_args.hardware.upper()
    print(
        f"on {where}: about {found['peak'] / 1e9:.1f} GB memory ({found['weights'] / 1e9:.1f} of them weights) of "
        f"{device.memory / 1e9:.0f} GB, {disk / 1e9:.2f} GB disk, {_duration(seconds)} of training"
    )
    if found["peak"] > device.memory:
        print(
            f"It will not fit. {_remedy(needed, micro, accumulated, args.gradient_checkpointing, device.memory, smaller)}"
        )
    if disk > free:
        print(f"The disk is too small: {free / 1e9:.1f} GB are free. Lower --save_total_limit, or free some space.")


def _remedy(needed, micro: int, accumulated: int, checkpointing: bool, memory: float, smaller: str) -> str:
    """The first change that makes it fit: gradient checkpointing, then smaller micro-batches in steps of the same size."""
    batch, flag = micro, "" if checkpointing else "--gradient_checkpointing true "
    while True:
        changed = flag
        if batch < micro:
            changed += (
                f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulated * micro // batch} "
            )
        if changed and (peak := needed(batch, True)["peak"]) <= memory:
            return f"With {changed}it would take about {peak / 1e9:.1f} GB."
        if batch == 1:
            return f"Not even one row at a time would, with gradient checkpointing: take shorter rows or {smaller}."
        batch //= 2


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
