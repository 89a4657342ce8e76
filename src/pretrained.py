"""Weights that others released, by name, and the way from a file to a method.

    python -m src.pretrained list
    python -m src.pretrained get swav-800ep         # then: python train.py --pretrained swav-800ep
    python -m src.pretrained export runs/mine/checkpoint.pt resnet50.pth      # our backbone in torchvision's names

torch takes seconds to import and is not needed for the first two, so the functions that do need it import it themselves.
"""

import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from . import downloads
from .config import OneLineParser
from .errors import InputError, RunError, run_script

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
    """Return the checkpoint file that a name stands for. Nothing is downloaded.

    A job on many machines, perhaps without a network, should not begin with a download.

    Args:
        name: a file, a run folder that holds checkpoint.pt, a released model of `RELEASES`, or NAME/FILE for one file of a
            released folder.

    Raises:
        InputError: if there is no such file; the message says how to get it.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            if not (path / "checkpoint.pt").is_file():
                raise InputError(
                    f"{name}: a folder without checkpoint.pt; expected a run folder of train.py, or a file"
                )
            return path / "checkpoint.pt"
    except OSError as error:  # a name that is too long, or a folder without permission
        raise InputError(f"{name}: cannot be opened ({error.strerror}); give another file") from None
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
    downloads.download(release.url, target, size=release.size or known.get("size", 0), md5=release.md5, sha256=sha256)


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
    parser = OneLineParser(prog="python -m src.pretrained", description="Weights that others released.")
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
        from .export import export  # imports torch

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
    run_script(main)
