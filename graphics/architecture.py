"""Draw the network and the loss of Self-Classifier, for the README.

    python graphics/architecture.py                  # writes graphics/architecture.png
    python graphics/architecture.py FILE.svg         # .png, .pdf or .svg

The picture has a white background, so it is readable on light and dark pages. The same matplotlib writes the same file.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from src.reports.canvas import INK, MUTED, figure_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 64
FILE = Path(__file__).with_suffix(".png")
WIDTH, HEIGHT = 12.2, 4.7  # inches; one unit of the axes is a tenth of an inch
# Fill and edge of the boxes.
IMAGES, NETWORK, QUEUE = ("#f6f8fa", "#656d76"), ("#ddf4ff", "#0969da"), ("#fff1e5", "#bc4c00")
TARGETS, PREDICTIONS, LOSS = ("#dafbe1", "#1a7f37"), ("#fbefff", "#8250df"), ("#ffebe9", "#d1242f")
Box = tuple[float, float, float, float]  # left, bottom, width, height


def draw(path: str | Path) -> None:
    """Draw the picture into a file, .png, .pdf or .svg."""
    with figure_at(path, WIDTH, HEIGHT, dpi=110) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 10 * WIDTH), ylim=(0, 10 * HEIGHT))
        axes.axis("off")
        _network(axes)
        _loss(axes)
    if Path(path).suffix == ".png":  # few colours: a third of the size
        with Image.open(path) as picture:
            small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        small.save(path, optimize=True)


def _network(axes: "Axes") -> None:
    """Draw the way from an image to the logits, and the queue."""
    _box(axes, (1, 16.5, 9, 9), IMAGES, "image")
    views = [(14.5, 27.5, 12, 5.5), (14.5, 18.2, 12, 5.5), (14.5, 8, 12, 6.5)]
    for box, text in zip(views, ("global view 0", "global view 1", "local views\n2 to 7"), strict=True):
        _box(axes, box, IMAGES, text, size=9)
        middle = box[1] + box[3] / 2
        _arrow(axes, (10, 21), (14.5, middle))
        _arrow(axes, (26.5, middle), (30, 21 + (middle - 21) / 2))
    _box(axes, (30, 12, 12, 18), NETWORK, "backbone", "ResNet-50\n2,048 features")
    _box(axes, (45, 12, 12, 18), NETWORK, "projection\nhead", "MLP, then\nunit length;\n128 numbers")
    _box(axes, (69, 12, 12.5, 18), NETWORK, "classifiers", "1,000, 2,000,\n4,000 and 8,000\nclasses")
    _arrow(axes, (42, 21), (45, 21))
    _arrow(axes, (57, 21), (69, 21))
    _note(axes, 63, 18.8, "embeddings")
    _note(axes, 55.5, 8, "All views pass through the same networks.\nGradients flow into targets and predictions.")

    colour = QUEUE[1]
    _box(axes, (45, 37, 36.5, 7.5), QUEUE, "queue of 262,144 embeddings of view 0", "of earlier images, from all GPUs")
    _arrow(axes, (61, 21), (61, 37), colour=colour)
    _note(axes, 60.2, 33.5, "view 0: look up,\nthen push", align="right", colour=colour)
    _arrow(axes, (65, 37), (65, 21), colour=colour)
    _note(axes, 65.8, 33.5, "once full: its nearest\nneighbour replaces view 0", align="left", colour=colour)


def _loss(axes: "Axes") -> None:
    """Draw the way from the logits to the loss."""
    text = "softmax over the batch,\ntemperature 0.05;\nrows scaled to sum 1"
    _box(axes, (87, 26.5, 16.5, 12), TARGETS, "p(image | class)", text)
    text = "softmax over classes,\ntemperature 0.1;\ncolumns scaled to sum N/C"
    _box(axes, (87, 3.5, 16.5, 12), PREDICTIONS, "p(class | image)", text)
    _arrow(axes, (81.5, 23), (87, 31))
    _note(axes, 84.2, 21, "logits")
    _arrow(axes, (81.5, 19), (87, 11))
    _box(
        axes,
        (106.5, 13.5, 14.5, 15),
        LOSS,
        "loss",
        "cross-entropy, mean\nover classifiers and\npairs of views; local\nviews only meet\nglobal ones",
    )
    _arrow(axes, (103.5, 33.5), (113, 28.5), colour=TARGETS[1])
    _note(axes, 112.5, 34.5, "targets of view i", colour=TARGETS[1])
    _arrow(axes, (103.5, 8.5), (113, 13.5), colour=PREDICTIONS[1])
    _note(axes, 112.5, 6.5, "logarithm, view j ≠ i", colour=PREDICTIONS[1])


def _box(axes: "Axes", box: Box, colours: tuple[str, str], title: str, text: str = "", *, size: float = 10) -> None:
    """Draw a rounded box with a title and, below it, smaller text."""
    from matplotlib.patches import FancyBboxPatch

    left, bottom, width, height = box
    fill, edge = colours
    shape = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.8")
    shape.set(facecolor=fill, edgecolor=edge, linewidth=1.2)
    axes.add_patch(shape)
    x, middle = left + width / 2, bottom + height / 2
    lines = text.count("\n") + 1 if text else 0
    shift = 0.85 * lines
    axes.text(x, middle + shift, title, ha="center", va="center", fontsize=size, weight="bold", color=INK)
    if text:
        below = middle + shift - 1.1 - 0.95 * (title.count("\n"))
        axes.text(x, below, text, ha="center", va="top", fontsize=8, color=INK, linespacing=1.25)


def _arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float], *, colour: str = MUTED) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0})


def _note(
    axes: "Axes",
    x: float,
    y: float,
    text: str,
    *,
    align: Literal["left", "center", "right"] = "center",
    colour: str = MUTED,
) -> None:
    axes.text(x, y, text, ha=align, va="center", fontsize=8, color=colour)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else FILE)
