"""The linear probe: its arithmetic by hand, what must not change, ranks, stopping, and the program on digits."""

import fcntl
import math
import os
import shutil
import signal
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluating import (
    CLOSE,
    EARLIER,
    FILES,
    SMALL,
    make_pictures,
    read_json,
    run_here,
    same_history,
    save_exact,
    save_untrained,
)
from torch import nn

from src import checkpoint, config, fingerprints
from src.config import ViewSettings, parse_lincls_eval
from src.config.flags import comments_of
from src.data.datasets import ImageFiles, open_data
from src.data.loaders import Batch, TrainLoader
from src.data.subsets import keep_rows
from src.data.views import build_views
from src.errors import InputError, RunError
from src.evaluation import linear
from src.evaluation.probe import LinearProbe, build_probe_optimizer, rate_factor
from src.evaluation.search import fit_linear, search, top_hits
from src.loading import load_backbone, load_method
from src.logs import Progress
from src.models.backbones import SmallConvNet, build_backbone, pool_windows
from src.preprocessing import IMAGENET
from src.trainer import Trainer

QUIET = Progress(1, 0, enabled=False)
CPU = torch.device("cpu")
LAST = f"{linear.NAME}.pt"


# --------------------------------------------------------------------------------------------------------------------
# the arithmetic, in float64


class FixedBatches:
    """Stands in for a loader: the same batches in the same order in every epoch."""

    too_many_damaged, waited = False, 0.0

    def __init__(self, images, batch_size):
        self.data, self.batch_size, self.per_rank, self.images = images, batch_size, batch_size, len(images)

    def __len__(self):
        return math.ceil(self.images / self.batch_size)

    def images_until(self, step):
        return min(step * self.batch_size, self.images)

    def epoch(self, epoch, start=0):
        for rows in list(torch.arange(self.images).split(self.batch_size))[start:]:
            yield Batch([self.data[rows]], rows)


class Pixels(nn.Module):
    """A backbone without weights."""

    width = 6

    def forward(self, images):
        return images.flatten(1)


def by_hand(x, y, weight, bias, optimizer, lr, decay, epochs, batch_size):
    """Softmax regression by SGD with momentum 0.9, one rate per epoch, written with nothing but NumPy.

    Returns the weight, the bias, and the mean loss over the images of each epoch.
    """
    weight, bias, losses = weight.copy(), bias.copy(), np.zeros(epochs)
    buffers = [np.zeros_like(weight), np.zeros_like(bias)]
    for epoch in range(epochs):
        rate = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for first in range(0, len(x), batch_size):
            rows, labels = x[first : first + batch_size], y[first : first + batch_size]
            z = np.exp(rows @ weight.T + bias)
            error = z / z.sum(axis=1, keepdims=True)
            losses[epoch] -= np.log(error[np.arange(len(rows)), labels]).sum() / len(x)
            error[np.arange(len(rows)), labels] -= 1
            for p, grad, buffer in zip(
                (weight, bias), (error.T @ rows / len(rows), error.mean(axis=0)), buffers, strict=True
            ):
                if optimizer == "sgd":
                    grad = grad + decay * p
                elif np.linalg.norm(p) > 0:
                    size, steep = np.linalg.norm(p), np.linalg.norm(grad)
                    grad = 0.001 * size / (steep + decay * size + 1e-8) * (grad + decay * p)
                buffer *= 0.9
                buffer += grad
                p -= rate * buffer
    return weight, bias, losses


@pytest.mark.parametrize(("optimizer", "lr", "decay"), [("sgd", 0.3, 0.01), ("lars", 0.8, 0.0), ("lars", 8.0, 0.1)])
def test_a_probe_is_softmax_regression(optimizer, lr, decay):
    torch.manual_seed(0)
    images, labels = torch.randn(11, 1, 2, 3, dtype=torch.float64), torch.randint(4, (11,))
    probe = LinearProbe(Pixels(), 4, labels).double()
    assert probe.fc.weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert not probe.fc.bias.any()
    start = [p.detach().numpy().copy() for p in (probe.fc.weight, probe.fc.bias)]
    loader, factor = FixedBatches(images, 4), rate_factor("cosine", 3)  # the last batch has three images
    trainer = Trainer(
        probe,
        build_probe_optimizer(probe, optimizer, lr=lr, momentum=0.9, weight_decay=decay),
        lambda step: factor(step // len(loader)),
        loader=loader,
        device=CPU,
    )
    summaries = [trainer.train_epoch(QUIET) for _ in range(3)]
    assert [summary["lr"] for summary in summaries] == pytest.approx([lr, 0.75 * lr, 0.25 * lr])
    expected = by_hand(images.flatten(1).numpy(), labels.numpy(), *start, optimizer, lr, decay, 3, 4)
    np.testing.assert_allclose(probe.fc.weight.detach(), expected[0], rtol=1e-10)
    np.testing.assert_allclose(probe.fc.bias.detach(), expected[1], rtol=1e-10)
    assert [summary["loss"] for summary in summaries] == pytest.approx(expected[2], rel=1e-10)


class Ramp(nn.Module):
    """A backbone of width 2 whose last map counts its 7 × 7 places row by row, scaled by the image in channel 1."""

    width = 2

    def __init__(self):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images):
        places = torch.arange(49, dtype=images.dtype).view(1, 1, 7, 7).expand(len(images), 1, 7, 7)
        return self.avgpool(torch.cat([places, places * images.mean(dim=(1, 2, 3), keepdim=True)], dim=1)).flatten(1)


def test_windows_of_the_last_map_by_hand():
    backbone = Ramp()
    images = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    torch.testing.assert_close(backbone(images), torch.tensor([[24.0, 48], [24, -24]]))
    assert pool_windows(backbone, 6, in_channels=1, image_size=4) == 8
    # the mean of place 7 r + c over rows 0 to 5 and columns 0 to 5 is 7 * 2.5 + 2.5
    windows = torch.tensor([20.0, 21, 27, 28])
    expected = torch.stack([torch.cat([windows, 2 * windows]), torch.cat([windows, -windows])])
    torch.testing.assert_close(backbone(images), expected)
    for window, places in ((1, 49), (7, 1)):
        assert pool_windows(Ramp(), window, in_channels=1, image_size=4) == 2 * places
    with pytest.raises(InputError, match=r"--pool-window 8 is larger than the last feature map, which is 7 × 7"):
        pool_windows(Ramp(), 8, in_channels=1, image_size=4)
    with pytest.raises(InputError, match="--pool-window 2: the backbone does not end in global average pooling"):
        pool_windows(Pixels(), 2, in_channels=1, image_size=4)


@pytest.mark.parametrize(
    ("arch", "size", "window", "features"),
    [("resnet18", 224, 6, 4 * 512), ("small_convnet", 16, 3, 4 * 128), ("cifar_resnet18", 32, 3, 4 * 512)],
)
def test_backbones_give_one_feature_for_each_window(arch, size, window, features):
    torch.manual_seed(0)
    backbone = build_backbone(arch).eval()
    before, images = fingerprints.of_weights(backbone), torch.rand(1, 3, size, size)
    with torch.no_grad():
        whole = backbone(images)
        assert pool_windows(backbone, window, in_channels=3, image_size=size) == features == 4 * backbone.width
        found = backbone(images).view(backbone.width, 4)
        assert not torch.equal(found[:, 0], found[:, 3])
        assert fingerprints.of_weights(backbone) == before  # nothing learned is touched
        backbone.avgpool = nn.AvgPool2d(window + 1)  # the whole map
        torch.testing.assert_close(backbone(images), whole)


def test_the_features_batch_normalisation_by_hand():
    """One channel's windows share mean and variance; in evaluation the running ones count. Only what follows the backbone learns."""
    torch.manual_seed(0)
    backbone = Ramp()
    probe = LinearProbe(
        backbone, 3, num_features=pool_windows(backbone, 6, in_channels=1, image_size=4), feature_bn=True
    ).double()
    probe.train()
    images = torch.tensor([2.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    windows = np.array([20.0, 21, 27, 28])
    channels = np.stack([np.stack([windows, windows]), np.stack([2 * windows, -windows])])  # channel, image, window
    mean, variance = channels.mean(axis=(1, 2)), channels.var(axis=(1, 2))
    normed = (channels - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
    expected = normed.transpose(1, 0, 2).reshape(2, 8) @ probe.fc.weight.detach().numpy().T
    np.testing.assert_allclose(probe(images).detach(), expected, rtol=1e-9)
    np.testing.assert_allclose(probe.bn.running_mean, 0.1 * mean)
    assert set(probe.saved_state()) == {
        *("fc.weight", "fc.bias"),
        *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    optimizer = build_probe_optimizer(probe, "sgd", lr=0.1, momentum=0.9)
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == 8 * 3 + 3 + 2 * 2
    probe.eval()
    shifted = (channels - 0.1 * mean[:, None, None]) / np.sqrt(0.9 + 0.1 * variance * 8 / 7 + 1e-5)[:, None, None]
    expected = shifted.transpose(1, 0, 2).reshape(2, 8) @ probe.fc.weight.detach().numpy().T
    np.testing.assert_allclose(probe(images).detach(), expected, rtol=1e-9)


def test_schedules_by_epoch():
    cosine = rate_factor("cosine", 100)
    assert [cosine(e) for e in (0, 25, 50, 99)] == pytest.approx([1, 0.8535533906, 0.5, 0.0002467198], rel=1e-6)
    step = rate_factor("step", 20, decay_epochs=(12, 16), gamma=0.2)
    assert [step(e) for e in (0, 11, 12, 15, 16, 19)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])
    assert rate_factor("constant", 9)(8) == 1


def test_presets_are_the_published_protocols():
    def of(*words):
        return parse_lincls_eval(["--checkpoint", "x", "--data", "somewhere", *words])

    common = {"momentum": 0.9, "nesterov": False, "crop_flip": True, "finetune": False, "schedule": "cosine"}
    common |= {"epochs": 100, "train_share": 1.0}
    expected = {
        "self_classifier": {**common, "optimizer": "lars", "batch_size": 4096, "lr": 0.8, "weight_decay": 0.0},
        "swav": {**common, "optimizer": "sgd", "batch_size": 256, "lr": 0.3, "weight_decay": 1e-6},
    }
    expected["swav"] |= {"pool_window": 0, "feature_bn": False}
    expected["swav_2x2"] = {**expected["swav"], "pool_window": 6}
    semi = {**common, "optimizer": "sgd", "batch_size": 256, "weight_decay": 0.0, "finetune": True, "train_bn": True}
    semi |= {"epochs": 20, "schedule": "step", "decay_epochs": (12, 16), "gamma": 0.2}
    expected["swav_semi_1"] = {**semi, "lr": 5.0, "backbone_lr": 0.02, "train_share": 0.01}
    expected["swav_semi_10"] = {**semi, "lr": 0.2, "backbone_lr": 0.01, "train_share": 0.1}
    for preset, values in expected.items():
        options = config.as_plain(of("--preset", preset))
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        assert {name: options[name] for name in values} == values, preset
        assert options["preset"] == preset
    assert of().preset == "self_classifier"
    assert of("--lr", "2", "--preset", "swav").lr == 2
    assert of("--preset", "swav_semi_1", "--train-list", "1percent.txt").train_share == 1
    trained = {"data": "digits", "data_root": "", "subset": "", "subset_file": "s.txt"}
    assert parse_lincls_eval(["--checkpoint", "x"], trained).preset == "digits"
    assert parse_lincls_eval(["--checkpoint", "x"], trained).subset_file == "s.txt"
    assert parse_lincls_eval(["--checkpoint", "x", "--data", "elsewhere"], trained).subset_file == ""
    found = parse_lincls_eval(["--checkpoint", "x", "--subset", "imagenet-50"], trained)
    assert (found.subset, found.subset_file) == ("imagenet-50", "")
    trained |= {"subset": "imagenet-200", "subset_file": ""}
    assert parse_lincls_eval(["--checkpoint", "x"], trained).subset == "imagenet-200"
    found = parse_lincls_eval(["--checkpoint", "x", "--subset-file", "s.txt"], trained)
    assert (found.subset, found.subset_file) == ("", "s.txt")


def test_top_hits_by_hand_and_with_few_classes():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1]])
    assert top_hits(logits, torch.tensor([4, 1, 6])).tolist() == [1, 2]
    assert top_hits(logits[:, :3], torch.tensor([2, 2, 0])).tolist()[1] == 3


# --------------------------------------------------------------------------------------------------------------------
# what changes and what does not


def digits_views():
    return build_views("digits", None, ViewSettings(global_crops_number=1, local_crops_number=0, global_crops_size=8))


def digits_probe(finetune=False, train_bn=False, rows=40, batch_size=16, **rates):
    """A probe of some digits, and the trainer around it."""
    torch.manual_seed(0)
    data = keep_rows(open_data("digits", "train"), np.arange(rows))
    loader = TrainLoader(data, digits_views(), batch_size=batch_size, seed=0, device=CPU, keep_last=True)
    probe = LinearProbe(SmallConvNet(1), 10, data.labels, finetune=finetune, train_bn=train_bn)
    optimizer = build_probe_optimizer(probe, "sgd", **{"lr": 0.1, "momentum": 0.0, **rates})
    return probe, Trainer(probe, optimizer, lambda step: 1.0, loader=loader, device=CPU)


def test_a_frozen_backbone_keeps_every_bit_and_a_changed_one_is_noticed():
    probe, trainer = digits_probe()
    layer = probe.fc.weight.detach().clone()
    trainer.train_epoch(QUIET)
    assert not torch.equal(layer, probe.fc.weight)
    assert probe.before == fingerprints.of_weights(probe.backbone)
    probe.check_unchanged()
    for name in ("layers.0.0.weight", "layers.0.1.running_mean", "layers.0.1.num_batches_tracked"):
        value = probe.backbone.state_dict()[name].view(-1)
        kept = value[0].clone()
        value[0] = kept + 1 if value.dtype == torch.long else torch.nextafter(kept, kept + 1)
        with pytest.raises(RunError, match="backbone has changed"):
            probe.check_unchanged()
        value[0] = kept
    probe.check_unchanged()


def test_an_epoch_has_every_image_once_the_last_batch_included():
    _, trainer = digits_probe(rows=39)
    batches = [step.indices for step in trainer.loader.epoch(1)]
    assert [len(indices) for indices in batches] == [16, 16, 7]
    assert len(trainer.loader) == 3
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(39))
    assert torch.equal(torch.cat([step.indices for step in trainer.loader.epoch(1, start=2)]), batches[2])


@pytest.mark.parametrize("train_bn", [False, True])
def test_fine_tuning_moves_the_backbone_by_its_own_rate(train_bn):
    probe, trainer = digits_probe(True, train_bn, rows=16, backbone_lr=0.02)
    before = {name: p.detach().clone() for name, p in probe.named_parameters()}
    buffers = {name: b.clone() for name, b in probe.backbone.named_buffers("backbone")}
    (batch,) = trainer.loader.epoch(0)
    probe.train()
    gradients = torch.autograd.grad(
        F.cross_entropy(probe(batch.views[0]), probe.labels[batch.indices]), [*probe.parameters()]
    )
    probe.load_saved_state({**before, **buffers})
    trainer.train_epoch(QUIET)
    for (name, p), grad in zip(probe.named_parameters(), gradients, strict=True):
        rate = 0.1 if name.startswith("fc.") else 0.02
        assert grad.any()
        torch.testing.assert_close(p.detach(), before[name] - rate * grad)
    same = [torch.equal(value, buffers[name]) for name, value in probe.backbone.named_buffers("backbone")]
    assert not any(same) if train_bn else all(same)


# --------------------------------------------------------------------------------------------------------------------
# many settings at once


def test_settings_trained_together_are_those_trained_alone():
    torch.manual_seed(0)
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
    settings = [(0.1, 0.0), (1.0, 0.01), (0.5, 0.1)]
    weight, bias = fit_linear(x, y, 3, settings=settings, epochs=4, batch_size=8, momentum=0.9)
    for s, (lr, decay) in enumerate(settings):
        layer = nn.Linear(5, 3).double()
        layer.requires_grad_(False).weight.zero_(), layer.bias.zero_()
        layer.requires_grad_(True)
        optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=decay)
        for epoch in range(4):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / 4))
            order = np.random.default_rng([0, epoch]).permutation(30)
            for first in range(0, 30, 8):
                rows = order[first : first + 8]
                optimizer.zero_grad()
                F.cross_entropy(layer(x[rows]), y[rows]).backward()
                optimizer.step()
        torch.testing.assert_close(weight[:, s].T, layer.weight.detach())
        torch.testing.assert_close(bias[s], layer.bias.detach())


def test_the_search_never_sees_the_test_images_and_keeps_only_images():
    torch.manual_seed(0)
    y = torch.arange(4).repeat_interleave(20)
    x = 3 * F.one_hot(y, 6).float() + torch.randn(80, 6)
    labels = torch.cat([y, torch.tensor([4])])  # one class with an only image: it is fitted on
    found = search(
        torch.cat([x, x[:1]]),
        labels,
        test=x,
        test_labels=y.flip(0),
        num_classes=5,
        lrs=(0.1, 1.0),
        weight_decays=(0.0, 0.01),
        epochs=5,
        momentum=0.9,
    )
    assert found["held_out_images"] == 16
    assert found["chosen"]["top1"] > 0.8  # although the test labels are wrong
    assert found["top1"] < 0.2
    with pytest.raises(InputError, match="--held-out"):
        search(x[::20], y[::20], test=x, test_labels=y, num_classes=4, lrs=(0.1,), weight_decays=(0.0,), momentum=0.9)


# --------------------------------------------------------------------------------------------------------------------
# the program


lincls = partial(run_here, "lincls_eval")
read = partial(read_json, name="lincls_eval")


@pytest.fixture
def untrained(tmp_path):
    return save_untrained(tmp_path / "run" / "checkpoint.pt", "--classes", "10", seed=1)


def accuracy_by_hand(given, saved):
    """Top-1 and top-5 of a saved linear layer on the digits' test split."""
    method, _ = load_method(given)
    saved = checkpoint.load(saved)["model"]
    data = open_data("digits", "test")
    with torch.no_grad():
        features = method.backbone(2 * data.images.float() / 255 - 1)
    logits = (features @ saved["fc.weight"].T + saved["fc.bias"]).numpy()
    own = logits[np.arange(len(logits)), data.labels]
    rank = (logits > own[:, None]).sum(axis=1)
    return (rank < 1).mean(), (rank < 5).mean()


def test_end_to_end_on_digits(tmp_path, capsys):
    run = tmp_path / "run"
    run_here("train", "--epochs", "2", "--warmup-epochs", "1", "--output-dir", run)
    before = (run / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    lincls("--checkpoint", run)
    result = read(run)
    assert (run / "checkpoint.pt").read_bytes() == before
    assert result["options"]["preset"] == "digits"
    assert (result["train_images"], result["test_images"], result["classes"]) == (1437, 360, 10)
    assert "preset digits: sgd, batch 128, lr 1" in result["protocol"]
    assert [row["epoch"] for row in result["history"]] == list(range(1, 31))
    tops = [row["top1"] for row in result["history"]]
    assert result["top1"] == max(tops)
    assert result["best_epoch"] == tops.index(max(tops)) + 1
    best, last = (accuracy_by_hand(run, run / name) for name in (linear.BEST, LAST))
    assert (result["top1"], result["top5"]) == pytest.approx(best, abs=CLOSE)
    assert (result["last_top1"], result["last_top5"]) == pytest.approx(last, abs=CLOSE)
    assert result["top1"] > 0.9
    assert f"{100 * result['top1']:.1f}" in capsys.readouterr().out


def test_help_needs_no_torch_and_every_flag_has_help(run_python):
    done = run_python("-X", "importtime", "lincls_eval.py", "--help")
    assert done.returncode == 0
    assert "--backbone-lr" in done.stdout
    assert " torch\n" not in done.stderr
    comments = comments_of(config.LinclsEvalOptions)
    assert all(comments[field] for field in config.LinclsEvalOptions.__annotations__)


@pytest.fixture
def stop_at(monkeypatch):
    """Ask the trainer to stop, as a signal does, in its n-th step from now on."""

    def arrange(step):
        agree, steps = Trainer._agree, []

        def counting(self, losses):
            steps.append(1)
            if len(steps) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return agree(self, losses)

        monkeypatch.setattr(Trainer, "_agree", counting)

    return arrange


def same_weights(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def without_times(history):
    return [{key: v for key, v in row.items() if key not in ("seconds", "images_per_second")} for row in history]


def test_a_stopped_probe_goes_on_bit_for_bit(untrained, tmp_path, stop_at, capsys):
    words = ("--checkpoint", untrained, "--epochs", "3", "--crop-flip", "--batch-size", "500", "--momentum", "0.5")
    lincls(*words, "--output-dir", tmp_path / "whole")
    stop_at(5)
    with pytest.raises(SystemExit) as stopped:
        lincls(*words, "--output-dir", tmp_path / "stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    state = checkpoint.load(tmp_path / "stopped" / LAST)
    assert (state["epoch"], state["done"]) == (1, 2)
    assert not (tmp_path / "stopped" / "lincls_eval.json").exists()

    with pytest.raises(InputError, match=r"holds an unfinished probe with other options: --lr 1.0 \(now 0.5\)"):
        lincls(*words, "--output-dir", tmp_path / "stopped", "--lr", "0.5")
    shutil.copytree(tmp_path / "stopped", tmp_path / "fresh")
    lincls(*words, "--output-dir", tmp_path / "fresh", "--lr", "0.5", "--fresh")
    capsys.readouterr()

    lincls(*words, "--output-dir", tmp_path / "stopped")
    assert "resuming from epoch 2, step 3" in capsys.readouterr().out
    whole, resumed = (checkpoint.load(tmp_path / name / LAST) for name in ("whole", "stopped"))
    assert same_weights(whole["model"], resumed["model"])
    for one, two in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values(), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])
    assert without_times(whole["history"]) == without_times(resumed["history"])
    assert resumed["history"] == read(tmp_path / "stopped")["history"]

    # finished: the same command repeats the result, other options begin anew
    lincls(*words, "--output-dir", tmp_path / "stopped")
    assert "the probe is already finished" in capsys.readouterr().out
    lincls(*words, "--output-dir", tmp_path / "stopped", "--epochs", "1")
    assert len(read(tmp_path / "stopped")["history"]) == 1


def test_a_probe_that_an_earlier_version_left_goes_on(tmp_path, capsys):
    """Files of the trainer that probes had until November 2026, stopped in the second of three epochs, and finished."""
    given = save_exact(tmp_path / "run" / "checkpoint.pt")
    stopped, finished = (checkpoint.load(FILES / f"probe_{name}.pt") for name in ("stopped", "finished"))
    assert (stopped["epoch"], stopped["done"], "totals" in stopped) == (1, 2, False)
    assert stopped["config"]["backbone"] == fingerprints.of_weights(load_backbone(given)[0])
    (tmp_path / "out").mkdir()
    shutil.copy(FILES / "probe_stopped.pt", tmp_path / "out" / LAST)
    words = ("--checkpoint", given, "--output-dir", tmp_path / "out", *EARLIER)
    with pytest.raises(InputError, match=r"unfinished probe with other options: --lr 0\.2 \(now 0\.3\)"):
        lincls(*words, "--lr", "0.3")
    lincls(*words)
    assert "resuming from epoch 2, step 3" in capsys.readouterr().out
    result, state = read(tmp_path / "out"), checkpoint.load(tmp_path / "out" / LAST)
    assert result["best_epoch"] == 2
    assert result["history"][0] == stopped["history"][0]
    same_history(result["history"], finished["history"])
    for name, value in finished["model"].items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-3, atol=1e-5)
    for one, two in zip(finished["optimizer"]["state"].values(), state["optimizer"]["state"].values(), strict=True):
        torch.testing.assert_close(two["momentum_buffer"], one["momentum_buffer"], rtol=1e-3, atol=1e-5)

    shutil.copy(FILES / "probe_finished.pt", tmp_path / "out" / LAST)
    lincls(*words)
    assert "the probe is already finished" in capsys.readouterr().out
    assert read(tmp_path / "out")["history"] == finished["history"]


def test_a_damaged_probe_goes_on_from_the_one_before(untrained, tmp_path, stop_at, capsys):
    words = ("--checkpoint", untrained, "--epochs", "3", "--batch-size", "500", "--output-dir", tmp_path / "out")
    stop_at(8)
    with pytest.raises(SystemExit):
        lincls(*words)
    before = checkpoint.load(tmp_path / "out" / "lincls_eval_previous.pt")
    assert [(state["epoch"], state["done"]) for state in (before, checkpoint.load(tmp_path / "out" / LAST))] == [
        (2, 0),
        (2, 2),
    ]
    (tmp_path / "out" / LAST).write_bytes(b"nothing")
    capsys.readouterr()
    lincls(*words)
    printed = capsys.readouterr().out
    assert "resuming from the previous checkpoint, lincls_eval_previous.pt" in printed
    assert "resuming from epoch 3, step 1" in printed
    assert (tmp_path / "out" / "lincls_eval_damaged.pt").read_bytes() == b"nothing"
    assert checkpoint.load(tmp_path / "out" / LAST)["epoch"] == 3


def test_the_best_probe_is_written_even_if_the_process_ends_between_two_files(untrained, tmp_path, monkeypatch):
    words = ("--checkpoint", untrained, "--epochs", "1", "--batch-size", "500", "--output-dir", tmp_path / "out")
    save = checkpoint.save

    def end_before_the_best(path, state):
        if path.name == linear.BEST:
            raise KeyboardInterrupt
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", end_before_the_best)
    with pytest.raises(KeyboardInterrupt):
        lincls(*words)
    monkeypatch.setattr(checkpoint, "save", save)
    assert checkpoint.load(tmp_path / "out" / LAST)["epoch"] == 1
    lincls(*words)
    best, last = (checkpoint.load(tmp_path / "out" / name) for name in (linear.BEST, LAST))
    assert same_weights(best["model"], last["model"])


def test_a_probe_may_run_beside_a_training_and_not_beside_another_probe(untrained, monkeypatch, capsys):
    monkeypatch.setattr("src.locks.SECONDS_TO_LEAVE", 0)
    folder, words = untrained.parent, ("--checkpoint", untrained, "--epochs", "1", "--batch-size", "1437")
    with held(folder / ".lock"):  # as by train.py
        lincls(*words)
        assert read(folder)["best_epoch"] == 1
        with pytest.raises(InputError, match=r"--output-dir .*run: another run is writing there \(process 7\)"):
            run_here("train", "--classes", "10", "--output-dir", folder)
    with (
        held(folder / ".lincls_eval.lock"),
        pytest.raises(InputError, match=r"another run is writing there \(process 7\)"),
    ):
        lincls(*words)


@contextmanager
def held(lock):
    """Hold a lock as another process would."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 7")
        file.flush()
        yield


def test_a_backbone_that_moves_is_not_reported(untrained, tmp_path, monkeypatch):
    """Whatever moved it: here the mean of its first normalisation, by the smallest step that float32 knows."""

    def move(probe, batch):
        mean = probe.backbone.layers[0][1].running_mean
        mean.copy_(torch.nextafter(mean, mean + 1))

    monkeypatch.setattr(LinearProbe, "after_step", move)
    with pytest.raises(RunError, match="backbone has changed"):
        lincls("--checkpoint", untrained, "--epochs", "1", "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out" / "lincls_eval.json").exists()


def test_fast_chooses_the_best_of_what_was_held_out(untrained, tmp_path, capsys):
    words = ("--checkpoint", untrained, "--fast", "--output-dir", tmp_path / "out", "--features-cache", tmp_path / "c")
    lincls(*words, "--fast-lrs", "1e-6", "0.1", "1", "--fast-weight-decays", "0", "0.1")
    result = read(tmp_path / "out")
    assert [(row["lr"], row["weight_decay"]) for row in result["settings"]] == [
        (lr, decay) for lr in (1e-6, 0.1, 1) for decay in (0, 0.1)
    ]
    tops = [(row["top1"], row["top5"]) for row in result["settings"]]
    assert result["chosen"] == result["settings"][tops.index(max(tops))]
    assert result["chosen"]["lr"] > 1e-6
    assert result["top1"] > 0.85  # of random features
    assert result["held_out_images"] == pytest.approx(0.2 * 1437, abs=5)
    assert "(chosen)" in capsys.readouterr().out
    lincls(*words, "--fast-lrs", "0.1")
    assert "taken from" in capsys.readouterr().out


def test_windows_of_the_map_are_probed(untrained, tmp_path, stop_at, capsys):
    """The digits' last map has 2 × 2 places: each its own window. Also stopped and continued, and the fast way."""
    words = ("--checkpoint", untrained, "--pool-window", "1", "--epochs", "3", "--output-dir")
    lincls(*words, tmp_path / "out", "--feature-bn")
    result = read(tmp_path / "out")
    assert result["features"] == 4 * 128
    assert "means over windows of 1 × 1 places, batch-normalised, preset digits" in result["protocol"]
    saved = checkpoint.load(tmp_path / "out" / LAST)["model"]
    assert saved["fc.weight"].shape == (10, 512)
    assert saved["bn.running_mean"].shape == (128,)
    stop_at(15)
    with pytest.raises(SystemExit):
        lincls(*words, tmp_path / "stopped", "--feature-bn")
    with pytest.raises(InputError, match=r"--feature-bn True \(now False\)"):
        lincls(*words, tmp_path / "stopped")
    lincls(*words, tmp_path / "stopped", "--feature-bn")
    resumed = checkpoint.load(tmp_path / "stopped" / LAST)["model"]
    assert same_weights(saved, resumed)

    lincls(*words, tmp_path / "fast", "--fast", "--features-cache", tmp_path / "c")
    lincls("--checkpoint", untrained, "--fast", "--output-dir", tmp_path / "whole", "--features-cache", tmp_path / "c")
    windows, whole = read(tmp_path / "fast"), read(tmp_path / "whole")
    assert (windows["features"], whole["features"]) == (512, 128)
    assert "taken from" not in capsys.readouterr().out  # other features than those of the whole map
    assert windows["backbone_sha256"] == whole["backbone_sha256"]
    with pytest.raises(
        InputError, match="--pool-window 3 is larger than the last feature map, which is 2 × 2 for images of 8 pixels"
    ):
        lincls("--checkpoint", untrained, "--pool-window", "3", "--output-dir", tmp_path / "never")


def test_few_labels_fine_tuned(untrained, tmp_path, capsys):
    words = ("--preset", "swav_semi_10", "--epochs", "2", "--lr", "0.1", "--no-crop-flip", "--schedule", "cosine")
    lincls("--checkpoint", untrained, *words, "--output-dir", tmp_path / "out")
    result = read(tmp_path / "out")
    counts = torch.bincount(open_data("digits", "train").labels).tolist()
    assert result["train_images"] == sum(round(0.1 * count) for count in counts)
    assert (
        "fine-tuning of the whole network (backbone lr 0.01, the batch's batch-norm statistics)" in result["protocol"]
    )
    assert "10 % of the labels" in result["protocol"]
    # what was fine-tuned can be probed in turn, and is another backbone
    capsys.readouterr()
    given = tmp_path / "out" / linear.BEST
    lincls("--checkpoint", given, "--fast", "--output-dir", tmp_path / "again")
    assert read(tmp_path / "again")["backbone_sha256"] != result["backbone_sha256"]
    lincls("--checkpoint", untrained, "--epochs", "1")
    with pytest.raises(InputError, match="contains no backbone"):
        lincls("--checkpoint", untrained.parent / linear.BEST, "--output-dir", tmp_path / "never")


def three_classes(top):
    colours = {"cat": (150, 30, 30), "dog": (30, 150, 30), "eel": (30, 30, 150)}
    return make_pictures(top, colours, splits=(("train", 6), ("val", 6)), size=(20, 24), noise=60)


def test_a_folder_of_photographs(tmp_path):
    given = save_untrained(tmp_path / "run.pt", *SMALL, channels=3)
    top = three_classes(tmp_path / "in")
    (tmp_path / "list.txt").write_text("cat/1.png\ndog/0.png\neel/2.png\ncat/0.png\n")
    words = ("--checkpoint", given, "--data", top, "--workers", "0", "--epochs", "6", "--optimizer", "sgd", "--lr", "1")
    lincls(*words, "--train-list", tmp_path / "list.txt", "--output-dir", tmp_path / "out")
    result = read(tmp_path / "out")
    assert (result["train_images"], result["test_images"], result["classes"]) == (4, 18, 3)
    assert result["top5"] == result["last_top5"] == 1  # of three classes
    assert result["top1"] > 0.6  # the channel names the class


def test_training_views_are_a_crop_and_a_flip():
    files = ImageFiles(["a"], torch.zeros(1, dtype=torch.long), ["a"])
    central = build_views("x", files, ViewSettings(global_crops_size=224))
    session = SimpleNamespace(views=central, view=IMAGENET, view_size=224, source=SimpleNamespace(data="x"))

    def views_of(*, crop_flip):
        return linear.training_views(SimpleNamespace(session=session, train=files), augment=crop_flip)

    views = views_of(crop_flip=True)
    (recipe,) = views.recipes
    assert (recipe.size, recipe.scale, recipe.bicubic, recipe.flip) == (224, (0.08, 1.0), False, 0.5)
    assert recipe.jitter == recipe.grayscale == recipe.blur == recipe.solarize == 0
    assert (central.eval_resize, central.eval_size) == (256, 224)
    plain = views_of(crop_flip=False)
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    (crops,) = plain.cut([image], np.array([0]), seed=0, epoch=0)
    assert torch.equal(crops[0], central.single_cut(image))
    assert torch.equal(plain.finish([crops], None, seed=0, epoch=0)[0], central.single_finish(crops))
    (whole,) = plain(image[None, :, :224, :224], np.array([0]), seed=0, epoch=0)
    assert torch.equal(whole, central.single(image[None, :, :224, :224]))


def test_backbones_of_others(tmp_path):
    torch.manual_seed(0)
    theirs = build_backbone("resnet18")
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    state["module.projection_head.0.weight"] = torch.zeros(4, 512)
    state["module.prototypes.weight"] = torch.zeros(4, 4)
    torch.save(state, tmp_path / "swav.pth.tar")
    backbone, record = load_backbone(tmp_path / "swav.pth.tar", "resnet18")
    assert fingerprints.of_weights(backbone) == fingerprints.of_weights(theirs)
    assert (record["config"]["data"], record["config"]["channels"]) == ("", 3)
    assert not backbone.training
    assert fingerprints.of_weights(load_backbone(tmp_path / "swav.pth.tar")[0]) == fingerprints.of_weights(theirs)
    with pytest.raises(InputError, match=r"--arch resnet50: .* holds resnet18: drop --arch"):
        load_backbone(tmp_path / "swav.pth.tar", "resnet50")


# --------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0"], "--lr is 0"),
        (["--lr", "-1"], "--lr is -1"),
        (["--finetune", "--backbone-lr", "0"], "--backbone-lr is 0"),
        (["--backbone-lr", "0.1"], "--backbone-lr is for --finetune"),
        (["--train-bn"], "--train-bn is for --finetune"),
        (["--fast", "--finetune"], "--fast .* --finetune"),
        (["--fast", "--feature-bn"], "--fast standardises every feature already"),
        (["--pool-window", "-1"], "--pool-window is -1"),
        (["--train-share", "0"], "--train-share is 0"),
        (["--train-share", "10"], "0.01 for 1 %"),
        (["--train-share", "0.1", "--train-list", "x"], "drop one"),
        (["--fast", "--held-out", "1"], "--held-out is 1"),
        (["--fast", "--fast-lrs", "0.1", "0"], "--fast-lrs is 0.1 0"),
        (["--fast", "--fast-weight-decays", "-1"], "--fast-weight-decays is -1"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--momentum", "1"], "--momentum is 1"),
        (["--nesterov", "--optimizer", "lars"], "--nesterov is for --optimizer sgd with momentum, not for lars"),
        (["--nesterov", "--optimizer", "adamw"], "--nesterov is for --optimizer sgd with momentum, not for adamw"),
        (["--nesterov", "--momentum", "0"], "--nesterov is for --optimizer sgd .* not for sgd with --momentum 0.0"),
        (["--momentum", "0.5", "--optimizer", "adamw"], "--momentum has no effect: --optimizer adamw has no momentum"),
        (["--decay-epochs", "3"], "--decay-epochs has no effect: --schedule is cosine, not step; drop one of them"),
        (["--gamma", "0.5", "--schedule", "constant"], "--gamma has no effect: --schedule is constant, not step"),
        (["--fast-lrs", "1"], "--fast-lrs has no effect: --fast is not given"),
        (["--fast-weight-decays", "0"], "--fast-weight-decays has no effect: --fast is not given"),
        (["--held-out", "0.5"], "--held-out has no effect: --fast is not given"),
        (["--features-cache", "x"], "--features-cache has no effect: --fast is not given"),
    ],
)
def test_contradictions_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse_lincls_eval(["--checkpoint", "x", "--data", "digits", *words])


@pytest.mark.parametrize(
    "words",
    [
        ("--decay-epochs", "3", "--gamma", "0.5", "--schedule", "step"),
        ("--fast", "--fast-lrs", "1", "--fast-weight-decays", "0", "--held-out", "0.5", "--features-cache", "x"),
        ("--fast", "--optimizer", "adamw", "--momentum", "0.5"),  # the search is always by SGD
        ("--preset", "swav_semi_1", "--gamma", "0.5"),  # whose schedule is step
        ("--nesterov", "--optimizer", "sgd"),
    ],
)
def test_the_same_flags_are_taken_where_they_have_an_effect(words):
    parse_lincls_eval(["--checkpoint", "x", "--data", "digits", *words])


def test_nesterov_is_refused_before_the_checkpoint_is_read():
    with pytest.raises(InputError, match="--nesterov is for --optimizer sgd"):
        lincls("--checkpoint", "nowhere.pt", "--data", "digits", "--optimizer", "lars", "--nesterov")


def test_bad_input_is_refused_before_anything_is_written(untrained, tmp_path):
    out = ("--output-dir", tmp_path / "out")
    with pytest.raises(InputError, match="--checkpoint is missing"):
        lincls(*out)
    with pytest.raises(InputError, match="no such file"):
        lincls("--checkpoint", tmp_path / "nothing.pt", *out)
    with pytest.raises(InputError, match=r"--arch resnet50: .* holds small_convnet"):
        lincls("--checkpoint", untrained, "--arch", "resnet50", *out)
    colour = save_untrained(tmp_path / "colour.pt", *SMALL, channels=3)
    with pytest.raises(InputError, match="images have 1 channels, but the network takes 3"):
        lincls("--checkpoint", colour, "--data", "digits", *out)
    top = three_classes(tmp_path / "in")
    with pytest.raises(InputError, match="the train split has no labels"):
        lincls("--checkpoint", colour, "--data", top / "train" / "cat", *out)
    make_pictures(tmp_path / "in", {"fox": (0, 0, 0)}, splits=(("val", 1),))
    with pytest.raises(InputError, match="3 classes in the train split, 4 in the test split; not in both: fox"):
        lincls("--checkpoint", colour, "--data", top, *out)
    shutil.rmtree(top / "val" / "fox")
    (tmp_path / "list.txt").write_text("cat/1.png\nowl/1.png\n")
    with pytest.raises(InputError, match="owl/1"):
        lincls("--checkpoint", colour, "--data", top, "--train-list", tmp_path / "list.txt", *out)
    assert not (tmp_path / "out").exists()
