"""Runs a task's script as a program of its own: to its end, until a signal, in two processes. Used by the tests of each task.

Importing torch and the libraries takes longer than a tiny run, so programs are forked from a process that has imported them
(the fork server of `multiprocessing`). What libraries read from the environment when they are imported must then be the same:
for a test that wants it otherwise a new interpreter is started. Also where there is a GPU, which no fork can use.
"""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from checkout import ROOT

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "OMP_", "MKL_", "ACCELERATE_", "TORCH", "PYTHON")
READ_LATER = ("HF_TOKEN",)

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        *("torch", "datasets", "peft", "evaluate", "matplotlib.pyplot", "transformers.models.auto.modeling_auto"),
        *("transformers.trainer_seq2seq", "transformers.pipelines"),
        *("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"),
    ]
)


def _read_at_import(environment) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k.startswith(READ_AT_IMPORT) and k not in READ_LATER}


@cache
def _environment_of_server() -> dict[str, str]:
    """What libraries read in the fork server, which starts with the first program."""
    return _read_at_import(os.environ)


@cache
def _path() -> list[str]:
    """The search path of a script, without its own folder: that of the tests has more in it."""
    show = [sys.executable, "-P", "-c", "import json, sys; print(json.dumps(sys.path))"]
    return json.loads(subprocess.run(show, capture_output=True, text=True, check=True).stdout)


def _in_fork(argv: list[str], cwd: str, environment: dict[str, str], path: list[str], outputs: list[str]) -> None:
    """What `python argv` does after its imports."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(outputs, 1):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), number)
    del sys.modules["task_runs"], sys.modules["checkout"]
    if argv[0] == "-m":
        sys.argv, sys.path[:] = argv[1:], ["", *path]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:] = argv, [str(Path(argv[0]).parent), *path]
        runpy.run_path(argv[0], run_name="__main__")


class Program:
    """`python argv`, started: `pid`, `running()`, `wait()`."""

    def __init__(self, argv: list, cwd: Path = ROOT, environment: dict[str, str] | None = None):
        self.argv = [str(arg) for arg in argv]
        environment = {**os.environ, **ONE_THREAD, **(environment or {})}
        self.outputs = []
        for _ in range(2):
            number, name = tempfile.mkstemp()
            os.close(number)
            self.outputs.append(name)
        self.forked = _read_at_import(environment) == _environment_of_server() and not torch.cuda.is_available()
        if self.forked:
            target = (self.argv, str(cwd), environment, _path(), self.outputs)
            self.process = server.Process(target=_in_fork, args=target)
            self.process.start()
        else:
            with open(self.outputs[0], "wb") as out, open(self.outputs[1], "wb") as err:
                python = [sys.executable, *self.argv]
                self.process = subprocess.Popen(python, cwd=cwd, env=environment, stdout=out, stderr=err)
        self.pid = self.process.pid

    def running(self) -> bool:
        return self.process.is_alive() if self.forked else self.process.poll() is None

    def wait(self) -> subprocess.CompletedProcess:
        """Its exit code, negative for a signal, and what it printed."""
        if self.forked:
            self.process.join()
            code = self.process.exitcode
        else:
            code = self.process.wait()
        out, err = (Path(name).read_text(encoding="utf8", errors="replace") for name in self.outputs)
        for name in self.outputs:
            os.unlink(name)
        return subprocess.CompletedProcess(self.argv, code, out, err)


def command(*argv, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python argv`, a script or `-m module`, to its end."""
    return Program(list(argv), cwd, environment).wait()


def interrupt(script: Path, argv: list[str], run: Path, after: int, signum: int) -> int:
    """Sends a signal once the checkpoint of step `after` is complete; returns how the script ended."""
    program = Program([script, *argv])
    while program.running() and not (run / f"checkpoint-{after}" / "manifest.json").exists():
        time.sleep(0.005)
    os.kill(program.pid, signum)
    return program.wait().returncode


def in_two_processes(task: str, argv: list[str], sharded: bool = False) -> subprocess.CompletedProcess:
    """A task in two processes, with the environment that `accelerate launch` would give them, and with half of the model in each
    if `sharded`; their outputs joined."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {**address, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    start = [ROOT / "tests" / "sharded.py", task] if sharded else [ROOT / "tasks" / task / "train.py"]
    programs = [Program([*start, *argv], ROOT, {**world, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    done = [program.wait() for program in programs]
    code = next((process.returncode for process in done if process.returncode), 0)
    out, err = ("".join(getattr(process, name) for process in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(argv, code, out, err)


def without_dropout(model: Path, copy: Path) -> Path:
    """A copy of a saved model that drops nothing: two processes draw other numbers than one."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {name: 0.0 for name, value in config.items() if "drop" in name and isinstance(value, float)}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def assert_like_one(
    two: subprocess.CompletedProcess, one: subprocess.CompletedProcess, runs: Path, name: str = "two"
) -> dict:
    """Two processes trained what one does at the same effective batch, wrote it once and showed each progress bar once.

    Losses agree to 1e-3 (gradients are summed in another order); what counts decisions (accuracy, F1, ROUGE, ...) may differ
    by the few that were a tie, 2 of 100. Rows grouped by length come in an order that depends on the number of processes: both
    must take them at random.

    Args:
        two, one: how the programs ended, both with `--disable_tqdm=false`.
        runs: holds their output folders, `name` and `one`.

    Returns:
        The results of the two processes.
    """
    for ended in (two, one):
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert two.stdout.count(" 2 processes, ") == two.stdout.count("preflight: ") == 1, two.stdout
    bars = [Counter(re.findall(r"([^\r\n|]*?):? +0%\|", ended.stderr)) for ended in (two, one)]
    assert bars[0] == bars[1] and bars[0][""], bars
    found, expected = (json.loads((runs / each / "all_results.json").read_text()) for each in (name, "one"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith(("test_", "base_", "baseline_")) and isinstance(value, (int, float, list)):
            exact = "loss" in key or "perplexity" in key
            share = 1 if "accuracy" in key else 100
            assert found[key] == pytest.approx(value, rel=1e-3, abs=0 if exact else 0.02 * share), key
    assert losses(runs / name) == pytest.approx(losses(runs / "one"), rel=1e-3) and losses(runs / name)
    files = [sorted(path.name for path in (runs / each).iterdir()) for each in (name, "one")]
    assert files[0] == files[1]
    return found


def losses(run: Path) -> dict[int, float]:
    """Logged training losses of a run by step."""
    return logged(run, "loss")


def logged(run: Path, name: str) -> dict[int, float]:
    """What a run logged by that name, by step."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}
