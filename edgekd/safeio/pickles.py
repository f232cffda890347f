"""The pickles of public graph files, read without `pickle`: a closed set of opcodes builds plain values, numpy arrays and sparse matrices, nothing else.

No name in the file is ever imported and nothing in it is ever called: the few names that these files use stand for the builders below. Anything else is
refused with its place. Only the names of opcodes come from `pickletools`, which executes nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import DataRefused, FileMissing
from edgekd.safeio.arrays import Csr

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BYTES = 1 << 30
_MAX_DEPTH = 10_000  # of marks and of the stack above them, so that a small file cannot ask for much
_KINDS = frozenset("biuf")


class _Refused(Exception):
    """Something that no such file holds."""


@dataclass(frozen=True)
class _Name:
    text: str


@dataclass
class _DType:
    code: str


@dataclass
class _Array:
    """An array whose content has not been read yet; afterwards `value` is set."""

    value: Any = None


@dataclass
class _Sparse:
    state: dict[str, Any] = field(default_factory=dict)


_RECONSTRUCT = frozenset({"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"})
_NDARRAY, _DTYPE, _ENCODE = "numpy ndarray", "numpy dtype", "_codecs encode"
_CSR = frozenset({"scipy.sparse.csr csr_matrix", "scipy.sparse._csr csr_matrix"})
_DEFAULTDICT, _LIST = "collections defaultdict", frozenset({"__builtin__ list", "builtins list"})
_NAMES = _RECONSTRUCT | _CSR | _LIST | {_NDARRAY, _DTYPE, _ENCODE, _DEFAULTDICT}
_MARK = object()


def read_pickle(path: Path) -> Any:
    """What the file holds: numbers, strings, tuples, lists, dicts, numpy arrays of numbers, and `Csr` matrices.

    Raises FileMissing, DataRefused for anything else that a pickle may hold, and for a file cut short.
    """
    data = _bytes_of(path)
    place = 0
    machine = _Machine()
    try:
        for opcode, argument, position in pickletools.genops(data):
            place = position or 0
            if opcode.name == "STOP":
                return _plain(machine.pop())
            machine.step(opcode.name, argument)
    except (_Refused, ValueError, TypeError, KeyError, IndexError, OverflowError, UnicodeError) as error:
        what = str(error) if isinstance(error, _Refused) else "it is damaged or no such file"
        raise DataRefused(
            f"{what} (byte {place})",
            where=str(path),
            expected="arrays, sparse matrices and lists of numbers, as Planetoid files hold them",
            hint="convert it: numpy.savez(FILE, ...), and format: arrays",
        ) from error
    raise DataRefused("the file is cut short", where=str(path), expected="a whole file", hint="fetch it again")


def _bytes_of(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataRefused(
                "the file is too large", where=str(path), expected=f"at most {MAX_BYTES >> 20} MiB", hint="convert it to arrays"
            )
        return path.read_bytes()
    except OSError as error:
        raise FileMissing(
            f"the file cannot be read: {error.strerror}", where=str(path), expected="a file of a Planetoid data set"
        ) from error


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if len(self.stack) > _MAX_DEPTH:
            raise _Refused("it nests or lists more than such files do")
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise _Refused(f"it uses {name}")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Refused("a value is missing")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Everything above the last mark."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                found = self.stack[at + 1 :]
                del self.stack[at:]
                return found
        raise _Refused("a mark is missing")

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise _Refused(f"a {kind.__name__} is missing")
        return self.stack[-1]


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def act(m: _Machine, _: Any) -> None:
        values = [m.pop() for _ in range(count)]
        m.stack.append(tuple(reversed(values)))

    return act


def _name(m: _Machine, argument: Any) -> None:
    _push_name(m, str(argument))


def _stack_name(m: _Machine, _: Any) -> None:
    second, first = m.pop(), m.pop()
    _push_name(m, f"{first} {second}")


def _push_name(m: _Machine, text: str) -> None:
    if text not in _NAMES:
        raise _Refused(f"it names {text.replace(' ', '.')!a}")
    m.stack.append(_Name(text))


def _reduce(m: _Machine, _: Any) -> None:
    arguments, called = m.pop(), m.pop()
    name = called.text if isinstance(called, _Name) else ""
    if not isinstance(arguments, tuple):
        raise _Refused("arguments are not a tuple")
    if name in _RECONSTRUCT and len(arguments) == 3 and arguments[0] == _Name(_NDARRAY):
        m.stack.append(_Array())
    elif name == _DTYPE and 1 <= len(arguments) <= 3 and isinstance(arguments[0], str):
        m.stack.append(_DType(arguments[0]))
    elif name == _DEFAULTDICT and len(arguments) <= 1 and all(isinstance(a, _Name) and a.text in _LIST for a in arguments):
        m.stack.append({})
    elif name == _ENCODE and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
        m.stack.append(arguments[0].encode("latin-1"))
    else:
        raise _Refused(f"it calls {name.replace(' ', '.') or 'something unnamed'}")


def _new_object(m: _Machine, _: Any) -> None:
    arguments, cls = m.pop(), m.pop()
    if not (isinstance(cls, _Name) and cls.text in _CSR and arguments == ()):
        raise _Refused("it makes an object")
    m.stack.append(_Sparse())


def _build(m: _Machine, _: Any) -> None:
    state, made = m.pop(), m.stack[-1] if m.stack else None
    if isinstance(made, _Array):
        made.value = _array(state)
    elif isinstance(made, _DType) and isinstance(state, tuple) and len(state) >= 2:
        order = str(state[1])
        if order not in ("<", ">", "|", "="):
            raise _Refused("an unknown byte order")
        made.code = {"=": "<"}.get(order, order) + made.code
    elif isinstance(made, _Sparse) and isinstance(state, dict):
        made.state = state
    else:
        raise _Refused("it sets the state of an object")


def _array(state: Any) -> NDArray[Any]:
    """An array of numbers from (version, shape, dtype, column order, bytes)."""
    if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _DType)):
        raise _Refused("an array without shape and type")
    _, shape, kind, by_columns, raw = state
    if not (isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape) and len(shape) <= 2):
        raise _Refused("an array of an unknown shape")
    dtype = np.dtype(kind.code)
    if dtype.kind not in _KINDS:
        raise _Refused("an array of something else than numbers")
    content = raw.encode("latin-1") if isinstance(raw, str) else raw
    count = 1
    for n in shape:
        count *= n
    if not isinstance(content, bytes) or len(content) != count * dtype.itemsize:
        raise _Refused("an array whose bytes do not fill its shape")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C").astype(dtype.newbyteorder("="))


def _append(m: _Machine, _: Any) -> None:
    value = m.pop()
    m.top(list).append(value)


def _appends(m: _Machine, _: Any) -> None:
    values = m.pop_mark()
    m.top(list).extend(values)


def _set_items(m: _Machine, _: Any) -> None:
    values = m.pop_mark()
    if len(values) % 2:
        raise _Refused("a key without a value")
    m.top(dict).update(zip(values[::2], values[1::2], strict=True))


def _set_item(m: _Machine, _: Any) -> None:
    value, key = m.pop(), m.pop()
    m.top(dict)[key] = value


def _put(m: _Machine, argument: Any) -> None:
    m.memo[int(argument)] = m.stack[-1]


def _memoize(m: _Machine, _: Any) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _get(m: _Machine, argument: Any) -> None:
    m.stack.append(m.memo[int(argument)])


def _nothing(_m: _Machine, _: Any) -> None:
    """An opcode that says something of the file and not of its content."""


_PUSHES = frozenset(
    {"BININT", "BININT1", "BININT2", "INT", "LONG1", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING", "STRING", "UNICODE"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}
)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK, "EMPTY_TUPLE": ()}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "LIST": lambda m, _: m.stack.append(m.pop_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "GLOBAL": _name,
    "STACK_GLOBAL": _stack_name,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "BUILD": _build,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "PUT": _put,
    "MEMOIZE": _memoize,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "GET": _get,
}


def _plain(value: Any) -> Any:
    """The value at the top; placeholders become what they stand for. Only the outermost one, and lists of numbers in a dict, are what such files hold."""
    if isinstance(value, _Array):
        if value.value is None:
            raise _Refused("an array without content")
        return value.value
    if isinstance(value, _Sparse):
        return _csr(value.state)
    if isinstance(value, dict):
        for key, items in value.items():
            if type(key) is not int or not isinstance(items, list) or not all(type(n) is int for n in items):
                raise _Refused("a table of something else than lists of whole numbers")
        return value
    raise _Refused(f"it holds a {type(value).__name__}")


def _csr(state: dict[str, Any]) -> Csr:
    shape = state.get("_shape", state.get("shape"))
    parts = [state.get(n) for n in ("indptr", "indices", "data")]
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and 0 <= n < 2**31 for n in shape)):
        raise _Refused("a sparse matrix without a shape")
    arrays = [p.value for p in parts if isinstance(p, _Array) and p.value is not None]
    if len(arrays) < len(parts):
        raise _Refused("a sparse matrix without its arrays")
    try:
        return Csr.checked((shape[0], shape[1]), *arrays)
    except ValueError as error:
        raise _Refused(str(error)) from error
