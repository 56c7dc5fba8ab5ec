"""Out of memory: training goes on with smaller micro-batches and the same effective batch, an evaluation with smaller batches.

Called by `shared.training.checkpoints.train` and by the functions of the tasks that score rows.

transformers' `auto_find_batch_size` (accelerate's `find_executable_batch_size`) does not serve: it shrinks the batch, leaves the
accumulation as it is and counts steps from 0 again with weights that are trained already.

With more than one process nothing shrinks: the others wait for the one that failed in the middle of a step, and it cannot
reach them. It stops with one line that says what to repeat; the launcher ends the others.
"""

import functools
import inspect
import logging
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils.memory import clear_device_cache

from shared import UserError

log = logging.getLogger("taskbook")


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's `torch.OutOfMemoryError`, the same as a plain RuntimeError (other GPUs, older libraries), and the CPU's."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def smaller(micro: int, accumulation: int) -> tuple[int, int]:
    """Half the micro-batch and twice the accumulation; the largest smaller micro-batch that keeps their product if it is odd."""
    rows = micro * accumulation
    micro = next(size for size in range(micro // 2, 0, -1) if rows % size == 0)
    return micro, rows // micro


def train_within_memory(trainer, checkpoint: Path | None):
    """`trainer.train`; out of memory in step k + 1, it goes on from step k with smaller micro-batches.

    Weights, optimizer, data order and log continue through a checkpoint of step k, so no step is lost or made twice. Only
    dropout draws other numbers.

    Args:
        checkpoint: where to begin, or None.

    Raises:
        UserError: a single row does not fit; the optimizer's state does not fit; more than one process.
    """
    args, training_step, evaluate = trainer.args, trainer.training_step, trainer.evaluate
    if args.auto_find_batch_size:
        raise UserError(
            "--auto_find_batch_size changes the effective batch. Leave it out: memory is looked after anyway."
        )
    trainer.evaluate = lambda *given, **named: evaluate_within_memory(args, lambda: evaluate(*given, **named))
    try:
        while True:
            now = SimpleNamespace(step=None, loss=None, inside=False)

            def watched(*given, now=now):
                if now.step != trainer.state.global_step:
                    now.step, now.loss = trainer.state.global_step, trainer._tr_loss.clone()
                now.inside = True
                loss = training_step(*given)
                now.inside = False
                return loss

            trainer.training_step = watched
            try:
                return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if refused := _why_not(trainer, now.inside):
                    raise UserError(refused) from error
            # Here the error is gone, and with it the frames that hold the activations of the failed step.
            checkpoint = _save_last_step(trainer, now.loss) or checkpoint
            micro, accumulation = smaller(args.per_device_train_batch_size, args.gradient_accumulation_steps)
            log.warning(
                "Out of memory at step %d: %d rows at a time instead of %d, accumulated over %d; the effective batch stays.",
                *(now.step + 1, micro, args.per_device_train_batch_size, accumulation),
            )
            args.per_device_train_batch_size, args.gradient_accumulation_steps = micro, accumulation
            trainer._train_batch_size = args.train_batch_size
    finally:
        del trainer.training_step, trainer.evaluate


def _why_not(trainer, inside: bool) -> str | None:
    """Why training cannot go on with smaller micro-batches, and what to do; None if it can."""
    args, step = trainer.args, trainer.state.global_step + 1
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if not inside:
        return (
            f"Out of memory at step {step}, outside of forward and backward pass, where smaller batches do not help. "
            "Train an adapter (--method lora), use --optim adafactor (with --optimizer adamw, where the task has it), or a "
            "smaller model."
        )
    if micro == 1:
        return (
            f"Out of memory at step {step} with one row at a time. Use --gradient_checkpointing true, shorter rows, an "
            "adapter (--method lora or qlora, where the task has it), or a smaller model."
        )
    if args.world_size > 1:
        less = "--per_device_train_batch_size {} --gradient_accumulation_steps {}".format(*smaller(micro, accumulation))
        return (
            f"Out of memory at step {step} in process {args.process_index} of {args.world_size}. Repeat the command with "
            f"{less}: the effective batch stays, and training goes on from the last checkpoint."
        )
    return None


def _save_last_step(trainer, loss: torch.Tensor) -> Path | None:
    """A checkpoint of the last whole step, after the memory of the one that failed has been given back.

    Args:
        loss: the running sum of the log before the step that failed.

    Returns:
        Its path; None if this session has made no step, so that nothing has changed since its beginning.
    """
    args, state, control = trainer.args, trainer.state, trainer.control
    trainer.model.zero_grad()
    clear_device_cache(garbage_collection=True)
    path = None
    if state.global_step > trainer._initial_global_step:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not (path / "manifest.json").exists():
            whole, args.save_only_model = args.save_only_model, False  # without the optimizer it could not go on
            control.should_log, control.should_evaluate, control.should_save = True, False, True
            trainer._maybe_log_save_evaluate(loss, None, trainer.model_wrapped, None, state.epoch, None, None)
            args.save_only_model = whole
    if trainer.optimizer is not None:
        trainer.optimizer.state.clear()  # loading it would otherwise hold it twice
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "training_bar"):
            callback.on_train_end(args, state, control)
    return path


def evaluate_within_memory(args, evaluate):
    """`evaluate()`; out of memory it begins again with half of `args.per_device_eval_batch_size`, never with less to train on.

    Raises:
        UserError: a single row does not fit; more than one process.
    """
    while True:
        try:
            return evaluate()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size = args.per_device_eval_batch_size
            if size == 1:
                raise UserError(
                    "Out of memory in the evaluation with one row at a time: evaluate shorter rows, or use a smaller model."
                ) from error
            if args.world_size > 1:
                raise UserError(
                    f"Out of memory in the evaluation, in process {args.process_index} of {args.world_size}: repeat the "
                    f"command with --per_device_eval_batch_size {size // 2}; training goes on from the last checkpoint."
                ) from error
        args.per_device_eval_batch_size = size // 2
        log.warning("Out of memory in the evaluation: %d rows at a time instead of %d.", size // 2, size)
        clear_device_cache(garbage_collection=True)


def within_memory(score):
    """Makes a function that scores rows, and takes the training arguments as `args`, go through `evaluate_within_memory`."""
    signature = inspect.signature(score)

    @functools.wraps(score)
    def retried(*given, **named):
        args = signature.bind(*given, **named).arguments["args"]
        return evaluate_within_memory(args, lambda: score(*given, **named))

    return retried
