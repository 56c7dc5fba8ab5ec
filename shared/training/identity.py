"""What must not change within a run: a resume with another model, data or settings is refused. Called by each train.py."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

from shared import UserError
from shared.publish.results import file_digest

MANIFEST = "manifest.json"

# Training arguments that may change within a run, by the beginning of their names: where things are written, what is logged,
# evaluated, saved and pushed, and how the same numbers are computed in less memory or time.
# fmt: off
HARMLESS = (
    "output_dir", "run_name", "project", "trackio", "report_to", "log", "disable_tqdm", "debug", "skip_memory_metrics",
    "eval", "per_device_eval", "do_", "prediction_loss_only", "batch_eval_metrics", "include_", "predict_with_generate",
    "generation", "bf16_full_eval", "fp16_full_eval", "metric_for_best_model", "greater_is_better",
    "load_best_model_at_end", "save", "push_to_hub", "hub", "resume_from_checkpoint", "restore_callback_states",
    "enable_jit_checkpoint", "dataloader_num", "dataloader_pin", "dataloader_persistent", "dataloader_prefetch",
    "dataloader_in", "dataloader_multi", "dataset_num_proc", "gradient_checkpointing", "auto_find_batch_size",
    "torch_empty_cache", "activation_checkpointing", "ddp_", "use_cpu", "local_rank",
    "per_device_train_batch_size", "gradient_accumulation_steps",
)
# fmt: on


def run_identity(args, run_args, **facts) -> dict[str, str]:
    """What must not change within a run, for `find_checkpoint` and `CompleteCheckpoints`: a resume with another is refused.

    Args:
        args: training arguments: all that are not HARMLESS count. Of micro-batch and accumulation only the product does:
            another micro-batch is the remedy for too little memory.
        run_args: the model by name. Data counts by its rows, not by its name: the same file elsewhere is the same data.
        facts: by the name that the error shows, e.g. `rows=[...]`, `method="lora"`; whatever is long is hashed.
    """

    def short(value) -> str:
        value = getattr(value, "value", value)  # of an enumeration
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        return text if len(text) <= 64 else hashlib.sha256(text.encode()).hexdigest()

    settings = {f.name: getattr(args, f.name) for f in fields(args) if f.init and not f.name.startswith(HARMLESS)}
    settings["rows of a step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings["processes"] = args.world_size  # each takes its own share of the rows
    facts = {"model": run_args.model_name_or_path or "from scratch", **facts}
    return {name.replace("_", " "): short(value) for name, value in {**facts, **settings}.items()}


# Options that change no number in all_results.json. Data counts by its contents, the model is in the identity.
NOT_IN_RESULTS = ("output_dir", "push_to_hub", "hub", "run_name", "disable_tqdm", "model_name_or_path")
DATA = ("dataset", "validation_file", "test_file")


def fingerprint(run_args) -> str:
    """Of a run with its evaluation: the same for a repeated command, another one for other settings, training or test rows."""
    options = {name: value for name, value in run_args.resolved.items() if not name.startswith(NOT_IN_RESULTS)}
    for name in DATA:  # training rows are in the identity, those that are held out may change without them
        path = Path(options.get(name) or "").expanduser()
        if name in options and path.exists():
            files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
            options[name] = [file_digest(each) for each in files]
    return hashlib.sha256(json.dumps([run_args.identity, options], sort_keys=True, default=str).encode()).hexdigest()


def check_identity(checkpoint: Path, identity: dict | None) -> None:
    """Compares with the identity that the checkpoint was written with.

    Raises:
        UserError: they differ; the message names what changed, with both values.
    """
    if identity is None:
        return
    then = json.loads((checkpoint / MANIFEST).read_bytes())["identity"] or {}
    now = json.loads(json.dumps(identity))
    changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if changed:
        what = "; ".join(f"{key}: {_shown(then.get(key))} then, {_shown(now.get(key))} now" for key in changed)
        raise UserError(
            f"{checkpoint} belongs to another run ({what}).\n"
            "Undo the change to go on with it, or start anew with `--resume never` or a new --output_dir."
        )


def _shown(value) -> str:
    """The value, or the beginning of its hash."""
    text = str(value)
    return f"{text[:8]}..." if len(text) == 64 else text
