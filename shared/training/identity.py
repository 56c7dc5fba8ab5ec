"""What must not change within a run: a resume with another model, data or settings is refused. Called by each train.py."""

import hashlib
import json
from pathlib import Path

from shared import UserError

MANIFEST = "manifest.json"


def run_identity(args, run_args, **facts) -> dict:
    """What must not change within a run, for `find_checkpoint` and `CompleteCheckpoints`: a resume with another is refused.

    Args:
        args: training arguments; the settings that the weights of each step depend on are taken from them.
        run_args: model and data by name.
        facts: by the name that the error shows, e.g. `rows=[...]`, `method="lora"`; whatever is long is hashed.
    """

    def short(value):
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        return text if len(text) <= 64 else hashlib.sha256(text.encode()).hexdigest()

    names = (
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "max_steps",
        "num_train_epochs",
    )
    names += ("world_size", "seed", "weight_decay", "optim")
    settings = {name: str(getattr(args, name)) for name in names}
    # their product only: another micro-batch is the remedy for too little memory
    settings["step_rows"] = str(args.per_device_train_batch_size * args.gradient_accumulation_steps)
    facts = {"model": run_args.model_name_or_path or "from scratch", "dataset": run_args.dataset, **facts}
    return {name.replace("_", " "): short(value) for name, value in {**facts, "settings": settings}.items()}


def check_identity(checkpoint: Path, identity: dict | None) -> None:
    """Compares with the identity that the checkpoint was written with.

    Raises:
        UserError: they differ; the message names what changed.
    """
    if identity is None:
        return
    then = json.loads((checkpoint / MANIFEST).read_bytes())["identity"] or {}
    now = json.loads(json.dumps(identity))
    changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if changed:
        what = "; ".join(f"{key}: {_short(then.get(key))} then, {_short(now.get(key))} now" for key in changed)
        raise UserError(
            f"{checkpoint} belongs to another run ({what}).\n"
            "Undo the change to go on with it, or start anew with `--resume never` or a new --output_dir."
        )


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
