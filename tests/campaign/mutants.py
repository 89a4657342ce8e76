"""Mutated checkpoint files: bytes, entries of the zip archive, operations of the pickle, and values in the content.

A mutant is a function of the random generator and of the sources, which are intact files.
"""

import io
import pickle
import pickletools
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Entries = list[tuple[str, bytes]]


def mutant(rng: random.Random, sources: Sequence[bytes]) -> bytes:
    """Return one of the sources with one to three changes."""
    content = rng.choice(sources)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        levels = [change_bytes, change_archive, change_pickle, change_pickle, change_value, change_value]
        try:
            content = rng.choice(levels)(content, rng)
        except Exception:  # an earlier change has left nothing that this level can read
            content = change_bytes(content, rng)
    return content


# ---- bytes ----------------------------------------------------------------------------------------------------------


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, exchange or overwrite some bytes."""
    changed = bytearray(content or b"\0")
    at, other = sorted((rng.randrange(len(changed)), rng.randrange(len(changed))))
    kind = rng.randrange(8)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        del changed[at : min(other, at + 64)]
    elif kind == 3:
        changed[at:at] = rng.randbytes(rng.choice([1, 4, 100, 5000]))
    elif kind == 4:
        changed[at : at + 8] = rng.choice(
            [b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, struct.pack("<q", len(content))]
        )
    elif kind == 5:
        changed += changed[at:other]
    elif kind == 6:
        changed[at:other] = bytes(other - at)
    else:
        changed[:0] = rng.randbytes(rng.choice([1, 512]))
    return bytes(changed)


# ---- archive --------------------------------------------------------------------------------------------------------


def unpack(content: bytes) -> Entries:
    """Return the entries of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def pack(entries: Entries, compressed: bool = False) -> bytes:
    """Return a zip archive with these entries, which may have equal names."""
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method, allowZip64=True) as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, data)
    return file.getvalue()


NAMES = (
    "../../executed",
    "/tmp/executed",
    "a" * 60000,
    "\x1b[31mred\n",
    "",
    "archive/data.pkl",
    "archive/version",
    ".",
)


def change_archive(content: bytes, rng: random.Random) -> bytes:
    """Drop, repeat, rename, exchange, empty, swell or compress entries, or lie about sizes in the directory."""
    entries = unpack(content)
    i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
    name, data = entries[i]
    kind = rng.randrange(11)
    if kind == 0:
        del entries[i]
    elif kind == 1:
        entries.append((name, rng.choice([data, b"", entries[j][1]])))
    elif kind == 2:
        entries[i] = (rng.choice([*NAMES, name + rng.choice(["/", "0", "\0", " "])]), data)
    elif kind == 3:
        entries[i], entries[j] = (name, entries[j][1]), (entries[j][0], data)
    elif kind == 4:
        entries[i] = (name, data[: rng.randrange(len(data) + 1)])
    elif kind == 5:
        entries[i] = (name, data + rng.randbytes(rng.choice([1, 4, 4096])))
    elif kind == 6:
        entries[i] = (name, bytes(rng.choice([10**6, 30 * 10**6])))
        return pack(entries, compressed=True)
    elif kind == 7:
        return pack(entries, compressed=True)
    elif kind == 8:
        entries = [(f"deep/{content_name}", content_data) for content_name, content_data in entries]
    elif kind == 9:
        return pack([(rng.choice(["c.pth", "c.pt", "../c.pth", "a/b/c.tar"]), content)], compressed=rng.random() < 0.5)
    else:
        return change_directory(pack(entries), rng)
    return pack(entries)


def change_directory(content: bytes, rng: random.Random) -> bytes:
    """Change a number in one record of the central directory, in a local header, or in the record at the end."""
    changed = bytearray(content)
    marks = {b"PK\1\2": (8, 10, 20, 24, 28, 30, 42), b"PK\3\4": (6, 8, 18, 22, 26, 28), b"PK\5\6": (8, 10, 12, 16)}
    mark = rng.choice([*marks])
    places = []
    at = content.find(mark)
    while at >= 0:
        places.append(at)
        at = content.find(mark, at + 4)
    at = rng.choice(places) + rng.choice(marks[mark])
    changed[at : at + 2] = rng.choice([b"\xff\xff", b"\0\0", b"\1\0", b"\x08\0", rng.randbytes(2)])
    if rng.random() < 0.5:
        changed[at + 2 : at + 4] = rng.choice([b"\xff\xff", b"\xff\x7f", rng.randbytes(2)])
    return bytes(changed)


# ---- pickle ---------------------------------------------------------------------------------------------------------

GLOBALS = (
    *("posix system", "builtins eval", "builtins getattr", "os popen", "collections Counter", "torch nn.Linear"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch FloatStorage", "torch storage.UntypedStorage"),
    *("torch._tensor _rebuild_from_type_v2", "torch Size", "torch device", "numpy dtype", "utils NNQueue"),
    *("numpy.core.multiarray scalar", "numpy.core.multiarray _reconstruct", "\x1b[2Jevil class", "a" * 20000 + " b"),
)
NUMBERS = (0, 1, -1, 255, 65535, 2**31 - 1, -(2**31))


def operations(data: bytes) -> list[bytes]:
    """Return the operations of a pickle as bytes."""
    starts = [place for _, _, place in pickletools.genops(data) if place is not None]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def change_pickle(content: bytes, rng: random.Random) -> bytes:
    """Change the operations of the pickle in an archive, or of a file that is a pickle."""
    if not content.startswith(b"PK"):
        return b"".join(_change_operations(operations(content), rng))
    entries = unpack(content)
    i = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    entries[i] = (entries[i][0], b"".join(_change_operations(operations(entries[i][1]), rng)))
    return pack(entries)


def _change_operations(steps: list[bytes], rng: random.Random) -> list[bytes]:
    i, j = rng.randrange(len(steps)), rng.randrange(len(steps))
    numbers = [k for k, step in enumerate(steps) if step[:1] in (b"J", b"K", b"M")]
    texts = [k for k, step in enumerate(steps) if step[:1] in (b"X", b"\x8c")]
    globals_ = [k for k, step in enumerate(steps) if step[:1] in (b"c", b"\x93")]
    kind = rng.randrange(11)
    if kind == 0:
        del steps[i]
    elif kind == 1:
        steps.insert(i, steps[j])
    elif kind == 2:
        steps[i], steps[j] = steps[j], steps[i]
    elif kind in (3, 4) and numbers:
        steps[rng.choice(numbers)] = b"J" + struct.pack("<i", rng.choice([*NUMBERS, rng.randrange(2**31)]))
    elif kind == 5 and numbers:
        huge = rng.choice([2**62, -(2**62), 2**64, 10**30])
        steps[rng.choice(numbers)] = pickle.dumps(huge, 2)[2:-1]
    elif kind == 6 and texts:
        text = rng.choice(
            ["", "\x1b]0;title\x07", "a\nb", "\u202egpj", "x" * 10**5, "model", "config", "cpu", "cuda:0", "meta"]
        )
        steps[rng.choice(texts)] = b"X" + struct.pack("<I", len(text.encode())) + text.encode()
    elif kind == 7 and globals_:
        steps[rng.choice(globals_)] = b"c" + rng.choice(GLOBALS).replace(" ", "\n", 1).encode() + b"\n"
    elif kind == 8:
        depth = rng.choice([10, 100, 500, 2000, 2000, 50_000])
        steps.insert(i, rng.choice([b"(" * depth, b"\x85" * depth, b"]" * depth + b"a" * (depth - 1), b"2" * depth]))
    elif kind == 9:
        steps[i] = rng.choice(
            [b"R", b"b", b"\x81", b"Q", b"0", b"(", b"t", b"s", b"u", b"}", b"N", b"h\xff", b"j\xff\xff\xff\x7f"]
        )
    else:
        steps.insert(
            i, rng.choice([b"cposix\nsystem\n(X\x0e\0\0\0touch executedtR0", b"I999999999999999999999\n", b"F1e999\n"])
        )
    return steps


# ---- content --------------------------------------------------------------------------------------------------------

VALUES: tuple[Callable[[], Any], ...] = (
    *(lambda: None, lambda: True, lambda: -1, lambda: 0, lambda: 2**63, lambda: 10**5000, lambda: 1.5),
    *(lambda: float("nan"), lambda: float("inf"), lambda: "", lambda: "x" * 10**5, lambda: "\x1b[31mred\n\x07"),
    *(
        list,
        dict,
        tuple,
        OrderedDict,
        lambda: [[]] * 1000,
        lambda: {1: 2, None: 3},
        lambda: nested(200),
        lambda: b"bytes",
    ),
    *(lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.zeros(3, dtype=torch.complex64)),
    *(lambda: torch.eye(3).to_sparse(), lambda: torch.empty(3, device="meta"), lambda: torch.zeros(1).expand(2**34)),
    *(lambda: torch.zeros(1).expand(2**12, 2**12, 2**8), lambda: torch.full((3,), float("nan"))),
    *(lambda: torch.zeros(3, dtype=torch.bool), lambda: torch.zeros(3, dtype=torch.int8), lambda: torch.zeros(0, 5)),
    *(lambda: torch.nn.Parameter(torch.zeros(2)), lambda: torch.arange(6).reshape(2, 3).t(), lambda: torch.Size([3])),
    *(lambda: torch.float32, lambda: torch.device("cuda:7"), lambda: {"a": {"b": {"c": torch.zeros(1)}}}),
)


def nested(depth: int) -> list:
    """Return a list in a list in a list, `depth` times."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def change_value(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove, rename or copy an entry at any depth of the content."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    places = list(containers(state))
    holder = rng.choice(places) if rng.random() < 0.5 else rng.choice([state, state.get("config", state)])
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = rng.choice(keys)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice([0, None, "", "\x1b[31m", "x" * 1000, (1, 2), -1, True])] = holder.pop(key)
    elif kind == 2 and isinstance(holder[key], Tensor):
        holder[key] = _other_tensor(holder[key], rng)
    elif kind == 3 and isinstance(holder[key], (int, float)):
        holder[key] = rng.choice(
            [-5, 0, 10**9, 10**13, 2**63, -holder[key], float("nan"), str(holder[key]), [holder[key]]]
        )
    elif kind == 4:
        holder[key] = holder[rng.choice(keys)]
    else:
        holder[key] = rng.choice(VALUES)()
    file = io.BytesIO()
    torch.save(state, file, pickle_protocol=rng.choice([2, 2, 2, 4]), _use_new_zipfile_serialization=rng.random() < 0.9)
    return file.getvalue()


def _other_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    shape = tuple(tensor.shape)
    return rng.choice(
        [
            lambda: tensor.double() if tensor.is_floating_point() else tensor.float(),
            lambda: tensor.flatten(),
            lambda: tensor[None],
            lambda: tensor.reshape(-1)[:1].expand(*(shape or (1,)), 10**9),
            lambda: torch.zeros(*shape[:-1], (shape[-1] if shape else 0) + 1),
            lambda: tensor.to(torch.float16),
            lambda: tensor * float("nan"),
            lambda: -tensor.float(),
            *(lambda value=value: torch.full_like(tensor, value) for value in (-1, 100, 127)),
            lambda: torch.full_like(tensor.long(), rng.choice([-(2**63), -1, 10**6, 2**62, 2**63 - 1])),
        ]
    )()


def containers(value: Any) -> Any:
    """Yield the non-empty dicts and lists in the content."""
    if isinstance(value, dict) and value:
        yield value
        for inside in value.values():
            yield from containers(inside)
    elif isinstance(value, list) and value:
        yield value
        for inside in value:
            yield from containers(inside)
