"""Documents that chat models answer from: collections, each an index of shared/retrieval. Used by api.py and chat_page.py."""

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.generation import Chunk, Sampling, Usage
from deploy.inference import Engine
from deploy.workers import Job
from shared import UserError
from shared.data.encoding import TooLong
from shared.retrieval.answers import MOST, citations, find, near_enough, open_index, with_passages
from shared.retrieval.encoder import Encoder
from shared.retrieval.hub import on_hub
from shared.retrieval.index import Found, Index
from shared.retrieval.qdrant import Qdrant, on_qdrant, parts

NOT_THERE = "The documents do not say."


@dataclass
class Evidence:
    """The passages nearest to a question, and whether they are near enough to answer from."""

    passages: list[Found]
    enough: bool


class SharedEncoder(Encoder):
    """For several threads, one after the other: a tokenizer is no more than one thread's at a time."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._lock = threading.Lock()

    def encode(self, *args, **kwargs):
        """As `Encoder.encode`."""
        with self._lock:
            return super().encode(*args, **kwargs)


class Collection:
    """An index that several threads ask, one after the other."""

    def __init__(self, name: str, index: Index | Qdrant):
        self.name, self.index, self._lock = name, index, threading.Lock()

    def state(self) -> tuple[int, bool]:
        """How many passages there are, and whether they are of all documents. Raises UserError: a damaged index."""
        try:
            with self._lock:
                return len(self.index), self.index.fact("whole") != "no"
        except sqlite3.Error as error:
            raise UserError(f"{self.name}: the index is damaged ({error}). Index its documents again.") from error

    def find(self, question: str, most: int = MOST) -> Evidence:
        """What may answer a question. Raises UserError: an empty or endless question, a damaged index."""
        with self._lock:
            passages, likeness = find(self.index, question, most)
            return Evidence(passages, near_enough(self.index, likeness))


def collection_name(path: str | Path) -> str:
    """What clients call an index: its file without folder and ending; of one on the Hub the name without owner and revision, of
    one in Qdrant that of its collection. Raises UserError: an address of something else, in which there may be a key.
    """
    if on_qdrant(path):
        return parts(path)[1]
    return Path(str(path).partition("@")[0]).name if on_hub(path) else Path(path).stem


def open_collections(paths: Sequence[str]) -> dict[str, Collection]:
    """By name. Raises UserError: no index, or two of one name."""
    found = {}
    for path in paths:
        name = collection_name(path)
        if name in found:
            raise UserError(f"{path}: there is another index named {name!r}. Give one of them another name.")
        found[name] = Collection(name, open_index(path))
    return found


def cited(evidence: Evidence) -> list[dict]:
    """What a reply refers to; nothing where the passages are not near enough."""
    return citations(evidence.passages) if evidence.enough else []


def answer_from(evidence: Evidence, engine: Engine, question: str, emit: Callable) -> Job:
    """As `Engine.answer_from`; where the passages are not near enough, no answer and a confidence of 0."""
    if evidence.enough:
        return engine.answer_from(question, [passage.text for passage in evidence.passages], emit)
    engine.check_question(question)
    emit(None)
    emit({"answer": "", "start": 0, "end": 0, "score": None, "confidence": 0.0, "number": None})
    return Job(emit)


def reply_from(
    evidence: Evidence, engine: Engine, messages: list[dict], sampling: Sampling, emit: Callable, none: str = NOT_THERE
) -> Job:
    """As `Engine.chat`, from passages: as many as fit are left in `evidence`. Where they are not enough, the reply is `none`.

    Raises:
        UserError: as `Engine.chat`.
    """
    if not evidence.enough and engine.chats:  # another model refuses
        began, job = time.perf_counter(), Job(emit)
        emit(None)
        for row in range(sampling.n):
            emit(Chunk(row, none, "stop"))
        emit(Usage(0, 0, time.perf_counter() - began))
        return job
    while True:
        try:
            return engine.chat(with_passages(messages, evidence.passages), sampling, emit)
        except TooLong:
            if len(evidence.passages) < 2:
                raise
            evidence.passages.pop()
