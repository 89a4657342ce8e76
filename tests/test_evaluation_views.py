"""Evaluations show images as the projects' own evaluations do: the size, the resize rule, the normalisation, the network.

The expected outputs come from torchvision's transforms with Pillow and from networks written down here after the fact sheets.
"""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluating import make_pictures, read_json, run_here, save_as_moco, save_untrained, torchvision_trunk
from PIL import Image
from torchvision import transforms

import train
from src.config import parse_cls_eval, parse_train
from src.data.datasets import MemoryImages
from src.data.views import build_views
from src.errors import InputError
from src.evaluation import classification, linear
from src.evaluation.session import choose_view
from src.loading import evaluation_view, load_backbone, load_classifiers, start_from
from src.methods import METHODS, build_method
from src.models.backbones import build_backbone
from src.preprocessing import Preprocessing, of_training
from src.releases import RELEASES

MODULES = {"cls_eval": "classification", "knn_eval": "knn", "lincls_eval": "linear"}
TRUE_STD, SWAV_STD = (0.229, 0.224, 0.225), (0.228, 0.224, 0.225)
MEAN = (0.485, 0.456, 0.406)
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR20 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


class Opened(Exception):
    """Ends a program when its session is open."""


def opened(program, *words):
    """Return the session that one of the three programs opens for these flags."""
    module, sessions = importlib.import_module(f"src.evaluation.{MODULES[program]}"), []
    original = module.open_session

    def open_session(*args, **options):
        sessions.append(original(*args, **options))
        raise Opened

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_session", open_session)
        with pytest.raises(Opened):
            run_here(program, *words, "--workers", "0", "--device", "cpu")
    return sessions[0]


def photographs(top, size, number=2):
    """A folder of smooth pictures of this height and width, in two classes, for training and for testing."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (top / split / name).mkdir(parents=True)
            for i in range(number):
                small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
                small.resize(size[::-1], Image.Resampling.BICUBIC).save(top / split / name / f"{i}.png")
    return top


def shown(paths, *, resize, size, mean, std):
    """The evaluation view as the projects make it."""
    steps = [transforms.Resize(resize), transforms.CenterCrop(size), transforms.ToTensor()]
    view = transforms.Compose([*steps, transforms.Normalize(mean, std)])
    return torch.stack([view(Image.open(path).convert("RGB")) for path in paths])


@torch.no_grad()
def outputs(session, split, function):
    """What a function of the session's network returns for the images of a split, in float64."""
    session.network.double()
    return torch.cat([function(images.double()) for images, _ in session.batches(session.splits[split])])


def assert_equal(found, expected):
    """Up to 1e-5 of the largest entry."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# --------------------------------------------------------------------------------------------------------------------
# the files of SCAN for small images


def scan_state(clusters=10, seed=0):
    """A file of SCAN's ResNet-18 for small images, with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def conv(out, into, size):
        return torch.randn(out, into, size, size, generator=generator) * (2 / (into * size**2)) ** 0.5

    state = {}

    def norm(name, width):
        state[f"{name}.weight"] = torch.rand(width, generator=generator) + 0.5
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1
        state[f"{name}.running_mean"] = torch.randn(width, generator=generator) * 0.1
        state[f"{name}.running_var"] = torch.rand(width, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    state["backbone.conv1.weight"] = conv(64, 3, 3)
    norm("backbone.bn1", 64)
    into = 64
    for layer in range(1, 5):
        out = 32 * 2**layer
        for block in range(2):
            name = f"backbone.layer{layer}.{block}"
            state[f"{name}.conv1.weight"], state[f"{name}.conv2.weight"] = conv(out, into, 3), conv(out, out, 3)
            norm(f"{name}.bn1", out)
            norm(f"{name}.bn2", out)
            if layer > 1 and block == 0:
                state[f"{name}.shortcut.0.weight"] = conv(out, into, 1)
                norm(f"{name}.shortcut.1", out)
            into = out
    state["cluster_head.0.weight"] = torch.randn(clusters, 512, generator=generator) / 20
    state["cluster_head.0.bias"] = torch.randn(clusters, generator=generator) / 20
    return state


def scan_logits(state, images, *, stl):
    """The logits of SCAN's network, from its fact sheet, section 1.1."""
    state = {key: value.double() for key, value in state.items()}

    def norm(x, name):
        stored = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *stored)

    x = F.relu(norm(F.conv2d(images, state["backbone.conv1.weight"], padding=1), "backbone.bn1"))
    if stl:
        x = F.max_pool2d(x, 2, stride=2, padding=1)
    for layer in range(1, 5):
        for block in range(2):
            name, stride = f"backbone.layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = F.relu(norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if f"{name}.shortcut.0.weight" in state:
                x = norm(F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=stride), f"{name}.shortcut.1")
            x = F.relu(x + y)
    if stl:
        assert x.shape[-2:] == (7, 7)
        x = F.avg_pool2d(x, 7, stride=1)
    features = x.mean(dim=(2, 3))
    return F.linear(features, state["cluster_head.0.weight"], state["cluster_head.0.bias"])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELF_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "arch", "side", "statistics"),
    [
        ("scan-cifar10", "cifar_resnet18", 32, CIFAR10),
        ("scan-cifar100-20-selflabel", "cifar_resnet18", 32, CIFAR20),
        ("scan-stl10", "stl_resnet18", 96, (MEAN, TRUE_STD)),
    ],
)
def test_files_of_scan_score_as_in_its_evaluation(cache, tmp_path, name, arch, side, statistics):
    """By the name in the catalogue, and for CIFAR-10 and STL-10 by path with --arch."""
    state, data = scan_state(), photographs(tmp_path / "data", (side, side), number=1)
    (cache / name).mkdir(parents=True)
    torch.save({"model": state, "head": 0}, cache / name / f"{name}.pth.tar")
    torch.save({"model": state, "head": 0}, tmp_path / "by_path.pth.tar")
    ways = [[name]] if "100" in name else [[name], [tmp_path / "by_path.pth.tar", "--arch", arch]]
    for way in ways:
        session = opened("cls_eval", "--data", data, "--output-dir", tmp_path / "out", "--checkpoint", *way)
        mean, std = statistics
        images = shown(session.splits["test"].paths, resize=side, size=side, mean=mean, std=std)
        expected = scan_logits(state, images.double(), stl=arch == "stl_resnet18")
        (found,) = [outputs(session, "test", lambda x, s=session: s.network.predict(x)[0])]
        assert_equal(found, expected)
        facts = session.facts()
        assert (facts["arch"], facts["eval_size"], facts["eval_resize"]) == (arch, side, side)
        assert (tuple(facts["eval_mean"]), tuple(facts["eval_std"])) == statistics


def test_the_network_for_stl10_computes_something_else():
    torch.manual_seed(0)
    cifar, stl = build_backbone("cifar_resnet18").eval(), build_backbone("stl_resnet18").eval()
    assert {k: v.shape for k, v in cifar.state_dict().items()} == {k: v.shape for k, v in stl.state_dict().items()}
    stl.load_state_dict(cifar.state_dict())
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        # fact sheet of SCAN, section 1.1: 96 → 49 → 49 → 25 → 13 → 7 → 1
        assert stl.stem(images).shape == (2, 64, 49, 49)
        assert stl.stages(stl.stem(images)).shape == (2, 512, 7, 7)
        assert (stl(images) - cifar(images)).abs().max() > 1e-2


def test_a_file_that_fits_two_networks_needs_a_name(cache, tmp_path):
    path = tmp_path / "model.pth.tar"
    torch.save(scan_state(), path)
    both = r"CIFAR and for STL-10.*: give --arch cifar_resnet18 or --arch stl_resnet18, or its name in `python -m src"
    for load in (load_backbone, load_classifiers):
        with pytest.raises(InputError, match=both) as error:
            load(path)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=both):
            load(path, "resnet18")
        assert load(path, "stl_resnet18")[1]["config"]["arch"] == "stl_resnet18"
    (cache / "scan-stl10").mkdir(parents=True)
    torch.save(scan_state(), cache / "scan-stl10" / "m.pth.tar")
    assert load_backbone("scan-stl10")[1]["config"]["arch"] == "stl_resnet18"
    with pytest.raises(
        InputError, match="--arch cifar_resnet18: checkpoint scan-stl10 holds stl_resnet18: drop --arch"
    ):
        load_backbone("scan-stl10", "cifar_resnet18")
    # --compare has one --arch for several files, so that a file that names its backbone decides itself
    assert load_classifiers("scan-stl10", "cifar_resnet18", strict=False)[1]["config"]["arch"] == "stl_resnet18"
    for name, release in RELEASES.items():
        assert release.arch == ("stl_resnet18" if "stl10" in name else "cifar_resnet18" if "cifar" in name else "")


def test_training_from_a_named_file_checks_the_backbone(cache):
    (cache / "scan-stl10").mkdir(parents=True)
    torch.save(scan_state(), cache / "scan-stl10" / "m.pth.tar")
    for arch in ("cifar_resnet18", "stl_resnet18"):
        settings = {"arch": arch, "channels": 3, "global_crops_size": 32, "patch_size": 16, "global_crops_number": 2}
        knobs = METHODS["self_classifier"].Config(classes=(3,), dim=4, hidden_dim=8, queue_length=0)
        method = build_method("self_classifier", knobs, settings)
        if arch == "stl_resnet18":
            assert "loaded backbone (120)" in start_from(method, "self_classifier", "scan-stl10", arch=arch)
            continue
        with pytest.raises(InputError, match="--arch cifar_resnet18: checkpoint scan-stl10 holds stl_resnet18"):
            start_from(method, "self_classifier", "scan-stl10", arch=arch)


# --------------------------------------------------------------------------------------------------------------------
# files of networks for ImageNet


def named(prefix):
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


def as_swav(state):
    head = {"projection_head.0.weight": torch.ones(4, 512), "projection_head.0.bias": torch.zeros(4)}
    head |= {"projection_head.2.weight": torch.ones(4, 4), "projection_head.2.bias": torch.zeros(4)}
    return {f"module.{key}": value for key, value in {**state, **head, "prototypes.weight": torch.ones(5, 4)}.items()}


IMAGENET_FILES = {
    "swav": as_swav,
    "moco": named("module.encoder_q."),
    "simsiam": lambda state: {**named("module.encoder.")(state), "module.predictor.0.weight": torch.ones(1, 1)},
    "torchvision": lambda state: state,
    "scan": lambda state: {**named("backbone.")(state), "cluster_head.0.weight": torch.ones(5, 512)},
}
EVALUATIONS = [  # the kind of file, program, flags, standard deviation of the red channel
    ("swav", "lincls_eval", ["--preset", "swav", "--lr", "1", "--batch-size", "4"], 0.228),
    ("swav", "lincls_eval", [], 0.229),
    ("swav", "knn_eval", ["--k", "1"], 0.229),
    ("swav", "cls_eval", ["--kmeans", "2"], 0.229),
    ("moco", "lincls_eval", ["--preset", "swav", "--lr", "1", "--batch-size", "4"], 0.228),
    ("moco", "knn_eval", ["--k", "1"], 0.229),
    ("simsiam", "knn_eval", ["--k", "1"], 0.229),
    ("torchvision", "knn_eval", ["--k", "1"], 0.229),
    ("scan", "cls_eval", ["--kmeans", "2"], 0.229),
]


@pytest.mark.parametrize(("kind", "program", "words", "red"), EVALUATIONS)
def test_features_for_imagenet_are_those_of_the_published_evaluation(tmp_path, kind, program, words, red):
    """224 of 256 pixels by Pillow, from higher and wider pictures, and the same normalisation in every split."""
    network = torchvision_trunk("resnet18")
    torch.save({"state_dict": IMAGENET_FILES[kind](network.state_dict())}, tmp_path / "file.pth.tar")
    data = photographs(tmp_path / "data", (301, 400) if kind == "swav" else (300, 270), number=1)
    session = opened(
        program, "--checkpoint", tmp_path / "file.pth.tar", "--data", data, "--output-dir", tmp_path / "out", *words
    )
    for split in session.splits:
        paths = session.splits[split].paths
        images = shown(paths, resize=256, size=224, mean=MEAN, std=(red, 0.224, 0.225))
        with torch.no_grad():
            expected = network.double()(images.double())
        assert_equal(outputs(session, split, session.network.get_submodule("backbone")), expected)
    assert session.facts()["eval_std"] == [red, 0.224, 0.225]


def test_prototypes_of_swav_see_the_normalisation_of_its_training(tmp_path):
    network = torchvision_trunk("resnet18")
    torch.save(as_swav(network.state_dict()), tmp_path / "file.pth.tar")
    data = photographs(tmp_path / "data", (256, 300), number=1)
    session = opened("cls_eval", "--checkpoint", tmp_path / "file.pth.tar", "--data", data)
    assert session.facts()["eval_std"] == [0.228, 0.224, 0.225]
    assert (session.view.size, session.view.resize) == (224, 256)


# --------------------------------------------------------------------------------------------------------------------
# our own runs


OWN = [  # --data of the run, crop size, --augment: size and resize rule, mean, standard deviation
    ("somewhere", 224, "dino", (224, 256), MEAN, TRUE_STD),
    ("somewhere", 160, "swav", (224, 256), MEAN, SWAV_STD),  # the 400ep presets of DeepCluster-v2 and SeLa-v2
    ("somewhere", 96, "dino", (224, 256), MEAN, TRUE_STD),
    ("somewhere", 70, "dino", (70, 80), MEAN, TRUE_STD),
    ("somewhere", 64, "dino", (64, 64), MEAN, TRUE_STD),
    ("somewhere", 32, "dino", (32, 32), MEAN, TRUE_STD),
    ("cifar10", 32, "swav", (32, 32), (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    ("cifar10", 24, "dino", (32, 32), (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    ("cifar100-20", 32, "dino", (32, 32), *CIFAR20),
    ("cifar10", 224, "dino", (224, 224), (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    ("stl10", 64, "dino", (96, 96), MEAN, TRUE_STD),
    ("stl10", 96, "swav", (96, 96), MEAN, SWAV_STD),
]


@pytest.mark.parametrize(("data", "crop", "augment", "sides", "mean", "std"), OWN)
def test_runs_are_evaluated_at_the_published_size(data, crop, augment, sides, mean, std):
    expected = Preprocessing(size=sides[0], resize=sides[1], mean=mean, std=std)
    assert of_training(data, crop_size=crop, augment=augment) == expected
    words = ["--method", "swav", "--preset", "400ep", "--lr", "1", "--batch-size", "8", "--augment", augment]
    words += ["--data", data, "--global-crops-size", str(crop), *(["--data-root", "x"] if data != "somewhere" else [])]
    options, _, _ = parse_train(words)
    views = train.open_views(options, None)  # for --eval-every
    assert (views.eval_size, views.eval_resize, views.mean, views.std) == (*sides, mean, std)
    assert views.recipes[0].size == crop
    options, _, _ = parse_train([*words, "--eval-size", "40", "--eval-resize", "45"])
    views = train.open_views(options, None)
    assert (views.eval_size, views.eval_resize, views.recipes[0].size) == (40, 45, crop)


@pytest.fixture
def run_of_160(tmp_path):
    """A run with training crops of 160 pixels on photographs, and the photographs."""
    data = photographs(tmp_path / "photographs", (200, 230), number=3)
    words = ["--method", "swav", "--prototypes", "4", "--dim", "4", "--hidden-dim", "4", "--arch", "small_convnet"]
    words += ["--global-crops-size", "160", "--augment", "swav", "--data", data]
    return save_untrained(tmp_path / "run" / "checkpoint.pt", *words, channels=3), data


def test_the_training_crops_do_not_set_the_size_of_evaluations(run_of_160, tmp_path):
    """In all three programs, with own sizes by flag, in the result files, and in the training split of the probe too."""
    path, _ = run_of_160
    programs = [
        ("knn_eval", ["--k", "2"]),
        ("cls_eval", []),
        ("lincls_eval", ["--epochs", "1", "--preset", "swav", "--batch-size", "6", "--lr", "0.1"]),
    ]
    for program, words in programs:
        for flags, size, resize in (([], 224, 256), (["--eval-size", "64"], 64, 73)):
            out = tmp_path / f"{program}_{size}"
            run_here(program, "--checkpoint", path, "--workers", "0", *words, *flags, "--output-dir", out)
            result = read_json(out, program)
            assert (result["eval_size"], result["eval_resize"]) == (size, resize)
            assert result["eval_std"][0] == (0.229 if program == "knn_eval" else 0.228)
    words = ["--eval-size", "64", "--eval-resize", "90"]
    assert opened("cls_eval", "--checkpoint", path, *words).view == Preprocessing(size=64, resize=90, std=SWAV_STD)
    found = [read_json(tmp_path / f"lincls_eval_{size}", "lincls_eval")["history"][0]["loss"] for size in (224, 64)]
    assert found[0] != found[1]


def test_the_probe_trains_at_the_size_and_with_the_normalisation_of_its_test(run_of_160, monkeypatch):
    path, _ = run_of_160
    for words, size, red in (
        (["--preset", "swav"], 224, 0.228),
        ([], 224, 0.229),
        (["--eval-size", "96"], 96, 0.229),
    ):
        words = ["--checkpoint", str(path), "--workers", "0", "--batch-size", "6", "--lr", "1", *words]
        monkeypatch.setattr(sys, "argv", ["lincls_eval.py", *words])
        job, _ = linear.open_job(linear.parse_lincls_eval())
        views = linear.training_views(job)
        (recipe,) = views.recipes
        assert (recipe.size, recipe.scale, views.std[0], job.session.views.std[0]) == (size, (0.08, 1.0), red, red)
        (crops,) = views.finish([torch.zeros(1, 3, size, size)], np.array([0]), seed=0, epoch=0)
        assert crops[0, :, 0, 0].tolist() == pytest.approx([-0.485 / red, -0.456 / 0.224, -0.406 / 0.225])


def test_windows_are_those_of_the_map_of_the_evaluation_view(run_of_160, monkeypatch):
    """The last map has 56 places per side for views of 224 pixels, and 40 for training crops of 160."""
    words = ["--checkpoint", str(run_of_160[0]), "--workers", "0", "--batch-size", "6", "--pool-window", "55"]
    monkeypatch.setattr(sys, "argv", ["lincls_eval.py", *words])
    job, _ = linear.open_job(linear.parse_lincls_eval())
    assert job.probe.fc.in_features == 4 * 128
    (images, _) = next(iter(job.session.batches(job.test)))
    assert job.probe(images).shape == (6, 2)


def test_features_of_another_size_are_not_taken_from_the_cache(run_of_160, tmp_path, capsys):
    path, _ = run_of_160
    words = ["--checkpoint", path, "--workers", "0", "--k", "2", "--features-cache", tmp_path / "cache"]
    for number, flags in enumerate(([], ["--eval-size", "64"], ["--eval-resize", "240"])):
        run_here("knn_eval", *words, *flags, "--output-dir", tmp_path / "out")
        assert "taken from" not in capsys.readouterr().out
        assert len(list((tmp_path / "cache").iterdir())) == 2 * (number + 1)
    run_here("knn_eval", *words, "--eval-size", "224", "--eval-resize", "256", "--output-dir", tmp_path / "out")
    assert capsys.readouterr().out.count("taken from") == 2


def test_a_run_records_the_size_that_it_asked_for(tmp_path):
    data = make_pictures(tmp_path / "data", {"a": (9, 9, 9), "b": (90, 9, 9)}, size=(40, 50))
    words = ["--data", data, "--arch", "small_convnet", "--global-crops-size", "160", "--classes", "2"]
    path = save_untrained(tmp_path / "run.pt", *words, "--queue-length", "0", "--eval-size", "48", channels=3)
    assert opened("knn_eval", "--checkpoint", path, "--k", "1").view == Preprocessing(size=48, resize=55)
    other = opened("knn_eval", "--checkpoint", path, "--k", "1", "--eval-size", "32", "--eval-resize", "32")
    assert other.view == Preprocessing(size=32, resize=32)


def test_scores_during_training_are_those_of_the_evaluation(tmp_path):
    """--eval-every shows the images as cls_eval.py does."""
    colours = {"a": (9, 90, 9), "b": (90, 9, 9), "c": (9, 9, 90)}
    data = make_pictures(tmp_path / "data", colours, splits=(("train", 4), ("val", 8)), size=(40, 52), noise=140)
    words = ["--data", data, "--arch", "small_convnet", "--global-crops-size", "16", "--local-crops-number", "0"]
    words += ["--classes", "3", "--queue-length", "0", "--epochs", "1", "--warmup-epochs", "0", "--lr", "0.1"]
    words += ["--batch-size", "6", "--eval-every", "1", "--eval-size", "24", "--workers", "0", "--device", "cpu"]
    run_here("train", *words, "--output-dir", tmp_path / "run")
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    run_here("cls_eval", "--checkpoint", tmp_path / "run", "--workers", "0", "--device", "cpu")
    result = read_json(tmp_path / "run", "cls_eval")
    assert (result["eval_size"], result["eval_resize"]) == (24, 24)
    scores = json.dumps(result)
    assert all(str(json.loads(line)[name]) in scores for name in ("acc", "nmi"))
    # a run continues with another size
    run_here("train", *words, "--eval-size", "32", "--output-dir", tmp_path / "run")


def test_images_in_memory_stay_whole():
    """CIFAR scored by a network for photographs is enlarged and not cropped, unless a resize rule is given."""
    data = MemoryImages(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), ["a", "b"])
    trained = vars(parse_train(["--data", "somewhere", "--global-crops-size", "160"])[0])
    words = ["--checkpoint", "x", "--data", "cifar10", "--data-root", "x"]
    state = {"config": trained}
    view = choose_view(parse_cls_eval(words), state, data, data="cifar10")
    assert (view.size, view.resize, view.std) == (224, 224, TRUE_STD)  # as in its training, not as in CIFAR's
    view = choose_view(parse_cls_eval([*words, "--eval-size", "64"]), state, data, data="cifar10")
    assert (view.size, view.resize) == (64, 64)
    view = choose_view(
        parse_cls_eval([*words, "--eval-size", "28", "--eval-resize", "32"]), state, data, data="cifar10"
    )
    assert (view.size, view.resize) == (28, 32)
    views = build_views("cifar10", data, parse_train(["--data", "somewhere"])[0].views, evaluation=view)
    assert views.single(data.images).shape == (2, 3, 28, 28)


def test_a_plain_state_dict_follows_the_data_it_is_scored_on(tmp_path):
    torch.save(
        {f"backbone.{k}": v for k, v in build_backbone("cifar_resnet18").state_dict().items()}, tmp_path / "p.pth"
    )
    state = load_backbone(tmp_path / "p.pth", "cifar_resnet18")[1]
    assert evaluation_view(state, "cifar100-20") == of_training("cifar100-20", crop_size=32, augment="dino")
    assert evaluation_view(state, "somewhere") == Preprocessing(size=32, resize=32)


# --------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("flag", ["--eval-size", "--eval-resize"])
def test_digits_and_features_have_their_own_views(tmp_path, flag):
    path = save_untrained(tmp_path / "run.pt", "--classes", "10")
    with pytest.raises(
        InputError, match=f"{flag} is for photographs, but --data digits has its own views: drop {flag}"
    ):
        run_here("knn_eval", "--checkpoint", path, flag, "32")
    np.savez(tmp_path / "f.npz", features_train=np.ones((4, 3)), labels_train=np.arange(4))
    for words in (["--data", "digits"], ["--data", str(tmp_path / "f.npz"), "--arch", "identity"]):
        with pytest.raises(InputError, match=f"{flag} is for photographs, but --data .* has its own views"):
            parse_train([*words, flag, "32"])


def test_views_that_do_not_fit_are_refused(run_of_160, tmp_path):
    path, data = run_of_160
    for parse in (parse_cls_eval, parse_train):
        with pytest.raises(InputError, match="--eval-resize 64 is smaller than the evaluation view of 96 pixels"):
            parse(["--data", str(data), "--eval-size", "96", "--eval-resize", "64"])
        with pytest.raises(InputError, match="--eval-size is -1: expected at least 0"):
            parse(["--data", str(data), "--eval-size", "-1"])
    with pytest.raises(InputError, match="--eval-resize 64 is smaller than the evaluation view of 224 pixels"):
        run_here("cls_eval", "--checkpoint", path, "--eval-resize", "64")
    words = ["--arch", "vit_tiny", "--patch-size", "20", "--global-crops-size", "160", "--local-crops-number", "0"]
    message = "--eval-size 224 is no multiple of the 20 pixels of a patch of vit_tiny: give --eval-size 220"
    with pytest.raises(InputError, match=message):
        parse_train(["--data", str(data), *words, "--eval-every", "1"])
    given = save_untrained(tmp_path / "vit.pt", "--data", data, *words, "--classes", "2", channels=3)
    with pytest.raises(InputError, match=message):
        run_here("knn_eval", "--checkpoint", given, "--k", "1")
    assert opened("knn_eval", "--checkpoint", given, "--k", "1", "--eval-size", "220").view.size == 220


def test_moco_and_compared_files_keep_their_own_view(tmp_path):
    """The file to compare with has its own size, unless a flag sets that of all files."""
    network = torchvision_trunk("resnet18")
    state = {**network.state_dict(), "fc.weight": torch.ones(5, 512), "fc.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "classifier.pth")
    torch.save(scan_state(), tmp_path / "scan.pth.tar")
    assert evaluation_view(load_backbone(save_as_moco(tmp_path / "m.pth.tar", network))[1], "x").size == 224
    data = photographs(tmp_path / "data", (40, 40), number=1)
    words = ["--checkpoint", str(tmp_path / "classifier.pth"), "--data", str(data), "--workers", "0"]
    words += ["--compare", str(tmp_path / "scan.pth.tar"), "--arch", "cifar_resnet18"]
    with pytest.raises(InputError, match=r"--arch cifar_resnet18: checkpoint .*classifier\.pth holds resnet18"):
        classification.open_job(parse_cls_eval(words))
    torch.save(scan_state(seed=1), tmp_path / "first.pth.tar")
    words[1] = str(tmp_path / "first.pth.tar")
    for flags, size in ([], 32), (["--eval-size", "48"], 48):
        job = classification.open_job(parse_cls_eval([*words, *flags]))
        (other,) = job.others.values()
        assert (job.session.view.size, other[2].eval_size, other[2].std) == (size, size, CIFAR10[1])
