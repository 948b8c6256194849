"""Send one client of `tests.rtsp_server` its pictures, sound and sender reports, when they are due."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from tests.rtp_packets import CLOCK_HZ, read_clip
from tests.rtsp_faults import Camera, Network, Picture, Stamps, pictures

if TYPE_CHECKING:
    from tests.rtsp_session import Session

_MAX_WAITING_BYTES = 2 << 20  # of a client that does not read: what comes then is lost, visibly
_NTP_UNIX_S = 2_208_988_800  # from 1900 to 1970
_SOUND = b"\xff" * 160  # 20 ms of silence
_SOUND_S = 0.02
_METADATA_S = 1.0
_METADATA = b'<?xml version="1.0"?><tt:MetadataStream xmlns:tt="http://www.onvif.org/ver10/schema"/>'


@dataclass(frozen=True, slots=True)
class Track:
    """Where a track of a client goes."""

    kind: str  # video, audio or metadata
    source: int  # SSRC
    channels: tuple[int, int] | None = None  # RTP and RTCP, through TCP
    ports: tuple[str, int, int] | None = None  # address, RTP, RTCP; through UDP


class Player:
    """Play a camera to one client."""

    def __init__(self, session: Session, tracks: Mapping[int, Track], udp: tuple[socket.socket, socket.socket]) -> None:
        self._session = session
        self._video = tracks[0]
        self._others = [_Other(track) for number, track in tracks.items() if number]
        self._udp = udp
        self._loop = asyncio.get_running_loop()
        self._camera = session.camera
        self._pictures = pictures(read_clip(self._camera.clip), self._camera.bitstream)
        self._stamps = Stamps(random.Random())
        self._network = Network(self._camera.delivery.seed)
        self._timer: asyncio.TimerHandle | None = None
        self._started_s = self._started_at = 0.0
        self._shift_s = 0.0  # of the present run of pictures
        self._number = 0  # of the next picture
        self._report_due_s = 0.0
        self._num_packets = self._num_bytes = 0
        self.sequence = random.randrange(1 << 16)
        self.first_timestamp = self._stamps.first(self._camera.clock)
        self._next = next(self._pictures)

    def start(self) -> None:
        self._started_s, self._started_at = self._loop.time(), time.time()
        self._report_due_s = self._camera.clock.first_report_s
        self._tick()

    def stop(self) -> None:
        if self._timer:
            self._timer.cancel()

    def say_bye(self) -> None:
        """Send RTCP BYE."""
        self._send_control(struct.pack(">BBHI", 0x81, 203, 1, self._video.source))

    def _tick(self) -> None:
        """Send what is due, and come back when the next picture is."""
        now_s = self._loop.time() - self._started_s
        camera = self._session.camera
        if camera is not self._camera:
            self._adopt(camera, now_s)
        while (due_s := self._next.due_s + self._shift_s) <= now_s:
            if camera.delivery.end_after is not None and self._number >= camera.delivery.end_after:
                self._session.note(camera.delivery.end)
                self._session.end(camera.delivery.end)
                return
            self._send(self._next, camera)
            self._number += 1
            self._next = next(self._pictures)
        self._timer = self._loop.call_at(self._started_s + due_s, self._tick)

    def _adopt(self, camera: Camera, now_s: float) -> None:
        """Go on as another camera."""
        if camera.clip != self._camera.clip or camera.bitstream is not self._camera.bitstream:
            self._pictures = pictures(read_clip(camera.clip), camera.bitstream)
            self._shift_s = now_s
            self._next = next(self._pictures)
        if camera.delivery.seed != self._camera.delivery.seed:
            self._network = Network(camera.delivery.seed)
        self._camera = camera

    def _send(self, picture: Picture, camera: Camera) -> None:
        pts_s = picture.pts_s + self._shift_s
        timestamp = self._stamps.stamp(self._number, pts_s, camera.clock)
        delivery = camera.delivery
        if delivery.stop_after is not None and self._number >= delivery.stop_after:
            return
        if camera.clock.reports and pts_s >= self._report_due_s:
            self._report_due_s = pts_s + camera.clock.report_interval_s
            self._report(timestamp, pts_s, camera)
        packets = picture.packets
        channel = self._video.channels[0] if self._video.channels else 0
        wire = packets.addressed(channel, self.sequence, timestamp, self._video.source)
        self.sequence = (self.sequence + len(packets)) & 0xFFFF
        self._num_packets += len(packets)
        self._num_bytes += packets.num_payload_bytes
        for other in self._others:
            self._send_other(other, pts_s)
        if self._video.channels:
            if self._session.num_waiting_bytes > _MAX_WAITING_BYTES:
                return
            if delivery.loss:
                ends = pairwise(packets.starts)
                kept = [wire[begin:end] for begin, end in ends if not self._network.loses(delivery)]
                wire = bytearray().join(kept)
            self._session.write(wire, delivery.bytes_per_s)
        elif not delivery.udp_blocked:
            self._send_by_udp(packets.split(wire), camera)

    def _send_by_udp(self, packets: list[bytes], camera: Camera) -> None:
        now_s = self._loop.time()
        for at_s, packet in self._network.carry(packets, now_s, camera.delivery):
            if at_s > now_s:
                self._loop.call_at(at_s, self._send_datagram, packet)
            else:
                self._send_datagram(packet)

    def _send_datagram(self, packet: bytes) -> None:
        assert self._video.ports is not None
        with suppress(OSError):  # the client has gone, or the buffer is full: the packet is lost
            self._udp[0].sendto(packet, self._video.ports[:2])

    def _report(self, timestamp: int, pts_s: float, camera: Camera) -> None:
        """Send an RTCP sender report (RFC 3550, 6.4.1): this time stamp is that time of day."""
        began_at = self._started_at if camera.clock.wall_clock_at is None else camera.clock.wall_clock_at
        ntp = round((began_at + pts_s + _NTP_UNIX_S) * 2**32) & 0xFFFFFFFFFFFFFFFF
        head = struct.pack(">BBHI", 0x80, 200, 6, self._video.source)
        body = struct.pack(">QIII", ntp, timestamp, self._num_packets & 0xFFFFFFFF, self._num_bytes & 0xFFFFFFFF)
        self._send_control(head + body)

    def _send_control(self, packet: bytes) -> None:
        if self._video.channels:
            self._session.write(struct.pack(">BBH", 0x24, self._video.channels[1], len(packet)) + packet)
        elif self._video.ports and not self._camera.delivery.udp_blocked:
            host, _, port = self._video.ports
            with suppress(OSError):
                self._udp[1].sendto(packet, (host, port))

    def _send_other(self, other: _Other, now_s: float) -> None:
        """Send the sound or metadata that is due."""
        for packet in other.due(now_s):
            if other.track.channels:
                head = struct.pack(">BBH", 0x24, other.track.channels[0], len(packet))
                self._session.write(head + packet)
            elif other.track.ports:
                with suppress(OSError):
                    self._udp[0].sendto(packet, other.track.ports[:2])


class _Other:
    """A track that is no video."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self._is_sound = track.kind == "audio"
        self._num_sent = 0

    def due(self, now_s: float) -> list[bytes]:
        packets = []
        interval_s = _SOUND_S if self._is_sound else _METADATA_S
        while self._num_sent * interval_s <= now_s:
            kind, body = (0, _SOUND) if self._is_sound else (107 | 0x80, _METADATA)
            ticks = 160 * self._num_sent if self._is_sound else CLOCK_HZ * self._num_sent
            head = struct.pack(">BBHII", 0x80, kind, self._num_sent & 0xFFFF, ticks & 0xFFFFFFFF, self.track.source)
            packets.append(head + body)
            self._num_sent += 1
        return packets
