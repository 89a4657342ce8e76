"""What a run costs: the estimate before it starts, and the table at its end."""

import json
import re
import threading

import pytest

from src.logs import SlowStep

WORDS = ("train.py", "--epochs", "3", "--warmup-epochs", "1", "--device", "cpu")


@pytest.mark.parametrize("method", ["self_classifier", "sela_v2"])
def test_the_estimate_is_near_what_the_run_counts(run_program, tmp_path, method):
    words = (*WORDS, "--method", method)
    estimated = run_program(*words, "--dry-run")
    assert estimated.returncode == 0, estimated.stderr
    assert json.loads(estimated.stdout)["epochs"] == 3
    whole = float(re.search(r"estimate: ([\d.e-]+) PFLOP", estimated.stderr).group(1))
    done = run_program(*words, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert whole == pytest.approx(last["total_pflop"], rel=0.1)
    assert f"{last['total_pflop']:.3g}" in done.stdout.split("PFLOP of the last epoch")[1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--data", "missing"), "none, because --data missing does not exist"),
        (
            ("--data", "cifar10", "--data-root", "missing"),
            "none, because a few images cannot be trained on: --data cifar10",
        ),
    ],
)
def test_no_estimate_has_a_reason_and_is_no_failure(run_program, words, reason):
    done = run_program("train.py", *words, "--dry-run")
    assert (done.returncode, json.loads(done.stdout)["data"]) == (0, words[1])
    assert reason in done.stderr


def test_a_slow_step_is_named_once_with_the_flags_that_make_it_cheaper():
    said, lines = threading.Event(), []
    slow = SlowStep("a smaller --batch-size", limit=0.02)
    with slow.watched(lambda line: (lines.append(line), said.set())) as begin:
        begin(7)
        assert said.wait(10)
        begin(8)
    with slow.watched(lines.append) as begin:
        begin(9)
    assert lines == ["step 7 takes longer than 0.02 seconds; steps get cheaper with a smaller --batch-size"]


def test_a_fast_step_is_not_named():
    lines = []
    with SlowStep("a smaller --batch-size", limit=0.4).watched(lines.append) as begin:
        for number in range(50):
            begin(number)
            threading.Event().wait(0.01)
    assert lines == []
