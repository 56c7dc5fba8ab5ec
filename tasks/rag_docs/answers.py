"""Does it help to answer what is found? A reader's answers with the right passage, with those that are found, and with none.

    python tasks/rag_docs/answers.py --retriever outputs/rag_docs --rows outputs/rag_rows
    accelerate launch tasks/qa_squad/train.py --dataset outputs/rag_rows --output_dir outputs/rag_reader
    python tasks/rag_docs/answers.py --retriever outputs/rag_docs --reader outputs/rag_reader

The first command writes the questions of the retriever's three splits, with those that have no answer, which it does not learn
from; the second one trains a reader on them; the third one asks both what neither was trained on, and makes sure of that.
"""

import argparse
import json
import logging
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import yaml

from shared import UserError
from shared.training.arguments import RunArguments

log = logging.getLogger("taskbook")
SYSTEMS = {
    "none: most frequent answer": "frequent",
    "random passages": "random",
    "retrieval": "retrieval",
    "right passage": "gold",
}
MEASURED = {
    "f1": "F1",
    "exact_match": "exact match",
    "named_f1": "F1, the function is named",
    "unnamed_f1": "F1, not named",
    "silent": "no answer is given",
    "refused": "questions without an answer: none is given",
    "citation_precision": "the cited passage holds the answer",
    "holds_answer": "one of those that were read holds it",
}


def settings_of(folder: Path) -> tuple[RunArguments, dict]:
    """What a run was started with. Raises UserError: it is no run."""
    path = folder / "run.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no run.yaml, so what it was trained on is not known. Name the folder of a run.")
    given = yaml.safe_load(path.read_text("utf8")) or {}
    known = {f.name for f in fields(RunArguments) if f.init}
    return RunArguments(**{name: value for name, value in given.items() if name in known}), given


def test_rows_of(folder: Path) -> list[dict]:
    """The first rows of the test split, as a run keeps them."""
    path = folder / "test.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: no test.jsonl, so what it was not trained on is not known. Train it here.")
    with path.open(encoding="utf8", newline="\n") as lines:  # splitlines would break in a text at U+2028
        return [json.loads(line) for line in lines]


def splits_of(folder: Path) -> dict:
    """The splits of the retriever's run, read again. Raises UserError: its data is no longer what it was."""
    from train import load_rows

    from shared.data.splits import first_rows

    run_args, given = settings_of(folder)
    splits, _ = load_rows(run_args, given.get("seed", 42))
    kept = test_rows_of(folder)
    if list(first_rows(splits["test"], len(kept))) != kept:
        raise UserError(f"{folder}: {run_args.dataset} is not what it was when this was trained. Train it again.")
    return splits


def unanswered(folder: Path, splits: dict) -> dict[str, list[dict]]:
    """For each split the questions about its documents that these do not answer. Raises UserError: no column of answers."""
    from question_rows import NEEDED, OPTIONAL, read, to_row

    from shared.data.columns import find_columns
    from shared.data.load import load_splits

    run_args, _ = settings_of(folder)
    side = {context: name for name, rows in splits.items() for context in rows["context"]}
    found = {name: [] for name in splits}
    for rows in load_splits(run_args, read).values():
        places = find_columns(run_args.dataset, rows.column_names, run_args.columns, NEEDED, OPTIONAL)
        if "answers" not in places:
            raise UserError(f"{run_args.dataset}: no column `answers`, so there is nothing to compare answers with.")
        for row in rows:
            if to_row(row, places) == "no answer" and row[places["context"]] in side:
                row = {name: row[column] for name, column in places.items() if name in ("context", "question", "title")}
                row |= {"title": row.get("title") or "", "answer": "", "answer_start": -1}
                found[side[row["context"]]].append(row)
    return found


def make_folder(folder: Path) -> None:
    """For `--rows`. Raises UserError: it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--rows {folder}: cannot be made ({error.strerror}); name another folder.") from error


def golds_of(rows, test) -> list[list[str]]:
    """For each row all answers to its question in the test split: several documents may be asked it."""
    same: dict[str, set[str]] = {}
    for row in test:
        same.setdefault(row["question"], set()).add(row["answer"])
    return [sorted(same[question]) for question in rows["question"]]


def write_rows(retriever: Path, folder: Path) -> None:
    """train.jsonl, validation.jsonl and test.jsonl for tasks/qa_squad: its rows have the same sides as the retriever's.

    Raises:
        UserError: as `splits_of`; a folder that cannot be made.
    """
    from shared.publish.results import replace_file

    splits = splits_of(retriever)
    none = unanswered(retriever, splits)
    make_folder(folder)
    for name, rows in splits.items():
        lines = []
        for row in [*rows, *none[name]]:
            start = row["answer_start"]
            answers = {"text": [row["answer"]] * (start >= 0), "answer_start": [start] * (start >= 0)}
            shown = {key: row[key] for key in ("title", "context", "question")} | {"answers": answers}
            lines.append(json.dumps(shown, ensure_ascii=False) + "\n")
        replace_file(folder / f"{name}.jsonl", "".join(lines).encode("utf8", "backslashreplace"))
        log.info("%s: %s questions with and %s without an answer", name, f"{len(rows):,}", f"{len(none[name]):,}")


def refuse_known(reader: Path, contexts: set[str]) -> None:
    """Raises UserError where the reader may have been trained on one of these texts, or nobody can tell."""
    from question_rows import read

    from shared.data.columns import find_columns
    from shared.data.load import load_splits

    run_args, _ = settings_of(reader)
    held_out = {row["context"] for row in test_rows_of(reader)}
    again = "Train it on the rows that --rows writes."
    for name, rows in load_splits(run_args, read).items():
        if name == "test":
            continue
        place = find_columns(run_args.dataset, rows.column_names, run_args.columns, ("context",), ())["context"]
        learned = set(rows[place])
        if known := len(contexts & learned):
            raise UserError(
                f"{reader}: may know {known:,} of the {len(contexts):,} texts that it is tested on. {again}"
            )
        if held_out & learned:
            raise UserError(f"{reader}: {run_args.dataset} is not what it was when this was trained. {again}")


def read_passages(reader, questions: list[str], passages: list[list[str]]) -> list[dict]:
    """The best answer to each question in its passages, as `best_answer` finds it; where there are none, no answer."""
    from shared.retrieval.answers import best_answer

    asked = [question for question, texts in zip(questions, passages, strict=True) for _ in texts]
    found = iter(reader.answer(asked, [text for texts in passages for text in texts], cut=True))
    return [best_answer([next(found) for _ in texts]) if texts else {"answer": ""} for texts in passages]


def evaluate(retriever: Path, reader_name: str) -> dict:
    """All metrics in points: `<system>_f1`, `_exact_match`, `_silent` (questions with an answer that get none), `_refused` (those
    without one that get none), `_citation_precision` (of cited passages, those that hold the answer); each with its interval.
    """
    from question_rows import documents_for, gold_of, gold_passages, names_its_subject

    from shared import metrics
    from shared.data.splits import first_rows
    from shared.inference.model import load
    from shared.publish.card import shown_name
    from shared.publish.compare import did_it_help
    from shared.publish.hub import pull
    from shared.retrieval.answers import MOST, find, near_enough
    from shared.retrieval.encoder import Encoder
    from shared.retrieval.index import Index
    from shared.retrieval.passages import cut

    # Data
    run_args, given = settings_of(retriever)
    splits = splits_of(retriever)
    rows = first_rows(splits["test"], run_args.max_test_rows)
    documents = documents_for(
        rows, splits["test"], (splits["validation"], splits["train"]), given.get("max_documents", 3000)
    )
    named = [names_its_subject(row) for row in rows]
    mixed = 0 < sum(named) < len(rows)
    # One that does not name its subject is asked of documents that answer it, too
    answered = {question for part in splits.values() for question in part["question"]}
    none = [row for row in unanswered(retriever, splits)["test"] if row["question"] not in answered]
    none = [row for row in none if names_its_subject(row) or not mixed][: run_args.max_test_rows]

    # Models
    folder = pull(reader_name)
    refuse_known(folder, set(splits["test"]["context"]))
    reader = load(folder)
    if reader.task != "question-answering":
        raise UserError(f"{reader_name}: a model for {reader.task}. Name a run of tasks/qa_squad.")
    (index := Index(":memory:", Encoder(retriever))).update(documents)
    passages = list(index.passages())
    log.info("%s passages of %s documents", f"{len(passages):,}", f"{len(documents):,}")

    # Passages of each system
    questions = [*rows["question"], *(row["question"] for row in none)]
    right = [held for held, _ in gold_of(rows, [splits["test"]], documents, passages)]
    found = [find(index, question, MOST) for question in questions]
    draw = np.random.default_rng(given.get("seed", 42))
    own = []
    for row in rows:
        parts = cut(row["context"])
        own.append([parts[i].text for i in gold_passages(row, parts)[:1]])
    own += [[part.text for part in cut(row["context"])] for row in none]
    shown = {
        "retrieval": [some for some, _ in found],
        "random": [
            [passages[i] for i in draw.choice(len(passages), min(MOST, len(passages)), False)] for _ in questions
        ],
    }
    texts = {"gold": own} | {name: [[each.text for each in some] for some in of] for name, of in shown.items()}

    # Answers
    given_answers, cited = {}, {}
    for system, of in texts.items():
        log.info("%s: %s passages are read", system, f"{sum(map(len, of)):,}")
        best = read_passages(reader, questions, of)
        if system == "retrieval":  # as it is served
            near = [near_enough(index, likeness) for _, likeness in found]
            best = [each if enough else {"answer": ""} for each, enough in zip(best, near, strict=True)]
        given_answers[system] = [each["answer"] for each in best]
        if system in shown:
            cited[system] = [
                some[each["number"] - 1].id if each["answer"] else None
                for each, some in zip(best, shown[system], strict=True)
            ]
    most_frequent = Counter(splits["train"]["answer"]).most_common(1)[0][0]
    given_answers["frequent"] = [most_frequent] * len(questions)

    # Scores
    golds = golds_of(rows, splits["test"])
    measured, of_rows = {}, {}
    for system, answers in given_answers.items():
        squad = metrics.load("squad").compute(predictions=answers[: len(rows)], references=golds, per_row=True)
        of_rows[system] = squad.pop("rows")
        scores = {**of_rows[system], "silent": [100.0 * (not answer) for answer in answers[: len(rows)]]}
        for part, counts in {"named_": named, "unnamed_": [not each for each in named]}.items() if mixed else ():
            scores |= {
                part + name: [v for v, c in zip(of, counts, strict=True) if c] for name, of in of_rows[system].items()
            }
        if none:
            scores["refused"] = [100.0 * (not answer) for answer in answers[len(rows) :]]
        if system in cited:
            hits = [100.0 * (c in held) for c, held in zip(cited[system], right, strict=False) if c is not None]
            scores |= {"citation_precision": hits} if hits else {}
            scores["holds_answer"] = [
                100.0 * any(each.id in held for each in some) for some, held in zip(shown[system], right, strict=False)
            ]
        measured |= {f"{system}_{name}": value for name, value in metrics.means(scores).items()}
    gap = metrics.paired_difference(of_rows["gold"]["f1"], of_rows["retrieval"]["f1"], higher_is_better=True)
    beaten = {"most frequent answer": of_rows["frequent"]}
    helped = did_it_help(of_rows["random"], of_rows["retrieval"], "f1", beaten, before="random passages")
    return measured | {
        "line": helped["line"],
        "gap_to_gold_f1": gap["difference"],
        "gap_to_gold_f1_ci95": gap["difference_ci95"],
        "most_frequent_answer": most_frequent,
        "questions": len(rows),
        "questions_without_answer": len(none),
        "documents": len(documents),
        "passages": len(passages),
        "reader": shown_name(reader_name),
        "data": shown_name(run_args.dataset),
    }


def table(found: dict, systems: dict[str, str], measured: dict[str, str]) -> str:
    """Rows of a Markdown table: each metric, for each system that has it.

    Args:
        systems, measured: by title and by name in `found` the systems; by name the titles of metrics.
    """
    lines = [f"| % | {' | '.join(systems)} |", f"|---|{'---|' * len(systems)}"]
    for name, title in measured.items():
        values = []
        for system in systems.values():
            low, high = found.get(f"{system}_{name}_ci95", (0, 0))
            value = found.get(f"{system}_{name}")
            values.append("" if value is None else f"{value:.1f} ({low:.1f} to {high:.1f})")
        if any(values):
            lines.append(f"| {title} | {' | '.join(values)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retriever", required=True, type=Path, help="the folder of a run of this task")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rows", type=Path, help="a folder to write the questions of the retriever's splits to")
    what.add_argument(
        "--reader", help="a run of tasks/qa_squad, trained on those; writes answers.json beside the retriever"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level="INFO", stream=sys.stderr)
    try:
        if options.rows:
            write_rows(options.retriever, options.rows)
            return 0
        from shared.publish.results import write_json

        found = evaluate(options.retriever, options.reader)
        write_json(options.retriever / "answers.json", found)
        low, high = found["gap_to_gold_f1_ci95"]
        print(table(found, SYSTEMS, MEASURED), f"\n{found['line']}")
        print(
            f"F1 with retrieval less that with the right passage: {found['gap_to_gold_f1']:.1f} ({low:.1f} to {high:.1f})."
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
