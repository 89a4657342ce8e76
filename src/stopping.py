"""Requests to stop a training run: a signal is remembered until the current step is finished."""

import signal
from types import FrameType


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

    def __init__(self) -> None:
        self.number = 0

    def listen(self) -> None:
        """Handle both signals from now on."""
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)

    def ask(self, number: int) -> None:
        """Ask the run to stop as if this signal had come, unless it was asked before."""
        self.number = self.number or number

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number:
            signal.default_int_handler(number, frame)
        self.number = number
