"""Two hosts of one process each, with addresses of their own: they train what one does, and neither waits for a dead one.

In two network namespaces joined by a virtual cable where that is allowed (root and iproute2), else on two loopback addresses.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import task_runs
from checkout import ROOT

from shared.training.launch import _what_was_lost

TASK = ROOT / "tasks" / "classify_bert"
PORT = "29517"
COMMANDS = re.findall(
    r"^accelerate launch .*two_machines.*$", (ROOT / "README.md").read_text("utf8"), re.M
)  # rank 0 and 1


@contextmanager
def network():
    """For each of two hosts: what stands before its commands, its address and its interface."""
    names, addresses = [f"taskbook{os.getpid()}{end}" for end in "ab"], ["10.213.7.1", "10.213.7.2"]

    def ip(*words) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    try:
        try:
            cable = [f"tb{os.getpid() % 10**6}{end}" for end in "ab"]
            made = all(ip("netns", "add", name) for name in names)
            made = made and ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
            for name, end, address in zip(names, cable, addresses, strict=True):
                made = made and ip("link", "set", end, "netns", name)
                made = made and ip("-n", name, "address", "add", f"{address}/24", "dev", end)
                made = made and ip("-n", name, "link", "set", end, "up") and ip("-n", name, "link", "set", "lo", "up")
        except FileNotFoundError:
            made = False
        if made:
            yield [(["ip", "netns", "exec", n], a, c) for n, a, c in zip(names, addresses, cable, strict=True)]
        else:
            yield [([], "127.0.0.2", "lo"), ([], "127.0.0.3", "lo")]
    finally:
        for name in names:
            subprocess.run(["sh", "-c", f"ip netns del {name}"], capture_output=True)


def rows(folder: Path) -> Path:
    path = folder / "rows.csv"
    path.write_text("text,label\n" + "\n".join(f"{i} {w} {i * 7},{w}" for i in range(60) for w in ("good", "bad")))
    return path


def flags(model, data, output, **options):
    options = {"model_name_or_path": model, "dataset": data, "output_dir": output, "max_length": 16} | options
    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 4, "logging_steps": 1, "warmup_steps": 0} | options
    options |= {"train_sampling_strategy": "random", "disable_tqdm": True, "learning_rate": 0.003}
    return [f"--{name}={value}" for name, value in options.items()] + ["--columns", "text=text", "label=label"]


def test_two_hosts_train_as_one_and_the_first_one_writes(tiny_bert, tmp_path):
    model, data = task_runs.without_dropout(tiny_bert, tmp_path / "model"), rows(tmp_path)
    with network() as hosts:
        started = []
        for rank, (prefix, _, interface) in enumerate(hosts):
            words = COMMANDS[rank].replace("10.0.0.1", hosts[0][1]).replace("29500", PORT)
            words = words.replace("tasks/chat_sft", "tasks/classify_bert").split()
            command = [*prefix, str(ROOT / ".venv" / "bin" / words[0]), *words[1:]]
            command += flags(model, data, tmp_path / f"host{rank}", per_device_train_batch_size=4, use_cpu=True)
            environment = os.environ | task_runs.ONE_THREAD | {"GLOO_SOCKET_IFNAME": interface}
            with (tmp_path / f"host{rank}.txt").open("w") as log:
                started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        codes = [process.wait(timeout=240) for process in started]
    logs = [(tmp_path / f"host{rank}.txt").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    assert " 2 processes, " in logs[0] and "report: " in logs[0]
    one = task_runs.command(
        TASK / "train.py",
        *flags(model, data, tmp_path / "one", per_device_train_batch_size=4, gradient_accumulation_steps=2),
    )
    assert one.returncode == 0, one.stderr
    found, expected = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("host0", "one"))
    for name in ("test_accuracy", "base_accuracy", "baseline_accuracy", "test_rows"):
        assert found[name] == pytest.approx(expected[name], abs=0.02), name
    assert task_runs.losses(tmp_path / "host0") == pytest.approx(task_runs.losses(tmp_path / "one"), rel=1e-3)
    second = sorted(path.name for path in (tmp_path / "host1").rglob("*") if path.is_file())
    assert second == ["rng_state_1.pth"] * len(second)  # what a shared disk would hold besides
    assert "report: " not in logs[1] and "preflight: " not in logs[1]


@pytest.mark.parametrize(("how", "signum"), [("killed", signal.SIGKILL), ("frozen", signal.SIGSTOP)])
def test_when_one_host_is_gone_the_other_ends(tiny_bert, tmp_path, how, signum):
    """A dead host closes its connections; one that hangs is given up after --ddp_timeout. Each has a disk of its own."""
    data = rows(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        common = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}

    def start(rank: str):
        options = {"max_steps": 100000, "eval_steps": 100000, "ddp_timeout": 15}
        argv = flags(tiny_bert, data, tmp_path / f"run{rank}", **options)
        return task_runs.Program([TASK / "train.py", *argv], environment=common | {"RANK": rank})

    first, second = map(start, "01")
    while first.running() and second.running() and not (tmp_path / "run0" / "checkpoint-4" / "manifest.json").exists():
        time.sleep(0.01)
    os.kill(second.pid, signum)
    deadline = time.monotonic() + 60
    while first.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    hangs = first.running()
    for program in (first, second) if hangs else (second,) if how == "frozen" else ():
        os.kill(program.pid, signal.SIGKILL)
    ended, _ = first.wait(), second.wait()
    assert not hangs
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and last.startswith("error: lost the connection to another process, which ")
    assert f"which {'has ended' if how == 'killed' else 'hangs'} (" in last
    assert re.search(r"the same command on all machines goes on from checkpoint-\d+\.", last)
    assert "Traceback" not in ended.stderr


def test_without_a_checkpoint_nothing_goes_on(tmp_path):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4242")
    assert "has ended ([gloo/" in _what_was_lost(lost, tmp_path)
    assert _what_was_lost(lost, tmp_path).endswith("starts anew: there is no complete checkpoint.")
    (tmp_path / "checkpoint-20").mkdir()  # half of one
    assert "there is no complete checkpoint" in _what_was_lost(lost, tmp_path)
    hangs = RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)")
    assert "which hangs (" in _what_was_lost(hangs, tmp_path) and "OpType=ALLREDUCE" in _what_was_lost(hangs, tmp_path)
