import os
import pickle

import pytest
import torch
from torch import nn

from src import checkpoint
from src.config import InputError


def test_what_is_saved_is_loaded(tmp_path):
    state = {"model": {"w": torch.arange(3.0)}, "epoch": 3, "history": [{"loss": 0.5}], "none": None}
    checkpoint.save(tmp_path / "c.pt", state)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert torch.equal(loaded.pop("model")["w"], state.pop("model")["w"])
    assert {**loaded} == {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **state}
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c.pt", {"epoch": 1})
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tmp_path / "c.pt", {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "c.pt")["epoch"] == 1


def test_missing_truncated_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        checkpoint.load(tmp_path / "nothing.pt")
    checkpoint.save(tmp_path / "c.pt", {"model": {"w": torch.randn(1000)}})
    whole = (tmp_path / "c.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "c.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"c\.pt"):
            checkpoint.load(tmp_path / "c.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "plain.pt")
    with pytest.raises(InputError, match="not written by train"):
        checkpoint.load(tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"plain\.pt: a state dict with unknown names \(w\)"):
        checkpoint.load_weights(tmp_path / "plain.pt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_a_file_that_would_execute_code_is_refused_and_does_not(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_the_offending_global_is_named(tmp_path):
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"execute code \(posix\.system\)"):
        checkpoint.load(tmp_path / "evil.pt")


def test_weights_that_do_not_fit_are_named():
    module = nn.Linear(2, 3)
    with pytest.raises(InputError, match=r"missing: bias.*not understood: extra.*weight \(3, 4\) instead of \(3, 2\)"):
        checkpoint.load_into(module, {"weight": torch.zeros(3, 4), "extra": torch.zeros(1)}, "it")
