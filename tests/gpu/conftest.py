"""`make gpu-check`: what the tests here, and others marked `gpu`, measure on a GPU becomes a table and outputs/gpu_check.json.

Each is there twice: `tiny` runs on a CPU in `make test`, `real` has the sizes of the recipes and needs a GPU.
"""

import time

import pytest
import torch
from checkout import ROOT
from gpu_report import card, rows_of, write_report

began = time.monotonic()


def pytest_configure(config):
    if config.option.markexpr == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("gpu-check measures a GPU, and PyTorch finds none here. Without one: make test.")


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.gpu)])
def size(request) -> str:
    return request.param


@pytest.fixture
def row(record_property):
    """`row(check, measured, limit, passed)` adds a line to the table; the test fails at its end if one did not pass."""
    missed = []

    def add(check: str, measured, limit: str = "", passed: bool = True) -> None:
        found = {"check": check, "measured": str(measured), "limit": limit, "passed": bool(passed)}
        record_property("row", found)
        if not passed:
            missed.append(found)

    yield add
    assert not missed


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "gpu" and torch.cuda.is_available():
        reports = [each for kind in ("passed", "failed", "error") for each in terminalreporter.stats.get(kind, [])]
        facts = card() | {"time": f"{(time.monotonic() - began) / 60:.1f} minutes"}
        write_report(facts, rows_of(reports), ROOT / "outputs" / "gpu_check.json", terminalreporter.write_line)
