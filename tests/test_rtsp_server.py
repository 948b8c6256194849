"""The cameras that misbehave: what they send when all is well, and what goes wrong, as a plain client sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import av
import av.error
import numpy as np
import pytest
from av.container import InputContainer

from tests.clips import write_clip, write_mjpeg
from tests.rtsp_faults import Camera
from tests.rtsp_server import Cameras, CameraServer

SIZE = (320, 240)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        "h264": write_clip(folder / "h264.mp4", 20, size=SIZE, fps=50),
        "b_frames": write_clip(folder / "b_frames.mp4", 20, size=SIZE, fps=50, gop=10, b_frames=2),
        "hevc": write_clip(folder / "hevc.mp4", 20, size=SIZE, fps=50, codec="libx265"),
        "mjpeg": write_mjpeg(folder / "mjpeg.mkv", 20, size=SIZE, fps=50),
    }


@contextmanager
def connect(url: str, transport: str = "tcp", timeout_s: float = 3.0) -> Iterator[InputContainer]:
    options = {"rtsp_transport": transport, "probesize": "32", "allowed_media_types": "video"}
    with av.open(url, options=options, timeout=timeout_s) as container:
        yield container


@contextmanager
def watching(cameras: Cameras, transport: str = "tcp", timeout_s: float = 3.0) -> Iterator[InputContainer]:
    with CameraServer({"gate": cameras}) as server, connect(server.url("gate"), transport, timeout_s) as container:
        yield container


def planes(path: Path, count: int) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray() for frame in islice(file.decode(video=0), count)]


@pytest.mark.parametrize("transport", ["tcp", "udp"])
@pytest.mark.parametrize("kind", ["h264", "b_frames", "hevc", "mjpeg"])
def test_a_client_gets_the_pictures_of_the_clip_in_real_time(clips: dict[str, Path], kind: str, transport: str) -> None:
    with watching(Camera(clips[kind]), transport) as camera:
        began_s = time.monotonic()
        received = [frame.to_ndarray() for frame in islice(camera.decode(video=0), 18)]
        took_s = time.monotonic() - began_s
    for index, (got, wanted) in enumerate(zip(received, planes(clips[kind], 18), strict=True)):
        assert np.array_equal(got, wanted), f"frame {index} is not the clip's"
    assert took_s > 0.25, "eighteen pictures at 50 a second were not sent in time, but at once"
