"""Reads the pickle in a PyTorch file as a description of tensors. Nothing is built or called.

A pickle is a program for a small machine, and the machines that run it (pickle's own, and torch's
with `weights_only`) allocate what it asks for: `bytearray(2**40)`, a memo of 2^31 places, a storage
of any size. This machine knows the few operations that weights need and puts down what is claimed
as plain values; whether the file has such bytes is for `torch_file.py` to check.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# A tensor takes some 40 operations: these are 100,000 tensors in one file, and seconds.
_MAX_OPERATIONS = 1 << 22


class NotPlain(Exception):
    """The pickle holds something else than tensors and plain values; the text says what."""


class Global(NamedTuple):
    """The name of a class or function; it is never looked up."""

    name: str


class Storage(NamedTuple):
    """Where data is said to lie: `numel` numbers under a key of the file."""

    dtype: str
    key: str
    numel: int


class Claim(NamedTuple):
    """A tensor as the file describes it; any of it may be a lie."""

    storage: Storage
    dtype: str
    offset: Any
    size: Any
    stride: Any


class Unusable(NamedTuple):
    """A tensor of a kind that is not converted."""

    kind: str


def read(file: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """The value of the pickle at the file's position, which is then behind it.

    The storages that it names are put into `storages`. Raises `NotPlain`, and `ValueError` for what
    is no pickle at all.
    """
    try:
        return _Machine({} if storages is None else storages).run(file)
    except (IndexError, KeyError, TypeError) as error:  # an operation without its operands
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error})") from error


class _Machine:
    """A stack, the marks on it, and the memo: by pickletools' names of the operations."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self._storages = storages
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> Any:
        for count, (code, argument, at) in enumerate(pickletools.genops(file)):
            name = code.name
            if count == _MAX_OPERATIONS:
                raise NotPlain(f"more than {_MAX_OPERATIONS} operations in a pickle")
            if name == "STOP":
                return self._stack.pop()
            if name in _WITH_VALUE:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif operation := _OPERATIONS.get(name):
                operation(self, argument)
            else:
                raise NotPlain(f"operation {name} at byte {at} of its pickle")
        raise ValueError("its pickle has no end")

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def ignore(self, _: Any) -> None:
        """Framing, which pickletools has read."""

    def put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def tuple(self, _: Any) -> None:
        items = tuple(self._since_mark())
        self._stack.append(items)

    def tuple_of(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count:
            raise IndexError("the stack is too short")
        del self._stack[-count:]
        self._stack.append(items)

    def append(self, _: Any) -> None:
        item = self._stack.pop()
        self._list().append(item)

    def appends(self, _: Any) -> None:
        items = self._since_mark()
        self._list().extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _put(self._dict(), key, value)

    def set_items(self, _: Any) -> None:
        items = self._since_mark()
        target = self._dict()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(target, key, value)

    def name(self, argument: Any) -> None:
        self._stack.append(_global(*argument.split(" ", 1)))

    def stacked_name(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_global(module, name))

    def call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(_call(function, arguments))

    def build(self, _: Any) -> None:
        """Attributes of an ordered dict, such as the version of a module; nobody reads them."""
        self._stack.pop()
        self._dict()

    def persistent(self, _: Any) -> None:
        kind, storage_type, key, _location, numel, *_rest = self._stack.pop()
        if kind != "storage" or not isinstance(storage_type, Global):
            raise NotPlain("a persistent id that names no storage")
        if not isinstance(key, str) or type(numel) is not int:
            raise NotPlain("a storage without a key or a size")
        storage = self._storages[key] = Storage(_STORAGES[storage_type.name], key, numel)
        self._stack.append(storage)

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _list(self) -> list[Any]:
        if not isinstance(target := self._stack[-1], list):
            raise TypeError(f"{type(target).__name__} is no list")
        return target

    def _dict(self) -> dict[Any, Any]:
        if not isinstance(target := self._stack[-1], dict):
            raise TypeError(f"{type(target).__name__} is no dict")
        return target


def _put(target: dict[Any, Any], key: Any, value: Any) -> None:
    if not isinstance(key, str | int):  # others may be large, and are hashed whole
        raise NotPlain(f"a dict with a {type(key).__name__} as key")
    target[key] = value


def _global(module: Any, name: Any) -> Global:
    full = f"{module}.{name}"
    if full not in _CALLS and full not in _STORAGES and full not in _NAMES:
        raise NotPlain(f"it asks for {full[:100]!r}")
    return Global(full)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or function.name not in _CALLS:
        raise NotPlain(f"it calls a {type(function).__name__}")
    return _CALLS[function.name](*arguments)


# --- what the named functions put down ------------------------------------------------------------


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in items:
        _put(found, key, value)
    return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Claim:
    if not isinstance(storage, Storage):
        raise NotPlain("a tensor without a storage")
    return Claim(storage, storage.dtype, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Claim:
    if not isinstance(dtype, Global):
        raise NotPlain("a tensor without a dtype")
    return _tensor(storage, offset, size, stride)._replace(dtype=dtype.name.removeprefix("torch."))


def _first(value: Any, *_: Any) -> Any:
    return value


def _of_type(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    return _call(function, arguments)


def _sparse(layout: Any, _data: Any) -> Unusable:
    return Unusable(layout if isinstance(layout, str) else "sparse")


_CALLS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "collections.OrderedDict": _ordered_dict,
        "torch.Size": lambda sizes: tuple(sizes),
        "torch.device": _first,
        "torch.serialization._get_layout": _first,
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": _first,
        "torch._utils._rebuild_parameter_with_state": _first,
        "torch._tensor._rebuild_from_type_v2": _of_type,
        "torch._utils._rebuild_sparse_tensor": _sparse,
        "torch._utils._rebuild_qtensor": lambda *_: Unusable("quantized"),
    }
)
_STORAGES: Mapping[str, str] = MappingProxyType(
    {
        "torch.DoubleStorage": "float64",
        "torch.FloatStorage": "float32",
        "torch.HalfStorage": "float16",
        "torch.BFloat16Storage": "bfloat16",
        "torch.LongStorage": "int64",
        "torch.IntStorage": "int32",
        "torch.ShortStorage": "int16",
        "torch.CharStorage": "int8",
        "torch.ByteStorage": "uint8",
        "torch.BoolStorage": "bool",
        "torch.ComplexFloatStorage": "complex64",
        "torch.ComplexDoubleStorage": "complex128",
        "torch.QUInt8Storage": "quint8",
        "torch.QInt8Storage": "qint8",
        "torch.QInt32Storage": "qint32",
        "torch.UntypedStorage": "uint8",
        "torch.storage.UntypedStorage": "uint8",
    }
)
# Classes of tensors, and dtypes: the only other names that weights come with.
_NAMES = frozenset(
    {
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        *(f"torch.{dtype}" for dtype in _STORAGES.values()),
        *(f"torch.float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")),
        *(f"torch.uint{bits}" for bits in (16, 32, 64)),
    }
)

_WITH_VALUE = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
        "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING",
        "BINBYTES", "SHORT_BINBYTES",
    }
)  # fmt: skip
_CONSTANTS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "NONE": lambda: None,
        "NEWTRUE": lambda: True,
        "NEWFALSE": lambda: False,
        "EMPTY_TUPLE": tuple,
        "EMPTY_LIST": list,
        "EMPTY_DICT": dict,
    }
)
_OPERATIONS: Mapping[str, Callable[[_Machine, Any], None]] = MappingProxyType(
    {
        "PROTO": _Machine.ignore,
        "FRAME": _Machine.ignore,
        "MARK": _Machine.mark,
        "BINPUT": _Machine.put,
        "LONG_BINPUT": _Machine.put,
        "MEMOIZE": _Machine.put,
        "BINGET": _Machine.get,
        "LONG_BINGET": _Machine.get,
        "POP": _Machine.pop,
        "TUPLE": _Machine.tuple,
        "TUPLE1": lambda machine, _: machine.tuple_of(1),
        "TUPLE2": lambda machine, _: machine.tuple_of(2),
        "TUPLE3": lambda machine, _: machine.tuple_of(3),
        "APPEND": _Machine.append,
        "APPENDS": _Machine.appends,
        "SETITEM": _Machine.set_item,
        "SETITEMS": _Machine.set_items,
        "GLOBAL": _Machine.name,
        "STACK_GLOBAL": _Machine.stacked_name,
        "REDUCE": _Machine.call,
        "BUILD": _Machine.build,
        "BINPERSID": _Machine.persistent,
    }
)
