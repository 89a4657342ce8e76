"""Walk over the pickle in a checkpoint without building anything, to find what torch.load must not be asked to do.

torch's safe loader executes no code, but it believes sizes: a tensor may declare any shape, and nested tuples end a process
by a stack overflow when they are hashed. The walk follows the same operations with stand-ins. It knows every class and
function that a checkpoint may name, compares each tensor with the bytes of its storage, and limits depth and length.

Source of the operations: Python's pickletools, and torch's `_weights_only_unpickler`, which takes only a part of them.
"""

import math
import struct
from collections.abc import Callable
from operator import mul
from typing import Any

from .allowed import (
    CALLABLE,
    FLAT,
    KEYS,
    KNOWN,
    QUEUE,
    SIMPLE,
    STORAGES,
    TENSORS,
    UNUSUAL,
    ATensor,
    Container,
    Deep,
    Name,
    Object,
    Storage,
    Unusual,
)
from .errors import InputError, printable

MOST_BYTES = 1 << 25  # of a pickle; storages do not count
MOST_OPERATIONS = 2_000_000  # 12,000 tensors with an optimiser, and the history of 1,000 epochs, take a quarter of it
MOST_DEPTH = 100  # of containers in containers
MOST_NAME = 200  # letters of a class or function
MOST_DIMENSIONS = 25
MOST_COPIED = 10_000  # entries of a list that becomes the keys of a dictionary; keys can be made to collide
SHARED = 1 << 26  # bytes by which tensors that share storages may exceed the storages
FOUR_BYTES = struct.Struct("<I")
CONSTANTS = {ord("N"): None, ord(")"): (), 0x88: True, 0x89: False}
_MARK = object()
DAMAGED = "not a checkpoint, or damaged: use another file"


def _refused(name: str) -> InputError:
    return InputError(f"refused, loading it would execute code ({printable(name)}): use a file that holds only tensors")


class Walk:
    """Follow one pickle.

    Args:
        data: bytes that contain it.
        start: where it begins.
        available: takes the key of a storage and returns the number of bytes that the file has for it; -1: it has none.
            None: storages are not described by the file elsewhere, as in files of torch before 1.6.
        total: bytes that all storages together may have.

    Attributes:
        at: position after the last operation.
        storages: {key: bytes} of the storages that the pickle names.
    """

    def __init__(self, data: bytes, start: int = 0, *, available: Callable[[str], int] | None, total: int):
        self.data, self.at, self.available, self.total = data, start, available, total
        self.stack: list[Any] = []
        self.marks: list[int] = []  # where the marks lie on the stack
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, int] = {}
        self.extents: dict[tuple[Any, Any], tuple[int, int]] = {}  # of shapes and strides; many tensors have the same
        self.declared = self.tensor_bytes = self.copied = 0
        self.protocol = 2
        self.is_newer = False  # uses operations that torch does not know

    def run(self) -> Any:
        """Follow the pickle to its end and return its stand-in.

        Raises:
            InputError: if the pickle names something unknown, is damaged, or exceeds a limit.
        """
        try:
            return self._run()
        except InputError:
            raise
        except (IndexError, KeyError, ValueError, TypeError, struct.error, AttributeError, OverflowError):
            raise InputError(DAMAGED) from None  # as on arbitrary bytes

    def _run(self) -> Any:
        data, stack, marks, memo, at = self.data, self.stack, self.marks, self.memo, self.at
        four_bytes = FOUR_BYTES.unpack_from
        for _ in range(MOST_OPERATIONS):
            operation = data[at]
            at += 1
            # the most frequent operations come first, and without a call
            if operation == 0x72:  # LONG_BINPUT
                memo[four_bytes(data, at)[0]] = stack[-1]
                at += 4
            elif operation == 0x68:  # BINGET
                found = memo[data[at]]
                if type(found) is Container:
                    found.closed = True
                stack.append(found)
                at += 1
            elif operation == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            elif operation == 0x58:  # BINUNICODE
                end = at + 4 + four_bytes(data, at)[0]
                if end > len(data):
                    raise InputError(DAMAGED)
                stack.append(str(data[at + 4 : end], "utf-8", "surrogatepass"))
                at = end
            elif operation == 0x28:  # MARK
                marks.append(len(stack))
                stack.append(_MARK)
            elif operation == 0x74:  # TUPLE
                self.put_together(self.above_mark())
            elif operation == 0x52:  # REDUCE
                self.call()
            elif operation == 0x4D:  # BININT2
                stack.append(data[at] | data[at + 1] << 8)
                at += 2
            elif operation in CONSTANTS:
                stack.append(CONSTANTS[operation])
            elif operation == 0x85:  # TUPLE1
                if type(stack[-1]) in SIMPLE:
                    stack[-1] = (stack[-1],)
                else:
                    self.put_together([stack.pop()])
            elif operation == 0x51:  # BINPERSID
                self.storage()
            elif operation == 0x71:  # BINPUT
                memo[data[at]] = stack[-1]
                at += 1
            elif operation == 0x2E:  # STOP
                self.at = at
                return self._finish()
            else:
                self.at = at
                handler = HANDLERS.get(operation)
                if handler is None:
                    self.check_protocol()
                    raise InputError(DAMAGED)
                handler(self)
                at = self.at
        raise InputError(f"a pickle of more than {MOST_OPERATIONS:,} operations: use a file that holds only tensors")

    def _finish(self) -> Any:
        (result,) = self.stack
        if type(result) is Unusual:
            raise InputError(f"holds {result.what}, expected dense tensors: use another file")
        if self.tensor_bytes > self.total + SHARED:
            raise InputError(
                f"its tensors take {self.tensor_bytes:,} bytes, but their storages have {self.total:,}: use another file"
            )
        return result

    def check_protocol(self) -> None:
        """Raise InputError if torch's safe loader does not know this protocol."""
        if self.protocol > 2 or self.is_newer:
            raise InputError(f"pickle protocol {self.protocol}, expected 2: save it with torch.save's default protocol")

    # ---- reading ----

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) < count:
            raise InputError(DAMAGED)
        self.at += count
        return found

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + MOST_NAME + 1)
        if end < 0:
            raise InputError(f"names a class of more than {MOST_NAME} letters: use a file that holds only tensors")
        found = self.data[self.at : end].decode("utf-8", "backslashreplace")
        self.at = end + 1
        return found

    def above_mark(self) -> list[Any]:
        stack, at = self.stack, self.marks.pop()
        found = stack[at + 1 :]
        if len(stack) <= at:
            raise InputError(DAMAGED)
        del stack[at:]
        return found

    def top(self, kind: str) -> Container:
        """Return the container on top of the stack, which is about to change."""
        found = self.stack[-1]
        if type(found) is not Container or found.kind != kind or found.closed:
            raise InputError(DAMAGED)
        return found

    # ---- operations ----

    def name(self, module: str, name: str) -> None:
        module = {"__builtin__": "builtins"}.get(module, module)
        full = f"{module}.{name}"
        if len(full) > MOST_NAME:
            raise InputError(f"names a class of more than {MOST_NAME} letters: use a file that holds only tensors")
        if full not in KNOWN:
            raise _refused(full)
        self.stack.append(Name(full))

    def put_together(self, items: list[Any]) -> None:
        """Push a tuple."""
        if SIMPLE.issuperset(map(type, items)):
            self.stack.append(tuple(items))
            return
        if Unusual in map(type, items):
            raise InputError("holds tensors of an unusual kind, expected dense tensors: use another file")
        depth = max(map(_depth, items))
        made = Deep(items)
        made.depth = _deeper(depth)
        self.stack.append(made)

    def set_items(self, items: list[Any]) -> None:
        target = self.top("dict")
        if len(items) % 2:
            raise InputError(DAMAGED)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in KEYS or (type(key) is int and not -(1 << 31) <= key < 1 << 32):
                raise InputError("a dictionary with keys that are no text and no number: use another file")
            kind = type(value)
            if kind not in FLAT:
                target.depth = max(target.depth, _deeper(_depth(value)))
            elif kind is Unusual:
                raise InputError(f"{_shown(key)} is {value.what}, expected a dense tensor: use another file")
            target.key = key
        target.size += len(items) // 2

    def add(self, items: list[Any]) -> None:
        target = self.top("list")
        for item in items:
            if type(item) not in FLAT:
                target.depth = max(target.depth, _deeper(_depth(item)))
            elif type(item) is Unusual:
                raise InputError(f"holds {item.what}, expected dense tensors: use another file")
        target.size += len(items)

    def get(self, key: int) -> None:
        found = self.memo[key]
        if type(found) is Container:
            found.closed = True
        self.stack.append(found)

    def storage(self) -> None:
        """Replace the description of a storage by the storage."""
        pid = self.stack.pop()
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise InputError(DAMAGED)
        kind, key, numbers, view = pid[1], pid[2], pid[4], pid[5:]
        item = STORAGES.get(kind) if type(kind) is Name else None
        if item is None or type(numbers) is not int or numbers < 0 or type(key) is not str:
            raise InputError(DAMAGED)
        size = item * numbers
        if key not in self.storages:
            self.storages[key] = size
            self.declared += size
            there = self.total if self.available is None else self.available(key)
            if size > there or self.declared > self.total:
                raise InputError(
                    f"storage {_shown(key)} is declared with {size:,} bytes, but the file has "
                    f"{max(min(there, self.total - self.declared + size), 0):,} for it: use another copy"
                )
        elif self.storages[key] != size:
            raise InputError(DAMAGED)
        if view and view[0] is not None:
            _, offset, length = view[0]
            if not (type(offset) is type(length) is int and offset >= 0 and 0 <= length <= numbers - offset):
                raise InputError(DAMAGED)
            numbers = length
        self.stack.append(Storage(item, numbers))

    def call(self) -> None:
        """Replace a function and its arguments by the result."""
        stack = self.stack
        arguments, name = stack.pop(), stack[-1]
        if type(name) is not Name or name not in CALLABLE or not isinstance(arguments, tuple):
            raise InputError(DAMAGED)
        result: Any
        if name in TENSORS:
            result = self.tensor(arguments)
        elif name in UNUSUAL:
            result = Unusual(UNUSUAL[name])
        elif name == "torch._utils._rebuild_parameter":
            if type(arguments[0]) is not ATensor:
                raise InputError(DAMAGED)
            result = arguments[0]
        elif name == "torch.Size":
            (result,) = arguments
            if type(result) is not tuple:
                raise InputError(DAMAGED)
        elif name in ("collections.OrderedDict", "collections.Counter", "builtins.set"):
            result = self.filled(name, arguments)
        else:
            self.check_plain(name, arguments)
            result = Object()
        stack[-1] = result

    def tensor(self, arguments: tuple[Any, ...]) -> ATensor:
        """Check that the storage of a tensor holds all of its numbers."""
        storage, offset, shape, stride = arguments[:4]
        if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
            raise InputError(DAMAGED)
        extent = self.extents.get((shape, stride)) or self.measure(shape, stride)
        if type(offset) is not int or offset < 0:
            raise InputError(DAMAGED)
        for extra in arguments[5:7]:  # after requires_grad: hooks and metadata, which a state dict does not need
            if extra is not None and (type(extra) is not Container or extra.size):
                raise InputError(DAMAGED)
        count, last = extent
        if count > storage.numbers or offset + last >= storage.numbers:
            raise InputError(
                f"a tensor of shape {_shown(shape)} in a storage of {storage.numbers:,} numbers: use another copy"
            )
        self.tensor_bytes += count * storage.item
        return _TENSOR

    def measure(self, shape: tuple[Any, ...], stride: tuple[Any, ...]) -> tuple[int, int]:
        """Return how many numbers a tensor has, and the position of the last one (far below 0 if there is none)."""
        numbers = (*shape, *stride)
        if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(stride):
            raise InputError(DAMAGED)
        if len(shape) > MOST_DIMENSIONS:
            raise InputError(f"a tensor of {len(shape)} dimensions: use another file")
        count = math.prod(shape)
        last = sum(map(mul, shape, stride)) - sum(stride) if count else -(1 << 200)
        self.extents[shape, stride] = count, last
        return count, last

    def filled(self, name: str, arguments: tuple[Any, ...]) -> Container:
        """Return the container that is made of another one."""
        made = Container("set" if name == "builtins.set" else "dict")
        made.is_ordered = name == "collections.OrderedDict"
        if arguments:
            (source,) = arguments
            if type(source) is not Container or (source.kind == "list" and source.size > MOST_COPIED):
                raise InputError(DAMAGED)
            self.copied += source.size
            made.size, made.depth = source.size, source.depth
        if self.copied > MOST_OPERATIONS:  # a short pickle could copy one long list again and again
            raise InputError("copies too much: use a file that holds only tensors")
        return made

    def check_plain(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Check the arguments of a function whose result is not examined any further."""
        if name == "_codecs.encode":
            if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] not in ("latin1", "latin-1"):
                raise InputError(DAMAGED)
            self.copied += len(arguments[0])
            if self.copied > MOST_OPERATIONS:
                raise InputError("copies too much: use a file that holds only tensors")
        elif any(type(argument) not in FLAT for argument in arguments):
            raise InputError(DAMAGED)

    def make(self) -> None:
        """Replace a class and its arguments by an instance."""
        arguments, name = self.stack.pop(), self.stack[-1]
        if type(name) is not Name or name != QUEUE or arguments != ():
            raise InputError(DAMAGED)
        self.stack[-1] = Object()

    def build(self) -> None:
        """Give a state to the object on top of the stack."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Object:
            return
        # state_dict() returns an ordered dictionary with this attribute. Another one could replace a method.
        if type(target) is not Container or not target.is_ordered or type(state) is not Container:
            raise InputError(DAMAGED)
        if state.kind != "dict" or state.size != 1 or state.key != "_metadata":
            raise InputError(DAMAGED)
        target.depth = max(target.depth, _deeper(state.depth))


_TENSOR = ATensor()


def _depth(value: Any) -> int:
    """Return how many containers lie in each other."""
    if type(value) in FLAT:
        return 0
    return 1 if type(value) is tuple else value.depth


def _deeper(depth: int) -> int:
    if depth >= MOST_DEPTH:
        raise InputError(f"more than {MOST_DEPTH} containers in each other: use a file that holds only tensors")
    return depth + 1


def _shown(value: object) -> str:
    """Return a part of the file as a message shows it."""
    text = printable(str(value))
    return text if len(text) <= 100 else f"{text[:100]}..."


# ---- the operations that are not in `Walk._run`, by their codes ------------------------------------------------------


def _protocol(walk: Walk) -> None:
    walk.protocol = walk.number(1)


def _name(walk: Walk) -> None:
    walk.name(walk.line(), walk.line())


def _name_from_stack(walk: Walk) -> None:
    walk.is_newer = True
    name, module = walk.stack.pop(), walk.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise InputError(DAMAGED)
    walk.name(module, name)


def _memoize(walk: Walk) -> None:
    walk.is_newer = True
    walk.memo[len(walk.memo)] = walk.stack[-1]


def _text(bytes_of_length: int) -> Callable[[Walk], None]:
    def handle(walk: Walk) -> None:
        walk.is_newer = True
        walk.stack.append(str(walk.take(walk.number(bytes_of_length)), "utf-8", "surrogatepass"))

    return handle


def _old_text(walk: Walk) -> None:
    walk.stack.append(walk.take(walk.number(1)).decode())  # torch.load has the encoding utf-8


def _frame(walk: Walk) -> None:
    walk.is_newer = True
    walk.take(8)


def _float(walk: Walk) -> None:
    walk.take(8)
    walk.stack.append(0.0)


def _signed(walk: Walk) -> None:
    walk.stack.append(int.from_bytes(walk.take(4), "little", signed=True))


def _long(walk: Walk) -> None:
    length = walk.number(1)
    if length > 16:
        raise InputError(DAMAGED)
    walk.stack.append(int.from_bytes(walk.take(length), "little", signed=True))


def _tuple_of(count: int) -> Callable[[Walk], None]:
    def handle(walk: Walk) -> None:
        items = walk.stack[-count:]
        if len(items) < count:
            raise InputError(DAMAGED)
        del walk.stack[-count:]
        walk.put_together(items)

    return handle


HANDLERS: dict[int, Callable[[Walk], None]] = {
    ord("j"): lambda walk: walk.get(walk.number(4)),
    ord("c"): _name,
    ord("i"): _name,  # torch does not know it; the walk only names the class
    ord("G"): _float,
    ord("J"): _signed,
    ord("}"): lambda walk: walk.stack.append(Container("dict")),
    ord("]"): lambda walk: walk.stack.append(Container("list")),
    ord("u"): lambda walk: walk.set_items(walk.above_mark()),
    ord("s"): lambda walk: walk.set_items([walk.stack.pop(-2), walk.stack.pop()]),
    ord("e"): lambda walk: walk.add(walk.above_mark()),
    ord("a"): lambda walk: walk.add([walk.stack.pop()]),
    ord("b"): Walk.build,
    ord("U"): _old_text,
    0x80: _protocol,
    0x81: Walk.make,
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    0x8A: _long,
    # of later protocols, which torch does not read: a refused class is named all the same
    0x8C: _text(1),
    0x8D: _text(8),
    0x93: _name_from_stack,
    0x94: _memoize,
    0x95: _frame,
}
