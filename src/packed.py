"""Weights in the safetensors format, whose files hold nothing but tensors and texts.

A file of this project has the entries of the checkpoint beside the weights, as JSON, in its metadata.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from . import files
from .errors import InputError

SUFFIX = ".safetensors"
ENTRY = "self_classifier"  # of the metadata
LONGEST = 1 << 22  # bytes of this entry
WHOLE = ("format", "version", "config", "epoch", "revision")  # entries of a checkpoint that are kept


def read(path: Path) -> dict[str, Any]:
    """Return the content of a file as `torch.load` would: a checkpoint if train.py wrote the weights, else the tensors.

    Raises:
        InputError: if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open  # takes a while

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
            text = (file.metadata() or {}).get(ENTRY)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"checkpoint {path}: no intact safetensors file ({reason}): use another copy") from None
    if text is None:
        return tensors
    try:
        content = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path}: its metadata are damaged: use another copy")
    return {**content, "model": tensors}


def write(path: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the weights of a checkpoint with what an evaluation needs: configuration, last epoch and origin.

    Raises:
        OSError: if the file cannot be written; its `filename` is the path.
    """
    from safetensors.torch import save  # takes a while

    kept = {name: state[name] for name in WHOLE if name in state}
    kept["history"] = state.get("history", [])[-1:]
    metadata = {"format": "pt", ENTRY: json.dumps(kept)}
    with files.replacing(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
