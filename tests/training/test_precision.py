"""The precision of a run: decided by the GPU (a table of cards, no GPU needed), and what a quantized run really trains in."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkout import ROOT, train_script
from products import Products
from trl.kernels import chunked_logprob

from shared import UserError
from shared.inference.torch_runner import load_torch
from shared.training.arguments import parse
from shared.training.hardware import (
    check_precision,
    choose_precision,
    dtype_of,
    hardware,
    matmul_flops,
    precision_flags,
)
from shared.training.launch import setup

CARDS = {
    "no GPU": ([], "fp32"),
    "GTX 1080": ([(6, 1)], "fp32"),
    "V100": ([(7, 0)], "fp16"),
    "T4": ([(7, 5)], "fp16"),
    "two T4": ([(7, 5), (7, 5)], "fp16"),
    "A100": ([(8, 0)], "bf16"),
    "RTX 3090": ([(8, 6)], "bf16"),
    "L4": ([(8, 9)], "bf16"),
    "H100": ([(9, 0)], "bf16"),
    "B200": ([(10, 0)], "bf16"),
    "RTX 5090": ([(12, 0)], "bf16"),
    "an A100 beside a T4": ([(8, 0), (7, 5)], "fp16"),
}
SEQ2SEQ = "transformers.training_args_seq2seq:Seq2SeqTrainingArguments"
ASKED = {"fp32": (False, False), "fp16": (True, False), "bf16": (False, True)}


@pytest.mark.parametrize("card", CARDS)
def test_the_card_decides(card):
    gpus, expected = CARDS[card]
    assert choose_precision(gpus) == expected
    on = {name: str(name == expected).lower() for name in ("bf16", "fp16")}
    assert precision_flags(set(), gpus) == ["--bf16", on["bf16"], "--fp16", on["fp16"]]
    check_precision(*ASKED[expected], gpus)
    check_precision(False, False, gpus)  # fp32 runs anywhere
    if expected != "bf16" and gpus:
        with pytest.raises(UserError, match="--bf16 false --fp16 true" if expected == "fp16" else "`--bf16 false`"):
            check_precision(False, True, gpus)
    if not gpus:
        with pytest.raises(UserError, match="fp16 needs a GPU"):
            check_precision(True, False, gpus)


@pytest.mark.parametrize(
    ("card", "argv", "expected"),
    [
        ("no GPU", [], "fp32"),
        ("T4", [], "fp16"),
        ("A100", [], "bf16"),
        ("A100", ["--fp16=true"], "fp16"),
        ("A100", ["--fp16"], "fp16"),
        ("T4", ["--bf16", "true"], "bf16"),
        ("no GPU", ["--fp16", "false"], "fp32"),
        ("A100", ["--bf16=false"], "fp32"),
    ],
)
@pytest.mark.parametrize("task", ["chat_sft", "summarize_t5"])
def test_what_is_said_wins(monkeypatch, task, card, argv, expected):
    """Through the whole parser: trl's SFTConfig turns bf16 on where nothing is said, transformers' does not."""
    training = {"chat_sft": "trl.trainer.sft_config:SFTConfig", "summarize_t5": SEQ2SEQ}[task]
    monkeypatch.setattr("shared.training.arguments.gpus", lambda: CARDS[card][0])
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    _, args, run_args = parse(train_script(task).ScriptArguments, training, argv)
    assert (args.fp16, args.bf16) == ASKED[expected]
    assert {"fp16", "bf16"} & set(run_args.resolved) == {name for name in ("fp16", "bf16") if name in "".join(argv)}


@pytest.mark.parametrize(("asked", "can"), [(True, True), (True, False), (False, True), (False, False), (True, None)])
def test_bf16_on_a_cpu_is_a_flag_and_said_where_it_pays(tmp_path, caplog, monkeypatch, asked, can):
    """transformers wanted --use_cpu beside it, and said nothing of a CPU that emulates it."""
    caplog.set_level("INFO", "taskbook")
    monkeypatch.setattr("shared.training.arguments.gpus", lambda: [])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = {} if can is None else {"avx2": True, "amx_bf16": can}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    script = train_script("summarize_t5").ScriptArguments
    _, args, run_args = parse(script, SEQ2SEQ, [f"--output_dir={tmp_path}", *(["--bf16", "true"] if asked else [])])
    assert args.bf16 == asked and "use_cpu" not in run_args.resolved  # which would leave another machine's GPU alone
    setup(args, run_args)
    assert ("--bf16 true" in caplog.text) == (can is True and not asked)
    assert ("only emulates bf16" in caplog.text) == (can is False and asked)


def test_a_recipe_for_a_t4_is_run_in_fp32_by_one_word():
    config = ROOT / "tasks" / "summarize_t5" / "configs" / "t4.yaml"
    script = train_script("summarize_t5").ScriptArguments
    _, args, _ = parse(script, SEQ2SEQ, [f"--config={config}"])
    assert args.fp16 and not args.bf16
    _, args, _ = parse(script, SEQ2SEQ, [f"--config={config}", "--fp16=false"])
    assert not args.fp16 and not args.bf16


def test_one_process_takes_one_gpu(tmp_path, caplog):
    """Trainer would split batches over all that it sees: packed rows would be torn, and steps be of other sizes."""
    caplog.set_level("INFO", "taskbook")
    script = train_script("summarize_t5").ScriptArguments
    _, args, run_args = parse(script, SEQ2SEQ, [f"--output_dir={tmp_path}"])
    args._n_gpu = 4  # as Trainer finds them
    assert args.train_batch_size == 4 * args.per_device_train_batch_size
    setup(args, run_args)
    assert args.n_gpu == 1 and args.train_batch_size == args.per_device_train_batch_size
    assert "One process trains on one of 4 GPUs. On all of them: accelerate launch --config_file " in caplog.text


def test_what_a_run_could_reach_is_measured_in_its_own_precision():
    """A CPU multiplies fp16 numbers one by one: a run in bf16 waited ten seconds, and its MFU was above 1."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        fp16, bf16 = ASKED[name]
        with Products() as products:
            assert matmul_flops(0.01, dtype_of(SimpleNamespace(fp16=fp16, bf16=bf16))) > 0
        assert set(products.flops) == {dtype}


def test_a_mac_starts_without_what_only_linux_has(tmp_path, monkeypatch):
    """macOS as far as it can be faked: cores are not told by process, and Apple's GPU is a device without CUDA."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    script, threads = train_script("summarize_t5").ScriptArguments, torch.get_num_threads()
    _, args, run_args = parse(script, SEQ2SEQ, [f"--output_dir={tmp_path}"])
    try:
        setup(args, run_args)
        assert torch.get_num_threads() == 3 and not args.bf16 and not args.fp16
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as mac:
        mac.setattr(torch.backends.mps, "is_available", lambda: True)
        assert hardware().startswith("Apple GPU, MPS")
        with pytest.raises(RuntimeError, match="(?i)mps"):  # a plan measures where a run would compute
            matmul_flops(0.01)
        mac.setenv("ACCELERATE_USE_CPU", "true")
        assert hardware().startswith("CPU") and matmul_flops(0.01) > 0


def test_no_attention_is_planned_anew_for_each_length(tiny, tmp_path):
    """cuDNN's, which torch prefers on Hopper: neither while training nor while serving."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    script = train_script("summarize_t5").ScriptArguments
    setup(*parse(script, SEQ2SEQ, [f"--output_dir={tmp_path}"])[1:])
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_torch(tiny / "llama", "text-generation")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("missing", ["gcc", "Python.h", "nothing"])
def test_without_a_compiler_losses_are_computed_without_triton(missing, tmp_path, monkeypatch, caplog):
    """Which builds a module in C before its first kernel runs; images with CUDA's runtime have no compiler."""
    caplog.set_level("INFO", "taskbook")
    (tmp_path / "gcc").touch(0o755)
    if missing != "Python.h":
        (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "none" if missing == "gcc" else tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    script = train_script("summarize_t5").ScriptArguments
    parsed = parse(script, SEQ2SEQ, [f"--output_dir={tmp_path}", "--fp16=false", "--bf16=false"])[1:]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("shared.training.launch.hardware", lambda: "a card")
    setup(*parsed)
    without = missing != "nothing"
    assert chunked_logprob._use_triton(torch.device("cuda")) != without
    assert ("apt-get install gcc python3-dev" in caplog.text) == without


def test_imports_need_nothing_that_only_linux_has():
    code = (
        "import asyncio, importlib, os, pkgutil, psutil, sys\n"  # the first and psutil are others on a Mac
        "del os.sched_getaffinity, os.sysconf\n"
        "sys.modules['resource'] = None\n"  # an import of it fails
        "import shared, deploy.api\n"
        "names = [m.name for m in pkgutil.walk_packages(shared.__path__, 'shared.')]\n"
        "done = [importlib.import_module(n) for n in names if not n.endswith('__main__')]\n"
        "print(len(done))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and int(done.stdout) > 30, done.stderr


def test_a_qlora_run_trains_fp32_adapters(tiny, data, tmp_path, monkeypatch):
    """trl casts the adapters of a quantized model to bf16: with fp16's loss scaling, on a T4, that ends in an error."""
    from packing import PackedSFTTrainer

    seen, compute_loss = [], PackedSFTTrainer.compute_loss

    def look(self, model, inputs, **kwargs):
        adapters = {p.dtype for p in model.parameters() if p.requires_grad}
        layers = {m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")}
        loss = compute_loss(self, model, inputs, **kwargs)
        seen.append((adapters, layers, loss.dtype))
        return loss

    monkeypatch.setattr(PackedSFTTrainer, "compute_loss", look)
    task, options = train_script("chat_sft"), {"model_name_or_path": tiny / "llama", "dataset": data, "method": "qlora"}
    options |= {
        "output_dir": tmp_path,
        "use_cpu": True,
        "max_steps": 1,
        "max_length": 64,
        "max_train_rows": 8,
        "max_test_rows": 4,
    }
    options |= {"max_validation_rows": 4, "per_device_train_batch_size": 2, "disable_tqdm": True, "lora_r": 2}
    argv = [f"--{name}={value}" for name, value in options.items()]
    argv += ["--columns", "prompt=question", "completion=answer", "--bf16=true"]
    task.main(*parse(task.ScriptArguments, "trl.trainer.sft_config:SFTConfig", argv))
    assert seen and all(entry == ({torch.float32}, {torch.bfloat16}, torch.float32) for entry in seen), seen
    from safetensors.torch import load_file

    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "all_results.json").read_text())["test_loss"] > 0


@pytest.mark.parametrize(
    ("words", "environment"), [(["--use_cpu", "true"], {}), (["--use_cpu"], {}), ([], {"ACCELERATE_USE_CPU": "True"})]
)
def test_a_gpu_that_shall_not_be_used_is_not_seen(words, environment, tmp_path, monkeypatch):
    """Or a run would be planned, and its replies written, where it does not train."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")  # that no machine has
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    script = train_script("summarize_t5").ScriptArguments
    parse(script, SEQ2SEQ, [f"--output_dir={tmp_path}", "--use_cpu=false"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if environment else "99")
    parse(script, SEQ2SEQ, [f"--output_dir={tmp_path}", *words])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
