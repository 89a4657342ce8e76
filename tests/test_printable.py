"""Names and texts from files reach a terminal, a log or a table only with escapes."""

import csv
import io
import json
import os
import sys

import numpy as np
import pytest
import torch
from evaluating import run_here, save_untrained
from hostile import entries, write_zip
from PIL import Image

from src import checkpoint, results
from src.config import OneLineParser
from src.errors import InputError, printable, run_script
from src.logs import Progress, table

EVIL = "a\x1b[2J\r\nb\u202e\udcff\x9b"  # clears the screen, starts a line, reverses the direction; no text; a terminal's sequence
SHOWN = r"a\x1b[2J\r\nb\u202e\udcff\x9b"


def is_harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_what_cannot_be_printed_is_escaped_as_in_python():
    assert printable(EVIL) == SHOWN
    assert printable("é 中 😀 |\\n") == "é 中 😀 |\\n"
    for text in (EVIL, "\\n", "a\\\nb", "é\\x1b\x1b中"):
        shown = printable(text, reversible=True)
        assert shown.isprintable()
        assert shown.encode("latin-1", "backslashreplace").decode("unicode_escape") == text


def test_errors_are_escaped(capsys, monkeypatch):
    def fail() -> None:
        raise InputError(f"{EVIL}: wrong")

    monkeypatch.setattr(sys, "argv", [f"{EVIL}.py"])
    with pytest.raises(SystemExit):
        run_script(fail)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said[:-1].isprintable()
    with pytest.raises(SystemExit):
        OneLineParser(prog="train.py").parse_args([EVIL])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said[:-1].isprintable()


def test_logs_and_tables_are_escaped(capsys):
    Progress(1, 0, enabled=True).say(f"first {EVIL}\nsecond")
    assert is_harmless(capsys.readouterr().out)
    assert table([EVIL, "x"], [[EVIL, EVIL]]).count("\n") == 2
    assert is_harmless(table([EVIL], [[EVIL]]))


@pytest.mark.parametrize(
    "operations",
    [
        f"c{EVIL.replace(chr(10), '')}\n{EVIL.replace(chr(10), '')}\n".encode("utf-8", "surrogatepass"),
        b"cposix\n\x1b[31msystem\n",
        entries(**{EVIL: b"N", "\x1b[31m": b"N"}),
    ],
)
def test_texts_from_a_pickle_are_escaped(tmp_path, operations):
    path = write_zip(tmp_path / "c.pt", operations)
    for read in (checkpoint.load, checkpoint.load_weights):
        with pytest.raises(InputError) as refused:
            read(path)
        assert str(refused.value).isprintable()
        assert r"\x1b[" in str(refused.value)


def test_names_of_tensors_are_escaped(tmp_path):
    path = save_untrained(tmp_path / "c.pt", "--classes", "4")
    content = torch.load(path, weights_only=True)
    for name, value in ((EVIL, torch.ones(2)), (EVIL, 5), ("x" * 100_000, 5)):
        torch.save({**content, "model": {**content["model"], name: value}}, path)
        with pytest.raises(InputError) as refused:
            checkpoint.load_into(torch.nn.Linear(1, 1), checkpoint.read_weights(path).tensors, "it")
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 1000


def test_results_are_escaped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["plain", EVIL]
    for name in names:
        os.mkdir(name)
        scores = {name: 0.5 for name in results.SCORES}
        content = {**scores, "method": EVIL, "arch": EVIL, "seed": EVIL, "protocol": EVIL, "cluster_sizes": [1]}
        with open(os.path.join(name, "cls_eval.json"), "w") as file:
            json.dump(content, file)
    for style in ("markdown", "latex", "csv"):
        monkeypatch.setattr(sys, "argv", ["results", "table", *names, "--format", style])
        results.main()
        printed = capsys.readouterr().out
        assert is_harmless(printed)
    rows = list(csv.DictReader(io.StringIO(printed)))
    folders = {row["run"].encode("latin-1", "backslashreplace").decode("unicode_escape") for row in rows}
    assert folders == set(names)
    assert len(rows) == 8


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"acc": [' + "[]," * 8_000_000 + "[]]}", '{"acc": 1' + 5000 * "0" + "}", "\x00"]
)
def test_hostile_results_are_one_line(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "cls_eval.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["results", "table", str(tmp_path)])
    with pytest.raises(SystemExit):
        results.main()
    assert "is not a result of cls_eval.py" in capsys.readouterr().err


def test_names_of_files_and_classes_are_escaped_in_an_evaluation(tmp_path, capsys):
    path = save_untrained(tmp_path / "rgb.pt", "--global-crops-size", "16", "--classes", "4", channels=3)
    folder = os.path.join(tmp_path, "pictures", "val", "C\x1b[31m\n=1")
    os.makedirs(folder)
    for name in ("\x1b[2J.png", "back\\slash.png", "n\nl.png", "q\",'.png"):
        Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(os.path.join(folder, name), "PNG")
    with open(os.path.join(folder, "\x1b[31mdamaged\n.png"), "wb") as file:
        file.write(b"\x1b")
    out = tmp_path / "o\x1b[2Jut"
    words = ("--checkpoint", path, "--data", tmp_path / "pictures", "--workers", "0", "--output-dir", out)
    with pytest.raises(SystemExit):  # too many images are damaged
        run_script(lambda: run_here("cls_eval", *words))
    printed = capsys.readouterr()
    assert is_harmless(printed.out + printed.err)
    os.remove(os.path.join(folder, "\x1b[31mdamaged\n.png"))
    run_here("cls_eval", *words)
    printed = capsys.readouterr()
    assert is_harmless(printed.out + printed.err)
    text = (out / "clusters.csv").read_text()
    assert is_harmless(text)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    files = {row["image"].encode("latin-1", "backslashreplace").decode("unicode_escape") for row in rows}
    assert files == {os.path.join(folder, name) for name in os.listdir(folder)}
    assert {row["class"] for row in rows} == {r"C\x1b[31m\n=1"}
