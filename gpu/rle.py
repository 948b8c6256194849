"""Binary masks as COCO keeps them: the lengths of their runs down the columns, zeros first, in compressed ASCII."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_BITS_PER_CHARACTER = 5
# The lengths of a frame's runs, and their differences, are below 2^31.
MAX_CHARACTERS_PER_RUN = 7


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """The part of a binary mask that can be set; everything outside the region is zero."""

    x0: int  # source pixels: the region's first column and row
    y0: int
    bits: Tensor  # [rows, columns] bool at source size; either may be 0


@dataclass(frozen=True, slots=True, eq=False)
class EncodedMasks:
    """The strings of M masks, one behind another, on the device where they were made.

    They were made with room for so many runs; where `num_runs` says that this was too little, no string is there.
    """

    characters: Tensor  # [>= offsets[M]] uint8
    offsets: Tensor  # [M + 1] int64; mask i is characters[offsets[i] : offsets[i + 1]], nothing if it was not valid
    num_runs: Tensor  # [] int64: of all masks together

    def strings(self) -> list[bytes]:
        """Cut out the M strings; waits for the device."""
        offsets = self.offsets.tolist()
        characters = self.characters[: offsets[-1]].numpy(force=True).tobytes()
        return [characters[first:last] for first, last in pairwise(offsets)]


def run_ends(bits: Bits, height: int, width: int) -> np.ndarray:
    """Say where each run of a height x width mask ends: [R] int64, counted down the columns; the last is its area."""
    rows, columns = bits.bits.shape
    # One zero below each column ends its runs; a region as tall as the frame has none, since runs go on in the next.
    pitch = rows + (rows < height)
    line = np.zeros(columns * pitch + 2, dtype=bool)
    line[1:-1].reshape(columns, pitch)[:, :rows] = bits.bits.numpy(force=True).T
    column, row = np.divmod(np.flatnonzero(line[1:] != line[:-1]), pitch)
    ends = (bits.x0 + column) * height + bits.y0 + row
    area = height * width
    return ends if len(ends) and ends[-1] == area else np.append(ends, area)


def pack(ends: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pack the runs of M masks into COCO's compressed ASCII, byte by byte as pycocotools does.

    The runs of mask i end at ends[offsets[i] : offsets[i + 1]], int64. Returns the characters uint8, and the offsets
    [M + 1] int64 of each mask's in them.

    From a mask's fourth run on, the difference to the length of the run before last is stored. Each number is cut into
    groups of five bits, lowest first, sign-extended; a sixth bit says that more follow; 48 is added (maskApi.c,
    rleToString).
    """
    values = _values(ends, offsets)
    left = _num_characters(values)
    first = np.concatenate(([0], left)).cumsum()
    characters, position = np.empty(first[-1], dtype=np.uint8), first[:-1]
    while len(position):
        more = left > 1
        characters[position] = 48 + (values & 0b11111) + 0b100000 * more
        position, values, left = position[more] + 1, values[more] >> _BITS_PER_CHARACTER, left[more] - 1
    return characters, first[offsets]


def _values(ends: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the number that stands for each run."""
    run = np.arange(len(ends)) - np.repeat(offsets[:-1], np.diff(offsets))
    lengths = np.diff(ends, prepend=0)
    lengths[run == 0] = ends[run == 0]
    values = lengths.copy()
    values[2:] -= np.where(run[2:] > 2, lengths[:-2], 0)
    return values


def _num_characters(values: np.ndarray) -> np.ndarray:
    """Count the characters that each number needs: n, when 5 n bits hold it in two's complement."""
    magnitudes = values ^ (values >> 63)  # -1 needs no more bits than 0
    most = magnitudes.max(initial=0)
    count = np.ones(len(values), dtype=np.int64)
    limit = 1 << (_BITS_PER_CHARACTER - 1)
    while limit <= most:
        count += magnitudes >= limit
        limit <<= _BITS_PER_CHARACTER
    return count


def join(ends: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lay the runs of M masks one behind another; returns the ends and the offsets [M + 1] of each mask."""
    offsets = np.cumsum([0, *map(len, ends)])
    return np.concatenate([np.empty(0, dtype=np.int64), *ends]), offsets
