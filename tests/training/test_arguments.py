"""What a configuration says of its own data set does not hold for another; every configuration of every task."""

import json
import shlex
from dataclasses import fields

import pytest
import yaml
from checkout import ROOT, train_script
from transformers import TrainingArguments

from shared import UserError
from shared.training.arguments import RunArguments, parse
from shared.training.launch import check_optimizer, check_schedule, setup

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tasks/*/configs/*.yaml"))
TRAINING = "transformers.training_args_seq2seq:Seq2SeqTrainingArguments"
OWN = {"chat_sft": "trl.trainer.sft_config:SFTConfig", "dpo_chat": "trl.trainer.dpo_config:DPOConfig"}
MADE_FOR_THE_DATA = {"rejected", "columns", "dataset_config", "label_until", "min_label_rows"}


def parsed(config: str, *argv: str) -> tuple[dict, list[str]]:
    """What each option is with this configuration, and what was set aside."""
    task = config.split("/")[1]
    script, _, run_args = parse(
        train_script(task).ScriptArguments,
        OWN.get(task, TRAINING),
        [f"--config={ROOT / config}", "--fp16=false", *argv],
    )
    both = {f.name: getattr(args, f.name) for args in (script, run_args) for f in fields(args)}
    return both, run_args.set_aside


def defaults(config: str) -> dict:
    classes = (train_script(config.split("/")[1]).ScriptArguments, RunArguments)
    made = [cls() for cls in classes]
    return {f.name: getattr(args, f.name) for args in made for f in fields(args)}


@pytest.mark.parametrize("config", CONFIGS)
def test_what_describes_the_data_set_of_a_configuration_does_not_hold_for_another(config):
    entries, plain = yaml.safe_load((ROOT / config).read_text()), defaults(config)
    theirs = MADE_FOR_THE_DATA & entries.keys()
    own, nothing = parsed(config)
    assert nothing == [] and all(own[name] != plain[name] for name in theirs)
    same, nothing = parsed(config, f"--dataset={entries['dataset']}")
    assert nothing == [] and all(same[name] == own[name] for name in theirs)
    other, said = parsed(config, "--dataset", "./mine.csv")
    assert all(other[name] == plain[name] for name in theirs), theirs
    assert len(said) == len(theirs) and all(entries["dataset"] in line and config in line for line in said)
    kept = entries.keys() & plain.keys() - MADE_FOR_THE_DATA - {"dataset"}
    assert kept and all(other[name] == own[name] for name in kept)
    assert not theirs & other["resolved"].keys() and other["resolved"]["dataset"] == "./mine.csv"


def test_there_is_such_a_configuration():
    entries = yaml.safe_load((ROOT / "tasks/classify_bert/configs/laptop.yaml").read_text())
    assert {"columns", "label_until", "min_label_rows"} <= entries.keys()


def test_the_command_line_may_say_it_again():
    argv = ["--dataset=./mine.csv", "--columns", "text=body", "--label_until=|"]
    found, said = parsed("tasks/classify_bert/configs/laptop.yaml", *argv)
    assert found["columns"] == ["text=body"] and found["label_until"] == "|"
    assert len(said) == 1 and said[0].startswith("min_label_rows 20 goes with dataset docs:summaries: not used (")


def test_another_model_brings_its_own_tokenizer():
    found, said = parsed("tasks/pretrain_gpt2/configs/t4.yaml", "--model_name_or_path=./mine", "--output_dir=x")
    assert found["tokenizer"] is None
    assert said[0].startswith("tokenizer openai-community/gpt2 goes with model_name_or_path (none)")


def test_another_schedule_brings_its_own_options():
    config = "tasks/pretrain_gpt2/configs/t4_vietnamese.yaml"
    found, said = parsed(config, "--lr_scheduler_type=linear", "--output_dir=x")
    assert "lr_scheduler_kwargs" not in found["resolved"] and found["resolved"]["lr_scheduler_type"] == "linear"
    assert len(said) == 1 and said[0].startswith("lr_scheduler_kwargs {'num_decay_steps': 250} ")
    assert said[0].endswith(f"{config})")
    found, said = parsed(config, "--learning_rate=0.1", "--output_dir=x")
    assert found["resolved"]["lr_scheduler_kwargs"]["num_decay_steps"] == 250 and said == []


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("linear", {"num_decay_steps": 3}, 'linear with --lr_scheduler_kwargs {"num_decay_steps": 3}: .*unexpected'),
        ("warmup_stable_decay", {}, "warmup_stable_decay without --lr_scheduler_kwargs: .*num_decay_steps"),
        ("cosine_with_min_lr", {}, "cosine_with_min_lr without --lr_scheduler_kwargs: .*min_lr"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "no"}, "Unknown decay type: no"),
    ],
)
def test_a_schedule_that_cannot_be_built_is_one_line(name, options, line, tmp_path):
    args = TrainingArguments(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=options, use_cpu=True)
    with pytest.raises(UserError, match=line):
        check_schedule(args)


@pytest.mark.parametrize(("steps", "warned"), [(-1, False), (99, True), (100, False)])
def test_a_schedule_longer_than_the_run_is_said(steps, warned, tmp_path, caplog):
    options = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 90}}
    check_schedule(TrainingArguments(tmp_path, **options, warmup_steps=10, max_steps=steps, use_cpu=True))
    assert ("decay take 100, so that" in caplog.text) == warned


@pytest.mark.parametrize(
    ("task", "option", "value", "line"),
    [
        ("classify_bert", "per_device_train_batch_size", "0", "1 or more"),
        ("chat_sft", "per_device_eval_batch_size", "-2", "1 or more"),
        ("mlm_bert", "gradient_accumulation_steps", "0", "1 or more"),
        ("mlm_bert", "seed", "-1", "from 0 to 4,294,967,295"),
        ("mlm_bert", "mlm_probability", "1.5", "from 0 to 1"),
        ("qa_squad", "max_train_rows", "-5", "1 or more"),
        ("qa_squad", "max_length", "0", "1 or more"),
        ("qa_squad", "show_data", "-1", "0 or more"),
        ("rag_docs", "dropout", "-0.1", "from 0 to 1"),
        ("rag_docs", "learning_rate", "nan", "0 or more"),
        ("rag_docs", "max_steps", "0", "1 or more, or -1"),
        ("dpo_chat", "num_train_epochs", "0", "nothing would be trained"),
        ("classify_bert", "prediction_loss_only", "true", "evaluations here need every row"),
        ("classify_bert", "eval_do_concat_batches", "false", "Leave it out"),
        ("summarize_t5", "batch_eval_metrics", "true", "Leave it out"),
        ("qa_squad", "dataloader_drop_last", "true", "Leave it out"),
        ("chat_sft", "resume_from_checkpoint", "Old/checkpoint-4", "--resume names the checkpoint"),
        ("classify_bert", "fp16_full_eval", "true", "precision of the run"),
        ("classify_bert", "include_for_metrics", "inputs", "each task knows what it evaluates"),
        ("qa_squad", "label_names", "answers", "each task knows what it evaluates"),
        ("mlm_bert", "hub_revision", "dev", "pushed once, to the main branch"),
        ("mlm_bert", "enable_jit_checkpoint", "true", "a SIGTERM leaves a checkpoint anyway"),
        ("rag_docs", "save_on_each_node", "true", "the first machine writes"),
        ("summarize_t5", "sortish_sampler", "true", "group_by_length sorts"),
        ("summarize_t5", "generation_max_length", "9", "--max_target_length says"),
        ("summarize_t5", "generation_config", "mine", "the model's own generation_config.json"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_line(task, option, value, line):
    with pytest.raises(UserError, match=rf"^--{option} (\['{value}'\]|{value}): .*{line}"):
        parsed(f"tasks/{task}/configs/laptop.yaml", f"--{option}={value}", "--hardware=this")


def test_an_option_that_would_change_nothing_is_refused_or_used():
    for path in sorted(ROOT.glob("tasks/*/train.py")):
        task = path.parent.name
        refused = getattr(train_script(task).ScriptArguments, "REFUSED", {})
        used = any("args.label_smoothing_factor" in file.read_text() for file in path.parent.glob("*.py"))
        assert used != ("label_smoothing_factor" in refused), task
        for name in refused:
            numbers = {"label_smoothing_factor": "0.1", "neftune_noise_alpha": "5", "generation_max_length": "9"}
            value = numbers.get(name, "true")
            with pytest.raises(UserError, match=f"--{name} .*{refused[name]}"):
                parsed(f"tasks/{task}/configs/laptop.yaml", f"--{name}={value}")


@pytest.mark.parametrize(
    ("given", "read"), [("all", "all"), ("non_padding", "non_padding"), ("false", "no"), ("", "all")]
)
def test_tokens_seen_are_counted_as_help_says(given, read):
    option = ["--include_num_input_tokens_seen", *given.split()]
    script = train_script("qa_squad").ScriptArguments
    _, args, _ = parse(script, TRAINING, [*option, "--liger_kernel_config", '{"rope": true}'])
    assert args.include_num_input_tokens_seen == read and args.liger_kernel_config == {"rope": True}


@pytest.mark.parametrize(
    ("metric", "more", "higher"),
    [
        ("perplexity", [], False),
        ("eval_perplexity", [], False),
        ("loss", [], False),
        ("accuracy", [], True),
        ("perplexity", ["--greater_is_better=true"], True),
    ],
)
def test_the_best_model_has_the_lowest_perplexity(metric, more, higher):
    argv = [f"--config={ROOT / 'tasks/chat_sft/configs/laptop.yaml'}", f"--metric_for_best_model={metric}", *more]
    _, args, _ = parse(train_script("chat_sft").ScriptArguments, OWN["chat_sft"], argv)
    assert args.greater_is_better == higher


def test_to_evaluate_alone_is_refused():
    """Transformers' own scripts take `--do_eval` without `--do_train` for: train nothing."""
    config = "tasks/classify_bert/configs/laptop.yaml"
    with pytest.raises(UserError, match="without --do_train: a run always trains"):
        parsed(config, "--do_eval")
    with pytest.raises(UserError, match="without --do_train: a run always trains"):
        parsed(config, "--do_train=false")
    parsed(config, "--do_train", "--do_eval", "--do_predict")


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--deepspeed is not supported"):
        parsed("tasks/classify_bert/configs/laptop.yaml", "--deepspeed=ds.json")
    laptop = f"--config={ROOT / 'tasks/chat_sft/configs/laptop.yaml'}"
    for option in ("use_liger_kernel", "activation_offloading"):
        _, args, run_args = parse(train_script("chat_sft").ScriptArguments, OWN["chat_sft"], [laptop, f"--{option}"])
        with pytest.raises(UserError, match=f"--{option}.* leave it out|--{option}.* Leave it out"):
            setup(args, run_args)


@pytest.mark.parametrize(
    "options",
    [
        {"split_batches": True},
        {"dispatch_batches": True},
        {"even_batches": False},
        {"use_seedable_sampler": False},
        {"gradient_accumulation_kwargs": {"num_steps": 4}},
    ],
)
def test_loaders_that_would_change_a_step_are_refused(options):
    """Two processes: half of the rows a step, a traceback, both waiting for each other for half an hour."""
    laptop = f"--config={ROOT / 'tasks/classify_bert/configs/laptop.yaml'}"
    argv = [laptop, f"--accelerator_config={json.dumps(options)}"]
    _, args, run_args = parse(train_script("classify_bert").ScriptArguments, TRAINING, argv)
    with pytest.raises(UserError, match=f"--accelerator_config {next(iter(options))}: .* Leave it out"):
        setup(args, run_args)


@pytest.mark.parametrize("name", ["datasets", "metrics", "modules"])
def test_a_cache_that_cannot_be_written_is_told_before_training(name, tmp_path, monkeypatch):
    """Metrics are measured at the end: a chat model was trained, and then nothing said how good it is."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(f"HF_{name.upper()}_CACHE", str(tmp_path / "file" / name))
    script = train_script("classify_bert").ScriptArguments
    _, args, run_args = parse(script, TRAINING, [f"--output_dir={tmp_path}"])
    with pytest.raises(UserError, match=rf"cache not writable: .*/{name} .*Set HF_HOME"):
        setup(args, run_args)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(
    ("metric", "given", "mode"), [("macro_f1", None, "max"), ("loss", None, None), ("accuracy", "min", "min")]
)
def test_a_schedule_that_looks_at_a_metric_knows_which_way_it_is_better(schedule, metric, given, mode):
    argv = [f"--config={ROOT / 'tasks/classify_bert/configs/laptop.yaml'}", f"--lr_scheduler_type={schedule}"]
    argv += [f"--metric_for_best_model={metric}", *([f'--lr_scheduler_kwargs={{"mode": "{given}"}}'] if given else [])]
    _, args, _ = parse(train_script("classify_bert").ScriptArguments, TRAINING, argv)
    assert (args.lr_scheduler_kwargs or {}).get("mode") == mode
    check_schedule(args)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "--optim_args momentun=0.9: --optim sgd reads no momentun"),
        ({"optim_args": "weight_decay=0.1"}, "--optim adamw_torch_fused reads no weight_decay"),
        ({"optim": "sgd", "optim_args": "momentum"}, "--optim_args momentum: write name=value"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "--optim sgd: could not convert string to float"),
        ({"optim": "galore_adamw"}, "--optim galore_adamw: You need to install `galore_torch`"),
        ({"optim": "adamw_torch_npu_fused"}, "--optim adamw_torch_npu_fused: .*failed to import"),
        ({"optim_target_modules": "all-linear"}, "--optim_target_modules: --optim adamw_torch_fused does not read it"),
        ({"optim": "schedule_free_adamw"}, "--optim schedule_free_adamw: "),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "--optim_args weight_decay=0.1: .*It is --weight_decay"),
    ],
)
def test_an_optimizer_that_is_not_there_or_reads_not_what_is_given_is_one_line(options, line, tmp_path):
    with pytest.raises(UserError, match=line):
        check_optimizer(TrainingArguments(tmp_path, use_cpu=True, **options))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("adamw_torch_fused", None),
        ("adafactor", None),
        ("sgd", "momentum=0.9, nesterov=true"),
        ("rmsprop", "alpha=0.9"),
        ("adamw_8bit", None),
        ("ademamix", "beta3=0.99,alpha=4"),
    ],
)
def test_an_optimizer_with_what_it_reads_is_taken(name, given, tmp_path):
    check_optimizer(TrainingArguments(tmp_path, use_cpu=True, optim=name, optim_args=given))


def test_what_another_optimizer_does_not_read_is_said(tmp_path, caplog):
    check_optimizer(TrainingArguments(tmp_path, use_cpu=True, optim="sgd", adam_beta2=0.95))
    assert caplog.messages == ["--optim sgd does not read --adam_beta2"]
    check_optimizer(TrainingArguments(tmp_path, use_cpu=True, optim="adamw_torch", adam_beta2=0.95))
    check_optimizer(TrainingArguments(tmp_path, use_cpu=True, optim="sgd"))
    assert len(caplog.messages) == 1


def test_the_command_of_a_card_can_be_pasted(tmp_path):
    """Several values of one option, blanks and quotes come out of a shell as they were typed; a token does not."""
    argv = ["--dataset=my rows.csv", "--columns", "prompt=a b", "completion=it's", "--hub_token", "hf_abc", "--seed=3"]
    argv += ["--max_steps=-1", "--push_to_hub", "--hub_token=hf_abc"]
    script = train_script("chat_sft").ScriptArguments
    *_, run_args = parse(script, OWN["chat_sft"], argv)
    start, *typed = shlex.split(run_args.command)[2:]
    assert start == "tasks/chat_sft/train.py" and "hf_abc" not in typed, typed
    *_, again = parse(script, OWN["chat_sft"], typed)
    assert again.resolved == run_args.resolved and again.columns == ["prompt=a b", "completion=it's"]
    assert again.command == run_args.command


def test_numbers_at_the_edge_are_taken():
    argv = ["--max_steps=1", "--show_data=0", "--seed=0", "--dropout=0", "--num_train_epochs=0", "--max_train_rows=1"]
    assert parsed("tasks/rag_docs/configs/laptop.yaml", *argv)[0]["max_train_rows"] == 1


def test_what_belongs_to_something_is_an_option():
    for path in sorted(ROOT.glob("tasks/*/train.py")):
        script = train_script(path.parent.name).ScriptArguments
        names = {f.name for cls in (script, RunArguments, TrainingArguments) for f in fields(cls)}
        belongs = getattr(script, "BELONGS_TO", {}) | RunArguments.BELONGS_TO
        assert belongs.keys() <= names and set(belongs.values()) <= names


@pytest.mark.parametrize(
    ("config", "processes", "share"),
    [
        ("pretrain_gpt2/configs/t4.yaml", 1, (8, 64)),
        ("pretrain_gpt2/configs/t4.yaml", 8, (8, 8)),
        ("chat_sft/configs/t4.yaml", 8, (4, 1)),
        ("classify_bert/configs/laptop.yaml", 2, (8, 1)),
        ("classify_bert/configs/laptop.yaml", 3, (5, 1)),  # 15 rows instead of 16
        ("classify_bert/configs/laptop.yaml", 32, (1, 1)),
    ],
)
def test_a_step_of_a_recipe_has_as_many_rows_in_several_processes(config, processes, share, monkeypatch):
    monkeypatch.setattr("transformers.training_args.TrainingArguments.world_size", processes)
    path, task = ROOT / "tasks" / config, config.split("/")[0]
    recipe = yaml.safe_load(path.read_text())
    rows = recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1)
    script = train_script(task).ScriptArguments
    _, args, run_args = parse(script, OWN.get(task, TRAINING), [f"--config={path}", "--fp16=false"])
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == share
    taken = share[0] * share[1] * processes
    said = [line for line in run_args.set_aside if "do not share out" in line]
    assert said == (
        [] if taken == rows else [f"{rows} rows a step do not share out over {processes} processes: {taken} are taken"]
    )
    assert run_args.resolved["per_device_train_batch_size"] == recipe["per_device_train_batch_size"]


def test_what_is_typed_is_meant_for_each_process_and_run_yaml_repeats_it(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.training_args.TrainingArguments.world_size", 4)
    script, config = train_script("pretrain_gpt2").ScriptArguments, ROOT / "tasks/pretrain_gpt2/configs/t4.yaml"
    typed = [f"--config={config}", "--fp16=false", "--per_device_train_batch_size=16"]
    _, args, run_args = parse(script, TRAINING, typed)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (16, 64)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_args.resolved))
    _, again, _ = parse(script, TRAINING, [f"--config={tmp_path / 'run.yaml'}"])
    assert (again.per_device_train_batch_size, again.gradient_accumulation_steps) == (16, 64)
