"""Many cameras from one process, which can be switched off and on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av

from benchmarks.measure import ROOT
from benchmarks.readers import BenchmarkError
from tests.rtsp import encode_clip

GOP_S = 10
CLIP_S = 30  # or as long as the source is
STOP_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Picture:
    """What cameras of one kind send."""

    width: int
    height: int
    fps: int
    bit_rate: str  # that the encoder is asked for

    def __str__(self) -> str:
        return f"{self.width}x{self.height} at {self.fps} frames/s"


@dataclass(frozen=True, slots=True)
class Clip:
    """What every camera sends, over and over: H.264, a key frame every 10 s, no B-frames."""

    path: Path
    picture: Picture
    kbit_s: float  # as encoded


def make_clip(source: Path, folder: Path, picture: Picture) -> Clip:
    """Encode a video to what the cameras send."""
    path, size, fps = (
        folder / f"camera-{picture.height}-{picture.fps}.mp4",
        (picture.width, picture.height),
        picture.fps,
    )
    encode_clip(source, path, fps=fps, size=size, gop=GOP_S * fps, seconds=CLIP_S, options={"b:v": picture.bit_rate})
    with av.open(str(path)) as container:
        sizes = [packet.size for packet in container.demux(video=0) if packet.size]
    return Clip(path, picture, sum(sizes) * 8e-3 * fps / len(sizes))


class CameraProcess:
    """The test server in a process of its own, so that its CPU can be told apart."""

    def __init__(self, clip: Clip, num_streams: int) -> None:
        self.clip = clip
        self.names = [f"cam{index}" for index in range(num_streams)]
        self._port = 0  # taken at the first start, and kept at the later ones
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the cameras are off"
        return self._process.pid

    @property
    def urls(self) -> Mapping[str, str]:
        return {name: f"rtsp://127.0.0.1:{self._port}/{name}" for name in self.names}

    def start(self) -> None:
        """Return when clients can connect. Raises BenchmarkError."""
        mounts = [f"{name}={self.clip.path}" for name in self.names]
        command = [sys.executable, "-m", "tests.rtsp_server", *mounts, "--port", str(self._port)]
        # In a session of its own: where the kernel shares the cores out by session, cameras do not wait for the rest.
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError("the camera server did not start; its words are on stderr")
        self._port = json.loads(line)["port"]

    def kill(self) -> None:
        """End at once, as cameras that lose power."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate(timeout=STOP_DEADLINE_S)


@contextmanager
def cameras(clip: Clip, num_streams: int) -> Iterator[CameraProcess]:
    """Serve a clip as so many cameras."""
    process = CameraProcess(clip, num_streams)
    process.start()
    try:
        yield process
    finally:
        process.kill()
