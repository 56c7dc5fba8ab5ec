"""Runs a task's script as a program of its own: to its end, until a signal, in two processes. Used by the tests of each task."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from checkout import ROOT

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def command(script: Path, *argv, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    """Runs a script to its end."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **ONE_THREAD, **environment},
    )


def interrupt(script: Path, argv: list[str], run: Path, after: int, signum: int) -> int:
    """Sends a signal once the checkpoint of step `after` is complete; returns how the script ended."""
    process = subprocess.Popen(
        [sys.executable, str(script), *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD},
    )
    while process.poll() is None and not (run / f"checkpoint-{after}" / "manifest.json").exists():
        time.sleep(0.005)
    process.send_signal(signum)
    return process.wait()


def in_two_processes(task: str, argv: list[str]) -> subprocess.CompletedProcess:
    """`accelerate launch` of a task with accelerate/cpu.yaml and two processes."""
    accelerate = [str(ROOT / ".venv" / "bin" / "accelerate"), "launch", "--config_file", "accelerate/cpu.yaml"]
    return subprocess.run(
        [*accelerate, "--num_processes", "2", f"tasks/{task}/train.py", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD},
    )


def losses(run: Path) -> dict[int, float]:
    """Logged training losses of a run by step."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
