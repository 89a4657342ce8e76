"""Read the flags that the file of a method declares, without importing the file, because that would import torch.

The dataclass `Config` and the literal `PRESETS` of `src/methods/<name>.py` can be read without the rest of the file.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from . import flags
from .recipe import OWN_IMAGES

METHODS_FOLDER = Path(__file__).parents[1] / "methods"


@dataclass(frozen=True)
class MethodSource:
    """The flags of a method: the dataclass, the comments after its fields, and the presets."""

    config: type
    comments: dict[str, str]
    presets: dict[str, dict[str, Any]]


def method_names() -> list[str]:
    """Return the names of all methods, which are those of the files of `src/methods`."""
    return sorted(path.stem for path in METHODS_FOLDER.glob("*.py") if path.stem not in ("__init__", "base"))


def read_method(name: str) -> MethodSource:
    """Read `Config` and `PRESETS` from the file of a method, without executing anything else in it."""
    path = METHODS_FOLDER / f"{name}.py"
    source = path.read_text()
    statements = flags.parsed(source)
    is_config: list[ast.stmt] = [
        node for node in statements if isinstance(node, ast.ClassDef) and node.name == "Config"
    ]
    namespace = {**vars(flags), "dataclass": dataclass, "Literal": Literal, "InputError": InputError}
    namespace["__name__"] = f"src.methods.{name}"
    exec(compile(ast.Module(body=is_config, type_ignores=[]), str(path), "exec"), namespace)
    presets = next(node.value for node in statements if isinstance(node, ast.Assign) and _assigns(node, "PRESETS"))
    expanded = flags.expand_presets(ast.literal_eval(presets), shared=OWN_IMAGES)
    return MethodSource(namespace["Config"], flags.field_comments(source, "Config"), expanded)


def _assigns(node: ast.Assign, name: str) -> bool:
    target = node.targets[0]
    return isinstance(target, ast.Name) and target.id == name
