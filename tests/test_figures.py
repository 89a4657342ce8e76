"""Figures: the right images and text in the right places, read back from the written file."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from PIL import Image

from src.reports import figures, scatter

RED = (0xD1, 0x24, 0x2F)
NAMES = ["zero", "one", "two"]
ROOT = Path(__file__).parents[1]


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
    figures.gallery(path, lambda _: board, clusters=[0], confidences=[1.0])
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
    figures.gallery(path, lambda _: image, clusters=[0], confidences=[1.0])
    assert (pixels(path) == colour_of(0)).all(axis=2).sum() == 96 * 96


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mapping": {4: 1, 9: 0}}, "cluster 6 occurs but is not in the mapping"),
        ({"mapping": {4: 1, 9: 0, 6: 3}}, "cluster 6 is class 3, but there are 3 names"),
        ({"mapping": None, "class_names": None}, "got labels but no mapping"),
        ({"class_names": None}, "pass both or neither"),
        ({"labels": [0, 1]}, "got lengths {'labels': 2, 'clusters': 9}; expected equal lengths above zero"),
        ({"confidences": [0.5]}, "got lengths {'clusters': 9, 'confidences': 1}; expected"),
        ({"images": lambda index: np.zeros((8, 8))}, r"got an image \(8, 8\) of float64; expected"),
        ({"images": lambda index: np.zeros((8, 8, 4), np.uint8)}, r"got an image \(8, 8, 4\) of uint8"),
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
    figures.confusion_matrix(
        tmp_path / "c.png", labels, clusters, mapping={i: i for i in range(1000)}, class_names=names
    )
    height, width, _ = pixels(tmp_path / "c.png").shape
    assert 1000 < height < 2500
    assert 1000 < width < 2500


@pytest.mark.parametrize(
    ("labels", "clusters", "mapping", "message"),
    [
        ([0, 1], [0, 4], {0: 0}, "cluster 4 occurs but is not in the mapping"),
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
    """Points, colours and keyword arguments of the next scatter plots."""
    drawn, scatter = [], Axes.scatter

    def recorded(self, x, y, **keywords):
        drawn.append((np.stack([x, y], axis=1), np.asarray(keywords["c"]), keywords))
        return scatter(self, x, y, **keywords)

    monkeypatch.setattr(Axes, "scatter", recorded)
    return drawn


def many_classes(count, per_class=4):
    """Well separated points of so many classes, their labels, and names."""
    labels = np.arange(count).repeat(per_class)
    centres = np.stack(np.divmod(np.arange(count), 20), axis=1) * 10.0
    points = centres[labels] + np.random.default_rng(0).normal(size=(len(labels), 2))
    return points, labels, [f"name of {k}" for k in range(count)]


def test_scatter_gives_each_class_its_points_and_a_colour_of_its_own(tmp_path, monkeypatch):
    text, drawn = drawn_text(monkeypatch), drawn_points(monkeypatch)
    points = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    figures.scatter(tmp_path / "s.png", points, [2, 0, 2, 0], class_names=NAMES)
    places, colours, _ = drawn[0]
    colour_at = {tuple(place): tuple(colour) for place, colour in zip(places.tolist(), colours, strict=True)}
    assert set(colour_at) == set(map(tuple, points))
    assert colour_at[0, 1] == colour_at[4, 5] != colour_at[2, 3] == colour_at[6, 7]
    assert text == ["zero", "two"]  # the legend; no axes, so no numbers
    picture = pixels(tmp_path / "s.png")
    for colour in colours:
        assert (picture == np.round(255 * colour)).all(axis=2).any()
    assert (picture[[0, -1]] == 255).all()  # nothing is cut off at the edges
    assert (picture[:, [0, -1]] == 255).all()


def test_scatter_names_its_directions(tmp_path, monkeypatch):
    text = drawn_text(monkeypatch)
    axes = ("first, 40.0 %", "second, 3.0 %")
    figures.scatter(tmp_path / "s.png", [[0, 1], [2, 3]], [0, 1], class_names=NAMES, title="Map", axis_labels=axes)
    assert set(text) == {*axes, "Map", "zero", "one"}


def test_points_are_smaller_where_there_are_many(tmp_path, monkeypatch):
    drawn = drawn_points(monkeypatch)
    for count in (10, 500, 10_000):
        points = np.random.default_rng(0).normal(size=(count, 2))
        figures.scatter(tmp_path / "s.png", points, np.zeros(count, int), class_names=NAMES)
    sizes = [keywords["s"] for _, _, keywords in drawn]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[2]) == (30, 2.2)


@pytest.mark.parametrize("count", [21, 250])
def test_an_index_names_up_to_300_classes_and_numbers_lie_among_their_points(tmp_path, monkeypatch, count):
    placed, write = {}, Axes.text

    def recorded(self, x, y, s, **keywords):
        placed[int(s)] = (x, y)
        return write(self, x, y, s, **keywords)

    monkeypatch.setattr(Axes, "text", recorded)
    text = drawn_text(monkeypatch)
    points, labels, names = many_classes(count)
    names[5] = "W" * 30  # wider than any other
    with figures.resolution(60):
        figures.scatter(tmp_path / "s.png", points, labels, class_names=names)
    names[5] = "W" * 19 + "…"
    assert {f"{k}  {name}" for k, name in enumerate(names)} <= set(text)
    assert set(placed) == set(range(count))
    for k, place in placed.items():
        assert np.allclose(place, np.median(points[labels == k], axis=0))
    picture = pixels(tmp_path / "s.png")
    assert (picture[[0, -1]] == 255).all()
    assert (picture[:, [0, -1]] == 255).all()


def test_numbers_never_cover_one_another(tmp_path, monkeypatch):
    boxes, draw = [], RendererAgg.draw_text

    def recorded(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        if s.isdecimal():
            boxes.append(mtext.get_window_extent().extents)
        return draw(self, gc, x, y, s, prop, angle, ismath, mtext)

    monkeypatch.setattr(RendererAgg, "draw_text", recorded)
    labels = np.arange(100).repeat(3)
    points = np.random.default_rng(0).normal(size=(300, 2))
    figures.scatter(tmp_path / "s.png", points, labels, class_names=[f"name of {k}" for k in range(100)])
    assert 50 < len(boxes) <= 100
    for i, (left, bottom, right, top) in enumerate(boxes):
        for other in boxes[:i]:
            assert left >= other[2] or other[0] >= right or bottom >= other[3] or other[1] >= top


def test_clusters_keep_their_own_number(tmp_path, monkeypatch):
    text = drawn_text(monkeypatch)
    points, labels, _ = many_classes(30)
    figures.scatter(tmp_path / "s.png", points, labels + 5, class_names=[f"cluster {k}" for k in range(35)])
    assert {f"cluster {k}" for k in range(5, 35)} <= set(text)
    assert {str(k) for k in range(5, 35)} <= set(text)


def test_scatter_of_more_classes_names_none(tmp_path, monkeypatch):
    text, drawn = drawn_text(monkeypatch), drawn_points(monkeypatch)
    points, labels, names = many_classes(1000, per_class=2)
    figures.scatter(tmp_path / "s.png", points, labels, class_names=names)
    assert text == ["1,000 classes; up to 300 are named"]
    assert len(np.unique(drawn[0][1], axis=0)) > 900


def test_colours_of_up_to_20_classes_are_distinct_and_those_of_more_go_around_the_circle():
    few = scatter._class_colours(20)
    assert len({tuple(colour) for colour in few}) == 20
    assert np.array_equal(few[:7], scatter._class_colours(7))
    many = scatter._class_colours(300)
    assert many.shape == (300, 3)
    assert 0 <= many.min() <= many.max() <= 1
    steps = np.linalg.norm(np.roll(many, -3, axis=0) - many, axis=1)  # three lightnesses: every third is alike
    assert steps.max() < 2 * np.median(steps)  # no jump, not even from the last to the first


@pytest.mark.parametrize(
    ("points", "labels", "message"),
    [
        ([[0, 1, 2]], [0], r"got points \(1, 3\); expected \(N, 2\)"),
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
    with pytest.raises(ValueError, match="got no curve"):
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


def test_a_grid_of_the_first_generation_has_no_gaps_and_no_borders(tmp_path):
    images = [np.broadcast_to(np.uint8(colour_of(i)), (40 + i, 60, 3)) for i in range(9)]
    figures.grid(tmp_path / "grid.png", images, framed=False)
    picture = pixels(tmp_path / "grid.png")
    assert picture.shape == (384, 384, 3)
    for i in range(9):
        top, left = 128 * (i // 3), 128 * (i % 3)
        assert (picture[top : top + 128, left : left + 128] == colour_of(i)).all(), i


@pytest.mark.parametrize("count", [0, 8])
def test_a_grid_needs_a_square_number(tmp_path, count):
    with pytest.raises(ValueError, match=f"got {count} images; expected a square number"):
        figures.grid(tmp_path / "grid.png", [np.zeros((4, 4), np.uint8)] * count)


@pytest.mark.parametrize(("number", "drawn_as"), [(4, "bar"), (61, "stairs")])
def test_cluster_sizes_come_in_order_with_a_line_at_their_mean(tmp_path, monkeypatch, number, drawn_as):
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
    assert {"mean of the clusters", f"classes, sizes × 2/{number}"} <= set(text)


@pytest.mark.parametrize("number", [3, 30, 60])
def test_bars_have_the_numbers_of_their_clusters(tmp_path, monkeypatch, number):
    text, labelled = drawn_text(monkeypatch), []
    set_xticks = Axes.set_xticks
    monkeypatch.setattr(Axes, "set_xticks", lambda self, *words: labelled.append(words) or set_xticks(self, *words))
    sizes = np.random.default_rng(0).permutation(number)
    figures.cluster_sizes(tmp_path / "sizes.png", sizes + 1)
    (ticks, numbers) = labelled[0]
    assert numbers == [str(cluster) for cluster in np.argsort(-sizes)]
    assert ticks.tolist() == [k + 0.5 for k in range(number)]
    assert set(numbers) <= set(text)


def test_cluster_sizes_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got no image in any cluster"):
        figures.cluster_sizes(tmp_path / "sizes.png", [0, 0])


# ---- all ------------------------------------------------------------------------------------------------------------

ODD = ["$x_1$ & <b>", "two\nlines\x00", "🐶 犬 собака", "a very long name of a class that ends"]
SHOWN = ["$x_1$ & <b>", "two\\nlines\\x00", "🐶 犬 собака", "a very long name of a c…"]


def draw_odd(path, kind):
    """Draw one kind of figure with names that are hard to write."""
    labels, mapping = np.arange(4), {k: k for k in range(4)}
    if kind == "confusion":
        figures.confusion_matrix(path, labels, labels, mapping=mapping, class_names=ODD)
    elif kind == "scatter":
        figures.scatter(path, np.eye(4)[:, :2], labels, class_names=ODD)
    else:
        figures.gallery(
            path,
            RecordedImages(),
            clusters=labels,
            confidences=np.ones(4),
            labels=labels,
            mapping=mapping,
            class_names=ODD,
        )


@pytest.mark.parametrize("kind", ["confusion", "scatter", "gallery"])
def test_names_are_drawn_as_text_without_a_warning(tmp_path, monkeypatch, kind):
    text = drawn_text(monkeypatch)
    draw_odd(tmp_path / "figure.png", kind)
    assert all(any(name in line for line in text) for name in SHOWN)
    draw_odd(tmp_path / "figure.svg", kind)
    written = "\n".join(ElementTree.parse(tmp_path / "figure.svg").getroot().itertext())
    assert all(name in written for name in SHOWN)


def test_figures_do_not_depend_on_the_users_settings(tmp_path):
    figures.cluster_sizes(tmp_path / "a.png", [3, 1])
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "black"}):
        figures.cluster_sizes(tmp_path / "b.png", [3, 1])
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_pdf_has_truetype_fonts_and_no_date(tmp_path):
    figures.scatter(tmp_path / "figure.pdf", [[0, 1], [2, 3]], [0, 1], class_names=NAMES)
    content = (tmp_path / "figure.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert content.rstrip().endswith(b"%%EOF")
    assert b"/FontFile2" in content
    assert b"/CIDFontType2" in content
    assert b"/Type3" not in content
    assert b"Date" not in content


def test_an_svg_has_text_as_text_and_no_date(tmp_path):
    figures.scatter(tmp_path / "figure.svg", [[0, 1], [2, 3]], [0, 1], class_names=NAMES, title="A map")
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")] == ["A map", "zero", "one"]
    assert not list(root.iter("{http://purl.org/dc/elements/1.1/}date"))


def test_numbers_in_an_svg_are_text(tmp_path):
    points, labels, names = many_classes(21)
    figures.scatter(tmp_path / "figure.svg", points, labels, class_names=names)
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    written = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {str(k) for k in range(21)} | {f"{k}  {name}" for k, name in enumerate(names)} <= written


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.jpg; expected \.png, \.pdf, \.svg"):
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


def test_resolution_changes_the_pixels_of_a_block(tmp_path):
    def shapes():
        figures.cluster_sizes(tmp_path / "sizes.png", [3, 1])
        small_gallery(tmp_path / "gallery.png")
        shown = (pixels(tmp_path / "gallery.png") == colour_of(5)).all(axis=2)
        return pixels(tmp_path / "sizes.png").shape, int(shown.any(axis=0).sum())

    assert shapes() == ((510, 900, 3), 96)
    with figures.resolution(300):
        assert shapes() == ((1020, 1800, 3), 192)
        with figures.resolution(50):
            assert shapes() == ((170, 300, 3), 36)
        assert shapes() == ((1020, 1800, 3), 192)
    assert shapes() == ((510, 900, 3), 96)


def test_another_process_on_another_day_writes_the_same_files(tmp_path):
    code = """
import sys
from src.reports import figures, scatter
for path in sys.argv[1:]:
    figures.scatter(path, [[0, 1], [2, 3]], [0, 1], class_names=["zero", "ä ☃"], title="A map")
"""
    ours, theirs = ([tmp_path / f"{who}.{suffix}" for suffix in ("png", "pdf", "svg")] for who in ("ours", "theirs"))
    environment = {**os.environ, "PYTHONHASHSEED": "1", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([sys.executable, "-c", code, *theirs], check=True, cwd=ROOT, env=environment)
    for own, other in zip(ours, theirs, strict=True):
        figures.scatter(own, [[0, 1], [2, 3]], [0, 1], class_names=["zero", "ä ☃"], title="A map")
        assert own.read_bytes() == other.read_bytes(), own.suffix


def test_pyplot_is_never_imported(tmp_path):
    code = f"""
import sys
from src.reports import figures, scatter
assert "matplotlib" not in sys.modules
figures.training_curves({str(tmp_path / "c.png")!r}, [1], {{"loss": [("", [1.0])]}})
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
