"""GGUF, the format of llama.cpp, Ollama and LM Studio: weights, tokenizer, template and stop tokens in one file. Called by
formats.py.

Only what was seen to give the same tokens in llama.cpp is written; anything else is refused by name.
"""

import json
import re
from pathlib import Path

import numpy as np

from shared import UserError

FILE = "model.gguf"
ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "GPT2LMHeadModel": "GPT2",
}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# How a text is cut into words before byte pairs are merged (tokenizer.json), and llama.cpp's name of it
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA3, "Bytes"): "llama-bpe",
    (QWEN2, "Bytes"): "qwen2",
}
MARK = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


def cannot(config, folder: Path) -> str | None:
    """Why a model cannot become GGUF; None where it can.

    Args:
        config: transformers' configuration.
        folder: where the tokenizer is.
    """
    name = (config.architectures or [""])[0]
    if name not in ARCHITECTURES:
        return f"{name or config.model_type} is none of {', '.join(ARCHITECTURES)}"
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        return "llama.cpp reads this architecture without its sliding window"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        return f"rotary embeddings of type {rope} have not been shown to be the same in llama.cpp"
    if name == "GPT2LMHeadModel" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        return "llama.cpp scales GPT-2's attention in the usual way only"
    activation = getattr(config, "hidden_act", None) or config.activation_function
    if activation != ("gelu_new" if name == "GPT2LMHeadModel" else "silu"):
        return f"llama.cpp computes this architecture with another activation than {activation}"
    try:
        pre_tokenizer(folder)
    except UserError as error:
        return str(error)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.chat_template and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        asked = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        if not asked.startswith(tokenizer.bos_token):
            return f"its texts begin with {tokenizer.bos_token} and its chats do not, while llama.cpp treats both alike"
    return None


def pre_tokenizer(folder: Path) -> str:
    """llama.cpp's name of a byte-level BPE tokenizer's way to cut text into words.

    Raises:
        UserError: another kind of tokenizer, or one that llama.cpp has not been seen to repeat.
    """
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    cut = whole.get("pre_tokenizer") or {}
    steps, names = cut.get("pretokenizers", [cut]), []
    for step in steps:
        kind, name = step.get("type"), None
        if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            name = step["pattern"].get("Regex")
        elif kind == "Digits" and step["individual_digits"]:
            name = "Digits"
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            name = "ByteLevel" if step.get("use_regex", True) else "Bytes"
        names.append(name)
    found = PRE_TOKENIZERS.get(tuple(names))
    model = whole.get("model") or {}
    normal = (whole.get("normalizer") or {}).get("type")
    fits = model.get("type") == "BPE" and bool(model.get("ignore_merges")) == (found == "llama-bpe")
    fits &= not model.get("byte_fallback") and normal in ((None, "NFC") if found == "qwen2" else (None,))
    if found is None or not fits:
        kind = ", ".join(str(step.get("type")) for step in steps)
        raise UserError(
            f"its tokenizer ({model.get('type') or 'no tokenizer.json'}; {kind}) is none that llama.cpp is known to repeat: "
            "byte-level BPE as in GPT-2, SmolLM2, Llama 3, Qwen 2 and 3"
        )
    return found


def plain_template(template: str) -> str:
    """A chat template without `{% generation %}` marks, which llama.cpp does not know; it renders the same text."""
    return MARK.sub(r"{#\1 \2#}", template)  # a comment takes the same blanks around it


def write(model, source: Path, target: Path, quantized: bool) -> None:
    """Writes model.gguf and, for Ollama, a Modelfile.

    Args:
        model: in fp32.
        source: where tokenizer and template are.
        quantized: matrices in 8 bits (q8_0) where their rows divide into blocks of 32, else fp16; vectors stay in fp32.
    """
    import gguf
    from transformers import AutoTokenizer

    config, tokenizer = model.config, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    kind = ARCHITECTURES[type(model).__name__]
    architecture = getattr(gguf.MODEL_ARCH, kind)
    writer = gguf.GGUFWriter(target / FILE, gguf.MODEL_ARCH_NAMES[architecture])
    _add_sizes(writer, config, kind)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantized else gguf.LlamaFileType.MOSTLY_F16)
    stops = _stops(model, tokenizer)
    _add_tokenizer(writer, tokenizer, source, config.vocab_size, stops)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings or name.endswith((".attn.bias", ".masked_bias")):
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(f"llama.cpp has no place for the weights {name}")
        values = tensor.detach().float().numpy()
        if kind == "GPT2" and values.ndim == 2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T
        if kind == "LLAMA" and re.search(r"\.[qk]_proj\.", name):
            values = _interleave(values, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
        values, stored = np.ascontiguousarray(values), None
        if values.ndim == 2:
            stored = gguf.GGMLQuantizationType.F16
            if quantized and values.shape[-1] % 32 == 0 and "position_embd" not in new:
                stored = gguf.GGMLQuantizationType.Q8_0
            if stored == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
                raise UserError(f"{name} holds numbers that overflow in fp16")
            values = gguf.quants.quantize(values, stored)
        writer.add_tensor(new, values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (target / "Modelfile").write_text(modelfile(tokenizer, stops), encoding="utf8")


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours in a head, transformers the first half with the second."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _add_sizes(writer, config, kind: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if kind == "GPT2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)


def _stops(model, tokenizer) -> list[int]:
    """Ids of the tokens that end a text, the tokenizer's own first."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    own = tokenizer.eos_token_id
    return sorted(dict.fromkeys(ends or ([] if own is None else [own])), key=lambda i: i != own)


def _add_tokenizer(writer, tokenizer, source: Path, size: int, stops: list[int]) -> None:
    import gguf

    whole = json.loads((source / "tokenizer.json").read_text(encoding="utf8"))
    most = max([*whole["model"]["vocab"].values(), *(added["id"] for added in whole["added_tokens"])])
    if most >= size:
        raise UserError(f"its tokenizer has a token {most}, its weights have rows up to {size - 1}")
    tokens = [f"[UNUSED{i}]".encode() for i in range(size)]  # models have more rows than tokens, for speed
    types = [gguf.TokenType.UNUSED] * size
    for token, i in whole["model"]["vocab"].items():
        tokens[i], types[i] = token.encode(), gguf.TokenType.NORMAL
    for added in whole["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"].encode(), kind
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(source))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add, i in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), stops, strict=False):
        add(i)
    for add, i in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if i is not None:
            add(i)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(plain_template(tokenizer.chat_template))


def modelfile(tokenizer, stops: list[int]) -> str:
    """For `ollama create`: the file beside it, the stop tokens and, of a template that treats each message alike, its text in
    Ollama's own language, which cannot read Jinja."""
    lines = [f"FROM ./{FILE}"]
    lines += [f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(i))}" for i in stops]
    if not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif (found := _by_role(tokenizer)) is not None:
        around, end, default = found
        parts = [
            f'{{{{ {"else " * bool(i)}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for i, (role, (before, after)) in enumerate(around.items())
        ]
        lines.append(f'TEMPLATE """{{{{ range .Messages }}}}{"".join(parts)}{{{{ end }}}}{{{{ end }}}}{end}"""')
        if default:
            lines.append(f'SYSTEM """{default}"""')
    return "\n".join(lines) + "\n"


def _by_role(tokenizer) -> tuple[dict, str, str] | None:
    """What stands around a message of each role, after the last one, and the system message where none is given."""

    def rendered(*turns, **options):
        return tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False, **options)

    try:
        turns = [("system", "@s@"), ("user", "@u@"), ("assistant", "@a@"), ("user", "@v@"), ("assistant", "@b@")]
        whole, asked = rendered(*turns), rendered(*turns, add_generation_prompt=True)
        parts = [rendered(*turns[: i + 1]) for i in range(len(turns))]
        alone = rendered(("user", "@u@"))
    except Exception:  # whatever a template raises, on purpose or not
        return None
    around, done = {}, ""
    for (role, text), part in zip(turns, parts, strict=True):
        own = part[len(done) :]
        if not part.startswith(done) or own.count(text) != 1:
            return None
        before, after = own.split(text)
        if around.setdefault(role, (before, after)) != (before, after) or '"""' in own or "{{" in own:
            return None
        done = part
    before, after = around["system"]
    user = "@u@".join(around["user"])
    default = alone.removesuffix(user)
    if not alone.endswith(user) or default and not (default.startswith(before) and default.endswith(after)):
        return None
    default = default[len(before) : len(default) - len(after)] if default else ""
    return around, asked[len(whole) :], default
