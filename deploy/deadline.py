"""What came with a model runs for so long at most. Used by inference.py."""

import ctypes
import threading
from concurrent.futures import Future

from shared import UserError


class Deadline:
    """Runs what came with a model, a tokenizer's patterns or a chat template, for at most `seconds` at a time.

    What is not back by then is given up: a template, which is Python, is ended; native code cannot be, and until it returns
    nothing more is begun, so that it takes one core and not the server.
    """

    def __init__(self, seconds: float):
        self.seconds, self._given_up = seconds, []

    def run(self, function, *args):
        """The function's result. Raises what it raises, and UserError when it is late, or when another one still runs."""
        self._given_up = [thread for thread in self._given_up if thread.is_alive()]
        if self._given_up:
            raise UserError("this model's tokenizer or chat template has not come back from another text yet.")
        result = Future()

        def work():
            try:
                result.set_result(function(*args))
            except Exception as error:
                result.set_exception(error)
            except BaseException as error:  # native code that fails raises what is no Exception
                result.set_exception(UserError(f"this model's tokenizer fails on this text ({type(error).__name__})."))

        thread = threading.Thread(target=work, name="encoding", daemon=True)
        thread.start()
        try:
            return result.result(self.seconds)
        except TimeoutError:
            self._given_up.append(thread)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            raise UserError(
                f"this model's tokenizer or chat template needed more than {self.seconds:g} s for this text."
            ) from None
