"""What all figures share: format, resolution, style, and the checks of their arguments.

The name of a file decides its format. The same arguments give the same file, byte for byte: no date is written. Text
stays text: PDF files embed TrueType fonts, SVG files leave the font to the viewer.

No function needs a display: matplotlib's Agg canvas draws, never pyplot. matplotlib is imported on first use, so that
importing this module is cheap.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
DPI = 150
INK, MUTED, FAINT, ACCENT = "#1f2328", "#656d76", "#d8dee4", "#0a3069"
WRONG = "#d1242f"
LINES = ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#bf3989"]
# Colours of up to 20 classes. The first six are those of Okabe and Ito without yellow and black. The others were chosen
# one after the other: each is as far as possible (in OKLab, also as seen with a colour vision deficiency) from all before.
CLASSES = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#78005a", "#c3005a", "#a5e100", "#4b1e96"),
    *("#875a00", "#875a87", "#3cd296", "#00695a", "#781e00", "#f0b4d2", "#b44bd2", "#a587ff", "#4b78ff", "#ff4b69"),
)
STYLE = {
    "text.parse_math": False,  # class names come from folders: a dollar sign is a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "font.size": 9,
    # Publishers refuse Type 3 fonts, matplotlib's default.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",  # else the ids in the file are random
}

_resolution: ContextVar[int] = ContextVar("resolution", default=DPI)


@contextmanager
def resolution(dpi: int) -> Iterator[None]:
    """Draw the figures of this block at another resolution, in dots per inch (default: 150)."""
    token = _resolution.set(dpi)
    try:
        yield
    finally:
        _resolution.reset(token)


@contextmanager
def figure_at(
    path: str | PathLike[str],
    width: float,
    height: float,
    *,
    dpi: int | None = None,
    layout: Literal["constrained"] | None = None,
) -> Iterator["Figure"]:
    """Yield a white figure of width × height inches and write it to `path` at the end of the block."""
    suffix, folder = Path(path).suffix, Path(path).absolute().parent
    if suffix not in FORMATS:
        raise ValueError(f"{path}: got a name that ends in {suffix or 'nothing'}; expected {', '.join(FORMATS)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: the folder {folder} does not exist; create it first")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = STYLE
    no_date = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[suffix]
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the figures
        matplotlib.rcParams.update(style)
        # matplotlib draws a box in place of a character that its font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        figure = Figure(figsize=(width, height), dpi=dpi or _resolution.get(), layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        if layout == "constrained":
            figure.set_layout_engine(layout, w_pad=0.12, h_pad=0.12)
        yield figure
        figure.savefig(path, dpi="figure", metadata=no_date)


def open_style(axes: "Axes") -> None:
    """Leave only the lower edge and horizontal grid lines behind the data."""
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)


def pixels(at_default: float) -> int:
    """Return a length in pixels at the current resolution, given the pixels at the default one."""
    return round(at_default * _resolution.get() / DPI)


def classes_of(cluster_ids: NDArray, mapping: Mapping[int, int], num_names: int) -> NDArray:
    """Return the class of each cluster, in the order of `cluster_ids`."""
    for cluster in cluster_ids.tolist():
        if cluster not in mapping:
            raise ValueError(f"cluster {cluster} occurs but is not in the mapping; give every cluster a class")
        if not 0 <= mapping[cluster] < num_names:
            raise ValueError(f"cluster {cluster} is class {mapping[cluster]}, but there are {num_names} names")
    return np.array([mapping[cluster] for cluster in cluster_ids.tolist()])


def check_labels(labels: NDArray, num_names: int) -> None:
    if not 0 <= labels.min() <= labels.max() < num_names:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, but there are {num_names} names")


def same_length(**sequences: Sequence[Any] | NDArray) -> None:
    lengths = {name: len(values) for name, values in sequences.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"got lengths {lengths}; expected equal lengths above zero")


def whole_percent(share: float) -> str:
    """Round a share to whole percent; only a share of 1 gives 100 %."""
    return f"{100 if share == 1 else min(round(100 * share), 99)} %"


def one_line(name: str, length: int) -> str:
    """Return a name as one line of at most `length` characters.

    Line breaks and other control characters become escapes such as `\\n`: they are no text, and an SVG file with them
    is not valid.
    """
    line = printable(name)
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
