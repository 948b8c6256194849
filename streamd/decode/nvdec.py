"""Decode on the GPU's own decoders, packet by packet, with FFmpeg's NVDEC; pictures stay on the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, cast

import av
import av.error
import torch
from av.codec.hwaccel import HWAccel
from torch.utils.dlpack import from_dlpack

from streamd.decode.frames import Framer
from streamd.decode.software import SoftwareDecoder, configure, described, first_look, picture_of
from streamd.messages import Frame, Packet, Picture

logger = logging.getLogger(__name__)

CODECS = frozenset({"h264", "hevc", "vp9"})
_MAX_FAILURES = 3  # of the decoder itself in a row, not of damaged packets
_SURFACES = ("nv12", "p010le", "p016le")  # what PyAV exports; P010 and P016 hold their top bits in the high byte

OpenContext = Callable[[av.VideoStream, torch.device], av.VideoCodecContext]


def open_context(video: av.VideoStream, device: torch.device) -> av.VideoCodecContext:
    """Open a decoder for a stream on a GPU. Raises FFmpegError, or RuntimeError where torch finds no such GPU.

    FFmpeg goes on in software by itself where the GPU has no session left or refuses the stream.
    """
    # torch's context, since memory of another one is of no use here. FFmpeg's `primary_ctx` would name it too, but
    # refuses it where it was made without FFmpeg's own flags; so it is made current, and FFmpeg told to take that.
    options: dict[str, object] = {"primary_ctx": "0", "current_ctx": "1"}
    with torch.cuda.device(device):
        torch.zeros(1, device=device)
        index = torch.cuda.current_device()
        accelerator = HWAccel("cuda", str(index), allow_software_fallback=True, options=options, is_hw_owned=True)
        context = cast(av.VideoCodecContext, av.CodecContext.create(video.codec_context.name, "r", hwaccel=accelerator))
    adopt(context, video)
    return context


def adopt(context: av.VideoCodecContext, video: av.VideoStream) -> None:
    """Tell a new decoder what the container's knows of the stream."""
    configure(context)
    context.extradata = video.codec_context.extradata
    context.reorder_depth = video.codec_context.reorder_depth  # FFmpeg found it out when it opened a file


class NvdecDecoder:
    """Decode one stream on a GPU; in software where that fails, and from then on if it fails for good.

    NVDEC conceals damage instead of reporting it: what the transport did not see is found only in headers.
    """

    def __init__(
        self,
        framer: Framer,
        video: av.VideoStream,
        device: torch.device,
        reason: str = "asked for",
        open_context: OpenContext = open_context,
    ) -> None:
        self._framer = framer
        self._video = video
        self._reason = reason
        self._refused = ""  # why the last picture came from the CPU
        self._num_failures = 0
        self._rotation: Literal[0, 90, 180, 270] | None = None
        self._context: av.VideoCodecContext | None = None
        self._software: SoftwareDecoder | None = None
        try:
            self._context = open_context(video, device)
        except (av.error.FFmpegError, OSError, RuntimeError) as err:
            self._give_up(f"NVDEC cannot be opened: {err}")

    @property
    def description(self) -> str:
        if self._software is not None:
            return self._software.description
        return f"software: {self._refused}" if self._refused else f"nvdec: {self._reason}"

    def decode(self, packet: Packet) -> Iterator[Frame]:
        if self._context is not None:
            if self._rotation is None:
                self._rotation = _container_rotation(self._video, packet)
            yield from self._frames(self._context, self._framer.stamped(packet))
        elif self._software is not None:
            yield from self._software.decode(packet)

    def flush(self) -> Iterator[Frame]:
        if self._context is not None:
            yield from self._frames(self._context, None)
        elif self._software is not None:
            yield from self._software.flush()

    def close(self) -> None:
        """Let the session go. Pictures that are still held stay whole: they lie in memory of their own."""
        self._context = None

    def _frames(self, context: av.VideoCodecContext, data: av.Packet[av.VideoStream] | None) -> Iterator[Frame]:
        started = time.perf_counter()
        try:
            decoded = context.decode(data)
        except (av.error.FFmpegError, OSError) as err:
            self._framer.note_damage()
            if not isinstance(err, av.error.InvalidDataError):
                self._num_failures += 1
                if self._num_failures >= _MAX_FAILURES:
                    self._give_up(f"NVDEC failed {self._num_failures} times in a row: {err}")
            return
        decode_ms = (time.perf_counter() - started) * 1e3 / max(1, len(decoded))
        for surface in decoded:
            self._num_failures = 0
            if reason := unusable(surface):
                self._give_up(reason)
                return
            yield self._framer.frame(surface, self._picture(surface), decode_ms)

    def _picture(self, surface: av.VideoFrame) -> Picture:
        if surface.sw_format is None:
            self._note_refusal(surface)
            picture = picture_of(surface)
        else:
            self._refused = ""
            picture = device_picture(surface)
        return replace(picture, rotation=picture.rotation or self._rotation or 0)

    def _note_refusal(self, surface: av.VideoFrame) -> None:
        codec, size = self._video.codec_context.name, f"{surface.width}x{surface.height}"
        reason = f"NVDEC has no session left, or refuses {codec} {surface.format.name} {size}"
        if reason != self._refused:
            logger.warning("%s: %s; goes on in software", self._framer.stream, reason)
        self._refused = reason

    def _give_up(self, reason: str) -> None:
        """Decode in software for the rest of the connection; it gives its first frame at the next key frame."""
        logger.warning("%s: %s; goes on in software", self._framer.stream, reason)
        self._context = None
        self._software = SoftwareDecoder(self._framer.stream, self._video, reason=reason, framer=self._framer)


def device_picture(surface: av.VideoFrame) -> Picture:
    """Share a surface's NV12 planes with torch; of 10 and 12 bits the high 8 are copied.

    The tensors keep FFmpeg's frame alive. It is no surface of the decoder, of which there are few: FFmpeg has copied
    it into a pool that grows (`nvdec_retrieve_data`), so that pictures may be held for as long as they are needed.
    The pool takes the memory back as soon as the last tensor goes: whoever reads it on a CUDA stream keeps the
    picture until that stream has done so.
    """
    planes = tuple(from_dlpack(plane.__dlpack__()) for plane in surface.planes)
    if planes[0].dtype == torch.uint16:
        planes = tuple(plane.view(torch.uint8)[..., 1::2].contiguous() for plane in planes)
    ready = None
    if planes[0].is_cuda:  # FFmpeg has queued its copy on the default stream
        ready = torch.cuda.Event()
        ready.record(torch.cuda.default_stream(planes[0].device))
    return described(surface, planes, "nv12", ready=ready)


def unusable(surface: av.VideoFrame) -> str:
    """Say why a surface cannot be shared with torch; empty where it can."""
    if surface.sw_format is None:
        return ""
    if surface.sw_format.name not in _SURFACES:
        return f"PyAV does not share surfaces in {surface.sw_format.name}"
    if surface.width % 2 or surface.height % 2:
        return f"PyAV shares the chroma of {surface.width}x{surface.height} without its last row or column"
    return ""


def _container_rotation(video: av.VideoStream, packet: Packet) -> Literal[0, 90, 180, 270]:
    """Return what a file says about its pictures' orientation, which only its own decoder is told."""
    if video.container.format.name == "rtsp":  # has no such header
        return 0
    decoded = first_look(video, packet.data)
    return 0 if decoded is None else described(decoded, (), "nv12").rotation
