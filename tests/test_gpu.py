"""What a GPU computes, beside a CPU; and that the host does not wait for it where it need not."""

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, view_settings
from PIL import Image

from src.assignments import balanced_labels, sinkhorn
from src.data.datasets import open_data
from src.data.digits import DigitRecipe, DigitViews
from src.data.loaders import TrainLoader
from src.data.photographs import PhotoViews, published_views
from src.data.views import photo_recipes
from src.evaluation import kmeans
from src.logs import Progress
from src.losses import self_classifier_terms
from src.methods import METHODS, build_method
from src.neighbors import count_hits
from src.optim import build_optimizer, parameter_groups, warmup_cosine
from src.queues import NearestNeighborQueue
from src.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAYOUT = (2, 2, 32, 16)  # numbers and sizes of views


CONFIGS = {
    "self_classifier": {"classes": (6, 10), "dim": 8, "hidden_dim": 16, "queue_length": 48},
    "swav": {
        "prototypes": 10,
        "dim": 8,
        "hidden_dim": 16,
        "freeze_prototypes": 2,
        "queue_length": 48,
        "queue_start": 0,
    },
    "deepcluster_v2": {"prototypes": (10, 12), "dim": 8, "hidden_dim": 16},
    "sela_v2": {"prototypes": (10, 12), "dim": 8, "hidden_dim": 16, "freeze_prototypes": 2, "max_iterations": 30},
}


@pytest.fixture
def exact():
    """float32 products in float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def never_waiting():
    """Calls what it is given, and fails where the host waits for the GPU."""

    def call(function, *words, **named):
        torch.cuda.synchronize()
        try:
            with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
            return function(*words, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


def make_trainer(device, name="self_classifier", precision=None, images=96):
    torch.manual_seed(0)
    data = open_data("digits", "train")
    data = data.keep(np.arange(images), data.labels.numpy()[:images], data.classes)
    loader = TrainLoader(data, DigitViews([DigitRecipe()] * 3), batch_size=24, seed=0, device=device)
    method = build_method(name, METHODS[name].Config(**CONFIGS[name]), SMALL).to(device)
    optimizer = build_optimizer("lars", parameter_groups(method, 1e-4), lr=0.5, momentum=0.9)
    lr = warmup_cosine(0.5, 0.001, warmup_start=0.1, warmup_epochs=1, epochs=4, steps_per_epoch=len(loader))
    return Trainer(method, optimizer, lr, loader=loader, device=device, labels=data.labels, autocast=precision)


def epochs(trainer, number):
    return [trainer.train_epoch(Progress(1, 0, enabled=False))["loss"] for _ in range(number)]


def test_the_loss_and_its_gradient(exact):
    torch.manual_seed(0)
    logits = [torch.randn(8, 32, classes) for classes in (10, 30)]
    found = []
    for device in (CPU, GPU):
        moved = [values.to(device).requires_grad_() for values in logits]
        terms = self_classifier_terms(moved, row_tau=0.1, col_tau=0.05, eps=1e-12, num_global=2)
        terms.sum().backward()
        found.append([terms.detach().cpu(), *(values.grad.cpu() for values in moved)])
    for here, there in zip(*found, strict=True):
        assert (here - there).abs().max() <= 1e-4 * here.abs().max()


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_an_update_does_not_wait(name, exact, never_waiting):
    torch.manual_seed(0)
    start = [torch.randn(64, 32), torch.randn(64), torch.zeros(5, 5)]
    grads = [torch.randn_like(values) for values in start]
    found = []
    for device in (CPU, GPU):
        network = torch.nn.ParameterList([torch.nn.Parameter(values.to(device)) for values in start])
        optimizer = build_optimizer(name, parameter_groups(network, 1e-4), lr=0.5, momentum=0.9)
        for _ in range(3):
            for parameter, grad in zip(network, grads, strict=True):
                parameter.grad = grad.to(device)
            never_waiting(optimizer.step) if device is GPU else optimizer.step()
        found.append([values.detach().cpu() for values in network])
    assert all(torch.allclose(here, there, rtol=1e-4, atol=1e-6) for here, there in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["dino", "swav", "scan_strong", "sela_3"])
@pytest.mark.parametrize("compiled", [False, True])
def test_views_are_those_of_the_cpu_and_made_without_waiting(name, compiled, exact, never_waiting):
    recipes = photo_recipes(view_settings(*LAYOUT, augment=name))
    rng = np.random.default_rng(0)
    crops = [torch.from_numpy(rng.integers(0, 256, (16, 3, r.size, r.size), dtype=np.uint8)) for r in recipes]
    expected = PhotoViews(recipes, 32).finish(crops, np.arange(16), seed=0, epoch=1)
    views, there = PhotoViews(recipes, 32, compiled=compiled), [crop.to(GPU) for crop in crops]
    views.finish(there, np.arange(16), seed=0, epoch=0)  # what is done once: compiling, choosing kernels
    made = never_waiting(views.finish, there, np.arange(16), seed=0, epoch=1)
    for here, there in zip(expected, made, strict=True):
        apart = (here - there.cpu()).abs()
        assert apart.mean() < 1e-3
        assert (apart > 0.02).float().mean() < 1e-3  # a grey level at a threshold may fall to the other side


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_beside_the_steps_are_those_of_the_cpu(workers, exact, tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(48):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "p" / f"{i:02}.png")
    data = open_data(str(tmp_path / "p"), "train")
    batches = []
    for device in (CPU, GPU):
        loader = TrainLoader(
            data,
            PhotoViews(published_views(view_settings(*LAYOUT)), 32),
            batch_size=8,
            seed=0,
            device=device,
            workers=workers,
        )
        made = []
        for batch in loader.epoch(1):
            torch.cuda._sleep(10**7)  # a step that is still computed when the next batch is made
            made.append([batch.indices.clone(), *(view.clone() for view in batch.views)])
        batches.append([[values.cpu() for values in batch] for batch in made])
        loader.close()
    for here, there in zip(*batches, strict=True):
        assert torch.equal(here[0], there[0])
        assert all((a - b).abs().mean() < 1e-3 for a, b in zip(here[1:], there[1:], strict=True))


def test_a_box_too_large_for_torchs_kernel_is_resized_all_the_same():
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    pixels = torch.from_numpy(np.array(Image.fromarray(noise).resize((2000, 1600)))).permute(2, 0, 1)
    views = PhotoViews(photo_recipes(view_settings(1, 0, 20, 8, (1.0, 1.0), augment="crop_flip")), 32)
    (here,), (there,) = (views.cut([pixels.to(device)], np.arange(1), seed=0, epoch=0) for device in (CPU, GPU))
    assert (here.float() - there.cpu().float()).abs().max() <= 1


def test_files_decoded_on_the_gpu_are_nearly_those_of_the_cpu(tmp_path):
    pytest.importorskip("torchcodec.decoders", reason="torchcodec is not installed", exc_type=(ImportError, OSError))
    for i in range(16):
        noise = np.random.default_rng(i).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((333, 217), Image.Resampling.BICUBIC)
        picture.save(tmp_path / f"{i:02}.jpg" if i else tmp_path / "00.png")
    data = open_data(str(tmp_path), "train")
    made = []
    for on_device in (False, True):
        views = PhotoViews(photo_recipes(view_settings(*LAYOUT, augment="crop_flip")), 32)
        loader = TrainLoader(data, views, batch_size=8, seed=0, device=GPU, workers=2, decode_on_device=on_device)
        made.append([batch for epoch in (0, 1) for batch in loader.epoch(epoch)])
        loader.close()
    for here, there in zip(*made, strict=True):
        assert torch.equal(here.indices, there.indices)
        assert all((a - b).abs().mean() < 0.03 for a, b in zip(here.views, there.views, strict=True))  # two grey levels


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_waits_only_where_it_looks(name, never_waiting):
    trainer = make_trainer(GPU, name)
    epochs(trainer, 2)  # the queue is full
    batch = next(iter(trainer.loader.epoch(2)))

    def step():
        result, backward = trainer._forward(batch)
        trainer.optimizer.zero_grad(set_to_none=True)
        backward()
        trainer.optimizer.step()
        trainer._add(result, batch.indices)

    never_waiting(step)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_begins_as_on_a_cpu(name, exact):
    here, there = (epochs(make_trainer(device, name), 2) for device in (CPU, GPU))
    assert here == pytest.approx(there, rel=0.05)  # a label may change with the last digit


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_every_precision_learns_and_goes_on(precision, tmp_path):
    straight = make_trainer(GPU, precision=precision, images=480)
    losses = epochs(straight, 3)
    assert losses[-1] < losses[0]
    first = make_trainer(GPU, precision=precision, images=480)
    epochs(first, 1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make_trainer(GPU, precision=precision, images=480)
    second.load_state_dict(torch.load(tmp_path / "state.pt", map_location=CPU))
    assert epochs(second, 2) == pytest.approx(losses[1:], rel=0.05)


def test_the_nearest_of_a_queue(exact):
    torch.manual_seed(0)
    stored, wanted = (F.normalize(torch.randn(rows, 16), dim=1) for rows in (70000, 50))
    indices = torch.arange(70000)
    stored[:50] = wanted  # each finds itself, which is not allowed
    found = []
    for device in (CPU, GPU):
        queue = NearestNeighborQueue(70000, 16).to(device)
        queue.push(stored.to(device), indices.to(device))
        found.append(queue.nearest_rows(wanted.to(device), indices[:50].to(device)).cpu())
    assert torch.equal(*found)


def test_assignments_neighbours_and_kmeans(exact):
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(20, 16), dim=1)
    owner = torch.arange(2000) % 20
    rows = F.normalize(centres[owner] + 0.1 * torch.randn(2000, 16), dim=1)
    scores = rows @ centres.T
    codes = [sinkhorn(scores.to(device), 0.05, 3).cpu() for device in (CPU, GPU)]
    assert torch.allclose(*codes, atol=1e-5)
    logs = (scores / 0.1).log_softmax(dim=1)
    labels = [balanced_labels(logs.to(device), 25.0, 0.1, max_iterations=1000).cpu() for device in (CPU, GPU)]
    assert (labels[0] == labels[1]).float().mean() > 0.999
    hits = [
        count_hits(
            rows[:1500].to(d),
            owner[:1500].to(d),
            queries=rows[1500:].to(d),
            query_labels=owner[1500:].to(d),
            ks=(1, 20),
            tau=0.07,
        )
        for d in (CPU, GPU)
    ]
    assert {k: list(map(int, values)) for k, values in hits[0].items()} == {
        k: list(map(int, values)) for k, values in hits[1].items()
    }
    ends = [kmeans.lloyd(rows.to(device), rows[:20].to(device)) for device in (CPU, GPU)]
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)
    assert torch.allclose(ends[0][0], ends[1][0].cpu(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches", [(), ("--precision", "bfloat16", "--channels-last", "--compile"), ("--precision", "float16")]
)
def test_digits_are_learned(run_python, tmp_path, switches):
    out = tmp_path / "out"
    done = run_python("train.py", *switches, "--output-dir", out, timeout=900)
    assert done.returncode == 0, done.stderr
    done = run_python("cls_eval.py", "--checkpoint", out / "checkpoint.pt")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "cls_eval.json").read_text())["acc"] > 0.9


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: one process does not use NCCL")
def test_nccl_trains_what_one_process_trains(run_python, tmp_path):
    words = ("train.py", "--epochs", "2", "--warmup-epochs", "1", "--output-dir")
    assert run_python(*words, tmp_path / "one").returncode == 0
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = run_python(*launch, *words, tmp_path / "ranks")
    assert done.returncode == 0, done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "ranks")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
