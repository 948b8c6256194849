"""Checkpoints that are pickles: numpy's arrays are read, and nothing else of Python is ever touched."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from streamd.errors import ModelError
from streamd.models.importers import pickles


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    return path


def zoo(arrays: dict[str, Any], protocol: int = 4, **others: Any) -> bytes:
    return pickle.dumps({"model": arrays, **others}, protocol=protocol)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["f2", "f4", ">f4", "f8", "i8", "u1", "?"])
def test_arrays_of_every_protocol_kind_and_order_are_read(tmp_path: Path, protocol: int, kind: str) -> None:
    whole = np.arange(24).reshape(2, 3, 4).astype(kind)
    arrays = {"c": whole, "fortran": np.asfortranarray(whole), "scalar": whole[1, 2, 3], "empty": whole[:0]}
    read = pickles.read(written(tmp_path, zoo(arrays, protocol))).arrays
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].shape == array.shape and read[name].dtype == whole.dtype.newbyteorder("=")
        assert read[name].flags.writeable and read[name].flags.c_contiguous


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(arrays_of.arrays(np.float32, arrays_of.array_shapes(min_dims=0, max_dims=4, max_side=3)), st.integers(0, 5))
def test_any_array_comes_back_bit_by_bit(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    read = pickles.read(written(tmp_path, zoo({"a": array}, protocol))).arrays["a"]
    assert read.tobytes() == array.tobytes() and read.shape == array.shape


def test_the_zoos_layouts_are_told_apart(tmp_path: Path) -> None:
    arrays = {"conv1_w": np.zeros(2, np.float32)}

    def kind(content: Any) -> tuple[bool, bool]:
        file = pickles.read(written(tmp_path, pickle.dumps(content)))
        return file.is_caffe2, file.is_partial

    assert kind({"model": arrays, "__author__": "somebody"}) == (False, False)
    assert kind({"model": OrderedDict(arrays), "matching_heuristics": True}) == (False, True)
    assert kind({"blobs": arrays, "cfg": "MODEL: {}"}) == (True, True)
    assert kind(arrays) == (True, True)


def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    raw = struct.pack("<2f", 1.5, -2.25)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n"
        b"(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS" + repr(raw)[1:].encode() + b"\ntb"
    )
    content = b"(dS'conv1_w'\n" + array + b"s."
    assert pickles.read(written(tmp_path, content)).arrays["conv1_w"].tolist() == [1.5, -2.25]


class Hostile:
    """Call a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "builtin(s|__).eval"),
        (getattr, "builtin(s|__).getattr"),
        (np.load, "numpy.load"),
        (np.frombuffer, "numpy"),
        (Path.unlink, "unlink|getattr"),
    ],
)
def test_a_pickle_that_calls_a_function_is_refused_and_nothing_runs(
    tmp_path: Path, protocol: int, function: Callable[..., Any], name: str
) -> None:
    canary = tmp_path / "canary"
    canary.touch()
    argument = f"rm {canary}" if function is os.system else f"__import__('os').remove({str(canary)!r})"
    hostile = Hostile(function, canary if function is Path.unlink else argument)
    content = zoo({"a": np.zeros(2, np.float32), "b": hostile}, protocol)
    with pytest.raises(ModelError, match=rf"weights.pkl: refused: it names .*({name})"):
        pickles.read(written(tmp_path, content))
    assert canary.exists()


def test_names_that_only_begin_with_numpys_are_refused(tmp_path: Path) -> None:
    for line in (b"cnumpy.core.multiarray\nfromfile\n", b"cnumpy\nload\n", b"cnumpy.core.multiarray\n_reconstruct.x\n"):
        with pytest.raises(ModelError, match="refused: it names numpy"):
            pickles.read(written(tmp_path, line + b"."))


def array_of(dtype: bytes = b"S'f4'\nI0\nI1\nt", order: bytes = b"S'<'\n", shape: bytes = b"(I2\nt") -> bytes:
    """Write by hand an array of eight bytes of zeros, in protocol 0."""
    return (
        b"(dS'model'\n(dS'a'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n" + shape
        + b"cnumpy\ndtype\n(" + dtype + b"R(I3\n" + order + b"NNNI-1\nI-1\nI0\ntbI00\nS'"
        + rb"\x00" * 8 + b"'\ntbss."
    )  # fmt: skip


def test_an_array_written_by_hand_is_read(tmp_path: Path) -> None:
    assert pickles.read(written(tmp_path, array_of())).arrays["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array_of(shape=b"(I1000000000000\nt"), "8 bytes for an array"),
        (array_of(shape=b"(I-2\nI-1\nt"), r"shape \(-2, -1\)"),
        (array_of(shape=b"(F2.0\nt"), r"shape \(2.0\)"),
        (array_of(shape=b"(" + b"I1\n" * 9 + b"I2\nt"), "shape"),
        (array_of(dtype=b"S'O8'\nI0\nI1\nt"), "array of 'O8'"),
        (array_of(dtype=b"S'f4,O'\nI0\nI1\nt"), "array of 'f4,O'"),
        (array_of(dtype=b"S'V8'\nI0\nI1\nt"), "array of 'V8'"),
        (array_of(order=b"S'x'\n"), "byte order 'x'"),
        (b"c_codecs\nencode\n(S'a'\nS'zlib'\ntR.", "encodes as 'zlib'"),
        (b"cnumpy\nndarray\n(I9\ntR.", "unusual way"),
    ],
)
def test_arrays_that_are_not_what_numpy_writes_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=f"refused: it (holds|encodes|makes) .*{message}|refused: .*{message}"):
        pickles.read(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "holds no arrays by name"),
        (b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x7f.", "cannot be read as a pickle"),
        (b"\x80\x05\x96\x00\x00\x00\x00\x04\x00\x00\x00.", "cannot be read as a pickle|says that"),
        (b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 40 + b"Ns.", "holds a tuple of more than"),
        (array_of(shape=b"(I2\nt" + b"q\x00h\x00\x86" * 40), "holds a tuple of more than"),
    ],
    ids=["number", "bytes", "bytearray", "key", "shape"],
)
def test_a_few_bytes_that_ask_for_endless_memory_or_time_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(ModelError, match=rf"weights\.pkl: .*{message}"):
        pickles.read(written(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        zoo({"a": np.zeros(8, np.float32)})[:-20],
        b"\x80\x04P.",
        b"(dS'model'\n(dS'a'\ncnumpy\ndtype\n(I5\ntbss.",  # changes the class instead of an object
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelError, match=r"weights\.pkl: (cannot be read|refused)"):
        pickles.read(written(tmp_path, content))


@pytest.mark.parametrize("content", [[], {"model": {}}, {"model": []}, {"model": {"a": 1}}, {1: np.zeros(2)}, "model"])
def test_a_file_without_arrays_by_name_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ModelError, match="holds no arrays by name"):
        pickles.read(written(tmp_path, pickle.dumps(content)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing\.pkl: cannot be read: No such file"):
        pickles.read(tmp_path / "missing.pkl")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_file_with_wrong_bytes_is_read_or_refused_and_never_crashes(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(zoo({"a": np.arange(3, dtype=np.float32), "b": np.float64(2)}, data.draw(st.integers(0, 5))))
    change = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, byte in data.draw(st.lists(change, max_size=4)):
        content[place] = byte
    with contextlib.suppress(ModelError):
        assert pickles.read(written(tmp_path, bytes(content))).arrays
