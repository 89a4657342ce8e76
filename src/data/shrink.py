"""Copy a folder of photographs at a smaller size, so that every epoch decodes fewer pixels.

    python -m src.data.shrink ~/imagenet ~/imagenet-320 --short-side 320

The copy has the same folders and file names. JPEG files are resized so that their shorter side has the given length. Smaller
JPEG files and images of other formats are copied unchanged. Damaged images are left out and reported. An interrupted command
can be run again: it skips the files that exist already.

Views from the copy are a little softer where a small crop of a large photograph is enlarged, and the losses of JPEG occur
twice. For this reason the published recipes use the original images.
"""

import io
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .. import files
from ..config import OneLineParser
from ..errors import InputError, RunError, printable, run_script
from ..inspection import read_json
from .decoding import opened
from .listing import list_images


def shrink(source: Path, target: Path, *, short_side: int, quality: int) -> str:
    """Copy one image file at a smaller size. The copy is either complete or does not exist.

    Args:
        short_side: length of the shorter side of the copy in pixels.
        quality: JPEG quality, 1 to 95.

    Returns:
        The reason why a damaged file was left out, or "".

    Raises:
        OSError: if the copy cannot be written.
    """
    if target.exists():
        return ""
    try:
        with opened(source) as file, Image.open(file) as image:
            image.load()  # detects damaged files here instead of in training
            file.seek(0)
            content = _smaller(image, short_side, quality) or file.read()
    except Exception as error:  # Pillow raises many kinds of errors on damaged files
        return f"{source}: {type(error).__name__}: {error}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(target) as copy:
        copy.write(content)
    return ""


def _smaller(image: Image.Image, short_side: int, quality: int) -> bytes:
    """Return a smaller JPEG file of the image, or b"" if the image is not JPEG or is small enough already."""
    scale = short_side / min(image.size)
    if scale >= 1 or image.format not in ("JPEG", "MPO"):
        return b""
    size = [max(round(side * scale), short_side) for side in image.size]
    kept = {name: image.info[name] for name in ("exif", "icc_profile") if name in image.info}
    content = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", quality=quality, subsampling="4:2:0", **kept)
    return content.getvalue()


def _record_settings(target: Path, settings: dict[str, int]) -> None:
    """Record the settings in the folder of the copy.

    Raises:
        InputError: if the folder was made with other settings, or if it cannot be written or read.
    """
    note = target / ".shrink.json"
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            files.write_text(note, json.dumps(settings))
        before = read_json(note)
    except (OSError, ValueError) as error:
        raise InputError(f"{target}: the folder cannot be used ({error}): pass another folder") from None
    if before != settings:
        raise InputError(f"{target} was made with {before}, but the settings are now {settings}: pass another folder")


def _shrink_pair(pair: tuple[Path, Path], *, short_side: int, quality: int) -> str:
    source, target = pair
    return shrink(source, target, short_side=short_side, quality=quality)


def main() -> None:
    parser = OneLineParser(prog="python -m src.data.shrink", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="Folder of photographs.")
    parser.add_argument("target", type=Path, help="Folder for the copy.")
    parser.add_argument(
        "--short-side", type=int, default=320, help="Length of the shorter side of the copies in pixels (default: 320)."
    )
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality of the copies, 1 to 95 (default: 92).")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="Number of worker processes (default: one per available core).",
    )
    options = parser.parse_args()
    if not options.source.is_dir():
        raise InputError(f"{options.source}: no such folder, expected a folder of photographs")
    if options.short_side < 1 or not 1 <= options.quality <= 95 or options.workers < 1:
        raise InputError(
            f"--short-side {options.short_side} --quality {options.quality} --workers {options.workers}: expected --short-side "
            "and --workers of at least 1 and --quality from 1 to 95"
        )
    inside = options.target.resolve()
    if inside == options.source.resolve() or options.source.resolve() in inside.parents:
        raise InputError(
            f"{options.target} lies in {options.source}, so the command would copy its own copies: pass a folder outside it"
        )
    (paths,) = list_images(options.source, [""])
    if not paths:
        raise InputError(f"{options.source}: no images in this folder, expected photographs")
    pairs = [(Path(path), options.target / os.path.relpath(path, options.source)) for path in paths]
    _record_settings(options.target, {"short_side": options.short_side, "quality": options.quality})
    job = partial(_shrink_pair, short_side=options.short_side, quality=options.quality)
    damaged = 0
    with ProcessPoolExecutor(options.workers) as pool:
        done = pool.map(job, pairs, chunksize=16)
        try:
            for wrong in tqdm(done, total=len(pairs), unit=" images", disable=not sys.stderr.isatty()):
                if wrong:
                    damaged += 1
                    print(f"left out: {printable(wrong)}", flush=True)
        except OSError as error:
            raise RunError(
                f"{options.target}: {error}: the files written so far are complete; run the same command again to continue"
            ) from None
    print(
        f"{len(pairs) - damaged:,} images in {options.target}"
        + (f", {damaged} damaged images left out" if damaged else "")
    )


if __name__ == "__main__":
    run_script(main)
