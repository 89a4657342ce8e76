"""The suffixes of the image files that can be read, and a message that counts the other files.

AVIF needs Pillow 11.3 or newer, HEIC needs the package pillow-heif.
"""

from collections.abc import Mapping

from PIL import features

HEIC = frozenset({".heic", ".heif", ".hif"})  # photographs of phones
AVIF = ".avif"
SHOWN = 6  # suffixes in a message


def _heic_is_read() -> bool:
    """Teach Pillow to read HEIC files, if pillow-heif is installed. It shows the images upright."""
    try:
        from pillow_heif import register_heif_opener
    except (ImportError, OSError):  # not installed, or built for another system
        return False
    register_heif_opener()
    return True


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
if features.check("avif"):  # Pillow 11.3 and newer
    IMAGE_SUFFIXES |= {AVIF}
if _heic_is_read():
    IMAGE_SUFFIXES |= HEIC


def describe_others(others: Mapping[str, int]) -> str:
    """Return a line about the files that are not read, with their numbers by suffix, or "" if there are none.

    Args:
        others: {suffix in lower case, "" for none: number of files}.
    """
    if not others:
        return ""
    ordered = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{number:,} {suffix or 'without a suffix'}" for suffix, number in ordered[:SHOWN]]
    rest = sum(number for _, number in ordered[SHOWN:])
    line = f"files that are not read: {', '.join(parts)}{f' and {rest:,} others' if rest else ''}"
    if HEIC & others.keys():
        line += "; `pip install pillow-heif` makes HEIC readable"
    if AVIF in others:
        line += "; Pillow 11.3 or newer reads AVIF"
    return line
