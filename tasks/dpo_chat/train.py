"""Trains a chat model on preferences (DPO) and shows whether it prefers what people chose.

    accelerate launch tasks/dpo_chat/train.py
    accelerate launch tasks/dpo_chat/train.py --model_name_or_path outputs/chat_sft
    accelerate launch tasks/dpo_chat/train.py --dataset ./my_pairs.jsonl --columns prompt=question chosen=good rejected=bad

The first command runs configs/laptop.yaml: two CPU cores, no account, no model hub. `--dry_run` shows the plan first.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.training.finish import finish
from shared.training.launch import begin, log, run, setup

# Torch is imported inside the functions: a misspelt key or --help is answered before it.


@dataclass
class ScriptArguments:
    """Train a chat model on preferences: a prompt, the reply that was chosen, the one that was rejected."""

    BELONGS_TO = {"rejected": "dataset"}
    REFUSED = {
        "label_smoothing_factor": "the loss of this task has none",
        "neftune_noise_alpha": "the reference would get noise, too, and another one",
    }

    method: Literal["lora", "qlora"] = field(
        default="lora",
        metadata={
            "help": "What is trained: a LoRA adapter, or one on a 4-bit base (qlora). An adapter that the model has goes on."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of a new adapter: more learns more and takes more memory."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA updates are scaled by lora_alpha / lora_r."})
    rejected: Literal["column", "loop"] = field(
        default="column",
        metadata={
            "help": "Where rejected replies come from: their column, or, where rows are conversations, a rule: the reply's first "
            "words, repeated (loop)."
        },
    )
    max_validation_rows: int = field(default=200, metadata={"help": "Rows of the validation split in each evaluation."})


def load_rows(run_args, seed: int, rejected: str = "column", encoder=None) -> tuple[dict, str]:
    """Pairs of the three splits, as the template of `encoder` can show them, and the cleaning report as one line."""
    from preferences import Reader, read_splits, text_of

    from shared.data.cleaning import clean_dataset
    from shared.data.load import load_splits
    from shared.data.splits import split_dataset

    data = load_splits(run_args, read_splits)
    first = next(iter(data.values()))
    read = Reader(run_args.dataset, first[0], first.column_names, run_args.columns, rejected)
    log.info("%s is read as %s", run_args.dataset, read.form)

    def convert(row):
        found = read(row)
        return found if isinstance(found, str) or encoder is None else encoder.fit(found)

    cleaned, report = clean_dataset(data, convert, run_args.dataset, most=run_args.max_bad_rows)
    return split_dataset(cleaned, text_of, seed), str(report)


def compute_metrics(scores: dict, before: dict, beta: float, prefix: str) -> dict:
    """Accuracy of preferences, margins and perplexity of the chosen replies, each with a 95 % bootstrap interval over rows.

    Args:
        scores, before: of `pairs.score_pairs`, of this model and of the model before training.
        beta: DPO's; a reward is beta times the difference in log-probability to the model before.
    """
    from pairs import margins, preferred

    from shared import metrics

    perplexity = metrics.load("perplexity").compute(
        predictions=[-logp for logp in scores["chosen"]], references=[int(n) for n in scores["chosen_tokens"]]
    )
    sides = ("chosen", "rejected")
    rewards = [[beta * (new - old) for new, old in zip(scores[s], before[s], strict=True)] for s in sides]
    means = {"accuracy": preferred(scores), "margin": margins(scores)}
    means["reward_margin"] = [chosen - rejected for chosen, rejected in zip(*rewards, strict=True)]
    return {f"{prefix}_{name}": value for name, value in (metrics.means(means) | perplexity).items()}


def verdict_line(metrics: dict) -> str:
    """What stands behind the verdict on margins: other measures, before -> after."""
    from shared.publish.compare import short_number

    shares = {"accuracy": "Chosen reply preferred", "replies_that_end": "replies that end"}
    shares |= {"replies_that_loop": "that loop", "greedy_replies_that_loop": "greedy ones that loop"}
    both = {name: [metrics[f"{p}_{name}"] for p in ("base", "test")] for name in shares if f"test_{name}" in metrics}
    said = {name: f"{shares[name]} {before:.0%} -> {after:.0%}" for name, (before, after) in both.items()}
    low, high = (f"{end * 100:+.1f}" for end in metrics["accuracy_difference_ci95"])
    said["accuracy"] += f" ({low} to {high} points)"
    before, after = (short_number(metrics[f"{prefix}_perplexity"]) for prefix in ("base", "test"))
    return f"{', '.join(said.values())}. Perplexity of the chosen replies {before} -> {after}."


def main(script_args, args, run_args) -> None:
    """The whole task, from data to card."""
    # Setup
    from chat_model import base_of, check_options, load_model, load_tokenizer, serve_as, usage
    from datasets import Dataset
    from drawn_replies import sample, sample_rows
    from pairs import PairEncoder, PairTrainer, margins, preferred, preflight, reference, score_pairs, show
    from transformers.trainer_utils import set_seed
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from shared.data.splits import first_rows
    from shared.metrics import paired_difference
    from shared.publish import compare
    from shared.publish.hub import pull
    from shared.publish.vocabulary import check_vocabulary
    from shared.training.checkpoints import CompleteCheckpoints, train
    from shared.training.identity import run_identity
    from shared.training.plan import print_plan
    from shared.training.processes import once_a_machine
    from shared.training.show_data import show_data
    from shared.training.signals import StopOnSignal

    setup(args, run_args)
    check_options(script_args, args)

    # Data
    weights = not (run_args.dry_run or run_args.show_data)
    source = pull(run_args.model_name_or_path, weights=weights)
    base, adapter = base_of(source, script_args, args, run_args.resolved, weights)
    tokenizer = load_tokenizer(source, base)
    encoder = PairEncoder(tokenizer)
    splits, cleaning = once_a_machine(lambda: load_rows(run_args, args.seed, script_args.rejected, encoder))
    limits = {"train": run_args.max_train_rows, "validation": script_args.max_validation_rows}
    limits["test"] = run_args.max_test_rows
    tokenized = {}
    for name, most in limits.items():
        rows = [encoder.tokenize(row, args.max_length) for row in first_rows(splits[name], most)]
        facts = preflight(rows, args.max_length, name)
        if name == "train":
            checked = facts
        tokenized[name] = Dataset.from_list([row for row in rows if row["useful"]])
    log.info("preflight: %s", ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in checked.items()))
    learnt = tokenized["train"]
    show_data(run_args, learnt["length"], lambda i: show(learnt[i], tokenizer), args.max_length)

    # Model
    set_seed(args.seed)
    model = load_model(source, base, adapter, script_args, args, run_args.dry_run)
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    used = (max(ids) for rows in tokenized.values() for side in sides for ids in rows[side] if ids)
    check_vocabulary(model.config, tokenizer, base, needs=1 + max(tokenizer.pad_token_id, *used))
    served = serve_as(model, source, tokenizer, encoder.stop)
    if run_args.dry_run:
        in_4bit = script_args.method == "qlora"
        return print_plan(model, args, run_args, in_4bit=in_4bit, pairs=True, smaller="--method qlora", **checked)

    # Train
    lora = (adapter.r, adapter.lora_alpha) if adapter else (script_args.lora_r, script_args.lora_alpha)
    seen = {"rows": [list(learnt[name]) for name in sides]}
    seen["chat_template"] = tokenizer.chat_template
    identity = run_identity(args, run_args, **seen, method=script_args.method, adapter=lora)
    checkpoint = begin(args, run_args, {**checked, "cleaning": cleaning}, identity)
    stopper = StopOnSignal()
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    trainer = PairTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=learnt,
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
        callbacks=[CompleteCheckpoints(identity), stopper],
        new_adapter=adapter is None,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # trl casts QLoRA adapters to bf16, which a T4 and a CPU emulate
    train(trainer, checkpoint)
    stopper.exit_if_stopped()

    # Evaluate
    model, talks = trainer.model.eval(), sample_rows(splits["test"])
    after = score_pairs(model, tokenized["test"], collator, args, "test, trained model")
    replies, greedy, counted = sample(model, encoder.plain, talks, served, "test", args.seed)
    with reference(model):
        before = score_pairs(model, tokenized["test"], collator, args, "test, model before")
        base_replies, base_greedy, base_counted = sample(model, encoder.plain, talks, served, "base", args.seed)
    longer = [float(n > m) for n, m in zip(after["chosen_tokens"], after["rejected_tokens"], strict=True)]
    helped = compare.did_it_help({"margin": margins(before)}, {"margin": margins(after)}, metric="margin")
    change = paired_difference(preferred(before), preferred(after), higher_is_better=True)
    metrics = {
        **compute_metrics(after, before, args.beta, "test"),
        **compute_metrics(before, before, args.beta, "base"),
        "baseline_longer_reply_accuracy": sum(longer) / len(longer),
        **counted,
        **base_counted,
        **helped,
        **{f"accuracy_{name}": change[name] for name in ("difference", "difference_ci95")},
        "test_rows": len(longer),
        "test_tokens": int(sum(after["chosen_tokens"]) + sum(after["rejected_tokens"])),
    }
    line = " ".join([helped["line"], verdict_line(metrics)])

    # Export
    drawn = {"base": base_replies, "trained": replies, "base_greedy": base_greedy, "trained_greedy": greedy}
    samples = [
        {"prompt": row["prompt"][-1]["content"], "reference": row["chosen"], "messages": row["prompt"]}
        | {"rejected": row["rejected"], "temperature": served.temperature}
        | {name: texts[i] for name, texts in drawn.items()}
        for i, row in enumerate(talks)
    ]
    if args.should_save:
        served.save_pretrained(args.output_dir)  # an adapter is saved without it
    finish(
        trainer,
        args,
        run_args,
        metrics=metrics,
        samples=samples,
        test_rows=(
            {"messages": [*row["prompt"], {"role": "assistant", "content": row["chosen"]}]} for row in splits["test"]
        ),
        preflight=checked,
        line=line,
        training={
            "method": f"DPO, {script_args.method}, beta {args.beta}",
            "adapter": "goes on from the model's own" if adapter else "new",
            "rejected replies": "made to loop, by a rule" if script_args.rejected == "loop" else "of the data",
            "data": cleaning,
        },
        library="peft",
        pipeline="text-generation",
        usage=usage(args.hub_model_id or f"outputs/{Path(args.output_dir).name}"),
        limits="Replies can be wrong or offensive. Preferring the replies that were chosen over those that were rejected says "
        "nothing about others, and a model can prefer more and answer worse: read the samples.",
    )


if __name__ == "__main__":
    run(main, ScriptArguments, "trl.trainer.dpo_config:DPOConfig")
