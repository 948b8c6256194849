"""NVDEC's pictures stay where they are, and a stream goes on in software when the GPU's decoder does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import av.error
import pytest
import torch

from streamd.decode.frames import Framer
from streamd.decode.nvdec import NvdecDecoder, adopt, device_picture, open_context, unusable
from streamd.decode.software import SoftwareDecoder
from streamd.messages import Packet
from tests.clips import drawing, turn, write_clip
from tests.decoding import assert_same, feed, in_software, packets_of, recode

GPU = torch.device("cuda", 0)


class FakeContext:
    """Decode with FFmpeg in software, and fail for the packets of a list."""

    def __init__(self, context: av.VideoCodecContext, fails: Sequence[int], error: type[Exception]) -> None:
        self._context = context
        self._fails = fails
        self._error = error
        self.num_packets = 0

    def decode(self, packet: Any) -> list[av.VideoFrame]:
        index, self.num_packets = self.num_packets, self.num_packets + 1
        if index in self._fails:
            raise self._error(-1, "a failure")
        return self._context.decode(packet)


class Opener:
    """Open fake contexts and keep them; or raise an error."""

    def __init__(
        self,
        fails: Sequence[int] = (),
        error: type[Exception] = av.error.ExternalError,
        refuses: Exception | None = None,
    ) -> None:
        self._fails = fails
        self._error = error
        self._refuses = refuses
        self.opened: list[FakeContext] = []

    def __call__(self, video: av.VideoStream, device: torch.device) -> av.VideoCodecContext:
        if self._refuses is not None:
            raise self._refuses
        context = cast(av.VideoCodecContext, av.CodecContext.create(video.codec_context.name, "r"))
        adopt(context, video)
        self.opened.append(FakeContext(context, self._fails, self._error))
        return cast(av.VideoCodecContext, self.opened[-1])


def zerolatency(folder: Path, num_frames: int = 40) -> Path:
    return write_clip(folder / "clip.mp4", num_frames, gop=8, options={"tune": "zerolatency"})


def test_a_gpu_that_cannot_be_opened_leaves_the_stream_to_the_software(tmp_path: Path) -> None:
    clip = zerolatency(tmp_path)
    refusal = av.error.PermissionError(1, "Operation not permitted")
    with packets_of(clip) as (source, packets):
        decoder = NvdecDecoder(Framer("gate", source.video), source.video, GPU, open_context=Opener(refuses=refusal))
        assert decoder.description == "software: NVDEC cannot be opened: [Errno 1] Operation not permitted"
        frames = feed(decoder, packets)
        decoder.close()
    assert_same(frames, in_software(clip))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_stream_decodes_in_software(tmp_path: Path) -> None:
    clip = zerolatency(tmp_path)
    with packets_of(clip) as (source, packets):
        decoder = NvdecDecoder(Framer("gate", source.video), source.video, GPU)
        assert decoder.description.startswith("software: NVDEC cannot be opened: ")
        assert_same(feed(decoder, packets), in_software(clip))


@pytest.mark.parametrize("b_frames", [0, 2])
def test_a_session_that_ffmpeg_replaced_by_software_gives_every_frame_and_says_so(
    tmp_path: Path, b_frames: int
) -> None:
    """FFmpeg falls back by itself where NVDEC's sessions are exhausted or it refuses the stream."""
    clip = write_clip(tmp_path / "clip.mp4", 24, gop=8, b_frames=b_frames)
    with packets_of(clip) as (source, packets):
        decoder = NvdecDecoder(Framer("gate", source.video), source.video, GPU, "a camera", Opener())
        assert decoder.description == "nvdec: a camera"
        frames = feed(decoder, packets)
        assert decoder.description == "software: NVDEC has no session left, or refuses h264 yuv420p 64x48"
    assert_same(frames, in_software(clip))


def test_a_decoder_that_fails_for_good_is_replaced_at_the_next_key_frame(tmp_path: Path) -> None:
    opener = Opener(fails=range(10, 99))
    with packets_of(zerolatency(tmp_path)) as (source, packets):
        decoder = NvdecDecoder(Framer("gate", source.video), source.video, GPU, open_context=opener)
        frames = feed(decoder, packets)
        assert decoder.description == "software: NVDEC failed 3 times in a row: [Errno -1] a failure"
    assert opener.opened[0].num_packets == 13, "it is not asked again"
    assert [frame.stamp.arrived_ns for frame in frames] == [*range(10), *range(16, 40)]
    assert [frame.seq for frame in frames] == list(range(34))
    assert not any(frame.corrupt for frame in frames)


def test_a_failure_now_and_then_marks_frames_and_keeps_the_decoder(tmp_path: Path) -> None:
    opener = Opener(fails=[3, 4, 11, 12, 20])
    with packets_of(zerolatency(tmp_path)) as (source, packets):
        decoder = NvdecDecoder(Framer("gate", source.video), source.video, GPU, open_context=opener)
        good = [frame.stamp.arrived_ns for frame in feed(decoder, packets) if not frame.corrupt]
    assert opener.opened[0].num_packets == 41, "all packets, and the flush"
    assert good == [*range(3), *range(8, 11), *range(16, 20), *range(24, 40)]


def test_damaged_packets_are_not_the_decoder_s_fault(tmp_path: Path) -> None:
    opener = Opener(fails=range(2, 20), error=av.error.InvalidDataError)
    with packets_of(zerolatency(tmp_path)) as (source, packets):
        decoder = NvdecDecoder(Framer("gate", source.video), source.video, GPU, open_context=opener)
        frames = feed(decoder, packets)
    assert opener.opened[0].num_packets == 41
    assert [frame.stamp.arrived_ns for frame in frames if not frame.corrupt] == [0, 1, *range(24, 40)]


def test_a_resolution_that_changes_in_mid_stream_changes_the_frames(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "small.h264", 10, size=(64, 48)).read_bytes()
    large = write_clip(tmp_path / "large.h264", 10, size=(128, 96)).read_bytes()
    (tmp_path / "both.h264").write_bytes(small + large + small)
    with packets_of(tmp_path / "both.h264") as (source, packets):
        frames = feed(NvdecDecoder(Framer("gate", source.video), source.video, GPU, open_context=Opener()), packets)
    assert_same(frames, in_software(tmp_path / "both.h264"))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_the_container_s_display_matrix_is_not_lost(tmp_path: Path, degrees: int) -> None:
    clip = turn(write_clip(tmp_path / "stored.mp4", 4), tmp_path / "turned.mp4", degrees)
    with packets_of(clip) as (source, packets):
        frames = feed(NvdecDecoder(Framer("gate", source.video), source.video, GPU, open_context=Opener()), packets)
    assert {frame.picture.rotation for frame in frames} == {(360 - degrees) % 360}
    assert_same(frames, in_software(clip))


def test_a_new_decoder_knows_what_the_container_s_knows(tmp_path: Path) -> None:
    with packets_of(write_clip(tmp_path / "clip.mp4", 12, gop=12, b_frames=3)) as (source, _):
        context = av.CodecContext.create("h264", "r")
        adopt(context, source.video)
        assert context.reorder_depth == source.video.codec_context.reorder_depth > 0
        assert context.extradata == source.video.codec_context.extradata and context.extradata
        assert context.copy_opaque and context.thread_count == 1


def surface(pixel_format: str, size: tuple[int, int] = (66, 50)) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(drawing(0, size), format="rgb24").reformat(format=pixel_format)


def test_planes_share_ffmpeg_s_memory_pitch_and_all_and_outlive_the_frame() -> None:
    """PyAV exports surfaces of a GPU and pictures of the CPU in the same way; the latter are at hand everywhere."""
    decoded = surface("nv12")
    picture = device_picture(decoded)
    assert picture.layout == "nv12" and picture.ready is None
    assert [tuple(plane.shape) for plane in picture.planes] == [(50, 66), (25, 33, 2)]
    assert [plane.data_ptr() for plane in picture.planes] == [plane.buffer_ptr for plane in decoded.planes]
    assert [plane.stride(0) for plane in picture.planes] == [plane.line_size for plane in decoded.planes]
    assert picture.planes[0].stride(0) > 66, "pitched"
    before = [plane.clone() for plane in picture.planes]
    del decoded
    others = [surface("nv12") for _ in range(20)]
    assert all(torch.equal(plane, copy) for plane, copy in zip(picture.planes, before, strict=True)) and others


def test_the_high_bits_of_ten_are_the_picture() -> None:
    ten, eight = device_picture(surface("p010le")), device_picture(surface("nv12"))
    for plane, expected in zip(ten.planes, eight.planes, strict=True):
        assert plane.dtype == torch.uint8 and plane.shape == expected.shape
        assert (plane.int() - expected.int()).abs().max() <= 1, "rounding"


def test_the_matrix_and_the_range_are_the_frame_s() -> None:
    decoded = surface("nv12")
    decoded.colorspace, decoded.color_range = 1, 2
    picture = device_picture(decoded)
    assert picture.matrix == "bt709" and picture.full_range
    assert device_picture(surface("nv12")).matrix == "bt601", "small pictures are SD"


@pytest.mark.parametrize(
    ("sw_format", "size", "reason"),
    [
        (None, (33, 27), ""),
        ("nv12", (64, 48), ""),
        ("p010le", (64, 48), ""),
        ("yuv444p", (64, 48), "PyAV does not share surfaces in yuv444p"),
        ("nv12", (64, 27), "PyAV shares the chroma of 64x27 without its last row or column"),
    ],
)
def test_surfaces_that_cannot_be_shared_are_named(sw_format: str | None, size: tuple[int, int], reason: str) -> None:
    described = SimpleNamespace(
        sw_format=SimpleNamespace(name=sw_format) if sw_format else None, width=size[0], height=size[1]
    )
    assert unusable(cast(av.VideoFrame, described)) == reason


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_surfaces_that_cannot_be_shared_leave_the_stream_to_the_software(
    demo_clip: Path, tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes until the next key frame, though FFmpeg could paint grey what pictures refer to."""
    monkeypatch.setattr("streamd.decode.nvdec.unusable", lambda surface: "too odd")
    clip = recode(demo_clip, tmp_path / "clip.mp4", codec, num_frames=40, size=(160, 144), gop=8)
    with packets_of(clip) as (source, packets):
        decoder = NvdecDecoder(Framer("gate", source.video), source.video, GPU, open_context=Opener())
        frames = feed(decoder, packets)
        assert decoder.description == "software: too odd"
    assert [frame.stamp.arrived_ns for frame in frames] == list(range(8, 40))
    assert [frame.seq for frame in frames] == list(range(32))


def on_gpu(clip: Path) -> list[str]:
    """Decode a clip with NVDEC, compare it with the software decoder, and say how its pictures are laid out."""
    with packets_of(clip) as (source, packets):
        decoder = NvdecDecoder(Framer("gate", source.video), source.video, GPU)
        frames = feed(decoder, packets)
        description = decoder.description
        decoder.close()
    assert description == "nvdec: asked for"
    assert all(frame.picture.planes[0].is_cuda and frame.picture.ready is not None for frame in frames)
    assert_same(frames, in_software(clip))
    return sorted({frame.picture.layout for frame in frames})


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    torch.zeros(1, device=GPU)  # as in the daemon, torch is first


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("codec", "b_frames", "size"),
    [("libx264", 0, (640, 360)), ("libx264", 2, (1920, 1080)), ("libx265", 2, (1280, 720))],
)
def test_frames_of_the_gpu_are_those_of_the_software_decoder(
    shared: Path, tmp_path: Path, codec: str, b_frames: int, size: tuple[int, int]
) -> None:
    scene = shared / "videos" / "pose2sim-multi-cam01.mp4"
    assert on_gpu(recode(scene, tmp_path / "clip.mp4", codec, size=size, b_frames=b_frames)) == ["nv12"]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_change_of_resolution_stays_on_the_gpu(demo_clip: Path, tmp_path: Path) -> None:
    parts = [
        recode(demo_clip, tmp_path / f"{width}.h264", "libx264", num_frames=20, size=(width, 360)).read_bytes()
        for width in (640, 480, 640)
    ]
    (tmp_path / "all.h264").write_bytes(b"".join(parts))
    assert on_gpu(tmp_path / "all.h264") == ["nv12"]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_held_pictures_neither_change_nor_starve_the_decoder(demo_clip: Path, tmp_path: Path) -> None:
    """More than NVDEC's 32 surfaces are held, and compared after the decoder has gone."""
    assert on_gpu(recode(demo_clip, tmp_path / "clip.mp4", "libx264", num_frames=100)) == ["nv12"]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_damage_that_the_transport_saw_is_marked_on_the_gpu_too(demo_clip: Path, tmp_path: Path) -> None:
    clip = recode(demo_clip, tmp_path / "clip.mp4", "libx264", num_frames=40)

    def damaged(packets: list[Packet]) -> list[Packet]:
        return [replace(packet, corrupt=index == 5) for index, packet in enumerate(packets)]

    with packets_of(clip) as (source, packets):
        expected = feed(SoftwareDecoder("gate", source.video), damaged(packets))
    with packets_of(clip) as (source, packets):
        frames = feed(NvdecDecoder(Framer("gate", source.video), source.video, GPU), damaged(packets))
    assert_same(frames, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_the_decoder_shares_torch_s_context(demo_clip: Path) -> None:
    with packets_of(demo_clip) as (source, packets):
        context = open_context(source.video, GPU)
        surfaces = [frame for packet in packets[:20] for frame in context.decode(packet.data)]
        assert {frame.format.name for frame in surfaces} == {"cuda"}
        luma = device_picture(surfaces[0]).planes[0]
        assert 0 < float(luma.float().mean()) < 255, "torch can compute with it"
