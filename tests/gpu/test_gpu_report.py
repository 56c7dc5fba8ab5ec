"""The table of `make gpu-check`, from reports as pytest makes them, and its refusal without a GPU."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

from checkout import ROOT
from gpu_report import rows_of, write_report


def report(name: str, when: str = "call", error: str = "", rows=()) -> SimpleNamespace:
    given = {"nodeid": f"tests/gpu/test_x.py::{name}", "when": when, "failed": bool(error), "longrepr": error}
    return SimpleNamespace(**given, user_properties=[("row", row) for row in rows])


def test_the_table_has_what_was_measured_and_what_broke_off(tmp_path):
    fits = {"check": "memory", "measured": "9.1", "limit": "<= 14.5", "passed": True}
    slow = {"check": "ratio", "measured": "1.4", "limit": "<= 1.25", "passed": False}
    reports = [report("test_a", rows=[fits, slow]), report("test_a", "teardown", "assert", [fits, slow])]
    reports += [report("test_b", error="Traceback\nRuntimeError: CUDA error", rows=[fits]), report("test_c")]
    said, path = [], tmp_path / "outputs" / "gpu_check.json"
    write_report({"card": "Tesla T4", "time": "9.4 minutes"}, rows_of(reports), path, said.append)
    assert said[2:] == [
        "| memory | 9.1 | <= 14.5 |  |",
        "| ratio | 1.4 | <= 1.25 | **no** |",
        "| memory | 9.1 | <= 14.5 |  |",
        "| test_b | RuntimeError: CUDA error | runs to its end | **no** |",
        "| test_c | yes | runs to its end |  |",
        f"gpu-check: 3 of 5 passed on Tesla T4, 9.4 minutes; report {path}",
    ]
    assert json.loads(path.read_text())["rows"][1] == slow


def test_without_a_gpu_it_is_one_line():
    """The command of the Makefile."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu/test_gpu_report.py"]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    lines = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
    assert ran.returncode and lines == [
        "ERROR: gpu-check measures a GPU, and PyTorch finds none here. Without one: make test."
    ]
