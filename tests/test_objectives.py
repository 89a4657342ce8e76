"""Compare each method's objective with loops over the equation, in float64, with options that differ from the defaults.

The losses have tests of their own. These tests pin down what a method hands to them: temperatures, views, clusters, queues.
"""

import math

import numpy as np
import pytest
import torch
from test_assignments import plain_sinkhorn
from test_losses import by_loops
from test_self_classifier_v1 import by_loops as first_generation_by_loops
from test_simclr import by_loops as nt_xent_by_loops
from torch import nn

from src.assignments import spherical_kmeans
from src.losses import IGNORED
from src.methods import METHODS

DIM = 4


class Flat(nn.Module):
    """A backbone whose features are the pixels."""

    width = 12

    def forward(self, images):
        return images.flatten(1)[:, : self.width]


class Normalised(nn.Module):
    """A backbone with batch normalisation over the images that pass through it together."""

    width = 3

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.bn(images).square().mean(dim=(2, 3))


def build(name, backbone=Flat, num_global=2, **options):
    torch.manual_seed(0)
    options = {"dim": DIM, "hidden_dim": 8, **({"head_bn": False} if name != "self_classifier_v1" else {}), **options}
    return METHODS[name](backbone(), METHODS[name].Config(**options), num_global).double()


def unit(*shape, seed=0):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(rows, dim=-1)


def cross_entropy(targets, scores, temperature):
    """Mean over rows of the cross-entropy between targets and a softmax, one entry at a time."""
    total = 0.0
    for target, row in zip(targets.tolist(), scores.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(z / temperature) for z in row))
        total -= sum(t * (z / temperature - normaliser) for t, z in zip(target, row, strict=True))
    return total / len(targets)


def close(value):
    return pytest.approx(value, rel=1e-10)


# ---- Self-Classifier ------------------------------------------------------------------------------------------------


def self_classifier(**options):
    """Temperatures that differ, an eps that is felt, and classifiers that scale their cosines."""
    options = {"classes": (3, 6), "row_tau": 0.3, "col_tau": 0.7, "eps": 1e-2, "queue_length": 6, **options}
    method = build("self_classifier", **options)
    with torch.no_grad():
        for classifier in method.classifiers:
            classifier.weight_g.copy_(torch.linspace(0.5, 2, len(classifier.weight_g))[:, None])
    return method


def logits_of(method, views):
    found = []
    for classifier in method.classifiers:
        rows = classifier.weight_g * nn.functional.normalize(classifier.weight_v, dim=1)
        found.append([(view @ rows.T).detach() for view in views])
    return found


@pytest.mark.parametrize("num_global", [1, 2, 3])
def test_self_classifier_hands_its_options_and_views_to_the_loss(num_global):
    method = self_classifier(num_global=num_global)
    views = list(unit(4, 5, DIM))
    step = method.objective(views, torch.arange(5))
    logits = logits_of(method, views)
    assert step.loss.item() == close(by_loops(logits, 0.3, 0.7, 1e-2, num_global))
    assert step.numbers["terms"].tolist() == close([by_loops([z], 0.3, 0.7, 1e-2, num_global) for z in logits])
    assert step.neighbors is None
    for k, z in enumerate(logits):  # the probabilities of view 1, at the temperature of the rows
        assert method.temperature == 0.3
        expected = [[math.exp(entry / 0.3) for entry in row] for row in z[1].tolist()]
        mean = [sum(row[c] / sum(row) for row in expected) / 5 for c in range(len(expected[0]))]
        assert step.numbers[f"prediction_{k}"].tolist() == pytest.approx(mean, rel=1e-5)  # in float32


@pytest.mark.parametrize("use_neighbors", [True, False])
def test_self_classifier_looks_up_neighbours_before_it_pushes_the_view_itself(use_neighbors):
    method = self_classifier(use_neighbors=use_neighbors)
    stored, indices = unit(6, DIM, seed=1), torch.tensor([12, 9, 7, 10, 8, 11])
    method.queue.push(stored, indices)
    views = [view.requires_grad_() for view in unit(3, 4, DIM)]
    own = torch.tensor([9, 10, 3, 12])
    nearest = []
    for query, image in zip(views[0].tolist(), own.tolist(), strict=True):
        order = sorted(range(6), key=lambda row: -sum(a * b for a, b in zip(query, stored[row].tolist(), strict=True)))
        nearest.append(order[indices[order[0]] == image])
    assert len(set(nearest)) > 1
    assert min(nearest) < 4  # one of the rows that this step overwrites

    step = method.objective(views, own)
    assert step.neighbors.tolist() == indices[nearest].tolist()
    used = [stored[nearest], *views[1:]] if use_neighbors else views
    assert step.loss.item() == close(by_loops(logits_of(method, used), 0.3, 0.7, 1e-2))
    assert torch.equal(method.queue.embeddings, torch.cat([views[0].detach(), stored[4:]]))
    assert method.queue.indices.tolist() == [9, 10, 3, 12, 8, 11]
    step.loss.backward()
    assert (views[0].grad is None) == use_neighbors
    assert views[1].grad.abs().sum() > 0


# ---- Self-Classifier with SimCLR ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_global", [1, 2])
def test_self_classifier_simclr_adds_the_losses_of_two_heads(num_global):
    options = {"classes": (5, 3), "row_tau": 0.3, "col_tau": 0.7, "eps": 1e-2, "contrast_dim": 3}
    method = build("self_classifier_simclr", num_global=num_global, **options, contrast_weight=0.25, contrast_tau=0.4)
    images = list(torch.randn(3, 6, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    step = method.objective(method.embed_views(images), torch.arange(6))
    features = [image.flatten(1) for image in images]
    ours = [method.projection_head(feature) for feature in features]
    contrasted = torch.stack([method.contrast_head(feature) for feature in features[:2]])  # the third view has no part
    first = by_loops(logits_of(method, ours), 0.3, 0.7, 1e-2, num_global)
    second = nt_xent_by_loops(contrasted, 0.4, "both")
    assert step.loss.item() == close(first + 0.25 * second)
    assert step.numbers["contrast"].item() == close(second)
    assert step.numbers["terms"].mean().item() == close(first)
    assert torch.equal(method.embed(images[0]), ours[0])


def test_self_classifier_simclr_adds_the_neighbour_as_a_view():
    method = build("self_classifier_simclr", classes=(5, 3), contrast_dim=3, queue_length=6)
    images = [list(torch.randn(2, 6, 1, 3, 4, generator=torch.Generator().manual_seed(k)).double()) for k in (0, 1)]
    past, now = (method.embed_views(views) for views in images)
    assert method.objective(past, torch.arange(6)).neighbors is None  # the queue was empty
    step = method.objective(now, torch.arange(6, 12))
    products = now[0][:, DIM:] @ past[0][:, DIM:].T
    nearest = products.argmax(dim=1)
    assert step.neighbors.tolist() == nearest.tolist()
    assert len(set(nearest.tolist())) > 1
    views = [past[0][nearest, :DIM].float().double(), *(view[:, :DIM] for view in now)]  # the queue holds float32
    first = by_loops(logits_of(method, views), 0.1, 0.05, 1e-12, 3)
    second = nt_xent_by_loops(torch.stack(now)[:, :, DIM:], 0.2, "both")
    assert step.loss.item() == pytest.approx(first + second, rel=1e-6)
    assert torch.equal(method.stored, now[0][:, :DIM].to(method.stored.dtype))


# ---- first generation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize_targets", [False, True])
def test_first_generation_hands_its_options_and_groups_to_the_loss(normalize_targets):
    options = {"num_classifiers": 2, "num_classes": 5, "tau": 0.4, "softmax_group": 3}
    method = build("self_classifier_v1", **options, normalize_targets=normalize_targets)
    views = list(unit(2, 6, DIM))
    rows = [nn.functional.normalize(classifier.weight, dim=1) for classifier in method.classifiers]
    groups = [
        first_generation_by_loops([[view[part] @ r.T for view in views] for r in rows], 0.4, normalize_targets)
        for part in (slice(0, 3), slice(3, 6))
    ]
    assert method.objective(views, torch.arange(6)).loss.item() == close(sum(groups) / 2)


# ---- SwAV -----------------------------------------------------------------------------------------------------------


def swav(**options):
    return build("swav", **{"prototypes": 5, "temperature": 0.3, "epsilon": 0.2, "sinkhorn_iterations": 2, **options})


@pytest.mark.parametrize("assign_views", [(0, 1), (0, 2), (2,)])
def test_swav_predicts_the_codes_of_each_assigned_view_from_every_other_view(assign_views):
    method = swav(assign_views=assign_views)
    views = [view.requires_grad_() for view in unit(3, 6, DIM)]
    scores = [(view @ method.classifiers[0].weight.T).detach() for view in views]
    terms = []
    for assigned in assign_views:
        codes = plain_sinkhorn(scores[assigned], 0.2, 2)
        terms += [cross_entropy(codes, scores[v], 0.3) for v in range(3) if v != assigned]
    step = method.objective(views, torch.arange(6))
    assert step.loss.item() == close(sum(terms) / len(terms))

    # the codes are constants: the gradient is that of the predictions alone
    step.loss.backward()
    targets = torch.zeros(3, 6, 5, dtype=torch.float64)
    for assigned in assign_views:
        for v in set(range(3)) - {assigned}:
            targets[v] += plain_sinkhorn(scores[assigned], 0.2, 2) / len(terms)
    for v, view in enumerate(views):
        slope = targets[v].sum(dim=1, keepdim=True) * (scores[v] / 0.3).softmax(dim=1) - targets[v]
        expected = slope @ method.classifiers[0].weight / 0.3 / 6
        torch.testing.assert_close(torch.zeros_like(view) if view.grad is None else view.grad, expected)


def test_swav_balances_each_view_together_with_the_past_of_that_view():
    method = swav(queue_length=7)
    past = unit(2, 7, DIM, seed=1)
    for queue, rows in zip(method.queues, past, strict=True):
        queue.push(rows)
    state = method.state_dict()
    state["queue_started"].fill_(True)
    method.load_state_dict(state)
    views = list(unit(3, 6, DIM))
    weight = method.classifiers[0].weight.detach()
    terms = []
    for assigned in (0, 1):
        codes = plain_sinkhorn(torch.cat([past[assigned], views[assigned]]) @ weight.T, 0.2, 2)[7:]
        terms += [cross_entropy(codes, views[v] @ weight.T, 0.3) for v in range(3) if v != assigned]
    assert method.objective(views, torch.arange(6)).loss.item() == close(sum(terms) / 4)
    for queue, rows, view in zip(method.queues, past, views, strict=False):
        assert torch.equal(queue.embeddings, torch.cat([view, rows[6:]]))


# ---- DeepCluster-v2 and SeLa-v2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepcluster_v2", "sela_v2"])
def test_every_view_predicts_the_cluster_of_its_image_in_every_head(name):
    method = build(name, prototypes=(5, 3), temperature=0.3, assign_views=(2, 0))
    method.bank.make_room(8)
    clusters = torch.tensor([[4, 0, 1, 2, IGNORED, 3, 0, 1], [0, 2, 1, IGNORED, 1, 0, 2, 0]])
    method.bank.clusters.copy_(clusters)
    images = torch.tensor([6, 3, 4, 0, 7])
    views = [view.requires_grad_() for view in unit(3, 5, DIM)]
    terms = []
    for head, size in enumerate((5, 3)):
        labels = clusters[head, images]
        known = labels != IGNORED
        onehot = nn.functional.one_hot(labels[known], size)
        weight = method.classifiers[head].weight.detach()
        terms.append(sum(cross_entropy(onehot, view[known] @ weight.T, 0.3) for view in views) / 3)
    step = method.objective(views, images)
    assert step.loss.item() == close(sum(terms) / 2)
    assert step.numbers["terms"].tolist() == close(terms)

    # each bank holds its own view
    assert torch.equal(method.bank.embeddings[:, images], torch.stack([views[2], views[0]]).detach())
    assert method.bank.written.nonzero().flatten().tolist() == [0, 3, 4, 6, 7]
    assert not method.bank.embeddings[:, [1, 2, 5]].any()
    assert torch.equal(method.bank.clusters, clusters)

    step.loss.backward()
    learns = [classifier.weight.grad is not None for classifier in method.classifiers]
    assert learns == [name == "sela_v2"] * 2  # the prototypes of DeepCluster-v2 are centroids
    assert all(view.grad.abs().sum() > 0 for view in views)


def test_deepcluster_clusters_its_share_from_the_drawn_rows():
    """The heads' prototypes are the centroids after as many iterations as the config says."""
    method = build("deepcluster_v2", prototypes=(5, 3), kmeans_iterations=2)
    rows = unit(40, DIM)
    start = rows[np.random.default_rng(7).choice(40, 3, replace=False)]
    expected, centroids = spherical_kmeans(rows, start, 2)
    assert not torch.equal(centroids, spherical_kmeans(rows, start, 10)[1])
    untouched = method.classifiers[0].weight.clone()
    assert torch.equal(method.assign(1, rows, mine=rows, generator=np.random.default_rng(7)), expected)
    assert torch.equal(method.classifiers[1].weight, centroids)
    assert torch.equal(method.classifiers[0].weight, untouched)


def test_sela_hands_its_options_to_the_transport(monkeypatch):
    given = []
    monkeypatch.setattr(
        "src.methods.sela_v2.balanced_prototype_labels", lambda *tensors, **limits: given.append((tensors, limits))
    )
    method = build("sela_v2", prototypes=(5, 3), temperature=0.3, lam=7.0, tolerance=0.05, max_iterations=12)
    rows = unit(6, DIM)
    method.assign(1, rows, mine=rows[::2], generator=None)
    (((mine, weight, temperature), limits),) = given
    assert torch.equal(mine, rows[::2])
    assert weight is method.classifiers[1].weight
    assert temperature == 0.3
    assert limits == {"lam": 7.0, "tolerance": 0.05, "max_iterations": 12}


# ---- what methods share ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["self_classifier", "swav", "deepcluster_v2"])
def test_scores_belong_to_their_views(name):
    sizes = {"self_classifier": {"classes": (6,)}, "swav": {"prototypes": 6}, "deepcluster_v2": {"prototypes": (6,)}}
    method = build(name, **sizes[name])
    views = torch.eye(DIM, dtype=torch.float64)[:3, None].expand(3, 5, DIM)  # all images of view v are axis v
    if name == "self_classifier":
        expected = nn.functional.normalize(method.classifiers[0].weight_v, dim=1)
        shares = method.objective(list(views), torch.arange(5)).numbers["share_0"]
        assert shares.argmax() == expected[:, 1].argmax()
    else:
        (scores,) = method.scores(list(views))
        expected = method.classifiers[0].weight.T[:3, None].expand(3, 5, 6)
        torch.testing.assert_close(scores, expected)


def test_batch_statistics_join_views_of_one_size_in_the_backbone_and_all_views_in_the_head():
    """Two large and two small views whose brightness differs, so that every other grouping gives other embeddings."""
    method = build("self_classifier", Normalised, classes=(3,), head_bn=True, queue_length=0)
    generator = torch.Generator().manual_seed(1)
    views = [
        (v + 1) * torch.randn(6, 3, side, side, generator=generator, dtype=torch.float64) + v
        for v, side in enumerate((5, 5, 4, 4))
    ]

    def normalised(rows, axes):
        centred = rows - rows.mean(dim=axes, keepdim=True)
        return centred / (centred.square().mean(dim=axes, keepdim=True) + 1e-5).sqrt()

    pairs = [normalised(torch.cat(pair), (0, 2, 3)).square().mean(dim=(2, 3)) for pair in (views[:2], views[2:])]
    first, _, _, last = method.projection_head.mlp
    hidden = nn.functional.leaky_relu(normalised(torch.cat(pairs) @ first.weight.T + first.bias, (0,)))
    expected = nn.functional.normalize(hidden @ last.weight.T + last.bias, dim=1)
    torch.testing.assert_close(torch.stack(method.embed_views(views)), expected.unflatten(0, (4, 6)))


@pytest.mark.parametrize("name", ["self_classifier", "swav"])
def test_idle_views_are_embedded_without_a_graph(name):
    method = build(name)
    views = list(torch.randn(3, 5, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    expected = method.embed_views(views)
    found = method.embed_views(views, 1)
    torch.testing.assert_close(found, expected)
    assert [view.requires_grad for view in expected] == [True, True, True]
    assert [view.requires_grad for view in found] == [False, True, True]


# ---- over ranks -----------------------------------------------------------------------------------------------------

OVER_RANKS = {
    "self_classifier": {"classes": (3, 6), "row_tau": 0.3, "col_tau": 0.7, "queue_length": 12},
    "self_classifier_v1": {"num_classifiers": 2, "num_classes": 5, "softmax_group": 0},
    "swav": {"prototypes": 5, "temperature": 0.3, "epsilon": 0.2, "queue_length": 12},
    "deepcluster_v2": {"prototypes": (5, 3), "temperature": 0.3, "assign_views": (1, 0)},
}


def steps_on_rank(name, rank, world_size):
    """Take four steps on this rank's share of given embeddings.

    Returns:
        The losses, the gradients of the embeddings, the neighbours, and the state of the method after the steps.
    """
    method = build(name, **OVER_RANKS[name])
    if name == "swav":
        method.load_state_dict(method.state_dict() | {"queue_started": torch.tensor(True)})
    if name == "deepcluster_v2":
        method.bank.make_room(40)
        generator = torch.Generator().manual_seed(3)
        # the first half of each batch has more clusters than the second
        method.bank.clusters.copy_(torch.randint(3, (2, 40), generator=generator))
        method.bank.clusters[:, 4::8] = method.bank.clusters[:, 5::8] = IGNORED
    losses, gradients, neighbors = [], [], []
    for step in range(4):  # the queues of 12 are full in the last two
        images = torch.arange(8 * step, 8 * step + 8).chunk(world_size)[rank]
        whole = unit(2, 8, DIM, seed=step)
        views = [view.chunk(world_size)[rank].clone().requires_grad_() for view in whole]
        found = method.objective(views, images)
        found.loss.backward()
        losses.append(found.loss.item())
        gradients.append(torch.stack([torch.zeros_like(v) if v.grad is None else v.grad for v in views]))
        neighbors.append(found.neighbors)
    return losses, gradients, neighbors, {key: value.clone() for key, value in method.state_dict().items()}


def test_objectives_of_two_ranks_are_those_of_one_process(run_ranks):
    """The mean over ranks of the losses, their gradients, and what is remembered: queues, bank, clusters.

    The gradient of a rank is that of the sum of the ranks' losses, which is twice the gradient of their mean.
    """
    code = """
        sys.path.insert(0, "tests")
        from test_objectives import OVER_RANKS, steps_on_rank
        torch.save([steps_on_rank(name, rank, 2) for name in OVER_RANKS], out / f"{rank}.pt")
    """
    for name, *both in zip(OVER_RANKS, *run_ranks(2, code), strict=True):
        losses, gradients, neighbors, state = steps_on_rank(name, 0, 1)
        one, two = both
        assert [(a + b) / 2 for a, b in zip(one[0], two[0], strict=True)] == close(losses), name
        for whole, *halves in zip(gradients, one[1], two[1], strict=True):
            torch.testing.assert_close(torch.cat(halves, dim=1) / 2, whole, rtol=1e-9, atol=1e-12, msg=name)
        for whole, *halves in zip(neighbors, one[2], two[2], strict=True):
            assert (whole is None) == (halves[0] is None)
            assert whole is None or torch.equal(torch.cat(halves), whole)
        for rank in both:
            assert rank[3].keys() == state.keys()
            for key, value in state.items():
                torch.testing.assert_close(rank[3][key], value, rtol=1e-12, atol=1e-12, msg=f"{name}: {key}")
