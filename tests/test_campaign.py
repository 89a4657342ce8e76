"""The first faults of each row of the fault campaign, its oracle, and the page that holds its results."""

import signal
import subprocess

import pytest
import torch

from src.measured import campaign_table
from tests.campaign import long_runs, program, runs
from tests.campaign.injection import Injector, Plan
from tests.campaign.trials import ROWS, Row, executed, judge

# Rows without a short version take seconds for one fault.
TRIED = [pytest.param(name, marks=[] if row.short else [pytest.mark.slow]) for name, row in ROWS.items()]


@pytest.mark.parametrize("name", TRIED)
def test_the_first_faults_of_each_row_are_survived(name, monkeypatch):
    monkeypatch.setattr(long_runs, "SECONDS", 1)
    row = ROWS[name]
    found = program.try_row(row, range(row.short or 2), seed=0, loud=False)
    if "left out" in found:
        pytest.skip(found["left out"])
    assert found["failures"] == []
    assert found["tried"] == (row.short or 2)


# ---- the oracle -----------------------------------------------------------------------------------------------------


def ended(status: int, output: str = "", errors: str = "") -> str:
    return judge(subprocess.CompletedProcess([], status, output, errors))


def test_the_oracle_accepts_what_is_documented():
    assert ended(0, "saved runs/mine/checkpoint.pt\n") == ""
    assert ended(1, "", "train.py: error: the disk is full\n") == ""
    assert ended(143, "stopped by SIGTERM: saved it at step 3; the same command continues from there\n") == ""


@pytest.mark.parametrize(
    ("status", "output", "errors", "problem"),
    [
        (1, "", "Traceback (most recent call last):\nKeyError: 1\n", "Traceback: KeyError: 1"),
        (0, "", "Exception ignored in: <function>\n", "Exception ignored"),
        (-signal.SIGSEGV, "", "", "status -11"),
        (3, "", "train.py: error: what\n", "status 3"),
        (2, "", "one line\nanother line\n", "2 lines on standard error"),
        (1, "", "", "ended silently with status 1"),
        (143, "", "", "ended silently with status 143"),
        (0, "damaged image \x1b[31mred.png\n", "", "control characters"),
    ],
)
def test_the_oracle_refuses(status, output, errors, problem):
    assert ended(status, output, errors).startswith(problem)


def test_a_run_that_lost_something_differs(tmp_path):
    expected = runs.reference()
    assert runs.run(runs.command(tmp_path)).returncode == 0
    assert runs.compare(tmp_path, expected) == ""
    metrics = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(metrics.partition("\n")[2])
    assert runs.compare(tmp_path, expected) == "metrics.jsonl differs in the length of content"
    (tmp_path / "metrics.jsonl").write_text(metrics)
    (tmp_path / ".checkpoint.pt.1.part").touch()
    assert runs.compare(tmp_path, expected) == "left behind: .checkpoint.pt.1.part"
    (tmp_path / "checkpoint_2.pt").write_bytes(b"half")
    assert runs.compare(tmp_path, expected).startswith("checkpoint_2.pt is lost: ")


def test_equal_means_bit_for_bit():
    one, two = {"a": [torch.zeros(2)], "seconds": 1.0}, {"a": [torch.zeros(2)], "seconds": 2.0}
    assert runs.difference(one, two) == ""
    two["a"][0][1] = 1e-45
    assert runs.difference(one, two) == "content.a[0]"
    assert runs.difference({"a": 1}, {"a": True}) == "content.a"
    assert runs.difference({"a": float("nan")}, {"a": float("nan")}) == ""


def test_a_file_of_the_hostile_code_is_noticed(tmp_path):
    assert executed(tmp_path) == ""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "executed").touch()
    assert executed(tmp_path) == "code from a file was executed"


def test_a_failure_names_the_command_that_repeats_it(monkeypatch):
    row = Row("some-row", "what", 2, 1, lambda numbers, seed, place: ((n, "broken" if n else "") for n in numbers))
    found = program.try_row(row, range(2), seed=7, loud=False)
    assert (found["tried"], found["survived"]) == (2, 1)
    command = "python -m tests.campaign --row some-row --seed 7 --only 1"
    assert found["failures"] == [{"problem": "broken", "command": command}]


def test_a_row_ends_after_its_time():
    row = Row("some-row", "what", 5, 1, lambda numbers, seed, place: ((n, "") for n in numbers))
    assert program.try_row(row, range(5), seed=7, loud=False, seconds=-1)["tried"] == 1


# ---- faults at exact calls ------------------------------------------------------------------------------------------


@pytest.fixture
def inject(tmp_path, monkeypatch):
    """Install faults in this process, and undo them after the test."""
    import builtins
    import io
    import os

    names = "replace rename link symlink unlink remove mkdir rmdir truncate fsync fdatasync ftruncate close open write sendfile"
    for name in names.split():
        monkeypatch.setattr(os, name, getattr(os, name))
    monkeypatch.setattr(builtins, "open", builtins.open)
    monkeypatch.setattr(io, "open", io.open)
    return lambda **plan: Injector(Plan(str(tmp_path), **plan)).install()


def test_a_disk_is_full_after_so_many_bytes(tmp_path, inject):
    inject(room=10)
    with open(tmp_path / "a", "wb", buffering=0) as file:
        assert file.write(b"12345678") == 8
        assert file.write(b"12345678") == 2  # as the system does: a part fits
        with pytest.raises(OSError, match="No space left"):
            file.write(b"1")
    assert (tmp_path / "a").read_bytes() == b"1234567812"


def test_the_call_of_the_plan_fails_and_no_other(tmp_path, inject):
    import errno

    inject(call=2, error=errno.EROFS)
    (tmp_path / "a").write_text("a")  # calls 0 and 1: open, write
    with pytest.raises(OSError, match="Read-only"):
        (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_table_adds_up():
    entry = {"what": "kills", "tried": 1200, "survived": 1199, "commit": "abc"}
    text = campaign_table({"a": entry, "b": {**entry, "tried": 1, "survived": 1, "left out": "no root"}})
    assert "| kills | 1,200 | 1,199 | 1 | abc |\n" in text
    assert "| kills (left out: no root) | 1 | 1 | 0 | abc |\n" in text
    assert "| **all** | **1,201** | **1,200** | **1** |  |\n" in text
