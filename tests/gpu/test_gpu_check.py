"""What only a GPU can show of the recipes for a T4: kernels, precision, memory, speed, a real out-of-memory, a kill.

`make gpu-check` runs this with the recipes' own sizes, `make test` with tiny models on a CPU. Weights are random, rows made up.
"""

import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipe_shapes
import task_runs
import torch
import transformers
from checkout import ROOT, train_script
from products import Products

from shared.export.export import export
from shared.publish.hub import check_peft
from shared.training import checkpoints
from shared.training.arguments import parse
from shared.training.hardware import choose_precision, gpus, matmul_flops
from shared.training.packed_attention import flash_dtype, packed_attention
from shared.training.plan import LiveBytes

RECIPES = {
    "pretrain_gpt2/configs/t4.yaml": "GPT-2",
    "mlm_bert/configs/t4.yaml": "BERT",
    "classify_bert/configs/t4.yaml": "BERT",
    "qa_squad/configs/t4.yaml": "BERT",
    "rag_docs/configs/t4.yaml": "bge-small",
    "summarize_t5/configs/t4.yaml": "T5",
    "summarize_t5/configs/t4_bart.yaml": "BART",
    "chat_sft/configs/t4.yaml": "SmolLM2",
    "chat_sft/configs/t4_gpt2.yaml": "GPT-2",
    "dpo_chat/configs/t4.yaml": "SmolLM2",
    "chat_sft/configs/t4_llama2_qlora.yaml": "Llama 2 7B",
    "chat_sft/configs/t4_llama2_p_tuning.yaml": "Llama 2 7B",
    "chat_sft/configs/t4_falcon_qlora.yaml": "Falcon 7B",
}
TRAINING = {"chat_sft": "trl.trainer.sft_config:SFTConfig", "dpo_chat": "trl.trainer.dpo_config:DPOConfig"}
TRAINING |= {"summarize_t5": "transformers.training_args_seq2seq:Seq2SeqTrainingArguments"}
PLAIN = "transformers.training_args:TrainingArguments"
SHORT = {
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": "{}",
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "resume": "never",
}
SHORT |= {"max_test_rows": 8, "gradient_accumulation_steps": 1, "disable_tqdm": True}
TINY = {"per_device_train_batch_size": 2, "fp16": False, "bf16": True, "use_cpu": True}
SHORTER = {"max_length": 64, "block_length": 64, "max_source_length": 48, "max_target_length": 8}
T4 = 14.5e9  # bytes that a T4 has left for a program
STEPS = {"tiny": 3, "real": 12}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """`made(task, shape, size)`: a file of rows and the folder of a model, made once."""
    folder = tmp_path_factory.mktemp("made")

    def make(task: str, shape: str, size: str):
        rows, model = folder / f"{task}-{size}.jsonl", folder / f"{shape}-{size}"
        if not rows.exists():
            recipe_shapes.write_rows(task, rows, *((500, 1000) if size == "real" else (200, 40)))
        if not model.exists():
            if "7B" in shape:  # a disk may have room for one of 14 GB
                for other in folder.glob(f"*7B-{size}"):
                    shutil.rmtree(other)
            device = "cuda" if size == "real" else "cpu"
            recipe_shapes.save_model(shape, model, device, size == "tiny")
        return rows, model

    return make


def flags(recipe: str, size: str, made, output, **options) -> list[str]:
    """A recipe with rows and a model that are made here, cut to a few steps."""
    task = recipe.split("/")[0]
    rows, model = made(task, RECIPES[recipe], size)
    options = {"dataset": rows, "model_name_or_path": model, "output_dir": output, "max_steps": STEPS[size]} | options
    if size == "tiny":
        config = (ROOT / "tasks" / recipe).read_text()
        options = TINY | {name: value for name, value in SHORTER.items() if f"{name}: " in config} | options
    columns = ["--columns", "text=text", "label=label"] if task == "classify_bert" else []
    words = [f"--{name}={value}" for name, value in (SHORT | options).items()]
    return [f"--config={ROOT / 'tasks' / recipe}", *words, *columns]


def main(recipe: str, argv: list[str]) -> None:
    """A task's train.py in this process."""
    task = recipe.split("/")[0]
    module = train_script(task)
    try:
        module.main(*parse(module.ScriptArguments, TRAINING.get(task, PLAIN), argv))
    finally:
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def host_memory():
    """Yields a list of readings, in bytes, of the memory of this process without the files that it has mapped."""
    readings, done = [], threading.Event()

    def watch():
        while not done.wait(0.05):
            readings.append(1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield readings
    finally:
        done.set()
        watcher.join()


@pytest.fixture
def watched(monkeypatch):
    """What the steps of a run are seen to do: when each began, its positions, seconds of waiting for rows, the products of the
    second, memory at most.
    """
    seen = SimpleNamespace(starts=[], positions=[], waits=[], products=None, allocated=0, reserved=0, trainer=None)
    step, take = transformers.Trainer.training_step, transformers.Trainer.get_batch_samples
    train = checkpoints.train

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch_step(self, model, inputs, *more):
        seen.starts.append(now())
        seen.positions.append(inputs["input_ids"].numel())
        if len(seen.starts) != 2:
            return step(self, model, inputs, *more)
        with Products() as seen.products:
            return step(self, model, inputs, *more)

    def watch_take(self, *given):
        begun = now()
        taken = take(self, *given)
        seen.waits.append(time.perf_counter() - begun)
        return taken

    def watch_train(trainer, checkpoint):
        seen.trainer = trainer
        seen.starts.clear(), seen.positions.clear(), seen.waits.clear()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        output = train(trainer, checkpoint)
        if torch.cuda.is_available():
            seen.allocated, seen.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return output

    monkeypatch.setattr(transformers.Trainer, "training_step", watch_step)
    monkeypatch.setattr(transformers.Trainer, "get_batch_samples", watch_take)
    monkeypatch.setattr(checkpoints, "train", watch_train)
    return seen


MILLIONS = {
    "SmolLM2": 134.5,
    "GPT-2": 124.4,
    "BERT": 109.5,
    "bge-small": 33.36,
    "T5": 60.5,
    "BART": 139.4,
    "Llama 2 7B": 6738,
    "Falcon 7B": 6922,
}


@pytest.mark.parametrize("shape", MILLIONS)
def test_shapes_are_those_that_are_published(shape):
    model = recipe_shapes.empty_model(shape, tiny=False)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[shape], rel=1e-3)


def test_environment(size, row):
    check_peft()
    device, half = ("cuda", torch.float16) if size == "real" else ("cpu", torch.bfloat16)
    row("precision that is chosen", choose_precision(gpus()))
    if size == "real":
        built, own = torch.cuda.get_arch_list(), torch.cuda.get_device_capability()
        major = [name for name in built if name.startswith(f"sm_{own[0]}")]
        row("PyTorch is built for this card", " ".join(built), "sm_{}{} or older of its kind".format(*own), major)
        row("memory in GB", f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f}")
    import bitsandbytes

    layer = torch.nn.Linear(128, 64, bias=False)
    packed = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=half, quant_type="nf4")
    packed.load_state_dict(layer.state_dict())
    x = torch.randn(16, 128, device=device, dtype=half)
    apart = (packed.to(device)(x).float() - layer.to(device, half)(x).float()).abs().mean() / x.abs().mean()
    row("4-bit layer against its weights in half precision", f"{apart:.1%} apart", "< 20 %", apart < 0.2)


class Kernels(LiveBytes):
    """Also collects the names of the operations of attention."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("softmax", "scaled_dot_product", "varlen")):
            self.names.add(str(func).split(".")[1].removeprefix("_scaled_dot_product_"))
        return super().__torch_dispatch__(func, types, args, kwargs)


HEADS = {"SmolLM2": (9, 3, 64), "Llama 2": (32, 32, 128), "GPT-2": (12, 12, 64), "Falcon": (71, 1, 64)}


@pytest.mark.parametrize("packed", [False, True], ids=["row", "packed"])
@pytest.mark.parametrize("model", HEADS)
def test_attention_grows_with_the_length_and_not_with_its_square(model, packed, size, row):
    heads, kv, width = HEADS[model]
    device, half = ("cuda", torch.float16) if size == "real" else ("cpu", torch.bfloat16)
    layer, found = SimpleNamespace(num_key_value_groups=heads // kv, is_causal=True), []
    for length in (1024, 2048) if size == "real" else (128, 256):
        query, key, value = (
            torch.randn(1, n, length, width, device=device, dtype=half, requires_grad=True) for n in (heads, kv, kv)
        )
        starts = torch.tensor([0, length // 2, length], device=device) if packed else None
        with Kernels() as kernels:
            packed_attention(layer, query, key, value, None, cu_seq_lens_q=starts)[0].sum().backward()
        found.append(kernels.peak)
    grows, names = found[1] / found[0], sorted(kernels.names)
    passed = grows < 2.5 and not any("softmax" in name for name in names)
    name = f"attention of {model}{', packed' * packed}"
    row(name, f"{', '.join(names)}; {grows:.1f} x", "no softmax; < 2.5 x for twice the length", passed)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_texts_of_a_packed_row_in_one_call(window, row, monkeypatch):
    """Against a call each. tests/training/test_packed_attention.py shows on a CPU what the kernel is given."""
    layer, lengths, found = SimpleNamespace(num_key_value_groups=3, is_causal=True), (300, 17, 1, 706), []
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    given = [torch.randn(1, n, 1024, 64, device="cuda", dtype=torch.float16, requires_grad=True) for n in (9, 3, 3)]
    name = f"packed row, {'a window of 100' if window else 'whole texts'}: outputs and gradients"
    if flash_dtype(given[0], 0.0) is None:
        return row(name, "a call for each text: this card or this PyTorch has no FlashAttention for all")
    for _ in range(2):
        out = packed_attention(layer, *given, None, cu_seq_lens_q=starts, sliding_window=window)[0]
        found.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
        monkeypatch.setattr("shared.training.packed_attention.flash_dtype", lambda query, dropout: None)
    apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))
    row(name, f"{apart:.2%} from a call each", "< 1 %", apart < 0.01)


ON_CPU = [recipe for recipe in RECIPES if recipe.endswith("/t4.yaml") or "llama2_qlora" in recipe]
SIZES = [("tiny", recipe) for recipe in ON_CPU]
SIZES += [pytest.param("real", recipe, marks=pytest.mark.gpu) for recipe in RECIPES]


@pytest.mark.parametrize(("size", "recipe"), SIZES)
def test_recipe(recipe, size, made, watched, row, tmp_path, capsys, monkeypatch):
    """Its plan; a few steps, the evaluation and the replies; memory and speed; the same losses as in fp32."""
    name, real = recipe.replace("/configs", ""), size == "real"
    # At which nothing overflows: a step that is skipped is another course than fp32's
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**8))
    main(recipe, [*flags(recipe, size, made, tmp_path / "plan"), "--dry_run"])
    planned = float(re.search(r"about ([\d.]+) GB memory", capsys.readouterr().out)[1])
    with host_memory() as on_host:
        main(recipe, flags(recipe, size, made, tmp_path / "run"))
    afterwards = torch.cuda.max_memory_reserved() if real else 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    before, after = (results.get(f"{which}_loss") for which in ("base", "test"))
    if before is not None:  # classify_bert has no untrained model to compare with
        row(f"{name}: loss of the test split", f"{before:.3f} -> {after:.3f}", "falls", after < before)

    half = watched.products.half()
    # Falcon's one key for all heads is broadcast, which PyTorch's kernels refuse: its attention is computed in fp32
    without = {"T5": "feed-forward layers", "Falcon 7B": "attention"}.get(RECIPES[recipe])
    if without and real:
        row(f"{name}: products in half precision", f"{half:.1%}", f"without the {without}")
    else:
        row(f"{name}: products in half precision", f"{half:.1%}", ">= 95 %", half >= 0.95)

    most = max(on_host) / 1e9
    row(f"{name}: memory of the process in GB", f"{most:.1f}", "< 6", most < 6)

    first = min(5, len(watched.starts) - 2)
    seconds = watched.starts[-1] - watched.starts[first]
    speed = sum(watched.positions[first:-1]) / seconds
    flops = (
        watched.products.flops.total()
        / watched.positions[1]
        * speed
        / matmul_flops(0.2, torch.float16 if real else torch.bfloat16)
    )
    row(f"{name}: tokens a second", f"{speed:,.0f}, {flops:.0%} of a large product's operations")
    share = sum(watched.waits[first:-1]) / seconds
    fast = not real or torch.cuda.get_device_capability() >= (8, 0)  # rows are prepared for a T4's pace
    row(f"{name}: waits for rows", f"{share:.1%} of the time", "" if fast else "< 5 %", fast or share < 0.05)
    if real:
        ratio = planned / (watched.allocated / 1e9)
        row(f"{name}: memory in GB", f"{watched.reserved / 1e9:.1f}", "<= 14.5, a T4's", watched.reserved <= T4)
        row(f"{name}: evaluation and replies in GB", f"{afterwards / 1e9:.1f}", "<= 14.5", afterwards <= T4)
        row(f"{name}: planned / measured memory", f"{ratio:.2f}", "0.75 to 1.25", 0.75 <= ratio <= 1.25)

    if "7B" not in RECIPES[recipe]:  # in fp32 they fit nowhere
        same = {"max_steps": STEPS[size] // 2}
        if "classify" in recipe:  # a head that is fitted to a random encoder leans on what half precision does not hold
            monkeypatch.setattr("linear_probe.start_head", lambda *given: None)
        main(recipe, flags(recipe, size, made, tmp_path / "half", **same))
        main(recipe, flags(recipe, size, made, tmp_path / "fp32", fp16=False, bf16=False, **same))
        losses, exact = (task_runs.losses(tmp_path / run) for run in ("half", "fp32"))
        apart = abs(sum(losses.values()) / sum(exact.values()) - 1)
        row(f"{name}: losses against fp32", f"{apart:.2%} apart", "< 5 %", apart < 0.05)
        norms = [task_runs.logged(tmp_path / run, "grad_norm")[1] for run in ("half", "fp32")]
        apart = abs(norms[0] / norms[1] - 1)
        row(f"{name}: first gradient's norm against fp32", f"{apart:.2%} apart", "< 5 %", apart < 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["chat_sft/configs/t4.yaml", "pretrain_gpt2/configs/t4.yaml"])
def test_the_scale_of_fp16_moves(recipe, made, watched, row, tmp_path, monkeypatch):
    """From one at which the gradients overflow: those steps are skipped, and nothing infinite stays behind."""
    finite, step = [], transformers.Trainer.training_step

    def look(self, *given, **more):
        states = [x for state in self.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        finite.append(all(x.isfinite().all() for x in [*self.model.parameters(), *states]))
        return step(self, *given, **more)

    monkeypatch.setattr(transformers.Trainer, "training_step", look)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**30))
    main(recipe, flags(recipe, "real", made, tmp_path / "run", fp16=True, bf16=False))
    scale, name = (
        watched.trainer.accelerator.scaler.get_scale(),
        f"{recipe.split('/')[0]}: scale of fp16 that overflows",
    )
    row(name, f"2^30 -> 2^{math.log2(scale):.0f}", "falls", scale < 2.0**30)
    finite += [math.isfinite(loss) for loss in task_runs.losses(tmp_path / "run").values()]
    row(f"{name}: weights, momenta, losses", "finite" if all(finite) else "not finite", "finite", all(finite))


def test_killed_it_goes_on(size, made, row, tmp_path):
    recipe = "pretrain_gpt2/configs/t4.yaml"
    script, options = ROOT / "tasks" / "pretrain_gpt2" / "train.py", {"save_strategy": "steps", "save_steps": 2}
    options |= {"resume": "auto", "max_steps": 8, "max_test_rows": 2}
    options |= {"bf16": False} if size == "tiny" else {}  # which a CPU computes slowly
    argv = {name: flags(recipe, size, made, tmp_path / name, **options) for name in ("whole", "killed")}
    whole = task_runs.command(script, *argv["whole"])
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert task_runs.interrupt(script, argv["killed"], tmp_path / "killed", 2, signal.SIGKILL) == -signal.SIGKILL
    again = task_runs.command(script, *argv["killed"])
    assert again.returncode == 0 and "Resumes from" in again.stdout, again.stderr[-3000:]
    if size == "real":
        manifest = json.loads((tmp_path / "killed" / "checkpoint-8" / "manifest.json").read_text())
        row(
            "the scale of fp16 is in a checkpoint",
            "scaler.pt" in manifest["files"],
            "",
            "scaler.pt" in manifest["files"],
        )
    expected, found = (task_runs.losses(tmp_path / name) for name in ("whole", "killed"))
    apart = max(abs(found[step] / expected[step] - 1) for step in expected)
    row("killed after 2 of 8 steps: losses", f"{apart:.2%} apart", "< 0.1 %", apart < 1e-3)


def test_a_4_bit_adapter_is_exported(size, made, row, tmp_path):
    """It is merged into the weights that were not rounded; the graph passes the gate of `shared.export`."""
    recipe = "chat_sft/configs/t4.yaml"
    main(recipe, flags(recipe, size, made, tmp_path / "run", method="qlora"))
    forms = export(str(tmp_path / "run"), ["onnx"], tmp_path / "forms")["artifacts"]
    row("export of a 4-bit adapter", f"{forms['onnx']['megabytes']:,.0f} MB", "kept", "onnx" in forms)


@pytest.mark.gpu
def test_out_of_memory(made, watched, row, tmp_path, caplog):
    """What half of the micro-batch takes is all that there is."""
    recipe = "pretrain_gpt2/configs/t4.yaml"
    caplog.set_level("INFO", "taskbook")
    half = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    main(recipe, flags(recipe, "real", made, tmp_path / "half", **half))
    most = 1.1 * watched.reserved
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
    try:
        main(recipe, flags(recipe, "real", made, tmp_path / "whole", per_device_train_batch_size=8))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    row(
        "out of memory: smaller micro-batches",
        f"{most / 1e9:.1f} GB",
        "are said",
        "Out of memory at step 1" in caplog.text,
    )
    expected, found = (task_runs.losses(tmp_path / name) for name in ("half", "whole"))
    first = abs(found[1] / expected[1] - 1)
    row("out of memory: the first loss", f"{first:.3%} apart", "< 0.1 %", first < 1e-3)
    apart = abs(sum(found.values()) / sum(expected.values()) - 1)
    row("out of memory: losses", f"{apart:.2%} apart", "< 2 %", apart < 0.02)


@pytest.mark.parametrize("profile", ["multi_gpu", "fsdp"])
@pytest.mark.parametrize("recipe", ["chat_sft/configs/t4.yaml", "pretrain_gpt2/configs/t4.yaml"])
@pytest.mark.gpu
def test_several_gpus(recipe, profile, made, row, tmp_path):
    """Two processes against one. tests/tasks/test_contract.py does this for every task on a CPU."""
    name = f"two GPUs, {profile}: {recipe.split('/')[0]}"
    if torch.cuda.device_count() < 2:
        return row(name, "this machine has one GPU")
    options = {"optimizer": "adamw"} if "pretrain" in recipe else {"train_sampling_strategy": "random"}
    script, environment = ROOT / "tasks" / recipe.split("/")[0] / "train.py", os.environ | {"OMP_NUM_THREADS": "4"}
    launch = [ROOT / ".venv" / "bin" / "accelerate", "launch", "--config_file", ROOT / "accelerate" / f"{profile}.yaml"]
    launch += ["--num_processes", "2", script, *flags(recipe, "real", made, tmp_path / "two", **options)]
    two = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr[-3000:]
    main(recipe, flags(recipe, "real", made, tmp_path / "one", **options))
    found, expected = (task_runs.losses(tmp_path / folder) for folder in ("two", "one"))
    apart = max(abs(found[step] / expected[step] - 1) for step in expected)
    row(name, f"losses {apart:.2%} apart", "< 2 %", apart < 0.02)
