"""Who may know whom: imports go downwards only, and everything named in the documents exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"

GROUND = {"config", "distributed"}
MAY_IMPORT = {
    "config": set(),
    "distributed": {"config"},
    "metrics": {"neighbors"},
    "neighbors": set(),
    "figures": set(),
    "optim": {"config"},
    "results": set(),
    "models": {"config"},
    "losses": {"distributed"},
    "assignments": {"distributed"},
    "queues": {"distributed"},
    "logs": set(),
    "data": GROUND | {"downloads"},
    "features": GROUND | {"data", "logs"},
    "checkpoint": {"config", "foreign"},
    "foreign": {"config"},
    "downloads": {"config"},
    "methods": GROUND | {"assignments", "losses", "queues", "models", "logs"},
    "trainer": GROUND | {"logs", "methods", "models", "optim"},
    "evaluation": GROUND
    | {"checkpoint", "data", "features", "logs", "metrics", "models", "neighbors", "optim", "trainer"},
    "pretrained": {"checkpoint", "config", "downloads", "methods", "models"},
    "run": GROUND | {"checkpoint", "logs", "trainer"},
    "probe": GROUND
    | {"checkpoint", "data", "evaluation", "features", "logs", "models", "pretrained", "run", "trainer"},
    "unsupervised": GROUND | {"data", "evaluation", "features", "figures", "logs", "metrics", "pretrained", "run"},
}


def first_party_imports(path):
    depth = len(path.relative_to(SRC).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        if isinstance(node, ast.Import | ast.ImportFrom) and "src" in ast.unparse(node).split("."):
            yield "src by its name"


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_downwards(path):
    part = path.relative_to(SRC).parts[0].removesuffix(".py")
    allowed = MAY_IMPORT.get(part, set()) | {part}
    assert set(first_party_imports(path)) <= allowed


def test_every_part_is_in_the_table():
    parts = {path.relative_to(SRC).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert parts == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_modules_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_trainer_does_not_know_which_method_it_runs():
    assert "METHODS" not in (SRC / "trainer.py").read_text()


@pytest.mark.parametrize("document", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
def test_paths_named_in_documents_exist(document):
    text = (ROOT / document).read_text()
    named = re.findall(
        r"\]\(([^)#\s:]+)\)|`((?:src|scripts|docs|tests|benchmarks|graphics)/[\w./-]*|\w+\.(?:py|md|yml|txt))`", text
    )
    assert named or document != "README.md"
    for link, path in named:
        target = link or path
        assert (ROOT / document).parent.joinpath(target).exists() or (ROOT / target).exists(), target
