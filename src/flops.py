"""Count the floating-point operations of a run, the one measure of cost that does not depend on the machine.

torch counts matrix products, convolutions and attention. Elementwise operations are not counted.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")


class OperationCounter:
    """Add up the operations of the functions that a run calls.

    Steps of an epoch with equal inputs take equally many operations, so only the first one of them is counted.

    Attributes:
        total: operations of the run so far.
        epoch: operations since the last call of `end_epoch`.
    """

    def __init__(self) -> None:
        self.total, self.epoch = 0, 0
        self._counting = False
        self._known: dict[str, int] = {}

    def run(self, function: Callable[..., Result], *arguments: Any, like: Hashable = None) -> Result:
        """Call a function with these arguments, and add its operations.

        If this happens within a function that is counted, nothing is added twice.

        Args:
            like: calls with an equal value take equally many operations within an epoch; None: every call is counted.
        """
        if self._counting:
            return function(*arguments)
        key = "" if like is None else f"{function.__name__} {like}"
        if key in self._known:
            self._add(self._known[key])
            return function(*arguments)
        self._counting = True
        try:
            with FlopCounterMode(display=False) as counter:
                result = function(*arguments)
        finally:
            self._counting = False
        found = counter.get_total_flops()
        if key:
            self._known[key] = found
        self._add(found)
        return result

    def _add(self, number: int) -> None:
        self.total += number
        self.epoch += number

    def end_epoch(self) -> int:
        """Return the operations of the epoch that ends, and start with 0 again."""
        ended, self.epoch = self.epoch, 0
        self._known.clear()  # a queue may be full now, which adds operations
        return ended

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and what was counted in this epoch, for a checkpoint."""
        return {"total": self.total, "epoch": self.epoch, "known": dict(self._known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.total, self.epoch, self._known = state["total"], state["epoch"], dict(state["known"])
