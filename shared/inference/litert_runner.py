"""A file of TensorFlow Lite as `model.Model` runs it: with ai-edge-litert, or with TensorFlow where only that is installed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from shared import UserError
from shared.inference.torch_runner import OneByOne

FILE = "model.tflite"


class LiteRTRunner:
    """Signatures of shared/export/litert_file.py, a row at a time.

    Attributes:
        length: tokens of a row, those that a decoder writes included.
    """

    def __init__(self, folder: Path, task: str):
        from transformers import AutoConfig, GenerationConfig

        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        has_settings = (folder / "generation_config.json").is_file()
        self.generation = GenerationConfig.from_pretrained(folder) if has_settings else None
        self.interpreter = interpreter_of()(model_path=str(folder / FILE), num_threads=torch.get_num_threads())
        self.signatures = {
            name: self.interpreter.get_signature_runner(name) for name in self.interpreter.get_signature_list()
        }
        self.shapes = {
            name: {key: tuple(each["shape"]) for key, each in runner.get_input_details().items()}
            for name, runner in self.signatures.items()
        }
        self.dtypes = {
            name: {key: each["dtype"] for key, each in runner.get_input_details().items()}
            for name, runner in self.signatures.items()
        }
        first = self.shapes["decode"]["mask"] if "decode" in self.shapes else self.shapes["encode"]["input_ids"]
        self.length = int(first[-1])

    def run(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What a signature gives for (1, tokens) inputs, which are padded with zeros to its shapes."""
        padded = {}
        for key, shape in self.shapes[name].items():
            value = np.asarray(inputs[key])
            if value.shape != shape:
                value = np.pad(value, [(0, most - here) for most, here in zip(shape, value.shape, strict=True)])
            padded[key] = value.astype(self.dtypes[name][key], copy=False)
        return self.signatures[name](**padded)

    def start(self, rows: Sequence[Sequence[int]], pad: int, most: int) -> OneByOne:
        """Rows to be continued, whose prompts have yet to be read."""
        return OneByOne([LiteRTDecoding(self, row) for row in rows])

    def tokens_read(self, rows: Sequence[Sequence[int]]) -> int:
        """Tokens that are computed for these prompts together."""
        return sum(map(len, rows))

    def logits(self, row: Sequence[int]) -> np.ndarray:
        """Scores of each next token of one row: (tokens, vocabulary) fp32."""
        if "decode" not in self.signatures:
            batch = {"input_ids": [row], "attention_mask": [[1] * len(row)], "token_type_ids": [[0] * len(row)]}
            return self.encode({name: np.array(values) for name, values in batch.items()})[0][0]
        decoding, scores = LiteRTDecoding(self, row[:1]), []
        decoding.read()
        for token in row[1:]:
            scores.append(decoding.logits)
            decoding.feed(torch.tensor([token]))
        return torch.cat([*scores, decoding.logits]).numpy()

    def encode(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Outputs of an encoder for a padded batch, each (rows, tokens, ...)."""
        rows, tokens = batch["input_ids"].shape
        outputs = []
        for i in range(rows):
            found = self.run("encode", {name: values[i : i + 1] for name, values in batch.items()})
            names = ("start_logits", "end_logits") if "start_logits" in found else ("logits",)
            by_token = len(names) == 2 or found["logits"].ndim == 3  # a label's scores are one row for the text
            outputs.append([found[name][:, :tokens] if by_token else found[name] for name in names])
        return tuple(np.concatenate(each) for each in zip(*outputs, strict=True))

    def seq2seq(self, ids: torch.Tensor, mask: torch.Tensor, changes: dict) -> torch.Tensor:
        """What an encoder-decoder writes to a padded batch: (rows, tokens) ids; `changes` are generation settings."""
        from shared.inference.litert_seq2seq import LiteRTEncoderDecoder

        writer = LiteRTEncoderDecoder(self.config, self.generation, self)
        return writer.generate(input_ids=ids, attention_mask=mask, do_sample=False, use_cache=False, **changes)


class LiteRTDecoding:
    """A row that is being continued, as TorchDecoding, with keys and values of the file's fixed length."""

    def __init__(self, runner: LiteRTRunner, row: Sequence[int]):
        self.runner, self.unread, self.length = runner, list(row), 0
        shapes = runner.shapes["decode"]
        self.cache = {
            name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name.startswith("kv_cache")
        }

    def read(self) -> bool:
        """Reads the next piece of the prompt; whether there is another. All but its last token give no scores."""
        name = next(name for name in self.runner.signatures if name.startswith("prefill"))
        piece = self.unread[:-1][: self.runner.shapes[name]["tokens"][1]]
        if piece:
            self._run(name, piece)
            self.unread = self.unread[len(piece) :]
        if len(self.unread) > 1:
            return True
        self.logits, self.unread = self._run("decode", self.unread), []
        return False

    def feed(self, token: torch.Tensor):
        """Appends a token, (1,), and computes the scores of the next."""
        self.logits = self._run("decode", token.tolist())

    def _run(self, name: str, tokens: list[int]) -> torch.Tensor | None:
        """A piece of the row; what pads it is written behind the row's end, where the next piece replaces it."""
        width, most = self.runner.shapes[name]["tokens"][1], self.runner.length
        if self.length + width > most:  # the cache is written as one slice, which would be moved to fit in
            scores = [self._run("decode", [token]) for token in tokens]
            return scores[-1]
        places = np.arange(self.length, self.length + width)
        mask = np.where(np.arange(most) <= places[:, None], 0.0, np.finfo(np.float32).min)[None, None]
        inputs = {"tokens": np.array([tokens]), "input_pos": places, "mask": mask}
        found = self.runner.run(name, inputs | self.cache)
        self.cache = {key: found[key] for key in self.cache}
        self.length += len(tokens)
        return torch.from_numpy(found["logits"][:, -1].copy()) if "logits" in found else None


def interpreter_of():
    """The class of the interpreter: ai-edge-litert's, else TensorFlow's.

    Raises:
        UserError: neither is installed.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        try:
            from tensorflow.lite.python.interpreter import Interpreter
        except ImportError as error:
            raise UserError(
                "a file of LiteRT is run by ai-edge-litert or tensorflow: pip install ai-edge-litert"
            ) from error
    return Interpreter
