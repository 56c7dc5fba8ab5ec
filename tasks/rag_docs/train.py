"""Trains an encoder to find the passage that answers a question, and shows what it finds beside and together with BM25.

    accelerate launch tasks/rag_docs/train.py
    accelerate launch tasks/rag_docs/train.py --dataset ./xquad.json
    accelerate launch tasks/rag_docs/train.py --dataset ./my_questions.csv --columns context=text

The first command runs configs/laptop.yaml: two CPU cores, no account, no model hub. `--dry_run` shows the plan first.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from shared import UserError
from shared.training.finish import finish
from shared.training.launch import begin, log, run, setup

# Torch is imported inside the functions: a misspelt key or --help is answered before it.


@dataclass
class ScriptArguments:
    """Retrieval: an encoder finds passages by meaning, BM25 by words, and both together, as `python -m shared.retrieval` does."""

    REFUSED = {"label_smoothing_factor": "the loss of this task has none"}

    max_length: int = field(default=256, metadata={"help": "Tokens of a question or passage; what is longer is cut."})
    group_size: int = field(
        default=16, metadata={"help": "Pairs in a row: each question finds its passage among those of the others."}
    )
    hard_negatives: int = field(
        default=0, metadata={"help": "Wrong passages besides, for each pair: such as BM25 ranks high for its question."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Dropout on hidden states; inside attention there is none."})
    pooling: Literal["mean", "cls"] = field(
        default="mean", metadata={"help": "A text's vector: the mean of its tokens' vectors, or the first one (bge)."}
    )
    question_prompt: str = field(default="", metadata={"help": "Words before each question (e5: `query: `)."})
    passage_prompt: str = field(default="", metadata={"help": "Words before each passage (e5: `passage: `)."})
    max_documents: int = field(
        default=3000,
        metadata={"help": "Documents that are searched for the test split: its own, then others up to so many."},
    )
    max_validation_rows: int = field(default=320, metadata={"help": "Pairs of the validation split per evaluation."})


def load_rows(run_args, seed: int) -> tuple[dict, str]:
    """Questions of the three splits, no document on two sides, and the cleaning report as one line."""
    from datasets import DatasetDict, Features, Value
    from question_rows import NEEDED, OPTIONAL, groups, read, to_row

    from shared.data.cleaning import clean_dataset
    from shared.data.columns import find_columns
    from shared.data.load import load_splits
    from shared.data.splits import split_dataset

    data = load_splits(run_args, read)
    names = next(iter(data.values())).column_names
    places = find_columns(run_args.dataset, names, run_args.columns, NEEDED, OPTIONAL)
    columns = dict.fromkeys(("context", "question", "title", "answer"), Value("string"))
    features = Features(columns | {"answer_start": Value("int64")})
    most = run_args.max_bad_rows
    cleaned, report = clean_dataset(data, lambda row: to_row(row, places), run_args.dataset, features, most)
    cleaned = DatasetDict({name: rows for name, rows in cleaned.items() if len(rows)})

    def split(names):
        grouped = {name: rows.add_column("group", names(rows)) for name, rows in cleaned.items()}
        return split_dataset(DatasetDict(grouped), lambda row: row["group"], seed, read=lambda row: row["context"])

    try:
        splits = split(groups)
    except UserError as error:
        log.warning("too few packages or articles for three splits (%s): split by context", str(error).splitlines()[0])
        splits = split(lambda rows: list(rows["context"]))
    return {name: rows.remove_columns("group").shuffle(seed) for name, rows in splits.items()}, str(report)


def compute_metrics(rankings: list[list[int]], gold: list[tuple], prefix: str, **where) -> tuple[dict, dict]:
    """MRR and recalls at 1, 5 and 10 with 95 % intervals over questions, named `<prefix>_<metric>`; the scores of each row.

    Args:
        where: by name a list that says for each row whether it counts, for the same once more as `<prefix>_<name>_<metric>`.
    """
    from question_rows import score

    from shared.metrics import means

    rows = score(rankings, gold)
    found = {f"{prefix}_{name}": value for name, value in means(rows).items()}
    for part, counts in where.items():
        if any(counts):
            some = {name: [v for v, c in zip(values, counts, strict=True) if c] for name, values in rows.items()}
            found |= {f"{prefix}_{part}_{name}": value for name, value in means(some).items()}
    return found, rows


def main(script_args, args, run_args) -> None:
    """The whole task, from questions to card."""
    # Setup
    import numpy as np
    import question_rows
    import retriever
    from transformers import set_seed

    from shared.data.splits import first_rows
    from shared.inference.positions import check_length
    from shared.publish import compare
    from shared.publish.hub import pull
    from shared.publish.vocabulary import load_tokenizer
    from shared.retrieval.encoder import SETTINGS, save_settings, tokenize
    from shared.retrieval.index import DEPTH, Index, fuse, passage_text
    from shared.training.checkpoints import CompleteCheckpoints, train
    from shared.training.identity import run_identity
    from shared.training.plan import print_plan
    from shared.training.processes import once_a_machine
    from shared.training.sharding import beside
    from shared.training.show_data import show_data
    from shared.training.signals import StopOnSignal

    setup(args, run_args)
    if script_args.group_size < 2:
        raise UserError("--group_size: a group of one pair holds no wrong passage. Take 2 or more.")

    # Data
    source = pull(run_args.model_name_or_path)
    tokenizer = load_tokenizer(source)
    check_length(script_args.max_length, source, tokenizer)
    splits, cleaning = once_a_machine(lambda: load_rows(run_args, args.seed))
    settings = {name: getattr(script_args, name) for name in SETTINGS}

    def ids(texts, kind: str) -> list[list[int]]:
        return tokenize(tokenizer, list(texts), settings[f"{kind}_prompt"], script_args.max_length)

    group = partial(question_rows.group_rows, size=script_args.group_size, seed=args.seed, ids=ids)
    groups = {
        "train": group(splits["train"], run_args.max_train_rows, negatives=script_args.hard_negatives),
        "validation": group(splits["validation"], script_args.max_validation_rows),
    }
    pairs = question_rows.paired(groups["train"])
    lengths = [len(text) for texts in groups["train"]["input_ids"] for text in texts]
    facts = {
        "pairs": len(pairs),
        "groups": len(groups["train"]),
        "negatives": len(lengths) - 2 * len(pairs),
        "documents": len(set(sum(groups["train"]["document"], []))),
        "tokens": sum(lengths),
        "longest_text": max(lengths),
        "full_length_share": round(sum(length == script_args.max_length for length in lengths) / len(lengths), 4),
    }
    log.info("preflight: %s", ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in facts.items()))

    def seen(i: int) -> str:
        question, passage = tokenizer.batch_decode(pairs[i])
        return f"{question}\n-> [[{passage}]]"

    show_data(run_args, [len(q) + len(p) for q, p in pairs], seen, 2 * script_args.max_length)

    # Model
    set_seed(args.seed)
    model = retriever.load_model(source, script_args.dropout, settings, args.device)
    if run_args.dry_run:
        plan = {"rows": facts["groups"], "tokens": facts["tokens"], "longest_row": facts["longest_text"]}
        plan["texts"] = (2 + script_args.hard_negatives) * script_args.group_size
        return print_plan(model, args, run_args, supervised_share=0.0, **plan)

    # Train
    rows = groups["train"].to_list()
    identity = run_identity(args, run_args, rows=rows, dropout=script_args.dropout, settings=settings)
    checkpoint = begin(args, run_args, {**facts, "cleaning": cleaning}, identity)
    stopper = StopOnSignal()
    collator = retriever.GroupCollator(tokenizer, packed=model.config._attn_implementation == retriever.PACKED)
    trainer = retriever.RetrieverTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=groups["train"],
        eval_dataset=groups["validation"],
        processing_class=tokenizer,
        callbacks=[CompleteCheckpoints(identity), stopper],
        pooling=script_args.pooling,
    )
    train(trainer, checkpoint)
    stopper.exit_if_stopped()

    # Evaluate
    own = question_rows.paired(groups["validation"])
    settings["likeness"] = retriever.least_likeness(trainer.model, own, collator, settings, args)
    rows = first_rows(splits["test"], run_args.max_test_rows)
    others = splits["validation"], splits["train"]
    documents = question_rows.documents_for(rows, splits["test"], others, script_args.max_documents)
    (index := Index(":memory:")).update(documents)
    passages = list(index.passages())
    numbers = np.array([passage.id for passage in passages])
    gold = question_rows.gold_of(rows, [splits["test"]], documents, passages)
    asked = ids(rows["question"], "question")
    texts = ids((passage_text(each.title, each.text) for each in passages), "passage")

    def find(model, title: str) -> list[list[int]]:
        """Passages by the likeness of their vectors to that of each question of the test split."""
        vectors = retriever.vectors_of(model, asked + texts, collator, script_args.pooling, args, title)
        return retriever.nearest(vectors[: len(asked)], vectors[len(asked) :], numbers, DEPTH)

    trained = find(trainer.model, "test, trained model")
    base = find(beside(trainer, retriever.load_model(source, 0.0, settings, args.device)), "test, untrained model")
    words = [index.by_words(question) for question in rows["question"]]
    random = np.random.default_rng(args.seed).permuted(np.tile(numbers, (len(asked), 1)), axis=1)[:, :DEPTH].tolist()
    found = {"test": trained, "base": base, "baseline_bm25": words, "baseline_random": random}
    for system in ("test", "base"):
        both = zip(words, found[system], strict=True)
        found[f"{system}_fused"] = [[item for item, _ in fuse(pair, DEPTH)] for pair in both]
    named = [question_rows.names_its_subject(row) for row in rows]
    parts = {"named": named, "unnamed": [not each for each in named]} if 0 < sum(named) < len(named) else {}
    metrics, scores = {}, {}
    for system, rankings in found.items():
        measured, scores[system] = compute_metrics(rankings, gold, system, **parts)
        metrics |= measured
    beaten = {"BM25": scores["baseline_bm25"], "BM25 and untrained": scores["base_fused"]}
    helped = compare.did_it_help(scores["base"], scores["test"], "mrr", beaten)
    metrics |= {**helped, "test_rows": len(rows), "documents": len(documents), "passages": len(passages)}

    # Export
    shown = {passage.id: passage_text(passage.title, passage.text)[:400] for passage in passages}
    samples = [
        {"prompt": row["question"], "base": shown[b[0]], "trained": shown[t[0]], "reference": shown[min(right)]}
        for row, b, t, (right, _), _ in zip(rows, base, found["test_fused"], gold, range(20), strict=False)
    ]
    if args.should_save:
        save_settings(Path(args.output_dir), settings, trainer.model.config.hidden_size)
    finish(
        trainer,
        args,
        run_args,
        metrics=metrics,
        samples=samples,
        preflight=facts,
        test_rows=rows,
        line=helped["line"],
        training={"data": cleaning, "searched": f"{len(passages):,} passages of {len(documents):,} documents"},
        pipeline="sentence-similarity",
        library="sentence-transformers",
        usage=retriever.usage(args.hub_model_id or f"outputs/{Path(args.output_dir).name}"),
        limits="It finds passages and writes no answer. A question that does not say what it is about fits many passages. "
        "`fused` is what `python -m shared.retrieval` does: the rankings of this model and of BM25 together.",
    )


if __name__ == "__main__":
    run(main, ScriptArguments, "transformers.training_args:TrainingArguments")
