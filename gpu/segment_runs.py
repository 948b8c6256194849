"""Maps of segment numbers as COCO run lengths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from streamd.gpu.rle import join, pack


def encode_segments(ids: Tensor, num_segments: int) -> tuple[list[bytes], np.ndarray]:
    """Encode the segments 1 to `num_segments` of a map [H, W] of integers; waits for the device.

    Returns the compressed run lengths of each, and its area in pixels, [num_segments] int64. The map itself stays where
    it is: only the places where a number changes, going down the columns, come to the host.
    """
    line = ids.t().flatten()
    changes = (line[1:] != line[:-1]).nonzero()[:, 0] + 1
    starts = torch.cat((changes.new_zeros(min(1, len(line))), changes))
    numbers, first = line[starts].numpy(force=True), starts.numpy(force=True)
    last = np.append(first[1:], len(line))
    ends = []
    areas = np.zeros(num_segments, dtype=np.int64)
    for index in range(num_segments):
        (runs,) = np.nonzero(numbers == index + 1)
        borders = np.stack((first[runs], last[runs]), axis=-1).ravel()
        areas[index] = (last[runs] - first[runs]).sum()
        ends.append(borders if len(borders) and borders[-1] == len(line) else np.append(borders, len(line)))
    characters, offsets = pack(*join(ends))
    return [characters[start:stop].tobytes() for start, stop in pairwise(offsets)], areas
