"""Read packets with PyAV from cameras (RTSP, HTTP, HLS), files and V4L2 devices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import av
import av.error

from streamd.errors import SourceError
from streamd.messages import Packet, Stamp
from streamd.sources.access_units import AccessUnits, Codec
from streamd.sources.timeline import SenderClock, Timeline

_RTSP_OPTIONS = {
    "allowed_media_types": "video",  # audio and metadata tracks are neither received nor parsed
    "probesize": "32",  # stop probing at once: the SDP names the codec, and the decoder reads the rest in band
    "analyzeduration": "0",
    "fflags": "+noparse+nofillin",  # give the pieces as they come; see access_units.py
}
_NOPARSE, _NOFILLIN = 0x20, 0x10  # AVFMT_FLAG_...


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What to open, and how long to wait for it."""

    url: str = field(repr=False)  # may hold a password
    transport: str = "tcp"  # rtsp and rtsps: "tcp" or "udp"
    open_timeout_s: float = 5.0
    read_timeout_s: float = 5.0

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme if "://" in self.url else "file"

    @property
    def is_file(self) -> bool:
        return self.scheme == "file"


def open_source(options: SourceOptions, timeline: Timeline) -> Source:
    """Connect, and find the video stream.

    Blocks for `open_timeout_s` at most. Raises SourceError, whose state says why.
    """
    url, file_format, library_options = _arguments(options)
    started = time.monotonic()
    try:
        container = av.open(
            url,
            format=file_format,
            options=library_options,
            timeout=(options.open_timeout_s, options.read_timeout_s),
        )
    except (av.error.FFmpegError, OSError, ValueError) as err:
        raise _open_error(err, options, time.monotonic() - started) from None  # its text repeats the URL
    if container.format.name == "tty":  # FFmpeg would type any .txt out as a film
        container.close()
        raise SourceError("a text file, not a video or picture", permanent=True)
    if not container.streams.video:
        container.close()
        raise SourceError("opened, but it holds no video stream", permanent=options.is_file)
    return Source(container, options, timeline)


class Source:
    """An open connection. Used and closed by one thread."""

    def __init__(self, container: av.container.InputContainer, options: SourceOptions, timeline: Timeline) -> None:
        self._container = container
        self._options = options
        self._timeline = timeline
        self.video = container.streams.video[0]
        codec = self.video.codec_context.name
        self._joins = options.scheme in ("rtsp", "rtsps") and codec in ("h264", "hevc")
        if not self._joins:
            container.flags &= ~(_NOPARSE | _NOFILLIN)
        self._time_base = float(self.video.time_base or 0)
        self._last_stamp_s = time.monotonic()
        self._sender_clock = SenderClock()
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
            yield Packet(data, self._stamp(ticks, sender_at), data.is_keyframe, data.is_corrupt)

    def _joined(self) -> Iterator[Packet]:
        """Join RTP payloads into access units."""
        units = AccessUnits(cast(Codec, self.video.codec_context.name))
        for piece in self._pieces():
            pts = piece.pts
            begins = pts != units.pts
            sender_at = self._sender_clock.time_of(piece, self._seconds(pts)) if begins else None
            for unit in units.feed(bytes(piece), pts, sender_at):
                data = cast("av.Packet[av.VideoStream]", av.Packet(unit.data))
                data.pts = unit.pts
                if self.video.time_base is not None:
                    data.time_base = self.video.time_base
                yield Packet(data, self._stamp(unit.pts, unit.sender_at), unit.keyframe, unit.corrupt)
            if time.monotonic() - self._last_stamp_s > self._options.read_timeout_s:
                raise SourceError("packets trickle in, but make no picture", "stalled")

    def _seconds(self, ticks: int | None) -> float | None:
        return None if ticks is None else ticks * self._time_base

    def _stamp(self, ticks: int | None, sender_at: float | None) -> Stamp:
        arrived_ns = time.monotonic_ns()
        self._last_stamp_s = arrived_ns / 1e9
        return self._timeline.stamp(
            pts_s=self._seconds(ticks),
            arrived_ns=arrived_ns,
            arrived_at=time.time(),
            sender_at=sender_at,
        )

    def _pieces(self) -> Iterator[av.Packet[av.VideoStream]]:
        """Yield what FFmpeg gives, until the end. Raises SourceError."""
        self._last_stamp_s = time.monotonic()
        try:
            for data in self._container.demux(self.video):
                if data.size:
                    yield data
        except (av.error.FFmpegError, OSError) as err:
            waited_s = time.monotonic() - self._last_stamp_s
            if _is_timeout(err) or waited_s >= self._options.read_timeout_s * 0.99:
                raise SourceError(f"connected, but nothing came for {waited_s:.1f} s", "stalled") from None
            state = "failed" if self._options.is_file else "unreachable"
            raise SourceError(f"reading failed: {_reason(err)}", state) from None

    def close(self) -> None:
        self._container.close()


def _arguments(options: SourceOptions) -> tuple[str, str | None, dict[str, str]]:
    """Map a URL of ours to PyAV's (file, format, options)."""
    url = options.url
    match options.scheme:
        case "rtsp" | "rtsps":
            return url, None, {**_RTSP_OPTIONS, "rtsp_transport": options.transport}
        case "v4l2":
            return url.removeprefix("v4l2://"), "video4linux2", {}
        case "file":
            return url.removeprefix("file://"), None, {}
        case _:
            return url, None, {}


def _open_error(err: Exception, options: SourceOptions, waited_s: float) -> SourceError:
    """Name what went wrong in the operator's terms; the library's own text repeats the URL with its password."""
    if isinstance(err, av.error.HTTPUnauthorizedError):
        return SourceError("the camera refuses the user name or password (401)", "unauthorized", permanent=True)
    if isinstance(err, av.error.HTTPForbiddenError):
        return SourceError("the camera allows this user no access to the path (403)", "unauthorized", permanent=True)
    if isinstance(err, av.error.HTTPNotFoundError):
        return SourceError("the camera has no such path (404); check the end of the URL", "not_found", permanent=True)
    if options.is_file or options.scheme == "v4l2":
        return _file_error(err)
    if _is_timeout(err) or waited_s >= options.open_timeout_s * 0.99:
        return SourceError(f"no answer within {options.open_timeout_s:g} s", "unreachable")
    if isinstance(err, av.error.ConnectionRefusedError):
        return SourceError("the connection was refused; is the camera's port right?", "unreachable")
    if isinstance(err, EOFError):
        return SourceError("closed the connection before it sent anything", "unreachable")
    if isinstance(err, av.error.InvalidDataError):
        return SourceError("answered with something that is not video", "failed")
    if isinstance(err, OSError):
        return SourceError(f"cannot be reached: {_reason(err)} (does its name resolve?)", "unreachable")
    return SourceError(f"cannot be opened: {_reason(err)}", "failed")


def _file_error(err: Exception) -> SourceError:
    if isinstance(err, FileNotFoundError):
        return SourceError("there is no such file or device", "not_found", permanent=True)
    if isinstance(err, PermissionError):
        return SourceError("no permission to read the file or device", "failed", permanent=True)
    if isinstance(err, av.error.InvalidDataError):
        return SourceError("not a video or picture that FFmpeg can read", "failed", permanent=True)
    if isinstance(err, EOFError):
        return SourceError("the file ends before its first frame", "failed", permanent=True)
    return SourceError(f"cannot be opened: {_reason(err)}", "failed", permanent=True)


def _is_timeout(err: Exception) -> bool:
    return isinstance(err, av.error.ExitError | TimeoutError)


def _reason(err: Exception) -> str:
    return getattr(err, "strerror", None) or type(err).__name__
