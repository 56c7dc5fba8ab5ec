"""Training tokens per second of tasks/pretrain_gpt2 against the minimal loop of transformers' run_clm.py, in turn.

    python benchmarks/pretrain_throughput.py --steps 12 --rounds 2

run_clm.py itself is an example in transformers' repository and no part of the package. `minimal` is its training as far as it
takes time: `Trainer` as it is, AdamW, blocks of input_ids and labels through `default_data_collator`, the loss of the model.
`minimal, GPT-2's defaults` leaves activation and dropout as `GPT2Config` has them, which is what run_clm.py trains with
`--config_overrides`. Same shape, blocks, batch and steps for all; ours runs once with AdamW and once with Muon, and writes no
checkpoint either. The first step of each run is not counted. Prints tokens per second and ratios of the best rounds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared.training.hardware import choose_precision, gpus

ROOT = Path(__file__).resolve().parent.parent
TASK = ROOT / "tasks" / "pretrain_gpt2"
SYSTEMS = ("minimal, GPT-2's defaults", "minimal", "ours, adamw", "ours, muon")


def train(system: str, size: str, vocab: int, length: int, batch: int, steps: int) -> dict:
    """Trains on random blocks in this process; returns tokens per second and the last loss."""
    sys.path.insert(0, str(TASK))  # the benchmark measures the task's own trainer
    import numpy as np
    import torch
    from blocks import Blocks, example
    from gpt2_models import HEAD, SIZES, build_model
    from trainer_gpt2 import PretrainTrainer
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )

    class Times(TrainerCallback):
        marks, loss = [], None

        def on_step_end(self, args, state, control, **kwargs):
            self.marks.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.loss = (logs or {}).get("loss", self.loss)

    class Vocabulary(list):
        eos_token_id = 0

    precision = choose_precision(gpus())
    options = {name: name == precision for name in ("bf16", "fp16")}
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    options |= {"per_device_train_batch_size": batch, "max_steps": steps, "learning_rate": 1e-3}
    options |= {"remove_unused_columns": False, "dataloader_pin_memory": torch.cuda.is_available()}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(output_dir=folder, **options)
        set_seed(0)
        blocks = Blocks(np.random.default_rng(0).integers(0, vocab, (batch * steps, length + 1), dtype=np.int32), 0)
        times = Times()
        if system.startswith("minimal"):
            layers, width = SIZES[size]
            shape = {"vocab_size": vocab, "n_positions": length, "n_layer": layers, "n_embd": width}
            shape |= {"n_head": width // HEAD, "bos_token_id": 0, "eos_token_id": 0}
            if system == "minimal":
                off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
                shape |= {"activation_function": "gelu_pytorch_tanh", **off}
            rows = [
                {"input_ids": (ids := example(block, 0)["input_ids"]), "labels": ids.clone()} for block in blocks.blocks
            ]
            trainer = Trainer(
                model=GPT2LMHeadModel(GPT2Config(**shape)),
                args=args,
                train_dataset=rows,
                data_collator=default_data_collator,
                callbacks=[times],
            )
        else:
            trainer = PretrainTrainer(
                model=build_model(None, size, Vocabulary(range(vocab)), length, False),
                args=args,
                train_dataset=blocks,
                data_collator=default_data_collator,
                callbacks=[times],
                muon=system == "ours, muon",
                block_length=length,
                end=0,
            )
        trainer.train()
    seconds = times.marks[-1] - times.marks[0]
    return {"tokens_per_second": (steps - 1) * batch * length / seconds, "loss": float(times.loss)}


def main() -> None:
    """Runs all in turn, each in a process of its own, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="how often each runs; the faster run counts")
    parser.add_argument("--size", default="nano", help="a size of the task")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens of the vocabulary")
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--batch", type=int, default=16, help="blocks of an optimizer step")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = (args.size, args.vocab, args.length, args.batch, args.steps)
    if args.one:
        print(json.dumps(train(args.one, *shape)))
        return
    found = {system: [] for system in SYSTEMS}
    for number in range(args.rounds):
        for system in SYSTEMS:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", system], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            result = json.loads(done.stdout.splitlines()[-1])
            found[system].append(result["tokens_per_second"])
            print(
                f"round {number}  {system:26} {result['tokens_per_second']:8.0f} tokens/s  loss {result['loss']:.3f}",
                flush=True,
            )
    best = {system: max(speeds) for system, speeds in found.items()}
    for ours in SYSTEMS[2:]:
        for theirs in SYSTEMS[:2]:
            print(f"{ours} / {theirs}: {best[ours] / best[theirs]:.2f}")


if __name__ == "__main__":
    main()
