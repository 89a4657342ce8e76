"""Read backbones from checkpoints, and write and read the checkpoints of detectors. No code in a file is executed."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import resnet50

from . import files
from .errors import InputError, printable, shown

FORMAT, VERSION = "self-classifier detector", 1
# Where the backbone lies in files of this project (backbone.), of the authors (module.backbone.), of SwAV (module.), of MoCo
# (module.encoder_q.) and of torchvision. The first prefix with a first convolution is used.
PREFIXES = ("backbone.", "encoder_q.", "encoder.", "teacher.backbone.", "")
CONTAINERS = ("state_dict", "model", "teacher")


class _StandIn:
    """Takes the place of a class that a file names besides tensors. It keeps nothing."""

    def __init__(self, *_arguments: object):
        pass

    def __setstate__(self, _state: object) -> None:
        pass


# What files of the authors contain besides tensors: their queue, and best scores as numbers of numpy.
STAND_INS: list[Any] = [
    (_StandIn, name)
    for name in ("utils.NNQueue", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
]


def read(path: Path) -> Any:
    """Return the content of a file of torch, which may hold only tensors and plain containers.

    Raises:
        InputError: if the file is missing, damaged, or asks for anything else.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path}: {'a folder, expected a file' if path.is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        line = printable(str(error).partition("\n")[0])[:150]
        raise InputError(
            f"checkpoint {path}: not a file of tensors, or loading it would execute code ({line}): use another file"
        ) from None
    except Exception as error:  # torch can raise any exception for arbitrary bytes
        line = printable(str(error).partition("\n")[0])[:150]
        raise InputError(f"checkpoint {path}: truncated or damaged ({line}): use another copy") from None


def in_folder(name: str, file: str) -> Path:
    """Return a path, or the named file in it if it is a folder."""
    path = Path(name)
    return path / file if path.is_dir() else path


def read_backbone(name: str) -> dict[str, Tensor]:
    """Return the ResNet-50 in a checkpoint under torchvision's names, without `fc`.

    Args:
        name: a checkpoint of this project or the folder of its run, a released file, or an export.

    Raises:
        InputError: if the file cannot be read, or does not contain a ResNet-50; see also `read`.
    """
    path = in_folder(name, "checkpoint.pt")
    content = read(path)
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {}
    if isinstance(content, dict):
        tensors = {
            str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)
        }
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}conv1.weight" in tensors), None)
    if prefix is None:
        found = shown([str(key) for key in tensors]) or "no tensors"
        raise InputError(f"checkpoint {path}: no ResNet-50 found, it holds {found}: name a file with a ResNet-50")
    with torch.device("meta"):
        expected = {key: value for key, value in resnet50().state_dict().items() if not key.startswith("fc.")}
    found_tensors = {key: tensors[prefix + key] for key in expected if prefix + key in tensors}
    wrong = [
        f"{key} {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in found_tensors.items()
        if value.shape != expected[key].shape
    ]
    missing = [key for key in expected if key not in found_tensors]
    blocks = [key for key in tensors if key.startswith(f"{prefix}layer") and key.removeprefix(prefix) not in expected]
    parts = [
        f"{len(names)} tensors {what}: {shown(names)}"
        for names, what in ((missing, "missing"), (wrong, "of another shape"), (blocks, "unexpected"))
        if names
    ]
    if parts:
        raise InputError(f"checkpoint {path}: its network is not a ResNet-50 ({'; '.join(parts)}): name another file")
    return found_tensors


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint of a detector, as a whole or not at all.

    Raises:
        RunError: if it cannot be written. The old file is kept.
    """
    files.write_tensors(path, {"format": FORMAT, "version": VERSION, **state})


def load(path: Path, *, needed: tuple[str, ...] = ("model", "config", "classes", "model_options")) -> dict[str, Any]:
    """Read the checkpoint of a detector.

    Raises:
        InputError: if it is not one, or has another version; see also `read`.
    """
    state = read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(
            f"checkpoint {path}: not written by detection/train.py: name model_final.pt or checkpoint.pt of a run"
        )
    if state.get("version") != VERSION:
        raise InputError(
            f"checkpoint {path}: format version {printable(state.get('version'))}, expected {VERSION}: use other code"
        )
    missing = [name for name in needed if name not in state]
    if missing:
        raise InputError(f"checkpoint {path}: it has no {', '.join(missing)}: use another copy")
    return state
