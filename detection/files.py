"""Write files so that a crash or a full disk leaves either the whole old file or the whole new one."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import RunError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when the block ends without an error.

    Raises:
        OSError: if the file cannot be written. The old file is kept.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as `replacing` does.

    Raises:
        RunError: if the file cannot be written. The old file is kept.
    """
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): free some space, or name another folder"
        ) from None


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain containers with `torch.save` as `replacing` does.

    Raises:
        RunError: if the file cannot be written. The old file is kept.
    """
    import torch

    try:
        with replacing(path) as file:
            output = _Output(file)
            try:
                torch.save(content, cast(BinaryIO, output))
            except RuntimeError as error:  # torch hides the reason
                raise output.failure or OSError(errno.EIO, str(error).splitlines()[0]) from None
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): free some space, or name another folder"
        ) from None


class _Output:
    """A file for `torch.save` that remembers why it could not be written."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise
