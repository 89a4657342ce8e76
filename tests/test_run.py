"""The folder of a run under faults: kills, full disks, files that are not what they should be, two runs at once, signals."""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import read_json, run_here
from PIL import Image

from src import checkpoint, files, locks
from src.config import parse_lincls_eval, parse_train
from src.errors import InputError, run_script
from src.logs import Progress
from src.run import Run, choose_folder, find_checkpoint
from src.trainer import Trainer

SHORT = (
    "--arch identity --classes 3 3 --dim 16 --hidden-dim 32 --warmup-epochs 0 --batch-size 60 --lr 0.1 --save-every 1 "
)
SHORT = (
    SHORT + "--optimizer sgd --global-crops-number 2 --local-crops-number 0 --queue-length 60 --device cpu"
).split()
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 240 features, which makes four steps of 60."""
    path = tmp_path_factory.mktemp("data") / "features.npz"
    np.savez(path, train_features=np.random.default_rng(0).normal(size=(240, 6)).astype(np.float32))
    return path


@pytest.fixture
def train(data, tmp_path, capfd):
    """Train in this process; return the exit status, the output and the errors."""

    def run(*words, epochs=2, folder="run"):
        output = ["--output-dir", tmp_path / folder] if folder else []
        status = 0
        try:
            run_script(lambda: run_here("train", "--data", data, *SHORT, "--epochs", epochs, *output, *words))
        except SystemExit as ended:
            status = ended.code
        said = capfd.readouterr()
        return status, said.out, said.err

    return run


def epochs_in(folder):
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Stub:
    """Has the state of a trainer after some epochs."""

    def __init__(self, epoch=1):
        self.epoch = epoch

    def state_dict(self):
        return {"epoch": self.epoch, "done": 0, "model": {"w": torch.full((1000,), float(self.epoch))}}


# ---- milestones and other files -------------------------------------------------------------------------------------


def test_a_milestone_is_whole_or_not_there(tmp_path, monkeypatch):
    """`shutil` is stopped in the middle of a copy, as by a full disk."""

    def half(source, target, *_):
        content = source.read() if hasattr(source, "read") else Path(source).read_bytes()
        write = target.write if hasattr(target, "write") else Path(target).write_bytes
        write(content[: len(content) // 2])
        raise FULL

    run = Run(tmp_path, {}, None, save_every=1, log=False)
    for name in ("copyfile", "copyfileobj"):
        monkeypatch.setattr(shutil, name, half)
    with pytest.raises((RuntimeError, OSError)) as failed:
        run.finish_epoch(Stub(), {"epoch": 1})
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint.pt"]
    message = f"{tmp_path}/checkpoint_1.pt cannot be written (No space left on device): free some space; "
    assert str(failed.value) == f"{message}the last checkpoint, {tmp_path}/checkpoint.pt (epoch 1, step 0), is kept"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:999])])
def test_the_newest_milestone_is_written_again(train, tmp_path, damage):
    train(epochs=2)
    folder = tmp_path / "run"
    damage(folder / "checkpoint_2.pt")
    train(epochs=2)
    assert (folder / "checkpoint_2.pt").read_bytes() == (folder / "checkpoint.pt").read_bytes()


def test_a_milestone_is_also_restored_from_the_previous_checkpoint(tmp_path):
    run = Run(tmp_path, {}, None, save_every=2, log=False)
    for epoch in (1, 2, 3):
        run.finish_epoch(Stub(epoch), {"epoch": epoch})
    (tmp_path / "checkpoint_2.pt").unlink()
    Run(tmp_path, {}, find_checkpoint(tmp_path, {}), save_every=2, log=False)
    assert checkpoint.load(tmp_path / "checkpoint_2.pt")["epoch"] == 2


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.17.part").write_bytes(b"half")
    (tmp_path / ".cls_eval.json.17.part").write_bytes(b"half")  # perhaps of an evaluation that still runs
    Run(tmp_path, {}, None, log=False)
    assert sorted(os.listdir(tmp_path)) == [".cls_eval.json.17.part", ".lock"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail(*_):
        raise FULL

    def write():
        with files.replacing(path) as file:
            file.write(b"new")
            if failing == "write":
                fail()

    with monkeypatch.context() as patch:
        if failing != "write":
            patch.setattr(files.os, failing, fail)
        with pytest.raises(OSError, match="No space left") as failed:
            write()
    assert failed.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    files.write_text(path, "new")
    assert path.read_text() == "new"


def test_the_file_and_its_name_are_on_the_disk_in_this_order(tmp_path, monkeypatch):
    calls = []

    def record(name):
        real = getattr(os, name)

        def call(*words):
            kind = "folder" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{words[0]}") else ""
            calls.append(name + kind)
            return real(*words)

        monkeypatch.setattr(files.os, name, call)

    record("fsync")
    record("replace")
    files.write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsyncfolder"]


def test_a_folder_that_cannot_be_synchronised_is_no_error(tmp_path, monkeypatch):
    real = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "not here")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", refuse)
    files.write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------

LINE = b'{"epoch": 1, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "content",
    [LINE + LINE[:9], LINE + bytes(100), bytes(range(256)) * 9, b"", None, b"[]\n3\nnull\n", b'{"loss": 1}\n'],
    ids=["torn", "NUL", "binary", "empty", "missing", "no objects", "no epoch"],
)
def test_the_log_is_rebuilt_from_the_checkpoint(train, tmp_path, content):
    train(epochs=1)
    log = tmp_path / "run" / "metrics.jsonl"
    before = log.read_bytes()
    log.unlink() if content is None else log.write_bytes(content)
    status, _, errors = train(epochs=1)
    assert (status, errors) == (0, "")
    assert log.read_bytes() == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "checkpoint_previous.pt"])
def test_a_folder_in_place_of_a_file_is_one_line(train, tmp_path, name):
    train(epochs=1)
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).mkdir()
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    status, _, errors = train(epochs=1)
    assert status == 2
    assert f": error: {tmp_path}/run/{name} is " in errors
    assert errors.count("\n") == 1
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == whole


def test_a_log_whose_checkpoint_is_gone_is_kept(train, tmp_path):
    train(epochs=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "run").glob("checkpoint*.pt"):
        path.unlink()
    train(epochs=1)
    assert (tmp_path / "run" / "metrics_earlier.jsonl").read_bytes() == before
    assert epochs_in(tmp_path / "run") == [1]


# ---- two runs at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [["--seed", "1"], []])
def test_of_two_starts_on_one_new_folder_one_trains(data, start_program, tmp_path, other):
    words = ["train.py", "--data", data, *SHORT, "--epochs", "2", "--output-dir", tmp_path / "run"]
    ends = [process.finish(120) for process in [start_program(*words), start_program(*words, *other)]]
    failed = [end for end in ends if end.returncode]
    assert [end.returncode for end in failed] == ([2] if other else [])
    for end in failed:
        assert "holds a run with other options: --seed" in end.stderr
        assert end.stderr.count("\n") == 1
    trained = sum("steps per epoch" in end.stdout and "the run is finished" not in end.stdout for end in ends)
    assert trained == 1
    assert epochs_in(tmp_path / "run") == [1, 2]


def test_the_lock_comes_before_the_look(tmp_path, monkeypatch):
    """Another run finishes while this one waits for the lock."""
    real = locks.take

    def lock(descriptor, folder):
        checkpoint.save(folder / "checkpoint.pt", {"config": {"epochs": 1}, "history": [], "epoch": 1, "done": 0})
        return real(descriptor, folder)

    monkeypatch.setattr(locks, "take", lock)
    assert find_checkpoint(tmp_path / "new", {"epochs": 1})["epoch"] == 1


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path, link):
    precious = tmp_path / "precious"
    precious.write_text("text")
    (tmp_path / "run").mkdir()
    getattr(tmp_path / "run" / ".lock", link)(precious)
    with pytest.raises(InputError, match=r"\.lock (is a link|has a second name), expected"):
        find_checkpoint(tmp_path / "run", {})
    assert precious.read_text() == "text"


def test_a_lock_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(InputError, match="is not a regular file"):
        find_checkpoint(tmp_path, {})


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_said_in_one_line(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    assert find_checkpoint(tmp_path, {}) is None
    line = f"this file system has no locks ({os.strerror(number)}); do not start a second program that writes in this folder"
    assert capsys.readouterr().out == f"{tmp_path}: {line}\n"


def test_a_lock_that_fails_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(InputError, match=r"cannot be locked \(Input/output error\)"):
        find_checkpoint(tmp_path, {})


def test_a_full_disk_does_not_stop_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.os, "pwrite", lambda *_: (_ for _ in ()).throw(FULL))
    locks.hold(tmp_path)
    assert tmp_path / ".lock" in locks._held


def test_a_lock_file_that_was_removed_meanwhile_is_created_again(tmp_path, monkeypatch):
    real = locks.take

    def lock(descriptor, folder):
        monkeypatch.setattr(locks, "take", real)
        (folder / ".lock").unlink()
        return real(descriptor, folder)

    monkeypatch.setattr(locks, "take", lock)
    locks.hold(tmp_path)
    assert os.fstat(locks._held[tmp_path / ".lock"]).st_nlink == 1


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path):
    locks.hold(tmp_path / "a" / "b")
    (tmp_path / "c").mkdir()
    locks.hold(tmp_path / "c")  # this process has not created it
    locks.hold(tmp_path / "d")
    (tmp_path / "d" / "file").touch()
    locks.release()
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]
    assert locks._held == {}


def test_two_new_runs_never_choose_one_folder(tmp_path, monkeypatch):
    chosen = [choose_folder(str(tmp_path / "run"), fresh=True, name="x") for _ in range(2)]
    assert [path.name for path in chosen] == ["run", "run-2"]
    monkeypatch.setattr("src.files.first_free", lambda folder: folder.with_name("free"))
    (tmp_path / "run").mkdir(exist_ok=True)
    assert choose_folder(str(tmp_path / "run"), fresh=True, name="x").name == "free"


def test_other_ranks_read_the_file_that_rank_0_read(run_ranks):
    """The last checkpoint becomes readable between the two."""
    found = run_ranks(
        2,
        """
        from src import checkpoint, run
        for name, epoch in (("checkpoint_previous", 1), ("checkpoint", 2)):
            checkpoint.save(out / f"{name}.pt", {"config": {}, "history": [], "epoch": epoch, "done": 0})
        distributed.barrier()
        if rank == 0:
            whole = (out / "checkpoint.pt").read_bytes()
            (out / "checkpoint.pt").write_bytes(whole[:99])
            real = run._read_checkpoint

            def read(folder, name, **words):
                state = real(folder, name, **words)
                (out / "checkpoint.pt").write_bytes(whole)
                return state

            run._read_checkpoint = read
        epoch = run.find_checkpoint(out, {})["epoch"]
        torch.save(epoch, out / f"{rank}.pt")
        """,
    )
    assert found == [1, 1]


def test_an_error_of_rank_0_is_that_of_all_ranks(run_ranks):
    found = run_ranks(
        2,
        """
        from src.errors import InputError

        def fail():
            raise InputError(f"rank {rank}")

        try:
            distributed.on_main(fail)
        except InputError as error:
            torch.save((str(error), distributed.on_main(lambda: rank)), out / f"{rank}.pt")
        """,
    )
    assert found == [("rank 0", 0)] * 2


# ---- errors of the operating system ---------------------------------------------------------------------------------


def at_step(monkeypatch, number, action):
    """Call a function when this many steps are finished."""
    real = Progress.advance

    def advance(progress, *words):
        real(progress, *words)
        if progress.done == 60 * number:
            action()

    monkeypatch.setattr(Progress, "advance", advance)


def test_a_folder_that_is_renamed_during_the_run_is_one_line(train, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    at_step(monkeypatch, 6, lambda: folder.rename(tmp_path / "elsewhere"))
    status, _, errors = train()
    assert status == 1
    assert errors.count("\n") == 1
    assert (
        f"{folder}/checkpoint.pt cannot be written (No such file or directory); {folder}/checkpoint.pt (epoch 1, step 0) is gone"
        in errors
    )
    assert checkpoint.load(tmp_path / "elsewhere" / "checkpoint.pt")["epoch"] == 1


@pytest.mark.parametrize("name", ["checkpoint_2.pt", "checkpoint_previous.pt", "metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file_during_the_run_is_one_line(train, tmp_path, monkeypatch, name):
    def put():
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).mkdir()

    at_step(monkeypatch, 6, put)
    status, _, errors = train()
    assert status == 1
    assert errors.count("\n") == 1
    epoch = 1 if "previous" in name else 2
    assert (
        f"{name}: Is a directory; the last checkpoint, {tmp_path}/run/checkpoint.pt (epoch {epoch}, step 0)" in errors
    )
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == epoch


def test_a_folder_with_the_name_of_a_temporary_file_does_no_harm(train, tmp_path):
    (tmp_path / "run" / ".checkpoint.pt.part").mkdir(parents=True)
    assert train()[0] == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(1, "Operation not permitted", "/a/b"), "/a/b: Operation not permitted"),
        (OSError(5, "Input/output error"), "Input/output error (OSError)"),
        (FileNotFoundError(2, "No such file", "/a", None, "/b"), "/a -> /b: No such file"),
        (OSError("a\nb"), "a b (OSError)"),
        (
            OSError(28, "No space left on device", "/a"),
            "/a cannot be written (No space left on device): free some space",
        ),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe (BrokenPipeError)"),
        (
            RuntimeError("value cannot be converted to type float without overflow"),
            "a number is too large for float32 (value cannot be converted to type float without overflow): "
            "use a smaller learning rate or smaller weights of the loss",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"),
            "a process that reads the images was killed, perhaps for lack of memory (DataLoader worker (pid 7) is killed by "
            "signal: Killed. ): use fewer --workers",
        ),
        (
            RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"),
            "the processes that read the images cannot hand them over (unable to write to file </torch_1_2_3>: No space left "
            "on device (28)): free some space in /dev/shm, or use fewer --workers",
        ),
        (
            FileNotFoundError(2, "No such file", "/a\x1b[31m\udcff\n"),
            "/a\\x1b[31m\\udcff : No such file",
        ),
        (MemoryError(), "there is not enough memory (MemoryError): use smaller batches or a smaller network"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes.\nmore"),
            "there is not enough memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes.): "
            "use smaller batches or a smaller network",
        ),
    ],
)
def test_errors_of_the_operating_system_are_one_line(error, line, capfd):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 1
    assert capfd.readouterr().err.endswith(f": error: {line}\n")


def test_another_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="unexpected"):
        run_script(lambda: (_ for _ in ()).throw(RuntimeError("unexpected")))


def test_all_ranks_end_when_rank_0_cannot_save(run_ranks):
    found = run_ranks(
        2,
        """
        from src import checkpoint, run
        from src.errors import RunError

        class Stub:
            def state_dict(self):
                return {"epoch": 1, "done": 0}

        keeper = run.Run(out / "run", {}, None, log=False)
        (out / "run" / "checkpoint.pt").mkdir(exist_ok=True)
        distributed.barrier()
        try:
            keeper.save(Stub())
        except RunError as error:
            torch.save(str(error), out / f"{rank}.pt")
        """,
    )
    assert found[0] == found[1]
    assert found[0].endswith("; no checkpoint has been saved yet")


# ---- numbers that are not finite ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_in_the_first_epoch_claims_no_checkpoint(train, tmp_path):
    status, out, errors = train("--lr", "1e30")
    assert status == 1
    assert errors.count("\n") == 1
    assert "not finite" in errors
    assert errors.endswith("; no checkpoint has been saved yet\n")
    assert "saved" not in out
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_later_names_the_last_checkpoint(train, tmp_path, monkeypatch):
    real = Trainer.train_epoch

    def spoiled(trainer, progress):
        if trainer.epoch == 1:
            with torch.no_grad():
                next(trainer.method.parameters()).fill_(torch.nan)
        return real(trainer, progress)

    monkeypatch.setattr(Trainer, "train_epoch", spoiled)
    status, _, errors = train()
    assert status == 1
    assert errors.endswith(f"; the last checkpoint, {tmp_path}/run/checkpoint.pt (epoch 1, step 0), is kept\n")
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1


def test_weights_that_the_last_step_ruins_are_not_saved(train, tmp_path):
    """One step per epoch: its loss is finite, what it leaves is not."""
    status, out, errors = train("--lr", "3e38", "--batch-size", "240", "--queue-length", "0", epochs=1)
    assert status == 1
    assert "the weights are not finite after step 1" in errors
    assert "saved" not in out
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# ---- stopping and continuing ----------------------------------------------------------------------------------------


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


def test_without_an_output_folder_the_command_that_continues_is_printed(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stop_at(monkeypatch, 3)
    status, out, _ = train(folder="")
    assert status == 128 + signal.SIGTERM
    (folder,) = (tmp_path / "runs").iterdir()
    command = out.splitlines()[-1].split("`")[1]
    assert out.splitlines()[-1].endswith(f"at step 4; `{command}` continues from there")
    python, program, *words = shlex.split(command)
    assert (python, program) == ("python", "train.py")
    assert words[-2:] == ["--output-dir", str(folder.relative_to(tmp_path))]
    run_here("train", *words)
    assert epochs_in(folder) == [1, 2]


def test_with_fresh_the_command_that_continues_is_printed_without_it(train, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    stop_at(monkeypatch, 3)
    _, out, _ = train("--fresh")
    words = shlex.split(out.splitlines()[-1].split("`")[1])
    assert "--fresh" not in words
    assert words.count("--output-dir") == 1
    assert words[-1] == str(tmp_path / "run-2")


def test_the_first_signal_is_acknowledged(train, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3, signal.SIGINT)
    status, out, errors = train()
    assert (status, errors) == (130, "")
    step = int(re.search(r"SIGINT: finishing step (\d+), then saving; press Ctrl-C again to end at once", out)[1])
    assert f"stopped by SIGINT: saved {tmp_path}/run/checkpoint.pt at step {step};" in out


def test_a_signal_after_the_ranks_have_agreed_stops_after_the_next_step(train, tmp_path, monkeypatch):
    real = Trainer._update

    def update(trainer, *words):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(trainer, *words)

    monkeypatch.setattr(Trainer, "_update", update)
    _, out, _ = train()
    assert "SIGTERM: finishing step 4, then saving\n" in out
    assert f"stopped by SIGTERM: saved {tmp_path}/run/checkpoint.pt at step 4;" in out


BLOCKED = """
import ctypes, os, signal, sys, threading, time
sys.path.insert(0, "tests")
from src.errors import run_script
from src.logs import Progress
from src.trainer import Trainer
from evaluating import run_here

times = int(sys.argv[1])
c, lock, answered = ctypes.CDLL(None), ctypes.create_string_buffer(64), threading.Event()
forward, say = Trainer._forward, Progress.say


def blocked(trainer, batch):
    c.pthread_mutex_lock(lock)
    threading.Thread(target=interrupt, daemon=True).start()
    c.pthread_mutex_lock(lock)  # C code that signals do not interrupt
    c.pthread_mutex_unlock(lock)
    return forward(trainer, batch)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    answered.wait(60)
    if times == 2:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    c.pthread_mutex_unlock(lock)


def heard(progress, line):
    say(progress, line)
    if "finishing" in line:
        answered.set()


Trainer._forward, Progress.say = blocked, heard
run_script(lambda: run_here("train", *sys.argv[2:]))
"""


def test_signals_are_answered_while_c_code_runs(data, start_program, tmp_path):
    words = ["--data", data, *SHORT, "--epochs", "1", "--output-dir", tmp_path / "run"]
    end = start_program("-c", BLOCKED, "1", *words).finish(50)
    assert end.returncode == 130
    assert end.stdout.index("SIGINT: finishing step 1, then saving") < end.stdout.index("stopped by SIGINT: saved")

    end = start_program("-c", BLOCKED, "2", *words).finish(50)
    assert end.returncode == 130
    last = f"the last checkpoint, {tmp_path}/run/checkpoint.pt (epoch 0, step 1), is kept"
    assert end.stderr == f"train.py: interrupted again, ended at once; {last}\n"


def test_a_finished_run_gets_more_epochs(train, tmp_path):
    train(epochs=1)
    status, out, _ = train(epochs=2)
    assert status == 0
    assert "the finished run of 1 epochs gets 2: the learning rate follows the schedule of 2 epochs from here on" in out
    assert "The result is not that of a run that began with --epochs 2" in out
    assert epochs_in(tmp_path / "run") == [1, 2]
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["extended"] == [1]
    assert read_json(tmp_path / "run", "config")["epochs"] == 2
    status, out, _ = train(epochs=2)
    assert "the run is finished; --epochs above 2 continues it" in out
    assert "the finished run of" not in out


def test_a_longer_run_can_be_stopped_and_continued_bit_for_bit(train, tmp_path, monkeypatch):
    for folder in ("run", "other"):
        train(epochs=1, folder=folder)
    train(epochs=3)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        train(epochs=3, folder="other")
    train(epochs=3, folder="other")
    one, two = (checkpoint.load(tmp_path / folder / "checkpoint.pt") for folder in ("run", "other"))
    assert one["extended"] == two["extended"] == [1]
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())


@pytest.mark.parametrize(("before", "now", "stop"), [(2, 1, False), (2, 3, True)])
def test_other_changes_of_the_number_of_epochs_are_refused_with_the_reason(train, monkeypatch, before, now, stop):
    with monkeypatch.context() as patch:
        if stop:
            stop_at(patch, 2)
        train(epochs=before)
    status, _, errors = train(epochs=now)
    assert status == 2
    assert f"--epochs {before} (now {now}); the learning rate of every epoch depends on --epochs" in errors


def test_a_checkpoint_without_an_option_that_came_later_continues(tmp_path):
    config = {"lr": 1.0, "data": "digits"}
    checkpoint.save(tmp_path / "checkpoint.pt", {"config": config, "history": [], "epoch": 1, "done": 0})
    now = {**config, **checkpoint.LATER_OPTIONS, **checkpoint.LATER_OF_TRAINING}
    assert find_checkpoint(tmp_path, now)["epoch"] == 1
    with pytest.raises(InputError, match=r"--subset  \(now imagenet-50\)"):
        find_checkpoint(tmp_path, {**now, "subset": "imagenet-50"})
    with pytest.raises(InputError, match=r"--newer None \(now \)"):  # an option that LATER_OPTIONS does not name
        find_checkpoint(tmp_path, {**now, "newer": ""})


# ---- numbers of flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (parse_train, ["--seed", "99999999999999999999"]),
        (parse_train, ["--seed", str(2**63)]),
        (parse_train, ["--epochs", str(2**31)]),
        (parse_train, ["--classes", "10", str(10**30)]),
        (parse_train, ["--lr", "1e308"]),
        (parse_train, ["--workers", "2000"]),
        (parse_train, ["--local-crops-size", "40000"]),
        (parse_train, ["--global-crops-number", "2000"]),
        (parse_train, ["--base-lr", "1e39"]),
        (parse_train, ["--base-lr", "3e38", "--batch-size", "512"]),
        (parse_train, ["--backbone-weight-decay", "1e39"]),
        (parse_train, ["--global-crops-scale", "1e39", "1"]),
        (parse_lincls_eval, ["--checkpoint", "x", "--fast", "--fast-lrs", "nan"]),
        (parse_lincls_eval, ["--checkpoint", "x", "--fast", "--fast-weight-decays", "0", "1e999"]),
        (parse_lincls_eval, ["--checkpoint", "x", "--seed", "-1"]),
    ],
)
def test_numbers_beyond_their_type_are_one_line(parse, words, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: parse(words))
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_largest_seed_trains(train):
    assert train("--seed", str(2**63 - 1), epochs=1)[0] == 0


def test_a_run_continues_after_its_images_moved_but_not_with_other_images(run_program, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(pictures / f"{i}.png")
    (pictures / "notes.txt").touch()
    words = ("train.py", "--workers", "1", "--output-dir", tmp_path / "run", "--no-in-memory")
    first = run_program(*words, "--data", pictures, "--epochs", "1")
    assert first.returncode == 0, first.stderr
    assert "files that are not read: 1 .txt" in first.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"], config["upright"]) == (str(pictures), True)
    moved = pictures.rename(tmp_path / "moved")
    again = run_program(*words, "--data", os.path.relpath(moved), "--epochs", "2")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(moved)
    (moved / "11.png").rename(moved / "12.png")
    other = run_program(*words, "--data", moved, "--epochs", "3")
    assert other.returncode == 2
    assert "holds a run on other images" in other.stderr
