"""Launch keypoints.cu: the best point of each heat map, found on the device without a word to the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from streamd.gpu import cuda
from streamd.gpu.reference import MAX_BOX_SIDE_PX

_NUM_THREADS = 256
_MAX_MAP_BYTES = 40 * 1024  # of a block's shared memory


def locate_keypoints(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """Find the point of each heat map [B, N, J, S, S]; see `reference.locate_keypoints`. Fit for a CUDA graph.

    ValueError for shapes that do not fit together, and for maps of more than 101 x 101.
    """
    num_maps, size = heatmaps.shape[2], heatmaps.shape[-1]
    if boxes.shape != (*heatmaps.shape[:2], 4) or heatmaps.shape[-2] != size:
        shapes = f"{list(heatmaps.shape)} and {list(boxes.shape)}"
        raise ValueError(f"locate_keypoints takes heat maps [B, N, J, S, S] and boxes [B, N, 4], not {shapes}")
    num_bytes = size * size * np.dtype(np.float32).itemsize
    if num_bytes > _MAX_MAP_BYTES:
        raise ValueError(f"heat maps of {size} x {size} are too large: a block has room for {_MAX_MAP_BYTES} bytes")
    maps, corners = heatmaps.float().contiguous(), boxes.float().contiguous()
    points = torch.empty((*heatmaps.shape[:3], 3), dtype=torch.float32, device=heatmaps.device)
    cuda.load("keypoints", heatmaps.device).launch(
        "locate_keypoints",
        points.numel() // 3,
        _NUM_THREADS,
        maps,
        corners,
        np.int32(num_maps),
        np.int32(size),
        np.float32(MAX_BOX_SIDE_PX),
        points,
        shared_bytes=num_bytes,
    )
    return points
