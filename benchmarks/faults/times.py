"""Clocks: rows 33 to 38."""

from __future__ import annotations

import time
from datetime import datetime
from itertools import groupby, pairwise
from pathlib import Path

from benchmarks.faults.bench import FPS, Bench
from benchmarks.faults.listener import Listener
from benchmarks.faults.row import Absent, Outcome, Row, expect
from benchmarks.faults.second import second_config, second_daemon
from benchmarks.faults.victim import Victim
from benchmarks.readers import free_endpoint
from streamd.wire import DetectionsMessage, StatusMessage
from tests.rtsp_faults import Camera, RtpClock

OFF_S = 1.0  # of a capture time that is right
HOURS_S = 7200.0
STEP_S = 8.0  # after each step of the clock
STEP_FPS = 4


def wrap(bench: Bench) -> Outcome:
    """RTP time stamps pass 2^32 two seconds after PLAY."""
    clock = RtpClock(first_timestamp=2**32 - 2 * 90_000)
    with bench.stream(bench.camera(Camera(bench.clip, clock=clock))) as victim:
        victim.delivers(5 * FPS)
        messages = _messages(victim)
        _is_monotonic(messages)
        expect(len({message.epoch for message in messages}) == 1, "the wrap was taken for a new epoch")
        _is_right(messages)
    return Outcome(note="one epoch, pts go on")


def jumps(bench: Bench) -> Outcome:
    """Time stamps jump by two hours after 3 s; then, of another camera, they begin again at 0."""
    for clock in (RtpClock(jumps=((3 * FPS, HOURS_S),)), RtpClock(restart_at=3 * FPS)):
        with bench.stream(bench.camera(Camera(bench.clip, clock=clock))) as victim:
            victim.delivers(6 * FPS)
            messages = _messages(victim)
            epochs = {message.epoch for message in messages}
            expect(len(epochs) == 2, f"there are {len(epochs)} epochs, not 2")
            expect(not victim.failures(), f"the stream failed: {victim.failures()}")
            _is_monotonic(messages)
            _is_right(messages)
    return Outcome(note="a new epoch, the capture times stay right")


def repeated_times(bench: Bench) -> Outcome:
    """Every 5th picture has the time stamp of the one before; then every 7th is stamped half a second early."""
    notes = []
    for name, clock in (("duplicate", RtpClock(duplicate_every=5)), ("backward", RtpClock(backward_every=7))):
        with bench.stream(bench.camera(Camera(bench.clip, clock=clock))) as victim:
            victim.delivers(4 * FPS)
            messages = _messages(victim)
            _is_monotonic(messages)
            num = int(bench.metric("streamd_stream_frames_dropped_total", stream=victim.name, reason="late"))
            expect(num, f"{name}: none was dropped and counted")
            expect(len({message.epoch for message in messages}) == 1, f"{name}: taken for a new epoch")
            notes.append(f"{name}: {num} dropped of {len(messages) + num}")
    return Outcome(note="; ".join(notes))


def no_reports(bench: Bench) -> Outcome:
    """No RTCP sender report comes; then, of another camera, the first one after 3 s."""
    with bench.stream(bench.camera(Camera(bench.clip, clock=RtpClock(reports=False)))) as victim:
        victim.delivers(3 * FPS)
        expect({message.clock for message in _messages(victim)} == {"arrival"}, "it does not say arrival")
        _is_right(_messages(victim))
    late = RtpClock(first_report_s=3.0, report_interval_s=1.0)
    with bench.stream(bench.camera(Camera(bench.clip, clock=late))) as victim:
        victim.delivers(6 * FPS)
        order = [clock for clock, _ in groupby(message.clock for message in _messages(victim))]
        expect(order == ["arrival", "sender"], f"the clocks were {order}")
        _is_right(_messages(victim))
    return Outcome(note="arrival, and sender from the first report on")


def camera_in_1970(bench: Bench) -> Outcome:
    """The camera believes that it is 1970."""
    with bench.stream(bench.camera(Camera(bench.clip, clock=RtpClock(wall_clock_at=0.0)))) as victim:
        victim.delivers(3 * FPS)
        messages = _messages(victim)
        stamped = [message for message in messages if message.clock == "sender"]
        expect(stamped or any("clock" in status.reason for status in victim.statuses()), "nothing says so")
        arrived = [getattr(message, "arrived_at", None) for message in messages]
        expect(all(arrived), "the messages carry no arrival time")
    return Outcome(note="said, and the arrival time is there too")


def clock_steps(bench: Bench) -> Outcome:
    """The clock of a second daemon steps an hour forwards, then two back; one of its cameras refuses."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        raise Absent("needs libfaketime (Debian: libfaketime)")
    steps = bench.made("clock", lambda path: path.write_text("+0"))
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(steps),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    nobody = free_endpoint().replace("tcp", "rtsp")
    cam = {"url": bench.camera(Camera(bench.clip)), "fps": STEP_FPS}
    config = second_config(bench, {"cam": cam, "away": {"url": nobody}})
    with second_daemon(bench, config, environment), Listener(config["publish"]["zeromq"]["bind"]) as listener:
        began_at = time.time()
        expect(listener.wait_for(lambda message: message.stream == "cam", began_at, 30.0), "it publishes nothing")
        time.sleep(2.0)
        for step in ("+3600", "-3600"):
            steps.write_text(step)
            stepped_at = time.time()
            time.sleep(STEP_S)
            came = listener.results("cam", stepped_at)
            silence_s = max(later.at - earlier.at for earlier, later in pairwise(came))
            expect(len(came) > STEP_FPS, f"{len(came)} results in {STEP_S:g} s after {step} s")
            expect(silence_s < 3.0, f"no result for {silence_s:.1f} s after {step} s")
            expect(len({heard.message.epoch for heard in came}) == 1, f"after {step} s there is a new epoch")
            off_s = datetime.fromisoformat(came[-1].message.arrived_at).timestamp() - came[-1].at
            expect(abs(off_s - float(step)) < 60, f"the clock did not step: the daemon's is off by {off_s:.0f} s")
        off_s = _retries_off_s(listener, began_at)
    expect(off_s < 1.0, f"a retry came {off_s:.1f} s off its time")
    return Outcome(note=f"no gap above {silence_s:.2f} s, the same epoch, each retry within {off_s:.2f} s of its time")


def _retries_off_s(listener: Listener, since: float) -> float:
    """Return by how much a try of the stream `away` came beside the time that its last failure had named, at most."""
    off_s, due_at = 0.0, 0.0
    for heard in listener.since(since):
        if not isinstance(heard.message, StatusMessage) or heard.message.stream != "away":
            continue
        if heard.message.state == "connecting" and due_at:
            off_s, due_at = max(off_s, abs(heard.at - due_at)), 0.0
        elif heard.message.retry_in_s is not None and not due_at:  # it is repeated every 5 s
            due_at = heard.at + heard.message.retry_in_s
    return off_s


def _messages(victim: Victim) -> list[DetectionsMessage]:
    return [heard.message for heard in victim.results()]


def _is_monotonic(messages: list[DetectionsMessage]) -> None:
    """Hold that presentation times rise within each epoch."""
    falls = [
        (earlier.pts, later.pts)
        for earlier, later in pairwise(messages)
        if earlier.epoch == later.epoch and later.pts <= earlier.pts
    ]
    expect(not falls, f"pts fall: {falls[:3]}")


def _is_right(messages: list[DetectionsMessage]) -> None:
    """Hold that capture times are of now."""
    now = time.time()
    span_s = len(messages) / FPS + 10.0
    wrong = [message.captured_at for message in messages if not now - span_s < message.captured_at_s < now + OFF_S]
    expect(not wrong, f"capture times are wrong: {wrong[:3]}")


ROWS = (
    Row(33, "RTP timestamp wraps at 2^32", wrap, in_ci=True, in_soak=True),
    Row(34, "timestamps jump by hours, or restart from 0", jumps, in_ci=True, in_soak=True),
    Row(35, "duplicate or backward pts", repeated_times, in_soak=True),
    Row(36, "no RTCP sender report, or it comes late", no_reports, in_soak=True),
    Row(37, "camera clock in 1970", camera_in_1970),
    Row(38, "host clock steps by an hour", clock_steps, stand_in=None),
)
