"""Questions with the text that answers them -> groups to learn from, the documents to search, rankings and their scores. Used by
train.py; needs no torch.
"""

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
from datasets import Dataset

from shared.data.cleaning import malformed
from shared.data.load import load_data
from shared.data.splits import first_rows
from shared.data.squad import read_answers, read_official
from shared.retrieval.index import Index, passage_text
from shared.retrieval.passages import cut

NEEDED = ("context", "question")
OPTIONAL = ("title", "answers", "answer_start")
PLACES = (1, 5, 10)  # of recall
HARDEST = 10  # passages that BM25 puts first, of which the hard negatives of a question are drawn


def read(name: str, config: str | None) -> dict:
    """The splits of any data: SQuAD's own JSON, or as `shared.data.load.load_data`."""
    official = read_official(name)
    return {"train": Dataset.from_list(official)} if official else load_data(name, config)


def to_row(row: dict, places: dict[str, str]) -> dict | str:
    """`context`, `question`, `title`, `answer`, `answer_start`, or the reason for dropping the row.

    Without a column of answers the whole context is the answer: `answer` is empty then. With one, a question without an answer
    is dropped: nothing that could be found is right for it.
    """
    values = {name: row.get(column) for name, column in places.items()}
    context, question = (values[name] for name in NEEDED)
    for name in NEEDED:
        if reason := malformed(values[name], places[name]):
            return f"bad: {reason}"
    title = values.get("title") if isinstance(values.get("title"), str) else ""
    made = {"context": context, "question": question.strip(), "title": title}
    if "answers" not in places:
        return made | {"answer": "", "answer_start": 0}
    found = read_answers(context, values["answers"], values.get("answer_start"), places["answers"])
    if isinstance(found, str):
        text = values["answers"]
        if not (isinstance(text, str) and text.strip() in context and len(cut(context)) == 1):
            return found
        # Nothing says where, but every place is in the same passage
        found = {"text": [text.strip()], "answer_start": [context.find(text.strip())]}
    if not found["text"]:
        return "no answer"
    return made | {"answer": found["text"][0], "answer_start": found["answer_start"][0]}


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
    """`question`, `passage` as it is indexed, `places` of all passages of its document that hold the answer, `document`, a number
    that rows of one context share, and `contexts`, that of the row and others that answer it.
    """
    numbers: dict[str, int] = {}
    found = []
    for row in rows:
        parts = cut(row["context"])
        if held := gold_passages(row, parts):
            text = passage_text(row["title"], parts[held[0]].text)
            number = numbers.setdefault(row["context"], len(numbers))
            pair = {"question": row["question"], "passage": text, "places": held, "document": number}
            pair |= {"title": row["title"], "context": row["context"], "contexts": contexts[row["question"]]}
            found.append(pair)
    return found


def add_negatives(pairs: list[dict], most: int, seed: int) -> None:
    """Gives each pair its `negatives`, at most `most`: passages of all documents of the pairs that BM25 ranks high for its
    question and that do not hold the answer, others of its own document among them. Each is (context, passage as it is indexed).
    """
    documents = {pair["context"]: pair["title"] for pair in pairs}
    order = list(documents)
    index = Index(":memory:")
    index.update({"source": str(i), "title": documents[text], "text": text} for i, text in enumerate(order))
    found, places, counts = {}, {}, Counter()
    for passage in index.passages():
        found[passage.id] = order[int(passage.source)], passage_text(passage.title, passage.text)
        places[passage.id] = counts[passage.source]
        counts[passage.source] += 1
    draw = random.Random(seed)
    for pair in pairs:
        wrong = []
        for item in index.by_words(pair["question"]):
            context, _ = found[item]
            own = context == pair["context"]
            if places[item] not in pair["places"] if own else context not in pair["contexts"]:
                wrong.append(found[item])
        pair["negatives"] = draw.sample(wrong[:HARDEST], min(most, len(wrong)))


def make_groups(pairs: list[dict], size: int, seed: int) -> list[list[dict]]:
    """Groups of `size` pairs or a few more; the passages of a group are wrong ones for its other questions.

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
    split,
    most: int | None,
    size: int,
    seed: int,
    ids: Callable[[list[str], str], list[list[int]]],
    negatives: int = 0,
) -> Dataset:
    """A row for each group: `input_ids` of its questions, then of their passages, then of the negatives; `document` of each pair;
    `right`, for each question which of passages and negatives answer it; `length` of all.

    Args:
        most: rows of the split to take.
        ids: texts and what they are, `question` or `passage` -> the token ids of each.
        negatives: hard ones for each pair, see `add_negatives`.
    """
    found = pairs(first_rows(split, most), contexts_of(split))
    if negatives:
        add_negatives(found, negatives, seed)
    made = []
    for group in make_groups(found, size, seed):
        extra = [(pair, *negative) for pair in group for negative in pair.get("negatives", ())]
        texts = ids([pair["question"] for pair in group], "question")
        texts += ids([*(pair["passage"] for pair in group), *(text for *_, text in extra)], "passage")
        right = [
            [other["context"] in pair["contexts"] for other in group]
            # A pair's own negatives may be of its own document
            + [owner is not pair and context in pair["contexts"] for owner, context, _ in extra]
            for pair in group
        ]
        document = [pair["document"] for pair in group]
        made.append({"input_ids": texts, "document": document, "right": right, "length": sum(map(len, texts))})
    return Dataset.from_list(made)


def paired(groups) -> list[tuple[list[int], list[int]]]:
    """The token ids of each question of rows of `group_rows`, and of its passage."""
    rows = zip(groups["input_ids"], groups["document"], strict=True)
    return [pair for texts, of in rows for pair in zip(texts[: len(of)], texts[len(of) : 2 * len(of)], strict=True)]


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
