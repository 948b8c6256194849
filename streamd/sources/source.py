"""Read packets with PyAV from cameras (RTSP, HTTP, HLS), files and V4L2 devices."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import av
import av.error

from streamd.errors import SourceError
from streamd.messages import Packet, Stamp
from streamd.sources.access_units import AccessUnits, Codec
from streamd.sources.allocation import bound_allocations
from streamd.sources.failures import Said, is_timeout, open_error, reason, redirection, refusal
from streamd.sources.ffmpeg_log import FfmpegLog, Silent
from streamd.sources.options import SourceOptions, arguments, with_login_of
from streamd.sources.timeline import SenderClock, Timeline
from streamd.sources.trickle import Trickle

logger = logging.getLogger(__name__)

_NOPARSE, _NOFILLIN = 0x20, 0x10  # AVFMT_FLAG_...


class Transport:
    """How a stream's RTP travels; lasts over its connections, so that UDP which does not work is tried once."""

    def __init__(self, stream: str, options: SourceOptions) -> None:
        self._stream = stream
        self.name = options.transport

    def fall_back(self, why: str) -> None:
        """Use TCP from now on."""
        logger.warning("%s: %s; from now on RTP comes by TCP", self._stream, why)
        self.name = "tcp"


def open_source(options: SourceOptions, timeline: Timeline, transport: Transport | None = None) -> Source:
    """Connect, and find the video stream.

    Blocks for `open_timeout_s` at most. Raises SourceError, whose state says why.
    """
    transport = transport or Transport("source", options)
    bound_allocations()
    log = _log(options)
    said: Said = ()
    started = time.monotonic()
    try:
        try:
            container = _open(options, transport.name, log)
        except av.error.FFmpegError as err:
            said = log.take()
            options = _amended(options, transport, err, said)
            container = _open(options, transport.name, log)
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as err:
        # FFmpeg's own text repeats the URL.
        raise open_error(err, options, time.monotonic() - started, log.take() or said) from None
    try:
        _check(container, options)
        if options.is_rtsp and time.monotonic() - started >= options.open_timeout_s * 0.99:
            # The camera agreed to play: FFmpeg then waits for the first packet, and lets go without an error.
            raise _silence(options, transport, options.open_timeout_s)
        return Source(container, options, timeline, transport)
    except BaseException:
        container.close()
        raise


def _log(options: SourceOptions) -> FfmpegLog:
    return FfmpegLog() if options.is_network else Silent()


def _open(options: SourceOptions, transport: str, log: FfmpegLog) -> av.container.InputContainer:
    url, file_format, library_options = arguments(options, transport)
    timeouts = (options.open_timeout_s, options.read_timeout_s)
    with log:
        return av.open(url, format=file_format, options=library_options, timeout=timeouts)


def _amended(options: SourceOptions, transport: Transport, err: av.error.FFmpegError, said: Said) -> SourceOptions:
    """Return options with which one more try at once may do; raises the error where none would."""
    if transport.name == "udp" and refusal(said) == ("SETUP", "461"):
        transport.fall_back("the camera refuses UDP (461)")
        return options
    target = redirection(said)
    if target and isinstance(err, av.error.HTTPUnauthorizedError) and (url := with_login_of(options.url, target)):
        return replace(options, url=url)  # FFmpeg leaves the login behind
    raise err


def _check(container: av.container.InputContainer, options: SourceOptions) -> None:
    """Refuse what holds nothing that can be decoded. Raises SourceError."""
    if container.format.name == "tty":  # FFmpeg would type any .txt out as a film
        raise SourceError("a text file, not a video or picture", permanent=True)
    if not container.streams.video:
        state = "failed" if options.is_file else "protocol_error"
        raise SourceError("opened, but it holds no video stream", state, permanent=options.is_file)
    if cast("object", container.streams.video[0].codec_context) is None:
        raise SourceError("the video is of a codec that FFmpeg does not know", "unsupported", permanent=True)


def _silence(options: SourceOptions, transport: Transport, waited_s: float) -> SourceError:
    """Say that a camera agreed to send, and did not; by UDP it may have done so in vain."""
    if transport.name == "udp":
        transport.fall_back(f"connected, but no packet came by UDP for {waited_s:.1f} s")
    return SourceError(f"connected, but nothing came for {waited_s:.1f} s", "stalled")


class Source:
    """An open connection. Used and closed by one thread."""

    def __init__(
        self,
        container: av.container.InputContainer,
        options: SourceOptions,
        timeline: Timeline,
        transport: Transport,
    ) -> None:
        self._container = container
        self._options = options
        self._timeline = timeline
        self._transport = transport
        self.video = container.streams.video[0]
        codec = self.video.codec_context.name
        self._joins = options.is_rtsp and codec in ("h264", "hevc")
        if not self._joins:
            container.flags &= ~(_NOPARSE | _NOFILLIN)
        self._time_base = float(self.video.time_base or 0)
        self._last_stamp_s = time.monotonic()
        self._sender_clock = SenderClock()
        self._trickle = Trickle(2 * options.read_timeout_s) if options.is_rtsp else None
        self._lost = False  # packets went missing just before the piece that was read last
        timeline.connect()

    def packets(self) -> Iterator[Packet]:
        """Yield each access unit as it comes; ends with the file. A camera never ends: SourceError."""
        yield from self._joined() if self._joins else self._whole()
        if not self._options.is_file:
            raise SourceError("the camera closed the connection", "unreachable")

    def _whole(self) -> Iterator[Packet]:
        """Yield what FFmpeg's parser or container gives."""
        for data in self._pieces():
            ticks = data.pts if data.pts is not None else data.dts
            sender_at = self._sender_clock.time_of(data, self._seconds(ticks))
            yield Packet(data, self._stamp(ticks, sender_at), data.is_keyframe, data.is_corrupt or self._lost)

    def _joined(self) -> Iterator[Packet]:
        """Join RTP payloads into access units."""
        codec = cast(Codec, self.video.codec_context.name)
        units = AccessUnits(codec, may_repeat=self._transport.name == "udp")
        for piece in self._pieces():
            pts = piece.pts
            begins = pts != units.pts
            sender_at = self._sender_clock.time_of(piece, self._seconds(pts)) if begins else None
            for unit in units.feed(bytes(piece), pts, sender_at, after_loss=self._lost):
                data = cast("av.Packet[av.VideoStream]", av.Packet(unit.data))
                data.pts = unit.pts
                if self.video.time_base is not None:
                    data.time_base = self.video.time_base
                stamp = self._stamp(unit.pts, unit.sender_at)
                yield Packet(data, stamp, unit.keyframe, unit.corrupt, unit.recovers_in)
            if time.monotonic() - self._last_stamp_s > self._options.read_timeout_s:
                raise SourceError("packets trickle in, but make no picture", "stalled")

    def _seconds(self, ticks: int | None) -> float | None:
        return None if ticks is None else ticks * self._time_base

    def _stamp(self, ticks: int | None, sender_at: float | None) -> Stamp:
        arrived_ns = time.monotonic_ns()
        self._last_stamp_s = arrived_ns / 1e9
        pts_s = self._seconds(ticks)
        stamp = self._timeline.stamp(pts_s=pts_s, arrived_ns=arrived_ns, arrived_at=time.time(), sender_at=sender_at)
        if self._trickle and pts_s is not None:
            self._trickle.note(stamp.epoch, pts_s, self._last_stamp_s)
        return stamp

    def _pieces(self) -> Iterator[av.Packet[av.VideoStream]]:
        """Yield what FFmpeg gives, until the end. Raises SourceError."""
        self._last_stamp_s = time.monotonic()
        log = _log(self._options)
        pieces = cast("Iterator[av.Packet[av.VideoStream]]", self._container.demux())
        num_pieces = 0
        try:
            while True:
                asked_s = time.monotonic()
                with log:
                    data = next(pieces, None)
                if data is None:
                    return
                if self._trickle:
                    self._trickle.waited_s += time.monotonic() - asked_s
                if said := log.take():
                    self._lost |= any(what.startswith("RTP: missed") for _, what in said)
                if data.stream_index != self.video.index:
                    self._check_for_silence(num_pieces)  # other tracks may go on while the video is silent
                elif data.size:
                    num_pieces += 1
                    yield data
                    self._lost = False
        except (av.error.FFmpegError, OSError) as err:
            waited_s = time.monotonic() - self._last_stamp_s
            if is_timeout(err) or waited_s >= self._options.read_timeout_s * 0.99:
                raise self._silence(num_pieces) from None
            state = "failed" if self._options.is_file else "unreachable"
            raise SourceError(f"reading failed: {reason(err)}", state) from None

    def _check_for_silence(self, num_pieces: int) -> None:
        silent_s = time.monotonic() - self._last_stamp_s
        if self._options.is_rtsp and silent_s > self._options.read_timeout_s:
            raise self._silence(num_pieces)

    def _silence(self, num_pieces: int) -> SourceError:
        silent_s = time.monotonic() - self._last_stamp_s
        if self._options.is_rtsp and num_pieces == 0:
            return _silence(self._options, self._transport, silent_s)
        return SourceError(f"connected, but nothing came for {silent_s:.1f} s", "stalled")

    def close(self) -> None:
        self._container.close()
