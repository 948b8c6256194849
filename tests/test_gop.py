"""A stream is cut where decoding can begin anew, whatever the codec and the container, and no packet is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.decode.gop import (
    MAX_BYTES,
    MAX_FRAMES,
    Gop,
    GopError,
    GopSplitter,
    is_idr,
    nal_length_size,
    nal_units,
    parameter_sets,
)
from streamd.messages import Packet, Stamp
from tests.clips import write_clip
from tests.decoding import packets_of, recode

AVCC = bytes.fromhex("0142c00cffe1")  # an H.264 configuration record of ISO 14496-15: lengths of 4 bytes
IDR, SLICE, SPS, PPS = b"\x65\x88", b"\x41\x9a", b"\x67\x42", b"\x68\xce"


def make_packet(*units: bytes, pts: int | None = 0, keyframe: bool = False, arrived_s: float = 0.0) -> Packet:
    """Make an access unit in Annex B."""
    data = av.Packet(b"".join(b"\0\0\0\1" + unit for unit in units))
    data.pts = pts
    stamp = Stamp(epoch=0, arrived_ns=round(arrived_s * 1e9), arrived_at=0.0, captured_at=0.0, clock="arrival")
    return Packet(cast("av.Packet[av.VideoStream]", data), stamp, keyframe, corrupt=False)


def split(path: Path, **options: Any) -> tuple[list[Packet], list[Gop]]:
    with packets_of(path) as (source, packets):
        context = source.video.codec_context
        splitter = GopSplitter(context.name, context.extradata, **options)
        gops = [gop for packet in packets for gop in splitter.feed(packet)]
        return packets, [*gops, *splitter.flush()]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts", "clip.mkv", "clip.h264"])
@pytest.mark.parametrize("b_frames", [0, 3])
def test_groups_begin_at_key_frames_and_lose_no_packet(tmp_path: Path, name: str, b_frames: int) -> None:
    packets, gops = split(write_clip(tmp_path / name, 24, gop=8, b_frames=b_frames))
    assert [len(gop.packets) for gop in gops] == [8, 8, 8]
    assert [packet for gop in gops for packet in gop.packets] == packets
    assert all(packet.keyframe == (index == 0) for gop in gops for index, packet in enumerate(gop.packets))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize(("open_gop", "lengths"), [(False, [8, 8, 8]), (True, [24])])
def test_groups_that_refer_to_the_one_before_come_as_one(
    demo_clip: Path, tmp_path: Path, codec: str, open_gop: bool, lengths: list[int]
) -> None:
    clip = recode(
        demo_clip, tmp_path / "c.mp4", codec, num_frames=24, size=(160, 144), gop=8, b_frames=2, open_gop=open_gop
    )
    packets, gops = split(clip)
    assert sum(packet.keyframe for packet in packets) == 3, "the clip has three key frames either way"
    assert [len(gop.packets) for gop in gops] == lengths


def test_key_frames_of_vp9_need_no_look_inside(tmp_path: Path) -> None:
    options = {"deadline": "realtime", "g": "8", "keyint_min": "8", "lag-in-frames": "0"}
    _, gops = split(write_clip(tmp_path / "clip.mkv", 24, codec="libvpx-vp9", options=options))
    assert [len(gop.packets) for gop in gops] == [8, 8, 8]


def test_every_picture_of_an_mjpeg_camera_is_a_group(tmp_path: Path) -> None:
    packets, gops = split(write_clip(tmp_path / "clip.avi", 3, codec="mjpeg", pixel_format="yuvj420p"))
    assert [gop.packets for gop in gops] == [(packet,) for packet in packets]


def test_key_frames_alone_are_groups_at_once(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 24, gop=8)
    with packets_of(path) as (source, packets):
        splitter = GopSplitter("h264", source.video.codec_context.extradata, keyframes_only=True)
        found = [index for index, packet in enumerate(packets) if splitter.feed(packet)]
    assert found == [0, 8, 16]


def test_a_group_that_never_ends_is_noticed_and_can_be_taken_back() -> None:
    splitter = GopSplitter("h264", None)
    packets = [make_packet(SPS, PPS, IDR, keyframe=True), *(make_packet(SLICE) for _ in range(MAX_FRAMES))]
    for packet in packets[:-1]:
        assert splitter.feed(packet) == [] and splitter.excess == ""
    splitter.feed(packets[-1])
    assert splitter.excess == f"no closed GOP within {MAX_FRAMES} frames"
    assert splitter.take_open() == packets
    assert splitter.excess == "" and splitter.flush() == []


def test_a_group_of_too_many_bytes_is_noticed() -> None:
    splitter = GopSplitter("vp9", None)
    for index in range(MAX_BYTES >> 24):
        assert splitter.excess == ""
        splitter.feed(make_packet(bytes(16 << 20), keyframe=index == 0))
    assert splitter.excess == f"no closed GOP within {MAX_BYTES >> 20} MiB"
    splitter.take_open()
    assert splitter.excess == ""


def test_a_group_that_takes_longer_than_the_stream_s_latency_is_noticed_while_it_arrives() -> None:
    splitter = GopSplitter("h264", None, max_s=1.0)
    splitter.feed(make_packet(IDR, keyframe=True, arrived_s=5.0))
    splitter.feed(make_packet(SLICE, arrived_s=5.9))
    assert splitter.excess == ""
    splitter.feed(make_packet(SLICE, arrived_s=6.1))
    assert splitter.excess == "a GOP takes longer than the 1 s of max_latency_ms"


def test_a_key_frame_that_is_no_idr_picture_begins_no_group() -> None:
    """Some cameras refresh picture by picture; their key frames are recovery points (SEI 6)."""
    splitter = GopSplitter("h264", None)
    splitter.feed(make_packet(SPS, PPS, IDR, keyframe=True))
    assert splitter.feed(make_packet(b"\x06\x06\x01", SLICE, keyframe=True)) == []
    (gop,) = splitter.feed(make_packet(IDR, keyframe=True))
    assert len(gop.packets) == 2


@pytest.mark.parametrize("times", [[0, None, 2], [0, 1, 1], [None]])
def test_packets_whose_times_do_not_say_their_order_are_an_error(times: Sequence[int | None]) -> None:
    gop = Gop(tuple(make_packet(SLICE, pts=pts) for pts in times))
    with pytest.raises(GopError, match="lack presentation times"):
        gop.in_order_of_presentation()


def test_frames_are_shown_in_the_order_of_their_times() -> None:
    gop = Gop(tuple(make_packet(SLICE, pts=pts) for pts in (0, 3, 1, 2)))
    assert [packet.data.pts for packet in gop.in_order_of_presentation()] == [0, 1, 2, 3]


UNITS = st.lists(
    st.binary(min_size=1, max_size=40).filter(lambda unit: b"\0\0\1" not in unit and unit[-1] and unit[0]), max_size=8
)


@given(units=UNITS, start_code=st.sampled_from([b"\0\0\1", b"\0\0\0\1"]))
def test_units_are_found_between_start_codes(units: list[bytes], start_code: bytes) -> None:
    assert list(nal_units(b"".join(start_code + unit for unit in units), 0)) == units


@given(units=UNITS, length_size=st.sampled_from([1, 2, 4]))
def test_units_are_found_by_their_lengths(units: list[bytes], length_size: int) -> None:
    data = b"".join(len(unit).to_bytes(length_size, "big") + unit for unit in units)
    assert list(nal_units(data, length_size)) == units


@given(data=st.binary(max_size=60), length_size=st.sampled_from([0, 1, 2, 4]))
def test_noise_in_place_of_units_raises_nothing(data: bytes, length_size: int) -> None:
    for unit in nal_units(data, length_size):
        is_idr(unit, "h264"), is_idr(unit, "hevc")


@pytest.mark.parametrize(
    ("codec", "extradata", "size"),
    [
        ("h264", None, 0),
        ("h264", b"\0\0\0\1" + SPS, 0),
        ("h264", AVCC, 4),
        ("h264", AVCC[:4] + b"\xfd" + AVCC[5:], 2),
        ("h264", AVCC[:3], 0),
        ("hevc", b"\1" + bytes(20) + b"\xf3" + bytes(3), 4),
        ("vp9", b"\1\2\3", 0),
    ],
)
def test_the_container_s_header_says_how_units_are_framed(codec: str, extradata: bytes | None, size: int) -> None:
    assert nal_length_size(codec, extradata) == size


def test_parameter_sets_are_complete_or_none() -> None:
    vps, sps, pps, idr = b"\x40\1", b"\x42\1", b"\x44\1", b"\x26\1"
    assert parameter_sets([b"\x09\xf0", SPS, PPS, IDR], "h264") == [SPS, PPS]
    assert parameter_sets([SPS, IDR], "h264") == []
    assert parameter_sets([vps, sps, pps, idr], "hevc") == [vps, sps, pps]
    assert parameter_sets([sps, pps, idr], "hevc") == []
    assert is_idr(idr, "hevc") and not is_idr(b"\x2a\1", "hevc"), "a CRA picture may be followed by such as refer back"
