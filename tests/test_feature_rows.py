"""Frozen features as data: a file of numpy.savez in the place of images, trained on and evaluated in this process."""

import csv
import os
import zipfile

import numpy as np
import pytest
import torch
from evaluating import read_json, run_here, save_untrained

from src import checkpoint, inspection
from src.config import ViewSettings, parse_train
from src.data import arrays, datasets
from src.data.datasets import FeatureRows, open_data
from src.data.views import IdentityViews, build_views
from src.errors import InputError, run_script
from src.models.backbones import Identity, build_backbone

NAMES = ["left", "right", "top"]


def groups(number, seed, width=6):
    """Rows around three points that are far apart, and the point of each."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % 3
    return (6 * np.eye(3, width)[labels] + rng.normal(size=(number, width))).astype(np.float32), labels


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Both splits with labels and names of the classes."""
    path = tmp_path_factory.mktemp("features") / "features.npz"
    (train, train_labels), (test, test_labels) = groups(240, 0), groups(60, 1)
    arrays = {"train_features": train, "train_labels": train_labels, "test_features": test, "test_labels": test_labels}
    np.savez(path, **arrays, classes=np.array(NAMES))
    return path


SHORT = "--arch identity --classes 3 3 --dim 16 --hidden-dim 32 --epochs 4 --warmup-epochs 0 --batch-size 60 --lr 0.1 "
SHORT = (SHORT + "--optimizer sgd --global-crops-number 2 --local-crops-number 0 --queue-length 60").split()


@pytest.fixture(scope="module")
def trained(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_here("train", "--data", file, *SHORT, "--eval-every", "2", "--output-dir", folder)
    return folder


def npy(shape, content, dtype="<f4") -> bytes:
    """Return an array of numpy's format that declares any shape."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


HOSTILE = {
    "more rows than bytes": (
        {"train_features": npy((1 << 40, 6), bytes(24))},
        "shape .* but the file has 24 bytes for it",
    ),
    "fewer rows than bytes": ({"train_features": npy((1, 6), bytes(48))}, "but the file has 48 bytes for it"),
    "negative rows": ({"train_features": npy((-1, -6), bytes(24))}, "is declared with the shape"),
    "pickled objects": ({"train_features": npy((1, 1), bytes(8), "|O")}, "holds objects"),
    "a header that is code": ({"train_features": npy("__import__('os').system('touch executed')", b"")}, "no header"),
    "a header of brackets": ({"train_features": npy(4000 * "(", b"")}, "no header of an array"),
    "dates": ({"train_features": npy((1, 1), bytes(8), "<M8[s]")}, "expected numbers or texts"),
    "the largest label": (
        {"train_features": npy((1, 6), bytes(24)), "train_labels": npy((1,), b"\xff" * 7 + b"\x3f", "<i8")},
        "classes, expected at most 1,000,000",
    ),
    "names without end": (
        {"train_features": npy((1, 6), bytes(24)), "classes": npy((2_000_000,), bytes(2_000_000), "|S1")},
        "2,000,000 classes, expected at most 1,000,000",
    ),
}


@pytest.mark.parametrize(("members", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_asks_for_more_than_it_holds_is_refused(tmp_path, monkeypatch, members, message):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("wrong.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    with pytest.raises(InputError, match=message) as refused:
        open_data("wrong.npz", "train")
    assert "\n" not in str(refused.value)
    assert os.listdir() == ["wrong.npz"]


def test_a_short_file_of_many_numbers_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, train_features=np.zeros((50_000, 20), dtype=np.float32))
    monkeypatch.setattr(inspection, "ROOM", 1 << 20)
    with pytest.raises(InputError, match=r"an archive of [\d,]+ bytes whose contents take 4,0\d\d,\d+"):
        open_data(str(path), "train")
    np.savez(path, train_features=np.zeros((5000, 20), dtype=np.uint8))  # which take four times the memory as float32
    monkeypatch.setattr(datasets, "ROOM", 1 << 10)
    with pytest.raises(InputError, match=r"1\d\d,\d+ bytes that take 440,000 in memory: write float32"):
        open_data(str(path), "train")


@pytest.mark.parametrize("order", ["C", "F"])
def test_features_are_converted_in_pieces(tmp_path, monkeypatch, order):
    monkeypatch.setattr(arrays, "PIECE", 40)
    rows = np.arange(35, dtype=np.float16).reshape(7, 5)
    np.savez(tmp_path / "rows.npz", train_features=np.asarray(rows, order=order))
    assert open_data(str(tmp_path / "rows.npz"), "train").images.tolist() == rows.tolist()


def test_rows_views_and_backbone_are_the_features(file):
    data = open_data(str(file), "test")
    features, labels = groups(60, 1)
    assert isinstance(data, FeatureRows)
    assert (len(data), data.channels, data.classes, data.has_pictures) == (60, 6, NAMES, False)
    assert torch.equal(data.images, torch.from_numpy(features))
    assert torch.equal(data.labels, torch.from_numpy(labels))
    assert len(open_data(str(file), "train")) == 240

    views = build_views(str(file), data, ViewSettings(global_crops_number=2, local_crops_number=3))
    assert isinstance(views, IdentityViews)
    assert [torch.equal(view, data.images) for view in views(data.images, np.arange(60), seed=0, epoch=0)] == [True] * 5
    assert torch.equal(views.single(data.images), data.images)

    backbone = build_backbone("identity", 6)
    assert isinstance(backbone, Identity)
    assert (backbone.width, list(backbone.parameters())) == (6, [])
    assert torch.equal(backbone(data.images), data.images)


def test_one_split_without_labels_is_enough_and_numbers_become_float32(tmp_path):
    path = tmp_path / "one.npz"
    np.savez(path, train_features=np.arange(12).reshape(4, 3))
    data = open_data(str(path), "train")
    assert data.images.dtype == torch.float32
    assert data.images.tolist() == np.arange(12.0).reshape(4, 3).tolist()
    assert (data.labels.tolist(), data.classes) == ([-1] * 4, [])


def test_classes_are_those_of_both_splits_and_may_be_chosen(file, tmp_path):
    path = tmp_path / "two.npz"
    arrays = {"train_features": np.zeros((2, 3)), "test_features": np.ones((3, 3))}
    np.savez(path, **arrays, train_labels=[0, 4], test_labels=[-1, 2, 2])
    assert open_data(str(path), "train").classes == open_data(str(path), "test").classes == list("01234")
    (tmp_path / "subset.txt").write_text("top\nleft\n")
    data = open_data(str(file), "test", subset_file=str(tmp_path / "subset.txt"))
    assert isinstance(data, FeatureRows)
    assert (data.classes, data.labels.bincount().tolist()) == (["top", "left"], [20, 20])
    assert torch.equal(data.images[0], open_data(str(file), "test").images[0])  # of the class left


def test_a_method_is_trained_on_features(trained, file):
    state = checkpoint.load(trained / "checkpoint.pt")
    assert (state["config"]["channels"], state["config"]["data"], state["config"]["arch"]) == (6, str(file), "identity")
    assert not any(name.startswith("backbone.") for name in state["model"])
    losses = [epoch["loss"] for epoch in state["history"]]
    assert losses[-1] < losses[0]
    assert state["history"][-1]["acc"] > 0.6
    assert "acc" not in state["history"][0]


def test_its_clusters_are_scored_and_drawn_without_pictures(trained, file, tmp_path, capsys):
    words = ("--checkpoint", trained, "--output-dir", tmp_path, "--pca", "--feature-quality", "--ensemble")
    run_here("cls_eval", *words)
    result = read_json(tmp_path, "cls_eval")
    assert result["acc"] == pytest.approx(
        checkpoint.load(trained / "checkpoint.pt")["history"][-1]["acc"], abs=1.01 / 60
    )
    assert (result["data"], result["arch"], result["images"]) == (str(file), "identity", 60)
    assert result["quality"]["features"] == 6
    assert {path.name for path in tmp_path.iterdir()} == {
        *("cls_eval.json", "clusters.csv", "confusion.png", "sizes.png", "pca.png")  # and no gallery
    }
    with (tmp_path / "clusters.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["class"] for row in rows] == [NAMES[i % 3] for i in range(60)]
    assert "wrote cls_eval.json" in capsys.readouterr().out


def test_k_means_neighbours_and_probes_see_the_features_themselves(trained, tmp_path):
    """The three groups are six standard deviations apart: every one of these methods finds them."""
    run_here("cls_eval", "--checkpoint", trained, "--kmeans", "3", "--output-dir", tmp_path)
    assert read_json(tmp_path, "cls_eval")["acc"] > 0.95
    run_here("knn_eval", "--checkpoint", trained, "--k", "5", "--output-dir", tmp_path)
    result = read_json(tmp_path, "knn_eval")
    assert result["k"]["5"]["top1"] > 0.95
    assert (result["features"], result["bank_images"], result["classes"]) == (6, 240, 3)
    words = ("--checkpoint", trained, "--output-dir", tmp_path, "--epochs", "4")
    run_here("lincls_eval", *words, "--optimizer", "sgd", "--batch-size", "60", "--lr", "0.1")
    assert read_json(tmp_path, "lincls_eval")["top1"] > 0.95
    run_here("lincls_eval", *words, "--fast", "--fast-lrs", "0.1", "--features-cache", tmp_path / "cache")
    result = read_json(tmp_path, "lincls_eval")
    assert (result["features"], result["top1"] > 0.95) == (6, True)


def test_other_features_may_be_evaluated(trained, tmp_path):
    features, labels = groups(30, 2)
    np.savez(tmp_path / "other.npz", test_features=features, test_labels=labels)
    run_here("cls_eval", "--checkpoint", trained, "--data", tmp_path / "other.npz", "--output-dir", tmp_path)
    assert read_json(tmp_path, "cls_eval")["images"] == 30


@pytest.mark.parametrize("program", ["knn_eval", "lincls_eval"])
def test_an_evaluation_that_needs_both_splits_says_which_is_missing(program, trained, tmp_path, capsys):
    features, labels = groups(30, 2)
    np.savez(tmp_path / "other.npz", test_features=features, test_labels=labels)
    words = ("--checkpoint", trained, "--data", tmp_path / "other.npz", "--output-dir", tmp_path / "out")
    assert "expected train_features" in one_line(capsys, program, *words)
    assert not (tmp_path / "out").exists()


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def one_line(capsys, *words):
    """Run a program that ends with status 2; return the one line that it says."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_here(*words))
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    return said.err


ROWS = np.ones((4, 6), np.float32)


def changed(**arrays):
    """A file like the one that is trained on, but for these arrays."""
    usual = {"train_features": ROWS, "test_features": ROWS, "train_labels": [0, 1, 1, 0], "test_labels": [0, 1, 1, 0]}
    return {name: array for name, array in {**usual, **arrays}.items() if array is not None}


WRONG = {
    "no such split": (changed(train_features=None), "the file holds test_features, train_labels"),
    "no arrays": ({}, "the file holds no array, expected train_features"),
    "3-D": (
        changed(train_features=np.ones((4, 2, 3))),
        r"train_features has shape \(4, 2, 3\) and type float64, expected \(N, F\)",
    ),
    "1-D": (
        changed(train_features=np.ones(4)),
        r"train_features has shape \(4,\) and type float64, expected \(N, F\) numbers",
    ),
    "no rows": (
        changed(train_features=np.ones((0, 6))),
        r"train_features has shape \(0, 6\) and type float64, expected",
    ),
    "strings": (
        changed(train_features=np.full((4, 6), "a")),
        r"train_features has shape \(4, 6\) and type <U1, expected",
    ),
    "NaN": (changed(train_features=ROWS * np.nan), "train_features holds NaN or infinity"),
    "infinite": (changed(train_features=ROWS * -np.inf), "holds NaN or infinity"),
    "too large": (changed(train_features=np.full((4, 6), 1e300)), "holds NaN or infinity"),
    "objects": (changed(train_features=np.array([[None] * 6] * 4)), "not an .npz file"),
    "other width": (
        changed(test_features=np.ones((4, 5))),
        r"is \(4, 6\), the other split's \(4, 5\); expected one width",
    ),
    "no width": (changed(train_features=np.zeros((4, 0))), r"train_features has shape \(4, 0\)"),
    "few labels": (changed(train_labels=[0, 1]), r"train_labels has shape \(2,\) and type int64, expected 4 integers"),
    "fractions": (changed(train_labels=[0.0, 1.0, 1.0, 0.0]), "and type float64, expected 4 integers"),
    "negative": (changed(train_labels=[0, 1, 1, -2]), "train_labels holds -2, expected -1"),
    "names as labels": (changed(train_labels=list("abba")), "and type <U1, expected 4 integers"),
    "one name": (changed(classes="a"), "the largest label is 1, but `classes` has only 1 names"),
    "few names": (changed(classes=["a"]), "the largest label is 1, but `classes` has only 1 names"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_and_status_2(name, tmp_path, capsys):
    arrays, message = WRONG[name]
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    said = one_line(capsys, "train", "--data", path, *SHORT, "--output-dir", tmp_path / "run")
    assert f"--data {path}: " in said
    with pytest.raises(InputError, match=message):
        open_data(str(path), "train")
    assert not (tmp_path / "run").exists()


def test_labels_of_the_other_split_that_are_none_do_not_matter(tmp_path):
    np.savez(tmp_path / "names.npz", **changed(test_labels=list("abba")))
    assert open_data(str(tmp_path / "names.npz"), "train").classes == ["0", "1"]


def text(path):
    path.write_text("0 1 2\n")


def nothing(path):
    path.touch()


def an_array(path):
    with path.open("wb") as file:
        np.save(file, ROWS)


def cut_off(path):
    np.savez(path, train_features=ROWS)
    path.write_bytes(path.read_bytes()[:300])


def damaged(path):
    np.savez_compressed(path, train_features=np.random.default_rng(0).normal(size=(50, 6)))
    content = bytearray(path.read_bytes())
    content[500:600] = bytes(100)
    path.write_bytes(content)


def another_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_features", "0 1 2")


@pytest.mark.parametrize("write", [text, nothing, an_array, cut_off, damaged, another_archive])
def test_what_is_no_file_of_features_is_one_line_and_status_2(write, tmp_path, capsys):
    path = tmp_path / "wrong.npz"
    write(path)
    said = one_line(capsys, "train", "--data", path, *SHORT, "--output-dir", tmp_path / "run")
    assert f"--data {path}: " in said


def test_a_missing_file_is_one_line_and_status_2(tmp_path, capsys):
    said = one_line(capsys, "train", "--data", tmp_path / "none.npz", *SHORT, "--output-dir", tmp_path / "run")
    assert said.endswith(f"error: --data {tmp_path / 'none.npz'}: no such file: pass the path of an .npz file\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x.npz"], r"--data x\.npz holds features, but --arch resnet50 takes images: give --arch identity"),
        (["--arch", "identity"], r"--arch identity takes features, but --data digits is not an \.npz file"),
        (["--data", "x.npz", "--arch", "identity", "--reference-views"], "--reference-views is for photographs"),
        (
            ["--data", "x.npz", "--arch", "identity", "--keep-decoded", "1"],
            r"--data x\.npz is in memory: drop one of them",
        ),
        (["--data", "x.npz", "--arch", "identity", "--decode-on-gpu"], r"--decode-on-gpu is for image files"),
    ],
)
def test_flags_that_do_not_go_with_features(words, message):
    with pytest.raises(InputError, match=message):
        parse_train(words)


def test_evaluations_refuse_images_for_features_and_the_reverse(trained, file, tmp_path):
    """Also where the number of channels is by chance that of the features."""
    grey = save_untrained(tmp_path / "grey.pt", "--classes", "3")
    with pytest.raises(InputError, match=r"features\.npz: the images have 6 channels, but the network takes 1"):
        run_here("knn_eval", "--checkpoint", grey, "--data", file)
    with pytest.raises(InputError, match="--data digits: the images have 1 channels, but the network takes 6"):
        run_here("knn_eval", "--checkpoint", trained, "--data", "digits")
    np.savez(tmp_path / "one.npz", test_features=np.ones((4, 1)))
    with pytest.raises(InputError, match=r"--data .*one\.npz: checkpoint .*grey\.pt takes images: give others"):
        run_here("cls_eval", "--checkpoint", grey, "--data", tmp_path / "one.npz")


def test_pictures_of_features_are_refused(trained, file, tmp_path):
    with pytest.raises(InputError, match=f"--grids shows images, but --data {file} holds features: drop --grids"):
        run_here("cls_eval", "--checkpoint", trained, "--grids", "2", "--output-dir", tmp_path / "out")
    with pytest.raises(InputError, match="--pool-window 2: the backbone does not end in global average pooling"):
        run_here("lincls_eval", "--checkpoint", trained, "--pool-window", "2", "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
