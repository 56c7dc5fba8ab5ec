"""Fine-tunes T5 or BART to summarize and shows whether it got better than the first sentences of the document.

    accelerate launch tasks/summarize_t5/train.py
    accelerate launch tasks/summarize_t5/train.py --config tasks/summarize_t5/configs/t4.yaml
    accelerate launch --config_file accelerate/multi_gpu.yaml --num_processes 8 tasks/summarize_t5/train.py --dataset ./mine.csv

The first command runs configs/laptop.yaml: two CPU cores, no account, no model hub, and so a BART made of a small encoder.
`--model_name_or_path google-t5/t5-small` starts from a pretrained summarizer. `--dry_run` shows the plan first.
"""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from shared.training.finish import finish
from shared.training.launch import begin, log, run, setup

# Torch is imported inside the functions: a misspelt key or --help is answered before it.

NO_SUMMARIZER = (
    "This model is no summarizer: it was trained from scratch for minutes to show and test the whole path. Start from a "
    "pretrained model, such as --model_name_or_path google-t5/t5-small, to get one."
)


@dataclass
class ScriptArguments:
    """Fine-tune T5 or BART on documents with summaries; evaluated by ROUGE and BLEU against lead sentences."""

    REFUSED = {
        "sortish_sampler": "transformers does not read it; --train_sampling_strategy group_by_length sorts",
        "generation_max_length": "--max_target_length says how long summaries may be",
        "generation_config": "how summaries are written lies in the model's own generation_config.json",
    }

    max_source_length: int = field(default=512, metadata={"help": "Tokens of a document that the model reads at once."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a summary, learnt and generated."})
    long_documents: Literal["cut", "chunk"] = field(
        default="cut",
        metadata={
            "help": "What is done when summarizing a document longer than max_source_length: cut it, or summarize it in pieces "
            "(chunk) and join their summaries. Training always cuts."
        },
    )
    max_validation_rows: int = field(default=200, metadata={"help": "Rows of the validation split in each evaluation."})
    scratch_width: int = field(
        default=256,
        metadata={
            "help": "Width of the T5 that is built where no model is named, a multiple of 64; layers grow with it."
        },
    )
    scratch_vocab_size: int = field(
        default=4096, metadata={"help": "Tokens of the tokenizer that is trained where no model is named."}
    )


def load_rows(run_args, seed: int) -> tuple[dict, str]:
    """Documents with summaries of the three splits, and the cleaning report as one line."""
    from articles import find_columns, text_of, to_pair

    from shared.data.cleaning import clean_dataset
    from shared.data.columns import log_columns
    from shared.data.load import load_splits
    from shared.data.splits import split_dataset

    data = load_splits(run_args)
    first = next(iter(data.values()))
    document, summary = find_columns(run_args.dataset, first.column_names, run_args.columns, next(iter(first), None))
    log_columns(run_args.dataset, {"document": document, "summary": summary}, first.column_names)
    data = {name: rows.select_columns([document, summary]) for name, rows in data.items()}
    convert = partial(to_pair, document=document, summary=summary)
    cleaned, report = clean_dataset(data, convert, run_args.dataset, most=run_args.max_bad_rows)
    return split_dataset(cleaned, text_of, seed), str(report)


def compute_metrics(outputs: list[str], documents: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    """ROUGE and BLEU in points with 95 % bootstrap intervals over rows; how long, new and often empty the summaries are.

    Returns:
        Metrics by name, and the ROUGE scores of each row.
    """
    from articles import novel_bigrams

    from shared import metrics
    from shared.data.cleaning import count_words

    found = metrics.load("rouge").compute(predictions=outputs, references=references, per_row=True)
    rows = found.pop("rows")
    bleu = metrics.load("bleu").compute(predictions=outputs, references=references)
    found |= {"bleu": bleu["bleu"], "bleu_ci95": bleu["bleu_ci95"], "bleu_signature": bleu["signature"]}
    new, bigrams = map(sum, zip(*map(novel_bigrams, outputs, documents), strict=True))
    found["summary_words"] = sum(map(count_words, outputs)) / len(outputs)
    found["novel_bigrams"] = new / bigrams if bigrams else None
    found["empty_outputs"] = sum(not text.strip() for text in outputs) / len(outputs)
    return found, rows


def main(script_args, args, run_args) -> None:
    """The whole task, from data to card."""
    # Setup
    from articles import allow_such_summaries, lead, preflight, show, tokenize
    from seq2seq_models import (
        SummaryTrainer,
        load_model,
        load_tokenizer,
        prefix_of,
        score_summaries,
        summarize,
        token_loss,
        usage,
        written_scores,
    )
    from transformers import DataCollatorForSeq2Seq
    from transformers.trainer_utils import set_seed

    from shared import metrics as shared_metrics
    from shared.data.splits import first_rows
    from shared.publish import compare
    from shared.publish.hub import pull
    from shared.training.checkpoints import CompleteCheckpoints, train
    from shared.training.identity import run_identity
    from shared.training.plan import print_plan
    from shared.training.processes import once_a_machine
    from shared.training.sharding import beside
    from shared.training.show_data import show_data
    from shared.training.signals import StopOnSignal

    setup(args, run_args)
    source = pull(run_args.model_name_or_path) if run_args.model_name_or_path else None
    if source is None:
        log.warning("%s", NO_SUMMARIZER)

    # Data
    splits, cleaning = once_a_machine(lambda: load_rows(run_args, args.seed))
    limits = {"train": run_args.max_train_rows, "validation": script_args.max_validation_rows}
    limits["test"] = run_args.max_test_rows
    for name, most in limits.items():
        splits[name] = first_rows(splits[name], most)
    texts = (text for row in splits["train"] for text in (row["document"], row["summaries"][0]))
    tokenizer = load_tokenizer(source, texts, script_args.scratch_vocab_size)

    # Model
    model = load_model(source, tokenizer, script_args, args)
    lengths = {"max_source": script_args.max_source_length, "max_target": script_args.max_target_length}
    encode = partial(tokenize, tokenizer=tokenizer, prefix=prefix_of(model), **lengths)
    tokenized = {
        name: rows.map(encode, batched=True, remove_columns=rows.column_names) for name, rows in splits.items()
    }
    allow_such_summaries(model.generation_config, list(tokenized["train"]["labels"]))
    facts = preflight(tokenized["train"], args)
    log.info("preflight: %s", ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in facts.items()))
    learnt = tokenized["train"]
    show_data(run_args, learnt["length"], lambda i: show(learnt[i], tokenizer), lengths["max_source"])
    if run_args.dry_run:
        facts |= {"longest_row": max(tokenized["train"]["length"]), "supervised_share": 1.0}
        longest_target = max(map(len, tokenized["train"]["labels"]))
        return print_plan(model, args, run_args, longest_target=longest_target, **facts)

    # Train
    digest = hashlib.sha256()
    for row in tokenized["train"]:
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    made = {} if source else {"scratch_width": str(script_args.scratch_width)}
    identity = run_identity(args, run_args, rows=digest.hexdigest(), **made)
    checkpoint = begin(args, run_args, {**facts, "cleaning": cleaning}, identity)
    stopper = StopOnSignal()
    collator = DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8 if args.fp16 else None)
    set_seed(args.seed)
    measure = partial(
        written_scores, tokenizer=tokenizer, rows=splits["validation"], script_args=script_args, args=args
    )
    trainer = SummaryTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
        compute_loss_func=partial(token_loss, label_smoothing=args.label_smoothing_factor),
        callbacks=[CompleteCheckpoints(identity), stopper],
        more_measures=measure if args.predict_with_generate else None,
    )
    train(trainer, checkpoint)
    stopper.exit_if_stopped()

    # Evaluate
    documents, references = list(splits["test"]["document"]), list(splits["test"]["summaries"])
    base = beside(trainer, load_model(source, tokenizer, script_args, args))
    base.generation_config = model.generation_config
    outputs, losses = {}, {}
    for name, system in (("base", base), ("test", trainer.accelerator.unwrap_model(trainer.model))):
        losses[name] = score_summaries(system, tokenized["test"], collator, args)
        outputs[name] = summarize(system, tokenizer, documents, script_args, args, f"summaries, {name}")
    outputs |= {f"baseline_lead{n}": [lead(document, n) for document in documents] for n in (1, 3)}
    outputs["reference"] = [summaries[0] for summaries in references]
    metrics, rouge = {"test_rows": len(documents)}, {}
    for name, texts in outputs.items():
        found, rouge[name] = compute_metrics(texts, documents, references)
        # The ROUGE of the references with themselves says nothing
        keep = ("summary_words", "novel_bigrams") if name == "reference" else found
        metrics |= {f"{name}_{key}": found[key] for key in keep}
    for name, scores in losses.items():
        tokens = list(map(int, scores["tokens"]))
        perplexity = shared_metrics.load("perplexity").compute(predictions=scores["nll"], references=tokens)
        metrics |= {f"{name}_{key}": value for key, value in perplexity.items()}
    metrics["test_tokens"] = sum(map(int, losses["test"]["tokens"]))
    baselines = {f"Lead-{n}": rouge[f"baseline_lead{n}"] for n in (1, 3)}
    helped = compare.did_it_help(rouge["base"], rouge["test"], "rougeL", baselines)
    line = helped["line"] + (f" {NO_SUMMARIZER}" if source is None else "")

    # Export
    samples = [
        {"prompt": document, "base": before, "trained": after, "reference": summaries[0]}
        for document, before, after, summaries in zip(
            documents[:20], outputs["base"], outputs["test"], references, strict=False
        )
    ]
    decoding = f"{model.generation_config.num_beams} beams" if model.generation_config.num_beams > 1 else "greedy"
    finish(
        trainer,
        args,
        run_args,
        metrics={**metrics, **helped},
        samples=samples,
        test_rows=splits["test"].select_columns(["document", "summaries"]),
        preflight=facts,
        line=line,
        training={
            "data": cleaning,
            "summaries": f"{decoding}, documents longer than {script_args.max_source_length} tokens: "
            f"{script_args.long_documents}",
            "references": f"{metrics['reference_summary_words']:.1f} words, "
            f"{100 * (metrics['reference_novel_bigrams'] or 0):.0f} % novel bigrams",
        },
        pipeline="summarization",
        usage=usage(
            args.hub_model_id or f"outputs/{Path(args.output_dir).name}",
            prefix_of(model),
            script_args.max_source_length,
        ),
        limits=("" if source else f"{NO_SUMMARIZER} ")
        + "Summaries can leave out what matters and state what the document does not say. ROUGE counts words shared with a "
        "reference, not truth.",
    )


if __name__ == "__main__":
    run(main, ScriptArguments, "transformers.training_args_seq2seq:Seq2SeqTrainingArguments")
