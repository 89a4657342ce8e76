"""Requests to stop a training run: a signal is remembered until the current step is finished."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from .signals import NAMES

END = b"\0"  # no signal has this number


class Interrupted(Exception):
    """A request to stop the run. All ranks have finished the same step when it is raised.

    Attributes:
        signal: number of the signal; SIGPIPE if standard output was closed.
    """

    def __init__(self, number: int):
        closed = number == signal.SIGPIPE
        super().__init__("standard output was closed" if closed else f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopRequest:
    """Remembers SIGINT and SIGTERM until the step is finished. A second SIGINT ends the program at once.

    Attributes:
        number: number of the signal, or 0 as long as nothing asked the run to stop.
    """

    _watching = False  # True in a process in which `announced` runs

    def __init__(self) -> None:
        self.number = 0
        self._replaced: dict[int, Any] = {}

    def listen(self) -> None:
        """Handle both signals from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, self._remember)
            self._replaced.setdefault(number, before)

    def stop_listening(self) -> None:
        """Restore the handlers that `listen` has replaced."""
        while self._replaced:
            signal.signal(*self._replaced.popitem())

    @contextlib.contextmanager
    def announced(self, acknowledge: Callable[[int], None], give_up: Callable[[], None]) -> Iterator[None]:
        """Answer signals at once while the block runs, although a handler must wait until C++ code returns.

        A backward pass is one call of C++ code and may take minutes. So a thread reads the signals from a pipe, into which
        Python's own C code writes them. Only the main thread may call this function.

        Args:
            acknowledge: called once with the number of the first signal.
            give_up: called at the second SIGINT, before the process ends with the status 130.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def watch() -> None:
            asked = False
            while (numbers := os.read(reader, 1)) != END:
                if asked and numbers[0] == signal.SIGINT:
                    with contextlib.suppress(Exception):
                        give_up()
                    os._exit(128 + signal.SIGINT)
                if not asked and numbers[0] in NAMES:
                    asked = True
                    with contextlib.suppress(Exception):  # the output may be closed
                        acknowledge(numbers[0])

        thread = threading.Thread(target=watch, name="signals", daemon=True)
        thread.start()
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        StopRequest._watching = True
        try:
            yield
        finally:
            StopRequest._watching = False
            signal.set_wakeup_fd(before)
            os.set_blocking(writer, True)
            os.write(writer, END)  # closing it would not end the thread while a data-loading worker holds a copy
            thread.join()
            os.close(writer)
            os.close(reader)

    def ask(self, number: int) -> None:
        """Ask the run to stop as if this signal had come, unless it was asked before."""
        self.number = self.number or number

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number and not StopRequest._watching:
            signal.default_int_handler(number, frame)
        self.number = number


def _leave_the_pipe() -> None:
    """Keep the signals of a forked process, such as a data-loading worker, out of the pipe of its parent."""
    if StopRequest._watching:
        signal.set_wakeup_fd(-1)
        StopRequest._watching = False


os.register_at_fork(after_in_child=_leave_the_pipe)
