"""Masks as bits of a region, and COCO's compressed string of run lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_BITS_PER_CHARACTER = 5
# A value needs n characters when 5 n bits hold it in two's complement: its magnitude must stay below 2^(5 n - 1).
_CHARACTER_LIMITS = 1 << (np.arange(1, 8, dtype=np.int64) * _BITS_PER_CHARACTER - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """The part of a binary mask that can be set; everything outside the region is zero."""

    x0: int  # source pixels: the region's first column and row
    y0: int
    bits: Tensor  # [rows, columns] bool at source size; either may be 0


def pack_counts(counts: np.ndarray) -> bytes:
    """Pack run lengths [R] into COCO's compressed ASCII, byte by byte as pycocotools does.

    From the fourth run on, the difference to the run before last is stored. Each number is cut into groups of
    five bits, lowest first, sign-extended; a sixth bit says that more follow; 48 is added (maskApi.c, rleToString).
    """
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2].astype(np.int64)
    magnitudes = values ^ (values >> 63)
    lengths = np.searchsorted(_CHARACTER_LIMITS, magnitudes, side="right") + 1
    group = np.arange(lengths.max(initial=1))
    characters = (values[:, None] >> (_BITS_PER_CHARACTER * group)) & 0b11111
    characters |= (group < lengths[:, None] - 1) * 0b100000
    return bytes((characters + 48)[group < lengths[:, None]].astype(np.uint8))
