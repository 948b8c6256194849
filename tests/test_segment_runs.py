"""Maps of segment numbers become the run lengths that pycocotools makes of each segment's mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from streamd.gpu.segment_runs import encode_segments


def expected(ids: np.ndarray, num_segments: int) -> list[bytes]:
    masks = [np.asfortranarray(ids == index, dtype=np.uint8) for index in range(1, num_segments + 1)]
    return [coco.encode(mask)["counts"] for mask in masks]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1, 1), (1, 9), (9, 1), (17, 23)]),
    st.sampled_from([0, 1, 3, 40]),
    st.booleans(),
)
def test_each_segment_is_encoded_as_its_mask_alone(
    seed: int, size: tuple[int, int], num_segments: int, blocks: bool
) -> None:
    ids = np.random.default_rng(seed).integers(0, num_segments + 1, size)
    if blocks:
        ids = np.repeat(np.repeat(ids, 3, axis=0), 4, axis=1)
    strings, areas = encode_segments(torch.from_numpy(ids), num_segments)
    assert strings == expected(ids, num_segments)
    assert areas.tolist() == [int((ids == index).sum()) for index in range(1, num_segments + 1)]


def test_a_map_of_one_segment_is_one_run_after_an_empty_one() -> None:
    strings, areas = encode_segments(torch.full((30, 40), 2, dtype=torch.int32), 2)
    assert strings == expected(np.full((30, 40), 2), 2)
    assert areas.tolist() == [0, 1200]


def test_numbers_beyond_those_asked_for_are_nobodys_segment() -> None:
    ids = torch.tensor([[1, 7], [7, 1]])
    assert encode_segments(ids, 1)[0] == expected(ids.numpy(), 1)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_map_without_pixels_has_segments_without_area(size: tuple[int, int]) -> None:
    strings, areas = encode_segments(torch.zeros(size, dtype=torch.int32), 2)
    assert len(strings) == 2 and areas.tolist() == [0, 0]
