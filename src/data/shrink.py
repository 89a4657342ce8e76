"""Copy a folder of photographs with their shorter side cut down, so that every epoch decodes fewer pixels.

    python -m src.data.shrink ~/imagenet ~/imagenet-320 --short-side 320

The tree is kept, image by image; smaller images and files that are no images are copied as they are, damaged ones are left out and
named. It can be stopped and started again: what is there already is not done again. Views cut from the copy are a little softer
where a small crop of a large photograph is enlarged, and JPEG's losses count twice; so the published recipes use the originals.
"""

import argparse
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..config import InputError, run_script
from .datasets import IMAGE_SUFFIXES


def shrink(source: Path, target: Path, short_side: int, quality: int) -> str:
    """Copy one file; returns what is wrong with it, or "". The copy appears whole or not at all."""
    if target.exists():
        return ""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with Image.open(source) as image:
            scale = short_side / min(image.size)
            if scale >= 1 or image.format != "JPEG":
                image.load()  # a damaged one is found out here, not in training
                shutil.copyfile(source, aside)
            else:
                size = [max(round(side * scale), short_side) for side in image.size]
                kept = {name: image.info[name] for name in ("exif", "icc_profile") if name in image.info}
                smaller = image.resize(size, Image.Resampling.LANCZOS)
                smaller.save(aside, "JPEG", quality=quality, subsampling="4:2:0", **kept)
        os.replace(aside, target)
    except Exception as error:  # Pillow raises many kinds on damaged files
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return f"{source}: {type(error).__name__}: {error}"
    return ""


def _job(pair: tuple[Path, Path], short_side: int, quality: int) -> str:
    return shrink(*pair, short_side, quality)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m src.data.shrink", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of photographs")
    parser.add_argument("target", type=Path, help="folder for the copy")
    parser.add_argument("--short-side", type=int, default=320, help="pixels (default: 320)")
    parser.add_argument("--quality", type=int, default=92, help="of JPEG, 1 to 95 (default: 92)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the cores)"
    )
    options = parser.parse_args()
    if not options.source.is_dir():
        raise InputError(f"{options.source}: no such folder, expected one of photographs")
    if options.short_side < 1 or not 1 <= options.quality <= 95 or options.workers < 1:
        raise InputError("expected --short-side and --workers of at least 1 and --quality from 1 to 95")
    inside = options.target.resolve()
    if inside == options.source.resolve() or options.source.resolve() in inside.parents:
        raise InputError(
            f"{options.target} lies in {options.source}, whose files it would copy again: give another folder"
        )
    found = (Path(top) / name for top, _, names in os.walk(options.source, followlinks=True) for name in names)
    files = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{options.source}: no images in it")
    pairs = [(path, options.target / path.relative_to(options.source)) for path in files]
    job = partial(_job, short_side=options.short_side, quality=options.quality)
    damaged = 0
    with ProcessPoolExecutor(options.workers) as pool:
        for wrong in tqdm(
            pool.map(job, pairs, chunksize=16), total=len(pairs), unit=" images", disable=not sys.stderr.isatty()
        ):
            if wrong:
                damaged += 1
                print(f"left out: {wrong}", flush=True)
    print(
        f"{len(pairs) - damaged:,} images in {options.target}"
        + (f", {damaged} damaged ones left out" if damaged else "")
    )


if __name__ == "__main__":
    run_script(main)
