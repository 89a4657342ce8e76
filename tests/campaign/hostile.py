"""Files that are made to crash, hang, swell or execute code: each is a function of the bytes of an intact checkpoint."""

import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from tests.campaign.mutants import nested, pack, unpack
from tests.campaign.trials import CANARY

Make = Callable[[bytes], bytes]
HOSTILE: dict[str, Make] = {}
PROTO = b"\x80\x02"


def _load(intact: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(intact), weights_only=True)


def _save(state: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def with_pickle(intact: bytes, data: bytes) -> bytes:
    """Return a checkpoint with another pickle in it."""
    return pack([(name, data if name.endswith("data.pkl") else content) for name, content in unpack(intact)])


# ---- code -----------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments

    def __call__(self) -> None:
        """Make the instance callable, because pickle accepts only callables as the function of a call."""


TOUCH = f"touch {CANARY}"
WRITE = f"open({CANARY!r}, 'w').close()"
CALLS: dict[str, Callable[[], Any]] = {
    "os.system": lambda: Call(os.system, TOUCH),
    "os.popen": lambda: Call(os.popen, TOUCH),
    "eval": lambda: Call(eval, WRITE),
    "exec": lambda: Call(exec, WRITE),
    "open": lambda: Call(open, CANARY, "w"),
    "os.mkdir": lambda: Call(os.mkdir, CANARY),
    "getattr of os": lambda: Call(Call(getattr, Call(__import__, "os"), "system"), TOUCH),
    "torch.load": lambda: Call(torch.load, CANARY),
    "torch.save": lambda: Call(torch.save, {}, CANARY),
    "pickle.loads": lambda: Call(pickle.loads, pickle.dumps(Call(os.system, TOUCH))),
}
PLACES: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "as the file": lambda state, evil: evil,
    "in the model": lambda state, evil: {**state, "model": {**state["model"], "evil": evil}},
    "as the configuration": lambda state, evil: {**state, "config": evil},
    "in the history": lambda state, evil: {**state, "history": [evil]},
    "as a key": lambda state, evil: {**state, "x": {"y": [(evil,)]}},
}


def _evil(call: str, place: str, **options: Any) -> Make:
    return lambda intact: _save(PLACES[place](_load(intact), CALLS[call]()), **options)


for _call in CALLS:
    for _place in PLACES:
        HOSTILE[f"{_call} {_place}"] = _evil(_call, _place)
    HOSTILE[f"{_call}, protocol 4"] = _evil(_call, "in the model", pickle_protocol=4)
    HOSTILE[f"{_call}, old format"] = _evil(_call, "in the model", _use_new_zipfile_serialization=False)
    HOSTILE[f"{_call}, a plain pickle"] = lambda intact, call=_call: pickle.dumps({"model": CALLS[call]()})
    HOSTILE[f"{_call}, an archive in an archive"] = lambda intact, call=_call: pack(
        [("c.pth", _evil(call, "in the model")(intact))]
    )

TEXT = b"X" + struct.pack("<I", len(TOUCH)) + TOUCH.encode()
OPERATIONS = {
    "GLOBAL and REDUCE": b"cposix\nsystem\n(" + TEXT + b"tR.",
    "INST": b"(" + TEXT + b"iposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\n" + TEXT + b"o.",
    "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93(" + TEXT + b"tR.",
    "NEWOBJ": b"cposix\nsystem\n(" + TEXT + b"t\x81.",
    "NEWOBJ_EX": b"cposix\nsystem\n(" + TEXT + b"t}\x92.",
    "EXT1": b"\x82\x01(" + TEXT + b"tR.",
    "BUILD of a stand-in": b"cutils\nNNQueue\n)\x81}(X\x0c\0\0\0__setstate__cposix\nsystem\nub" + TEXT + b"b.",
    "call of a stand-in": b"cutils\nNNQueue\n(" + TEXT + b"tR.",
    "attribute of a stand-in": b"cutils\nNNQueue.__setstate__\n(" + TEXT + b"tR.",
    "torch.storage": b"ctorch.storage\n_load_from_bytes\n(" + TEXT + b"tR.",
    "rebuild function": b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\ncutils\nNNQueue\n(" + TEXT + b"tNtR.",
    "numpy's reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n(cposix\nsystem\n(K\0tX\1\0\0\0btR.",
    "numpy's dtype of objects": b"cnumpy\ndtype\n(X\x02\0\0\0O8tR.",
    "persistent id": b"(X\x07\0\0\0storagecposix\nsystem\n" + TEXT + TEXT + b"K\1tQ.",
    "second pickle": b"}." + PROTO + b"cposix\nsystem\n(" + TEXT + b"tR.",
}
for _name, _data in OPERATIONS.items():
    HOSTILE[f"{_name}, in an archive"] = lambda intact, data=_data: with_pickle(intact, PROTO + data)
    HOSTILE[f"{_name}, a plain pickle"] = lambda intact, data=_data: PROTO + data


# ---- depth, length and size -----------------------------------------------------------------------------------------


def _pickles(name: str, make: Callable[[], bytes]) -> None:
    HOSTILE[f"{name}, in an archive"] = lambda intact: with_pickle(intact, make())
    HOSTILE[f"{name}, compressed"] = lambda intact: pack(unpack(with_pickle(intact, make())), compressed=True)
    HOSTILE[f"{name}, a plain pickle"] = lambda intact: make()


def _text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


_pickles("300,000 nested tuples", lambda: PROTO + b")" + b"\x85" * 300_000 + b".")
_pickles("300,000 nested lists", lambda: PROTO + b"]" * 300_000 + b"a" * 299_999 + b".")
_pickles("300,000 nested dicts", lambda: PROTO + b"}K\0" * 300_000 + b"N" + b"s" * 300_000 + b".")
_pickles("a nested dict as a key", lambda: PROTO + b"}" + b")" + b"\x85" * 100_000 + b"K\1s.")
_pickles("300,000 marks", lambda: PROTO + b"(" * 300_000 + b".")
_pickles("a class name of 400,000 letters", lambda: PROTO + b"c" + b"a" * 400_000 + b"\nb\n.")
_pickles("a class name of 400,000 points", lambda: PROTO + b"ca\n" + b"." * 400_000 + b"\n.")
_pickles("a class name of 400,000 spaces", lambda: PROTO + b"c" + b" " * 400_000 + b"\n" + b" " * 400_000 + b"\n.")
_pickles("a class name with escape sequences", lambda: PROTO + b"c\x1b[2J\x1b]0;evil\x07\nb\x1b[31m\n.")
_pickles("a class name with a return", lambda: PROTO + b"cos\rtrain.py: saved\nb\n.")
_pickles("a text that doubles 40 times", lambda: PROTO + _text(b"x") + b"q\0" + b"h\0\x86q\0" * 40 + b".")
_pickles("a list of itself", lambda: PROTO + b"]q\0h\0a.")
_pickles("a dict of itself", lambda: PROTO + b"}q\0" + _text(b"config") + b"h\0s.")
_pickles("an int of 10 million digits", lambda: PROTO + b"I" + b"9" * 10_000_000 + b"\n.")
_pickles("a long of 10 MB", lambda: PROTO + b"\x8b" + struct.pack("<i", 10_000_000) + b"\x7f" * 10_000_000 + b".")
_pickles("a text of a declared 2 GB", lambda: PROTO + b"X\xff\xff\xff\x7fabc.")
_pickles("a frame of a declared exabyte", lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.")
_pickles("bytes of a declared exabyte", lambda: b"\x80\x05\x8e" + struct.pack("<Q", 2**60) + b"N.")
_pickles("a bytearray of a declared exabyte", lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"N.")
_pickles("a memo of number 2^31", lambda: PROTO + b"Nr\xff\xff\xff\x7f.")
_pickles(
    "a million memos", lambda: PROTO + b"".join(b"Nr" + struct.pack("<I", i) + b"0" for i in range(1_000_000)) + b"N."
)
_pickles("protocol 255", lambda: b"\x80\xff}.")
_pickles("no end", lambda: PROTO + b"}")
_pickles("nothing", lambda: b"")


def _swollen(name: str, size: int) -> Make:
    """Return a function that adds an entry of compressed zeros to a checkpoint, or replaces the one of this name."""

    def make(intact: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for each, data in unpack(intact):
                if not each.endswith(name):
                    archive.writestr(each, data)
            with archive.open(f"archive/{name}", "w") as entry:
                for _ in range(size // 10**7):
                    entry.write(bytes(10**7))
        return file.getvalue()

    return make


HOSTILE["a storage of 2 GB in 9 MB"] = _swollen("data/0", 2 * 10**9)
HOSTILE["a pickle of 2 GB in 9 MB"] = _swollen("data.pkl", 2 * 10**9)
HOSTILE["an archive of 2 GB in an archive"] = lambda intact: pack([("c.pth", _swollen("data/0", 2 * 10**9)(intact))])
HOSTILE["100,000 entries"] = lambda intact: pack(
    [*unpack(intact), *((f"archive/data/x{i}", b"") for i in range(100_000))]
)
HOSTILE["an archive in an archive, 20 times"] = lambda intact: _wrapped(intact, 20)


def _wrapped(content: bytes, times: int) -> bytes:
    for _ in range(times):
        content = pack([("c.pth", content)])
    return content


# ---- contents -------------------------------------------------------------------------------------------------------


def _content(name: str, change: Callable[[dict[str, Any]], Any], **options: Any) -> None:
    def make(intact: bytes) -> bytes:
        state = _load(intact)
        changed = change(state)
        return _save(state if changed is None else changed, **options)

    HOSTILE[name] = make


TENSORS: dict[str, Callable[[], Any]] = {
    "a stride of 0": lambda: torch.zeros(1).expand(2**20, 2**20),
    "a stride of 0, 8 GB": lambda: torch.zeros(1).expand(2**31),
    "meta": lambda: torch.empty(2**20, 2**20, device="meta"),
    "sparse, with a shape of 4 TB": lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (2**20, 2**20)),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "without dimensions": lambda: torch.zeros(()),
    "empty": lambda: torch.zeros(0),
    "of 64 dimensions": lambda: torch.zeros([1] * 64),
    "of text": lambda: "tensor",
    "a list": lambda: [1.0, 2.0],
    "float8": lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "NaN": lambda: torch.full((4, 8), float("nan")),
}
for _name, _tensor in TENSORS.items():
    for _part in ("model", "totals"):
        _content(
            f"a tensor of {_part}: {_name}",
            lambda state, tensor=_tensor, part=_part: state[part].update(
                {next(iter(state[part] or {"x": 0})): tensor()}
            ),
        )
    _content(f"every tensor: {_name}", lambda s, tensor=_tensor: s.update(model={key: tensor() for key in s["model"]}))
    _content(f"the generator: {_name}", lambda state, tensor=_tensor: state.update(generator=tensor()))

WRONG: tuple[Any, ...] = (None, 5, -5, "x", 1.5, float("nan"), [], [1], {}, {1: 2}, True, b"bytes", 2**80, nested(50))
for _entry in (
    "config",
    "model",
    "optimizer",
    "scaler",
    "epoch",
    "done",
    "history",
    "totals",
    "seconds",
    "generator",
    "operations",
    "extended",
):
    _content(f"no {_entry}", lambda state, entry=_entry: [state.pop(entry, None)].clear())
    for _value in WRONG:
        _content(
            f"{_entry} is {str(_value)[:20]}", lambda state, entry=_entry, value=_value: state.update({entry: value})
        )
for _option in (
    "arch",
    "method",
    "classes",
    "hidden_dim",
    "dim",
    "queue_length",
    "channels",
    "global_crops_size",
    "data",
):
    _content(f"no {_option} in the configuration", lambda state, option=_option: [state["config"].pop(option)].clear())
    for _value in (*WRONG, 10**9, 10**13, -1, [10**9], [10**12] * 3, [0], [], ["x"], "\x1b[31mred\n", "x" * 10**6):
        _content(
            f"{_option} in the configuration is {str(_value)[:20]!r}",
            lambda state, option=_option, value=_value: state["config"].update({option: value}),
        )
_content("keys are numbers", lambda state: dict(enumerate(state.values())))
_content("keys of the model are numbers", lambda state: state.update(model=dict(enumerate(state["model"].values()))))
_content(
    "keys of the model have escape sequences",
    lambda s: s.update(model={f"\x1b[31m{k}\n": v for k, v in s["model"].items()}),
)
_content(
    "keys of the model have a megabyte", lambda s: s.update(model={k + "x" * 10**6: v for k, v in s["model"].items()})
)
_content("a state dict of 100,000 tensors", lambda s: {f"backbone.{i}": torch.zeros(1) for i in range(20_000)})
_content(
    "the configuration has escape sequences",
    lambda state: state["config"].update({"\x1b[2J": "\x07", "arch": "\x1b[2J"}),
)
_content(
    "a state of the optimiser with other shapes",
    lambda s: s["optimizer"]["state"].update({0: {"momentum_buffer": torch.zeros(7)}}),
)
_content("a state of the optimiser for a billionth parameter", lambda s: s["optimizer"]["state"].update({10**9: {}}))
_content("groups of the optimiser without parameters", lambda s: s["optimizer"].update(param_groups=[]))
_content("a format version 2", lambda state: state.update(version=2))
_content("a format version of text", lambda state: state.update(version="\x1b[2J"))
_content("a counter", lambda state: collections.Counter("abc"))
HOSTILE["a file of zeros"] = lambda intact: bytes(10**6)
HOSTILE["half of the file"] = lambda intact: intact[: len(intact) // 2]
HOSTILE["text"] = lambda intact: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HOSTILE["a page of a web server"] = lambda intact: b"<!DOCTYPE html><html>404</html>"
