"""Run lengths and their strings, byte by byte against pycocotools; and the kernel that makes them, against its twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from streamd.gpu.rle import Bits, EncodedMasks, join, pack, run_ends

repeatable = settings(deadline=None, derandomize=True, max_examples=80)


def encoded(bits: Bits, height: int, width: int) -> bytes:
    ends = run_ends(bits, height, width)
    assert ends[-1] == height * width and (np.diff(ends) > 0).all()
    characters, offsets = pack(ends, np.array([0, len(ends)]))
    assert offsets.tolist() == [0, len(characters)]
    return characters.tobytes()


def encoded_by_pycocotools(bits: Bits, height: int, width: int) -> bytes:
    rows, columns = bits.bits.shape
    frame = np.zeros((height, width), dtype=np.uint8, order="F")
    frame[bits.y0 : bits.y0 + rows, bits.x0 : bits.x0 + columns] = bits.bits.numpy()
    counts: bytes = coco.encode(frame)["counts"]
    return counts


def assert_same(bits: Bits, height: int, width: int) -> None:
    assert encoded(bits, height, width) == encoded_by_pycocotools(bits, height, width)


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
    assert encoded(Bits(2, 3, bits.T.contiguous().T), 20, 20) == encoded(Bits(2, 3, bits), 20, 20)


def packed_by_pycocotools(ends: np.ndarray) -> bytes:
    # frPyObjects packs whatever it is given, so the widest numbers can be compared too.
    lengths = np.diff(ends, prepend=0).tolist()
    counts: bytes = coco.frPyObjects({"size": [1, 1], "counts": lengths}, 1, 1)["counts"] if lengths else b""
    return counts


@repeatable
@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=40), max_size=5))
def test_packed_runs_are_what_pycocotools_reads(masks: list[list[int]]) -> None:
    ends = [np.cumsum(np.array(lengths, dtype=np.int64)) for lengths in masks]
    characters, offsets = pack(*join(ends))
    theirs = list(map(packed_by_pycocotools, ends))
    assert characters.tobytes() == b"".join(theirs)
    np.testing.assert_array_equal(offsets, np.cumsum([0, *map(len, theirs)]))


def test_strings_are_cut_out_of_the_characters_and_a_mask_that_is_not_valid_has_none() -> None:
    encoded = EncodedMasks(torch.tensor(list(b"abcde??")).byte(), torch.tensor([0, 2, 2, 5]), torch.tensor(7))
    assert encoded.strings() == [b"ab", b"", b"cde"]


def random_ends(rng: np.random.Generator, num_runs: int, longest: int) -> np.ndarray:
    ends = np.cumsum(rng.integers(1, longest, num_runs, endpoint=True))
    assert num_runs == 0 or ends[-1] < 2**31
    return ends


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize(
    "masks",
    [
        [],
        [(0, 1)],
        [(1, 1), (0, 1), (2, 10**9), (3, 10**8), (4, 10**8), (5, 10**8)],
        [(255, 40), (256, 400), (257, 4000), (0, 1), (511, 3_000_000), (1200, 1), (1, 2**31 - 1)],
    ],
)
def test_kernel_packs_what_the_twin_packs(
    device: torch.device, masks: list[tuple[int, int]], spare: int, stride: int
) -> None:
    from streamd.gpu.runs import pack_runs

    rng = np.random.default_rng(7)
    ends, offsets = join([random_ends(rng, *mask) for mask in masks])
    buffer = np.append(ends, np.full(spare, -1)).astype(np.int32)
    positions = np.full(len(masks) * stride + 1, -1)
    positions[::stride] = offsets
    packed = pack_runs(torch.tensor(buffer).to(device), torch.tensor(positions).to(device), stride)
    characters, expected_offsets = pack(ends, offsets)
    assert packed.num_runs == len(ends)
    np.testing.assert_array_equal(packed.offsets.cpu(), expected_offsets)
    np.testing.assert_array_equal(packed.characters[: len(characters)].cpu(), characters)


def test_kernel_packs_nothing_where_there_was_too_little_room(device: torch.device) -> None:
    from streamd.gpu.runs import pack_runs

    packed = pack_runs(torch.full((9,), 1 << 30, device=device).int(), torch.tensor([0, 4, 10], device=device), 1)
    assert packed.num_runs == 10
    assert packed.offsets.tolist() == [0, 0, 0]
