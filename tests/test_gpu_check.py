"""tools/gpu_check.py: refuses in one line without a GPU; what can run without one does, at tiny size."""

import importlib.util
import json
import subprocess

import pytest
import torch
from checkout import ROOT

spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)


@pytest.fixture
def flags(tmp_path):
    rows = [{"text": f"number {i} is {i * 7} and {i * 13} " + "red green " * (i % 9)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [f"--dataset={tmp_path / 'rows.jsonl'}", "--vocab_size=300", "--block_length=16", "--use_cpu=true"]
    flags += ["--max_steps=6", "--save_steps=2", "--logging_steps=1", "--warmup_steps=0", "--max_test_rows=3"]
    return [*flags, "--per_device_train_batch_size=2", "--eval_strategy=no", "--disable_tqdm=true"]


def test_without_a_gpu_it_says_so_in_one_line():
    if torch.cuda.is_available():
        return
    done = subprocess.run(
        ["make", "--old-file=.venv/.installed", "gpu-check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.splitlines()[0].startswith("error: gpu-check needs a GPU"), done.stderr
    assert "Traceback" not in done.stderr


def test_its_checks_at_tiny_size(flags, tmp_path):
    rows = gpu_check.check_task("pretrain_gpt2", flags, tmp_path / "whole", memory=False)
    assert [each["check"].split(": ")[1] for each in rows] == ["loss", "time", "memory"]
    assert all(each["passed"] for each in rows), rows
    killed = gpu_check.check_resume("pretrain_gpt2", flags, tmp_path / "whole", tmp_path / "killed", 2)
    assert killed[0]["passed"] and killed[0]["measured"] == "losses differ by 0.0e+00", killed
    wrong = gpu_check.check_task("pretrain_gpt2", [*flags, "--size=huge"], tmp_path / "wrong")
    assert not wrong[0]["passed"] and "huge" in wrong[0]["measured"], wrong
    table = gpu_check.report([*rows, *wrong], "this machine", tmp_path / "report.json")
    assert table.startswith("gpu-check: 3 of 4 passed on this machine") and table.count("**failed**") == 1
    assert json.loads((tmp_path / "report.json").read_text())["passed"] == 3
