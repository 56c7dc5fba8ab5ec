"""The next token from its scores, and rows of unequal length as one tensor. Used by model.py and the runners."""

import os
from collections.abc import Sequence

import torch

PROMPT_CHUNK = 256  # tokens of prompts that are read at a time: others get their next token in between
SHARED_PREFIX = 16  # tokens that several prompts begin with, from which on these are read once


class Cancelled(Exception):
    """Nobody waits for the result any more; raised between two steps of the computation."""


def check_cancelled(cancelled) -> None:
    """Raises Cancelled if the function that was given says so."""
    if cancelled is not None and cancelled():
        raise Cancelled


def pick(logits: torch.Tensor, temperature: float, top_p: float, penalty: float, seen: list[int], draw) -> int:
    """The next token of one row.

    Args:
        logits: (vocabulary,) fp32.
        seen: ids of the row so far, for the repetition penalty.
        draw: torch.Generator, or None for one that is not seeded.
    """
    if penalty != 1:
        logits = logits.clone()
        places = torch.tensor(sorted(set(seen)))
        scores = logits[places]
        logits[places] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if temperature <= 0:
        return int(logits.argmax())
    logits = (logits - logits.max()).double()  # the largest is 0, so that no temperature, however small, gives infinity
    probabilities = (logits / temperature).softmax(-1)
    places = torch.arange(len(probabilities))
    if top_p < 1:
        # Sorting all takes ten times as long, and those left out before are together less than what may be left out. NaN stays:
        # a row of it shall not end the others with an error.
        small = probabilities <= (1 - top_p) / 2 / len(probabilities)
        places = small.logical_not().nonzero()[:, 0]
        falling, order = probabilities[places].sort(descending=True)
        kept = falling.cumsum(0) - falling < top_p  # the first token that reaches it stays
        kept[0] = True
        places, probabilities = places[order[kept]], falling[kept]
    # As torch.multinomial, in half the time: a number for each token, so that what rounding changes for one moves no other
    numbers = -torch.rand(len(logits), generator=draw, dtype=probabilities.dtype)[places].log()
    return int(places[(probabilities / numbers).argmax()])


def distinct(rows: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Rows without repetitions, and which of them each row is: a prompt that several share is read once."""
    numbers: dict[tuple[int, ...], int] = {}
    places = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    return list(numbers), places


def common_prefix(rows: Sequence[Sequence[int]], window: int | None) -> int:
    """Tokens that rows begin with, all of them, and that are read once: 0 if too few to pay. Those of a chat are its template's.

    Args:
        window: of layers that keep no more than so many tokens.
    """
    shortest = min(map(len, rows), default=0)
    length = min(len(os.path.commonprefix(list(rows))), shortest - 1, window - 1 if window else shortest)
    return length if len(rows) > 1 and length >= SHARED_PREFIX else 0


def pad_left(ids: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one (rows, longest) tensor of ids, and its attention mask."""
    longest = max(map(len, ids))
    tokens = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    return tokens, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count the tokens of each row from 0, padding aside."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
