"""detection/: the detectors, their training, and what of it depends neither on ranks nor on restarts."""

import json
import math
import signal
import zipfile

import pytest
import torch
from conftest import ROOT
from detecting import SMALL, paste_shapes, run_detection, write_shapes, write_voc
from processes import finish_ranks, run_words, start_ranks
from torch import nn

pytest.importorskip("pycocotools", reason="pycocotools is not installed: it decodes masks")

from detection.checkpoints import read_backbone
from detection.data import Stream, TrainingPictures, seed_of
from detection.errors import InputError, RunError, Stopped
from detection.heads import Anchors, SeededSampler, box_losses, crop_masks, mask_loss
from detection.models import C4Pool, ModelOptions, backbone_tensors, build_detector
from detection.normalization import update_statistics
from detection.schedule import build_optimizer, learning_rate
from detection.trainer import Trainer


def options_of(architecture: str = "c4", **changes) -> ModelOptions:
    sizes = (16, 32, 48) if architecture == "c4" else (16, 24, 32, 48, 64)
    small = {"rpn_batch": 16, "roi_batch": 8, "pre_nms": 50, "post_nms": 16, "pre_nms_test": 50, "post_nms_test": 16}
    chosen = {"architecture": architecture, "classes": 3, "masks": True, "anchor_sizes": sizes, "roi_size": 4, **small}
    return ModelOptions(**{**chosen, **changes})


def example(width: int, height: int, *, boxes=((8, 8, 30, 30),), seed: int = 0):
    """Return an image of noise and a target with boxes that are also masks."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "masks": masks}
    target |= {"labels": torch.ones(len(boxes), dtype=torch.int64), "seed": torch.tensor(seed)}
    return image, target


# --------------------------------------------------------------------------------------------------------------------
# C4 against loops


def test_anchors_equal_loops():
    anchors = Anchors(((32, 64),), (0.5, 1.0, 2.0), strides=(16,))
    images = type("Images", (), {"image_sizes": [(48, 32)]})()
    (found,) = anchors(images, [torch.zeros(1, 1, 3, 2)])
    expected = []
    for row in range(3):
        for column in range(2):
            for ratio in (0.5, 1.0, 2.0):
                for side in (32, 64):
                    width = math.sqrt(side * side / ratio)
                    height = ratio * width
                    x, y = 16 * column, 16 * row
                    expected.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    torch.testing.assert_close(found, torch.tensor(expected))


def sample(plane, y: float, x: float) -> float:
    """Return the value between the pixels of a plane, as RoIAlign defines it."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = max(y, 0.0), max(x, 0.0)
    low_y, low_x = min(int(y), height - 1), min(int(x), width - 1)
    high_y, high_x = min(low_y + 1, height - 1), min(low_x + 1, width - 1)
    dy, dx = (y - low_y if low_y < height - 1 else 0.0), (x - low_x if low_x < width - 1 else 0.0)
    top = plane[low_y, low_x] * (1 - dx) + plane[low_y, high_x] * dx
    bottom = plane[high_y, low_x] * (1 - dx) + plane[high_y, high_x] * dx
    return float(top * (1 - dy) + bottom * dy)


def test_pooling_equals_loops():
    features = torch.randn(2, 1, 5, 6)
    boxes = [torch.tensor([[3.0, 5.0, 70.0, 61.0]]), torch.tensor([[40.0, 2.0, 95.0, 33.0]])]
    found = C4Pool(3)({"0": features}, boxes, [(80, 96)] * 2)
    for place, box in enumerate(boxes):
        x0, y0, x1, y1 = (float(side) / 16 - 0.5 for side in box[0])
        rows, columns = math.ceil((y1 - y0) / 3), math.ceil((x1 - x0) / 3)
        for row in range(3):
            for column in range(3):
                total = 0.0
                for i in range(rows):
                    for j in range(columns):
                        y = y0 + (y1 - y0) / 3 * (row + (i + 0.5) / rows)
                        x = x0 + (x1 - x0) / 3 * (column + (j + 0.5) / columns)
                        total += sample(features[place, 0].double(), y, x)
                assert found[place, 0, row, column].item() == pytest.approx(total / rows / columns, abs=1e-5)


def test_the_published_head_has_the_published_shapes():
    model = build_detector(options_of(roi_size=14), None).eval()
    shapes = {}
    for name, layer in (("layer4", model.heads.shared.layer4), ("mask", model.heads.mask_predictor)):
        layer.register_forward_hook(lambda _, given, got, name=name: shapes.update({name: (given[0].shape, got.shape)}))
    with torch.no_grad():
        features = model.backbone(torch.zeros(1, 3, 64, 48))
        assert features["0"].shape == (1, 1024, 4, 3)
        pooled = model.heads.pool(features, [torch.tensor([[0.0, 0.0, 20.0, 30.0]])], [(64, 48)])
        model.heads.mask_predictor(pooled)
    assert shapes["layer4"] == ((1, 1024, 14, 14), (1, 2048, 7, 7))
    assert shapes["mask"] == ((1, 2048, 7, 7), (1, 4, 14, 14))
    norm = model.heads.shared.norm
    torch.testing.assert_close(pooled.mean((2, 3)).shape, torch.Size([1, 2048]))
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 2048


@pytest.mark.parametrize("architecture", ["c4", "fpn"])
def test_images_of_different_sizes_and_without_objects(architecture):
    model = build_detector(options_of(architecture), None)
    three = [example(64, 48), example(32, 64, boxes=(), seed=1), example(48, 48, seed=2)]
    for batch in (three[:1], three, three[1:2]):
        images, targets = zip(*batch, strict=True)
        losses = model(list(images), list(targets))
        assert len(losses) == 5
        assert all(torch.isfinite(loss) for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()  # of the image without objects
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses["loss_mask"].item() == losses["loss_box_reg"].item() == 0.0
    with torch.no_grad():
        found = model.eval()([image for image, _ in three])
    assert [one["boxes"].shape[1] for one in found] == [4] * 3
    for one, (image, _) in zip(found, three, strict=True):
        assert (one["boxes"] <= torch.tensor([image.shape[2], image.shape[1]] * 2)).all()
        assert one["masks"].shape[1:] == ((1, 4, 4) if architecture == "c4" else (1, 28, 28))


def test_faster_rcnn_has_no_masks():
    model = build_detector(options_of(masks=False), None)
    image, target = example(48, 48)
    del target["masks"]
    assert set(model([image], [target])) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}


# --------------------------------------------------------------------------------------------------------------------
# weights


@pytest.mark.parametrize("architecture", ["c4", "fpn"])
def test_every_tensor_of_the_backbone_is_in_the_detector(architecture):
    from torchvision.models import resnet50

    network = resnet50()
    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    for tensor in weights.values():  # also the statistics differ from those of a new network
        tensor += torch.rand_like(tensor) if tensor.is_floating_point() else 3
    model = build_detector(options_of(architecture), weights)
    found = backbone_tensors(model)
    assert len(weights) == 318
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# losses, sampling, normalisation, schedule


def test_box_losses_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    regression = torch.zeros(2, 12)
    regression[0, 8:12] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # class 2
    deltas = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    losses = box_losses(logits, regression, labels=torch.tensor([2, 0]), deltas=deltas)
    assert losses["loss_classifier"].item() == pytest.approx(math.log(3))
    assert losses["loss_box_reg"].item() == pytest.approx(10 / 2)  # the background has no box


def test_mask_loss_by_hand():
    logits = torch.zeros(2, 3, 2, 2)
    logits[0, 1] = 50.0
    wanted = torch.ones(2, 2, 2)
    loss = mask_loss(logits, torch.tensor([1, 2]), wanted)
    assert loss.item() == pytest.approx(math.log(2) / 2)  # the first mask is right, the second undecided


def test_cropped_masks_show_the_part_inside_the_box():
    mask = torch.zeros(1, 8, 8)
    mask[0, :, 4:] = 1
    cropped = crop_masks(mask, torch.tensor([[2.0, 0.0, 6.0, 4.0]]), objects=torch.tensor([0]), size=2)
    assert cropped.tolist() == [[[0.0, 1.0], [0.0, 1.0]]]


def test_the_sample_of_an_image_depends_on_its_seed_alone():
    labels = torch.cat((torch.ones(20), torch.zeros(80), -torch.ones(10)))
    sampler = SeededSampler(16, 0.25)
    sampler.seeds = [5, 6]
    positive, negative = sampler([labels, labels])
    assert [int(mask.sum()) for mask in positive + negative] == [4, 4, 12, 12]
    assert (labels[positive[0]] == 1).all()
    assert (labels[negative[0]] == 0).all()
    assert not torch.equal(negative[0], negative[1])
    sampler.seeds = [6]
    assert torch.equal(sampler([labels])[1][0], negative[1])


def test_the_final_statistics_are_the_mean_over_batches():
    model = nn.Sequential(nn.BatchNorm2d(1))
    model.forward = lambda images, targets: nn.Sequential.forward(model, images)
    batches = [torch.randn(2, 1, 3, 3) * scale for scale in (1.0, 2.0, 3.0)]
    model.eval()
    assert update_statistics(model, [(batch, None) for batch in batches]) == 3
    assert not model.training
    assert model[0].momentum == 0.1
    means, variances = ([getattr(batch, name)().item() for batch in batches] for name in ("mean", "var"))
    assert model[0].running_mean.item() == pytest.approx(sum(means) / 3, abs=1e-6)
    assert model[0].running_var.item() == pytest.approx(sum(variances) / 3, rel=1e-5)


def test_the_schedule_by_hand():
    recipe = {"base": 0.1, "decay_steps": [100, 200], "gamma": 0.1, "warmup_steps": 10, "warmup_factor": 0.001}
    rates = [learning_rate(step, **recipe) for step in (0, 5, 10, 99, 100, 199, 200)]
    assert rates == pytest.approx([0.0001, 0.05005, 0.1, 0.1, 0.01, 0.01, 0.001])


def test_normalisations_have_no_weight_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    decayed, free = build_optimizer(model, lr=0.1, momentum=0.9, weight_decay=1e-4).param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3, 1, 1), (4,)]
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0.0)
    assert [p.shape for p in free["params"]] == [(4,), (4,)]


def test_every_pass_sees_every_picture_once_and_a_restart_changes_nothing():
    whole = list(Stream(5, 2, seed=1, steps=(0, 10)))
    indices = [index for batch in whole for index, _ in batch]
    assert [sorted(indices[start : start + 5]) for start in (0, 5, 10, 15)] == [list(range(5))] * 4
    assert indices[:5] != indices[5:10]
    assert list(Stream(5, 2, seed=1, steps=(7, 10))) == whole[7:]
    seeds = [seed for batch in whole for _, seed in batch]
    assert len(set(seeds)) == 20
    assert seed_of(1, 2) != seed_of(2, 1)


# --------------------------------------------------------------------------------------------------------------------
# several ranks

RANKS = """
    import sys
    sys.path.insert(0, "tests")
    from test_detection import first_losses
    torch.manual_seed(0)
    torch.save(first_losses(), out / f"{rank}.pt")
"""


def first_losses():
    """Return the losses of the first step of this rank, and the gradient of the first layer, averaged over the ranks."""
    from detection import distributed

    torch.manual_seed(0)
    model = build_detector(options_of(), None)
    batch = [example(48, 48, seed=place, boxes=((4, 4, 30, 30),) * (1 + place % 2)) for place in range(4)]
    own = len(batch) // distributed.world_size()
    images, targets = zip(*batch[distributed.rank() * own :][:own], strict=True)
    losses = model(list(images), list(targets))
    torch.stack(list(losses.values())).sum().backward()
    grad = model.backbone.body.conv1.weight.grad
    mean = {name: distributed.sum_counts(loss) / distributed.world_size() for name, loss in losses.items()}
    statistics = model.heads.shared.norm.running_var
    return mean, distributed.sum_counts(grad) / distributed.world_size(), statistics


def test_two_ranks_equal_one_in_the_first_step(run_ranks):
    losses, grad, statistics = first_losses()
    for found_losses, found_grad, found_statistics in run_ranks(2, RANKS):
        for name, loss in losses.items():
            assert found_losses[name].item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-6), name
        torch.testing.assert_close(found_statistics, statistics, rtol=1e-3, atol=1e-5)
        assert (found_grad - grad).norm() < 0.02 * grad.norm()


# --------------------------------------------------------------------------------------------------------------------
# programs


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("detection") / "shapes", images=4, size=(48, 48))


def flags_of(shapes) -> tuple:
    return (
        "--annotations",
        shapes / "annotations.json",
        "--images",
        shapes / "images",
        *SMALL,
        "--batch-size",
        2,
        "--lr",
        0.01,
    )


def test_training_continues_bit_for_bit(shapes, tmp_path, monkeypatch, capsys):
    words = (*flags_of(shapes), "--steps", 3, "--precise-bn", 1, "--save-every", 2)
    run_detection("train", *words, "--output-dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_agree", lambda trainer: int(signal.SIGTERM) if trainer.step == 1 else 0)
        with pytest.raises(Stopped, match="SIGTERM"):
            run_detection("train", *words, "--output-dir", tmp_path / "parts")
    assert not (tmp_path / "parts" / "model_final.pt").exists()
    run_detection("train", *words, "--output-dir", tmp_path / "parts")
    assert "resuming from step 1 of 3" in capsys.readouterr().out
    for name in ("checkpoint.pt", "model_final.pt"):
        one, other = (torch.load(tmp_path / run / name)["model"] for run in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one), name
    lines = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3]
    assert list((tmp_path / "parts").glob("events.*"))
    with pytest.raises(InputError, match=r"other options \(lr was 0.01, is 0.5\)"):
        run_detection("train", *words, "--output-dir", tmp_path / "parts", "--lr", 0.5)


@pytest.mark.parametrize("architecture", ["c4", "fpn"])
def test_training_and_evaluation_in_bfloat16(shapes, tmp_path, architecture):
    anchors = ("--anchor-sizes", 16, 24, 32, 48, 64) if architecture == "fpn" else ()
    words = (*flags_of(shapes), "--steps", 1, "--precision", "bfloat16", "--architecture", architecture, *anchors)
    run_detection("train", *words, "--output-dir", tmp_path)
    data = ("--annotations", shapes / "annotations.json", "--images", shapes / "images")
    run_detection(
        "evaluate",
        "--checkpoint",
        tmp_path,
        *data,
        "--workers",
        0,
        "--evaluator",
        "pycocotools",
        "--precision",
        "bfloat16",
    )
    scores = json.loads((tmp_path / "evaluate.json").read_text())
    assert scores["images"] == 4
    assert 0 <= scores["bbox"]["ap50"] <= 1
    assert scores["segm"].keys() == scores["bbox"].keys()


def test_training_and_evaluation_on_voc(shapes, tmp_path, capsys):
    data = write_voc(tmp_path / "data", shapes, train=2)
    words = ("--dataset", "voc", "--data", data, "--sets", "2007_trainval", *SMALL, "--batch-size", 1, "--steps", 1)
    run_detection("train", *words, "--output-dir", tmp_path / "run")
    run_detection("evaluate", "--checkpoint", tmp_path / "run", "--data", data, "--workers", 0)
    assert "2 images, 20 classes; evaluator: VOC, 11-point" in capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    assert scores["bbox"].keys() == {"ap", "ap50", "ap75"}


@pytest.mark.slow  # starts two ranks
def test_two_ranks_train_and_score_like_one(shapes, tmp_path):
    words = (*flags_of(shapes), "--steps", 1, "--precise-bn", 1)
    data = ("--annotations", shapes / "annotations.json", "--images", shapes / "images", "--workers", 0)

    def programs(ranks: int, folder):
        for program in (("train.py", *words, "--output-dir", folder), ("evaluate.py", "--checkpoint", folder, *data)):
            command = [f"detection/{program[0]}", *map(str, program[1:]), "--device", "cpu"]
            for rank in finish_ranks(start_ranks(ranks, run_words, *command)):
                assert rank.returncode == 0, rank.stderr[-3000:]
        scores = json.loads((folder / "evaluate.json").read_text())
        return json.loads((folder / "metrics.jsonl").read_text()), scores["images"]

    (one, images), (two, images_of_two) = programs(1, tmp_path / "one"), programs(2, tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    assert images == images_of_two == 4


@pytest.mark.slow  # trains a ResNet-50 and a detector for a few steps
def test_photographs_and_a_checkpoint_of_our_own_training(tmp_path, run_program):
    archive = ROOT.parent / "shared" / "data" / "imagenet-sample.zip"
    if not archive.exists():
        pytest.skip("the photographs are missing: ../shared/data/imagenet-sample.zip")
    with zipfile.ZipFile(archive) as content:
        content.extractall(tmp_path / "photographs")
    files = sorted((tmp_path / "photographs").rglob("*.JPEG"))
    assert len(files) == 250
    few = tmp_path / "few"
    few.mkdir()
    for file in files[:4]:
        (few / file.name).symlink_to(file)
    views = ("--global-crops", "2", "--global-size", "32", "--local-crops", "0")
    trained = run_program(
        *("train.py", "--data", str(few), "--arch", "resnet50", "--epochs", "1", "--batch-size", "4", "--unlabelled"),
        *(*views, "--output-dir", str(tmp_path / "pretrained"), "--device", "cpu", "--workers", "0"),
    )
    assert trained.returncode == 0, trained.stderr[-2000:]
    shapes = paste_shapes(files, tmp_path / "pasted")
    words = (*flags_of(shapes), "--max-size", 160, "--steps", 3, "--pretrained", tmp_path / "pretrained")
    run_detection("train", *words, "--output-dir", tmp_path / "run")
    data = ("--annotations", shapes / "annotations.json", "--images", shapes / "images")
    run_detection("evaluate", "--checkpoint", tmp_path / "run", *data, "--workers", 0)
    scores = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    assert scores["images"] == 250
    assert scores["problems"] == {}


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(shapes, tmp_path, monkeypatch):
    from detection.models import Detector

    def broken(self, images, targets):
        return {"loss_mask": self.rpn.head.cls_logits.weight.sum() * math.nan}

    monkeypatch.setattr(Detector, "forward", broken)
    with pytest.raises(RunError, match=r"a loss is not finite by step 1 \(loss_mask nan\): use a smaller --lr"):
        run_detection("train", *flags_of(shapes), "--steps", 1, "--output-dir", tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_batches_that_the_ranks_cannot_share_are_refused(shapes, tmp_path, monkeypatch):
    from detection import distributed

    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(InputError, match="--batch-size 2 is not divisible by the 3 ranks"):
        run_detection("train", *flags_of(shapes), "--output-dir", tmp_path)


def test_pictures_are_mirrored_and_resized_by_their_seed(shapes):
    from detection.coco import read_coco

    annotations = read_coco(shapes / "annotations.json", shapes / "images", masks=True).for_training()
    pictures = TrainingPictures(annotations, sizes=(24, 48), longest=100, masks=True)
    seen = set()
    for seed in range(8):
        image, target, unusable = pictures[0, seed]
        assert unusable == []
        assert torch.equal(image, pictures[0, seed][0])
        assert target["masks"].shape[1:] == image.shape[1:]
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = torch.where(mask)
            inside = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (inside - box).abs().max() <= 1.0
        seen.add((image.shape[1], round(float(target["boxes"][0, 0]) / image.shape[1], 2)))
    assert len(seen) == 4  # two sizes, mirrored or not


@pytest.mark.slow  # two and a half minutes of one core
def test_a_detector_overfits_shapes(tmp_path):
    shapes = write_shapes(tmp_path / "shapes", images=64)
    words = (*flags_of(shapes), "--batch-size", 4, "--steps", 400, "--lr", 0.02, "--warmup-steps", 40)
    words = (*words, "--decay-steps", 320, "--warmup-factor", 0.01, "--anchor-sizes", 16, 24, 32, "--precise-bn", 16)
    run_detection("train", *words, "--output-dir", tmp_path / "run")
    data = ("--annotations", shapes / "annotations.json", "--images", shapes / "images")
    run_detection("evaluate", "--checkpoint", tmp_path / "run", *data, "--workers", 0)
    scores = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    assert scores["bbox"]["ap50"] > 0.8
    assert scores["segm"]["ap50"] > 0.8


def test_the_backbone_of_our_own_run_is_read(tmp_path):
    from torchvision.models import resnet50

    state = {name: value for name, value in resnet50().state_dict().items() if not name.startswith("fc.")}
    ours = {
        "format": "self-classifier checkpoint",
        "model": {f"backbone.{name}": value for name, value in state.items()},
    }
    torch.save(ours, tmp_path / "checkpoint.pt")
    found = read_backbone(str(tmp_path))
    assert all(torch.equal(found[name], state[name]) for name in state)
