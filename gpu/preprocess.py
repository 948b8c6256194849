"""Letterbox and normalise pictures into a batch with one launch; `reference.preprocess` is the twin."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamd.gpu import cuda
from streamd.gpu.reference import from_ycbcr
from streamd.messages import Letterbox, Picture

# `Frame` in preprocess.cu, which says what the fields mean.
FRAME = np.dtype(
    [
        ("origin", np.uint64, 3),
        ("row_stride", np.int32, 3),
        ("column_stride", np.int32, 3),
        ("height", np.int32, 2),
        ("width", np.int32, 2),
        ("step_y", np.float32, 2),
        ("step_x", np.float32, 2),
        ("left", np.int32),
        ("top", np.int32),
        ("right", np.int32),
        ("bottom", np.int32),
        ("weights", np.float32, (3, 4)),
        ("normalise", np.float32, (3, 2)),
        ("padding", np.float32, 3),
        ("is_nv12", np.int32),
        ("unused", np.int64),  # rounds the size up to that of a CUDA struct with float4
    ]
)

_BLOCK = (32, 8)  # threads; kThreadsX and kThreadsY
_TILE = (128, 32)  # pixels that a block fills; kTileWidth and kTileHeight
_HOST = torch.device("cpu")
_FUNCTIONS = {torch.float32: "preprocess_float32", torch.float16: "preprocess_float16"}
_CHANNELS_OF_PLANES = {"yuv": (1, 1, 1), "nv12": (1, 2), "rgb": (3,)}


def preprocess(
    pictures: Sequence[Picture],
    letterboxes: Sequence[Letterbox],
    out: Tensor,
    *,
    colour: Literal["bgr", "rgb"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    pad: tuple[float, float, float],
    antialias: bool = False,
) -> None:
    """Fill each slot of `out` with one picture, as `reference.preprocess` does, on torch's current stream.

    Returns at once. Whoever made the pictures keeps them until the launch has run, and has let the current stream
    wait for them. Not for a CUDA graph, whose replays would read the same addresses again.

    Raises ValueError for a picture that is not on the device of `out`, and for what the kernel cannot take.
    """
    function = _function(out)
    num_slots, _, height, width = out.shape
    if not len(pictures) == len(letterboxes) == num_slots:
        raise ValueError(
            f"preprocess fills every slot: got {len(pictures)} pictures and {len(letterboxes)} letterboxes "
            f"for {num_slots} slots"
        )
    frames = np.empty(num_slots, FRAME)
    for slot, (picture, letterbox) in enumerate(zip(pictures, letterboxes, strict=True)):
        _check_picture(picture, slot, out.device)
        _check_letterbox(letterbox, slot, height, width)
        mixing = _mixing(picture.layout, picture.matrix, picture.full_range, colour, mean, std, pad)
        frames[slot] = _frame(picture, letterbox, mixing)
    if antialias and _any_shrinks(frames):  # else it changes nothing, and four elements are read quicker than a window
        function += "_antialias"
    grid = (-(-width // _TILE[0]), -(-height // _TILE[1]), num_slots)
    cuda.load("preprocess", out.device).launch(
        function, grid, _BLOCK, _on_device(frames, out.device), out, np.int32(height), np.int32(width)
    )


def _function(out: Tensor) -> str:
    """Name the kernel for the type and the memory layout of `out`."""
    function = _FUNCTIONS.get(out.dtype)
    if function is None or out.dim() != 4 or out.shape[1] != 3:
        raise ValueError(
            f"preprocess writes [B, 3, H, W] of float32 or float16, not {list(out.shape)} of {out.dtype}; "
            "let the network convert other types"
        )
    if out.is_contiguous():
        return function
    if out.is_contiguous(memory_format=torch.channels_last):
        return f"{function}_channels_last"
    raise ValueError(
        f"preprocess writes a batch that is contiguous or channels_last, not one of strides {out.stride()}"
    )


def _check_picture(picture: Picture, slot: int, device: torch.device) -> None:
    expected = _CHANNELS_OF_PLANES[picture.layout]
    shapes = [list(plane.shape) for plane in picture.planes]
    is_shaped = len(shapes) == len(expected) and all(
        len(shape) >= 2 and all(shape) and shape[2:] == ([n] if n > 1 else [])
        for shape, n in zip(shapes, expected, strict=True)
    )
    if not is_shaped or (picture.layout == "yuv" and shapes[1] != shapes[2]):
        raise ValueError(f"the picture for slot {slot} is no {picture.layout}: its planes have the shapes {shapes}")
    for plane in picture.planes:
        if plane.dtype != torch.uint8 or plane.device != device:
            raise ValueError(
                f"the picture for slot {slot} is {plane.dtype} on {plane.device}; preprocess reads uint8 on {device}, "
                "the device of the batch: move the picture there first"
            )


def _check_letterbox(letterbox: Letterbox, slot: int, height: int, width: int) -> None:
    across = 0 <= letterbox.left < letterbox.left + letterbox.width <= width
    down = 0 <= letterbox.top < letterbox.top + letterbox.height <= height
    if not (across and down):
        raise ValueError(f"{letterbox} of slot {slot} is empty or leaves the {width} x {height} pixels of the batch")


class _Channel(NamedTuple):
    """Where the bytes of one channel lie: at origin + y * row_stride + x * column_stride."""

    origin: int
    row_stride: int
    column_stride: int
    height: int
    width: int


def _upright_channels(picture: Picture) -> list[_Channel]:
    """Find the three channels of a picture: Y', Cb, Cr or R', G', B'."""
    return [
        _upright(
            _Channel(plane.data_ptr() + i * plane.stride(-1), plane.stride(0), plane.stride(1), *plane.shape[:2]),
            picture.rotation,
        )
        for plane, num_channels in zip(picture.planes, _CHANNELS_OF_PLANES[picture.layout], strict=True)
        for i in range(num_channels)
    ]


def _upright(channel: _Channel, rotation: int) -> _Channel:
    """Turn a channel counter-clockwise by walking through the same bytes in another order."""
    origin, row_stride, column_stride, height, width = channel
    last_row, last_column = (height - 1) * row_stride, (width - 1) * column_stride
    if rotation == 90:
        return _Channel(origin + last_column, -column_stride, row_stride, width, height)
    if rotation == 180:
        return _Channel(origin + last_row + last_column, -row_stride, -column_stride, height, width)
    if rotation == 270:
        return _Channel(origin + last_row, column_stride, -row_stride, width, height)
    return channel


class _Mixing(NamedTuple):
    """The fields of FRAME that do not depend on where pixels lie."""

    weights: np.ndarray
    normalise: np.ndarray
    padding: np.ndarray


@cache
def _mixing(
    layout: Literal["yuv", "nv12", "rgb"],
    matrix: Literal["bt601", "bt709"],
    full_range: bool,
    colour: Literal["bgr", "rgb"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    pad: tuple[float, float, float],
) -> _Mixing:
    """Say how the channels mix to 0..1, where the kernel clamps them for nothing, and what 0..1 is normalised."""
    if layout == "rgb":
        weights, offset = np.eye(3)[:: 1 if colour == "rgb" else -1], np.zeros((3, 1))
    else:
        weights, offset = (part.double().numpy() for part in from_ycbcr(matrix, full_range, colour, _HOST))
    centre, spread = np.array(mean), np.array(std)
    return _Mixing(
        weights=np.hstack((weights, offset)) / 255,
        normalise=np.stack((255 / spread, -centre / spread), axis=1),
        # In float32, so that padding equals the twin's to the last bit.
        padding=(np.array(pad, np.float32) - np.array(mean, np.float32)) / np.array(std, np.float32),
    )


def _frame(picture: Picture, letterbox: Letterbox, mixing: _Mixing) -> tuple[object, ...]:
    """Give the fields of FRAME in their order."""
    channels = _upright_channels(picture)
    heights, widths = ([channel[axis] for channel in channels[:2]] for axis in (3, 4))
    row_strides = [channel.row_stride for channel in channels]
    # The kernel reads the neighbour of each column, with whatever weight; of a single column, that is itself.
    column_strides = [channel.column_stride if channel.width > 1 else 0 for channel in channels]
    origins = [channel.origin for channel in channels]
    is_paired = picture.layout == "nv12" and origins[2] == origins[1] + 1 and not (origins[1] | row_strides[1]) & 1
    return (
        origins,
        row_strides,
        column_strides,
        heights,
        widths,
        [height / letterbox.height for height in heights],
        [width / letterbox.width for width in widths],
        letterbox.left,
        letterbox.top,
        letterbox.left + letterbox.width,
        letterbox.top + letterbox.height,
        *mixing,
        is_paired and column_strides == [1, 2, 2],
        0,
    )


def _any_shrinks(frames: np.ndarray) -> bool:
    return bool((frames["step_x"] > 1).any() or (frames["step_y"] > 1).any())


def _on_device(frames: np.ndarray, device: torch.device) -> Tensor:
    """Copy without waiting, from pinned memory, which torch does not hand out again before the copy has run."""
    host = torch.empty(frames.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host.numpy()[:] = frames.view(np.uint8)
    return host.to(device, non_blocking=True)
