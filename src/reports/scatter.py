"""Figures of points in the plane, coloured and named by class."""

import math
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .canvas import CLASSES, FAINT, MUTED, check_labels, figure_at, one_line, same_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

LISTED_BESIDE, LISTED_BELOW = 20, 300  # largest number of classes whose names are at the side, and below


def scatter(
    path: str | PathLike[str],
    points: ArrayLike,
    labels: ArrayLike,
    *,
    class_names: Sequence[str],
    title: str = "",
    axis_labels: tuple[str, str] | None = None,
) -> None:
    """Draw points in the colours of their classes.

    Up to 20 classes are named at the side. Up to 300 classes are named in an index below, and each class's number is
    written among its points; a number that would cover another one is left out. More classes have no names.

    Both axes have the same scale and no ticks.

    Args:
        path: file to write, .png, .pdf or .svg; its folder must exist.
        points: (N, 2).
        labels: (N,) class of every point, a position in `class_names`.
        class_names: name of each class.
        axis_labels: what the two directions mean; None: nothing, as in t-SNE, and no axes are drawn.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the points are not (N, 2), a class has no name, or the lengths differ.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    same_length(points=points, labels=labels)
    if points.shape != (len(points), 2):
        raise ValueError(f"got points {points.shape}; expected (N, 2)")
    check_labels(labels, len(class_names))
    classes, group = np.unique(labels, return_inverse=True)
    colours = _class_colours(len(classes))
    numbered = LISTED_BESIDE < len(classes) <= LISTED_BELOW
    with figure_at(path, 1, 1) as figure:
        names = [one_line(class_names[k], 20 if numbered else 24) for k in classes]
        if numbered:  # unless the name is the number
            names = [n if n in (f"{k}", f"cluster {k}") else f"{k}  {n}" for k, n in zip(classes, names, strict=True)]
        axes = _lay_out(figure, names, colours, axis_labels=axis_labels)
        order = np.random.default_rng(0).permutation(len(points))  # else the last class would cover the others
        x, y = points[order].T
        size = float(np.clip(220 / math.sqrt(len(points)), 1, 30))
        many = len(points) > 20_000  # as one image in PDF and SVG files: viewers are slow with so many shapes
        axes.scatter(x, y, s=size, c=colours[group][order], linewidths=0, rasterized=many)
        axes.set_title(title)
        if numbered:
            _write_numbers(axes, points, group=group, classes=classes)


def _lay_out(
    figure: "Figure", names: Sequence[str], colours: NDArray, *, axis_labels: tuple[str, str] | None
) -> "Axes":
    """Make a figure of square axes and a list of names beside or below, and return the axes."""
    beside, below = len(names) <= LISTED_BESIDE, LISTED_BESIDE < len(names) <= LISTED_BELOW
    side, margin = (7.0 if below else 5.0), 0.15  # inches
    left = bottom = 0.4 if axis_labels else margin
    width, height = left + side + margin, 0.4 + side + bottom
    if beside:
        legend = _legend(figure, names, colours, size=9, ncols=1)
        extent = legend.get_window_extent()
        width += extent.width / figure.dpi + margin
        height = max(height, extent.height / figure.dpi + 2 * margin)
        legend.set_loc("center right")
        legend.set_bbox_to_anchor((1 - margin / width, 0.5))
    elif below:
        legend = _columns(figure, names, colours, width=width - 2 * margin)
        listed = margin + legend.get_window_extent().height / figure.dpi
        bottom, height = bottom + listed, height + listed
        legend.set_loc("upper center")
        legend.set_bbox_to_anchor((0.5, listed / height))
    else:
        bottom, height = bottom + 0.25, height + 0.25
        note = f"{len(names):,} classes; up to {LISTED_BELOW:,} are named"
        figure.text(left / width, margin / height, note, fontsize=8, color=MUTED)
    figure.set_size_inches(width, height)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    axes.set_aspect("equal", adjustable="datalim")
    if axis_labels:
        axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1], xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color(FAINT)
    else:
        axes.set_axis_off()
    return axes


def _columns(figure: "Figure", names: Sequence[str], colours: NDArray, *, width: float) -> "Legend":
    """Add a legend with as many columns as fit into `width` inches."""
    longest = sorted(names, key=len)[-10:]  # to measure all names takes as long as to draw them
    one_column = _legend(figure, longest, colours[: len(longest)], size=6, ncols=1)
    gap = 6 / 72  # between columns
    ncols = int((width + gap) / (one_column.get_window_extent().width / figure.dpi + gap))
    one_column.remove()
    while True:
        legend = _legend(figure, names, colours, size=6, ncols=ncols)
        if ncols == 1 or legend.get_window_extent().width <= width * figure.dpi:
            return legend
        legend.remove()
        ncols -= 1


def _legend(figure: "Figure", names: Sequence[str], colours: NDArray, *, size: float, ncols: int) -> "Legend":
    """Add the list of names, each with a point in its colour."""
    from matplotlib.lines import Line2D

    points = [Line2D([], [], color=tuple(c), marker="o", linestyle="", markersize=0.6 * size) for c in colours]
    return figure.legend(
        points,
        names,
        fontsize=size,
        ncols=ncols,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        handletextpad=0.4,
        columnspacing=1,
        labelspacing=0.5 if ncols == 1 else 0.3,
    )


def _write_numbers(axes: "Axes", points: NDArray, *, group: NDArray, classes: NDArray) -> None:
    """Write the number of each class at the median of its points, or at a point near it if another number is there.

    Large classes come first. A number that finds no free place is left out.
    """
    size = 6
    axes.apply_aspect()  # the scale of the axes is final only now
    digits = len(str(classes.max()))
    room = np.array([0.7 * digits + 0.2, 1.2]) * size * axes.figure.dpi / 72  # width and height of a number
    taken = np.empty((0, 2))
    for k in np.argsort(-np.bincount(group), kind="stable"):
        own = points[group == k]
        median = np.median(own, axis=0)
        nearest = np.argsort(((own - median) ** 2).sum(axis=1), kind="stable")[:40]
        places = np.vstack([median, own[nearest]])
        pixels = axes.transData.transform(places)
        covers = np.all(np.abs(pixels[:, None] - taken) < room, axis=2)  # (places, numbers so far)
        free = ~np.any(covers, axis=1)
        if not free.any():
            continue
        first = int(free.argmax())
        taken = np.vstack([taken, pixels[first]])
        x, y = places[first]
        behind = {"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.75, "linewidth": 0}
        axes.text(x, y, str(classes[k]), fontsize=size, ha="center", va="center", bbox=behind)


def _class_colours(count: int) -> NDArray:
    """Return one colour per class, (count, 3) in [0, 1].

    Up to 20 are distinct. More lie evenly on the hue circle of OKLab, so that the last class resembles the first again.
    Three alternating lightnesses keep neighbours apart, each with the largest chroma that sRGB has at every hue.
    """
    if count <= len(CLASSES):
        return np.array([list(bytes.fromhex(colour[1:])) for colour in CLASSES[:count]]) / 255
    hue = 2 * np.pi * np.arange(count) / count
    lightness, chroma = np.resize([0.65, 0.5, 0.77], count), np.resize([0.11, 0.085, 0.115], count)
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    # From OKLab to linear sRGB (Ottosson 2020), then to sRGB.
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        axis=1,
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = (cones**3 @ to_rgb.T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).clip(0, 1)
