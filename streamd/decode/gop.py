"""Cut a stream into groups of pictures that decode by themselves, for a decoder that keeps no state between calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streamd.errors import StreamdError
from streamd.messages import Packet

MAX_FRAMES = 500  # a camera that never begins anew must not fill the memory,
MAX_BYTES = 64 << 20  # whatever its bit rate
_START_CODE = b"\0\0\1"


class GopError(StreamdError):
    """A group of pictures cannot be decoded as a whole; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Gop:
    """The packets from one key frame to the next, in the order of decoding."""

    packets: tuple[Packet, ...]

    def in_order_of_presentation(self) -> list[Packet]:
        """Return the packets as their pictures are shown. Raises GopError where the times do not say that."""
        times = [packet.data.pts for packet in self.packets]
        if None in times or len({*times}) < len(times):
            raise GopError("its packets lack presentation times, or repeat them")
        return sorted(self.packets, key=lambda packet: packet.data.pts or 0)


class GopSplitter:
    """Gather packets until their group is whole.

    Groups begin at pictures behind which nothing refers to anything before (IDR), so that of a stream with open
    groups several come as one. Every picture of an intra codec is a group of its own.
    """

    def __init__(
        self, codec: str, extradata: bytes | None, *, max_s: float = math.inf, keyframes_only: bool = False
    ) -> None:
        """`max_s`: how long a group may take to arrive; `keyframes_only`: take these and skip the rest."""
        self._codec = codec
        self._length_size = nal_length_size(codec, extradata)
        self._max_s = max_s
        self._keyframes_only = keyframes_only
        self._open: list[Packet] = []
        self._num_bytes = 0  # of these

    def feed(self, packet: Packet) -> list[Gop]:
        """Take a packet; return the groups that are whole now, at most one."""
        if self._codec == "mjpeg":
            return [Gop((packet,))]
        begins = packet.keyframe and self._begins_anew(packet)
        if self._keyframes_only:
            return [Gop((packet,))] if begins else []
        ended = self.flush() if begins else []
        self._open.append(packet)
        self._num_bytes += packet.data.size
        return ended

    def flush(self) -> list[Gop]:
        """Return the group that was begun, at the end of a file."""
        packets = self.take_open()
        return [Gop(tuple(packets))] if packets else []

    def take_open(self) -> list[Packet]:
        """Give up the packets of the group that was begun."""
        packets, self._open, self._num_bytes = self._open, [], 0
        return packets

    @property
    def excess(self) -> str:
        """Say in which way the group that was begun is too long; empty while it is not."""
        if len(self._open) > MAX_FRAMES:
            return f"no closed GOP within {MAX_FRAMES} frames"
        if self._num_bytes > MAX_BYTES:
            return f"no closed GOP within {MAX_BYTES >> 20} MiB"
        if self._open:
            lasted_s = (self._open[-1].stamp.arrived_ns - self._open[0].stamp.arrived_ns) / 1e9
            if lasted_s > self._max_s:
                return f"a GOP takes longer than the {self._max_s:g} s of max_latency_ms"
        return ""

    def _begins_anew(self, packet: Packet) -> bool:
        if self._codec not in ("h264", "hevc"):
            return True  # key frames of VP8, VP9 and AV1 end all references
        return any(is_idr(unit, self._codec) for unit in nal_units(bytes(packet.data), self._length_size))


def nal_length_size(codec: str, extradata: bytes | None) -> int:
    """Return how many bytes give a NAL unit's length, by ISO 14496-15's configuration record; 0 for Annex B."""
    if not extradata or extradata[0] != 1:
        return 0
    position = {"h264": 4, "hevc": 21}.get(codec, len(extradata))
    return (extradata[position] & 3) + 1 if len(extradata) > position else 0


def nal_units(data: bytes, length_size: int) -> Iterator[bytes]:
    """Yield the NAL units of an access unit, without their start codes or lengths; stops at what is no such data."""
    if length_size == 0:
        for unit in data.split(_START_CODE)[1:]:
            yield unit.rstrip(b"\0")  # of the next start code, which may have four bytes
        return
    position = 0
    while position + length_size < len(data):
        start = position + length_size
        position = start + int.from_bytes(data[position:start], "big")
        yield data[start:position]


def is_idr(unit: bytes, codec: str) -> bool:
    """Tell an IDR picture's slice (H.264 table 7-1: 5; H.265 table 7-1: IDR_W_RADL 19, IDR_N_LP 20)."""
    return bool(unit) and (unit[0] & 0x1F == 5 if codec == "h264" else unit[0] >> 1 & 0x3F in (19, 20))


def parameter_sets(units: Sequence[bytes], codec: str) -> list[bytes]:
    """Select what a decoder must know first (H.264: SPS 7, PPS 8; H.265: VPS 32, SPS 33, PPS 34).

    Empty unless each kind is there.
    """
    kinds = (7, 8) if codec == "h264" else (32, 33, 34)
    found = [(_kind(unit, codec), unit) for unit in units if unit and _kind(unit, codec) in kinds]
    return [unit for _, unit in found] if {kind for kind, _ in found} == {*kinds} else []


def _kind(unit: bytes, codec: str) -> int:
    return unit[0] & 0x1F if codec == "h264" else unit[0] >> 1 & 0x3F
