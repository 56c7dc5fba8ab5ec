"""Trainer with a fused loss, Muon, tokens per second and MFU in its log, and an evaluation by document. Used by train.py."""

import time
from functools import partial

import torch
import torch.nn.functional as F
from blocks import NOTHING, document_positions, example
from muon import MuonAdamW, parameter_groups
from transformers import Trainer, TrainerCallback
from trl.kernels import ChunkedLogProbFunction

from shared import UserError
from shared.training.hardware import dtype_of, matmul_flops
from shared.training.losses import finite, log_evaluation, step_mean
from shared.training.packed_attention import PACKED
from shared.training.scoring import autocast, score_rows
from shared.training.sharding import refuse_sharded

CHUNK = 512  # positions whose logits exist at a time: 512 x 50,257 in fp32 are 100 MB
TILE = 8192  # words whose logits trl's kernel holds at a time, of 4,096 positions: in half precision 67 MB
NO_LOGITS = torch.empty(0, dtype=torch.long)


def check_options(script_args, args) -> None:
    """Raises UserError where other options do not go with `--streaming` or `--optimizer muon`, the default."""
    if script_args.streaming and (args.max_steps <= 0 or args.dataloader_num_workers):
        raise UserError(
            "--streaming needs --max_steps, and leaves --dataloader_num_workers at 0: a stream has no known end."
        )
    if script_args.optimizer == "muon":
        if args.optim != args.default_optim:
            raise UserError(f"--optim {args.optim.value} would not be used beside Muon: add --optimizer adamw.")
        refuse_sharded(args, "--optimizer muon", "use --optimizer adamw")


def hidden_states(model, input_ids: torch.Tensor, end: int) -> torch.Tensor:
    """Last hidden states, after the final norm, (rows * length, width); no logits are computed.

    They come through the model's own forward, so that DistributedDataParallel sees it.
    """
    inputs = {"input_ids": input_ids}
    if getattr(model, "module", model).config._attn_implementation == PACKED:
        positions, starts = document_positions(input_ids, end)
        inputs = {"input_ids": input_ids.flatten()[None], "position_ids": positions, "cu_seq_lens_q": starts}
    keep = NO_LOGITS.to(input_ids.device)
    return (
        model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=keep).hidden_states[-1].flatten(0, 1)
    )


def loss_sum(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats without ever holding all logits.

    Args:
        hidden: (n, width). head: (vocabulary, width). targets: (n,), -100 counts nothing.

    On a GPU trl's kernel, which computes each product twice, in less time all the same. Elsewhere torch's operation, which
    computes gradients chunk by chunk on the way forward, if it may: not in half precision, in which it would add up the loss, nor
    before torch 2.13. Each chunk is computed twice then.
    """
    if hidden.is_cuda:
        counted, width = targets != -100, min(TILE, len(head))
        logs = ChunkedLogProbFunction.apply(hidden, head, None, targets.clamp(min=0), 1.0, width, None, 1.0, ())[0]
        return -logs.masked_fill(~counted, 0).sum()
    if hasattr(F, "linear_cross_entropy") and not torch.is_autocast_enabled(hidden.device.type):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        return F.linear_cross_entropy(hidden, head, targets, reduction="sum", options=options)

    def chunk_loss(rows, goals):
        return F.cross_entropy(F.linear(rows, head).float(), goals, reduction="sum")

    once_more = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in it is random
    again = partial(torch.utils.checkpoint.checkpoint, chunk_loss, **once_more)
    return sum(again(*part) for part in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True))


class Clock(TrainerCallback):
    """Seconds of training since the last log; evaluations and saves are left out."""

    def __init__(self):
        self.seconds, self.steps, self.mark = 0.0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    on_evaluate = on_save = on_train_begin

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self.steps, self.mark = self.seconds + now - self.mark, self.steps + 1, now


class PretrainTrainer(Trainer):
    """`Trainer` with Muon or AdamW, the loss above, checked before each step, and speed in the log.

    Args:
        muon: whether hidden matrices are trained by Muon.
        block_length: tokens of a block.
    """

    def __init__(self, *args, muon: bool, block_length: int, end: int, **kwargs):
        self.muon, self.block_length, self.end, self.clock = muon, block_length, end, Clock()
        super().__init__(*args, **kwargs)
        self.add_callback(self.clock)
        self.flops_per_token = flops_per_token(self.model, block_length)
        self.peak = matmul_flops(dtype=dtype_of(self.args)) * self.args.world_size

    def create_optimizer(self, model=None):
        """AdamW with betas from the training arguments, Muon for the hidden matrices if asked; or what `--optim` names."""
        if self.args.optim != self.args.default_optim:
            return super().create_optimizer(model)
        if self.optimizer is None:
            self.optimizer = MuonAdamW(
                parameter_groups(self.model if model is None else model, self.muon, self.args.weight_decay),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def get_decay_parameter_names(self, model):
        """The same as are decayed without `--optim`."""
        decayed = {id(p) for group in parameter_groups(model, False, 1.0)[:2] for p in group["params"]}
        return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean nats a token over the whole optimizer step (`num_items_in_batch` tokens).

        Raises:
            UserError: the loss is not finite; the step is not made.
        """
        targets = inputs["shift_labels"].flatten()
        hidden = hidden_states(model, inputs["input_ids"], self.end)
        head = self.accelerator.unwrap_model(model).get_output_embeddings().weight
        # accelerate's covers the model's forward only, and the head is a third of it
        with autocast(hidden.device, self.args):
            total = loss_sum(hidden, head, targets)
        loss = step_mean(self, total, (targets != -100).sum(), num_items_in_batch)
        return finite(loss, lambda: f" at step {self.state.global_step + 1}")

    def log(self, logs, *args, **kwargs):
        """Adds tokens per second, MFU and minutes left to each training loss."""
        if "loss" in logs and self.clock.steps:
            step_tokens = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            speed = self.clock.steps * step_tokens * self.block_length / self.clock.seconds
            left = (self.state.max_steps - self.state.global_step) * self.clock.seconds / self.clock.steps / 60
            logs |= {
                "tokens_per_second": round(speed),
                "mfu": float(f"{speed * self.flops_per_token / self.peak:.3g}"),
                "minutes_left": round(left, 1),
            }
            self.clock.seconds, self.clock.steps = 0.0, 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss over all tokens of the validation documents."""
        rows = score_documents(self.model, eval_dataset or self.eval_dataset, self.block_length, self.end, self.args)
        return log_evaluation(self, rows, metric_key_prefix)


def flops_per_token(model, length: int) -> float:
    """Floating-point operations of training on a token: 6 a weight that multiplies, 12 x layers x width x length for
    attention (Chowdhery et al. 2022, appendix B).
    """
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters() if id(p) not in tables and p is not head) + head.numel()
    return 6 * weights + 12 * model.config.num_hidden_layers * model.config.hidden_size * length


def windows(ids: list[int], end: int, length: int) -> list[tuple[list[int], int]]:
    """A document, with end-of-text tokens around it, as windows of `length` + 1 tokens that overlap by half.

    Returns:
        (tokens, how many targets at the front belong to the window before): so each target has at least half a window of
        context where the document has that much, and is scored once.
    """
    row, overlap = [end, *ids, end], length - max(1, length // 2)
    found, covered = [(row[: length + 1], 0)], length
    while covered < len(row) - 1:
        start = covered - overlap
        found.append((row[start : start + length + 1], overlap))
        covered = start + length
    return found


def score_documents(model, documents: list[list[int]], length: int, end: int, args, title: str = "evaluating") -> dict:
    """Scores every document by itself, after an end-of-text token and up to the one behind it. Processes share the work.

    Returns:
        `{"nll": summed nats, "tokens": predicted tokens}`, one entry a document, in their order.
    """
    work = [(number, *window) for number, ids in enumerate(documents) for window in windows(ids, end, length)]

    def score_batch(numbers: list[int]) -> list[float]:
        chosen = [work[i] for i in numbers]
        longest = max(len(tokens) for _, tokens, _ in chosen)
        # padding stands behind a document, where causal attention does not see it
        padded = [example(tokens + [NOTHING] * (longest - len(tokens)), end) for _, tokens, _ in chosen]
        for block, (_, _, scored) in zip(padded, chosen, strict=True):
            block["shift_labels"][:scored] = -100
        inputs, targets = (
            torch.stack([p[key] for p in padded]).to(model.device) for key in ("input_ids", "shift_labels")
        )
        hidden = hidden_states(model, inputs, end)
        head = model.get_output_embeddings().weight  # after the forward pass: FSDP gathers it there
        parts = zip(hidden.split(CHUNK), targets.flatten().split(CHUNK), strict=True)
        losses = [F.cross_entropy(F.linear(h, head).float(), t, reduction="none") for h, t in parts]
        return torch.cat(losses).view(targets.shape).cpu().double().sum(1).tolist()

    nll = [0.0] * len(documents)
    scored = score_rows(model, [len(tokens) for _, tokens, _ in work], score_batch, args, title)
    for (number, *_), nats in zip(work, scored, strict=True):
        nll[number] += nats
    return {"nll": nll, "tokens": [len(ids) + 1 for ids in documents]}
