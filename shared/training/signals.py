"""SIGTERM and Ctrl-C stop a run at the end of a step, with a checkpoint. Called by each train.py."""

import os
import signal
import threading
import time

import torch
from transformers import TrainerCallback

from accelerate import PartialState


class StopOnSignal(TrainerCallback):
    """SIGTERM or Ctrl-C: finish the optimizer step, save, stop. A second Ctrl-C interrupts at once.

    Acts at the end of a step, the only place that can be resumed exactly; during an evaluation it waits for its end.
    """

    def __init__(self):
        self.received = 0
        self.received_at = 0.0
        self.step = self.saved = 0
        self.previous = {}
        self.process = os.getpid()
        self.launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def on_train_begin(self, args, state, control, **kwargs):
        # Python allows handlers in the main thread only; out of memory, training begins a second time
        if threading.current_thread() is threading.main_thread() and not self.previous:
            for signum in (signal.SIGTERM, signal.SIGINT):
                self.previous[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum, frame):
        if os.getpid() != self.process:  # a data loader's worker, forked with our handlers: its parent decides
            return
        if not self.received:
            self.received, self.received_at = signum, time.monotonic()
            # print is not reentrant
            os.write(2, b"\nstopping after this step; press Ctrl-C again to interrupt at once\n")
        elif signum == signal.SIGINT and time.monotonic() - self.received_at > 1:
            # Within a second it is the launcher, passing on the Ctrl-C that the terminal has sent to all.
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step
        if self.launcher not in (None, os.getppid()):
            # `accelerate launch` of one process dies of a SIGTERM without passing it on; we would train on unseen, and
            # the same command, given again, would write to the same folder.
            self.received = self.received or signal.SIGTERM
        if args.world_size > 1:
            # It can reach the processes in different steps; stopping alone would leave the others waiting for ever.
            received = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
            self.received = int(received)
        if self.received:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self.saved = state.global_step  # with --save_strategy best a worse one is not saved

    def restore(self) -> None:
        """Gives both signals back to whoever had them before; `train` calls it however training ended."""
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def exit_if_stopped(self) -> None:
        """After training: ends the program if a signal arrived, with one line on how to go on.

        Raises:
            SystemExit: 143 after SIGTERM, 130 after SIGINT, as a shell reports them.
        """
        if not self.received:
            return
        if PartialState().is_main_process:
            name = signal.Signals(self.received).name
            then = "checkpoint saved; the same command goes on from there"
            if self.saved != self.step:
                then = "not saved, as --save_strategy says; the same command goes on from the last checkpoint"
            print(f"stopped by {name} at step {self.step}, {then}.")
        raise SystemExit(128 + self.received)
