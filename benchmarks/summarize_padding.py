"""Rows per second and padding of tasks/summarize_t5 with batches grouped by length against random order, in turn.

    python benchmarks/summarize_padding.py --rows 384 --rounds 3

Trains one epoch of the same rows of a data set (`docs:summaries` unless told) with the same tiny T5, once for each order and
round; loading, tokenizing and evaluation are not counted. Prints rows/s, the share of padding in the batches that were really
trained, and the ratio of the best rounds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from shared.data.load import load_data

TASK = Path(__file__).resolve().parent.parent / "tasks" / "summarize_t5"
SIDES = {"random": "random", "grouped": "group_by_length"}


class CountingCollator(DataCollatorForSeq2Seq):
    """Counts the positions of the batches it makes, and those that hold no padding."""

    positions = filled = 0

    def __call__(self, features, return_tensors=None):
        batch = super().__call__(features, return_tensors)
        for name, filler in (("attention_mask", 0), ("labels", -100)):
            self.positions += batch[name].numel()
            self.filled += int((batch[name] != filler).sum())
        return batch


def main() -> None:
    """Trains both ways in turn and prints a table."""
    sys.path.insert(0, str(TASK))  # the benchmark borrows the task's own preprocessing and model
    from articles import find_columns, to_pair, tokenize
    from seq2seq_models import load_model, load_tokenizer, token_loss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="docs:summaries", help="data set by name, as the task takes it")
    parser.add_argument("--rows", type=int, default=384, help="rows of an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs; the faster run counts")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch")
    args = parser.parse_args()
    script_args = argparse.Namespace(max_source_length=512, max_target_length=64, scratch_width=256)
    rows = load_data(args.dataset)["train"].shuffle(seed=0)
    columns = find_columns(rows.column_names, [], rows[0])
    rows = rows.select(range(args.rows)).map(lambda row: to_pair(row, *columns), remove_columns=rows.column_names)
    tokenizer = load_tokenizer(None, iter(rows["document"]), 4096)
    rows = rows.map(
        lambda batch: tokenize(batch, tokenizer, "summarize: ", 512, 64), batched=True, remove_columns=rows.column_names
    )
    results: dict[str, list] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, args.rounds):  # round -1 warms up and is not counted
            for side, strategy in SIDES.items():
                training = Seq2SeqTrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=args.batch,
                    max_steps=2 if number < 0 else -1,
                    num_train_epochs=1,
                    learning_rate=1e-3,
                    train_sampling_strategy=strategy,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    dataloader_pin_memory=torch.cuda.is_available(),
                )
                set_seed(0)
                model = load_model(None, tokenizer, script_args, training)
                collator = CountingCollator(tokenizer, model=model)
                trainer = Seq2SeqTrainer(
                    model=model,
                    args=training,
                    data_collator=collator,
                    train_dataset=rows,
                    processing_class=tokenizer,
                    compute_loss_func=token_loss,
                )
                start = time.perf_counter()
                trainer.train()
                seconds = time.perf_counter() - start
                if number >= 0:
                    results[side].append((len(rows) / seconds, 1 - collator.filled / collator.positions))
                    print(
                        f"{side:8} round {number}: {results[side][-1][0]:6.2f} rows/s  padding {results[side][-1][1]:.1%}",
                        flush=True,
                    )
    best = {side: max(runs) for side, runs in results.items()}
    print(
        f"ratio {best['grouped'][0] / best['random'][0]:.2f}  padding {best['random'][1]:.1%} -> {best['grouped'][1]:.1%}"
    )


if __name__ == "__main__":
    main()
