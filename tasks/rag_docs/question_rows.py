"""Questions with the text that answers them -> groups to learn from, the documents to search, rankings and their scores. Used by
train.py; needs no torch.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset

from shared import UserError
from shared.data.cleaning import malformed
from shared.data.files import kind_of, read_json
from shared.data.load import load_data
from shared.data.splits import first_rows
from shared.retrieval.index import passage_text
from shared.retrieval.passages import cut

NEEDED = ("context", "question")
OPTIONAL = ("title", "answers", "answer_start")
PLACES = (1, 5, 10)  # of recall


def read(name: str, config: str | None) -> dict:
    """The splits of any data: SQuAD's own JSON (articles, paragraphs, questions), or as `shared.data.load.load_data`.

    Raises:
        UserError: it has articles, but not in that format.
    """
    file = Path(name).expanduser()
    content = read_json(file) if file.is_file() and kind_of(file) == ".json" else None
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list) or not any(isinstance(a, dict) and "paragraphs" in a for a in articles):
        return load_data(name, config)
    try:
        rows = [
            {
                "title": article.get("title") or "",
                "context": paragraph["context"],
                "question": asked["question"],
                "answers": {key: [answer[key] for answer in asked["answers"]] for key in ("text", "answer_start")},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: not SQuAD's JSON: {type(error).__name__} {error} in an article of `data`.") from error
    return {"train": Dataset.from_list(rows)}


def to_row(row: dict, places: dict[str, str]) -> dict | str:
    """`context`, `question`, `title`, `answer`, `answer_start`, or the reason for dropping the row.

    Without a column of answers the whole context is the answer: `answer` is empty then. With one, a question without an answer
    is dropped: nothing that could be found is right for it.
    """
    values = {name: row.get(column) for name, column in places.items()}
    context, question = (values[name] for name in NEEDED)
    for text in (context, question):
        if reason := malformed(text):
            return f"bad: {reason}"
    title = values.get("title") if isinstance(values.get("title"), str) else ""
    made = {"context": context, "question": question.strip(), "title": title}
    if "answers" not in places:
        return made | {"answer": "", "answer_start": 0}
    answers, start = values["answers"], values.get("answer_start")
    if isinstance(answers, list) and answers and isinstance(answers[0], dict):
        answers = answers[0]
    if isinstance(answers, dict):
        answers, start = answers.get("text"), answers.get("answer_start")
    answer, start = (each[0] if isinstance(each, list) and each else each for each in (answers, start))
    if answer is None or answer == [] or answer == "":
        return "no answer"
    if not isinstance(answer, str):
        return "bad: wrong type"
    answer = answer.strip()
    if not isinstance(start, int) or not context.startswith(answer, start):
        start = context.find(answer)
    return made | {"answer": answer, "answer_start": start} if start >= 0 else "bad: answer not in its context"


def groups(rows) -> list[str]:
    """For each row the text that must stay on one side of a split: its package's name, all contexts of its title, or its own.

    A qualified name, as `docs:questions` has them, begins with its package: what is tested is documentation of other packages.
    """
    names = [
        title.partition(".")[0] if title and " " not in title else title or context
        for title, context in zip(rows["title"], rows["context"], strict=True)
    ]
    packages = {name for name, title in zip(names, rows["title"], strict=True) if title.startswith(f"{name}.")}
    contexts: dict[str, dict[str, None]] = {}
    for name, context in zip(names, rows["context"], strict=True):
        if name not in packages:  # one may have megabytes of them
            contexts.setdefault(name, {})[context] = None
    joined = {name: "\n".join(sorted(texts)) for name, texts in contexts.items()}
    return [joined.get(name, name) for name in names]


def gold_passages(row: dict, passages: list) -> list[int]:
    """Which of the passages of its context hold the answer, or a part of it; all where the context itself is the answer."""
    first, last = row["answer_start"], row["answer_start"] + len(row["answer"])
    held = [i for i, part in enumerate(passages) if part.start < last and first < part.start + len(part.text)]
    return held if row["answer"] else list(range(len(passages)))


def contexts_of(*parts) -> dict[str, dict[str, None]]:
    """For each question all contexts that it is asked of, word for word: each of them answers it."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        for question, context in zip(part["question"], part["context"], strict=True):
            found.setdefault(question, {})[context] = None
    return found


def pairs(rows, contexts: dict[str, dict[str, None]]) -> list[dict]:
    """`question`, `passage` as it is indexed, `document`, a number that rows of one context share, and `contexts`, that of the
    row and others that answer it.
    """
    numbers: dict[str, int] = {}
    found = []
    for row in rows:
        parts = cut(row["context"])
        if held := gold_passages(row, parts):
            text = passage_text(row["title"], parts[held[0]].text)
            number = numbers.setdefault(row["context"], len(numbers))
            pair = {"question": row["question"], "passage": text, "document": number, "title": row["title"]}
            found.append(pair | {"context": row["context"], "contexts": contexts[row["question"]]})
    return found


def make_groups(pairs: list[dict], size: int, seed: int) -> list[list[dict]]:
    """Groups of `size` pairs or a few more; the passages of a group are the wrong ones for its other questions.

    Half of a group lie next to each other by title, which is what a search must tell apart, half come from anywhere.
    """
    draw = random.Random(seed)
    pairs = draw.sample(pairs, len(pairs))
    count = max(1, len(pairs) // size)
    near, far = sorted(pairs[::2], key=lambda pair: pair["title"]), pairs[1::2]
    parts = zip(
        np.array_split(np.arange(len(near)), count), np.array_split(np.arange(len(far))[::-1], count), strict=True
    )
    made = [[near[i] for i in some] + [far[i] for i in others] for some, others in parts]
    return draw.sample(made, count)


def group_rows(
    split, most: int | None, size: int, seed: int, ids: Callable[[list[str], str], list[list[int]]]
) -> Dataset:
    """A row for each group: `input_ids` of its questions, then of its passages; `document` of each passage; `length` of all;
    `right`, for each question which of the passages answer it.

    Args:
        most: rows of the split to take.
        ids: texts and what they are, `question` or `passage` -> the token ids of each.
    """
    made = []
    for group in make_groups(pairs(first_rows(split, most), contexts_of(split)), size, seed):
        texts = [text for kind in ("question", "passage") for text in ids([pair[kind] for pair in group], kind)]
        document = [pair["document"] for pair in group]
        right = [[other["context"] in pair["contexts"] for other in group] for pair in group]
        made.append({"input_ids": texts, "document": document, "right": right, "length": sum(map(len, texts))})
    return Dataset.from_list(made)


def documents_for(rows, test, others, most: int) -> list[dict]:
    """Documents to search: the contexts of `rows`, then those of all of `test` and of `others` until there are `most`; each once.

    Of `others`, which the model may know from training, none that a question of `rows` is asked of, too: it would answer.
    """
    asked, known = set(rows["question"]), set()
    for part in others:
        known |= {c for question, c in zip(part["question"], part["context"], strict=True) if question in asked}
    found: dict[str, str] = {}
    for part in (rows, test, *others):
        for context, title in zip(part["context"], part["title"], strict=True):
            if len(found) >= most and part is not rows:
                break
            if part is rows or context not in known:
                found.setdefault(context, title)
    return [{"source": str(i), "title": title, "text": text} for i, (text, title) in enumerate(found.items())]


def gold_of(rows, others, documents: list[dict], passages: list) -> list[tuple[set[int], set[int]]]:
    """For each row the ids of the passages of the index that hold its answer, or that to the same question in `others`; and those
    of all passages of these documents.
    """
    asked = set(rows["question"])
    same: dict[str, list[dict]] = {}
    for part in others:
        wanted = [i for i, question in enumerate(part["question"]) if question in asked]
        for row in part.select(wanted):
            same.setdefault(row["question"], []).append(row)
    number = {document["text"]: document["source"] for document in documents}
    of_source: dict[str, list] = {}
    for passage in passages:
        of_source.setdefault(passage.source, []).append(passage)
    found = []
    for question in rows["question"]:
        right, near = set(), set()
        for row in same[question]:
            parts = of_source.get(number.get(row["context"]), [])
            right |= {parts[i].id for i in gold_passages(row, parts)}
            near |= {part.id for part in parts}
        found.append((right, near))
    return found


def score(rankings: list[list[int]], gold: list[tuple[set[int], set[int]]]) -> dict[str, list[float]]:
    """For each row, by metric: the reciprocal of the first right place (0 where there is none), whether it is among the first,
    and whether any passage of a right document is.
    """
    ranks, near = (
        [
            next((place for place, item in enumerate(ranking, 1) if item in wanted[which]), None)
            for ranking, wanted in zip(rankings, gold, strict=True)
        ]
        for which in (0, 1)
    )
    found = {"mrr": [1 / rank if rank else 0.0 for rank in ranks]}
    for name, places in (("recall", ranks), ("document_recall", near)):
        found |= {f"{name}_at_{k}": [float(rank is not None and rank <= k) for rank in places] for k in PLACES}
    return found


def names_its_subject(row: dict) -> bool:
    """Whether the question says which function or class it is about; one that does not fits many."""
    return row["title"].rpartition(".")[2] in row["question"]
