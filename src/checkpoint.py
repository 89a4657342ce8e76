"""Write and read checkpoints, and read the weights of other projects' files. No file can execute code.

A checkpoint contains only tensors and plain containers. It is written to a temporary file, which is then renamed.
"""

import io
import os
import pickle
import pickletools
import re
import shutil
import struct
import subprocess
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .errors import InputError, RunError
from .foreign import AuthorsQueue, Weights, translate

FORMAT = "self-classifier checkpoint"
VERSION = 1
# Options that earlier code did not have, with the values that stand for what it did.
LATER_OPTIONS = {"subset": ""}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint. At any time, the file is either the whole old checkpoint or the whole new one.

    Raises:
        RunError: if the file cannot be written, for instance because the disk is full. The old checkpoint is kept.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError if the disk is full
        aside.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free // 2**20
        reason = error.strerror if isinstance(error, OSError) else f"the disk has {free} MiB left"
        raise RunError(f"{path} cannot be written ({reason}); the last checkpoint is kept") from None


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project to the CPU.

    Raises:
        InputError: if the file is missing, damaged, not a checkpoint of this project, or would execute code.
    """
    return _checked(_read(path), path)


def _checked(state: object, path: str | Path) -> dict[str, Any]:
    """Return the content of a file if it is a checkpoint of this project; else raise InputError."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = ", ".join(map(str, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"checkpoint {path}: not written by train.py, it holds {found}, ...: name a file of train.py")
    if state.get("version") != VERSION:
        raise InputError(
            f"checkpoint {path}: format version {state.get('version')}, expected {VERSION}: use the code that wrote the file"
        )
    config = state.get("config")
    if isinstance(config, dict) and "data" in config:
        state["config"] = {**LATER_OPTIONS, **config}
    return state


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file under our names.

    The file may be a checkpoint of this project or any file that `src/foreign.py` knows. The authors' Self-Classifier
    files fit `SelfClassifier` completely, including the queue. In other projects' files, `backbone.*` fits the backbone of
    the same architecture, and the heads have our names for such parts.

    Raises:
        InputError: see `load`; also if the file holds no state dict, or a state dict with unknown names.
    """
    return read_weights(path).tensors


def read_weights(path: str | Path) -> Weights:
    """Return what `load_weights` returns, with the source of the weights and the names that were left out."""
    content = _read(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        record = _checked(content, path)
        if missing := [part for part in ("config", "model") if part not in record]:
            raise InputError(
                f"checkpoint {path}: has no {', '.join(missing)}, which every file of train.py has: use another file"
            )
        config = record["config"]
        return Weights(
            record.pop("model"),
            source="train.py",
            left_out=[],
            method=config["method"],
            arch=config["arch"],
            record=record,
        )
    try:
        return translate(content)
    except InputError as error:
        raise InputError(f"weights {path}: {error}") from None


# --------------------------------------------------------------------------------------------------------------------
# reading without running code from the file


def _numpy_scalar(kind: "_NumpyType", data: bytes) -> int | float | bool:
    """Convert a pickled numpy number to a plain number. Some projects store their best score as a numpy number."""
    return struct.unpack(kind.order + kind.letter, data)[0]


class _NumpyType:
    """Replace `numpy.dtype` for numbers."""

    def __init__(self, code: str, *_flags: object):
        letters = {"f4": "f", "f8": "d", "i4": "i", "i8": "q", "u1": "B", "b1": "?"}  # numpy's codes to those of struct
        self.letter, self.order = letters[code], "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">", "|": "<"}[state[1]]


# Classes and functions that files of other projects may name besides tensors and plain containers, with their
# replacements. The replacements only keep their arguments.
STAND_INS = (
    (AuthorsQueue, "utils.NNQueue"),
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
)


def _read(path: str | Path) -> object:
    """Read the content of a file with torch's safe loader."""
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: {'a folder, expected a file' if Path(path).is_dir() else 'no such file'}")
    try:
        with _open(path) as file, warnings.catch_warnings(), torch.serialization.safe_globals(list(STAND_INS)):
            warnings.simplefilter("ignore")  # about other pickle protocols, which are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        culprit = found[1] if found else next(_globals_in(path), None)
        if culprit:
            raise InputError(
                f"checkpoint {path}: refused, loading it would execute code ({culprit}): use a file that holds only tensors"
            ) from None
        raise InputError(f"checkpoint {path}: not a checkpoint, or damaged: use another file") from None
    except Exception as error:  # torch can raise any exception for arbitrary bytes
        detail = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(
            f"checkpoint {path}: cannot be read, truncated or damaged ({detail}): use another copy"
        ) from None


def _open(path: str | Path) -> BinaryIO:
    """Open a file. If it is a zip archive that contains one checkpoint, as OBoW's file does, open that checkpoint."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if damaged := archive.testzip():  # torch does not verify the checksums
                raise InputError(f"damaged: the checksum of {damaged} is wrong: use another copy")
            if not any(name.endswith("data.pkl") for name in names):  # torch.save also writes a zip archive
                inside = [name for name in names if name.endswith((".pth", ".pt", ".tar"))]
                if len(inside) != 1:
                    raise InputError(
                        f"an archive of {len(inside)} checkpoints, expected one: unpack it and name a file"
                    )
                return io.BytesIO(archive.read(inside[0]))
    return open(path, "rb")


def _globals_in(path: str | Path) -> Iterator[str]:
    """Yield the classes and functions that a file names although no checkpoint needs them, in order, without running them.

    The message about a refused file contains the first of them. torch names what it refuses only for old pickles.
    """
    harmless = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", *(name for _, name in STAND_INS)}
    with _open(path) as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                file = io.BytesIO(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
        file.seek(0)
        strings: list[str] = []  # the text on the stack of the pickle
        memo: dict[Any, list[str]] = {}
        memoized = 0
        try:
            while True:  # an old file consists of several pickles, followed by other bytes
                for operation, argument, _ in pickletools.genops(file):
                    name = None
                    if operation.name in ("GLOBAL", "INST"):
                        name = str(argument).replace(" ", ".")
                    elif operation.name == "STACK_GLOBAL":
                        name = ".".join(strings[-2:])
                    elif "UNICODE" in operation.name:
                        strings.append(str(argument))
                    elif operation.name == "MEMOIZE":
                        memo[memoized], memoized = strings[-1:], memoized + 1
                    elif "GET" in operation.name:
                        strings += memo.get(argument, [])
                    if name and name not in harmless and not re.fullmatch(r"torch\.\w+Storage", name):
                        yield name
        except ValueError:
            return


def load_into(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that must fit a module exactly.

    Args:
        source: where the weights come from, for the message.

    Raises:
        InputError: naming the first three missing and unexpected keys, and all keys whose shapes differ with both shapes.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = [("missing", missing, 3), ("unexpected", unexpected, 3), ("of another shape", shapes, len(shapes))]
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:shown])}{' ...' if len(keys) > shown else ''}"
        for what, keys, shown in problems
        if keys
    ]
    if found:
        raise InputError(f"{source} does not fit this method and architecture; tensors: {'; '.join(found)}")
    module.load_state_dict(weights)


def code_revision() -> str:
    """Return the git commit of this checkout, with a "+" if tracked files were changed; "unknown" outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+" if changed else commit
