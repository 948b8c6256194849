"""Read a clip's coded pictures and cut them into RTP packets: H.264 (RFC 6184), H.265 (RFC 7798), JPEG (RFC 2435).

A clip is cut once. What differs between its viewers (channel, sequence number, time stamp, source) is written into a
copy, so that a hundred viewers cost little more than the copies.
"""

from __future__ import annotations

import functools
import struct
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal, cast

import av
from av.bitstream import BitStreamFilterContext
from av.video.stream import VideoStream

MAX_PAYLOAD_BYTES = 1400  # of one RTP packet
CLOCK_HZ = 90_000
_HEADER_BYTES = 16  # "$", channel, length; then RTP's own twelve bytes
_PAYLOAD_TYPES = {"h264": 96, "hevc": 96, "mjpeg": 26}

Codec = Literal["h264", "hevc", "mjpeg"]


@dataclass(frozen=True, slots=True, eq=False)
class Packets:
    """One picture as interleaved RTP packets (RFC 2326, 10.12), one after the other, with the viewer's part blank."""

    wire: bytes
    starts: tuple[int, ...]  # where in `wire` each packet begins, and where the last one ends
    num_payload_bytes: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def addressed(self, channel: int, sequence: int, timestamp: int, source: int) -> bytearray:
        """Fill in a viewer's part; as it goes through TCP."""
        wire = bytearray(self.wire)
        for start in self.starts[:-1]:
            wire[start + 1] = channel
            struct.pack_into(">HII", wire, start + 6, sequence, timestamp, source)
            sequence = (sequence + 1) & 0xFFFF
        return wire

    def split(self, addressed: bytearray) -> list[bytes]:
        """Take the packets apart; as they go through UDP, without the four bytes that TCP needs."""
        return [bytes(addressed[begin + 4 : end]) for begin, end in pairwise(self.starts)]


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One coded picture of a clip; times in seconds from the first one's."""

    nals: tuple[bytes, ...]  # NAL units without start codes; of MJPEG the JPEG file
    pts_s: float
    due_s: float  # when a camera that took it at `pts_s` would send it: later, where B-frames wait for others
    keyframe: bool
    packets: Packets


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """All pictures of a file, in decoding order."""

    codec: Codec
    width: int  # pixels
    height: int
    parameter_sets: tuple[bytes, ...]  # of its beginning
    units: tuple[Unit, ...]
    length_s: float

    @property
    def fps(self) -> float:
        return len(self.units) / self.length_s

    @property
    def payload_type(self) -> int:
        return _PAYLOAD_TYPES[self.codec]


def read_clip(path: Path) -> Clip:
    """Read and cut a file, once for each version of it."""
    return _read_clip(path, path.stat().st_mtime_ns)


@functools.cache
def _read_clip(path: Path, _version: int) -> Clip:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = cast(Codec, stream.codec_context.name)
        assert codec in ("h264", "hevc", "mjpeg"), f"{path}: {codec} has no packetiser here"
        width, height = stream.codec_context.width, stream.codec_context.height
        tick_s = float(stream.time_base or 0)
        coded = list(_coded(container, stream, codec))
    parameter_sets = tuple(nal for nal in coded[0][0] if is_parameter_set(codec, nal))
    dts = [dts if dts is not None else index for index, (_, dts, _, _) in enumerate(coded)]
    pts = [pts if pts is not None else dts[index] for index, (_, _, pts, _) in enumerate(coded)]
    waits_s = max(p - pts[0] - (d - dts[0]) for p, d in zip(pts, dts, strict=True)) * tick_s
    units = tuple(
        Unit(
            nals=nals,
            pts_s=(pts[index] - pts[0]) * tick_s,
            due_s=(dts[index] - dts[0]) * tick_s + waits_s,
            keyframe=keyframe,
            packets=packets_of(codec, nals),
        )
        for index, (nals, _, _, keyframe) in enumerate(coded)
    )
    steps = [later - earlier for earlier, later in pairwise(dts)] or [1]
    return Clip(codec, width, height, parameter_sets, units, (dts[-1] - dts[0] + median(steps)) * tick_s)


Coded = tuple[tuple[bytes, ...], int | None, int | None, bool]  # NAL units, dts, pts, key frame


def _coded(container: av.container.InputContainer, stream: VideoStream, codec: Codec) -> Iterator[Coded]:
    """Yield the pictures; parameter sets stand before each key frame, as most cameras send them."""
    if codec == "mjpeg":
        for packet in container.demux(stream):
            if packet.size:
                yield (bytes(packet),), packet.dts, packet.pts, True
        return
    annex_b = BitStreamFilterContext(f"{codec}_mp4toannexb", stream)
    for packet in container.demux(stream):
        if packet.size:
            for filtered in annex_b.filter(packet):
                yield split_nals(bytes(filtered)), filtered.dts, filtered.pts, filtered.is_keyframe


def split_nals(annex_b: bytes) -> tuple[bytes, ...]:
    """Take NAL units out of a byte stream with start codes (H.264 annex B)."""
    return tuple(nal for part in annex_b.split(b"\0\0\1") if (nal := part.rstrip(b"\0")))


def is_parameter_set(codec: Codec, nal: bytes) -> bool:
    if codec == "mjpeg":
        return False
    return nal[0] & 0x1F in (7, 8) if codec == "h264" else nal[0] >> 1 & 0x3F in (32, 33, 34)


def is_slice(codec: Codec, nal: bytes) -> bool:
    if codec == "mjpeg":
        return True
    return nal[0] & 0x1F in (1, 5) if codec == "h264" else nal[0] >> 1 & 0x3F < 32


def packets_of(codec: Codec, nals: Sequence[bytes]) -> Packets:
    """Cut one picture."""
    payloads: list[bytes] = []
    for nal in nals:
        payloads += _jpeg_payloads(nal) if codec == "mjpeg" else _nal_payloads(codec, nal)
    wire, starts = bytearray(), [0]
    for index, payload in enumerate(payloads, start=1):
        marker = 0x80 if index == len(payloads) else 0  # the picture's last packet
        wire += struct.pack(">BBH", 0x24, 0, 12 + len(payload))
        wire += struct.pack(">BBHII", 0x80, marker | _PAYLOAD_TYPES[codec], 0, 0, 0) + payload
        starts.append(len(wire))
    return Packets(bytes(wire), tuple(starts), len(wire) - _HEADER_BYTES * len(payloads))


def _nal_payloads(codec: Codec, nal: bytes) -> list[bytes]:
    """Send a small NAL unit as it is, a large one in fragments (FU-A of H.264, FU of H.265)."""
    if len(nal) <= MAX_PAYLOAD_BYTES:
        return [nal]
    if codec == "h264":
        indicator, kind, body = bytes([nal[0] & 0xE0 | 28]), nal[0] & 0x1F, nal[1:]
    else:
        indicator, kind, body = bytes([nal[0] & 0x81 | 49 << 1, nal[1]]), nal[0] >> 1 & 0x3F, nal[2:]
    step = MAX_PAYLOAD_BYTES - len(indicator) - 1
    fragments = [body[begin : begin + step] for begin in range(0, len(body), step)]
    last = len(fragments) - 1
    return [
        indicator + bytes([kind | (0x80 if index == 0 else 0) | (0x40 if index == last else 0)]) + fragment
        for index, fragment in enumerate(fragments)
    ]


def _jpeg_payloads(jpeg: bytes) -> list[bytes]:
    """Cut a baseline JPEG with the usual Huffman tables; its quantisation tables go along (Q = 255)."""
    parts = _jpeg_parts(jpeg)
    kind, restart = parts.kind, b""
    if parts.restart_interval:
        kind, restart = kind + 64, struct.pack(">HH", parts.restart_interval, 0xFFFF)
    tables = b"\0\0" + struct.pack(">H", len(parts.tables)) + parts.tables
    payloads, offset = [], 0
    while offset < len(parts.scan):
        head = struct.pack(">I", offset) + bytes([kind, 255, *parts.size]) + restart + (b"" if offset else tables)
        data = parts.scan[offset : offset + MAX_PAYLOAD_BYTES - len(head)]
        payloads.append(head + data)
        offset += len(data)
    return payloads


@dataclass(frozen=True, slots=True, eq=False)
class _JpegParts:
    """What RFC 2435 sends of a JPEG."""

    tables: bytes  # of quantisation
    kind: int  # 0: 4:2:2, 1: 4:2:0
    size: tuple[int, int]  # blocks of 8 pixels
    restart_interval: int  # MCUs; 0: there are no restart markers
    scan: bytes


def _jpeg_parts(jpeg: bytes) -> _JpegParts:
    tables, kind, size, restart_interval, position = b"", 0, (0, 0), 0, 2
    marker = 0
    while marker != 0xDA:
        marker, length = jpeg[position + 1], int.from_bytes(jpeg[position + 2 : position + 4], "big")
        body = jpeg[position + 4 : position + 2 + length]
        if marker == 0xDB:
            tables += b"".join(body[begin + 1 : begin + 65] for begin in range(0, len(body), 65))
        elif marker == 0xC0:
            height, width = struct.unpack_from(">HH", body, 1)
            size = (-(-width // 8), -(-height // 8))
            kind = 1 if body[7] == 0x22 else 0  # luma sampled 2x2, or 2x1
        elif marker == 0xDD:
            (restart_interval,) = struct.unpack(">H", body)
        position += 2 + length
    assert max(size) <= 255, "RFC 2435 carries at most 2040 pixels a side"
    return _JpegParts(tables, kind, size, restart_interval, jpeg[position:].removesuffix(b"\xff\xd9"))


def media_lines(clip: Clip, *, with_parameter_sets: bool = True) -> list[str]:
    """Describe a clip in the lines of SDP (RFC 4566) that belong to its `m=`."""
    sets = [b64encode(nal).decode() for nal in clip.parameter_sets] if with_parameter_sets else []
    if clip.codec == "mjpeg":
        return ["a=rtpmap:26 JPEG/90000"]
    if clip.codec == "h264":
        names, parameters = "H264", ["packetization-mode=1"]
        if sets:
            parameters.append(f"profile-level-id={clip.parameter_sets[0][1:4].hex()}")
            parameters.append(f"sprop-parameter-sets={','.join(sets)}")
    else:
        names, parameters = "H265", []
        keys = {32: "sprop-vps", 33: "sprop-sps", 34: "sprop-pps"}
        for nal, text in zip(clip.parameter_sets, sets, strict=False):
            parameters.append(f"{keys[nal[0] >> 1 & 0x3F]}={text}")
    fmtp = [f"a=fmtp:96 {';'.join(parameters)}"] if parameters else []
    return [f"a=rtpmap:96 {names}/90000", *fmtp]
