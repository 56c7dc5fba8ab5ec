"""An exported graph in ONNX Runtime, as `model.Model` runs it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from shared import UserError
from shared.inference.sampling import PROMPT_CHUNK, distinct


class OnnxRunner:
    """Graphs of shared/export/graphs.py or onnxruntime-genai in ONNX Runtime, on the CPU."""

    def __init__(self, folder: Path, task: str):
        from transformers import AutoConfig, GenerationConfig

        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        has_settings = (folder / "generation_config.json").is_file()
        self.generation = GenerationConfig.from_pretrained(folder) if has_settings else None
        if task == "summarization":
            self.encoder, self.decoder = (open_session(folder / f"{part}.onnx") for part in ("encoder", "decoder"))
        else:
            self.session = open_session(folder / "model.onnx")
            self.inputs = {each.name for each in self.session.get_inputs()}
            self.outputs = [each.name for each in self.session.get_outputs()]

    def start(self, rows: Sequence[Sequence[int]], pad: int, most: int):
        """Rows to be continued by at most `most` tokens each; their prompts have yet to be read: an OnnxDecoding."""
        return OnnxDecoding(self, rows, pad, most)

    def tokens_read(self, rows: Sequence[Sequence[int]]) -> int:
        """Tokens that are computed for these prompts together, padding among them."""
        return len(rows) * max(map(len, rows))

    def logits(self, row: Sequence[int]) -> np.ndarray:
        """Scores of each next token of one row: (tokens, vocabulary) fp32."""
        if any(name.startswith("past_") for name in self.inputs):
            decoding = OnnxDecoding(self, [row], 0, 0, every=True)
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
        return writer.generate(input_ids=ids, attention_mask=mask, do_sample=False, **changes)


class OnnxDecoding:
    """As TorchDecoding, with keys and values in buffers of their final length, which the graph fills in place. Padding stands
    right: the attention of ONNX Runtime knows the length of each row, and the next token overwrites the padding.
    """

    def __init__(self, runner: OnnxRunner, rows: Sequence[Sequence[int]], pad: int, most: int, every: bool = False):
        rows, self.places = distinct(rows)
        self.session, self.inputs, self.every = runner.session, runner.inputs, every
        self.lengths = np.array([len(row) for row in rows])
        longest, config = int(self.lengths.max()), runner.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.ends = self.lengths + most
        self.read_until, self.shape = 0, (heads, width)
        self.cache = dict.fromkeys(name for name in runner.inputs if name.startswith("past_"))
        self.prompt = np.array([list(row) + [pad] * (longest - len(row)) for row in rows], np.int64)
        whole = (self.lengths == longest).all() and not every  # padding would be taken for text that was read
        self.chunk = PROMPT_CHUNK if whole else longest

    def read(self) -> bool:
        """Reads the next piece of the prompts; whether there is another."""
        if not self.read_until:
            self._allocate(len(self.prompt))
        longest = self.prompt.shape[1]
        here = slice(self.read_until, min(self.read_until + self.chunk, longest))
        self.read_until = here.stop
        columns = np.arange(here.stop)
        mask = (columns < self.lengths[:, None]).astype(np.int64)
        positions = np.minimum(columns, self.lengths[:, None] - 1)[:, here]
        part = self.prompt[:, here]
        last = np.minimum(self.lengths - 1, here.stop - 1) - here.start
        self._run(part, mask, positions, last)
        if here.stop < longest:
            return True
        if len(self.places) > len(self.prompt):
            self._move([(self, self.places)])
            self.logits = self.logits[self.places]
        self.prompt = None
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
        import onnxruntime

        shape = (rows, self.shape[0], int(self.ends.max()), self.shape[1])
        new = onnxruntime.OrtValue.ortvalue_from_numpy  # memory that is not written to is not taken
        self.cache = {name: new(np.zeros(shape, np.float32)) for name in self.cache}

    def _run(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, last: np.ndarray):
        binding = self.session.io_binding()
        kept = np.arange(ids.shape[1]) if self.every else np.unique(last)
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": kept}
        feed = {name: np.ascontiguousarray(values, np.int64) for name, values in feed.items() if name in self.inputs}
        for name, values in feed.items():
            binding.bind_cpu_input(name, values)
        for name, values in self.cache.items():
            binding.bind_ortvalue_input(name, values)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), values)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        logits = torch.from_numpy(binding.get_outputs()[-1].numpy())
        if self.every:
            self.logits = logits
        else:  # a graph of onnxruntime-genai gives all scores
            columns = np.searchsorted(kept, last) if "logits_to_keep" in self.inputs else last
            self.logits = logits[torch.arange(len(ids)), torch.from_numpy(columns)]

    def feed(self, tokens: torch.Tensor):
        """Appends one token to each row, (rows,), and computes the scores of the next."""
        self.lengths = self.lengths + 1
        mask = (np.arange(self.lengths.max()) < self.lengths[:, None]).astype(np.int64)
        self._run(tokens[:, None].numpy(), mask, self.lengths[:, None] - 1, np.zeros(len(tokens), int))


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
