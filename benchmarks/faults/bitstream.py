"""What cameras send: rows 20 to 32."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.faults.bench import CLIP, FPS, GOP, SIZE, Bench
from benchmarks.faults.row import Outcome, Row, expect
from benchmarks.faults.victim import Victim
from streamd.wire import DetectionsMessage
from tests.clips import turn, write_clip
from tests.rtsp import encode_clip
from tests.rtsp_faults import Answers, Bitstream, Camera, Delivery

GROWTH_MIB = 30.0  # of a stream that is read: its decoder and its pictures
OTHER_SIZE = (480, 360)
HUGE_SDP_BYTES = 10 << 20
STANDARD_TABLES = {"huffman": "default"}  # the only ones that JPEG over RTP knows (RFC 2435)


def late_keyframe(bench: Bench) -> Outcome:
    """The camera leaves key frames out for 10 s after PLAY."""
    with bench.stream(bench.camera(Camera(bench.clip, bitstream=Bitstream(no_keyframe_s=10.0)))) as victim:
        victim.enters("waiting_keyframe")
        first = victim.delivers(1, since=victim.added_at, within_s=25.0)[0]
        waited_s = first.at - victim.added_at
        expect(waited_s > 9.5, f"a picture was published after {waited_s:.1f} s, before there was a key frame")
        expect(not victim.failures(), f"the stream failed while it waited: {victim.failures()}")
        victim.delivers()
    return Outcome(note=f"first result after {waited_s:.1f} s; waiting_keyframe until then")


def long_gop(bench: Bench) -> Outcome:
    """A key frame comes every 250 pictures; the stream runs for 20 s, 500 pictures."""
    clip = bench.made("gop250.mp4", lambda path: _encode(path, fps=25, gop=250, seconds=20))
    before = bench.usage()
    with bench.stream(bench.camera(Camera(clip))) as victim:
        victim.delivers(1)
        time.sleep(20.0)
        victim.delivers(1)
        grown_mib = bench.usage().memory_mib - before.memory_mib
    expect(grown_mib < GROWTH_MIB, f"memory grew by {grown_mib:.0f} MiB")
    return Outcome(note=f"memory grew by {grown_mib:.1f} MiB while it ran")


def parameter_sets(bench: Bench) -> Outcome:
    """SPS and PPS are only in the SDP; then only in band."""
    for where in ("sdp", "band"):
        bitstream = Bitstream(parameter_sets=where)
        with bench.stream(bench.camera(Camera(bench.clip, bitstream=bitstream))) as victim:
            victim.delivers(FPS)
    return Outcome(note="decodes both")


def other_size(bench: Bench) -> Outcome:
    """320x240 becomes 480x360 in mid-stream, with an IDR at once; then with its parameter sets and a later IDR."""
    larger = bench.made("larger.mp4", lambda path: _encode(path, size=OTHER_SIZE))
    longest_s = 0.0
    for with_keyframe in (True, False):
        bitstream = Bitstream(then=larger, then_after=2 * GOP, then_with_keyframe=with_keyframe)
        with bench.stream(bench.camera(Camera(bench.clip, bitstream=bitstream))) as victim:
            last, first = _change(victim, lambda message: (message.width, message.height) == OTHER_SIZE)
            longest_s = max(longest_s, first - last)
            sizes = {(heard.message.width, heard.message.height) for heard in victim.results()}
            expect(sizes <= {SIZE, OTHER_SIZE}, f"the messages carry {sizes}")
    return Outcome(longest_s, "the messages carry the new size")


def other_codec(bench: Bench) -> Outcome:
    """H.264 until the connection ends, H.265 on the next."""
    hevc = bench.made("hevc.mp4", lambda path: write_clip(path, 50, codec="libx265", size=SIZE, fps=FPS))
    once = Camera(bench.clip, delivery=Delivery(end_after=2 * GOP))
    with bench.stream(bench.camera(once, Camera(hevc))) as victim:
        failed_at = victim.fails()
        recovered_s = victim.recovers(failed_at, 20.0)
        victim.delivers(FPS)
    return Outcome(recovered_s)


def odd_rates(bench: Bench) -> Outcome:
    """1 frame/s; 20 frames/s where the SDP says 5; intervals that differ by up to 80 %."""
    notes = []
    for name, bitstream, rate in (
        ("1 frame/s", Bitstream(speed=1 / FPS), 1.0),
        ("declared wrong", Bitstream(speed=2.0, claimed_fps=5.0), 20.0),
        ("variable", Bitstream(irregular=0.8), 10.0),
    ):
        with bench.stream(bench.camera(Camera(bench.clip, bitstream=bitstream))) as victim:
            victim.delivers(1)
            time.sleep(6.0)
            expect(not victim.failures(), f"{name}: the stream failed: {victim.failures()}")
            results = victim.results()
            measured = (len(results) - 1) / (results[-1].at - results[0].at)
            expect(abs(measured / rate - 1) < 0.25, f"{name}: {measured:.1f} results/s of {rate:g} frames/s")
            notes.append(f"{name}: {measured:.1f} results/s")
    return Outcome(note="; ".join(notes))


def b_frames(bench: Bench) -> Outcome:
    """Every second and third picture is a B-frame."""
    clip = bench.made("b_frames.mp4", lambda path: write_clip(path, 60, size=SIZE, fps=FPS, gop=20, b_frames=2))
    with bench.stream(bench.camera(Camera(clip))) as victim:
        victim.delivers(3 * FPS)
        _in_order(victim)
        late = bench.metric("streamd_stream_frames_dropped_total", stream=victim.name, reason="late")
        expect(not late, f"{late:.0f} frames were taken for late")
    return Outcome(note="every frame, in the order of its pts")


def damage(bench: Bench) -> Outcome:
    """Every 15th picture has wrong bytes; then every 15th lacks half of its last slice."""
    notes = []
    for name, bitstream in (
        ("corrupt", Bitstream(corrupt_every=15, seed=1)),
        ("truncated", Bitstream(truncate_every=15, seed=1)),
    ):
        with bench.stream(bench.camera(Camera(CLIP, bitstream=bitstream))) as victim:
            victim.delivers(1)
            time.sleep(6.0)
            num = int(bench.metric("streamd_stream_frames_dropped_total", stream=victim.name, reason="corrupt"))
            expect(num, f"{name}: no frame was found damaged")
            expect(not victim.failures(), f"{name}: the stream failed: {victim.failures()}")
            victim.delivers(FPS)
            notes.append(f"{name}: {num} frames dropped")
    return Outcome(note="; ".join(notes) + "; it goes on at the next key frame")


def rare_pixels(bench: Bench) -> Outcome:
    """10 bits; 4:2:2; interlaced."""
    kinds: dict[str, dict[str, Any]] = {
        "10bit": {"pixel_format": "yuv420p10le"},
        "422": {"pixel_format": "yuv422p"},
        "interlaced": {"options": {"flags": "+ilme+ildct", "x264-params": "tff=1"}},
    }
    notes = []
    for name, how in kinds.items():
        clip = bench.made(f"{name}.mp4", lambda path, how=how: write_clip(path, 50, size=SIZE, fps=FPS, **how))  # type: ignore[misc]
        with bench.stream(bench.camera(Camera(clip))) as victim:
            victim.delivers(FPS)
            notes.append(f"{name} decodes by {victim.statuses()[-1].decoder.partition(':')[0]}")
    return Outcome(note="; ".join(notes))


def motion_jpeg(bench: Bench) -> Outcome:
    """The camera sends MJPEG."""
    clip = bench.made("mjpeg.avi", lambda path: _encode(path, codec="mjpeg", options=STANDARD_TABLES))
    with bench.stream(bench.camera(Camera(clip))) as victim:
        victim.delivers(2 * FPS)
        _in_order(victim)
    return Outcome(note="decodes")


def other_tracks(bench: Bench) -> Outcome:
    """Audio and metadata are described beside the video, and sent if they are set up."""
    with bench.stream(bench.camera(Camera(bench.clip, answers=Answers(tracks=("audio", "metadata"))))) as victim:
        victim.delivers(2 * FPS)
    setups = len([event for event in bench.cameras.events("cam", "SETUP")])
    return Outcome(note=f"ignored ({setups} tracks set up so far)" if setups else "ignored")


def odd_pictures(bench: Bench) -> Outcome:
    """Files of 63x47, of 4095x33, and one that its header turns by 90 degrees."""
    odd = bench.made("odd.mp4", lambda path: write_clip(path, 50, size=(63, 47), pixel_format="yuv444p"))
    wide = bench.made("wide.mp4", lambda path: write_clip(path, 50, size=(4095, 33), pixel_format="yuv444p"))
    stored = bench.made("stored.mp4", lambda path: write_clip(path, 50, size=(64, 48)))
    turned = bench.made("turned.mp4", lambda path: turn(stored, path, 90))
    for clip, size in ((odd, (63, 47)), (wide, (4095, 33)), (turned, (48, 64))):
        with bench.stream(str(clip), loop=True) as victim:
            for message in (heard.message for heard in victim.delivers(5)):
                expect((message.width, message.height) == size, f"{clip.name} is {message.width}x{message.height}")
                outside = [box for box in (found.box for found in message.objects) if not _inside(box, size)]
                expect(not outside, f"{clip.name}: boxes outside of the picture: {outside}")
    return Outcome(note="boxes are in pixels as displayed")


def bad_descriptions(bench: Bench) -> Outcome:
    """An SDP of noise; one of 10 MB; then 20 SEI units of 4 kB before each picture."""
    before = bench.usage()
    with bench.stream(bench.camera(Camera(bench.clip, answers=Answers(sdp=_noise)))) as victim:
        victim.enters("protocol_error")
        bench.camera(Camera(bench.clip))
        recovered_s = victim.recovers(time.time(), 35.0)
    with bench.stream(bench.camera(Camera(bench.clip, answers=Answers(sdp=_huge)))) as victim:
        time.sleep(4.0)
        state = victim.statuses()[-1].state  # the video that it names may as well be played
        expect(state in ("protocol_error", "running", "connecting"), f"10 MB: {victim.history()}")
    flood = Bitstream(sei_per_picture=20, sei_bytes=4000)
    with bench.stream(bench.camera(Camera(bench.clip, bitstream=flood))) as victim:
        victim.delivers(5 * FPS)
        grown_mib = bench.usage().memory_mib - before.memory_mib
    expect(grown_mib < GROWTH_MIB, f"memory grew by {grown_mib:.0f} MiB")
    return Outcome(recovered_s, f"10 MB: {state}; memory grew by {grown_mib:.1f} MiB")


def _noise(_: bytes) -> bytes:
    return bytes(range(1, 256)) * 8


def _huge(right: bytes) -> bytes:
    return right + b"a=x:" + b"y" * HUGE_SDP_BYTES


def _encode(path: Path, *, fps: int = FPS, gop: int = GOP, **how: Any) -> Path:
    return encode_clip(CLIP, path, fps=fps, gop=gop, **{"size": SIZE, **how})


def _inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> bool:
    x1, y1, x2, y2 = box
    return 0 <= x1 <= x2 <= size[0] and 0 <= y1 <= y2 <= size[1]


def _messages(victim: Victim) -> list[DetectionsMessage]:
    return [heard.message for heard in victim.results()]


def _in_order(victim: Victim) -> None:
    """Hold that presentation times rise and no number is left out."""
    messages = _messages(victim)
    expect(all(later.pts > earlier.pts for earlier, later in pairwise(messages)), "pts do not rise")
    expect(all(later.seq == earlier.seq + 1 for earlier, later in pairwise(messages)), "a message is missing")


def _change(victim: Victim, is_new: Any) -> tuple[float, float]:
    """Wait for the first result of a new kind; return when the last old one and the first new one came."""
    deadline = time.monotonic() + 20.0
    while not any(is_new(message) for message in _messages(victim)):
        expect(time.monotonic() < deadline, f"nothing changed within 20 s; {victim.name} was {victim.history()}")
        time.sleep(0.1)
    results = victim.results()
    first = next(heard.at for heard in results if is_new(heard.message))
    return max((heard.at for heard in results if heard.at < first), default=first), first


ROWS = (
    Row(20, "no key frame for 10 s after connect", late_keyframe),
    Row(21, "GOP of 250", long_gop),
    Row(22, "SPS/PPS only in the SDP, or only in band", parameter_sets, in_ci=True, in_soak=True),
    Row(23, "resolution changes in mid-stream, with and without IDR", other_size, in_ci=True, in_soak=True),
    Row(24, "H.264 becomes H.265 on reconnect", other_codec, in_soak=True),
    Row(25, "1 fps, wrong declared rate, variable rate", odd_rates),
    Row(26, "B-frames", b_frames, in_soak=True),
    Row(27, "corrupt NAL, truncated slice", damage, in_ci=True, stand_in="large"),
    Row(28, "10-bit, 4:2:2, interlaced", rare_pixels),
    Row(29, "MJPEG camera", motion_jpeg, in_soak=True),
    Row(30, "audio and metadata tracks beside the video", other_tracks, in_soak=True),
    Row(31, "odd sizes, 4095 wide, rotation metadata", odd_pictures),
    Row(32, "malformed or 10 MB SDP; SEI flood", bad_descriptions),
)
