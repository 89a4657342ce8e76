"""Thumbnails of images, packed into sheets, and what can be measured on the pixels."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

TILE = 64  # largest side of a thumbnail in pixels
COLUMNS = 16  # a sheet holds 16 x 16 thumbnails
MEASURED = 256  # longer side in pixels at which sharpness is measured
HASH = 8  # side of the grid of comparisons in a hash
# Near-duplicates differ in at most so many of 64 comparisons, in their mean by at most so many grey levels, and at 16 x 16 pixels
# on average by at most this share of the contrast of the image. On 5,000 photographs of CIFAR-10 these limits found eight groups
# of 17 images, and each group was one object in one scene. Images below 16 pixels have too few details, and must be almost equal.
CLOSE_BITS, CLOSE_MEANS, CLOSE_SHARE, EQUAL_SHARE = 14, 40.0, 0.35, 0.02
SMALL = 16
BROKEN = (128, 128, 128)
# Quality of the WebP files, from the best to the smallest: (share of the side of a tile, quality); None is lossless.
QUALITIES = (
    (1.0, None),
    (1.0, 90),
    (1.0, 80),
    (1.0, 70),
    (1.0, 55),
    (0.875, 55),
    (0.75, 50),
    (0.625, 45),
    (0.5, 40),
    (0.375, 35),
    (0.25, 30),
)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Thumbnails and measurements of N images.

    Attributes:
        thumbnails: RGB, the longer side at most 64 pixels.
        sizes: (N, 2) width and height of the images in pixels.
        brightness: (N,) mean grey level, 0 to 255.
        sharpness: (N,) standard deviation of the Laplacian in grey levels, at 256 pixels or less.
        duplicates: (N,) number of the group of near-duplicates, counted from 1; 0: none.
        broken: {position: the reason why the image cannot be shown}.
    """

    thumbnails: list[Image.Image]
    sizes: np.ndarray
    brightness: np.ndarray
    sharpness: np.ndarray
    duplicates: np.ndarray
    broken: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Sheets:
    """WebP files with 256 thumbnails each, and the size of the thumbnails in them.

    Attributes:
        tile: side of the square that each thumbnail has.
        shapes: (N, 2) width and height of the thumbnails in the sheets, in the order of the sheets.
    """

    files: list[bytes]
    tile: int
    shapes: np.ndarray


def read_pictures(count: int, picture: Callable[[int], np.ndarray]) -> Pictures:
    """Read all images once and measure them.

    Args:
        picture: returns image i, (H, W) or (H, W, 3) uint8, or raises an error.
    """
    thumbnails, broken = [], {}
    sizes, brightness, sharpness = np.zeros((count, 2), dtype=np.int64), np.zeros(count), np.zeros(count)
    hashes, small = np.zeros(count, dtype=np.uint64), np.zeros((count, SMALL * SMALL), dtype=np.float32)
    for i in range(count):
        try:
            image = Image.fromarray(picture(i))
        except Exception as error:  # a decoder may raise any error for a damaged file
            broken[i] = " ".join(str(error).split())[:200] or type(error).__name__
            thumbnails.append(Image.new("RGB", (TILE, TILE), BROKEN))
            continue
        sizes[i] = image.size
        grey = _at_most(image, MEASURED).convert("L")
        brightness[i] = np.asarray(grey).mean()
        sharpness[i] = _sharpness(np.asarray(grey, dtype=np.float32))
        hashes[i] = _hash(grey)
        small[i] = np.asarray(grey.resize((SMALL, SMALL), Image.Resampling.BOX), dtype=np.float32).ravel()
        thumbnails.append(_at_most(image, TILE).convert("RGB"))
    shown = np.setdiff1d(np.arange(count), list(broken))
    duplicates = np.zeros(count, dtype=np.int64)
    duplicates[shown] = near_duplicates(hashes[shown], small[shown], sizes[shown].min(axis=1))
    return Pictures(
        thumbnails=thumbnails,
        sizes=sizes,
        brightness=brightness,
        sharpness=sharpness,
        duplicates=duplicates,
        broken=broken,
    )


def _at_most(image: Image.Image, side: int) -> Image.Image:
    """Return the image with its longer side reduced to `side` pixels, or the image itself if it is smaller."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(scale * length), 1) for length in image.size)
    return image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)


def _sharpness(grey: np.ndarray) -> float:
    """Return the standard deviation of the Laplacian of an image in grey levels; 0 for images below 3 x 3 pixels."""
    if min(grey.shape) < 3:
        return 0.0
    middle = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle).std())


def _hash(grey: Image.Image) -> np.uint64:
    """Return 64 bits that tell, on a grid, whether a point is brighter than its left neighbour."""
    pixels = np.asarray(grey.resize((HASH + 1, HASH), Image.Resampling.BOX), dtype=np.int16)
    bits = (pixels[:, 1:] > pixels[:, :-1]).ravel()
    return np.packbits(bits).view(np.uint64)[0]


def near_duplicates(hashes: np.ndarray, small: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Find groups of images that look almost the same.

    Args:
        hashes: (N,) uint64.
        small: (N, 256) grey levels.
        sides: (N,) shorter sides in pixels.

    Returns:
        (N,) number of the group of each image, counted from 1 in the order of their first images; 0: no near-duplicate.
    """
    count = len(hashes)
    means = small.mean(axis=1, keepdims=True)
    centred = small - means
    most = np.where(sides < SMALL, EQUAL_SHARE, CLOSE_SHARE) * centred.std(axis=1).clip(min=1)
    firsts, seconds = [], []
    for i in range(count):
        close = i + 1 + np.flatnonzero(np.bitwise_count(hashes[i + 1 :] ^ hashes[i]) <= CLOSE_BITS)
        if len(close):
            alike = np.abs(centred[close] - centred[i]).mean(axis=1) <= most[i]
            close = close[alike & (np.abs(means[close, 0] - means[i, 0]) <= CLOSE_MEANS)]
            firsts += [i] * len(close)
            seconds += close.tolist()
    if not firsts:
        return np.zeros(count, dtype=np.int64)
    pairs = coo_array((np.ones(len(firsts)), (firsts, seconds)), shape=(count, count))
    _, groups = connected_components(pairs, directed=False)
    large = np.bincount(groups)[groups] > 1
    _, first, inverse = np.unique(groups[large], return_index=True, return_inverse=True)
    numbers = np.zeros(count, dtype=np.int64)
    numbers[large] = np.argsort(np.argsort(first))[inverse] + 1
    return numbers


def pack(thumbnails: Sequence[Image.Image], budget: int) -> Sheets:
    """Pack thumbnails into sheets of at most `budget` bytes together, in the best quality for which they fit.

    If even the smallest quality does not fit, it is used all the same.
    """
    largest = max(max(each.size) for each in thumbnails)
    count = math.ceil(len(thumbnails) / COLUMNS**2)
    probe = [thumbnails[i] for i in np.random.default_rng(0).permutation(len(thumbnails))[: COLUMNS**2]]
    for number, (share, quality) in enumerate(QUALITIES):
        last = number == len(QUALITIES) - 1
        tile = max(round(share * largest), min(largest, 8))
        expected = len(_encode(_sheet(probe, tile), quality)) * len(thumbnails) / len(probe)
        if expected > budget and not last:
            continue
        smaller = [_at_most(each, tile) for each in thumbnails]
        parts = [smaller[start : start + COLUMNS**2] for start in range(0, len(smaller), COLUMNS**2)]
        files = [_encode(_sheet(part, tile), quality) for part in parts]
        if sum(map(len, files)) <= budget or last:
            return Sheets(files=files, tile=tile, shapes=np.array([each.size for each in smaller]))
    raise AssertionError(f"no quality for {count} sheets")


def _sheet(thumbnails: Sequence[Image.Image], tile: int) -> Image.Image:
    """Return one image with thumbnails in rows of 16, each in the top left corner of its square."""
    columns = min(COLUMNS, len(thumbnails))
    sheet = Image.new("RGB", (columns * tile, math.ceil(len(thumbnails) / COLUMNS) * tile))
    for i, each in enumerate(thumbnails):
        row, column = divmod(i, COLUMNS)
        sheet.paste(_at_most(each, tile), (column * tile, row * tile))
    return sheet


def _encode(sheet: Image.Image, quality: int | None) -> bytes:
    file = io.BytesIO()
    if quality is None:
        sheet.save(file, "WEBP", lossless=True, quality=60, method=4)
    else:
        sheet.save(file, "WEBP", quality=quality, method=4)
    return file.getvalue()
