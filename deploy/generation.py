"""Text that a model writes for many at once. Used by inference.py."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import torch
from tokenizers.decoders import DecodeStream

from deploy.workers import Job, lower_priority
from shared.inference.batch import Row
from shared.inference.model import Model
from shared.inference.sampling import PROMPT_CHUNK

REPLIES = 16  # at once, of one model
BEFORE = 16  # tokens of a prompt with which its continuation is decoded
# Rows x the longest of them, in tokens: what keys and values of a model take at most, unless 4 contexts are more
CELLS = 16 * 1024


@dataclass(frozen=True)
class Sampling:
    """How text is drawn. `max_tokens` None: up to 512, as many as fit. `temperature` 0: the likeliest token."""

    max_tokens: int | None = None
    temperature: float = 0.7
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1


@dataclass(frozen=True)
class Chunk:
    """New text of reply `row`; `reason` is `stop` or `length` with the last one."""

    row: int
    text: str
    reason: str | None = None


@dataclass(frozen=True)
class Usage:
    """The end of a generation: tokens read and written, and how long writing took, in seconds."""

    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(eq=False)
class TextJob(Job):
    """A request for text.

    Attributes:
        prompts: token ids; `sampling.n` replies to each, of `most` tokens.
        continues: the replies go on with the text of their prompts, in which a blank at their beginning counts.
    """

    prompts: list[list[int]]
    most: list[int]
    sampling: Sampling
    continues: bool = False

    def __post_init__(self):
        self.next = 0  # prompt
        self.open, self.written, self.began = len(self.prompts) * self.sampling.n, 0, 0.0


class Reply:
    """The text of one row of token ids as they come; holds back what may be the beginning of a stop text.

    Args:
        before: token ids that it goes on with. Decoders of Metaspace (Llama 2, Mistral) drop the first blank of a text.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...], before: Sequence[int] = ()):
        self._tokenizer, self._stop, self._held, self._open = tokenizer, stop, "", []
        self._decoder = DecodeStream(skip_special_tokens=True)
        self.reason = None
        first = max(len(before) - BEFORE, 0)
        # A part of a character would spoil the whole ones after it
        while first and "\ufffd" in tokenizer.decode([before[first]]):
            first -= 1
        for token in before[first:]:
            self._decode(token)

    def _decode(self, token: int) -> str:
        """The text that is whole with this token; `_open` holds the tokens of what is not."""
        self._open.append(token)
        try:
            text = self._decoder.step(self._tokenizer, token) or ""
        except Exception:  # of Llama 2's kind: bytes that are no character unmake those that were shown before them
            self._decoder = DecodeStream(skip_special_tokens=True)
            text = "".join(self._decoder.step(self._tokenizer, each) or "" for each in self._open)
        if text:
            self._open = []
        return text

    def add(self, token: int) -> str:
        """What can be shown after this token; `reason` is set when a stop text was found."""
        self._held += self._decode(token)
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            shown, self._held, self.reason = self._held[: min(places)], "", "stop"
            return shown
        most = max((len(stop) for stop in self._stop), default=1) - 1
        keep = next(
            (
                n
                for n in range(min(most, len(self._held)), 0, -1)
                if any(s.startswith(self._held[-n:]) for s in self._stop)
            ),
            0,
        )
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self, reason: str) -> str:
        """The rest of the text, at the end."""
        self.reason, rest, self._held = reason, self._held, ""
        return rest


class Writer:
    """Continues the texts of one model together, in a thread of its own: requests join and leave between two tokens.

    Args:
        tokenizer: of the tokenizers library, to turn ids into text.
        replies: most that are written at once; a request for more, or longer than there is room, runs alone.
    """

    def __init__(self, model: Model, tokenizer, replies: int = REPLIES):
        self._model, self._tokenizer, self._replies = model, tokenizer, replies
        self._cells = max(CELLS, 4 * model.context)
        self._rows: dict[Row, tuple[TextJob, int, Reply]] = {}  # with the number of the reply
        self._waiting, self._lock, self._active = deque(), threading.Lock(), False
        calls = SimpleQueue()
        threading.Thread(target=_work, args=(calls,), name="writer", daemon=True).start()
        self._calls = calls
        weakref.finalize(self, calls.put, None)  # the thread ends with its model

    def submit(self, job: TextJob) -> TextJob:
        """Queues a job; who calls limits how many."""
        with self._lock:
            self._waiting.append(job)
            if not self._active:
                self._active = True
                self._calls.put(self._run)
        return job

    def _run(self) -> None:
        batch = self._model.batch()
        while True:
            try:
                if rows := self._next(batch):
                    batch.add(rows)
                for row in batch.step():
                    self._end(row)
            except BaseException as error:  # the thread lives on; who asked hears of it
                for job, *_ in self._rows.values():
                    job.fail(error)
                self._rows.clear()
                batch = self._model.batch()
            with self._lock:
                if not self._rows and not self._waiting:
                    self._active = False
                    return

    def _next(self, batch) -> list[Row]:
        """Rows whose prompts are read next, together: one prompt, or several that are as much as a piece of a long one."""
        rows, prompts = [], {}
        while self._waiting:
            job = self._waiting[0]
            if job.cancelled.is_set():
                self._waiting.popleft()
                continue
            prompt, most = job.prompts[job.next], job.most[job.next]
            count = len(self._rows) + job.sampling.n
            longest = max([len(prompt) + most, *(len(row.prompt) + row.most for row in self._rows)])
            if self._rows and (count > self._replies or count * longest > self._cells):
                break
            prompts[tuple(prompt)] = None
            if rows and batch.tokens_read(list(prompts)) > PROMPT_CHUNK:
                break
            self._waiting.popleft()
            rows += self._start(job)
            if job.next < len(job.prompts):  # one request with many prompts does not keep the others waiting
                self._waiting.append(job)
        return rows

    def _start(self, job: TextJob) -> list[Row]:
        """Rows for the next prompt of a job."""
        if not job.next:
            job.emit(None)
            job.began = time.perf_counter()
        sampling, rows = job.sampling, []
        for i in range(sampling.n):
            reply = Reply(self._tokenizer, sampling.stop, job.prompts[job.next] if job.continues else ())
            row = Row(
                job.prompts[job.next],
                job.most[job.next],
                self._model.stop_ids,
                sampling.temperature,
                sampling.top_p,
                sampling.repetition_penalty,
                torch.Generator().manual_seed(sampling.seed + i) if sampling.seed is not None else None,
                partial(self._show, job, job.next * sampling.n + i, reply),
                lambda reply=reply: job.cancelled.is_set() or reply.reason is not None,
            )
            self._rows[row] = job, job.next * sampling.n + i, reply
            rows.append(row)
        job.next += 1
        return rows

    @staticmethod
    def _show(job: TextJob, number: int, reply: Reply, token: int) -> None:
        try:
            text = reply.add(token)
        except BaseException as error:  # the others go on
            return job.fail(error)
        if text or reply.reason:
            job.emit(Chunk(number, text, reply.reason))

    def _end(self, row: Row) -> None:
        job, number, reply = self._rows.pop(row)
        if row.error is not None:
            job.fail(row.error)
        job.open, job.written = job.open - 1, job.written + len(row.written)
        if job.cancelled.is_set():
            return
        if not reply.reason:
            reason = "length" if len(row.written) >= row.most else "stop"
            job.emit(Chunk(number, reply.finish(reason), reason))
        if not job.open:
            job.emit(Usage(sum(map(len, job.prompts)), job.written, time.perf_counter() - job.began))


def _work(calls: SimpleQueue) -> None:
    lower_priority()
    while (call := calls.get()) is not None:
        call()
        del call  # it holds the model
