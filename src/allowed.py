"""What the pickle in a checkpoint may name, and stand-ins for the objects that it describes. `pickles.py` uses them."""

from typing import Any

STORAGES = {  # bytes per number
    f"torch.{name}Storage": size
    for name, size in {
        "Double": 8,
        "Float": 4,
        "Half": 2,
        "BFloat16": 2,
        "Long": 8,
        "Int": 4,
        "Short": 2,
        "Char": 1,
        "Byte": 1,
        "Bool": 1,
        "ComplexDouble": 16,
        "ComplexFloat": 8,
    }.items()
} | {"torch.UntypedStorage": 1, "torch.storage.UntypedStorage": 1}
TENSORS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
QUEUE = "utils.NNQueue"
NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
# What torch can rebuild, but no network here consists of
UNUSUAL = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (meta)",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_tensor_v3": "a tensor of an unusual number type",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._tensor._rebuild_from_type_v2": "a tensor of a subclass",
}
CALLABLE = {
    *(*TENSORS, *NUMPY_SCALARS, *UNUSUAL, "numpy.dtype", "_codecs.encode"),
    *("collections.OrderedDict", "collections.Counter", "builtins.set", "torch.Size", "torch.device"),
    *("torch._utils._rebuild_parameter", "torch.serialization._get_layout"),
}
# a number type, such as torch.float32, and names that only stand among arguments
DTYPES = {
    f"torch.{name}"
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
} | {f"torch.{name}" for name in ("complex64", "complex128", "uint16", "uint32", "uint64")}
KNOWN = CALLABLE | DTYPES | set(STORAGES) | {QUEUE}


class Name(str):
    """A class or function that the pickle names."""


class Container:
    """A list, dict or set. Only what the checks need is kept of the contents."""

    __slots__ = ("closed", "depth", "is_ordered", "key", "kind", "size")

    def __init__(self, kind: str):
        self.kind, self.depth, self.size = kind, 1, 0
        self.closed = False  # fetched from the memo: changing it now could hide how deep another container is
        self.is_ordered = False
        self.key: Any = None  # the last key


class Deep(tuple):
    """A tuple that holds containers."""

    depth: int


class Storage:
    __slots__ = ("item", "numbers")

    def __init__(self, item: int, numbers: int):
        self.item, self.numbers = item, numbers


class ATensor:
    __slots__ = ()


class Unusual:
    __slots__ = ("what",)

    def __init__(self, what: str):
        self.what = what


class Object:
    """An instance that takes a state: a dtype of numpy or the authors' queue."""

    __slots__ = ()


KEYS = {str, int, bool, type(None)}
FLAT = {int, float, bool, str, bytes, type(None), Name, Storage, ATensor, Object, Unusual}
SIMPLE = FLAT - {Unusual}
