import os
import pickle
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch import nn

from src import checkpoint, files, locks, run
from src.errors import InputError, RunError
from src.queues import NearestNeighborQueue


def test_what_is_saved_is_loaded(tmp_path):
    state = {"model": {"w": torch.arange(3.0)}, "epoch": 3, "history": [{"loss": 0.5}], "none": None}
    checkpoint.save(tmp_path / "c.pt", state)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert torch.equal(loaded.pop("model")["w"], state.pop("model")["w"])
    assert {**loaded} == {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **state}
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c.pt", {"epoch": 1})
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tmp_path / "c.pt", {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "c.pt")["epoch"] == 1


def test_missing_truncated_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        checkpoint.load(tmp_path / "nothing.pt")
    checkpoint.save(tmp_path / "c.pt", {"model": {"w": torch.randn(1000)}})
    whole = (tmp_path / "c.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "c.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"c\.pt"):
            checkpoint.load(tmp_path / "c.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "plain.pt")
    with pytest.raises(InputError, match="not written by train"):
        checkpoint.load(tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"plain\.pt: a state dict with unknown names \(w\)"):
        checkpoint.load_weights(tmp_path / "plain.pt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_a_file_that_would_execute_code_is_refused_and_does_not(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def pickled(state, path, protocol):
    path.write_bytes(pickle.dumps(state, protocol))


WRITERS = {
    "torch": torch.save,
    "torch, protocol 4": lambda state, path: torch.save(state, path, pickle_protocol=4),
    "torch before 1.6": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "torch before 1.6, protocol 4": lambda state, path: torch.save(
        state, path, pickle_protocol=4, _use_new_zipfile_serialization=False
    ),
    "pickle, protocol 2": lambda state, path: pickled(state, path, 2),
    "pickle, protocol 5": lambda state, path: pickled(state, path, 5),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_the_offending_global_is_named(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"ordinary": [1.5, "text"] * 3, "model": Evil()}, tmp_path / "evil.pt")
    for read in (checkpoint.load, checkpoint.load_weights):
        with pytest.raises(InputError, match=r"evil\.pt: refused, .*execute code \(posix\.system\)"):
            read(tmp_path / "evil.pt")
    assert os.listdir(tmp_path) == ["evil.pt"]


@pytest.fixture
def authors_queue(monkeypatch):
    """The class that their checkpoints name, as it lies in the module `utils` of their project."""
    module = types.ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", module)
    module.NNQueue = type("NNQueue", (), {"__module__": "utils"})
    return module.NNQueue


def filled(queue_class, **changed):
    queue = queue_class()
    state = {"queue_len": 3, "dim": 2, "queue": torch.rand(3, 2), "queue_targets": torch.tensor([2.0, 0, 1])}
    queue.__dict__ = {**state, "queue_indices": torch.tensor([7, 8, 9]), "ptr": 1, "full": True, **changed}
    return queue


STATE = {
    "module.backbone.w": torch.ones(1),
    "module.cls_0.weight_v": torch.ones(1),
    "module.cls_0.weight_g": torch.ones(1),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_the_authors_queue_is_recovered(tmp_path, authors_queue, zipped):
    queue = filled(authors_queue)
    content = {"epoch": 5, "state_dict": STATE, "nn_queue": queue, "best_loss": np.float64(1.5)}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    del sys.modules["utils"]
    weights = checkpoint.load_weights(tmp_path / "c.pt")
    assert set(weights) == {"backbone.w", "classifiers.0.weight_v", "classifiers.0.weight_g"} | {
        f"queue.{name}" for name in ("embeddings", "indices", "labels", "_pointer", "_full")
    }
    ours = NearestNeighborQueue(3, 2)
    ours.load_state_dict({key.removeprefix("queue."): v for key, v in weights.items() if key.startswith("queue.")})
    assert torch.equal(ours.embeddings, queue.queue)
    assert (ours.indices.tolist(), ours.labels.tolist(), ours.pointer, ours.full) == ([7, 8, 9], [2, 0, 1], 1, True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queue": [1, 2]}, "has no Tensor called queue"),
        ({"ptr": "0"}, "has no int called ptr"),
        ({"queue": Evil()}, r"execute code \(posix\.system\)"),
        ({"extra": Evil()}, r"execute code \(posix\.system\)"),
        ({"__class__": Evil}, r"execute code \(test_checkpoint\.Evil\)"),
    ],
)
def test_a_queue_with_other_contents_is_refused(tmp_path, monkeypatch, authors_queue, changed, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "nn_queue": filled(authors_queue, **changed)}, tmp_path / "c.pt")
    with pytest.raises(InputError, match=message):
        checkpoint.load_weights(tmp_path / "c.pt")
    assert os.listdir(tmp_path) == ["c.pt"]


TOUCH = b"X\x0e\x00\x00\x00touch executed"  # the text, pushed
PRETENDERS = {
    "the class is called": b"cutils\nNNQueue\n(" + TOUCH + b"tR",
    "the class is called without arguments, then made from a function": b"cutils\nNNQueue\n)Rcposix\nsystem\n"
    + TOUCH
    + b"b",
    "new with arguments": b"cutils\nNNQueue\n(" + TOUCH + b"t\x81",
    "slots by setattr": b"cutils\nNNQueue\n)\x81(N}(X\x09\x00\x00\x00__class__cutils\nNNQueue\nutb",
    "state that is a text": b"cutils\nNNQueue\n)\x81" + TOUCH + b"b",
    "built class": b"cutils\nNNQueue\n}(X\x0c\x00\x00\x00__setstate__cposix\nsystem\nub",
    "an instance is called": b"cutils\nNNQueue\n)\x81(" + TOUCH + b"tR",
    "a method of it": b"cutils\nNNQueue.__setstate__\n(" + TOUCH + b"tR",
    "numpy's dtype of objects": b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR",
    "numpy's scalar of a text": b"cnumpy.core.multiarray\nscalar\n(" + TOUCH + TOUCH + b"tR",
    "torch's own rebuild function": b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\ncutils\nNNQueue\n("
    + TOUCH
    + b"tNtR",
    "torch's loader": b"ctorch.storage\n_load_from_bytes\n(" + TOUCH + b"tR",
}


@pytest.mark.parametrize("evil", PRETENDERS.values(), ids=PRETENDERS)
def test_a_pretended_queue_executes_nothing(tmp_path, monkeypatch, evil):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.pt"
    torch.save({"state_dict": STATE}, good)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(tmp_path / "evil.pt", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, b"\x80\x02" + evil + b"." if name.endswith("data.pkl") else data)
    with pytest.raises(InputError, match=r"evil\.pt"):
        checkpoint.load_weights(tmp_path / "evil.pt")
    assert sorted(os.listdir(tmp_path)) == ["evil.pt", "good.pt"]


@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(0.1), np.int64(-4), np.bool_(True)])
def test_numbers_of_numpy_are_read_as_plain_numbers(tmp_path, value):
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "head": value}, tmp_path / "c.pt")
    head = checkpoint.load(tmp_path / "c.pt")["head"]
    assert head == value.item()
    assert type(head) is type(value.item())


def test_an_archive_around_one_checkpoint_is_opened(tmp_path):
    torch.save(
        {"network": {"conv1.weight": torch.ones(2), "layer1.0.x": torch.ones(3), "fc.w": torch.ones(1)}},
        tmp_path / "c.pth",
    )
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.write(tmp_path / "c.pth", "deep/c.pth")
        archive.writestr("readme.txt", "text")
    weights = checkpoint.read_weights(tmp_path / "c.zip")
    assert (weights.source, list(weights.tensors), weights.left_out) == (
        "OBoW",
        ["backbone.conv1.weight", "backbone.layer1.0.x"],
        ["fc.w"],
    )
    with zipfile.ZipFile(tmp_path / "c.zip", "a") as archive:
        archive.write(tmp_path / "c.pth", "other.pth")
    with pytest.raises(InputError, match="an archive of 2 checkpoints, expected one: unpack it and name a file"):
        checkpoint.load_weights(tmp_path / "c.zip")


def test_the_authors_file_is_read_and_damaged_copies_are_refused(tmp_path):
    path = GOLDEN / "shufflenet_initial.pth.tar"
    if not path.exists():
        pytest.skip(f"needs the authors' file {path.name}, which is not public; it is looked for in ../shared/golden")
    weights = checkpoint.load_weights(path)
    assert weights["queue.embeddings"].shape == (64, 16)
    assert not weights["queue._full"]
    assert [len(weights[f"classifiers.{k}.weight_g"]) for k in range(2)] == [10, 20]
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.pt"):
            checkpoint.load_weights(tmp_path / "cut.pt")


def test_weights_that_do_not_fit_are_named():
    module = nn.Linear(2, 3)
    with pytest.raises(InputError, match=r"missing: bias.*unexpected: extra.*weight \(3, 4\) instead of \(3, 2\)"):
        checkpoint.load_into(module, {"weight": torch.zeros(3, 4), "extra": torch.zeros(1)}, "it")


def test_every_tensor_of_another_shape_is_named_with_both():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    wrong = {key: torch.zeros(5, *value.shape[1:]) for key, value in module.state_dict().items()}
    with pytest.raises(InputError) as refused:
        checkpoint.load_into(module, wrong, "it")
    for i in range(4):
        assert f"{i}.weight (5, 2) instead of (2, 2)" in str(refused.value)
        assert f"{i}.bias (5,) instead of (2,)" in str(refused.value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 25895168")])
def test_a_full_disk_keeps_the_last_checkpoint_and_leaves_nothing_half_written(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"config": {}})
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RunError, match=r"checkpoint.pt cannot be written \(.*\)$"):
        checkpoint.save(path, {"config": {}})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert path.read_bytes() == before


# ---- the last two ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, monkeypatch, capsys, links):
    class Stub:
        def state_dict(self):
            return {"epoch": len(saved), "done": 0}

    if not links:
        monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    saved, config = [], {"lr": 1.0}
    keeper = run.Run(tmp_path, config, None, log=False)
    for _ in range(3):
        saved.append(None)
        keeper.save(Stub())
    assert run.find_checkpoint(tmp_path, config)["epoch"] == 3
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert run.find_checkpoint(tmp_path, config)["epoch"] == 2
    said = capsys.readouterr().out
    assert "checkpoint.pt" in said
    assert "resuming from the previous checkpoint, checkpoint_previous.pt" in said
    assert not list(tmp_path.glob(".*.part"))

    # going on, the damaged file does not take the place of the good one, even if the next save fails
    keeper = run.Run(tmp_path, config, run.find_checkpoint(tmp_path, config) | {"history": []}, log=False)
    with monkeypatch.context() as full:
        full.setattr(checkpoint.torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(RunError):
            keeper.save(Stub())
    assert run.find_checkpoint(tmp_path, config)["epoch"] == 2
    assert (tmp_path / "checkpoint_damaged.pt").exists()
    keeper.save(Stub())
    assert run.find_checkpoint(tmp_path, config)["epoch"] == 3

    (tmp_path / "checkpoint.pt").unlink()  # gone altogether
    assert run.find_checkpoint(tmp_path, config)["epoch"] == 2
    (tmp_path / "checkpoint_previous.pt").write_bytes(b"")
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(InputError, match="is a folder, expected a checkpoint"):
        run.find_checkpoint(tmp_path, config)
    (tmp_path / "checkpoint.pt").rmdir()
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(InputError):
        run.find_checkpoint(tmp_path, config)


@pytest.mark.parametrize(
    ("code", "difference"),
    [
        ("2 - rank", "rank 0 finds epoch 2, step 5, rank 1 finds epoch 1, step 5"),
        ("None", "rank 1 finds no checkpoint"),
    ],
)
def test_ranks_that_find_other_checkpoints_do_not_train(run_ranks, code, difference):
    """As on a disk of each host, or a network disk that is behind: half of a network would be trained from the start."""
    found = run_ranks(
        2,
        f"""
        from src import checkpoint, files, locks, run
        from src.errors import InputError
        folder = out / f"disk {{rank}}"
        folder.mkdir()
        epoch = {code} if rank or {code} else 2
        if epoch:
            checkpoint.save(folder / "checkpoint.pt", {{"config": {{}}, "history": [], "epoch": epoch, "done": 5}})
        try:
            run.find_checkpoint(folder, {{}})
        except InputError as error:
            torch.save(str(error), out / f"{{rank}}.pt")
        """,
    )
    assert all("differs between ranks: rank 0 finds " in text for text in found)
    assert all(difference in text for text in found)


def test_a_folder_is_held_by_one_run(tmp_path, monkeypatch, capsys, start_program):
    hold = "import sys, time; from pathlib import Path; from src import locks; locks.hold(Path(sys.argv[1])); time.sleep(100)"
    other = start_program("-c", hold, tmp_path)
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
        assert other.poll() is None, other.stderr
        time.sleep(0.01)
    monkeypatch.setattr(locks, "SECONDS_TO_LEAVE", 0.0)
    who = rf"another run is writing there \(process {other.pid} on .+\); give another folder, or end that run"
    with pytest.raises(InputError, match=who):
        run.Run(tmp_path, {}, None)
    with pytest.raises(InputError, match=who):
        run.find_checkpoint(tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}  # nothing was written
    monkeypatch.setattr(locks, "SECONDS_TO_LEAVE", 60.0)
    monkeypatch.setattr(locks.time, "sleep", lambda _: other.kill())  # it leaves meanwhile
    run.Run(tmp_path, {}, None).log.close()
    assert f"waiting for another run to end (process {other.pid} on " in capsys.readouterr().out
    assert (tmp_path / "config.json").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / ".lock").mkdir()  # root may write everywhere else
    with pytest.raises(InputError, match=r"--output-dir .*: cannot be written \(Is a directory\); give another"):
        run.find_checkpoint(tmp_path, {})


def test_flipped_bytes_within_tensors_are_found_out(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {"model": {"w": torch.zeros(10000)}})
    whole = bytearray((tmp_path / "c.pt").read_bytes())
    middle = whole.index(bytes(20000))
    whole[middle + 10000] ^= 1
    (tmp_path / "c.pt").write_bytes(whole)
    with pytest.raises(InputError, match=r"damaged: the checksum of .* is wrong"):
        checkpoint.load(tmp_path / "c.pt")


def test_a_checkpoint_of_earlier_code_gets_the_options_it_did_not_have(tmp_path):
    config = {"method": "swav", "arch": "resnet50", "data": "digits"}
    checkpoint.save(tmp_path / "c.pt", {"config": config, "history": [], "model": {}})
    for record in (checkpoint.load(tmp_path / "c.pt"), checkpoint.read_weights(tmp_path / "c.pt").record):
        assert record["config"] == {**checkpoint.LATER_OPTIONS, **checkpoint.LATER_OF_TRAINING, **config}
    checkpoint.save(tmp_path / "c.pt", {"config": {**config, "subset": "imagenet-50"}, "history": [], "model": {}})
    assert checkpoint.load(tmp_path / "c.pt")["config"]["subset"] == "imagenet-50"


@pytest.mark.parametrize("part", ["config", "model", "version"])
def test_a_file_of_ours_without_a_part_of_it_is_refused(part, tmp_path):
    whole = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "config": {}, "history": [], "model": {}}
    torch.save({name: value for name, value in whole.items() if name != part}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="format version None" if part == "version" else f"has no {part}"):
        checkpoint.read_weights(tmp_path / "c.pt")
