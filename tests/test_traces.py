"""The losses of 30 steps of every method are those that tests/traces stores; what changes them is found."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from processes import finish_ranks, start_ranks

from src import results, traces
from src.config import flag, parse_train, read_method
from src.data import digits
from src.data.loaders import TrainLoader
from src.methods import METHODS

each_method = pytest.mark.parametrize("method", METHODS)
# Options that are temperatures, although their help does not begin with that word.
ALSO_TEMPERATURES = ("epsilon", "lam", "entropy_weight")
WITHOUT_TEMPERATURE = {"selflabel"}


@pytest.fixture(scope="module", autouse=True)
def two_ranks(tmp_path_factory):
    """Two ranks that compute the traces of all methods while the other tests of this file run."""
    file = tmp_path_factory.mktemp("traces") / "two_ranks.json"
    ranks = start_ranks(2, traces.run_on_ranks, str(file), *METHODS)

    def finish():
        for rank in finish_ranks(ranks):
            assert rank.returncode == 0, rank.stderr[-3000:]
        return json.loads(file.read_text())

    yield finish
    for rank in ranks:
        rank.close()


def stored(method: str, ranks: int) -> dict[str, list[float]]:
    start = f"ranks {ranks}"
    return {name: trace for name, trace in traces.read(method).items() if name.startswith(start)}


@each_method
def test_one_process_replays_its_traces(method):
    expected = {**stored(method, 1), "views": traces.read(method).get("views", [])}
    assert traces.differences(traces.run_cases([method])[method], expected) == []
    assert [len(trace) for name, trace in expected.items() if name != "views"] == [30, 30]


# ---- what turns a trace red -----------------------------------------------------------------------------------------


def compare_first_epoch(method: str, *flags: str) -> list[str]:
    """Return the differences of the first ten steps, on one process, from the stored trace."""
    found, whole = traces.follow(method, 1, *flags, epochs=1), traces.read(method)
    expected = {"losses": whole["ranks 1, accumulate 1"][:10], "views": whole["views"]}
    return traces.differences(found, expected)


def temperatures() -> list[tuple[str, str]]:
    found = []
    for method in METHODS:
        comments = read_method(method).comments
        names = [field.name for field in dataclasses.fields(read_method(method).config)]
        own = [name for name in names if comments[name].startswith("temperature") or name in ALSO_TEMPERATURES]
        assert bool(own) == (method not in WITHOUT_TEMPERATURE), method
        found += [(method, name) for name in own]
    return found


@pytest.mark.parametrize(("method", "option"), temperatures())
def test_a_doubled_temperature_turns_a_trace_red(method, option):
    _, _, knobs = parse_train(["--method", method])
    (line,) = compare_first_epoch(method, flag(option), str(2 * getattr(knobs, option)))
    assert line.startswith("losses: the loss of step ")


@each_method
def test_exchanged_views_turn_a_trace_red(method, monkeypatch):
    ordered = digits.DigitViews.__call__

    def exchanged(self, *args, **which):
        first, second, *others = ordered(self, *args, **which)
        return [second, first, *others]

    monkeypatch.setattr(digits.DigitViews, "__call__", exchanged)
    assert any(line.startswith("views: the mean of view 0 is ") for line in compare_first_epoch(method))


def test_another_order_of_the_draws_of_a_view_turns_a_trace_red(monkeypatch):
    draw = digits.uniforms
    monkeypatch.setattr(digits, "uniforms", lambda **which: draw(**which)[:, ::-1].copy())
    assert len(compare_first_epoch("swav")) == 2


def test_one_more_draw_before_the_weights_turns_a_trace_red(monkeypatch):
    build = traces.build_method

    def build_later(*args):
        torch.rand(1)
        return build(*args)

    monkeypatch.setattr(traces, "build_method", build_later)
    (line,) = compare_first_epoch("swav")
    assert line.startswith("losses: the loss of step 1 is ")


def test_another_order_of_the_images_turns_a_trace_red(monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", lambda seed, rng=np.random.default_rng: rng([*seed, 1]))
    assert len(compare_first_epoch("swav")) == 2


# ---- two ranks; they had the time to finish --------------------------------------------------------------------------


def test_two_ranks_replay_their_traces(two_ranks):
    found = two_ranks()
    for method in METHODS:
        assert traces.differences(found[method], stored(method, 2)) == [], method


@each_method
def test_the_stored_loss_of_two_ranks_is_that_of_one_process(method):
    whole = traces.read(method)
    assert whole["ranks 2, accumulate 1"] == pytest.approx(whole["ranks 1, accumulate 1"], rel=1e-8)


# ---- files and the command ------------------------------------------------------------------------------------------


def test_differences_name_the_first_step_that_differs():
    old = {"a": [1.0, 2.0, 3.0], "b": [1.0], "c": [1.0, 2.0], "views": [0.5, -0.25]}
    assert traces.differences(old, old) == []
    assert traces.differences({**old, "a": [1.0, 2.0 + 1e-9, 3.0]}, old) == []
    new = {"a": [1.0, 2.5, 3.5], "c": [1.0], "d": [1.0], "views": [0.5, -0.125]}
    assert traces.differences(new, old) == [
        "d: not stored",
        "b: stored, but not found",
        "a: the loss of step 2 is 2.5, stored 2",
        "c: 1 numbers, 2 stored",
        "views: the mean of view 1 is -0.125, stored -0.25",
    ]
    assert traces.differences({"a": [float("nan")]}, {"a": [1.0]}) == ["a: the loss of step 1 is nan, stored 1"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `python -m src.results traces` with given traces in place of those of the code."""
    monkeypatch.setattr(traces, "FOLDER", tmp_path / "traces")

    def run(found, *words):
        monkeypatch.setattr(traces, "run_all", lambda folder: found)
        monkeypatch.setattr(sys, "argv", ["results.py", "traces", *words])
        try:
            results.main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


def test_the_command_compares_and_renews(command, tmp_path):
    first = {"swav": {"x": [1.0, 1 / 3]}, "sela_v2": {"x": [2.0]}}
    status, output, _ = command(first)
    assert (status, output.splitlines()) == (1, ["swav: x: not stored", "sela_v2: x: not stored"])
    status, output, _ = command(first, "--write")
    assert (status, output.count("wrote ")) == (0, 2)
    assert (tmp_path / "traces" / "swav.json").read_text() == '{\n "x": [1, 0.3333333333]\n}\n'
    assert command(first) == (0, "all traces are as stored\n", "")

    before = (tmp_path / "traces" / "sela_v2.json").stat().st_mtime_ns
    second = {"swav": {"x": [1.0, 0.5]}, "sela_v2": {"x": [2.0 + 1e-10]}}
    status, output, _ = command(second)
    assert (status, output) == (1, "swav: x: the loss of step 2 is 0.5, stored 0.3333333333\n")
    command(second, "--write")
    assert traces.read("swav") == {"x": [1.0, 0.5]}
    assert (tmp_path / "traces" / "sela_v2.json").stat().st_mtime_ns == before  # unchanged traces stay as they are


def test_the_loader_gives_the_first_batch_again():
    """The trace reads the views of the first batch before training; the training must see the same batch."""
    data = traces.open_data("digits", "train")
    loader = TrainLoader(
        data, digits.DigitViews([digits.DigitRecipe()]), batch_size=8, seed=0, device=torch.device("cpu")
    )
    one, two = (next(iter(loader.epoch(0, apart=True))).views[0] for _ in range(2))
    assert torch.equal(one, two)
