"""Which checkpoint is the best one, read from what evaluations found. Called by `CompleteCheckpoints`.

Upstream's own answer is about the metric that the run had before a resume, and the folder that it had; where the best evaluation
lay between two checkpoints, so that its weights are gone, it takes none of those that were evaluated later.
"""

import logging
import math
from pathlib import Path

log = logging.getLogger("taskbook")


def evaluations(args, state) -> dict[int, float]:
    """What evaluations found by step, of the metric that `--metric_for_best_model` names; none without it."""
    name = f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}"
    found = {entry["step"]: entry[name] for entry in state.log_history if name in entry and entry["step"]}
    return {step: value for step, value in sorted(found.items()) if not math.isnan(value)}


def best_of(args, values: dict[int, float]) -> int | None:
    """The first step with the best value."""
    return (max if args.greater_is_better else min)(values, key=values.get, default=None)


def best_checkpoint(args, state) -> str | None:
    """The checkpoint in output_dir whose evaluation was the best; None where none was evaluated."""
    folder = Path(args.output_dir)
    saved = {step: v for step, v in evaluations(args, state).items() if (folder / f"checkpoint-{step}").is_dir()}
    return str(folder / f"checkpoint-{best_of(args, saved)}") if saved else None


def go_on_with_best(args, state) -> None:
    """Sets what the state of a resumed run says of the best evaluation, by the metric that is asked for now."""
    if not args.metric_for_best_model:
        return
    values = evaluations(args, state)
    best = best_of(args, values)
    state.best_metric, state.best_global_step = values.get(best), best
    state.best_model_checkpoint = best_checkpoint(args, state)
    if best and args.load_best_model_at_end and not (path := Path(args.output_dir) / f"checkpoint-{best}").is_dir():
        then = "the best of those that are there, or the last one"
        log.warning("%s, the best so far, is not there: --load_best_model_at_end takes %s", path, then)
