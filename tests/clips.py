"""Small clips made on the spot, whose pictures say which frame they are and which way is up."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

from tests.rtsp import encode_frame

TOP_LEFT, REST = 235, 40  # luma of the top left quarter, and least luma of the rest


def drawing(index: int, size: tuple[int, int]) -> np.ndarray:
    """Draw frame `index`: RGB [H, W, 3], grey, the top left quarter bright, the rest lighter from frame to frame."""
    width, height = size
    picture = np.full((height, width, 3), REST + 5 * (index % 30), np.uint8)
    picture[: (height + 1) // 2, : (width + 1) // 2] = TOP_LEFT
    return picture


def white(index: int, size: tuple[int, int]) -> np.ndarray:
    """Draw nothing, on white: RGB [H, W, 3]."""
    width, height = size
    return np.full((height, width, 3), 255, np.uint8)


def write_clip(
    path: Path,
    num_frames: int = 10,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    pixel_format: str = "yuv420p",
    fps: int = 25,
    gop: int = 5,
    b_frames: int = 0,
    options: Mapping[str, str] | None = None,
    container: str | None = None,
    draw: Callable[[int, tuple[int, int]], np.ndarray] = drawing,
) -> Path:
    """Encode `num_frames` drawings; `size` is width and height in pixels."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options=dict(options or {}))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.time_base = Fraction(1, fps)
        if codec.startswith("libx264"):
            stream.gop_size, stream.max_b_frames = gop, b_frames
            stream.options |= {"sc_threshold": "0"}  # key frames by the GOP alone
        if codec == "libx265":  # with its own threads and B-frames the muxer once refused a packet
            stream.options |= {"x265-params": "log-level=none:bframes=0:frame-threads=1:pools=none"}
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(index, size), format="rgb24")
            encode_frame(output, stream, frame, index, fps)
        output.mux(stream.encode(None))
    return path


def write_mjpeg(path: Path, num_frames: int = 10, *, size: tuple[int, int] = (64, 48), fps: int = 25) -> Path:
    """Encode drawings as Motion JPEG with the Huffman tables that RTP takes for granted; of a .mkv or .avi."""
    options = {"huffman": "default"}
    return write_clip(path, num_frames, codec="mjpeg", size=size, pixel_format="yuvj420p", fps=fps, options=options)


def write_sound(path: Path) -> Path:
    """Write a second of silence."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    return path


def turn(source: Path, out: Path, degrees: int) -> Path:
    """Copy an MP4 and say in its track header that players turn it `degrees` clockwise, as phones do."""
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one = 1 << 16
    matrix = struct.pack(">9i", cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    data = bytearray(source.read_bytes())
    header = data.index(b"tkhd")
    data[header + 44 : header + 44 + len(matrix)] = matrix  # version 0: 4 + 20 + 16 bytes after the type
    out.write_bytes(data)
    return out
