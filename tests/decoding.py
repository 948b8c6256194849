"""What the decoders' tests share: packets of a clip, clips of real scenes in other codecs, and how alike frames are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from streamd.decode import Decoder
from streamd.decode.software import SoftwareDecoder
from streamd.messages import Frame, Packet, Picture
from streamd.sources import Source, SourceOptions, Timeline, open_source
from tests.rtsp import encode_frame

LUMA_PSNR_DB = 38.0  # two decoders' pictures are the same from here on; what is left is rounding
_CODEC_OPTIONS = {
    "libx264": {"preset": "veryfast", "sc_threshold": "0"},
    "libx265": {"preset": "ultrafast"},
    "mjpeg": {"q:v": "2"},
}


@contextmanager
def packets_of(path: Path) -> Iterator[tuple[Source, list[Packet]]]:
    """Open a clip and read its packets, numbered: `arrived_ns` is the index."""
    source = open_source(SourceOptions(str(path)), Timeline())
    try:
        packets = [
            replace(packet, stamp=replace(packet.stamp, arrived_ns=index))
            for index, packet in enumerate(source.packets())
        ]
        yield source, packets
    finally:
        source.close()


def feed(decoder: Decoder, packets: Sequence[Packet]) -> list[Frame]:
    """Decode a whole clip."""
    frames = [frame for packet in packets for frame in decoder.decode(packet)]
    return [*frames, *decoder.flush()]


def in_software(path: Path) -> list[Frame]:
    """Decode a clip with the decoder that the others are compared with."""
    with packets_of(path) as (source, packets):
        return feed(SoftwareDecoder("gate", source.video), packets)


def recode(
    clip: Path,
    out: Path,
    codec: str,
    *,
    num_frames: int = 60,
    size: tuple[int, int] = (640, 360),
    gop: int = 20,
    b_frames: int = 0,
    open_gop: bool = False,
    hashes: bool = False,
) -> Path:
    """Encode the beginning of a clip anew, at 25 frames/s; `size` is width and height in pixels.

    `hashes`: H.265 says of each picture what its MD5 is.
    """
    with av.open(str(clip)) as source, av.open(str(out), "w") as output:
        stream = output.add_stream(codec, rate=25, options=dict(_CODEC_OPTIONS[codec]))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec == "libx264":
            stream.gop_size, stream.max_b_frames = gop, b_frames
            stream.options |= {"x264-params": f"open-gop={int(open_gop)}:b-adapt=0"}
        if codec == "libx265":  # in one thread, as in clips.py
            groups = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop={int(open_gop)}"
            groups += f":bframes={b_frames}:hash={int(hashes)}"
            stream.options |= {"x265-params": f"log-level=none:{groups}:frame-threads=1:pools=none"}
        for index, frame in enumerate(islice(source.decode(video=0), num_frames)):
            resized = frame.reformat(*size, format=stream.pix_fmt)
            resized.pict_type = 0  # else the encoder would keep the source's key frames
            encode_frame(output, stream, resized, index, 25)
        output.mux(stream.encode(None))
    return out


def luma_of(picture: Picture, matrix: str | None = None) -> np.ndarray:
    """Return luma in 0..255 of full range; that of RGB by `matrix`."""
    plane = picture.planes[0].cpu().numpy().astype(np.float64)
    if picture.layout == "rgb":
        red, blue = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[matrix or picture.matrix]
        return plane @ np.array([red, 1 - red - blue, blue])
    return plane if picture.full_range else (plane - 16) * 255 / 219


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two planes in 0..255."""
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def assert_same(frames: Sequence[Frame], expected: Sequence[Frame]) -> None:
    """Check count, numbers, times, stamps, marks, sizes and luma against another decoder's frames."""

    def facts(frame: Frame) -> tuple[object, ...]:
        return (
            frame.stream,
            frame.seq,
            frame.pts_s,
            frame.stamp.arrived_ns,
            frame.keyframe,
            frame.corrupt,
            frame.width,
            frame.height,
            frame.picture.rotation,
        )

    assert [facts(frame) for frame in frames] == [facts(frame) for frame in expected]
    worst = min(
        psnr_db(luma_of(frame.picture, other.picture.matrix), luma_of(other.picture))
        for frame, other in zip(frames, expected, strict=True)
    )
    assert worst >= LUMA_PSNR_DB, f"the luma of one frame differs: {worst:.1f} dB"


def need_dali() -> None:
    """Skip where DALI is not installed."""
    pytest.importorskip("nvidia.dali", reason="DALI is missing: pip install nvidia-dali-cuda130")
