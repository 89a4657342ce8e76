"""Weights that others released, by name, and the way from a file to a method.

    python -m src.pretrained list
    python -m src.pretrained get swav-800ep         # then: python train.py --pretrained swav-800ep
    python -m src.pretrained export runs/mine/checkpoint.pt resnet50.pth      # our backbone in torchvision's names

torch takes seconds to import and is not needed for the first two, so the functions that do need it import it themselves.
"""

import difflib
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from . import config, downloads
from .config import InputError, RunError

# --------------------------------------------------------------------------------------------------------------------
# what there is


@dataclass(frozen=True)
class Release:
    """A published file, or a Google Drive folder of files. Sizes and digests are given where they were published."""

    what: str
    url: str
    size: int = 0
    md5: str = ""  # what it begins with
    sha256: str = ""  # what it begins with

    @property
    def is_folder(self) -> bool:
        return "drive.google.com/drive/folders" in self.url


DRIVE = "https://drive.google.com/drive/folders/"
FACEBOOK = "https://dl.fbaipublicfiles.com/"
SWAV = FACEBOOK + "deepcluster/"

RELEASES = {
    "self-classifier": Release(
        "Self-Classifier, second generation: the authors' folder", DRIVE + "1o8M1cSVnhsMsdiRejj0DweWs2mhtP57F"
    ),
    "self-classifier-v1": Release(
        "Self-Classifier, first generation: the authors' folder, 100 and 800 epochs",
        DRIVE + "1Jnr2S6ADn3-m5wfd-MZO29A_2FUdS3KD",
    ),
    "swav-800ep": Release("SwAV, 800 epochs", SWAV + "swav_800ep_pretrain.pth.tar"),
    "swav-400ep": Release("SwAV, 400 epochs", SWAV + "swav_400ep_pretrain.pth.tar"),
    "swav-200ep": Release("SwAV, 200 epochs", SWAV + "swav_200ep_pretrain.pth.tar"),
    "swav-100ep": Release("SwAV, 100 epochs", SWAV + "swav_100ep_pretrain.pth.tar"),
    "swav-400ep-bs256": Release("SwAV, 400 epochs, batch 256", SWAV + "swav_400ep_bs256_pretrain.pth.tar"),
    "swav-200ep-bs256": Release("SwAV, 200 epochs, batch 256", SWAV + "swav_200ep_bs256_pretrain.pth.tar"),
    "swav-400ep-2x224": Release("SwAV, 400 epochs, two views", SWAV + "swav_400ep_2x224_pretrain.pth.tar"),
    "swav-rn50w2-400ep": Release("SwAV, ResNet-50 twice as wide", SWAV + "swav_RN50w2_400ep_pretrain.pth.tar"),
    "swav-rn50w4-400ep": Release("SwAV, ResNet-50 four times as wide", SWAV + "swav_RN50w4_400ep_pretrain.pth.tar"),
    "swav-rn50w5-400ep": Release("SwAV, ResNet-50 five times as wide", SWAV + "swav_RN50w5_400ep_pretrain.pth.tar"),
    "deepcluster-v2-800ep": Release("DeepCluster-v2, 800 epochs", SWAV + "deepclusterv2_800ep_pretrain.pth.tar"),
    "deepcluster-v2-400ep": Release("DeepCluster-v2, 400 epochs", SWAV + "deepclusterv2_400ep_pretrain.pth.tar"),
    "deepcluster-v2-400ep-2x224": Release(
        "DeepCluster-v2, 400 epochs, two views", SWAV + "deepclusterv2_400ep_2x224_pretrain.pth.tar"
    ),
    "sela-v2-400ep": Release("SeLa-v2, 400 epochs", SWAV + "selav2_400ep_pretrain.pth.tar"),
    "sela-v2-400ep-2x224": Release("SeLa-v2, 400 epochs, two views", SWAV + "selav2_400ep_2x224_pretrain.pth.tar"),
    "moco-v2-800ep": Release(
        "MoCo v2, 800 epochs",
        FACEBOOK + "moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        md5="a04e12f8",
    ),
    "simsiam-100ep": Release(
        "SimSiam, 100 epochs, batch 256", FACEBOOK + "simsiam/models/100ep-256bs/pretrain/checkpoint_0099.pth.tar"
    ),
    "obow-200ep": Release(
        "OBoW, 200 epochs",
        "https://github.com/valeoai/obow/releases/download/v0.1.0/ImageNetFull_ResNet50_OBoW_full_feature_extractor.zip",
    ),
    "barlow-twins-1000ep": Release(
        "Barlow Twins, 1000 epochs",
        FACEBOOK + "barlowtwins/ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051/resnet50.pth",
    ),
    "dino-resnet50": Release("DINO, ResNet-50", FACEBOOK + "dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth"),
}


def resolve(name: str | Path) -> Path:
    """The file of a path, or of a name in `RELEASES` that was downloaded; NAME/FILE names one file of a folder.

    Nothing is downloaded: a job on many machines, perhaps without network, should not begin with that.

    Raises:
        InputError: saying how to get it.
    """
    path = Path(name)
    if path.is_file():
        return path
    release, _, file = str(name).partition("/")
    if release not in RELEASES:
        near = difflib.get_close_matches(release, RELEASES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"{name}: no such file, and no released model of that name; {hint}see python -m src.pretrained list"
        )
    folder = downloads.cache_folder() / release
    files = _files_of(release)
    if not files:
        raise InputError(f"{name} is not in {folder.parent}: fetch it first, python -m src.pretrained get {release}")
    if file:
        files = [path for path in files if str(path.relative_to(folder)) == file]
    if len(files) != 1:
        there = ", ".join(f"{release}/{path.relative_to(folder)}" for path in _files_of(release))
        raise InputError(f"{name}: expected one of {there}")
    return files[0]


def _files_of(release: str) -> list[Path]:
    folder = downloads.cache_folder() / release
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


# --------------------------------------------------------------------------------------------------------------------
# from a file to a method


class Unclassified(InputError):
    """Weights of a backbone, where a method with classifiers was expected."""


def load_method(name: str | Path):
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
    from . import checkpoint
    from .methods import METHODS, build_method

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
    method = build_method(
        settings["method"],
        kind(**knobs),
        settings["arch"],
        settings["channels"],
        settings["global_crops_size"],
        settings["patch_size"],
        settings["global_crops_number"],
    )
    method.make_room(weights.tensors)
    network = _network(method)  # all that an authors' file holds: neither SwAV's queue nor a bank is in it
    memory = {} if own else {key: value for key, value in method.state_dict().items() if _part(key) not in network}
    checkpoint.load_into(method, {**memory, **weights.tensors}, f"checkpoint {name}")
    return method.eval(), state


def load_classifiers(name: str | Path, arch: str = ""):
    """Any file that can say which cluster an image is in: a method of this project, or linear classifiers on a backbone.

    Args:
        name, arch: as for `load_backbone`.

    Returns:
        A module with `backbone`, `predict`, `classes` and `temperature`, and the rest of the checkpoint.

    Raises:
        Unclassified: if the file holds no classifiers.
        InputError: as `load_backbone`, or if the classifiers do not fit the backbone.
    """
    from torch import nn

    from . import checkpoint
    from .methods import METHODS
    from .models.heads import LinearClassifiers

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


def load_backbone(name: str | Path, arch: str = ""):
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
    from . import checkpoint
    from .methods import METHODS, build_backbone

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
    size = 32 if known.startswith("cifar") else config.TrainOptions.global_crops_size
    options = config.TrainOptions(arch=known, patch_size=patch_size, global_crops_size=size)
    settings = {**config.as_plain(options), "method": weights.source, "channels": 3, "data": "", "seed": None}
    settings |= weights.record.get("config", {})
    backbone = build_backbone(known, settings["channels"], settings["global_crops_size"], settings["patch_size"])
    checkpoint.load_into(backbone, tensors, f"checkpoint {name} ({weights.source}, --arch {known})")
    return backbone.eval(), {"history": [], **weights.record, "config": settings}


def _authors_settings(weights) -> dict:
    """The configuration that an authors' checkpoint implies, with the views that they published. Of a Self-Classifier the
    activation leaves no trace; theirs was LeakyReLU."""
    from .methods import METHODS

    tensors = weights.tensors
    sizes = [len(value) for key, value in tensors.items() if re.fullmatch(r"classifiers\.\d+\.weight(_g)?", key)]
    head = {key: value for key, value in tensors.items() if key.startswith("projection_head.")}
    layers = [value for key, value in head.items() if key.endswith("weight") and value.ndim == 2]
    patches = tensors.get("backbone.patch_embed.proj.weight")
    defaults = config.as_plain(METHODS[weights.method].Config())
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
    published = config.read_method(weights.method).presets["published"]
    views = {name: published[name] for name in config.VIEW_SETTINGS if name in published}
    patch_size = patches.shape[-1] if patches is not None else 16
    options = config.TrainOptions(arch=weights.arch, patch_size=patch_size, **views)
    known = {name: value for name, value in knobs.items() if name in defaults}
    settings = {**config.as_plain(options), **defaults, **known}
    return {**settings, "method": weights.method, "channels": 3, "data": "", "seed": None}


def start_from(method, method_name: str, name: str) -> str:
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
    from . import checkpoint
    from .methods import METHODS, PrototypeMethod

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


def _network(method) -> set[str]:
    """The parts of a method that have parameters; the others are what it remembers."""
    return {_part(key) for key, _ in method.named_parameters()}


def _part(key: str) -> str:
    return key.split(".")[0]


def _shapes(tensors, part: str) -> dict:
    return {key: value.shape for key, value in tensors.items() if _part(key) == part}


def _shapes(tensors, part: str) -> dict:
    return {key: value.shape for key, value in tensors.items() if _part(key) == part}


def _count(keys) -> str:
    """How many tensors of each part."""
    parts = [_part(key) for key in keys]
    return ", ".join(f"{part} ({parts.count(part)})" for part in dict.fromkeys(parts))


# --------------------------------------------------------------------------------------------------------------------
# from a method to a file


def export(name: str | Path, file: str | Path, arch: str = "") -> str:
    """Write a backbone as a plain state dict in torchvision's names, and say in one line what it fits.

    Args:
        name: a path or a released model, as for `load_backbone`; `arch` likewise.
        file: what to write; it must not exist.

    Raises:
        InputError: if there is no backbone in `name`, if torchvision has none of its kind, or `file` cannot be written.
        RunError: if writing does not come to its end.
    """
    import torch

    from .models.backbones import OWN_NAMES, WIDE_RESNETS

    path = Path(file)
    if path.exists():
        raise InputError(f"{file} exists already: name another file")
    backbone, state = load_backbone(name, arch)
    arch = state["config"]["arch"]
    if arch in OWN_NAMES:
        raise InputError(f"checkpoint {name}: its backbone is {arch}, which torchvision does not have under such names")
    tensors = dict(backbone.state_dict())
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.touch()
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror})") from None
    try:
        with open(aside, "wb") as opened:
            torch.save(tensors, opened)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        aside.unlink(missing_ok=True)
        raise RunError(
            f"{file} cannot be written ({getattr(error, 'strerror', None) or 'is the disk full?'})"
        ) from None
    said = f"{file}: {len(tensors)} tensors of {arch}, {backbone.width} features"
    if arch in WIDE_RESNETS:
        return f"{said}; names as in torchvision's resnet50, which is not so wide"
    return f"{said}; torchvision.models.{arch}() takes it with load_state_dict(..., strict=False) and lacks fc alone"


# --------------------------------------------------------------------------------------------------------------------
# the command line


def get(name: str) -> list[Path]:
    """Download a release into the cache folder, unless it is there, and check it against what was published or recorded."""
    if name not in RELEASES:
        near = difflib.get_close_matches(name, RELEASES, n=1)
        raise InputError(f"{name}: {f'did you mean {near[0]}? ' if near else ''}see python -m src.pretrained list")
    release, cache = RELEASES[name], downloads.cache_folder()
    with downloads.locked(cache):
        try:
            if not _files_of(name):
                _fetch(name, release, cache)
            for path in _files_of(name):
                downloads.check_or_record(cache, path)
        except OSError as error:
            raise RunError(f"{cache}: {error.strerror or error}") from None
    return _files_of(name)


def _fetch(name: str, release: Release, cache: Path) -> None:
    if release.is_folder:
        _fetch_drive_folder(release.url, cache / name)
        return
    target = cache / name / release.url.rsplit("/", 1)[1]
    known = downloads.recorded(cache).get(str(target.relative_to(cache)), {})
    sha256 = release.sha256 or known.get("sha256", "")
    downloads.download(release.url, target, release.size or known.get("size", 0), release.md5, sha256)


def _fetch_drive_folder(url: str, target: Path) -> None:
    """With gdown, which knows Google's pages; it continues interrupted files itself."""
    try:
        import gdown
    except ImportError:
        raise InputError(
            f"Google Drive needs gdown: pip install gdown, or fetch {url} by hand and give its path"
        ) from None
    part = target.with_name(f".{target.name}.part")
    try:
        files = gdown.download_folder(url=url, output=str(part), quiet=not sys.stderr.isatty(), resume=True)
    except Exception as error:  # of gdown, requests, or the disk
        raise RunError(f"{url}: {error}; the same command goes on from what is in {part}") from None
    if not files:
        raise RunError(f"{url}: gdown found no file there")
    os.replace(part, target)


def main() -> None:
    parser = config.OneLineParser(prog="python -m src.pretrained", description="Weights that others released.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the names, and which of them are here")
    getter = commands.add_parser("get", help="download one")
    getter.add_argument("name", help="one of the list")
    exporter = commands.add_parser("export", help="write a backbone in torchvision's names")
    exporter.add_argument("checkpoint", help="a file of train.py or of others, or one of the list")
    exporter.add_argument("file", help="what to write: a plain state dict, without a classifier")
    exporter.add_argument(
        "--arch", default="", help="of the backbone, where the checkpoint does not say; default: resnet50"
    )
    options = parser.parse_args()
    if options.command == "export":
        print(export(options.checkpoint, options.file, options.arch))
        return
    if options.command == "get":
        for path in get(options.name):
            print(path)
        return
    for name, release in RELEASES.items():
        here = f"{sum(path.stat().st_size for path in _files_of(name)) / 1e6:,.0f} MB here" if _files_of(name) else ""
        print(f"{name:28}{release.what:76}{here}")
    print(f"\npython -m src.pretrained get NAME downloads one into {downloads.cache_folder()}")


if __name__ == "__main__":
    config.run_script(main)
