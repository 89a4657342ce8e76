"""The linear probe: its arithmetic by hand, what must not change, ranks, stopping, and the program on digits."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import lincls_eval
from src import checkpoint, config
from src.config import parse_lincls_eval, parse_train
from src.data.datasets import ImageFiles, open_data
from src.data.loaders import Batch
from src.data.views import build_views
from src.errors import InputError, RunError
from src.evaluation import linear
from src.loading import load_backbone, load_method
from src.logs import Progress
from src.methods import build_method
from src.models.backbones import SmallConvNet, build_backbone, pool_windows

QUIET = Progress(1, 0, enabled=False)


# --------------------------------------------------------------------------------------------------------------------
# the arithmetic, in float64


class FixedBatches:
    """Stands in for a loader: the same batches in the same order in every epoch."""

    too_many_damaged = False

    def __init__(self, images, batch_size):
        self.data, self.batch_size, self.images = images, batch_size, len(images)

    def __len__(self):
        return math.ceil(self.images / self.batch_size)

    def epoch(self, epoch, start=0):
        for rows in list(torch.arange(self.images).split(self.batch_size))[start:]:
            yield Batch([self.data[rows]], rows)


class Pixels(nn.Module):
    """A backbone without weights."""

    width = 6

    def forward(self, images):
        return images.flatten(1)


def by_hand(x, y, weight, bias, optimizer, lr, decay, epochs, batch_size):
    """Softmax regression by SGD with momentum 0.9, one rate per epoch, written with nothing but NumPy."""
    weight, bias = weight.copy(), bias.copy()
    buffers = [np.zeros_like(weight), np.zeros_like(bias)]
    for epoch in range(epochs):
        rate = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for first in range(0, len(x), batch_size):
            rows, labels = x[first : first + batch_size], y[first : first + batch_size]
            z = np.exp(rows @ weight.T + bias)
            error = z / z.sum(axis=1, keepdims=True)
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
    return weight, bias


@pytest.mark.parametrize(("optimizer", "lr", "decay"), [("sgd", 0.3, 0.01), ("lars", 0.8, 0.0), ("lars", 8.0, 0.1)])
def test_a_probe_is_softmax_regression(optimizer, lr, decay):
    torch.manual_seed(0)
    images, labels = torch.randn(11, 1, 2, 3, dtype=torch.float64), torch.randint(4, (11,))
    probe = linear.LinearProbe(Pixels(), 4).double()
    assert probe.fc.weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert not probe.fc.bias.any()
    start = [p.detach().numpy().copy() for p in (probe.fc.weight, probe.fc.bias)]
    trainer = linear.ProbeTrainer(
        probe,
        linear.build_probe_optimizer(probe, optimizer, lr, weight_decay=decay),
        linear.rate_factor("cosine", 3),
        FixedBatches(images, 4),  # the last batch has three images
        labels,
        torch.device("cpu"),
    )
    rates = [trainer.train_epoch(QUIET)["lr"] for _ in range(3)]
    assert rates == pytest.approx([lr, 0.75 * lr, 0.25 * lr])
    expected = by_hand(images.flatten(1).numpy(), labels.numpy(), *start, optimizer, lr, decay, 3, 4)
    np.testing.assert_allclose(probe.fc.weight.detach(), expected[0], rtol=1e-10)
    np.testing.assert_allclose(probe.fc.bias.detach(), expected[1], rtol=1e-10)


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
    before, images = linear.fingerprint(backbone), torch.rand(1, 3, size, size)
    with torch.no_grad():
        whole = backbone(images)
        assert pool_windows(backbone, window, in_channels=3, image_size=size) == features == 4 * backbone.width
        found = backbone(images).view(backbone.width, 4)
        assert not torch.equal(found[:, 0], found[:, 3])
        assert linear.fingerprint(backbone) == before  # nothing learned is touched
        backbone.avgpool = nn.AvgPool2d(window + 1)  # the whole map
        torch.testing.assert_close(backbone(images), whole)


def test_the_features_batch_normalisation_by_hand():
    """One channel's windows share mean and variance; in evaluation the running ones count. Only what follows the backbone learns."""
    torch.manual_seed(0)
    backbone = Ramp()
    probe = linear.LinearProbe(
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
    assert set(probe.trained_state()) == {
        *("fc.weight", "fc.bias"),
        *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    optimizer = linear.build_probe_optimizer(probe, "sgd", 0.1)
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == 8 * 3 + 3 + 2 * 2
    probe.eval()
    shifted = (channels - 0.1 * mean[:, None, None]) / np.sqrt(0.9 + 0.1 * variance * 8 / 7 + 1e-5)[:, None, None]
    expected = shifted.transpose(1, 0, 2).reshape(2, 8) @ probe.fc.weight.detach().numpy().T
    np.testing.assert_allclose(probe(images).detach(), expected, rtol=1e-9)


def test_schedules_by_epoch():
    cosine = linear.rate_factor("cosine", 100)
    assert [cosine(e) for e in (0, 25, 50, 99)] == pytest.approx([1, 0.8535533906, 0.5, 0.0002467198], rel=1e-6)
    step = linear.rate_factor("step", 20, decay_epochs=(12, 16), gamma=0.2)
    assert [step(e) for e in (0, 11, 12, 15, 16, 19)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])
    assert linear.rate_factor("constant", 9)(8) == 1


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
    trained = {"data": "digits", "data_root": "", "subset_file": "s.txt"}
    assert parse_lincls_eval(["--checkpoint", "x"], trained).preset == "digits"
    assert parse_lincls_eval(["--checkpoint", "x"], trained).subset_file == "s.txt"
    assert parse_lincls_eval(["--checkpoint", "x", "--data", "elsewhere"], trained).subset_file == ""


def test_top_hits_by_hand_and_with_few_classes():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1]])
    assert linear.top_hits(logits, torch.tensor([4, 1, 6])).tolist() == [1, 2]
    assert linear.top_hits(logits[:, :3], torch.tensor([2, 2, 0])).tolist()[1] == 3


# --------------------------------------------------------------------------------------------------------------------
# what changes and what does not


def digits_probe(finetune=False, train_bn=False, rows=40, batch_size=16, epochs=1, **rates):
    from src.data.loaders import TrainLoader

    torch.manual_seed(0)
    data = linear.keep_rows(open_data("digits", "train"), np.arange(rows))
    views = build_views("digits", data, 1, 0, 8, 8, (1, 1), (1, 1))
    loader = TrainLoader(data, views, batch_size=batch_size, seed=0, device=torch.device("cpu"), keep_last=True)
    probe = linear.LinearProbe(SmallConvNet(1), 10, finetune, train_bn)
    optimizer = linear.build_probe_optimizer(probe, "sgd", **{"lr": 0.1, "momentum": 0.0, **rates})
    factor = linear.rate_factor("constant", epochs)
    return probe, linear.ProbeTrainer(probe, optimizer, factor, loader, data.labels, torch.device("cpu")), data


def test_a_frozen_backbone_keeps_every_bit_and_a_changed_one_is_noticed():
    probe, trainer, _ = digits_probe()
    before, layer = linear.fingerprint(probe.backbone), probe.fc.weight.detach().clone()
    trainer.train_epoch(QUIET)
    assert not torch.equal(layer, probe.fc.weight)
    linear.check_unchanged(probe.backbone, before)
    for name in ("layers.0.0.weight", "layers.0.1.running_mean", "layers.0.1.num_batches_tracked"):
        value = probe.backbone.state_dict()[name].view(-1)
        kept = value[0].clone()
        value[0] = kept + 1 if value.dtype == torch.long else torch.nextafter(kept, kept + 1)
        with pytest.raises(RunError, match="backbone changed"):
            linear.check_unchanged(probe.backbone, before)
        value[0] = kept
    linear.check_unchanged(probe.backbone, before)


def test_an_epoch_has_every_image_once_the_last_batch_included():
    _, trainer, _ = digits_probe(rows=39)
    batches = [step.indices for step in trainer.loader.epoch(1)]
    assert [len(indices) for indices in batches] == [16, 16, 7]
    assert len(trainer.loader) == 3
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(39))
    assert torch.equal(torch.cat([step.indices for step in trainer.loader.epoch(1, start=2)]), batches[2])


@pytest.mark.parametrize("train_bn", [False, True])
def test_fine_tuning_moves_the_backbone_by_its_own_rate(train_bn):
    probe, trainer, data = digits_probe(True, train_bn, rows=16, backbone_lr=0.02)
    before = {name: p.detach().clone() for name, p in probe.named_parameters()}
    buffers = {name: b.clone() for name, b in probe.named_buffers()}
    (batch,) = trainer.loader.epoch(0)
    probe.train()
    gradients = torch.autograd.grad(
        F.cross_entropy(probe(batch.views[0]), data.labels[batch.indices]), [*probe.parameters()]
    )
    probe.load_state_dict({**before, **buffers})
    trainer.train_epoch(QUIET)
    for (name, p), grad in zip(probe.named_parameters(), gradients, strict=True):
        rate = 0.1 if name.startswith("fc.") else 0.02
        assert grad.any()
        torch.testing.assert_close(p.detach(), before[name] - rate * grad)
    same = [torch.equal(value, buffers[name]) for name, value in probe.named_buffers()]
    assert not any(same) if train_bn else all(same)


RANKS_CODE = """
import numpy as np
import torch
from src.data.datasets import open_data
from src.data.loaders import TrainLoader, single_views
from src.data.views import build_views
from src.evaluation import linear
from src.logs import Progress
from src.models.backbones import SmallConvNet, build_backbone, pool_windows

saved = []
for finetune, train_bn, rows, feature_bn in ((False, False, 39, False), (True, True, 38, False), (False, False, 38, True)):
    torch.manual_seed(0)
    data = linear.keep_rows(open_data("digits", "train"), np.arange(rows))
    test = linear.keep_rows(open_data("digits", "test"), np.arange(33))
    views = build_views("digits", data, 1, 0, 8, 8, (1, 1), (1, 1))
    device = torch.device("cpu")
    loader = TrainLoader(data, views, 16, 0, device, keep_last=True)
    probe = linear.LinearProbe(SmallConvNet(1), 10, finetune, train_bn, feature_bn=feature_bn)
    optimizer = linear.build_probe_optimizer(probe, "sgd", 0.5, 0.05 if finetune else None)
    wrapped = distributed.parallel(probe, device, 0 if probe.shares_statistics else 1)
    trainer = linear.ProbeTrainer(wrapped, optimizer, linear.rate_factor("cosine", 3), loader, data.labels, device)
    losses = [trainer.train_epoch(Progress(1, 0, False))["loss"] for _ in range(3)]
    tops = linear.score(wrapped, single_views(test, views, 5, device), test.labels)
    saved.append((losses, tops, probe.state_dict()))
"""


@pytest.mark.slow
def test_two_ranks_are_one(run_ranks):
    from src import distributed

    single = {"distributed": distributed}
    exec(RANKS_CODE, single)
    for saved in run_ranks(2, RANKS_CODE + "torch.save(saved, out / f'{rank}.pt')"):
        for (losses, tops, state), (one_losses, one_tops, one_state) in zip(saved, single["saved"], strict=True):
            assert losses == pytest.approx(one_losses, rel=1e-4)
            assert tops == one_tops
            for name, value in one_state.items():
                torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# many settings at once


def test_settings_trained_together_are_those_trained_alone():
    torch.manual_seed(0)
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
    settings = [(0.1, 0.0), (1.0, 0.01), (0.5, 0.1)]
    weight, bias = linear.fit_linear(x, y, 3, settings=settings, epochs=4, batch_size=8)
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
    found = linear.search(
        torch.cat([x, x[:1]]),
        labels,
        test=x,
        test_labels=y.flip(0),
        num_classes=5,
        lrs=(0.1, 1.0),
        weight_decays=(0.0, 0.01),
        epochs=5,
    )
    assert found["held_out_images"] == 16
    assert found["chosen"]["top1"] > 0.8  # although the test labels are wrong
    assert found["top1"] < 0.2
    with pytest.raises(InputError, match="--held-out"):
        linear.search(x[::20], y[::20], test=x, test_labels=y, num_classes=4, lrs=(0.1,), weight_decays=(0.0,))


# --------------------------------------------------------------------------------------------------------------------
# the program


@pytest.fixture
def lincls(monkeypatch):
    """Run lincls_eval.py in this process; signals are handled as before afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lincls_eval.py", *map(str, words)])
        lincls_eval.main()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_checkpoint(folder, *words, channels=1):
    """A checkpoint of train.py with random weights."""
    options, name, knobs = parse_train([*map(str, words)])
    settings = {"method": name, **config.as_plain(options), **config.as_plain(knobs), "channels": channels}
    torch.manual_seed(1)
    shape = (options.arch, channels, options.global_crops_size, options.patch_size, options.global_crops_number)
    method = build_method(name, knobs, *shape)
    folder.mkdir(exist_ok=True)
    state = {"config": settings, "history": [], "model": method.state_dict(), "epoch": 0}
    checkpoint.save(folder / "checkpoint.pt", state)
    return folder / "checkpoint.pt"


@pytest.fixture
def untrained(tmp_path):
    return write_checkpoint(tmp_path / "run", "--classes", "10")


def read(folder):
    return json.loads((folder / "lincls_eval.json").read_text())


def accuracy_by_hand(given, folder, name):
    """Top-1 and top-5 of a saved linear layer on the digits' test split."""
    method, _ = load_method(given)
    saved = checkpoint.load(folder / name)["model"]
    data = open_data("digits", "test")
    with torch.no_grad():
        features = method.backbone(2 * data.images.float() / 255 - 1)
    logits = (features @ saved["fc.weight"].T + saved["fc.bias"]).numpy()
    own = logits[np.arange(len(logits)), data.labels]
    rank = (logits > own[:, None]).sum(axis=1)
    return (rank < 1).mean(), (rank < 5).mean()


@pytest.mark.slow
def test_end_to_end_on_digits(run_python, tmp_path):
    run = tmp_path / "run"
    done = run_python("train.py", "--epochs", "4", "--warmup-epochs", "1", "--output-dir", run)
    assert done.returncode == 0, done.stderr
    before = (run / "checkpoint.pt").read_bytes()
    done = run_python("lincls_eval.py", "--checkpoint", run / "checkpoint.pt")
    assert done.returncode == 0, done.stderr
    result = read(run)
    assert (run / "checkpoint.pt").read_bytes() == before
    assert result["options"]["preset"] == "digits"
    assert (result["train_images"], result["test_images"], result["classes"]) == (1437, 360, 10)
    assert "preset digits: sgd, batch 128, lr 1" in result["protocol"]
    assert [row["epoch"] for row in result["history"]] == list(range(1, 31))
    tops = [row["top1"] for row in result["history"]]
    assert result["top1"] == max(tops)
    assert result["best_epoch"] == tops.index(max(tops)) + 1
    best, last = (accuracy_by_hand(run / "checkpoint.pt", run, name) for name in (linear.BEST, linear.LAST))
    assert (result["top1"], result["top5"]) == pytest.approx(best, abs=1e-6)
    assert (result["last_top1"], result["last_top5"]) == pytest.approx(last, abs=1e-6)
    assert result["top1"] > 0.92
    assert f"{100 * result['top1']:.1f}" in done.stdout


def test_help_needs_no_torch_and_every_flag_has_help(run_python):
    done = run_python("-X", "importtime", "lincls_eval.py", "--help")
    assert done.returncode == 0
    assert "--backbone-lr" in done.stdout
    assert " torch\n" not in done.stderr
    comments = config.field_comments(Path(config.__file__).read_text(), "LinclsEvalOptions")
    assert all(comments[field] for field in config.LinclsEvalOptions.__annotations__)


def test_a_stopped_probe_goes_on_bit_for_bit(untrained, lincls, tmp_path, monkeypatch, capsys):
    words = ("--checkpoint", untrained, "--epochs", "3", "--crop-flip", "--batch-size", "500", "--momentum", "0.5")
    lincls(*words, "--output-dir", tmp_path / "whole")
    agree, steps = linear.ProbeTrainer._agree, []

    def stop_in_the_second_epoch(self, losses):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return agree(self, losses)

    monkeypatch.setattr(linear.ProbeTrainer, "_agree", stop_in_the_second_epoch)
    with pytest.raises(SystemExit) as stopped:
        lincls(*words, "--output-dir", tmp_path / "stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    state = checkpoint.load(tmp_path / "stopped" / linear.LAST)
    assert (state["epoch"], state["done"]) == (1, 2)
    assert not (tmp_path / "stopped" / "lincls_eval.json").exists()

    with pytest.raises(InputError, match=r"--lr 1.0 \(now 0.5\)"):
        lincls(*words, "--output-dir", tmp_path / "stopped", "--lr", "0.5")
    shutil.copytree(tmp_path / "stopped", tmp_path / "fresh")
    lincls(*words, "--output-dir", tmp_path / "fresh", "--lr", "0.5", "--fresh")
    capsys.readouterr()

    lincls(*words, "--output-dir", tmp_path / "stopped")
    assert "going on from epoch 2, step 3" in capsys.readouterr().out
    whole, resumed = (checkpoint.load(tmp_path / name / linear.LAST) for name in ("whole", "stopped"))
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
    for one, two in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values(), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])
    assert whole["history"] == resumed["history"] == read(tmp_path / "stopped")["history"]

    # finished: the same command repeats the result, other options begin anew
    lincls(*words, "--output-dir", tmp_path / "stopped")
    assert "finished before" in capsys.readouterr().out
    lincls(*words, "--output-dir", tmp_path / "stopped", "--epochs", "1")
    assert len(read(tmp_path / "stopped")["history"]) == 1


def test_a_backbone_that_moves_is_not_reported(untrained, lincls, tmp_path, monkeypatch):
    monkeypatch.setattr(linear.LinearProbe, "train", lambda self, mode=True: nn.Module.train(self, mode))
    with pytest.raises(RunError, match="backbone changed"):
        lincls("--checkpoint", untrained, "--epochs", "1", "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out" / "lincls_eval.json").exists()


def test_fast_chooses_the_best_of_what_was_held_out(untrained, lincls, tmp_path, capsys):
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


def test_windows_of_the_map_are_probed(untrained, lincls, tmp_path, monkeypatch, capsys):
    """The digits' last map has 2 × 2 places: each its own window. Also stopped and continued, and the fast way."""
    words = ("--checkpoint", untrained, "--pool-window", "1", "--epochs", "3", "--output-dir")
    lincls(*words, tmp_path / "out", "--feature-bn")
    result = read(tmp_path / "out")
    assert result["features"] == 4 * 128
    assert "means over windows of 1 × 1 places, batch-normalised, preset digits" in result["protocol"]
    saved = checkpoint.load(tmp_path / "out" / linear.LAST)["model"]
    assert saved["fc.weight"].shape == (10, 512)
    assert saved["bn.running_mean"].shape == (128,)
    agree, steps = linear.ProbeTrainer._agree, []

    def stop_in_the_second_epoch(self, losses):
        steps.append(1)
        if len(steps) == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return agree(self, losses)

    monkeypatch.setattr(linear.ProbeTrainer, "_agree", stop_in_the_second_epoch)
    with pytest.raises(SystemExit):
        lincls(*words, tmp_path / "stopped", "--feature-bn")
    with pytest.raises(InputError, match=r"--feature-bn True \(now False\)"):
        lincls(*words, tmp_path / "stopped")
    lincls(*words, tmp_path / "stopped", "--feature-bn")
    resumed = checkpoint.load(tmp_path / "stopped" / linear.LAST)["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in saved.items())

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


def test_few_labels_fine_tuned(untrained, lincls, tmp_path, capsys):
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


def picture_folder(top, classes=("cat", "dog", "eel"), splits=("train", "val"), number=6):
    rng = np.random.default_rng(0)
    for split in splits:
        for k, name in enumerate(classes):
            (top / split / name).mkdir(parents=True)
            for i in range(number):
                grey = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                grey[..., k % 3] += 150
                Image.fromarray(grey).save(top / split / name / f"{name}_{i}.png")
    return top


SMALL = ("--arch", "small_convnet", "--global-crops-size", "16", "--local-crops-number", "0", "--classes", "3")


def test_a_folder_of_photographs(lincls, tmp_path):
    given = write_checkpoint(tmp_path / "run", "--data", "x", *SMALL, channels=3)
    top = picture_folder(tmp_path / "in")
    (tmp_path / "list.txt").write_text("cat_1.png\ndog/dog_0.png\neel_2.png\ncat_0.png\n")
    words = ("--checkpoint", given, "--data", top, "--workers", "0", "--epochs", "6", "--optimizer", "sgd", "--lr", "1")
    lincls(*words, "--train-list", tmp_path / "list.txt", "--output-dir", tmp_path / "out")
    result = read(tmp_path / "out")
    assert (result["train_images"], result["test_images"], result["classes"]) == (4, 18, 3)
    assert result["top5"] == result["last_top5"] == 1  # of three classes
    assert result["top1"] > 0.6  # the channel names the class


def test_training_views_are_a_crop_and_a_flip():
    files = ImageFiles(["a"], torch.zeros(1, dtype=torch.long), ["a"])
    central = build_views("x", files, 2, 0, 224, 96, (0.4, 1), (0.4, 1))
    views = linear.training_views("x", files, 224, central)
    (recipe,) = views.recipes
    assert (recipe.size, recipe.scale, recipe.bicubic, recipe.flip) == (224, (0.08, 1.0), False, 0.5)
    assert recipe.jitter == recipe.grayscale == recipe.blur == recipe.solarize == 0
    assert (central.eval_resize, central.eval_size) == (256, 224)
    plain = linear.training_views("x", files, 224, central, augment=False)
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    (crops,) = plain.cut([image], np.array([0]), seed=0, epoch=0)
    assert torch.equal(crops[0], central.single_cut(image))
    assert torch.equal(plain.finish([crops], None, seed=0, epoch=0)[0], central.single_finish(crops))


def test_backbones_of_others(tmp_path):
    torch.manual_seed(0)
    theirs = build_backbone("resnet18")
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    state["module.projection_head.0.weight"] = torch.zeros(4, 512)
    state["module.prototypes.weight"] = torch.zeros(4, 4)
    torch.save(state, tmp_path / "swav.pth.tar")
    backbone, record = load_backbone(tmp_path / "swav.pth.tar", "resnet18")
    assert linear.fingerprint(backbone) == linear.fingerprint(theirs)
    assert (record["config"]["data"], record["config"]["channels"]) == ("", 3)
    assert not backbone.training
    assert linear.fingerprint(load_backbone(tmp_path / "swav.pth.tar")[0]) == linear.fingerprint(theirs)
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
        (["--held-out", "1"], "--held-out is 1"),
        (["--fast-lrs", "0.1", "0"], "--fast-lrs is 0.1 0"),
        (["--fast-weight-decays", "-1"], "--fast-weight-decays is -1"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--momentum", "1"], "--momentum is 1"),
    ],
)
def test_contradictions_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse_lincls_eval(["--checkpoint", "x", "--data", "digits", *words])


def test_bad_input_is_refused_before_anything_is_written(untrained, lincls, tmp_path):
    out = ("--output-dir", tmp_path / "out")
    with pytest.raises(InputError, match="--checkpoint is missing"):
        lincls(*out)
    with pytest.raises(InputError, match="no such file"):
        lincls("--checkpoint", tmp_path / "nothing.pt", *out)
    with pytest.raises(InputError, match="--nesterov"):
        lincls("--checkpoint", untrained, "--optimizer", "adamw", "--nesterov", *out)
    with pytest.raises(InputError, match=r"--arch resnet50: .* holds small_convnet"):
        lincls("--checkpoint", untrained, "--arch", "resnet50", *out)
    colour = write_checkpoint(tmp_path / "colour", "--data", "x", *SMALL, channels=3)
    with pytest.raises(InputError, match="images have 1 channels, but the network takes 3"):
        lincls("--checkpoint", colour, "--data", "digits", *out)
    top = picture_folder(tmp_path / "in")
    with pytest.raises(InputError, match="the train split has no labels"):
        lincls("--checkpoint", colour, "--data", top / "train" / "cat", *out)
    picture_folder(tmp_path / "in", ("fox",), ("val",))
    with pytest.raises(InputError, match="3 classes in the train split, 4 in the test split; not in both: fox"):
        lincls("--checkpoint", colour, "--data", top, *out)
    shutil.rmtree(top / "val" / "fox")
    (tmp_path / "list.txt").write_text("cat_1.png\nowl_1.png\n")
    with pytest.raises(InputError, match="owl_1"):
        lincls("--checkpoint", colour, "--data", top, "--train-list", tmp_path / "list.txt", *out)
    assert not (tmp_path / "out").exists()
