"""Run lengths and their string, byte by byte against pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from streamd.gpu.ops import Bits, pack_counts, rle

repeatable = settings(deadline=None, derandomize=True, max_examples=80)


def packed(bits: Bits, height: int, width: int) -> bytes:
    counts = rle(bits, height, width)
    assert counts.dtype == np.uint32 and counts.sum(dtype=np.int64) == height * width
    return pack_counts(counts)


def packed_by_pycocotools(bits: Bits, height: int, width: int) -> bytes:
    rows, columns = bits.bits.shape
    frame = np.zeros((height, width), dtype=np.uint8, order="F")
    frame[bits.y0 : bits.y0 + rows, bits.x0 : bits.x0 + columns] = bits.bits.numpy()
    counts: bytes = coco.encode(frame)["counts"]
    return counts


def assert_same(bits: Bits, height: int, width: int) -> None:
    assert packed(bits, height, width) == packed_by_pycocotools(bits, height, width)


@st.composite
def regions(draw: st.DrawFn) -> tuple[Bits, int, int]:
    """Draw a region of random density anywhere in a small frame; it may be empty or be the whole frame."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    y0, x0 = draw(st.integers(0, height)), draw(st.integers(0, width))
    rows, columns = draw(st.integers(0, height - y0)), draw(st.integers(0, width - x0))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Bits(x0, y0, torch.from_numpy(rng.random((rows, columns)) < density)), height, width


@repeatable
@given(regions())
def test_run_lengths_of_any_region_are_those_of_pycocotools(case: tuple[Bits, int, int]) -> None:
    assert_same(*case)


@pytest.mark.parametrize(
    ("x0", "y0", "rows", "columns"),
    [
        (0, 0, 0, 0),  # empty
        (40, 30, 0, 7),
        (0, 0, 60, 80),  # full
        (0, 0, 1, 1),  # first pixel
        (79, 59, 1, 1),  # last pixel
        (33, 7, 1, 1),
        (12, 0, 60, 1),  # one column
        (0, 12, 1, 80),  # one row
        (5, 10, 50, 9),  # down to the last row
        (5, 0, 50, 9),  # from the first row
        (5, 0, 60, 9),  # runs go on from column to column
    ],
)
def test_run_lengths_of_degenerate_masks_are_those_of_pycocotools(x0: int, y0: int, rows: int, columns: int) -> None:
    assert_same(Bits(x0, y0, torch.ones(rows, columns, dtype=torch.bool)), 60, 80)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_run_lengths_of_a_frame_4095_wide_are_those_of_pycocotools(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    blobs = torch.rand(1, 1, 20, 40, generator=rng)
    bits = torch.nn.functional.interpolate(blobs, (2160, 4095), mode="bilinear")[0, 0] > 0.5
    assert_same(Bits(0, 0, bits.to(dtype)), 2160, 4095)
    assert_same(Bits(4094, 2159, torch.ones(1, 1, dtype=dtype)), 2160, 4095)


def test_run_lengths_do_not_depend_on_how_the_bits_lie_in_memory() -> None:
    bits = torch.rand(9, 14, generator=torch.Generator().manual_seed(1)) > 0.4
    assert packed(Bits(2, 3, bits.T.contiguous().T), 20, 20) == packed(Bits(2, 3, bits), 20, 20)


@repeatable
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_packed_counts_are_what_pycocotools_reads(counts: list[int]) -> None:
    # frUncompressedRLE packs whatever it is given, so the widest numbers can be compared too.
    theirs = coco.frPyObjects({"size": [1, 1], "counts": counts}, 1, 1)["counts"]
    assert pack_counts(np.array(counts, dtype=np.uint32)) == theirs
