"""Make frames out of decoded pictures: numbered, timed, stamped, and marked where damage may show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import av

from streamd.messages import Frame, Packet, Picture, Stamp


@dataclass(slots=True)
class _Mark:
    """What a packet tells its frame, which may come later."""

    stamp: Stamp
    damaged: bool


class Framer:
    """Make the frames of one connection; the decoders that take over from one another share it.

    Frames after damage are marked corrupt until the next key frame, because they refer to the damaged one; where a
    camera refreshes its picture piece by piece, until the last piece has come.
    """

    def __init__(self, stream: str, video: av.VideoStream, first_seq: int = 0) -> None:
        self.stream = stream
        self._next_seq = first_seq
        self._time_base = float(video.time_base or 0)
        self._frame_s = 1 / float(video.average_rate or video.guessed_rate or 25)
        self._last_pts_s = -self._frame_s
        self._num_spoilt = 0.0  # packets to come that refer to damage, in order of decoding; inf: until a key frame
        self._newest: _Mark | None = None
        self._shown_damaged = False  # by pictures, in order of presentation

    def stamped(self, packet: Packet) -> av.Packet[av.VideoStream]:
        """Return FFmpeg's packet with what its frame is to know; the decoder must have `copy_opaque` set."""
        if packet.corrupt:
            self._num_spoilt = math.inf
        elif packet.keyframe:
            self._num_spoilt = min(self._num_spoilt, packet.recovers_in)
        # Not the packet itself: Python's collector does not see FFmpeg's references, so the ring would never be freed.
        self._newest = packet.data.opaque = _Mark(packet.stamp, self._num_spoilt > 0)
        self._num_spoilt = max(0.0, self._num_spoilt - 1)
        return packet.data

    def note_damage(self) -> None:
        """Mark the newest packet, whose picture may come nevertheless, and those up to the next key frame."""
        self._num_spoilt = math.inf
        if self._newest is not None:
            self._newest.damaged = True

    def frame(self, decoded: av.VideoFrame, picture: Picture, decode_ms: float) -> Frame:
        """Make a frame of what FFmpeg decoded from stamped packets."""
        mark = cast(_Mark, decoded.opaque)
        if decoded.is_corrupt or decoded.key_frame:
            self._shown_damaged = decoded.is_corrupt
        corrupt = mark.damaged or self._shown_damaged
        return self._make(picture, self._pts_s(decoded), mark.stamp, decode_ms, bool(decoded.key_frame), corrupt)

    def frame_of(self, packet: Packet, picture: Picture, decode_ms: float) -> Frame:
        """Make a frame of a picture that was decoded from this packet, which has a presentation time."""
        assert packet.data.pts is not None
        self._last_pts_s = packet.data.pts * self._time_base
        return self._make(picture, self._last_pts_s, packet.stamp, decode_ms, packet.keyframe, corrupt=False)

    def _make(
        self, picture: Picture, pts_s: float, stamp: Stamp, decode_ms: float, keyframe: bool, corrupt: bool
    ) -> Frame:
        height, width = picture.planes[0].shape[:2]
        if picture.rotation in (90, 270):
            width, height = height, width
        frame = Frame(
            stream=self.stream,
            seq=self._next_seq,
            pts_s=pts_s,
            stamp=stamp,
            decode_ms=decode_ms,
            picture=picture,
            width=width,
            height=height,
            keyframe=keyframe,
            corrupt=corrupt,
        )
        self._next_seq += 1
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
