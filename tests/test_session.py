"""`open_session`: everything that an evaluation needs in one call, and what is wrong with it said before any image is read."""

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import (
    SMALL,
    digit_features,
    digit_probabilities,
    make_pictures,
    read_json,
    run_here,
    save_as_moco,
    save_untrained,
    torchvision_trunk,
)

from src import checkpoint
from src.config import parse_knn_eval
from src.data.datasets import open_data, published_classes
from src.data.digits import DigitViews
from src.data.photographs import PhotoViews
from src.errors import InputError
from src.evaluation.session import Unclassified, open_session

EVALUATION = Path(__file__).parents[1] / "src" / "evaluation"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of digits with random weights; its folder."""
    return save_untrained(
        tmp_path_factory.mktemp("run") / "checkpoint.pt", "--classes", "10", "12", "--seed", "5"
    ).parent


@pytest.fixture(scope="module")
def moco(tmp_path_factory):
    """A released backbone without classifiers, and the network."""
    network = torchvision_trunk("resnet18")
    return save_as_moco(tmp_path_factory.mktemp("moco") / "moco.pth.tar", network), network


@pytest.fixture
def colour(tmp_path):
    """A network for small colour images, trained on a folder that is not there."""
    return save_untrained(tmp_path / "colour" / "checkpoint.pt", "--data", str(tmp_path / "moved"), *SMALL, channels=3)


@pytest.fixture
def pictures(tmp_path):
    """Two colours as classes, two training images and one validation image of each."""
    return make_pictures(
        tmp_path / "data", {"b": (0, 0, 90), "r": (90, 0, 0)}, splits=(("train", 2), ("val", 1)), size=(20, 24)
    )


def options_of(checkpoint, *words, parse=parse_knn_eval):
    return parse(["--checkpoint", str(checkpoint), *map(str, words)])


def opened(checkpoint, *words, part="backbone", splits=("train", "test"), batch_size=256, **how):
    return open_session(options_of(checkpoint, *words), part=part, splits=splits, batch_size=batch_size, **how)


# ---- what it opens --------------------------------------------------------------------------------------------------


def test_our_own_checkpoint_names_its_data_and_views(trained, tmp_path):
    session = opened(trained, "--output-dir", tmp_path / "out", part="classifiers")
    assert (session.checkpoint, session.trained["method"], session.state["epoch"]) == (
        str(trained),
        "self_classifier",
        0,
    )
    assert {split: len(data) for split, data in session.splits.items()} == {"train": 1437, "test": 360}
    assert (session.source.data, session.device, session.folder) == ("digits", torch.device("cpu"), tmp_path / "out")
    assert isinstance(session.views, DigitViews)
    assert not session.network.training
    assert not session.folder.exists()
    assert session.facts() == {
        "checkpoint": str(trained),
        "method": "self_classifier",
        "arch": "small_convnet",
        "epochs": 0,
        "seed": 5,
        "data": "digits",
        "subset": "",
        "subset_file": "",
    }
    logits = [p.log() for p in digit_probabilities(trained)]
    images, indices = next(session.batches(session.splits["test"]))
    assert np.array_equal(indices, np.arange(256))
    for found, expected in zip(session.network.predict(images), logits, strict=True):
        torch.testing.assert_close((found / session.network.temperature).log_softmax(dim=1), expected[:256])


@pytest.mark.parametrize(
    ("part", "has"),
    [("backbone", {"backbone"}), ("head", {"backbone", "embed"}), ("classifiers", {"backbone", "embed", "predict"})],
)
def test_each_part_of_the_network(trained, part, has):
    session = opened(trained, part=part, splits=("test",))
    assert all(hasattr(session.network, name) for name in has)
    layers = has & {"backbone", "embed"}
    for layer, expected in (("backbone", "backbone"), ("embed", "head")):
        if layer in layers:
            found = session.features(session.splits["test"], split="test", layer=expected)
            torch.testing.assert_close(found, digit_features(trained, expected)[1][0])


def test_a_foreign_checkpoint_needs_data(moco, pictures, tmp_path):
    path, network = moco
    with pytest.raises(
        InputError, match=r"--data is missing: .*moco\.pth\.tar does not name the data it was trained on"
    ):
        opened(path)
    session = opened(path, "--data", pictures, "--workers", "0")
    assert (session.trained["method"], session.state["epoch"], session.trained["arch"]) == ("MoCo v2", 7, "resnet18")
    assert isinstance(session.views, PhotoViews)
    assert session.folder == path.parent
    data = session.splits["test"]
    ((images, indices),) = session.batches(data)
    assert (tuple(images.shape), indices.tolist()) == ((2, 3, 224, 224), [0, 1])
    with torch.no_grad():
        torch.testing.assert_close(session.features(data, split="test", layer="backbone"), network(images))
    with pytest.raises(Unclassified, match="without classifiers"):
        opened(path, "--data", pictures, part="classifiers")
    with pytest.raises(Unclassified, match=r"holds a backbone \(MoCo v2\)"):
        opened(path, "--data", pictures, part="head")


def test_data_that_moved_or_other_data_may_be_named(colour, pictures):
    with pytest.raises(InputError, match=r"--data .*moved: no such folder"):
        opened(colour)
    session = opened(colour, "--data", pictures, "--workers", "0")
    assert (session.source.data, session.facts()["data"]) == (str(pictures), str(pictures))
    assert (session.views.eval_size, session.splits["train"].classes) == (16, ["b", "r"])
    (pictures / "list.txt").write_text("r\n")
    session = opened(colour, "--data", pictures, "--workers", "0", "--subset-file", pictures / "list.txt")
    assert [len(session.splits[split]) for split in ("train", "test")] == [2, 1]
    assert session.facts()["subset_file"] == str(pictures / "list.txt")


def test_the_classes_of_the_training_run_are_kept(tmp_path):
    (tmp_path / "list.txt").write_text("7\n3\n")
    path = save_untrained(tmp_path / "run" / "checkpoint.pt", "--classes", "2", "--subset-file", tmp_path / "list.txt")
    session = opened(path)
    assert session.splits["test"].classes == ["7", "3"]
    assert session.facts()["subset_file"] == str(tmp_path / "list.txt")
    (tmp_path / "other.txt").write_text("1\n")
    assert opened(path, "--subset-file", tmp_path / "other.txt").splits["test"].classes == ["1"]
    assert len(opened(path, "--data", "digits").splits["test"].classes) == 10  # other data, even of the same name


def test_the_published_subset_of_the_training_run_is_kept(tmp_path):
    wanted, folder = published_classes("imagenet-50"), tmp_path / "data"
    make_pictures(folder, dict.fromkeys([*wanted, "n99999999"], (0, 90, 0)), splits=[("train", 1)], size=(20, 24))
    path = tmp_path / "run" / "checkpoint.pt"
    save_untrained(path, "--data", folder, "--subset", "imagenet-50", *SMALL, channels=3)
    session = opened(path, "--workers", "0", splits=("train",))
    assert session.splits["train"].classes == wanted
    assert (session.facts()["subset"], session.facts()["subset_file"]) == ("imagenet-50", "")
    (tmp_path / "list.txt").write_text("n99999999\n")  # another choice replaces it
    session = opened(path, "--workers", "0", "--subset-file", tmp_path / "list.txt", splits=("train",))
    assert session.splits["train"].classes == ["n99999999"]
    assert (session.facts()["subset"], session.facts()["subset_file"]) == ("", str(tmp_path / "list.txt"))


def test_other_splits_are_opened_when_they_are_asked_for(trained):
    session = opened(trained, splits=("test",))
    assert list(session.splits) == ["test"]
    assert session.open("test") is session.splits["test"]
    assert torch.equal(session.open("train").images, open_data("digits", "train").images)


def test_images_without_a_label_are_left_out_where_labels_are_needed(tmp_path):
    rows = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    arrays = {
        "train_features": rows,
        "test_features": rows,
        "train_labels": [0, -1, 1, 0],
        "test_labels": [-1, 1, 0, 0],
    }
    np.savez(tmp_path / "f.npz", **arrays)
    words = ("--data", str(tmp_path / "f.npz"), *SMALL, "--arch", "identity")
    path = save_untrained(tmp_path / "run" / "checkpoint.pt", *words, channels=3)
    session = opened(path, labelled=True)
    assert [session.splits[split].labels.tolist() for split in ("train", "test")] == [[0, 1, 0], [1, 0, 0]]
    assert torch.equal(session.splits["train"].images, torch.from_numpy(rows[[0, 2, 3]]))
    assert len(opened(path).splits["train"]) == 4


def test_precision_and_layout(trained):
    session = opened(trained, "--precision", "bfloat16", "--channels-last", splits=("test",))
    assert (session.autocast, session.layout) == (torch.bfloat16, torch.channels_last)
    weight = next(value for value in session.network.parameters() if value.ndim == 4 and value.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    plain = opened(trained, splits=("test",))
    assert (plain.autocast, plain.layout) == (None, torch.contiguous_format)


def test_results_go_below_the_folder_unless_another_is_named(trained, tmp_path):
    assert opened(trained, below="kmeans", splits=("test",)).folder == trained / "kmeans"
    assert opened(trained / "checkpoint.pt", splits=("test",)).folder == trained
    named = opened(trained, "--output-dir", tmp_path / "out", below="kmeans", splits=("test",))
    assert named.folder == tmp_path / "out"


def test_a_session_is_frozen(trained):
    session = opened(trained, splits=("test",))
    for field in dataclasses.fields(session):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(session, field.name, None)


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_read(monkeypatch):
    """Fail where an image is decoded or a network is run, or a folder is made."""
    for name in ("src.evaluation.session.single_views", "src.evaluation.session.extract", "src.run.make_folder"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("work has begun"))
    monkeypatch.setattr("src.data.datasets.decode", lambda *_, **__: pytest.fail("an image was read"))
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_: pytest.fail("the network was run"))


@pytest.mark.parametrize("part", ["backbone", "head", "classifiers"])
@pytest.mark.parametrize("labelled", [False, True])
def test_what_does_not_fit_is_said_before_any_image_is_read(colour, trained, pictures, part, labelled, nothing_read):
    def refused(checkpoint, *words):
        with pytest.raises(InputError) as error:
            opened(checkpoint, *words, part=part, labelled=labelled)
        return str(error.value)

    nowhere = pictures / "nowhere"
    assert refused(nowhere) == (
        f"{nowhere}: no such file, and no released model of that name; see python -m src.pretrained list"
    )
    assert (
        refused(pictures) == f"{pictures}: a folder without checkpoint.pt; expected a run folder of train.py, or a file"
    )
    assert refused(colour, "--data", nowhere).startswith(f"--data {nowhere}: no such folder, expected a folder")
    assert (
        refused(colour, "--data", "digits")
        == "--data digits: the images have 1 channels, but the network takes 3: use other images"
    )
    assert (
        refused(trained, "--data", pictures)
        == f"--data {pictures}: the images have 3 channels, but the network takes 1: use other images"
    )
    (pictures / "file").touch()
    assert refused(colour, "--data", pictures, "--output-dir", pictures / "file") == (
        f"--output-dir {pictures / 'file'}: {pictures / 'file'} is a file, expected a folder"
    )
    (pictures / "val").rename(pictures / "old")
    assert "the folder has train, but the test split needs val or test" in refused(colour, "--data", pictures)


def test_labels_and_classes_are_checked_where_they_are_needed(colour, pictures, nothing_read):
    make_pictures(pictures, {"y": (90, 90, 0)}, splits=(("val", 1),), size=(20, 24))
    words = ("--data", pictures)
    with pytest.raises(
        InputError, match="2 classes in the train split, 3 in the test split; not in both: y; list the common"
    ):
        opened(colour, *words, labelled=True)
    assert opened(colour, *words).splits["test"].classes == ["b", "r", "y"]
    flat = pictures / "train" / "b"  # two images without classes, for both splits
    with pytest.raises(
        InputError, match=r"--data .*b: the train split has no labels, but this evaluation needs labels in all splits"
    ):
        opened(colour, "--data", flat, labelled=True)
    assert opened(colour, "--data", flat).splits["test"].labels.tolist() == [-1, -1]
    for name in "bry":
        for file in (pictures / "val" / name).iterdir():
            file.rename(pictures / "val" / f"{name}.png")
        (pictures / "val" / name).rmdir()
    with pytest.raises(
        InputError, match=r"--data .*data: the test split has no labels, but this evaluation needs labels in all splits"
    ):
        opened(colour, *words, labelled=True)


# ---- who uses it ----------------------------------------------------------------------------------------------------

OPENING = {"load_backbone", "load_classifiers", "load_method", "open_split", "build_views", "start", "results_folder"}
ELSEWHERE = {  # the checkpoints of --compare, and the views that a probe is trained on, which are not those of the run
    ("classification", "_open_other", "load_classifiers"),
    ("classification", "_open_other", "build_views"),
    ("linear", "training_views", "build_views"),
}


def calls(path):
    """(module, function, name of what it calls), of all calls in a file."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    yield path.stem, function.name, ast.unparse(node.func).split(".")[-1]


def test_nothing_else_opens_checkpoints_data_views_or_devices():
    files = [path for path in EVALUATION.glob("*.py") if path.stem != "session"]
    found = {call for path in files for call in calls(path)}
    assert {call for call in found if call[2] in OPENING} == ELSEWHERE
    assert {module for module, _, name in found if name == "open_session"} == {"classification", "knn", "linear"}
    in_session = {name for _, _, name in calls(EVALUATION / "session.py")}
    assert in_session >= OPENING


@pytest.mark.parametrize("program", ["cls_eval", "knn_eval", "lincls_eval"])
def test_programs_only_parse_and_run(program):
    tree = ast.parse((EVALUATION.parents[1] / f"{program}.py").read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert [ast.unparse(node.func).split(".")[-1] for node in ast.walk(main) if isinstance(node, ast.Call)] in (
        [f"parse_{program}", "run"],
        ["run", f"parse_{program}"],
    )


PROGRAMS = {
    "cls_eval": ("cls_eval.py", ("--classifier", "0"), "cls_eval"),
    "knn_eval": ("knn_eval.py", ("--k", "5"), "knn_eval"),
    "lincls_eval": ("lincls_eval.py", ("--epochs", "1"), "lincls_eval"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_folder_is_its_checkpoint(trained, tmp_path, program):
    """All three programs, in this process: the folder of a run stands for its checkpoint.pt, and takes the results."""
    _, words, name = PROGRAMS[program]
    run_here(program, "--checkpoint", trained, *words)
    result = read_json(trained, name)
    assert result["checkpoint"] == str(trained)
    run_here(program, "--checkpoint", trained / "checkpoint.pt", *words, "--output-dir", tmp_path)
    same = {**read_json(tmp_path, name), "checkpoint": str(trained)}
    for each in (result, same):
        each.pop("options", None), each.pop("history", None)
    assert result == same


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_starts_as_a_user_starts_it(trained, tmp_path, run_python, program):
    file, words, name = PROGRAMS[program]
    done = run_python(file, "--checkpoint", trained, *words, "--output-dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / f"{name}.json").read_text())["data"] == "digits"
    assert "wrote " in done.stdout


def test_a_checkpoint_without_a_seed_is_evaluated(tmp_path):
    state = checkpoint.load(save_untrained(tmp_path / "run.pt"))
    del state["config"]["seed"]
    torch.save(state, tmp_path / "run.pt")
    assert opened(tmp_path / "run.pt").facts()["seed"] is None
