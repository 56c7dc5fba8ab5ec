"""What one process does for the others: decisions by the first one, data made once on each machine. Called by each train.py."""

import shutil
import tempfile
from collections.abc import Callable
from itertools import cycle, islice

from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast_object_list, gather_object
from datasets import DatasetDict, load_from_disk

from accelerate import PartialState
from shared import UserError


def on_main_process(decide: Callable):
    """What `decide()` returns in the first process, in all of them; where it raises a UserError all raise it."""
    state = PartialState()
    if state.num_processes == 1:
        return decide()
    answer = [None]
    if state.is_main_process:
        try:
            answer = [decide()]
        except UserError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def once_a_machine(make: Callable[[], tuple]) -> tuple:
    """What `make()` returns, called in the first process of each machine alone; the others map its rows into their memory.

    Args:
        make: returns data sets by split, and then plain values.

    Raises:
        UserError: as `make`, in all processes of the machine.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    made = written = refused = None
    try:
        if state.is_local_main_process:
            try:
                made = make()
                written = tempfile.mkdtemp(prefix="taskbook-rows-")
                DatasetDict(made[0]).save_to_disk(written)
            except UserError as error:
                refused = str(error)
        answers = gather_object([(written, refused, made and made[1:])])
        folder, refused, facts = answers[state.process_index - state.local_process_index]
        if refused is not None:
            raise UserError(refused)
        if made is None:
            made = (load_from_disk(folder), *facts)
        state.wait_for_everyone()
    finally:
        if written:
            shutil.rmtree(written, ignore_errors=True)  # a mapped file stays readable
    return made


class Shares(BatchSamplerShard):
    """The batches of a process: as many as each other one has. accelerate fills the last ones of an epoch up with rows of its
    beginning; here what is left is shared out, and a row comes twice only where fewer are left than processes.
    """

    def __iter__(self):
        group = []
        for batch in self.batch_sampler:
            group.append(batch)
            if len(group) == self.num_processes:
                yield group[self.process_index]
                group = []
        if rows := [row for batch in group for row in batch]:
            rows = list(islice(cycle(rows), max(len(rows), self.num_processes)))
            yield rows[self.process_index :: self.num_processes]


def without_repeats(trainer) -> None:
    """Lets several processes take `Shares` of an epoch's rows: each step then has the rows that it has in one process. Not where
    `trainer.gathers_rows`, which needs as many rows of each process.
    """
    if trainer.args.world_size == 1 or getattr(trainer, "gathers_rows", False):
        return
    load = trainer.get_train_dataloader

    def shared_out():
        loader = load()
        if type(sampler := getattr(loader, "batch_sampler", None)) is BatchSamplerShard:
            sampler.__class__ = Shares  # a loader does not take another sampler once it is made
        return loader

    trainer.get_train_dataloader = shared_out
