"""The README's section on trackers, callbacks and optimizers: numbers arrive, without an account and without a network."""

import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys

import pytest
import task_runs
from checkout import ROOT, train_script

from shared.training.arguments import parse

CALLBACK = "callbacks=[CompleteCheckpoints(identity), stopper, EarlyStoppingCallback(early_stopping_patience=3)],"


def flags(tiny_bert, folder, **options) -> list[str]:
    rows = [{"text": f"Number {i} is {'red' if i % 2 else 'green'}", "label": i % 2} for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "model_name_or_path": tiny_bert,
        "dataset": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "max_steps": 4,
        "logging_steps": 1,
        "eval_steps": 1,
        "save_steps": 1,
        "min_label_rows": 2,
        "disable_tqdm": True,
    } | options
    return [f"--{name}={value}" for name, value in options.items()] + ["--columns", "text=text", "label=label"]


def read_tensorboard(folder) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}


def read_trackio(folder) -> dict:
    (database,) = (folder / "trackio").glob("*.db")
    found = {}
    for (logged,) in sqlite3.connect(database).execute("select metrics from metrics order by id"):
        found |= json.loads(logged)
    return found


def read_wandb(folder) -> dict:
    """Its file is a LevelDB log: blocks of 32 KiB, each part behind 4 bytes of checksum, 2 of length and 1 of kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, offset, part, found = path.read_bytes(), 7, b"", {}
    while offset + 7 <= len(content):
        if (left := 32768 - offset % 32768) < 7:
            offset += left
            continue
        length, kind = struct.unpack("<HB", content[offset + 4 : offset + 7])
        part += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            items, part = Record.FromString(part).history.item, b""
            found |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
    return found


@pytest.mark.parametrize(
    ("tracker", "read"), [("tensorboard", read_tensorboard), ("trackio", read_trackio), ("wandb", read_wandb)]
)
def test_numbers_arrive_at_a_tracker(tracker, read, tiny_bert, tmp_path):
    assert f"--report_to {tracker}" in (ROOT / "README.md").read_text()
    script, argv = ROOT / "tasks" / "classify_bert" / "train.py", flags(tiny_bert, tmp_path, report_to=tracker)
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "TRACKIO_DIR": tmp_path / "trackio"}
    environment["TENSORBOARD_LOGGING_DIR"] = tmp_path / "tensorboard"
    # A program of its own, whose end a tracker waits for: those of `task_runs` are forked, and end at once
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    ran = subprocess.run([sys.executable, script, *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    last = {name: value for entry in history for name, value in entry.items()}
    found = read(tmp_path)
    for name in ("loss", "eval_loss", "eval_macro_f1"):
        shown = name.replace("eval_", "eval/") if name.startswith("eval") else f"train/{name}"
        assert found[shown] == pytest.approx(last[name], rel=1e-5), (name, found)


def test_a_callback_of_ones_own_is_one_entry(tiny_bert, tmp_path):
    """A learning rate of 0 does not get better: early stopping ends the run after 3 of 8 steps more than the first."""
    assert CALLBACK in (ROOT / "README.md").read_text() and CALLBACK in (ROOT / "README.vi.md").read_text()
    copy = tmp_path / "stopping"
    shutil.copytree(ROOT / "tasks" / "classify_bert", copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "train.py").read_text()
    assert source.count("callbacks=[CompleteCheckpoints(identity), stopper],") == 1
    source = source.replace("callbacks=[CompleteCheckpoints(identity), stopper],", CALLBACK)
    assert source.count(", set_seed\n") == 1
    (copy / "train.py").write_text(source.replace(", set_seed\n", ", EarlyStoppingCallback, set_seed\n"))
    options = {"learning_rate": 0.0, "max_steps": 8, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    for gone in ((), (3, 4), ()):  # whole; killed in its third step; killed after its last one: it goes on counting
        for step in gone:
            shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
        (tmp_path / "run" / "all_results.json").unlink(missing_ok=True)
        ran = task_runs.command(copy / "train.py", *flags(tiny_bert, tmp_path, **options))
        assert ran.returncode == 0, ran.stderr[-2000:]
        about = json.loads((tmp_path / "run" / "all_results.json").read_text())["run"]
        assert (about["steps"], about["weights_of_step"]) == (4, 1)
    assert "| steps | 4; the weights are those of step 1, the best |" in (tmp_path / "run" / "README.md").read_text()


def test_another_optimizer(tiny_bert, tmp_path):
    assert "--optim adafactor" in (ROOT / "README.md").read_text()
    module = train_script("classify_bert")
    argv = flags(tiny_bert, tmp_path, optim="adafactor", max_steps=2)
    module.main(*parse(module.ScriptArguments, "transformers.training_args:TrainingArguments", argv))
    state = (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").stat().st_size
    weights = (tmp_path / "run" / "checkpoint-2" / "model.safetensors").stat().st_size
    assert state < 0.3 * weights  # of a matrix it keeps rows and columns; AdamW keeps twice the weights
