"""What the model will see, before it is trained: rows with the trained part marked, and how long they are. Called by each
train.py; how files were read and which rows were dropped is logged where that happens, above it.
"""

import logging
import sys
from collections.abc import Callable, Sequence

log = logging.getLogger("taskbook")
BARS, WIDTH, SHOWN = 8, 40, 2000  # bars of the histogram, characters of the longest, characters of a row


def show_data(run_args, lengths: Sequence[int], row: Callable[[int], str], most: int | None = None) -> None:
    """Logs rows and lengths: `--show_data` rows and a histogram, or in a run that trains one row and a line.

    Args:
        lengths: tokens of each training row, as it is trained.
        row: the text of a training row by its number, see `marked`.
        most: tokens at which rows are cut.

    Raises:
        SystemExit: with `--show_data`, once all is shown.
    """
    ordered = sorted(lengths)
    cut = "" if most is None else f", cut at {most:,}"
    said = f"{ordered[0]:,} to {ordered[-1]:,}, half of them up to {ordered[len(ordered) // 2]:,}{cut}"
    log.info("tokens of a row: %s", said)
    if not run_args.show_data:
        log.info("first row, [[trained]] marked:\n%s", row(0)[: SHOWN // 2])
        return
    log.info("rows by their tokens:\n%s", histogram(ordered))
    for number in range(min(run_args.show_data, len(ordered))):
        text = row(number)
        rest = f" ... and {len(text) - SHOWN:,} characters" if len(text) > SHOWN else ""
        log.info("training row %d, [[trained]] marked:\n%s%s", number + 1, text[:SHOWN], rest)
    log.info("nothing was trained: leave --show_data out to begin")
    sys.exit()


def histogram(ordered: Sequence[int]) -> str:
    """A line for each of at most BARS equal ranges of sorted numbers: the range, how many, a bar."""
    first, step = ordered[0], max(1, -(-(ordered[-1] - ordered[0] + 1) // BARS))
    counts = [0] * (1 + (ordered[-1] - first) // step)
    for length in ordered:
        counts[(length - first) // step] += 1
    return "\n".join(
        f"{first + i * step:>9,} to {first + (i + 1) * step - 1:>7,} {count:>9,} {'#' * -(-WIDTH * count // max(counts))}"
        for i, count in enumerate(counts)
    )


def marked(tokenizer, ids: Sequence[int], labels: Sequence[int]) -> str:
    """Token ids as text, between brackets what is trained: `[[reply]]`, or `[[[MASK] = word]]` where another token is learnt.

    Args:
        labels: one for each id; -100 where nothing is trained.
    """
    ids, labels = list(map(int, ids)), list(map(int, labels))
    text, start = "", 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or (labels[i] == -100) != (labels[i - 1] == -100):
            part, learnt = tokenizer.decode(ids[start:i]), labels[start:i]
            if learnt[0] != -100:
                part = f"[[{part}]]" if learnt == ids[start:i] else f"[[{part} = {tokenizer.decode(learnt).strip()}]]"
            text, start = text + part, i
    return text
