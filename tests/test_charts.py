"""Charts come back as they were packed, and no bytes make a reader take more memory than a chart has."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.charts import MAX_SIDE, pack, unpack
from streamd.errors import WireError
from tests.conftest import ROOT
from tests.wire_samples import body


@settings(deadline=None)
@given(
    height=st.integers(1, MAX_SIDE),
    width=st.integers(1, MAX_SIDE),
    seed=st.integers(0, 9),
)
def test_any_chart_comes_back(height: int, width: int, seed: int) -> None:
    planes = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    np.testing.assert_array_equal(unpack(pack(planes), (height, width)), planes)


def test_a_reader_needs_numpy_alone() -> None:
    planes = body(3, 2, num_parts=2)
    program = (
        "import sys; from streamd.wire import SurfaceChart;"
        f"SurfaceChart(box=(0, 0, 2, 3), size=(3, 2), data={pack(planes)!r}).decode();"
        "print(sorted({'torch', 'av', 'numpy', 'supervision', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"


def test_a_person_at_full_resolution_takes_seven_kilobytes() -> None:
    planes = body(MAX_SIDE, MAX_SIDE // 2)
    packed = pack(planes)
    assert 6_500 < len(packed) < 7_500 and planes.size == 24_576
    np.testing.assert_array_equal(unpack(packed, (MAX_SIDE, MAX_SIDE // 2)), planes)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 4), (MAX_SIDE + 1, 4), (4, 1 << 40)])
def test_a_size_that_the_daemon_never_sends_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(WireError, match=r"size is .* cells, want 1 to 128"):
        unpack(pack(body(4, 4)), size)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not zlib",
        pack(body(8, 4))[:-5],
        pack(body(8, 3)),
        pack(body(8, 5)),
        zlib.compress(bytes(96))[:-1] + b"\0",
    ],
)
def test_damaged_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="damaged chart"):
        unpack(data, (8, 4))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack(data, (8, 4))


def test_bytes_that_would_swell_are_read_no_further_than_a_chart_goes() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    tracemalloc.start()
    with pytest.raises(WireError, match="damaged chart"):
        unpack(bomb, (MAX_SIDE, MAX_SIDE))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
