"""Options of predict.py."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from . import flags
from .flags import Options, require_at_least, require_at_most
from .training import BUILT_IN_DATA, DeviceOptions, EvalViewOptions


@dataclass(frozen=True, kw_only=True)
class PredictOptions(DeviceOptions, EvalViewOptions, Options):
    """prediction"""

    checkpoint: str = ""  # run folder or file of train.py, or file of another project with classifiers (required)
    data: str = ""  # folder of images, or one image file (required)
    output_dir: str = (
        ""  # folder for the results, outside --data (default: runs/predicted/NAME, with the name of --data)
    )
    sort: Literal["no", "links", "copies"] = (
        "no"  # put links to the images, or copies of them, into one folder per cluster; the originals never change
    )
    names: str = ""  # JSON file with names of clusters, merged and rejected ones, as the atlas saves it
    atlas: bool = True  # write atlas.html, a page that shows the clusters and their images
    update: bool = False  # list --data again and predict only files that are new or have changed
    classifier: int | None = None  # number of the classifier (default: the one that training chose)
    arch: str = ""  # architecture of a released network if its file does not name it (default: resnet50)
    batch_size: int = 256  # number of images per forward pass
    workers: int = -1  # number of processes that decode image files (-1: one per available core)

    def check(self) -> None:
        if not self.checkpoint:
            raise InputError("--checkpoint is missing: name a file written by train.py, or a released model")
        if not self.data:
            raise InputError("--data is missing: name a folder of images, or one image file")
        if self.data in BUILT_IN_DATA or self.data.endswith(".npz"):
            raise InputError(
                f"--data {self.data}: expected a folder of image files, or one image file; "
                "python -m src.data.unpack writes data sets as files"
            )
        require_at_least(self, batch_size=1, workers=-1)
        require_at_most(self, workers=1024)


def parse_predict(argv: Sequence[str] | None = None) -> PredictOptions:
    """Parse the command line of predict.py."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = flags.OneLineParser(
        prog="predict.py",
        allow_abbrev=False,
        description="Put every image of a folder into the clusters of a checkpoint.",
    )
    for group in (PredictOptions, EvalViewOptions, DeviceOptions):
        flags.add_flags(parser, group, flags.comments_of(group))
    flags.add_dry_run(parser)
    values = parser.parse_args(argv)
    options = flags.collect(PredictOptions, values)
    flags.end_dry_run(values, flags.as_plain(options))
    return options
