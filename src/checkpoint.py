"""The one checkpoint format: tensors and plain containers, read with the safe loader, written aside and renamed."""

import os
import pickle
import re
import subprocess
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import InputError

FORMAT = "self-classifier checkpoint"
VERSION = 1


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that the file is at any time either the old one or the new one, whole."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load(path: str | Path) -> dict:
    """Read a checkpoint of this project, onto the CPU.

    Raises:
        InputError: if it is missing, damaged, would execute code, or is something else.
    """
    state = _read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = ", ".join(map(str, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"checkpoint {path}: not written by train.py (it holds {found}, ...)")
    if state["version"] != VERSION:
        raise InputError(f"checkpoint {path}: format version {state['version']}, this code reads {VERSION}")
    return state


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The plain state dict of a method in a file: of our own checkpoints, or a state dict saved as it is.

    Raises:
        InputError: as `load`, and if the file holds no state dict.
    """
    state = _read(path)
    if isinstance(state, dict) and state.get("format") == FORMAT:
        return load(path)["model"]
    if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
        return dict(state)
    raise InputError(f"weights {path}: neither a checkpoint of train.py nor a plain state dict")


def _read(path: str | Path) -> object:
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of another protocol, which are refused below anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)|[Uu]nsupported (?:global|class|operand)\S* (\S+)", str(error))
        if culprit:
            name = (culprit[1] or culprit[2]).strip("`'\".,")
            raise InputError(f"checkpoint {path}: refused, loading it would execute code ({name})") from None
        raise InputError(f"checkpoint {path}: not a checkpoint, or damaged") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(f"checkpoint {path}: cannot be read, truncated or damaged ({detail})") from None


def load_into(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        InputError: naming the first keys that are missing, not understood, or of another shape.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = [("missing", missing), ("not understood", unknown), ("of another shape", shapes)]
    found = [f"{len(keys)} {what}: {', '.join(keys[:3])}{' ...' * (len(keys) > 3)}" for what, keys in problems if keys]
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
