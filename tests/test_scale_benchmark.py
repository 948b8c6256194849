"""That the benchmark of scale measures what it says. Never how much anything costs."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from benchmarks.measure import describe_machine
from benchmarks.scale import report
from benchmarks.scale.cameras import Picture, make_clip
from benchmarks.scale.messages import SINKS, Load, measure_messages
from benchmarks.scale.streams import measure_return, measure_streams, read_held
from streamd import wire
from tests.redis_server import missing_for_redis


def test_a_line_is_told_from_what_is_there_without_any_stream() -> None:
    line = report.Line.fit({1: 102.0, 10: 120.0, 100: 300.0})
    assert line.slope == pytest.approx(2.0) and line.base == pytest.approx(100.0)


def test_what_a_process_holds_is_read_from_the_kernel() -> None:
    before = read_held(os.getpid())
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    with open(os.devnull) as _:
        held = read_held(os.getpid())
    release.set()
    thread.join()
    assert held.num_threads == before.num_threads + 1 and held.num_descriptors == before.num_descriptors + 1
    assert held.rss_mib > held.own_mib > 0 and held.rss_mib >= held.pss_mib > 0


@pytest.mark.parametrize("sink", SINKS)
def test_every_message_is_made_sent_and_weighed(sink: str) -> None:
    if missing := missing_for_redis():
        pytest.skip(missing)
    assert sink in SINKS
    cost = measure_messages(Load(10, has_masks=True), "msgpack", sink, seconds=0.2, rate_hz=250)
    assert cost.num_messages == 50 and cost.encode_us > 0
    assert cost.payload_bytes > 10 * len(wire.channel("gate", "detections"))
    assert (cost.publish_us > 0) == (sink != "none")
    assert (cost.server_us is not None) == (sink not in ("none", "zeromq"))
    keeps = sink in ("redis stream", "redis both", "stored")
    assert (cost.redis_bytes is not None) == keeps
    if cost.redis_bytes is not None:
        assert cost.redis_bytes > cost.payload_bytes


@pytest.mark.slow
def test_cameras_are_read_decoded_and_come_back(untrained_artifact: Path, demo_clip: Path, tmp_path: Path) -> None:
    clip = make_clip(demo_clip, tmp_path, Picture(640, 360, fps=10, bit_rate="300k"))
    run = measure_streams(untrained_artifact, "decode", clip, num_streams=2, seconds=2)
    assert run.read_share > 0 and run.frames_decoded_per_s > 0
    assert run.cpu_cores > 0 and run.first_message_s <= run.all_streams_s
    back = measure_return(untrained_artifact, clip, num_streams=2, outage_s=1)
    assert len(back.back_after_s) == 2 and back.num_threads[0] == back.num_threads[1]
    tables = [*report.stream_tables([run]), *report.return_tables([back])]
    machine = describe_machine(["streams"], "benchmarks.scale")
    as_json, as_markdown = report.write(machine, [run, back], tables, tmp_path / "found")
    assert json.loads(as_json.read_text())["runs"][0]["num_streams"] == 2
    assert "| decode, 640x360 at 10 frames/s" in as_markdown.read_text()
