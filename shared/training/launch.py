"""How every task starts: logging, seed, precision, launch checks, errors, where to resume. Called by each train.py.

Torch is not imported here before the configuration has been checked.
"""

import errno
import inspect
import json
import logging
import math
import os
import shlex
import shutil
import sys
import sysconfig
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from shared import UserError
from shared.metrics import check_caches
from shared.training.arguments import parse
from shared.training.hardware import check_precision, cores, device_type, gpus, hardware, multiplies_bf16

log = logging.getLogger("taskbook")
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # says at import which kernel it could not download


def run(main, script_class: type, training: str) -> None:
    """Parse, call `main(script_args, training_args, run_args)`, and turn a foreseeable error into one line and exit code 2."""
    parsed = ()
    try:
        parsed = parse(script_class, training)
        main(*parsed)
    except UserError as error:
        if _traceback_asked(sys.argv[1:]):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if _traceback_asked(sys.argv[1:]):
            raise
        if isinstance(error, RuntimeError) and _connection_lost(error):
            print(f"error: {_what_was_lost(error, Path(parsed[1].output_dir))}", file=sys.stderr, flush=True)
            os._exit(2)  # an ordinary exit would wait for the others once more
        if write_failed(error):
            said = "the disk is full. Checkpoints written before are intact; free space, then repeat the command."
        elif isinstance(error, OSError) and "no file named model.safetensors" in str(error):  # transformers'
            said = f"{parsed[2].model_name_or_path} has no weights: model.safetensors is missing."
        else:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)


# torch.save does not say why: these are its words for a write that failed, in practice a full disk.
_WRITE_FAILED = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos", "iostream error")


def write_failed(error: BaseException | None) -> bool:
    """OSError from Python, SafetensorError from Rust, RuntimeError from torch.save: three ways to say ENOSPC."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in _WRITE_FAILED):
            return True
        error = error.__cause__ or error.__context__
    return False


def _traceback_asked(argv: list[str]) -> bool:
    """`--traceback`, `--traceback true`, `--traceback=true`: the last one counts. An error may come before parsing."""
    asked = False
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):  # of none there is none
        name, _, value = flag.partition("=")
        if name == "--traceback":
            asked = (value or following).lower() not in ("false", "0", "no", "n", "f")
    return asked


def _connection_lost(error: RuntimeError) -> bool:
    """Whether it is gloo's or NCCL's word for a process that does not answer any more."""
    import torch

    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "[gloo]")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def _what_was_lost(error: RuntimeError, output_dir: Path) -> str:
    """One line: whether the other process has ended or hangs, and what repeating the command does."""
    said = str(error).splitlines()[0][:150]
    if "imed out" in said or "timeout" in said:
        what = f"which hangs ({said}). If it does so at the same step again, the code is to blame"
    else:
        what = f"which has ended ({said}). Its own last line says why"
    kept = sorted(int(path.parent.name.split("-")[1]) for path in output_dir.glob("checkpoint-[0-9]*/manifest.json"))
    then = f"goes on from checkpoint-{kept[-1]}" if kept else "starts anew: there is no complete checkpoint"
    return f"lost the connection to another process, {what}; else the same command on all machines {then}."


def check_schedule(training_args) -> None:
    """Builds the schedule once, which Trainer does when all data are read.

    Raises:
        UserError: `--lr_scheduler_kwargs` that this type of schedule does not take, or lacks.
    """
    import torch
    from transformers import get_scheduler

    name, named = training_args.lr_scheduler_type, training_args.lr_scheduler_kwargs or {}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training_args.learning_rate)
    try:
        get_scheduler(name, optimizer, 0, 1000, named)
    except (TypeError, ValueError) as error:
        given = f"with --lr_scheduler_kwargs {json.dumps(named)}" if named else "without --lr_scheduler_kwargs"
        raise UserError(f"--lr_scheduler_type {getattr(name, 'value', name)} {given}: {error}.") from error
    steps = training_args.max_steps
    changing = training_args.get_warmup_steps(steps) + named.get("num_decay_steps", 0)
    if 0 < steps < changing:
        log.warning(
            "--max_steps %d: warm-up and decay take %d, so that the rate is hardly ever whole. Lower --warmup_steps, or "
            "num_decay_steps in --lr_scheduler_kwargs.",
            steps,
            changing,
        )


def check_optimizer(training_args) -> None:
    """Looks the optimizer up, which Trainer does when all data are read.

    Raises:
        UserError: its package is not installed; options that it does not read, which upstream would pass over.
    """
    from transformers import Trainer

    name, given = training_args.optim.value, training_args.optim_args or ""
    pairs = [each.strip().split("=") for each in given.split(",") if each.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--optim_args {given}: write name=value, several with commas between them.")
    kind = None
    try:
        kind, _ = Trainer.get_optimizer_cls_and_kwargs(training_args)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        if "You need to pass a" not in str(error):  # a model: GaLore and the like look for their layers in it, later
            raise UserError(f"--optim {name}: {str(error).splitlines()[0]}") from error
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS  # nothing else knows which options each one reads

    source = inspect.getsource(_OPTIMIZER_HANDLERS[name])
    if unread := [option for option, _ in pairs if f'"{option}"' not in source]:
        raise UserError(f"--optim_args {given}: --optim {name} reads no {', '.join(unread)}. Leave it out.")
    if "weight_decay" in dict(pairs):
        raise UserError(f"--optim_args {given}: the groups of weights have their own decay. It is --weight_decay.")
    usual = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    adam = [option for option, value in usual.items() if getattr(training_args, option) != value]
    if adam and "adam_" not in source:
        log.warning("--optim %s does not read %s", name, " and ".join(f"--{option}" for option in adam))
    if training_args.optim_target_modules is not None and not name.startswith(("galore", "apollo")):
        raise UserError(f"--optim_target_modules: --optim {name} does not read it. Leave it out.")
    if hasattr(kind, "train"):  # schedule-free ones
        raise UserError(
            f"--optim {name}: it evaluates other weights than it trains, which is not done here. Take another."
        )


EMULATED = "This CPU only emulates bf16, slowly: --bf16 false"
FASTER = "This CPU has instructions for bf16: with --bf16 true it trains faster, to nearly the same losses"


def setup(training_args, run_args) -> None:
    """Logging, seed, precision and launch checks, and what the training arguments must be in every task.

    Raises:
        UserError: a cache that cannot be written, a precision that this hardware does not have, a schedule or an optimizer
            that cannot be built.
    """
    import datasets
    import torch
    import transformers
    from accelerate.state import DistributedType, PartialState
    from transformers.utils import is_liger_kernel_available

    from shared.training.sharding import is_sharded

    rank = training_args.process_index
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for noisy in ("httpx", "filelock", "fsspec", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()  # loading takes a second here; training and evaluation have their own bars
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated")  # called inside trl and peft
    check_caches("datasets", "metrics", "modules")  # the last two are needed at the end, when all is trained
    check_schedule(training_args)
    check_optimizer(training_args)
    if not run_args.dry_run:  # a plan may be for another machine
        check_precision(training_args.fp16, training_args.bf16, gpus())
    # It plans each shape that it has not seen, for half a second and more (H200), and batches of texts have many
    torch.backends.cuda.enable_cudnn_sdp(False)
    training_args.dataloader_pin_memory &= torch.cuda.is_available()  # torch warns about it without a GPU
    transformers.set_seed(training_args.seed)
    processes = training_args.world_size
    if processes != int(os.environ.get("WORLD_SIZE", processes)):
        raise UserError(
            f"{os.environ['WORLD_SIZE']} processes were asked for, but this one runs alone; see accelerate/cpu.yaml."
        )
    if processes > 1 and not torch.cuda.is_available():  # transformers 5.23 hands --ddp_timeout on for GPUs only
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=training_args.ddp_timeout))
    if is_sharded(training_args):
        if PartialState().distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
            raise UserError("FSDP needs GPUs: without one accelerate does not shard. Use accelerate/cpu.yaml.")
        # Else only the first process would have the weights, and all others would try and compare models without any
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if "ACCELERATE_MIXED_PRECISION" in os.environ and not torch.cuda.is_available():
        # accelerate launch gives each process a single thread, so that one process would leave the other cores idle
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    precision = "fp16" if training_args.fp16 else "bf16" if training_args.bf16 else "fp32"
    share = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps, processes
    log.info(
        "%s, %d process%s, %s, seed %d, %d rows a step (%d at once x %d accumulated x %d)",
        *(hardware(), processes, "es" * (processes > 1), precision, training_args.seed, math.prod(share), *share),
    )
    if device_type() == "cpu" and multiplies_bf16() == (not training_args.bf16):
        log.info("%s", EMULATED if training_args.bf16 else FASTER)
    for line in run_args.set_aside:
        log.info("%s", line)
    # Trainer would split each batch over them (DataParallel), packed rows and their lengths, too
    if training_args.n_gpu > 1:
        command = f"accelerate launch --config_file accelerate/multi_gpu.yaml --num_processes {training_args.n_gpu}"
        log.info("One process trains on one of %d GPUs. On all of them: %s", training_args.n_gpu, command)
        training_args._n_gpu = 1
    if torch.cuda.is_available() and not _triton_compiles():
        from trl.kernels import chunked_logprob

        chunked_logprob._TRITON_AVAILABLE = False  # as where trl finds none: PyTorch computes the same, more slowly
        log.info(
            "Triton needs gcc and Python.h (apt-get install gcc python3-dev): losses are computed without, more slowly"
        )
    if training_args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel: it is not installed: pip install liger-kernel, or leave it out.")
    if getattr(training_args, "activation_offloading", False) and not torch.cuda.is_available():
        raise UserError(
            "--activation_offloading moves activations from a GPU to the CPU, and there is none. Leave it out."
        )
    _check_loaders(training_args.accelerator_config)
    _check_trackers(training_args.report_to)
    training_args.logging_nan_inf_filter = False  # upstream would log the running average in place of a NaN
    if training_args.hub_token:  # Trainer would write it into training_args.bin
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    _check_hub_strategy(training_args, run_args)
    # Trainer would push checkpoints in place, whole or not: the model is pushed once, at the end, by `finish`
    run_args.push, training_args.push_to_hub = training_args.push_to_hub, False
    if run_args.push and rank == 0 and not (run_args.dry_run or run_args.show_data):
        from shared.publish.hub import check_push

        name = training_args.hub_model_id or Path(training_args.output_dir).name
        training_args.hub_model_id = check_push(name, training_args.hub_private_repo)
    run_args.started = time.time()


def _triton_compiles() -> bool:
    """Whether Triton can build here what starts its kernels, a module of Python in C; else it ends a run at its first loss."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and (Path(sysconfig.get_path("include")) / "Python.h").exists()


def _check_loaders(config) -> None:
    """Raises UserError for options of accelerate's data loaders with which steps would have other rows, or processes wait."""
    usual, names = type(config)(), ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")
    changed = [name for name in names if getattr(config, name) != getattr(usual, name)]
    changed += ["gradient_accumulation_kwargs"] if "num_steps" in (config.gradient_accumulation_kwargs or {}) else []
    if changed:
        raise UserError(
            f"--accelerator_config {', '.join(changed)}: here each process fetches its own rows of a step, in an order that a "
            "resume repeats. Leave it out."
        )


def _check_trackers(names: list[str]) -> None:
    """Raises UserError for a tracker that does not exist or is not installed."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to {name}: no such tracker. Known: none, {', '.join(INTEGRATION_TO_CALLBACK)}.")
        if name not in (*get_available_reporting_integrations(), "flyte"):  # which upstream's list leaves out
            raise UserError(f"--report_to {name}: it is not installed: pip install {name}, or --report_to none.")


def _check_hub_strategy(training_args, run_args) -> None:
    """Raises UserError where an option for the Hub would be ignored."""
    strategy = run_args.resolved.get("hub_strategy", "end")
    if strategy not in ("end", "checkpoint"):
        raise UserError(
            f"--hub_strategy {strategy}: here it is `end` (the finished model) or `checkpoint` (each one, too)."
        )
    for flag, given in (
        ("--hub_strategy checkpoint", strategy == "checkpoint"),
        ("--resume hub", run_args.resume == "hub"),
    ):
        if given and not training_args.push_to_hub:
            raise UserError(
                f"{flag} needs --push_to_hub true, and --hub_model_id unless the output folder has its name."
            )
    training_args.hub_strategy = strategy


BEGUN = "# Begun last in this folder: "


def begin(args, run_args, preflight: dict, identity: dict):
    """The checkpoint to go on from; writes run.yaml and preflight.json once it is sure that the run is not refused.

    Args:
        preflight: facts about the training rows, for preflight.json.
        identity: see `shared.training.identity.run_identity`.

    Returns:
        Path of a checkpoint, or None.

    Raises:
        SystemExit: the run is finished; its result has been shown.
        UserError: another run writes to the folder, or it cannot be written; see also `find_checkpoint`.
    """
    from shared.publish import results
    from shared.training.checkpoints import find_checkpoint
    from shared.training.hub_checkpoints import fetch
    from shared.training.identity import fingerprint
    from shared.training.processes import on_main_process

    output, fetched = Path(args.output_dir), None

    def claim() -> None:
        run_args.lock = _claim(output)

    on_main_process(claim)
    run_args.identity = identity
    if run_args.resume == "auto" and on_main_process(lambda: _finished(output, args, run_args)):
        sys.exit()
    if args.hub_strategy == "checkpoint" or run_args.resume == "hub":
        fetched = partial(fetch, args.hub_model_id, output)
    checkpoint = find_checkpoint(output, run_args.resume, identity, fetched)
    if args.should_save:
        again = shlex.join([*shlex.split(run_args.command)[:3], "--config", f"{output}/run.yaml"])
        header = f"# Repeat this run: {again}\n{BEGUN}{fingerprint(run_args)}\n"
        resolved = yaml.safe_dump(run_args.resolved, allow_unicode=True)
        (output / "run.yaml").write_text(header + resolved, encoding="utf8")
        results.write_json(output / "preflight.json", preflight)
    return checkpoint


def _finished(output: Path, args, run_args) -> bool:
    """Whether this very run has its result already, which is shown then, and pushed where that is asked for."""
    from shared.publish import hub
    from shared.training.identity import fingerprint

    try:
        results, mine = json.loads((output / "all_results.json").read_text("utf8")), fingerprint(run_args)
        # Another run may have begun since, and have written some of its own files
        _, other, begun = (output / "run.yaml").read_text("utf8").partition(BEGUN)
        same = results["run"]["fingerprint"] == mine and (not other or begun.startswith(mine))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not same or not any(output.glob("*.safetensors")):
        return False
    log.info("%s", results["line"])
    log.info("This run is finished: %s. `--resume never` begins anew.", output / "README.md")
    if run_args.push:
        log.info("pushed: %s", hub.publish(output, args.hub_model_id, args.hub_private_repo))
    return True


def _claim(output: Path) -> FileLock:
    """Makes the folder and locks it for this run; the lock ends with the process, however that ends."""
    lock = FileLock(output / ".lock", is_singleton=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{output}: another run is writing to it. Wait for its end, or name another --output_dir."
        ) from None
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be written ({error.strerror}). Name another folder.") from error
    return lock
