"""The formats: which a model can have, and how each is written. Called by export.py."""

import contextlib
import inspect
import io
import json
import shutil
from pathlib import Path

from shared import UserError

FORMATS = ("merged", "fp16", "int8", "gguf", "gguf-q8_0", "litert", "onnx", "onnx-int8", "int4")
OF_ONE_GRAPH = ("onnx", "onnx-int8", "int4")
HELP = {
    "merged": "safetensors in fp32, adapters merged in",
    "fp16": "safetensors of half the size",
    "int8": "safetensors with 8-bit weights (bitsandbytes)",
    "gguf": "llama.cpp, Ollama, LM Studio in fp16",
    "gguf-q8_0": "the same with 8-bit weights",
    "litert": "TensorFlow Lite in fp32; needs make litert-env",
    "onnx": "ONNX Runtime in fp32",
    "onnx-int8": "ONNX Runtime with 8-bit weights",
    "int4": "ONNX Runtime with 4-bit weights, 8 where they distort most",
}
# Architectures that onnxruntime-genai builds itself, with rotary embeddings inside of its attention; others are traced
GENAI = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
NOT_SETTINGS = (
    "*.index.json",
    "all_results.json",
    "trainer_state.json",
    "preflight.json",
    "adapter_config.json",
    "golden.json",
)


def impossible(folder: Path, task: str) -> dict[str, str]:
    """The formats that this model cannot have, each with the reason."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from shared.export import gguf_file, litert_file

    adapter, tokens = _read(folder / "adapter_config.json"), folder
    if adapter:
        from peft import PeftConfig

        if PeftConfig.from_pretrained(folder).is_prompt_learning:
            return dict.fromkeys(FORMATS, "virtual tokens stand before the prompt and are no change of the weights")
        from shared.publish.hub import pull

        folder = pull(adapter["base_model_name_or_path"])
    found = {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if reason := litert_file.cannot(config, task):
        found["litert"] = reason
    if getattr(config, "attention_type", None) == "block_sparse":
        reason = "its attention is another one for short texts than for long ones (block_sparse), and a graph has one"
        found |= dict.fromkeys(("litert", *OF_ONE_GRAPH), reason)
    if task != "text-generation":
        found["int4"] = "four bits are measured for decoders only, whose speed is that of reading their weights"
        found |= dict.fromkeys(("gguf", "gguf-q8_0"), "llama.cpp is asked to continue texts only")
        return found
    if reason := gguf_file.cannot(config, tokens):
        found |= dict.fromkeys(("gguf", "gguf-q8_0"), reason)
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_attention_backend:
        reason = f"{config.model_type} has attention code of its own, which is not that of ONNX Runtime or LiteRT"
        found |= dict.fromkeys(("litert", *OF_ONE_GRAPH), reason)
    return found


def write(name: str, folder: Path, model, source: Path, target: Path, task: str) -> None:
    """Writes one format.

    Args:
        folder: of the whole model in fp32, which `from_pretrained` reads.
        model: the same in memory; tracing changes it, so the graphs come last.
        source: where tokenizer, template and settings are.
    """
    import torch
    from transformers import AutoTokenizer

    target.mkdir(parents=True)
    if name == "merged":
        model.save_pretrained(target)
    elif name == "fp16":
        _save_half(model, target)
    elif name == "int8":
        import transformers

        from shared.inference.torch_runner import TASKS

        # The head stays as it is: its rounding is what shows most in the output
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        auto = getattr(transformers, TASKS[task])
        options = {"quantization_config": config, "dtype": torch.float32, "trust_remote_code": False}
        auto.from_pretrained(folder, **options).save_pretrained(target)
    elif name.startswith("gguf"):
        from shared.export import gguf_file

        gguf_file.write(model, source, target, quantized=name == "gguf-q8_0")
    elif name == "litert":
        from shared.export import litert_file
        from shared.inference.positions import longest_input

        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        length = longest_input(model.config, tokenizer) or litert_file.LONGEST
        litert_file.write(model, folder, target, task, length, "token_type_ids" in tokenizer.model_input_names)
    else:
        from shared.export import graphs, quantize
        from shared.export.graph_check import Check

        traced = target.parent / ".graphs"  # in fp32, for all three formats
        if not traced.is_dir():
            traced.mkdir()
            try:
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
                segments = _reads_segments(tokenizer, model)
                check = Check(model, tokenizer, task, segments)
                if task == "text-generation" and _genai_builds(folder):
                    _build_with_genai(folder, traced)
                else:
                    graphs.export(model, traced, task, segments)
                check.compare(traced, folder / "config.json")
            except UserError:
                shutil.rmtree(traced)
                raise
        for graph in sorted(traced.glob("*.onnx")):
            if name == "onnx":
                for file in (graph, graph.with_name(f"{graph.name}.data")):
                    if file.is_file():
                        shutil.copy(file, target)
            else:
                quantize.quantize(graph, target / graph.name, 4 if name == "int4" else 8, task)
    _copy_settings(source, folder, target, weights=name in ("merged", "fp16", "int8"))


def _save_half(model, target: Path) -> None:
    """fp16 weights, but for what transformers keeps in fp32: T5's feed-forward output overflows in fp16.

    Raises:
        UserError: other weights do.
    """
    import copy

    import torch

    half = copy.deepcopy(model)
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in half.named_parameters():
        if not any(part in kept for part in name.split(".")):
            whole, parameter.data = parameter.data, parameter.data.half()
            if not torch.equal(parameter.isfinite(), whole.isfinite()):
                raise UserError(f"{name} holds numbers that overflow in fp16")
    half.config.dtype = torch.float16
    half.save_pretrained(target)


def _build_with_genai(folder: Path, target: Path) -> None:
    """onnxruntime-genai's own builder."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    cache = target / ".cache"
    where = ("", str(folder), str(target), "fp32", "cpu", str(cache))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        create_model(*where, **parse_extra_options(*where, []))
    shutil.rmtree(cache, ignore_errors=True)


def _copy_settings(source: Path, folder: Path, target: Path, weights: bool) -> None:
    """Tokenizer, template and generation settings as the run has them; the configuration as the weights were saved with."""
    from fnmatch import fnmatch

    for origin in (folder, source):
        for path in sorted(origin.iterdir()):
            known = any(fnmatch(path.name, kind) for kind in SETTINGS)
            if path.is_file() and known and not any(fnmatch(path.name, kind) for kind in NOT_SETTINGS):
                if path.name == "config.json" and (weights or origin != folder):
                    continue
                shutil.copy(path, target / path.name)


def _genai_builds(folder: Path) -> bool:
    """Whether onnxruntime-genai knows the architecture, and its rotary embeddings the width of the heads and their scaling.

    Its Llama leaves out any scaling but llama3 without a word, its Qwen and Mistral fail at most (0.18).
    """
    config = _read(folder / "config.json")
    width = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    # Its caches are as long as the window, ours as the text
    windowed = config.get("sliding_window") is not None or "sliding_attention" in (config.get("layer_types") or ())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    name, scaling = (config.get("architectures") or [""])[0], rope.get("rope_type", "default")
    known = scaling == "default" or scaling == "llama3" and name == "LlamaForCausalLM"
    return name in GENAI and width % 16 == 0 and not windowed and known


def _reads_segments(tokenizer, model) -> bool:
    """Whether the tokenizer tells first and second text apart, and the model listens: DistilBERT does not."""
    return (
        "token_type_ids" in tokenizer.model_input_names
        and "token_type_ids" in inspect.signature(model.forward).parameters
    )


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
