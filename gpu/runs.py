"""Launch rle.cu: the ends of runs become COCO's strings on the device where they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from streamd.gpu import cuda
from streamd.gpu.rle import MAX_CHARACTERS_PER_RUN, EncodedMasks

_NUM_THREADS = 256


def pack_runs(ends: Tensor, positions: Tensor, stride: int) -> EncodedMasks:
    """Pack the runs of M masks, which lie in `ends` [capacity] int32 as paste.cu writes them.

    Mask i's are ends[positions[i * stride] : positions[(i + 1) * stride]]; `positions` is [M * stride + 1] int64. Where
    they are more than `ends` holds, every string is empty.
    """
    num_masks = (len(positions) - 1) // stride
    device = ends.device
    runs = (ends, positions, np.int32(stride), np.int64(len(ends)))
    lengths = torch.empty(num_masks, dtype=torch.int32, device=device)
    offsets = torch.zeros(num_masks + 1, dtype=torch.int64, device=device)
    characters = torch.empty(MAX_CHARACTERS_PER_RUN * len(ends), dtype=torch.uint8, device=device)
    rle = cuda.load("rle", device)
    rle.launch("measure_strings", num_masks, _NUM_THREADS, *runs, lengths)
    torch.cumsum(lengths, 0, dtype=torch.int64, out=offsets[1:])
    rle.launch("write_strings", num_masks, _NUM_THREADS, *runs, offsets, characters)
    return EncodedMasks(characters, offsets, positions[-1])
