"""What to run first on a GPU: `make gpu-check`. Trains each task for some steps and compares with what its plan said.

About ten minutes, no account and no model hub: the laptop recipes, in the precision of the card. Writes
outputs/gpu_check.json and prints a table for an issue. Not covered: the recipes' own models, several GPUs, export.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "outputs" / "gpu_check"
TASKS = ("pretrain_gpt2", "mlm_bert", "classify_bert", "chat_sft", "summarize_t5", "qa_squad")
SHORT = ["--max_steps=30", "--max_test_rows=50", "--eval_strategy=no", "--save_steps=10", "--logging_steps=5"]
SHORT += ["--warmup_steps=2", "--disable_tqdm=true"]
RATIO = (0.75, 1.25)  # of planned to measured memory


def row(check: str, measured: str, limit: str, passed: bool) -> dict:
    """A line of the table."""
    return {"check": check, "measured": measured, "limit": limit, "passed": bool(passed)}


def environment() -> list[dict]:
    """Whether torch was built for this card, and whether an adapter can be made."""
    import torch

    from shared import UserError
    from shared.publish.hub import check_peft

    major, minor = torch.cuda.get_device_capability()
    built = torch.cuda.get_arch_list()
    fits = any(re.fullmatch(rf"(sm|compute)_{major}\d", each) for each in built)
    try:
        check_peft()
        adapters = "can be made"
    except UserError as error:
        adapters = str(error)
    return [
        row("torch is built for this card", f"sm_{major}{minor}, {torch.__version__}", ", ".join(built), fits),
        row("adapters", adapters, "can be made", adapters == "can be made"),
    ]


def command(task: str, flags: list[str]) -> list[str]:
    """A task's script with these flags."""
    return [sys.executable, str(ROOT / "tasks" / task / "train.py"), *flags]


def losses(run: Path) -> dict[int, float]:
    """Logged training losses of a run by step."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def check_task(task: str, flags: list[str], run: Path, memory: bool = True) -> list[dict]:
    """Trains for the steps that `flags` say: it ends, losses are finite and fall, and memory is what `--dry_run` had said."""
    flags = [*flags, f"--output_dir={run}", "--resume=never"]
    plan = subprocess.run(command(task, [*flags, "--dry_run=true"]), cwd=ROOT, capture_output=True, text=True)
    trained = subprocess.run(command(task, flags), cwd=ROOT, capture_output=True, text=True)
    if trained.returncode:
        said = (trained.stderr.strip().splitlines() or ["nothing"])[-1][:200]
        return [row(f"{task} trains", said, "ends without an error", False)]
    found, results = list(losses(run).values()), json.loads((run / "all_results.json").read_text())
    good = all(map(math.isfinite, found)) and found[-1] < found[0]
    rows = [row(f"{task}: loss", f"{found[0]:.3f} to {found[-1]:.3f}", "finite, falls", good)]
    minutes = results["train_minutes"]
    rows.append(row(f"{task}: time", f"{minutes:.2f} min of training", "none", True))
    planned = re.search(r"about ([\d.]+) GB memory", plan.stdout)
    if not planned:
        said = (plan.stderr.strip().splitlines() or ["nothing"])[-1][:200]
        rows.append(row(f"{task}: plan", said, "a plan", False))
    else:
        ratio = float(planned[1]) / results["peak_memory_gb"]
        within = not memory or RATIO[0] <= ratio <= RATIO[1]
        shown = f"planned {planned[1]} GB, measured {results['peak_memory_gb']} GB"
        rows.append(row(f"{task}: memory", shown, f"ratio {RATIO[0]} to {RATIO[1]}" if memory else "none", within))
    return rows


def check_resume(task: str, flags: list[str], whole: Path, run: Path, after: int) -> list[dict]:
    """Kills a run once its checkpoint of step `after` is complete; repeated, it must end with the losses of the run `whole`."""
    flags = [*flags, f"--output_dir={run}"]
    manifest, deadline = run / f"checkpoint-{after}" / "manifest.json", time.monotonic() + 600
    program = subprocess.Popen(command(task, flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while program.poll() is None and not manifest.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed = program.poll() is None
    if killed:
        os.kill(program.pid, signal.SIGKILL)
        program.wait()
    again = subprocess.run(command(task, flags), cwd=ROOT, capture_output=True, text=True)
    if not killed or again.returncode or "Resumes from" not in again.stdout:
        said = (again.stderr.strip().splitlines() or ["it had ended, or nothing was resumed"])[-1][:200]
        return [row(f"{task}: killed, goes on", said, "goes on", False)]
    expected, found = losses(whole), losses(run)
    common = expected.keys() & found.keys()
    most = max((abs(found[step] / expected[step] - 1) for step in common), default=math.inf)
    return [row(f"{task}: killed, goes on", f"losses differ by {most:.1e}", "1e-3 at most", most <= 1e-3)]


def report(rows: list[dict], about: str, path: Path) -> str:
    """Writes the rows as JSON; returns them as a table in Markdown."""
    passed = sum(each["passed"] for each in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "passed": passed, "rows": rows}, indent=1), encoding="utf8")
    lines = [
        f"gpu-check: {passed} of {len(rows)} passed on {about}",
        "",
        "| check | measured | limit | |",
        "|---|---|---|---|",
    ]
    marks = {True: "passed", False: "**failed**"}
    lines += [f"| {each['check']} | {each['measured']} | {each['limit']} | {marks[each['passed']]} |" for each in rows]
    return "\n".join(lines)


def main() -> int:
    """Runs all checks; the exit code is 0 if all passed, 2 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        print(
            "error: gpu-check needs a GPU that torch can use, and there is none. `make test` runs without.",
            file=sys.stderr,
        )
        return 2
    from shared.training.hardware import hardware

    started, rows = time.monotonic(), environment()
    for task in TASKS:
        print(f"{task} ...", flush=True)
        rows += check_task(task, SHORT, OUTPUT / task)
    print("killed, goes on ...", flush=True)
    same = [*SHORT, "--full_determinism=true"]
    rows += check_task("pretrain_gpt2", same, OUTPUT / "whole")[:1]
    rows += check_resume("pretrain_gpt2", [*same, "--resume=auto"], OUTPUT / "whole", OUTPUT / "killed", 10)
    minutes = (time.monotonic() - started) / 60
    about = f"{hardware()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {minutes:.1f} min"
    print(report(rows, about, ROOT / "outputs" / "gpu_check.json"))
    return 0 if all(each["passed"] for each in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
