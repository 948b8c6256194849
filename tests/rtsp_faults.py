"""What a camera of `tests.rtsp_server` does, and does wrong: one frozen `Camera` says all of it.

A default everywhere is a camera that behaves well. Numbers of pictures count from a client's PLAY.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Literal

from tests.rtp_packets import (
    CLOCK_HZ,
    Clip,
    Codec,
    Packets,
    Unit,
    is_parameter_set,
    is_slice,
    packets_of,
    read_clip,
)

End = Literal["fin", "rst", "bye", "half_open"]
TrackKind = Literal["audio", "metadata"]


@dataclass(frozen=True, slots=True)
class Login:
    """Who may watch."""

    user: str
    password: str = field(repr=False)
    scheme: Literal["digest", "basic"] = "digest"
    nonce_lasts: int | None = None  # requests that one digest nonce is good for; then 401 with stale=true


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """How RTSP requests are answered. The keys are methods (OPTIONS, DESCRIBE, SETUP, PLAY, ...); "*" is any."""

    status: Mapping[str, int] = field(default_factory=dict)  # refuse with this code
    raw: Mapping[str, bytes] = field(default_factory=dict)  # send these bytes instead; {CSEQ} is replaced
    silent: frozenset[str] = frozenset()  # never answer
    redirect: str = ""  # DESCRIBE is answered with 302 and this address
    redirect_status: int = 302
    sdp: Callable[[bytes], bytes] | None = None  # makes the description that is sent out of the right one
    tracks: tuple[TrackKind, ...] = ()  # described, and sent if they are set up, beside the video
    session_timeout_s: float = 60.0  # without a request for so long, a client that plays is dropped
    announce_timeout: bool = True  # name it in the Session header, in whole seconds
    udp_refused: bool = False  # 461 to a SETUP by UDP
    rtp_info: bool = True  # PLAY's answer names the first sequence number and time stamp
    bytes_per_s: float | None = None  # answers trickle


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """What becomes of the packets, and of the connection."""

    stop_after: int | None = None  # pictures; then no RTP and no RTCP comes, and the connection stays. 0: never any
    end_after: int | None = None  # pictures; then the connection ends as `end` says
    end: End = "fin"  # "bye": RTCP BYE, then FIN. "half_open": silence; what the client then sends is answered by RST
    bytes_per_s: float | None = None  # TCP: a trickle
    udp_blocked: bool = False  # SETUP and PLAY succeed, but no packet arrives
    loss: float = 0.0  # share of the packets; with TCP too, as if the camera's own buffer ran over
    reorder: float = 0.0  # UDP: share of the packets that come after the next one
    duplicate: float = 0.0  # UDP: share of the packets that come twice
    jitter_s: float = 0.0  # UDP: most seconds that a packet is late; the order stays
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Bitstream:
    """What is wrong with the pictures."""

    start_at: int = 0  # picture of the clip that comes first
    no_keyframe_s: float = 0.0  # key frames are left out for so long
    parameter_sets: Literal["both", "sdp", "band"] = "both"  # where they are to be found
    corrupt_every: int = 0  # every n-th picture has a few wrong bytes
    truncate_every: int = 0  # every n-th picture lacks the second half of its last slice
    seed: int = 0
    sei_per_picture: int = 0  # H.264 and H.265: so many SEI units before each picture ...
    sei_bytes: int = 1000  # ... of so many bytes each
    then: Path | None = None  # another clip of the same codec goes on in mid-stream ...
    then_after: int = 0  # ... after so many pictures
    then_with_keyframe: bool = True  # False: its parameter sets come, but no key frame before its second GOP
    speed: float = 1.0  # pictures come so many times faster than the clip says, time stamps too
    claimed_fps: float | None = None  # what the SDP says; None: the truth
    irregular: float = 0.0  # 0..0.9: how much the intervals between pictures differ


@dataclass(frozen=True, slots=True, eq=False)
class RtpClock:
    """What the time stamps say."""

    first_timestamp: int | None = None  # 2**32 - 90_000 wraps after a second; None is random
    jumps: tuple[tuple[int, float], ...] = ()  # (picture, seconds): from then on time stamps are so much later
    restart_at: int | None = None  # the picture whose time stamp is 0 again
    duplicate_every: int = 0  # every n-th picture repeats the time stamp of the one before
    backward_every: int = 0  # every n-th picture is stamped half a second early
    reports: bool = True  # RTCP sender reports
    first_report_s: float = 0.0  # when the first one comes
    report_interval_s: float = 5.0
    wall_clock_at: float | None = None  # Unix seconds that the camera believes it is at PLAY; 0.0 is 1970


@dataclass(frozen=True, slots=True, eq=False)
class Camera:
    """One mount, H.264, H.265 or MJPEG as the clip is."""

    clip: Path
    login: Login | None = None
    answers: Answers = Answers()
    delivery: Delivery = Delivery()
    bitstream: Bitstream = Bitstream()
    clock: RtpClock = RtpClock()


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """What goes out next."""

    index: int  # in the clip
    due_s: float  # after PLAY
    pts_s: float  # capture time after PLAY
    packets: Packets


def pictures(clip: Clip, faults: Bitstream) -> Iterator[Picture]:
    """Yield a camera's pictures without end, damaged as told."""
    rng = random.Random(faults.seed)
    for number, (index, unit, at_s) in enumerate(_in_time(clip, faults)):
        if unit.keyframe and unit.due_s + at_s < faults.no_keyframe_s:
            continue
        packets = unit.packets
        nals = _faulty(clip, unit, number, faults, rng)
        if nals is not unit.nals:
            if not nals:
                continue
            packets = packets_of(clip.codec, nals)
        late_s = rng.uniform(0, faults.irregular) / clip.fps if faults.irregular else 0.0
        due_s, pts_s = unit.due_s + at_s + late_s, unit.pts_s + at_s + late_s
        yield Picture(index, due_s / faults.speed, pts_s / faults.speed, packets)


def _in_time(clip: Clip, faults: Bitstream) -> Iterator[tuple[int, Unit, float]]:
    """Yield index, unit and the seconds to add to its times: the clip over and over, or another from some point on."""
    start_s = -clip.units[faults.start_at].due_s
    for num_sent, index in enumerate(_indices(clip, faults.start_at)):
        if index == 0 and num_sent:
            start_s += clip.length_s
        if faults.then and num_sent == faults.then_after:
            break
        yield index, clip.units[index], start_s
    assert faults.then is not None
    other = read_clip(faults.then)
    assert other.codec == clip.codec, "the codec changes only with a new connection"
    start_s += clip.units[index].due_s
    for number, index in enumerate(_indices(other, 0)):
        if index == 0 and number:
            start_s += other.length_s
        unit = other.units[index]
        if unit.keyframe and number == 0 and not faults.then_with_keyframe:
            sets = other.parameter_sets
            unit = replace(unit, nals=sets, packets=packets_of(other.codec, sets), keyframe=False)
        yield index, unit, start_s


def _indices(clip: Clip, first: int) -> Iterator[int]:
    return (number % len(clip.units) for number in count(first))


def _faulty(clip: Clip, unit: Unit, number: int, faults: Bitstream, rng: random.Random) -> tuple[bytes, ...]:
    """Return the unit's own NAL units, the very same object, where nothing is wrong with it."""
    nals = unit.nals
    if faults.parameter_sets == "sdp" and any(is_parameter_set(clip.codec, nal) for nal in nals):
        nals = tuple(nal for nal in nals if not is_parameter_set(clip.codec, nal))
    if faults.corrupt_every and number % faults.corrupt_every == faults.corrupt_every - 1:
        nals = tuple(_corrupted(nal, rng) if is_slice(clip.codec, nal) else nal for nal in nals)
    if faults.truncate_every and number % faults.truncate_every == faults.truncate_every - 1:
        nals = (*nals[:-1], nals[-1][: max(8, len(nals[-1]) // 2)])
    if faults.sei_per_picture and clip.codec != "mjpeg":
        nals = (*(_sei(clip.codec, faults.sei_bytes, rng) for _ in range(faults.sei_per_picture)), *nals)
    return nals


def _corrupted(nal: bytes, rng: random.Random) -> bytes:
    """Change some bytes behind the slice's header."""
    damaged = bytearray(nal)
    for _ in range(1 + len(nal) // 500):
        damaged[rng.randrange(len(nal) // 3, len(nal))] ^= rng.randrange(1, 256)
    return bytes(damaged)


def _sei(codec: Codec, num_bytes: int, rng: random.Random) -> bytes:
    """Make a supplemental message of user data that nobody knows."""
    head = b"\x06\x05" if codec == "h264" else bytes([39 << 1, 1, 5])
    size = b"\xff" * (num_bytes // 255) + bytes([num_bytes % 255])
    return head + size + bytes(rng.randrange(1, 256) for _ in range(16)) + b"\x55" * (num_bytes - 16) + b"\x80"


class Stamps:
    """Give each picture of one client its RTP time stamp."""

    def __init__(self, rng: random.Random) -> None:
        self._random_first = rng.randrange(1 << 31)
        self._last = self._random_first
        self._restarted_s: float | None = None

    def first(self, faults: RtpClock) -> int:
        return self._random_first if faults.first_timestamp is None else faults.first_timestamp

    def stamp(self, number: int, pts_s: float, faults: RtpClock) -> int:
        """Return the time stamp of the `number`-th picture, modulo 2^32."""
        shift_s = sum(seconds for at, seconds in faults.jumps if number >= at)
        first = self.first(faults)
        if faults.restart_at is not None and number >= faults.restart_at:
            if self._restarted_s is None:
                self._restarted_s = pts_s
            first, shift_s = 0, shift_s - self._restarted_s
        timestamp = (first + round((pts_s + shift_s) * CLOCK_HZ)) & 0xFFFFFFFF
        if faults.duplicate_every and number % faults.duplicate_every == faults.duplicate_every - 1:
            return self._last
        if faults.backward_every and number % faults.backward_every == faults.backward_every - 1:
            return (timestamp - CLOCK_HZ // 2) & 0xFFFFFFFF
        self._last = timestamp
        return timestamp


class Network:
    """Lose, repeat, swap and delay one client's packets."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._free_at_s = 0.0  # when the last delayed packet arrives: the order stays
        self._held: bytes | None = None

    def loses(self, faults: Delivery) -> bool:
        return self._rng.random() < faults.loss

    def carry(self, packets: list[bytes], now_s: float, faults: Delivery) -> list[tuple[float, bytes]]:
        """Return what arrives of the packets, each with the time of its arrival."""
        arriving: list[tuple[float, bytes]] = []
        for packet in packets:
            if self.loses(faults):
                continue
            if self._held is None and self._rng.random() < faults.reorder:
                self._held = packet
                continue
            sent = [packet] * (2 if self._rng.random() < faults.duplicate else 1)
            if self._held is not None:
                sent.append(self._held)
                self._held = None
            for one in sent:
                if faults.jitter_s:
                    self._free_at_s = max(self._free_at_s, now_s + self._rng.uniform(0, faults.jitter_s))
                arriving.append((max(now_s, self._free_at_s), one))
        return arriving
