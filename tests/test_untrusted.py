"""Files that ask for memory, time or stack that they do not hold are refused with one line, and quickly."""

import io
import resource
import zipfile
from pathlib import Path
from types import SimpleNamespace

import hostile
import pytest
import torch
from evaluating import save_untrained
from hostile import changed, entries, number, numbers, ours, tensor, text, write_legacy, write_zip

from src import allowed, checkpoint, inspection, run, schema
from src.errors import InputError
from src.loading import is_modest, load_backbone, load_classifiers, load_method, start_from
from src.methods import METHODS
from src.methods.self_classifier import Config as SelfClassifierConfig

NESTED = b")" + 300_000 * b"\x85"
COPIED = b"(]q\x00(" + 1000 * (text("ab")) + b"e" + b"ccollections\nOrderedDict\nq\x010" + b""
HOSTILE = {
    "tuples in tuples, as a key": (b"}" + NESTED + b"Ns", "containers in each other|keys that are no text"),
    "tuples in tuples": (ours(config=NESTED), "more than 100 containers in each other"),
    "lists in lists": (ours(config=200 * b"]" + 199 * b"a"), "more than 100 containers in each other"),
    "a list that grows after it was used": (b"]q\x00]h\x00ah\x00]a", "not a checkpoint"),
    "a long class name": (b"c" + 400_000 * b"x" + b"\n\n", "class of more than 200 letters"),
    "a long function name": (b"ctorch\n" + 400_000 * b"x" + b"\n", "class of more than 200 letters"),
    "a long name, not ended": (b"c" + 400_000 * b"x", "class of more than 200 letters"),
    "a shape of 4 TB": (entries(w=tensor((1 << 40,), (1,))), r"shape \(1099511627776,\) in a storage of 4 numbers"),
    "a shape of 4 TB with a stride of 0": (entries(w=tensor((1 << 40,), (0,))), "in a storage of 4 numbers"),
    "an offset behind the storage": (entries(w=tensor((2,), (1,), offset=3)), "in a storage of 4 numbers"),
    "a stride behind the storage": (entries(w=tensor((2, 2), (1 << 40, 1))), "in a storage of 4 numbers"),
    "a negative stride": (entries(w=tensor((2,), (-1,))), "not a checkpoint"),
    "fewer strides than dimensions": (entries(w=tensor((2, 2), (1,))), "not a checkpoint"),
    "a size whose product overflows": (entries(w=tensor((1 << 32, 1 << 32), (0, 0))), "in a storage of 4 numbers"),
    "a storage of 4 TB": (entries(w=tensor((1 << 40,), (1,), storage=1 << 40)), "storage 0 is declared with"),
    "a storage that does not exist": (entries(w=tensor(key="17")), "storage 17 is declared with"),
    "a bytearray of 1 TB": (
        b"cbuiltins\nbytearray\n" + number(1 << 40) + b"\x85R",
        r"execute code \(builtins.bytearray\)",
    ),
    "a tensor without data": (
        entries(w=b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n" + numbers(1 << 40) + b"(tNtR"),
        r"w is a tensor without data \(meta\), expected a dense tensor",
    ),
    "a length of 1 GB": (b"X\xff\xff\xff\x3f", "not a checkpoint"),
    "an operation without operands": (b"u", "not a checkpoint"),
    "other state of a dictionary": (
        b"ccollections\nOrderedDict\n)R}" + text("items") + number(3) + b"sb",
        "not a checkpoint",
    ),
    "keys that collide": (
        b"}(" + number((1 << 61) - 1) + b"N" + number(2 * ((1 << 61) - 1)) + b"Nu",
        "keys that are no",
    ),
    "nothing but a number": (number(3), "holds int"),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(("operations", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_pickle_that_asks_for_too_much_is_refused(tmp_path, operations, message, write):
    path = write(tmp_path / "evil.pt", operations)
    if write is write_legacy:  # whose storages have no list
        message = message.replace("storage 17", "storage key '0' not found|storage 17").replace(
            "holds int", "holds int|not found"
        )
    with pytest.raises(InputError, match=message) as refused:
        checkpoint.load(path)
    assert "evil.pt" in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)


def test_the_hostile_files_are_otherwise_good(tmp_path):
    """What the other tests change is the reason for which a file is refused."""
    for write in (write_zip, write_legacy):
        assert checkpoint.load(write(tmp_path / "c.pt", ours(model=entries(w=tensor()))))["model"]["w"].tolist() == [
            0,
            0,
        ]


def test_long_pickles_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="more than 2,000,000 operations"):
        checkpoint.load(write_zip(tmp_path / "c.pt", b"]" + 2_000_000 * b"Na", deflated=True))
    monkeypatch.setattr(inspection, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="not a checkpoint"):
        checkpoint.load(write_zip(tmp_path / "c.pt", entries(w=text(1000 * "x"))))


def test_copying_one_list_again_and_again_is_refused(tmp_path):
    pairs = b"](" + 9999 * text("ab") + b"eq\x00"
    copies = 300 * b"ccollections\nOrderedDict\nh\x00\x85Rr\x01\x00\x00\x00a"
    with pytest.raises(InputError, match="copies too much"):
        checkpoint.load(write_zip(tmp_path / "c.pt", b"]" + pairs + b"a" + copies))
    encoded = b"]" + text(1_000_000 * "x") + b"q\x00a" + 3 * (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86Ra")
    with pytest.raises(InputError, match="copies too much"):
        checkpoint.load(write_zip(tmp_path / "c.pt", encoded))


def test_tensors_that_share_one_storage_must_not_exceed_it_many_times(tmp_path):
    storage = 1 << 23  # numbers
    shared = {f"w{i}": tensor((storage,), (1,), storage=storage) for i in range(4)}
    path = write_zip(tmp_path / "c.pt", entries(**shared), storages=[("0", bytes(4 * storage))])
    with pytest.raises(InputError, match="its tensors take 134,217,728 bytes, but their storages have 33,554,432"):
        checkpoint.load_weights(path)


# ---- archives -------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory():
    """Let this process grow by at most 1 GB."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_short_archive_with_long_contents_is_refused(tmp_path, monkeypatch, little_memory):
    monkeypatch.setattr(inspection, "ROOM", 1 << 20)
    (tmp_path / "bomb.pt").write_bytes(hostile.bomb(1 << 23))
    with pytest.raises(InputError, match=r"an archive of [\d,]+ bytes whose contents take 8,38\d,\d+"):
        checkpoint.load_weights(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.pt", bytes(1 << 23))
    with pytest.raises(InputError, match="whose contents take"):
        checkpoint.load_weights(tmp_path / "outer.zip")


def test_a_compressed_archive_with_ordinary_contents_is_read(tmp_path):
    path = write_zip(tmp_path / "c.pt", ours(model=entries(w=tensor())), deflated=True)
    assert checkpoint.load(path)["model"]["w"].tolist() == [0, 0]


def test_archives_in_archives_are_refused(tmp_path):
    inner = write_zip(tmp_path / "c.pt", ours(model=entries(w=tensor()))).read_bytes()
    for _ in range(2):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("c.pt", inner)
        inner = file.getvalue()
    (tmp_path / "outer.zip").write_bytes(inner)
    with pytest.raises(InputError, match="an archive of 1 checkpoints, expected one"):
        checkpoint.load(tmp_path / "outer.zip")


def test_archives_that_two_readers_would_read_differently_are_refused(tmp_path):
    path = write_zip(tmp_path / "c.pt", ours(model=entries(w=tensor())))
    whole = path.read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    fewer = whole[: end + 8] + b"\x02\x00\x02\x00" + whole[end + 12 :]  # the record counts two of four entries
    comment = whole[:-2] + b"\x04\x00text"
    for damaged in (b"PK\x03\x04" + whole, fewer, comment, whole.replace(b"c/version", b"C/DATA/0\x00"[:9])):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", b"\x80\x02}.")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("c/data.pkl", b"\x80\x02].")
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load(path)


def test_an_archive_of_many_entries_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MOST_ENTRIES", 3)
    with pytest.raises(InputError, match="an archive of 4 entries, expected at most 3"):
        checkpoint.load(write_zip(tmp_path / "c.pt", ours()))


# ---- contents -------------------------------------------------------------------------------------------------------

WRONG_CONFIGS = {
    "classes": (10**12, [5, 10**12], "5", [], 5 * [[2]], [2.5], 100_000 * [2]),
    "hidden_dim": (10**9, -1, 1.5, "x", None, 10**30),
    "dim": (10**12, True),
    "queue_length": (10**12, -3),
    "head_layers": (10**9,),
    "row_tau": ("0.1", 0, float("nan"), [1]),
    "activation": ("tanh", 3),
    "arch": (None, 3, "resnet50w5", 100_000 * "x", "\x1b[31m"),
    "method": (None, 3),
    "channels": ("1", 0, 10**15, None),
    "global_crops_size": (10**12, -1, "8"),
    "global_crops_number": (10**9, 0),
    "global_crops_scale": ([0.1], [2, 3], 5),
    "patch_size": (0, 10**9),
    "augment": ("none", 5),
    "data": (5, None),
    "subset": ("../../secret", 5),
    "seed": ("x",),
}
SMALL = ("--classes", "4", "--hidden-dim", "8", "--dim", "4", "--queue-length", "0", "--arch", "small_convnet")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("untrained") / "checkpoint.pt", *SMALL).read_bytes()


@pytest.fixture
def saved(tmp_path, untrained):
    (tmp_path / "checkpoint.pt").write_bytes(untrained)
    return tmp_path / "checkpoint.pt"


def refusals(path) -> list[str]:
    """Return what every reader says of a file."""
    said = []
    for read in (load_method, load_classifiers, load_backbone):
        with pytest.raises(InputError) as refused:
            read(path)
        said.append(str(refused.value))
        assert "\n" not in said[-1]
        assert len(said[-1]) < 1000
    return said


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG_CONFIGS for value in WRONG_CONFIGS[name]])
def test_a_configuration_of_wrong_types_or_sizes_is_refused(saved, little_memory, name, value):
    changed(saved, lambda content: content["config"].update({name: value}))
    for line in refusals(saved):
        assert name in line.replace("--", "").replace("-", "_") or "tensors:" in line, line


@pytest.mark.parametrize("name", ["arch", "method", "classes", "channels", "global_crops_size", "augment", "data_root"])
def test_a_configuration_without_an_entry_is_refused(saved, name):
    changed(saved, lambda content: content["config"].pop(name))
    assert all(name in line for line in refusals(saved))


WRONG = {
    "config": (5, [], {5: 6}, None),
    "model": ([], 5, {5: torch.ones(1)}, {"w": 5}, {"w": torch.ones(2) * 1j}, {"w": torch.ones(())}, {}),
    "history": ({}, 5, [5], [{5: 6}], [{"loss": torch.ones(2)}], [{"loss": 200 * [[[[[[1]]]]]]}]),
    "epoch": ("x", -5, 1.5, None, 10**30, True),
    "done": ("x", -5),
    "optimizer": (5, {}, {"param_groups": [], "state": {}}, {"param_groups": [{"params": ["x"]}], "state": {}}),
    "generator": (None, 5, torch.ones(3), torch.zeros(5056, dtype=torch.uint8)[:7]),
    "cuda_generator": (5, torch.ones(16)),
    "totals": ([], {"loss": 5}),
    "extended": (5, ["x"]),
    "operations": (5, {"total": "x", "epoch": 0, "known": {}}, {"total": 1, "epoch": 0, "known": {"a": -1}}),
    "scaler": (5, {"scale": torch.ones(1)}),
    "seconds": ("x", -1, float("nan")),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_an_entry_of_a_wrong_type_is_named(saved, name, value):
    def change(content):
        content.setdefault("done", 0)
        content[name] = value

    changed(saved, change)
    if (name, value) == ("model", {}):
        assert all("the file holds 0 tensors" in line for line in refusals(saved))
        return
    with pytest.raises(InputError, match=rf"the entry {name}") as refused:
        checkpoint.load_run(saved)
    assert "\n" not in str(refused.value)
    assert all(f"the entry {name}" in line for line in refusals(saved))


@pytest.mark.parametrize("name", ["config", "history", "epoch", "done"])
def test_a_run_does_not_continue_without_an_entry(tmp_path, saved, name):
    def change(content):
        content["done"] = 0
        del content[name]

    changed(saved, change)
    with pytest.raises(InputError, match=f"has no {name}"):
        run.find_checkpoint(tmp_path, {})


def test_sparse_tensors_are_named(saved):
    changed(saved, lambda content: content["model"].update(w=torch.ones(3).to_sparse()))
    assert all("w is a sparse tensor, expected a dense tensor" in line for line in refusals(saved))


def test_weights_of_a_network_that_the_file_does_not_hold_are_refused(tmp_path, little_memory):
    """A file of another project may name any network."""
    state = {
        "module.encoder_q.conv1.weight": torch.ones(64, 3, 7, 7),
        "module.encoder_q.layer1.0.conv2.weight": torch.ones(2),
    }
    torch.save({"state_dict": state, "arch": "regnet_y_128gf"}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="does not fit"):
        load_backbone(tmp_path / "c.pt")
    swav = {
        "conv1.weight": torch.ones(2),
        "projection_head.0.weight": torch.ones(3, 3),
        "prototypes.weight": torch.ones(5),
    }
    torch.save({"state_dict": swav, "arch": "resnet50w5"}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="shapes of SwAV"):
        load_method(tmp_path / "c.pt")


def test_a_memory_bank_is_compared_with_its_embeddings_before_it_is_made(tmp_path, little_memory):
    words = ("--method", "deepcluster_v2", "--prototypes", "3", "--hidden-dim", "8", "--dim", "4")
    path = save_untrained(tmp_path / "c.pt", *words)
    long = torch.zeros(1, dtype=torch.bool).expand(1 << 28)
    changed(path, lambda content: content["model"].update({"bank.written": torch.zeros(1 << 20, dtype=torch.bool)}))
    with pytest.raises(
        InputError, match=r"the memory bank has embeddings of the shape \(2, 0, 4\), expected \(2, 1048576, 4\)"
    ):
        load_method(path)
    with pytest.raises(InputError, match="the memory bank has embeddings of the shape None"):
        METHODS["deepcluster_v2"].make_room(
            SimpleNamespace(bank=SimpleNamespace(embeddings=torch.zeros(2, 0, 4))), {"bank.written": long}
        )


def test_a_modest_configuration_is_not_compared_twice(saved, monkeypatch):
    config = torch.load(saved, weights_only=True)["config"]
    options = SelfClassifierConfig(classes=(4,), hidden_dim=8, dim=4, queue_length=0)
    assert is_modest(config, options)
    for name, value in (("arch", "resnet50w5"), ("arch", "vit_small"), ("channels", 17), ("arch", "unknown")):
        assert not is_modest({**config, name: value}, options)
    for changes in (
        {"hidden_dim": 1 << 20},
        {"classes": (1 << 20,)},
        {"queue_length": 1 << 20},
        {"classes": (1000,) * 500},
    ):
        assert not is_modest(config, SelfClassifierConfig(**{"hidden_dim": 8, "dim": 4, "queue_length": 0, **changes}))


def test_pretrained_weights_are_checked_too(saved):
    changed(saved, lambda content: content.update(model=[]))
    with pytest.raises(InputError, match="the entry model"):
        start_from(SimpleNamespace(state_dict=dict), "self_classifier", str(saved))


@pytest.mark.parametrize("dtype", [*schema.NUMBERS, *schema.WHOLE_NUMBERS, torch.complex64, torch.complex128])
def test_the_checks_know_the_size_of_every_number(tmp_path, dtype):
    torch.save({"w": torch.zeros(2, 3, dtype=dtype)}, tmp_path / "c.pt")
    with open(tmp_path / "c.pt", "rb") as file:
        assert inspection.checked_checkpoint(file) is file
    assert sum(name.endswith("Storage") for name in allowed.STORAGES) == 14
