"""Pieces of RTP packets become access units, at once where the camera allows it, and never wrongly for long."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.sources import SourceOptions, Timeline, open_source
from streamd.sources.access_units import START_CODE, AccessUnit, AccessUnits, Codec
from tests.conftest import StartRtsp

FRAGMENT = 100  # bytes of payload in one piece
AUD, SPS, IDR, SLICE, FILLER = b"\x09\xf0", b"\x67\x42\x00", b"\x65", b"\x41", b"\x0c\xff"


def pieces_of(unit: bytes, fragment: int = FRAGMENT) -> list[bytes]:
    """Cut a NAL unit as RTP does and FFmpeg gives it: the head stands in the first piece alone."""
    if len(unit) <= fragment + 2:
        return [START_CODE + unit]
    head, payload = unit[:1], unit[1:]
    cuts = [payload[i : i + fragment] for i in range(0, len(payload), fragment)]
    return [START_CODE + head + cuts[0], *cuts[1:]]


def a_slice(size: int, head: bytes = SLICE) -> bytes:
    return head + bytes(1 + i % 250 for i in range(size))  # no zeros, so no start code within


def a_picture(*units: bytes) -> list[bytes]:
    return [piece for unit in units for piece in pieces_of(unit)]


def play(units: AccessUnits, pictures: list[list[bytes]], first_pts: int = 0) -> list[tuple[int, AccessUnit]]:
    """Feed pictures one after the other; return each unit with the number of pictures begun when it came."""
    out = []
    for index, pieces in enumerate(pictures):
        for piece in pieces:
            out += [(index, unit) for unit in units.feed(piece, first_pts + index)]
    return out


def test_a_picture_is_let_go_at_its_last_piece_once_the_camera_is_known() -> None:
    units = AccessUnits("h264")
    pictures = [a_picture(AUD, a_slice(250), a_slice(330))] * 60
    out = play(units, pictures)
    assert units.ends_early
    assert [unit.data for _, unit in out] == [b"".join(pieces) for pieces in pictures[: len(out)]]
    waited = [began - (unit.pts or 0) for began, unit in out]
    assert waited[0] == 1 and waited[-1] == 0
    assert len(out) == 60 and not any(unit.corrupt for _, unit in out)


def test_a_last_piece_of_full_length_waits_for_the_next_picture() -> None:
    units = AccessUnits("h264")
    play(units, [a_picture(a_slice(250))] * 40)
    full = a_picture(a_slice(3 * FRAGMENT))
    assert play(units, [full], first_pts=100) == []
    ((_, unit), *_) = play(units, [a_picture(a_slice(250))], first_pts=101)
    assert unit.data == b"".join(full) and not unit.corrupt


def test_a_camera_that_adds_something_behind_its_slices_is_never_cut_off() -> None:
    units = AccessUnits("h264")
    pictures = [a_picture(a_slice(250), FILLER)] * 100
    out = play(units, pictures)
    assert not units.ends_early
    assert {unit.data for _, unit in out} == {b"".join(pictures[0])}


def test_a_camera_that_cuts_evenly_is_never_cut_off() -> None:
    def even(size: int) -> list[bytes]:
        return pieces_of(a_slice(size), fragment=size // 4 + 1)

    units = AccessUnits("h264")
    pictures = [even(300 + 37 * (index % 7)) for index in range(100)]
    out = play(units, pictures)
    assert [unit.data for _, unit in out] == [b"".join(pieces) for pieces in pictures[: len(out)]]
    assert not any(unit.corrupt for _, unit in out)


def test_a_camera_that_changes_its_ways_is_caught_and_the_picture_marked() -> None:
    units = AccessUnits("h264")
    one_slice, two_slices = a_picture(a_slice(250)), a_picture(a_slice(250), a_slice(250))
    play(units, [one_slice] * 40)
    out = play(units, [two_slices] * 3, first_pts=100)
    assert out[0][1].data == b"".join(one_slice), "it was let go after its first slice"
    assert out[1][1].corrupt, "and what followed says that something is missing"
    assert out[-1][1].data == b"".join(two_slices) and not out[-1][1].corrupt


def test_after_three_mistakes_the_camera_is_trusted_no_more() -> None:
    units = AccessUnits("h264")
    one_slice, two_slices = a_picture(a_slice(250)), a_picture(a_slice(250), a_slice(250))
    for turn in range(3):
        play(units, [one_slice] * 40, first_pts=1000 * turn)
        play(units, [two_slices] * 2, first_pts=1000 * turn + 500)
    play(units, [one_slice] * 100, first_pts=5000)
    assert not units.ends_early


@pytest.mark.parametrize(
    ("codec", "head", "keyframe"),
    [
        ("h264", IDR, True),
        ("h264", SLICE, False),
        ("h264", b"\x06\x06\x01", True),  # SEI: recovery point
        ("h264", b"\x06\x05\x01", False),
        ("hevc", b"\x26\x01", True),  # IDR_W_RADL
        ("hevc", b"\x2a\x01", True),  # CRA
        ("hevc", b"\x02\x01", False),  # TRAIL_R
    ],
)
def test_key_frames_are_recognised(codec: str, head: bytes, keyframe: bool) -> None:
    units = AccessUnits(codec)  # type: ignore[arg-type]
    ((_, unit),) = play(units, [[START_CODE + head + b"\x11\x22"], [START_CODE + SLICE]])
    assert unit.keyframe is keyframe


def test_several_units_in_one_packet_are_all_seen() -> None:
    units = AccessUnits("h264")
    ((_, unit),) = play(units, [[START_CODE + SPS + START_CODE + IDR + b"\x11"], [START_CODE + SLICE]])
    assert unit.keyframe


def test_a_picture_without_end_does_not_fill_the_memory() -> None:
    units = AccessUnits("h264")
    for index in range(40):
        assert not list(units.feed(bytes([0x11 + index]) * (1 << 20), 0))
    ((_, unit),) = play(units, [[START_CODE + SLICE]], first_pts=1)
    assert unit.corrupt and len(unit.data) <= 16 << 20


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from([AUD, SPS, IDR, SLICE, FILLER]), st.integers(0, 450)), min_size=1)),
    st.booleans(),
)
def test_no_byte_is_lost_repeated_or_moved(pictures: list[list[tuple[bytes, int]]], known: bool) -> None:
    units = AccessUnits("h264")
    if known:
        play(units, [a_picture(a_slice(250))] * 40)
    fed = [a_picture(*(a_slice(size, head) for head, size in picture)) for picture in pictures]
    out = play(units, [*fed, [START_CODE + SLICE]], first_pts=100)
    everything = b"".join(piece for pieces in fed for piece in pieces)
    got = b"".join(unit.data for _, unit in out)
    assert got in (everything, everything + START_CODE + SLICE)


def test_a_real_camera_s_pictures_come_before_the_next_one_begins(
    demo_clip: Path, rtsp_server: StartRtsp, tmp_path: Path
) -> None:
    server = rtsp_server({"cam": demo_clip}, log_sent=tmp_path / "sent.jsonl")
    source = open_source(SourceOptions(server.url("cam")), Timeline())
    arrived = []
    for packet in source.packets():
        assert packet.data.pts is not None
        arrived.append((packet.data.pts / 90_000, time.time()))
        if len(arrived) == 60:
            break
    source.close()
    sent = {round(unit["pts_s"], 1): unit["sent_at"] for unit in server.sent()}
    delays = sorted(at - sent[round(pts_s, 1)] for pts_s, at in arrived[40:])
    assert delays[len(delays) // 2] < 0.06, f"one frame time is 0.1 s: {delays}"


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("codec", "first", "next_one"),
    [
        ("h264", bytes([0x65, 0x88]), bytes([0x41, 0x9A])),
        ("hevc", bytes([0x26, 1, 0xAF]), bytes([0x02, 1, 0xD0])),
    ],
)
def test_two_pictures_with_one_time_stay_two(codec: Codec, first: bytes, next_one: bytes, known: bool) -> None:
    """A picture's first slice says that it begins at the picture's first block."""

    def pieces(head: bytes, filling: bytes) -> list[bytes]:
        return [START_CODE + head + filling * 1000, filling * 1000, filling * 900]

    units = AccessUnits(codec)
    play(units, [pieces(first, b"a")] * (40 if known else 1))
    assert units.ends_early == known
    fed = [unit for piece in (*pieces(first, b"b"), *pieces(next_one, b"c")) for unit in units.feed(piece, 100)]
    fed += units.feed(START_CODE + next_one, 200)
    pictures = [unit for unit in fed if unit.pts == 100]
    assert [unit.data[-1:] for unit in pictures] == [b"b", b"c"]
    assert not any(unit.corrupt for unit in pictures)


def test_a_packet_that_the_network_repeats_is_no_picture_of_its_own() -> None:
    units = AccessUnits("h264", may_repeat=True)
    picture = START_CODE + SLICE + b"\x9a" + b"x" * 20
    out = play(units, [[picture, picture], [START_CODE + SLICE]])
    assert [unit.data for _, unit in out] == [picture]


@pytest.mark.parametrize(("payload", "recovers_in"), [(b"\x80", 0), (b"\x08\x40", 15), (b"\x40", 1)])
def test_a_recovery_point_says_after_how_many_pictures_all_is_new(payload: bytes, recovers_in: int) -> None:
    units = AccessUnits("h264")
    recovery_point = START_CODE + b"\x06\x06" + bytes([len(payload)]) + payload + START_CODE
    out = play(units, [[recovery_point + SLICE], [START_CODE + SLICE]])
    assert [(unit.keyframe, unit.recovers_in) for _, unit in out] == [(True, recovers_in)]
