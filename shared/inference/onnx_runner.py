"""An exported graph in ONNX Runtime, as `model.Model` runs it."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from shared import UserError
from shared.inference.positions import switches_at
from shared.inference.sampling import PROMPT_CHUNK, distinct


class OnnxRunner:
    """Graphs of shared/export/graphs.py or onnxruntime-genai in ONNX Runtime, on the CPU.

    Attributes:
        length: most tokens of a row, where that is less than the model reads in PyTorch: rotary embeddings that switch there do
            so for all rows of a batch, and not for what is in the buffers.
    """

    def __init__(self, folder: Path, task: str):
        from transformers import AutoConfig, GenerationConfig

        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        has_settings = (folder / "generation_config.json").is_file()
        self.generation = GenerationConfig.from_pretrained(folder) if has_settings else None
        if switch := switches_at(self.config):
            self.length = switch
        if task == "summarization":
            self.encoder, self.decoder = (open_session(folder / f"{part}.onnx") for part in ("encoder", "decoder"))
        else:
            self.session = open_session(folder / "model.onnx")
            self.inputs = {each.name for each in self.session.get_inputs()}
            self.outputs = [each.name for each in self.session.get_outputs()]

    def start(self, rows: Sequence[Sequence[int]], pad: int, most: int):
        """Rows to be continued by at most `most` tokens each; their prompts have yet to be read: an OnnxDecoding."""
        return OnnxDecoding(self, rows, most)

    def tokens_read(self, rows: Sequence[Sequence[int]]) -> int:
        """Tokens that are computed for these prompts together."""
        return len(rows[0]) + sum(len(row) - same_beginning(before, row) for before, row in pairwise(rows))

    def logits(self, row: Sequence[int]) -> np.ndarray:
        """Scores of each next token of one row: (tokens, vocabulary) fp32."""
        if any(name.startswith("past_") for name in self.inputs):
            decoding = OnnxDecoding(self, [row], 0, every=True)
            decoding.read()
            return decoding.logits[0].numpy()
        batch = {"input_ids": [row], "attention_mask": [[1] * len(row)], "token_type_ids": [[0] * len(row)]}
        return self.encode({name: np.array(values, np.int64) for name, values in batch.items()})[0][0]

    def encode(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Outputs of an encoder for a padded batch, each (rows, tokens, ...)."""
        return tuple(self.session.run(self.outputs, {n: v for n, v in batch.items() if n in self.inputs}))

    def seq2seq(self, ids: torch.Tensor, mask: torch.Tensor, changes: dict) -> torch.Tensor:
        """What an encoder-decoder writes to a padded batch: (rows, tokens) ids; `changes` are generation settings."""
        from shared.inference.onnx_seq2seq import OnnxEncoderDecoder

        writer = OnnxEncoderDecoder(self.config, self.generation, self.encoder, self.decoder)
        # The settings may turn the cache off, as training does, or ask for one of a fixed length: the graph is nothing without
        cache = {"use_cache": True, "cache_implementation": "dynamic"}
        return writer.generate(input_ids=ids, attention_mask=mask, do_sample=False, **cache, **changes)


class OnnxDecoding:
    """As TorchDecoding, with keys and values in buffers of their final length, which the graph fills in place; ONNX Runtime's
    attention knows the length of each row. It reads prompts in pieces for one row at a time only, which takes no longer than
    together: there is no padding, and what a prompt begins with as the one before it is copied.
    """

    def __init__(self, runner: OnnxRunner, rows: Sequence[Sequence[int]], most: int, every: bool = False):
        self.prompts, self.places = distinct(rows)
        self.session, self.inputs, self.every = runner.session, runner.inputs, every
        self.lengths = np.array([len(row) for row in self.prompts])
        config = runner.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.ends = self.lengths + most
        self.row, self.read_until, self.shape, self.logits = 0, 0, (heads, width), []
        self.cache = dict.fromkeys(name for name in runner.inputs if name.startswith("past_"))

    def read(self) -> bool:
        """Reads the next PROMPT_CHUNK tokens of the prompts; whether there are more."""
        if not self.row and not self.read_until:
            self._allocate(len(self.prompts))
        room = PROMPT_CHUNK
        while room and self.row < len(self.prompts):
            prompt, cache = self.prompts[self.row], {name: value.numpy() for name, value in self.cache.items()}
            if self.row and not self.read_until:
                self.read_until = same_beginning(self.prompts[self.row - 1], prompt)
                for values in cache.values():
                    values[self.row, :, : self.read_until] = values[self.row - 1, :, : self.read_until]
            here = np.arange(self.read_until, len(prompt) if self.every else min(self.read_until + room, len(prompt)))
            cache = {name: _value(values[self.row : self.row + 1]) for name, values in cache.items()}
            ids, mask = np.array([prompt])[:, here], np.ones((1, here[-1] + 1), np.int64)
            logits = self._run(ids, mask, here[None], cache)
            room, self.read_until = max(room - len(here), 0), int(here[-1]) + 1
            if self.read_until == len(prompt):
                self.logits.append(logits)
                self.row, self.read_until = self.row + 1, 0
        if self.row < len(self.prompts):
            return True
        self.logits = torch.cat(self.logits)
        if len(self.places) > len(self.prompts):
            self._move([(self, self.places)])
            self.logits = self.logits[self.places]
        self.prompts = None
        return False

    def join(self, other: "OnnxDecoding"):
        """Takes the rows of another in below its own."""
        self._move([(each, list(range(len(each.lengths)))) for each in (self, other)])

    def keep(self, places: list[int]):
        """Drops all rows but these."""
        self._move([(self, places)])

    def _move(self, parts: list[tuple["OnnxDecoding", list[int]]]):
        """Rows of decodings, by their places, to new buffers of this one."""
        moved = [(each.cache, places, each.lengths[places]) for each, places in parts]
        self.lengths, self.ends = (
            np.concatenate([getattr(each, name)[places] for each, places in parts]) for name in ("lengths", "ends")
        )
        self._allocate(len(self.lengths))
        for name, target in self.cache.items():
            row, target = 0, target.numpy()
            for cache, places, lengths in moved:
                source = cache[name].numpy()
                for place, length in zip(places, lengths, strict=True):
                    target[row, :, :length] = source[place, :, :length]
                    row += 1

    def _allocate(self, rows: int):
        shape = (rows, self.shape[0], int(self.ends.max()), self.shape[1])
        # Memory that is not written to is not taken
        self.cache = {name: _value(np.zeros(shape, np.float32)) for name in self.cache}

    def _run(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: dict) -> torch.Tensor:
        """Scores after the last token of each row, (rows, vocabulary), or after `every`, (rows, tokens, vocabulary)."""
        binding = self.session.io_binding()
        kept = np.arange(ids.shape[1])[0 if self.every else -1 :]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": kept}
        feed = {name: np.ascontiguousarray(values, np.int64) for name, values in feed.items() if name in self.inputs}
        for name, values in feed.items():
            binding.bind_cpu_input(name, values)
        for name, values in cache.items():
            binding.bind_ortvalue_input(name, values)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), values)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        logits = torch.from_numpy(binding.get_outputs()[-1].numpy())
        return logits if self.every else logits[:, -1]  # a graph of onnxruntime-genai gives all scores

    def feed(self, tokens: torch.Tensor):
        """Appends one token to each row, (rows,), and computes the scores of the next."""
        self.lengths = self.lengths + 1
        mask = (np.arange(self.lengths.max()) < self.lengths[:, None]).astype(np.int64)
        self.logits = self._run(tokens[:, None].numpy(), mask, self.lengths[:, None] - 1, self.cache)


def same_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that `other` begins with as `one` does, but for its last, whose scores are wanted."""
    return min(len(os.path.commonprefix([list(one), list(other)])), len(other) - 1)


def _value(values: np.ndarray):
    """Of ONNX Runtime, in the same memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(values)


def open_session(path: Path):
    """A session of ONNX Runtime on as many threads as torch has, which heeds OMP_NUM_THREADS and the cores of this process.

    Raises:
        UserError: no such file, or not a graph that this version reads.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        raise UserError(f"{path}: ONNX Runtime does not open it ({str(error).splitlines()[0][:160]}).") from error
