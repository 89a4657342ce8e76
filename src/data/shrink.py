"""Copy a folder of photographs with their shorter side cut down, so that every epoch decodes fewer pixels.

    python -m src.data.shrink ~/imagenet ~/imagenet-320 --short-side 320

The tree is kept, image by image. JPEG files are cut down, smaller ones and other images copied as they are, damaged ones left out
and named. It can be stopped and started again: what is there already is not done again. Views cut from the copy are a little softer
where a small crop of a large photograph is enlarged, and JPEG's losses count twice; so the published recipes use the originals.
"""

import argparse
import io
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..errors import InputError, RunError, run_script
from .decoding import opened
from .listing import list_images


def shrink(source: Path, target: Path, *, short_side: int, quality: int) -> str:
    """Copy one file; returns what is wrong with it, or "". The copy appears whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    if target.exists():
        return ""
    try:
        with opened(source) as file, Image.open(file) as image:
            image.load()  # a damaged one is found out here, not in training
            file.seek(0)
            content = _smaller(image, short_side, quality) or file.read()
    except Exception as error:  # Pillow raises many kinds on damaged files
        return f"{source}: {type(error).__name__}: {error}"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return ""


def _smaller(image: Image.Image, short_side: int, quality: int) -> bytes:
    """A JPEG file of the image with its shorter side cut down; nothing if it is none, or small enough."""
    scale = short_side / min(image.size)
    if scale >= 1 or image.format not in ("JPEG", "MPO"):
        return b""
    size = [max(round(side * scale), short_side) for side in image.size]
    kept = {name: image.info[name] for name in ("exif", "icc_profile") if name in image.info}
    content = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", quality=quality, subsampling="4:2:0", **kept)
    return content.getvalue()


def _note(target: Path, settings: dict) -> None:
    """Write into the copy what it was made with. Raises InputError if that is something else, or cannot be written."""
    note = target / ".shrink.json"
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            note.write_text(json.dumps(settings))
        before = json.loads(note.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{target}: cannot be written ({error}): give another folder") from None
    if before != settings:
        raise InputError(f"{target} was made with {before}, now {settings}: give another folder")


def _job(pair: tuple[Path, Path], *, short_side: int, quality: int) -> str:
    source, target = pair
    return shrink(source, target, short_side=short_side, quality=quality)


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
    (files,) = list_images(options.source, [""])
    if not files:
        raise InputError(f"{options.source}: no images in it")
    pairs = [(Path(path), options.target / os.path.relpath(path, options.source)) for path in files]
    _note(options.target, {"short_side": options.short_side, "quality": options.quality})
    job = partial(_job, short_side=options.short_side, quality=options.quality)
    damaged = 0
    with ProcessPoolExecutor(options.workers) as pool:
        done = pool.map(job, pairs, chunksize=16)
        try:
            for wrong in tqdm(done, total=len(pairs), unit=" images", disable=not sys.stderr.isatty()):
                if wrong:
                    damaged += 1
                    print(f"left out: {os.fsencode(wrong).decode(errors='replace')}", flush=True)
        except OSError as error:
            raise RunError(f"{options.target}: {error}; what is there is whole, the same command goes on") from None
    print(
        f"{len(pairs) - damaged:,} images in {options.target}"
        + (f", {damaged} damaged ones left out" if damaged else "")
    )


if __name__ == "__main__":
    run_script(main)
