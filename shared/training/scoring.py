"""Scores of the rows of a split, batch by batch. Called by each task for its validation and test split."""

from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from shared.training.out_of_memory import within_memory


def autocast(device: torch.device, args) -> torch.autocast:
    """The precision that the training arguments ask for: fp16, bf16, or none of them (fp32)."""
    half = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(device.type, half, enabled=args.fp16 or args.bf16)


@within_memory
@torch.no_grad()
def score_rows(
    model, lengths: Sequence[int], score_batch: Callable[[list[int]], list], args, title: str = "evaluating"
) -> list:
    """What `score_batch` says of each row, in the order of the rows; processes share the work.

    All processes make the same number of calls: in each forward pass FSDP waits for the others, and would wait for ever for one
    that has no rows left. Where rows do not share out evenly some are scored twice and counted once.

    Args:
        model: put into eval mode, and back.
        lengths: of each row, in any unit; the longest come first, so that little is padded and out of memory shows at once.
        score_batch: called with at most `per_device_eval_batch_size` row numbers, under autocast and without gradients; returns
            one picklable result a row.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    order += islice(cycle(order), -len(order) % args.world_size)
    mine, size, found = order[args.process_index :: args.world_size], args.per_device_eval_batch_size, {}
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    for batch in tqdm(batches, desc=title, disable=args.disable_tqdm or args.process_index > 0, leave=False):
        with autocast(model.device, args):
            found |= dict(zip(batch, score_batch(batch), strict=True))
    model.train(was_training)
    everyone = dict(gather_object(list(found.items()))) if args.world_size > 1 else found
    return [everyone[i] for i in range(len(lengths))]
