"""Checkpoints of every format version are loaded, evaluated and resumed; see tests/keep_checkpoints.py."""

import json
import shutil

import pytest
from evaluating import run_here

from src import checkpoint
from src.checkpoint import VERSION
from src.errors import InputError
from src.methods import METHODS
from tests.keep_checkpoints import FOLDER, logits_of, read

VERSIONS = sorted(FOLDER.glob("version_*"))
EXPECTED = {(folder.name, method): known for folder in VERSIONS for method, known in read(folder).items()}
WITHOUT_CLASSIFIERS = {"simclr"}
each_file = pytest.mark.parametrize(("version", "method"), EXPECTED)


def test_every_version_and_method_has_a_small_file():
    assert [folder.name for folder in VERSIONS] == [f"version_{number}" for number in range(1, VERSION + 1)]
    assert {method for version, method in EXPECTED if version == f"version_{VERSION}"} == set(METHODS)
    for version, method in EXPECTED:
        assert (FOLDER / version / f"{method}.pt").stat().st_size < 2**20


@each_file
def test_the_network_is_the_one_that_was_saved(version, method):
    expected = EXPECTED[version, method]["logits"]
    for found, logits in zip(logits_of(FOLDER / version / f"{method}.pt"), expected, strict=True):
        assert found == pytest.approx(logits, rel=1e-9, abs=1e-9)


@each_file
def test_it_is_evaluated(version, method, tmp_path):
    program = "knn_eval" if method in WITHOUT_CLASSIFIERS else "cls_eval"
    run_here(program, "--checkpoint", FOLDER / version / f"{method}.pt", "--device", "cpu", "--output-dir", tmp_path)
    found = json.loads((tmp_path / f"{program}.json").read_text())
    if program == "cls_eval":
        assert (found["method"], found["images"]) == (method, 360)
        assert 0.1 < found["acc"] < 1


@each_file
def test_it_is_resumed(version, method, tmp_path, capsys):
    known = EXPECTED[version, method]
    shutil.copy(FOLDER / version / f"{method}.pt", tmp_path / "checkpoint.pt")
    run_here("train", *known["flags"], "--output-dir", tmp_path)
    assert "resuming from step 10 (epoch 2 of 3)" in capsys.readouterr().out
    history = checkpoint.load(tmp_path / "checkpoint.pt")["history"]
    assert [summary["epoch"] for summary in history] == [1, 2, 3]
    # as without the stop, apart from how processors round in float32
    assert history[-1]["loss"] == pytest.approx(known["loss"], rel=1e-3)


def test_a_migration_makes_an_older_file_readable(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "old.pt", {"config": {}, "speed": 0.5})
    monkeypatch.setattr(checkpoint, "VERSION", VERSION + 2)
    with pytest.raises(InputError, match=f"format version {VERSION}, expected {VERSION + 2}"):
        checkpoint.load(tmp_path / "old.pt")

    def rename(state):
        return {"lr": state.pop("speed"), **state}

    monkeypatch.setitem(checkpoint.MIGRATIONS, VERSION + 1, lambda state: {**state, "lr": 2 * state["lr"]})
    monkeypatch.setitem(checkpoint.MIGRATIONS, VERSION, rename)
    state = checkpoint.load(tmp_path / "old.pt")
    assert (state["lr"], state["version"], "speed" in state) == (1.0, VERSION + 2, False)
