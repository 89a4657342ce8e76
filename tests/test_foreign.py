"""Every published layout gets our names: those of the authors' code (golden), and those that the projects only describe."""

import json

import pytest
import torch
from conftest import GOLDEN
from torch import nn
from torchvision.models import (
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

from src.errors import InputError
from src.foreign import translate
from src.methods import METHODS
from src.models.backbones import build_backbone

META = torch.device("meta")  # names and shapes without memory


def empty(*shape):
    return torch.empty(shape, device=META)


def layout(name):
    path = GOLDEN / "key_layouts.json"
    if not path.exists():
        pytest.skip(f"the authors' layouts are not here: {path.name} is looked for beside the repository")
    return {key: empty(*shape) for key, shape in json.loads(path.read_text())[name]}


def trunk(network=resnet50, prefix="", fc=0):
    with META:
        state = network(num_classes=fc or 1).state_dict()
    return {prefix + key: value for key, value in state.items() if fc or not key.startswith("fc.")}


def parts(keys):
    names = [key.split(".")[0] for key in keys]
    return {name: names.count(name) for name in names}


def load_backbone(weights, arch):
    """Strictly: a name too many, too few, or of another shape raises."""
    with META:
        backbone = build_backbone(arch)
    backbone.load_state_dict(
        {key.removeprefix("backbone."): v for key, v in weights.tensors.items() if key.startswith("backbone.")}
    )


def linear(prefix, *shape):
    return {f"{prefix}.weight": empty(*shape), f"{prefix}.bias": empty(shape[0])}


def sela_alexnet(arch):
    """An AlexNet of SeLa's code on several GPUs, with two heads."""
    with META:
        state = build_backbone(arch).state_dict()
    state = {key.replace("features.", "features.module."): value for key, value in state.items()}
    return state | linear("top_layer0", 50, 4096) | linear("top_layer1", 50, 4096)


def sela_resnet():
    """The first version of SeLa's ResNet-50: torchvision's, as a sequence."""
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    parted = {key: key.split(".", 1) for key in trunk()}
    return {f"features.{places[first]}.{rest}": trunk()[key] for key, (first, rest) in parted.items()}


# name of the layout, what the file looks like around it, source, backbone, our parts, what is left out
LAYOUTS = [
    ("self_classifier_resnet50", "state_dict", "second gen", "resnet50", {"projection_head": 9, "classifiers": 8}, {}),
    (
        "self_classifier_resnet18_3linear_no_bn",
        "state_dict",
        "second gen",
        "resnet18",
        {"projection_head": 6, "classifiers": 4},
        {},
    ),
    ("swav_resnet50", "", "SwAV", "resnet50", {"projection_head": 9, "classifiers": 1}, {}),
    ("swav_resnet50w2", "", "SwAV", "resnet50w2", {"projection_head": 9, "classifiers": 1}, {}),
    ("scan_cifar10_cluster", "model", "ResNet-18 for small", "cifar_resnet18", {"classifiers": 2}, {}),
    ("scan_cifar10_simclr", "", "ResNet-18 for small", "cifar_resnet18", {"projection_head": 4}, {}),
    ("sela_resnetv2_1x1000", "state_dict", "SeLa, pre-activation", "sela_resnet50", {"classifiers": 2}, {}),
    ("sela_alexnet_10x3000", "", "SeLa, AlexNet", "sela_alexnet", {"classifiers": 20}, {}),
    (
        "mocov2_resnet50",
        "state_dict",
        "MoCo v2",
        "resnet50",
        {"projection_head": 4},
        {"encoder_k": 322, "queue": 1, "queue_ptr": 1},
    ),
    ("simsiam_resnet50", "state_dict", "SimSiam", "resnet50", {"projection_head": 17, "predictor": 8}, {}),
]


@pytest.mark.parametrize(("name", "wrapper", "source", "arch", "expected", "left_out"), LAYOUTS)
def test_layouts_of_the_authors_code_get_our_names(name, wrapper, source, arch, expected, left_out):
    state = layout(name)
    weights = translate({wrapper: state, "epoch": 3, "arch": "anything"} if wrapper else state)
    assert source in weights.source
    if arch:
        load_backbone(weights, arch)
    if "scan" in name:  # max-pooling has no parameters, so the file fits both networks
        assert (weights.arch, weights.arches) == ("", ("cifar_resnet18", "stl_resnet18"))
        load_backbone(weights, "stl_resnet18")
    assert {part: n for part, n in parts(weights.tensors).items() if part != "backbone" or not arch} == expected
    assert parts(weights.left_out) == left_out
    assert len(weights.tensors) + len(weights.left_out) == len(state)
    assert {id(value) for value in weights.tensors.values()} <= {id(value) for value in state.values()}


@pytest.mark.parametrize(
    ("name", "arch", "knobs"),
    [
        ("self_classifier_resnet50", "resnet50", {}),
        (
            "self_classifier_resnet18_3linear_no_bn",
            "resnet18",
            {"classes": (20, 50), "dim": 64, "hidden_dim": 256, "head_layers": 3, "head_bn": False},
        ),
    ],
)
def test_the_authors_second_generation_loads_strictly(name, arch, knobs):
    weights = translate({"state_dict": layout(name), "arch": arch, "epoch": 800})
    assert (weights.method, weights.arch, weights.record) == ("self_classifier", arch, {"epoch": 800})
    kind = METHODS["self_classifier"]
    with META:
        method = kind(build_backbone(arch), kind.Config(**knobs, queue_length=0))
    method.load_state_dict(weights.tensors)


def norm(prefix, width):
    with META:
        return {f"{prefix}.{key}": value for key, value in nn.BatchNorm1d(width).state_dict().items()}


def swav_head(prefix="module.", hidden=2048, width=2048, bn=True):
    head = linear("projection_head.0", hidden, width) | (norm("projection_head.1", hidden) if bn else {})
    head |= linear(f"projection_head.{3 if bn else 2}", 128, hidden)
    return {prefix + key: value for key, value in head.items()}


def wide_file(arch, hidden, bn):
    with META:
        backbone = build_backbone(arch)
    state = {f"module.{key}": value for key, value in backbone.state_dict().items()}
    head = swav_head(hidden=hidden, width=backbone.width, bn=bn)
    return state | head | {"module.prototypes.weight": empty(3000, 128)}


# the file, then the method that it is, on which backbone, with what settings beside the published ones
PROTOTYPES = {
    "swav": (lambda: layout("swav_resnet50"), "swav", "resnet50", {}),
    "swav, wide": (lambda: layout("swav_resnet50w2"), "swav", "resnet50w2", {"hidden_dim": 8192}),
    "swav, wider": (lambda: wide_file("resnet50w4", 8192, True), "swav", "resnet50w4", {"hidden_dim": 8192}),
    "swav, widest": (  # without batch normalisation in the head
        *(lambda: wide_file("resnet50w5", 10240, False), "swav", "resnet50w5"),
        {"hidden_dim": 10240, "head_bn": False},
    ),
    "deepcluster-v2, sela-v2": (
        lambda: trunk(prefix="module.") | swav_head() | HEADS,
        "deepcluster_v2",
        "resnet50",
        {},
    ),
}


@pytest.mark.parametrize("name", PROTOTYPES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_networks_with_prototypes_load_with_no_name_left_over(name, wrapped):
    file, method, arch, knobs = PROTOTYPES[name]
    state = file()
    weights = translate({"epoch": 400, "state_dict": state, "optimizer": {}} if wrapped else state)
    assert (weights.method, weights.arch, weights.left_out) == (method, arch, [])
    assert weights.record == {"epoch": 400 if wrapped else None}
    kind = METHODS[method]
    with META:
        built = kind(build_backbone(arch), kind.Config(**knobs))
    missing, unexpected = built.load_state_dict(weights.tensors, strict=False)
    assert not unexpected
    assert {key.split(".")[0] for key in missing} <= {"queue_started", "bank"}  # which no file of theirs holds
    assert len(weights.tensors) == len(state)


@pytest.mark.parametrize("network", [resnet18, resnet34, resnet50, resnet101, resnet152])
def test_resnets_are_known_by_their_blocks(network):
    assert translate(trunk(network)).arch == network.__name__


@pytest.mark.parametrize("network", [wide_resnet50_2, wide_resnet101_2, resnext50_32x4d])
def test_no_other_network_is_taken_for_a_resnet(network):
    assert translate(trunk(network)).arch == ""


FIRST_GENERATION = (
    trunk(resnet18, "module.backbone.")
    | linear("module.backbone.fc.0", 64, 512)
    | norm("module.backbone.fc.1", 64)
    | linear("module.backbone.fc.3", 16, 64)
    | {f"module.cls_{k}": empty(30, 16) for k in range(11)}
)
HEADS = {f"module.prototypes.prototypes{k}.weight": empty(3000, 128) for k in range(3)}
SCAN_HEADS = {key: value for k in range(10) for key, value in linear(f"cluster_head.{k}", 1000, 2048).items()}

# what the reference sheets say of files whose code was not run: file, source, backbone, our other names, left out
DESCRIBED = {
    "self-classifier-v1": (
        {"state_dict": FIRST_GENERATION, "arch": "resnet18"},
        "first gen",
        "resnet18",
        {"projection_head.mlp.0.weight", "projection_head.mlp.3.bias", "classifiers.10.weight"},
        [],
    ),
    "deepcluster-v2": (
        trunk(prefix="module.") | swav_head() | HEADS,
        "DeepCluster-v2",
        "resnet50",
        {"projection_head.mlp.1.running_var", "classifiers.0.weight", "classifiers.2.weight"},
        [],
    ),
    "swav, fine-tuned": (
        {"state_dict": trunk(prefix="module.") | linear("module.projection_head", 1000, 2048), "epoch": 20},
        "a network of SwAV's code",
        "resnet50",
        {"projection_head.mlp.weight", "projection_head.mlp.bias"},
        [],
    ),
    "obow": (
        {"network": trunk(fc=8192)},
        "OBoW",
        "resnet50",
        set(),
        ["fc.weight", "fc.bias"],
    ),
    "barlow twins, dino": (trunk(), "Barlow Twins, DINO", "resnet50", set(), []),
    "torchvision": (trunk(resnet18, fc=1000), "torchvision", "resnet18", {"classifiers.0.weight"}, []),
    "sela, exported": (
        {"state_dict": trunk(fc=1000), "labels": empty(1, 99)},
        "SeLa, exported",
        "resnet50",
        {"classifiers.0.weight", "classifiers.0.bias"},
        [],
    ),
    "scan, imagenet": (
        {"model": trunk(prefix="backbone.") | SCAN_HEADS, "head": 4},
        "SCAN, ResNet-50",
        "resnet50",
        {"classifiers.4.weight", "classifiers.9.bias"},
        [],
    ),
    "scan, parallel": (
        {"model": {f"module.{k}": v for k, v in (trunk(prefix="backbone.") | SCAN_HEADS).items()}, "best_loss_head": 4},
        "SCAN, ResNet-50",
        "resnet50",
        {"classifiers.4.weight"},
        [],
    ),
    "sela, parallel": (
        {"state_dict": sela_alexnet("sela_alexnet_small"), "L": torch.zeros(2, 99, dtype=torch.long, device="meta")},
        "SeLa, AlexNet",
        "sela_alexnet_small",
        {"classifiers.0.weight", "classifiers.1.bias", "labels"},
        [],
    ),
    "sela, with rotations": (
        sela_alexnet("sela_alexnet") | linear("top_layer2", 4, 4096),
        "SeLa, AlexNet",
        "sela_alexnet",
        {"classifiers.0.weight", "classifiers.1.bias"},
        ["top_layer2.weight", "top_layer2.bias"],
    ),
    "sela, resnet": (
        sela_resnet() | linear("top_layer.0", 1000, 2048),
        "SeLa, ResNet",
        "resnet50",
        {"classifiers.0.weight", "classifiers.0.bias"},
        [],
    ),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_layouts_of_the_sheets_get_our_names(name):
    content, source, arch, some, left_out = DESCRIBED[name]
    weights = translate(content)
    assert source in weights.source
    assert some <= weights.tensors.keys()
    assert weights.left_out == left_out
    if arch:
        load_backbone(weights, arch)
        assert set(parts(weights.tensors)) - {"backbone"} == {key.split(".")[0] for key in some}


def test_scans_small_resnet_computes_what_its_names_mean():
    # a block's convolutions and its shortcut must not be exchanged: their shapes alone would not tell in every block
    state = layout("scan_cifar10_simclr")
    renamed = {id(value): key for key, value in translate(state).tensors.items()}
    for theirs, ours in {
        "backbone.conv1.weight": "backbone.stem.0.0.weight",
        "backbone.layer1.0.conv1.weight": "backbone.stages.0.residual.0.0.weight",
        "backbone.layer1.1.conv2.weight": "backbone.stages.1.residual.2.0.weight",
        "backbone.layer3.0.bn2.bias": "backbone.stages.4.residual.2.1.bias",
        "backbone.layer4.0.shortcut.1.weight": "backbone.stages.6.shortcut.1.weight",
    }.items():
        assert renamed[id(state[theirs])] == ours


@pytest.mark.parametrize("name", METHODS)
def test_a_plain_state_dict_of_a_method_keeps_its_names(name):
    kind = METHODS[name]
    with META:
        state = kind(build_backbone("resnet18"), kind.Config()).state_dict()
    weights = translate(state)
    assert weights.tensors.keys() == state.keys()
    assert weights.left_out == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.weight": empty(1)}, r"unknown names \(a\.weight\)"),
        ({"state_dict": {}, "epoch": 3}, "no state dict in it, but a dict of state_dict, epoch"),
        ({"model": "text", 3: empty(1)}, "no state dict"),
        ([1, 2], "but a list"),
        ({}, "no state dict"),
    ],
)
def test_what_is_no_known_state_dict_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        translate(content)
