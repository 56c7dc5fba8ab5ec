"""Conversations in one row without padding, each seeing only itself; logits only where a token is trained. Used by train.py.

trl flattens a batch into one row (`padding_free`) but needs FlashAttention to keep its conversations apart, which neither a T4
nor a CPU has, and it passes every position through the head although a third of the tokens is trained.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from shared import UserError
from shared.training import scoring
from shared.training.losses import finite, log_evaluation, step_mean


class RowCollator(DataCollatorForLanguageModeling):
    """trl's collator, which also says which rows of the data a batch holds."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        # For FlashAttention and linear attention; `packed` needs cu_seq_lens_q alone.
        for unused in ("seq_idx", "max_length_q", "max_length_k", "cu_seq_lens_k"):
            batch.pop(unused, None)
        batch["row"] = torch.tensor([example["row"] for example in examples])
        return batch


def token_losses(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward pass with logits only for the tokens that are trained.

    Returns:
        nll (n,) in nats, whether the top-1 prediction is right (n,) bool, and in which conversation of the batch each
        token stands (n,), where n counts the trained tokens of the batch.
    """
    inner = getattr(model, "module", model)  # inside DistributedDataParallel
    labels, inputs = batch["labels"], {k: v for k, v in batch.items() if k not in ("labels", "row")}
    trained = labels[:, 1:] != -100  # the position before a trained token predicts it
    targets, keep = labels[:, 1:][trained], F.pad(trained, (0, 1))
    if "cu_seq_lens_q" in inputs:
        starts = inputs["cu_seq_lens_q"].long()
        conversation = torch.bucketize(keep[0].nonzero().flatten(), starts, right=True) - 1
    else:
        conversation = keep.nonzero()[:, 0]
    prompt_learning = getattr(inner, "active_peft_config", None)
    if getattr(prompt_learning, "is_prompt_learning", False):  # virtual tokens stand in front of every row
        keep = F.pad(keep, (prompt_learning.num_virtual_tokens, 0))
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits.float()
    if logits.dim() == 3:  # xLSTM and others know no `logits_to_keep`
        logits = logits[keep]
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets, conversation


@torch.no_grad()
def prove(model, rows: list[dict], collator: RowCollator, exact: bool) -> str:
    """Why the model must not be trained as it was loaded, "" where the longest rows score the same whether packed or alone.

    What follows a token must not change its loss. The attention is tried too: the beginning of a row must score the same with
    the model's own, which leaves nothing out. Where it does not, the model goes on with its own.

    Args:
        rows: tokenized.
        collator: as it will be used; `padding_free` is switched off where packed rows differ.
        exact: whether it computes in fp32; half precision rounds.

    Raises:
        UserError: the model sees the tokens that it is to predict.
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    was_training, alone = model.training, replace(collator, padding_free=False)
    model.eval()
    longest = sorted(rows, key=lambda row: -len(row["input_ids"]))[:2]
    longest = longest if len(longest) > 1 else longest * 2
    # Sharded only when training begins (FSDP): until then the whole model lies in the memory of the CPU
    most = 32 if model.device.type == "cpu" and torch.cuda.is_available() else None

    def score(collate, rows, most=most) -> torch.Tensor:
        rows = [{**row, "input_ids": row["input_ids"][:most], "labels": row["input_ids"][:most]} for row in rows]
        batch = {name: value.to(model.device) for name, value in collate(rows).items()}
        return token_losses(model, batch)[0]

    def differ(ours: torch.Tensor, theirs: torch.Tensor) -> str:
        apart = (ours - theirs).abs().mean().item()
        return f"{apart:.2g} nats a token" if not apart <= (1e-4 if exact else 2e-2) else ""

    half = max(2, min(64, len(longest[0]["input_ids"]) // 2))
    first, ours = score(alone, longest[:1], half), score(alone, longest[:1], 2 * half)
    apart = differ(first, ours[: len(first)])
    if apart and first.isfinite().all():  # a loss that is not a number stops the first step, and names its rows
        raise UserError(
            f"{inner.config.model_type}: losses of a row's first tokens depend on what follows them, by {apart}: it is no causal "
            "language model, it sees the tokens that it is to predict."
        )
    why, implementation = "", inner.config._attn_implementation
    if implementation != "eager" and inner._supports_attention_backend:
        inner.set_attn_implementation("eager")
        if apart := differ(ours, score(alone, longest[:1], 2 * half)):
            why = f"its own attention (eager) gives other losses than {implementation}, by {apart}"
            collator.padding_free = False
        else:
            inner.set_attn_implementation(implementation)
    if collator.padding_free:
        separate = torch.cat([score(alone, [row]) for row in longest])
        if apart := differ(score(collator, longest), separate):
            why = f"packed rows give other losses than rows alone, by {apart}"
            collator.padding_free = False
    model.train(was_training)
    return why


class PackedSFTTrainer(SFTTrainer):
    """`SFTTrainer` that computes logits for trained tokens only and checks each loss before the optimizer may use it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.model.config.get_text_config()
        if hasattr(config, "output_router_logits"):  # trl asks mixtures of experts for a loss that is not used here
            config.output_router_logits = False

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "labels", "row"]

    def create_model_card(self, *args, **kwargs):
        """None here: the run writes its own card, with metrics, at the end."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean nll in nats over the trained tokens of the whole optimizer step (`num_items_in_batch` of them)."""
        nll, _, _ = token_losses(model, inputs)
        loss = step_mean(self, nll.sum(), nll.numel(), num_items_in_batch)
        rows = inputs["row"]
        return finite(
            loss, lambda: f" at step {self.state.global_step + 1}, in rows {rows.tolist()} of the training split"
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss over all trained tokens of the validation split (upstream takes the mean of the batches' means)."""
        rows = score_rows(self.model, eval_dataset or self.eval_dataset, self.data_collator, self.args)
        return log_evaluation(self, rows, metric_key_prefix)


def score_rows(model, dataset, collator, args, title: str = "evaluating") -> dict[str, list[float]]:
    """Scores every row; memory does not grow with rows, no logits are kept. Processes share the work.

    Returns:
        `{"nll": summed nats, "tokens": trained tokens, "correct": top-1 hits}`, one entry a row, in the data set's order.
    """

    def score_batch(rows: list[int]) -> list[list[float]]:
        batch = {name: value.to(model.device) for name, value in collator([dataset[i] for i in rows]).items()}
        nll, correct, conversation = token_losses(model, batch)
        found = torch.stack([nll, torch.ones_like(nll), correct]).cpu().double()  # Apple's GPU has no float64
        return torch.zeros(3, len(rows), dtype=torch.float64).index_add_(1, conversation.cpu(), found).T.tolist()

    found = scoring.score_rows(model, [len(ids) for ids in dataset["input_ids"]], score_batch, args, title)
    return dict(zip(("nll", "tokens", "correct"), map(list, zip(*found, strict=True)), strict=True))


def unigram_scores(trained: list[list[int]], rows: list[list[int]], vocabulary: int) -> dict[str, list[float]]:
    """The trivial baseline: each token by its share of the trained tokens of the training split, one added to each count.

    Args:
        trained, rows: labels of the training and of the scored rows, -100 where nothing is learned.
        vocabulary: number of token ids.

    Returns:
        As `score_rows`.
    """
    counts = 1 + np.bincount([label for row in trained for label in row[1:] if label != -100], minlength=vocabulary)
    nll, likeliest = np.log(counts.sum() / counts), counts.argmax()
    scored = [np.array([label for label in row[1:] if label != -100]) for row in rows]
    return {
        "nll": [float(nll[row].sum()) for row in scored],
        "tokens": [len(row) for row in scored],
        "correct": [int((row == likeliest).sum()) for row in scored],
    }
