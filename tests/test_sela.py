"""SeLa: when labels are updated and how, what the loss is, files of labels, its networks, and the authors' files."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluating import run_here
from PIL import Image
from torch import nn

from src import pseudo_labels
from src.assignments import LARGEST_SHIFT, balanced_labels, balanced_prototype_labels
from src.config import parse_lincls_eval, parse_train
from src.data.datasets import MemoryImages
from src.data.digits import DigitRecipe, DigitViews
from src.data.labels import arrange, names_of, read_labels, write_labels
from src.data.loaders import TrainLoader
from src.data.photographs import TenCrops
from src.data.training import TrainingData
from src.data.views import build_views
from src.errors import InputError
from src.evaluation.probe import LayerProbes, LinearProbe
from src.loading import load_method
from src.methods.sela import SeLa, update_steps
from src.models.backbones import build_backbone
from src.models.sela_networks import PreActivationBlock
from src.optim import warmup_drops

CPU = torch.device("cpu")


class Pixels(nn.Module):
    """A backbone whose features are the pixels, with a batch normalisation to see which mode it is in."""

    width = 64

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, images):
        return self.norm(images.flatten(1))


def build(**options) -> SeLa:
    torch.manual_seed(0)
    return SeLa(Pixels(), SeLa.Config(**{"classes": (4, 5), "updates": 3, **options})).double()


class DoubleViews(DigitViews):
    def __call__(self, images, indices, **which):
        return [view.double() for view in super().__call__(images, indices, **which)]

    def single(self, images):
        return super().single(images).double()


def training_data(*, images=50, batch=12, epochs=3) -> TrainingData:
    pixels = torch.randint(256, (images, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    data = MemoryImages(pixels, torch.zeros(images).long(), ["a"])
    views = DoubleViews([DigitRecipe()])
    return TrainingData(TrainLoader(data, views, batch_size=batch, seed=0, device=CPU, epochs=epochs))


# ---- when labels are updated ----------------------------------------------------------------------------------------


def test_updates_are_spread_as_published():
    """The authors' schedule for 400 epochs of ImageNet: update k is due after (k / 99)² of the training."""
    steps = 401 * 5004
    at = update_steps(100, steps, spacing="quadratic")
    assert len(at) == 100
    assert at == [math.ceil((steps - 1) * k**2 / 99**2) for k in range(100)]
    epochs = np.array(at) / 5004
    assert [(epochs < limit).sum() for limit in (1, 100, 200, 300)] == [5, 50, 70, 86]
    assert epochs[-1] - epochs[-2] == pytest.approx(8.1, abs=0.1)


def test_updates_with_linear_spacing_and_in_short_runs():
    assert update_steps(5, 41, spacing="linear") == [0, 10, 20, 30, 40]
    assert update_steps(4, 10, spacing="quadratic") == [0, 1, 4, 9]
    # at most one per step; what does not fit is left out
    assert update_steps(9, 5, spacing="quadratic") == [0, 1, 2, 3, 4]
    assert update_steps(1, 5, spacing="quadratic") == [0]
    assert update_steps(0, 5, spacing="linear") == []


def test_the_learning_rate_falls_to_a_tenth():
    lr = warmup_drops(0.08, (150, 300, 350), warmup_start=0.0, warmup_epochs=0, steps_per_epoch=10)
    assert [lr(step) for step in (0, 1499, 1500, 2999, 3000, 3499, 3500, 4009)] == pytest.approx(
        [0.08, 0.08, 0.008, 0.008, 0.0008, 0.0008, 0.00008, 0.00008]
    )
    lr = warmup_drops(1.0, (3,), warmup_start=0.2, warmup_epochs=1, steps_per_epoch=5)
    assert [lr(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_an_update_within_an_epoch_happens_before_its_step():
    method, data = build(updates=4), training_data()
    method.prepare_run(data)  # 12 steps: updates before steps 0, 2, 5 and 11
    assert update_steps(4, data.steps, spacing="quadratic") == [0, 2, 5, 11]
    done = []
    for step in range(data.steps):
        method.prepare_step(step, data)
        done.append(int(method.updates))
    assert done == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4]


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_random_labels_are_balanced_and_differ_between_heads():
    method, data = build(classes=(5, 5), updates=0), training_data()
    method.prepare_run(data)
    assert [torch.bincount(row).tolist() for row in method.labels] == [[10] * 5] * 2
    assert not torch.equal(*method.labels)
    method.prepare_step(0, data)
    assert method.updates == 0


def test_an_update_gives_the_labels_of_the_central_views_in_evaluation_mode():
    method, data = build(), training_data()
    method.prepare_run(data)
    method.train()
    method.prepare_step(0, data)
    method.eval()
    images = DoubleViews([DigitRecipe()]).single(data._loader.data.images)
    with torch.no_grad():
        expected = [balanced_labels(z.log_softmax(dim=1), 25.0, 0.1) for z in method.predict(images)]
    assert torch.equal(method.labels.long(), torch.stack(expected))
    assert (method.backbone.norm.running_mean == 0).all()


def test_an_update_leaves_every_module_in_its_mode():
    method, data = build(), training_data()
    method.prepare_run(data)
    method.train()
    method.backbone.norm.eval()  # as the trainer does with frozen weights
    method.prepare_step(0, data)
    assert (method.training, method.backbone.training, method.backbone.norm.training) == (True, True, False)


def test_an_update_as_published_sees_augmented_views_in_training_mode():
    method, data = build(label_mode="train", label_view="augmented"), training_data()
    method.prepare_run(data)
    before = method.labels.clone()
    method.train()
    method.prepare_step(0, data)
    assert (method.backbone.norm.running_mean != 0).all()
    left = set(range(50)) - {int(i) for batch in data.batches(1 << 20) for i in batch.indices}
    assert len(left) == 2  # of the last partial batch, which keep their labels
    assert torch.equal(method.labels[:, list(left)], before[:, list(left)])


def test_heads_are_labelled_in_turn():
    method, data = build(update_heads="in_turn"), training_data()
    method.prepare_run(data)
    first = method.labels.clone()
    method.update_labels(0, data)
    second = method.labels.clone()
    assert not torch.equal(second[0], first[0])
    assert torch.equal(second[1], first[1])
    method.update_labels(1, data)
    assert torch.equal(method.labels[0], second[0])
    assert not torch.equal(method.labels[1], second[1])


def test_the_log_describes_the_last_update():
    method, data = build(), training_data()
    method.prepare_run(data)
    before = method.labels.clone()
    method.prepare_step(0, data)
    averages = {"terms": torch.ones(2)}
    for k, size in enumerate((4, 5)):
        averages |= {f"share_{k}": torch.full((size,), 1 / size), f"prediction_{k}": torch.full((size,), 1 / size)}
    summary = method.summarize(averages)
    assert summary["updates"] == 1
    for k, size in enumerate((4, 5)):
        counts = torch.bincount(method.labels[k], minlength=size)
        assert (summary[f"smallest_{k}"], summary[f"largest_{k}"]) == (counts.min(), counts.max())
        assert summary[f"changed_{k}"] == pytest.approx((before[k] != method.labels[k]).double().mean())


# ---- the transport in memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "classes", "lam", "spread"), [(300, 7, 25.0, 1.0), (200, 12, 25.0, 6.0)])
def test_a_plan_in_memory_gives_the_labels_of_chunks(images, classes, lam, spread):
    """Also where a factor changes so much that the plan is computed again."""
    generator = torch.Generator().manual_seed(2)
    features, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (images, classes))
    bias = spread * torch.randn(classes, generator=generator, dtype=torch.float64)
    how = {"lam": lam, "tolerance": 1e-6, "max_iterations": None, "bias": bias}
    chunks = balanced_prototype_labels(features, weight, 0.5, **how)
    assert torch.equal(balanced_prototype_labels(features, weight, 0.5, **how, memory=1 << 20), chunks)
    logs = ((features @ weight.T + bias) / 0.5).log_softmax(dim=1)
    assert torch.equal(balanced_labels(logs, lam, 1e-6), chunks)


def test_a_large_shift_is_computed_again(monkeypatch):
    monkeypatch.setattr("src.assignments.LARGEST_SHIFT", 0.0)
    test_a_plan_in_memory_gives_the_labels_of_chunks(200, 12, 25.0, 6.0)
    assert LARGEST_SHIFT > 0


@pytest.mark.parametrize("case", ["case0", "case1", "case2", "case3", "case4"])
def test_authors_labels_from_a_plan_in_memory(golden, case):
    numbers = golden("sela.npz", f"{case}_labels64")
    logs = torch.from_numpy(numbers[f"{case}_probabilities"]).log()
    how = {"lam": float(numbers[f"{case}_lambda"]), "tolerance": 0.1, "max_iterations": None}
    labels = balanced_prototype_labels(logs, torch.eye(logs.shape[1]).double(), 1.0, **how, memory=1 << 24)
    assert (labels.numpy() == numbers[f"{case}_labels64"]).all()


@pytest.mark.parametrize("case", ["cifar0", "cifar1"])
def test_authors_cost_of_the_labels(golden, case):
    """Their cost is the mean cross-entropy of the labels."""
    numbers = golden("sela.npz", f"{case}_cost")
    logs = torch.from_numpy(numbers[f"{case}_probabilities"]).log()
    labels = balanced_labels(logs, 10.0, 0.01)
    assert F.nll_loss(logs, labels).item() == pytest.approx(float(numbers[f"{case}_cost"]), rel=1e-6)


def test_float32_with_nearly_uniform_probabilities_gives_the_labels_of_float64():
    """Powers of p to 25 are below the smallest float32 here."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.02 * torch.randn(400, 100, generator=generator)
    assert (logits.softmax(dim=1) ** 25 == 0).all()
    expected = balanced_labels(logits.double().log_softmax(dim=1), 25.0, 0.1)
    weight = torch.eye(100)
    how = {"lam": 25.0, "tolerance": 0.1, "max_iterations": None}
    assert torch.equal(balanced_labels(logits, 25.0, 0.1), expected)
    assert torch.equal(balanced_prototype_labels(logits, weight, 1.0, **how, memory=1 << 24), expected)
    assert torch.bincount(expected, minlength=100).max() <= 9  # of 400 images for 100 classes


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_cross_entropy_of_the_heads():
    method, data = build(), training_data()
    method.prepare_run(data)
    features, indices = torch.randn(6, 64).double(), torch.arange(6)
    step = method.objective([features], indices)
    by_hand = [
        -sum(head(row).log_softmax(0)[method.labels[k, i]] for i, row in enumerate(features)) / 6
        for k, head in enumerate(method.heads)
    ]
    torch.testing.assert_close(step.numbers["terms"], torch.stack(by_hand).detach())
    torch.testing.assert_close(step.loss, sum(by_hand) / 2)


@pytest.mark.parametrize("rotation", ["add", "only"])
def test_rotations_are_predicted_from_turned_views_and_labels_from_upright_ones(rotation):
    method, data = build(updates=0, rotation=rotation), training_data()
    method.prepare_run(data)
    method.eval()
    images = torch.randn(3, 1, 8, 8).double()
    embeddings = method.embed_views([images])
    assert len(embeddings) == 4
    for turn, found in enumerate(embeddings):
        turned = images
        for _ in range(turn):
            turned = turned.transpose(2, 3).flip(2)  # a quarter turn to the left
        torch.testing.assert_close(found, method.backbone(turned))
    step = method.objective(embeddings, torch.arange(3))
    rotations = [method.rotation_head(e).log_softmax(dim=1)[:, turn] for turn, e in enumerate(embeddings)]
    expected = -torch.stack(rotations).mean()
    torch.testing.assert_close(step.numbers["rotation"], expected.detach())
    labels = build_upright_loss(method, embeddings[0])
    torch.testing.assert_close(step.loss, expected + (labels if rotation == "add" else 0))
    step.loss.backward()
    assert rotation == "add" or not method.heads[0].weight.grad.any()


def build_upright_loss(method, upright):
    terms = [F.cross_entropy(head(upright), method.labels[k, :3].long()) for k, head in enumerate(method.heads)]
    return sum(terms) / len(terms)


# ---- files of labels ------------------------------------------------------------------------------------------------

NAMES = ["b/2.png", "b/1.png", 'a/"x", y.png']
LABELS = np.array([[3, 0, 1], [7, 5, 6]])  # two heads of three images


def test_labels_come_back_in_any_order(tmp_path):
    write_labels(tmp_path / "labels.csv", NAMES, LABELS)
    assert (tmp_path / "labels.csv").read_text().splitlines()[:2] == ["path,head,label", "b/2.png,0,3"]
    names, labels = read_labels(str(tmp_path / "labels.csv"))
    order = [2, 0, 1]
    found = arrange("labels.csv", names, labels, images=[NAMES[i] for i in order])
    assert (found == LABELS[:, order]).all()
    # another copy of the images, in another folder
    found = arrange("labels.csv", names, labels, images=[f"train/{NAMES[i]}" for i in order])
    assert (found == LABELS[:, order]).all()


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("1,2\n3,4\n", [], [[1, 2], [3, 4]]),  # in the order of the images
        ("path,l0,l1\nb.png,1,2\na.png,3,4\n", ["b.png", "a.png"], [[1, 2], [3, 4]]),
        ("b.png,1\na.png,3\n", ["b.png", "a.png"], [[1], [3]]),
        ("l0,l1\n1,2\n3,4\n", [], [[1, 2], [3, 4]]),
        ("0,8,2\n1,3,4\n", [], [[8, 2], [3, 4]]),  # the first column numbers the images
        ("5\n6\n", [], [[5], [6]]),
        ("1.0,2.0\r\n3.0,4.0\r\n", [], [[1, 2], [3, 4]]),
        ("path,head,label\na,1,4\na,0,3\n", ["a"], [[3, 4]]),
    ],
)
def test_tables_of_labels_are_read(text, names, labels, tmp_path):
    (tmp_path / "l.csv").write_text(text)
    found, table = read_labels(str(tmp_path / "l.csv"))
    assert (found, table.tolist()) == (names, labels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file holds no labels"),
        ("a,b\n", "the file holds no labels"),
        ("1,2\n3\n", "line 2 has 1 columns"),
        ("a.png\nb.png\n", "the file holds no labels|line 2 has 1 columns"),
        ("1,x\n", "line 1 has 'x', expected a whole number"),
        ("1,-2\n", "line 1 has '-2', expected a whole number"),
        ("1,99999999999\n", "line 1 has '99999999999'"),
        ("path,head,label\na,0\n", "line 2 has 2 columns, expected path, head and label"),
        ("path,head,label\na,0,1\nb,1,1\n", "2 labels of 2 images and 2 heads"),
        ("path,head,label\na,0,1\na,0,2\nb,0,1\nb,1,1\n", "a label appears twice"),
        ("path,head,label\n", "0 labels of 0 images"),
    ],
)
def test_what_is_no_table_of_labels_is_refused(text, message, tmp_path):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_labels(str(tmp_path / "l.csv"))
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        read_labels(str(tmp_path / "nowhere.csv"))


def test_labels_of_other_images_are_refused():
    labels = LABELS.T
    with pytest.raises(InputError, match="labels of 3 images, but the data set has 2"):
        arrange("l.csv", NAMES, labels, images=["b/1.png", "b/2.png"])
    with pytest.raises(InputError, match=r"no labels of 3\.png"):
        arrange("l.csv", NAMES, labels, images=["b/1.png", "b/2.png", "b/3.png"])
    with pytest.raises(InputError, match="several images with one name"):
        arrange("l.csv", ["a/1", "b/1", "b/2"], labels, images=["x/1", "y/1", "y/2"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight small pictures in two class folders."""
    top = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for folder in ("train/a", "train/b"):
        (top / folder).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(top / folder / f"{i}.png")
    return top


SMALL = ["--method", "sela", "--preset", "small_images", "--arch", "small_convnet", "--global-crops-size", "16"]
SMALL += [
    "--batch-size",
    "4",
    "--epochs",
    "1",
    "--warmup-epochs",
    "0",
    "--lr",
    "0.001",
    "--device",
    "cpu",
    "--workers",
    "0",
]


def test_a_network_learns_from_the_labels_of_another(pictures, tmp_path, capsys):
    """Train, export the labels, and train again on them, with the images in memory and with rotations."""
    run_here("train", *SMALL, "--data", pictures, "--classes", 2, 3, "--output-dir", tmp_path / "first")
    assert "written" not in (written := pseudo_labels.write(str(tmp_path / "first"), tmp_path / "deep" / "l.csv")), (
        written
    )
    names, labels = read_labels(str(tmp_path / "deep" / "l.csv"))
    assert names == [f"{folder}/{i}.png" for folder in "ab" for i in range(4)]
    method, _ = load_method(tmp_path / "first")
    assert (method.labels.numpy() == labels.T).all()
    words = ["--updates", 0, "--labels", tmp_path / "deep" / "l.csv", "--rotation", "add", "--in-memory"]
    run_here("train", *SMALL, *words, "--data", pictures, "--classes", 2, 3, "--output-dir", tmp_path / "2")
    again, _ = load_method(tmp_path / "2")
    assert torch.equal(again.labels, method.labels)
    line = json.loads((tmp_path / "2" / "metrics.jsonl").read_text())
    assert 0 <= line["rotation_accuracy"] <= 1
    assert line["updates"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--classes 2", "labels of 2 heads, but --classes has 1 sizes"),
        ("--classes 2 2", "head 1 has the label 2, but --classes gives it 2 classes"),
        ("--classes 2 9", "--classes 9 is more than the 8 images"),
        (
            "--classes 2 3 --updates 4",
            "--labels .+ gives the labels, and --updates 4 would replace them: give --updates 0",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_anything_is_written(words, message, pictures, tmp_path):
    rows = "".join(f"{i % 2},{i % 3}\n" for i in range(8))
    (tmp_path / "l.csv").write_text(rows)
    words = ["--updates", "0", *words.split(), "--labels", str(tmp_path / "l.csv")]
    with pytest.raises(InputError, match=message):
        run_here("train", *SMALL, *words, "--data", pictures, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_exports_without_labels_or_of_other_images_are_refused(pictures, tmp_path):
    run_here("train", *SMALL, "--data", pictures, "--classes", 2, 3, "--output-dir", tmp_path / "run")
    with pytest.raises(InputError, match=r"labels of 8 images, but the data set has 1,437"):
        pseudo_labels.write(str(tmp_path / "run"), tmp_path / "l.csv", data="digits")
    torch.save({"backbone.layers.0.0.weight": torch.zeros(1), "backbone.x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="holds no labels: expected a checkpoint of --method sela"):
        pseudo_labels.write(str(tmp_path / "other.pt"), tmp_path / "l.csv")
    assert not (tmp_path / "l.csv").exists()


def test_names_are_paths_in_the_common_folder_or_positions():
    images = MemoryImages(torch.zeros(2, 1, 1, 1).byte(), torch.zeros(2).long(), ["a"])
    assert names_of(images) == ["0", "1"]
    named = MemoryImages(images.images, images.labels, ["a"], ["/x/train/a/1.png", "/x/train/b/1.png"])
    assert names_of(named) == ["a/1.png", "b/1.png"]
    assert names_of(named.keep(np.array([1]), np.zeros(1, dtype=np.int64), ["a"])) == ["1.png"]


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lam 0", "--lam is 0"),
        ("--tolerance -1", "--tolerance is -1"),
        ("--classes 1 5", "expected sizes of at least 2"),
        ("--updates -1", "--updates is -1"),
        ("--rotation only", "--rotation only learns from rotations and needs no labels"),
        ("--global-crops-number 0 --local-crops-number 0", "make no view|--global-crops-number is 0"),
        ("--lr-drops 5 3", "--lr-drops 5 3: expected ascending numbers"),
        ("--lr-drops 0 3", "--lr-drops 0 3: expected ascending numbers"),
        ("--lr-drops 90", "--lr-drops 90 are not all below --epochs 90"),
        ("--lr-drops 9 --final-lr 0.1", "--final-lr has no effect: --lr-drops takes the place of the cosine"),
    ],
)
def test_wrong_options_are_one_line(words, message):
    with pytest.raises(InputError, match=message):
        parse_train(["--method", "sela", *words.split()])


def test_one_view_is_enough_for_sela_and_not_for_others():
    words = ["--global-crops-number", "1", "--local-crops-number", "0"]
    assert parse_train(["--method", "sela", *words])[0].num_views == 1
    with pytest.raises(InputError, match="make one view, but training needs two"):
        parse_train(["--method", "swav", *words])


# ---- networks and their probes --------------------------------------------------------------------------------------


def test_the_parameters_of_the_networks_are_as_many_as_published():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        big, small, resnet = (build_backbone(f"sela_{name}") for name in ("alexnet", "alexnet_small", "resnet50"))
    assert (count(big.features), count(big)) == (3_749_952, 58_284_096)
    assert count(small) == pytest.approx(57.0e6, rel=1e-3)
    assert (big.width, small.width, resnet.width) == (4096, 4096, 2048)


@pytest.mark.parametrize("size", [32, 223, 255])
def test_alexnet_refuses_views_of_other_sizes(size):
    with pytest.raises(InputError, match="takes views of 224 to 254 pixels"):
        build_backbone("sela_alexnet", image_size=size)


def test_a_pre_activation_block_by_hand():
    torch.manual_seed(0)
    block = PreActivationBlock(8, 2, 1).double().eval()
    with torch.no_grad():
        for norm in (block.bn1, block.bn2, block.bn3):
            norm.running_mean.uniform_()
            norm.running_var.uniform_(0.5, 2)
        x = torch.randn(2, 8, 5, 5).double()
        y = F.conv2d(F.relu(block.bn1(x)), block.conv1.weight)
        y = F.conv2d(F.relu(block.bn2(y)), block.conv2.weight, padding=1)
        y = F.conv2d(F.relu(block.bn3(y)), block.conv3.weight)
        torch.testing.assert_close(block(x), y + x)  # the shortcut is the input itself
        wider = PreActivationBlock(8, 4, 2).double().eval()
        shortcut = F.conv2d(F.relu(wider.bn1(x)), wider.shortcut[0].weight, stride=2)
        y = F.conv2d(F.relu(wider.bn1(x)), wider.conv1.weight)
        y = F.conv2d(F.relu(wider.bn2(y)), wider.conv2.weight, padding=1, stride=2)
        torch.testing.assert_close(wider(x), F.conv2d(F.relu(wider.bn3(y)), wider.conv3.weight) + shortcut)


@pytest.fixture(scope="module")
def probes():
    torch.manual_seed(0)
    return LayerProbes(build_backbone("sela_alexnet_small"), 3, torch.tensor([0, 1, 2, 0]))


def test_each_convolution_of_alexnet_has_a_probe_of_the_published_size(probes):
    assert [probe[3].in_features for probe in probes.probes] == [6400, 6912, 9600, 6400, 9216]
    assert all(not list(probe[1].parameters()) for probe in probes.probes)  # neither scale nor shift
    assert probes.layers == ("conv1", "conv2", "conv3", "conv4", "conv5")
    with pytest.raises(InputError, match="--layers probes an AlexNet, but the backbone is a SmallConvNet"):
        LayerProbes(build_backbone("small_convnet", 1), 3)


def test_probes_see_the_maps_after_the_relus_and_leave_the_backbone_alone(probes):
    images = torch.randn(4, 3, 224, 224)
    probes.train()
    step = probes.objective(probes.embed_views([images]), torch.arange(4))
    step.loss.backward()
    assert all(p.grad is None for p in probes.backbone.parameters())
    assert all(p.grad.abs().sum() > 0 for p in probes.own_parameters())
    with torch.no_grad():
        maps, x = [], images
        for module in probes.backbone.features:
            x = module(x.clone())
            if isinstance(module, nn.ReLU):
                maps.append(x)
        logits = torch.stack([probe(m) for probe, m in zip(probes.probes, maps, strict=True)])
        losses = [F.cross_entropy(each, probes.labels) for each in logits]
    assert step.loss.item() == pytest.approx(sum(losses).item(), rel=1e-5)
    probes.check_unchanged()


def test_ten_crops_are_corners_centre_and_their_mirror_images():
    options, _, _ = parse_train(["--data", "somewhere", "--global-crops-size", "96"])
    images = MemoryImages(torch.arange(3 * 10 * 12).view(1, 3, 10, 12).byte(), torch.zeros(1).long(), ["a"])
    views = build_views("somewhere", images, options.views)
    views.eval_size, views.eval_resize = 4, 10
    crops = TenCrops(views).single(images.images)
    assert crops.shape == (1, 10, 3, 4, 4)
    whole = views.single_finish(images.images)
    places = [(0, 0), (0, 8), (6, 0), (6, 8), (3, 4)]
    for k, (y, x) in enumerate(places):
        crop = whole[:, :, y : y + 4, x : x + 4]
        torch.testing.assert_close(crops[:, k], crop)
        torch.testing.assert_close(crops[:, 5 + k], crop.flip(-1))


def test_presets_of_the_probes_are_the_published_ones():
    words = ["--checkpoint", "x", "--data", "somewhere", "--preset"]
    alexnet = parse_lincls_eval([*words, "sela_alexnet"])
    assert (alexnet.epochs, alexnet.batch_size, alexnet.lr, alexnet.weight_decay) == (36, 192, 0.01, 1e-5)
    assert (alexnet.schedule, alexnet.decay_epochs, alexnet.gamma) == ("step", (10, 20, 30), 0.1)
    assert (alexnet.layers, alexnet.ten_crops, alexnet.optimizer, alexnet.momentum) == (True, True, "sgd", 0.9)
    resnet = parse_lincls_eval([*words, "sela"])
    assert (resnet.epochs, resnet.batch_size, resnet.lr, resnet.weight_decay) == (146, 1024, 0.1, 0)
    assert (resnet.schedule, resnet.decay_epochs, resnet.layers, resnet.ten_crops) == ("step", (85, 128), False, True)
    for flag in ("--fast", "--finetune", "--feature-bn"):
        with pytest.raises(InputError, match=f"--layers has its own pooling .+ drop {flag}"):
            parse_lincls_eval([*words, "sela_alexnet", flag])
    assert LinearProbe.layers == ()


# ---- the authors' files ---------------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_authors_is_scored_and_its_labels_are_written(tmp_path):
    """Of the pre-activation ResNet on several GPUs, with two heads, one that predicts rotations, and labels."""
    torch.manual_seed(0)
    state = build_backbone("sela_resnet50").state_dict()
    state = {key.replace("features.", "features.module."): value for key, value in state.items()}
    heads = [nn.Linear(2048, size).state_dict() for size in (6, 6, 4)]
    state |= {f"top_layer{k}.{key}": value for k, head in enumerate(heads) for key, value in head.items()}
    labels = torch.arange(16).view(2, 8) % 6
    torch.save({"epoch": 3, "arch": "resnetv2", "state_dict": state, "L": labels}, tmp_path / "ckpt003.pth")
    method, found = load_method(tmp_path / "ckpt003.pth")
    assert isinstance(method, SeLa)
    assert (method.classes, found["config"]["arch"]) == ((6, 6), "sela_resnet50")
    assert torch.equal(method.labels.long(), labels)
    torch.testing.assert_close(method.heads[1].weight, heads[1]["weight"])
