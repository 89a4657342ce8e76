"""What an atlas holds: the choice of its images, neighbours, map, measurements, thumbnails and the written page."""

import base64
import io
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from evaluating import digit_probabilities, make_pictures, save_untrained
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.manifold import trustworthiness

from src import fingerprints
from src.errors import InputError
from src.loading import load_classifiers
from src.reports.atlas import AtlasData, Clusters, choose, layout, pictures, write, writing


def content_of(path) -> dict:
    """Return the content of a page as its scripts read it."""
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', path.read_text(), re.S)
    return json.loads(found[1])


def unpack(packed: dict, width: int = 1) -> np.ndarray:
    types = {"u8": "<u1", "i8": "<i1", "u16": "<u2", "u32": "<u4"}
    values = np.frombuffer(base64.b64decode(packed["data"]), types[packed["type"]])
    return values if width == 1 else values.reshape(-1, width)


def atlas_of(count: int = 6, **changes) -> AtlasData:
    rng = np.random.default_rng(0)
    given = {
        "title": "things",
        "paths": [f"{i}.png" for i in range(count)],
        "picture": lambda i: np.full((10, 20, 3), 40 * i % 256, dtype=np.uint8),
        "embeddings": rng.normal(size=(count, 4)),
        "clusterings": [
            Clusters(
                name="classifier 0",
                clusters=np.arange(count) % 2,
                confidences=rng.random(count),
                size=2,
                model="ab",
                classifier=0,
            )
        ],
    }
    return AtlasData(**{**given, **changes})


# ---- choice of the images -------------------------------------------------------------------------------------------


def test_all_images_are_chosen_if_they_fit():
    assert choose(np.zeros(5, dtype=int), np.zeros(5), 5).tolist() == [0, 1, 2, 3, 4]


def test_clusters_share_the_places_evenly_and_small_ones_leave_theirs_to_the_others():
    clusters = np.repeat([0, 1, 2], [2, 50, 100])
    chosen = choose(clusters, np.random.default_rng(0).random(152), 31)
    assert len(chosen) == 31
    assert np.bincount(clusters[chosen]).tolist() == [2, 15, 14]
    assert (np.diff(chosen) > 0).all()


def test_half_of_the_places_go_to_the_surest_images_and_the_others_reach_the_least_sure():
    confidences = np.linspace(1, 0, 101)
    chosen = choose(np.zeros(101, dtype=int), confidences, 6)
    assert chosen.tolist() == [0, 1, 2, 3, 52, 100]  # 3 + np.linspace(0, 97, 3)


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match=r"1 to 10000 images, got 10001: use choose\(\)"):
        atlas_of(10_001)
    with pytest.raises(ValueError, match="embeddings: got 5 entries for 6 images"):
        atlas_of(embeddings=np.zeros((5, 2)))
    with pytest.raises(ValueError, match="at least one clustering"):
        atlas_of(clusterings=[])


# ---- neighbours and map ---------------------------------------------------------------------------------------------


def test_neighbours_are_the_rows_with_the_largest_products_without_the_row_itself():
    rows = layout.unit_rows(np.random.default_rng(0).normal(size=(50, 5)))
    found, similar = layout.find_neighbours(rows, 7)
    products = rows.double() @ rows.double().T
    products.fill_diagonal_(-2)
    expected = products.topk(7)
    assert found.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(similar, expected.values, atol=1e-6)


def test_equal_images_are_neighbours_of_each_other_but_not_of_themselves():
    rows = layout.unit_rows(np.repeat(np.eye(3), [20, 2, 1], axis=0))
    found, _ = layout.find_neighbours(rows, 4)
    assert not (found == np.arange(23)[:, None]).any()
    assert (found[:20] < 20).all()
    assert found[20, 0] == 21
    assert layout.find_neighbours(rows[:3], 10)[0].shape == (3, 2)


def test_the_map_keeps_neighbours_and_does_not_change():
    rows = layout.unit_rows(load_digits().data[:300])
    points = layout.two_dimensions(rows)
    assert trustworthiness(rows, points, n_neighbors=10) > 0.93  # principal components: 0.82
    assert points.min() == 0
    assert points.max() == 1
    np.testing.assert_array_equal(points, layout.two_dimensions(rows))


def test_the_map_descends_the_gradient_of_the_loss_of_pacmap():
    generator = torch.Generator().manual_seed(0)
    points = (4 * torch.randn(12, 2, generator=generator)).double().requires_grad_()
    pairs = tuple(layout._random(12, width, generator) for width in (3, 2, 4))
    loss = points.new_zeros(())
    for i in range(12):
        for kind, (others, weight) in enumerate(zip(pairs, (2.0, 500.0, 1.5), strict=True)):
            for j in others[i].tolist():
                d = 1 + (points[i] - points[j]).square().sum()
                loss = loss + weight * (d / (10 + d) if kind == 0 else d / (10000 + d) if kind == 1 else 1 / (1 + d))
    loss.backward()
    torch.testing.assert_close(layout._gradient(points.detach(), pairs, (2.0, 500.0, 1.5)), points.grad)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_a_few_or_equal_images_have_a_map(count):
    points = layout.two_dimensions(layout.unit_rows(np.ones((count, 3))))
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_brightness_sharpness_and_size_are_measured():
    board = 255 * (np.indices((12, 10)).sum(axis=0) % 2).astype(np.uint8)  # a chessboard, 10 wide and 12 high
    found = pictures.read_pictures(2, lambda i: [board, np.full((3, 5, 3), 200, dtype=np.uint8)][i])
    assert found.sizes.tolist() == [[10, 12], [5, 3]]
    assert found.brightness.tolist() == [127.5, 200]
    assert found.sharpness.tolist() == [4 * 255, 0]  # the Laplacian is ±1020
    assert [each.size for each in found.thumbnails] == [(10, 12), (5, 3)]


def test_copies_of_a_photograph_are_near_duplicates():
    rng = np.random.default_rng(0)
    scenes = [np.kron(rng.integers(0, 256, (6, 6, 3)), np.ones((8, 8, 1))) for _ in range(4)]
    copy = np.clip(0.95 * scenes[2] + 10 + rng.normal(0, 3, scenes[2].shape), 0, 255)
    images = [each.astype(np.uint8) for each in (*scenes, copy, np.zeros((48, 48, 3)), np.full((48, 48, 3), 255))]
    found = pictures.read_pictures(7, lambda i: images[i])
    assert found.duplicates.tolist() == [0, 0, 1, 0, 1, 0, 0]  # black and white differ in their mean


def test_groups_of_near_duplicates_are_numbered_by_their_first_images():
    hashes = np.array([7, 1 << 40, 7, 1 << 40, 99], dtype=np.uint64)
    small = np.random.default_rng(0).normal(100, 40, (5, 256)).astype(np.float32)
    small[2], small[3] = small[0], small[1]
    assert pictures.near_duplicates(hashes, small, np.full(5, 100)).tolist() == [1, 2, 1, 2, 0]


def test_tiny_images_are_near_duplicates_only_if_they_are_equal():
    digits = (load_digits().images[:200] * 255 / 16).astype(np.uint8)
    digits[150] = digits[20]
    found = pictures.read_pictures(200, lambda i: digits[i])
    assert np.flatnonzero(found.duplicates).tolist() == [20, 150]


def test_an_image_that_cannot_be_decoded_is_kept_as_broken():
    def picture(i):
        if i == 1:
            raise SyntaxError("broken  PNG\nfile")
        return np.zeros((4, 4), dtype=np.uint8)

    found = pictures.read_pictures(3, picture)
    assert found.broken == {1: "broken PNG file"}
    assert len(found.thumbnails) == 3
    assert found.duplicates.tolist() == [1, 0, 1]


def test_thumbnails_lie_in_rows_of_sixteen_and_fit_into_the_budget():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (32, 24, 3), dtype=np.uint8)) for _ in range(300)]
    rich = pictures.pack(noise, 10**9)
    assert rich.tile == 32
    assert len(rich.files) == 2
    sheet = np.asarray(Image.open(io.BytesIO(rich.files[0])))
    assert sheet.shape == (512, 512, 3)
    np.testing.assert_array_equal(sheet[32:64, 64:88], np.asarray(noise[18]))  # lossless
    poor = pictures.pack(noise, 100_000)
    assert sum(map(len, poor.files)) <= 100_000
    assert poor.shapes[0].tolist() == [round(poor.tile * 0.75), poor.tile]


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_holds_what_it_was_given(tmp_path):
    top = np.array([[0, 1], [1, 0]] * 3), np.array([[0.75, 0.25]] * 6)
    first = Clusters(
        name="one", clusters=top[0][:, 0], confidences=top[1][:, 0], size=2, model="ab", classifier=0, top=top
    )
    data = atlas_of(
        clusterings=[first],
        labels=np.array([-1, 0, 1, 0, 1, 0]),
        classes=["a", "b"],
        totals=np.array([5, 9]),
        left_out={1: [("x y.png", str(tmp_path / "deep" / "x y.png"))]},
        files=[str(tmp_path / f"{i}#.png") for i in range(6)],
        history=[{"epoch": 1, "loss": 0.5, "nan": float("nan"), "note": "text"}],
        config={"classes": [10, 20]},
    )
    write(data, tmp_path / "atlas.html")
    found = content_of(tmp_path / "atlas.html")
    entry = found["clusterings"][0]
    assert unpack(entry["clusters"]).tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_allclose(unpack(entry["top"]["shares"], 2) / 65535, top[1], atol=1e-5)
    assert unpack(found["labels"]).tolist() == [0, 1, 2, 1, 2, 1]
    assert found["links"][3] == "3%23.png"
    assert found["left_out"] == {"1": [["x y.png", "deep/x%20y.png"]]}
    assert found["history"] == [{"epoch": 1, "loss": 0.5}]
    assert found["config"] == {"classes": "10 20"}
    order = np.argsort(unpack(found["place"]))
    assert sorted(order.tolist()) == list(range(6))
    assert unpack(found["shapes"], 2).tolist() == [[20, 10]] * 6


def test_text_cannot_leave_its_place_in_the_page(tmp_path):
    bad = ["</script><script>alert(1)</script>", "<!-- sheets -->", "/* content */", "\udcff.png", "a\u2028b", '"']
    write(atlas_of(paths=bad, title="</title>"), tmp_path / "atlas.html")
    page = (tmp_path / "atlas.html").read_text()
    assert content_of(tmp_path / "atlas.html")["paths"] == bad
    assert page.count("<script>") == 1
    assert "alert(1)</script>" not in page


def test_the_page_asks_for_nothing(tmp_path):
    write(atlas_of(), tmp_path / "atlas.html")
    page = re.sub(r"http://www.w3.org/2000/svg", "", (tmp_path / "atlas.html").read_text())
    assert not re.search(r"https?:|url\((?!data:)|import |@import|fetch\(|XMLHttp|src=", page)
    assert "default-src 'none'" in page


def test_thumbnails_shrink_until_the_page_fits(tmp_path, monkeypatch):
    budget = 60_000
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
    write(atlas_of(), tmp_path / "small.html")
    fixed = (tmp_path / "small.html").stat().st_size + 20_000  # scripts, and the content of 200 images
    monkeypatch.setattr(writing, "LARGEST", 10 * (fixed + budget))
    monkeypatch.setattr(writing, "SMALLEST_BUDGET", 0)
    write(atlas_of(200, picture=lambda i: images[i]), tmp_path / "atlas.html")
    assert (tmp_path / "atlas.html").stat().st_size <= fixed + budget


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "atlas.html").write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write(atlas_of(), tmp_path / "atlas.html")
    assert [each.name for each in tmp_path.iterdir()] == ["atlas.html"]
    assert (tmp_path / "atlas.html").read_text() == "old"


# ---- cls_eval.py ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_untrained(
        tmp_path_factory.mktemp("run") / "checkpoint.pt", "--classes", "10", "12", history=[{"classifier": 1}]
    )


@pytest.fixture
def run(evaluate):
    return partial(evaluate, "cls_eval")


def test_cls_eval_writes_an_atlas_of_all_classifiers(trained, run, tmp_path):
    other = save_untrained(tmp_path / "other.pt", "--classes", "9", seed=1)
    _, printed = run("--checkpoint", trained, "--atlas", "--compare", str(other))
    assert "wrote atlas.html" in printed
    found = content_of(tmp_path / "out" / "atlas.html")
    assert [each["name"] for each in found["clusterings"]] == ["classifier 1 (chosen)", "classifier 0", str(other)]
    assert [each["size"] for each in found["clusterings"]] == [12, 10, 9]
    assert found["paths"] == [str(i) for i in range(360)]
    probabilities = digit_probabilities(trained)
    for entry, k in zip(found["clusterings"][:2], (1, 0), strict=True):
        width = entry["top"]["width"]
        assert width == 5
        clusters = torch.from_numpy(unpack(entry["top"]["clusters"], width).astype(np.int64))
        shares = torch.from_numpy(unpack(entry["top"]["shares"], width) / 65535).float()
        torch.testing.assert_close(probabilities[k].gather(1, clusters), shares, rtol=0, atol=1e-4)
        torch.testing.assert_close(probabilities[k].topk(5).values, shares, rtol=0, atol=1e-4)
        assert entry["classifier"] == k
        assert entry["model"] == fingerprints.of_weights(load_classifiers(trained, "")[0])
    assert found["classes"] == [str(k) for k in range(10)]


def test_cls_eval_writes_an_atlas_of_kmeans_without_classifiers(trained, run, tmp_path):
    result, _ = run("--checkpoint", trained, "--kmeans", 3, "--restarts", 1, "--atlas")
    found = content_of(tmp_path / "out" / "atlas.html")
    entry = found["clusterings"][0]
    assert np.bincount(unpack(entry["clusters"])).tolist() == result["cluster_sizes"]
    assert entry["top"] is None
    assert entry["classifier"] is None  # predict.py refuses its names


def test_the_atlas_of_a_folder_links_to_the_files(run, tmp_path):
    top = make_pictures(tmp_path / "my pictures", {"a": (150, 0, 0), "b": (0, 0, 150)}, splits=[("val", 3)])
    path = save_untrained(
        tmp_path / "run.pt", "--data", str(top), "--arch", "cifar_convnet", "--classes", "4", channels=3
    )
    run("--checkpoint", path, "--data", str(top), "--atlas")
    found = content_of(tmp_path / "out" / "atlas.html")
    assert len(found["paths"]) == 6
    assert all(path.startswith(str(top)) for path in found["paths"])
    assert found["links"][0].startswith("../my%20pictures/val/a/")
    assert found["title"] == "my pictures"


def test_features_have_no_atlas(run, tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", train_features=rows, test_features=rows)
    path = save_untrained(
        tmp_path / "f.pt", "--data", str(tmp_path / "rows.npz"), "--arch", "identity", "--classes", "3", channels=8
    )
    with pytest.raises(InputError, match=r"--atlas shows images, but .* holds features: drop --atlas"):
        run("--checkpoint", path, "--atlas")
