"""Turn dataclasses into command-line flags: one flag per field, with the comment after the field as its help.

Nothing here imports torch, so `--help` and errors in flags appear at once.
"""

import argparse
import ast
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import InputError, printable

T = TypeVar("T")
LARGEST_COUNT = 2**31 - 1  # of a flag that counts something
LARGEST_SEED = 2**63 - 1  # of torch's and numpy's generators
LARGEST_FLOAT = 3.4028234e38  # of float32
SAME_BATCH = 0.01  # relative difference of two batch sizes up to which one learning rate serves both

# --------------------------------------------------------------------------------------------------------------------
# checks


class Options:
    """Base class of all groups of options. After construction, the `check` of every group runs."""

    def __post_init__(self) -> None:
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                vars(group)["check"](self)


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


def require_at_most(config: object, **bounds: int) -> None:
    """Raise InputError unless each of these fields is at most its bound."""
    for name, bound in bounds.items():
        if getattr(config, name) > bound:
            raise InputError(f"{flag(name)} is {getattr(config, name)}: expected at most {bound}")


def require_sizes(config: object, name: str) -> None:
    """Raise InputError unless the field holds sizes of at least 2, one for each classifier."""
    sizes = getattr(config, name)
    if not sizes or min(sizes) < 2:
        raise InputError(f"{flag(name)} is {' '.join(map(str, sizes))}: expected sizes of at least 2")


def require_views(config: object, name: str) -> None:
    """Raise InputError unless the field holds different positions of views, counted from 0."""
    views = getattr(config, name)
    if not views or min(views) < 0 or len(set(views)) < len(views):
        raise InputError(
            f"{flag(name)} is {' '.join(map(str, views))}: expected different positions of views, counted from 0"
        )


def require_momentum(config: object) -> None:
    """Raise InputError unless 0 <= momentum < 1."""
    momentum = getattr(config, "momentum")  # noqa: B009  only groups that have this field call the function
    if not 0 <= momentum < 1:
        raise InputError(f"--momentum is {momentum}: expected 0 <= momentum < 1")


def refuse_unused(given: set[str], unused: dict[str, str]) -> None:
    """Raise InputError for a flag that was given but has no effect.

    Args:
        given: the flags on the command line.
        unused: {flag that has no effect: the reason, which names the other flag}.
    """
    for name, reason in unused.items():
        if name in given:
            raise InputError(f"{name} has no effect: {reason}; drop one of them")


# --------------------------------------------------------------------------------------------------------------------
# reading dataclasses


def expand_presets(presets: dict[str, dict], *, shared: Mapping[str, dict] | None = None) -> dict[str, dict]:
    """Resolve the key `base`: with {"a": {...}, "b": {"base": "a", "lr": 0.1}}, b gets the values of a and its own lr.

    Args:
        shared: {name of a preset: values that it gets between those of its base and its own}. A preset gets them if it has no
            base, or if its base got some too.
    """
    shared = shared or {}
    expanded: dict[str, dict] = {}
    sharing: set[str | None] = {None}
    for name, preset in presets.items():
        changes = dict(preset)
        base = changes.pop("base", None)
        common = shared.get(name, {}) if base in sharing else {}
        if common or (base and base in sharing):
            sharing.add(name)
        expanded[name] = {**(expanded[base] if base else {}), **common, **changes}
    return expanded


@cache
def parsed(source: str) -> list[ast.stmt]:
    """Return the statements of the source of a module."""
    return ast.parse(source).body


def field_comments(source: str, class_name: str) -> dict[str, str]:
    """Return the comment after each field of a class: {"col_tau": "temperature of ..."}."""
    lines = source.splitlines()
    found = {}
    for node in parsed(source):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    # search after the value, as the formatter may put the value and the comment into brackets
                    end = field.value or field
                    _, _, comment = lines[(end.end_lineno or 0) - 1][end.end_col_offset :].partition("#")
                    found[field.target.id] = comment.strip()
    return found


def comments_of(config: type) -> dict[str, str]:
    """Return `field_comments` of a dataclass in an imported module."""
    return field_comments(Path(str(sys.modules[config.__module__].__file__)).read_text(), config.__name__)


def as_plain(options: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as values that JSON can hold."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}


# --------------------------------------------------------------------------------------------------------------------
# command lines


def similar_to(word: str, known: Iterable[Any]) -> list[str]:
    """Return at most three of the known words that are similar to a word, the most similar one first."""
    return difflib.get_close_matches(word, [str(each) for each in known], n=3, cutoff=0.7)


def closest(word: str, known: Iterable[Any]) -> str:
    """Return the question for the known words that are similar to a word, or the list of all known words."""
    known = [str(each) for each in known]
    similar = similar_to(word, known)
    return f"did you mean {' or '.join(similar)}?" if similar else f"expected one of {', '.join(known)}"


class OneLineParser(argparse.ArgumentParser):
    """A parser that prints errors as one line. The usage of forty flags would hide the message."""

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would ignore that the output is closed

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{printable(f'{self.prog}: error: {message}')} (see --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line and refuse words that are not flags."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.explain_unknown(unknown))
        return values

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not among the choices. The message names the closest choices."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r} is not a choice: {closest(str(value), action.choices)}")

    def explain_unknown(self, words: Sequence[str]) -> str:
        """Return the message about words that are no flags of this parser. It suggests similar flags."""
        known = [name for action in self._actions for name in action.option_strings]
        similar = [
            f"{word}: did you mean {found}?" for word in words for found in similar_to(word.split("=")[0], known)
        ]
        return f"unknown flag or value: {similar[0] if similar else ' '.join(words)}"


def add_flags(
    parser: argparse.ArgumentParser, config: type, comments: dict[str, str], *, title: str = "", **defaults: Any
) -> None:
    """Add one flag for each field that `config` itself declares.

    Args:
        comments: see `field_comments`.
        title: title of the group of flags; "": the docstring of `config`.
        defaults: values that replace the defaults of the fields.
    """
    group = parser.add_argument_group(title or config.__doc__)
    hints = typing.get_type_hints(config)
    for field in fields(config):
        if field.name not in config.__annotations__:
            continue
        default = defaults.get(field.name, field.default)
        text = comments[field.name]
        if "(default: " not in text and "(required)" not in text:
            text = f"{text} (default: {_shown(default)})"
        how_to_parse = _how_to_parse(hints[field.name], field.name)
        group.add_argument(
            flag(field.name), dest=field.name, default=default, help=text.replace("%", "%%"), **how_to_parse
        )


def _shown(default: Any) -> str:
    """Return a default as the help shows it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple | list):
        default = " ".join(map(str, default))
    return "none" if default in ("", None) else str(default)


def _how_to_parse(hint: Any, name: str) -> dict[str, Any]:
    """Return the settings of argparse for the type of a field.

    The type is bool, int, float, str, a choice, a pair or a list of numbers.
    """
    kinds: dict[Any, Callable[[str], Any]] = {float: number, int: seed if name == "seed" else whole_number}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is types.UnionType:  # int | None
        return {"type": kinds[typing.get_args(hint)[0]]}
    if typing.get_origin(hint) is tuple:
        element, second = typing.get_args(hint)
        return {"type": kinds.get(element, element), "nargs": "+" if second is Ellipsis else 2}
    return {"type": kinds.get(hint, hint)}


def number(text: str) -> float:
    """Parse a flag of type float. Networks compute in float32, so the number must be in its range.

    The checks of the fields refuse inf and nan.
    """
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected a number") from None
    if LARGEST_FLOAT < abs(value) < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected a number of at most {LARGEST_FLOAT:.3g}")
    return value


def whole_number(text: str) -> int:
    """Parse a flag of type int, which counts something."""
    return _bounded(text, LARGEST_COUNT)


def seed(text: str) -> int:
    """Parse the flag --seed."""
    return _bounded(text, LARGEST_SEED)


def _bounded(text: str, largest: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected a whole number") from None
    if abs(value) > largest:
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected a whole number of at most {largest}")
    return value


def collect(config: Callable[..., T], values: argparse.Namespace) -> T:
    """Build a dataclass from parsed values. This runs its checks."""
    return build(config, {field.name: vars(values)[field.name] for field in fields(typing.cast(Any, config))})


def build(config: Callable[..., T], values: dict[str, Any]) -> T:
    """Build a dataclass from the values of its fields, with tuples in place of lists."""
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def read_options(config: type[T], values: Mapping[str, Any], *, longest: int) -> T:
    """Build a dataclass from values that a file holds, after their types are checked. This also runs the checks of the class.

    Args:
        longest: largest number of elements of a list, and largest number of parts that the names with "layers" or
            "classifiers" ask for.

    Raises:
        InputError: naming the value that is missing, has a wrong type or is out of bounds.
    """
    names = [field.name for field in fields(typing.cast(Any, config))]
    check_types(config, values, names)
    for name in names:
        value = values[name]
        size = len(value) if isinstance(value, list | tuple) else value if name in NUMBERS_OF_PARTS else 0
        if size > longest:
            raise InputError(f"{name} asks for {size} parts, but the file holds {longest} tensors")
    return build(config, {name: values[name] for name in names})


NUMBERS_OF_PARTS = ("head_layers", "num_classifiers")
LARGEST = 1 << 63  # of whole numbers


def check_types(config: type, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check the types of values that a file holds for fields of a dataclass.

    Raises:
        InputError: naming the value that is missing or has a wrong type.
    """
    hints = typing.get_type_hints(config)
    for name in names:
        if name not in values:
            raise InputError(f"{name} is missing")
        if not _has_type(values[name], hints[name]):
            found = (
                str(values[name])[:100] if isinstance(values[name], int | float | str) else type(values[name]).__name__
            )
            raise InputError(f"{name} is {found}, expected {_name_of_type(hints[name])}")


def _has_type(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint) if isinstance(value, str | int) else False
    if typing.get_origin(hint) is types.UnionType:
        return any(_has_type(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        first, *others = typing.get_args(hint)
        fixed = Ellipsis not in others
        return (
            isinstance(value, list | tuple)
            and (not fixed or len(value) == 1 + len(others))
            and all(_has_type(element, first) for element in value)
        )
    if hint is int:
        return type(value) is int and -LARGEST <= value < 2 * LARGEST
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _name_of_type(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def flags_in(argv: Sequence[str]) -> set[str]:
    """Return the flags on a command line, where --no-x also counts as --x."""
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    return given | {"--" + name.removeprefix("--no-") for name in given if name.startswith("--no-")}


def add_dry_run(parser: argparse.ArgumentParser, *, also: str = "") -> None:
    """Add --dry-run. `also` says in the help what it does after printing the configuration."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"print the resolved configuration as JSON, {also}and exit",
    )


def end_dry_run(
    values: argparse.Namespace, settings: dict[str, Any], *, estimate: Callable[[], str] | None = None
) -> None:
    """Print the settings, one per line, and exit if --dry-run is given.

    Args:
        estimate: returns a line about the cost, which goes to standard error, so that the output stays JSON.
    """
    if values.dry_run:
        print("{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(settings[name])}" for name in settings) + "\n}")
        if estimate is not None:
            sys.stdout.flush()
            print(f"estimate: {printable(estimate())}", file=sys.stderr)
        raise SystemExit(0)
