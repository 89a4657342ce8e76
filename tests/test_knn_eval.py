"""knn_eval.py as a user types it, its numbers computed again from the same network; and which images are searched."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from evaluating import (
    digit_features,
    make_pictures,
    run_here,
    save_as_moco,
    torchvision_trunk,
    undecided,
)
from PIL import Image

from src import checkpoint
from src.config import KnnEvalOptions, parse_knn_eval
from src.config.flags import comments_of
from src.data.datasets import ImageFiles, MemoryImages
from src.data.subsets import draw_share, read_list
from src.errors import InputError, run_script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An epoch of digits; the checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    run_here("train", "--epochs", "1", "--warmup-epochs", "1", "--output-dir", folder)
    return folder / "checkpoint.pt"


@pytest.fixture
def knn(evaluate):
    return partial(evaluate, "knn_eval")


def expected_scores(bank, queries, ks, tau, *, error=1e-6):
    """The definition in NumPy: {k: scores} that may differ by the queries that rounding may decide.

    Args:
        error: of a similarity, by the rounding of features and products in float32.
    """
    (x, y), (q, target) = bank, queries
    x, q = (np.asarray(rows, dtype=float) for rows in (x, q))
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
        top5 = (ranking[:, :5] == target[:, None]).any(axis=1).mean()
        few = undecided(x, y, q, k, tau, error)
        assert few < 0.03 * len(q)
        result[str(k)] = pytest.approx({"top1": top1, "top5": top5}, abs=few / len(q) + 1e-12)
    return result


@pytest.mark.parametrize("layer", ["backbone", "head"])
def test_the_written_numbers_are_those_of_the_network(trained, knn, layer):
    result, printed = knn("--checkpoint", trained, "--layer", layer, "--k", "1", "10", "100", "--tau", "0.07")
    assert result["k"] == expected_scores(*digit_features(trained, layer), (1, 10, 100), 0.07)
    assert 0.3 < result["k"]["10"]["top1"] < result["k"]["10"]["top5"]
    assert result["layer"] == layer
    assert (result["bank_images"], result["test_images"], result["tau"]) == (1437, 360, 0.07)
    row = re.search(r"^10 +([\d.]+) +([\d.]+)$", printed, flags=re.MULTILINE)
    assert [float(row[1]), float(row[2])] == [round(100 * result["k"]["10"][name], 1) for name in ("top1", "top5")]


def test_the_published_settings_are_the_default(trained, knn):
    result, _ = knn("--checkpoint", trained)
    assert result["k"] == expected_scores(*digit_features(trained), (10, 20, 100, 200), 0.1)


def test_half_precision_is_close(trained, knn):
    full, _ = knn("--checkpoint", trained, "--k", "10", "--tau", "0.05")
    for precision in ("bfloat16", "float16"):
        result, _ = knn("--checkpoint", trained, "--k", "10", "--tau", "0.05", "--precision", precision)
        assert result["k"]["10"] == pytest.approx(full["k"]["10"], abs=0.03)
        assert precision in result["protocol"]


def test_in_a_small_bank_the_default_numbers_that_fit_are_scored(trained, knn, tmp_path):
    (features, labels), queries = digit_features(trained)
    rows = draw_share(labels, 0.1, 0)
    result, printed = knn("--checkpoint", trained, "--bank-share", "0.1")
    assert result["k"] == expected_scores((features[rows], labels[rows]), queries, (10, 20, 100), 0.1)
    line = (
        "--k 200 is larger than the bank, 142 of 1437 training images (10 % of each class): scoring --k 10 20 100 only"
    )
    assert line in printed.splitlines()
    (tmp_path / "list.txt").write_text("0\n1\n2\n")
    result, printed = knn("--checkpoint", trained, "--bank-list", tmp_path / "list.txt")
    assert list(result["k"]) == ["3"]
    assert "scoring --k 3 only" in printed
    result, printed = knn("--checkpoint", trained, "--k", "10")
    assert "larger than" not in printed


@pytest.mark.parametrize("cache", [(), ("--features-cache",)])
def test_a_share_of_the_bank_is_drawn_by_class_and_seed(trained, knn, tmp_path, cache):
    (features, labels), queries = digit_features(trained)
    rows = draw_share(labels, 0.1, 3)
    cache = (*cache, tmp_path / "cache") if cache else ()
    result, printed = knn("--checkpoint", trained, "--k", "5", "--bank-share", "0.1", "--seed", "3", *cache)
    assert result["k"] == expected_scores((features[rows], labels[rows]), queries, (5,), 0.1)
    assert result["bank_images"] == len(rows) == 142
    assert "142 training images searched (10 %" in printed


def test_a_list_names_the_bank(trained, knn, tmp_path):
    (features, labels), queries = digit_features(trained)
    (tmp_path / "list.txt").write_text("".join(f"{i}\n" for i in range(700, 100, -2)))
    result, _ = knn("--checkpoint", trained, "--k", "5", "--bank-list", tmp_path / "list.txt")
    rows = np.arange(102, 702, 2)
    assert result["k"] == expected_scores((features[rows], labels[rows]), queries, (5,), 0.1)
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
    state = checkpoint.load(trained)
    name = next(name for name in state["model"] if name.startswith("backbone."))
    state["model"][name] = -state["model"][name]
    torch.save(state, tmp_path / "other.pt")
    other, printed = knn("--checkpoint", tmp_path / "other.pt", *words)
    assert "taken from" not in printed
    assert other["k"] == expected_scores(*digit_features(tmp_path / "other.pt"), (5,), 0.1)
    assert other["k"] != first["k"]


def test_the_linear_probe_shares_the_cache(trained, knn, tmp_path, capsys):
    knn("--checkpoint", trained, "--features-cache", tmp_path / "cache")
    words = ("--checkpoint", trained, "--fast", "--epochs", "1", "--fast-lrs", "1", "--fast-weight-decays", "0")
    run_here("lincls_eval", *words, "--features-cache", tmp_path / "cache", "--output-dir", tmp_path / "linear")
    assert capsys.readouterr().out.count("taken from") == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


# ---- other networks, folders ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three colours as classes, three training images and one validation image of each; names repeat."""
    colours = {"b": (60, 0, 0), "g": (0, 60, 0), "r": (0, 0, 60)}
    return make_pictures(tmp_path / "data", colours, splits=(("train", 3), ("val", 1)), noise=85)


def test_a_backbone_of_others_on_a_folder(knn, folder, tmp_path):
    network = torchvision_trunk("resnet18")
    path = save_as_moco(tmp_path / "moco.pth.tar", network)
    words = ("--checkpoint", path, "--data", folder, "--workers", "0")
    result, _ = knn(*words, "--k", "1", "3", "9")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    parts = []
    for split in ("train", "val"):
        rows, labels = [], []
        for file in sorted((folder / split).rglob("*.png")):
            image = Image.open(file).resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
            with torch.no_grad():
                rows.append(network(((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std)[None])[0])
            labels.append("bgr".index(file.parent.name))
        parts.append((torch.stack(rows), np.array(labels)))
    rounded = 1e-4  # Pillow rounds pixels to whole grey levels
    assert result["k"] == expected_scores(*parts, (1, 3, 9), 0.1, error=rounded)
    assert result["k"]["9"]["top5"] == 1  # three classes
    assert (result["arch"], result["epochs"], result["features"]) == ("resnet18", 7, 512)

    (folder / "list.txt").write_text("b/1.png\ng/0.png\nr/2.png\n")
    result, _ = knn(*words, "--k", "1", "--bank-list", folder / "list.txt")
    rows = [1, 3, 8]  # of b, g, r
    assert result["k"] == expected_scores([part[rows] for part in parts[0]], parts[1], (1,), 0.1, error=rounded)
    with pytest.raises(InputError, match="expected self_classifier"):
        knn(*words, "--layer", "head")
    with pytest.raises(InputError, match=r"--arch resnet50: .*resnet18"):
        knn(*words, "--arch", "resnet50")


def test_what_is_wrong_is_said_before_any_work(trained, knn, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("src.features._run", lambda *_, **__: pytest.fail("the network was run"))
    (tmp_path / "list.txt").write_text("0\n1437\n")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "empty" / "1.png")
    digits = ("--checkpoint", trained)
    cases = [
        (
            (*digits, "--bank-share", "0.1", "--k", "10", "150"),
            r"--k 150 is larger than the bank, 142 of 1437 training images \(10 %.*: give a smaller --k",
        ),
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
    assert all(comments_of(KnnEvalOptions)[name] for name in KnnEvalOptions.__annotations__)


def test_an_error_is_one_line_and_status_2(trained, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_here("knn_eval", "--checkpoint", trained, "--k", "5000"))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.endswith(
        "error: --k 5000 is larger than the bank, 1437 of 1437 training images (100 % of each class): "
        "give a smaller --k or search more images\n"
    )


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
