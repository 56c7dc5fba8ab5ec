"""Files of TensorFlow Lite (now LiteRT), written by litert-torch. Called by formats.py.

Shapes are fixed: one row, and no more than LONGEST tokens, of which padding costs as much as text. Signatures: `encode` of an
encoder; `encode` and `write` (scores of all tokens so far) of an encoder with a decoder; `prefill_<n>` and `decode` of a
decoder, with keys and values as inputs and outputs, by litert-torch's own `export_hf`.
"""

import contextlib
import io
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from shared import UserError
from shared.inference.litert_runner import FILE

LONGEST = 512  # tokens that a graph reads, and a decoder those that it writes with them
WRITTEN = 128  # tokens that an encoder's decoder writes
PREFILL = 32  # tokens of a prompt that are read at once


def cannot(config, task: str) -> str | None:
    """Why a model cannot be exported, or None."""
    if find_spec("litert_torch") is None:
        return (
            "litert-torch has an environment of its own: make litert-env, then .venv-litert/bin/python -m shared.export"
        )
    window = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if window or getattr(config, "sliding_window", None) or getattr(config, "local_attention", None):
        return "its layers see a window, which has not been seen to be right in LiteRT"
    return None


class _Encoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        names = ("logits",) if "logits" in out else ("start_logits", "end_logits")
        return {name: out[name] for name in names}


class _States(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        out = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        return {"states": out.last_hidden_state}


class _Writer(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids, attention_mask, states):
        # Padding right of what is written is seen by nothing that counts
        out = self.model(
            decoder_input_ids=decoder_input_ids,
            attention_mask=attention_mask,
            encoder_outputs=(states,),
            use_cache=False,
        )
        return {"logits": out.logits}


@torch.no_grad()
def write(model, folder: Path, target: Path, task: str, length: int, segments: bool) -> None:
    """Writes `model.tflite` in fp32.

    Args:
        folder: of the model, which export_hf reads.
        length: tokens that the model reads at most.
        segments: see `shared.export.graphs.export_encoder`.

    Raises:
        UserError: litert-torch cannot convert the model.
    """
    length = min(length, LONGEST)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            if task == "text-generation":
                _write_decoder(model, folder, target, length)
            else:
                _write_encoder(model, target, task, length, segments)
        except Exception as error:  # whatever the model's code or the converter raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise UserError(f"litert-torch cannot convert it ({reason})") from error


def _write_encoder(model, target: Path, task: str, length: int, segments: bool) -> None:
    import litert_torch

    model = model.eval()
    model.set_attn_implementation("eager")
    ids = torch.ones(1, length, dtype=torch.int32)
    tokens = {"input_ids": ids, "attention_mask": ids.clone()}
    if task == "summarization":
        states = torch.zeros(1, length, model.config.hidden_size)
        written = torch.ones(1, min(WRITTEN, length), dtype=torch.int32)
        decoding = {"decoder_input_ids": written, "attention_mask": ids.clone(), "states": states}
        converter = litert_torch.signature("encode", _States(model).eval(), sample_kwargs=tokens)
        converter = converter.signature("write", _Writer(model).eval(), sample_kwargs=decoding)
    else:
        tokens |= {"token_type_ids": ids * 0} if segments else {}
        converter = litert_torch.signature("encode", _Encoder(model).eval(), sample_kwargs=tokens)
    converter.convert().export(str(target / FILE))


def _write_decoder(model, folder: Path, target: Path, length: int) -> None:
    from litert_torch.generative.export_hf.export import export

    copy = target / ".original"
    shutil.copytree(folder, copy)
    config = model.config
    if not hasattr(config, "num_key_value_heads"):  # GPT-2's configuration leaves them to be worked out
        config.num_key_value_heads = config.num_attention_heads
        config.head_dim = config.hidden_size // config.num_attention_heads
        config.save_pretrained(copy)
    # Without an empty recipe it rounds the weights to 8 bits
    options = {"prefill_lengths": [PREFILL], "cache_length": length, "quantization_recipe": ""}
    try:
        export(str(copy), str(target / ".written"), externalize_embedder=False, bundle_litert_lm=False, **options)
        (found,) = (target / ".written").rglob("*.tflite")
        shutil.move(found, target / FILE)
    finally:
        for made in (copy, target / ".written"):
            shutil.rmtree(made, ignore_errors=True)
