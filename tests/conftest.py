"""Rules for every test: it tests this checkout, sends nothing home, and with CI=true does not skip."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and the forks of `datasets` do not go together

import pytest
from checkout import ROOT


@pytest.fixture(scope="session", autouse=True)
def shared_is_this_checkout():
    """A script started by `accelerate launch` must import `shared` from here and not from another clone."""
    import shared

    # -P: without the working directory on the path, which is what a script in tasks/ sees
    command = [sys.executable, "-P", "-c", "import shared; print(shared.__file__)"]
    script = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    for who, where in (("these tests", shared.__file__), ("a script", script.stdout.strip() or script.stderr.strip())):
        assert where and Path(where).parent == ROOT / "shared", (
            f"{who} would use shared from {where}, not from {ROOT / 'shared'}: "
            f"run `.venv/bin/pip install -e .` in {ROOT}"
        )


def _skip_fails(report):
    """With CI=true a skip is a failure: what CI can run it must run."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _skip_fails((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _skip_fails((yield))
