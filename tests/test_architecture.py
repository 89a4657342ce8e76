"""Imports go downwards only, functions stay short, and everything that the documents name exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
FILES = sorted(SRC.rglob("*.py"))
SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "lincls_eval", "knn_eval", "cls_eval", "predict")]


def table() -> dict[str, set[str]]:
    """Return the table of docs/architecture.md: {part: the parts that it may import}, lowest first."""
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]*)\|$", (ROOT / "docs/architecture.md").read_text(), flags=re.M)
    return {part: set(re.findall(r"\w+", allowed)) for part, allowed in rows}


def part_of(module: str) -> str:
    """Return the part that a module belongs to: src.data.loaders -> data."""
    return module.split(".")[1]


def imported_modules(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the modules of ours that a module imports anywhere in its code, as src.a or src.a.b."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "src")
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            target = [*start, *(node.module.split(".") if node.module else [])]
            if target and target[0] == "src":
                for alias in node.names:
                    inner = ".".join([*target, alias.name])
                    yield inner if exists(inner) else ".".join(target)


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def graph() -> dict[str, set[str]]:
    """Return {module: the modules that it imports}."""
    return {
        name_of(path): set(imported_modules(path.read_text(), name_of(path), path.name == "__init__.py")) - {"src"}
        for path in FILES
    }


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, or nothing. A module may import its own package's `__init__`."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := visit(module, []))), [])


@pytest.mark.parametrize(
    ("statement", "module", "expected"),
    [
        ("from src.trainer import Trainer", "src.losses", ["src.trainer"]),
        ("import src.trainer", "src.losses", ["src.trainer"]),
        ("from src import trainer", "src.losses", ["src.trainer"]),
        ("from .trainer import Trainer", "src.losses", ["src.trainer"]),
        ("from . import trainer, errors", "src.losses", ["src.trainer", "src.errors"]),
        ("from ..trainer import Trainer", "src.data.views", ["src.trainer"]),
        ("from .. import distributed", "src.data.views", ["src.distributed"]),
        ("from .loaders import Views", "src.data.views", ["src.data.loaders"]),
        ("def f():\n    from ..run import Run", "src.data.views", ["src.run"]),
        ("import torch\nfrom numpy import array", "src.losses", []),
    ],
)
def test_the_reader_of_imports_sees_every_form(statement, module, expected):
    assert list(imported_modules(statement, module)) == expected


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_table_is_itself_without_circles_and_names_every_part():
    allowed = table()
    assert circle_in(allowed) == []
    assert set(allowed) == {part_of(name_of(path)) for path in FILES if name_of(path) != "src"}
    known: set[str] = set()
    for part, below in allowed.items():  # a part stands below everything that it imports
        assert below <= known, f"{part} stands above {below - known} in the table"
        known.add(part)


@pytest.mark.parametrize("module", sorted(set(graph()) - {"src"}))
def test_imports_go_downwards(module):
    part = part_of(module)
    imported = {part_of(target) for target in graph()[module]}
    assert imported <= table()[part] | {part}


def test_there_is_no_circle():
    assert circle_in(graph()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_inside_the_package_imports_are_relative(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "src" for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level or (node.module or "").split(".")[0] != "src"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_modules_say_what_they_are_and_stay_short(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    assert len(source.splitlines()) <= 500
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 < 80, node.name


def test_train_reads_aloud():
    (main,) = (node for node in ast.parse(SCRIPTS[0].read_text()).body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno + 1 <= 110


# Their order is part of the contract with outside checks, or of autograd's or torch's protocols.
MAY_BE_POSITIONAL = {
    ("src.loading", "__torch_function__"),
    ("src.losses", "self_classifier"),
    ("src.losses", "forward"),
    ("src.losses", "confident_cross_entropy"),
    ("src.metrics", "knn_top"),
    ("src.optim", "__init__"),
    ("src.optim", "warmup_cosine"),
}


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_that_could_be_exchanged_are_named(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and (name_of(path), node.name) not in MAY_BE_POSITIONAL:
            positional = [arg.arg for arg in node.args.args if arg.arg not in ("self", "cls", "ctx")]
            assert len(positional) <= 3, f"{node.name}{tuple(positional)}"
        if isinstance(node, ast.Call):
            splats = [arg for arg in node.args if isinstance(arg, ast.Starred)]
            assert not any(isinstance(arg.value, ast.Tuple) for arg in splats), f"line {node.lineno}"


@pytest.mark.parametrize("name", ["base", "self_classifier", "self_classifier_v1", "swav", "deepcluster_v2", "sela_v2"])
def test_from_the_command_to_the_loss_in_four_files(name):
    """train.py → trainer.py → the method's file → losses.py: no other file of ours calls the objective."""
    callers = [
        path.relative_to(ROOT).as_posix()
        for path in [*FILES, *SCRIPTS]
        if re.search(r"\.objective\(", path.read_text())
    ]
    assert callers == ["src/trainer.py"]
    if name != "base":
        source = (SRC / "methods" / f"{name}.py").read_text()
        inherits = "class SeLaV2(MemoryBankMethod" in source
        assert "from ..losses import" in source or inherits


def test_the_trainer_does_not_know_which_method_it_runs():
    assert "METHODS" not in (SRC / "trainer.py").read_text()


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
)
def test_paths_named_in_documents_exist(document):
    text = (ROOT / document).read_text()
    named = re.findall(
        r"\]\(([^)#\s:]+)\)|`((?:src|scripts|docs|tests|benchmarks|graphics)/[\w./-]*|\w+\.(?:py|md|yml|txt))`", text
    )
    assert named or document != "README.md"
    for link, path in named:
        target = link or path
        places = [(ROOT / document).parent / target, ROOT / target, ROOT / "src" / target]
        assert any(place.exists() for place in places), target
