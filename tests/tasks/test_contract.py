"""What holds for every task: steps that do not depend on how their rows are split, what a resume refuses, shuffled splits, a loss
for the shortest run. Tiny models with random weights, rows of unequal length."""

import csv
import gzip
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import task_runs
import transformers
from checkout import ROOT, train_script
from datasets import Dataset, DatasetDict
from products import Products
from safetensors import SafetensorError
from safetensors.numpy import load_file
from streamlit.testing.v1 import AppTest

from shared import UserError
from shared.compare.readme import FIGURES
from shared.training import launch
from shared.training.arguments import parse
from shared.training.checkpoints import seconds_trained, write_manifest
from shared.training.identity import fingerprint, run_identity

PLAIN = "transformers.training_args:TrainingArguments"
TRAINING = dict.fromkeys(("pretrain_gpt2", "mlm_bert", "classify_bert", "qa_squad", "rag_docs"), PLAIN)
TRAINING |= {"chat_sft": "trl.trainer.sft_config:SFTConfig", "dpo_chat": "trl.trainer.dpo_config:DPOConfig"}
TRAINING |= {"summarize_t5": "transformers.training_args_seq2seq:Seq2SeqTrainingArguments"}
TASKS = sorted(TRAINING)
SETTINGS = {
    "pretrain_gpt2": {"vocab_size": 300, "block_length": 32, "optimizer": "adamw"},
    "mlm_bert": {"max_length": 32, "dropout": 0.0},
    "classify_bert": {"max_length": 32, "min_label_rows": 2},
    "qa_squad": {"max_length": 48, "doc_stride": 8, "dropout": 0.0},
    "rag_docs": {"max_length": 48, "group_size": 2, "dropout": 0.0},
    "chat_sft": {"max_length": 256},
    "dpo_chat": {"max_length": 256},
    "summarize_t5": {"max_source_length": 48, "max_target_length": 8},
}


def words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choice(("red", "green", "blue", "white", "black")) for _ in range(draw.randint(least, most)))


def make_rows(task: str, count: int, changed: bool = False) -> list[dict]:
    """Rows of very unequal length; `changed`, the same with other targets."""
    rows, draw = [], random.Random(1)
    for i in range(count):
        text, colour = f"Number {i} {i * 7919} {words(draw, 1, 25)}", ("red", "green")[(i + changed) % 2]
        rows.append(
            {
                "chat_sft": {"question": text, "answer": f"{colour} {words(draw, 1, 12)}"},
                "classify_bert": {"text": text, "label": colour},
                "dpo_chat": {
                    "prompt": text,
                    "chosen": f"{colour} {words(draw, 1, 12)}",
                    "rejected": words(draw, 1, 12),
                },
                "mlm_bert": {"text": text},
                "pretrain_gpt2": {"text": text},
                "qa_squad": {"context": f"{text} red green", "question": f"Which is {i}?", "answers": f"{i * 7919}"},
                "rag_docs": {"context": f"{text} {colour}", "question": f"Which is {i}?", "answers": f"{i * 7919}"},
                "summarize_t5": {"document": text, "summary": f"{colour} {i}"},
            }[task]
        )
        if task == "qa_squad" and changed:
            rows[-1]["answers"] = f"Number {i} {i * 7919}"
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny, tiny_bert):
    """Folders of models that drop nothing, by task: two processes draw other numbers than one."""
    from argparse import Namespace

    from seq2seq_models import load_model, load_tokenizer
    from transformers import Seq2SeqTrainingArguments

    folder = tmp_path_factory.mktemp("models")
    texts = (text for row in make_rows("summarize_t5", 60) for text in row.values())
    tokenizer = load_tokenizer(None, texts, 300)
    sizes = Namespace(scratch_width=64, max_target_length=8, max_source_length=48)
    t5 = load_model(None, tokenizer, sizes, Seq2SeqTrainingArguments(output_dir=str(folder), bf16=False, use_cpu=True))
    for part in (t5, tokenizer):
        part.save_pretrained(folder / "dropping_t5")
    t5 = task_runs.without_dropout(folder / "dropping_t5", folder / "t5")
    bert = task_runs.without_dropout(tiny_bert, folder / "bert")
    return {"chat_sft": tiny / "llama", "dpo_chat": tiny / "llama", "summarize_t5": t5} | dict.fromkeys(
        ("mlm_bert", "classify_bert", "qa_squad", "rag_docs"), bert
    )


@pytest.fixture(scope="module")
def argv(tmp_path_factory, models):
    """`argv(task, output, rows=..., **options)`: the flags of a short run."""
    folder = tmp_path_factory.mktemp("rows")

    def flags(task: str, output, rows: list[dict] | None = None, name: str = "rows.jsonl", **options) -> list[str]:
        path = folder / task / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows or make_rows(task, 60))))
        options = (
            SETTINGS[task]
            | {
                "dataset": path,
                "output_dir": output,
                "max_steps": 2,
                "warmup_steps": 0,
                "logging_steps": 50,
                "eval_strategy": "no",
                "save_strategy": "no",
                "max_test_rows": 3,
                "train_sampling_strategy": "random",
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "learning_rate": 0.01,
                # nearly plain gradient descent: Adam's own division would blow up what differs in the last bit
                "adam_epsilon": 1.0,
                "lr_scheduler_type": "constant",
            }
            | options
        )
        if task in models:
            options = {"model_name_or_path": models[task]} | options
        columns = ["--columns", "text=text", "label=label"] if task == "classify_bert" else []
        return [f"--{key}={value}" for key, value in options.items()] + columns

    return flags


def weights(run) -> dict[str, np.ndarray]:
    return load_file(next(run.glob("*model.safetensors")))


def assert_page_of(run, monkeypatch):
    """deploy/ shows what the run left: verdict, metrics before training, of a baseline and after, cost, loss, samples."""
    monkeypatch.setenv("TASKBOOK_MODELS", str(run))
    page = AppTest.from_file(ROOT / "deploy" / "app.py", default_timeout=60)
    page.query_params["page"] = "model"
    page.run()
    assert not page.exception and not page.error, page.error
    assert len(page.success) + len(page.warning) == 1
    metrics = page.table[0].value
    assert {"before", "trained"} < set(metrics) and len(set(metrics)) > 3, "a baseline stands between them"
    assert all(metrics["trained"]) and metrics["trained"].str.contains(" to ").any(), "intervals"
    assert [each.label for each in page.metric] == ["Training", "Whole run", "Peak memory", "Device hours"]
    assert "CPU" in page.caption[1].value.replace("\\", "") and len(page.get("image")) == 1
    assert [each.label for each in page.expander][-2:] == ["Settings of the run", "Card"] and len(page.expander) > 2
    assert {"Before", "After"} <= {each.value for each in page.caption}


@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_the_same_however_its_rows_are_split(task, argv, tmp_path, monkeypatch):
    """8 x 1 = 2 x 4 = two processes of 4 = two with half of the model each (FSDP): loss, gradient norm, weights. 3 test rows in 2
    processes. The run is shorter than `logging_steps` and is not evaluated, and has a loss and a card all the same."""
    script = ROOT / "tasks" / task / "train.py"
    bars = {"disable_tqdm": False}
    one = task_runs.command(script, *argv(task, tmp_path / "one", **bars))
    for name in ("two", "sharded"):
        flags = argv(task, tmp_path / name, per_device_train_batch_size=4, **bars)
        two = task_runs.in_two_processes(task, flags, name == "sharded")
        task_runs.assert_like_one(two, one, tmp_path, name)
        assert name == "two" or "holds 0.5" in two.stdout
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    many = task_runs.command(script, *argv(task, tmp_path / "many", **split))
    assert many.returncode == 0, many.stderr[-3000:]
    again = task_runs.command(script, *argv(task, tmp_path / "many", **split))
    assert again.returncode == 0 and "Did it help?" in again.stdout, again.stderr[-3000:]
    assert "This run is finished" in again.stdout and "train_runtime" not in again.stdout, again.stdout
    results = json.loads((tmp_path / "many" / "all_results.json").read_text())
    shown = set(FIGURES[task]) - {"baseline_silent_f1"}  # where questions have no answer: tests/tasks/test_qa_squad.py
    assert results.keys() >= shown, "the READMEs' table shows figures that this run has not"
    found = results["run"]
    assert (found["task"], found["data"], found["steps"], found["processes"]) == (task, "rows.jsonl", 2, 1), found
    assert found["test_rows_sha256"] and found["hardware"] and found["date"] and str(tmp_path) not in json.dumps(found)
    compared = task_runs.command("-m", "shared.compare", tmp_path / "one", tmp_path / "many")
    assert compared.returncode == 0 and "| one" in compared.stdout and "paired test over" in compared.stdout, compared
    if task != "rag_docs":  # an encoder alone answers nothing: the page offers no run of it
        assert_page_of(tmp_path / "one", monkeypatch)
    history = json.loads((tmp_path / "one" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [2] and (tmp_path / "one" / "README.md").exists()
    for name in ("many", "two", "sharded"):
        other = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        for key in ("loss", "grad_norm"):
            assert other[0][key] == pytest.approx(history[0][key], rel=2e-4), (name, key)
        for key, value in weights(tmp_path / "one").items():
            np.testing.assert_allclose(
                weights(tmp_path / name)[key], value, rtol=1e-3, atol=2e-6, err_msg=f"{name} {key}"
            )


@pytest.mark.parametrize("task", ["classify_bert", "summarize_t5"])
def test_the_last_step_of_an_epoch_has_the_same_rows_in_two_processes(task, argv, tmp_path):
    """43 rows, 10 a step: three are left for the fifth step, and none is trained twice."""
    whole = {"max_steps": -1, "num_train_epochs": 2, "logging_steps": 1, "max_train_rows": 43}
    one = task_runs.command(
        ROOT / "tasks" / task / "train.py", *argv(task, tmp_path / "one", per_device_train_batch_size=10, **whole)
    )
    assert one.returncode == 0, one.stderr[-3000:]
    two = task_runs.in_two_processes(task, argv(task, tmp_path / "two", per_device_train_batch_size=5, **whole))
    assert two.returncode == 0, two.stderr[-3000:]
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")]
    first, second = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert len(first) == 10 and second == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize(("task", "count"), [("qa_squad", "windows"), ("rag_docs", "groups")])
def test_rows_of_a_small_last_micro_batch_count_like_the_others(task, count, argv, tmp_path):
    """The last step of an epoch, whose rows do not fill its micro-batches: its loss and gradient are those of one batch."""
    logged = {}
    for name, micro, accumulation in (("one", 15, 1), ("many", 5, 3)):
        split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        split |= {"max_steps": -1, "num_train_epochs": 1, "logging_steps": 1, "learning_rate": 0.0}
        done = task_runs.command(
            ROOT / "tasks" / task / "train.py", *argv(task, tmp_path / name, make_rows(task, 72), **split)
        )
        assert done.returncode == 0, done.stderr[-3000:]
        logged[name] = [task_runs.logged(tmp_path / name, key) for key in ("loss", "grad_norm")]
    rows = json.loads((tmp_path / "one" / "preflight.json").read_text())[count]
    assert rows % 15 > 5 and rows % 15 % 5, f"{rows} {count}: the last step has full micro-batches only, or one"
    for one, many in zip(logged["one"], logged["many"], strict=True):
        assert many == pytest.approx(one, rel=1e-4)


def test_the_cost_of_a_run_is_that_of_all_its_parts(argv, tmp_path):
    """Stopped after its first checkpoint, resumed, then evaluated on more rows: time and steps are those of the whole."""
    script, run = ROOT / "tasks" / "mlm_bert" / "train.py", tmp_path / "run"
    options = {"max_steps": 40, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 20}
    flags = argv("mlm_bert", run, **options)
    assert task_runs.interrupt(script, flags, run, 4, signal.SIGKILL) == -signal.SIGKILL
    state = max(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    before = seconds_trained(json.loads(state.read_text())["log_history"])
    assert task_runs.command(script, *flags).returncode == 0
    first = json.loads((run / "all_results.json").read_text())
    last = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in last if "eval_loss" in entry] == [0, 20, 40]
    session = next(entry["train_runtime"] for entry in last if "train_runtime" in entry)
    assert seconds_trained(last) > session + 0.5 * before > session
    assert first["train_minutes"] == pytest.approx(seconds_trained(last) / 60, abs=0.01)
    newest = run / "checkpoint-40"
    state = json.loads((newest / "trainer_state.json").read_text())
    state["log_history"].append({"step": 40, "seconds_trained": 6000.0})  # as if it had taken longer than anything else
    (newest / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(newest, json.loads((newest / "manifest.json").read_text())["identity"])
    more = task_runs.command(script, *argv("mlm_bert", run, **options, max_test_rows=5))
    assert more.returncode == 0 and "This run is finished" not in more.stdout, more.stderr[-3000:]
    second = json.loads((run / "all_results.json").read_text())
    # Without the seconds after the last checkpoint, which the second command does not know of.
    assert second["test_rows"] == 5 and second["train_minutes"] > 0.5 * first["train_minutes"]
    assert second["run_minutes"] > second["train_minutes"] >= 100
    assert second["device_hours"] == pytest.approx(second["train_minutes"] / 60, abs=3e-4)


def test_a_run_is_not_finished_for_other_test_rows(tmp_path):
    """The same file elsewhere is the same data; other test rows under the same name are not."""
    run_args = SimpleNamespace(
        identity={"rows": "the same"}, resolved={"output_dir": "a", "dataset": str(tmp_path / "mine")}
    )
    (tmp_path / "mine").mkdir()
    for name in ("train", "test"):
        (tmp_path / "mine" / f"{name}.csv").write_text("text\nred\n")
    before = fingerprint(run_args)
    (tmp_path / "mine").rename(tmp_path / "moved")
    run_args.resolved |= {"dataset": str(tmp_path / "moved"), "output_dir": "b"}
    assert fingerprint(run_args) == before
    (tmp_path / "moved" / "test.csv").write_text("text\nblue\n")
    assert fingerprint(run_args) != before
    run_args.resolved |= {"dataset": "pypi:chitchat", "test_file": str(tmp_path / "moved" / "test.csv")}
    before = fingerprint(run_args)
    (tmp_path / "moved" / "test.csv").write_text("text\ngreen\n")
    assert fingerprint(run_args) != before


class Begun(Exception):
    """Raised where training would begin."""


def test_a_run_is_finished_with_its_card_and_until_another_one_begins_in_its_folder(argv, tmp_path, monkeypatch):
    def run(**options):
        module = train_script("classify_bert")
        flags = argv("classify_bert", tmp_path / "run", **options)
        module.main(*parse(module.ScriptArguments, PLAIN, flags))

    def stop(*args, **kwargs):
        raise Begun

    with monkeypatch.context() as killed, pytest.raises(Begun):
        killed.setattr("shared.publish.card.write_card", stop)
        run()
    assert not (tmp_path / "run" / "all_results.json").exists()
    run()
    assert (tmp_path / "run" / "README.md").exists() and (tmp_path / "run" / "all_results.json").exists()
    monkeypatch.setattr("shared.training.checkpoints.train", stop)
    with pytest.raises(SystemExit):
        run()
    with pytest.raises(Begun):
        run(learning_rate=0.5, resume="never")
    with pytest.raises(Begun):  # what lies there may be the other one's
        run()


@pytest.fixture
def identity_of(argv, tmp_path, monkeypatch):
    """The identity that a run would have, without training."""

    def identity(task: str, **options) -> dict:
        module, found = train_script(task), []

        def begin(args, run_args, preflight, identity):
            found.append(identity)
            raise Begun

        monkeypatch.setattr(module, "begin", begin)
        with pytest.raises(Begun):
            module.main(*parse(module.ScriptArguments, TRAINING[task], argv(task, tmp_path / "run", **options)))
        return found[0]

    return identity


@pytest.mark.parametrize("task", TASKS)
def test_a_resume_knows_its_rows_and_their_targets_and_not_their_path(task, identity_of):
    rows = make_rows(task, 60)
    before = identity_of(task)
    assert identity_of(task, rows=rows, name="moved.jsonl") == before
    other = make_rows(task, 60, changed=True) if task not in ("mlm_bert", "pretrain_gpt2") else make_rows(task, 61)
    assert identity_of(task, rows=other)["rows"] != before["rows"]


@pytest.mark.parametrize(
    ("task", "options", "change", "name"),
    [
        ("chat_sft", {"method": "lora"}, {"load_in_4bit": "true"}, "method"),
        ("summarize_t5", {"model_name_or_path": "", "scratch_width": 64}, {"scratch_width": 128}, "scratch width"),
    ],
)
def test_a_resume_knows_what_else_its_model_is_made_of(task, options, change, name, identity_of):
    before, after = identity_of(task, **options), identity_of(task, **options | change)
    assert {key for key in after if before.get(key) != after[key]} == {name}


@pytest.mark.parametrize(
    "change",
    [
        {"adam_beta1": 0.8},
        {"adam_beta2": 0.9},
        {"max_grad_norm": 0.5},
        {"label_smoothing_factor": 0.1},
        {"bf16": True},
        {"train_sampling_strategy": "sequential"},
        {"learning_rate": 0.5},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_resume_with_other_settings_is_refused_with_both_values(change, tmp_path):
    from shared.training.checkpoints import find_checkpoint, write_manifest

    def identity(**options):
        flags = {"output_dir": tmp_path, "use_cpu": True, "bf16": False, "per_device_train_batch_size": 8} | options
        module = train_script("classify_bert")
        _, args, run_args = parse(module.ScriptArguments, PLAIN, [f"--{name}={value}" for name, value in flags.items()])
        return run_identity(args, run_args, rows="the same")

    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "rng_state.pth").write_text("state")
    (checkpoint / "trainer_state.json").write_text("{}")
    write_manifest(checkpoint, identity())
    harmless = {
        "output_dir": tmp_path / "x",
        "logging_steps": 7,
        "eval_steps": 9,
        "save_steps": 9,
        "disable_tqdm": True,
    }
    harmless |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    assert find_checkpoint(tmp_path, "auto", identity(**harmless)) == checkpoint
    name, before = next(iter(change)), identity()
    shown = "rows of a step" if name == "gradient_accumulation_steps" else name.replace("_", " ")
    after = identity(**change)
    with pytest.raises(UserError, match=f"{shown}: {before[shown]} then, {after[shown]} now") as refused:
        find_checkpoint(tmp_path, "auto", after)
    assert str(refused.value).count(" then, ") == 1 and before[shown] != after[shown]


@pytest.mark.parametrize("task", TASKS)
def test_official_splits_are_shuffled(task, argv, tmp_path, monkeypatch):
    """`--max_test_rows 5` of a sorted file must not be five rows of one kind."""
    rows = make_rows(task, 200)
    for i, row in enumerate(rows):
        key = next(iter(row))
        row[key] = f"{'early' if i < 100 else 'late'} {row[key]}"
    data = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[::2]))
    data["validation"] = Dataset.from_list(rows[1::4])
    data.save_to_disk(tmp_path / "sorted")
    module = train_script(task)
    flags = argv(task, tmp_path / "run", dataset=tmp_path / "sorted")
    script_args, args, run_args = parse(module.ScriptArguments, TRAINING[task], flags)
    if task == "pretrain_gpt2":
        from documents import load_documents as load
    else:
        load = getattr(module, "load_rows", None) or module.load_documents
    splits = load(script_args, run_args, args.seed)[0] if task == "classify_bert" else load(run_args, args.seed)[0]
    for split in ("train", "validation", "test"):
        first = [json.dumps(row) for row in splits[split].select(range(20))]
        assert 2 < sum("early" in row for row in first) < 18, split


def test_an_output_folder_belongs_to_one_run(tmp_path):
    hold = "import sys, filelock as f; a = f.FileLock(sys.argv[1]); a.acquire(); print('held', flush=True); sys.stdin.read()"
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", hold, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing to it"):
            launch._claim(tmp_path / "run")
    launch._claim(tmp_path / "run").release()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        launch._claim(tmp_path / "file" / "run")


def test_a_disk_that_is_full_at_the_end_is_one_line(monkeypatch, capsys):
    """What writes weights raises no OSError."""

    def write():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(launch, "parse", lambda *given: ())
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        launch.run(write, None, "")
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: the disk is full.")


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (["--traceback"], True),
        (["--traceback=true", "--dry_run"], True),
        (["--traceback", "true"], True),
        (["--traceback", "--dry_run"], True),
        (["--traceback=false"], False),
        (["--dry_run"], False),
    ],
)
def test_a_traceback_is_shown_where_it_is_asked_for(argv, asked, monkeypatch, capsys):
    def fail(*_):
        raise UserError("wrong")

    monkeypatch.setattr(launch, "parse", fail)
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(UserError if asked else SystemExit):
        launch.run(None, None, "")


@pytest.mark.parametrize("task", TASKS)
def test_a_step_in_half_precision_computes_in_it(task, argv, tmp_path, monkeypatch):
    """Autocast covers a model's forward only: what a trainer multiplies outside of it runs in fp32 unless it says so."""

    class Done(Exception):
        pass

    step = transformers.Trainer.training_step

    def counted(self, *given, **named):
        with Products() as products:
            step(self, *given, **named)
        raise Done(products)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)
    module, options = train_script(task), {"bf16": True, "use_cpu": True, "disable_tqdm": True}
    if task == "pretrain_gpt2":
        options["tokenizer"] = "pypi:gpt2-tokenizer"  # a head as large as it really is
    with pytest.raises(Done) as done:
        module.main(*parse(module.ScriptArguments, TRAINING[task], argv(task, tmp_path, **options)))
    products = done.value.args[0]
    assert products.half() >= 0.95, products.flops


def refusal(task: str, argv, output, **options) -> str:
    """What a run is refused with."""
    module = train_script(task)
    with pytest.raises(UserError) as stopped:
        module.main(*parse(module.ScriptArguments, TRAINING[task], argv(task, output, **options)))
    return str(stopped.value)


@pytest.mark.parametrize("task", TASKS)
def test_a_file_that_is_none_is_one_line(task, argv, tmp_path):
    lines = [json.dumps(row) for row in make_rows(task, 40)]
    table = ",".join(make_rows(task, 1)[0]) + "\n"
    files = {
        "bad.jsonl": ("\n".join([*lines[:20], "{oops}", *lines[20:]]).encode(), "line 21: not JSON"),
        "empty.jsonl": (b"", "holds no row"),
        "empty.csv": (b"", "no header in its first line"),
        "header.csv": (table.encode(), "holds no row"),
        "cut.jsonl.gz": (gzip.compress("\n".join(lines).encode())[:-30], "cannot be read"),
        "named.csv.gz": (b"text,label\n", "holds no row"),  # its content counts
    }
    for name, (content, said) in files.items():
        (tmp_path / name).write_bytes(content)
        line = refusal(task, argv, tmp_path / "run", dataset=tmp_path / name)
        assert said in line and str(tmp_path / name) in line and "\n" not in line.strip(), (name, line)


@pytest.mark.parametrize("task", sorted({*TASKS} - {"pretrain_gpt2"}))
def test_a_folder_without_a_whole_model_is_one_line(task, argv, models, tmp_path, monkeypatch, capsys):
    """First without weights, then without config.json, too."""
    folder = tmp_path / "model"
    shutil.copytree(models[task], folder)
    (folder / "model.safetensors").unlink()
    module = train_script(task)
    for said in ("has no weights: model.safetensors is missing", "holds no model: config.json and model.safetensors"):
        flags = argv(task, tmp_path / "run", model_name_or_path=folder)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        with pytest.raises(SystemExit):
            launch.run(module.main, module.ScriptArguments, TRAINING[task])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and said in lines[0], lines
        (folder / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("task", TASKS)
def test_trackers_and_metrics_that_there_are_not_are_one_line(task, argv, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.integrations.integration_utils, "is_wandb_available", lambda: False)
    line = refusal(task, argv, tmp_path / "a", report_to="wandb", dataset="./none.csv")
    assert line == "--report_to wandb: it is not installed: pip install wandb, or --report_to none."
    assert "no such tracker. Known: none, " in refusal(task, argv, tmp_path / "b", report_to="wandbb")
    options = {"metric_for_best_model": "accurracy", "eval_strategy": "steps", "eval_steps": 1, "disable_tqdm": True}
    monkeypatch.setattr(transformers.Trainer, "training_step", None)
    line = refusal(task, argv, tmp_path / "c", **options)
    assert line.startswith("--metric_for_best_model accurracy: an evaluation here measures loss"), line


def test_the_share_of_bad_rows_is_ones_own(argv, tmp_path):
    rows = [{"text": None} if i % 5 == 0 else row for i, row in enumerate(make_rows("mlm_bert", 60))]
    assert "12 of 60 rows are unusable" in refusal("mlm_bert", argv, tmp_path / "run", rows=rows)
    module = train_script("mlm_bert")
    run_args = parse(module.ScriptArguments, PLAIN, argv("mlm_bert", tmp_path, rows=rows, max_bad_rows=0.2))[2]
    assert sum(map(len, module.load_documents(run_args, 42)[0].values())) == 48


def as_table(rows: list[dict]) -> str:
    file = io.StringIO()
    table = csv.DictWriter(file, list(rows[0]), delimiter=";")
    table.writeheader()
    table.writerows(rows)
    return file.getvalue()


def splits_of(task: str, flags: list[str]) -> dict:
    module = train_script(task)
    script_args, args, run_args = parse(module.ScriptArguments, TRAINING[task], flags)
    if task == "pretrain_gpt2":
        from documents import load_documents as load
    else:
        load = getattr(module, "load_rows", None) or module.load_documents
    return load(script_args, run_args, args.seed)[0] if task == "classify_bert" else load(run_args, args.seed)[0]


@pytest.mark.parametrize("task", ["qa_squad", "rag_docs"])
def test_a_context_that_official_splits_share_is_said_though_their_articles_differ(task, argv, tmp_path, caplog):
    """Rows shared out at random: the test split has some of each article's contexts, and training rows ask about all of them."""
    caplog.set_level("INFO", "taskbook")
    texts = [[" ".join(f"w{t * 997 + c * 91 + i * i}" for i in range(30)) for c in range(10)] for t in range(6)]
    rows = [{"title": f"t{t}", "context": c, "question": "what?", "answers": c[:9]} for t in range(6) for c in texts[t]]
    for name, part in (("train", rows), ("test", rows[::5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    splits_of(task, argv(task, tmp_path / "run", dataset=tmp_path))
    assert "12 of 12 rows of the official test split are near-duplicates of training rows" in caplog.text


@pytest.mark.parametrize("task", TASKS)
def test_own_files_are_the_splits(task, argv, tmp_path, caplog):
    """Three files by flags, and a folder of three; what the test file repeats of the training file is said."""
    caplog.set_level("INFO", "taskbook")
    rows = make_rows(task, 61)[1:]  # the answer of the first one stands in several places
    parts = {"train": rows[:40], "val": rows[40:50], "test": [*rows[50:], *rows[:3]]}
    (tmp_path / "mine").mkdir()
    for name, part in parts.items():
        (tmp_path / "mine" / f"{name}.csv").write_text(as_table(part))
    files = {name: tmp_path / "mine" / f"{name}.csv" for name in parts}
    flags = {"dataset": files["train"], "validation_file": files["val"], "test_file": files["test"]}
    by_flags = splits_of(task, argv(task, tmp_path / "run", **flags))
    by_folder = splits_of(task, argv(task, tmp_path / "run", dataset=tmp_path / "mine"))
    assert {name: len(rows) for name, rows in by_flags.items()} == {"train": 40, "validation": 10, "test": 13}
    for name, part in by_flags.items():
        assert list(part) == list(by_folder[name])
    assert "3 of 13 rows of the official test split are near-duplicates of training rows" in caplog.text
    assert "validation split are near-duplicates" not in caplog.text
    separator = ";" if len(rows[0]) > 1 else ","
    assert f"train.csv: read as csv, cells between {separator!r}, UTF-8" in caplog.text


@pytest.mark.parametrize("task", TASKS)
def test_data_is_shown_before_it_is_trained(task, argv, tmp_path, caplog):
    """How the file was read, what was dropped, three rows with the trained part marked, a histogram: and nothing trained."""
    rows = [*make_rows(task, 61)[1:], dict.fromkeys(make_rows(task, 1)[0])]
    module, run = train_script(task), tmp_path / "run"
    caplog.set_level("INFO", "taskbook")
    with pytest.raises(SystemExit) as ended:
        module.main(*parse(module.ScriptArguments, TRAINING[task], argv(task, run, rows=rows, show_data=3)))
    assert not ended.value.code and not run.exists()
    said = caplog.text
    assert "rows.jsonl: read as jsonl, UTF-8, " in said and "read 61 = kept 60 + dropped 1 (" in said
    assert "1 of 61 rows (1.6%) dropped: " in said and "first row 61" in said
    assert "columns read: " in said or "rows.jsonl is read as " in said
    shown = re.findall(r"training row \d, \[\[trained\]\] marked:\n(.*?)\n(?=INFO|$)", said, re.S)
    assert len(shown) == 3, said
    learnt = {
        "chat_sft": r"\[\[(red|green) .*<\|im_end\|>\n?\]\]",
        "dpo_chat": r"assistant\n\[\[(red|green) .*<\|im_end\|>\]\]\nrejected: \[\[.*<\|im_end\|>\]\]$",
        "classify_bert": r"number .*\n-> \[\[(red|green)\]\]$",
        "mlm_bert": r"^\[CLS\] .*\[SEP\]$",  # in a short row nothing may be masked
        "pretrain_gpt2": r"^[^\[]+\[\[.*\]\]$",
        "qa_squad": r"\[\[\d+\]\]|^\[\[\[CLS\]\]\]",
        "rag_docs": r"which is \d+.*\n-> \[\[.*(red|green).*\]\]",
        "summarize_t5": r"\n-> \[\[(red|green) \d+.*\]\]$",
    }[task]
    assert all(re.search(learnt, text, re.S) for text in shown), shown
    if task == "mlm_bert":
        assert re.search(r"\[\[\[MASK\][^\]]* = \w+\]\]", said), shown
    counts = [int(line.split()[3]) for line in re.findall(r"^ +[\d,]+ to +[\d,]+ +[\d,]+ #*$", said, re.M)]
    assert 1 < len(counts) <= 8 and sum(counts) >= 40, said
    if task == "classify_bert":
        assert "training rows by label: green " in said or "training rows by label: red " in said
