"""Errors that a user sees as one line, and `run_script`, which runs the main function of every program."""

import errno
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from .signals import end_with_one_line, launched_as, main_has_ended

BROKEN_PIPE = 128 + signal.SIGPIPE  # the exit status of a program that SIGPIPE ends
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# Texts of torch and numpy that a machine or a number can cause, and what to do.
EXPECTED = {
    r"not enough memory|out of memory|allocate memory|Unable to allocate": (
        "there is not enough memory ({}): use smaller batches or a smaller network"
    ),
    r"shared memory|unable to (write to|mmap|open) ": (
        "the processes that read the images cannot hand them over ({}): free some space in /dev/shm, or use fewer --workers"
    ),
    r"DataLoader worker .*(exited unexpectedly|is killed by signal)": (
        "a process that reads the images was killed, perhaps for lack of memory ({}): use fewer --workers"
    ),
    r"cannot be converted to type \w+ without overflow": (
        "a number is too large for float32 ({}): use a smaller learning rate or smaller weights of the loss"
    ),
}


class InputError(ValueError):
    """The input of the user is wrong. The program ends with exit status 2.

    The message is one line: what was found, what was expected, what to do.
    """


class RunError(RuntimeError):
    """The work failed after it started. The program ends with exit status 1.

    Usually all ranks raise the same error, and rank 0 prints it.

    Args:
        message: one line.
        speaks: print the message on this rank, whatever its number.
    """

    def __init__(self, message: str, speaks: bool = False):
        super().__init__(message)
        self.speaks = speaks


def printable(text: object, *, reversible: bool = False) -> str:
    """Return text in which every character that cannot be printed is replaced by its Python escape, such as \\n or \\x1b.

    File names and texts in files may hold line breaks, control sequences of terminals, marks that reverse the direction of
    writing, and bytes that are no text.

    Args:
        reversible: also write each backslash as two. Then Python's codec `unicode_escape` restores the text.
    """
    text = str(text)
    if text.isprintable() and not (reversible and "\\" in text):
        return text
    kept = {"\\": "\\\\"} if reversible else {}
    return "".join(kept.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def run_script(main: Callable[[], None]) -> None:
    """Run the main function of a program and turn the expected failures into one line on standard error.

    Raises:
        SystemExit: 2 after an `InputError`, 1 after a `RunError`, after an error of the operating system, such as a full disk,
            or without memory, 128 + the signal after SIGINT or SIGTERM. If the reader of standard output is gone, as in
            `| head`, 141 and no line.
    """
    _replace_closed_streams()
    handlers = end_with_one_line()
    status: int | str | None = 0
    try:
        try:
            main()
        except (OSError, RuntimeError, MemoryError) as error:
            explained = explain(error)
            if explained is error:
                raise
            raise explained from None
    except (InputError, RunError) as error:
        place = _place_of_speaker(error)
        if place is not None:
            print_line(f"error{place}: {error}")
        status = 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:
        status = BROKEN_PIPE
    except KeyboardInterrupt:
        print_line("interrupted")
        status = 128 + signal.SIGINT
    except SystemExit as end:
        status = end.code
    finally:
        main_has_ended()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        failure = _flush_output()
    if isinstance(failure, BrokenPipeError):
        status = status or BROKEN_PIPE
    elif failure is not None and not status:
        print_line(f"error: standard output: {failure.strerror}")
        status = 1
    if status:
        raise SystemExit(status)


def explain(error: Exception) -> Exception:
    """Return the RunError that says in one line what went wrong, or the error itself if it is unexpected.

    Errors of the operating system, a lack of memory and ranks that no longer answer are expected.
    """
    if isinstance(error, InputError | RunError):
        return error
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return error
    if isinstance(error, OSError):
        return RunError(_describe(error), speaks=True)
    text = f"out of memory {error}" if isinstance(error, MemoryError) else str(error)
    for pattern, message in EXPECTED.items():
        if re.search(pattern, text):
            return RunError(message.format(str(error).partition("\n")[0][:200] or type(error).__name__), speaks=True)
    distributed = sys.modules.get("src.distributed")  # looked up, because an import here would import torch
    return distributed.explain(error) if distributed else error


def _describe(error: OSError) -> str:
    """Return an error of the operating system in one line, with the path."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in DISK_IS_FULL:
        return f"{error.filename or 'a file or standard output'} cannot be written ({reason}): free some space"
    where = " -> ".join(
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
    )
    return f"{where}: {reason}" if where else f"{reason} ({type(error).__name__})"


def print_line(message: str) -> None:
    """Print a message on standard error as one line that begins with the name of the program."""
    line = printable(re.sub(r"\s+", " ", message))
    print(f"{printable(Path(sys.argv[0]).name)}: {line}", file=sys.stderr)


def _place_of_speaker(error: InputError | RunError) -> str | None:
    """Return "" or " on rank N" if this process prints the error, and None if another rank does.

    Usually all ranks fail with the same error, and rank 0 prints it. Another rank prints an error that it alone has,
    for example if a file is missing on its host.
    """
    number, ranks = launched_as()
    if ranks == "1" or not number.isdecimal() or getattr(error, "speaks", False):
        return ""
    distributed = sys.modules.get("src.distributed")
    if distributed is None or distributed.world_size() == 1:  # the ranks do not know each other yet
        return "" if number == "0" else None
    if number == "0":
        distributed.speaks_first()
        return ""
    return f" on rank {number}" if isinstance(error, InputError) and distributed.speaks_first() else None


# ---- standard streams -----------------------------------------------------------------------------------------------


def _replace_closed_streams() -> None:
    """Open the null device for each closed standard stream. Otherwise the first file that is opened would take its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  for the whole program


def _reader_is_gone() -> bool:
    """Return True if the pipe behind standard output has no reader any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush_output() -> OSError | None:
    """Flush standard output. If that fails, discard its buffer and return the error."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        return error
    return None


def drop_output() -> None:
    """Send the buffer of standard output, and everything that is printed from now on, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
