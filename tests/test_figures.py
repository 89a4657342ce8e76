"""Figures: the right images in the right places, read back from the written file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from PIL import Image

from src.reports import figures

RED = (0xD1, 0x24, 0x2F)
NAMES = ["zero", "one", "two"]


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def colour_of(index):
    """A colour that belongs to one image only and is not otherwise in a figure."""
    return (17 + index, 250 - index, 77)


class RecordedImages:
    """One plain colour per index; remembers what was asked for."""

    def __init__(self, shape=(12, 12)):
        self.asked, self.shape = [], shape

    def __call__(self, index):
        self.asked.append(index)
        return np.broadcast_to(np.uint8(colour_of(index)), (*self.shape, 3))


def left_edge(picture, index):
    """Column where the tile of an image begins, None where it is not shown."""
    found = (picture == colour_of(index)).all(axis=2)
    return int(np.flatnonzero(found.any(axis=0))[0]) if found.any() else None


def top_edge(picture, index):
    return int(np.flatnonzero((picture == colour_of(index)).all(axis=2).any(axis=1))[0])


# ---- gallery --------------------------------------------------------------------------------------------------------


def small_gallery(path, **changes):
    """Cluster 4 (class 1) is right in 3 of 4, cluster 9 (class 0) in 2 of 2, cluster 6 (class 2) in 1 of 3."""
    arguments = {
        "images": RecordedImages(),
        "labels": [1, 1, 1, 0, 0, 0, 2, 1, 0],
        "clusters": [4, 4, 4, 4, 9, 9, 6, 6, 6],
        "confidences": [0.5, 0.9, 0.7, 0.8, 0.6, 0.95, 0.3, 0.2, 0.4],
        "mapping": {4: 1, 9: 0, 6: 2},
        "class_names": NAMES,
        "per_cluster": 2,
    }
    arguments |= changes
    figures.gallery(path, **arguments)
    return arguments["images"].asked, pixels(path) if path.suffix == ".png" else None


def test_gallery_asks_only_for_the_most_confident_images_of_each_cluster(tmp_path):
    asked, _ = small_gallery(tmp_path / "gallery.png")
    assert asked == [5, 4, 1, 3, 8, 6]  # clusters by purity, images by confidence


def test_gallery_shows_clusters_top_down_and_images_left_to_right(tmp_path):
    _, picture = small_gallery(tmp_path / "gallery.png")
    assert left_edge(picture, 5) == left_edge(picture, 1) < left_edge(picture, 4)
    assert top_edge(picture, 5) == top_edge(picture, 4) < top_edge(picture, 1) < top_edge(picture, 6)
    assert [left_edge(picture, index) for index in (0, 2, 7)] == [None] * 3


def test_gallery_frames_exactly_the_images_of_another_class(tmp_path):
    _, picture = small_gallery(tmp_path / "gallery.png")
    assert (picture == RED).all(axis=2).any()
    for index, is_wrong in {5: False, 4: False, 1: False, 3: True, 8: True, 6: False}.items():
        row, column = top_edge(picture, index), left_edge(picture, index)
        above = tuple(picture[row - 1, column + 20])
        assert above == (RED if is_wrong else (255, 255, 255)), index


def test_gallery_without_labels_has_no_frames_and_ranks_by_confidence(tmp_path):
    asked, picture = small_gallery(tmp_path / "gallery.png", labels=None)
    assert asked == [5, 4, 1, 3, 8, 6]  # mean confidence 0.775, 0.725, 0.3
    assert not (picture == RED).all(axis=2).any()
    asked, picture = small_gallery(tmp_path / "gallery.png", labels=None, mapping=None, class_names=None)
    assert asked == [5, 4, 1, 3, 8, 6]
    assert not (picture == RED).all(axis=2).any()


def test_gallery_puts_clusters_too_small_for_a_row_last(tmp_path):
    asked, _ = small_gallery(tmp_path / "gallery.png", per_cluster=3)
    assert asked == [1, 3, 2, 8, 6, 7, 5, 4]


def test_gallery_stops_at_the_asked_number_of_clusters(tmp_path):
    asked, picture = small_gallery(tmp_path / "gallery.png", max_clusters=1)
    assert asked == [5, 4]
    assert picture.shape[0] < 200


def test_gallery_enlarges_small_images_without_smoothing(tmp_path):
    board = (200 * (np.indices((8, 8)).sum(axis=0) % 2)).astype(np.uint8)
    path = tmp_path / "gallery.png"
    figures.gallery(path, lambda _: board, clusters=None, confidences=[0], [1.0], None, None)
    picture = pixels(path)
    black = (picture == 0).all(axis=2)
    row, column = np.argwhere(black)[0]
    assert np.array_equal(picture[row : row + 96, column : column + 96, 0], board.repeat(12, axis=0).repeat(12, axis=1))


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (32, 32), (64, 48), (300, 200), (150, 400)])
def test_gallery_takes_images_of_any_size(tmp_path, shape):
    _, picture = small_gallery(tmp_path / "gallery.png", images=RecordedImages(shape))
    side = {8: 96, 28: 84, 32: 96, 48: 96}.get(min(shape), 96)
    shown = (picture == colour_of(5)).all(axis=2)
    assert shown.any(axis=0).sum() == shown.any(axis=1).sum() == side


def test_gallery_crops_to_the_middle(tmp_path):
    image = np.zeros((100, 300, 3), dtype=np.uint8)
    image[:, 100:200] = colour_of(0)
    path = tmp_path / "gallery.png"
    figures.gallery(path, lambda _: image, clusters=None, confidences=[0], [1.0], None, None)
    assert (pixels(path) == colour_of(0)).all(axis=2).sum() == 96 * 96


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mapping": {4: 1, 9: 0}}, "cluster 6 occurs but the mapping gives it no class"),
        ({"mapping": {4: 1, 9: 0, 6: 3}}, "cluster 6 is class 3, but there are 3 names"),
        ({"mapping": None, "class_names": None}, "labels were given, but no mapping"),
        ({"class_names": None}, "give both or neither"),
        ({"labels": [0, 1]}, "expected equal lengths above zero, got {'labels': 2, 'clusters': 9}"),
        ({"confidences": [0.5]}, "expected equal lengths above zero, got {'clusters': 9, 'confidences': 1}"),
        ({"images": lambda index: np.zeros((8, 8))}, r"uint8, got \(8, 8\) of float64"),
        ({"images": lambda index: np.zeros((8, 8, 4), np.uint8)}, r"got \(8, 8, 4\) of uint8"),
        ({"per_cluster": 0}, "per_cluster=0"),
    ],
)
def test_gallery_refuses_what_does_not_fit_together(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_gallery(tmp_path / "gallery.png", **changes)
    assert not (tmp_path / "gallery.png").exists()


# ---- confusion matrix -----------------------------------------------------------------------------------------------


def drawn_text(monkeypatch):
    """Every text of the next figures, recorded when it is drawn."""
    drawn, draw = [], RendererAgg.draw_text

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        drawn.append(("formula", s) if ismath else s)
        return draw(self, gc, x, y, s, prop, angle, ismath, mtext)

    monkeypatch.setattr(RendererAgg, "draw_text", draw_text)
    return drawn


def test_confusion_matrix_writes_counts_names_and_accuracy(tmp_path, monkeypatch):
    drawn = drawn_text(monkeypatch)
    labels, clusters = [0] * 11 + [1] * 21 + [1] * 31 + [2] * 41, [8] * 11 + [8] * 21 + [5] * 31 + [6] * 41
    figures.confusion_matrix(tmp_path / "c.png", labels, clusters, mapping={8: 0, 5: 1, 6: 2}, class_names=NAMES)
    for text in ("11", "21", "31", "41", "zero", "one", "two", "accuracy 79.8 % of 104 images", "true class"):
        assert text in drawn
    rows = [text for text in drawn if text in ("8", "5", "6")]
    assert rows[:3] == ["8", "5", "6"]  # top down, in the order of their classes


def drawn_shares(monkeypatch):
    """Every matrix of the next figures, recorded when it is drawn."""
    drawn, imshow = [], Axes.imshow

    def recorded(self, matrix, **keywords):
        drawn.append(matrix)
        return imshow(self, matrix, **keywords)

    monkeypatch.setattr(Axes, "imshow", recorded)
    return drawn


def test_confusion_matrix_has_what_is_right_on_the_diagonal(tmp_path, monkeypatch):
    drawn = drawn_shares(monkeypatch)
    names = [str(i) for i in range(30)]
    labels = np.arange(30).repeat(4)
    cluster_of_class = np.random.default_rng(0).permutation(30)
    mapping = {int(cluster): i for i, cluster in enumerate(cluster_of_class)}
    figures.confusion_matrix(tmp_path / "c.png", labels, cluster_of_class[labels], mapping=mapping, class_names=names)
    assert np.array_equal(drawn[0], np.eye(30))


def test_confusion_matrix_lists_the_clusters_of_a_class_largest_first(tmp_path, monkeypatch):
    drawn = drawn_shares(monkeypatch)
    labels, clusters = [0, 0, 1, 1, 1, 0, 2, 2], [3, 3, 0, 1, 1, 1, 2, 2]
    figures.confusion_matrix(tmp_path / "c.png", labels, clusters, mapping={3: 0, 1: 1, 0: 1, 2: 2}, class_names=NAMES)
    assert drawn[0] == pytest.approx(np.array([[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 1, 0], [0, 0, 1]]))


def test_confusion_matrix_leaves_classes_without_images_out(tmp_path, monkeypatch):
    drawn = drawn_text(monkeypatch)
    figures.confusion_matrix(tmp_path / "c.png", [0, 2], [1, 0], mapping={1: 0, 0: 2}, class_names=NAMES)
    assert "two" in drawn
    assert "one" not in drawn


def test_confusion_matrix_of_a_thousand_classes(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 50_000)
    clusters = np.where(rng.random(50_000) < 0.4, labels, rng.integers(0, 1000, 50_000))
    names = [f"class {i}" for i in range(1000)]
    figures.confusion_matrix(tmp_path / "c.png", labels, clusters, mapping={i: i for i in range(1000)}, class_names=names)
    height, width, _ = pixels(tmp_path / "c.png").shape
    assert 1000 < height < 2500
    assert 1000 < width < 2500


def test_names_with_a_dollar_sign_are_written_as_they_are(tmp_path, monkeypatch):
    drawn = drawn_text(monkeypatch)
    names = ["$x_1$", "$", "a" * 40]
    figures.confusion_matrix(tmp_path / "c.png", [0, 1, 2], [0, 1, 2], mapping={0: 0, 1: 1, 2: 2}, class_names=names)
    assert {"$x_1$", "$", "a" * 23 + "…"} <= set(drawn)


@pytest.mark.parametrize(
    ("labels", "clusters", "mapping", "message"),
    [
        ([0, 1], [0, 4], {0: 0}, "cluster 4 occurs but the mapping gives it no class"),
        ([0, 5], [0, 1], {0: 0, 1: 1}, "labels go from 0 to 5, but there are 3 names"),
        ([0], [0, 1], {0: 0, 1: 1}, "expected equal lengths above zero"),
        ([], [], {}, "expected equal lengths above zero"),
    ],
)
def test_confusion_matrix_refuses_what_does_not_fit_together(tmp_path, labels, clusters, mapping, message):
    with pytest.raises(ValueError, match=message):
        figures.confusion_matrix(tmp_path / "c.png", labels, clusters, mapping=mapping, class_names=NAMES)


# ---- points in the plane --------------------------------------------------------------------------------------------


def drawn_points(monkeypatch):
    """Name, points and colour of every class of the next figures."""
    drawn, scatter = {}, Axes.scatter

    def recorded(self, x, y, **keywords):
        drawn[keywords["label"]] = (np.stack([x, y], axis=1).tolist(), tuple(keywords["color"]), keywords["s"])
        return scatter(self, x, y, **keywords)

    monkeypatch.setattr(Axes, "scatter", recorded)
    return drawn


def test_scatter_gives_each_class_its_points_and_a_colour_of_its_own(tmp_path, monkeypatch):
    text, drawn = drawn_text(monkeypatch), drawn_points(monkeypatch)
    points = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    figures.scatter(tmp_path / "s.png", points, [2, 0, 2, 0], class_names=NAMES)
    assert {name: rows for name, (rows, _, _) in drawn.items()} == {
        "zero": [points[1], points[3]],
        "two": [points[0], points[2]],
    }
    assert drawn["zero"][1] != drawn["two"][1]
    assert {size for _, _, size in drawn.values()} == {10}
    assert set(text) == {"zero", "two"}  # the legend; no axes, so no numbers
    assert pixels(tmp_path / "s.png").shape == (750, 900, 3)


def test_scatter_of_many_classes_names_none(tmp_path, monkeypatch):
    text, drawn = drawn_text(monkeypatch), drawn_points(monkeypatch)
    labels = np.arange(1000).repeat(2)
    points = np.random.default_rng(0).normal(size=(2000, 2))
    figures.scatter(tmp_path / "s.png", points, labels, class_names=[f"class {i}" for i in range(1000)])
    assert text == []
    assert len({colour for _, colour, _ in drawn.values()}) > 200


@pytest.mark.parametrize(
    ("points", "labels", "message"),
    [
        ([[0, 1, 2]], [0], r"\(N, 2\), got \(1, 3\)"),
        ([[0, 1]], [3], "labels go from 3 to 3, but there are 3 names"),
        ([[0, 1]], [-1], "labels go from -1"),
        ([[0, 1]], [0, 1], "expected equal lengths above zero"),
    ],
)
def test_scatter_refuses_what_does_not_fit_together(tmp_path, points, labels, message):
    with pytest.raises(ValueError, match=message):
        figures.scatter(tmp_path / "s.png", points, labels, class_names=NAMES)


# ---- training curves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_panels", [1, 2, 3, 4, 5])
def test_training_curves_draw_one_panel_per_title(tmp_path, monkeypatch, num_panels):
    drawn = drawn_text(monkeypatch)
    curves = {f"panel {i}": [("train", [3.0, 2.0, 1.0]), ("test", [None, 2.5, None])] for i in range(num_panels)}
    figures.training_curves(tmp_path / "curves.png", [1, 2, 3], curves)
    assert {text for text in drawn if text.startswith("panel")} == set(curves)
    assert {"train", "test", "epoch"} <= set(drawn)
    height, width, _ = pixels(tmp_path / "curves.png").shape
    assert 300 < height < 1000
    assert 400 < width < 1800


def test_training_curves_go_on_over_epochs_without_a_measurement(tmp_path, monkeypatch):
    plotted, plot = [], Axes.plot

    def recorded(self, x, y, **keywords):
        plotted.append((x.tolist(), y.tolist()))
        return plot(self, x, y, **keywords)

    monkeypatch.setattr(Axes, "plot", recorded)
    curves = {"accuracy": [("", [None, 0.5, None, 0.7]), ("never", [None] * 4)]}
    figures.training_curves(tmp_path / "curves.png", [1, 2, 3, 4], curves)
    assert plotted == [([2, 4], [0.5, 0.7]), ([], [])]


def test_training_curves_refuse_a_wrong_number_of_values(tmp_path):
    with pytest.raises(ValueError, match="'epochs': 3, \"curve 'loss'\": 2"):
        figures.training_curves(tmp_path / "curves.png", [1, 2, 3], {"loss": [("", [1.0, 2.0])]})
    with pytest.raises(ValueError, match="no curve"):
        figures.training_curves(tmp_path / "curves.png", [1, 2, 3], {})


# ---- one cluster, and all of them -----------------------------------------------------------------------------------


def test_a_grid_is_that_of_the_paper_to_the_pixel(tmp_path):
    images = [np.broadcast_to(np.uint8(colour_of(i)), (40 + i, 60, 3)) for i in range(9)]
    figures.grid(tmp_path / "grid.png", images)
    picture = pixels(tmp_path / "grid.png")
    assert picture.shape == (444, 444, 3)
    for i in range(9):
        top, left = 15 + 143 * (i // 3), 15 + 143 * (i % 3)
        tile = picture[top : top + 128, left : left + 128]
        assert (tile[3:-3, 3:-3] == colour_of(i)).all(), i
        assert all((side == 0).all() for side in (tile[:3], tile[-3:], tile[:, :3], tile[:, -3:])), i
    assert (picture[:15] == 255).all()
    assert (picture[:, 429:] == 255).all()
    assert (picture[143:158] == 255).all()


@pytest.mark.parametrize("count", [0, 8])
def test_a_grid_needs_a_square_number(tmp_path, count):
    with pytest.raises(ValueError, match=f"square number of images, got {count}"):
        figures.grid(tmp_path / "grid.png", [np.zeros((4, 4), np.uint8)] * count)


@pytest.mark.parametrize(("number", "drawn_as"), [(4, "bar"), (61, "stairs")])
def test_cluster_sizes_come_in_order_with_a_line_where_all_are_alike(tmp_path, monkeypatch, number, drawn_as):
    found = {}

    def recorded(name):
        original = getattr(Axes, name)

        def record(self, *words, **keywords):
            found.setdefault(name, []).append([np.asarray(word).tolist() for word in words])
            return original(self, *words, **keywords)

        monkeypatch.setattr(Axes, name, record)

    for name in ("bar", "stairs", "axhline"):
        recorded(name)
    text = drawn_text(monkeypatch)
    sizes = [3, 0, 9, 4] + [0] * (number - 4)
    figures.cluster_sizes(tmp_path / "sizes.png", sizes, [8, 8])
    heights = found["bar"][0][1] if drawn_as == "bar" else found["stairs"][0][0]
    assert heights == sorted(sizes, reverse=True)
    assert found["axhline"][0][0] == 16 / number
    assert found["stairs"][-1] == [[8 * 2 / number] * 2, [0, number / 2, number]]  # the classes, of the same area
    assert f"16 images in 3 of {number} clusters" in text


def test_cluster_sizes_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no image in any cluster"):
        figures.cluster_sizes(tmp_path / "sizes.png", [0, 0])


# ---- all ------------------------------------------------------------------------------------------------------------


def test_figures_are_written_as_pdf_where_the_file_is_called_so(tmp_path):
    small_gallery(tmp_path / "gallery.pdf")
    figures.grid(tmp_path / "grid.pdf", [np.zeros((4, 4), np.uint8)])
    for name in ("gallery.pdf", "grid.pdf"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"%PDF")
        assert content.rstrip().endswith(b"%%EOF")
    with pytest.raises(ValueError, match=r"ends in \.png or \.pdf"):
        figures.grid(tmp_path / "grid.jpg", [np.zeros((4, 4), np.uint8)])


def test_missing_folder_is_named(tmp_path):
    path = tmp_path / "nowhere" / "figure.png"
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        figures.confusion_matrix(path, [0], [0], mapping={0: 0}, class_names=NAMES)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        small_gallery(path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        figures.training_curves(path, [1], {"loss": [("", [1.0])]})
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        figures.scatter(path, [[0, 1]], [0], class_names=NAMES)


def test_drawing_twice_gives_the_same_file(tmp_path):
    for name in ("a.png", "b.png"):
        small_gallery(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pyplot_is_never_imported(tmp_path):
    code = f"""
import sys
from src.reports import figures
assert "matplotlib" not in sys.modules
figures.training_curves({str(tmp_path / "c.png")!r}, [1], {{"loss": [("", [1.0])]}})
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
