"""Errors that a user sees as one line, and `run_program`, which runs the main function of a program of this folder."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
MEMORY = r"not enough memory|out of memory|allocate memory|Unable to allocate"


class InputError(ValueError):
    """The input of the user is wrong. The program ends with exit status 2.

    The message is one line: what was found, what was expected, what to do.
    """


class RunError(RuntimeError):
    """The work failed after it started. The program ends with exit status 1."""


class Stopped(Exception):
    """A signal stopped the training after a finished step, and everything is saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


def printable(text: object) -> str:
    """Return text in which every character that cannot be printed is replaced by its Python escape, such as \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown(names: list[str], most: int = 3) -> str:
    """Return the first names of a list as text that is safe to print."""
    text = ", ".join(printable(name) for name in names[:most])
    return f"{text}, ..." if len(names) > most else text


def run_program(main: Callable[[], None]) -> None:
    """Run the main function of a program and turn the expected failures into one line on standard error.

    Raises:
        SystemExit: 2 after an `InputError`; 1 after a `RunError`, after an error of the operating system, or without
            memory; 128 + the signal after a signal that stopped the training.
    """
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _end(error, 2)
    except RunError as error:
        _end(error, 1)
    except Stopped as error:
        _end(error, 128 + error.signal)
    except KeyboardInterrupt:
        _end("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        _end(_describe(error), 1)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search(MEMORY, str(error)):
            raise
        _end("there is not enough memory: use a smaller --batch-size or smaller images", 1)


def _end(message: object, status: int) -> None:
    """Print a message and end the program with a status.

    Before the ranks have met, all of them fail alike, and only rank 0 speaks. Later a rank may fail alone, and says its number.
    """
    text = str(message)
    if "Traceback" in text:  # a data-loading worker sends the whole text; its last line has the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    line = printable(re.sub(r"\s+", " ", text))
    distributed = sys.modules.get("detection.distributed")  # looked up, because an import here would import torch
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    together = distributed is not None and distributed.world_size() > 1
    if rank == "0" or together:
        place = f" on rank {rank}" if together and rank != "0" else ""
        print(f"{printable(Path(sys.argv[0]).name)}: error{place}: {line}", file=sys.stderr)
    raise SystemExit(status) from None


def _describe(error: OSError) -> str:
    """Return an error of the operating system in one line, with the path."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL:
        return f"{error.filename or 'a file or standard output'} cannot be written ({reason}): free some space"
    return f"{error.filename}: {reason}" if error.filename else reason
