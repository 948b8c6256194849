"""The live table's numbers and looks, with a clock of the test's own; and `watch` on a real socket."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator

import msgspec
import pytest
from rich.console import Console

from streamd.announce import status_message
from streamd.errors import SubscribeError
from streamd.messages import StreamState
from streamd.publish.zeromq import ZeroMqSink
from streamd.watch import StreamTable, is_same_machine, render, watch
from streamd.wire import DetectionsMessage, StatusMessage
from tests.redis_server import free_port
from tests.wire_samples import CAPTURED_AT, make_message, make_status, outgoing, outgoing_status

T0 = CAPTURED_AT + 0.05  # every sample message was captured 50 ms before


def detections(seq: int, stream: str = "gate", age_s: float = 0.0, dropped: int = 0) -> DetectionsMessage:
    """Make a message that was captured `age_s` after the first."""
    message = msgspec.structs.replace(make_message(stream, seq), dropped=dropped)
    moment = f"2026-01-31T10:{int(age_s) // 60:02d}:{age_s % 60:09.6f}Z"
    return msgspec.structs.replace(message, captured_at=moment)


def status(stream: str, state: StreamState, reason: str = "") -> StatusMessage:
    return status_message(make_status(stream, state, reason))


def drawn(table: StreamTable, now_s: float, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(table, now_s))
    return console.export_text().splitlines()


@pytest.fixture
def busy() -> StreamTable:
    """8 s of a stream at 25 frames/s, of which a fifth of the frames was dropped."""
    table = StreamTable(same_machine=True)
    for seq in range(200):
        table.update(detections(seq, age_s=seq / 25, dropped=seq // 4), CAPTURED_AT - 0.123456 + seq / 25 + 0.040)
    return table


def now_of(busy: StreamTable) -> float:
    return busy.rows["gate"].last_at_s


def test_rate_is_measured_over_the_last_five_seconds(busy: StreamTable) -> None:
    now_s = now_of(busy)
    assert busy.frames_per_s("gate", now_s) == pytest.approx(25, abs=0.3)
    assert busy.frames_per_s("gate", now_s + 2.5) == pytest.approx(12.5, abs=0.3)
    assert busy.frames_per_s("gate", now_s + 6) == 0


def test_a_young_stream_has_its_rate_at_once() -> None:
    table = StreamTable(same_machine=True)
    for seq in range(11):
        table.update(detections(seq), T0 + seq / 10)
    assert table.frames_per_s("gate", T0 + 1.0) == pytest.approx(11)


def test_latency_is_from_capture_to_here_on_the_same_machine(busy: StreamTable) -> None:
    assert busy.latency_ms("gate", now_of(busy)) == pytest.approx((40, 40), abs=0.1)


def test_latency_percentiles_are_of_the_window() -> None:
    table = StreamTable(same_machine=True)
    for number in range(100):
        table.update(detections(number), CAPTURED_AT - 0.123456 + 0.001 * number)
    latency = table.latency_ms("gate", T0)
    assert latency == pytest.approx((50, 95), abs=0.1)


def test_latency_is_the_daemons_own_for_another_machine() -> None:
    table = StreamTable(same_machine=False)
    table.update(detections(0), T0 + 3)
    assert table.latency_ms("gate", T0 + 3) == (15.0, 15.0)


@pytest.mark.parametrize("clock_error_s", [-7200.0, 7200.0])
def test_latency_is_the_daemons_own_for_a_camera_whose_clock_is_wrong(clock_error_s: float) -> None:
    table = StreamTable(same_machine=True)
    table.update(detections(0), T0 + clock_error_s)
    assert table.latency_ms("gate", T0 + clock_error_s) == (15.0, 15.0)


def test_dropped_share_is_of_the_window(busy: StreamTable) -> None:
    assert busy.dropped_share("gate") == pytest.approx(0.2, abs=0.01)


def test_a_restart_of_the_daemon_begins_the_measurements_anew(busy: StreamTable) -> None:
    now_s = now_of(busy)
    busy.update(detections(0, age_s=9), now_s + 1)
    assert busy.dropped_share("gate") is None and busy.num_missed("gate") == 0


def test_missed_messages_are_counted(busy: StreamTable) -> None:
    busy.update(detections(210, age_s=9), now_of(busy) + 1)
    assert busy.num_missed("gate") == 10


def test_the_table_fits_eighty_columns_and_shows_what_counts(busy: StreamTable) -> None:
    now_s = now_of(busy)
    busy.update(status("back-door", StreamState.UNAUTHORIZED, "the camera refuses the user or password"), now_s)
    busy.update(status("garage", StreamState.WAITING_KEYFRAME), now_s)
    lines = drawn(busy, now_s)
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["stream", "state", "objects", "fps", "p50", "p95", "drop", "miss"]
    assert lines[1].split() == ["back-door", "unauthorized", "0.0", "-", "-", "-", "0"]
    assert lines[2].split() == ["garage", "no", "keyframe", "0.0", "-", "-", "-", "0"]
    assert "person 1, bicycle 1" in lines[3] and "running" in lines[3] and "20%" in lines[3]
    assert lines[4].rstrip() == "back-door: the camera refuses the user or password"


def test_a_stream_that_stops_sending_is_silent(busy: StreamTable) -> None:
    lines = drawn(busy, now_of(busy) + 8)
    assert "silent 8 s" in lines[1] and "person" not in lines[1]


def test_a_frame_without_objects_says_none() -> None:
    table = StreamTable(same_machine=True)
    table.update(msgspec.structs.replace(detections(0), objects=()), T0)
    assert "none" in drawn(table, T0)[1]


def test_an_empty_table_says_that_it_waits() -> None:
    assert "no message yet" in drawn(StreamTable(same_machine=True), T0)[1]


def test_markup_in_a_reason_is_shown_as_it_is() -> None:
    table = StreamTable(same_machine=True)
    table.update(status("gate", StreamState.FAILED, "[rtsp @ 0x55] [/] method failed"), T0)
    assert "gate: [rtsp @ 0x55] [/] method failed" in drawn(table, T0)[2]


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://localhost:5555", True),
        ("ipc:///run/streamd/s", True),
        ("redis://[::1]:6379/0", True),
        ("unix:///run/redis.sock", True),
        ("tcp://10.0.0.5:5555", False),
        ("redis://user:pw@server", False),
    ],
)
def test_the_clock_is_ours_only_on_this_machine(url: str, same: bool) -> None:
    assert is_same_machine(url) is same


@pytest.fixture
def published() -> Iterator[str]:
    """Publish on ZeroMQ, a status and a detections message at a time, until the test ends."""
    sink = ZeroMqSink("tcp://127.0.0.1:0")
    sink.open()
    endpoint = sink.endpoint
    stop = threading.Event()

    def publish() -> None:
        seq = 0
        while not stop.wait(0.02):
            sink.send([outgoing_status("gate"), outgoing("gate", seq)])
            seq += 1

    thread = threading.Thread(target=publish)
    thread.start()
    yield endpoint
    stop.set()
    thread.join()
    sink.close()


def test_json_lines_are_one_message_each(published: str) -> None:
    console = Console(width=40, file=io.StringIO())
    watch(published, "gate", json_lines=True, console=console, seconds=0.5)
    assert isinstance(console.file, io.StringIO)
    messages = [json.loads(line) for line in console.file.getvalue().splitlines()]
    assert {"seq" in message for message in messages} == {True, False}
    assert all(message["stream"] == "gate" for message in messages)


def test_the_live_table_ends_with_what_it_last_knew(published: str) -> None:
    console = Console(width=80, file=io.StringIO())
    watch(published, None, json_lines=False, console=console, seconds=0.6)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert published in text and "person 1, bicycle 1" in text


def test_a_redis_that_is_not_there_is_an_error_with_advice() -> None:
    with pytest.raises(SubscribeError, match="is redis-server running"):
        watch(f"redis://127.0.0.1:{free_port()}", None, json_lines=False, console=Console(file=io.StringIO()))
