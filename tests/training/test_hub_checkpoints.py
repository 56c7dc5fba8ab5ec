"""`--push_to_hub true --hub_strategy checkpoint` through a whole task; test_checkpoints.py has the accidents."""

import json
import shutil

import pytest
import task_runs
from checkout import ROOT, train_script

from shared import UserError
from shared.training.arguments import parse
from shared.training.launch import setup

TRAINING = "trl.trainer.sft_config:SFTConfig"


def test_an_adapter_goes_on_on_a_machine_that_has_nothing(hub, tiny, data, tmp_path):
    run = tmp_path / "run"
    options = {"model_name_or_path": tiny / "llama", "dataset": data, "output_dir": run, "method": "lora", "lora_r": 2}
    options |= {"max_length": 64, "max_train_rows": 16, "max_validation_rows": 4, "max_test_rows": 4, "max_steps": 4}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_steps": 2, "logging_steps": 1}
    options |= {"push_to_hub": True, "hub_model_id": "adapter-far-away", "hub_strategy": "checkpoint"}
    argv = [f"--{name}={value}" for name, value in options.items()]
    argv += ["--disable_tqdm=true", "--columns", "prompt=question", "completion=answer"]
    script = ROOT / "tasks" / "chat_sft" / "train.py"
    first = task_runs.command(script, *argv, **hub.env)
    assert first.returncode == 0, first.stderr
    results, losses = json.loads((run / "all_results.json").read_text()), task_runs.losses(run)
    kept = hub.files("alice/adapter-far-away", "checkpoints")
    assert {"checkpoint-4/manifest.json", "checkpoint-4/optimizer.pt"} <= kept.keys()
    content = b"".join(kept.values())
    assert str(tmp_path).encode() not in kept["checkpoint-4/adapter_config.json"]
    assert hub.tokens["write"].encode() not in content and not any("training_args" in name for name in kept)
    assert not any(name.startswith("checkpoint-") for name in hub.files("alice/adapter-far-away"))

    shutil.rmtree(run)
    second = task_runs.command(script, *argv, **hub.env)
    assert second.returncode == 0, second.stderr
    assert "Fetches checkpoint-4 from the Hub: alice/adapter-far-away." in second.stdout
    again = json.loads((run / "all_results.json").read_text())
    assert again["test_loss"] == results["test_loss"] != results["base_loss"]
    assert task_runs.losses(run) == losses and set(losses) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hub_strategy=checkpoint"], "--hub_strategy checkpoint needs --push_to_hub true"),
        (["--resume=hub"], "--resume hub needs --push_to_hub true"),
        (["--push_to_hub=true", "--hub_strategy=every_save"], "here it is `end`"),
    ],
)
def test_what_would_be_ignored_is_refused(flags, said, tmp_path):
    _, args, run_args = parse(train_script("chat_sft").ScriptArguments, TRAINING, [f"--output_dir={tmp_path}", *flags])
    with pytest.raises(UserError, match=said):
        setup(args, run_args)
