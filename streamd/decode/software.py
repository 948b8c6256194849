"""Decode on the CPU with FFmpeg's own decoders."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from typing import Literal, cast

import av
import av.error
import numpy as np
import torch

from streamd.decode.frames import Framer
from streamd.errors import SourceError
from streamd.messages import Frame, Packet, Picture

_PLANAR_YUV = frozenset(
    f"yuv{full}{chroma}p" for full in ("", "j") for chroma in ("410", "411", "420", "422", "440", "444")
)
_DEEP = re.compile(r"(yuv4\d\dp|p0)(?:9|1[0246])(?:le|be)")  # the same planes in 9 to 16 bits
_MAX_REFUSED = 3  # key frames in a row
_HD_HEIGHT = 720  # without a matrix in the stream, HD is BT.709 and SD BT.601 (ITU-R BT.709, BT.601)
_MAX_PIXELS = 1 << 26  # of a picture: 8192 x 8192; a decoder keeps up to 17 of them

Layout = Literal["yuv", "nv12", "rgb"]


class SoftwareDecoder:
    """Decode one stream; pictures stay in FFmpeg's buffers and nothing is converted here."""

    def __init__(
        self,
        stream: str,
        video: av.VideoStream,
        first_seq: int = 0,
        *,
        reason: str = "asked for",
        framer: Framer | None = None,
    ) -> None:
        """Decode with the context of the stream's container; `framer` is that of a decoder that failed."""
        self.description = f"software: {reason}"
        self._framer = framer or Framer(stream, video, first_seq)
        self._context = video.codec_context
        self._num_refused = 0.0  # key frames; no longer counted once there was a picture
        configure(self._context)

    def decode(self, packet: Packet) -> Iterator[Frame]:
        """Decode as `Decoder` says. Raises SourceError where no key frame can be decoded from the begin on."""
        return self._frames(packet)

    def flush(self) -> Iterator[Frame]:
        return self._frames(None)

    def reset(self) -> None:
        """Forget all that was decoded, so that after a flush a new key frame can come."""
        self._context.flush_buffers()

    def close(self) -> None:
        """Nothing to do: the context belongs to the source's container."""

    def _frames(self, packet: Packet | None) -> Iterator[Frame]:
        data = None if packet is None else self._framer.stamped(packet)
        started = time.perf_counter()
        try:
            decoded = self._context.decode(data)
        except (av.error.FFmpegError, OSError):
            # A damaged packet. Which exception it is differs by codec; the consequence does not.
            self._framer.note_damage()
            if packet is not None and packet.keyframe and not packet.corrupt:
                self._note_refusal()
            return
        decode_ms = (time.perf_counter() - started) * 1e3 / max(1, len(decoded))
        for picture in decoded:
            self._num_refused = -math.inf
            yield self._framer.frame(picture, picture_of(picture), decode_ms)

    def _note_refusal(self) -> None:
        self._num_refused += 1
        if self._num_refused >= _MAX_REFUSED:
            what = f"none of {_MAX_REFUSED} key frames can be decoded"
            advice = "is the stream encrypted, or of a kind that FFmpeg does not know?"
            raise SourceError(f"{what}: {advice}", "unsupported", permanent=True)


def configure(context: av.VideoCodecContext) -> None:
    """Set a decoder up for live video, unless it has begun.

    One thread and no frame delay: FRAME threading adds latency, and dropping an undrained context deadlocked.
    """
    if context.is_open:
        return
    context.thread_type = "SLICE"
    context.thread_count = 1
    context.copy_opaque = True  # a frame carries its packet's stamp through reordering
    context.options = {
        # Report damage instead of painting over it, also what only the hash that a camera sends of a picture shows.
        "err_detect": "explode+crccheck",
        "max_pixels": str(_MAX_PIXELS),
    }


def first_look(video: av.VideoStream, keyframe: av.Packet[av.VideoStream]) -> av.VideoFrame | None:
    """Decode a key frame, to learn what only a decoded frame says; None where it cannot be decoded.

    The container's decoder is afterwards as good as new.
    """
    context = video.codec_context
    configure(context)
    try:
        decoded = [*context.decode(keyframe), *context.decode(None)]
    except (av.error.FFmpegError, OSError):
        return None
    finally:
        context.flush_buffers()
    return decoded[0] if decoded else None


def picture_of(decoded: av.VideoFrame) -> Picture:
    """Wrap FFmpeg's buffers without a copy; of deep colours 8 bits are kept, rare formats become RGB.

    Raises SourceError for formats that FFmpeg itself cannot convert.
    """
    name = _as_8_bit(decoded.format.name)
    layout: Layout = "yuv" if name in _PLANAR_YUV else "nv12" if name == "nv12" else "rgb"
    wanted = "rgb24" if layout == "rgb" else name
    converted = decoded
    if wanted != decoded.format.name:
        # Without a matrix in the stream, FFmpeg would take BT.601 at any size.
        by_matrix = {"bt601": "ITU601", "bt709": "ITU709"}[_matrix(decoded)] if layout == "rgb" else None
        converted = _reformat(decoded, wanted, by_matrix)
    channels = {"yuv": (1, 1, 1), "nv12": (1, 2), "rgb": (3,)}[layout]
    planes = tuple(_plane(plane, n) for plane, n in zip(converted.planes, channels, strict=True))
    return described(decoded, planes, layout)


def _reformat(decoded: av.VideoFrame, wanted: str, matrix: str | None) -> av.VideoFrame:
    name = decoded.format.name
    refused = SourceError(f"FFmpeg does not convert pictures of the format {name}", "unsupported", permanent=True)
    if name.startswith("yaf32"):  # at which its converter ends the process (seen with FFmpeg 8)
        raise refused
    try:
        return decoded.reformat(format=wanted, src_colorspace=matrix)
    except (av.error.FFmpegError, OSError, ValueError) as err:
        raise refused from err


def _as_8_bit(pixel_format: str) -> str:
    deep = _DEEP.fullmatch(pixel_format)
    if deep is None:
        return pixel_format
    return "nv12" if deep[1] == "p0" else deep[1]


def described(
    decoded: av.VideoFrame, planes: tuple[torch.Tensor, ...], layout: Layout, *, ready: torch.cuda.Event | None = None
) -> Picture:
    """Make a picture of a frame's planes and of what the frame says about its colours and its orientation."""
    return Picture(
        planes=planes,
        layout=layout,
        matrix=_matrix(decoded),
        full_range=decoded.format.name.startswith("yuvj") or decoded.color_range == 2,  # AVCOL_RANGE_JPEG
        rotation=cast(Literal[0, 90, 180, 270], round(decoded.rotation / 90) * 90 % 360),
        ready=ready,
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
