"""Does a graph compute what PyTorch computes? Asked of each graph as soon as it is written, on rows of unequal lengths, alone and
padded together. Called by formats.py.

Tracing may fix a size for good (Funnel, RecurrentGemma), or make a graph that ONNX Runtime does not run (DeepSeek V3's heads).
What is measured later is read row by row, and its tolerance is made for rounding.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from shared import UserError
from shared.inference.onnx_runner import OnnxRunner
from shared.inference.positions import longest_input

LENGTHS = (24, 9)  # tokens of the rows, about
WRITTEN = 3  # that a decoder is given one by one
ALIKE = 0.01  # of the largest score; sums in another order move it by a thousandth of that


class Check:
    """Made before a model is traced, which changes it.

    Args:
        segments: whether the graph tells first and second text apart.
    """

    def __init__(self, model, tokenizer, task: str, segments: bool):
        self.task = task
        self.rows = _rows(model.config, tokenizer)
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        self.pads = pad is not None  # without, some classes read a row alone only
        rows = [torch.tensor(row) for row in self.rows]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad or 0)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        self.batch = {"input_ids": ids, "attention_mask": mask}
        if segments:
            second = int((getattr(model.config, "type_vocab_size", None) or 1) > 1)
            self.batch["token_type_ids"] = second * mask * (torch.arange(ids.shape[1]) > 3)
        self.steps = torch.tensor([row[1 : 1 + WRITTEN] for row in self.rows])
        self.expected = self._pytorch(model)

    @torch.no_grad()
    def _pytorch(self, model) -> list[np.ndarray]:
        if self.task == "text-generation":
            return [model(input_ids=torch.tensor([row])).logits[0].numpy() for row in self.rows]
        if self.task == "summarization":
            return [model(**self.batch, decoder_input_ids=self.steps).logits.numpy()]
        return [out for batch in self._batches() for out in _outputs(model(**batch))]

    def _batches(self) -> list[dict[str, torch.Tensor]]:
        """The last row alone, which is the shorter one, and all together."""
        length = len(self.rows[-1])
        return [{name: values[-1:, :length] for name, values in self.batch.items()}, *[self.batch] * self.pads]

    def _onnx(self, runner: OnnxRunner) -> list[np.ndarray]:
        if self.task == "text-generation":
            return [runner.logits(row) for row in self.rows]
        if self.task == "summarization":
            from transformers import DynamicCache, EncoderDecoderCache

            from shared.inference.onnx_seq2seq import OnnxEncoderDecoder

            writer = OnnxEncoderDecoder(runner.config, None, runner.encoder, runner.decoder)
            mask, cache = self.batch["attention_mask"], EncoderDecoderCache(DynamicCache(), DynamicCache())
            states = writer.encode(**self.batch)
            steps = [
                writer.forward(
                    attention_mask=mask, decoder_input_ids=token[:, None], encoder_outputs=states, cache=cache
                ).logits
                for token in self.steps.T
            ]
            return [torch.cat(steps, 1).numpy()]
        return [
            out
            for batch in self._batches()
            for out in runner.encode({name: values.numpy() for name, values in batch.items()})
        ]

    def _one_by_one(self, runner: OnnxRunner) -> list[np.ndarray]:
        """Scores of a decoder's last tokens, written to all rows together, (rows, vocabulary) each."""
        decoding = runner.start([row[:-WRITTEN] for row in self.rows], 0, WRITTEN)
        while decoding.read():
            pass
        found = []
        for place in range(-WRITTEN, 0):
            decoding.feed(torch.tensor([row[place] for row in self.rows]))
            found.append(decoding.logits.numpy())
        return found

    def compare(self, graphs: Path, config: Path) -> None:
        """Runs the graphs of a folder.

        Args:
            config: of the model, a file.

        Raises:
            UserError: ONNX Runtime does not run them, or the scores are others than PyTorch's.
        """
        shutil.copy(config, graphs / "config.json")
        expected = self.expected
        try:
            runner = OnnxRunner(graphs, self.task)
            found = self._onnx(runner)
            if self.task == "text-generation":
                found += self._one_by_one(runner)
                last = [np.stack([scores[place] for scores in expected]) for place in range(-WRITTEN, 0)]
                expected = [*expected, *last]
        except UserError:
            raise
        except Exception as error:  # onnxruntime's errors have no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"ONNX Runtime does not run the graph that PyTorch traced ({reason})") from error
        real = self.batch["attention_mask"].numpy() > 0
        for scores, right in zip(found, expected, strict=True):
            if self.task in ("fill-mask", "question-answering") and right.shape[:2] == real.shape:
                scores, right = scores[real], right[real]  # what stands at padding is no one's
            most = np.abs(right).max()
            if scores.shape != right.shape or not np.abs(scores - right).max() <= ALIKE * most:
                other = "of another shape" if scores.shape != right.shape else f"{np.abs(scores - right).max():.2g} off"
                raise UserError(
                    f"its graph computes something else than PyTorch (scores {other}, the largest is {most:.2g})"
                )


def _outputs(out) -> list[np.ndarray]:
    return [out[name].numpy() for name in ("logits", "start_logits", "end_logits") if name in out]


def _rows(config, tokenizer) -> list[list[int]]:
    """Token ids of texts of the vocabulary's own words; special tokens stand where the tokenizer puts them."""
    size = min(len(tokenizer), getattr(config.get_text_config(), "vocab_size", None) or len(tokenizer))
    usual = np.setdiff1d(np.arange(size), tokenizer.all_special_ids)
    draw, most = np.random.default_rng(0), longest_input(config, tokenizer) or max(LENGTHS)
    texts = [tokenizer.decode(draw.choice(usual, 4 * length).tolist()) for length in LENGTHS]
    lengths = [min(length, most) for length in LENGTHS]
    return [
        [i % size for i in tokenizer(text, truncation=True, max_length=length)["input_ids"]]  # it may know more words
        for text, length in zip(texts, lengths, strict=True)
    ]
