"""How far to trust clusters: values known by hand, and partitions that are wrong on purpose."""

import numpy as np
import pytest
from evaluating import digit_probabilities, save_untrained

from src.evaluation import trust
from src.evaluation.trust import Head


def head(clusters, confidence=0.95, loss=None, probabilities=None):
    return Head(clusters=np.array(clusters), confidence=confidence, loss=loss, probabilities=probabilities)


TRUE = np.repeat([0, 1, 2, 3], 25)
RENAMED = np.array([2, 0, 3, 1])[TRUE]
MERGED = np.concatenate([np.repeat([0, 0, 2], 25), np.repeat([3, 1], [13, 12])])  # classes 0 and 1 together, 3 in two


def test_two_heads_agree_after_their_clusters_are_matched():
    assert trust.agreement_of(head(TRUE), head(RENAMED, 0.9), 4) == (1.0, pytest.approx(0.85))
    few = RENAMED.copy()
    few[:3] = 0
    assert trust.agreement_of(head(TRUE), head(few), 4)[0] == pytest.approx(0.97)
    assert trust.agreement_of(head(TRUE), head(MERGED), 4)[0] == pytest.approx(0.63)


@pytest.mark.parametrize(
    ("own", "same_run", "independent", "level", "reason"),
    [
        (TRUE, [], [], "yellow", "no independent run"),
        (TRUE, [RENAMED], [], "yellow", "no independent run"),
        (TRUE, [], [RENAMED], "green", "1 of 1 independent runs have"),
        (TRUE, [], [RENAMED, MERGED], "yellow", "1 of 2 independent runs have"),
        (TRUE, [], [RENAMED, RENAMED, MERGED], "green", "2 of 3 independent runs have"),
        (MERGED, [], [TRUE], "red", "only 0 of 1 independent runs have"),
        (MERGED, [MERGED], [TRUE, RENAMED, MERGED], "red", "only 1 of 3 independent runs have"),
    ],
)
def test_independent_runs_confirm_a_partition_or_do_not(own, same_run, independent, level, reason):
    found = trust.judge_partition(
        head(own), same_run=[head(each) for each in same_run], independent=[head(each) for each in independent], size=4
    )
    assert found["level"] == level
    assert reason in found["reason"]


@pytest.mark.parametrize(
    ("loss", "other", "level"), [(0.33, 0.25, "red"), (0.25, 0.33, "green"), (0.25, 0.245, "green")]
)
def test_another_partition_with_a_lower_loss_is_an_alarm(loss, other, level):
    found = trust.judge_partition(
        head(TRUE, loss=loss), same_run=[head(MERGED, loss=other)], independent=[head(RENAMED)], size=4
    )
    assert found["level"] == level
    same = trust.judge_partition(
        head(TRUE, loss=loss), same_run=[head(RENAMED, loss=other)], independent=[head(RENAMED)], size=4
    )
    assert same["level"] == "green"  # the same partition with a lower loss is none


def test_stability_and_neighbours_of_clusters():
    clusters = np.array([0, 0, 0, 0, 1, 1])
    other = np.array([1, 1, 1, 0, 0, 0])
    neighbours = np.array([[1, 2], [0, 2], [0, 4], [0, 5], [5, 0], [4, 5]])
    found = trust.judge_clusters(clusters, others=[other], neighbours=neighbours, size=3)
    assert [each["stability"] for each in found] == [0.75, 1.0, None]
    assert [each["neighbours"] for each in found] == [0.75, 0.75, None]
    assert [each["level"] for each in found] == ["yellow", "yellow", None]
    assert [each["images"] for each in found] == [4, 2, 0]
    (only, *_) = trust.judge_clusters(clusters, others=[], neighbours=None, size=3)
    assert (only["stability"], only["neighbours"], only["level"]) == (None, None, None)


def test_independent_runs_lower_the_confidence_in_a_wrong_partition():
    reference = np.full((100, 4), 0.02)
    reference[np.arange(100), RENAMED] = 0.94
    other = head(RENAMED, 0.94, probabilities=reference)
    assert trust.calibrated(head(TRUE), [other], 4) == pytest.approx(0.94)
    found = trust.calibrated(head(MERGED), [other, other], 4)
    # One of the two merged classes has its match in the cluster, but nothing tells which one. The same holds for the two parts
    # of class 3. So all images of the cluster get the mean.
    assert found[MERGED == 2] == pytest.approx(0.94)
    assert found[MERGED == 0].mean() == pytest.approx(0.48, abs=0.01)
    assert found[MERGED == 0] == pytest.approx(found[0])
    assert 0.2 < found[MERGED == 1].mean() < 0.8
    assert 0.2 < found[MERGED == 3].mean() < 0.8


def test_the_calibration_error_of_known_values():
    confidences = np.array([0.95, 0.95, 0.55, 0.55])
    assert trust.expected_calibration_error(confidences, np.array([True, True, True, False])) == pytest.approx(0.05)
    assert trust.expected_calibration_error(confidences, np.array([True, False, False, False])) == pytest.approx(0.5)
    assert trust.expected_calibration_error(np.ones(3), np.ones(3, dtype=bool)) == 0


def test_the_levels_of_images():
    found = trust.judge_images(np.array([0.95, 0.9, 0.7, 0.6, 0.3]), by=2)
    assert (found["green"], found["yellow"], found["red"]) == (0.4, 0.4, 0.2)
    assert found["expected_accuracy"] == pytest.approx(0.69)
    assert found["calibrated_by"] == 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two untrained networks of different seeds, with classifiers that see the same digits."""
    top = tmp_path_factory.mktemp("runs")
    words = ("--hidden-dim", "32", "--dim", "16", "--classes", "10", "10", "12")
    return [
        save_untrained(
            top / f"{seed}.pt", *words, "--seed", seed, seed=seed, history=[{"classifier": 1, "loss_0": 2.0}]
        )
        for seed in (1, 2)
    ]


def test_cls_eval_judges_the_chosen_classifier(runs, evaluate):
    one, two = runs
    result, printed = evaluate("cls_eval", "--checkpoint", one, "--compare", two, "--feature-quality")
    found = result["trust"]
    assert (found["partition"]["same_run"], found["partition"]["independent"]) == (1, 1)
    own, other = digit_probabilities(one)[1].numpy(), digit_probabilities(two)[1].numpy()
    heads = [head(p.argmax(axis=1), float(p.max(axis=1).mean()), probabilities=p) for p in (own, other)]
    expected = trust.calibrated(heads[0], heads[1:], 10)
    assert found["images"]["expected_accuracy"] == pytest.approx(expected.mean(), abs=1e-4)
    assert found["images"]["calibrated_by"] == 1
    assert [each["images"] for each in found["clusters"]] == result["cluster_sizes"]
    assert all(each["neighbours"] is not None for each in found["clusters"] if each["images"])
    assert all(sentence in printed for _, sentence in found["sentences"])


def test_a_run_of_the_same_seed_confirms_nothing(runs, evaluate):
    result, _ = evaluate("cls_eval", "--checkpoint", runs[0], "--compare", runs[0])
    assert result["trust"]["partition"]["independent"] == 0
    assert result["quality"]["compared_with"][str(runs[0])] == pytest.approx(1)


def test_k_means_is_not_judged(runs, evaluate):
    result, _ = evaluate("cls_eval", "--checkpoint", runs[0], "--kmeans", "3")
    assert "trust" not in result
