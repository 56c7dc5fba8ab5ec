"""A checkpoint or adapter in PyTorch, as `model.Model` runs it."""

import inspect
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad as padded

from shared import UserError
from shared.inference.positions import first_position, switches_at
from shared.inference.sampling import PROMPT_CHUNK, common_prefix, distinct, pad_left, positions_of
from shared.publish.hub import pull

GGUF = "model.gguf"
TASKS = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "feature-extraction": "AutoModel",
    "summarization": "AutoModelForSeq2SeqLM",
}


class TorchRunner:
    """A checkpoint or adapter in PyTorch: in fp32 on a CPU, in its own precision on a GPU."""

    def __init__(self, folder: Path, task: str):
        self.model = load_torch(folder, task)
        self.device = self.model.device
        self.config = self.model.config
        self.generation = getattr(self.model, "generation_config", None)
        self.padded = task == "text-generation" and takes_padding(self.model)
        adapter = getattr(self.model, "active_peft_config", None)
        self.virtual = getattr(adapter, "num_virtual_tokens", 0)  # P-tuning's stand before each prompt
        parts = self.model.modules()
        self.switching = [part for part in parts if hasattr(part, "set_attention_type") and hasattr(part, "encoder")]

    @torch.inference_mode()
    def start(self, rows: Sequence[Sequence[int]], pad: int, most: int):
        """Rows to be continued by at most `most` tokens each, whose prompts have yet to be read: a TorchDecoding or OneByOne."""
        if not self.padded:
            return OneByOne([TorchDecoding(self.model, [row], pad) for row in rows])
        return TorchDecoding(self.model, rows, pad)

    def tokens_read(self, rows: Sequence[Sequence[int]]) -> int:
        """Tokens that are computed for these prompts together, padding among them."""
        shared = shared_prefix(self.model, rows) if self.padded else 0
        return shared + len(rows) * (max(map(len, rows)) - shared)

    @torch.inference_mode()
    def logits(self, row: Sequence[int]) -> np.ndarray:
        """Scores of each next token of one row: (tokens, vocabulary) fp32."""
        self._as_configured()
        ids = torch.tensor([row], device=self.device)
        return self.model(input_ids=ids).logits[0, -len(row) :].float().cpu().numpy()

    def _as_configured(self):
        """BigBird reads a text that is too short for its blocks with full attention, and then all later ones, too."""
        for part in self.switching:
            part.set_attention_type(self.config.attention_type)

    @torch.inference_mode()
    def encode(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Outputs of an encoder for a padded batch, each (rows, tokens, ...)."""
        self._as_configured()
        out = self.model(**{name: torch.from_numpy(values).to(self.device) for name, values in batch.items()})
        names = ("logits", "start_logits", "end_logits")  # a decoder with a class gives its cache, too
        return tuple(out[name].float().cpu().numpy() for name in names if name in out)

    @torch.inference_mode()
    def hidden_states(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Last hidden states of the encoder below any head: (rows, tokens, width) fp32."""
        self._as_configured()
        inputs = {name: torch.from_numpy(values).to(self.device) for name, values in batch.items()}
        return self.model.base_model(**inputs).last_hidden_state.float().cpu().numpy()

    @torch.inference_mode()
    def seq2seq(self, ids: torch.Tensor, mask: torch.Tensor, changes: dict) -> torch.Tensor:
        """What an encoder-decoder writes to a padded batch: (rows, tokens) ids; `changes` are generation settings."""
        return self.model.generate(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), do_sample=False, **changes
        ).cpu()


class TorchDecoding:
    """A batch that is being continued: `read` its prompts, `logits` (rows, vocabulary) of the next token, `feed` to go on.

    Rows of equal length are read in pieces, and what several begin with is read once. Not where a model carries a state
    beside keys and values: it would take a piece for a new text. A row of a model that hands out no cache (RecurrentGemma, RWKV,
    GPT-1) is read anew for each token, one whose rotary embeddings switch (longrope) for the token with which they do.
    """

    def __init__(self, model, rows: Sequence[Sequence[int]], pad: int):
        stateful = carries_state(model, model.config)
        rows, self.places = distinct(rows)
        shared = shared_prefix(model, rows)
        ids, mask = (each.to(model.device) for each in pad_left(rows, pad))
        self.name, self.prompt = "input_ids", ids
        if getattr(model, "peft_config", None):  # virtual tokens (P-tuning) stand before the padding
            virtual = model.get_prompt(len(ids))
            model = model.get_base_model()
            mask = torch.cat([mask.new_ones(len(ids), virtual.shape[1]), mask], 1)
            embeddings = model.get_input_embeddings()(ids)
            self.name, self.prompt = "inputs_embeds", torch.cat([virtual.to(embeddings.dtype), embeddings], 1)
        self.model, self.cache, self.masked = model, None, not stateful  # Mamba would mask its state
        takes = inspect.signature(model.forward).parameters
        self.positions, self.cached = "position_ids" in takes, "cache" in takes
        self.switch, self.counted = switches_at(model.config), first_position(model)
        pieces = mask.all() and not stateful and self.cached and not self.switch
        self.chunk = PROMPT_CHUNK if pieces else mask.shape[1]
        self.whole, self.mask, self.first = mask, mask[:, :0], None
        if shared:
            self.first = TorchDecoding(model, [rows[0][:shared]], pad)

    @property
    def unread(self) -> bool:
        """Whether there is more of the prompts to read."""
        return self.mask.shape[1] < self.whole.shape[1]

    @torch.inference_mode()
    def read(self) -> bool:
        """Reads the next piece of the prompts; whether there is another."""
        if self.first is not None:
            if not self.first.read():
                self._share()
            return True
        start, width = self.mask.shape[1], self.whole.shape[1]
        end = min(start + self.chunk, width)
        self.mask = self.whole[:, :end]
        self._run({self.name: self.prompt[:, start:end]})
        if self.unread:
            return True
        if len(self.places) > len(self.mask):
            places = torch.tensor(self.places, device=self.mask.device)
            self.cache.batch_select_indices(places)
            self.mask, self.logits = self.mask[places], self.logits[self.places]
        return False

    def _share(self):
        """Gives each row of what all begin with as much as stands in these columns, behind its padding."""
        self.cache, width = self.first.cache, self.first.mask.shape[1]
        self.mask, self.first = self.whole[:, :width], None
        padding = (self.whole == 0).sum(1).clamp(max=width).tolist()
        for layer, _ in self._layers(self.cache):
            for name in ("keys", "values"):
                values = getattr(layer, name)
                setattr(layer, name, torch.cat([padded(values, (0, 0, n, 0))[:, :, :width] for n in padding]))

    def _run(self, inputs: dict):
        length = next(iter(inputs.values())).shape[1]
        if self.positions:
            inputs["position_ids"] = positions_of(self.mask)[:, -length:] + self.counted
        if self.masked:
            inputs["attention_mask"] = self.mask
        if self.cached:
            inputs["cache"] = self.cache
        out = self.model(**inputs, use_cache=self.cached, logits_to_keep=1)
        self.cache, self.logits = getattr(out, "cache", None), out.logits[:, -1].cpu()
        self.cached = self.cache is not None

    @torch.inference_mode()
    def feed(self, tokens: torch.Tensor):
        """Appends one token to each row, (rows,), and computes the scores of the next."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        inputs = {"input_ids": tokens[:, None].to(self.mask.device)}
        if not self.cached or self.switch:
            new = inputs["input_ids"]
            new = new if self.name == "input_ids" else self.model.get_input_embeddings()(new)
            self.prompt = torch.cat([self.prompt, new.to(self.prompt.dtype)], 1)
            if not self.cached or self.mask.shape[1] == self.switch + 1:
                self.cache, inputs = None, {self.name: self.prompt}
        self._run(inputs)

    @torch.inference_mode()
    def join(self, other: "TorchDecoding"):
        """Takes the rows of another in below its own. What is shorter is padded on the left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.mask = torch.cat([padded(each.mask, (width - each.mask.shape[1], 0)) for each in (self, other)])
        for mine, theirs in self._layers(other.cache):
            columns = max(mine.keys.shape[2], theirs.keys.shape[2])  # of a layer with a window, those inside it
            for name in ("keys", "values"):
                parts = [getattr(layer, name) for layer in (mine, theirs)]
                setattr(mine, name, torch.cat([padded(x, (0, 0, columns - x.shape[2], 0)) for x in parts]))
            if mine.is_sliding:
                mine.cumulative_length = width

    @torch.inference_mode()
    def keep(self, places: list[int]):
        """Drops all rows but these, and columns that are padding in all that remain."""
        index = torch.tensor(places, device=self.mask.device)
        mask = self.mask[index]
        self.mask = mask[:, int(mask.any(0).int().argmax()) :]
        width = self.mask.shape[1]
        for layer, _ in self._layers(self.cache):
            for name in ("keys", "values"):
                values = getattr(layer, name)
                setattr(layer, name, values[:, :, max(values.shape[2] - width, 0) :][index])
            if layer.is_sliding:
                layer.cumulative_length = width

    def _layers(self, other):
        """Layers of both caches that hold keys; some models let later layers use those of earlier ones."""
        pairs = zip(self.cache.layers, other.layers, strict=True)
        return [(mine, theirs) for mine, theirs in pairs if getattr(mine, "is_initialized", False)]


class OneByOne:
    """Rows of a model that takes no padding, as TorchDecoding."""

    def __init__(self, rows: list[TorchDecoding]):
        self.rows = rows

    @property
    def logits(self) -> torch.Tensor:
        """Scores of each row's next token, (rows, vocabulary)."""
        return torch.cat([row.logits for row in self.rows])

    def read(self) -> bool:
        """Reads the next piece of a prompt; whether there is another."""
        row = next(row for row in self.rows if row.unread)
        return row.read() or row is not self.rows[-1]

    def feed(self, tokens: torch.Tensor):
        """Appends one token to each row, (rows,)."""
        for row, token in zip(self.rows, tokens[:, None], strict=True):
            row.feed(token)

    def join(self, other: "OneByOne"):
        """Takes the rows of another in below its own."""
        self.rows = self.rows + other.rows

    def keep(self, places: list[int]):
        """Drops all rows but these."""
        self.rows = [self.rows[place] for place in places]


def shared_prefix(model, rows: Sequence[Sequence[int]]) -> int:
    """Tokens at the beginning of all rows that are read once; none where virtual tokens (P-tuning) stand before them."""
    if getattr(model, "peft_config", None):
        return 0
    return common_prefix(rows, getattr(model.config.get_text_config(), "sliding_window", None))


def takes_padding(model) -> bool:
    """Whether rows of any length can be continued together, and each as alone."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    base = model.get_base_model() if getattr(model, "peft_config", None) else model
    if carries_state(model, model.config) or "cache" not in inspect.signature(base.forward).parameters:
        return False
    if switches_at(base.config):  # by the longest row, for all of them
        return False
    layers = DynamicCache(config=base.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def causal_architecture(config, name: str):
    """The class that continues texts with this configuration.

    Raises:
        UserError: it does not. transformers would load BERT, which then sees what it is to predict, BART without its encoder, and
            XLNet, which reads both ways but for a permutation that is given with each token.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    if config.is_encoder_decoder:
        raise UserError(
            f"{name}: {config.model_type} has an encoder and a decoder; tasks/summarize_t5 trains such models."
        )
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if encoder or config.model_type == "xlnet" or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name}: {config.model_type} is no causal language model, so it does not continue a text.")
    return MODEL_FOR_CAUSAL_LM_MAPPING[kind]


def carries_state(architecture, config) -> bool:
    """Whether layers carry a state along the row, recurrent ones or convolutions, of which padding would become a part."""
    text = config.get_text_config()
    kinds = {
        kind for name in ("layer_types", "layers_block_type", "block_types") for kind in getattr(text, name, None) or ()
    }
    return architecture._is_stateful or any("attention" not in kind or "linear" in kind for kind in kinds)


def load_torch(folder: Path, task: str):
    """A model in PyTorch, in eval mode. LoRA adapters are merged into their base in memory; virtual tokens stay an adapter.

    A CPU computes in fp32 whatever the precision on disk: its fp16 is emulated.

    Raises:
        UserError: the base of an adapter is not to be had, or is another model; another kind of adapter.
    """
    import transformers

    # bitsandbytes says at import which kernel it could not download, and at each product that it computes in fp16; peft asks
    # transformers by an old name
    for part in ("backends", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{part}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each length that it has not seen, for half a second and more
    gpu = torch.cuda.is_available()
    auto = getattr(transformers, TASKS[task])
    options = {"use_safetensors": True, "dtype": "auto" if gpu else torch.float32, "trust_remote_code": False}
    with _quietly():
        if (folder / "adapter_config.json").is_file():
            return load_adapter(folder, auto, options).eval().to("cuda" if gpu else "cpu")
        # read back, configuration and all: llama.cpp itself is no part of this project
        model = (_from_gguf(folder, auto) if (folder / GGUF).is_file() else whole(auto, folder, options)).eval()
    keep_layout(model)
    return model if getattr(model, "is_quantized", False) or not gpu else model.to("cuda")


def keep_layout(model):
    """On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit layer for good when it first evaluates: its products are bf16
    from then on, no gradient passes it, and its widths must be multiples of 64 in and 32 out (0.50.2). So not here.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def whole(auto, folder: Path, options: dict):
    """`from_pretrained` of a checkpoint that lacks nothing: what a file does not hold would be filled with random numbers.

    Raises:
        UserError: tensors are missing; to continue texts: an architecture that does not.
    """
    if auto.__name__ == "AutoModelForCausalLM":
        from transformers import AutoConfig

        causal_architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False), str(folder))
    model, found = auto.from_pretrained(folder, **options, output_loading_info=True)
    # Of AutoModel the hidden states are read, not what a pooler makes of them
    missing = sorted(key for key in found["missing_keys"] if auto.__name__ != "AutoModel" or "pooler." not in key)
    if missing:
        raise UserError(
            f"{folder}: the weights lack {len(missing)} tensors of {type(model).__name__}, {missing[0]} for one; they would be "
            "random. Is it another kind of model, or is a file incomplete?"
        )
    return model


def _from_gguf(folder: Path, auto):
    """The model of a GGUF file in plain fp32 layers. transformers (5.24) looks there neither for the width of Qwen 3's heads nor
    for GPT-2's sizes nor for biases, which it would leave out without a word.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, gguf_file=GGUF, trust_remote_code=False)
    file = GGUFReader(folder / GGUF)
    tensors, kind = {tensor.name for tensor in file.tensors}, file.get_field("general.architecture").contents()
    sizes = {"attention.key_length": "head_dim"}
    if config.model_type == "gpt2":
        sizes = {"context_length": "n_positions", "feed_forward_length": "n_inner"}
    for field, own in sizes.items():
        if (found := file.get_field(f"{kind}.{field}")) is not None:
            setattr(config, own, int(found.contents()))
    config.attention_bias, config.mlp_bias = (f"blk.0.{part}.bias" in tensors for part in ("attn_output", "ffn_gate"))
    options = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
    model, loaded = auto.from_pretrained(folder, gguf_file=GGUF, config=config, **options)
    if unread := sorted(loaded["unexpected_keys"]):
        raise UserError(
            f"{folder / GGUF}: {len(unread)} of its tensors are not read by transformers, {unread[0]} for one."
        )
    model.is_quantized, model.hf_quantizer = False, None  # transformers marks it as quantized
    return model


def load_adapter(folder: Path, auto, options: dict):
    """The base that an adapter names, in full precision, with the adapter merged in; one that cannot be merged stays on it.

    A base that was trained on in 4 bits (QLoRA) is taken as it was before, never rounded: rounding the sum once more would
    lose what the adapter learnt.
    """
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning and config.peft_type not in ("P_TUNING", "PROMPT_TUNING"):
        raise UserError(
            f"{folder}: adapters of type {config.peft_type.value} cannot be used here; LoRA and P-tuning can."
        )
    name = config.base_model_name_or_path or ""
    source = pull(f"{name}@{config.revision}" if config.revision and "/" in name and not Path(name).is_dir() else name)
    base = whole(auto, source, options)
    if getattr(base, "is_quantized", False):
        base = base.dequantize().to(options["dtype"])
    if (folder / "generation_config.json").is_file():  # where its replies end, which its base may not know
        base.generation_config = GenerationConfig.from_pretrained(folder)
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: the adapter does not fit {name} ({str(error).splitlines()[0][:160]}).") from error
    return model if config.is_prompt_learning else model.merge_and_unload()


class _quietly:
    """No progress bars of transformers while a model is loaded."""

    def __enter__(self):
        from transformers.utils import logging

        self.bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_):
        from transformers.utils import logging

        if self.bars:
            logging.enable_progress_bar()
