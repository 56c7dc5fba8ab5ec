"""Graphs for ONNX Runtime, traced from PyTorch with attention as one node of ONNX Runtime's own. Used by shared/export/export.py.

Decoders get one graph that serves prompts as well as single tokens, with the inputs and outputs that onnxruntime-genai names:
`input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.key|value` -> `logits`, `present.N.key|value`; padding stands
right of a row. Encoders with decoders get two, `encoder.onnx` and `decoder.onnx`.

transformers.exporters was tried first. It traces attention, masks and caches as they are written, which took 186 CPU seconds for
SmolLM2-135M on this class of machine, and its fusions found no attention in the result; this takes a tenth.
"""

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.export import Dim
from transformers import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D

from shared import UserError

ATTENTION = "onnxruntime"
# What attention code is called with beside tensors, and what it may ignore; anything else that is set is refused
HARMLESS = {"dropout", "is_causal", "deterministic", "position_ids", "output_attentions", "use_cache", "logits_to_keep"}


class _Trace:
    """What the attention of the model that is being traced needs, and what it leaves.

    Attributes:
        pasts: (key, value) of earlier tokens a layer; empty for an encoder.
        padding: (batch, sequence) int32, 1 where a token of the encoder is real.
        lengths, total: tokens of each row less one, and columns of the attention mask; int32, for a causal model.
        presents: (key, value) with the new tokens, a layer.
        layer: whose self-attention comes next; None before cross-attention or the attention of an encoder.
        asked, windows: sizes of the windows that the model's masks have, and of those that its attention is given.
    """

    def __init__(self, pasts=(), padding=None, mask=None):
        self.pasts, self.padding, self.presents, self.layer = pasts, padding, [], None
        self.asked, self.windows = set(), set()
        if mask is not None:
            self.lengths = (mask.sum(1) - 1).to(torch.int32)
            self.total = torch.ones_like(mask[0], dtype=torch.int32).sum().to(torch.int32)

    # What models ask a cache for; a real one would be traced as it joins tensors
    is_compileable, is_initialized, is_sliding = False, True, (False,)

    def update(self, key, value, layer, *_, **__):
        self.layer = layer
        if self.padding is not None:  # T5 counts the keys for its position bias
            past = self.pasts[layer]
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
            self.presents.append((key, value))
        return key, value

    def get_seq_length(self, *_):
        return self.pasts[0][0].shape[2]

    def get_query_offset(self, *_):
        return self.get_seq_length()

    def get_mask_sizes(self, query, *_):
        return self.get_seq_length() + query, 0

    def __len__(self):
        return len(self.pasts)


_current: list[_Trace] = []


def _attend(
    module,
    query,
    key,
    value,
    mask,
    scaling=None,
    position_bias=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **others,
):
    """Attention of all models as one node: GroupQueryAttention in a causal decoder, else MultiHeadAttention.

    Raises:
        UserError: the model asks for something that the node cannot do.
    """
    trace = _current[-1]
    batch, heads, length, width = query.shape
    layer, trace.layer = trace.layer, None
    causal = layer is not None and trace.padding is None
    asked = {name for name, given in others.items() if given is not None and given is not False}
    unknown = sorted(asked - HARMLESS)
    if causal and (position_bias is not None or getattr(module, "is_causal", True) is False):
        unknown.append("tokens that see later ones" if position_bias is None else "position_bias")
    elif not causal:
        unknown += [name for name, given in (("softcap", softcap), ("s_aux", s_aux)) if given is not None]
        if sliding_window is not None and mask is None:
            unknown.append("sliding_window")
        if layer is None and (others.get("is_causal") or getattr(module, "is_causal", False)):
            unknown.append("tokens that see earlier ones only")
    if value.shape[-1] != width:
        unknown.append("values of another width than the keys")
    if unknown:
        raise UserError(f"its attention has {', '.join(unknown)}, which no node of ONNX Runtime computes")

    def flat(x):
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)

    scale = float(width**-0.5 if scaling is None else scaling)
    if causal:
        kept = (batch, key.shape[1], trace.columns, width)
        inputs = [flat(query), flat(key), flat(value), *trace.pasts[layer], trace.lengths, trace.total]
        attributes = {"num_heads": heads, "kv_num_heads": key.shape[1], "scale": scale}
        if sliding_window is not None:
            attributes["local_window_size"] = int(sliding_window)
            trace.windows.add(sliding_window)
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        if s_aux is not None:  # a score a head that takes part in the softmax and has no value
            inputs += [None, None, None, None, s_aux]
        out, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=[query.dtype] * 3,
            shapes=[(batch, length, heads * width), kept, kept],
            version=1,
        )
        trace.presents.append(present)
        return out.view(batch, length, heads, width), None
    padding = trace.padding if layer is None else None  # a decoder writes one token at a time, after all others
    if mask is not None:  # that of a window holds the padding too
        padding, position_bias = None, torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [flat(query), flat(key), flat(value), None, padding, position_bias],
        # Its own -10,000 is not low enough where scores are larger than that
        {"num_heads": heads, "scale": scale, "mask_filter_value": torch.finfo(query.dtype).min},
        dtype=query.dtype,
        shape=(batch, length, heads * width),
        version=1,
    )
    return out.view(batch, length, heads, width), None


def _mask(local_size=None, **sizes):
    """The mask of an encoder's windowed layers, (batch, 1, sequence, sequence); all other attention needs none."""
    trace = _current[-1]
    if local_size is None:
        return None
    if trace.padding is None:
        trace.asked.add(local_size)
        return None
    return sdpa_mask(**sizes | {"allow_is_bidirectional_skip": False}, local_size=local_size)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)


class _MatMul(torch.nn.Module):
    """A linear layer whose weight lies as ONNX's MatMul reads it, (in, out): quantizers look for that node."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x):
        x = torch.matmul(x, self.weight)
        return x if self.bias is None else x + self.bias


def _prepare(model) -> None:
    """Attention as one node, and every linear layer as a MatMul."""
    model.set_attn_implementation(ATTENTION)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:  # a subclass does something else
                setattr(parent, name, _MatMul(child.weight.t(), child.bias))
            elif isinstance(child, Conv1D):  # GPT-2's
                setattr(parent, name, _MatMul(child.weight, child.bias))


@contextlib.contextmanager
def _tracing(trace: _Trace):
    _current.append(trace)
    try:
        yield trace
    finally:
        _current.pop()


class _Decoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep, pasts):
        with _tracing(_Trace(pasts, mask=attention_mask)) as trace:
            trace.columns = attention_mask.shape[1]
            inputs = {"input_ids": input_ids, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
            logits = self.model(**inputs, cache=trace, use_cache=True).logits
        if trace.asked != trace.windows:
            raise UserError("its layers attend to chunks, which no node of ONNX Runtime computes")
        return logits, *(tensor for present in trace.presents for tensor in present)


def export_decoder(model, path: Path) -> None:
    """Writes the graph of a causal decoder (GPT-2, Llama and whatever else takes its attention from transformers' interface).

    `logits_to_keep` (positions) is an input besides those at the top of this file: a prompt needs the scores of its last
    token only.
    """
    _prepare(model)
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pasts = [(torch.zeros(2, kept, 5, width), torch.zeros(2, kept, 5, width)) for _ in range(layers)]
    batch, length, past, total, some = map(Dim, ("batch", "sequence", "past", "total", "kept"))
    examples = (
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(2, 8, dtype=torch.long),
        torch.arange(5, 8).expand(2, 3).contiguous(),
        torch.tensor([1, 2]),
        pasts,
    )
    tokens, cached = {0: batch, 1: length}, {0: batch, 2: past}
    shapes = (tokens, {0: batch, 1: total}, tokens, {0: some}, [(cached, cached)] * layers)
    names = ["input_ids", "attention_mask", "position_ids", "logits_to_keep", *_cache_names("past_key_values", layers)]
    _write(_Decoder(model), examples, shapes, names, ["logits", *_cache_names("present", layers)], path)


class _Encoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        with _tracing(_Trace(padding=attention_mask.to(torch.int32))):
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        return (out.logits,) if "logits" in out else (out.start_logits, out.end_logits)


def export_encoder(model, path: Path, segments: bool) -> None:
    """Writes the graph of an encoder with a head for masked words (`logits`) or answers (`start_logits`, `end_logits`).

    Args:
        segments: whether the tokenizer tells first and second text apart (`token_type_ids`).
    """
    _prepare(model)
    names = ["input_ids", "attention_mask", *["token_type_ids"] * segments]
    tokens = {0: Dim("batch"), 1: Dim("sequence")}
    outputs = ["start_logits", "end_logits"] if "QuestionAnswering" in type(model).__name__ else ["logits"]
    # Not one tensor for all: the trace would take them for one input
    examples = tuple(torch.ones(2, 5, dtype=torch.long) for _ in names)
    _write(_Encoder(model), examples, (tokens,) * len(names), names, outputs, path)


class _CrossStates(torch.nn.Module):
    """The encoder, and what the decoder's cross-attention reads of it: keys and values a layer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        with _tracing(_Trace(padding=attention_mask.to(torch.int32))):
            states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # A step of the decoder shows them; whatever else it computes is not asked for, and so not in the graph
        caches, layers = EncoderDecoderCache(DynamicCache(), DynamicCache()), _decoder_layers(self.model)
        empty = states.new_zeros(states.shape[0], *_heads(self.model)[:1], 1, _heads(self.model)[1])
        with _tracing(_Trace([(empty, empty)] * layers, padding=attention_mask.to(torch.int32))) as trace:
            caches.self_attention_cache = trace
            start = input_ids[:, :1] * 0
            self.model.get_decoder()(input_ids=start, encoder_hidden_states=states, cache=caches, use_cache=True)
        return tuple(x for layer in caches.cross_attention_cache.layers for x in (layer.keys, layer.values))


@dataclass
class _Crosses:
    """Keys and values of the encoder's states a layer, where a decoder looks for them."""

    layers: list


class _CrossDecoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, encoder_attention_mask, pasts, crosses):
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        caches.cross_attention_cache = _Crosses([SimpleNamespace(keys=key, values=value) for key, value in crosses])
        caches.is_updated = dict.fromkeys(range(len(crosses)), True)
        states = crosses[0][0].new_zeros(
            input_ids.shape[0], encoder_attention_mask.shape[1], 1
        )  # only its shape is read
        with _tracing(_Trace(pasts, padding=encoder_attention_mask.to(torch.int32))) as trace:
            caches.self_attention_cache = trace
            logits = self.model(
                decoder_input_ids=input_ids, encoder_outputs=(states,), cache=caches, use_cache=True
            ).logits
        return logits, *(tensor for present in trace.presents for tensor in present)


def export_encoder_decoder(model, folder: Path) -> None:
    """Writes `encoder.onnx` (`input_ids`, `attention_mask` -> `cross.N.key|value`) and `decoder.onnx`, which takes one token a
    row (`input_ids`, `encoder_attention_mask`, `past_key_values.N...`, `cross.N...` -> `logits`, `present.N...`): T5 and BART.
    """
    _prepare(model)
    layers, (heads, width) = _decoder_layers(model), _heads(model)
    batch, source, past = map(Dim, ("batch", "source", "past"))
    crosses, tokens = _cache_names("cross", layers), {0: batch, 1: source}
    ids, mask = (torch.ones(2, 5, dtype=torch.long) for _ in range(2))
    names = ["input_ids", "attention_mask"]
    _write(_CrossStates(model), (ids, mask), (tokens, tokens), names, crosses, folder / "encoder.onnx")
    pasts = [(torch.zeros(2, heads, 3, width), torch.zeros(2, heads, 3, width)) for _ in range(layers)]
    across = [(torch.zeros(2, heads, 5, width), torch.zeros(2, heads, 5, width)) for _ in range(layers)]
    shapes = ({0: batch}, tokens, [({0: batch, 2: past},) * 2] * layers, [({0: batch, 2: source},) * 2] * layers)
    names = ["input_ids", "encoder_attention_mask", *_cache_names("past_key_values", layers), *crosses]
    outputs = ["logits", *_cache_names("present", layers)]
    _write(
        _CrossDecoder(model),
        (torch.ones(2, 1, dtype=torch.long), mask, pasts, across),
        shapes,
        names,
        outputs,
        folder / "decoder.onnx",
    )


def _decoder_layers(model) -> int:
    return getattr(model.config, "num_decoder_layers", None) or model.config.decoder_layers  # T5's name, BART's


def _heads(model) -> tuple[int, int]:
    """Number and width of the attention heads of an encoder-decoder's decoder."""
    config = model.config
    if hasattr(config, "d_kv"):
        return config.num_heads, config.d_kv
    return config.decoder_attention_heads, config.d_model // config.decoder_attention_heads


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


@torch.no_grad()
def _write(module, examples, shapes, inputs: list[str], outputs: list[str], path: Path) -> None:
    """Traces a module and writes graph and weights (`<name>.data` beside it)."""
    for noisy in ("torch.onnx", "torch.export", "torch.fx", "onnxscript"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # What cannot be traced would be printed, hundreds of lines of it
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            module.eval()(*examples)  # tracing would hide the reason of a refusal
            program = torch.onnx.export(
                module,
                examples,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        except UserError:
            raise
        except Exception as error:  # whatever a model's own code raises
            if "grouped_mm" in str(error) or "grouped_mm" in _cause(error):
                raise UserError(
                    "its layers choose among experts, by a product (grouped_mm) that ONNX has no word for; take merged or fp16"
                ) from error
            raise UserError(f"PyTorch cannot trace it ({_cause(error)})") from error
    program.save(str(path), external_data=True)


def _cause(error: BaseException) -> str:
    """The first line of what an error came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def export(model, folder: Path, task: str, segments: bool) -> None:
    """Writes the graphs of a model; it is changed by that and of no further use. `segments`: see `export_encoder`."""
    try:
        if task == "summarization":
            export_encoder_decoder(model, folder)
        elif task == "text-generation":
            export_decoder(model, folder / "model.onnx")
        else:
            export_encoder(model, folder / "model.onnx", segments)
    except AttributeError as error:  # ProphetNet and FSMT name their heads and layers otherwise
        raise UserError(f"{model.config.model_type} is built otherwise than what is traced here ({error})") from error
