"""detection/: annotations, metrics, checkpoints, the converter, flags, scripts and documents."""

import ast
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from detecting import run_detection, write_shapes, write_voc
from PIL import Image

from detection import config, metrics
from detection.annotations import check_classes
from detection.checkpoints import read_backbone
from detection.coco import as_coco, as_results, read_coco
from detection.convert import as_detectron2, detectron2_name
from detection.distributed import first_host, read_launch
from detection.errors import InputError, RunError, Stopped, run_program
from detection.transforms import Unreadable, new_size, open_image
from detection.voc import average_precision, overlaps, read_voc, voc_scores

FOLDER = ROOT / "detection"
MODULES = sorted(FOLDER.glob("*.py"))


@pytest.fixture
def shapes(tmp_path):
    return write_shapes(tmp_path / "shapes", images=4)


def edit(shapes: Path, change) -> Path:
    """Change the annotations of a folder of shapes."""
    path = shapes / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


# --------------------------------------------------------------------------------------------------------------------
# COCO's annotations


def test_coco_is_read_and_written_unchanged(shapes):
    path = shapes / "annotations.json"
    content = json.loads(path.read_text())
    found = read_coco(path, shapes / "images", masks=True)
    assert (found.classes, found.category_ids) == (["bird", "boat", "bottle"], [10, 20, 30])
    again = as_coco(found)
    assert again["categories"] == content["categories"]
    assert again["images"] == content["images"]
    assert again["annotations"] == content["annotations"]
    assert not found.problems.counts()


def test_what_cannot_be_used_is_counted_and_named(shapes):
    def change(content):
        first, second, third, fourth, *_ = content["annotations"]
        first["bbox"] = [5, 5, 0, 10]
        second["bbox"] = [200, 5, 10, 10]
        third["category_id"] = 7
        fourth["image_id"] = 99
        content["annotations"].append({"id": 70, "image_id": 1})
        content["annotations"].append({**first, "id": 71, "bbox": [50, 50, 30, 30]})
        content["annotations"].append({**first, "id": 72, "bbox": [1, 1, 9, 9], "segmentation": [[1, 2]]})
        content["images"].append({"id": 80, "file_name": "gone.jpg", "width": 9, "height": 9})
        content["annotations"].append({**first, "id": 73, "image_id": 80})
        content["images"].append({"id": 81})

    found = read_coco(edit(shapes, change), shapes / "images", masks=True)
    assert found.problems.counts() == {
        "images that are missing": 1,
        "entries of images that cannot be read": 1,
        "boxes of zero area": 1,
        "boxes outside their image": 1,
        "annotations of categories that the file does not list": 1,
        "annotations of images that the file does not list": 1,
        "annotations that cannot be read": 1,
        "boxes partly outside their image, which are cut": 1,
        "annotations without a usable segmentation": 1,
        "annotations of images that are missing": 1,
    }
    assert "1 images that are missing: gone.jpg" in list(found.problems.lines())
    assert found.pictures[0].things[-1].box == (50, 50, 64, 64)
    kept = found.for_training()
    assert len(kept.pictures) < len(found.pictures)
    assert kept.problems.counts()["images without objects, which training leaves out"] == 4 - len(kept.pictures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "expected the lists images, annotations, categories"),
        (lambda content: content["categories"].clear(), "bad categories (no categories)"),
        (lambda content: content["categories"].append(content["categories"][0]), "two categories with one id"),
        (lambda content: [entry.update(file_name="no") for entry in content["images"]], "none of its 4 images is in"),
        (lambda content: content["annotations"].clear(), "no image with an object remains"),
    ],
)
def test_annotations_without_anything_to_use_are_refused(shapes, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_coco(edit(shapes, change), shapes / "images", masks=True).for_training()


def test_files_that_are_not_there_or_no_json_are_refused(shapes):
    with pytest.raises(InputError, match="No such file or directory, expected annotations"):
        read_coco(shapes / "no.json", shapes / "images", masks=False)
    with pytest.raises(InputError, match="no such folder, expected the images"):
        read_coco(shapes / "annotations.json", shapes / "no", masks=False)
    (shapes / "bad.json").write_text("[" * 10)
    with pytest.raises(InputError, match="not a JSON file"):
        read_coco(shapes / "bad.json", shapes / "images", masks=False)


def test_a_crowd_is_left_out_in_training_and_kept_in_evaluation(shapes):
    def change(content):
        for entry in content["annotations"]:
            entry["iscrowd"] = int(entry["image_id"] == 1)

    found = read_coco(edit(shapes, change), shapes / "images", masks=False)
    assert [picture.number for picture in found.for_training().pictures] == [2, 3, 4]
    assert sum(entry["iscrowd"] for entry in as_coco(found)["annotations"]) == 2


def test_other_categories_than_the_detectors_are_refused(shapes):
    found = read_coco(shapes / "annotations.json", shapes / "images", masks=False)
    check_classes(found, ["bird", "boat", "bottle"])
    with pytest.raises(
        InputError, match=r"3 categories, expected the 2 of the detector \(missing: cat; not in the detector: boat"
    ):
        check_classes(found, ["bird", "cat"])


def test_the_standard_files_of_coco_must_have_its_categories(shapes, tmp_path):
    folder = tmp_path / "data" / "coco" / "annotations"
    folder.mkdir(parents=True)
    (folder.parent / "train2017").symlink_to(shapes / "images")
    (folder / "instances_train2017.json").write_text((shapes / "annotations.json").read_text())
    with pytest.raises(InputError, match="3 categories, expected the 80 of COCO: name the file with --annotations"):
        run_detection("train", "--data", tmp_path / "data", "--output-dir", tmp_path / "run", "--device", "cpu")


# --------------------------------------------------------------------------------------------------------------------
# COCO's metrics


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("evaluator", ["hotcoco", "faster-coco-eval"])
def test_all_evaluators_agree(shapes, kind, evaluator):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    pytest.importorskip(metrics.PACKAGES[evaluator], reason=f"{evaluator} is not installed")
    from pycocotools import mask as tools

    annotations = read_coco(shapes / "annotations.json", shapes / "images", masks=True)
    generator, found = np.random.default_rng(0), []
    for picture in annotations.pictures:
        one = {"number": picture.number, "boxes": [], "labels": [], "scores": [], "masks": []}
        for thing in picture.things * 2:  # the second time as a duplicate
            x0, y0, x1, y1 = (float(side + generator.normal() * 2) for side in thing.box)
            one["boxes"].append([x0, y0, x1, y1])
            one["labels"].append(thing.label if generator.random() < 0.8 else 1)
            one["scores"].append(float(generator.random()))
            code = tools.frPyObjects([[x0, y0, x1, y0, x1, y1, x0, y1]], 64, 64)[0]
            one["masks"].append({"size": [64, 64], "counts": code["counts"].decode()})
        found.append(one)
    results, truth = as_results(found, annotations), as_coco(annotations)
    expected = metrics.coco_scores(truth, results, kind=kind, evaluator="pycocotools")
    assert 0.1 < expected["ap"] < 0.9
    assert metrics.coco_scores(truth, results, kind=kind, evaluator=evaluator) == pytest.approx(expected, abs=1e-9)


def test_perfect_and_missing_detections(shapes):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from pycocotools import mask as tools

    annotations = read_coco(shapes / "annotations.json", shapes / "images", masks=True)
    dot = tools.frPyObjects([[0, 0, 1, 0, 1, 1, 0, 1]], 64, 64)[0]["counts"].decode()
    found = [
        {
            "number": picture.number,
            "masks": [{"size": [64, 64], "counts": dot} for _ in picture.things],
            "boxes": [list(thing.box) for thing in picture.things],
            "labels": [thing.label for thing in picture.things],
            "scores": [1.0] * len(picture.things),
        }
        for picture in annotations.pictures
    ]
    truth = as_coco(annotations)
    scores = metrics.coco_scores(truth, as_results(found, annotations), kind="bbox", evaluator="pycocotools")
    assert (scores["ap"], scores["ap50"], scores["ap75"]) == pytest.approx((1.0, 1.0, 1.0))
    scores = metrics.coco_scores(truth, as_results(found, annotations), kind="segm", evaluator="pycocotools")
    assert scores["ap"] == 0.0  # the boxes are right, the masks are not
    assert set(metrics.coco_scores(truth, [], kind="bbox", evaluator="pycocotools").values()) == {0.0}


def test_a_missing_evaluator_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install hotcoco"):
        metrics.choose_evaluator("hotcoco")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "pycocotools" or None)
    assert metrics.choose_evaluator("auto") == "pycocotools"


# --------------------------------------------------------------------------------------------------------------------
# VOC


def test_average_precision_by_hand():
    # four objects; the detections are right, wrong, right: recall 1/4, 1/4, 1/2, precision 1, 1/2, 2/3
    recall, precision = np.array([0.25, 0.25, 0.5]), np.array([1.0, 0.5, 2 / 3])
    assert average_precision(recall, precision, rule="area") == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    # recall 0, 0.1, 0.2 have precision 1; 0.3, 0.4, 0.5 have 2/3; the others 0
    assert average_precision(recall, precision, rule="11-point") == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)
    assert average_precision(np.zeros(0), np.zeros(0), rule="11-point") == 0.0
    assert average_precision(np.zeros(0), np.zeros(0), rule="area") == 0.0
    # 3 of 10 objects, all found at once: 0.3 counts, although the point is 0.30000000000000004
    assert average_precision(np.array([0.3]), np.ones(1), rule="11-point") == pytest.approx(4 / 11)


def test_overlap_by_hand():
    assert overlaps(np.array([0, 0, 2, 2]), np.array([[1, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])).tolist() == [
        1 / 7,
        1,
        0,
    ]


def voc_case(shapes, tmp_path, **objects):
    """Return annotations of two pictures whose objects are given as lists of (name, difficult, xmin, ymin, xmax, ymax)."""
    data = write_voc(tmp_path / "data", shapes, train=2)
    for number, things in objects.items():
        text = "<annotation><size><width>64</width><height>64</height></size>"
        for name, difficult, *sides in things:
            box = "".join(
                f"<{tag}>{side}</{tag}>" for tag, side in zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=True)
            )
            text += f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"
        path = data / "VOC2007" / "Annotations" / f"{number.removeprefix('n')}.xml"
        path.write_text(text + "</annotation>")
    return read_voc(data, ["2007_trainval"])


def test_voc_scores_by_hand(shapes, tmp_path):
    annotations = voc_case(
        shapes,
        tmp_path,
        n000001=[("bird", 0, 1, 1, 10, 10), ("bird", 1, 31, 31, 40, 40)],
        n000002=[("bird", 0, 1, 1, 10, 10), ("bottle", 0, 1, 1, 20, 20)],
    )
    assert annotations.pictures[0].things[0].box == (0, 0, 10, 10)
    bird, bottle = (annotations.classes.index(name) + 1 for name in ("bird", "bottle"))
    found = [
        # right; a duplicate, which is wrong; on a difficult object, which does not count
        {
            "number": "000001",
            "boxes": [[0, 0, 10, 10], [0, 0, 10, 9], [30, 30, 40, 40]],
            "labels": [bird] * 3,
            "scores": [0.9, 0.8, 0.7],
        },
        # overlaps by 0.6, which suffices for AP50 but not for AP75
        {"number": "000002", "boxes": [[0, 0, 10, 6], [0, 0, 20, 20]], "labels": [bird, bottle], "scores": [0.6, 0.5]},
    ]
    for rule, birds, tight in (("area", 0.5 + 0.5 * 2 / 3, 0.5), ("11-point", (6 + 5 * 2 / 3) / 11, 6 / 11)):
        scores = voc_scores(annotations, found, rule=rule)
        assert scores["ap50"] == pytest.approx((birds + 1) / 2)
        assert scores["ap75"] == pytest.approx((tight + 1) / 2)
        assert scores["ap"] == pytest.approx((3 * (birds + 1) / 2 + 7 * (tight + 1) / 2) / 10)  # 0.5, 0.55, 0.6


def test_what_of_voc_cannot_be_used_is_counted_and_named(shapes, tmp_path):
    voc_case(shapes, tmp_path, n000001=[("bird", 0, 1, 1, 10, 10), ("unicorn", 0, 1, 1, 5, 5), ("boat", 0, 9, 9, 8, 9)])
    folder = tmp_path / "data" / "VOC2007"
    (folder / "Annotations" / "000002.xml").unlink()
    listing = folder / "ImageSets" / "Main" / "trainval.txt"
    listing.write_text("000001  1\n000002 -1\n000009 -1\n\n")
    found = read_voc(tmp_path / "data", ["2007_trainval"])
    assert found.problems.counts() == {
        "objects of classes that VOC does not have": 1,
        "boxes of zero area": 1,
        "images without annotation": 1,
        "images that are missing": 1,
    }
    assert "unicorn (object 2 of 000001.xml)" in "".join(found.problems.lines())
    (folder / "Annotations" / "000001.xml").write_text("<annotation>")
    with pytest.raises(InputError, match="no image with annotations remains"):
        read_voc(tmp_path / "data", ["2007_trainval"])
    with pytest.raises(InputError, match="expected the list of 2012_test: correct --data or --sets"):
        read_voc(tmp_path / "data", ["2012_test"])


# --------------------------------------------------------------------------------------------------------------------
# images


def test_the_annotated_size_decides_about_rotation(shapes):
    picture = read_coco(shapes / "annotations.json", shapes / "images", masks=False).pictures[0]
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 5, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # to be rotated by a quarter clockwise
    image.save(picture.file, exif=exif, quality=95)
    picture.width, picture.height = 10, 20
    rotated = open_image(picture)
    assert rotated.size == (10, 20)
    assert rotated.getpixel((5, 1))[2] > 200  # the left end is now at the top
    picture.width, picture.height = 20, 10
    assert open_image(picture).getpixel((1, 5))[2] > 200
    square = Image.new("RGB", (20, 20), "red")
    square.paste("blue", (0, 0, 5, 20))
    square.save(picture.file, exif=exif, quality=95)
    picture.width, picture.height = 20, 20  # the size does not tell
    assert open_image(picture).getpixel((10, 1))[2] > 200
    picture.width = 30
    with pytest.raises(Unreadable, match=r"20 x 20, annotated as 30 x 20"):
        open_image(picture)
    picture.file.write_bytes(b"no image")
    with pytest.raises(Unreadable, match=picture.file.name):
        open_image(picture)


def test_new_sizes_by_hand():
    assert new_size(640, 480, shorter=800, longer=1333) == (1067, 800)
    assert new_size(1000, 250, shorter=800, longer=1333) == (1333, 333)


# --------------------------------------------------------------------------------------------------------------------
# checkpoints and the converter


@cache
def resnet(depth: int = 50) -> dict[str, torch.Tensor]:
    import torchvision

    state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("source", ["authors", "swav", "moco", "export", "dino"])
def test_backbones_of_all_sources_are_read(tmp_path, source, monkeypatch):
    state, path = resnet(), tmp_path / "file.pt"
    if source == "authors":  # with their queue, an object of a class that this project does not have
        queue = type("NNQueue", (), {"__module__": "utils"})()
        queue.ptr = 3
        monkeypatch.setitem(sys.modules, "utils", type(sys)("utils"))
        sys.modules["utils"].NNQueue = type(queue)
        type(queue).__qualname__ = "NNQueue"
        weights = {f"module.backbone.{name}": value for name, value in state.items()} | {
            "module.cls_0.weight_g": torch.ones(2)
        }
        torch.save({"state_dict": weights, "nn_queue": queue, "best_loss": np.float64(1.5)}, path)
    elif source == "swav":
        torch.save(
            {f"module.{name}": value for name, value in state.items()} | {"module.prototypes.weight": torch.ones(2)},
            path,
        )
    elif source == "moco":
        torch.save({"state_dict": {f"module.encoder_q.{name}": value for name, value in state.items()}}, path)
    elif source == "dino":
        torch.save({"teacher": {f"module.backbone.{name}": value for name, value in state.items()}}, path)
    else:
        torch.save(state, path)
    found = read_backbone(str(path))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_files_that_are_no_resnet50_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(content, message):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(InputError, match=message):
            read_backbone("file.pt")

    refused(resnet(18), "not a ResNet-50 .*tensors missing: layer1.0.conv3.weight, .*tensors of another shape")
    refused({**resnet(), "layer3.6.conv1.weight": torch.ones(1)}, "not a ResNet-50 .*unexpected: layer3.6.conv1.weight")
    refused({"weight": torch.ones(2)}, "no ResNet-50 found, it holds weight")
    refused([1, 2], "no ResNet-50 found, it holds no tensors")
    refused({"model": Hostile()}, "would execute code")
    assert not (tmp_path / "pwned").exists()
    (tmp_path / "file.pt").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(InputError, match=r"damaged|not a file of tensors"):
        read_backbone("file.pt")
    with pytest.raises(InputError, match=r"checkpoint no\.pt: no such file"):
        read_backbone("no.pt")


def names_of_the_sheet() -> set[str]:
    """Return detectron2's names for a ResNet-50, written from the structure of the network."""

    def block(start: str, convolutions: list[tuple[str, str]]) -> set[str]:
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        names = {f"{start}{name}.weight" for name, _ in convolutions}
        return names | {f"{start}{inner}.{part}" for _, inner in convolutions for part in norm}

    names = block("stem.", [("conv1", "conv1.norm")])
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for place in range(blocks):
            convolutions = [(f"conv{n}", f"conv{n}.norm") for n in (1, 2, 3)]
            convolutions += [("shortcut", "shortcut.norm")] if place == 0 else []
            names |= block(f"res{stage}.{place}.", convolutions)
    return names


def test_the_converter_follows_the_published_rules(tmp_path):
    state = resnet()
    converted = as_detectron2(state)
    assert converted["model"].keys() == names_of_the_sheet()
    assert len(converted["model"]) == len(state) == 318
    assert (converted["__author__"], converted["matching_heuristics"]) == ("SC", True)
    assert detectron2_name("bn1.weight") == "stem.conv1.norm.weight"
    assert detectron2_name("layer4.0.downsample.1.bias") == "res5.0.shortcut.norm.bias"
    torch.save(state, tmp_path / "model.pt")
    run_detection("convert", tmp_path / "model.pt", tmp_path / "model.pkl")
    written = pickle.loads((tmp_path / "model.pkl").read_bytes())
    assert all(np.array_equal(written["model"][detectron2_name(name)], state[name].numpy()) for name in state)
    with pytest.raises(InputError, match=r"model.pkl exists already"):
        run_detection("convert", tmp_path / "model.pt", tmp_path / "model.pkl")
    with pytest.raises(InputError, match=r"ends in \.pkl"):
        run_detection("convert", tmp_path / "model.pt", tmp_path / "model.bin")


# --------------------------------------------------------------------------------------------------------------------
# flags, start, errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset swav", "no recipe for --dataset coco: use --dataset voc"),
        ("--dataset voc --annotations a --images b", "--annotations and --images are for --dataset coco"),
        ("--annotations a", "belong together"),
        ("--dataset voc --masks", "the annotations of VOC have no masks"),
        ("--batch-size 0", "--batch-size is 0, expected at least 1"),
        ("--lr nan", "--lr is nan, expected a positive number"),
        ("--min-size 4", "--min-size has 4, expected at least 8 pixels"),
        ("--architecture fpn --anchor-sizes 32", "expected 5, one for each level of FPN"),
        ("--layers 3", "unrecognized arguments: --layers 3"),
    ],
)
def test_wrong_flags_are_refused(words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        config.parse_train(words.split())


def test_the_recipes_are_the_published_ones():
    coco, voc = config.parse_train([]), config.parse_train(["--dataset", "voc"])
    shared = {
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "gamma": 0.1,
        "warmup_factor": 0.001,
        "max_size": 1333,
        "test_size": 800,
    }
    shared |= {
        "rpn_batch": 256,
        "roi_batch": 512,
        "roi_size": 14,
        "precise_bn": 200,
        "batch_size": 32,
        "architecture": "c4",
    }
    shared |= {"pre_nms_test": 6000, "post_nms_test": 1000}
    assert shared.items() <= coco.items()
    assert shared.items() <= voc.items()
    assert (coco["lr"], coco["steps"], coco["decay_steps"]) == (0.1, 180_000, [120_000, 160_000])
    assert (voc["lr"], voc["steps"], voc["decay_steps"]) == (0.15, 24_000, [18_000, 22_000])
    assert (coco["warmup_steps"], voc["warmup_steps"]) == (1000, 100)
    assert coco["min_size"] == [640, 672, 704, 736, 768, 800]
    assert voc["min_size"] == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert coco["masks"]
    assert not voc["masks"]
    supervised = config.parse_train(["--preset", "supervised"])
    assert (supervised["batch_size"], supervised["lr"]) == (16, 0.02)
    assert config.parse_train(["--dataset", "voc", "--steps", "240"])["decay_steps"] == [180, 220]


def test_both_launchers_are_understood():
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    launch = read_launch(torchrun)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.address, launch.port) == (1, 2, 1, "host", 29500)
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "7777",
        "SLURM_STEP_ID": "1",
    }
    launch = read_launch({**slurm, "SLURM_STEP_NODELIST": "gpu[007-010,12]"})
    assert (launch.rank, launch.local_rank, launch.address, launch.port) == (3, 1, "gpu007", 24433)
    assert first_host("a1,b2") == "a1"
    assert read_launch({}) is None
    for environ, message in (
        ({"RANK": "0"}, "RANK set but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"),
        ({**torchrun, "RANK": "x"}, "RANK is 'x', expected a number"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}, "start it with srun"),
    ):
        with pytest.raises(InputError, match=message):
            read_launch(environ)


def test_before_the_ranks_meet_only_one_of_them_speaks(monkeypatch, capsys):
    def main():
        raise InputError("wrong")

    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            run_program(main)
        assert capsys.readouterr().err.count("\n") == lines


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a\nb"), 2, "error: a b"),
        (Stopped(15), 143, "error: stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (
            OSError(28, "No space left on device", "f"),
            1,
            "error: f cannot be written (No space left on device): free some",
        ),
        (
            RunError("Caught RunError in worker.\nTraceback:\n  x\ndetection.errors.RunError: ten images"),
            1,
            "error: ten images",
        ),
        (RuntimeError("CUDA out of memory"), 1, "there is not enough memory: use a smaller --batch-size"),
    ],
)
def test_failures_are_one_line(error, status, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_program(main)
    assert end.value.code == status
    text = capsys.readouterr().err
    assert line in text
    assert text.count("\n") == 1


def test_programs_start_from_any_folder_and_without_torch_for_help(tmp_path):
    for name, words in (("train", ["--dry-run"]), ("evaluate", ["--help"]), ("convert", ["no.pt", "x.pkl"])):
        traced = ["-X", "importtime"] if name != "convert" else []
        command = [sys.executable, *traced, str(FOLDER / f"{name}.py"), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == (2 if name == "convert" else 0), done.stderr[-2000:]
        if name == "convert":
            assert done.stderr == "convert.py: error: checkpoint no.pt: no such file\n"
        else:
            assert "torch" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_detectron2_is_named_where_it_is_missing():
    done = subprocess.run([sys.executable, FOLDER / "train_detectron2.py"], capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        pytest.skip("detectron2 is installed")
    assert done.returncode == 2
    assert "detectron2 is not installed: install it, or use detection/train.py" in done.stderr


# --------------------------------------------------------------------------------------------------------------------
# scripts, configurations, documents

SCRIPTS = {path.name: path for path in sorted(FOLDER.glob("*.sh"))}
PUBLISHED = {
    "coco": "published: box AP 41.5, AP50 61.3, AP75 45.0; mask AP 36.1, AP50 58.1, AP75 38.7   ours: not run",
    "pascal": "published: AP 56.6, AP50 82.4, AP75 62.6   ours: not run",
}


@pytest.mark.parametrize("name", ["train_coco", "train_pascal", "eval_coco", "eval_pascal"])
def test_scripts_ask_for_the_published_resources_and_parse(name):
    path = SCRIPTS[f"{name}.sh"]
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    kind, data = name.split("_")
    nodes, limit = (2, "0:20:00") if kind == "eval" else (4, {"coco": "48:00:00", "pascal": "6:00:00"}[data])
    for wanted in (f"--job-name=sc_800ep_{data}_{kind}", f"--nodes={nodes} ", "--gpus-per-node=4", "--cpus-per-gpu=16"):
        assert wanted in text
    assert f"--time={limit}\n" in text
    assert PUBLISHED[data] in text
    command = re.search(r"launch python detection/(\w+)\.py (.*)", text.replace("\\\n", " "))
    words = [word for word in shlex.split(command[2].replace("$SEED", "0")) if word != "$@"]
    options = {"train": config.parse_train, "evaluate": config.parse_evaluate}[command[1]](words)
    if kind == "train":
        assert options["dataset"] == {"coco": "coco", "pascal": "voc"}[data]
        assert options["preset"] == "self_classifier"


def test_a_script_says_which_data_it_wants(tmp_path):
    done = subprocess.run(
        ["bash", SCRIPTS["train_pascal.sh"]], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "DATASET_PATH is not set: export DATASET_PATH=the folder that holds VOC2007/ and VOC2012/" in done.stderr


def settings(name: str) -> dict[str, str]:
    """Return the lines of one of detectron2's configurations and of those that it names as _BASE_: {key: text}."""
    found: dict[str, str] = {}
    path: list[str] = []
    for line in (FOLDER / "configs" / name).read_text().splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        key, _, value = line.strip().partition(":")
        path = [*path[:depth], key]
        if value:
            found[".".join(path)] = value.strip()
    base = found.pop("_BASE_", "")
    return {**(settings(base) if base else {}), **found}


def test_the_configurations_have_the_published_values():
    base = {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.RPN.PRE_NMS_TOPK_TEST": "6000",
        "MODEL.RPN.POST_NMS_TOPK_TEST": "1000",
        "MODEL.BACKBONE.FREEZE_AT": "0",
        "MODEL.RESNETS.NORM": "SyncBN",
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
        "TEST.PRECISE_BN.ENABLED": "true",
        "INPUT.MIN_SIZE_TEST": "800",
    }
    coco = {"MODEL.MASK_ON": "true", "SOLVER.STEPS": "(120000, 160000)", "SOLVER.MAX_ITER": "180000"}
    coco |= {"INPUT.MIN_SIZE_TRAIN": "(640, 672, 704, 736, 768, 800)", "DATASETS.TRAIN": '("coco_2017_train",)'}
    voc = {"MODEL.MASK_ON": "false", "SOLVER.STEPS": "(18000, 22000)", "SOLVER.MAX_ITER": "24000"}
    voc |= {"SOLVER.WARMUP_ITERS": "100", "MODEL.ROI_HEADS.NUM_CLASSES": "20", "DATASETS.TEST": '("voc_2007_test",)'}
    ours = {"INPUT.FORMAT": "RGB", "MODEL.RESNETS.STRIDE_IN_1X1": "false", "SOLVER.IMS_PER_BATCH": "32"}
    ours |= {"MODEL.PIXEL_MEAN": "[123.675, 116.280, 103.530]", "MODEL.PIXEL_STD": "[58.395, 57.120, 57.375]"}
    theirs = {"SOLVER.IMS_PER_BATCH": "16", "SOLVER.BASE_LR": "0.02"}
    theirs |= {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl"}
    for name, data, rate in (("coco_R_50_C4_2x", coco, "0.1"), ("pascal_voc_R_50_C4_24k", voc, "0.15")):
        assert {**base, **data, **theirs}.items() <= settings(f"{name}.yaml").items()
        assert {**base, **data, **ours, "SOLVER.BASE_LR": rate}.items() <= settings(f"{name}_ssc.yaml").items()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_are_short_and_do_not_import_src(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    assert len(source.splitlines()) <= 500
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(alias.name.partition(".")[0] != "src" for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] != "src"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 < 80, node.name


def test_the_documented_commands_are_understood():
    text = (FOLDER / "README.md").read_text()
    commands = re.findall(r"python detection/(train|evaluate|convert)\.py ([^#\n]*)", text.replace("\\\n", " "))
    assert len(commands) >= 5
    for name, words in commands:
        getattr(config, f"parse_{name}")(shlex.split(words))
    for published in ("41.5", "61.3", "45.0", "36.1", "58.1", "38.7", "56.6", "82.4", "62.6", "38.2", "33.3", "53.5"):
        assert published in text
