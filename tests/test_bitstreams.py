"""Whatever a camera sends over RTSP becomes clean frames in their order, or a state that says why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clips import write_clip
from tests.decoding import in_software, luma_of, recode
from tests.rtsp_faults import Answers, Bitstream, Camera, Delivery
from tests.watching import Seen, assert_clean, shown, watch


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Make small clips whose pictures say which frame they are; 25 frames/s, a key frame each second."""
    folder = tmp_path_factory.mktemp("clips")
    hevc = {"x265-params": "log-level=none:bframes=0:frame-threads=1:pools=none:keyint=25:min-keyint=25:scenecut=0"}
    return {
        "h264": write_clip(folder / "h264.mp4", 50, gop=25),
        "large": write_clip(folder / "large.mp4", 50, gop=25, size=(128, 96)),
        "b-frames": write_clip(
            folder / "b.mp4", 50, gop=25, b_frames=3, options={"x264-params": "b-adapt=0:b-pyramid=normal:open-gop=0"}
        ),
        "hevc": write_clip(folder / "hevc.mp4", 50, codec="libx265", options=hevc),
        "mjpeg": write_clip(folder / "mjpeg.avi", 50, codec="mjpeg", pixel_format="yuvj420p", options={"q:v": "2"}),
        "10 bit": write_clip(folder / "10.mp4", 50, gop=25, pixel_format="yuv420p10le"),
        "4:2:2": write_clip(folder / "422.mp4", 50, gop=25, pixel_format="yuv422p"),
        "interlaced": write_clip(folder / "i.mp4", 50, gop=25, options={"x264-params": "interlaced=1"}),
        "long group": write_clip(folder / "long.mp4", 300, gop=300),
        "10 fps": write_clip(folder / "10fps.mp4", 20, gop=10, fps=10),
        "1 fps": write_clip(folder / "1.mp4", 20, gop=5, fps=1),
    }


def test_ten_seconds_without_a_key_frame_are_waited_for_and_nothing_grey_is_handed_over(
    clips: Mapping[str, Path],
) -> None:
    faults = Bitstream(start_at=3, no_keyframe_s=10, speed=8)
    seen = watch(Camera(clips["h264"], bitstream=faults), 30, stall_timeout_s=0.5)
    assert_clean(seen)
    assert seen.states == ["connecting", "waiting_keyframe", "running", "ended"]
    assert seen.statuses[2].at - seen.statuses[1].at > 0.9, "which is less than ten seconds at 8 times the speed"
    assert seen.frames[0].keyframe and seen.last.corrupt == 0


@pytest.mark.parametrize("sets", ["sdp", "band"])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_parameter_sets_may_come_in_the_description_alone_or_in_band_alone(
    clips: Mapping[str, Path], codec: str, sets: Any
) -> None:
    seen = watch(Camera(clips[codec], bitstream=Bitstream(parameter_sets=sets, speed=4)), 30)
    assert_clean(seen)
    assert seen.last.corrupt == seen.last.dropped == 0


@pytest.mark.parametrize("with_keyframe", [True, False])
def test_a_resolution_that_changes_in_mid_stream_goes_on_with_the_new_size(
    clips: Mapping[str, Path], with_keyframe: bool
) -> None:
    faults = Bitstream(then=clips["large"], then_after=20, then_with_keyframe=with_keyframe, speed=4)
    seen = watch(Camera(clips["h264"], bitstream=faults), 60)
    assert_clean(seen)
    sizes = [(frame.width, frame.height) for frame in seen.frames]
    assert sizes == [(64, 48)] * 20 + [(128, 96)] * 40
    assert all(frame.picture.planes[0].shape == (frame.height, frame.width) for frame in seen.frames)
    assert seen.frames[20].keyframe and seen.states.count("running") == 1
    assert seen.last.reconnects == 0


def test_a_camera_that_comes_back_with_another_codec_is_decoded_again(clips: Mapping[str, Path]) -> None:
    faults = Bitstream(speed=4)
    ends = Delivery(end_after=20)
    cameras = [Camera(clips[codec], delivery=ends, bitstream=faults) for codec in ("h264", "hevc", "mjpeg", "h264")]
    seen = watch(cameras, until=lambda seen: seen.frames[-1].stamp.epoch == 3)
    assert_clean(seen)
    assert seen.epochs == [0, 1, 2, 3]
    assert all(sum(frame.stamp.epoch == epoch for frame in seen.frames) >= 18 for epoch in range(3))
    assert [frame.seq for frame in seen.frames] == list(range(len(seen.frames)))


@pytest.mark.parametrize(
    ("clip", "faults", "step_s"),
    [
        ("1 fps", Bitstream(claimed_fps=25), 1.0),
        ("h264", Bitstream(claimed_fps=1), 0.04),
        ("h264", Bitstream(claimed_fps=1000), 0.04),
        ("h264", Bitstream(irregular=0.9), 0.04),
    ],
    ids=["1 fps that claims 25", "25 fps that claims 1", "25 fps that claims 1000", "variable"],
)
def test_a_rate_is_what_the_time_stamps_say_and_not_what_is_claimed(
    clips: Mapping[str, Path], clip: str, faults: Bitstream, step_s: float
) -> None:
    seen = watch(Camera(clips[clip], bitstream=faults), 5 if step_s == 1 else 40)
    assert_clean(seen)
    steps = np.diff([frame.pts_s for frame in seen.frames])
    assert np.mean(steps) == pytest.approx(step_s, rel=0.1)
    if faults.irregular:
        assert np.std(steps) > 0.1 * step_s
    else:
        assert steps == pytest.approx(step_s, rel=0.01)
    assert seen.last.dropped == 0


def test_a_rate_that_changes_in_mid_stream_costs_no_frame(clips: Mapping[str, Path]) -> None:
    faults = Bitstream(then=clips["10 fps"], then_after=25)
    seen = watch(Camera(clips["h264"], bitstream=faults), 40)
    assert_clean(seen)
    steps = np.diff([frame.pts_s for frame in seen.frames])
    assert steps == pytest.approx([0.04] * 25 + [0.1] * 14, abs=0.001)
    assert (seen.epochs, seen.last.dropped, seen.last.reconnects) == ([0], 0, 0)


@pytest.mark.parametrize("faults", [Bitstream(claimed_fps=5, speed=2), Bitstream(claimed_fps=500, speed=2)])
def test_a_cap_on_frames_counts_those_that_come(clips: Mapping[str, Path], faults: Bitstream) -> None:
    """The clip's 25 frames/s at twice the speed are 50."""
    seen = watch(Camera(clips["h264"], bitstream=faults), 20, fps=10)
    assert np.diff([frame.pts_s for frame in seen.frames]) == pytest.approx(0.1, abs=0.021)


def test_b_frames_come_in_order_and_none_is_lost(clips: Mapping[str, Path]) -> None:
    seen = watch(Camera(clips["b-frames"], bitstream=Bitstream(speed=2)), 60)
    assert_clean(seen)
    assert np.diff([frame.pts_s for frame in seen.frames]) == pytest.approx(0.02, abs=0.001)
    indices = [shown(frame) for frame in seen.frames]
    assert indices == [index % 50 % 30 for index in range(60)]
    assert seen.last.dropped == 0


@pytest.mark.parametrize("clip", ["mjpeg", "10 bit", "4:2:2", "interlaced", "long group"])
def test_unusual_pictures_are_decoded(clips: Mapping[str, Path], clip: str) -> None:
    faults = Bitstream(speed=4 if clip != "long group" else 20)
    seen = watch(Camera(clips[clip], bitstream=faults), 30 if clip != "long group" else 290)
    assert_clean(seen)
    assert seen.last.dropped == 0


def test_sound_and_metadata_beside_the_video_are_ignored(clips: Mapping[str, Path]) -> None:
    seen = watch(Camera(clips["h264"], answers=Answers(tracks=("audio", "metadata"))), 30)
    assert_clean(seen)
    assert seen.last.dropped == 0


def test_a_codec_that_nothing_here_decodes_is_said_to_be_unsupported(clips: Mapping[str, Path]) -> None:
    strange = Camera(clips["h264"], answers=Answers(sdp=lambda sdp: sdp.replace(b"H264/90000", b"X-NEW/90000")))
    seen = watch([strange, Camera(clips["h264"])], 1)
    assert seen.states[:2] == ["connecting", "unsupported"] and seen.states[-2] == "running"


def test_damage_to_h265_is_seen_where_the_camera_sends_the_pictures_hashes(demo_clip: Path, tmp_path: Path) -> None:
    """FFmpeg's decoder itself takes almost any H.265 for good."""
    clip = recode(demo_clip, tmp_path / "hashed.mp4", "libx265", size=(320, 240), hashes=True)
    faults = Bitstream(corrupt_every=33, speed=3)
    assert_nothing_damaged(watch(Camera(clip, bitstream=faults), until=lambda seen: seen.frames[-1].pts_s > 1.5), clip)


@pytest.fixture(scope="module")
def street(demo_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encode a street scene small, with a key frame every 20."""
    return recode(demo_clip, tmp_path_factory.mktemp("street") / "h264.mp4", "libx264", size=(320, 240))


@pytest.mark.parametrize("faults", [Bitstream(speed=3, corrupt_every=33), Bitstream(speed=3, truncate_every=33)])
def test_after_damage_nothing_is_handed_over_before_the_next_key_frame(street: Path, faults: Bitstream) -> None:
    seen = watch(Camera(street, bitstream=faults), until=lambda seen: seen.frames[-1].pts_s > 2.5)
    assert_nothing_damaged(seen, street)


def assert_nothing_damaged(seen: Seen, clip: Path) -> None:
    """Check frames of a clip, at three times its speed, against the clip, of which each 33rd was damaged."""
    reference = [luma_of(frame.picture) for frame in in_software(clip)]
    numbers = [round(frame.pts_s * 75) for frame in seen.frames]
    for number, frame in zip(numbers, seen.frames, strict=True):
        assert np.array_equal(luma_of(frame.picture), reference[number % 60]), f"picture {number} is not the camera's"
    damaged = [number for number in range(numbers[-1]) if number % 33 == 32]
    spoiled = {n for first in damaged for n in range(first, first - first % 20 + 20)}
    assert set(range(numbers[-1])) - {*numbers} == {n for n in spoiled if n < numbers[-1]}
    assert seen.last.corrupt > 0 and seen.last.reconnects == 0
