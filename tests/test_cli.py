"""The programs as a user types them."""

import json
import signal
import time

import numpy as np
import pytest
import torch
from conftest import run_as_user
from PIL import Image

from src import checkpoint
from src.config import (
    ClsEvalOptions,
    EvaluationOptions,
    KnnEvalOptions,
    LinclsEvalOptions,
    TrainOptions,
    flags,
    method_names,
    parse_train,
    read_method,
)
from src.errors import InputError

TINY = ("--epochs", "4", "--warmup-epochs", "1")
SAVED = ("--eval-every", "2", "--save-every", "2")


@pytest.mark.parametrize("words", [("--help",), ("--method", "self_classifier", "--help")])
def test_help_needs_no_torch(run_python, words):
    began = time.monotonic()
    done = run_python("-X", "importtime", "train.py", *words)
    assert done.returncode == 0
    assert "--row-tau" in done.stdout
    assert " torch\n" not in done.stderr, f"torch was imported, {time.monotonic() - began:.1f} s"


def test_every_flag_has_help_and_presets_name_real_flags():
    shared = set(TrainOptions.__dataclass_fields__)
    evaluations = (ClsEvalOptions, KnnEvalOptions, LinclsEvalOptions)
    groups = {group for options in (TrainOptions, *evaluations) for group in options.__mro__}
    groups = {group for group in groups if "__annotations__" in vars(group)} - {EvaluationOptions}  # it has no flags
    assert len(groups) > 10
    for group in groups:
        comments = flags.comments_of(group)
        assert all(comments[field] for field in group.__annotations__), group
    for name in method_names():
        method = read_method(name)
        assert all(method.comments[field] for field in method.config.__dataclass_fields__)
        for preset in method.presets.values():
            assert set(preset) <= shared | set(method.config.__dataclass_fields__)
        assert method.presets["published"] == {} or name != "self_classifier"


def test_preset_follows_the_data_and_flags_win():
    options, name, knobs = parse_train([])
    assert (name, options.data, options.arch, options.epochs) == ("self_classifier", "digits", "small_convnet", 90)
    options, _, knobs = parse_train(["--data", "somewhere"])
    assert (options.arch, options.epochs, options.lr, options.batch_size) == ("resnet50", 800, 3.2, 4092)
    assert (knobs.classes, knobs.row_tau, knobs.queue_length) == ((1000, 2000, 4000, 8000), 0.1, 262144)
    options, _, knobs = parse_train(["--epochs", "7", "--classes", "5", "6", "--no-head-bn"])
    assert (options.epochs, knobs.classes, knobs.head_bn) == (7, (5, 6), False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fresh"], "--output-dir"),
        (["--global-crops-number", "1"], "--local-crops-number"),
        (["--warmup-epochs", "100"], "--epochs"),
        (["--download"], "--data is digits"),
        (["--row-tau", "-1"], "--row-tau"),
        (["--col-tau", "inf"], "--col-tau is inf"),
        (["--lr", "nan"], "--lr is nan"),
        (["--warmup-start", "inf"], "--warmup-start is inf"),
        (["--arch", "vit_tiny", "--global-crops-size", "36"], "--patch-size 16 does not divide"),
        (["--local-crops-scale", "0.5", "0.1"], "--local-crops-scale"),
    ],
)
def test_contradictions_are_refused_naming_the_flags(words, message):
    with pytest.raises(InputError, match=message):
        parse_train(words)


@pytest.mark.parametrize("words", [["--epsilon", "0.05"], ["--lr", "fast"], ["--optimizer", "rmsprop"]])
def test_wrong_flags_are_one_line_and_status_2(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        parse_train(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on digits, started as a user starts it."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    done = run_as_user("train.py", *TINY, *SAVED, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_what_it_promises(trained):
    folder, output = trained
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint_2.pt", "checkpoint_4.pt"} <= names
    assert any(name.startswith("events.out") for name in names)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"acc", "nmi", "ami", "ari"} <= set(lines[1])
    assert "acc" not in lines[0]
    assert "(chosen)" in output
    assert checkpoint.load(folder / "checkpoint.pt")["history"] == lines


def test_cls_eval_scores_the_classifier_with_the_lowest_loss(trained, run_python, tmp_path):
    folder, _ = trained
    done = run_python(
        "cls_eval.py", "--checkpoint", folder / "checkpoint.pt", "--output-dir", tmp_path, "--pixel-kmeans"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "cls_eval.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    candidates = {k: last[f"loss_{k}"] for k in range(8)}
    assert result["classifier"] == last["classifier"] == min(candidates, key=candidates.get)
    assert {name: result[name] for name in ("acc", "nmi", "ami", "ari")} == pytest.approx(
        {name: last[name] for name in ("acc", "nmi", "ami", "ari")}, abs=0.01
    )
    assert result["pixel_kmeans"]["acc"] == pytest.approx(0.786, abs=0.02)
    for figure in ("confusion.png", "gallery.png"):
        with Image.open(tmp_path / figure) as image:
            assert min(image.size) > 200


def test_a_finished_run_is_not_repeated_and_other_options_are_refused(trained, run_program):
    folder, _ = trained
    before = (folder / "checkpoint.pt").read_bytes()
    done = run_program("train.py", *TINY, "--output-dir", folder, "--eval-every", "2", "--lr", "0.5", "--seed", "3")
    assert done.returncode == 2
    assert "--lr 0.002 (now 0.5)" in done.stderr
    assert "--seed 0 (now 3)" in done.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_weights_of_another_architecture_are_refused_naming_keys(trained, run_program, tmp_path):
    folder, _ = trained
    done = run_program(
        "train.py", "--pretrained", folder / "checkpoint.pt", "--arch", "cifar_resnet18", "--output-dir", tmp_path / "x"
    )
    assert done.returncode == 2
    assert "backbone." in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_sigterm_saves_and_the_same_command_goes_on_bit_for_bit(trained, start_program, tmp_path):
    folder, _ = trained
    words = ("train.py", *TINY, *SAVED, "--output-dir", tmp_path)
    process = start_program(*words)
    log = tmp_path / "metrics.jsonl"
    while not log.exists() or not log.stat().st_size:  # the file is empty until the first epoch ends
        assert process.poll() is None, process.stderr
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    done = process.finish(120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "continues from there" in done.stdout
    done = start_program(*words).finish(240)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    expected, resumed = (checkpoint.load(path / "checkpoint.pt")["model"] for path in (folder, tmp_path))
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


@pytest.fixture
def coloured(tmp_path):
    """A folder of pictures in three colours, some of them deeper, and the flags of a short run on it."""
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i in range(48):
        colour = np.zeros((24, 30, 3), np.uint8) + (np.eye(3, dtype=np.uint8)[i % 3] * 200)
        noise = rng.integers(0, 55, colour.shape, dtype=np.uint8)
        Image.fromarray(colour + noise).save(tmp_path / "in" / ("deep" if i % 2 else ".") / f"{i}.png")
    words = "--arch small_convnet --global-crops-size 16 --local-crops-size 8 --local-crops-number 1 --classes 3 3"
    words += " --dim 16 --hidden-dim 32 --batch-size 24 --queue-length 24 --epochs 2 --warmup-epochs 1 --lr 0.1"
    return ["--preset", "published", "--data", str(tmp_path / "in"), *words.split(), "--workers", "1"]


def test_a_folder_without_labels_is_learned_and_shown(coloured, run_program, tmp_path):
    out = tmp_path / "out"
    done = run_program("train.py", *coloured, "--output-dir", out)
    assert done.returncode == 0, done.stderr
    done = run_program("cls_eval.py", "--checkpoint", out / "checkpoint.pt", "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert "no labels, so no scores" in done.stdout
    assert sum(json.loads((out / "cls_eval.json").read_text())["cluster_sizes"]) == 48
    assert (out / "gallery.png").exists()


@pytest.mark.slow
def test_compiled_it_learns_the_same(coloured, run_python, tmp_path):
    losses = []
    for switch in ([], ["--compile"]):
        done = run_python("train.py", *coloured, *switch, "--output-dir", tmp_path / f"out{len(switch)}", timeout=500)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / f"out{len(switch)}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_compiling_without_a_compiler_is_refused(monkeypatch, tmp_path):
    parse_train(["--compile"])
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"--compile: no compiler was found \(g\+\+ or gcc\): install one, or drop"):
        parse_train(["--compile"])
    (tmp_path / "gcc").touch(mode=0o755)  # one is enough: the other may be for the other kind of device
    parse_train(["--compile"])


def test_torchrun_trains_what_one_process_trains(trained, run_python, tmp_path):
    folder, _ = trained
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *TINY, "--output-dir")
    done = run_python(*words, tmp_path / "two", *SAVED)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder, tmp_path / "two")
    )
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=0.02)
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-3)
