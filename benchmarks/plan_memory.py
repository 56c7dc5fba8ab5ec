"""Peak memory of training that `--dry_run` estimates, against the peak measured, for configurations of every task on a CPU.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py "chat_sft --method full"

Each configuration runs in a process of its own, laptop.yaml of its task unless another is named, for a few steps. Measured is the
largest resident memory (VmHWM, which Linux sets back on request) from the first step on, without preparing data or evaluating.
Prints estimate, measurement and their ratio.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATIONS = (
    "pretrain_gpt2",
    "mlm_bert",
    "classify_bert",
    "qa_squad",
    "summarize_t5",
    "chat_sft",
    "chat_sft --method full",
    "chat_sft --per_device_train_batch_size 1 --gradient_accumulation_steps 8",
    "chat_sft --gradient_checkpointing true",
    "dpo_chat",
)


def measure(task: str, argv: list[str]) -> None:
    """In a child: trains as the task does, and prints the peak of it in GB before anything is saved or evaluated."""
    script = ROOT / "tasks" / task / "train.py"
    sys.path.insert(0, str(script.parent))  # as for a script
    spec = importlib.util.spec_from_file_location("train", script)
    sys.modules["train"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from shared.training import checkpoints
    from shared.training.arguments import parse

    def train_and_stop(trainer, checkpoint):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        trainer.train()
        kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
        print(f"measured {kilobytes * 1024 / 1e9:.3f}", flush=True)
        os._exit(0)

    checkpoints.train = train_and_stop
    training = re.search(r'run\(main, ScriptArguments, "(.+?)"\)', script.read_text())[1]
    module.main(*parse(module.ScriptArguments, training, argv))


def main() -> None:
    """Estimate and measurement of each configuration named on the command line, or of all."""
    if sys.argv[1:2] == ["--measure"]:
        return measure(sys.argv[2], sys.argv[3:])
    print(f"{'configuration':72} {'estimate':>8} {'measured':>8}  ratio")
    folder = tempfile.mkdtemp()  # stays empty: nothing is saved
    for words in sys.argv[1:] or CONFIGURATIONS:
        task, *flags = words.split()
        flags += ["--output_dir", folder, "--resume", "never", "--max_steps", "4"]
        flags += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"]
        planned = [sys.executable, f"tasks/{task}/train.py", *flags, "--dry_run"]
        found = []
        for command, words_before in (
            (planned, r"about ([\d.]+) GB memory"),
            ([sys.executable, __file__, "--measure", task, *flags], r"measured ([\d.]+)"),
        ):
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if not (match := re.search(words_before, ran.stdout)):
                sys.exit(ran.stdout[-2000:] + ran.stderr[-2000:])
            found.append(float(match[1]))
        print(f"{words:72} {found[0]:8.2f} {found[1]:8.2f}  {found[0] / found[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
