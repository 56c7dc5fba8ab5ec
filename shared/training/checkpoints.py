"""Checkpoints that survive `kill -9`, Ctrl-C and a full disk, and a resume that repeats the uninterrupted run exactly.

Called by each `tasks/*/train.py`: `find_checkpoint`, Trainer(callbacks=[CompleteCheckpoints, StopOnSignal]), `train`.

transformers writes a checkpoint in place, deletes older ones without knowing whether the new one is whole, and resumes
from the highest number. Here a checkpoint counts only once `manifest.json`, written last, names size and sha256 of each
file. What else keeps a resume from being exact, and where it is cured (transformers 5.23, accelerate 1.15):

- `group_by_length` shuffles with the global random state, which a resume inside an epoch restores too late
  (`CompleteCheckpoints.on_epoch_begin`); plain shuffling derives each epoch's order from the seed;
- a collator that draws random numbers: batches are fetched one ahead, before the random state is restored (that of
  tasks/mlm_bert seeds each row);
- the logged loss: its running sum is not in the checkpoint (`CompleteCheckpoints` logs at every save);
- a checkpoint of the last step, after which Trainer takes one more inside an epoch, and early stopping's count (`train`);
- `train_loss` covers this session's steps only (`mean_train_loss`).

Not exact: `eval_strategy: epoch` with `save_strategy: steps` (the evaluation after the save draws random numbers),
another number of processes, `ignore_data_skip`, CUDA kernels that are not deterministic (`full_determinism`).
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from accelerate import PartialState
from shared import UserError
from shared.publish.results import file_digest
from shared.training.best import best_checkpoint, go_on_with_best
from shared.training.hub_checkpoints import Uploads, make_portable
from shared.training.identity import MANIFEST, check_identity
from shared.training.launch import write_failed
from shared.training.noise import add_noise
from shared.training.out_of_memory import train_within_memory
from shared.training.processes import on_main_process, without_repeats
from shared.training.sharding import shard
from shared.training.signals import StopOnSignal

log = logging.getLogger("taskbook")

# Begins like a checkpoint so that the usual ignore pattern for a push, `checkpoint-*`, covers it.
REPLACED = "checkpoint-replaced"


def find_checkpoint(
    output_dir: str | Path, resume: str, identity: dict | None = None, fetch: Callable[[int], Path | None] | None = None
) -> Path | None:
    """The checkpoint to go on from; says in the log which one and why, and names each one that is passed over.

    Changes nothing on disk, but for what `fetch` puts there. With several processes the first one decides, since the others must
    not see another answer.

    Args:
        output_dir: the run's folder, which holds `checkpoint-N`.
        resume: `auto` (newest valid one here, else on the Hub), `hub` (newest valid one of both), `never` (start anew) or the
            path of a checkpoint.
        identity: what must not change within a run (fingerprint of the data, tokenizer, chat template, ...), plain JSON
            values; compared with the one given to `CompleteCheckpoints` when the checkpoint was written.
        fetch: downloads the newest valid checkpoint after a step from the Hub; None where none is kept there.

    Raises:
        UserError: the path does not exist or is damaged; the identity differs; see `shared.training.hub_checkpoints.fetch`.
    """
    found = on_main_process(lambda: _find(Path(output_dir), resume, identity, fetch))
    if found and not (found / "trainer_state.json").exists():
        raise UserError(
            f"{found} is not on machine {platform.node()}: --output_dir must lie on a disk that all machines share. "
            "Copy the checkpoint there, or start anew with `--resume never`."
        )
    return found


def _find(output_dir: Path, resume: str, identity: dict | None, fetch: Callable | None) -> Path | None:
    candidates = sorted(_checkpoints(output_dir), key=_step, reverse=True)
    if resume == "never":
        log.info("Starts anew: resume is `never`.%s", _set_aside_notice(candidates))
        return None
    if resume not in ("auto", "hub"):
        chosen = Path(resume)
        if not chosen.is_dir():
            found = _names(candidates) or "no checkpoint"
            raise UserError(f"--resume {resume}: no such folder. {output_dir} holds {found}.")
        if reason := damage(chosen):
            raise UserError(
                f"--resume {resume}: damaged ({reason}). `--resume auto` takes the newest valid checkpoint."
            )
        check_identity(chosen, identity)
        newer = [c for c in candidates if _step(c) > _step(chosen)]
        log.info("Resumes from %s: named by --resume.%s", chosen, _set_aside_notice(newer))
        return chosen
    chosen = None
    for candidate in candidates:
        if reason := damage(candidate):
            log.warning("Passed over %s: %s.", candidate, reason)
            continue
        chosen = candidate
        break
    if fetch and (resume == "hub" or not chosen):
        chosen = fetch(_step(chosen) if chosen else -1) or chosen
    if chosen:
        check_identity(chosen, identity)
        log.info("Resumes from %s: the newest valid checkpoint.", chosen)
        return chosen
    why = "none of the checkpoints is valid" if candidates else "there is no checkpoint yet"
    log.info("Starts anew: %s in %s.%s", why, output_dir, _set_aside_notice(candidates))
    return None


def _set_aside_notice(checkpoints: list[Path]) -> str:
    if not checkpoints:
        return ""
    return f" {_names(checkpoints)} will move to {REPLACED}/ and be deleted once this run has a complete checkpoint."


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed, naming the file; None if every file is what the manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        signature = manifest.pop("sha256")
        files = manifest["files"]
    except FileNotFoundError:
        return f"no {MANIFEST}, it is half-written"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is not readable"
    if signature != _signature(manifest):
        return f"{MANIFEST} was altered"
    for name, recorded in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != recorded["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {recorded['bytes']}"
        if file_digest(path) != recorded["sha256"]:
            return f"{name} differs from its sha256"
    if not any(name.startswith("rng_state") for name in files):
        return "saved with `save_only_model`, it holds no optimizer and no random state"
    return None


class CompleteCheckpoints(TrainerCallback):
    """Makes each checkpoint verifiable and only then deletes older ones, so that a valid one exists at any moment.

    Takes `save_total_limit` over from transformers for the time of training; the best checkpoint is kept besides.
    """

    def __init__(self, identity: dict | None = None):
        self.identity = identity
        self.limit = None
        self.saved_step = None
        self.uploads = None
        self.began = None
        self.seconds_before = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # A run may have several parts: the log, which is in each checkpoint, carries the time of those before.
        self.began = time.monotonic() - seconds_trained(state.log_history)
        if self.seconds_before is None:  # out of memory, training begins a second time
            self.seconds_before = seconds_trained(state.log_history)
        if args.save_total_limit is not None:
            # Upstream's rotation runs before on_save: with a limit of 1 it would delete the only valid checkpoint.
            self.limit, args.save_total_limit = args.save_total_limit, None
        self.saved_step = state.global_step
        output_dir = Path(args.output_dir)
        go_on_with_best(args, state)
        if not state.is_world_process_zero:
            return
        for checkpoint in _checkpoints(output_dir):
            # Left in place it would be picked by the next resume, or be overwritten file by file.
            if _step(checkpoint) > state.global_step:
                _set_aside(checkpoint, worthless=state.global_step > 0 and not (checkpoint / MANIFEST).exists())
        check_disk(output_dir, _expected_bytes(args, model))
        if args.hub_strategy == "checkpoint" and self.uploads is None:
            self.uploads = Uploads(args.hub_model_id, output_dir)

    def on_log(self, args, state, control, **kwargs):
        if self.began is not None:
            state.log_history[-1]["seconds_trained"] = round(time.monotonic() - self.began, 1)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = train_dataloader
        while (inner := getattr(sampler, "batch_sampler", None)) is not None:
            sampler = inner
        seed = args.seed if args.data_seed is None else args.data_seed
        if isinstance(sampler, BatchRebalanceSampler):
            sampler.seed = seed  # upstream's order is the same for any seed
        sampler = getattr(sampler, "sampler", None)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(seed + int(state.epoch or 0))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        name = args.metric_for_best_model
        if name and metrics and f"eval_{name.removeprefix('eval_')}" not in metrics:
            measured = [key.removeprefix("eval_") for key, value in metrics.items() if isinstance(value, int | float)]
            kept = [key for key in measured if not key.endswith(("_per_second", "runtime", "epoch"))]
            raise UserError(f"--metric_for_best_model {name}: an evaluation here measures {', '.join(kept)}.")

    def on_step_end(self, args, state, control, **kwargs):
        # The loss since the last log is lost on resume: log where a checkpoint is or (evaluation) may be written. And a run
        # that is shorter than `logging_steps` has a loss too.
        if control.should_save or control.should_evaluate or state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)
        if self.saved_step == state.global_step:
            control.should_save = False  # it would rewrite, in place, what may be the only valid checkpoint

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step
        PartialState().wait_for_everyone()  # each process writes its own random state
        if args.metric_for_best_model:
            state.best_model_checkpoint = best_checkpoint(args, state)
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self.uploads:
                make_portable(checkpoint)
            write_manifest(checkpoint, self.identity)
            if self.uploads:
                self.uploads.add(checkpoint)
            _delete(checkpoint.parent / REPLACED)
            self._delete_older(checkpoint, state.best_model_checkpoint)
        # A process that exits before would make the launcher end the first one, which is still writing.
        PartialState().wait_for_everyone()

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self.limit
        self.began = None
        if self.uploads:
            self.uploads.wait()

    def _delete_older(self, newest: Path, best: str | None) -> None:
        if not self.limit or self.limit < 0:
            return
        older = sorted((c for c in _checkpoints(newest.parent) if _step(c) < _step(newest)), key=_step, reverse=True)
        complete = [c for c in older if (c / MANIFEST).exists()]
        kept = complete[: self.limit - 1]
        for checkpoint in older:
            if checkpoint not in kept and not (best and checkpoint.name == Path(best).name):
                _delete(checkpoint)


def write_manifest(checkpoint: Path, identity: dict | None) -> None:
    """Declares a checkpoint complete: all its files on disk first, the manifest renamed into place last.

    Raises:
        OSError: the disk is full or failing; the checkpoint then stays incomplete.
    """
    files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST):
        _fsync(path)
        files[path.relative_to(checkpoint).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    manifest = {"step": _step(checkpoint), "identity": json.loads(json.dumps(identity)), "files": files}
    temporary = checkpoint / f".{MANIFEST}"
    temporary.write_text(json.dumps({**manifest, "sha256": _signature(manifest)}, indent=1), encoding="utf-8")
    _fsync(temporary)
    temporary.replace(checkpoint / MANIFEST)
    for folder in [*(p for p in checkpoint.rglob("*") if p.is_dir()), checkpoint, checkpoint.parent]:
        _fsync(folder)


def train(trainer, checkpoint: Path | None):
    """`trainer.train`, but a finished run takes no further step, a full disk is a plain error, and out of memory it goes on with
    smaller micro-batches.

    Args:
        trainer: any `transformers.Trainer`, with `CompleteCheckpoints` among its callbacks.
        checkpoint: what `find_checkpoint` returned.

    Returns:
        TrainOutput; its `training_loss` is only this session's, see `mean_train_loss`.

    Raises:
        UserError: a checkpoint could not be written. The half-written one is removed, the older ones are intact. Out of memory
            where smaller micro-batches do not help, see `shared.training.out_of_memory`.
    """
    if finished := checkpoint is not None and _is_finished(trainer, _trainer_state(checkpoint)):
        trainer.get_batch_samples = lambda *args: ([], setattr(trainer.control, "should_training_stop", True))
    without_repeats(trainer)
    asked = trainer.args.eval_on_start or trainer.args.eval_strategy != "no"
    trainer.args.eval_on_start = checkpoint is None and asked  # the curve of a loss begins where training does
    if trainer.is_fsdp_enabled:
        shard(trainer, trainer.model)
    noise = add_noise(trainer)
    try:
        output = train_within_memory(trainer, checkpoint)
        trainer.optimizer.state.clear()  # what is evaluated and compared next takes their place
        trainer.model.zero_grad()
        return output
    except Exception as error:
        if not write_failed(error):
            raise
        output_dir, step = Path(trainer.args.output_dir), trainer.state.global_step
        unfinished, free = output_dir / f"checkpoint-{step}", _free(output_dir)
        if trainer.is_world_process_zero() and not (unfinished / MANIFEST).exists():
            _delete(unfinished)
        kept = _names([c for c in _checkpoints(output_dir) if (c / MANIFEST).exists()])
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"{unfinished} could not be written, the disk is full or failing ({free / 1e9:.1f} GB free; {reason}).\n"
            f"Intact: {kept or 'no checkpoint'}. Free some space and repeat the command, or lower --save_total_limit."
        ) from error
    finally:
        if finished:
            del trainer.get_batch_samples
        for hook in noise:
            hook.remove()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, StopOnSignal):
                callback.restore()


def _is_finished(trainer, state: dict) -> bool:
    """Whether a checkpoint's run takes no further step; early stopping (which upstream restores with all else) counts on."""
    done, callbacks = 0 < trainer.args.max_steps <= state["global_step"], trainer.callback_handler.callbacks
    for callback in (each for each in callbacks if isinstance(each, EarlyStoppingCallback)):
        vars(callback).update(state["stateful_callbacks"].get(type(callback).__name__, {}).get("attributes", {}))
        done |= callback.early_stopping_patience_counter >= callback.early_stopping_patience
    return done


def check_disk(output_dir: str | Path, bytes_needed: int) -> None:
    """Refuses to start what cannot be stored.

    Raises:
        UserError: fewer than `bytes_needed` bytes are free where `output_dir` lies.
    """
    if (free := _free(Path(output_dir))) < bytes_needed:
        raise UserError(
            f"{output_dir} has {free / 1e9:.1f} GB free; one more checkpoint takes {bytes_needed / 1e9:.1f} GB.\n"
            "Free some space, choose an --output_dir on a larger disk, or train an adapter."
        )


def _expected_bytes(args, model) -> int:
    """A lower bound of one checkpoint: no run that fits is refused."""
    if model is None or args.world_size > 1:  # a process may hold only a shard
        return 0
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in saved)
    if "adamw_torch" in str(getattr(args.optim, "value", args.optim)) and not args.save_only_model:
        size += 2 * sum(p.numel() * p.element_size() for p in trained)
    return size


def seconds_trained(log_history: list[dict]) -> float:
    """Seconds from the first step to the last log, summed over the parts of a run that was interrupted; what such a part did
    after its last checkpoint was lost and is not counted.

    Args:
        log_history: `trainer.state.log_history`.
    """
    return next((e["seconds_trained"] for e in reversed(log_history) if "seconds_trained" in e), 0.0)


def mean_train_loss(log_history: list[dict]) -> float:
    """Mean training loss over all logged steps, those before a resume included; nan if none was logged.

    Args:
        log_history: `trainer.state.log_history`; each `loss` is the mean since the entry before.
    """
    total, last = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else float("nan")


def _checkpoints(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    return [p for p in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]


def _step(checkpoint: Path) -> int:
    if re.fullmatch(r"checkpoint-\d+", checkpoint.name):
        return int(checkpoint.name.split("-")[1])
    return _trainer_state(checkpoint)["global_step"]  # a path that the user has renamed


def _trainer_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def _set_aside(checkpoint: Path, worthless: bool) -> None:
    target = checkpoint.parent / REPLACED / checkpoint.name
    _delete(checkpoint if worthless else target)
    if not worthless:
        target.parent.mkdir(exist_ok=True)
        checkpoint.rename(target)


def _delete(folder: Path) -> None:
    """The manifest goes first and for good: a folder that is half deleted must not look complete."""
    if not folder.is_dir():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    _fsync(folder)
    shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    if os.name != "posix":  # Windows opens no folders and syncs no read-only file
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signature(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(c.name for c in sorted(checkpoints, key=_step))
