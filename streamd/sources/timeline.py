"""When a picture was taken, and which presentation times may be compared."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamd.messages import Stamp

if TYPE_CHECKING:
    import av

_JUMP_BACK_S = 1.0
_JUMP_AHEAD_S = 10.0
_SENDER_REFRESH_S = 0.5
_SAME_REPORT_S = 0.5  # two reports between which a camera jumped are further apart
_EARLIEST_SENDER_TIME = 946_684_800.0  # 2000-01-01: a camera whose clock was never set says 1970


@dataclass(slots=True)
class Timeline:
    """Stamp the packets of one stream over all of its connections.

    An epoch ends where presentation times stop being comparable: at a reconnect, or when the camera's clock
    jumps (back by more than a second, or ahead by ten seconds more than really passed).
    """

    epoch: int = -1
    _last_pts_s: float | None = None
    _last_arrived_ns: int = 0
    _last_ahead_s: float | None = None  # the sender's clock, ahead of this machine's
    _stale: float | None = None  # the sender's Unix time of presentation time 0, by a report from before a jump

    def connect(self) -> None:
        """Begin a new epoch."""
        self._begin_epoch()
        self._last_ahead_s = self._stale = None

    def stamp(self, pts_s: float | None, arrived_ns: int, arrived_at: float, sender_at: float | None) -> Stamp:
        """Say when the packet's picture was taken; `arrived_at` and `sender_at` are Unix seconds."""
        by_arrival = Stamp(self.epoch, arrived_ns, arrived_at, arrived_at, "arrival")
        if pts_s is None:  # the first packet after connecting, which may carry the next one's sender time
            return by_arrival
        if self._last_pts_s is not None and self._jumped(pts_s, arrived_ns):
            self._begin_epoch()
            self._doubt(pts_s, arrived_at, sender_at)
            by_arrival = replace(by_arrival, epoch=self.epoch)
        self._last_pts_s, self._last_arrived_ns = pts_s, arrived_ns
        if sender_at is None:
            return by_arrival
        if sender_at < _EARLIEST_SENDER_TIME:
            return replace(by_arrival, unset_at=sender_at)
        if self._stale is not None and abs(sender_at - pts_s - self._stale) < _SAME_REPORT_S:
            return by_arrival
        self._stale, self._last_ahead_s = None, sender_at - arrived_at
        return replace(by_arrival, captured_at=sender_at, clock="sender")

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self._last_pts_s = None

    def _jumped(self, pts_s: float, arrived_ns: int) -> bool:
        assert self._last_pts_s is not None
        step_s = pts_s - self._last_pts_s
        passed_s = (arrived_ns - self._last_arrived_ns) / 1e9
        return step_s < -_JUMP_BACK_S or step_s > passed_s + _JUMP_AHEAD_S

    def _doubt(self, pts_s: float, arrived_at: float, sender_at: float | None) -> None:
        """Believe no sender time after a jump before a new report, unless the jump brought it nearer to our clock.

        What FFmpeg says until then is the last report carried over the jump. That is right where the camera's clock
        was set and its presentation times follow it, and hours off where they began anew.
        """
        if sender_at is None or self._last_ahead_s is None:
            return
        if abs(sender_at - arrived_at) > abs(self._last_ahead_s) + _SAME_REPORT_S:
            self._stale = sender_at - pts_s


class SenderClock:
    """Say when the camera took a picture, by its RTCP sender reports.

    FFmpeg gives each packet the time that it derived from the last report. Reading that costs more than the rest of a
    packet's way, and is needed only as often as reports come: in between, presentation times run at the same rate.
    """

    def __init__(self) -> None:
        self._read_at_s: float | None = None  # the presentation time when the offset was read
        self._offset_s = 0.0  # Unix time of presentation time 0

    def time_of(self, packet: av.Packet[av.VideoStream], pts_s: float | None) -> float | None:
        """Return the Unix time in seconds; None before the first report."""
        if pts_s is None:
            return None
        if self._read_at_s is None or not 0 <= pts_s - self._read_at_s < _SENDER_REFRESH_S:
            sender_at = _producer_reference_time(packet)
            if sender_at is None:
                self._read_at_s = None
                return None
            self._read_at_s, self._offset_s = pts_s, sender_at - pts_s
        return pts_s + self._offset_s


def _producer_reference_time(packet: av.Packet[av.VideoStream]) -> float | None:
    """Read libavutil's AVProducerReferenceTime: int64 wall clock in microseconds, int flags."""
    if not packet.has_sidedata("prft"):
        return None
    (wallclock_us,) = struct.unpack_from("<q", bytes(packet.get_sidedata("prft")))
    return float(wallclock_us / 1e6)
