"""Training on a real Slurm of two nodes: what ranks learn, how they are stopped, and what is left when one dies."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT
from slurm import SlurmCluster, why_not

from src import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]

EPOCHS = 8
STEPS = EPOCHS * 11
TINY = f"--epochs {EPOCHS} --warmup-epochs 1 --classes 10 10 20 --dim 16 --hidden-dim 32 --batch-size 128".split()
TRAIN = ("train.py", *TINY, "--device", "cpu", "--output-dir")
SRUN = ("srun", "--nodes=2", "--ntasks=2", "python", *TRAIN)


@pytest.fixture(scope="module")
def cluster():
    with SlurmCluster(ROOT) as running:
        yield running
    assert not running.processes()


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """The folder of a run under srun that nothing disturbed."""
    folder = tmp_path_factory.mktemp("slurm") / "whole"
    done = cluster.run(*SRUN, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "64 images on each of 2 x cpu" in done.stdout
    return folder


def assert_same_weights(one, two):
    one, two = (checkpoint.load(folder / "checkpoint.pt") for folder in (one, two))
    assert (one["epoch"], two["epoch"]) == (EPOCHS, EPOCHS)
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())


def in_the_middle(cluster, folder) -> tuple[subprocess.Popen, str]:
    """A run that has saved its first epoch and not ended, and its job's number."""
    name = folder.parent.name  # pytest gives each test its own
    process = cluster.popen(SRUN[0], f"--job-name={name}", *SRUN[1:], folder)
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process, cluster.job(name)


def exit_codes(errors: str) -> dict[int, int]:
    """What srun says about its tasks: rank to exit status."""
    found = re.findall(r"task (\d+): Exited with exit code (\d+)", errors)
    return {int(rank): int(code) for rank, code in found}


def assert_stopped_whole(process: subprocess.Popen, folder) -> int:
    """All ranks left at the same step and told so; returns that step."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert exit_codes(errors) == {0: 143, 1: 143}, errors
    assert "Traceback" not in errors
    step = int(re.search(r"stopped by SIGTERM: saved .* at step (\d+); the same command continues", output)[1])
    assert 0 < step < STEPS
    left = checkpoint.load(folder / "checkpoint.pt")
    assert left["epoch"] * 11 + left["done"] == step
    return step


def test_a_cluster_ends_with_what_runs_on_it():
    with SlurmCluster(ROOT) as running:
        process = running.popen("srun", "--nodes=2", "--ntasks=2", "bash", "-c", "echo here; sleep 1000")
        assert process.stdout.readline() == "here\n"
        assert len(running.processes()) > 4 + 2  # daemons, tasks
    assert not running.processes()
    assert not running.folder.exists()
    assert process.returncode != 0


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing():
    broken = SlurmCluster(ROOT, configuration="NoSuchOption=1\n")
    with pytest.raises(RuntimeError, match="NoSuchOption"), broken:
        pass
    assert not broken.processes()
    assert not broken.folder.exists()


def test_two_nodes_train_what_torchrun_trains(cluster, whole, run_python, tmp_path):
    done = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *TRAIN, tmp_path / "r")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(whole, tmp_path / "r")
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, tmp_path / "r")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_a_signal_to_the_step_saves_and_the_same_command_goes_on_bit_for_bit(cluster, whole, tmp_path):
    folder = tmp_path / "r"
    process, job = in_the_middle(cluster, folder)
    cluster.run("scancel", "--signal=TERM", f"{job}.0")
    step = assert_stopped_whole(process, folder)
    done = cluster.run(*SRUN, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from step {step} " in done.stdout
    assert_same_weights(whole, folder)


def test_a_signal_to_one_task_stops_all_ranks_at_one_step(cluster, tmp_path):
    folder = tmp_path / "r"
    process, job = in_the_middle(cluster, folder)
    os.kill(cluster.pid(job, rank=1), signal.SIGTERM)
    assert_stopped_whole(process, folder)


def test_one_killed_task_ends_the_step_and_the_last_checkpoint_loads(cluster, tmp_path):
    folder = tmp_path / "r"
    process, job = in_the_middle(cluster, folder)
    os.kill(cluster.pid(job, rank=1), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "task 1: Killed" in errors
    assert checkpoint.load(folder / "checkpoint.pt")["epoch"] >= 1
