"""End a program with one line at SIGINT and SIGTERM.

A program imports this module first. It imports only what the interpreter has loaded already, as a signal that comes before
the handlers are set ends in a traceback. `signal` would import `enum`, which takes longer than everything else here.
"""

import _signal  # type: ignore[import-not-found]  # what `signal` consists of, without its enumerations
import os
import sys

_ended: list[bool] = []  # not empty after the main function
NAMES = {int(_signal.SIGINT): "SIGINT", int(_signal.SIGTERM): "SIGTERM"}


def end_with_one_line() -> dict:
    """End the program with one line at SIGINT and SIGTERM from now on, and return the handlers that this replaces.

    A signal that the caller ignores stays ignored: a shell ignores SIGINT for its background jobs. Training replaces these
    handlers by those of `stopping.StopRequest`, and data-loading workers ignore both signals.
    """
    process = os.getpid()
    _ended.clear()

    def end(number: int, frame) -> None:  # no type: the import of `types` takes a while
        _signal.signal(number, _signal.SIG_DFL)  # a second signal ends the program at once
        if os.getpid() == process and launched_as()[0] == "0":
            os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted by {NAMES[number]}\n".encode())
        if _ended or _is_importing(frame):
            os._exit(128 + number)  # nothing has begun, or all is done, and C code may swallow an exception
        sys.unraisablehook = lambda _: None  # an object that was half built may fail while it is deleted
        raise SystemExit(128 + number)

    replaced = {}
    for number in NAMES:
        if _signal.getsignal(number) in (_signal.default_int_handler, _signal.SIG_DFL):
            replaced[number] = _signal.signal(number, end)
    return replaced


def main_has_ended() -> None:
    """Let signals not change the status any more, because only the interpreter is left to end.

    A job script takes the status 143 as "stopped and saved". A failed program that gets SIGTERM while its interpreter ends must
    not end with it. The interpreter replaces Python's handlers by the system's while it ends, but not an ignored signal.
    """
    _ended.append(True)
    for number in NAMES:
        _signal.signal(number, _signal.SIG_IGN)


def launched_as() -> tuple[str, str]:
    """Return the number of this rank and the number of ranks, as torchrun or Slurm wrote them into the environment."""
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return number, os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"


def _is_importing(frame) -> bool:
    """Return True if this frame or one of its callers imports a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
