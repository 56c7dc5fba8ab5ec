"""Documents as one row of tokens, cut into the same blocks from memory or from a stream. Used by train.py.

The row is `end doc end doc end ...`. Block k holds the tokens kL to kL + L, so that neighbours share one token, the last
target of one and the first input of the next: every token is predicted exactly once and none is lost. Only the very
last block of a pass may be short; it is filled up with positions that have no target.
"""

import copy
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from shared.training.show_data import marked

NOTHING = -1  # fills the last block
STREAM_STATE = "stream.json"
LOT = 128, 500_000  # documents, or characters, that are tokenized together
AHEAD = 8  # lots that are read, and given to the tokenizer, before they are needed
HELD_OUT = 0.02  # share of a stream's documents for each of test and validation


class Packer:
    """Cuts blocks of `length` + 1 tokens from documents as they come."""

    def __init__(self, end: int, length: int, carry: list[int] | None = None):
        self.end, self.length = end, length
        self.carry = [end] if carry is None else list(carry)  # its first token is the last of the block before

    def add(self, ids: list[int]) -> list[list[int]]:
        """The blocks that are full once the document is added, each of `length` + 1 tokens."""
        row, blocks, start = [*self.carry, *ids, self.end], [], 0
        while len(row) - start > self.length:
            blocks.append(row[start : start + self.length + 1])
            start += self.length
        self.carry = row[start:]
        return blocks

    def flush(self) -> list[list[int]]:
        """The last, short block of a pass, filled up with NOTHING; none if no token is left."""
        rest, self.carry = self.carry, [self.end]
        return [rest + [NOTHING] * (self.length + 1 - len(rest))] if len(rest) > 1 else []


def pack(documents: Iterable[list[int]], end: int, length: int) -> np.ndarray:
    """All blocks of a list of documents: (blocks, length + 1) of int32."""
    packer, blocks = Packer(end, length), []
    for ids in documents:
        blocks += [np.array(block, dtype=np.int32) for block in packer.add(ids)]
    blocks += [np.array(block, dtype=np.int32) for block in packer.flush()]
    return np.stack(blocks) if blocks else np.empty((0, length + 1), dtype=np.int32)


def as_text(block: np.ndarray, tokenizer) -> str:
    """A block as text, with what is learnt between brackets: all but its first token."""
    ids = [token for token in block.tolist() if token != NOTHING]
    return marked(tokenizer, ids, [-100, *ids[1:]])


def example(block, end: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `shift_labels`, both (length,): the target of each position is the token after it, -100 for none."""
    block = torch.as_tensor(np.asarray(block, dtype=np.int64))
    inputs, targets = block[:-1], block[1:]
    return {
        "input_ids": torch.where(inputs == NOTHING, end, inputs),
        "shift_labels": torch.where(targets == NOTHING, -100, targets),
    }


class Blocks(torch.utils.data.Dataset):
    """Blocks in memory: four bytes a token."""

    def __init__(self, blocks: np.ndarray, end: int):
        self.blocks, self.end = blocks, end

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, i):
        return example(self.blocks[i], self.end)


class BlockStream(torch.utils.data.IterableDataset):
    """Blocks of a stream, which is never held in memory and begins again when it has been read to its end.

    Args:
        rows: `datasets.IterableDataset`.
        text: row -> its text, or None for a row that is not trained on (unusable, or held out).
        encode: texts -> token ids of each. It works ahead, in a thread beside training, on all cores if it is a tokenizer.
        end, length: as for `Packer`.
        most: documents in one pass; all by default.
        keep: how many blocks the trainer may fetch ahead of the step that is saved.
        resume: a state of `state_at`. Trainer skips what was trained by fetching it: those blocks then come out blank,
            without reading the corpus again.
    """

    def __init__(self, rows, text, encode: Callable, end: int, length: int, most: int | None, keep: int, resume=None):
        self.rows, self.text, self.encode, self.end, self.length, self.most = rows, text, encode, end, length, most
        self.resume, self.states = resume, deque(maxlen=keep)

    def __iter__(self) -> Iterator[dict]:
        state = self.resume or {"skip": 0, "blocks": 0, "pass": 0, "documents": 0, "carry": None, "rows": None}
        blank = example([self.end] * (self.length + 1), self.end)
        for _ in range(state["skip"]):
            yield blank
        packer, documents, number = Packer(self.end, self.length, state["carry"]), state["documents"], state["blocks"]
        self.rows.load_state_dict(copy.deepcopy(state["rows"]))  # None: from the beginning
        for current in range(state["pass"], 10**9):
            self.rows.set_epoch(current)
            begun = number
            for ids, rows in self._documents():
                documents += 1
                for block in packer.add(ids):
                    number += 1
                    if number > state["skip"]:
                        yield example(block, self.end)
                self._remember(number, current, documents, packer, rows)
                if documents == self.most:
                    break
            documents = 0
            for block in packer.flush():
                number += 1
                if number > state["skip"]:
                    yield example(block, self.end)
            if number == begun and not state["rows"]:
                return  # nothing to train on: Trainer says so
            self._remember(number, current + 1, 0, packer, None)

    def _documents(self) -> Iterator[tuple[list[int], dict]]:
        """Token ids of each document of a pass, in their order, with the state of the rows after it."""

        def lots():
            texts, states = [], []
            for row in self.rows:
                if (text := self.text(row)) is not None:
                    texts.append(text)
                    states.append(self.rows.state_dict())
                if len(texts) == LOT[0] or sum(map(len, texts)) >= LOT[1]:
                    yield texts, states
                    texts, states = [], []
            yield texts, states

        with ThreadPoolExecutor(1) as beside:
            ahead = deque()
            for texts, states in lots():
                ahead.append((beside.submit(self.encode, texts), states))
                if len(ahead) > AHEAD:
                    encoded, states = ahead.popleft()
                    yield from zip(encoded.result(), states, strict=True)
            for encoded, states in ahead:
                yield from zip(encoded.result(), states, strict=True)

    def first(self, count: int) -> np.ndarray:
        """The first blocks of the corpus, read again: (count, length + 1) of int32."""
        again = BlockStream(self.rows, self.text, self.encode, self.end, self.length, self.most, 1)
        rows = [
            torch.cat([block["input_ids"][:1], block["shift_labels"].clamp(min=NOTHING)]).numpy()
            for block in islice(again, count)
        ]
        return np.stack(rows).astype(np.int32)

    def _remember(self, number: int, current: int, documents: int, packer: Packer, rows: dict | None) -> None:
        """One state for each number of blocks, the latest document boundary before the block after it."""
        if self.states and self.states[-1]["blocks"] == number:
            self.states.pop()
        self.states.append(
            {"blocks": number, "pass": current, "documents": documents, "carry": list(packer.carry), "rows": rows}
        )

    def state_at(self, blocks: int) -> dict | None:
        """Where reading must begin so that what comes next is the block after the first `blocks`; plain JSON."""
        fitting = [state for state in self.states if state["blocks"] <= blocks]
        return {**fitting[-1], "skip": blocks} if fitting else self.resume and {**self.resume, "skip": blocks}


class SaveStream(TrainerCallback):
    """Writes into each checkpoint where the stream stands. Comes before CompleteCheckpoints, whose manifest lists the file."""

    def __init__(self, stream: BlockStream):
        self.stream = stream

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            step_blocks = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STREAM_STATE
            path.write_text(json.dumps(self.stream.state_at(state.global_step * step_blocks)), encoding="utf8")


def read_state(checkpoint: Path | None) -> dict | None:
    """The stream's state in a checkpoint; None for a fresh start."""
    return json.loads((checkpoint / STREAM_STATE).read_text(encoding="utf8")) if checkpoint else None


def side(text: str, seed: int, missing: tuple[str, ...]) -> str:
    """Split of a streamed document, by a hash of its text: `train`, or one of the splits that the data lacks.

    Exact copies land on one side. Near-duplicates may not: finding them needs the whole corpus, which shared/corpora/readers.py
    has read once already.
    """
    share = (
        int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode("utf8", "surrogatepass")).digest()[:8], "big") / 2**64
    )
    return missing[int(share / HELD_OUT)] if share < HELD_OUT * len(missing) else "train"


def document_positions(input_ids: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For `--isolate_documents`: positions that restart at each document, and where each begins in the flattened batch.

    Args:
        input_ids: (rows, length). A document begins at its end-of-text token and at the start of a row.

    Returns:
        position_ids (1, rows * length), cu_seq_lens_q (documents + 1,).
    """
    begins = input_ids == end
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    total = input_ids.numel()
    lengths = torch.diff(starts, append=starts.new_tensor([total]))
    positions = torch.arange(total, device=starts.device) - torch.repeat_interleave(starts, lengths, output_size=total)
    return positions[None], torch.cat([starts, starts.new_tensor([total])])
