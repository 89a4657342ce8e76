import pytest
import torch
import torch.nn.functional as F

from src.queues import EmbeddingQueue, MemoryBank, NearestNeighborQueue


def push(queue, indices, **kwargs):
    indices = torch.tensor(indices)
    queue.push(F.normalize(torch.randn(len(indices), queue.embeddings.shape[1]), dim=1), indices, **kwargs)


def test_first_in_first_out_with_wrap_around():
    queue = NearestNeighborQueue(7, 3)
    push(queue, [0, 1, 2, 3])
    assert (queue.pointer, queue.full, queue.indices.tolist()) == (4, False, [0, 1, 2, 3, 0, 0, 0])
    push(queue, [4, 5, 6, 7])
    assert (queue.pointer, queue.full, queue.indices.tolist()) == (1, True, [7, 1, 2, 3, 4, 5, 6])


def test_exactly_filled_is_full():
    queue = NearestNeighborQueue(6, 3)
    push(queue, [0, 1, 2])
    assert (queue.pointer, queue.full) == (3, False)
    push(queue, [3, 4, 5])
    assert (queue.pointer, queue.full) == (0, True)
    whole = EmbeddingQueue(4, 3)
    assert whole.push(torch.ones(4, 3)).tolist() == [0, 1, 2, 3]
    assert (whole.pointer, whole.full) == (0, True)


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (5, 1, 4, 2, 5), (1,) * 12])
def test_queue_is_a_list_of_the_last_rows(sizes):
    """Contents, place of the oldest row, and what `push` returns, after every push."""
    queue, history = EmbeddingQueue(5, 2), []
    for number, size in enumerate(sizes):
        rows = [[float(number), float(i)] for i in range(size)]
        written = queue.push(torch.tensor(rows))
        assert queue.embeddings[written].tolist() == rows
        history = (history + rows)[-5:]
        assert queue.full == (sum(sizes[: number + 1]) >= 5)
        by_age = torch.cat([queue.embeddings[queue.pointer :], queue.embeddings[: queue.pointer]])
        assert by_age[5 - len(history) :].tolist() == history
        if not queue.full:
            assert not queue.embeddings[queue.pointer :].any()


def test_look_ups_are_those_of_loops_in_float64():
    """Images are known by their index, which is not their row: an image stored twice is excluded once."""
    generator = torch.Generator().manual_seed(0)
    stored = F.normalize(torch.randn(12, 4, generator=generator, dtype=torch.double), dim=1)
    images = [7, 3, 11, 0, 5, 3, 9, 1, 8, 2, 20, 6]  # image 3 twice
    queue = NearestNeighborQueue(12, 4).double()
    queue.push(stored, torch.tensor(images), torch.arange(100, 112))
    queries = F.normalize(stored + 0.2 * torch.randn(12, 4, generator=generator, dtype=torch.double), dim=1)
    rows = torch.cat([queue.nearest_rows(queries, torch.tensor(own)) for own in (images, list(range(12)))])
    expected = []
    for own in (images, list(range(12))):
        for query, image in zip(queries.tolist(), own, strict=True):
            products = [sum(a * b for a, b in zip(query, row, strict=True)) for row in stored.tolist()]
            first, second = sorted(range(12), key=lambda row: -products[row])[:2]
            expected.append(second if images[first] == image else first)
    assert rows.tolist() == expected
    embeddings, labels = queue.nearest(queries, torch.tensor(images))
    assert torch.equal(embeddings, stored[rows[:12]])
    assert labels.tolist() == [100 + row for row in expected[:12]]


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


def test_bank_keeps_the_last_embedding_of_each_image():
    bank = MemoryBank(num_banks=2, num_heads=3, dim=2)
    assert (len(bank), bank.clusters.shape) == (0, (3, 0))
    bank.make_room(5)
    assert len(bank) == 5
    assert not bank.embeddings.any()
    assert not bank.written.any()
    assert (bank.clusters == -100).all()
    first, second = torch.arange(1.0, 9).view(2, 2, 2), torch.arange(11.0, 19).view(2, 2, 2)
    bank.write(first, torch.tensor([3, 0]))
    bank.write(second, torch.tensor([4, 3]))
    assert bank.embeddings[0].tolist() == [[3, 4], [0, 0], [0, 0], [13, 14], [11, 12]]
    assert bank.embeddings[1].tolist() == [[7, 8], [0, 0], [0, 0], [17, 18], [15, 16]]
    assert bank.written.tolist() == [True, False, False, True, True]


def test_bank_remembers_values_not_graphs():
    bank = MemoryBank(1, 1, 2)
    bank.make_room(2)
    bank.write(torch.ones(1, 1, 2, requires_grad=True), torch.tensor([1]))
    assert not bank.embeddings.requires_grad
    queue = NearestNeighborQueue(2, 2)
    queue.push(torch.ones(2, 2, requires_grad=True), torch.arange(2))
    assert not queue.embeddings.requires_grad
    assert not queue.nearest(torch.ones(1, 2, requires_grad=True), torch.tensor([0]))[0].requires_grad


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
