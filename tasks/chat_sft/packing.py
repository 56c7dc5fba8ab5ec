"""Conversations in one row without padding, each seeing only itself; logits only where a token is trained. Used by train.py.

trl flattens a batch into one row (`padding_free`) but needs FlashAttention to keep its conversations apart, which neither a T4
nor a CPU has, and it passes every position through the head although a third of the tokens is trained.
"""

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from shared.training.losses import finite, log_evaluation, step_mean
from shared.training.out_of_memory import within_memory


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
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets, conversation


class PackedSFTTrainer(SFTTrainer):
    """`SFTTrainer` that computes logits for trained tokens only and checks each loss before the optimizer may use it."""

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


@within_memory
@torch.no_grad()
def score_rows(model, dataset, collator, args, title: str = "evaluating") -> dict[str, list[float]]:
    """Scores every row; memory does not grow with rows, no logits are kept. Processes share the work.

    Returns:
        `{"nll": summed nats, "tokens": trained tokens, "correct": top-1 hits}`, one entry a row, in the data set's order.
    """
    was_training = model.training
    model.eval()
    lengths = [len(ids) for ids in dataset["input_ids"]]
    longest_first = sorted(range(len(dataset)), key=lambda i: -lengths[i])  # out of memory shows at once
    mine = longest_first[args.process_index :: args.world_size]
    size, scores = args.per_device_eval_batch_size, {}
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    for rows in tqdm(batches, desc=title, disable=args.disable_tqdm or args.process_index > 0, leave=False):
        batch = {name: value.to(model.device) for name, value in collator([dataset[i] for i in rows]).items()}
        with torch.autocast(
            model.device.type, torch.float16 if args.fp16 else torch.bfloat16, enabled=args.fp16 or args.bf16
        ):
            nll, correct, conversation = token_losses(model, batch)
        found = torch.stack([nll, torch.ones_like(nll), correct]).cpu().double()  # Apple's GPU has no float64
        sums = torch.zeros(3, len(rows), dtype=torch.float64).index_add_(1, conversation.cpu(), found)
        scores.update(zip(rows, sums.T.tolist(), strict=True))
    model.train(was_training)
    everyone = gather_object(list(scores.items())) if args.world_size > 1 else scores.items()
    ordered = [values for _, values in sorted(everyone)]
    return dict(zip(("nll", "tokens", "correct"), map(list, zip(*ordered, strict=True)), strict=True))
