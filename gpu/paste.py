"""Launch paste.cu: masks are stretched to source size and encoded on the device; their pixels are never stored.

Nothing here waits for the device, so that it can be captured in a CUDA graph. The twins are in mask_reference.py.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from streamd.gpu import cuda
from streamd.gpu.mask_reference import logit
from streamd.gpu.rle import EncodedMasks
from streamd.gpu.runs import pack_runs

_NUM_THREADS = 256
# A mask's columns are cut into parts, a block each: many where there are few masks, so that all processors have work,
# but no more than there is work for, since the part of a small mask is at least 32 columns wide.
_NUM_BLOCKS = 4096
_MIN_PARTS, _MAX_PARTS = 8, 64
_ELEMENT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def encode_prototype_masks(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    valid: Tensor,
    placements: Tensor,
    *,
    input_size: tuple[int, int],
    threshold: float,
    capacity: int,
) -> EncodedMasks:
    """Encode masks that are mixtures of prototypes; see `mask_reference.encode_prototype_masks`."""
    num_images, num_prototypes, height, width = prototypes.shape
    _check("coefficients", coefficients, (num_images, valid.shape[1], num_prototypes), prototypes.dtype)
    logits = torch.bmm(coefficients, prototypes.flatten(2))
    mask = (
        logits,
        _element_type(logits),
        np.int32(height),
        np.int32(width),
        np.float32(height / input_size[0]),
        np.float32(width / input_size[1]),
        np.float32(logit(threshold)),
    )
    return _encode("prototype", mask, boxes, valid, placements, capacity)


def encode_box_masks(
    masks: Tensor, boxes: Tensor, valid: Tensor, placements: Tensor, *, threshold: float, capacity: int
) -> EncodedMasks:
    """Encode masks that are squares of probabilities over their boxes; see `mask_reference.encode_box_masks`."""
    size = masks.shape[-1]
    _check("masks", masks, (*valid.shape, size, size), masks.dtype)
    mask = (masks.contiguous(), _element_type(masks), np.int32(size), np.float32(threshold))
    return _encode("box", mask, boxes, valid, placements, capacity)


def _encode(
    kind: Literal["prototype", "box"],
    mask: tuple[Tensor | np.generic, ...],
    boxes: Tensor,
    valid: Tensor,
    placements: Tensor,
    capacity: int,
) -> EncodedMasks:
    """Count the runs of every part, sum up where each part's begin, write them, and pack them."""
    num_images, num_objects = valid.shape
    _check("boxes", boxes, (num_images, num_objects, 4), torch.float32)
    _check("valid", valid, (num_images, num_objects), torch.bool)
    placements = placements[:, :6]
    _check("placements", placements, (num_images, 6), torch.float32)
    num_masks = num_images * num_objects
    num_parts = min(max(_NUM_BLOCKS // max(num_masks, 1), _MIN_PARTS), _MAX_PARTS)
    device = boxes.device
    objects = (boxes.contiguous(), valid.contiguous(), placements.contiguous(), np.int32(num_objects))
    table = torch.empty(num_masks * (num_parts + 1), dtype=torch.int32, device=device)
    positions = torch.zeros(len(table) + 1, dtype=torch.int64, device=device)
    ends = torch.empty(capacity, dtype=torch.int32, device=device)
    paste, grid = cuda.load("paste", device), (num_masks, num_parts)
    paste.launch(f"count_{kind}_runs", grid, _NUM_THREADS, *mask, *objects, table)
    torch.cumsum(table, 0, dtype=torch.int64, out=positions[1:])
    paste.launch(f"write_{kind}_runs", grid, _NUM_THREADS, *mask, *objects, positions, np.int64(capacity), ends)
    return pack_runs(ends, positions, num_parts + 1)


def _element_type(elements: Tensor) -> np.int32:
    if elements.dtype not in _ELEMENT_TYPES:
        raise TypeError(f"masks are float32, float16 or bfloat16, not {elements.dtype}")
    return np.int32(_ELEMENT_TYPES[elements.dtype])


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        wanted, given = (f"{kind} {list(sizes)}" for kind, sizes in ((dtype, shape), (tensor.dtype, tensor.shape)))
        raise ValueError(f"{name} must be {wanted}, not {given}")
