"""Trains a model to mark the answer to a question in a text, and shows how often it is right.

    accelerate launch tasks/qa_squad/train.py
    accelerate launch tasks/qa_squad/train.py --config tasks/qa_squad/configs/t4.yaml
    accelerate launch tasks/qa_squad/train.py --dataset ./my_questions.csv --columns context=text answers=answer

The first command runs configs/laptop.yaml: two CPU cores, no account, no model hub. `--dry_run` shows the plan first.
"""

from dataclasses import dataclass, field
from pathlib import Path

from shared import UserError
from shared.training.finish import finish
from shared.training.launch import begin, log, run, setup

# What the best threshold would give on the test split itself; the one that is used is chosen on validation.
BEST = ("f1", "threshold", "exact_match", "exact_match_threshold")

# Torch is imported inside the functions: a misspelt key or --help is answered before it.


@dataclass
class ScriptArguments:
    """Extractive question answering: the answer is a span of the context, or there is none (SQuAD 1.1 and 2.0)."""

    REFUSED = {"label_smoothing_factor": "the loss of this task has none"}

    max_length: int = field(default=384, metadata={"help": "Most tokens of a window, question and context together."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens of the context that neighbouring windows share."})
    max_answer_length: int = field(default=30, metadata={"help": "Most tokens of an answer that is given."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout on hidden states; inside attention there is none."})
    max_validation_rows: int = field(
        default=1000,
        metadata={"help": "Rows of the validation split in each evaluation, and for the no-answer threshold."},
    )


def load_rows(run_args, seed: int) -> tuple[dict, str]:
    """Questions of the three splits, and the cleaning report as one line."""
    from datasets import DatasetDict, Features, List, Value
    from squad_features import NEEDED, OPTIONAL, groups, read, to_question, without_secret

    from shared.data.cleaning import clean_dataset
    from shared.data.columns import find_columns
    from shared.data.load import load_splits
    from shared.data.splits import split_dataset

    data = load_splits(run_args, read)
    names = next(iter(data.values())).column_names
    places = find_columns(run_args.dataset, names, run_args.columns, NEEDED, OPTIONAL)
    text = Value("string")
    columns = dict.fromkeys(("id", "title", "context", "question"), text)
    features = Features(columns | {"answers": {"text": List(text), "answer_start": List(Value("int64"))}})
    most = run_args.max_bad_rows
    cleaned, report = clean_dataset(data, lambda row: to_question(row, places), run_args.dataset, features, most)
    cleaned = without_secret(cleaned)

    def split(by_title: bool):
        grouped = {name: rows.add_column("group", groups(rows, by_title)) for name, rows in cleaned.items()}
        return split_dataset(DatasetDict(grouped), lambda row: row["group"], seed, read=lambda row: row["context"])

    try:
        splits = split(by_title=True)
    except UserError as error:
        if len(set(cleaned["train"]["title"])) == 1 and not cleaned["train"]["title"][0]:
            raise
        log.warning("too few articles for three splits (%s): split by context", str(error).splitlines()[0])
        splits = split(by_title=False)
    splits = {name: rows.remove_columns("group").shuffle(seed) for name, rows in splits.items()}
    for name, rows in splits.items():
        none = sum(not answers["text"] for answers in rows["answers"])
        log.info("%s: %s questions with and %s without an answer", name, f"{len(rows) - none:,}", f"{none:,}")
    return splits, str(report)


def compute_metrics(rows, answers: list[str], prefix: str, **no_answer) -> tuple[dict, dict]:
    """Exact match and F1 in points with intervals, for SQuAD 2.0 also of the rows with and without an answer.

    Args:
        answers: (rows,) answers; "" says that there is none.
        no_answer: `no_answer_scores` and `threshold` of shared/metrics/squad.

    Returns:
        The metrics, each named `<prefix>_<metric>`, and the scores of each row.
    """
    from shared import metrics

    golds = [answers["text"] for answers in rows["answers"]]
    found = metrics.load("squad").compute(predictions=answers, references=golds, per_row=True, **no_answer)
    scores = found.pop("rows")
    return {f"{prefix}_{name}": value for name, value in found.items()}, scores


def main(script_args, args, run_args) -> None:
    """The whole task, from data to card."""
    # Setup
    import hashlib

    import reader
    import squad_features as features
    from transformers.trainer_utils import set_seed

    from shared.data.splits import first_rows
    from shared.inference.positions import check_length
    from shared.inference.qa_windows import decode, make_windows, strip_blanks
    from shared.publish import compare
    from shared.publish.hub import pull
    from shared.publish.vocabulary import load_tokenizer
    from shared.training.checkpoints import CompleteCheckpoints, train
    from shared.training.identity import run_identity
    from shared.training.plan import print_plan
    from shared.training.processes import once_a_machine
    from shared.training.sharding import beside
    from shared.training.show_data import show_data
    from shared.training.signals import StopOnSignal

    setup(args, run_args)

    # Data
    source = pull(run_args.model_name_or_path)
    tokenizer = load_tokenizer(source)
    check_length(script_args.max_length, source, tokenizer)
    splits, cleaning = once_a_machine(lambda: load_rows(run_args, args.seed))
    limits = {"train": run_args.max_train_rows, "validation": script_args.max_validation_rows}
    limits["test"] = run_args.max_test_rows
    rows, windows = {}, {}
    for name, most in limits.items():
        rows[name] = first_rows(splits[name], most)
        windows[name] = make_windows(rows[name], tokenizer, script_args.max_length, script_args.doc_stride)
    facts = features.preflight(rows["train"], windows["train"])
    mismatches = facts.pop("span_mismatches")
    log.info("preflight: %s", ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in facts.items()))
    for wrong in mismatches[:5]:
        log.info("%s: the answer %r is not whole tokens, learned is %r", wrong["id"], wrong["answer"], wrong["tokens"])

    learnt = windows["train"]
    show_data(run_args, learnt.lengths, lambda i: features.show(learnt[i], tokenizer), script_args.max_length)

    # Model
    set_seed(args.seed)
    model = reader.load_model(source, script_args.dropout, args.device)
    if run_args.dry_run:
        plan = {"rows": facts["windows"], "tokens": facts["tokens"], "longest_row": facts["longest_window"]}
        return print_plan(model, args, run_args, supervised_share=0.0, **plan)

    # Train
    digest = hashlib.sha256(windows["train"].ids.tobytes() + windows["train"].answer.tobytes()).hexdigest()
    identity = run_identity(args, run_args, rows=digest, dropout=script_args.dropout)
    checkpoint = begin(args, run_args, {**facts, "span_mismatches": mismatches, "cleaning": cleaning}, identity)
    stopper = StopOnSignal()
    collator = reader.WindowCollator(tokenizer, packed=reader.is_packed(model))

    def answer(model, name: str, title: str) -> tuple[dict, list[str], float]:
        """Best spans of a split with their scores, as text, and the mean loss of its windows."""
        scores = reader.score_windows(model, windows[name], collator, args, f"{name}, {title}")
        found = decode(windows[name], scores["start"], scores["end"], max_answer_length=script_args.max_answer_length)
        strip_blanks(found, rows[name]["context"])
        return found, features.spans_of(rows[name], found), float(scores["nll"].mean())

    def validate(model) -> dict:
        """Loss of the validation split; F1 and the threshold that gives it, where some questions have no answer."""
        found, texts, loss = answer(model, "validation", "evaluating")
        no_answer = {"no_answer_scores": found["no_answer"]} if facts["unanswerable_rows"] else {}
        metrics, _ = compute_metrics(rows["validation"], texts, "eval", **no_answer)
        return {
            "eval_loss": loss,
            "eval_f1": metrics.get("eval_best_f1", metrics["eval_f1"]),
            "eval_threshold": metrics.get("eval_best_threshold"),
        }

    trainer = reader.WindowTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=windows["train"],
        eval_dataset=windows["validation"],
        processing_class=tokenizer,
        callbacks=[CompleteCheckpoints(identity), stopper],
        validate=validate,
    )
    train(trainer, checkpoint)
    stopper.exit_if_stopped()

    # Evaluate
    model = trainer.model
    model.config.max_answer_length = script_args.max_answer_length  # what whoever serves the model needs to know
    model.config.window_length, model.config.window_stride = script_args.max_length, script_args.doc_stride
    model.config.no_answer_threshold = validate(model)["eval_threshold"]  # None: each question has an answer
    found, texts, loss = answer(model, "test", "trained model")
    no_answer = {}
    if facts["unanswerable_rows"]:
        no_answer = {"no_answer_scores": found["no_answer"], "threshold": model.config.no_answer_threshold}
    tested, trained_scores = compute_metrics(rows["test"], texts, "test", **no_answer)
    set_seed(args.seed)  # the same new head as before training
    base = beside(trainer, reader.load_model(source, script_args.dropout, args.device))
    _, base_texts, base_loss = answer(base, "test", "untrained model")
    base_metrics, base_scores = compute_metrics(rows["test"], base_texts, "base")
    guesses = {"position": features.most_frequent_place(rows["train"], rows["test"])}
    if no_answer:
        guesses["silent"] = [""] * len(rows["test"])
    baselines = {name: compute_metrics(rows["test"], texts, f"baseline_{name}") for name, texts in guesses.items()}
    helped = compare.did_it_help(
        base_scores, trained_scores, "f1", {name: scores for name, (_, scores) in baselines.items()}
    )
    whole = {f"baseline_{name}_{metric}" for name in guesses for metric in ("exact_match", "f1")}
    best = {f"best_{name}": tested.pop(f"test_best_{name}") for name in BEST if f"test_best_{name}" in tested}
    metrics = {
        **tested,
        **base_metrics,
        **{k: v for numbers, _ in baselines.values() for k, v in numbers.items() if k.removesuffix("_ci95") in whole},
        **best,
        **helped,
        "test_loss": loss,
        "base_loss": base_loss,
        "test_rows": len(rows["test"]),
    }

    # Export
    given = [
        "" if no_answer and score > no_answer["threshold"] else text
        for text, score in zip(texts, found["no_answer"], strict=True)
    ]
    samples = features.samples(rows["test"], found, base_texts, given)
    finish(
        trainer,
        args,
        run_args,
        metrics=metrics,
        samples=samples,
        test_rows=rows["test"],
        preflight=facts,
        line=helped["line"],
        training={"data": cleaning, "no_answer_threshold": no_answer.get("threshold", "none, all have an answer")},
        pipeline="question-answering",
        usage=reader.usage(args.hub_model_id or f"outputs/{Path(args.output_dir).name}", script_args.max_length),
        limits="It marks a place in the text it is given and knows nothing else; the place can be wrong. Whether a question "
        "has an answer at all is harder for it than where the answer stands.",
    )


if __name__ == "__main__":
    run(main, ScriptArguments, "transformers.training_args:TrainingArguments")
