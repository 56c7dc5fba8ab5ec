"""FSDP with two processes of a CPU (tests/sharded.py): what tests/tasks/test_contract.py does not run for every task."""

import json
from argparse import Namespace

import pytest
import task_runs
from checkout import ROOT, train_script
from safetensors.torch import load_file

from shared import UserError
from shared.training.arguments import parse
from shared.training.launch import setup

CHAT = ROOT / "tasks" / "chat_sft" / "train.py"
COMMON = {"max_steps": 2, "warmup_steps": 0, "logging_steps": 1, "lr_scheduler_type": "constant", "max_test_rows": 3}
COMMON |= {"per_device_train_batch_size": 4, "max_validation_rows": 3, "per_device_eval_batch_size": 2}
COMMON |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "adam_epsilon": 1.0}
COMMON |= {"train_sampling_strategy": "random", "disable_tqdm": False}


def flags(output, **options) -> list[str]:
    return [f"--{name}={value}" for name, value in (COMMON | {"output_dir": output} | options).items()]


def weights(run) -> dict:
    return load_file(next(run.glob("*model.safetensors")))


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].sub(value).abs().max() < 2e-6, name


def write_rows(path, make):
    """60 rows of unequal length; `make(number, text)` gives one."""
    rows = [make(i, f"Number {i} {i * 7919} " + "red " * (i % 9)) for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def compare(task, tmp_path, **options):
    """Two processes with half of the model each, and one with all of it; both evaluate 3 rows after each step."""
    sharded = task_runs.in_two_processes(task, flags(tmp_path / "sharded", **options), sharded=True)
    whole = flags(tmp_path / "one", **options | {"per_device_train_batch_size": 8})
    one = task_runs.command(ROOT / "tasks" / task / "train.py", *whole)
    task_runs.assert_like_one(sharded, one, tmp_path, "sharded")
    assert_equal(weights(tmp_path / "sharded"), weights(tmp_path / "one"))
    history = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("sharded", "one")
    ]
    evaluated = [[entry["eval_loss"] for entry in entries if "eval_loss" in entry] for entries in history]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4) and len(evaluated[0]) >= 2
    return sharded


def test_all_weights_of_a_chat_model(tiny, data, tmp_path):
    """The base that it is compared with is sharded too: no process holds a whole one."""
    options = {"model_name_or_path": tiny / "llama", "dataset": data, "method": "full", "max_length": 256}
    sharded = compare("chat_sft", tmp_path, **options)
    assert sharded.stdout.count("holds 0.50 of the weights") == 4  # two models in two processes


def test_an_adapter_in_bf16_with_checkpointing_is_merged(tiny, data, tmp_path):
    options = {"model_name_or_path": tiny / "llama", "dataset": data, "max_length": 256, "save_merged": True}
    options |= {"bf16": True, "use_cpu": True, "gradient_checkpointing": True}
    sharded = task_runs.in_two_processes("chat_sft", flags(tmp_path / "sharded", **options), sharded=True)
    one = task_runs.command(CHAT, *flags(tmp_path / "one", **options | {"per_device_train_batch_size": 8}))
    assert sharded.returncode == one.returncode == 0, sharded.stderr[-3000:] + one.stderr[-3000:]
    assert task_runs.losses(tmp_path / "sharded") == pytest.approx(task_runs.losses(tmp_path / "one"), rel=1e-3)
    assert_equal(weights(tmp_path / "sharded" / "merged"), weights(tmp_path / "one" / "merged"))


def test_a_bart_whose_encoder_is_frozen_and_whose_table_has_four_names(tiny_bert, tmp_path):
    model = task_runs.without_dropout(tiny_bert, tmp_path / "bert")
    rows = write_rows(tmp_path / "rows.jsonl", lambda i, text: {"document": text, "summary": f"{i} is red"})
    options = {"model_name_or_path": model, "dataset": rows, "predict_with_generate": True}
    options |= {"max_validation_rows": 4, "per_device_eval_batch_size": 1}  # Trainer's own loss is a mean over batches
    compare("summarize_t5", tmp_path, **options, max_source_length=48, max_target_length=8)


def test_it_goes_on_from_a_checkpoint(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", lambda i, text: {"text": text})
    options = {"dataset": rows, "vocab_size": 300, "block_length": 32, "optimizer": "adamw", "eval_strategy": "no"}
    options |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "adam_epsilon": 1e-8}
    whole = task_runs.in_two_processes("pretrain_gpt2", flags(tmp_path / "whole", **options), sharded=True)
    assert whole.returncode == 0, whole.stderr[-3000:]
    resumed = flags(tmp_path / "resumed", **options, resume=tmp_path / "whole" / "checkpoint-2")
    ended = task_runs.in_two_processes("pretrain_gpt2", resumed, sharded=True)
    assert ended.returncode == 0 and "Resumes from" in ended.stdout, ended.stderr[-3000:]
    assert task_runs.losses(tmp_path / "resumed") == task_runs.losses(tmp_path / "whole")
    assert_equal(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("task", "what"),
    [
        ("chat_sft", "--method qlora"),
        ("chat_sft", "--method p_tuning"),
        ("pretrain_gpt2", "--optimizer muon"),
        ("dpo_chat", "--method qlora"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_any_data_is_read(task, what, tmp_path):
    argv = [*what.split(), f"--output_dir={tmp_path / 'run'}", "--dataset=not/there.jsonl"]
    ended = task_runs.in_two_processes(task, argv, sharded=True)
    assert ended.returncode == 2 and ended.stderr.count(f"error: {what} does not go with FSDP") == 2, ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "run").exists()


def test_a_t5_in_fp16_is_refused(monkeypatch):
    """Its feed-forward layers would get fp16 weights and fp32 inputs."""
    from seq2seq_models import load_model, load_tokenizer

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = Namespace(fp16=True, fsdp=None, seed=0, generation_num_beams=None)
    sizes = Namespace(scratch_width=64, max_target_length=8)
    with pytest.raises(UserError, match="--fp16 for a T5 does not go with FSDP"):
        load_model(None, load_tokenizer(None, ["red green"], 300), sizes, args)


def test_sharding_without_a_gpu_is_refused(monkeypatch, tmp_path):
    """accelerate would silently hold the whole model in each process."""
    script = train_script("summarize_t5").ScriptArguments
    training = "transformers.training_args_seq2seq:Seq2SeqTrainingArguments"
    _, args, run_args = parse(script, training, [f"--output_dir={tmp_path}"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP needs GPUs"):
        setup(args, run_args)
