"""Texts that are continued together: they join and leave between two tokens (continuous batching). Used by model.py and by
deploy/generation.py.

transformers' ContinuousBatchingManager (5.24) has one seed for all requests and no repetition penalty for each;
onnxruntime-genai's Engine batches so on CUDA only.
"""

from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import torch

from shared.inference.sampling import pick


@dataclass(eq=False)
class Row:
    """A text that is being continued.

    Attributes:
        prompt: token ids.
        most: tokens to write at most.
        ends: token ids that end it; they are not written.
        temperature, top_p, repetition_penalty, draw: see `sampling.pick`.
        on_token: called with each token that is written.
        cancelled: asked before each token and each piece of the prompt.
        written: token ids so far.
        open: whether more will follow.
        error: why its prompt could not be read.
    """

    prompt: Sequence[int]
    most: int
    ends: Container[int] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    draw: torch.Generator | None = None
    on_token: Callable[[int], None] | None = None
    cancelled: Callable[[], bool] | None = None
    written: list[int] = field(default_factory=list)
    open: bool = True
    error: Exception | None = None

    def take(self, logits: torch.Tensor) -> None:
        """Writes the next token, or ends; `logits` (vocabulary,) fp32."""
        seen = [*self.prompt, *self.written] if self.repetition_penalty != 1 else []
        token = pick(logits, self.temperature, self.top_p, self.repetition_penalty, seen, self.draw)
        self.open = token not in self.ends
        if not self.open:
            return
        self.written.append(token)
        self.open = len(self.written) < self.most
        if self.on_token is not None:
            self.on_token(token)

    def left(self) -> bool:
        """Whether it needs no further token."""
        if self.open and self.cancelled is not None and self.cancelled():
            self.open = False
        return not self.open


class Batch:
    """Rows of one model.

    Attributes:
        rows: those that are being continued.
        reading: (rows, decoding or None) whose prompts are being read; the first is next.
    """

    def __init__(self, runner, pad: int):
        self._runner, self._pad, self._decoding = runner, pad, None
        self.rows: list[Row] = []
        self.reading: deque[tuple[list[Row], object | None]] = deque()

    def add(self, rows: list[Row]) -> None:
        """Rows whose prompts are read together; what they begin with alike is read once."""
        self.reading.append((rows, None))

    def tokens_read(self, prompts: list[Sequence[int]]) -> int:
        """Tokens that are computed for these prompts, all different, if they are read together."""
        return self._runner.tokens_read(prompts)

    def step(self) -> list[Row]:
        """Reads a piece of a prompt and writes a token of each row; returns the rows that ended, which are gone."""
        ended = self._leave()
        if self.reading:
            ended += self._read()
        if self.rows:
            self._decoding.feed(torch.tensor([row.written[-1] for row in self.rows]))
            self._write(self.rows, self._decoding)
            ended += self._leave()
        return ended

    def _read(self) -> list[Row]:
        rows, decoding = self.reading.popleft()
        if all([row.left() for row in rows]):
            return rows
        try:
            if decoding is None:
                most = max(row.most for row in rows)
                decoding = self._runner.start([row.prompt for row in rows], self._pad, most)
            if decoding.read():
                self.reading.append((rows, decoding))  # a long prompt does not keep the next one waiting
                return []
        except Exception as error:  # too long for the memory, say: the others go on
            for row in rows:
                row.error, row.open = error, False
            return rows
        self._write(rows, decoding)
        places = [place for place, row in enumerate(rows) if not row.left()]
        if places:
            if len(places) < len(rows):
                decoding.keep(places)
            if self._decoding is None:
                self._decoding = decoding
            else:
                self._decoding.join(decoding)
            self.rows += [rows[place] for place in places]
        return [row for row in rows if not row.open]

    def _write(self, rows: list[Row], decoding) -> None:
        logits = decoding.logits.float()
        for row, scores in zip(rows, logits, strict=True):
            if not row.left():
                row.take(scores)

    def _leave(self) -> list[Row]:
        ended = [row for row in self.rows if row.left()]
        if ended:
            places = [place for place, row in enumerate(self.rows) if row.open]
            self.rows = [self.rows[place] for place in places]
            if places:
                self._decoding.keep(places)
            else:
                self._decoding = None
        return ended
