"""Stop and go on, bit for bit; damaged images; losses that are not finite."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, view_settings
from PIL import Image

from src.data.datasets import MemoryImages, open_data
from src.data.digits import DigitRecipe, DigitViews
from src.data.loaders import TrainLoader, single_views
from src.data.photographs import PhotoViews, published_views
from src.data.workers import available_workers
from src.errors import InputError, RunError
from src.logs import Progress
from src.methods import METHODS, build_method
from src.optim import build_optimizer, parameter_groups, warmup_cosine
from src.stopping import Interrupted
from src.trainer import Trainer

CPU = torch.device("cpu")


def make_trainer(name="self_classifier", optimizer="lars", epochs=3, autocast=None):
    torch.manual_seed(0)
    config = METHODS[name].Config(classes=(6, 10), dim=8, hidden_dim=16, queue_length=48)
    digits = open_data("digits", "train")
    data = MemoryImages(digits.images[:100], digits.labels[:100], digits.classes)
    loader = TrainLoader(data, DigitViews([DigitRecipe()] * 3), batch_size=24, seed=0, device=CPU)
    method = build_method(name, config, SMALL)
    lr = warmup_cosine(0.5, 0.001, warmup_start=0.1, warmup_epochs=1, epochs=epochs, steps_per_epoch=len(loader))
    optimizer = build_optimizer(optimizer, parameter_groups(method, 1e-4), lr=0.5, momentum=0.9)
    return Trainer(method, optimizer, lr, loader=loader, device=CPU, labels=data.labels, autocast=autocast)


def quiet():
    return Progress(1, 0, enabled=False)


class StopAfter:
    """Asks to stop as the given step ends."""

    def __init__(self, trainer, step):
        self.trainer, self.at = trainer, step

    @property
    def number(self):
        return signal.SIGTERM if self.trainer.step + 1 == self.at else 0


POSITIONS = {
    "queue.indices": (100, r"the indices of its queue go from 100 to 100, expected 0 to 99"),
    "queue._pointer": (48, r"its queue of 48 rows writes next to row 48, which does not exist"),
}


@pytest.mark.parametrize("entry", POSITIONS)
@pytest.mark.parametrize("value", ["beyond", "negative"])
def test_positions_in_a_checkpoint_that_do_not_exist_are_named(entry, value):
    state, (beyond, message) = make_trainer().state_dict(), POSITIONS[entry]
    state["model"] = {
        **state["model"],
        entry: torch.full_like(state["model"][entry], beyond if value == "beyond" else -1),
    }
    with pytest.raises(InputError, match=message if value == "beyond" else "-1") as refused:
        make_trainer().load_state_dict(state)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("number", "cluster", "message"),
    [
        (3, 0, "its memory bank has 3 images, expected 100"),
        (100, 6, "the clusters of its head 0 go from 6 to 6, expected 0 to 5"),
    ],
)
def test_a_memory_bank_of_other_images_or_clusters_is_named(number, cluster, message):
    method = METHODS["deepcluster_v2"]
    method = build_method("deepcluster_v2", method.Config(prototypes=(6, 10), dim=8, hidden_dim=16), SMALL)
    method.bank.make_room(number)
    method.check_positions(number)  # IGNORED is no cluster
    method.bank.clusters.fill_(cluster)
    with pytest.raises(InputError, match=message):
        method.check_positions(100)


@pytest.mark.parametrize("entry", ["loss", "terms", "share_0"])
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_totals_that_do_not_fit_are_named(entry, change):
    trainer = make_trainer()
    trainer.stop_request = StopAfter(trainer, 2)
    with pytest.raises(Interrupted):
        trainer.train_epoch(quiet())
    state = trainer.state_dict()
    if change == "missing":
        del state["totals"][entry]
    else:
        state["totals"][entry] = torch.ones(7)
    second = make_trainer()

    def resume():
        second.load_state_dict(state)
        second.train_epoch(quiet())

    with pytest.raises((InputError, RunError), match=f"has no '{entry}'|its total {entry} has the shape") as refused:
        resume()
    assert "does not fit this run" in str(refused.value)


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_stopping_at_any_step_changes_no_bit(optimizer, stop_at, tmp_path):
    straight = make_trainer(optimizer=optimizer)
    expected = [straight.train_epoch(quiet()) for _ in range(3)]

    first = make_trainer(optimizer=optimizer)
    first.stop_request = StopAfter(first, stop_at)
    summaries = []
    for _ in range((stop_at - 1) // len(first.loader)):
        summaries.append(first.train_epoch(quiet()))
    with pytest.raises(Interrupted):
        first.train_epoch(quiet())
    assert first.step == stop_at
    torch.save(first.state_dict(), tmp_path / "state.pt")

    torch.manual_seed(99)
    second = make_trainer(optimizer=optimizer)
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    while second.epoch < 3:
        summaries.append(second.train_epoch(quiet()))

    timing = {"seconds", "images_per_second"}
    for a, b in zip(expected, summaries, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
    for name, value in straight.state_dict()["model"].items():
        assert torch.equal(value, second.state_dict()["model"][name]), name
    for a, b in zip(
        straight.optimizer.state_dict()["state"].values(), second.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_resumes_bit_for_bit_too(precision):
    straight, first = make_trainer(autocast=precision), make_trainer(autocast=precision)
    straight.train_epoch(quiet())
    first.stop_request = StopAfter(first, 2)
    with pytest.raises(Interrupted):
        first.train_epoch(quiet())
    second = make_trainer(autocast=precision)
    second.load_state_dict(first.state_dict())
    second.train_epoch(quiet())
    expected = straight.state_dict()["model"]
    assert all(torch.equal(value, expected[name]) for name, value in second.state_dict()["model"].items())


def test_the_loss_falls():
    trainer = make_trainer(epochs=12, optimizer="adamw")
    trainer.lr = lambda step: 0.003
    summaries = [trainer.train_epoch(quiet()) for _ in range(12)]
    assert summaries[-1]["loss"] < summaries[0]["loss"] - 0.5
    assert json.dumps(summaries)  # plain numbers only


@pytest.mark.parametrize(("labels", "agreement"), [(torch.zeros(100).long(), 1.0), (torch.arange(100), 0.0)])
def test_neighbours_agreement_counts_equal_labels_of_other_images(labels, agreement):
    trainer = make_trainer(epochs=2)
    trainer.labels = labels
    summaries = [trainer.train_epoch(quiet()) for _ in range(2)]
    assert summaries[-1]["neighbor_agreement"] == agreement


def test_images_without_a_label_do_not_count_as_agreeing():
    trainer = make_trainer(epochs=2)
    trainer.labels = torch.full((100,), -1)
    assert all("neighbor_agreement" not in trainer.train_epoch(quiet()) for _ in range(2))


def test_a_loss_that_is_not_finite_stops_before_the_update():
    trainer = make_trainer()
    trainer.train_epoch(quiet())
    before = {name: value.clone() for name, value in trainer.method.state_dict().items() if "running" not in name}
    trainer.method.classifiers[0].weight_g.data[0] = float("nan")
    with pytest.raises(RunError, match=r"not finite in step 4 on rank 0"):
        trainer.train_epoch(quiet())
    now = trainer.method.state_dict()
    assert all(torch.equal(now[n], v) for n, v in before.items() if n.startswith("backbone") and "num_b" not in n)


@pytest.fixture
def pictures(tmp_path):
    def make(count, damaged=()):
        shutil.rmtree(tmp_path / "p", ignore_errors=True)
        (tmp_path / "p").mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "p" / f"{i:03}.png")
            if i in damaged:
                (tmp_path / "p" / f"{i:03}.png").write_bytes(b"\x89PNG not really")
        return open_data(str(tmp_path / "p"), "train")

    return make


def file_loader(data, workers, seed=0, batch_size=20):
    views = PhotoViews(published_views(view_settings(2, 2, 16, 8)), 16)
    return TrainLoader(data, views, batch_size=batch_size, seed=seed, device=CPU, workers=workers)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # more than cores, perhaps
def test_workers_do_not_change_a_bit_nor_does_starting_in_the_middle(pictures):
    data = pictures(60)
    here = list(file_loader(data, workers=0).epoch(1))
    there = list(file_loader(data, workers=4).epoch(1))
    rest = list(file_loader(data, workers=0).epoch(1, start=2))
    assert len(here) == 3
    for a, b in zip(here + here[2:], there + rest, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    other = next(iter(file_loader(data, workers=0).epoch(2)))
    assert not torch.equal(other.indices, here[0].indices)


def test_a_program_that_forgets_to_close_its_workers_still_ends(pictures, run_python):
    data = pictures(20)
    code = f"""
import gc, torch
gc.disable()
from src.data.datasets import open_data
from src.data.loaders import TrainLoader
from src.config import ViewSettings
from src.data.photographs import PhotoViews, published_views
views = PhotoViews(published_views(ViewSettings(global_crops_size=16, local_crops_number=0)), 16)
data = open_data({str(Path(data.paths[0]).parent)!r}, "train")
loader = TrainLoader(data, views, batch_size=10, seed=0, device=torch.device("cpu"), workers=2)
loader.cycle = loader
next(loader.epoch(0))
"""
    assert run_python("-c", code, timeout=100).returncode == 0


def test_a_damaged_image_is_reported_replaced_and_counted(pictures, capsys):
    data = pictures(120, damaged={7})
    loader = file_loader(data, workers=0)
    seen = torch.cat([batch.indices for batch in loader.epoch(0)])
    assert "damaged image" in capsys.readouterr().out
    assert list(loader.damaged) == [data.paths[7]]
    assert 7 not in seen
    assert (seen == 8).sum() == 2
    assert not loader.too_many_damaged


def test_more_than_one_percent_damaged_is_too_many(pictures):
    loader = file_loader(pictures(120, damaged={7, 50}), workers=0)
    list(loader.epoch(0))
    assert loader.too_many_damaged
    one_of_100 = file_loader(pictures(100, damaged={99}), workers=0)  # the last one, replaced by the first
    seen = torch.cat([batch.indices for batch in one_of_100.epoch(0)])
    assert not one_of_100.too_many_damaged
    assert (seen == 0).sum() == 2


def test_a_folder_of_damaged_files_ends_with_one_sentence(pictures):
    loader = file_loader(pictures(40, damaged=set(range(40))), workers=0)
    with pytest.raises(RunError, match="more than 1 % of the images are damaged"):
        next(loader.epoch(0))


def test_an_evaluation_refuses_a_damaged_image(pictures):
    data = pictures(20, damaged={13})
    with pytest.raises(InputError, match=r"013\.png: cannot be decoded \(UnidentifiedImageError"):
        list(single_views(data, file_loader(data, 0).views, batch_size=8, device=CPU, workers=0))


def test_views_cut_in_several_goes_are_those_of_one(pictures, monkeypatch):
    whole = list(file_loader(pictures(60), workers=0).epoch(1))
    monkeypatch.setattr("src.data.loaders.TOGETHER", 1)
    for a, b in zip(whole, file_loader(pictures(60), workers=0).epoch(1), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_workers_that_live_on_read_the_next_epoch(pictures):
    data = pictures(60)
    lasting = file_loader(data, workers=1)
    list(lasting.epoch(0))
    for a, b in zip(lasting.epoch(1), file_loader(data, workers=0).epoch(1), strict=True):
        assert torch.equal(a.indices, b.indices)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    lasting.close()


def test_a_worker_that_hangs_does_not_keep_the_program(pictures, run_python):
    """As on a network disk that no longer answers; workers take no signal but the last."""
    data = pictures(20)
    code = f"""
import time, torch
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds that a worker gets to end
from src.data import datasets
from src.data.datasets import open_data
from src.data.loaders import TrainLoader
from src.config import ViewSettings
from src.data.photographs import PhotoViews, published_views
decode, read = datasets.decode, []
datasets.decode = lambda path, upright: time.sleep(10**6) if len(read) == 3 else (read.append(path), decode(path))[1]
views = PhotoViews(published_views(ViewSettings(global_crops_size=16, local_crops_number=0)), 16)
data = open_data({str(Path(data.paths[0]).parent)!r}, "train")
loader = TrainLoader(data, views, batch_size=2, seed=0, device=torch.device("cpu"), workers=1)
next(loader.epoch(0))
raise KeyboardInterrupt
"""
    assert "KeyboardInterrupt" in run_python("-c", code, timeout=100).stderr


# ---- feeding --------------------------------------------------------------------------------------------------------


def test_waiting_for_files_is_counted_and_the_work_between_is_not(pictures, monkeypatch):
    clock = iter(range(0, 10_000, 10))  # every look at the clock is ten seconds later
    monkeypatch.setattr("src.data.loaders.time.monotonic", lambda: next(clock))
    loader = file_loader(pictures(60), workers=0)
    list(loader.epoch(0))
    assert loader.waited == 30  # each of three batches


def test_a_gpu_has_waited_where_its_steps_were_done_before_the_batch_came(pictures):
    class Mark:  # an event, which knows its time when the GPU has come to it
        def __init__(self, time):
            self.time, self.known = time, False

        def synchronize(self):
            self.known = True

        def elapsed_time(self, later):
            assert self.known
            assert later.known
            return later.time - self.time  # milliseconds

    loader = file_loader(pictures(20), workers=0)
    loader._waits += [(Mark(1000), Mark(1250)), (Mark(2000), Mark(1900)), (Mark(3000), Mark(3100))]
    assert loader.waited == pytest.approx(0.35)
    assert loader.waited == pytest.approx(0.35)
    loader._waits.append((Mark(0), Mark(9)))
    loader.waited = 0.0
    assert loader.waited == 0


def test_an_epoch_that_waited_long_gets_a_word(pictures):
    loader = file_loader(pictures(20), workers=0)
    waiting = {"epoch": 1, "images_per_second": 300.0, "waited": 0.4}
    said = loader.advice(waiting)
    assert said.startswith(
        "training is data-bound: 40% of epoch 1 was spent waiting for images. Files arrive at 300 images/s"
    )
    assert "training could use 500 images/s." in said
    assert "(now 0)" in said
    assert loader.advice({**waiting, "waited": 0.1}) == ""
    assert loader.advice({"epoch": 1, "images_per_second": 300.0}) == ""


def test_the_summary_says_how_long_an_epoch_waited():
    trainer = make_trainer()
    trainer.loader.waited = 1e6
    summary = trainer.train_epoch(quiet())
    assert summary["waited"] == pytest.approx(1e6 / summary["seconds"])
    assert "waited" not in trainer.train_epoch(quiet())


@pytest.mark.parametrize(
    ("environ", "quota", "expected"),
    [
        ({}, None, 16),
        ({"LOCAL_WORLD_SIZE": "4"}, None, 4),
        ({"SLURM_NTASKS_PER_NODE": "4"}, None, 4),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}, None, 6),  # each task has its own
        ({"SLURM_CPUS_PER_TASK": "12", "LOCAL_WORLD_SIZE": "4"}, None, 3),  # torchrun in one task
        ({"SLURM_CPUS_PER_TASK": "64"}, None, 16),  # bound to fewer
        ({}, "max 100000", 16),
        ({}, "250000 100000", 2),
        ({}, "50000 100000", 1),
        ({}, "nonsense", 16),
    ],
)
def test_workers_are_as_many_as_the_job_has_cores(environ, quota, expected, monkeypatch, tmp_path):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    assert available_workers(str(tmp_path / "cpu.max")) == expected


def test_the_first_step_has_a_line_at_once_and_the_others_wait(capsys):
    progress = Progress(100, 0, enabled=True)
    progress.count(10, "features")
    assert capsys.readouterr().out == ""
    progress.advance(10, epoch=1, loss=2.5)
    progress.advance(10, epoch=1, loss=2.4)
    assert re.fullmatch(r"epoch 1 +20%  loss 2\.500  [\d,]+ images/s  \d:\d\d left\n", capsys.readouterr().out)
