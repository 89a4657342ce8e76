"""Turn dataclasses into command-line flags: one flag per field, with the comment after the field as its help.

Nothing here imports torch, so `--help` and wrong flags are answered at once.
"""

import argparse
import ast
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import InputError

T = TypeVar("T")

# --------------------------------------------------------------------------------------------------------------------
# checks


class Options:
    """Base class of all groups of options: after construction, every group's own `check` runs."""

    def __post_init__(self) -> None:
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                group.check(self)


def flag(name: str) -> str:
    """Return the flag of a field: col_tau -> --col-tau."""
    return "--" + name.replace("_", "-")


def require_positive(config: object, *names: str) -> None:
    """Raise InputError unless each of these fields is above 0 and finite."""
    for name in names:
        found = getattr(config, name)
        if not 0 < found < math.inf:
            kind = "a finite number above 0" if found == math.inf else "a number above 0"
            raise InputError(f"{flag(name)} is {found}: expected {kind}")


def require_at_least(config: object, **bounds: float) -> None:
    """Raise InputError unless each of these fields is finite and at least its bound."""
    for name, bound in bounds.items():
        if not bound <= getattr(config, name) < math.inf:
            raise InputError(f"{flag(name)} is {getattr(config, name)}: expected at least {bound}")


def require_sizes(config: object, name: str) -> None:
    """Raise InputError unless the field holds numbers of classes or clusters, one for each classifier."""
    sizes = getattr(config, name)
    if not sizes or min(sizes) < 2:
        raise InputError(f"{flag(name)} is {' '.join(map(str, sizes))}: expected sizes of at least 2")


def require_views(config: object, name: str) -> None:
    """Raise InputError unless the field holds positions of views, each once."""
    views = getattr(config, name)
    if not views or min(views) < 0 or len(set(views)) < len(views):
        raise InputError(
            f"{flag(name)} is {' '.join(map(str, views))}: expected positions of views from 0 on, each once"
        )


def require_momentum(config: object) -> None:
    """Raise InputError unless 0 <= momentum < 1."""
    momentum = getattr(config, "momentum")  # noqa: B009  a group that has the field calls this
    if not 0 <= momentum < 1:
        raise InputError(f"--momentum is {momentum}: expected 0 <= momentum < 1")


def refuse_unused(given: set[str], unused: dict[str, str]) -> None:
    """Raise InputError for a flag that was given but has no effect.

    Args:
        given: the flags on the command line.
        unused: {flag without effect: the reason, which names the other flag}.
    """
    for name, reason in unused.items():
        if name in given:
            raise InputError(f"{name} has no effect: {reason}; drop one of them")


# --------------------------------------------------------------------------------------------------------------------
# reading dataclasses


def expand_presets(presets: dict[str, dict]) -> dict[str, dict]:
    """Resolve `base`: {"a": {...}, "b": {"base": "a", "lr": 0.1}} gives b everything of a, and another lr."""
    expanded: dict[str, dict] = {}
    for name, preset in presets.items():
        changes = dict(preset)
        base = changes.pop("base", None)
        expanded[name] = {**(expanded[base] if base else {}), **changes}
    return expanded


@cache
def parsed(source: str) -> list[ast.stmt]:
    """Return the statements of a module."""
    return ast.parse(source).body


def field_comments(source: str, class_name: str) -> dict[str, str]:
    """Return the comment after each field of a class: {"col_tau": "temperature of ..."}."""
    lines = source.splitlines()
    found = {}
    for node in parsed(source):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    # after the value itself: the formatter may put the value and the comment in brackets
                    end = field.value or field
                    _, _, comment = lines[(end.end_lineno or 0) - 1][end.end_col_offset :].partition("#")
                    found[field.target.id] = comment.strip()
    return found


def comments_of(config: type) -> dict[str, str]:
    """Return `field_comments` of a dataclass in an imported module."""
    return field_comments(Path(str(sys.modules[config.__module__].__file__)).read_text(), config.__name__)


def as_plain(options: Any) -> dict[str, Any]:
    """Return a dataclass as JSON-able values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}


# --------------------------------------------------------------------------------------------------------------------
# command lines


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage of forty flags would bury the message."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def add_flags(
    parser: argparse.ArgumentParser, config: type, comments: dict[str, str], *, title: str = "", **defaults: Any
) -> None:
    """Add one flag for each field that `config` itself declares.

    Args:
        comments: see `field_comments`.
        title: of the group of flags; the docstring of `config` if empty.
        defaults: values that replace those of the fields.
    """
    group = parser.add_argument_group(title or config.__doc__)
    hints = typing.get_type_hints(config)
    for field in fields(config):
        if field.name not in config.__annotations__:
            continue
        default = defaults.get(field.name, field.default)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = comments[field.name].replace("%", "%%")
        settings = {"dest": field.name, "default": default, "help": f"{text} (default: {shown})"}
        group.add_argument(flag(field.name), **settings, **_how_to_parse(hints[field.name]))


def _how_to_parse(hint: Any) -> dict[str, Any]:
    """Return argparse's settings for a field's type: bool, int, float, str, a choice, a pair or a list of numbers."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is types.UnionType:  # int | None
        return {"type": typing.get_args(hint)[0]}
    if typing.get_origin(hint) is tuple:
        element, second = typing.get_args(hint)
        return {"type": element, "nargs": "+" if second is Ellipsis else 2}
    return {"type": hint}


def collect(config: Callable[..., T], values: argparse.Namespace) -> T:
    """Build the dataclass from parsed values; its checks run here."""
    as_tuple = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items()}
    return config(**{field.name: as_tuple[field.name] for field in fields(typing.cast(Any, config))})


def flags_in(argv: Sequence[str]) -> set[str]:
    """Return the flags on a command line, those of --no-x as --x."""
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    return given | {"--" + name.removeprefix("--no-") for name in given if name.startswith("--no-")}


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run."""
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration as JSON and exit, checking flags only"
    )


def end_dry_run(values: argparse.Namespace, settings: dict[str, Any]) -> None:
    """With --dry-run, print the settings, one per line, and exit."""
    if values.dry_run:
        print("{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(settings[name])}" for name in settings) + "\n}")
        raise SystemExit(0)
