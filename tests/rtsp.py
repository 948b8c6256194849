"""Cameras for tests and benchmarks: `RtspServer` runs gst_rtsp_server.py, `encode_clip` makes what it serves."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
from av.video.stream import VideoStream

SERVER = Path(__file__).with_name("gst_rtsp_server.py")
SYSTEM_PYTHON = Path("/usr/bin/python3")  # Debian's bindings of GStreamer are for Debian's Python
ELEMENTS = ("appsrc", "parsebin", "qtdemux", "h264parse", "rtph264pay", "rtpbin", "udpsink")
DEADLINE_S = 20.0
PROBE = f"""
import gi
gi.require_version("Gst", "1.0"), gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gst, GstRtspServer
Gst.init(None)
print(*(name for name in {ELEMENTS!r} if Gst.ElementFactory.find(name) is None))
"""


@functools.cache
def missing_for_rtsp() -> str:
    """Say what the RTSP server lacks on this machine; empty when it can run."""
    if not SYSTEM_PYTHON.exists():
        return f"{SYSTEM_PYTHON} is missing"
    probe = subprocess.run([SYSTEM_PYTHON, "-c", PROBE], capture_output=True, text=True)
    if probe.returncode != 0:
        return (
            f"gst-rtsp-server is missing (Debian: python3-gi gir1.2-gst-rtsp-server-1.0): {probe.stderr.strip()[-200:]}"
        )
    if names := probe.stdout.strip():
        return f"GStreamer lacks {names} (Debian: gstreamer1.0-plugins-base, -good and -bad)"
    return ""


class RtspServer:
    """Serve clips as cameras, each by its name: `RtspServer({"gate": clip})` gives rtsp://127.0.0.1:PORT/gate.

    Each client gets the clip from its first frame, a key frame, unless `shared`. `sent` reads what went out.
    """

    def __init__(
        self,
        clips: Mapping[str, Path],
        *,
        user: str = "",
        password: str = "",
        digest: bool = False,
        shared: bool = False,
        log_sent: Path | None = None,
    ) -> None:
        self.port = 0  # taken at the first start, and kept at the later ones
        self.user = user
        self.password = password
        self.log_sent = log_sent
        self._options = [option for name, clip in clips.items() for option in ("--mount", f"/{name}={clip}")]
        if user:
            self._options += ["--user", user, "--password", password]
        if log_sent:
            self._options += ["--log-sent", str(log_sent)]
        self._options += ["--digest"] * digest + ["--shared"] * shared
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> RtspServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._running().pid

    def url(self, name: str) -> str:
        """Give the address of a camera, with user and password where there are some."""
        login = f"{self.user}:{self.password}@" if self.user else ""
        return f"rtsp://{login}127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start, and return when clients can connect."""
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, SERVER, "--port", str(self.port), *self._options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = self._answer()["port"]

    def stop(self) -> None:
        """End in good order: clients are told."""
        self._end(kill=False)

    def kill(self) -> None:
        """End at once, as a camera that loses power; `start` brings it back on the same port."""
        self._end(kill=True)

    def freeze(self, name: str) -> None:
        """Send no more pictures of a camera; its connections stay open, and RTCP still comes."""
        self._order(f"freeze /{name}")

    def thaw(self, name: str) -> None:
        self._order(f"thaw /{name}")

    def sent(self) -> list[dict[str, Any]]:
        """Read the log of sent access units: mount, client, count, index in the clip, pts_s, sent_at (Unix s)."""
        assert self.log_sent is not None, "start the server with log_sent=FILE"
        # The last line may still be in the writing.
        return [json.loads(line) for line in self.log_sent.read_text().splitlines(keepends=True) if line[-1] == "\n"]

    def _order(self, command: str) -> None:
        stdin = self._running().stdin
        assert stdin is not None
        stdin.write(command + "\n")
        stdin.flush()
        if error := self._answer().get("error"):
            raise ValueError(f"RTSP server: {error}")

    def _answer(self) -> dict[str, Any]:
        process = self._running()
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"RTSP server ended with {process.wait(DEADLINE_S)}; its words are on stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None, "the RTSP server is not running"
        return self._process

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        try:
            process.communicate(timeout=DEADLINE_S)  # closes stdin, which ends the server
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def is_h264(clip: Path) -> bool:
    with av.open(str(clip)) as container:
        return container.streams.video[0].codec_context.name == "h264"


def encode_clip(
    source: Path,
    out: Path,
    *,
    fps: int,
    size: tuple[int, int] | None = None,
    gop: int = 25,
    seconds: float | None = None,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
) -> Path:
    """Encode the first frames of a video again, one after the other at `fps`, without B-frames.

    No frame is left out or repeated, so a source of another rate plays faster or slower. `size` is width and height
    in pixels; None keeps the source's. `seconds` of the result; None takes the whole source.
    """
    num_frames = None if seconds is None else round(seconds * fps)
    partial = out.with_suffix(f".partial{out.suffix}")
    with av.open(str(partial), "w", options={"movflags": "faststart"}) as container:
        frames = read_frames(source, num_frames)
        first = next(frames)
        stream = container.add_stream(codec, rate=fps, options={"preset": "veryfast", "bf": "0", **(options or {})})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size or (first.width, first.height)
        stream.pix_fmt = "yuv420p" if codec != "mjpeg" else "yuvj420p"
        stream.gop_size = gop
        stream.max_b_frames = 0
        stream.codec_context.thread_type = "FRAME"  # threads by slice would cut each picture into slices
        encode_frame(container, stream, first, 0, fps)
        for index, frame in enumerate(frames, start=1):
            encode_frame(container, stream, frame, index, fps)
        container.mux(stream.encode(None))
    partial.rename(out)  # so that a broken run leaves no half of a clip behind
    return out


def read_frames(source: Path, num_frames: int | None) -> Iterator[av.VideoFrame]:
    with av.open(str(source)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index == num_frames:
                return
            yield frame


def encode_frame(
    container: av.container.OutputContainer, stream: VideoStream, frame: av.VideoFrame, index: int, fps: int
) -> None:
    picture = frame.reformat(stream.width, stream.height, stream.pix_fmt)
    picture.pts, picture.time_base = index, Fraction(1, fps)
    picture.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses its own key frames
    container.mux(stream.encode(picture))
