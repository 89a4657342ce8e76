"""The entries of a checkpoint of train.py: their types and bounds, checked once after reading.

A message names the entry as a path of keys, such as `config.arch`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, printable

MOST_LETTERS = 4096  # of a text in the configuration or the history
# Tensors without a dimension are counters and switches.
SCALARS = ("num_batches_tracked", "_pointer", "_full", "queue_started")
NUMBERS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
REAL = {*NUMBERS, *WHOLE_NUMBERS}
TENSORS = (Tensor, torch.nn.Parameter)
IN_A_RUN = ("config", "history", "epoch", "done")  # what `run.py` reads

# --------------------------------------------------------------------------------------------------------------------
# parts


def shown(value: Any) -> str:
    """Return a part of a file as a message shows it, in at most 60 letters."""
    text = printable(str(value)[:1000])
    return text if len(text) <= 60 else f"{text[:60]}..."


def refuse(entry: str, value: Any, expected: str) -> InputError:
    """Return the error about an entry."""
    if isinstance(value, bool | int | float | str | None):
        # a number of more than 4300 digits cannot be converted to text
        huge = isinstance(value, int) and value.bit_length() > 100
        found = "a huge number" if huge else repr(shown(value)) if isinstance(value, str) else str(value)
    else:
        found = f"a {type(value).__name__}"
    return InputError(f"the entry {entry} is {found}, expected {expected}: use another file")


def state_dict(entry: str, value: Any, *, scalars: tuple[str, ...] | None = SCALARS) -> dict[str, Tensor]:
    """Return a state dict as a plain dictionary of dense real tensors.

    Args:
        scalars: endings of the names of tensors that may have no dimension; None: all may.

    Raises:
        InputError: naming the first entry that is something else.
    """
    if not isinstance(value, dict):
        raise refuse(entry, value, "a dictionary of tensors")
    for name, tensor in value.items():
        if type(name) is not str:
            raise refuse(entry, value, f"names of tensors as its keys, not {type(name).__name__}s")
        if type(tensor) in TENSORS and tensor.layout is torch.strided and tensor.dtype in REAL:
            if tensor.ndim or scalars is None or name.endswith(scalars):
                continue
            raise InputError(f"the entry {_path(entry, name)} has no dimension, expected weights: use another file")
        dense_tensor(_path(entry, name), tensor)
    return {name: tensor.detach() if tensor.requires_grad else tensor for name, tensor in value.items()}


def _path(entry: str, name: str) -> str:
    return f"{entry}.{shown(name)}" if entry else shown(name)


def dense_tensor(entry: str, value: Any) -> None:
    """Raise InputError unless the value is a dense tensor of real numbers."""
    if not isinstance(value, Tensor):
        raise refuse(entry, value, "a tensor")
    if value.layout is not torch.strided or value.dtype not in REAL:
        raise InputError(
            f"the entry {entry} is a tensor of {value.dtype} in the layout {value.layout}, expected a dense tensor of real "
            "numbers: use another file"
        )


def _plain(entry: str, value: Any, depth: int = 0) -> None:
    """Raise InputError unless the value could be written as JSON and has a sensible size."""
    if isinstance(value, str) and len(value) > MOST_LETTERS:
        raise InputError(
            f"the entry {entry} has {len(value):,} letters, expected at most {MOST_LETTERS:,}: use another file"
        )
    if isinstance(value, int) and not -(1 << 64) < value < 1 << 64:
        raise refuse(entry, value, "a number of at most 64 bits")
    if isinstance(value, bool | int | float | str | None):
        return
    if depth < 4 and isinstance(value, list | tuple):
        for element in value:
            _plain(entry, element, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        _named(entry, value)
        for name, element in value.items():
            _plain(f"{entry}.{shown(name)}", element, depth + 1)
    else:
        raise refuse(entry, value, "numbers and texts")


def _named(entry: str, value: Any) -> None:
    """Raise InputError unless the value is a dictionary whose keys are texts."""
    if not isinstance(value, dict):
        raise refuse(entry, value, "a dictionary")
    for key in value:
        if type(key) is not str:
            raise refuse(entry, value, f"texts as its keys, not {shown(key)}")


def _count(entry: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise refuse(entry, value, "a count of at least 0")


def _seconds(entry: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise refuse(entry, value, "a finite number of at least 0")


def _config(entry: str, value: Any) -> None:
    _named(entry, value)
    _plain(entry, value)
    for name in ("arch", "method"):
        if name in value and type(value[name]) is not str:
            raise refuse(f"{entry}.{name}", value[name], "a text")


def _history(entry: str, value: Any) -> None:
    if not isinstance(value, list):
        raise refuse(entry, value, "a list with one dictionary per epoch")
    for number, epoch in enumerate(value):
        _named(f"{entry}[{number}]", epoch)
        for name, each in epoch.items():
            _plain(f"{entry}[{number}].{shown(name)}", each)
            if not isinstance(each, int | float):
                raise refuse(f"{entry}[{number}].{shown(name)}", each, "a number")


def _optimizer(entry: str, value: Any) -> None:
    _named(entry, value)
    groups, state = value.get("param_groups"), value.get("state")
    if not isinstance(groups, list) or not groups:
        raise refuse(f"{entry}.param_groups", groups, "a list of dictionaries")
    for number, group in enumerate(groups):
        where = f"{entry}.param_groups[{number}]"
        _named(where, group)
        _plain(where, group)
        numbers = group.get("params")
        if not isinstance(numbers, list) or any(type(each) is not int for each in numbers):
            raise refuse(f"{where}.params", numbers, "a list of numbers")
    if not isinstance(state, dict):
        raise refuse(f"{entry}.state", state, "a dictionary")
    for number, entries in state.items():
        where = f"{entry}.state.{shown(number)}"
        if type(number) is not int:
            raise refuse(f"{entry}.state", state, "numbers of parameters as its keys")
        _named(where, entries)
        for name, tensor in entries.items():
            if isinstance(tensor, Tensor):
                dense_tensor(f"{where}.{shown(name)}", tensor)
            else:
                _plain(f"{where}.{shown(name)}", tensor)


def _totals(entry: str, value: Any) -> None:
    _named(entry, value)
    for name, tensor in value.items():
        dense_tensor(f"{entry}.{shown(name)}", tensor)


def _extended(entry: str, value: Any) -> None:
    if not isinstance(value, list):
        raise refuse(entry, value, "a list of numbers of epochs")
    for number, epochs in enumerate(value):
        _count(f"{entry}[{number}]", epochs)


def _operations(entry: str, value: Any) -> None:
    """Raise InputError unless the value is what `flops.OperationCounter.state_dict` returns."""
    _named(entry, value)
    for name in ("total", "epoch"):
        _operation_count(f"{entry}.{name}", value.get(name))
    _named(f"{entry}.known", value.get("known"))
    for name, number in value["known"].items():
        _operation_count(f"{entry}.known.{shown(name)}", number)


def _operation_count(entry: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < 1 << 100:
        raise refuse(entry, value, "a number of operations")


def _generator(entry: str, value: Any) -> None:
    """Raise InputError unless the value is a state that the generator of the CPU takes."""
    dense_tensor(entry, value)
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError, ValueError):
        raise InputError(f"the entry {entry} is not the state of a random generator: use another file") from None


def _cuda_generator(entry: str, value: Any) -> None:
    if value is None:
        return
    dense_tensor(entry, value)
    if value.dtype is not torch.uint8 or value.ndim != 1 or len(value) != 16:
        raise InputError(f"the entry {entry} is not the state of a random generator: use another file")


def _scaler(entry: str, value: Any) -> None:
    _named(entry, value)
    _plain(entry, value)


def _text(entry: str, value: Any) -> None:
    _plain(entry, value)
    if type(value) is not str:
        raise refuse(entry, value, "a text")


ENTRIES: dict[str, Callable[[str, Any], object]] = {
    "config": _config,
    "history": _history,
    "revision": _text,
    "optimizer": _optimizer,
    "scaler": _scaler,
    "epoch": _count,
    "done": _count,
    "skipped": _count,
    "totals": _totals,
    "extended": _extended,
    "operations": _operations,
    "total": dense_tensor,  # probes until November 2026
    "seconds": _seconds,
    "generator": _generator,
    "cuda_generator": _cuda_generator,
}

# --------------------------------------------------------------------------------------------------------------------
# the whole


def check(content: dict[Any, Any], *, needed: Iterable[str] = ()) -> None:
    """Check the entries of a checkpoint of train.py, and make `model` a plain dictionary.

    Other entries, of later versions, are not examined.

    Args:
        needed: entries that must exist.

    Raises:
        InputError: naming the first entry that is missing or wrong.
    """
    _named("of the whole file", content)
    if missing := [name for name in needed if name not in content]:
        raise InputError(f"has no {', '.join(missing)}, which every such file of train.py has: use another file")
    for name, rule in ENTRIES.items():
        if name in content:
            rule(name, content[name])
    if "model" in content:
        content["model"] = state_dict("model", content["model"])
