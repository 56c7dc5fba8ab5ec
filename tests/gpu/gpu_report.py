"""The table of `make gpu-check` and its file. Used by conftest.py."""

import json
import shutil
import subprocess
from pathlib import Path

import torch


def card() -> dict:
    """The GPU and what drives it."""
    found = {"card": torch.cuda.get_device_name(), "capability": "sm{}{}".format(*torch.cuda.get_device_capability())}
    found |= {"torch": f"torch {torch.__version__}"}
    if program := shutil.which("nvidia-smi"):
        asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = "driver " + subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0]
    return found


def rows_of(reports: list) -> list[dict]:
    """Lines of the table: what tests recorded, and a line for each that broke off or recorded nothing.

    Args:
        reports: pytest's; a test that fails at its end (a limit was passed) has a second one.
    """
    rows = []
    for report in reports:
        found = [value for name, value in report.user_properties if name == "row"]
        broke_off = report.failed and all(each["passed"] for each in found)
        if report.when == "call":
            rows += found
        if broke_off or report.when == "call" and not found:
            said = str(report.longrepr).strip().splitlines()[-1] if broke_off else "yes"
            name = report.nodeid.split("::")[-1]
            rows.append({"check": name, "measured": said, "limit": "runs to its end", "passed": not broke_off})
    return rows


def write_report(facts: dict, rows: list[dict], path: Path, write_line) -> None:
    """A table in Markdown, to paste into an issue, a last line, and the file.

    Args:
        facts: of the machine and the run.
        write_line: prints one.
    """
    write_line("| check | measured | limit | |")
    write_line("|---|---|---|---|")
    for each in rows:
        mark = "" if each["passed"] else "**no**"
        write_line(f"| {each['check']} | {each['measured']} | {each['limit']} | {mark} |")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts | {"rows": rows}, indent=1))
    passed = sum(each["passed"] for each in rows)
    write_line(f"gpu-check: {passed} of {len(rows)} passed on {', '.join(map(str, facts.values()))}; report {path}")
