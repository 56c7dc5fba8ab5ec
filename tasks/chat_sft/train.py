"""Fine-tunes a chat model on conversations and shows whether it got better.

    accelerate launch tasks/chat_sft/train.py
    accelerate launch tasks/chat_sft/train.py --dataset ./my_chats.jsonl --columns prompt=question completion=reply
    accelerate launch --config_file accelerate/multi_gpu.yaml --num_processes 8 tasks/chat_sft/train.py --method full

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
    """Fine-tune a chat model on conversations: only the assistant's words are trained, conversations never see each other."""

    BELONGS_TO = {"roles": "dataset"}
    REFUSED = {"label_smoothing_factor": "the loss of this task has none"}

    method: Literal["full", "lora", "qlora", "p_tuning"] = field(
        default="lora",
        metadata={
            "help": "What is trained: all weights (full), a LoRA adapter, a LoRA adapter on a 4-bit base (qlora), or virtual "
            "tokens in front of the prompt (p_tuning)."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices: more learns more and takes more."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA updates are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the inputs of the LoRA matrices."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Hold the frozen base in 4 bits (NF4) for p_tuning and lora; qlora always does."},
    )
    virtual_tokens: int = field(default=20, metadata={"help": "Number of virtual tokens that p_tuning puts in front."})
    max_validation_rows: int = field(default=200, metadata={"help": "Rows of the validation split in each evaluation."})
    mixture: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Data sets to train on beside the conversations: texts with summaries (as CNN/DailyMail) and questions about "
            'texts (as SQuAD), each tested by its own metric. A configuration follows the name: "abisee/cnn_dailymail 3.0.0".'
        },
    )
    mixture_weights: list[float] = field(
        default_factory=list, metadata={"help": "Shares of the training rows: of --dataset, then of each of --mixture."}
    )
    roles: list[str] = field(
        default_factory=list, metadata={"help": "Who is who where names do not tell: user=customer assistant=agent."}
    )
    save_merged: bool = field(default=False, metadata={"help": "Also write merged/, the adapter merged into its base."})


def load_rows(run_args, seed: int, chat=None, roles=()) -> tuple[dict, str]:
    """Conversations of the three splits, as the template of `chat` can show them, and the cleaning report as one line."""
    from formats import text_of
    from speakers import log_roles, open_talks

    from shared.data.cleaning import clean_dataset
    from shared.data.splits import split_dataset

    data, reader = open_talks(run_args, roles)

    def convert(row):
        found = reader(row)
        return found if isinstance(found, str) or chat is None else chat.fit(found)

    cleaned, report = clean_dataset(data, convert, run_args.dataset, most=run_args.max_bad_rows)
    log_roles(reader)
    return split_dataset(cleaned, text_of, seed), str(report)


def compute_metrics(rows: dict[str, list[float]], prefix: str) -> dict:
    """Loss, perplexity and token accuracy over all trained tokens of a split, with 95 % bootstrap intervals over rows."""
    from shared import metrics

    found = metrics.load("perplexity").compute(predictions=rows["nll"], references=list(map(int, rows["tokens"])))
    found["accuracy"] = sum(rows["correct"]) / sum(rows["tokens"])
    found["accuracy_ci95"] = metrics.ci95(metrics.bootstrap_ratio(rows["correct"], rows["tokens"]))
    return {f"{prefix}_{name}": value for name, value in found.items()}


def main(script_args, args, run_args) -> None:
    """The whole task, from data to card."""
    # Setup
    from contextlib import nullcontext

    import methods
    import mixture
    from chats import plain_messages, preflight, sample_talks, show
    from datasets import Dataset
    from methods import add_adapter, attention, check_method, load_chat, load_model, serve_as
    from packing import PackedSFTTrainer, RowCollator, prove, score_rows, unigram_scores
    from replies import in_words, sample
    from transformers.trainer_utils import set_seed

    from shared.data.splits import first_rows
    from shared.publish import compare
    from shared.publish.hub import pull
    from shared.training.checkpoints import CompleteCheckpoints, train
    from shared.training.identity import run_identity
    from shared.training.packed_attention import PACKED
    from shared.training.plan import print_plan
    from shared.training.processes import once_a_machine
    from shared.training.sharding import beside
    from shared.training.show_data import show_data
    from shared.training.signals import StopOnSignal

    setup(args, run_args)
    args.dataset_kwargs = {"skip_prepare_dataset": True}  # rows are tokenized here
    check_method(script_args, args, run_args.resolved)

    # Data
    source = pull(run_args.model_name_or_path, weights=not (run_args.dry_run or run_args.show_data))
    chat = load_chat(source, args)
    tokenizer = chat.tokenizer
    splits, cleaning = once_a_machine(lambda: load_rows(run_args, args.seed, chat, script_args.roles))
    limits = {"train": run_args.max_train_rows, "validation": script_args.max_validation_rows}
    limits["test"] = run_args.max_test_rows
    splits, asked = mixture.mix(splits, script_args, limits, tokenizer, args)
    tokenized = {}
    for name, most in limits.items():
        chosen = first_rows(splits[name], most)
        rows = [chat.tokenize(row, args.max_length) for row in chosen]
        if name == "train":
            facts = preflight(rows, chat.stop, args.max_length)
        useful = [{**row, "row": i} for i, row in enumerate(rows) if any(label != -100 for label in row["labels"][1:])]
        tokenized[name] = Dataset.from_list(useful)
    chat.log_notes(log)
    log.info("preflight: %s", ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in facts.items()))
    learnt, lengths = tokenized["train"], list(map(len, tokenized["train"]["input_ids"]))
    show_data(run_args, lengths, lambda i: show(learnt[i], tokenizer), args.max_length)

    # Model
    set_seed(args.seed)
    needs = 1 + max(max(ids) for rows in tokenized.values() for ids in rows["input_ids"])
    base = load_model(source, script_args.method, args, script_args.load_in_4bit, run_args.dry_run, needs)
    served = serve_as(base, tokenizer, chat.stop)
    model = add_adapter(base, script_args, args)
    if run_args.dry_run:
        return print_plan(model, args, run_args, in_4bit=script_args.load_in_4bit, smaller="--method qlora", **facts)

    # Train
    method = script_args.method
    lora = (script_args.lora_r, script_args.lora_alpha, script_args.lora_dropout, script_args.virtual_tokens)
    seen = {"rows": [list(tokenized["train"][name]) for name in ("input_ids", "labels")]}
    seen["chat_template"] = tokenizer.chat_template
    rounded = " in 4 bits" if script_args.load_in_4bit and method != "qlora" else ""
    identity = run_identity(args, run_args, **seen, method=method + rounded, adapter=lora)
    checkpoint = begin(args, run_args, {**facts, "cleaning": cleaning}, identity)
    stopper = StopOnSignal()
    implementation, padded = attention(source, method)
    collator = RowCollator(pad_token_id=tokenizer.pad_token_id, padding_free=implementation == PACKED)
    trainer = PackedSFTTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
        callbacks=[CompleteCheckpoints(identity), stopper],
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # trl casts QLoRA adapters to bf16, which a T4 and a CPU emulate
    padded = prove(model, tokenized["train"], collator, exact=not script_args.load_in_4bit) or padded
    log.info("conversations %s", f"are padded: {padded}" if padded else "share a row without seeing each other")
    train(trainer, checkpoint)
    stopper.exit_if_stopped()

    # Evaluate
    trained_rows = score_rows(trainer.model, tokenized["test"], collator, args, "test, trained model")
    talks = sample_talks(splits["test"])
    trainer.model.eval()
    after, after_greedy, counted = sample(trainer.model, chat, talks, served, "test", args.seed)
    trained_answers = mixture.answer(trainer.model, chat, asked, served, args, "trained model")
    adapted = method != "full"
    with trainer.model.disable_adapter() if adapted else nullcontext():
        base = (
            methods.base_of(trainer.model)
            if adapted
            else beside(trainer, load_model(source, "full", args, needs=needs))
        )
        base.eval().set_attn_implementation(model.config._attn_implementation)
        base_rows = score_rows(base, tokenized["test"], collator, args, "test, base model")
        before, before_greedy, base_counted = sample(base, chat, talks, served, "base", args.seed)
        base_answers = mixture.answer(base, chat, asked, served, args, "base model")
    unigram = unigram_scores(tokenized["train"]["labels"], tokenized["test"]["labels"], len(tokenizer))
    helped = compare.did_it_help(base_rows, trained_rows, baselines={"unigram": unigram})
    others = mixture.compare(asked, base_answers, trained_answers)
    metrics = {
        **compute_metrics(trained_rows, "test"),
        **compute_metrics(base_rows, "base"),
        **compute_metrics(unigram, "baseline"),
        **counted,
        **base_counted,
        **helped,
        **others["metrics"],
        "test_rows": len(base_rows["nll"]),
    }

    # Export
    drawn = {"base": before, "trained": after, "base_greedy": before_greedy, "trained_greedy": after_greedy}
    samples = [
        {"prompt": said[-2]["content"], "reference": said[-1]["content"], "messages": said[:-1]}
        | {"temperature": served.temperature, **{name: texts[i] for name, texts in drawn.items()}}
        for i, said in enumerate(talk["messages"] for talk in talks)
    ]
    if adapted and args.should_save:
        served.save_pretrained(args.output_dir)  # an adapter is saved without it
    if script_args.save_merged:
        methods.save_merged(
            trainer, load_model(source, "full", args), tokenizer, served
        )  # never 4-bit: it would round twice
    finish(
        trainer,
        args,
        run_args,
        metrics=metrics,
        samples=samples + others["samples"],
        test_rows=({"messages": plain_messages(row)} for row in splits["test"]["messages"]),
        preflight=facts,
        line=" ".join(filter(None, [helped["line"], in_words(counted, base_counted), *others["lines"]])),
        more_data=others["data"],
        training={"method": method, "data": cleaning, "rows": f"padded: {padded}" if padded else "packed"},
        library="peft" if adapted else "transformers",
        pipeline="text-generation",
        usage=methods.usage(
            args.hub_model_id or f"outputs/{Path(args.output_dir).name}", method, script_args.load_in_4bit
        ),
        limits="Replies can be wrong or offensive: the model is small and imitates its data. Perplexity says how well it "
        "predicts such conversations, not how useful its replies are.",
    )


if __name__ == "__main__":
    run(main, ScriptArguments, "trl.trainer.sft_config:SFTConfig")
