"""From a file to a network: methods, classifiers and backbones, from our own checkpoints and from released files."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint
from .config import TrainOptions, ViewSettings, as_plain, read_method
from .errors import InputError
from .foreign import Weights
from .methods import METHODS, Method, PrototypeMethod, build_method
from .models.backbones import build_backbone
from .models.heads import LinearClassifiers
from .pretrained import resolve


class Unclassified(InputError):
    """Weights of a backbone, where a method with classifiers was expected."""


def load_method(name: str | Path) -> tuple[Method, dict[str, Any]]:
    """Rebuild the method that a checkpoint holds, with its weights, in evaluation mode.

    Args:
        name: a path or a released model: a checkpoint of train.py, or one of the authors', whose settings are read
            off the shapes of its tensors. One of SeLa-v2 becomes DeepCluster-v2, which is the same network.

    Returns:
        The method, on the CPU, and the rest of the checkpoint (`config`, `history`, ...). Of an authors' file the
        configuration does not name the data.

    Raises:
        InputError: if the file is neither, or its weights do not fit what its configuration names; Unclassified if it is
            a backbone alone.
    """
    weights = checkpoint.read_weights(resolve(name))
    if weights.method not in METHODS:
        known = weights.method or f"a backbone ({weights.source}) without classifiers of a method here"
        kind = InputError if weights.method else Unclassified
        raise kind(f"checkpoint {name}: holds {known}; expected {', '.join(METHODS)}")
    if not weights.arch:
        raise InputError(
            f"checkpoint {name}: does not say of which architecture it is, and has not the shapes of a ResNet: "
            "give a whole checkpoint"
        )
    own = "config" in weights.record
    state = weights.record if own else {"config": _authors_settings(weights), "history": [], **weights.record}
    settings = state["config"]
    kind = METHODS[settings["method"]].Config
    knobs = {field.name: settings[field.name] for field in fields(kind)}
    knobs = {name: tuple(value) if isinstance(value, list) else value for name, value in knobs.items()}
    method = build_method(settings["method"], kind(**knobs), settings)
    method.make_room(weights.tensors)
    network = _network(method)  # all that an authors' file holds: neither SwAV's queue nor a bank is in it
    memory = {} if own else {key: value for key, value in method.state_dict().items() if _part(key) not in network}
    checkpoint.load_into(method, {**memory, **weights.tensors}, f"checkpoint {name}")
    return method.eval(), state


def load_classifiers(name: str | Path, arch: str = "") -> tuple[Method | LinearClassifiers, dict[str, Any]]:
    """Any file that can say which cluster an image is in: a method of this project, or linear classifiers on a backbone.

    Args:
        name, arch: as for `load_backbone`.

    Returns:
        A module with `backbone`, `predict`, `classes` and `temperature`, and the rest of the checkpoint.

    Raises:
        Unclassified: if the file holds no classifiers.
        InputError: as `load_backbone`, or if the classifiers do not fit the backbone.
    """
    weights = checkpoint.read_weights(resolve(name))
    if weights.method in METHODS:
        if arch and weights.arch and arch != weights.arch:
            raise InputError(f"--arch {arch}: checkpoint {name} holds {weights.arch}: drop --arch")
        return load_method(name)
    heads = {key: value for key, value in weights.tensors.items() if _part(key) == "classifiers"}
    if not heads:
        held = weights.method or f"a backbone ({weights.source})"
        raise Unclassified(f"checkpoint {name}: holds {held} without classifiers; expected a method or classifiers")
    backbone, state = load_backbone(name, arch)
    classifiers = []
    while f"classifiers.{len(classifiers)}.weight" in heads:
        prefix = f"classifiers.{len(classifiers)}"
        weight, bias = heads.pop(f"{prefix}.weight"), heads.pop(f"{prefix}.bias", None)
        if weight.ndim != 2 or weight.shape[1] != backbone.width:
            raise InputError(
                f"checkpoint {name}: {prefix}.weight is of shape {tuple(weight.shape)}, the backbone {state['config']['arch']} "
                f"has {backbone.width} features: it needs another --arch, or is of no use here"
            )
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
        classifiers.append(linear)
    if heads or not classifiers:
        raise InputError(f"checkpoint {name}: classifiers with unknown names ({', '.join(list(heads)[:3])})")
    return LinearClassifiers(backbone, classifiers).eval(), state


def load_backbone(name: str | Path, arch: str = "") -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of any file this project reads, with its weights, in evaluation mode.

    Args:
        name: a path or a released model.
        arch: what it is, where the file does not say; resnet50 if "".

    Returns:
        The backbone, on the CPU, and the rest of the checkpoint as in `load_method`. Of a file that is not train.py's the
        configuration does not name the data.

    Raises:
        InputError: if there is no backbone in it, or one that does not fit the architecture.
    """
    weights = checkpoint.read_weights(resolve(name))
    known = weights.arch or arch or "resnet50"
    if arch and arch != known:
        raise InputError(f"--arch {arch}: checkpoint {name} holds {known}: drop --arch")
    # of other files the heads, of whatever shape, stay unread
    if weights.method in METHODS and "config" in weights.record:
        method, state = load_method(name)
        return method.backbone, state
    tensors = {key.removeprefix("backbone."): v for key, v in weights.tensors.items() if key.startswith("backbone.")}
    if not tensors:
        raise InputError(f"checkpoint {name}: no backbone in it, but {_count(weights.tensors)}")
    patches = tensors.get("patch_embed.proj.weight")
    patch_size = patches.shape[-1] if patches is not None else 16
    size = 32 if known.startswith("cifar") else TrainOptions.global_crops_size
    options = TrainOptions(arch=known, patch_size=patch_size, global_crops_size=size)
    settings = {**as_plain(options), "method": weights.source, "channels": 3, "data": "", "seed": None}
    settings |= weights.record.get("config", {})
    backbone = build_backbone(
        known, settings["channels"], image_size=settings["global_crops_size"], patch_size=settings["patch_size"]
    )
    checkpoint.load_into(backbone, tensors, f"checkpoint {name} ({weights.source}, --arch {known})")
    return backbone.eval(), {"history": [], **weights.record, "config": settings}


def _authors_settings(weights: Weights) -> dict[str, Any]:
    """The configuration that an authors' checkpoint implies, with the views that they published. Of a Self-Classifier the
    activation leaves no trace; theirs was LeakyReLU."""
    tensors = weights.tensors
    sizes = [len(value) for key, value in tensors.items() if re.fullmatch(r"classifiers\.\d+\.weight(_g)?", key)]
    head = {key: value for key, value in tensors.items() if key.startswith("projection_head.")}
    layers = [value for key, value in head.items() if key.endswith("weight") and value.ndim == 2]
    patches = tensors.get("backbone.patch_embed.proj.weight")
    defaults = as_plain(METHODS[weights.method].Config())
    knobs = {  # of all methods; each knows some of them
        "classes": sizes,
        "prototypes": sizes if isinstance(defaults.get("prototypes"), list) else sizes[0],
        "num_classifiers": len(sizes),
        "num_classes": sizes[0],
        "dim": next(value.shape[1] for key, value in tensors.items() if re.match(r"classifiers\.0\.weight(_v)?$", key)),
        "head_layers": len(layers),
        "head_bn": any(key.endswith("running_mean") for key in head),
        "queue_length": len(tensors.get("queue.embeddings", ())),
    }
    if len(layers) > 1:
        knobs["hidden_dim"] = len(layers[0])
    published = read_method(weights.method).presets["published"]
    views = {name: published[name] for name in ViewSettings.__dataclass_fields__ if name in published}
    patch_size = patches.shape[-1] if patches is not None else 16
    options = TrainOptions(arch=weights.arch, patch_size=patch_size, **views)
    known = {name: value for name, value in knobs.items() if name in defaults}
    settings = {**as_plain(options), **defaults, **known}
    return {**settings, "method": weights.method, "channels": 3, "data": "", "seed": None}


def start_from(method: Method, method_name: str, name: str) -> str:
    """Load weights into a freshly built method, for `--pretrained`, and say in one line what was and was not loaded.

    Of a file with weights of the same method the network is taken, and not what it remembers (queues, banks), whose images
    are those of another run. Between SwAV, DeepCluster-v2 and SeLa-v2, whose networks have the same parts, head and
    prototypes are taken too, each if it fits; of any other file the backbone. Parts that are not taken keep their random
    start.

    Args:
        name: a path or a released model.

    Raises:
        InputError: if there is no backbone in it, or a part that is taken does not fit exactly.
    """
    weights = checkpoint.read_weights(resolve(name))
    own = method.state_dict()
    parts = {"backbone"}
    if weights.method == method_name:
        parts = _network(method)
    elif isinstance(method, PrototypeMethod) and issubclass(METHODS.get(weights.method, object), PrototypeMethod):
        parts |= {part for part in _network(method) if _shapes(own, part) == _shapes(weights.tensors, part)}
    taken = {key: value for key, value in weights.tensors.items() if _part(key) in parts}
    if not any(_part(key) == "backbone" for key in taken):
        raise InputError(f"--pretrained {name}: no backbone in it, but {_count(weights.tensors)}")
    kept = {key: value for key, value in own.items() if _part(key) not in {_part(key) for key in taken}}
    checkpoint.load_into(method, {**kept, **taken}, f"--pretrained {name}")
    left_out = [*(key for key in weights.tensors if key not in taken), *weights.left_out]
    return (
        f"--pretrained {name} ({weights.source}): took {_count(taken)}; "
        f"left out {_count(left_out) or 'nothing'}; fresh start for {_count(kept) or 'nothing'}"
    )


def _network(method: Method) -> set[str]:
    """The parts of a method that have parameters; the others are what it remembers."""
    return {_part(key) for key, _ in method.named_parameters()}


def _part(key: str) -> str:
    return key.split(".")[0]


def _shapes(tensors, part: str) -> dict:
    return {key: value.shape for key, value in tensors.items() if _part(key) == part}


def _count(keys) -> str:
    """How many tensors of each part."""
    parts = [_part(key) for key in keys]
    return ", ".join(f"{part} ({parts.count(part)})" for part in dict.fromkeys(parts))
