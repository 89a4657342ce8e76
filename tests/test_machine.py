"""What the processor offers: the fastest precision, and memory that stays with the process."""

import ctypes
import json

import pytest
import torch

from src.machine import fastest_precision, keep_freed_memory

TINY = (
    *("--data", "digits", "--classes", "10", "--hidden-dim", "16", "--dim", "8"),
    *("--epochs", "2", "--warmup-epochs", "1", "--save-every", "1"),
)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, "float32"),
        ({"neon": True}, "float32"),  # another kind of processor names other capabilities
    ],
)
def test_bfloat16_is_chosen_where_the_processor_computes_in_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fastest_precision(torch.device("cpu")) == expected


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_chosen_where_the_gpu_computes_in_it(monkeypatch, native):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: asked.append(how) or native)
    assert fastest_precision(torch.device("cuda")) == ("bfloat16" if native else "float32")
    assert asked == [{"including_emulation": False}]


def test_freed_memory_is_kept_only_with_glibc(monkeypatch):
    keep_freed_memory()  # the library of this system

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    keep_freed_memory()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # a library without mallopt
    keep_freed_memory()


def test_a_run_stores_the_precision_it_chose_and_keeps_it(run_program, tmp_path):
    words = ("train.py", *TINY, "--precision", "auto", "--output-dir", tmp_path)
    done = run_program(*words)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    expected = fastest_precision(torch.device("cpu"))
    assert config["precision"] == expected
    assert f"precision={expected}" in done.stdout

    # the same run begun on a processor with another precision
    other = {"float32": "bfloat16", "bfloat16": "float32"}[expected]
    done = run_program("train.py", *TINY, "--precision", other, "--output-dir", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    done = run_program("train.py", *TINY, "--precision", "auto", "--output-dir", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "other" / "config.json").read_text())["precision"] == other
    assert f"precision={other}" in done.stdout
