"""What the tasks' trainers share around a loss: its mean over a whole step, refusing NaN, logging a validation split."""

import math
from collections.abc import Callable

import torch

from shared import UserError


def step_mean(trainer, total: torch.Tensor, own, num_items_in_batch):
    """Mean loss a token over the whole optimizer step, so that micro-batches weigh by their tokens.

    Args:
        total: summed nats of this micro-batch, with its gradient.
        own: trained tokens of this micro-batch, for a loss outside of training.
        num_items_in_batch: trained tokens of the step over all processes, as `Trainer.compute_loss` gets it.
    """
    if num_items_in_batch is None:
        return total / own
    # DDP averages gradients over processes, and the count is over all of them already
    scale = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return total * scale / num_items_in_batch


def rows_of_step(trainer, batches: list[dict], name: str) -> torch.Tensor:
    """Rows of an optimizer step over all processes, for `step_mean`. Upstream counts labels; where there are none it takes the
    mean of the micro-batches' means, in which rows of a small one weigh more.

    Args:
        batches: the micro-batches of this process.
        name: of a column that has an entry for each row.
    """
    rows = torch.tensor(sum(len(batch[name]) for batch in batches), device=trainer.args.device)
    together = trainer.args.world_size > 1 and trainer.args.average_tokens_across_devices
    return trainer.accelerator.gather(rows).sum() if together else rows


def finite(loss: torch.Tensor, where: Callable[[], str] = str) -> torch.Tensor:
    """The loss, checked before the optimizer may use it.

    Args:
        where: returns what the message adds, for example " at step 4, in rows [3, 7] of the training split".

    Raises:
        UserError: NaN or infinity.
    """
    if not torch.isfinite(loss):
        raise UserError(
            f"The loss became {loss.item()}{where()}; this optimizer step was not made. Lower --learning_rate, train without "
            "--fp16, or look at these rows."
        )
    return loss


def log_evaluation(trainer, rows: dict[str, list[float]], prefix: str, **more: float) -> dict:
    """Loss and perplexity over all tokens of a split, logged as `Trainer.evaluate` does; it takes the mean of batch means.

    Args:
        rows: `nll` in nats and `tokens` of each row.
        more: other measures, by their names without the prefix.
    """
    loss = sum(rows["nll"]) / sum(rows["tokens"])
    more = {f"{prefix}_{name}": value for name, value in more.items()}
    metrics = {f"{prefix}_loss": loss, f"{prefix}_perplexity": math.exp(loss)} | more
    trainer.log(dict(metrics))
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    return metrics
