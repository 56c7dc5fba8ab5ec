"""A checkpoint or adapter in PyTorch, as `model.Model` runs it."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from shared import UserError
from shared.inference.sampling import pad_left, positions_of
from shared.publish.hub import pull

TASKS = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "summarization": "AutoModelForSeq2SeqLM",
}


class TorchRunner:
    """A checkpoint or adapter in PyTorch: in fp32 on a CPU, in its own precision on a GPU."""

    def __init__(self, folder: Path, task: str):
        self.model = load_torch(folder, task)
        self.device = self.model.device
        self.config = self.model.config
        self.generation = getattr(self.model, "generation_config", None)

    @torch.inference_mode()
    def start(self, rows: Sequence[Sequence[int]], pad: int, most: int):
        """Reads the prompts of a batch, of which at most `most` tokens each will follow: a TorchDecoding."""
        ids, mask = pad_left(rows, pad)
        return TorchDecoding(self.model, ids.to(self.device), mask.to(self.device))

    @torch.inference_mode()
    def logits(self, row: Sequence[int]) -> np.ndarray:
        """Scores of each next token of one row: (tokens, vocabulary) fp32."""
        ids = torch.tensor([row], device=self.device)
        return self.model(input_ids=ids).logits[0, -len(row) :].float().cpu().numpy()

    @torch.inference_mode()
    def encode(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Outputs of an encoder for a padded batch, each (rows, tokens, ...)."""
        out = self.model(**{name: torch.from_numpy(values).to(self.device) for name, values in batch.items()})
        return tuple(scores.float().cpu().numpy() for scores in out.to_tuple())

    @torch.inference_mode()
    def seq2seq(self, ids: torch.Tensor, mask: torch.Tensor, changes: dict) -> torch.Tensor:
        """What an encoder-decoder writes to a padded batch: (rows, tokens) ids; `changes` are generation settings."""
        return self.model.generate(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), do_sample=False, **changes
        ).cpu()


class TorchDecoding:
    """A batch in the middle of being continued: `logits` (rows, vocabulary) of the next token, `feed` to go on."""

    def __init__(self, model, ids, mask):
        import inspect

        prompt = None
        if getattr(model, "peft_config", None):  # virtual tokens (P-tuning) stand before the padding
            prompt = model.get_prompt(len(ids))
            model = model.get_base_model()
            mask = torch.cat([mask.new_ones(len(ids), prompt.shape[1]), mask], 1)
        self.model, self.mask, self.cache = model, mask, None
        self.positions = "position_ids" in inspect.signature(model.forward).parameters
        if prompt is None:
            self._run({"input_ids": ids})
        else:
            embeddings = model.get_input_embeddings()(ids)
            self._run({"inputs_embeds": torch.cat([prompt.to(embeddings.dtype), embeddings], 1)})

    def _run(self, inputs: dict):
        length = next(iter(inputs.values())).shape[1]
        if self.positions:
            inputs["position_ids"] = positions_of(self.mask)[:, -length:]
        out = self.model(
            **inputs, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.cache, self.logits = out.past_key_values, out.logits[:, -1].cpu()

    @torch.inference_mode()
    def feed(self, tokens: torch.Tensor):
        """Appends one token to each row, (rows,), and computes the scores of the next."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self._run({"input_ids": tokens[:, None].to(self.mask.device)})


def load_torch(folder: Path, task: str):
    """A model in PyTorch, in eval mode. LoRA adapters are merged into their base in memory; virtual tokens stay an adapter.

    A CPU computes in fp32 whatever the precision on disk: its fp16 is emulated.

    Raises:
        UserError: the base of an adapter is not to be had, or is another model.
    """
    import transformers

    # bitsandbytes says at each product that it computes in fp16, and peft asks transformers by an old name
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    gpu = torch.cuda.is_available()
    auto = getattr(transformers, TASKS[task])
    options = {"use_safetensors": True, "dtype": "auto" if gpu else torch.float32}
    with _quietly():
        if (folder / "adapter_config.json").is_file():
            return load_adapter(folder, auto, options).eval().to("cuda" if gpu else "cpu")
        model = auto.from_pretrained(folder, **options).eval()
    return model if getattr(model, "is_quantized", False) or not gpu else model.to("cuda")


def load_adapter(folder: Path, auto, options: dict):
    """The base that an adapter names, in full precision, with the adapter merged in; one that cannot be merged stays on it.

    A base that was trained on in 4 bits (QLoRA) is taken as it was before, never rounded: rounding the sum once more would
    lose what the adapter learnt.
    """
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    config = PeftConfig.from_pretrained(folder)
    name = config.base_model_name_or_path or ""
    source = pull(f"{name}@{config.revision}" if config.revision and "/" in name and not Path(name).is_dir() else name)
    base = auto.from_pretrained(source, **options)
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
