"""Superclasses of ImageNet: counts of BREEDS, a small hierarchy by hand, both protocols, the files on their way."""

import hashlib
import json
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

import cls_eval
from src import config, downloads
from src.config import SUPERCLASSES, parse_cls_eval
from src.data import imagenet
from src.errors import InputError, RunError
from src.evaluation.clustering import score_superclasses

PUBLISHED = GOLDEN.parent / "data" / "imagenet_info"
needs_files = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the hierarchy's files are not beside the repository")


@needs_files
@pytest.mark.parametrize("choice", SUPERCLASSES)
def test_counts_of_breeds(choice):
    expected = json.loads((GOLDEN / "breeds_counts.json").read_text())[choice]
    found = imagenet.superclasses(choice, PUBLISHED)
    sizes = Counter(found.of_class.values())
    assert len(found.names) == len(sizes) == expected["superclasses"]
    assert len(found.of_class) == expected["classes_covered"]
    # numbered in the order of the ids
    by_id = expected["members_by_superclass"]
    assert [sizes[i] for i in range(len(sizes))] == [by_id[node] for node in sorted(by_id)]
    assert sum(size == 1 for size in sizes.values()) == expected["superclasses_with_one_member"]


@needs_files
def test_published_names_and_members():
    found = imagenet.superclasses("living17", PUBLISHED)
    dogs = next(i for i, name in enumerate(found.names) if name.startswith("dog"))
    assert sum(position == dogs for position in found.of_class.values()) == 118
    assert found.of_class["n02099712"] == dogs  # Labrador retriever
    assert "n03110669" not in found.of_class  # cornet, an instrument


# ---- by hand --------------------------------------------------------------------------------------------------------

# root > n00021939 > a > {x > n1, n2}; n00004258 > n3; n1 is also right below a: its level is that of the longest way
EDGES = """n00001740 n00021939
n00001740 n00004258
n00021939 a
a x
a n00000001
x n00000001
x n00000002
n00004258 n00000003
n00004258 nobody
"""
CLASSES = ["n00000001", "n00000002", "n00000003", "n00000004"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A hierarchy of three classes; a fourth is not in it."""
    folder = tmp_path / "info"
    folder.mkdir()
    (folder / "class_hierarchy.txt").write_text(EDGES)
    (folder / "dataset_class_info.json").write_text(json.dumps([[i, name, "?"] for i, name in enumerate(CLASSES)]))
    (folder / "node_names.txt").write_text("x\tthe x\na\tthe a\n")
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(imagenet, "FILES", sums)
    return folder


def test_levels_are_those_of_the_longest_way(small):
    found = {level: imagenet.superclasses(level, small) for level in "123456"}
    assert (found["1"].names, found["1"].of_class) == (
        ["n00004258", "n00021939"],
        {"n00000001": 1, "n00000002": 1, "n00000003": 0},
    )
    assert (found["2"].names, found["2"].of_class) == (
        ["the a", "n00000003"],
        {"n00000001": 0, "n00000002": 0, "n00000003": 1},
    )
    assert (found["3"].names, found["3"].of_class) == (["the x"], {"n00000001": 0, "n00000002": 0})
    assert (found["4"].names, found["4"].of_class) == (CLASSES[:2], {"n00000001": 0, "n00000002": 1})
    assert found["5"].names == []


def test_sets_are_below_a_node_and_not_too_small(small, monkeypatch):
    monkeypatch.setitem(imagenet.SETS, "entity13", (1, imagenet.ROOT, 2))
    monkeypatch.setitem(imagenet.SETS, "living17", (2, imagenet.LIVING, 1))
    assert imagenet.superclasses("entity13", small).of_class == {"n00000001": 0, "n00000002": 0}
    assert imagenet.superclasses("living17", small).of_class == {"n00000003": 0}


def test_classes_that_cannot_have_a_superclass(small):
    mapping, names = imagenet.class_to_superclass("2", ["n00000003", "n00000004", "n00000002"], small)
    assert (mapping, len(names)) == ({0: 1, 2: 0}, 2)
    with pytest.raises(
        InputError, match=r"--superclass 2: 2 of the 3 class names are not WordNet ids, such as cat,.*: drop the flag"
    ):
        imagenet.class_to_superclass("2", ["n00000003", "cat", "n123"], small)
    with pytest.raises(InputError, match="the data set has no classes"):
        imagenet.class_to_superclass("2", [], small)
    with pytest.raises(InputError, match="none of the 1 classes belongs"):
        imagenet.class_to_superclass("2", ["n00000004"], small)


def test_two_protocols_by_hand():
    # classes 0, 1 → superclass 0; 2, 3 → superclass 1; 4 → none. Clusters 0 and 1 are matched with classes 0 and 2, cluster
    # 2 is left over: its majority class is 1. Cluster 3 holds what does not count, cluster 4 class 3.
    labels = np.array([0, 0, 1, 2, 2, 0, 1, 1, 0, 4, 4, -1, 3])
    clusters = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 0, 0, 4])
    found = score_superclasses(labels, clusters, {0: 0, 1: 0, 2: 1, 3: 1})
    assert found["published"]["acc"] == 9 / 10  # all but the image of class 0 in cluster 1
    assert found["throughout"]["acc"] == 9 / 10
    from sklearn.metrics import adjusted_mutual_info_score as ami
    from sklearn.metrics import adjusted_rand_score as ari

    kept = np.isin(labels, [0, 1, 2, 3])
    assert found["published"]["ami"] == pytest.approx(ami(labels[kept], clusters[kept]))
    assert found["throughout"]["ami"] == pytest.approx(ami(labels[kept] // 2, clusters[kept]))
    assert found["throughout"]["ari"] == pytest.approx(ari(labels[kept] // 2, clusters[kept]))


def test_the_protocols_differ_where_the_matching_does():
    # Cluster 0 holds three images of class 2 and two each of classes 0 and 1: class 2 by classes, superclass 0 by superclasses.
    labels = np.array([2, 2, 2, 0, 0, 1, 1, 2, 2])
    clusters = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1])
    found = score_superclasses(labels, clusters, {0: 0, 1: 0, 2: 1})
    # by classes: 0 → 2 and 1 → another (3), or 0 → 0 or 1 and 1 → 2 (2 + 2 = 4), which is the best
    assert found["published"]["acc"] == found["throughout"]["acc"] == 6 / 9
    labels[3:7] = [0, 1, 3, 4]
    found = score_superclasses(labels[:7], clusters[:7], {0: 0, 1: 0, 2: 1, 3: 0, 4: 0})
    assert (found["published"]["acc"], found["throughout"]["acc"]) == (3 / 7, 4 / 7)


# ---- the files ------------------------------------------------------------------------------------------------------


def test_a_missing_or_other_file_is_named(small):
    (small / "node_names.txt").write_text("other\n")
    with pytest.raises(
        InputError, match=r"--hierarchy: .*node_names.txt is not the published file: .* expected [0-9a-f]{12}"
    ):
        imagenet.superclasses("2", small)
    (small / "node_names.txt").unlink()
    with pytest.raises(
        InputError, match=r"node_names.txt is missing: run python -m src.data.imagenet get .*info to download it"
    ):
        imagenet.superclasses("2", small)


def test_get_fetches_what_is_missing_and_checks_it(small, tmp_path, monkeypatch):
    asked = []

    def download(url, target, sha256):
        asked.append(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(small / target.name, target)
        if downloads.digest(target) != sha256:
            raise RunError("another file")

    monkeypatch.setattr(downloads, "download", download)
    monkeypatch.setenv("SELF_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    paths = imagenet.get()
    assert paths == [tmp_path / "cache" / "imagenet_info" / name for name in imagenet.FILES]
    assert asked == [imagenet.SOURCE + name for name in imagenet.FILES]
    assert imagenet.superclasses("3").names == ["the x"]
    paths[1].unlink()
    monkeypatch.setattr(sys, "argv", ["imagenet.py", "get", str(paths[0].parent)])
    imagenet.main()
    assert len(asked) == 4
    paths[1].write_text("damaged")
    with pytest.raises(InputError, match="is not the published file"):
        imagenet.get()


def test_what_is_published_is_asked_for():
    assert imagenet.SOURCE.endswith("/MadryLab/BREEDS-Benchmarks/master/imagenet_class_hierarchy/modified/")
    assert len(imagenet.FILES) == 3
    if PUBLISHED.is_dir():
        assert imagenet.check(PUBLISHED) == PUBLISHED


def test_the_program_says_in_one_line_what_is_wrong(run_python, tmp_path):
    done = run_python("-X", "importtime", "-m", "src.data.imagenet", "--help", SELF_CLASSIFIER_CACHE=str(tmp_path))
    assert done.returncode == 0
    assert " torch\n" not in done.stderr
    (tmp_path / "class_hierarchy.txt").write_text("")
    for name in imagenet.FILES:
        (tmp_path / name).write_text("")
    done = run_python("-m", "src.data.imagenet", "get", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# ---- cls_eval.py ----------------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path):
    """A released backbone and four class folders of one colour each."""
    from torchvision import models

    torch.manual_seed(0)
    state = {f"module.encoder_q.{name}": value for name, value in models.resnet18().state_dict().items()}
    torch.save({"epoch": 7, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth.tar")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in zip(CLASSES, ((250, 0, 0), (180, 90, 0), (0, 0, 250), (0, 250, 0)), strict=True):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 6, (40, 40, 3)) + colour
                Image.fromarray(pixels.clip(max=255).astype(np.uint8)).save(place / f"{i}.png")
    return ["--checkpoint", tmp_path / "moco.pth.tar", "--data", tmp_path / "data", "--workers", "0", "--kmeans", "4"]


def test_cls_eval_prints_and_writes_both_protocols(released, small, tmp_path, monkeypatch, capsys):
    words = [*released, "--superclass", "2", "4", "--hierarchy", small, "--output-dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["cls_eval.py", *map(str, words)])
    cls_eval.main()
    result = json.loads((tmp_path / "out" / "cls_eval.json").read_text())
    printed = capsys.readouterr().out
    assert result["acc"] == 1
    two, four = result["superclass"]["2"], result["superclass"]["4"]
    assert (two["superclasses"], two["classes"], two["images"]) == (2, 3, 9)
    assert (four["superclasses"], four["classes"], four["images"]) == (2, 2, 6)
    assert two["published"] == {"acc": 1, "nmi": 1, "ami": 1, "ari": 1}
    # three clusters of three images each, of which two make one superclass: 9 pairs together, 18 in the superclasses, of 36
    assert two["throughout"]["acc"] == 1
    assert two["throughout"]["ari"] == pytest.approx((9 - 18 * 9 / 36) / ((18 + 9) / 2 - 18 * 9 / 36))
    assert re.search(r"^level 2, published +2 +3 +9 +100.0 +100.0 +100.0 +100.0$", printed, flags=re.MULTILINE)
    assert re.search(r"^level 2, throughout +2 +3 +9 +100.0 ", printed, flags=re.MULTILINE)


def test_cls_eval_refuses_before_any_work(released, small, tmp_path, monkeypatch):
    monkeypatch.setattr("src.features._run", lambda *_, **__: pytest.fail("the network was run"))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["cls_eval.py", *map(str, (*released, *words))])
        cls_eval.main()

    with pytest.raises(InputError, match=r"--hierarchy: .*[a-z_]+.[a-z]+ is missing"):
        run("--superclass", "2", "--hierarchy", tmp_path)
    (tmp_path / "data" / "val" / "n00000003").rename(tmp_path / "data" / "val" / "ship")
    (tmp_path / "data" / "train" / "n00000003").rename(tmp_path / "data" / "train" / "ship")
    with pytest.raises(InputError, match="1 of the 4 class names are not WordNet ids, such as ship"):
        run("--superclass", "2", "--hierarchy", small)
    for split in ("train", "val"):
        (tmp_path / "data" / split / "ship").rename(tmp_path / "data" / split / "n00000003")
    for name in CLASSES[:2]:
        shutil.rmtree(tmp_path / "data" / "val" / name)
    with pytest.raises(InputError, match="--superclass 4: no image of the test split belongs to one"):
        run("--superclass", "4", "--hierarchy", small)


def test_wrong_flags():
    with pytest.raises(InputError, match=r"--superclass 7: expected some of 2, 3, .*nonliving26"):
        parse_cls_eval(["--checkpoint", "x", "--superclass", "2", "7"])
    with pytest.raises(InputError, match="--hierarchy is for superclasses"):
        parse_cls_eval(["--checkpoint", "x", "--hierarchy", "y"])
    assert set(config.SUPERCLASSES) - set("23456") == set(imagenet.SETS)
