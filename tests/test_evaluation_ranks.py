"""Evaluations on two ranks: one start of torchrun for all of them, and what one process computes to compare with.

The ranks import this file: `on_every_rank` is what they run.
"""

import csv
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluating import EARLIER, FILES, read_json, run_here, same_history, save_exact
from test_knn import case
from test_knn_features import Method, images, pull
from torch.testing import assert_close

import src.features
from src import checkpoint, distributed
from src.config import ViewSettings
from src.data.datasets import open_data
from src.data.loaders import TrainLoader, single_views
from src.data.subsets import keep_rows
from src.data.views import build_views
from src.evaluation import kmeans, linear
from src.evaluation.knn import knn_scores
from src.evaluation.probe import LinearProbe, build_probe_optimizer, rate_factor
from src.logs import Progress
from src.metrics import knn_top
from src.models.backbones import SmallConvNet
from src.trainer import Trainer

CPU = torch.device("cpu")
# name: (program, flags); all of the checkpoint in `folder / "run"`, with results in `folder / name`
PROGRAMS = {
    "knn": ("knn_eval", ("--k", "1", "20")),
    "clusters": ("cls_eval", ("--ensemble", "--feature-quality")),
    "kmeans": ("cls_eval", ("--kmeans", "5", "--restarts", "3")),
    "fast": ("lincls_eval", ("--fast", "--epochs", "2", "--fast-lrs", "0.1", "1", "--fast-weight-decays", "0")),
    "statistics": ("lincls_eval", ("--feature-bn", "--epochs", "2", "--batch-size", "40", "--train-share", "0.1")),
    "earlier": ("lincls_eval", EARLIER),
}


# --------------------------------------------------------------------------------------------------------------------
# what every rank does


def on_every_rank(folder: Path) -> None:
    """Run everything and save what this rank found. The first program starts and the last line ends the process group."""
    stop, distributed.stop = distributed.stop, lambda: None
    for name in PROGRAMS:
        run(folder, name)
        distributed.start = lambda device: CPU
    rank = distributed.rank()
    found = {
        "features": shared_features(folder / "cache" if rank == 0 else Path("/nowhere")),
        "queries": shared_queries(),
        "restarts": shared_restarts(),
        "probes": [train_probe(*each) for each in PROBES],
    }
    torch.save(found, folder / f"{rank}.pt")
    stop()


def run(folder: Path, name: str) -> None:
    program, words = PROGRAMS[name]
    run_here(program, "--checkpoint", folder / "run", "--output-dir", folder / name, *words)


def shared_features(cache: Path) -> list:
    """Return features and number of batches: of five images, then of one, so that the last rank has none; each twice."""
    found, piece = [], src.features.PIECE
    src.features.PIECE = 20  # one row of four numbers at once
    for count in (5, 1):
        for _ in range(2):
            method = Method()
            found.append((pull(method, images(count), cache), method.batches))
    src.features.PIECE = piece
    return found


def shared_queries() -> list:
    found = []
    for count in (40, 1):
        bank, bank_labels, queries, query_labels = case(queries=count)
        labelled = {"queries": queries, "query_labels": query_labels}
        found.append(knn_scores(bank, bank_labels, **labelled, ks=(1, 9), tau=0.1, device=CPU))
    return found


def shared_restarts() -> list:
    rows = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    return [kmeans.fit(rows, 20, init="random", restarts=restarts, seed=2)._asdict() for restarts in (5, 1)]


# finetune, train_bn, number of images, feature_bn; of 39 images the ranks get different shares of the last batch
PROBES = [(False, False, 39, False), (True, True, 38, False), (False, False, 38, True)]


def train_probe(finetune: bool, train_bn: bool, rows: int, feature_bn: bool) -> tuple:
    """Return the losses of three epochs, the accuracies, and the network."""
    torch.manual_seed(0)
    data = keep_rows(open_data("digits", "train"), np.arange(rows))
    test = keep_rows(open_data("digits", "test"), np.arange(33))
    views = build_views("digits", data, ViewSettings(global_crops_number=1, local_crops_number=0, global_crops_size=8))
    probe = LinearProbe(SmallConvNet(1), 10, data.labels, finetune=finetune, train_bn=train_bn, feature_bn=feature_bn)
    shares = probe.shares_statistics
    loader = TrainLoader(data, views, batch_size=16, seed=0, device=CPU, keep_last=True, equal_shares=shares)
    rates = {"lr": 0.5, "backbone_lr": 0.05 if finetune else None}
    optimizer, factor = build_probe_optimizer(probe, "sgd", momentum=0.9, **rates), rate_factor("cosine", 3)
    trainer = Trainer(
        probe,
        optimizer,
        lambda step: factor(step // len(loader)),
        loader=loader,
        device=CPU,
        sync_bn_group=0 if shares else 1,
    )
    losses = [trainer.train_epoch(Progress(1, 0, enabled=False))["loss"] for _ in range(3)]
    tops = linear.score(probe, single_views(test, views, batch_size=5, device=CPU), test.labels)
    return losses, tops, probe.state_dict()


# --------------------------------------------------------------------------------------------------------------------
# what comes out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder in which one process evaluated."""
    folder = prepared(tmp_path_factory.mktemp("one"))
    for name in PROGRAMS:
        run(folder, name)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two ranks evaluated, what each of them found, and what they printed."""
    folder, tests = prepared(tmp_path_factory.mktemp("two")), Path(__file__).parent
    (folder / "ranks.py").write_text(
        "import sys\n"
        f"sys.path[:0] = {[str(tests.parent), str(tests)]}\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from test_evaluation_ranks import on_every_rank\n"
        f"on_every_rank(Path({str(folder)!r}))\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "ranks.py"]
    done = subprocess.run(
        words,
        cwd=tests.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(
        folder=folder, ranks=[torch.load(folder / f"{rank}.pt") for rank in range(2)], printed=done.stdout
    )


def prepared(folder: Path) -> Path:
    """A network whose backbone every processor computes alike, and the probe of an earlier version of it."""
    save_exact(folder / "run" / "checkpoint.pt")
    (folder / "earlier").mkdir()
    shutil.copy(FILES / "probe_stopped.pt", folder / "earlier" / "lincls_eval.pt")
    return folder


def test_ranks_share_the_images_and_all_get_every_feature(two):
    """Also where a rank has no image, and from a cache that rank 0 alone has."""
    for rank, found in enumerate(two.ranks):
        for (features, batches), count, cached in zip(found["features"], (5, 5, 1, 1), (0, 1, 0, 1), strict=True):
            assert torch.equal(features, 2 * images(count).images.flatten(1).float())
            mine = len(range(rank, count, 2))
            assert batches == (0 if cached else math.ceil(mine / 2))


def test_ranks_share_the_queries(two):
    expected = []
    for count in (40, 1):
        scores = knn_top(*case(queries=count), [1, 9], 0.1)
        expected.append(
            {k: {"top1": pytest.approx(first), "top5": pytest.approx(five)} for k, (first, five) in scores.items()}
        )
    assert [found["queries"] for found in two.ranks] == [expected, expected]


def test_ranks_share_the_restarts_and_find_the_same(two):
    expected = shared_restarts()
    assert expected[0]["restart"] == 1  # of rank 1
    for found in two.ranks:
        for fit, other in zip(found["restarts"], expected, strict=True):
            assert torch.equal(fit["centroids"], other["centroids"])
            assert {**fit, "centroids": None} == {**other, "centroids": None}


@pytest.mark.parametrize("which", range(len(PROBES)))
def test_a_probe_on_two_ranks_is_the_probe_on_one(two, which):
    losses, tops, state = train_probe(*PROBES[which])
    for found in two.ranks:
        their_losses, their_tops, their_state = found["probes"][which]
        assert their_losses == pytest.approx(losses, rel=1e-3)
        assert their_tops == pytest.approx(tops, abs=1.01 / 33)  # rounding may decide one image
        for name, value in state.items():
            assert_close(their_state[name], value, rtol=1e-2, atol=1e-4)


def test_clusters_and_scores_are_those_of_one_process(one, two):
    """Batches differ, and so may their rounding: an image between two clusters may be in the other one."""
    result, expected = (read_json(folder / "clusters", "cls_eval") for folder in (two.folder, one))
    changed = sum(a != b for a, b in zip(clusters_in(two.folder), clusters_in(one), strict=True))
    assert changed <= 2
    within = 0.02 if changed else 1e-6
    for name in ("acc", "nmi", "ami", "ari"):
        assert result[name] == pytest.approx(expected[name], abs=within)
        assert result["ensemble"][name] == pytest.approx(expected["ensemble"][name], abs=0.02)
    assert result["ensemble"]["members"] == expected["ensemble"]["members"]
    flat = {"used", "balance_hard", "balance_soft", "rankme", "features", "silhouette"}
    assert set(result["quality"]) == {*flat, "agreement"}
    for name in flat:
        assert result["quality"][name] == pytest.approx(expected["quality"][name], rel=max(within, 1e-3))
    assert result["quality"]["agreement"]["10"]["ami"] == pytest.approx(
        expected["quality"]["agreement"]["10"]["ami"], abs=0.02
    )


def clusters_in(folder):
    with (folder / "clusters" / "clusters.csv").open() as file:
        return [line["cluster"] for line in csv.DictReader(file)]


def test_k_means_is_that_of_one_process(one, two):
    result, expected = (read_json(folder / "kmeans", "cls_eval") for folder in (two.folder, one))
    assert result["kmeans"]["inertia"] == pytest.approx(expected["kmeans"]["inertia"], rel=1e-3)
    assert result["kmeans"]["best"] == expected["kmeans"]["best"]
    assert result["ami"] == pytest.approx(expected["ami"], abs=0.02)


def test_nearest_neighbours_score_as_in_one_process(one, two):
    result, expected = (read_json(folder / "knn", "knn_eval") for folder in (two.folder, one))
    assert (result["bank_images"], result["test_images"]) == (1437, 360)
    for k in ("1", "20"):
        assert result["k"][k] == pytest.approx(expected["k"][k], abs=2.01 / 360)
    assert two.printed.count("neighbours") == 1


def test_the_fast_probe_scores_as_in_one_process(one, two):
    result, expected = (read_json(folder / "fast", "lincls_eval") for folder in (two.folder, one))
    assert result["held_out_images"] == expected["held_out_images"]
    for name in ("top1", "top5"):
        assert result[name] == pytest.approx(expected[name], abs=2.01 / 360)
        assert [row[name] for row in result["settings"]] == pytest.approx(
            [row[name] for row in expected["settings"]], abs=2.01 / 288
        )


def test_a_probe_that_normalises_features_uses_the_statistics_of_both_ranks(one, two):
    result, expected = (read_json(folder / "statistics", "lincls_eval") for folder in (two.folder, one))
    assert result["train_images"] == expected["train_images"] == 142  # the ranks divide every batch
    assert [epoch["loss"] for epoch in result["history"]] == pytest.approx(
        [epoch["loss"] for epoch in expected["history"]], rel=1e-3
    )


def test_a_probe_of_an_earlier_version_goes_on_over_two_ranks(one, two):
    """Its unfinished epoch was counted by one process."""
    finished = checkpoint.load(FILES / "probe_finished.pt")
    for folder in (one, two.folder):
        same_history(read_json(folder / "earlier", "lincls_eval")["history"], finished["history"])
        weight = checkpoint.load(folder / "earlier" / "lincls_eval.pt")["model"]["fc.weight"]
        assert_close(weight, finished["model"]["fc.weight"], rtol=1e-3, atol=1e-5)
    assert two.printed.count("resuming from epoch 2, step 3") == 1
