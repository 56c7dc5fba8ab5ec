"""What vLLM reads of a model's folder, looked at without vLLM, which needs a GPU. Used by export/ and tasks/."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def differs(folder: Path) -> list[str]:
    """What of a folder is not as vLLM reads it: configuration, tokenizer, template, stop tokens, safetensors by their names."""
    found, names = [], {path.name for path in folder.iterdir()}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    found += [f"no {name}" for name in sorted(wanted - names)]
    found += [f"{name} stands in the way" for name in sorted(names) if name.startswith("adapter_")]
    if found:
        return found
    settings = json.loads((folder / "config.json").read_text())
    (architecture,) = settings["architectures"]
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        found.append(f"architecture {architecture}")
    found += [name for name in ("auto_map", "quantization_config") if name in settings]
    weights = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != "pt":
                found.append(f"{path.name} is not marked as PyTorch's")
            weights |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    found += [f"no tensor {name}" for name in own.keys() - weights.keys() - tied]
    found += [f"a tensor {name} {weights[name]}" for name in weights if own.get(name) != weights[name]]
    tokenizer, chat = AutoTokenizer.from_pretrained(folder), [{"role": "user", "content": "What?"}]
    if "What?" not in tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False):
        found.append("a template without the message")
    if len(tokenizer) > config.vocab_size:
        found.append("a tokenizer with more tokens than the model has")
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        found.append(f"texts end at {ends}, a turn at {tokenizer.eos_token_id}")
    return found
