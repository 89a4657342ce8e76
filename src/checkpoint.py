"""The one checkpoint format: tensors and plain containers, read with the safe loader, written aside and renamed."""

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
from typing import BinaryIO

import torch
from torch import Tensor, nn

from .errors import InputError, RunError
from .foreign import AuthorsQueue, Weights, translate

FORMAT = "self-classifier checkpoint"
VERSION = 1


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that the file is at any time either the old one or the new one, whole.

    Raises:
        RunError: if it cannot be written, for want of space for instance; the old one is kept.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        aside.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free // 2**20
        reason = error.strerror if isinstance(error, OSError) else f"the disk has {free} MiB left"
        raise RunError(f"{path} cannot be written ({reason}); the last checkpoint is kept") from None


def load(path: str | Path) -> dict:
    """Read a checkpoint of this project, onto the CPU.

    Raises:
        InputError: if it is missing, damaged, would execute code, or is something else.
    """
    return _checked(_read(path), path)


def _checked(state: object, path: str | Path) -> dict:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = ", ".join(map(str, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"checkpoint {path}: not written by train.py (it holds {found}, ...)")
    if state.get("version") != VERSION:
        raise InputError(f"checkpoint {path}: format version {state.get('version')}, this code reads {VERSION}")
    return state


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, in our names: of our own checkpoints, or of any file that `src/foreign.py` knows.

    The authors' Self-Classifier files load into `SelfClassifier` as they are, queue included. Of other projects' files
    `backbone.*` fits the backbone of that architecture; their heads are there under our names for such parts.

    Raises:
        InputError: as `load`, and if the file holds no state dict, or one of unknown names.
    """
    return read_weights(path).tensors


def read_weights(path: str | Path) -> Weights:
    """As `load_weights`, with where the weights come from and what was left out."""
    content = _read(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        record = _checked(content, path)
        if missing := [part for part in ("config", "model") if part not in record]:
            raise InputError(
                f"checkpoint {path}: has no {', '.join(missing)}, as every file of train.py has: take another"
            )
        config = record["config"]
        return Weights(record.pop("model"), "train.py", [], config["method"], config["arch"], record)
    try:
        return translate(content)
    except InputError as error:
        raise InputError(f"weights {path}: {error}") from None


# --------------------------------------------------------------------------------------------------------------------
# reading without executing anything


def _numpy_scalar(kind: "_NumpyType", data: bytes) -> int | float | bool:
    """What numpy pickles for a number, as a plain number; some projects keep a best score in this form."""
    return struct.unpack(kind.order + kind.letter, data)[0]


class _NumpyType:
    """Stands in for `numpy.dtype` of a number."""

    def __init__(self, code: str, *_flags):
        letters = {"f4": "f", "f8": "d", "i4": "i", "i8": "q", "u1": "B", "b1": "?"}  # numpy's to struct's
        self.letter, self.order = letters[code], "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">", "|": "<"}[state[1]]


# What files of other projects may name beside tensors and plain containers. None of it does more than keep its arguments.
STAND_INS = (
    (AuthorsQueue, "utils.NNQueue"),
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
)


def _read(path: str | Path) -> object:
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: {'a folder, expected a file' if Path(path).is_dir() else 'no such file'}")
    try:
        with _open(path) as file, warnings.catch_warnings(), torch.serialization.safe_globals(list(STAND_INS)):
            warnings.simplefilter("ignore")  # about pickles of another protocol, which are refused below anyway
            return torch.load(file, map_location="cpu", weights_only=True)
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        culprit = found[1] if found else next(_globals_in(path), None)
        if culprit:
            raise InputError(f"checkpoint {path}: refused, loading it would execute code ({culprit})") from None
        raise InputError(f"checkpoint {path}: not a checkpoint, or damaged") from None
    except Exception as error:  # arbitrary bytes can make the reader stumble in any way
        detail = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(f"checkpoint {path}: cannot be read, truncated or damaged ({detail})") from None


def _open(path: str | Path) -> BinaryIO:
    """The file; or, if it is a zip archive around one checkpoint (as OBoW's is), that one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if damaged := archive.testzip():  # torch does not compare the checksums
                raise InputError(f"damaged: {damaged} has other bytes than were written; take another copy")
            if not any(name.endswith("data.pkl") for name in names):  # else torch.save's own archive
                inside = [name for name in names if name.endswith((".pth", ".pt", ".tar"))]
                if len(inside) != 1:
                    raise InputError(f"an archive of {len(inside)} checkpoints: unpack it and name one")
                return io.BytesIO(archive.read(inside[0]))
    return open(path, "rb")


def _globals_in(path: str | Path) -> Iterator[str]:
    """The classes and functions that the pickles of a file name and no checkpoint needs, in order. Nothing is run.

    It serves the message about a file that was refused already: torch names what it refuses only in old pickles.
    """
    harmless = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", *(name for _, name in STAND_INS)}
    with _open(path) as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                file = io.BytesIO(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
        file.seek(0)
        strings, memo, memoized = [], {}, 0
        try:
            while True:  # old files are several pickles in a row, then bytes that are none
                for operation, argument, _ in pickletools.genops(file):
                    name = None
                    if operation.name in ("GLOBAL", "INST"):
                        name = argument.replace(" ", ".")
                    elif operation.name == "STACK_GLOBAL":
                        name = ".".join(strings[-2:])
                    elif "UNICODE" in operation.name:
                        strings.append(argument)
                    elif operation.name == "MEMOIZE":
                        memo[memoized], memoized = strings[-1:], memoized + 1
                    elif "GET" in operation.name:
                        strings += memo.get(argument, [])
                    if name and name not in harmless and not re.fullmatch(r"torch\.\w+Storage", name):
                        yield name
        except ValueError:
            return


def load_into(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        InputError: naming the first keys that are missing or not understood, and every one of another shape, with both.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = [("missing", missing, 3), ("not understood", unknown, 3), ("of another shape", shapes, len(shapes))]
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:shown])}{' ...' * (len(keys) > shown)}"
        for what, keys, shown in problems
        if keys
    ]
    if found:
        raise InputError(f"{source} does not fit this method and architecture; keys {'; '.join(found)}")
    module.load_state_dict(weights)


def code_revision() -> str:
    """The git commit of this checkout, with a + if files were changed; "unknown" outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+" * bool(changed)
