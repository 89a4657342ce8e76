"""Errors that end a program with one line, and the function that runs every entry script."""

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path


class InputError(ValueError):
    """What the user gave is wrong. One line: what was found, what was expected, what to do. Exit status 2."""


class RunError(RuntimeError):
    """A failure after work started; shown as one line, exit status 1. All ranks fail alike and rank 0 says it, unless this
    one has to speak for them."""

    def __init__(self, message: str, speaks: bool = False):
        super().__init__(message)
        self.speaks = speaks


def run_script(main: Callable[[], None]) -> None:
    """Run an entry script: what was expected to go wrong becomes one line and exit status 2 (input) or 1 (later)."""
    try:
        try:
            main()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RunError(f"no space left on the disk, writing {error.filename or 'a file'}") from None
        except RuntimeError as error:
            distributed = sys.modules.get("src.distributed")  # loaded by now if ranks have met
            explained = distributed.explain(error) if distributed else error
            if explained is error:
                raise
            raise explained from None
    except (InputError, RunError) as error:
        where = _place_of_speaker(error)
        if where is not None:
            message = re.sub(r"\s+", " ", str(error))
            print(f"{Path(sys.argv[0]).name}: error{where}: {message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None


def _place_of_speaker(error: InputError | RunError) -> str | None:
    """Where this process is among the ranks, if it is the one to say what is wrong; None if another one is.

    Most often all fail alike and rank 0 says it. Another speaks if it fails alone: of a file, say, that its host lacks.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    ranks = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    if ranks == "1" or not rank.isdecimal() or getattr(error, "speaks", False):
        return ""
    distributed = sys.modules.get("src.distributed")
    met = distributed is not None and distributed.world_size() > 1
    if rank == "0":
        if met:
            distributed.speaks_first()
        return ""
    return f" on rank {rank}" if met and isinstance(error, InputError) and distributed.speaks_first() else None
