"""tasks/rag_docs: rows, groups, rankings and their scores, the loss, a run end to end, resume, errors, answers from what is
found. Tiny models, real code."""

import json
import random
import re
import signal
from functools import partial
from pathlib import Path

import answers
import numpy as np
import pytest
import question_rows
import retriever
import talks
import task_runs
import torch
from checkout import ROOT, train_script
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from shared import UserError
from shared.inference.model import load
from shared.retrieval.encoder import SETTINGS, Encoder
from shared.retrieval.index import Index
from shared.retrieval.passages import cut
from shared.training.arguments import parse

rag_docs = train_script("rag_docs")
TASK = ROOT / "tasks" / "rag_docs"
TRAINING = "transformers.training_args:TrainingArguments"
WORDS = {
    "red": "crimson",
    "green": "lime",
    "blue": "navy",
    "white": "snow",
    "black": "coal",
    "grey": "ash",
    "pink": "rose",
}
CITIES = {"Hanoi": "Vietnam", "Paris": "France", "Lima": "Peru", "Oslo": "Norway", "Cairo": "Egypt", "Rome": "Italy"}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """SQuAD's JSON: 42 articles of a colour and a city, asked for in words that the text does not have; BM25 finds none."""
    path, articles = tmp_path_factory.mktemp("questions") / "squad.json", []
    for i, (colour, city) in enumerate((colour, city) for colour in WORDS for city in CITIES):
        context = f"A {colour} house stands in {city}."
        asked = [
            f"Which {WORDS[colour]} building is {where} {CITIES[city]}?" for where in ("at", "inside", "of", "from")
        ]
        given = [{"text": city, "answer_start": context.index(city)}]
        qas = [{"id": f"{i}-{j}", "question": question, "answers": given} for j, question in enumerate(asked)]
        qas.append({"id": f"{i}-none", "question": f"Who owns the {colour} one at {city}?", "answers": []})
        articles.append({"title": f"t{i}", "paragraphs": [{"context": context, "qas": qas}]})
    path.write_text(json.dumps({"data": articles}))
    return path


def flags(model, questions, output, **options):
    options = {
        "model_name_or_path": model,
        "dataset": questions,
        "output_dir": output,
        "max_length": 24,
        "group_size": 8,
        "dropout": 0.0,
        "max_steps": 60,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "logging_steps": 5,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | options
    return [f"--{name}={value}" for name, value in options.items()]


command = partial(task_runs.command, TASK / "train.py")


@pytest.fixture(scope="module")
def run(tiny_bert, questions, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "rag"
    ran = command(*flags(tiny_bert, questions, output))
    assert ran.returncode == 0, ran.stderr[-3000:]
    return output


def test_it_learns_what_words_mean_and_is_saved_whole(run):
    """Documents of the test split were never trained on: their colours and cities were, each with others."""
    results = json.loads((run / "all_results.json").read_text())
    losses = list(task_runs.losses(run).values())
    assert losses[-1] < 0.6 * losses[0], losses
    assert results["test_recall_at_1"] > results["base_recall_at_1"] + 0.2, results
    assert results["test_mrr"] > results["baseline_random_mrr"] and results["baseline_bm25_mrr"] <= results["test_mrr"]
    assert results["documents"] == results["passages"] == 42 and results["test_fused_mrr"] > results["base_fused_mrr"]
    low, high = results["test_mrr_ci95"]
    assert low <= results["test_mrr"] <= high
    text = ["A red house stands in Oslo."]
    ours = Encoder(run)
    bound = ours.settings["likeness"]
    assert ours.settings == SETTINGS | {"max_length": 24, "likeness": bound} and -1 < bound < 1
    theirs = SentenceTransformer(str(run), device="cpu").encode_document(text)
    np.testing.assert_allclose(ours.encode(text, "passage"), theirs, atol=1e-5)
    index = Index(":memory:", ours)
    texts = {row["context"] for row in map(json.loads, (run / "test.jsonl").read_text().splitlines())}
    index.update([{"source": text, "text": text} for text in sorted(texts)])
    row = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert index.search(row["prompt"]) and {"prompt", "base", "trained", "reference"} <= row.keys()
    card = (run / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "Right passage first, together with BM25" in card
    assert "Did it help? Better than" in card and not list(run.glob("*.sqlite*"))


def test_a_killed_run_ends_with_the_same_weights(tiny_bert, questions, tmp_path):
    from safetensors.numpy import load_file

    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    argv = {name: flags(tiny_bert, questions, tmp_path / name, dropout=0.1, **options) for name in ("whole", "killed")}
    assert command(*argv["whole"]).returncode == 0
    killed = tmp_path / "killed"
    assert task_runs.interrupt(TASK / "train.py", argv["killed"], killed, 4, signal.SIGKILL) == -signal.SIGKILL
    again = command(*argv["killed"])
    assert again.returncode == 0 and "Resumes from" in again.stdout, again.stderr[-3000:]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answers": {"text": ["b"], "answer_start": [4]}}, ("b", 4)),
        ({"answers": {"text": ["b"], "answer_start": [3]}}, ("b", 2)),  # its place is wrong
        ({"answers": [{"text": "c", "answer_start": 6}]}, ("c", 6)),
        ({"answers": " c "}, ("c", 6)),
        ({"answers": ["c", "b"]}, ("c", 6)),
        ({"answers": {"text": [], "answer_start": []}}, "no answer"),
        ({"answers": []}, "no answer"),
        ({"answers": None}, "no answer"),
        ({"answers": "b"}, ("b", 2)),  # twice, but all of it is one passage
        ({"answers": "b", "answer_start": "4"}, ("b", 4)),  # a cell of a CSV
        ({"answers": "b", "answer_start": 4.0}, ("b", 4)),  # of a column that pandas made floats of
        ({"answers": "{'text': ['b'], 'answer_start': [4]}"}, ("b", 4)),
        ({"context": "\N{GRINNING FACE} b b", "answers": "b", "answer_start": 5}, ("b", 4)),  # counted in UTF-16
        ({"context": "1 7", "answers": 7}, ("7", 2)),
        ({"context": "b " * 200, "answers": "b"}, "bad: answer not in its context, or more than once and without"),
        ({"answers": "x"}, "bad: answer not in its context"),
        ({"answers": 7}, "bad: answer not in its context"),
        ({"answers": True}, "bad: wrong type"),
        ({"question": " "}, "bad: empty"),
        ({"context": None}, "bad: missing"),
    ],
)
def test_rows(row, expected):
    row = {"context": "a b b c", "question": "?", "answers": "c", "title": None} | row
    found = question_rows.to_row(row, dict.fromkeys(row) | {name: name for name in row})
    if isinstance(found, str):
        assert isinstance(expected, str) and found.startswith(expected), found
    else:
        assert (found["answer"], found["answer_start"]) == expected


def test_without_answers_the_whole_text_is_the_answer():
    found = question_rows.to_row({"body": "x " * 300, "question": "?"}, {"context": "body", "question": "question"})
    assert found["answer"] == "" and question_rows.gold_passages(found, cut(found["context"])) == [0, 1, 2]


def test_the_passage_with_the_answer_is_the_right_one():
    context = "\n\n".join(f"Paragraph {i} " + "word " * 80 + f"end{i}." for i in range(4))
    row = {"context": context, "answer": "end2", "answer_start": context.index("end2")}
    assert question_rows.gold_passages(row, cut(context)) == [2]


def test_the_bound_is_what_97_of_100_own_passages_reach(monkeypatch):
    """Of a group the questions come first: here of 100, whose likeness to their passages is 0.00 to 0.99."""
    likeness = np.arange(100) / 100
    vectors = {}
    for i, cosine in enumerate(likeness):
        vectors |= {i: [1.0, 0.0], 100 + i: [cosine, (1 - cosine**2) ** 0.5]}
    monkeypatch.setattr(retriever, "vectors_of", lambda _, texts, *rest: np.array([vectors[ids[0]] for ids in texts]))
    rows = [[[i] for i in numbers] + [[100 + i] for i in numbers] for numbers in (range(0, 60), range(60, 100))]
    rows[0].append([7])  # a negative of the first group, whose vector belongs to no question
    pairs = question_rows.paired({"input_ids": rows, "document": [range(60), range(40)]})
    bound = retriever.least_likeness(None, pairs, None, {"pooling": "mean"}, None)
    assert (likeness >= bound).sum() == 97


def test_a_package_stays_on_one_side():
    rows = {"title": ["a.b", "a", "The river", "", "The river"], "context": ["1", "2", "3", "4", "5"]}
    found = question_rows.groups(rows)
    assert found == ["a", "a", "3\n5", "4", "3\n5"]


def test_all_documents_that_a_question_is_asked_of_answer_it():
    rows = Dataset.from_dict({"question": ["a?", "a?", "b?"], "context": ["a 1", "b 2", "b 2"], "title": ["", "", ""]})
    rows = rows.add_column("answer", ["1", "2", "2"]).add_column("answer_start", [2, 2, 2])
    group = question_rows.group_rows(rows, None, 3, 0, lambda texts, kind: [[len(text)] for text in texts])[0]
    order = [
        question_rows.pairs(rows, question_rows.contexts_of(rows)).index(p)
        for p in question_rows.make_groups(question_rows.pairs(rows, question_rows.contexts_of(rows)), 3, 0)[0]
    ]
    wanted = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 1]], dtype=bool)
    np.testing.assert_array_equal(np.array(group["right"]), wanted[order][:, order])
    (index := Index(":memory:")).update(documents := question_rows.documents_for(rows, rows, (), 9))
    passages = list(index.passages())
    assert question_rows.gold_of(rows.select([0, 2]), [rows], documents, passages) == [({1, 2}, {1, 2}), ({2}, {2})]


def test_negatives_are_near_by_words_and_hold_no_answer():
    """Each context but the last is cut into three passages; the second one of each says which colour its house has."""
    filler = "word " * 100
    rows = [
        {"context": f"{filler}house.\n\nThe house {n} is {colour}.{filler}\n\nThe house {n} again.{filler}", "title": n}
        for n, colour in (("alpha", "red"), ("beta", "blue"), ("gamma", "green"))
    ] + [{"context": "Nothing alike.", "title": "delta"}]
    for row, colour in zip(rows, ("red", "blue", "green", "alike"), strict=True):
        row |= {"question": f"Which colour has house {row['title']}?", "answer": colour}
        row["answer_start"] = row["context"].index(colour)
    rows[2]["question"] = rows[1]["question"]  # beta and gamma answer it both
    data = Dataset.from_list(rows)
    found = question_rows.pairs(data, question_rows.contexts_of(data))
    question_rows.add_negatives(found, 20, seed=0)
    own = found[0]
    assert own["negatives"] and own["passage"] not in {text for _, text in own["negatives"]}
    assert {context for context, _ in own["negatives"]} >= {own["context"], rows[1]["context"]}
    assert {context for context, _ in found[1]["negatives"]} == {rows[0]["context"], rows[1]["context"]}
    question_rows.add_negatives(found, 1, seed=0)
    assert [len(pair["negatives"]) for pair in found] == [1, 1, 1, 1]

    texts = []

    def ids(of, kind):
        texts.extend(of)
        return [[len(text)] for text in of]

    group = question_rows.group_rows(data, None, 4, 0, ids, negatives=2)[0]
    extra = len(group["input_ids"]) - 8
    assert extra > 4 and {len(right) for right in group["right"]} == {4 + extra} and len(group["document"]) == 4
    questions, passages = texts[:4], texts[4:]
    of = {row["context"]: row["title"] for row in rows}
    for question, right in zip(questions, group["right"], strict=True):
        answering = {row["title"] for row in rows if row["question"] == question}
        for passage, says in zip(passages[:4], right, strict=False):
            assert says == (passage.split("\n")[0] in answering)
        # Of a document that answers it a negative is wrong only for the question that it was drawn for
        for passage, says in zip(passages[4:], right[4:], strict=True):
            assert not says or passage.split("\n")[0] in answering
    assert any(any(right[4:]) for right in group["right"]) and set(of.values()) == {"alpha", "beta", "gamma", "delta"}


def test_groups_hold_each_pair_once():
    pairs = [{"question": str(i), "title": f"t{i // 3:02}"} for i in range(103)]
    made = question_rows.make_groups(pairs, 8, seed=0)
    assert sorted(int(pair["question"]) for group in made for pair in group) == list(range(103))
    assert {len(group) for group in made} <= {8, 9, 10} and len(made) == 12
    assert made == question_rows.make_groups(pairs, 8, seed=0) != question_rows.make_groups(pairs, 8, seed=1)


def test_scores_by_hand():
    found = question_rows.score(
        [[5, 6, 7], [1, 2], [3, *range(20, 30), 9]], [({6, 7}, {5, 6, 7}), ({8}, {8}), ({9}, {9, 29})]
    )
    assert found["mrr"] == [1 / 2, 0.0, 1 / 12]
    assert (found["recall_at_1"], found["recall_at_5"], found["recall_at_10"]) == ([0, 0, 0], [1, 0, 0], [1, 0, 0])
    assert [found[f"document_recall_at_{k}"] for k in (1, 5, 10)] == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_documents_to_search_are_those_of_the_rows_then_others():
    rows = [
        {"context": ["a", "b", "a"], "title": ["A", "B", "A"], "question": ["1", "2", "3"]},
        {"context": ["c", "b", "e", "d"], "title": ["C", "B", "E", "D"], "question": ["4", "5", "2", "6"]},
    ]
    for most, expected in ((1, "ab"), (3, "abc"), (9, "abcd")):
        assert (
            "".join(each["text"] for each in question_rows.documents_for(rows[0], rows[0], rows[1:], most)) == expected
        )


def test_the_loss_of_a_group_by_hand():
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(10, 4, generator=draw), dim=-1)
    right = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]]).bool(), torch.eye(2).bool()
    batch = {"pairs": torch.tensor([3, 2]), "right": torch.cat([each.flatten() for each in right])}
    batch["passages"] = batch["pairs"]
    found = retriever.group_losses(vectors, batch)
    q, p = vectors[:3], vectors[3:6]
    scores = (q @ p.T / 0.05).exp()
    scores[0, 2] = 0  # that passage answers it, too
    assert found[0].item() == pytest.approx(-(scores.diagonal() / scores.sum(1)).log().mean().item(), rel=1e-5)
    q, p = vectors[6:8], vectors[8:]
    expected = torch.nn.functional.cross_entropy(q @ p.T / 0.05, torch.arange(2))
    assert found[1].item() == pytest.approx(expected.item(), rel=1e-5)
    batch = {"pairs": torch.tensor([3]), "passages": torch.tensor([7]), "right": torch.eye(3, 7).bool().flatten()}
    expected = torch.nn.functional.cross_entropy(vectors[:3] @ vectors[3:].T / 0.05, torch.arange(3))
    assert retriever.group_losses(vectors, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_packed_vectors_are_padded_ones(pooling, tiny_bert):
    draw, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(tiny_bert)
    model = retriever.load_model(tiny_bert, 0.0, SETTINGS, torch.device("cpu")).eval()
    texts = [[101, *(draw.randrange(2000, 9000) for _ in range(length)), 102] for length in (3, 40, 11, 1)]
    packed = retriever.embed(model, retriever.GroupCollator(tokenizer, True).texts(texts), pooling)
    model.set_attn_implementation("sdpa")
    padded = retriever.embed(model, retriever.GroupCollator(tokenizer, False).texts(texts), pooling)
    assert packed.shape == (4, 32) and torch.allclose(packed, padded, atol=1e-5)


def test_no_document_lies_on_two_sides(questions):
    _, args, run_args = parse(
        rag_docs.ScriptArguments, TRAINING, ["--dataset", str(questions), "--model_name_or_path", "x"]
    )
    splits, _ = rag_docs.load_rows(run_args, args.seed)
    sides = [set(rows["context"]) for rows in splits.values()]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == 42


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group_size": 1}, "holds no wrong passage"),
        ({"max_length": 4000}, "reads 512 tokens at most"),
        ({"max_length": 2}, "of each text 2 are special tokens"),
        ({"model_name_or_path": "gpt2"}, "gives no vectors of texts"),
        ({"dataset": "broken.json"}, "not SQuAD's JSON"),
    ],
)
def test_errors_are_one_line(options, said, tiny, tiny_bert, questions, tmp_path):
    (tmp_path / "broken.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "x", "qas": [{}]}]}]}))
    options = {
        name: {"gpt2": tiny / "gpt2", "broken.json": tmp_path / "broken.json"}.get(value, value)
        for name, value in options.items()
    }
    argv = flags(tiny_bert, questions, tmp_path / "run", **options)
    with pytest.raises(UserError, match=said) as refused:
        rag_docs.main(*parse(rag_docs.ScriptArguments, TRAINING, argv))
    assert "\n" not in str(refused.value).strip()


def test_the_plan_and_the_rows_are_shown(tiny_bert, questions, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "taskbook")
    for extra, said in ((["--dry_run"], "GB memory"), (["--show_data", "1"], "[[")):
        argv = [*flags(tiny_bert, questions, tmp_path / "run"), *extra]
        try:
            rag_docs.main(*parse(rag_docs.ScriptArguments, TRAINING, argv))
        except SystemExit as left:
            assert not left.code
        assert said in capsys.readouterr().out + caplog.text
    assert not Path(tmp_path / "run").exists()


def test_rows_of_the_hub_and_of_tables_are_the_same(questions, tmp_path):
    rows = question_rows.read(str(questions), None)["train"]
    Dataset.from_list(list(rows)).to_json(tmp_path / "rows.jsonl")
    again = question_rows.read(str(tmp_path / "rows.jsonl"), None)["train"]
    places = {name: name for name in ("context", "question", "title", "answers")}
    assert [question_rows.to_row(a, places) for a in rows] == [question_rows.to_row(b, places) for b in again]


@pytest.fixture(scope="module")
def reader(run, tiny_bert, tmp_path_factory):
    """A run of tasks/qa_squad on the rows that `--rows` writes, which stand beside it."""
    folder = tmp_path_factory.mktemp("reader")
    written = ask(run, "--rows", folder / "rows")
    assert written.returncode == 0, written.stderr[-3000:]
    options = {"max_length": 48, "doc_stride": 8, "max_steps": 90, "per_device_train_batch_size": 16}
    argv = flags(tiny_bert, folder / "rows", folder / "reader", **options)
    argv = [flag for flag in argv if not flag.startswith("--group_size")]
    trained = task_runs.command(ROOT / "tasks" / "qa_squad" / "train.py", *argv)
    assert trained.returncode == 0, trained.stderr[-3000:]
    return folder / "reader"


def ask(run, option, value):
    """The README's command, with folders of the test."""
    command, folder = (
        f"python tasks/rag_docs/answers.py --retriever outputs/rag_docs {option} ",
        f"outputs/rag_{option[2:]}",
    )
    assert f"\n{command}{folder}\n" in (TASK / "README.md").read_text()
    return task_runs.command(TASK / "answers.py", "--retriever", run, option, value)


def test_rows_for_a_reader_lie_on_the_sides_of_the_retriever(run, reader):
    sides = {}
    for name in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (reader.parent / "rows" / f"{name}.jsonl").read_text().splitlines()]
        sides[name] = {row["context"] for row in rows}
        assert sum(not row["answers"]["text"] for row in rows) == len(sides[name]), "one of each text has no answer"
        assert all(a in row["context"] for row in rows for a in row["answers"]["text"])
    tested = {json.loads(line)["context"] for line in (run / "test.jsonl").read_text().splitlines()}
    assert sides["test"] == tested and sum(map(len, sides.values())) == len(set.union(*sides.values())) == 42


def test_answers_from_what_is_found(run, reader):
    ran = ask(run, "--reader", reader)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((run / "answers.json").read_text())
    assert (found["questions"], found["questions_without_answer"], found["passages"]) == (16, 4, 42)
    assert found["gold_f1"] > 80 and found["retrieval_f1"] > found["random_f1"]
    assert found["gap_to_gold_f1"] == pytest.approx(found["retrieval_f1"] - found["gold_f1"])
    assert found["most_frequent_answer"] in CITIES and found["frequent_refused"] == 0 == found["frequent_silent"]
    assert found["gold_refused"] >= 50
    for name in ("holds_answer", "citation_precision"):
        assert found[f"retrieval_{name}"] > found[f"random_{name}"] and f"gold_{name}" not in found
    assert (
        "| F1 | " in ran.stdout and "Did it help?" in ran.stdout and str(run) not in (run / "answers.json").read_text()
    )


def test_a_chat_model_learns_to_cite_and_is_asked(run, tiny, tmp_path):
    """The three commands of the README, the second one for two steps."""
    script, first = TASK / "talks.py", "python tasks/rag_docs/talks.py --retriever outputs/rag_docs"
    second = "accelerate launch tasks/chat_sft/train.py --dataset outputs/rag_talks --output_dir outputs/rag_chat"
    for command in (f"{first} --rows outputs/rag_talks", second, f"{first} --chat outputs/rag_chat"):
        assert all(command in path.read_text() for path in (TASK / "README.md", script))
    written = task_runs.command(script, "--retriever", run, "--rows", tmp_path / "rows")
    assert written.returncode == 0, written.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        asked, reply = (message["content"] for message in row["messages"])
        answer, number = re.fullmatch(r"(.+) \[([1-3])\]", reply).groups()
        cited = asked.split(f"[{number}] ")[1].split(f"[{int(number) + 1}] ")[0]
        assert answer in cited.partition("\n\n")[0], "the passage with that number holds it"
    options = {"model_name_or_path": tiny / "llama", "dataset": tmp_path / "rows", "output_dir": tmp_path / "chat"}
    options |= {"max_length": 1024, "max_steps": 2, "max_test_rows": 2, "eval_strategy": "no", "save_steps": 2}
    trained = task_runs.command(
        ROOT / "tasks" / "chat_sft" / "train.py", *(f"--{key}={value}" for key, value in options.items())
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    ran = task_runs.command(script, "--retriever", run, "--chat", tmp_path / "chat", tiny / "llama")
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((run / "talks.json").read_text())
    assert found["questions"] == 16 and found["models"] == ["chat", "llama"]
    assert found["chat_cites"] <= 100 and 0 <= found["llama_f1"] < found["first_citation_precision"] <= 100
    assert "| `chat` | `llama` | the first passage cited |" in ran.stdout and len(found["samples"]) == 10


def test_what_is_asked_must_chat(run, tiny, capsys):
    for names, said in (
        ([tiny / "gpt2"], "not a model for chat"),
        ([tiny / "llama"] * 2, "two models are called llama"),
    ):
        assert talks.main(["--retriever", str(run), "--chat", *map(str, names)]) == 2
        assert said in capsys.readouterr().err


def test_answers_go_to_their_questions(tiny_served):
    """An answer that stands in a heading alone is in no passage."""
    reader = load(tiny_served["question-answering"])
    texts = [["A red house stands in Oslo.", "Rome."], [], ["A blue house stands in Lima."]]
    found = answers.read_passages(reader, ["Which one?", "Why?", "Where?"], texts)
    assert found[1] == {"answer": ""} and found[0]["number"] in (1, 2) and found[2]["number"] == 1
    alone = reader.answer("Where?", texts[2][0])
    assert found[2]["answer"] == alone["answer"]


def known_reader(folder, dataset, tested):
    folder.mkdir()
    (folder / "run.yaml").write_text(json.dumps({"dataset": str(dataset), "max_length": 48}))
    (folder / "test.jsonl").write_text(json.dumps({"context": tested, "question": "?"}) + "\n")
    return folder


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    for name in ("splits_of", "unanswered"):
        monkeypatch.setattr(answers, name, lambda *_: {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--rows .*file/rows: cannot be made .*; name another folder"):
        answers.write_rows(tmp_path, tmp_path / "file" / "rows")


def test_a_text_with_a_line_separator_stays_one_row(tmp_path):
    rows = [{"context": f"two{mark}lines"} for mark in "\u2028\x85\x0c"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf8")
    assert answers.test_rows_of(tmp_path) == rows


def test_a_reader_that_may_know_the_texts_is_refused(run, questions, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    for name, text in (("train", "a"), ("test", "b")):
        (rows / f"{name}.jsonl").write_text(json.dumps({"context": text, "question": "?"}) + "\n")
    answers.refuse_known(known_reader(tmp_path / "good", rows, "b"), {"b", "c"})
    for name, dataset, tested, said in (
        ("one", rows, "b", "may know 1 of the 2 texts"),
        ("two", rows, "a", "is not what it was when this was trained"),
        ("three", tmp_path / "gone.jsonl", "b", "no such file"),
    ):
        known = {"a", "b"} if name == "one" else {"c"}
        with pytest.raises(UserError, match=said):
            answers.refuse_known(known_reader(tmp_path / name, dataset, tested), known)
    for name in ("test.jsonl", "run.yaml"):
        (tmp_path / "good" / name).unlink()
        with pytest.raises(UserError, match=f"no {name}"):
            answers.refuse_known(tmp_path / "good", {"c"})
    spoilt = ask(run, "--reader", known_reader(tmp_path / "spoilt", questions, "x"))
    assert (
        spoilt.returncode == 2
        and spoilt.stderr.splitlines()[-1].startswith("error: ")
        and "may know 4 of" in spoilt.stderr
    )


def test_a_retriever_whose_data_has_changed_is_refused(run, tmp_path):
    (tmp_path / "run.yaml").write_text((run / "run.yaml").read_text())
    (tmp_path / "test.jsonl").write_text((run / "test.jsonl").read_text().replace("house", "hut"))
    refused = ask(tmp_path, "--rows", tmp_path / "rows")
    assert refused.returncode == 2 and "is not what it was" in refused.stderr and not (tmp_path / "rows").exists()
