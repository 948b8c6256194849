"""The whole, with nothing faked: RTSP servers, models, ZeroMQ, Redis, signals, and what goes wrong among them."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest

from streamd.client import Subscription, subscribe
from streamd.wire import DetectionsMessage, StatusMessage
from tests.clips import white, write_clip
from tests.conftest import StartRtsp
from tests.daemon_process import DaemonProcess
from tests.hanging_model import export_hanging_model
from tests.redis_server import RedisServer, free_port

WITHIN_S = 40.0

Message = DetectionsMessage | StatusMessage


def make_config(model: Path, streams: dict[str, Any], port: int, **publish: Any) -> dict[str, Any]:
    return {
        "defaults": {"read_timeout_s": 2, "stall_timeout_s": 2, "open_timeout_s": 2},
        "models": {"people": {"path": str(model)}},
        "streams": {name: {"url": url} if isinstance(url, str) else url for name, url in streams.items()},
        "publish": {"zeromq": {"bind": f"tcp://127.0.0.1:{port}"}, **publish},
        "metrics": {"log_interval_s": 2},
    }


def listen(url: str) -> Subscription[Message]:
    return subscribe(url, kinds=("detections", "status"), timeout_s=WITHIN_S)


def collect(messages: Subscription[Message], until: Callable[[list[Message]], bool]) -> list[Message]:
    """Take messages until they suffice."""
    received: list[Message] = []
    deadline = time.monotonic() + WITHIN_S
    for message in messages:
        received.append(message)
        if until(received):
            return received
        if time.monotonic() > deadline:
            break
    raise AssertionError(f"not within {WITHIN_S} s; the last of {len(received)} were {received[-3:]}")


def receive(url: str, until: Callable[[list[Message]], bool]) -> list[Message]:
    """Listen until the messages suffice."""
    with listen(url) as messages:
        return collect(messages, until)


def both(*conditions: Callable[[list[Message]], bool]) -> Callable[[list[Message]], bool]:
    return lambda messages: all(condition(messages) for condition in conditions)


def detections_of(messages: list[Message], stream: str) -> list[DetectionsMessage]:
    return [m for m in messages if isinstance(m, DetectionsMessage) and m.stream == stream]


def states_of(messages: list[Message], stream: str) -> list[str]:
    return [str(m.state) for m in messages if isinstance(m, StatusMessage) and m.stream == stream]


def has_frames(*streams: str, num: int = 10) -> Callable[[list[Message]], bool]:
    return lambda messages: all(len(detections_of(messages, stream)) >= num for stream in streams)


def has_state(stream: str, state: str) -> Callable[[list[Message]], bool]:
    return lambda messages: state in states_of(messages, stream)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def address(port: int) -> str:
    return f"tcp://127.0.0.1:{port}"


def test_two_cameras_reach_both_subscribers_with_the_right_content(
    shared: Path,
    nano_artifact: Path,
    rtsp_server: StartRtsp,
    redis_server: RedisServer,
    tmp_path: Path,
    port: int,
    address: str,
) -> None:
    clips = {"yard": shared / "videos/vtest.avi", "door": shared / "videos/intel-one-by-one-person-detection.mp4"}
    cameras = rtsp_server(clips, user="viewer", password="top-secret")
    streams = {name: cameras.url(name) for name in clips}
    config = make_config(nano_artifact, streams, port, redis={"url": redis_server.url})
    with DaemonProcess(tmp_path, config) as daemon:
        by_zeromq = receive(address, has_frames("yard", "door", num=30))
        by_redis = receive(redis_server.url, has_frames("yard", "door", num=10))
        kept = list(_read_stream(redis_server.url, "yard", num=20))
        daemon.wait_for_notification("STATUS=2 of 2 streams running", 20)
        assert daemon.stop() == 0
        log = daemon.log()

    sizes = {"yard": (768, 576), "door": (768, 432)}
    for name, (width, height) in sizes.items():
        messages = detections_of(by_zeromq, name)
        assert [m.seq for m in messages] == list(range(messages[0].seq, messages[0].seq + len(messages)))
        assert all((m.width, m.height) == (width, height) for m in messages)
        assert all(later.pts > earlier.pts for earlier, later in pairwise(messages))
        assert all(m.clock == "sender" for m in messages[1:]), "the RTSP server sends RTCP sender reports"
        assert all(abs(time.time() - m.captured_at_s) < 120 for m in messages)
        for found in (found for m in messages for found in m.objects):
            x1, y1, x2, y2 = found.box
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            assert 0.3 <= found.score <= 1
    persons = [sum(found.label == "person" for found in m.objects) for m in detections_of(by_zeromq, "yard")]
    assert min(persons) >= 2 and max(persons) <= 15, "the yard shows four to nine people in its first seconds"

    same = {(m.stream, m.seq): m for m in by_zeromq if isinstance(m, DetectionsMessage)}
    twice = [m for m in [*by_redis, *kept] if isinstance(m, DetectionsMessage) and (m.stream, m.seq) in same]
    assert twice, "Redis keeps what came by ZeroMQ"
    assert all(same[m.stream, m.seq] == m for m in twice)
    assert "READY=1" in daemon.notifications
    assert "top-secret" not in log
    assert "viewer" in log or "rtsp" not in log


def _read_stream(url: str, stream: str, num: int) -> Iterator[Message]:
    with subscribe(url, stream=stream, since="0", timeout_s=WITHIN_S) as messages:
        for _, message in zip(range(num), messages, strict=False):
            yield message


def test_a_camera_that_reboots_comes_back_and_the_other_never_notices(
    demo_clip: Path, nano_artifact: Path, rtsp_server: StartRtsp, tmp_path: Path, port: int, address: str
) -> None:
    rebooting, steady = rtsp_server({"cam": demo_clip}), rtsp_server({"cam": demo_clip})
    streams = {"rebooting": rebooting.url("cam"), "steady": steady.url("cam")}
    with DaemonProcess(tmp_path, make_config(nano_artifact, streams, port)), listen(address) as messages:
        before = collect(messages, has_frames("rebooting", "steady"))
        rebooting.kill()
        down = collect(messages, both(has_state("rebooting", "unreachable"), has_frames("steady")))
        rebooting.start()
        after = collect(messages, has_frames("rebooting", "steady"))

    last, first = detections_of(before, "rebooting")[-1], detections_of(after, "rebooting")[0]
    assert first.epoch > last.epoch
    assert first.seq > last.seq
    unreachable = next(m for m in down if isinstance(m, StatusMessage) and m.state == "unreachable")
    assert unreachable.reason and unreachable.retry_in_s is not None
    _assert_undisturbed(before + down + after, "steady", fps=10)


def test_a_camera_that_freezes_is_stalled_and_the_other_never_notices(
    demo_clip: Path, nano_artifact: Path, rtsp_server: StartRtsp, tmp_path: Path, port: int, address: str
) -> None:
    cameras = rtsp_server({"frozen": demo_clip, "steady": demo_clip})
    streams = {name: cameras.url(name) for name in ("frozen", "steady")}
    with DaemonProcess(tmp_path, make_config(nano_artifact, streams, port)), listen(address) as messages:
        before = collect(messages, has_frames("frozen", "steady"))
        cameras.freeze("frozen")
        stalled = collect(messages, both(has_state("frozen", "stalled"), has_frames("steady")))
        cameras.thaw("frozen")
        after = collect(messages, has_frames("frozen", "steady"))
    _assert_undisturbed(before + stalled + after, "steady", fps=10)


def _assert_undisturbed(received: list[Message], stream: str, fps: float) -> None:
    """The stream lost no message, never reconnected, and made no pause."""
    messages = detections_of(received, stream)
    assert [m.seq for m in messages] == list(range(messages[0].seq, messages[0].seq + len(messages)))
    assert len({m.epoch for m in messages}) == 1
    steps = [later.pts - earlier.pts for earlier, later in pairwise(messages)]
    assert max(steps) <= 5 / fps, f"{stream} paused: {steps}"


def test_bad_files_have_a_state_and_a_good_camera_runs_beside_them(
    demo_clip: Path, nano_artifact: Path, rtsp_server: StartRtsp, tmp_path: Path, port: int, address: str
) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("this is no video\n" * 100)
    empty = tmp_path / "empty.mp4"
    _write_video_without_frames(empty)
    cut_off = tmp_path / "cut-off.mp4"
    cut_off.write_bytes(demo_clip.read_bytes()[:200_000])
    streams = {
        "good": rtsp_server({"cam": demo_clip}).url("cam"),
        "text": str(text),
        "empty": str(empty),
        "missing": str(tmp_path / "missing.mp4"),
        "cut-off": str(cut_off),
    }
    with DaemonProcess(tmp_path, make_config(nano_artifact, streams, port)) as daemon:
        messages = receive(
            address,
            lambda m: (
                has_frames("good", num=20)(m)
                and has_state("text", "failed")(m)
                and has_state("empty", "failed")(m)
                and has_state("missing", "not_found")(m)
                and {"failed", "ended"} & set(states_of(m, "cut-off")) != set()
            ),
        )
        assert daemon.stop() == 0
    reasons = {m.stream: m.reason for m in messages if isinstance(m, StatusMessage) and m.reason}
    assert "not a video" in reasons["text"]
    assert "no frame" in reasons["empty"] or "no video stream" in reasons["empty"]
    assert "no such file" in reasons["missing"]


def _write_video_without_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 64, 64
        container.start_encoding()


def test_a_redis_that_is_not_there_does_not_stop_detection(
    demo_clip: Path, nano_artifact: Path, tmp_path: Path, port: int, address: str
) -> None:
    streams = {"clip": {"url": str(demo_clip), "loop": True}}
    redis = {"url": f"redis://:hidden@127.0.0.1:{free_port()}"}
    with DaemonProcess(tmp_path, make_config(nano_artifact, streams, port, redis=redis)) as daemon:
        receive(address, has_frames("clip", num=30))
        assert daemon.stop() == 0
        assert "redis" in daemon.log().lower()
        assert "hidden" not in daemon.log()


def test_a_port_that_is_taken_ends_the_daemon_with_69_and_says_what_to_do(
    demo_clip: Path, nano_artifact: Path, tmp_path: Path, port: int
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        daemon = DaemonProcess(tmp_path, make_config(nano_artifact, {"clip": str(demo_clip)}, port))
        with daemon._socket:
            daemon.start()
            assert daemon.wait(60) == 69
    assert str(port) in daemon.log()
    assert "Traceback" not in daemon.log()


def test_a_missing_model_ends_the_daemon_with_78(demo_clip: Path, tmp_path: Path, port: int) -> None:
    daemon = DaemonProcess(tmp_path, make_config(tmp_path / "none.pt", {"clip": str(demo_clip)}, port))
    with daemon._socket:
        daemon.start()
        assert daemon.wait(60) == 78
    assert "none.pt" in daemon.log()
    assert "Traceback" not in daemon.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_tells_systemd(
    demo_clip: Path, nano_artifact: Path, tmp_path: Path, port: int, address: str, number: signal.Signals
) -> None:
    streams = {"clip": {"url": str(demo_clip), "loop": True}}
    with DaemonProcess(tmp_path, make_config(nano_artifact, streams, port)) as daemon:
        receive(address, has_frames("clip", num=3))
        assert daemon.stop(number) == 0
        daemon.wait_for_notification("STOPPING=1", 1)
        assert number.name in daemon.log()


def test_the_daemon_ends_by_itself_when_all_files_have_ended_and_every_frame_is_published(
    demo_clip: Path, nano_artifact: Path, tmp_path: Path, redis_server: RedisServer, port: int
) -> None:
    streams = {name: {"url": str(demo_clip), "pace": "fast"} for name in ("one", "two")}
    config = make_config(nano_artifact, streams, port, redis={"url": redis_server.url})
    with DaemonProcess(tmp_path, config) as daemon:
        assert daemon.wait(90) == 0
    for name in streams:
        messages = list(_read_stream(redis_server.url, name, num=250))
        assert [m.seq for m in messages if isinstance(m, DetectionsMessage)] == list(range(250))
        assert all(m.dropped == 0 for m in messages)


def test_a_model_that_hangs_ends_the_pings_of_the_watchdog_and_says_where_it_was(tmp_path: Path, port: int) -> None:
    model = export_hanging_model(tmp_path / "hanging.pt")
    clip = write_clip(tmp_path / "white.mp4", fps=10, size=(96, 64), draw=white)
    config = make_config(model, {"white": {"url": str(clip), "loop": True}}, port)
    with DaemonProcess(tmp_path, config, {"WATCHDOG_USEC": "4000000"}) as daemon:
        stuck = "STATUS=1 of 1 streams running; model people on cpu: one batch for "
        daemon.wait_for_notification(stuck, WITHIN_S)
        for _ in range(3):
            daemon.notifications.clear()
            daemon.wait_for_notification(stuck, WITHIN_S)
            assert "WATCHDOG=1" not in daemon.notifications
        assert daemon.stop(signal.SIGABRT) == -signal.SIGABRT  # as systemd does then
        log = daemon.log()
    assert log.count("stuck: model people on cpu") == 1
    assert "Fatal Python error: Aborted" in log and "infer.py" in log
