"""k-means against scikit-learn's from the same start, by hand, over ranks; and cls_eval.py --kmeans as a user types it."""

import re
import shutil
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from evaluating import (
    digit_features,
    make_pictures,
    read_json,
    run_here,
    save_as_moco,
    save_untrained,
    torchvision_trunk,
)
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.metrics import adjusted_mutual_info_score

from src import features, neighbors
from src.config import KMeansOptions, parse_cls_eval
from src.config.flags import comments_of
from src.data.subsets import draw_share
from src.errors import InputError
from src.evaluation import kmeans


def blobs(N=1500, width=12, centres=40, spread=0.6, offset=0.0, seed=0):
    """Overlapping groups of rows: k-means takes tens of iterations."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(centres, width))[rng.integers(centres, size=N)] + spread * rng.normal(size=(N, width))
    return torch.from_numpy(rows + offset)


def theirs(rows, start, **settings):
    return KMeans(len(start), init=start.numpy(), n_init=1, algorithm="lloyd", **settings).fit(rows.numpy())


@pytest.mark.parametrize("chunk", [1 << 22, 5000])
@pytest.mark.parametrize(("group", "most"), [(50, 0.4), (7, 0.0), (7, 1.0), (7, 0.4), (60, 0.4)])
def test_lloyd_takes_the_way_of_scikit_learn(monkeypatch, chunk, group, most):
    monkeypatch.setattr(kmeans, "CHUNK", chunk)
    monkeypatch.setattr(kmeans, "GROUP", group)
    monkeypatch.setattr(kmeans, "MOST", most)
    rows = blobs()
    start = rows[:45].clone()
    took = []
    for settings, ours in (
        ({"max_iter": 3}, {"max_iterations": 3}),
        ({"tol": 1e-2}, {"tolerance": 1e-2}),
        ({}, {}),
        ({"tol": 0}, {"tolerance": 0}),
    ):
        expected = theirs(rows, start, **settings)
        centroids, inertia, iterations = kmeans.lloyd(rows, start, **ours)
        took.append(iterations)
        assert iterations == expected.n_iter_
        assert inertia == pytest.approx(expected.inertia_, rel=1e-10)
        assert np.allclose(centroids, expected.cluster_centers_, rtol=0, atol=1e-9)
        assert np.array_equal(kmeans.assign(rows, centroids)[0], expected.labels_)
    assert took[0] < took[1] < took[2]
    assert took[2] > 15
    assert torch.equal(start, rows[:45])


def test_by_default_the_iterations_end_where_those_of_scikit_learn_end():
    rows = blobs(N=5000, width=2, centres=1, spread=1.0)
    expected = theirs(rows, rows[:8])
    centroids, inertia, iterations = kmeans.lloyd(rows, rows[:8])
    assert (iterations, inertia) == (expected.n_iter_, pytest.approx(expected.inertia_, rel=1e-10))
    assert np.allclose(centroids, expected.cluster_centers_, rtol=0, atol=1e-9)
    assert iterations < theirs(rows, rows[:8], tol=5e-5).n_iter_ < theirs(rows, rows[:8], tol=0).n_iter_
    found = kmeans.fit(rows, 8, init="random", restarts=1)
    start = rows[np.random.default_rng([0, 0]).choice(5000, 8, replace=False)]
    assert found.iterations == theirs(rows, start).n_iter_
    early = kmeans.fit(rows, 8, init="random", restarts=1, least_gain=kmeans.EARLY)
    assert early.iterations < found.iterations


# ---- faiss ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_faiss(monkeypatch):
    """Let faiss compute the first iterations, also of a small problem."""
    monkeypatch.setattr(neighbors, "WORTHWHILE", 0)


@pytest.mark.parametrize("chunk", [1 << 22, 5000])
def test_faiss_finds_the_nearest_centroids(monkeypatch, with_faiss, chunk):
    monkeypatch.setattr(kmeans, "CHUNK", chunk)
    rows = blobs(offset=30.0).float()
    search = kmeans._Search(rows, 45)
    assert search.faiss is not None
    found = search.nearest(rows[:45])
    distances = torch.cdist(rows.double(), rows[:45].double())
    # rounding may exchange two centroids that are equally far
    assert torch.allclose(distances.gather(1, found[:, None])[:, 0], distances.amin(dim=1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("settled", [0.0, 0.02, 0.5])  # faiss in all iterations; in some; in two
def test_with_faiss_the_way_is_that_of_scikit_learn(monkeypatch, with_faiss, settled):
    monkeypatch.setattr(kmeans, "SETTLED", settled)
    # far groups, so that rounding changes no assignment, and centroids that move through them for a few iterations
    rows = blobs(centres=12, spread=0.3, seed=5)
    for start in (rows[:12], torch.cat([rows[:10], rows[:2] + 1e3])):
        expected = theirs(rows, start)
        centroids, inertia, iterations = kmeans.lloyd(rows.float(), start.float())
        assert iterations == expected.n_iter_ > 3
        assert inertia == pytest.approx(expected.inertia_, rel=1e-4)
        assert np.allclose(centroids, expected.cluster_centers_, atol=1e-4)


def test_after_faiss_the_bounds_take_over_once_few_rows_change(with_faiss):
    rows = blobs().float()
    search = kmeans._Search(rows, 45)
    owner, centroids = search.nearest(rows[:45]).clone(), rows[:45]
    assert search.faiss is not None  # most rows have left the first centroid
    while search.faiss is not None:
        assert search.lower.isinf().all()
        before, centroids = owner, kmeans._means(rows, owner, centroids)[0]
        owner = search.nearest(centroids).clone()
        assert ((owner != before).float().mean() <= kmeans.SETTLED) == (search.faiss is None)
    search.nearest(centroids)
    assert search.lower.isfinite().all()


def test_far_from_the_origin_faiss_keeps_the_digits(with_faiss):
    rows = blobs(offset=300.0)
    expected = theirs(rows, rows[:45].clone())
    assert kmeans.lloyd(rows.float(), rows[:45].float())[1] == pytest.approx(expected.inertia_, rel=2e-3)


@pytest.mark.parametrize("gain", [1e-2, 1e-3, 1e-4])
def test_an_early_stop_ends_when_an_iteration_lowers_the_sum_by_less_than_its_share(gain):
    rows = blobs()
    # after n means, (N, K) distances
    left = [theirs(rows, rows[:45], max_iter=n, tol=0).transform(rows.numpy()) for n in range(1, 40)]
    owners = [rows.new_tensor(distances.argmin(axis=1)) for distances in left]
    first = torch.cdist(rows, rows[:45]).argmin(dim=1)
    sums = []
    for distances, owner in zip(left, [first, *owners], strict=False):
        sums.append((distances[np.arange(len(rows)), owner.long()] ** 2).sum())  # to the mean of those it is a mean of
    enough = next(n for n in range(1, 39) if sums[n - 1] - sums[n] < gain * sums[n])
    centroids, inertia, iterations = kmeans.lloyd(rows, rows[:45], least_gain=gain)
    assert iterations == enough + 1
    assert inertia == pytest.approx(sums[enough], rel=1e-9)
    assert np.allclose(centroids, theirs(rows, rows[:45], max_iter=enough + 1, tol=0).cluster_centers_, atol=1e-9)


def test_float32_far_from_the_origin_keeps_its_digits():
    rows = blobs(offset=300.0)
    expected = theirs(rows, rows[:45].clone())
    centroids, inertia, _ = kmeans.lloyd(rows.float(), rows[:45].float(), tolerance=0)
    assert inertia == pytest.approx(expected.inertia_, rel=2e-3)
    clusters, _ = kmeans.assign(rows.float(), centroids)
    exact = torch.cdist(rows, centroids.double()).argmin(dim=1)
    assert (clusters == exact).float().mean() > 0.999


def test_an_empty_centroid_takes_the_farthest_row():
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.0], [100.0]])
    # by distance: 0 and 1 to the first, the rest to the second, nothing to the third, which takes 100
    start = torch.tensor([[0.5], [12.0], [-5000.0]])
    centroids, inertia, _ = kmeans.lloyd(rows, start)
    assert centroids.flatten().tolist() == [0.5, 10.5, 100.0]
    assert inertia == 1.0
    assert theirs(rows, start).cluster_centers_.flatten().tolist() == [0.5, 10.5, 100.0]


def test_more_empty_centroids_than_different_rows_stay_where_they_are():
    rows = torch.tensor([[0.0, 0.0]] * 4 + [[2.0, 0.0]] * 3)
    for init in ("random", "k-means++"):
        found = kmeans.fit(rows, 5, init=init, restarts=2)
        assert found.inertia == 0
        assert found.centroids.isfinite().all()
        assert len(kmeans.assign(rows, found.centroids)[0].unique()) == 2
    far = torch.tensor([[9.0, 9.0]])
    assert kmeans.lloyd(rows, torch.cat([rows[[0, 4]], far]))[0].tolist() == [[0, 0], [2, 0], [9, 9]]


def test_many_empty_centroids_end_where_scikit_learn_ends():
    rows = blobs(N=400, centres=30, seed=3)
    start = torch.cat([rows[:20], torch.full((15, 12), 1e3, dtype=torch.float64) + torch.arange(15)[:, None]])
    expected = theirs(rows, start)
    centroids, inertia, _ = kmeans.lloyd(rows, start, tolerance=0)
    assert inertia == pytest.approx(expected.inertia_, rel=1e-9)
    assert len(kmeans.assign(rows, centroids)[0].unique()) == 35


@pytest.mark.parametrize("most", [0.0, 1.0])  # all centroids at once; group by group
def test_nothing_is_looked_at_twice_but_what_was_given_away(monkeypatch, most):
    monkeypatch.setattr(kmeans, "MOST", most)
    rows = blobs(N=50)
    search = kmeans._Search(rows, 3)
    nearest = search.nearest(rows[:3]).clone()
    assert (search.upper < search.lower).all()
    search.give(torch.arange(10, 20), (nearest[10:20] + 1) % 3)
    assert torch.equal(search.nearest(rows[:3]), nearest)


def test_one_cluster_and_a_cluster_for_each_row():
    rows = blobs(N=60)
    one = kmeans.fit(rows, 1)
    assert np.allclose(one.centroids, rows.mean(dim=0, keepdim=True))
    assert one.inertia == pytest.approx(((rows - rows.mean(dim=0)) ** 2).sum().item())
    assert kmeans.assign(rows, one.centroids)[1].tolist() == [1.0] * 60
    assert kmeans.fit(rows, 60).inertia == 0
    for K in (0, 61):
        with pytest.raises(ValueError, match=f"num_clusters must be from 1 to 60, .* got {K}"):
            kmeans.fit(rows, K)


def test_how_sure_an_assignment_is():
    centroids = torch.tensor([[0.0], [4.0], [4.0]])
    rows = torch.tensor([[0.0], [1.0], [2.0], [4.0], [-2.0]])  # of mean 1: nothing is rounded
    clusters, sure = kmeans.assign(rows, centroids)
    assert clusters[:2].tolist() == [0, 0]
    assert sure.tolist() == pytest.approx([1, 1 - 1 / 3, 0, 0, 1 - 2 / 6], abs=1e-6)


def test_plus_plus_finds_far_groups_and_is_as_good_as_scikit_learns():
    far = blobs(N=600, centres=30, spread=1e-3, seed=1)
    for seed in range(5):
        chosen = far[kmeans.plus_plus(far, 30, np.random.default_rng(seed))]
        assert (torch.cdist(far, chosen).amin(dim=1) < 0.1).all()  # a row of every group
    rows = blobs(spread=2.0)

    def left(chosen) -> float:
        return torch.cdist(rows, rows[chosen]).amin(dim=1).square().sum().item()

    ours = [left(kmeans.plus_plus(rows, 40, np.random.default_rng(seed))) for seed in range(10)]
    others = [left(kmeans_plusplus(rows.numpy(), 40, random_state=seed)[1]) for seed in range(10)]
    random = [left(np.random.default_rng(seed).choice(len(rows), 40, replace=False)) for seed in range(10)]
    assert np.mean(ours) == pytest.approx(np.mean(others), rel=0.03)
    assert np.mean(ours) < 0.97 * np.mean(random)


def test_the_best_restart_counts_and_the_seed_decides():
    rows = blobs()
    each = []
    for restart in range(4):
        start = np.random.default_rng([7, restart]).choice(len(rows), 45, replace=False)
        each.append(kmeans.lloyd(rows, rows[start]))
    inertias = [inertia for _, inertia, _ in each]
    best = int(np.argmin(inertias))
    found = kmeans.fit(rows, 45, init="random", restarts=4, seed=7)
    assert (found.restart, found.inertia, found.iterations) == (best, inertias[best], each[best][2])
    assert torch.equal(found.centroids, each[best][0])
    assert best > 0
    assert kmeans.fit(rows, 45, init="random", restarts=4, seed=8).inertia != found.inertia
    one, two = (kmeans.fit(rows, 45, seed=1) for _ in range(2))
    assert torch.equal(one.centroids, two.centroids)


# ---- cls_eval.py ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a network with random weights, which is all that k-means asks for."""
    return save_untrained(tmp_path_factory.mktemp("run") / "checkpoint.pt", "--classes", "10", "10", "20")


@pytest.fixture
def run(evaluate):
    return partial(evaluate, "cls_eval")


def check(result, fitted_on, tested, labels, K, **settings):
    """The written numbers are those of these features; an image as near to another centroid may be in the one or the other."""
    fit = kmeans.fit(fitted_on, K, **settings)
    nearest = torch.cdist(tested.double(), fit.centroids.double()).topk(2, largest=False)
    clusters = nearest.indices[:, 0]
    unsure = int((nearest.values[:, 1] < nearest.values[:, 0] * (1 + 1e-5)).sum())
    assert unsure < 3
    assert result["kmeans"]["inertia"] == pytest.approx(fit.inertia, rel=1e-4)
    ami = adjusted_mutual_info_score(labels, clusters)
    assert result["ami"] == pytest.approx(ami, abs=0.01 if unsure else 1e-6)
    sizes = torch.bincount(clusters, minlength=K)
    assert (torch.tensor(result["cluster_sizes"]) - sizes).abs().sum() <= 2 * unsure
    assert result["kmeans"]["fit_images"] == len(fitted_on)


def test_the_written_numbers_are_those_of_the_features(trained, run, tmp_path):
    (train, train_labels), (test, labels) = digit_features(trained)
    result, printed = run("--checkpoint", trained, "--kmeans", "10", "--features-cache", tmp_path / "cache")
    check(result, train, test, labels, 10, restarts=10)
    assert result["ami"] > 0.4
    assert (
        re.search(r"^k-means, backbone +10 +10( +[\d.]+){3} +(.+?) ", printed, re.M)[2] == f"{100 * result['ami']:.1f}"
    )
    assert (result["classifier"], "classifiers" in result) == (None, False)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"cls_eval.json", "clusters.csv", "confusion.png", "gallery.png", "sizes.png"}

    words = ("--kmeans", "12", "--fit-share", "0.1", "--seed", "3", "--restarts", "2", "--init", "random")
    result, printed = run("--checkpoint", trained, *words, "--features-cache", tmp_path / "cache")
    assert printed.count("taken from") == 2
    rows = draw_share(train_labels, 0.1, 3)
    check(result, train[rows], test, labels, 12, restarts=2, seed=3, init="random")
    assert "early" not in result["protocol"]
    again, printed = run("--checkpoint", trained, *words)
    assert "taken from" not in printed
    assert again["kmeans"]["inertia"] == pytest.approx(result["kmeans"]["inertia"], rel=1e-3)


def test_the_head_at_unit_length_from_a_list_applied_to_the_training_split(trained, run, tmp_path):
    (train, labels), _ = digit_features(trained, "head")
    (tmp_path / "list.txt").write_text("".join(f"{i}\n" for i in range(0, 600, 2)))
    words = (
        "--layer",
        "head",
        "--normalize",
        "--fit-list",
        tmp_path / "list.txt",
        "--split",
        "train",
        "--restarts",
        "1",
    )
    result, _ = run("--checkpoint", trained, "--kmeans", "8", *words)
    train = torch.nn.functional.normalize(train)
    check(result, train[0:600:2], train, labels, 8)
    assert (result["images"], result["kmeans"]["normalize"]) == (1437, True)


def test_normalize_changes_what_is_clustered(trained, run):
    (train, _), (test, labels) = digit_features(trained)
    result, _ = run("--checkpoint", trained, "--kmeans", "10", "--normalize", "--restarts", "1")
    check(result, *map(torch.nn.functional.normalize, (train, test)), labels, 10)


def test_an_early_stop_is_named_in_the_result(trained, run):
    words = ("--checkpoint", trained, "--kmeans", "10", "--restarts", "1", "--seed", "1")
    result, _ = run(*words)
    early, _ = run(*words, "--early-stop")
    assert (result["kmeans"]["early_stop"], early["kmeans"]["early_stop"]) == (False, True)
    assert "the best of 1 starts (k-means++), fitted" in result["protocol"]
    assert "the best of 1 starts (k-means++, early stop), fitted" in early["protocol"]
    assert early["kmeans"]["iterations"] < result["kmeans"]["iterations"]


@pytest.fixture
def folder(tmp_path):
    """Three colours as classes, three training and two validation images of each."""
    colours = {"b": (200, 0, 0), "g": (0, 200, 0), "r": (0, 0, 200)}
    return make_pictures(tmp_path / "data", colours, splits=(("train", 3), ("val", 2)), noise=31)


@pytest.fixture
def moco(tmp_path):
    return save_as_moco(tmp_path / "moco.pth.tar", torchvision_trunk("resnet18"))


def test_a_released_backbone_without_classifiers(run, folder, moco, tmp_path, monkeypatch):
    run_network = features._run
    words = ("--checkpoint", moco, "--data", folder, "--workers", "0")
    result, _ = run(*words, "--kmeans", "3")
    assert [result[name] for name in ("acc", "nmi", "ami", "ari")] == [1, 1, 1, 1]
    assert (result["method"], result["epochs"], result["cluster_sizes"]) == ("MoCo v2", 7, [2, 2, 2])
    (tmp_path / "list.txt").write_text("b/0.png\ng/0.png\ng/1.png\n")
    assert run(*words, "--kmeans", "2", "--fit-list", tmp_path / "list.txt")[0]["kmeans"]["fit_images"] == 3
    # images without labels are clustered as well, and there is nothing to score
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        path.rename(folder / f"{i}.png")
    for split in ("train", "val"):
        shutil.rmtree(folder / split)
    seen = []
    monkeypatch.setattr(
        features, "_run", lambda *args, **settings: seen.append(args[2]) or run_network(*args, **settings)
    )
    result, printed = run(*words, "--kmeans", "3", "--fit-share", "0.5")
    assert "no labels, so no scores" in printed
    assert (sum(result["cluster_sizes"]), result["kmeans"]["fit_images"]) == (15, 8)
    assert seen == [15]  # both splits are all images, whose features are computed once


def test_what_is_wrong_is_said_before_any_work(trained, run, folder, moco, monkeypatch, tmp_path):
    monkeypatch.setattr("src.features._run", lambda *_, **__: pytest.fail("the network was run"))
    (tmp_path / "list.txt").write_text("0\n1437\n")
    digits = ("--checkpoint", trained, "--kmeans")
    cases = [
        ((*digits, "1438"), r"--kmeans 1438 is larger than the 1437 images it is fitted on, of 1437 training images"),
        (
            (*digits, "200", "--fit-share", "0.1"),
            r"--kmeans 200 is larger than the 142 images .*\(10 % of each class\)",
        ),
        ((*digits, "5", "--fit-list", tmp_path / "list.txt"), r"--fit-list .*1 of the 2 listed images, such as 1437"),
        ((*digits, "5", "--data", folder), r"images have 3 channels, but the network takes 1"),
        (("--checkpoint", moco, "--data", folder), r"moco.* without classifiers.*; --kmeans K clusters the features"),
        (
            ("--checkpoint", moco, "--data", folder, "--kmeans", "3", "--layer", "head"),
            r"without .*; drop --layer head",
        ),
        (("--checkpoint", tmp_path / "none.pt", "--kmeans", "3"), r"none.pt: no such file"),
    ]
    for words, message in cases:
        with pytest.raises(InputError, match=message):
            run(*words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kmeans", "-1"], "--kmeans is -1"),
        (["--kmeans", "3", "--classifier", "0"], "--kmeans and --classifier"),
        (["--kmeans", "3", "--restarts", "0"], "--restarts is 0"),
        (["--kmeans", "3", "--fit-share", "0"], "--fit-share is 0.0"),
        (["--kmeans", "3", "--fit-share", "10"], "--fit-share is 10.0: expected a fraction"),
        (["--kmeans", "3", "--fit-share", "0.1", "--fit-list", "x"], "--fit-share and --fit-list"),
        (["--fit-share", "0.1"], "--fit-share is for k-means"),
        (["--normalize"], "--normalize is for k-means"),
        (["--layer", "head"], "--layer is for k-means"),
    ],
)
def test_wrong_flags_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse_cls_eval(["--checkpoint", "x", *words])


def test_every_flag_has_help():
    assert all(comments_of(KMeansOptions)[field.name] for field in fields(KMeansOptions))


def test_without_output_dir_the_scores_of_the_classifiers_are_kept(trained):
    for words in ((), ("--kmeans", "10", "--restarts", "1")):
        run_here("cls_eval", "--checkpoint", trained, *words)
    read = [read_json(folder, "cls_eval") for folder in (trained.parent, trained.parent / "kmeans")]
    assert [("classifiers" in result, "kmeans" in result) for result in read] == [(True, False), (False, True)]
