"""List, download and export weights.

    python -m src.pretrained list
    python -m src.pretrained get swav-800ep         # then: python train.py --pretrained swav-800ep
    python -m src.pretrained export runs/mine/checkpoint.pt resnet50.pth      # our backbone with torchvision's names
    python -m src.pretrained pack runs/mine mine.safetensors                  # the whole network, for evaluations and predict.py

Importing torch takes seconds. The first two commands do not need torch, so only the last two import it.
"""

import sys
from pathlib import Path
from typing import Any

from . import downloads, files
from .config import OneLineParser
from .errors import InputError, RunError, printable, run_script
from .releases import RELEASES, Release, downloaded_files, hint


def get(name: str) -> list[Path]:
    """Download a release to the cache folder, unless it is already there, and return its files.

    The files are compared with the published digests, or with the digests that the first download recorded.

    Raises:
        InputError: if there is no release of this name.
        RunError: if the download or the comparison fails.
    """
    if name not in RELEASES:
        raise InputError(f"{name}: no released model of that name; {hint(name)}")
    release, cache = RELEASES[name], downloads.cache_folder()
    with downloads.locked(cache):
        try:
            if not downloaded_files(name):
                _fetch(name, release, cache)
            for path in downloaded_files(name):
                if not release.is_folder:
                    downloads.check_published(path, size=release.size, md5=release.md5, sha256=release.sha256)
                downloads.check_or_record(cache, path)
        except OSError as error:
            raise RunError(f"{cache}: {error.strerror or error}") from None
    return downloaded_files(name)


def _fetch(name: str, release: Release, cache: Path) -> None:
    """Download the file or the folder of a release."""
    if release.is_folder:
        _fetch_drive_folder(release.url, cache / name)
        return
    if release.drive_id:
        _fetch_drive_file(release, cache / name / f"{name}.pth.tar")
        return
    target = cache / name / release.url.rsplit("/", 1)[1]
    known = downloads.recorded(cache).get(str(target.relative_to(cache)), {})
    sha256 = release.sha256 or known.get("sha256", "")
    downloads.download(release.url, target, size=release.size or known.get("size", 0), md5=release.md5, sha256=sha256)


def _fetch_drive_folder(url: str, target: Path) -> None:
    """Download a Google Drive folder with gdown, which continues interrupted downloads."""
    gdown = _import_gdown(url)
    part = target.with_name(f".{target.name}.part")
    try:
        found = gdown.download_folder(url=url, output=str(part), quiet=not sys.stderr.isatty(), resume=True)
    except Exception as error:  # gdown, requests and the disk raise many kinds
        raise RunError(f"{url}: {error}; the same command continues the download in {part}") from None
    if not found:
        raise RunError(f"{url}: gdown found no file there; fetch it by hand and pass its path")
    files.move(part, target)


def _fetch_drive_file(release: Release, target: Path) -> None:
    """Download one file of Google Drive with gdown."""
    gdown = _import_gdown(release.url)
    part = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = gdown.download(id=release.drive_id, output=str(part), quiet=not sys.stderr.isatty(), resume=True)
    except Exception as error:  # gdown, requests and the disk raise many kinds
        raise RunError(f"{release.url}: {error}; the same command tries again") from None
    if not found:
        raise RunError(f"{release.url}: gdown found no file there; fetch it by hand and pass its path and --arch")
    files.move(part, target)


def _import_gdown(url: str) -> Any:
    try:
        import gdown
    except ImportError:
        raise InputError(
            f"gdown is not installed, which Google Drive needs: pip install gdown, or fetch {url} by hand and pass its path"
        ) from None
    return gdown


def main() -> None:
    """Run one of the commands."""
    parser = OneLineParser(prog="python -m src.pretrained", description="List, download and export weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the released models and the sizes of the downloaded ones")
    getter = commands.add_parser("get", help="download a released model")
    getter.add_argument("name", help="a name from the list")
    exporter = commands.add_parser("export", help="write a backbone with torchvision's names")
    exporter.add_argument(
        "checkpoint", help="file of train.py or of another project, run folder, or name from the list"
    )
    exporter.add_argument("file", help="file to write: a plain state dict without a classifier")
    exporter.add_argument(
        "--arch", default="", help="architecture of the backbone if the checkpoint does not name it (default: resnet50)"
    )
    packer = commands.add_parser("pack", help="write the network of a run without the state of the optimiser")
    packer.add_argument("checkpoint", help="run folder or file of train.py")
    packer.add_argument("file", help="file to write, with the suffix .safetensors")
    options = parser.parse_args()
    if options.command == "pack":
        from .export import pack  # imports torch

        print(printable(pack(options.checkpoint, options.file)))
        return
    if options.command == "export":
        from .export import export  # imports torch

        print(printable(export(options.checkpoint, options.file, options.arch)))
        return
    if options.command == "get":
        for path in get(options.name):
            print(printable(path))
        return
    for name, release in RELEASES.items():
        here = downloaded_files(name)
        size = f"{sum(path.stat().st_size for path in here) / 1e6:,.0f} MB here" if here else ""
        print(f"{name:28}{release.what:76}{size}")
    print(f"\npython -m src.pretrained get NAME downloads a model to {printable(downloads.cache_folder())}")


if __name__ == "__main__":
    run_script(main)
