"""From a checkpoint file to a method that can predict."""

from dataclasses import fields
from pathlib import Path

from . import checkpoint
from .config import InputError
from .methods import METHODS, Method, build_method


def load_method(path: str | Path) -> tuple[Method, dict]:
    """Rebuild the method that a checkpoint holds, with its weights, in evaluation mode.

    Returns:
        The method, on the CPU, and the rest of the checkpoint (`config`, `history`, ...).

    Raises:
        InputError: if the file is not a checkpoint of train.py, or its weights do not fit what its configuration names.
    """
    state = checkpoint.load(path)
    config = state["config"]
    if config["method"] not in METHODS:
        raise InputError(f"checkpoint {path}: method {config['method']} is unknown, expected {', '.join(METHODS)}")
    kind = METHODS[config["method"]].Config
    knobs = {field.name: config[field.name] for field in fields(kind)}
    knobs = {name: tuple(value) if isinstance(value, list) else value for name, value in knobs.items()}
    method = build_method(
        config["method"],
        kind(**knobs),
        config["arch"],
        config["channels"],
        config["global_crops_size"],
        config["patch_size"],
        config["global_crops_number"],
    )
    checkpoint.load_into(method, state.pop("model"), f"checkpoint {path}")
    return method.eval(), state
