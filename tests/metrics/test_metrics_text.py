"""shared/metrics: rouge, bleu and squad give the values of their reference implementations, offline, in any script."""

import math
import os
import random
import re
import string
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rouge_score import rouge_scorer, tokenizers
from sacrebleu.metrics import BLEU

from shared import UserError, metrics
from shared.metrics.rouge.rouge import WordTokenizer
from shared.metrics.squad.squad import best_threshold, exact_match, f1, normalize_answer
from shared.publish.card import model_card
from shared.publish.compare import did_it_help

ROOT = Path(__file__).resolve().parents[2]
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
WORDS = [
    "parsers",
    "return",
    "the",
    "names",
    "of",
    "running",
    "tests",
    "and",
    "relations",
    "checked",
    "quickly",
    "skies",
]


@pytest.fixture(scope="module")
def rouge():
    return metrics.load("rouge")


@pytest.fixture(scope="module")
def bleu():
    return metrics.load("bleu")


@pytest.fixture(scope="module")
def squad():
    return metrics.load("squad")


def sentences(draw: random.Random, most: int = 4) -> list[str]:
    """Sentences of 3 to 9 words that punkt parts where we join them."""
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(3, 9))).capitalize() + "." for _ in range(draw.randint(1, most))
    ]


# ROUGE


def test_rouge_by_hand(rouge):
    found = rouge.compute(predictions=["The cat sat on the mat."], references=["The cat lay on the mat."])
    # 5 of 6 words; 3 of 5 bigrams (the cat, on the, the mat); the longest common subsequence has 5 words.
    values = {"rouge1": 500 / 6, "rouge2": 60, "rougeL": 500 / 6, "rougeLsum": 500 / 6}
    assert {name: found[name] for name in ROUGE} == pytest.approx(values)


def test_rouge_lsum_splits_sentences_on_both_sides(rouge):
    one, two = "Dr. Smith went home early.", "Nobody saw him there again."
    found = rouge.compute(predictions=[f"{one} {two}"], references=[f"{two} {one}"])
    # Ten words; in order only one sentence of five matches, sentence by sentence both do. "Dr." ends none.
    assert (found["rougeL"], found["rougeLsum"]) == pytest.approx((50, 100))
    # Union of longest common subsequences (Lin 2004, section 3.2): w1 w2 of the first and w1 w3 w5 of the second.
    predictions, references = ["One two six seven eight. One three eight nine five."], ["One two three four five."]
    found = rouge.compute(predictions=predictions, references=references)
    assert found["rougeLsum"] == pytest.approx(100 * 2 * (4 / 10) * (4 / 5) / (4 / 10 + 4 / 5))
    lines = rouge.compute(predictions=["one two\nthree four"], references=["three four\none two"])
    assert (lines["rougeL"], lines["rougeLsum"]) == pytest.approx((50, 100))  # CNN/DailyMail: a highlight a line


def test_rouge_equals_rouge_score_on_english(rouge):
    draw, scorer = random.Random(0), rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
    predictions = [sentences(draw) for _ in range(60)]
    references = [[sentences(draw) for _ in range(draw.randint(1, 3))] for _ in predictions]
    expected = [
        scorer.score_multi(["\n".join(text) for text in texts], "\n".join(prediction))
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    found = rouge.compute(
        predictions=[" ".join(text) for text in predictions],
        references=[[" ".join(text) for text in texts] for texts in references],
        per_row=True,
    )
    for name in ROUGE:
        values = [100 * score[name].fmeasure for score in expected]
        assert found["rows"][name] == pytest.approx(values)
        assert found[name] == pytest.approx(np.mean(values))
        low, high = found[f"{name}_ci95"]
        assert low < found[name] < high
    assert len({round(value, 6) for value in found["rows"]["rougeLsum"]}) > 30  # the texts do differ
    assert found["rougeL"] < found["rougeLsum"]


def test_rouge_words_are_those_of_rouge_score_where_letters_are_ascii():
    ours, theirs, draw = WordTokenizer(), tokenizers.DefaultTokenizer(use_stemmer=True), random.Random(1)
    # Punctuation, symbols and digits that are not ASCII part words as they do there.
    for text in ("don’t — “quoted” … 5½ x² €5 a\u00a0b • ①", "snake_case re-runs U.S. 3.14 dies skies", "", " \n\t"):
        assert ours.tokenize(text) == theirs.tokenize(text)
    for _ in range(500):
        text = "".join(draw.choices(string.printable, k=60)) + " ".join(draw.choices(WORDS, k=5))
        assert ours.tokenize(text) == theirs.tokenize(text)


def test_rouge_takes_the_best_reference_of_each_type(rouge):
    texts = ["the red fox", "fox red the lazy"]
    found = rouge.compute(predictions=["the red fox runs"], references=[texts])
    assert found["rouge1"] == pytest.approx(100 * 2 * 3 / (4 + 3))
    one = rouge.compute(predictions=["fox red the"], references=[texts[1]])
    assert one["rougeL"] == pytest.approx(100 * 2 * 3 / (3 + 4))
    mixed = rouge.compute(predictions=["the red fox runs", "fox red the"], references=[texts[0], texts], per_row=True)
    assert mixed["rows"]["rougeL"] == pytest.approx([600 / 7, 600 / 7])  # a string in one row, a list in the next


def test_rouge_of_vietnamese(rouge):
    prediction, reference = "Hội An là phố cổ.", "Hội An là thành phố cổ."
    found = rouge.compute(predictions=[prediction], references=[reference])
    assert (found["rouge1"], found["rouge2"]) == pytest.approx((1000 / 11, 600 / 9))
    apart = rouge.compute(predictions=[unicodedata.normalize("NFD", prediction)], references=[reference])
    assert apart == found
    assert rouge.compute(predictions=["má"], references=["mạ"])["rouge1"] == 0  # rouge-score itself: m = m
    assert rouge_scorer.RougeScorer(["rouge1"]).score("má", "mạ")["rouge1"].fmeasure == 1


def test_rouge_of_other_scripts(rouge):
    chinese = rouge.compute(predictions=["今天天气很好。我去公园。"], references=["我去公园。今天天气不好。"])
    assert chinese["rouge1"] == pytest.approx(90)  # 9 of 10 characters
    assert chinese["rougeLsum"] == pytest.approx(90) and chinese["rougeL"] == pytest.approx(50)
    tokenize = WordTokenizer().tokenize
    assert tokenize("हिन्दी भाषा।") == ["हिन्दी", "भाषा"]  # vowel signs are marks, not letters
    assert tokenize("Ёлки, ПАЛКИ 24") == ["ёлки", "палки", "24"]
    assert tokenize("GPT-2は便利") == ["gpt", "2", "は", "便", "利"]
    assert tokenize("ที่นี่") == ["ที่", "นี่"]


# BLEU


def test_bleu_by_hand(bleu):
    found = bleu.compute(predictions=["the cat sat on the mat"] * 3, references=["the cat lay on the mat"] * 3)
    # Summed over rows: 15/18 words, 9/15 bigrams, 3/12 trigrams, 0/9 of order 4, which "exp" counts as 1/2.
    value = 100 * (15 / 18 * 9 / 15 * 3 / 12 * 0.5 / 9) ** 0.25
    assert found["bleu"] == pytest.approx(value)
    assert found["bleu_ci95"] == pytest.approx([value, value])  # equal rows: every draw is the corpus
    assert found["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_penalises_brevity_against_the_closest_reference(bleu):
    found = bleu.compute(predictions=["a b c d"], references=[["a b c d e f", "x y z w v u t s r"]])
    assert found["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_bleu_sums_over_the_corpus_and_takes_ragged_references(bleu):
    draw = random.Random(2)
    references = [[" ".join(sentences(draw)) for _ in range(draw.randint(1, 3))] for _ in range(80)]
    predictions = [" ".join(draw.choice(texts).split()[: draw.randint(4, 20)]) for texts in references]
    predictions[7] = ""
    found = bleu.compute(predictions=predictions, references=references)
    # A reference given twice changes nothing, so the ragged lists equal these, which need no None.
    even = list(
        zip(*[(texts * 3)[:3] if len(texts) == 1 else (texts + texts[:1])[:3] for texts in references], strict=True)
    )
    score = BLEU().corpus_score(predictions, even, n_bootstrap=2000)
    assert found["bleu"] == pytest.approx(score.score)
    assert "nrefs:var" in found["signature"]
    low, high = found["bleu_ci95"]
    assert low < found["bleu"] < high
    assert (low, high) == pytest.approx((score._mean - score._ci, score._mean + score._ci), abs=0.15 * (high - low))


@pytest.mark.parametrize("name", ["rouge", "bleu"])
def test_all_empty_predictions_score_zero(name, request):
    found = request.getfixturevalue(name).compute(
        predictions=["", "", ""], references=["One two.", ["three"], ["", "x"]]
    )
    assert {value for key, value in found.items() if key in (*ROUGE, "bleu")} == {0}
    assert {tuple(value) for key, value in found.items() if key.endswith("_ci95")} == {(0, 0)}


# SQuAD


def official_normalization(text):
    """By its description: lower case, no ASCII punctuation, no a, an, the as words, single spaces."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(word for word in re.sub(r"\b(?:the|an|a)\b", " ", kept).split())


def official_scores(answers, prediction):
    """Exact match and F1 of one question, step by step as in evaluate-v2.0.py."""
    golds = [answer for answer in answers if official_normalization(answer)] or [""]
    exact, best = 0, 0.0
    for gold in golds:
        ours, theirs = official_normalization(prediction).split(), official_normalization(gold).split()
        exact = max(exact, int(ours == theirs))
        if not ours or not theirs:
            best = max(best, float(ours == theirs))
            continue
        same = sum(min(count, Counter(theirs)[word]) for word, count in Counter(ours).items())
        if same:
            precision, recall = same / len(ours), same / len(theirs)
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


def official_sweep(raw, predictions, scores, has_answer):
    """find_best_thresh: from "no answer at all" on, one question after the other is answered."""
    now = best = sum(not has for has in has_answer)
    threshold = 0.0
    for row in sorted(range(len(scores)), key=lambda row: scores[row]):
        now += raw[row] if has_answer[row] else (-1 if predictions[row] else 0)
        if now > best:
            best, threshold = now, scores[row]
    return 100 * best / len(scores), threshold


def at_threshold(raw, scores, has_answer, threshold):
    rows = zip(raw, scores, has_answer, strict=True)
    return [float(not has) if score > threshold else value for value, score, has in rows]


def random_questions(seed, rows=120):
    draw = random.Random(seed)
    words = ["the", "The", "a", "an", "cat", "Cat,", "U.S.", "dog's", "dog", "--", "5", "theme", "Huế", "“so”", "x-ray"]
    text = lambda most: " ".join(draw.choices(words, k=draw.randint(1, most)))  # noqa: E731
    references = [[text(4) for _ in range(draw.randint(1, 4))] if draw.random() < 0.7 else [] for _ in range(rows)]
    predictions = [draw.choice([text(4), "cat", *answers, ""]) for answers in references]
    scores = [draw.betavariate(2, 4) if answers else draw.betavariate(4, 2) for answers in references]
    return predictions, references, scores


@pytest.mark.parametrize("seed", range(5))
def test_squad_equals_the_official_script(squad, seed):
    predictions, references, scores = random_questions(seed)
    # A prediction of nothing but articles for a question without answer: the sweep of the script counts it as wrong,
    # its scores as right. Ours is right in both; left out here.
    predictions = [text if official_normalization(text) else "" for text in predictions]
    has_answer = [bool(answers) for answers in references]
    expected = np.array([official_scores(*row) for row in zip(references, predictions, strict=True)])
    found = squad.compute(predictions=predictions, references=references, no_answer_scores=scores, per_row=True)
    for column, name in enumerate(("exact_match", "f1")):
        raw = expected[:, column]
        assert found["rows"][name] == pytest.approx(list(100 * raw))
        assert found[name] == pytest.approx(100 * raw.mean())
        assert found[f"has_answer_{name}"] == pytest.approx(100 * raw[np.array(has_answer)].mean())
        assert found[f"no_answer_{name}"] == pytest.approx(100 * raw[~np.array(has_answer)].mean())
        value, threshold = official_sweep(raw, predictions, scores, has_answer)
        threshold_name = {"f1": "best_threshold"}.get(name, "best_exact_match_threshold")
        assert (found[f"best_{name}"], found[threshold_name]) == pytest.approx((value, threshold))
    assert len(set(found["rows"]["f1"])) > 5 and 0 < found["best_threshold"] < 1
    # The threshold chosen above, applied: the value promised, and the script's apply_no_ans_threshold row by row.
    threshold = found["best_threshold"]
    given = squad.compute(
        predictions=predictions, references=references, no_answer_scores=scores, threshold=threshold, per_row=True
    )
    assert given["f1"] == pytest.approx(found["best_f1"])
    assert given["rows"]["f1"] == pytest.approx(
        [100 * x for x in at_threshold(expected[:, 1], scores, has_answer, threshold)]
    )
    assert given["has_answer_f1"] <= found["has_answer_f1"] and given["no_answer_f1"] > found["no_answer_f1"]


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better_than_the_best(seed):
    draw = random.Random(seed)
    rows = draw.randint(1, 12)
    raw = [draw.choice([0, 0.4, 1]) for _ in range(rows)]
    scores = [draw.choice([-2.5, -1.0, 0.0, 0.0, 0.5, 3.0]) for _ in range(rows)]  # differences of scores, with ties
    has_answer = np.array([draw.random() < 0.6 for _ in range(rows)])
    value, threshold = best_threshold([100 * x for x in raw], scores, has_answer)
    reached = {t: 100 * np.mean(at_threshold(raw, scores, has_answer, t)) for t in (*scores, min(scores) - 1)}
    assert value == pytest.approx(max(reached.values()))
    assert 100 * np.mean(at_threshold(raw, scores, has_answer, threshold)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat\n sat.", "cat sat"),
        ("an apple, a pear & the fig!", "apple pear fig"),
        ("theatre another banana", "theatre another banana"),  # articles are whole words
        ("U.S.A.", "usa"),
        ("a.", ""),
        ("", ""),
        ("“so”", "“so”"),  # only ASCII punctuation, as in the official script
        (unicodedata.normalize("NFD", "Đường Huế"), "đường huế"),
    ],
)
def test_normalized_answers(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("gold", "answer", "exact", "overlap"),
    [
        ("the Eiffel Tower", "Eiffel tower.", 1, 1),
        ("Eiffel Tower", "the old Eiffel Tower in Paris", 0, 2 * 2 / (2 + 5)),
        ("no no yes", "no", 0, 2 * 1 / (1 + 3)),  # a word counts as often as both have it
        ("cat", "dog", 0, 0),
        ("cat", "", 0, 0),
        ("", "cat", 0, 0),
        ("", "", 1, 1),
        ("", "the", 1, 1),
        ("thành phố Huế", unicodedata.normalize("NFD", "Thành phố Huế,"), 1, 1),
        ("má", "mạ", 0, 0),
        ("Hội An là phố cổ", "phố cổ Hội An", 0, 2 * 3 / (3 + 4)),  # "an" goes as an English article, on both sides
    ],
)
def test_answers_by_hand(gold, answer, exact, overlap):
    assert (exact_match(gold, answer), f1(gold, answer)) == pytest.approx((exact, overlap))


def test_squad_1_takes_the_best_gold_answer_and_has_no_other_keys(squad):
    references = [["Denver Broncos", "The Broncos"], ["1969", "in 1969"]]
    found = squad.compute(predictions=["broncos", "on 1969"], references=references)
    assert (found["exact_match"], found["f1"]) == pytest.approx((50, 100 * (1 + 2 / 3) / 2))
    assert set(found) == {"exact_match", "exact_match_ci95", "f1", "f1_ci95"}


def test_squad_without_answers(squad):
    found = squad.compute(predictions=["", "", ""], references=[["x"], [], [""]])
    assert (found["exact_match"], found["has_answer_f1"], found["no_answer_f1"]) == pytest.approx((200 / 3, 0, 100))
    none = squad.compute(predictions=["", "x"], references=[[], []])
    assert none["no_answer_exact_match"] == 50 and "has_answer_f1" not in none
    article = squad.compute(predictions=[""], references=[["The"]])  # a gold answer that normalises to nothing
    assert article["exact_match"] == 100 and "no_answer_f1" not in article


def test_squad_says_what_is_wrong_with_scores(squad):
    rows = {"predictions": ["a", "b"], "references": [["a"], []]}
    for scores, error, words in (
        ([0.5], ValueError, "one no-answer score a row, 2"),
        ([0.5, float("nan")], UserError, "row 1 is nan"),
    ):
        with pytest.raises(error, match=words):
            metrics.load("squad").compute(**rows, no_answer_scores=scores)
    with pytest.raises(ValueError, match="needs no_answer_scores"):
        metrics.load("squad").compute(**rows, threshold=0.5)


# All three


@pytest.mark.parametrize("name", ["rouge", "bleu", "squad"])
@pytest.mark.parametrize(
    ("predictions", "references", "error", "words"),
    [
        ([], [], UserError, "split empty"),
        (["a"], [["b"], ["c"]], ValueError, r"predictions \(1\) and references \(2\)"),
        (["a", "b"], [["b"]], ValueError, r"predictions \(2\) and references \(1\)"),
    ],
)
def test_what_can_not_be_scored_is_an_error(name, predictions, references, error, words):
    with pytest.raises(error, match=words):
        metrics.load(name).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("name", ["rouge", "bleu"])
def test_a_row_without_reference_is_named(name):
    with pytest.raises(UserError, match="Row 1 has no reference"):
        metrics.load(name).compute(predictions=["a", "b"], references=["a", []])


@pytest.mark.parametrize("name", ["rouge", "bleu", "squad"])
def test_batches_and_repetition_change_nothing(name, request):
    metric, (predictions, references, _) = request.getfixturevalue(name), random_questions(9, rows=40)
    references = [answers or ["none"] for answers in references]
    found = metric.compute(predictions=predictions, references=references)
    for start in (0, 25):
        stop = start + 25
        metric.add_batch(predictions=predictions[start:stop], references=references[start:stop])
    assert metric.compute() == found
    assert sum(key.endswith("_ci95") for key in found) == {"rouge": 4, "bleu": 1, "squad": 2}[name]
    for key in found:
        if key.endswith("_ci95"):
            low, high = found[key]
            assert 0 <= low < found[key.removesuffix("_ci95")] < high <= 100


def test_rows_serve_the_comparison(rouge, squad):
    references = [f"One row has {i} and {i * 3} words." for i in range(40)]
    base = rouge.compute(predictions=["Nothing."] * 40, references=references, per_row=True)
    trained = rouge.compute(predictions=references, references=references, per_row=True)
    found = did_it_help(base["rows"], trained["rows"], "rougeL")
    assert found["line"].startswith("Did it help? Yes: test rougeL 0.0") and found["rougeL_difference"] == 100
    rows = squad.compute(predictions=["x"] * 40, references=[[text] for text in references], per_row=True)["rows"]
    assert did_it_help(rows, rows, "f1")["line"].startswith("Did it help? No")


def test_no_connection_and_no_download(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise SystemExit('a connection was tried')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import evaluate, sys\n"
        "for name, key in (('rouge', 'rougeLsum'), ('bleu', 'bleu'), ('squad', 'f1')):\n"
        "    metric = evaluate.load(f'{sys.argv[1]}/{name}', keep_in_memory=True)\n"
        "    text = 'Dr. Smith is here. He sat.'\n"
        "    print(round(metric.compute(predictions=[text], references=[[text]])[key]))\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "NLTK_DATA": str(tmp_path), "HOME": str(tmp_path)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_EVALUATE_OFFLINE": "0"}  # allowed to connect, and does not
    command = [sys.executable, "-c", code, str(ROOT / "shared" / "metrics")]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == ["100", "100", "100"], run.stderr


def test_the_card_names_them_and_leaves_thresholds_out():
    names = ("exact_match", "f1", "has_answer_exact_match", "has_answer_f1", "no_answer_exact_match", "no_answer_f1")
    results = {f"test_{name}": 50.0 for name in (*names, *ROUGE, "bleu", "best_f1", "best_exact_match")}
    results |= {"test_best_threshold": 0.31, "test_best_exact_match_threshold": 0.42, "test_f1_ci95": [48.0, 52.0]}
    facts = {"title": "t", "base_model": "org/base", "hub_base": None, "dataset": "org/data", "license": None}
    facts |= {"library": "transformers", "pipeline": "question-answering", "metrics": results, "line": "Did it help?"}
    card = model_card(**facts, training={}, preflight={}, samples=[], usage="", limits="", loss_plot=False)
    assert "| F1 of questions without an answer |" in card and "| F1 | 50.0 (48.0 to 52.0) |" in card
    assert "hreshold |" not in card and "0.31" not in card and "0.42" not in card
    assert card.index("| Exact match |") < card.index("| F1 |") < card.index("| F1 of questions with an answer |")
