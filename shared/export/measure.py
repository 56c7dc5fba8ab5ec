"""Is an exported model the same, and what does it cost? Each artifact in a process of its own, next to the original. Used by
shared/export/export.py.
"""

import multiprocessing
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
import transformers

from shared.export.score import score
from shared.inference.golden import GOLDEN, GOLDEN_TOKENS, golden_outputs
from shared.inference.model import Model, load
from shared.inference.torch_runner import TASKS

# transformers imports when it is first asked: here, so that processes start with it, and loading is no importing
for _name in ("AutoConfig", "AutoTokenizer", "GenerationConfig", "GenerationMixin", "PreTrainedModel", *TASKS.values()):
    getattr(transformers, _name)

WRITING = ("text-generation", "summarization")


def write_golden(folder: Path, artifact: str, prompts: list, outputs: list, ids: list, stop_ids) -> None:
    """golden.json: prompts, their token ids, what this artifact makes of them, a checksum of each file; see `Model.verify`."""
    from shared.publish import results

    items = [{"prompt": p, "input_ids": i, "output": o} for p, i, o in zip(prompts, ids, outputs, strict=True)]
    kept = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (GOLDEN, "README.md"))
    golden = {"artifact": artifact, "stop_ids": list(stop_ids), "items": items}
    results.write_json(folder / GOLDEN, golden | {"sha256": {path.name: results.file_digest(path) for path in kept}})


def measure(folder: str, artifact: str | None, task: str, rows: list[dict], prompts: list, settle: bool) -> dict:
    """Loads one artifact and measures it; called in a fresh process, whose memory is its own.

    Args:
        settle: as in `shared.export.score.score`.

    Returns:
        What `score` gives, `device`, `load_seconds`, `latency_ms` and `per_second` by batch size, `peak_memory_gb`, `outputs`,
        `input_ids` and `stop_ids` of the golden prompts.
    """
    from shared.export.export import quiet_libraries

    quiet_libraries()  # a process of its own: each call of a model whose settings hold a max_length would be warned of
    begun = time.perf_counter()
    model = load(folder, task=task) if artifact is None else Model(Path(folder), artifact, task)
    found = {"load_seconds": round(time.perf_counter() - begun, 2), "device": model.device.type}
    found |= score(model, rows, settle)
    use(model, prompts[:1])  # the first call allocates
    found["input_ids"], found["stop_ids"] = [model.prompt_ids(p) for p in prompts], list(model.stop_ids)
    found["outputs"], found["latency_ms"], found["per_second"] = [], {}, {}
    batches = {
        1: [[p] for p in prompts],
        8: [[prompts[(8 * call + i) % len(prompts)] for i in range(8)] for call in range(2)],
    }
    for size, calls in batches.items():
        times, units = [], 0
        for chosen in calls:
            begun = time.perf_counter()
            outputs = use(model, chosen)
            times.append(time.perf_counter() - begun)
            units += sum(map(len, outputs)) if model.task in WRITING else len(outputs)
            found["outputs"] += outputs if size == 1 else []
        found["latency_ms"][str(size)] = {f"p{p}": round(1000 * float(np.percentile(times, p)), 1) for p in (50, 95)}
        found["per_second"][str(size)] = round(units / sum(times), 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found | {"peak_memory_gb": round(peak / 1e9, 2)}


def use(model: Model, prompts: list) -> list:
    """What `golden_outputs` gives, all prompts as one batch where the model takes one."""
    if model.task == "text-generation":
        return model.generate([model.prompt_ids(p) for p in prompts], max_new_tokens=GOLDEN_TOKENS)
    if model.task == "summarization":
        return model.summary_ids(prompts, GOLDEN_TOKENS)
    if model.task == "question-answering":
        found = model.answer([p["question"] for p in prompts], [p["context"] for p in prompts], cut=True)
        return [[answer["start"], answer["end"]] for answer in found]
    return golden_outputs(model, prompts)


def _way_to_start() -> str:
    """A process that is forked cannot use a GPU that the first one has looked at, and importing looks."""
    return "spawn" if torch.cuda.is_available() else "forkserver"


def start_measuring() -> None:
    """Starts what the processes of `in_a_process` are forked from. It imports the libraries while something else is done."""
    context = multiprocessing.get_context(_way_to_start())
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["shared.export.measure", "onnxruntime", "transformers.cache_utils"])
        forkserver.ensure_running()


def in_a_process(*arguments) -> dict:
    """`measure` in a process of its own, started from one that has imported the libraries and nothing else.

    Raises:
        UserError: the artifact cannot be loaded or used.
    """
    with multiprocessing.get_context(_way_to_start()).Pool(1) as pool:
        found = pool.apply(measure, arguments)
        pool.close()  # leaving the block alone would kill it, and it would complain
        pool.join()
    return found
