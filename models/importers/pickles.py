"""Read the arrays of a pickle, the form of Detectron2's zoo, without running anything that it names.

A pickle is a program, which may call any function of Python. To this reader it may name what numpy writes an array
with; stand-ins of that build the arrays from checked bytes, and any other name is refused before it is looked up.
"""

from __future__ import annotations

import math
import mmap
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np

from streamd.errors import ModelError

_KINDS = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
_MAX_VALUES = 1 << 20  # of a tuple and the tuples in it
_MAX_RANK = 8  # of an array; the weight of a convolution has 4


@dataclass(frozen=True, slots=True, eq=False)
class ZooFile:
    """The arrays of a file, and whose names they have."""

    arrays: dict[str, np.ndarray]
    is_caffe2: bool  # named as Caffe2 did: conv1_w, res2_0_branch2a_bn_s
    is_partial: bool  # names lack what comes before the part, such as `backbone.bottom_up.`


def read(path: Path) -> ZooFile:
    """Read a pickle of numbers, words, maps, lists and numpy arrays. Raises ModelError."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _find_arrays(_Unpickler(cast(BinaryIO, content)).load(), path)
    except OSError as err:
        raise ModelError(f"{path}: cannot be read: {err.strerror or err}") from err
    except _RefusedError as err:
        raise ModelError(f"{path}: refused: {err}, and weights need arrays and plain values alone") from err
    except ModelError:
        raise
    except Exception as err:  # a damaged pickle can make the unpickler raise nearly anything
        raise ModelError(f"{path}: cannot be read as a pickle: {err or type(err).__name__}") from err


def _find_arrays(content: Any, path: Path) -> ZooFile:
    """Take the arrays of Detectron2's layout, {"model": {...}}, or of Caffe2's: {"blobs": {...}} or alone."""
    top = dict(content) if isinstance(content, dict) else {}
    is_caffe2 = "model" not in top
    found = top.get("blobs" if "blobs" in top else "model", top)
    named = dict(found) if isinstance(found, dict) else {}
    arrays = {
        name: value.value for name, value in named.items() if isinstance(value, (_Array, _ArrayFromBuffer, _Scalar))
    }
    if not arrays or not all(isinstance(name, str) for name in arrays):
        raise ModelError(f'{path}: holds no arrays by name, neither alone nor under "model"')
    return ZooFile(arrays, is_caffe2, is_partial=is_caffe2 or bool(top.get("matching_heuristics")))


class _RefusedError(Exception):
    """A pickle asks for more than plain values."""


# Python's own unpickler, not the one in C, which makes room for as many numbered values as the highest number says: 20
# bytes could ask for 30 GB.
_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    def __init__(self, file: BinaryIO) -> None:
        # Python 2, which wrote the oldest files, had no bytes: latin1 keeps each byte as a character.
        super().__init__(file, encoding="latin1")
        self._tuples: dict[int, tuple[object, int]] = {}  # id -> the tuple itself, and how many values it stands for

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _RefusedError(f"it names {module}.{name}")
        return _STAND_INS[module, name]

    def weigh(self) -> None:
        """Refuse a tuple of tuples of the same tuple: to hash it, as a key, would take for ever."""
        made = self.stack[-1]
        weight = sum(self._tuples.get(id(value), (None, 1))[1] for value in made)
        if weight > _MAX_VALUES:
            raise _RefusedError(f"it holds a tuple of more than {_MAX_VALUES} values")
        self._tuples[id(made)] = made, weight

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_PythonUnpickler.dispatch)


def _weighed(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def load_and_weigh(unpickler: _Unpickler) -> None:
        load(unpickler)
        unpickler.weigh()

    return load_and_weigh


def _load_bytearray(unpickler: _Unpickler) -> None:
    """Read the bytes before making room for them; Python's own does it the other way round."""
    (num_bytes,) = struct.unpack("<Q", unpickler.read(8))
    content = unpickler.read(min(num_bytes, sys.maxsize))
    if len(content) != num_bytes:
        raise _RefusedError(f"it says that {num_bytes} bytes follow, and {len(content)} do")
    unpickler.append(bytearray(content))


_Unpickler.dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray
for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_code[0]] = _weighed(_Unpickler.dispatch[_code[0]])


class _StandIn:
    """What a pickle may make an object of. The state of the class itself is out of its reach."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"it changes a {type(self).__name__}")


class _Dtype(_StandIn):
    """Stands for numpy.dtype: a kind of number and its byte order."""

    __slots__ = ("kind", "order")

    def __init__(self, kind: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(kind, str) or kind not in _KINDS:
            raise _RefusedError(f"it holds an array of {kind!r:.40}" if isinstance(kind, str) else "it has no dtype")
        self.kind = kind
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *_ = state
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise _RefusedError(f"it holds an array of the byte order {order!r:.40}")
        self.order = order

    def decode(self, content: bytes | bytearray | str, shape: tuple[int, ...], fortran: bool) -> np.ndarray:
        """Copy bytes into an array in the machine's byte order."""
        content = content.encode("latin1") if isinstance(content, str) else bytes(content)
        dtype = np.dtype(self.order + self.kind)
        if len(shape) > _MAX_RANK or any(type(side) is not int or not 0 <= side < 1 << 48 for side in shape):
            shown = ", ".join(str(side)[:20] if type(side) in (int, float) else "?" for side in shape)
            raise _RefusedError(f"it holds an array of the shape ({shown:.80})")
        if math.prod(shape) * dtype.itemsize != len(content):
            raise _RefusedError(f"it holds {len(content)} bytes for an array of {shape!r} {self.kind}")
        array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
        return array.astype(dtype.newbyteorder("="), order="C", copy=True)


class _Array(_StandIn):
    """Stands for an array that numpy makes empty and then fills (pickle protocols 0 to 4)."""

    __slots__ = ("value",)

    def __init__(self, kind: Any, shape: Any, typecode: Any) -> None:
        self.value = np.zeros(0, np.float32)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.value = _decode(dtype, content, shape, fortran)


class _ArrayFromBuffer(_StandIn):
    """Stands for numpy's `_frombuffer` (pickle protocol 5)."""

    __slots__ = ("value",)

    def __init__(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        self.value = _decode(dtype, content, shape, order == "F")


class _Scalar(_StandIn):
    """Stands for a number of numpy."""

    __slots__ = ("value",)

    def __init__(self, dtype: Any, content: Any) -> None:
        self.value = _decode(dtype, content, (), False)


class _NdarrayType(_StandIn):
    """Stands for numpy.ndarray, which is named and never called."""

    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        raise _RefusedError("it makes an array in an unusual way")


class _Bytes(_StandIn):
    """Stands for `_codecs.encode`, by which the protocols of Python 2 write bytes, and for `bytes`: none at all."""

    __slots__ = ("value",)

    def __init__(self, text: Any = "", encoding: Any = "latin1") -> None:
        if not isinstance(text, str) or encoding != "latin1":
            raise _RefusedError(f"it encodes as {encoding if isinstance(encoding, str) else '?'!r:.40}")
        self.value = text.encode("latin1")


_STAND_INS: dict[tuple[str, str], type] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _ArrayFromBuffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _NdarrayType,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
    ("collections", "OrderedDict"): OrderedDict,
}


def _decode(dtype: Any, content: Any, shape: Any, fortran: Any) -> np.ndarray:
    content = content.value if isinstance(content, _Bytes) else content
    if (
        not isinstance(dtype, _Dtype)
        or not isinstance(content, (bytes, bytearray, str))
        or not isinstance(shape, tuple)
    ):
        raise _RefusedError(
            f"it holds an array made of {type(dtype).__name__}, {type(content).__name__}, {type(shape).__name__}"
        )
    return dtype.decode(content, shape, bool(fortran))
