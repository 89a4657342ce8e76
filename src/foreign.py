"""Recognise the checkpoints of other projects and rename their tensors to our names.

Our names are `backbone.*`, `projection_head.mlp.*`, `classifiers.<k>.*` and `queue.*`. The table `SOURCES` describes one
kind of file per entry and is searched from top to bottom. Its facts come from the repositories of the projects. The names
of the tensors were checked against models that were built with the projects' code.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from . import schema
from .errors import InputError
from .preprocessing import (
    CIFAR10_MEAN,
    CIFAR100_MEAN,
    CIFAR100_STD,
    IMAGENET,
    SWAV_STD,
    Preprocessing,
)

Rules: TypeAlias = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
Views: TypeAlias = dict[tuple[str, str], Preprocessing]


class Weights(NamedTuple):
    """Hold the contents of a file.

    Attributes:
        tensors: the tensors under our names.
        source: the project that wrote the file.
        left_out: the original names of the tensors that are not in `tensors`.
        method: the method of this project to which all of `tensors` belong; None: only the backbone can be used. Files of
            DeepCluster-v2 and SeLa-v2 have the same tensor names and hold the same network, so both are deepcluster_v2.
        arch: the backbone that the file names. If it names none, a ResNet is recognised by its blocks and shapes. "" if
            the backbone is unknown, or if `arches` names several.
        record: the other contents. For a checkpoint of train.py, these are all of its other entries. For other files,
            these are the number of epochs and, if the file names it, the classifier with the lowest loss. SCAN's files
            name it.
        arches: the backbones that these tensors fit, if there are several. The file does not tell which one it is.
    """

    tensors: dict[str, Tensor]
    source: str
    left_out: list[str]
    method: str | None
    arch: str
    record: dict[str, Any]
    arches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Describe one kind of file of another project.

    Attributes:
        name: the project and the kind of file, for messages.
        signs: patterns. Each must match the beginning of some name in the state dict, without DataParallel's `module.`.
        rules: pairs (pattern, replacement) for the beginning of a name. The first pattern that matches is used. A tensor
            whose name matches no pattern is left out.
        beside: names of entries of the file, of which at least one must exist; (): no condition.
        method: see `Weights`.
        arches: the backbones that have these names and shapes, if they are not torchvision's.
        network: returns the name of the backbone from the renamed tensors; None: the file names it, or it is a ResNet.
        views: {(backbone, data set): evaluation view}. The key (backbone, "") is for all other data sets, and ("", "") for all
            other backbones. {}: the source does not state it, so that the rule of our own networks decides.
    """

    name: str
    signs: tuple[str, ...]
    rules: Rules
    beside: tuple[str, ...] = ()
    method: str | None = None
    arches: tuple[str, ...] = ()
    network: Callable[[dict[str, Tensor]], str] | None = None
    views: Views = field(default_factory=lambda: {("", ""): IMAGENET})


def _small_block(match: re.Match[str]) -> str:
    """Convert the beginning of a name in a ResNet-18 with two blocks per layer to the names of our `CifarResNet`."""
    layer, block, part = int(match[1]), int(match[2]), match[3]
    inside = {"conv1": "residual.0.0", "bn1": "residual.0.1", "conv2": "residual.2.0", "bn2": "residual.2.1"}
    return f"backbone.stages.{2 * (layer - 1) + block}.{inside.get(part, part)}."


def _alexnet_in(tensors: dict[str, Tensor]) -> str:
    """Return the variant of SeLa's AlexNet with these tensors."""
    first = tensors.get("backbone.features.0.weight")
    return "sela_alexnet_small" if first is not None and len(first) == 64 else "sela_alexnet"


TRUNK = (r"(conv1|bn1|layer[1-4])\.", r"backbone.\1.")  # torchvision's names
SCAN_HEADS = (
    (r"cluster_head\.(\d+)\.", r"classifiers.\1."),
    (r"contrastive_head\.", "projection_head.mlp."),
)

SELA_HEADS = ((r"top_layer(\d+)\.", r"classifiers.\1."), (r"top_layer\.(0\.)?", "classifiers.0."))

PROTOTYPES = (  # SwAV has one matrix of prototypes, DeepCluster-v2 and SeLa-v2 have a numbered matrix for each head
    TRUNK,
    (r"projection_head\.", "projection_head.mlp."),
    (r"prototypes\.prototypes(\d+)\.", r"classifiers.\1."),
    (r"prototypes\.", "classifiers.0."),
)

# Evaluation views, as in the code of the projects. All others evaluate ImageNet as `IMAGENET`.
SWAV_VIEWS: Views = {("", ""): replace(IMAGENET, std=SWAV_STD)}
SCAN_VIEWS: Views = {
    ("cifar_resnet18", ""): Preprocessing(resize=32, size=32, mean=CIFAR10_MEAN, std=(0.2023, 0.1994, 0.2010)),
    ("cifar_resnet18", "cifar100-20"): Preprocessing(resize=32, size=32, mean=CIFAR100_MEAN, std=CIFAR100_STD),
    ("stl_resnet18", ""): Preprocessing(resize=96, size=96),
}

SOURCES = (
    Source(
        "Self-Classifier, the authors' second generation",
        signs=(r"backbone\.", r"cls_0\.weight_v"),
        rules=(
            (r"backbone\.", "backbone."),
            (r"mlp_head\.mlp\.", "projection_head.mlp."),
            (r"cls_(\d+)\.", r"classifiers.\1."),
        ),
        method="self_classifier",
    ),
    Source(
        "Self-Classifier, the authors' first generation",
        signs=(r"backbone\.", r"cls_0$"),
        rules=(
            (r"backbone\.fc\.", "projection_head.mlp."),
            (r"backbone\.", "backbone."),
            (r"cls_(\d+)$", r"classifiers.\1.weight"),
        ),
        method="self_classifier_v1",
    ),
    Source(  # leaves out the momentum encoder and the queue of negatives
        "MoCo v2",
        signs=(r"encoder_q\.conv1\.",),
        rules=((r"encoder_q\.fc\.", "projection_head.mlp."), (r"encoder_q\.", "backbone.")),
    ),
    Source(
        "SimSiam",
        signs=(r"encoder\.conv1\.", r"predictor\."),
        rules=(
            (r"encoder\.fc\.", "projection_head.mlp."),
            (r"encoder\.", "backbone."),
            (r"predictor\.", "predictor."),
        ),
    ),
    Source(
        "SwAV",
        signs=(r"conv1\.", r"projection_head\.\d", r"prototypes\.weight$"),
        rules=PROTOTYPES,
        views=SWAV_VIEWS,
        method="swav",
    ),
    Source(
        "DeepCluster-v2 or SeLa-v2",
        signs=(r"conv1\.", r"projection_head\.\d", r"prototypes\.prototypes0\."),
        rules=PROTOTYPES,
        views=SWAV_VIEWS,
        method="deepcluster_v2",
    ),
    Source(  # a network that was fine-tuned on labels or trained without prototypes
        "a network of SwAV's code",
        signs=(r"conv1\.", r"projection_head\."),
        rules=PROTOTYPES,
        views=SWAV_VIEWS,
    ),
    Source(  # The networks for CIFAR and STL-10 have the same names and shapes, as max-pooling has no parameters.
        "SCAN, ResNet-18 for small images",
        signs=(r"backbone\.layer2\.0\.shortcut\.", r"(cluster|contrastive)_head\."),
        rules=(
            (r"backbone\.conv1\.", "backbone.stem.0.0."),
            (r"backbone\.bn1\.", "backbone.stem.0.1."),
            (r"backbone\.layer(\d)\.(\d)\.(\w+)\.", _small_block),
            *SCAN_HEADS,
        ),
        arches=("cifar_resnet18", "stl_resnet18"),
        views=SCAN_VIEWS,
    ),
    Source(
        "SCAN, ResNet-50",
        signs=(r"backbone\.", r"(cluster|contrastive)_head\."),
        rules=((r"backbone\.", "backbone."), *SCAN_HEADS),
    ),
    Source(
        "SeLa, AlexNet",
        signs=(r"features\.", r"classifier\.4\.", r"top_layer"),
        rules=(
            (r"features\.(module\.)?", "backbone.features."),
            (r"classifier\.", "backbone.classifier."),
            *SELA_HEADS,
        ),
        method="sela",
        network=_alexnet_in,
    ),
    Source(
        "SeLa, pre-activation ResNet",
        signs=(r"features\.(module\.)?2\.0\.bn1\.", r"top_layer"),
        rules=((r"features\.(module\.)?", "backbone.features."), *SELA_HEADS),
        method="sela",
        network=lambda tensors: "sela_resnet50",
    ),
    Source(  # a ResNet of torchvision as a sequence
        "SeLa, ResNet",
        signs=(r"features\.(module\.)?4\.0\.conv1\.", r"top_layer"),
        rules=(
            (r"features\.(module\.)?0\.", "backbone.conv1."),
            (r"features\.(module\.)?1\.", "backbone.bn1."),
            (r"features\.(?:module\.)?([4-7])\.", lambda match: f"backbone.layer{int(match[1]) - 3}."),
            *SELA_HEADS,
        ),
        method="sela",
        network=lambda tensors: _resnet_in(tensors),
    ),
    Source(
        "SeLa, exported to torchvision's names",
        signs=(r"conv1\.", r"layer1\.0\."),
        rules=(TRUNK, (r"fc\.", "classifiers.0.")),
        beside=("labels", "L"),
    ),
    Source(  # leaves out fc
        "OBoW",
        signs=(r"conv1\.", r"layer1\.0\."),
        rules=(TRUNK,),
        beside=("network",),
    ),
    Source(
        "a ResNet in torchvision's names (Barlow Twins, DINO, torchvision)",
        signs=(r"conv1\.", r"layer1\.0\."),
        rules=(TRUNK, (r"fc\.", "classifiers.0.")),
    ),
    Source(
        "a plain state dict of self_classifier",
        signs=(r"backbone\.", r"classifiers\.0\.weight_v"),
        rules=((r"(\w+)", r"\1"),),
        method="self_classifier",
        views={},
    ),
    Source(
        "a plain state dict of this project",
        signs=(r"backbone\.",),
        rules=((r"(\w+)", r"\1"),),
        views={},
    ),
)

DEPTHS: dict[tuple[tuple[int, ...], bool], str] = {  # (blocks of the four layers, three convolutions per block)
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
WEIGHTS = ("weight", "weight_g", "weight_v", "bias")  # endings of names of tensors that have a dimension
WRAPPERS = ("state_dict", "model", "network", "net")  # entries in which a file may keep the state dict


class AuthorsQueue:
    """Replace the class `utils.NNQueue`, which the authors of Self-Classifier pickle. It keeps tensors and runs no code."""

    state: dict[str, Any] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        kinds = {"queue": Tensor, "queue_indices": Tensor, "queue_targets": Tensor, "ptr": int, "full": bool}
        for name, kind in kinds.items():
            if not isinstance(state, dict) or type(state.get(name)) is not kind:
                raise InputError(
                    f"its utils.NNQueue has no {kind.__name__} called {name}: use another copy of the file"
                )
            if kind is Tensor:
                schema.dense_tensor(f"nn_queue.{name}", state[name])
        rows = state["queue"]
        if rows.ndim != 2 or any(state[name].shape != rows.shape[:1] for name in ("queue_indices", "queue_targets")):
            raise InputError("its utils.NNQueue has tensors of different lengths: use another copy of the file")
        if not 0 <= state["ptr"] <= len(rows):
            raise InputError("its utils.NNQueue writes outside the queue: use another copy of the file")
        self.state = state

    def buffers(self) -> dict[str, Tensor]:
        """Return the queue as the buffers of our `NearestNeighborQueue`; nothing if the file holds no state of it."""
        if self.state is None:
            return {}
        return {
            "queue.embeddings": self.state["queue"],
            "queue.indices": self.state["queue_indices"].long(),
            "queue.labels": self.state["queue_targets"].long(),
            "queue._pointer": torch.tensor(self.state["ptr"]),
            "queue._full": torch.tensor(self.state["full"]),
        }


def translate(content: object) -> Weights:
    """Find the state dict in the content of a file, recognise its source and rename its tensors to our names.

    Raises:
        InputError: if there is no state dict, or its source is not in `SOURCES`.
    """
    state, beside = _find_state_dict(content)
    state = schema.state_dict("", state, scalars=None)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    for source in SOURCES:
        known = all(any(re.match(sign, name) for name in state) for sign in source.signs)
        if known and (not source.beside or beside.keys() & set(source.beside)):
            break
    else:
        raise InputError(
            f"a state dict with unknown names ({_some(state)}): expected a file of train.py or one of docs/pretrained.md"
        )
    renamed = {name: _rename(name, source.rules) for name in state}
    tensors = {new: state[name] for name, new in renamed.items() if new}
    for name, new in renamed.items():
        if new and state[name].ndim == 0 and new.endswith(WEIGHTS):
            raise InputError(f"the entry {schema.shown(name)} has no dimension, expected weights: use another file")
    queue = beside.get("nn_queue") if "state_dict" in beside else None
    if isinstance(queue, AuthorsQueue):
        tensors |= queue.buffers()
    rotation: set[str] = set()
    if source.method == "sela":
        rotation = _rotation_head(tensors)
        tensors = {name: value for name, value in tensors.items() if name not in rotation}
        if "L" in beside:
            schema.dense_tensor("L", beside["L"])
            tensors["labels"] = beside["L"].int()
    arch, epoch = beside.get("arch"), beside.get("epoch")
    best = next((beside[name] for name in ("head", "best_loss_head") if isinstance(beside.get(name), int)), None)
    history = {} if best is None else {"history": [{"classifier": best}]}
    return Weights(
        tensors,
        source.name,
        left_out=[name for name, new in renamed.items() if not new or new in rotation],
        method=source.method,
        arch=_backbone_in(tensors, source, named=arch),
        record={"epoch": epoch if type(epoch) is int else None, **history},
        arches=source.arches,
    )


def _rotation_head(tensors: dict[str, Tensor]) -> set[str]:
    """Return the names of the head of SeLa that predicts rotations: the last one, with four classes where others have more."""
    heads = [k for k in range(99) if f"classifiers.{k}.weight" in tensors]
    sizes = [len(tensors[f"classifiers.{k}.weight"]) for k in heads]
    if len(sizes) < 2 or sizes[-1] != 4 or min(sizes[:-1]) <= 4:
        return set()
    return {f"classifiers.{heads[-1]}.{part}" for part in ("weight", "bias")}


def _backbone_in(tensors: dict[str, Tensor], source: Source, *, named: object) -> str:
    """Return the backbone of a file, "" if it is unknown.

    Args:
        named: the entry of the file that names it, if there is one.
    """
    if source.arches:
        return ""
    if source.network:
        return source.network(tensors)
    return schema.shown(named) if isinstance(named, str) else _resnet_in(tensors)


def evaluation_view(name: str, *, arch: str, data: str) -> Preprocessing | None:
    """Return the evaluation view of a network of another project.

    Args:
        name: the source, as in `Weights`.
        arch: the backbone.
        data: the data set on which the network is evaluated, as in --data.

    Returns:
        None: the source does not state it.
    """
    (views,) = (source.views for source in SOURCES if source.name == name)
    keys = ((arch, data), (arch, ""), ("", ""))
    return next((views[key] for key in keys if key in views), None)


def _resnet_in(tensors: dict[str, Tensor]) -> str:
    """Return the name of the ResNet with these tensors, which have torchvision's names; "" if it is another network.

    Other networks have the same names, such as ResNets that are wider, or have groups, only within the blocks.
    """
    stem, inner = (tensors.get(f"backbone.{name}.weight") for name in ("conv1", "layer1.0.conv2"))
    if stem is None or inner is None:
        return ""
    blocks = tuple(sum(f"backbone.layer{i}.{j}.conv1.weight" in tensors for j in range(99)) for i in range(1, 5))
    depth = DEPTHS.get((blocks, "backbone.layer1.0.conv3.weight" in tensors), "")
    widen = {64: "", 128: "w2", 256: "w4", 320: "w5"}.get(len(stem))
    if widen is None or stem.shape[1:] != (3, 7, 7) or inner.shape[:2] != (len(stem), len(stem)):
        return ""
    return depth + widen if depth == "resnet50" or not widen else ""


def _find_state_dict(content: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict and the named entries of the file, which are {} if the file is only a state dict."""
    if not isinstance(content, dict):
        raise InputError(f"no state dict in it, but a {type(content).__name__}: expected a state dict")
    if _is_state_dict(content):
        return content, {}
    for wrapper in WRAPPERS:
        state = content.get(wrapper)
        if _is_state_dict(state):
            return state, {key: value for key, value in content.items() if isinstance(key, str)}
    raise InputError(
        f"no state dict in it, but a {type(content).__name__} of {_some(content)}: expected a state dict, or one in an "
        f"entry {', '.join(WRAPPERS)}"
    )


def _is_state_dict(value: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _rename(name: str, rules: Rules) -> str | None:
    """Return our name of a tensor; None if no rule matches."""
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return None


def _some(names: Iterable[object]) -> str:
    """Return the first four names, for a message."""
    listed = list(names)
    return ", ".join(map(schema.shown, listed[:4])) + (", ..." if len(listed) > 4 else "")
