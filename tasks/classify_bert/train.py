"""Fine-tunes an encoder (BERT) to sort texts into classes, on any file with a text and a label.

    accelerate launch tasks/classify_bert/train.py
    accelerate launch tasks/classify_bert/train.py --dataset ./reviews.csv --columns text=review label=stars
    accelerate launch --config_file accelerate/multi_gpu.yaml --num_processes 8 tasks/classify_bert/train.py

The first command runs configs/laptop.yaml: two CPU cores, no account, no model hub. `--dry_run` shows the plan first.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shared import UserError
from shared.training.finish import finish
from shared.training.launch import begin, log, run, setup

# Torch is imported inside the functions: a misspelt key or --help is answered before it.


@dataclass
class ScriptArguments:
    """Fine-tune an encoder to sort texts into classes: accuracy and macro-F1 beside a linear classifier on it as it was."""

    BELONGS_TO = {"label_until": "dataset", "min_label_rows": "dataset"}

    max_length: int = field(default=128, metadata={"help": "Tokens of a text; what is longer is cut."})
    label_until: str | None = field(
        default=None,
        metadata={"help": "The label ends before this text: with `/`, a column that holds `torch/nn` gives `torch`."},
    )
    min_label_rows: int = field(
        default=10,
        metadata={"help": "Rows of labels that fewer training rows have are left out: they cannot be learned."},
    )
    max_validation_rows: int = field(default=200, metadata={"help": "Rows of the validation split in each evaluation."})


def load_rows(script_args, run_args, seed: int) -> tuple[dict, list[str], str]:
    """The three splits with `text` and `label` (number of the class), the names of the classes, the cleaning report."""
    from datasets import DatasetDict
    from labelled_texts import hides_labels, likely_one, named, number_labels, refuse_measures, to_row

    from shared.data.cleaning import clean_dataset
    from shared.data.columns import find_columns
    from shared.data.load import load_splits
    from shared.data.splits import first_rows, split_dataset

    data = load_splits(run_args)
    first = next(iter(data.values()))
    places = find_columns(run_args.dataset, first.column_names, run_args.columns, ("text", "label"))
    hidden = hides_labels({split: rows[places["label"]] for split, rows in data.items()})
    convert = partial(to_row, places=places, until=script_args.label_until, hidden=hidden)
    rows = named(data, places["label"])
    cleaned, report = clean_dataset(rows, convert, run_args.dataset, most=run_args.max_bad_rows)
    # The Hub's test splits are often without labels
    labelled = DatasetDict({split: rows for split, rows in cleaned.items() if len(rows)})
    splits = split_dataset(labelled, lambda row: row["text"], seed)
    splits["train"] = first_rows(splits["train"], run_args.max_train_rows)
    counts = Counter(splits["train"]["label"])
    refuse_measures(run_args.dataset, list(counts))
    classes = sorted(label for label, count in counts.items() if count >= script_args.min_label_rows)
    if len(classes) < 2:
        raise UserError(
            f"{run_args.dataset}: {len(counts):,} labels, {len(classes)} of them with {script_args.min_label_rows} training rows "
            "or more; at least two are needed. Is --columns label=... the right column? Lower --min_label_rows?"
        )
    splits, left_out = number_labels(splits, classes, run_args.dataset)
    rare = len(counts) - len(classes)
    found = f"{len(classes)} labels, {rare} rarer ones left out with {left_out.pop('train'):,} training rows"
    for split, lost in left_out.items():
        if lost:
            found += f"; {split}: {lost:,} of {lost + len(splits[split]):,} rows have labels that are not learnt"
            found += "; accuracy is of the others"
    found = "; ".join(filter(None, (found, likely_one(counts))))
    log.info("%s: %s", run_args.dataset, found)
    log.info("training rows by label: %s", ", ".join(f"{label} {count:,}" for label, count in counts.most_common(20)))
    return splits, classes, f"{report}; {found}"


def compute_metrics(predicted, labels, prefix: str) -> dict:
    """Accuracy and macro-F1 of (rows,) predicted classes, with 95 % bootstrap intervals over rows."""
    import numpy as np

    from shared.metrics import bootstrap_ratio, ci95, macro_f1, resampled_counts

    hits = (np.asarray(predicted) == np.asarray(labels)).astype(float)
    draws = [macro_f1(predicted, labels, counts) for counts in resampled_counts(len(hits))]
    return {
        f"{prefix}_accuracy": float(hits.mean()),
        f"{prefix}_accuracy_ci95": ci95(bootstrap_ratio(hits)),
        f"{prefix}_macro_f1": macro_f1(predicted, labels),
        f"{prefix}_macro_f1_ci95": ci95(draws),
    }


def main(script_args, args, run_args) -> None:
    """The whole task, from texts to card."""
    # Setup
    import numpy as np
    from labelled_texts import spelled_tokens
    from linear_probe import CheckedTrainer, fit_linear, load_model, predict_linear, start_head
    from transformers import AutoModel, DataCollatorWithPadding, set_seed

    from shared.data.splits import first_rows
    from shared.inference.positions import check_length
    from shared.metrics import macro_f1
    from shared.publish import compare
    from shared.publish.hub import pull
    from shared.publish.vocabulary import load_tokenizer
    from shared.training.checkpoints import CompleteCheckpoints, train
    from shared.training.identity import run_identity
    from shared.training.out_of_memory import evaluate_within_memory
    from shared.training.plan import print_plan
    from shared.training.processes import once_a_machine
    from shared.training.show_data import show_data
    from shared.training.signals import StopOnSignal

    setup(args, run_args)

    # Data
    source = pull(run_args.model_name_or_path)
    tokenizer = load_tokenizer(source)
    check_length(script_args.max_length, source, tokenizer)
    splits, classes, cleaning = once_a_machine(lambda: load_rows(script_args, run_args, args.seed))
    if spelled := spelled_tokens(splits["train"]["text"], tokenizer):
        log.warning(
            "texts spell control tokens (%s), which deploy/ reads as plain characters: write them otherwise", spelled
        )
    limits = {"train": None, "validation": script_args.max_validation_rows, "test": run_args.max_test_rows}

    def tokenize(batch):
        most = script_args.max_length
        ids, more = (tokenizer(batch["text"], truncation=True, max_length=n)["input_ids"] for n in (most, most + 1))
        cut = [len(a) < len(b) for a, b in zip(ids, more, strict=True)]
        return {"input_ids": ids, "length": list(map(len, ids)), "truncated": cut}

    rows = {}
    for name, most in limits.items():
        chosen = first_rows(splits[name], most)
        rows[name] = chosen.map(tokenize, batched=True, remove_columns=["text"], load_from_cache_file=False)
    labels, counts = rows["test"]["label"], Counter(rows["train"]["label"])
    majority = counts.most_common(1)[0][0]
    lengths = rows["train"]["length"]
    facts = {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "longest_row": max(lengths),
        "truncated_share": round(sum(rows["train"]["truncated"]) / len(lengths), 4),
        "labels": len(classes),
        "largest_label": f"{classes[majority]}, {counts[majority] / len(lengths):.1%}",
        "smallest_label": f"{classes[counts.most_common()[-1][0]]}, {counts.most_common()[-1][1]} rows",
    }
    log.info("preflight: %s", ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items()))

    def seen(i):
        return f"{tokenizer.decode(rows['train'][i]['input_ids'])}\n-> [[{classes[rows['train'][i]['label']]}]]"

    show_data(run_args, lengths, seen, script_args.max_length)

    # Model
    set_seed(args.seed)  # the new head
    model, new_head = load_model(source, tokenizer, classes)
    if run_args.dry_run:
        return print_plan(model, args, run_args, supervised_share=0.0, **facts)

    # Train
    identity = run_identity(
        args, run_args, rows=[list(rows["train"][name]) for name in ("input_ids", "label")], labels=classes
    )
    checkpoint = begin(args, run_args, {**facts, "cleaning": cleaning}, identity)
    stopper, collator = StopOnSignal(), DataCollatorWithPadding(tokenizer)
    if checkpoint is None and new_head:
        start_head(model.to(args.device), rows["train"], collator, args.per_device_eval_batch_size)
    trainer = CheckedTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean()),
            "macro_f1": macro_f1(found.predictions.argmax(-1), found.label_ids),
        },
        callbacks=[CompleteCheckpoints(identity), stopper],
    )
    train(trainer, checkpoint)
    stopper.exit_if_stopped()

    # Evaluate
    predicted = evaluate_within_memory(args, lambda: trainer.predict(rows["test"])).predictions.argmax(-1)
    encoder = AutoModel.from_pretrained(source, dtype="float32", trust_remote_code=False).to(args.device).eval()
    weights = fit_linear(encoder, rows["train"], collator, len(classes), args.per_device_eval_batch_size)
    probed = predict_linear(encoder, weights, rows["test"], collator, args.per_device_eval_batch_size)
    scored = {
        name: {"correct": (np.asarray(found) == labels).astype(float), "tokens": np.ones(len(labels))}
        for name, found in (("test", predicted), ("base", probed), ("baseline", np.full(len(labels), majority)))
    }
    baselines = {"most frequent label": scored["baseline"]}
    helped = compare.did_it_help(scored["base"], scored["test"], "accuracy", baselines, before="linear classifier")
    metrics = {
        **compute_metrics(predicted, labels, "test"),
        **compute_metrics(probed, labels, "base"),
        **compute_metrics(np.full(len(labels), majority), labels, "baseline"),
        **helped,
        "test_rows": len(labels),
        "data": cleaning,
    }

    # Export
    samples = [
        {"prompt": text, "base": classes[b], "trained": classes[t], "reference": classes[r]}
        for text, b, t, r in zip(splits["test"]["text"][:20], probed, predicted, labels, strict=False)
    ]
    folder = args.hub_model_id or f"outputs/{Path(args.output_dir).name}"
    finish(
        trainer,
        args,
        run_args,
        metrics=metrics,
        samples=samples,
        preflight=facts,
        test_rows=({"text": row["text"], "label": classes[row["label"]]} for row in splits["test"]),
        line=helped["line"],
        training={"labels": ", ".join(classes[:30]), "data": cleaning},
        pipeline="text-classification",
        usage=f'from transformers import pipeline\n\nclassify = pipeline("text-classification", model="{folder}")\n'
        'print(classify("A text to sort."))',
        limits="It always answers with one of its labels, also for a text that belongs to none. Before training: a linear "
        "classifier (ridge regression) on the mean token vectors of the same encoder, frozen, on the same rows.",
    )


if __name__ == "__main__":
    run(main, ScriptArguments, "transformers.training_args:TrainingArguments")
