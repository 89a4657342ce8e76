"""What the trainer and the loader promise to methods: hooks, embeddings by index, companions, skipped steps."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from src.config import ViewSettings
from src.data.datasets import ImageFiles, MemoryImages
from src.data.digits import DigitRecipe, DigitViews
from src.data.loaders import TrainLoader
from src.data.photographs import PhotoViews, published_views
from src.data.training import TrainingData
from src.data.views import IdentityViews
from src.errors import RunError
from src.logs import Progress
from src.methods.base import Method, Step
from src.trainer import Trainer

CPU = torch.device("cpu")


def memory(count=40, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, size, size), generator=generator, dtype=torch.uint8)
    return MemoryImages(images, torch.arange(count) % 4, [str(k) for k in range(4)])


def loader_of(data, views=None, **changes):
    views = views or DigitViews([DigitRecipe(), DigitRecipe()])
    return TrainLoader(data, views, **{"batch_size": 8, "seed": 3, "device": CPU, **changes})


@pytest.fixture
def files(tmp_path):
    """Ten small photographs whose red channel is ten times their position."""
    paths = []
    for i in range(10):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(np.full((9, 9, 3), (10 * i, 5, 7), np.uint8)).save(paths[-1])
    return ImageFiles(paths, torch.arange(10), [str(i) for i in range(10)])


class Recorder(Method):
    """A method that remembers what it was called with. Its loss is the mean of a weight times the embeddings."""

    def __init__(self, skips=(), named=None):
        super().__init__()
        self.backbone = nn.Identity()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls, self.seen, self.skips, self.named = [], [], set(skips), named

    def companions(self, indices, epoch):
        return None if self.named is None else self.named(indices, epoch)

    def prepare_run(self, data):
        self.calls.append("run")

    def prepare_epoch(self, epoch, data):
        self.calls.append(f"epoch {epoch}")

    def prepare_step(self, step, data):
        self.step = step
        self.calls.append(f"step {step}")

    def embed_views(self, views, idle=0):
        return [view.flatten(1) * self.weight for view in views]

    def objective(self, embeddings, indices):
        self.seen.append((len(embeddings), indices.tolist()))
        loss = torch.cat(embeddings).mean()
        return Step(loss, {}, skip=torch.tensor(self.step in self.skips))


def trainer_of(method, data=None, **changes):
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    return Trainer(method, optimizer, lambda step: 0.1, loader=loader_of(data or memory(20)), device=CPU, **changes)


def quiet():
    return Progress(100, 0, enabled=False)


# ---- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_come_before_the_run_each_epoch_and_each_step():
    method = Recorder()
    trainer = trainer_of(method)  # two steps per epoch
    for _ in range(2):
        trainer.train_epoch(quiet())
    assert method.calls == ["run", "epoch 0", "step 0", "step 1", "epoch 1", "step 2", "step 3"]


def test_a_resumed_run_is_not_prepared_again():
    first = trainer_of(Recorder())
    first.train_epoch(quiet())
    method = Recorder()
    again = trainer_of(method)
    again.load_state_dict(first.state_dict())
    again.train_epoch(quiet())
    assert method.calls == ["epoch 1", "step 2", "step 3"]


# ---- skipped steps --------------------------------------------------------------------------------------------------


def test_a_skipped_step_changes_nothing_and_is_counted():
    skipping, whole = Recorder(skips={1}), Recorder()
    trainer = trainer_of(skipping, memory(24))  # three steps
    summary = trainer.train_epoch(quiet())
    assert summary["skipped_steps"] == 1
    assert summary["step"] == 3
    assert "skipped_steps" not in trainer_of(whole, memory(24)).train_epoch(quiet())
    # the loss of the skipped step is not in the mean
    losses = []
    for step, batch in enumerate(loader_of(memory(24)).epoch(0)):
        with torch.no_grad():
            losses.append(torch.cat([view.flatten(1) for view in batch.views]).mean().item() if step != 1 else None)
    by_hand, weight = [], 1.0
    for loss in losses:
        if loss is not None:
            by_hand.append(weight * loss)
            weight -= 0.1 * loss
    assert summary["loss"] == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert skipping.weight.item() == pytest.approx(weight, rel=1e-5)


def test_skipped_steps_survive_a_restart():
    trainer = trainer_of(Recorder(skips={0}), memory(24))
    trainer.stop_request.number = 15
    with pytest.raises(Exception, match="SIGTERM"):
        trainer.train_epoch(quiet())
    again = trainer_of(Recorder(skips={0}), memory(24))
    again.load_state_dict(trainer.state_dict())
    assert again.train_epoch(quiet())["skipped_steps"] == 1


def test_an_epoch_of_skipped_steps_is_an_error_that_says_why():
    method = Recorder(skips={0, 1})
    method.why_skipped = "no image was confident"
    with pytest.raises(RunError, match="every step of epoch 1 was skipped: no image was confident"):
        trainer_of(method).train_epoch(quiet())


# ---- embeddings by index --------------------------------------------------------------------------------------------


def test_every_image_is_embedded_at_its_position():
    data = memory(19)
    loader = loader_of(data)
    rows = TrainingData(loader).embed(lambda views: views[0].flatten(1))
    assert rows.indices.tolist() == list(range(19))
    assert torch.equal(rows.values, loader.views.single(data.images).flatten(1))


def test_the_views_of_an_epoch_are_those_of_training():
    data = memory(19)
    loader = loader_of(data)
    rows = TrainingData(loader).embed(lambda views: torch.stack(views, dim=1), epoch=2)
    batches = list(loader.epoch(2))
    indices = torch.cat([batch.indices for batch in batches])
    assert rows.indices.tolist() == sorted(indices.tolist())
    assert len(rows.indices) == 16  # without the last partial batch
    for batch in batches:
        for view in range(2):
            at = torch.searchsorted(rows.indices, batch.indices)
            assert torch.equal(rows.values[at, view], batch.views[view])


def test_images_may_be_embedded_in_the_middle_of_an_epoch(files):
    loader = loader_of(files, photo_views(), batch_size=2, workers=1)
    data, found = TrainingData(loader), []
    try:
        for step, batch in enumerate(loader.epoch(0)):
            found += batch.indices.tolist()
            if step == 1:
                assert len(data.embed(lambda views: views[0].mean(dim=(2, 3))).indices) == 10
                assert len(data.embed(lambda views: views[0].mean(dim=(2, 3)), epoch=0).indices) == 10
        assert sorted(found) == list(range(10))
    finally:
        loader.close()


# ---- companions -----------------------------------------------------------------------------------------------------


def next_two(indices, epoch):
    """Name the next two images, and in the second epoch those after them."""
    return np.stack([(indices + 1 + epoch) % 10, (indices + 2 + epoch) % 10], axis=1)


def photo_views():
    settings = ViewSettings(local_crops_number=0, global_crops_size=8, global_crops_scale=(0.9, 1.0))
    return PhotoViews(published_views(settings), 8)


@pytest.mark.parametrize("epoch", [0, 1])
def test_companions_of_images_in_memory_are_loaded_with_them(epoch):
    data = MemoryImages(torch.arange(10).view(10, 1, 1, 1).float(), torch.zeros(10), ["a"])
    loader = loader_of(data, IdentityViews(2), batch_size=4)
    loader.companions = next_two
    for batch in loader.epoch(epoch):
        assert batch.companions.tolist() == next_two(batch.indices.numpy(), epoch).tolist()
        shown = [view.flatten().tolist() for view in batch.views]
        own, first, second = (each.tolist() for each in (batch.indices, *batch.companions.T))
        assert shown == [own, own, first, first, second, second]


@pytest.mark.parametrize("workers", [0, 1])
def test_companions_of_files_have_the_views_that_they_have_on_their_own(files, workers):
    alone, together = (loader_of(files, photo_views(), batch_size=5, workers=w) for w in (0, workers))
    together.companions = next_two
    views = {}
    for batch in alone.epoch(0):
        for row, index in enumerate(batch.indices.tolist()):
            views[index] = [view[row] for view in batch.views]
    try:
        for batch in together.epoch(0):
            assert len(batch.views) == 6
            for row in range(5):
                for place, index in enumerate([batch.indices[row], *batch.companions[row]]):
                    for view in range(2):
                        assert torch.equal(batch.views[2 * place + view][row], views[int(index)][view])
    finally:
        together.close()


def test_companions_outside_the_data_set_are_refused():
    loader = loader_of(memory(20))
    loader.companions = lambda indices, epoch: indices[:, None] + 20
    with pytest.raises(ValueError, match="companions must be positions from 0 to 19, got"):
        list(loader.epoch(0))


def test_a_method_sees_its_companions_and_accumulates_over_them():
    losses = []
    for accumulate in (1, 2):
        method = Recorder(named=lambda indices, epoch: ((indices + 1) % 20)[:, None])
        trainer = trainer_of(method, memory(20), accumulate=accumulate)
        losses.append(trainer.train_epoch(quiet())["loss"])
        assert {views for views, _ in method.seen} == {4}  # two of the images, two of their companions
        assert {len(indices) for _, indices in method.seen} == {8}
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---- the last batch of an epoch -------------------------------------------------------------------------------------


def test_images_are_counted_to_the_last_partial_batch():
    loader = loader_of(memory(19), keep_last=True)
    assert [loader.images_until(step) for step in range(4)] == [0, 8, 16, 19]
    assert [len(batch.indices) for batch in loader.epoch(0)] == [8, 8, 3]


# ---- several ranks, in one start ------------------------------------------------------------------------------------


def test_two_ranks_agree_on_steps_rows_and_shares(run_ranks):
    code = """
        import sys; sys.path.insert(0, "tests")
        from test_contracts import Recorder, TrainingData, loader_of, memory, quiet, trainer_of
        method = Recorder(skips={0, 1} if rank else {1, 2})   # all ask for step 1 only
        skipped = trainer_of(method, memory(32)).train_epoch(quiet())["skipped_steps"], method.weight.item()

        data = TrainingData(loader_of(memory(19)))
        embed = lambda views: views[0].flatten(1)
        rows = [tuple(data.embed(embed)), tuple(data.embed(embed, sharded=True)), tuple(data.embed(embed, epoch=1))]

        last = [
            [len(batch.indices) for batch in loader_of(memory(19), keep_last=True, equal_shares=equal).epoch(0)]
            for equal in (True, False)
        ]
        torch.save([skipped, rows, last], out / f"{rank}.pt")
    """
    (first, first_rows, first_last), (second, second_rows, second_last) = run_ranks(2, code)

    # a step is skipped if all ranks ask, and the ranks keep equal weights
    assert first == second
    assert first[0] == 1

    # every rank gets the rows of all ranks, or only its own
    data = TrainingData(loader_of(memory(19)))
    whole, seen = data.embed(lambda views: views[0].flatten(1)), data.embed(lambda v: v[0].flatten(1), epoch=1)
    for rows in (first_rows, second_rows):
        for (values, indices), expected in ((rows[0], whole), (rows[2], seen)):
            assert torch.equal(values, expected.values)
            assert torch.equal(indices, expected.indices)
        assert torch.equal(rows[1][0], whole.values[rows[1][1]])
    assert sorted(first_rows[1][1].tolist() + second_rows[1][1].tolist()) == list(range(19))

    # of a last batch of three images, each rank gets one, or the first rank gets two
    assert (first_last, second_last) == ([[4, 4, 1], [4, 4, 2]], [[4, 4, 1], [4, 4, 1]])
