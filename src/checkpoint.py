"""Write and read checkpoints, and read the weights of other projects' files. No file can execute code.

A checkpoint contains only tensors and plain containers. It is written to a temporary file, which is then renamed.
"""

import errno
import pickle
import struct
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from . import files, inspection, packed, pickles, schema
from .errors import InputError, RunError
from .foreign import AuthorsQueue, Weights, translate

FORMAT = "self-classifier checkpoint"
VERSION = 1
# {version: function that takes a checkpoint of this version and returns one of the next version}. Whoever raises VERSION adds
# a function here, so that older files stay readable; CONTRIBUTING.md has the steps.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
# Options that earlier code did not have, with the values that stand for what it did. Whoever adds an option to train.py adds it
# here, so that runs of earlier code continue and their files can be evaluated.
LATER_OPTIONS = {"subset": "", "unlabelled": False, "val_share": 0.0, "upright": False}
LATER_OF_TRAINING: dict[str, Any] = {"lr_drops": []}
LATER_OF_PROBES = {"layers": False, "ten_crops": False}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint. At any time, the file is either the whole old checkpoint or the whole new one.

    Raises:
        RunError: if the file cannot be written, for instance because the disk is full. The old checkpoint is kept.
    """
    try:
        write_tensors(path, {"format": FORMAT, "version": VERSION, **state})
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror})") from None


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain containers with `torch.save`, as a whole or not at all.

    Raises:
        OSError: if the file cannot be written; its `filename` is the path.
    """
    with files.replacing(path) as file:
        output = _Output(file)
        try:
            torch.save(content, cast(BinaryIO, output))
        except RuntimeError as error:  # torch hides the reason
            failure = output.failure or OSError(errno.EIO, str(error).splitlines()[0])
            raise OSError(failure.errno, failure.strerror, str(path)) from None


class _Output:
    """A file for `torch.save` that remembers why it could not be written."""

    def __init__(self, file: BinaryIO):
        self.file, self.failure = file, cast(OSError | None, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project to the CPU.

    Raises:
        InputError: if the file is missing, damaged, not a checkpoint of this project, would execute code, or has an entry of
            a wrong type.
    """
    return _checked(_read(path), path)


def load_run(path: str | Path) -> dict[str, Any]:
    """Do what `load` does, and also require the entries from which a run continues."""
    return _checked(_read(path), path, needed=schema.IN_A_RUN)


def _checked(state: object, path: str | Path, *, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the content of a file if it is a checkpoint of this project with the needed entries; else raise InputError."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = ", ".join(map(schema.shown, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"checkpoint {path}: not written by train.py, it holds {found}, ...: name a file of train.py")
    for version, migrate in sorted(MIGRATIONS.items()):
        if _version(state) == version:
            state = {**migrate(state), "version": version + 1}
    if _version(state) != VERSION:
        raise InputError(
            f"checkpoint {path}: format version {schema.shown(state.get('version'))}, expected {VERSION}: use the code that "
            "wrote the file"
        )
    try:
        schema.check(state, needed=needed)
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from None
    config = state.get("config")
    if isinstance(config, dict) and "data" in config:
        later = LATER_OF_PROBES if config.get("method") == "linear" else LATER_OF_TRAINING
        state["config"] = {**LATER_OPTIONS, **later, **config}
    return state


def _version(state: dict[str, Any]) -> int | None:
    """Return the version of the format, or None if a file holds something else in its place."""
    version = state.get("version")
    return version if type(version) is int else None


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
        record = _checked(content, path, needed=("config", "model"))
        config = record["config"]
        if missing := [name for name in ("method", "arch") if name not in config]:
            raise InputError(f"checkpoint {path}: its config has no {', '.join(missing)}: use another file")
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
    """Read the content of a file with torch's safe loader, after `inspection.checked_checkpoint` has checked the file."""
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: {'a folder, expected a file' if Path(path).is_dir() else 'no such file'}")
    if Path(path).suffix == packed.SUFFIX:
        return packed.read(Path(path))
    try:
        with open(path, "rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(list(STAND_INS)):
            warnings.simplefilter("ignore")
            return torch.load(inspection.checked_checkpoint(file), map_location="cpu", weights_only=True)
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from None
    except pickle.UnpicklingError:
        raise InputError(f"checkpoint {path}: {pickles.DAMAGED}") from None
    except Exception as error:  # torch can raise any exception for arbitrary bytes
        raise InputError(
            f"checkpoint {path}: cannot be read, truncated or damaged ({inspection.first_line(error)}): use another copy"
        ) from None


def load_into(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that must fit a module exactly. Raises InputError as `check_fit` does."""
    check_fit(module, weights, source)
    module.load_state_dict(weights)


def check_fit(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Check that weights fit a module exactly. The module may have no data, as on the device "meta".

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
        f"{len(keys)} {what}: {', '.join(map(schema.shown, keys[:shown]))}{' ...' if len(keys) > shown else ''}"
        for what, keys, shown in problems
        if keys
    ]
    if found:
        raise InputError(f"{source} does not fit this method and architecture; tensors: {'; '.join(found)}")


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
