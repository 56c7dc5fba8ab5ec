"""Trains a masked language model (BERT) on documents and shows how well it fills in what is missing.

    accelerate launch tasks/mlm_bert/train.py
    accelerate launch tasks/mlm_bert/train.py --config tasks/mlm_bert/configs/t4.yaml
    accelerate launch --config_file accelerate/multi_gpu.yaml --num_processes 8 tasks/mlm_bert/train.py

The first command runs configs/laptop.yaml: two CPU cores, no account, no model hub. `--dry_run` shows the plan first.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shared.training.finish import finish
from shared.training.launch import begin, log, run, setup

# Torch is imported inside the functions: a misspelt key or --help is answered before it.


@dataclass
class ScriptArguments:
    """Continue the pretraining of an encoder on documents, or start from scratch, by masked language modelling."""

    REFUSED = {
        "label_smoothing_factor": "the loss of this task has none",
        "dataloader_persistent_workers": "workers that outlive an epoch would repeat its masks",
    }

    max_length: int = field(
        default=128,
        metadata={"help": "Tokens of a row; a longer document is cut into several rows, and no token is lost."},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that is masked in training."})
    whole_word_mask: bool = field(
        default=False, metadata={"help": "Mask all tokens of a word together instead of each on its own."}
    )
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout while training, by default the model's own; 0 learns faster where no row is seen twice. The saved "
            "configuration keeps the model's own."
        },
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Take only tokenizer and architecture of model_name_or_path, and begin with random weights."},
    )
    max_validation_rows: int = field(
        default=50, metadata={"help": "Documents of the validation split in each evaluation."}
    )


def load_documents(run_args, seed: int) -> tuple[dict, str]:
    """Clean documents (column `text`) of the three splits, and the cleaning report as one line."""
    from shared.data.cleaning import clean_dataset, document_cleaner
    from shared.data.columns import find_columns
    from shared.data.load import load_data, load_splits
    from shared.data.splits import split_dataset

    # A tenth goes to each of validation and test
    most = None if run_args.max_train_rows is None else math.ceil(run_args.max_train_rows / 0.8)
    data = load_splits(run_args, partial(load_data, most=most))
    names = next(iter(data.values())).column_names
    clean = document_cleaner(find_columns(run_args.dataset, names, run_args.columns, ["text"])["text"])

    def convert(row):
        result = clean(row)
        return "empty" if result == "bad: empty" else result  # nothing is wrong with an empty line of a text file

    cleaned, report = clean_dataset(data, convert, run_args.dataset, most=run_args.max_bad_rows)
    return split_dataset(cleaned, lambda row: row["text"], seed), str(report)


def compute_metrics(rows: dict[str, list[float]], prefix: str) -> dict:
    """Loss, perplexity and accuracy over all masked tokens of a split, with 95 % bootstrap intervals over documents."""
    from shared import metrics

    tokens = [int(count) for count in rows["tokens"]]
    found = metrics.load("perplexity").compute(predictions=rows["nll"], references=tokens)
    for name, hits in (("accuracy", "correct"), ("accuracy_top5", "correct_top5")):
        found[name] = sum(rows[hits]) / sum(tokens)
        found[f"{name}_ci95"] = metrics.ci95(metrics.bootstrap_ratio(rows[hits], tokens))
    return {f"{prefix}_{name}": value for name, value in found.items()}


def main(script_args, args, run_args) -> None:
    """The whole task, from documents to card."""
    # Setup
    from masking import (
        MaskedTrainer,
        NewMasks,
        fix_masks,
        frequency_log_probs,
        masking_collator,
        score_documents,
        score_most_frequent,
    )
    from mlm_model import fill_mask, load_model, load_tokenizer, start_head
    from mlm_rows import count_tokens, cut_into_rows, preflight, sample_prompts

    from shared.data.splits import first_rows
    from shared.publish import compare
    from shared.publish.hub import pull
    from shared.training.checkpoints import CompleteCheckpoints, train
    from shared.training.dropout import set_dropout
    from shared.training.identity import run_identity
    from shared.training.plan import print_plan
    from shared.training.processes import once_a_machine
    from shared.training.sharding import beside
    from shared.training.show_data import marked, show_data
    from shared.training.signals import StopOnSignal

    setup(args, run_args)

    # Data
    source = pull(run_args.model_name_or_path)
    tokenizer = load_tokenizer(source, script_args.max_length)
    splits, cleaning = once_a_machine(lambda: load_documents(run_args, args.seed))
    limits = {
        "train": run_args.max_train_rows,
        "validation": script_args.max_validation_rows,
        "test": run_args.max_test_rows,
    }
    rows = {
        name: cut_into_rows(
            first_rows(splits[name], most),
            tokenizer,
            script_args.max_length,
        )
        for name, most in limits.items()
    }
    collator = masking_collator(tokenizer, args.seed, script_args.mlm_probability, script_args.whole_word_mask)
    facts = preflight(rows["train"], collator, args)
    log.info("preflight: %s", ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in facts.items()))

    def seen(i):
        batch = collator([rows["train"][i]])
        return marked(tokenizer, batch["input_ids"][0], batch["labels"][0])

    show_data(run_args, rows["train"]["length"], seen, script_args.max_length)

    # Model
    model, new = load_model(source, script_args.from_scratch, args.seed)
    if run_args.dry_run:
        return print_plan(model, args, run_args, **facts)
    counts, digest = count_tokens(rows["train"], model.config.vocab_size)
    counts[tokenizer.all_special_ids] = 0
    start_head(model, new, frequency_log_probs(counts))
    if script_args.dropout is not None:
        set_dropout(model, script_args.dropout)

    # Train
    masking = {"probability": script_args.mlm_probability, "whole words": script_args.whole_word_mask}
    weights = {"from scratch": script_args.from_scratch, "dropout": script_args.dropout}
    identity = run_identity(args, run_args, rows=digest, masking=masking, weights=weights)
    checkpoint = begin(args, run_args, {**facts, "cleaning": cleaning}, identity)
    stopper = StopOnSignal()
    trainer = MaskedTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=rows["train"],
        eval_dataset=fix_masks(rows["validation"], tokenizer, args.seed),
        processing_class=tokenizer,
        callbacks=[NewMasks(collator), CompleteCheckpoints(identity), stopper],
    )
    train(trainer, checkpoint)
    stopper.exit_if_stopped()

    # Evaluate
    test = fix_masks(rows["test"], tokenizer, args.seed)
    trained_rows = score_documents(trainer.model, test, tokenizer, args, "test, trained model")
    asked = sample_prompts(splits["test"]["text"], tokenizer, args.seed)
    prompts = [prompt for prompt, _ in asked]
    after = fill_mask(trainer.model, tokenizer, prompts, args.device)
    base = beside(trainer, load_model(source, script_args.from_scratch, args.seed)[0])
    base_rows = score_documents(base, test, tokenizer, args, "test, untrained model")
    before = fill_mask(base, tokenizer, prompts, args.device)
    baseline = score_most_frequent(counts, test)
    helped = compare.did_it_help(base_rows, trained_rows, baselines={"most frequent token": baseline})
    metrics = {
        **compute_metrics(trained_rows, "test"),
        **compute_metrics(base_rows, "base"),
        **compute_metrics(baseline, "baseline"),
        **helped,
        "test_rows": len(base_rows["nll"]),
    }

    # Export
    samples = [
        {"prompt": prompt, "base": b, "trained": t, "reference": word}
        for (prompt, word), b, t in zip(asked, before, after, strict=True)
    ]
    if script_args.from_scratch:
        run_args.model_name_or_path = None  # the card names no base
    folder = args.hub_model_id or f"outputs/{Path(args.output_dir).name}"
    finish(
        trainer,
        args,
        run_args,
        metrics=metrics,
        samples=samples,
        test_rows=splits["test"].select_columns("text"),
        preflight=facts,
        line=helped["line"],
        training={
            "masking": f"{script_args.mlm_probability:.0%} of the {'words' if script_args.whole_word_mask else 'tokens'}"
        }
        | {"head": "new" if new else "of the base model", "data": cleaning},
        pipeline="fill-mask",
        usage=f'from transformers import pipeline\n\nfill = pipeline("fill-mask", model="{folder}")\n'
        f'print(fill("The capital of France is {tokenizer.mask_token}."))',
        limits="It fills in words as its data would; what it says need not be true. Perplexity and accuracy are over masked "
        "tokens on fixed masks, and cannot be compared between tokenizers.",
    )


if __name__ == "__main__":
    run(main, ScriptArguments, "transformers.training_args:TrainingArguments")
