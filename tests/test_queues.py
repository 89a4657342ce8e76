import pytest
import torch
import torch.nn.functional as F

from src.queues import NearestNeighborQueue


def push(queue, indices, **kwargs):
    indices = torch.tensor(indices)
    queue.push(F.normalize(torch.randn(len(indices), queue.embeddings.shape[1]), dim=1), indices, **kwargs)


def test_first_in_first_out_with_wrap_around():
    queue = NearestNeighborQueue(7, 3)
    push(queue, [0, 1, 2, 3])
    assert (queue.pointer, queue.full, queue.indices.tolist()) == (4, False, [0, 1, 2, 3, 0, 0, 0])
    push(queue, [4, 5, 6, 7])
    assert (queue.pointer, queue.full, queue.indices.tolist()) == (1, True, [7, 1, 2, 3, 4, 5, 6])


def test_nearest_is_never_the_image_itself_while_it_is_stored_once():
    queue = NearestNeighborQueue(4, 2)
    stored = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]), dim=1)
    queue.push(stored, torch.arange(4), labels=torch.tensor([5, 6, 7, 8]))
    neighbors, labels = queue.nearest(stored[:1], torch.tensor([0]))
    assert torch.equal(neighbors[0], stored[1])
    assert labels.tolist() == [6]
    assert queue.nearest(stored[:1], torch.tensor([9]))[1].tolist() == [5]  # another image may take the best


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        push(NearestNeighborQueue(3, 2), [0, 1, 2, 3])


def test_state_dict_restores_everything():
    queue, other = NearestNeighborQueue(5, 3), NearestNeighborQueue(5, 3)
    push(queue, [3, 4, 5], labels=torch.tensor([1, 0, 1]))
    push(queue, [6, 7, 8])
    assert queue.labels.tolist() == [-1, 0, 1, -1, -1]  # rows 3, 4 and 0 were pushed without
    other.load_state_dict(queue.state_dict())
    assert (other.pointer, other.full) == (queue.pointer, queue.full) == (1, True)
    push_next = torch.ones(2, 3)
    for q in (queue, other):
        q.push(push_next, torch.tensor([1, 2]))
    assert all(torch.equal(queue.state_dict()[name], value) for name, value in other.state_dict().items())


def test_authors_traces(golden):
    data = golden("nn_queue.npz")
    traces = sorted({name.split("_")[0] for name in data.files if name.startswith("trace")})
    assert traces
    lookups = 0
    for trace in traces:
        queue = NearestNeighborQueue(int(data[f"{trace}_queue_len"]), int(data[f"{trace}_dim"]))
        for step in range(len(data[f"{trace}_batch_sizes"])):
            key = f"{trace}_step{step:02d}_"
            embeddings, indices, labels = (
                torch.from_numpy(data[key + name]) for name in ("embeddings", "indices", "labels")
            )
            assert queue.full == bool(data[key + "full_before"])
            if queue.full:
                lookups += 1
                assert queue.nearest_rows(embeddings, indices).tolist() == data[key + "nn_rows"].tolist()
                neighbors, neighbor_labels = queue.nearest(embeddings, indices)
                assert torch.equal(neighbors, torch.from_numpy(data[key + "nn_embeddings"]))
                assert neighbor_labels.tolist() == data[key + "nn_labels"].astype(int).tolist()
            queue.push(embeddings, indices, labels)
            assert queue.pointer == int(data[key + "ptr_after"])
            assert queue.full == bool(data[key + "full_after"])
            assert queue.indices.tolist() == data[key + "queue_indices_after"].tolist()
        assert torch.equal(queue.embeddings, torch.from_numpy(data[f"{trace}_queue_final"]))
    assert lookups


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 40])
def test_chunks_of_the_queue_find_the_same_rows(chunk, monkeypatch):
    torch.manual_seed(0)
    queue = NearestNeighborQueue(16, 5)
    stored = F.normalize(torch.randn(16, 5), dim=1)
    queue.push(stored, torch.arange(16))
    queries = torch.cat([F.normalize(torch.randn(20, 5), dim=1), stored])  # the latter with themselves as best match
    indices = torch.cat([torch.arange(20), torch.arange(16)])
    expected = queue.nearest_rows(queries, indices)
    monkeypatch.setattr("src.queues.CHUNK", chunk)
    assert torch.equal(queue.nearest_rows(queries, indices), expected)
