"""End a program with one line at SIGINT and SIGTERM. This module is small, so that a program can import it first."""

import os
import signal
import sys

HEARD = (signal.SIGINT, signal.SIGTERM)


def end_with_one_line() -> dict:
    """End the program with one line at SIGINT and SIGTERM from now on, and return the handlers that this replaces.

    A signal that the caller ignores stays ignored: a shell ignores SIGINT for its background jobs. Training replaces these
    handlers by those of `stopping.StopRequest`, and data-loading workers ignore both signals.
    """
    process = os.getpid()

    def end(number: int, frame) -> None:  # no types: their import takes a while
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once
        if os.getpid() == process and launched_as()[0] == "0":
            name = os.path.basename(sys.argv[0])
            os.write(2, f"{name}: interrupted by {signal.Signals(number).name}\n".encode())
        if _is_importing(frame):
            os._exit(128 + number)  # nothing has begun, and the C code of a module may swallow an exception
        raise SystemExit(128 + number)

    replaced = {}
    for number in HEARD:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            replaced[number] = signal.signal(number, end)
    return replaced


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
