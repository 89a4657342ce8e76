"""From a network to a file that other libraries load."""

import os
from pathlib import Path

import torch

from .errors import InputError, RunError
from .loading import load_backbone
from .models.backbones import OWN_NAMES, WIDE_RESNETS


def export(name: str | Path, file: str | Path, arch: str = "") -> str:
    """Write a backbone as a plain state dict in torchvision's names, and say in one line what it fits.

    Args:
        name: a path or a released model, as for `load_backbone`; `arch` likewise.
        file: what to write; it must not exist.

    Raises:
        InputError: if there is no backbone in `name`, if torchvision has none of its kind, or `file` cannot be written.
        RunError: if writing does not come to its end.
    """
    path = Path(file)
    if path.exists():
        raise InputError(f"{file} exists already: name another file")
    backbone, state = load_backbone(name, arch)
    arch = state["config"]["arch"]
    if arch in OWN_NAMES:
        raise InputError(f"checkpoint {name}: its backbone is {arch}, which torchvision does not have under such names")
    tensors = dict(backbone.state_dict())
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.touch()
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror})") from None
    try:
        with open(aside, "wb") as opened:
            torch.save(tensors, opened)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        aside.unlink(missing_ok=True)
        raise RunError(
            f"{file} cannot be written ({getattr(error, 'strerror', None) or 'is the disk full?'})"
        ) from None
    said = f"{file}: {len(tensors)} tensors of {arch}, {backbone.width} features"
    if arch in WIDE_RESNETS:
        return f"{said}; names as in torchvision's resnet50, which is not so wide"
    return f"{said}; torchvision.models.{arch}() takes it with load_state_dict(..., strict=False) and lacks fc alone"
