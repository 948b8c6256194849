"""What is read from outside has a bound: a few bytes never ask for endless memory or time."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import yaml

from streamd import config_file, wire
from streamd.bounded import PlainLoader, read_bytes
from streamd.datasets import data, pictures
from streamd.decode.software import SoftwareDecoder
from streamd.errors import ConfigError, DataError, ModelError, WireError
from streamd.models.contract import MAX_SIDE, describe_wrong_spec
from streamd.models.importers import config as detectron2_config
from streamd.models.spec import ModelSpec
from streamd.sources import SourceOptions, Timeline, open_source
from streamd.sources.access_units import AccessUnits
from tests.wire_samples import make_message

MIB = 1 << 20


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Fail where Python or numpy asks for more memory, at any time within the block."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < num_bytes, f"{peak >> 20} MiB"


def test_a_file_is_read_up_to_its_bound_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    assert read_bytes(path, 4) == b"1234"
    with pytest.raises(OSError, match="larger than 3 bytes"):
        read_bytes(path, 3)
    with at_most(8 * MIB), pytest.raises(OSError, match="larger than 1 MiB"):
        read_bytes(Path("/dev/zero"), MIB)


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ((40_000, 25_000), "PPklln0"),
        ((1, 2**40), "0"),
        ((-3, -4), "<"),
        ((2**33, 2**33), ""),
        ((3, 4), "o" * 100_000),
        ((3, 4), "\uffff"),
        ((3, 4), "ooooooo1" * 100),
    ],
)
def test_a_mask_that_says_it_is_huge_takes_no_memory(size: tuple[int, int], counts: str) -> None:
    with at_most(4 * MIB), pytest.raises(WireError, match="damaged mask"):
        wire.Mask(size=size, counts=counts).decode()


def test_a_message_whose_numbers_are_beyond_reason_is_refused_where_they_are_used() -> None:
    huge = msgspec.structs.replace(make_message(), width=1 << 20, height=1 << 20, captured_at="yesterday")
    with at_most(4 * MIB), pytest.raises(WireError, match="frame has 1048576 x 1048576 pixels"):
        huge.segment_map()
    with pytest.raises(WireError, match="captured_at is 'yesterday'"):
        _ = huge.captured_at_s
    with pytest.raises(WireError, match="67108865 bytes, want 67108864 at most"):
        wire.decode(bytes(wire.MAX_PAYLOAD_BYTES + 1), "status")
    nested = b'{"more":' + b"[" * 100_000
    with pytest.raises(WireError, match="not a streamd status message"):
        wire.decode(nested, "status")


def unfolding(merge: str) -> str:
    """Write ten maps of which each holds the one before ten times."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{{merge}: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 11)]
    return "\n".join(lines)


YAML_BOMBS = {
    "aliases": unfolding("x"),
    "merges": unfolding("<<"),
    "empty merges": unfolding("<<").replace("{x: 1}", "{}"),
    "many merges": f"a: &a {{x: 1}}\nb: {{<<: [{'*a,' * 2_000}]}}",
    "base 60": f"a: {'1:' * 20_000}1",
    "float base 60": f"a: {'1:' * 20_000}1.5",
    "hexadecimal": f"a: 0x{'f' * 20_000}",
    "depth": "a: " + "[" * 5_000,
}


@pytest.mark.parametrize("bomb", YAML_BOMBS.values(), ids=YAML_BOMBS)
@pytest.mark.parametrize(
    ("read", "refused"),
    [(config_file.load, ConfigError), (detectron2_config.read, ModelError), (data.read, DataError)],
    ids=["configuration", "detectron2", "yolo"],
)
def test_yaml_that_unfolds_without_end_is_read_or_refused_in_time(
    tmp_path: Path, read: Callable[[Path], object], refused: type[Exception], bomb: str
) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(f"names: [a]\ntrain: .\n{bomb}\n")
    began = time.process_time()
    with suppress(refused):
        read(path)
    assert time.process_time() - began < 60, "without a bound, hours"


def test_yaml_whose_key_cannot_be_one_is_an_error_of_yaml() -> None:
    with pytest.raises(yaml.YAMLError):
        yaml.load("? !!omap [a: []]\n: b", Loader=PlainLoader)


def test_a_camera_that_never_ends_a_picture_fills_no_memory() -> None:
    units = AccessUnits("h264")
    with at_most(64 * MIB):
        for _ in range(100):
            units.feed(bytes(MIB), 1)
        for number in range(100_000):
            units.feed(b"%d" % number, 1)
    (unit,) = units.feed(b"\0\0\0\1\x65", 2)
    assert unit.corrupt and len(unit.data) <= 17 * MIB


def png_of(width: int, height: int) -> bytes:
    """Write the head of a picture that is nothing but its size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * width) * 4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_picture_that_says_it_is_huge_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_of(30_000, 30_000))
    with at_most(16 * MIB), pytest.raises(DataError, match="decompression bomb"):
        pictures.inspect(path, None, deep=True)
    with at_most(16 * MIB), pytest.raises(DataError, match="decompression bomb"):
        pictures.read(path, (30_000, 30_000))


def test_a_camera_whose_pictures_are_huge_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_of(30_000, 4_000))
    source = open_source(SourceOptions(str(path)), Timeline())
    decoder = SoftwareDecoder("gate", source.video)
    assert not [frame for packet in source.packets() for frame in decoder.decode(packet)]
    source.close()


def test_a_model_whose_input_is_huge_is_refused() -> None:
    spec = ModelSpec(name="a", task="detect", labels=("a",), input_size=(MAX_SIDE * 2, 32), colour="rgb")
    assert describe_wrong_spec(spec) == f"input_size is [{MAX_SIDE * 2}, 32], both must be positive, and at most 8192"
