"""Export a backbone to a file that other libraries can load, or a whole network without the optimiser."""

import errno
from pathlib import Path

from . import packed
from .checkpoint import load, write_tensors
from .errors import InputError, RunError
from .loading import load_backbone
from .models.backbones import OWN_NAMES, WIDE_RESNETS
from .releases import resolve

BAD_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


def export(name: str | Path, file: str | Path, arch: str = "") -> str:
    """Write a backbone as a plain state dict with torchvision's names.

    Args:
        name: a path or a released model, see `load_backbone`.
        file: file to write. It must not exist.
        arch: architecture, see `load_backbone`.

    Returns:
        One line that says how to load the file.

    Raises:
        InputError: if `name` contains no backbone, torchvision does not have this architecture, or `file` exists or cannot
            be created.
        RunError: if writing fails.
    """
    path = Path(file)
    if path.exists():
        raise InputError(f"{file} exists already: name another file")
    backbone, state = load_backbone(name, arch)
    arch = state["config"]["arch"]
    if arch in OWN_NAMES:
        raise InputError(
            f"checkpoint {name}: its backbone is {arch}, which torchvision does not have with these parameter names: "
            "expected a network of torchvision"
        )
    tensors = dict(backbone.state_dict())
    try:
        write_tensors(path, tensors)
    except OSError as error:
        raise (InputError if error.errno in BAD_PATH else RunError)(
            f"{file} cannot be written ({error.strerror})"
        ) from None
    written = f"{file}: {len(tensors)} tensors of {arch}, {backbone.width} features"
    if arch in WIDE_RESNETS:
        return f"{written}; the names are those of torchvision's resnet50, which is narrower"
    return f"{written}; load them into torchvision.models.{arch}() with load_state_dict(..., strict=False); only fc is missing"


def pack(name: str | Path, file: str | Path) -> str:
    """Write the network of a checkpoint of train.py as a safetensors file, without the state of the optimiser.

    Args:
        name: a run folder or a file of train.py.
        file: file to write, with the suffix .safetensors. It must not exist.

    Returns:
        One line that says what was written.

    Raises:
        InputError: if `name` is no checkpoint of train.py, or `file` has another suffix, exists or cannot be created.
        RunError: if writing fails.
    """
    path = Path(file)
    if path.suffix != packed.SUFFIX:
        raise InputError(f"{file}: expected a name that ends in {packed.SUFFIX}: name another file")
    if path.exists():
        raise InputError(f"{file} exists already: name another file")
    state = load(resolve(name))
    tensors = state["model"]
    try:
        packed.write(path, state, tensors)
    except OSError as error:
        raise (InputError if error.errno in BAD_PATH else RunError)(
            f"{file} cannot be written ({error.strerror})"
        ) from None
    return f"{file}: {len(tensors)} tensors, {path.stat().st_size / 1e6:.2f} MB; evaluations and predict.py take it as --checkpoint"
