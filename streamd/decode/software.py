"""Decode on the CPU with FFmpeg's own decoders."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, cast

import av
import av.error
import numpy as np
import torch

from streamd.messages import Frame, Packet, Picture, Stamp

_PLANAR_YUV = frozenset(
    f"yuv{full}{chroma}p" for full in ("", "j") for chroma in ("410", "411", "420", "422", "440", "444")
)
_HD_HEIGHT = 720  # without a matrix in the stream, HD is BT.709 and SD BT.601 (ITU-R BT.709, BT.601)


class SoftwareDecoder:
    """Decode one stream; pictures stay in FFmpeg's buffers and nothing is converted here.

    One thread and no frame delay: FRAME threading adds latency, and dropping an undrained context deadlocked.
    Frames after damage are marked corrupt until the next key frame, because they refer to the damaged one.
    """

    def __init__(self, stream: str, video: av.VideoStream, first_seq: int = 0) -> None:
        self._stream = stream
        self._context = video.codec_context
        self._context.thread_type = "SLICE"
        self._context.thread_count = 1
        self._context.copy_opaque = True  # a frame carries its packet's stamp through reordering
        self._context.options = {"err_detect": "explode"}  # report damage instead of painting over it
        self._time_base = float(video.time_base or 0)
        self._frame_s = 1 / float(video.average_rate or video.guessed_rate or 25)
        self._last_pts_s = -self._frame_s
        self._seq = first_seq
        self._damaged = False

    def decode(self, packet: Packet) -> Iterator[Frame]:
        if packet.keyframe:
            self._damaged = packet.corrupt
        elif packet.corrupt:
            self._damaged = True
        # Not the packet itself: Python's collector does not see FFmpeg's references, so the ring would never be freed.
        packet.data.opaque = (packet.stamp, self._damaged)
        return self._frames(packet.data)

    def flush(self) -> Iterator[Frame]:
        return self._frames(None)

    def close(self) -> None:
        """Nothing to do: the context belongs to the source's container."""

    def _frames(self, data: av.Packet[av.VideoStream] | None) -> Iterator[Frame]:
        started = time.perf_counter()
        try:
            decoded = self._context.decode(data)
        except (av.error.FFmpegError, OSError):
            # A damaged packet. Which exception it is differs by codec; the consequence does not.
            self._damaged = True
            return
        decode_ms = (time.perf_counter() - started) * 1e3 / max(1, len(decoded))
        for picture in decoded:
            yield self._frame(picture, decode_ms)

    def _frame(self, decoded: av.VideoFrame, decode_ms: float) -> Frame:
        stamp, damaged = cast(tuple[Stamp, bool], decoded.opaque)
        picture = picture_of(decoded)
        height, width = picture.planes[0].shape[:2]
        if picture.rotation in (90, 270):
            width, height = height, width
        frame = Frame(
            stream=self._stream,
            seq=self._seq,
            pts_s=self._pts_s(decoded),
            stamp=stamp,
            decode_ms=decode_ms,
            picture=picture,
            width=width,
            height=height,
            keyframe=bool(decoded.key_frame),
            corrupt=damaged or decoded.is_corrupt,
        )
        self._seq += 1
        return frame

    def _pts_s(self, decoded: av.VideoFrame) -> float:
        """Return the presentation time; a stream without any, such as a bare H.264 file, plays at its frame rate."""
        if decoded.pts is None:
            self._last_pts_s += self._frame_s
            return self._last_pts_s
        pts_s = decoded.pts * self._time_base
        if pts_s <= self._last_pts_s and decoded.dts is not None and decoded.dts * self._time_base > self._last_pts_s:
            pts_s = decoded.dts * self._time_base  # AVI stores no presentation times, and FFmpeg guesses badly
        self._last_pts_s = pts_s
        return pts_s


def picture_of(decoded: av.VideoFrame) -> Picture:
    """Wrap FFmpeg's buffers without a copy; rare pixel formats are converted to 8-bit RGB."""
    name = decoded.format.name
    layout: Literal["yuv", "nv12", "rgb"]
    if name in _PLANAR_YUV:
        layout = "yuv"
    elif name == "nv12":
        layout = "nv12"
    else:
        layout = "rgb"
        if name != "rgb24":
            decoded = decoded.reformat(format="rgb24")
    channels = {"yuv": (1, 1, 1), "nv12": (1, 2), "rgb": (3,)}[layout]
    return Picture(
        planes=tuple(_plane(plane, n) for plane, n in zip(decoded.planes, channels, strict=True)),
        layout=layout,
        matrix=_matrix(decoded),
        full_range=name.startswith("yuvj") or decoded.color_range == 2,  # AVCOL_RANGE_JPEG
        rotation=cast(Literal[0, 90, 180, 270], round(decoded.rotation / 90) * 90 % 360),
    )


def _plane(plane: av.video.plane.VideoPlane, num_channels: int) -> torch.Tensor:
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
    pixels = rows[:, : plane.width * num_channels]
    if num_channels > 1:
        pixels = pixels.reshape(plane.height, plane.width, num_channels)
    return torch.from_numpy(pixels)


def _matrix(decoded: av.VideoFrame) -> Literal["bt601", "bt709"]:
    colourspace = int(decoded.colorspace)  # AVColorSpace
    if colourspace == 1:
        return "bt709"
    if colourspace in (4, 5, 6):  # FCC, BT.470BG, SMPTE 170M
        return "bt601"
    return "bt709" if decoded.height >= _HD_HEIGHT else "bt601"
