"""How a run is asked to stop: a signal is remembered until the step is finished."""

import signal
from types import FrameType


class Interrupted(Exception):
    """A signal asked the run to stop; all ranks finished the same step. `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopRequest:
    """Remembers SIGINT and SIGTERM until the step is done; a second SIGINT ends the program at once."""

    def __init__(self) -> None:
        self.number = 0

    def listen(self) -> None:
        """Handle both signals from now on."""
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number:
            signal.default_int_handler(number, frame)
        self.number = number
