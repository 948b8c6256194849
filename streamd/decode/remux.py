"""Put a group of pictures into a file of its own, in memory: what DALI decodes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

import av
import av.error

from streamd.decode.gop import Gop, GopError, is_idr, nal_length_size, nal_units, parameter_sets
from streamd.decode.software import described, first_look
from streamd.messages import Packet, Picture

_PIXEL_FORMATS = ("yuv420p", "yuvj420p", "yuv420p10le")  # what NVDEC decodes on every GPU
_TICK = Fraction(1, 25)  # of the file; the frames get their true times from their packets
_START_CODE = b"\0\0\0\1"


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A file in memory, and what its frames will be."""

    data: bytes  # MP4, or one JPEG
    packets: tuple[Packet, ...]  # one for each frame, in order of presentation
    look: Picture  # without planes: how the frames' colours and orientation are meant
    num_bytes: int  # of the decoded RGB


class Remuxer:
    """Make chunks of the groups of one connection; copies and checks, and decodes only a first key frame."""

    def __init__(self, video: av.VideoStream) -> None:
        self._video = video
        self._codec = video.codec_context.name
        self._length_size = nal_length_size(self._codec, video.codec_context.extradata)
        self._head = b""  # the parameter sets that `_look` and `_template` belong to
        self._template: av.VideoStream | None = None
        self._look: Picture | None = None

    def chunk(self, gop: Gop) -> Chunk:
        """Check a group and put it into a file. Raises GopError."""
        if self._codec == "mjpeg":
            return self._photograph(gop.packets[0])
        packets = gop.in_order_of_presentation()
        template = self._template_for(bytes(gop.packets[0].data))
        look = self._look_of(gop.packets[0])
        num_bytes = 3 * template.width * template.height * len(packets)
        return Chunk(_to_mp4(gop, packets, template), tuple(packets), look, num_bytes)

    def close(self) -> None:
        """Give up the template's file."""
        if self._template is not None and self._template is not self._video:
            self._template.container.close()
        self._template = None

    def _photograph(self, packet: Packet) -> Chunk:
        data = bytes(packet.data)
        width, height = jpeg_size(data)
        if packet.data.pts is None:
            raise GopError("its packets lack presentation times")
        return Chunk(data, (packet,), self._look_of(packet), 3 * width * height)

    def _template_for(self, keyframe: bytes) -> av.VideoStream:
        """Return a stream whose parameters a file's header can be made of. Raises GopError."""
        if self._codec not in ("h264", "hevc"):
            self._template = self._video
            return self._video
        units = list(nal_units(keyframe, self._length_size))
        if not any(is_idr(unit, self._codec) for unit in units):
            raise GopError("its first picture is no IDR picture")
        sets = parameter_sets(units, self._codec)
        if self._length_size not in (0, 4):
            raise GopError(f"its NAL units have lengths of {self._length_size} bytes, and DALI reads only 4")
        if self._length_size:  # the container's header holds the sets; others among the packets would replace them
            head = b"".join(sets)
        else:
            sets = sets or parameter_sets(list(nal_units(self._extradata, 0)), self._codec)
            head = b"".join(_START_CODE + unit for unit in sets) or self._head
            if not head:
                raise GopError("no SPS and PPS came with its first picture or before")
        if head != self._head or self._template is None:
            self.close()
            self._look, self._head = None, head
            self._template = self._video if self._length_size else _parsed(head + keyframe, self._codec)
        return self._template

    @property
    def _extradata(self) -> bytes:
        return self._video.codec_context.extradata or b""

    def _look_of(self, packet: Packet) -> Picture:
        """Decode the first picture in software, once for each set of parameters. Raises GopError."""
        if self._look is None:
            decoded = first_look(self._video, packet.data)
            if decoded is None:
                raise GopError("its first picture cannot be decoded")
            name = decoded.format.name
            if self._codec != "mjpeg" and (name not in _PIXEL_FORMATS or decoded.interlaced_frame):
                raise GopError(f"{'interlaced' if decoded.interlaced_frame else name} video is not decoded by DALI")
            self._look = described(decoded, (), "rgb")
        return self._look


def _parsed(data: bytes, codec: str) -> av.VideoStream:
    """Let FFmpeg read the parameters out of a picture in Annex B. Raises GopError."""
    try:
        container = av.open(io.BytesIO(data), format=cast(Literal["h264", "hevc"], codec))
    except (av.error.FFmpegError, OSError, ValueError) as err:
        raise GopError(f"its parameter sets cannot be read: {err}") from err
    video = container.streams.video[0]
    if not video.width or not video.height:
        container.close()
        raise GopError("its parameter sets name no picture size")
    return video


def _to_mp4(gop: Gop, shown: list[Packet], template: av.VideoStream) -> bytes:
    """Copy packets into an MP4. Raises GopError.

    Times are counted anew from zero: DALI finds frames by presentation times that must not be negative.
    """
    rank = {id(packet): index for index, packet in enumerate(shown)}
    delay = max(index - rank[id(packet)] for index, packet in enumerate(gop.packets))
    out = io.BytesIO()
    try:
        with av.open(out, "w", format="mp4") as container:
            stream = container.add_stream_from_template(template)
            stream.time_base = _TICK
            for index, packet in enumerate(gop.packets):
                copy = av.Packet(bytes(packet.data))
                copy.stream, copy.time_base = stream, _TICK
                copy.pts, copy.dts, copy.duration = rank[id(packet)] + delay, index, 1
                copy.is_keyframe = index == 0
                container.mux(copy)
    except (av.error.FFmpegError, OSError, ValueError) as err:
        raise GopError(f"it cannot be put into a file: {err}") from err
    return out.getvalue()


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a JPEG. Raises GopError where it is not whole or leaves its tables to the reader.

    Markers are from ITU-T T.81, table B.1.
    """
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-64:]:  # cameras pad behind the end
        raise GopError("the JPEG is not whole")
    size, has_tables, position = None, False, 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended and progressive frames
            height, width = (int.from_bytes(data[position + at : position + at + 2], "big") for at in (5, 7))
            size = (width, height)
        has_tables |= marker == 0xC4
        if marker == 0xDA:  # the scan begins
            break
        position += 2 + length
    if size is None or 0 in size:
        raise GopError("the JPEG names no size")
    if not has_tables:  # AVI1 allows that
        raise GopError("the JPEG has no Huffman tables")
    return size
