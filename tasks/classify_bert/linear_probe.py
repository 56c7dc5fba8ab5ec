"""A linear classifier on the frozen encoder: what it knows before training. A Trainer that stops at NaN. Used by train.py."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from shared.training.losses import finite, step_mean


class CheckedTrainer(Trainer):
    """`Trainer` with the mean loss over the rows of a whole optimizer step, checked before it is used; predicts in order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # BERT takes any keyword and ignores the number of rows: upstream would add up micro-batches and processes
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns.append("length")  # or the sampler would read every row to learn its length

    def _get_eval_sampler(self, eval_dataset):
        # Upstream orders evaluation rows by length too, at random, and `predict` returns them in that order.
        return SequentialSampler(eval_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy in nats over the rows of the whole optimizer step (`num_items_in_batch` of them)."""
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", "length")})
        smoothing = self.args.label_smoothing_factor
        total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        loss = step_mean(self, total, len(labels), num_items_in_batch)
        if model.training:
            finite(loss, lambda: f" at step {self.state.global_step + 1}")
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def mean_vectors(encoder, rows, collator, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batch by batch the mean token vectors (batch, hidden + 1; the last is 1, for the bias) and the labels (batch,), float64."""
    rows = rows.remove_columns([name for name in rows.column_names if name not in ("input_ids", "label")])
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collator):
        labels, batch = batch.pop("labels"), {name: value.to(encoder.device) for name, value in batch.items()}
        hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
        mean = ((hidden * mask).sum(1) / mask.sum(1)).cpu().double()
        yield torch.cat([mean, torch.ones(len(mean), 1, dtype=torch.float64)], dim=1), labels


def fit_linear(encoder, rows, collator, labels: int, batch_size: int) -> torch.Tensor:
    """Ridge regression from mean token vectors to one-hot labels, in closed form: weights (hidden + 1, labels).

    Sums are kept, not vectors: memory does not grow with rows. The penalty is a thousandth of the features' mean square.
    """
    gram, target = 0.0, 0.0
    for vectors, classes in mean_vectors(encoder, rows, collator, batch_size):
        gram = gram + vectors.T @ vectors
        target = target + vectors.T @ torch.nn.functional.one_hot(classes, labels).double()
    return torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64), target)


def predict_linear(encoder, weights: torch.Tensor, rows, collator, batch_size: int) -> list[int]:
    """The class (rows,) with the largest value for each row."""
    batches = mean_vectors(encoder, rows, collator, batch_size)
    return [int(label) for vectors, _ in batches for label in (vectors @ weights).argmax(-1)]
