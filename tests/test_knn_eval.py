"""knn_eval.py as a user types it, its numbers computed again from the same network; and which images are searched."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from src import config
from src.config import KnnEvalOptions, parse_knn_eval
from src.data.datasets import ImageFiles, MemoryImages, open_data
from src.data.subsets import draw_share, read_list
from src.errors import InputError
from src.loading import load_method


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An epoch of digits; the checkpoint."""
    import os
    import subprocess

    folder = tmp_path_factory.mktemp("run") / "digits"
    words = [sys.executable, "train.py", "--epochs", "1", "--warmup-epochs", "1", "--output-dir", str(folder)]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint.pt"


@pytest.fixture
def knn(evaluate):
    return partial(evaluate, "knn_eval")


def digit_features(checkpoint, layer="backbone"):
    """Features of both splits straight from the network, their labels, all float64."""
    method, _ = load_method(checkpoint)
    found = []
    for split in ("train", "test"):
        data = open_data("digits", split)
        with torch.no_grad():
            images = 2 * (data.images.float() / 255) - 1
            features = method.backbone(images) if layer == "backbone" else method.embed(images)
        found.append((features.double().numpy(), data.labels.numpy()))
    return found


def scores_of(bank, queries, ks, tau):
    """The definition in NumPy, for data without ties."""
    (x, y), (q, target) = bank, queries
    x, q = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, q))
    similarity = q @ x.T
    order = np.argsort(-similarity, axis=1, kind="stable")
    result = {}
    for k in ks:
        votes = np.zeros((len(q), 1 + max(y.max(), target.max())))
        for row in range(len(q)):
            np.add.at(votes[row], y[order[row, :k]], np.exp(similarity[row, order[row, :k]] / tau))
        ranking = np.argsort(-votes, axis=1, kind="stable")
        top1 = (ranking[:, 0] == target).mean()
        result[str(k)] = {"top1": top1, "top5": (ranking[:, :5] == target[:, None]).any(axis=1).mean()}
    return result


def same(found, expected, within=0.0):
    return {k: pytest.approx(scores, abs=within + 1e-12) for k, scores in expected.items()} == found


@pytest.mark.parametrize("layer", ["backbone", "head"])
def test_the_written_numbers_are_those_of_the_network(trained, knn, layer):
    result, printed = knn("--checkpoint", trained, "--layer", layer, "--k", "1", "10", "100", "--tau", "0.07")
    expected = scores_of(*digit_features(trained, layer), (1, 10, 100), 0.07)
    assert same(result["k"], expected)
    assert 0.3 < expected["10"]["top1"] < expected["10"]["top5"]
    assert result["layer"] == layer
    assert (result["bank_images"], result["test_images"], result["tau"]) == (1437, 360, 0.07)
    row = re.search(r"^10 +([\d.]+) +([\d.]+)$", printed, flags=re.MULTILINE)
    assert [float(row[1]), float(row[2])] == [round(100 * expected["10"][name], 1) for name in ("top1", "top5")]


def test_the_published_settings_are_the_default(trained, knn):
    result, _ = knn("--checkpoint", trained)
    assert same(result["k"], scores_of(*digit_features(trained), (10, 20, 100, 200), 0.1))


def test_half_precision_is_close(trained, knn):
    expected = scores_of(*digit_features(trained), (10,), 0.05)
    for precision in ("bfloat16", "float16"):
        result, _ = knn("--checkpoint", trained, "--k", "10", "--tau", "0.05", "--precision", precision)
        assert same(result["k"], expected, within=0.03)
        assert precision in result["protocol"]


@pytest.mark.parametrize("cache", [(), ("--features-cache",)])
def test_a_share_of_the_bank_is_drawn_by_class_and_seed(trained, knn, tmp_path, cache):
    (features, labels), queries = digit_features(trained)
    rows = draw_share(labels, 0.1, 3)
    cache = (*cache, tmp_path / "cache") if cache else ()
    result, printed = knn("--checkpoint", trained, "--k", "5", "--bank-share", "0.1", "--seed", "3", *cache)
    assert same(result["k"], scores_of((features[rows], labels[rows]), queries, (5,), 0.1))
    assert result["bank_images"] == len(rows) == 142
    assert "142 training images searched (10 %" in printed


def test_a_list_names_the_bank(trained, knn, tmp_path):
    (features, labels), queries = digit_features(trained)
    (tmp_path / "list.txt").write_text("".join(f"{i}\n" for i in range(700, 100, -2)))
    result, _ = knn("--checkpoint", trained, "--k", "5", "--bank-list", tmp_path / "list.txt")
    rows = np.arange(102, 702, 2)
    assert same(result["k"], scores_of((features[rows], labels[rows]), queries, (5,), 0.1))
    assert (result["bank_images"], result["bank_share"]) == (300, None)


def test_the_cache_serves_every_share_and_no_other_network(trained, knn, tmp_path):
    words = ("--k", "5", "--features-cache", tmp_path / "cache")
    first, printed = knn("--checkpoint", trained, *words)
    assert "taken from" not in printed
    assert len(list((tmp_path / "cache").iterdir())) == 2
    again, printed = knn("--checkpoint", trained, *words)
    assert printed.count("taken from") == 2
    assert again == first
    _, printed = knn("--checkpoint", trained, *words, "--bank-share", "0.5")
    assert printed.count("taken from") == 2
    _, printed = knn("--checkpoint", trained, *words, "--layer", "head")
    assert "taken from" not in printed
    state = torch.load(trained)
    name = next(name for name in state["model"] if name.startswith("backbone."))
    state["model"][name] = -state["model"][name]
    torch.save(state, tmp_path / "other.pt")
    other, printed = knn("--checkpoint", tmp_path / "other.pt", *words)
    assert "taken from" not in printed
    assert same(other["k"], scores_of(*digit_features(tmp_path / "other.pt"), (5,), 0.1))
    assert other["k"] != first["k"]


def test_the_linear_probe_shares_the_cache(trained, knn, monkeypatch, tmp_path, capsys):
    import lincls_eval

    knn("--checkpoint", trained, "--features-cache", tmp_path / "cache")
    words = ["lincls_eval.py", "--checkpoint", trained, "--fast", "--epochs", "1", "--fast-lrs", "1"]
    words += ["--features-cache", tmp_path / "cache", "--output-dir", tmp_path / "linear"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    lincls_eval.main()
    assert capsys.readouterr().out.count("taken from") == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


# ---- other networks, folders ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three colours as classes, five training and two validation images of each; names repeat from class to class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for colour in range(3):
            place = tmp_path / "data" / split / "rgb"[colour]
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3)) // 3 + 60 * np.eye(3, dtype=int)[colour]
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def moco(tmp_path):
    """A file as MoCo v2 leaves it, of a ResNet-18, and the network."""
    torch.manual_seed(0)
    network = models.resnet18()
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 7, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth.tar")
    network.fc = torch.nn.Identity()
    return tmp_path / "moco.pth.tar", network.eval()


@pytest.mark.slow
def test_a_backbone_of_others_on_a_folder(knn, folder, moco):
    path, network = moco
    words = ("--checkpoint", path, "--data", folder, "--workers", "0")
    result, _ = knn(*words, "--k", "1", "3", "15")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    parts = []
    for split in ("train", "val"):
        rows, labels = [], []
        for file in sorted((folder / split).rglob("*.png")):
            image = Image.open(file).resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
            with torch.no_grad():
                rows.append(network(((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std)[None])[0])
            labels.append(sorted("rgb").index(file.parent.name))
        parts.append((torch.stack(rows).double().numpy(), np.array(labels)))
    assert same(result["k"], scores_of(*parts, (1, 3, 15), 0.1))
    assert result["k"]["15"]["top5"] == 1  # three classes
    assert (result["arch"], result["epochs"], result["features"]) == ("resnet18", 7, 512)

    (folder / "list.txt").write_text("b/1.png\ng/0.png\nr/4.png\n")
    result, _ = knn(*words, "--k", "1", "--bank-list", folder / "list.txt")
    rows = [1, 5, 14]  # of b, g, r
    assert same(result["k"], scores_of([part[rows] for part in parts[0]], parts[1], (1,), 0.1))
    with pytest.raises(InputError, match="expected self_classifier"):
        knn(*words, "--layer", "head")
    with pytest.raises(InputError, match=r"--arch resnet50: .*resnet18"):
        knn(*words, "--arch", "resnet50")


def test_what_is_wrong_is_said_before_any_work(trained, knn, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("src.features._run", lambda *_: pytest.fail("the network was run"))
    (tmp_path / "list.txt").write_text("0\n1437\n")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "empty" / "1.png")
    digits = ("--checkpoint", trained)
    cases = [
        ((*digits, "--bank-share", "0.1"), r"--k 200 is larger than the bank, 142 of 1437 training images \(10 %"),
        (
            (*digits, "--bank-list", tmp_path / "list.txt"),
            r"--bank-list .*1 of the 2 listed images, such as 1437, .* among the 1437 ",
        ),
        ((*digits, "--bank-list", tmp_path / "none.txt"), r"--bank-list .*none.txt: No such file"),
        ((*digits, "--data", folder), r"--data .*images have 3 channels, but the network takes 1"),
        ((*digits, "--data", tmp_path / "empty"), r"--data .*empty: .* no labels"),
        ((*digits, "--data", tmp_path / "nowhere"), r"--data .*nowhere: no such folder"),
        (("--checkpoint", tmp_path / "none.pt"), r"none.pt: no such file"),
    ]
    for words, message in cases:
        with pytest.raises(InputError, match=message):
            knn(*words)
    (folder / "val").rename(folder / "old")
    with pytest.raises(InputError, match=r"--data .*has train, but the test split needs val or test"):
        knn(*digits, "--data", folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint", "x", "--k", "5", "0"], "--k is 5 0"),
        (["--checkpoint", "x", "--tau", "0"], "--tau is 0.0"),
        (["--checkpoint", "x", "--bank-share", "10"], "--bank-share is 10.0: expected a fraction"),
        (["--checkpoint", "x", "--bank-share", "0"], "--bank-share is 0.0"),
        (["--checkpoint", "x", "--bank-share", "0.1", "--bank-list", "y"], "--bank-share and --bank-list"),
    ],
)
def test_wrong_flags_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse_knn_eval(words)


def test_every_flag_has_help_without_torch(run_python):
    done = run_python("-X", "importtime", "knn_eval.py", "--help")
    assert done.returncode == 0
    assert " torch\n" not in done.stderr
    source = Path(config.__file__).read_text()
    assert all(config.field_comments(source, "KnnEvalOptions")[name] for name in KnnEvalOptions.__annotations__)


def test_an_error_is_one_line_and_status_2(run_python, trained):
    done = run_python("knn_eval.py", "--checkpoint", trained, "--k", "5000")
    assert done.returncode == 2
    assert done.stderr.startswith("knn_eval.py: error: --k 5000 is larger than the bank, 1437 of 1437")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(trained, knn, run_python, tmp_path):
    one, _ = knn("--checkpoint", trained)
    words = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "knn_eval.py",
        "--checkpoint",
        trained,
    )
    done = run_python(*words, "--output-dir", tmp_path / "two", "--features-cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "knn_eval.json").read_text()) == one
    assert done.stdout.count("neighbours") == 1


# ---- a part of the labelled images ----------------------------------------------------------------------------------


def test_a_share_is_that_of_every_class():
    labels = np.repeat([0, 1, 2, 5, -1], [100, 50, 4, 1, 30])
    rows = draw_share(labels, 0.1, 0)
    assert np.array_equal(np.unique(labels[rows], return_counts=True), ([0, 1, 2, 5], [10, 5, 1, 1]))
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, draw_share(labels, 0.1, 0))
    assert not np.array_equal(rows, draw_share(labels, 0.1, 1))
    assert set(rows) < set(draw_share(labels, 0.5, 0))
    assert np.array_equal(draw_share(labels, 1.0, 0), np.flatnonzero(labels >= 0))
    assert np.array_equal(rows[labels[rows] == 1], draw_share(np.where(labels == 1, 1, -1), 0.1, 0))
    assert not len(draw_share(labels[-30:], 0.1, 0))


def test_a_list_names_images_by_name_folder_or_position(tmp_path):
    files = ImageFiles(
        ["/d/train/a/1.png", "/d/train/a/x.png", "/d/train/b/1.png"], torch.tensor([0, 0, 1]), ["a", "b"]
    )
    memory = MemoryImages(torch.zeros(4, 1, 1, 1), torch.zeros(4), ["a"])

    def rows(data, text):
        (tmp_path / "list.txt").write_text(text)
        return read_list(data, str(tmp_path / "list.txt"), "--bank-list").tolist()

    assert rows(files, "x.png\n\n b/1.png \n") == [1, 2]
    assert rows(files, "\ufefftrain/a/1.png\r\n./a/x.png") == [0, 1]
    assert rows(files, "/d/train/b/1.png\n") == [2]
    assert rows(memory, "3\n0\n") == [0, 3]
    for data, text, message in [
        (files, "x.png\n1.png\n", r"list.txt: 1.png is the name of 2 images: .* as in a/1.png"),
        (files, "x.png\nc/x.png\ny.png\n", "2 of the 3 listed images, such as c/x.png, are not among the 3 "),
        (files, "ng\n", "ng"),
        (files, "x.png\na/x.png\n", "x.png is listed twice"),
        (files, "\n", "lists no image"),
        (memory, "4\n", "1 of the 1 listed images, such as 4, are not among the 4 "),
        (memory, "-1\n", "such as -1"),
    ]:
        with pytest.raises(InputError, match=f"--bank-list .*{message}"):
            rows(data, text)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file"):
        read_list(files, str(tmp_path / "bytes"), "--bank-list")
