"""Build networks from files: methods, classifiers and backbones, from our own checkpoints and from released files."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import checkpoint, foreign
from .config import TrainOptions, ViewSettings, as_plain, check_settings, read_method, read_options
from .errors import InputError
from .foreign import Weights
from .methods import METHODS, Method, PrototypeMethod, build_method, feature_width
from .models.backbones import build_backbone
from .models.heads import LinearClassifiers
from .preprocessing import Preprocessing, of_training
from .releases import release_of, resolve

M = TypeVar("M", bound=nn.Module)
MODEST = 1 << 28  # bytes
WIDEST = 2048  # features of the backbones below
SMALL_BACKBONES = (
    "small_convnet",
    "cifar_convnet",
    "cifar_resnet18",
    "cifar_resnet34",
    "stl_resnet18",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
)
SMALL_SIZES = {"cifar": 32, "stl": 96}  # side in pixels of the images of networks whose names begin so


class Unclassified(InputError):
    """Raised if a file holds only a backbone, but a network with classifiers is expected."""


def load_method(name: str | Path, weights: Weights | None = None) -> tuple[Method, dict[str, Any]]:
    """Build the method of a checkpoint with its weights, in evaluation mode.

    Args:
        name: a path or a released model. The file is a checkpoint of train.py or of a method's authors. In the second
            case, the settings are derived from the shapes of the tensors. A file of SeLa-v2 becomes DeepCluster-v2, which
            has the same network.
        weights: the contents of the file, if it has been read already.

    Returns:
        method: on the CPU.
        state: the rest of the checkpoint (`config`, `history`, ...). For an authors' file, the configuration does not name
            the data.

    Raises:
        InputError: if the file holds no such checkpoint, or its weights do not fit its configuration.
        Unclassified: if the file holds only a backbone.
    """
    weights = weights or checkpoint.read_weights(resolve(name))
    if weights.method not in METHODS:
        expected = ", ".join(METHODS)
        if weights.method:
            raise InputError(f"checkpoint {name}: holds {weights.method}; expected {expected}")
        raise Unclassified(
            f"checkpoint {name}: holds a backbone ({weights.source}) without the classifiers of a method; expected {expected}"
        )
    if not weights.arch:
        raise InputError(
            f"checkpoint {name}: does not name its architecture, and its tensors do not have the shapes of a ResNet: use a "
            "complete checkpoint"
        )
    own = "config" in weights.record
    try:
        state = weights.record if own else _foreign_state(name, weights, _authors_settings(weights))
    except (IndexError, StopIteration):
        raise InputError(
            f"checkpoint {name}: its classifiers do not have the shapes of {weights.source}: use another file"
        ) from None
    settings = state["config"]
    try:
        check_settings(settings)
        config = read_options(METHODS[settings["method"]].Config, settings, longest=len(weights.tensors))
    except InputError as error:
        raise InputError(f"checkpoint {name}: in its configuration, {error}") from None

    def build() -> Method:
        method = build_method(settings["method"], config, settings)
        method.make_room(weights.tensors)
        return method

    def complete(method: Method) -> dict[str, Tensor]:
        # An authors' file holds only the network. SwAV's queue and the memory bank keep their initial values.
        network = _network(method)
        memory = {} if own else {key: value for key, value in method.state_dict().items() if _part(key) not in network}
        return {**memory, **weights.tensors}

    if not is_modest(settings, config):
        check_size(build, complete, f"checkpoint {name}")
    method = build()
    checkpoint.load_into(method, complete(method), f"checkpoint {name}")
    return method.eval(), state


def load_classifiers(
    name: str | Path, arch: str = "", *, strict: bool = True
) -> tuple[Method | LinearClassifiers, dict[str, Any]]:
    """Build a network that assigns images to clusters: a method of this project, or linear classifiers on a backbone.

    Args:
        name: a path or a released model.
        arch: architecture of the backbone if the file does not name it; see `load_backbone`.
        strict: refuse an `arch` that is not the one that the file names; otherwise the file decides.

    Returns:
        network: a module with `backbone`, `predict`, `classes` and `temperature`, on the CPU, in evaluation mode.
        state: the rest of the checkpoint.

    Raises:
        Unclassified: if the file holds no classifiers.
        InputError: see `load_backbone`; also if the classifiers do not fit the backbone.
    """
    weights = checkpoint.read_weights(resolve(name))
    if weights.method in METHODS:
        if weights.arch:
            _architecture(name, weights, arch if strict else "")
        method, state = load_method(name, weights)
        if not method.classes:
            raise Unclassified(
                f"checkpoint {name}: {weights.method} has no classifiers; expected a method with classifiers"
            )
        return method, state
    heads = {key: value for key, value in weights.tensors.items() if _part(key) == "classifiers"}
    if not heads:
        held = weights.method or f"a backbone ({weights.source})"
        raise Unclassified(f"checkpoint {name}: holds {held} without classifiers; expected a method or classifiers")
    backbone, state = load_backbone(name, arch, weights, strict=strict)
    width = feature_width(backbone)
    classifiers: list[nn.Linear] = []
    while f"classifiers.{len(classifiers)}.weight" in heads:
        prefix = f"classifiers.{len(classifiers)}"
        weight, bias = heads.pop(f"{prefix}.weight"), heads.pop(f"{prefix}.bias", None)
        if weight.ndim != 2 or weight.shape[1] != width or (bias is not None and bias.shape != weight.shape[:1]):
            raise InputError(
                f"checkpoint {name}: {prefix}.weight has the shape {tuple(weight.shape)}, but the backbone "
                f"{state['config']['arch']} has {width} features: give another --arch, or use another file"
            )
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
        classifiers.append(linear)
    if heads or not classifiers:
        raise InputError(
            f"checkpoint {name}: classifiers with unknown names ({', '.join(list(heads)[:3])}): expected matrices and biases "
            "of linear classifiers"
        )
    return LinearClassifiers(backbone, classifiers).eval(), state


def load_backbone(
    name: str | Path, arch: str = "", weights: Weights | None = None, *, strict: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the backbone of a file with its weights, in evaluation mode. The file may be any that this project reads.

    Args:
        name: a path or a released model.
        arch: architecture of the backbone if neither the file nor the list of released models names it ("": resnet50).
        weights: the contents of the file, if it has been read already.
        strict: see `load_classifiers`.

    Returns:
        backbone: on the CPU.
        state: the rest of the checkpoint as in `load_method`. For a file that train.py did not write, the configuration
            does not name the data.

    Raises:
        InputError: if the file contains no backbone, its weights do not fit the architecture, or they fit several
            architectures and nothing names one of them.
    """
    weights = weights or checkpoint.read_weights(resolve(name))
    known = _architecture(name, weights, arch, strict=strict)
    if weights.method in METHODS and "config" in weights.record:
        method, state = load_method(name, weights)
        return method.backbone, state
    # Only the backbone of other files is used, so their heads may have any shape.
    tensors = {key.removeprefix("backbone."): v for key, v in weights.tensors.items() if key.startswith("backbone.")}
    if not tensors:
        raise InputError(f"checkpoint {name}: contains no backbone, only {_count(weights.tensors)}: use another file")
    size = SMALL_SIZES.get(known.partition("_")[0], TrainOptions.global_crops_size)
    options = TrainOptions(arch=known, patch_size=_patch_size(tensors), global_crops_size=size)
    settings = {**as_plain(options), **_unknown_data(weights.source), **weights.record.get("config", {})}
    try:
        check_settings(settings)
    except InputError as error:
        raise InputError(f"checkpoint {name}: in its configuration, {error}") from None

    def build() -> nn.Module:
        return build_backbone(
            known, settings["channels"], image_size=settings["global_crops_size"], patch_size=settings["patch_size"]
        )

    source = f"checkpoint {name} ({weights.source}, --arch {known})"
    if not is_modest(settings):
        check_size(build, lambda _: tensors, source)
    backbone = build()
    checkpoint.load_into(backbone, tensors, source)
    return backbone.eval(), _foreign_state(name, weights, settings)


def _architecture(name: str | Path, weights: Weights, arch: str, *, strict: bool = True) -> str:
    """Return the architecture of the backbone of a file; see `load_backbone`."""
    release = release_of(name) if weights.arches else None
    named = weights.arch or (release.arch if release else "")
    if arch and named and arch != named and strict:
        raise InputError(f"--arch {arch}: checkpoint {name} holds {named}: drop --arch")
    known = named or arch
    if weights.arches and known not in weights.arches:
        fitting = " or ".join(f"--arch {each}" for each in weights.arches)
        raise InputError(
            f"checkpoint {name} ({weights.source}): its tensors fit the networks for CIFAR and for STL-10, which are not the "
            f"same: give {fitting}, or its name in `python -m src.pretrained list`"
        )
    return known or TrainOptions.arch


def _foreign_state(name: str | Path, weights: Weights, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what `load_method` returns as `state` for a file that train.py did not write."""
    release = release_of(name)
    trained_on = release.data if release else ""
    return {"history": [], **weights.record, "config": settings, "source": weights.source, "trained_on": trained_on}


def evaluation_view(state: dict[str, Any], data: str) -> Preprocessing:
    """Return the evaluation view of photographs for a network.

    A network of another project has the view of that project. A network of train.py has the view of
    `preprocessing.of_training`, with the changes that the run asked for.

    Args:
        state: what `load_backbone`, `load_method` or `load_classifiers` returned beside the network.
        data: the data on which the network is evaluated, as in --data. It decides if the training data is unknown.
    """
    trained = state["config"]
    if "source" in state:
        on = state["trained_on"] or data
        found = foreign.evaluation_view(state["source"], arch=trained["arch"], data=on)
        if found:
            return found
    view = of_training(trained["data"] or data, crop_size=trained["global_crops_size"], augment=trained["augment"])
    return view.changed(size=trained.get("eval_size", 0), resize=trained.get("eval_resize", 0))


def is_modest(settings: Mapping[str, Any], config: Any = None) -> bool:
    """Return whether the network of a configuration takes at most `MODEST` bytes beside a ResNet.

    This is an upper bound, which most checkpoints meet. The comparison in `check_size` costs more time.

    Args:
        settings: the configuration of a run, checked.
        config: the options of the method; None: only the backbone is built.
    """
    values = [] if config is None else list(as_plain(config).values())
    sizes = [value for each in values for value in (each if isinstance(each, list) else [each]) if type(value) is int]
    lists = sum(len(each) for each in values if isinstance(each, list))
    parts = 3 + lists + sum(getattr(config, name, 0) for name in ("head_layers", "num_classifiers"))
    first, second, *_ = sorted([WIDEST, settings["channels"], *sizes, 0], reverse=True)
    known = settings["arch"] in (*SMALL_BACKBONES, "identity")
    return (
        known
        and (settings["channels"] <= 16 or settings["arch"] == "identity")
        and 4 * parts * first * second <= MODEST
    )


class _WithoutData(TorchFunctionMode):
    """Build modules whose weights have shapes but no data, and skip the functions that fill weights.

    `torch.device("meta")` would also move the numbers from which some networks compute their widths.
    """

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand)
    FILLERS = ("normal_", "uniform_", "trunc_normal_", "zero_", "fill_", "constant_", "kaiming_uniform_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        elif getattr(func, "__name__", "") in self.FILLERS:
            filled = args[0] if args else kwargs["tensor"]  # torch.nn.init passes it by name
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


def check_size(build: Callable[[], M], complete: Callable[[M], dict[str, Tensor]], source: str) -> None:
    """Build a network without data, and compare it with the tensors of a file before memory is allocated for it.

    A short file can name a network, or sizes, that would take terabytes.

    Args:
        build: builds the network.
        complete: takes the network and returns all tensors that are to be loaded into it.
        source: where the tensors come from, for the message.

    Raises:
        InputError: if the network does not have exactly these tensors.
    """
    try:
        with _WithoutData():
            network = build()
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes whose product is no 64-bit number
        detail = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(f"{source}: a network of these sizes cannot be built ({detail}): use another file") from None
    checkpoint.check_fit(network, complete(network), source)


def _patch_size(backbone: Mapping[str, Tensor]) -> int:
    """Return the side of the patches of a ViT with these tensors; the default for other networks."""
    patches = backbone.get("patch_embed.proj.weight")
    return max(patches.shape[-1], 1) if patches is not None and patches.ndim else TrainOptions.patch_size


def _unknown_data(method: str) -> dict[str, Any]:
    """Return the part of the configuration that describes the data of a file that train.py did not write."""
    return {"method": method, "channels": 3, "data": "", "seed": None}


def _authors_settings(weights: Weights) -> dict[str, Any]:
    """Derive the configuration from an authors' checkpoint. The view settings are the published ones.

    The tensors do not show the activation of Self-Classifier's head. It is the default, LeakyReLU, which the authors used.
    """
    tensors, name = weights.tensors, str(weights.method)
    sizes = [len(value) for key, value in tensors.items() if re.fullmatch(r"classifiers\.\d+\.weight(_g)?", key)]
    head = {key: value for key, value in tensors.items() if key.startswith("projection_head.")}
    layers = [value for key, value in head.items() if key.endswith("weight") and value.ndim == 2]
    defaults = as_plain(METHODS[name].Config())
    knobs: dict[str, Any] = {  # the options of all methods; each method has some of them
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
    published = read_method(name).presets["published"]
    views = {field.name: published[field.name] for field in fields(ViewSettings) if field.name in published}
    backbone = {key.removeprefix("backbone."): value for key, value in tensors.items()}
    options = TrainOptions(arch=weights.arch, patch_size=_patch_size(backbone), **views)
    known = {key: value for key, value in knobs.items() if key in defaults}
    return {**as_plain(options), **defaults, **known, **_unknown_data(name)}


def start_from(method: Method, method_name: str, name: str, *, arch: str = "") -> str:
    """Load weights into a newly built method, for `--pretrained`.

    From a file of the same method, the network is loaded. Queues and banks are not, because their images belong to another
    run. SwAV, DeepCluster-v2 and SeLa-v2 have networks with the same parts. Between them, the backbone is loaded, and the
    head and the prototypes are loaded if their shapes match. From any other file, only the backbone is loaded. All other
    parts keep their random weights.

    Args:
        method: the method that receives the weights.
        method_name: its name in `METHODS`.
        name: a path or a released model.
        arch: architecture of the backbone of the method; "": not compared with that of a released model.

    Returns:
        One line that says which parts were loaded and which were not.

    Raises:
        InputError: if the file contains no backbone, or a part to be loaded does not fit exactly.
    """
    weights = checkpoint.read_weights(resolve(name))
    if arch in weights.arches:  # their tensors have the same shapes
        _architecture(name, weights, arch)
    own = method.state_dict()
    other = METHODS.get(weights.method or "")
    parts = {"backbone"}
    if weights.method == method_name:
        parts = _network(method)
    elif isinstance(method, PrototypeMethod) and other is not None and issubclass(other, PrototypeMethod):
        parts |= {part for part in _network(method) if _shapes(own, part) == _shapes(weights.tensors, part)}
    loaded = {key: value for key, value in weights.tensors.items() if _part(key) in parts}
    if not any(_part(key) == "backbone" for key in loaded):
        raise InputError(f"--pretrained {name}: contains no backbone, only {_count(weights.tensors)}: use another file")
    kept = {key: value for key, value in own.items() if _part(key) not in {_part(key) for key in loaded}}
    checkpoint.load_into(method, {**kept, **loaded}, f"--pretrained {name}")
    if method.earlier_stage:
        method.start_after(*_earlier(name, weights, arch))
    left_out = [*(key for key in weights.tensors if key not in loaded), *weights.left_out]
    return (
        f"--pretrained {name} ({weights.source}): loaded {_count(loaded)}; "
        f"left out {_count(left_out) or 'nothing'}; initial values for {_count(kept) or 'nothing'}"
    )


def _earlier(name: str | Path, weights: Weights, arch: str) -> tuple[nn.Module, int]:
    """Return the whole network of a file from which a later stage starts, and the number of its classifier to use."""
    network: nn.Module
    if weights.method in METHODS:
        network, state = load_method(name, weights)
    elif any(_part(key) == "classifiers" for key in weights.tensors):
        network, state = load_classifiers(name, arch)
    else:
        network, state = load_backbone(name, arch, weights)
    history = state.get("history") or [{}]
    return network, int(history[-1].get("classifier", state.get("classifier", 0)))


def _network(method: Method) -> set[str]:
    """Return the parts of a method that have parameters. The other parts are queues and banks."""
    return {_part(key) for key, _ in method.named_parameters()}


def _part(key: str) -> str:
    """Return the first component of a tensor's name."""
    return key.split(".")[0]


def _shapes(tensors: Mapping[str, Tensor], part: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a part."""
    return {key: tuple(value.shape) for key, value in tensors.items() if _part(key) == part}


def _count(keys: Iterable[str]) -> str:
    """Return the number of tensors in each part, for a message."""
    parts = [_part(key) for key in keys]
    return ", ".join(f"{part} ({parts.count(part)})" for part in dict.fromkeys(parts))
