"""DensePose charts as bytes, for both ends of the wire.

Three planes of height x width uint8, in rows: part, U, V. Each row is stored as its difference, modulo 256, from the
row above it, which makes smooth coordinates small numbers, and all is compressed by zlib (RFC 1950).
"""

from __future__ import annotations

import zlib

import numpy as np

from streamd.errors import WireError

MAX_SIDE = 128  # cells; the daemon sends no more, and a message that says so would have the reader make room for them


def pack(planes: np.ndarray) -> bytes:
    """Return the bytes of planes [3, height, width] uint8."""
    # Differences repeat within a row if at all: to search further takes four times as long and saves 6 %.
    compressor = zlib.compressobj(strategy=zlib.Z_RLE)
    return compressor.compress(np.diff(planes, axis=1, prepend=np.uint8(0)).tobytes()) + compressor.flush()


def unpack(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return the planes [3, height, width] uint8 that `pack` was given; `size` is height and width.

    Raises WireError where the size is not one that the daemon sends, or the bytes are damaged; never takes more memory
    than the size says.
    """
    height, width = size
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise WireError(f"damaged chart: its size is {height} x {width} cells, want 1 to {MAX_SIDE}")
    num_bytes = 3 * height * width
    reader = zlib.decompressobj()
    try:
        content = reader.decompress(data, num_bytes + 1)
    except zlib.error as err:
        raise WireError(f"damaged chart: {err}") from err
    if len(content) != num_bytes or not reader.eof:
        raise WireError(f"damaged chart: its bytes are not those of 3 planes of {height} x {width} cells")
    steps = np.frombuffer(content, np.uint8).reshape(3, height, width)
    return np.cumsum(steps, axis=1, dtype=np.uint8)
