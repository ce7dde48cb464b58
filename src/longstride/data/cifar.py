"""CIFAR-10 in its two official versions, neither of which can run code here.

The binary version, ``data_batch_1.bin`` ... ``test_batch.bin``: 3,073 bytes an image, a label (0 to 9) and 1,024 red,
green and blue values in raster order. The python version, ``data_batch_1`` ... ``test_batch``: a pickle of a dictionary
whose ``data`` is uint8[10000, 3072] in the same order.

A pickle is a program that names functions and calls them. Here it is only *disassembled* (`pickletools.genops`, which
runs nothing), and the few instructions that build dictionaries, lists, tuples, texts, numbers and NumPy arrays are
carried out by `_build`, on values of our own: no function that a file names is ever looked up, and a name that such
arrays do not need is an error.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from longstride.data.kind import CorruptFileError

NAMES = re.compile(r"(data_batch_\d+|test_batch)(\.bin)?")

SIDE = 32
ROW_BYTES = 1 + 3 * SIDE * SIDE
CLASSES = 10

# The official files have 31 MB; a pickle is read as a whole.
MOST_PICKLE_BYTES = 1 << 27

# What NumPy writes for an array: older and newer names of the same functions.
RECONSTRUCT = frozenset({"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"})
NDARRAY = "numpy ndarray"
DTYPE = "numpy dtype"
# What Python 3 writes for bytes in an old protocol: the text of the same code points.
ENCODE = "_codecs encode"
ALLOWED = RECONSTRUCT | {NDARRAY, DTYPE, ENCODE}


def is_cifar(file: PurePath) -> bool:
    """Whether a file has one of the data set's names."""
    return NAMES.fullmatch(file.name) is not None


def read_cifar(path: Path) -> Iterator[np.ndarray]:
    """uint8[images, 3, 32, 32]: a batch file, of the binary version if its name ends in .bin.

    Raises:
        CorruptFileError: not such a file.
    """
    yield (_read_binary(path) if path.suffix == ".bin" else _read_pickle(path)).reshape(-1, 3, SIDE, SIDE)


def _read_binary(path: Path) -> np.ndarray:
    file_bytes = path.stat().st_size
    if file_bytes == 0 or file_bytes % ROW_BYTES:
        raise CorruptFileError(path, f"{file_bytes:,} bytes are not a whole number of images of {ROW_BYTES:,} bytes")
    rows = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, ROW_BYTES)
    if (worst := int(rows[:, 0].max())) >= CLASSES:
        raise CorruptFileError(path, f"it has the label {worst}, but CIFAR-10's are 0 to {CLASSES - 1}")
    return rows[:, 1:]


def _read_pickle(path: Path) -> np.ndarray:
    if (file_bytes := path.stat().st_size) > MOST_PICKLE_BYTES:
        raise CorruptFileError(path, f"{file_bytes:,} bytes are too many for a batch of CIFAR-10")
    try:
        content = _build(path.read_bytes())
    except ForbiddenError as error:
        raise CorruptFileError(path, f"{error}, which no batch of CIFAR-10 needs: it was not run") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(path, f"not a sound pickle ({error})") from error
    data = content.get(b"data", content.get("data")) if isinstance(content, dict) else None
    if not isinstance(data, _Array):
        raise CorruptFileError(path, "it holds no array called data: not a batch of CIFAR-10's python version")
    try:
        return data.to_numpy()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptFileError(path, f"its array is not one ({error})") from error


class ForbiddenError(ValueError):
    """A pickle wants what is not allowed: the message names it."""


@dataclass(frozen=True)
class _Name:
    """A function or class that a pickle names, as its name alone."""

    text: str


@dataclass
class _Dtype:
    """``numpy.dtype(code)``."""

    code: Any


@dataclass
class _Array:
    """An array before (None) and after it has its state: (version, shape, dtype, is_fortran, content)."""

    state: Any = None

    def to_numpy(self) -> np.ndarray:
        """uint8[images, 3072]; ValueError for anything else."""
        _, shape, dtype, is_fortran, content = self.state
        # Python 2 wrote texts where Python 3 has bytes.
        content = content.encode("latin-1") if isinstance(content, str) else content
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", b"u1"):
            raise ValueError("its data are not of uint8")
        if len(shape) != 2 or shape[1] != ROW_BYTES - 1 or not shape[0] or is_fortran:
            raise ValueError(f"its data have the shape {list(shape)}: it must be [images, {ROW_BYTES - 1}]")
        if len(content) != shape[0] * shape[1]:
            raise ValueError(f"its data have {len(content):,} bytes, fewer or more than their shape {list(shape)}")
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)


_MARK = object()
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_OLD_TEXTS = frozenset({"STRING", "BINSTRING", "SHORT_BINSTRING"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _build(program: bytes) -> Any:
    """What the pickle describes, of `_Array`, `_Dtype` and plain values."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        slot = len(memo) if name == "MEMOIZE" else argument
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _LITERALS:
            stack.append(argument)
        elif name in _OLD_TEXTS:
            # genops reads Python 2's byte strings as latin-1.
            stack.append(str(argument).encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                argument = f"{module} {attribute}"
            if argument not in ALLOWED:
                raise ForbiddenError(f"the pickle names {str(argument).replace(' ', '.')}")
            stack.append(_Name(str(argument)))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[slot] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[slot])
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            # An array's state; a dtype's (byte order, alignment) says nothing about single bytes.
            if isinstance(stack[-1], _Array):
                stack[-1].state = state
            elif not isinstance(stack[-1], _Dtype):
                raise ForbiddenError(f"the pickle gives a state to {type(stack[-1]).__name__}")
        else:
            _collect(name, stack)
    raise ValueError("it ends without the instruction to stop")


def _call(function: Any, arguments: Any) -> Any:
    text = function.text if isinstance(function, _Name) else None
    if text in RECONSTRUCT:
        return _Array()
    if text == DTYPE:
        return _Dtype(arguments[0])
    if text == ENCODE and arguments[1] in ("latin1", "latin-1"):
        return arguments[0].encode("latin-1")
    raise ForbiddenError(f"the pickle calls {text.replace(' ', '.') if text else type(function).__name__}")


def _collect(name: str, stack: list[Any]) -> None:
    """The instructions that make dictionaries, lists and tuples."""
    if name == "MARK":
        stack.append(_MARK)
    elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
        stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        stack[-count:] = [tuple(stack[-count:])]
    elif name == "APPEND":
        value = stack.pop()
        stack[-1].append(value)
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        stack[-1][key] = value
    elif name in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
        values = _since_mark(stack)
        if name == "TUPLE":
            stack.append(tuple(values))
        elif name == "LIST":
            stack.append(values)
        elif name == "APPENDS":
            stack[-1].extend(values)
        else:
            pairs = dict(zip(values[::2], values[1::2], strict=True))
            if name == "DICT":
                stack.append(pairs)
            else:
                stack[-1].update(pairs)
    else:
        raise ForbiddenError(f"the pickle uses the instruction {name}")


def _since_mark(stack: list[Any]) -> list[Any]:
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]
