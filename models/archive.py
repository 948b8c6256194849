"""Look over the zip archive of an artifact or a checkpoint before torch reads it.

torch's own reader is fast and trusting: it takes an entry's declared size for its memory, and a storage's declared
length for that of its bytes, so that a file of a kilobyte could ask for a terabyte, or publish the daemon's memory.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from streamd.errors import ModelError

MAX_SPEC_BYTES = 1 << 20  # of streamd.json; a thousand labels have 20 kB
MAX_COMPRESSED_BYTES = 64 << 20  # of a file's compressed entries, once unpacked; torch compresses its code alone
MAX_PICKLE_BYTES = 16 << 20  # of a description of an archive's tensors; that of 700 of them has 90 kB
MAX_ENTRIES = 200_000
MAX_NAME = 255  # characters of an entry's name; torch's reader cuts longer ones

# What zipfile raises, beside its own error, for names that are no text and entries that are cut or wrong.
DAMAGE = (RuntimeError, NotImplementedError, ValueError, LookupError, EOFError, struct.error, zlib.error)

_ITEM_BYTES = {
    **dict.fromkeys(("Byte", "Char", "Bool"), 1),
    **dict.fromkeys(("Short", "Half", "BFloat16"), 2),
    **dict.fromkeys(("Int", "Float"), 4),
    **dict.fromkeys(("Long", "Double", "ComplexFloat"), 8),
}
_STORAGE = re.compile(rf"torch ({'|'.join(_ITEM_BYTES)})Storage")
_BUILDERS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch\.jit\._pickle (build_\w+list|restore_type_tag)"
    r"|__torch__[\w.]* \w+"
)
_CLASSES = re.compile(r"__torch__\.torch\.classes\b")  # C++ classes, which may do anything


def is_zip(path: Path) -> bool:
    """Tell whether torch's reader or Python's takes a file for a zip archive; one that cannot be read is none."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\3\4" or zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        return True  # a damaged one
    except OSError:
        return False


def check_sizes(path: Path) -> None:
    """Raise ModelError where a zip's entries are together larger than the file could hold, or are too many."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, *DAMAGE) as err:
        raise ModelError(f"{path}: cannot be read as a zip archive: it is truncated or damaged ({err})") from err
    except OSError as err:
        raise ModelError(f"{path}: cannot be read: {err.strerror or err}") from err
    num_stored = sum(entry.file_size for entry in entries if entry.compress_type == zipfile.ZIP_STORED)
    num_unpacked = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
    if len(entries) > MAX_ENTRIES:
        raise ModelError(f"{path}: refused: holds {len(entries)} entries, and {MAX_ENTRIES} is the limit")
    if num_stored > os.stat(path).st_size:
        raise ModelError(f"{path}: refused: its entries say that they have {num_stored} bytes, more than the file")
    if num_unpacked > MAX_COMPRESSED_BYTES:
        limit = MAX_COMPRESSED_BYTES >> 20
        raise ModelError(f"{path}: refused: compressed entries would grow to {num_unpacked} bytes; {limit} MiB may be")


def read_code(path: Path) -> str:
    """Return the TorchScript of an artifact, all files of it, by the reader that torch loads with.

    Raises ModelError where what else is in the archive could lead that reader astray.
    """
    check_sizes(path)
    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))
        names = reader.get_all_records()
        _check_names(path, names, has_model_json=reader.has_record("model.json"))
        for archive in ("data", "constants"):
            _check_pickle(path, reader, archive)
        return "\n".join(reader.get_record(name).decode() for name in names if name.lower().endswith(".py"))
    except UnicodeDecodeError as err:
        raise ModelError(f"{path}: refused: its code is not UTF-8") from err
    except RuntimeError as err:
        reason = str(err).partition(". ")[0]
        raise ModelError(
            f"{path}: the model cannot be loaded: {reason}. The file is probably damaged: copy it or export it again"
        ) from err


def _check_names(path: Path, names: list[str], *, has_model_json: bool) -> None:
    if has_model_json:  # whose code may lie under any name
        raise ModelError(f"{path}: refused: a TorchScript archive of before 2019; export the model again")
    for name in names:
        if len(name) >= MAX_NAME:
            raise ModelError(f"{path}: refused: the name of an entry has {len(name)} characters: {name[:40]}...")


def _check_pickle(path: Path, reader: Any, archive: str) -> None:
    """Refuse a description of tensors that names anything but tensors, or more of their bytes than there are."""
    name = f"{archive}.pkl"
    size = reader.get_record_size(name)
    if size > MAX_PICKLE_BYTES:
        raise ModelError(f"{path}: refused: its {name} has {size} bytes, and {MAX_PICKLE_BYTES >> 20} MiB may be")
    try:
        for kind, key, num_items in _storages(reader.get_record(name)):
            has = reader.get_record_size(f"{archive}/{key}") if num_items else 0
            if not 0 <= num_items * _ITEM_BYTES[kind] <= has:
                raise ModelError(
                    f"{path}: refused: a tensor says that it has {num_items} {kind} in {archive}/{key} of {has} bytes"
                )
    except _RefusedError as err:
        raise ModelError(f"{path}: refused: its {name} {err}") from err
    except ValueError as err:  # of pickletools, for what is no pickle
        raise ModelError(f"{path}: refused: its {name} is damaged: {err}") from err


class _RefusedError(Exception):
    """A pickle of torch's holds what torch does not write."""


_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE")
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1")
_PUTS = ("BINPUT", "LONG_BINPUT")
_GETS = ("BINGET", "LONG_BINGET")
_PLAIN = """
PROTO MARK STOP NONE NEWTRUE NEWFALSE BINFLOAT GLOBAL EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
EMPTY_DICT SETITEM SETITEMS NEWOBJ BUILD REDUCE BINPERSID
"""
_KNOWN = frozenset((*_TEXTS, *_NUMBERS, *_PUTS, *_GETS, *_PLAIN.split()))


def _storages(content: bytes) -> Iterator[tuple[str, str, int]]:
    """Yield kind, entry and number of items of each storage that a pickle refers to.

    Nothing is built. A reference is the tuple ("storage", class, entry, device, number) and its BINPERSID, written as
    torch writes it: five values in a row, each a plain one or a word that stood before.
    """
    memo: dict[int, Any] = {}
    window: list[tuple[str, Any]] = []  # the last operations, without the puts
    operations: Iterator[tuple[Any, Any, int | None]] = pickletools.genops(content)
    for opcode, argument, _ in operations:
        name = opcode.name
        if name not in _KNOWN:
            raise _RefusedError(f"uses {name}, which torch does not write")
        if name in _PUTS:
            kind, value = window[-1] if window else ("", None)
            memo[argument] = value if kind in (*_TEXTS, *_GETS, "GLOBAL") else None
            continue
        if name in _GETS:
            argument = memo.get(argument)
        elif name == "GLOBAL":
            is_known = _STORAGE.fullmatch(argument) or _BUILDERS.fullmatch(argument)
            if not is_known or _CLASSES.match(argument):
                raise _RefusedError(f"names {argument!r:.80}, and tensors and the model's own classes alone may be")
        elif name == "BINPERSID":
            yield _storage(window)
        window = [*window[-6:], (name, argument)]


def _storage(window: list[tuple[str, Any]]) -> tuple[str, str, int]:
    kinds, values = [kind for kind, _ in window], [value for _, value in window]
    is_plain = (
        len(window) == 7
        and (kinds[0], kinds[6]) == ("MARK", "TUPLE")
        and all(kind in (*_TEXTS, *_GETS, "GLOBAL") for kind in kinds[1:5])
        and kinds[5] in _NUMBERS
        and values[1] == "storage"
        and all(isinstance(value, str) for value in values[1:5])
    )
    if not is_plain or not (kind := _STORAGE.fullmatch(values[2])):
        raise _RefusedError("refers to a tensor's bytes in a way that torch does not write")
    return kind[1], values[3], values[5]
