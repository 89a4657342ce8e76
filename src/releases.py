"""Name the weights that others released, and find their files in the cache folder."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from . import downloads
from .errors import InputError


@dataclass(frozen=True)
class Release:
    """Describe a published file, or a Google Drive folder of files.

    Attributes:
        what: the model, for the list.
        url: where it was published.
        size: number of bytes (0: not published).
        md5, sha256: beginning of the digest ("": not published).
        arch: the backbone, if the file does not tell it.
        data: the data set of the training, if the file does not tell it and evaluations need it.
    """

    what: str
    url: str
    size: int = 0
    md5: str = ""
    sha256: str = ""
    arch: str = ""
    data: str = ""

    @property
    def is_folder(self) -> bool:
        return "drive.google.com/drive/folders" in self.url

    @property
    def drive_id(self) -> str:
        """Identifier of a single file on Google Drive; "" for other files."""
        return self.url.removeprefix(DRIVE_FILE) if self.url.startswith(DRIVE_FILE) else ""


DRIVE = "https://drive.google.com/drive/folders/"
DRIVE_FILE = "https://drive.google.com/uc?id="
FACEBOOK = "https://dl.fbaipublicfiles.com/"
SWAV = FACEBOOK + "deepcluster/"


def _scan(trained_on: str, file: str, *, data: str = "") -> Release:
    """Return a file of SCAN on Google Drive. The files for small images do not tell their backbone and their data."""
    arch = {"": "", "stl10": "stl_resnet18"}.get(data, "cifar_resnet18")
    return Release(f"SCAN, {trained_on}", DRIVE_FILE + file, arch=arch, data=data)


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
    "scan-cifar10-simclr": _scan("CIFAR-10, SimCLR", "1Cl5oAcJKoNE5FSTZsBSAKLcyA5jXGgTT", data="cifar10"),
    "scan-cifar10": _scan("CIFAR-10, clustering", "1v6b6jJY5M4-duSqWpGFmdf9e9T3dPrx0", data="cifar10"),
    "scan-cifar10-selflabel": _scan("CIFAR-10, self-labelling", "18gITFzAbQsGS5vt8hyi5HjbeRDsVLihw", data="cifar10"),
    "scan-cifar100-20-simclr": _scan("CIFAR-100-20, SimCLR", "1huW-ChBVvKcx7t8HyDaWTQB5Li1Fht9x", data="cifar100-20"),
    "scan-cifar100-20": _scan("CIFAR-100-20, clustering", "1pPCi1QG05kP_JdoX29dxEhVddIRk68Sd", data="cifar100-20"),
    "scan-cifar100-20-selflabel": _scan(
        "CIFAR-100-20, self-labelling", "11mEmpDMyq63pM4kmDy6ItHouI6Q__uB7", data="cifar100-20"
    ),
    "scan-stl10-simclr": _scan("STL-10, SimCLR", "1261NDFfXuKR2Dh4RWHYYhcicdcPag9NZ", data="stl10"),
    "scan-stl10": _scan("STL-10, clustering", "1y1cnGLpeTVo80cnWhAJy-B72FYs2AjZ_", data="stl10"),
    "scan-stl10-selflabel": _scan("STL-10, self-labelling", "1uNYN9XOMIPb40hmxOzALg4PWhU_xwkEF", data="stl10"),
    "scan-imagenet50": _scan("ImageNet-50, clustering", "1UdBtvCHVGd08x8SiH6Cuh6mQmqsADg0t"),
    "scan-imagenet50-selflabel": _scan("ImageNet-50, self-labelling", "1iOE4_lQ4w7CGPLU4algBDG34nz68eN8o"),
    "scan-imagenet100": _scan("ImageNet-100, clustering", "1tcROQ3wc_MbxmLr05qt-UvF9yVrBwBq9"),
    "scan-imagenet100-selflabel": _scan("ImageNet-100, self-labelling", "1VVgRpJ9DJn9dNrbAKbfPer2FllTvP6Cs"),
    "scan-imagenet200": _scan("ImageNet-200, clustering", "1oO-OCW2MiXmNC4sD6pkw8PurYScX7oVW"),
    "scan-imagenet200-selflabel": _scan("ImageNet-200, self-labelling", "11dfobUwy6ragh7PoqFagoEns5-teWalm"),
    "scan-imagenet": _scan("ImageNet, clustering", "1PcF8ydoWoqhxARGuW55KcNarfZyJwcza"),
}


def resolve(name: str | Path) -> Path:
    """Return the path of a file, of the checkpoint in a run folder, or of a downloaded release.

    A run that selects its best epoch has two checkpoints. This is then the best one, not the last one.

    This function downloads nothing, because a job may run on many machines without a network.

    Args:
        name: a file, a run folder, a name in `RELEASES`, or NAME/FILE for one file of a released folder.

    Raises:
        InputError: if there is no such file. The message says how to get it.
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
            best = path / "checkpoint_best.pt"
            return best if best.is_file() else path / "checkpoint.pt"
    except OSError as error:  # a name that is too long, or a folder without permission
        raise InputError(f"{name}: cannot be opened ({error.strerror}); give another file") from None
    release, _, file = str(name).partition("/")
    if release not in RELEASES:
        raise InputError(f"{name}: no such file, and no released model of that name; {hint(release)}")
    folder = downloads.cache_folder() / release
    files = downloaded_files(release)
    if not files:
        raise InputError(f"{name} is not in {folder.parent}: fetch it first, python -m src.pretrained get {release}")
    if file:
        files = [path for path in files if str(path.relative_to(folder)) == file]
    if len(files) != 1:
        there = ", ".join(f"{release}/{path.relative_to(folder)}" for path in downloaded_files(release))
        raise InputError(f"{name}: expected one of {there}")
    return files[0]


def release_of(name: str | Path) -> Release | None:
    """Return the release that a name of the list stands for; None for a path of a file or a folder."""
    return None if Path(name).exists() else RELEASES.get(str(name).partition("/")[0])


def downloaded_files(release: str) -> list[Path]:
    """Return the files of a release in the cache folder."""
    folder = downloads.cache_folder() / release
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def hint(name: str) -> str:
    """Return the last part of the message about an unknown name: a similar name, and the command for the list."""
    similar = difflib.get_close_matches(name, RELEASES, n=1)
    question = f"did you mean {similar[0]}? " if similar else ""
    return f"{question}see python -m src.pretrained list"
