"""DALI's decoder gives the frames that the software decoder gives, and what DALI cannot do is done without it."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.stream import VideoStream

from streamd.decode import Decoder, dali
from streamd.decode.dali import DaliDecoder, GopMode, as_bt709
from streamd.decode.dali_service import DaliRunner, DaliService, Kind
from streamd.decode.frames import Framer
from streamd.decode.software import SoftwareDecoder
from streamd.messages import Frame, Packet
from streamd.sources import Source, SourceOptions, Timeline, open_source
from tests.clips import turn, write_clip
from tests.conftest import StartRtsp
from tests.decoding import assert_same, feed, in_software, need_dali, packets_of, recode

LIVE = GopMode(is_live=True)
FILE = GopMode()
CPU = torch.device("cpu")


class FakeDali:
    """Decode with FFmpeg to RGB by BT.601 whatever the stream says, as DALI does; fail for the chunks of a list."""

    max_batch = 4

    def __init__(self, fails: Sequence[int] = ()) -> None:
        self._fails = fails
        self._seen: dict[bytes, int] = {}  # each chunk's index, in the order in which they came
        self.gate = threading.Event()
        self.gate.set()

    @property
    def num_chunks(self) -> int:
        return len(self._seen)

    def decode(self, samples: Sequence[bytes]) -> list[torch.Tensor]:
        assert self.gate.wait(10)
        if any(self._seen.setdefault(sample, len(self._seen)) in self._fails for sample in samples):
            raise RuntimeError("encountered:\nno memory")
        return [_rgb(sample) for sample in samples]


class ForgetfulDali(FakeDali):
    """Lose a frame of each chunk."""

    def decode(self, samples: Sequence[bytes]) -> list[torch.Tensor]:
        return [frames[1:] for frames in super().decode(samples)]


def _rgb(sample: bytes) -> torch.Tensor:
    with av.open(io.BytesIO(sample), "r") as file:
        frames = [
            frame.reformat(format="rgb24", src_colorspace="itu601").to_ndarray() for frame in file.decode(video=0)
        ]
    return torch.from_numpy(np.stack(frames))


@dataclass
class Bench:
    """A decoder under test, and what it asked for."""

    decoder: DaliDecoder
    runner: FakeDali
    heirs: list[str] = field(default_factory=list)  # the reasons why one was wanted


@contextmanager
def bench(
    source: Source, mode: GopMode = FILE, runner: FakeDali | None = None, max_wait_s: float = 0.0
) -> Iterator[Bench]:
    runner = runner or FakeDali()
    reasons: list[str] = []

    def make_heir(framer: Framer, reason: str) -> Decoder:
        reasons.append(reason)
        return SoftwareDecoder(framer.stream, source.video, reason=reason, framer=framer)

    with closing(DaliService("dali test", runner, max_wait_s)) as service:
        decoder = DaliDecoder(Framer("gate", source.video), source.video, service, mode, make_heir, "a test")
        with closing(decoder):
            yield Bench(decoder, runner, reasons)


def zerolatency(folder: Path, num_frames: int = 24, **options: int) -> Path:
    return write_clip(folder / "clip.mp4", num_frames, options={"tune": "zerolatency"}, **{"gop": 8, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [FILE, LIVE], ids=["file", "live"])
@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 0), ("libx264", 2), ("libx265", 2), ("mjpeg", 0)])
@pytest.mark.parametrize("size", [(320, 180), (256, 720)], ids=["bt601", "bt709"])
def test_frames_are_those_of_the_software_decoder(
    demo_clip: Path, tmp_path: Path, codec: str, b_frames: int, mode: GopMode, size: tuple[int, int]
) -> None:
    name = "clip.mkv" if codec == "mjpeg" else "clip.mp4"
    clip = recode(demo_clip, tmp_path / name, codec, num_frames=20, size=size, gop=8, b_frames=b_frames)
    with packets_of(clip) as (source, packets), bench(source, mode) as test:
        frames = feed(test.decoder, packets)
        assert test.decoder.description == "dali: a test" and test.heirs == []
        assert test.runner.num_chunks == (20 if codec == "mjpeg" else 3)
    assert all(frame.picture.layout == "rgb" for frame in frames)
    assert_same(frames, in_software(clip))


@pytest.mark.parametrize("mode", [FILE, LIVE], ids=["file", "live"])
def test_a_resolution_that_changes_in_mid_stream_changes_the_frames(tmp_path: Path, mode: GopMode) -> None:
    small = write_clip(tmp_path / "small.h264", 10, size=(64, 48)).read_bytes()
    large = write_clip(tmp_path / "large.h264", 10, size=(128, 96)).read_bytes()
    (tmp_path / "both.h264").write_bytes(small + large + small)
    with packets_of(tmp_path / "both.h264") as (source, packets), bench(source, mode) as test:
        timed = [replace(packet, data=_at(packet.data, index)) for index, packet in enumerate(packets)]
        frames = feed(test.decoder, timed)
        assert test.heirs == [] and test.runner.num_chunks == 4, "the last two are the first two again"
    assert [(frame.width, frame.height) for frame in frames] == [(64, 48)] * 10 + [(128, 96)] * 10 + [(64, 48)] * 10


def _at(data: av.Packet[VideoStream], index: int) -> av.Packet[VideoStream]:
    """Give a bare stream's packet the presentation time that a camera's has."""
    data.pts = index
    return data


@pytest.mark.parametrize("degrees", [90, 180])
def test_turned_pictures_are_marked_as_by_the_software_decoder(tmp_path: Path, degrees: int) -> None:
    clip = turn(write_clip(tmp_path / "a.mp4", 8, gop=4), tmp_path / "turned.mp4", degrees)
    with packets_of(clip) as (source, packets), bench(source) as test:
        assert_same(feed(test.decoder, packets), in_software(clip))


def test_damaged_packets_are_marked_as_by_the_software_decoder_and_dali_is_not_blamed(tmp_path: Path) -> None:
    clip = zerolatency(tmp_path, 40)

    def damaged(packets: list[Packet]) -> list[Packet]:
        return [replace(packet, corrupt=index in (3, 11, 19, 27)) for index, packet in enumerate(packets)]

    with packets_of(clip) as (source, packets):
        expected = feed(SoftwareDecoder("gate", source.video), damaged(packets))
    with packets_of(clip) as (source, packets), bench(source) as test:
        frames = feed(test.decoder, damaged(packets))
        assert test.heirs == [] and test.runner.num_chunks == 1
    assert sum(frame.corrupt for frame in frames) == 4 * 5
    assert_same(frames, expected)


@pytest.mark.parametrize("fails", [[0], [1], [0, 1], [0, 2, 4], [1, 3]])
def test_groups_that_dali_cannot_decode_are_decoded_in_software(tmp_path: Path, fails: list[int]) -> None:
    clip = zerolatency(tmp_path, 80, b_frames=2)
    with packets_of(clip) as (source, packets), bench(source, runner=FakeDali(fails)) as test:
        frames = feed(test.decoder, packets)
        assert test.heirs == [], "fewer than three in a row"
    layouts = ["yuv" if index // 8 in fails else "rgb" for index in range(80)]
    assert [frame.picture.layout for frame in frames] == layouts
    assert_same(frames, in_software(clip))


def test_a_chunk_with_too_few_frames_is_decoded_in_software(tmp_path: Path) -> None:
    clip = zerolatency(tmp_path, 16)
    with packets_of(clip) as (source, packets), bench(source, runner=ForgetfulDali()) as test:
        frames = feed(test.decoder, packets)
    assert [frame.picture.layout for frame in frames] == ["yuv"] * 16
    assert_same(frames, in_software(clip))


@pytest.mark.parametrize("mode", [FILE, LIVE], ids=["file", "live"])
def test_after_several_failures_in_a_row_an_heir_goes_on_and_no_frame_is_lost(tmp_path: Path, mode: GopMode) -> None:
    clip = zerolatency(tmp_path, 80)
    with packets_of(clip) as (source, packets), bench(source, mode, FakeDali([1, 2, 3])) as test:
        frames = feed(test.decoder, packets)
        assert test.heirs == ["DALI failed 3 times in a row: DALI cannot decode it: no memory"]
        assert test.decoder.description == f"software: {test.heirs[0]}"
        assert test.runner.num_chunks < 10, "DALI is not asked again"
    assert_same(frames, in_software(clip))


def test_a_format_that_dali_does_not_decode_goes_to_the_heir(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 40, gop=4, pixel_format="yuv422p")
    with packets_of(clip) as (source, packets), bench(source) as test:
        frames = feed(test.decoder, packets)
        assert test.heirs == ["DALI failed 3 times in a row: yuv422p video is not decoded by DALI"]
        assert test.runner.num_chunks == 0
    assert_same(frames, in_software(clip))


def test_groups_too_large_for_the_memory_go_to_the_heir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "_MAX_CHUNK_BYTES", 8 * 64 * 48 * 3 - 1)
    clip = zerolatency(tmp_path, 40)
    with packets_of(clip) as (source, packets), bench(source) as test:
        frames = feed(test.decoder, packets)
        assert "decoded is too large" in test.heirs[0] and test.runner.num_chunks == 0
    assert_same(frames, in_software(clip))


def test_a_gpu_without_memory_left_costs_no_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(rgb: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dali, "as_bt709", fail)
    clip = write_clip(tmp_path / "a.mp4", 16, gop=8, size=(64, 720))
    with packets_of(clip) as (source, packets), bench(source) as test:
        assert_same(feed(test.decoder, packets), in_software(clip))


def test_a_group_longer_than_the_stream_s_latency_goes_to_the_heir_whole(tmp_path: Path) -> None:
    clip = zerolatency(tmp_path, 48, gop=24)
    with packets_of(clip) as (source, packets), bench(source, GopMode(is_live=True, max_gop_s=0.4)) as test:
        numbered = [
            replace(packet, stamp=replace(packet.stamp, arrived_ns=index * 40_000_000))
            for index, packet in enumerate(packets)
        ]
        frames: list[Frame] = []
        num_frames_after = []
        for packet in numbered:
            frames += test.decoder.decode(packet)
            num_frames_after.append(len(frames))
        frames += test.decoder.flush()
        assert test.heirs == ["a GOP takes longer than the 0.4 s of max_latency_ms"]
    assert num_frames_after[:13] == [0] * 11 + [12, 13], "all that was begun comes at once, and then each as it comes"
    assert [frame.seq for frame in frames] == list(range(48)) and not any(frame.corrupt for frame in frames)


def test_dali_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "_DEADLINE_S", 0.05)
    clip, runner = zerolatency(tmp_path, 32), FakeDali()
    runner.gate.clear()
    with packets_of(clip) as (source, packets), bench(source, runner=runner) as test:
        frames = feed(test.decoder, packets)
        runner.gate.set()
        assert test.heirs == ["DALI gave no answer within 0.05 s"]
    assert_same(frames, in_software(clip))


def test_a_camera_s_frames_leave_at_the_pace_of_its_packets(tmp_path: Path) -> None:
    clip = zerolatency(tmp_path, 64)
    with packets_of(clip) as (source, packets), bench(source, LIVE) as test:
        num_frames = []
        for packet in packets:
            num_frames.append(len(list(test.decoder.decode(packet))))
            settle(test)
    assert num_frames[:9] == [0] * 9, "the first group comes when it is whole and decoded"
    assert num_frames[9:] == [1] * 55


def test_a_camera_s_frames_do_not_fall_behind_where_dali_was_late(tmp_path: Path) -> None:
    clip, runner = zerolatency(tmp_path, 64), FakeDali()
    with packets_of(clip) as (source, packets), bench(source, LIVE, runner) as test:
        runner.gate.clear()
        late = [len(list(test.decoder.decode(packet))) for packet in packets[:24]]
        assert late == [0] * 24
        runner.gate.set()
        settle(test)
        arrived = 24
        for packet in packets[24:40]:
            arrived += 1
            last = [frame.stamp.arrived_ns for frame in test.decoder.decode(packet)][-1]
            settle(test)
        assert arrived - last <= 8 + 3, "one group, and what it takes to gather and decode it"


def settle(test: Bench) -> None:
    """Wait until DALI has done all that was asked."""
    for pending in test.decoder._pending:
        if pending.decoded is not None:
            pending.decoded.exception(10)


def test_an_mjpeg_camera_s_frame_comes_with_its_packet(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mkv", 5, codec="mjpeg", pixel_format="yuvj420p")
    with packets_of(clip) as (source, packets), bench(source, LIVE) as test:
        assert [len(list(test.decoder.decode(packet))) for packet in packets] == [1] * 5


def test_key_frames_alone_come_with_their_packets(tmp_path: Path) -> None:
    mode = GopMode(is_live=True, keyframes_only=True)
    with packets_of(zerolatency(tmp_path, 24)) as (source, packets), bench(source, mode) as test:
        num_frames = [len(list(test.decoder.decode(packet))) for packet in packets]
    assert [index for index, num in enumerate(num_frames) if num] == [0, 8, 16]


def test_a_file_is_decoded_ahead_and_no_further_than_a_few_groups(tmp_path: Path) -> None:
    clip, runner = zerolatency(tmp_path, 64), FakeDali()
    runner.gate.clear()
    with packets_of(clip) as (source, packets), bench(source, FILE, runner) as test:
        for packet in packets[:17]:
            assert list(test.decoder.decode(packet)) == []
        assert len(test.decoder._pending) == 2, "a third waits for the first"
        runner.gate.set()


def test_closing_takes_back_what_was_not_begun(tmp_path: Path) -> None:
    clip, runner = zerolatency(tmp_path, 24), FakeDali()
    runner.gate.clear()
    with packets_of(clip) as (source, packets):
        with bench(source, FILE, runner, max_wait_s=0.0) as test:
            for packet in packets[:17]:
                list(test.decoder.decode(packet))
            test.decoder.close()
            runner.gate.set()
        assert runner.num_chunks <= 1


@pytest.mark.parametrize("full_range", [False, True])
def test_colours_that_were_made_with_the_wrong_matrix_are_mended(full_range: bool) -> None:
    rng = np.random.default_rng(0)
    ycbcr = rng.integers([60, 90, 90], [190, 166, 166], (64, 64, 3)).astype(np.float64)  # nothing is clamped

    def to_rgb(red: float, blue: float) -> np.ndarray:
        luma, cb, cr = np.moveaxis(ycbcr - [0 if full_range else 16, 128, 128], -1, 0)
        if not full_range:
            luma, cb, cr = luma * 255 / 219, cb * 255 / 224, cr * 255 / 224
        r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
        return np.stack([r, (luma - red * r - blue * b) / (1 - red - blue), b], axis=-1).round().clip(0, 255)

    wrong = torch.from_numpy(to_rgb(0.299, 0.114).astype(np.uint8))
    right = to_rgb(0.2126, 0.0722)
    difference = np.abs(as_bt709(wrong).numpy() - right)
    assert difference.max() <= 2 and difference.mean() < 0.5
    assert np.abs(wrong.numpy() - right).max() > 10, "there was something to mend"


def decode_with(device: torch.device, clip: Path) -> list[str]:
    """Decode a clip with DALI itself, compare it with the software decoder, and say who decoded it."""
    kind: Kind = "images" if clip.suffix == ".mkv" and "mjpeg" in clip.stem else "videos"
    heirs: list[str] = []

    def make_heir(framer: Framer, reason: str) -> Decoder:
        heirs.append(reason)
        return SoftwareDecoder(framer.stream, source.video, reason=reason, framer=framer)

    with packets_of(clip) as (source, packets), closing(DaliService("dali", DaliRunner(kind, device))) as service:
        decoder = DaliDecoder(Framer("gate", source.video), source.video, service, FILE, make_heir)
        with closing(decoder):
            frames = feed(decoder, packets)
    assert all(frame.picture.planes[0].device.type == device.type for frame in frames)
    assert all((frame.picture.ready is None) == (device.type == "cpu") for frame in frames)
    assert_same(frames, in_software(clip))
    return [*{frame.picture.layout for frame in frames}, *heirs]


def test_dali_on_the_cpu_gives_the_frames_of_the_software_decoder(demo_clip: Path, tmp_path: Path) -> None:
    """MJPEG, because DALI's CPU build decodes neither H.264 nor H.265."""
    need_dali()
    clip = recode(demo_clip, tmp_path / "mjpeg.mkv", "mjpeg", num_frames=20, size=(320, 180))
    assert decode_with(CPU, clip) == ["rgb"]


def test_dali_on_the_cpu_gives_the_frames_of_vp9(tmp_path: Path) -> None:
    need_dali()
    options = {"deadline": "realtime", "g": "8", "keyint_min": "8", "lag-in-frames": "0"}
    assert decode_with(CPU, write_clip(tmp_path / "a.mkv", 24, codec="libvpx-vp9", options=options)) == ["rgb"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("codec", "b_frames", "size"),
    [
        ("libx264", 0, (640, 360)),
        ("libx264", 2, (1920, 1080)),  # BT.709, and a coded height of 1088
        ("libx265", 2, (1280, 720)),
        ("mjpeg", 0, (640, 360)),
    ],
)
def test_dali_on_the_gpu_gives_the_frames_of_the_software_decoder(
    shared: Path, tmp_path: Path, codec: str, b_frames: int, size: tuple[int, int]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    need_dali()
    name = "mjpeg.mkv" if codec == "mjpeg" else "clip.mp4"
    scene = shared / "videos" / "pose2sim-multi-cam01.mp4"
    clip = recode(scene, tmp_path / name, codec, size=size, b_frames=b_frames)
    assert decode_with(torch.device("cuda", 0), clip) == ["rgb"]


def test_a_camera_s_groups_are_decoded_from_rtsp_alone(rtsp_server: StartRtsp, demo_clip: Path) -> None:
    """RTSP gives no header: the parameter sets come in the SDP or among the pictures, and packets have no lengths."""
    server = rtsp_server({"gate": demo_clip})
    with closing(open_source(SourceOptions(server.url("gate")), Timeline())) as source:
        packets = list(itertools.islice(source.packets(), 50))
        expected = feed(SoftwareDecoder("gate", source.video), packets)
        source.video.codec_context.flush_buffers()
        with bench(source, LIVE) as test:
            frames = feed(test.decoder, packets)
            assert test.heirs == [] and test.runner.num_chunks == 3
    assert_same(frames, expected)
