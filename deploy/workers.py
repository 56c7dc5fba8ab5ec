"""Threads that compute, and what is handed to them. Used by inference.py and generation.py."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shared import UserError
from shared.inference.sampling import Cancelled


@dataclass(eq=False)
class Job:
    """One request. `emit` gets `None` when it starts, then what it yields; the last is a `Usage`, a result (dict or list), or the
    exception that ended it. A cancelled job emits no more.
    """

    emit: Callable
    cancelled: threading.Event = field(default_factory=threading.Event, init=False)

    def cancel(self) -> None:
        """A waiting job never starts; a running one stops before its next token or batch."""
        self.cancelled.set()

    def fail(self, error: BaseException) -> None:
        """Ends it, unless it has ended."""
        if not self.cancelled.is_set():
            # native code that fails raises what is no Exception
            known = isinstance(error, Exception)
            self.emit(error if known else UserError(f"the model fails on this text ({type(error).__name__})."))
            self.cancel()


@dataclass(eq=False)
class Task(Job):
    """What `run` does, at once for all tasks of the same `batch` that wait together; None: never together with others."""

    run: Callable  # of a list of tasks
    batch: tuple | None = None
    item: tuple = ()


class Workers:
    """A fixed number of threads, so of models that compute at once; what waits together and can go together, goes together."""

    def __init__(self, threads: int = 2, batch_size: int = 8):
        self.batch_size, self._waiting, self._changed = batch_size, deque(), threading.Condition()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"worker-{number}", daemon=True).start()

    def submit(self, task: Task) -> Task:
        """Queues a task; who calls limits how many."""
        with self._changed:
            self._waiting.append(task)
            self._changed.notify()
        return task

    def _next(self) -> list[Task]:
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            tasks = [self._waiting.popleft()]
            if tasks[0].batch is not None:
                for task in list(self._waiting):
                    if task.batch == tasks[0].batch and len(tasks) < self.batch_size:
                        self._waiting.remove(task)
                        tasks.append(task)
            return [task for task in tasks if not task.cancelled.is_set()]

    def _work(self) -> None:
        lower_priority()
        while True:
            tasks = self._next()
            try:
                for task in tasks:
                    task.emit(None)
                if tasks:
                    tasks[0].run(tasks)
            except Cancelled:
                pass
            except BaseException as error:  # the thread lives on; who asked hears of it
                for task in tasks:
                    task.fail(error)


def lower_priority() -> None:
    """Of this thread, where threads have priorities of their own: answering comes before computing."""
    if sys.platform == "linux":
        # 5 has a third of the weight of 0: with 19 a busy neighbour stops all replies
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
