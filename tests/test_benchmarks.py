"""That the benchmark measures what it says. Never how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from benchmarks.figures import SentLog
from benchmarks.measure import describe_machine, percentile, read_cpu
from streamd.decode.software import SoftwareDecoder
from streamd.sources import SourceOptions, Timeline, open_source
from tests.conftest import ROOT
from tests.rtsp import RtspServer, encode_frame, missing_for_rtsp, read_frames

NUM_BITS, BLOCK_PX = 10, 32
NUM_FRAMES, FPS = 100, 25
WITHIN_S = 30.0


@dataclass(frozen=True)
class Seen:
    """A frame as a reader got it."""

    index: int  # read from its pixels
    epoch: int
    pts_s: float


@pytest.fixture(scope="module")
def numbered_clip(demo_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encode a clip that carries each frame's index in its pixels: a row of black and white blocks, low bit first."""
    out = tmp_path_factory.mktemp("numbered") / "clip.mp4"
    with av.open(str(out), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 768, 576, "yuv420p", FPS
        for index, frame in enumerate(read_frames(demo_clip, NUM_FRAMES)):
            pixels = frame.to_ndarray(format="rgb24")
            for bit in range(NUM_BITS):
                pixels[:BLOCK_PX, bit * BLOCK_PX : (bit + 1) * BLOCK_PX] = 255 * (index >> bit & 1)
            encode_frame(container, stream, av.VideoFrame.from_ndarray(pixels, "rgb24"), index, FPS)
        container.mux(stream.encode(None))
    return out


@pytest.fixture
def server(numbered_clip: Path, tmp_path: Path) -> Iterator[RtspServer]:
    if missing := missing_for_rtsp():
        pytest.skip(missing)
    with RtspServer({"gate": numbered_clip}, log_sent=tmp_path / "sent.jsonl") as running:
        yield running


def need_opencv() -> None:
    if importlib.util.find_spec("cv2") is None:
        pytest.skip("OpenCV is missing: pip install '.[dev]'")


def read_index(luma: np.ndarray[Any, Any]) -> int:
    """Read a frame's index from its upper left corner [H, W]."""
    middle = BLOCK_PX // 2
    return sum((int(luma[middle, bit * BLOCK_PX + middle]) > 128) << bit for bit in range(NUM_BITS))


def assert_matched(seen: list[Seen], server: RtspServer) -> None:
    """Check that the time stamps lead to the access units that the pixels show."""
    units = server.sent()
    log = SentLog(units)
    index_at = {unit["sent_at"]: unit["index"] for unit in units}
    found = [log.sent_at("gate", frame.epoch, frame.pts_s) for frame in seen]
    assert [index_at.get(at or 0.0) for at in found] == [frame.index for frame in seen]


def test_streamd_frames_are_matched_to_the_access_units_that_their_pixels_show(server: RtspServer) -> None:
    seen: list[Seen] = []
    for _ in range(2):  # a second connection begins the clip, and the presentation times, anew
        source = open_source(SourceOptions(server.url("gate")), timeline := Timeline(epoch=len(seen) // NUM_FRAMES - 1))
        decoder = SoftwareDecoder("gate", source.video)
        frames = (frame for packet in source.packets() for frame in decoder.decode(packet))
        for _, frame in zip(range(NUM_FRAMES), frames, strict=False):
            seen.append(Seen(read_index(frame.picture.planes[0].numpy()), frame.stamp.epoch, frame.pts_s))
        source.close()
        assert timeline.epoch == seen[-1].epoch
    assert {frame.epoch for frame in seen} == {0, 1}
    assert_matched(seen, server)


def test_naive_frames_are_matched_to_the_access_units_that_their_pixels_show(server: RtspServer) -> None:
    need_opencv()
    from benchmarks.naive import Camera

    news = threading.Condition()
    camera = Camera("gate", server.url("gate"), news)
    camera.start()
    seen: list[Seen] = []
    deadline = time.monotonic() + WITHIN_S
    while len(seen) < NUM_FRAMES and time.monotonic() < deadline:
        with news:
            news.wait(1)
            if (frame := camera.take()) is not None:
                seen.append(Seen(read_index(frame.image[:, :, 0]), frame.epoch, frame.pts_s))
    camera.stopping.set()
    camera.join(WITHIN_S)
    assert len(seen) == NUM_FRAMES
    assert_matched(seen, server)


def unit(client: int, count: int, sent_at: float, pts_s: float) -> dict[str, Any]:
    return {"mount": "/gate", "client": client, "count": count, "index": count, "pts_s": pts_s, "sent_at": sent_at}


def test_a_time_stamp_between_two_access_units_matches_none() -> None:
    log = SentLog([unit(0, count, 100 + count * 0.04, 7.3 + count * 0.04) for count in range(10)])
    assert log.sent_at("gate", 0, 0.0401) == pytest.approx(100.04)
    assert log.sent_at("gate", 0, 0.06) is None
    assert log.sent_at("gate", 0, -0.04) is None
    assert log.sent_at("gate", 0, 0.4) is None
    assert log.sent_at("gate", 1, 0.04) is None
    assert log.sent_at("street", 0, 0.04) is None


def test_a_reconnected_stream_is_matched_by_its_epoch() -> None:
    log = SentLog([unit(4, 0, 100.0, 0.01), unit(5, 0, 200.0, 0.02), unit(5, 1, 200.04, 0.06)])
    assert log.sent_at("gate", 0, 0.0) == 100.0
    assert log.sent_at("gate", 1, 0.04) == 200.04
    assert log.num_sent((200.0, 201.0)) == 2


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.95, 0.99, 1.0)] == [1, 50, 95, 99, 100]
    assert percentile([3.0], 0.99) == 3.0
    assert math.isnan(percentile([], 0.5))


def test_cpu_time_is_what_the_process_itself_counts() -> None:
    before, own_before = read_cpu(os.getpid()), time.process_time()
    while time.process_time() - own_before < 0.2:
        pass
    used_s = read_cpu(os.getpid()).total_s - before.total_s
    assert used_s == pytest.approx(time.process_time() - own_before, abs=0.05)


def test_a_result_names_no_folder_of_the_machine() -> None:
    machine = describe_machine(["--clip", "/srv/clips/street.mp4", "--out", "benchmarks/results/x"])
    assert machine.command == "python -m benchmarks.streams --clip street.mp4 --out benchmarks/results/x"


@pytest.mark.slow
def test_a_short_run_fills_the_table_and_the_record(nano_artifact: Path, demo_clip: Path, tmp_path: Path) -> None:
    if missing := missing_for_rtsp():
        pytest.skip(missing)
    need_opencv()
    options = ["--streams", "1", "--seconds", "5", "--repeat", "1", "--clip", str(demo_clip)]
    command = [sys.executable, "-m", "benchmarks.streams", *options, "--model", str(nano_artifact)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "smoke")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "send to publish p95" in done.stdout

    record = json.loads((tmp_path / "smoke.json").read_text())
    (scale,) = record["scales"]
    (pair,) = scale["pairs"]
    for reader in ("streamd", "naive"):
        run = pair[reader]
        assert run["reader"] == reader
        assert run["frames_per_s"] > 0 and list(run["frames_per_s_of"]) == ["cam0"]
        assert 0 < run["latency_ms"]["p50"] <= run["latency_ms"]["p95"] <= run["latency_ms"]["p99"]
        assert 0 <= run["dropped"] < 1
        assert run["cpu_ms_per_frame"] > 0 and run["peak_memory_mib"] > 0
        assert 0 < run["first_message_s"] <= run["first_of_all_s"]
        assert run["num_unmatched"] == 0
    assert pair["streamd"]["sender_clock_ms"] < 20
    assert {"infer", "stream", "publish"} <= set(pair["streamd"]["threads_ms_per_frame"])
    assert set(scale["costs"]["stages_ms"]) == {"decode", "letterbox", "forward", "post-process", "encode"}
    assert 0 < sum(scale["costs"]["stages_ms"].values()) <= scale["costs"]["total_ms"]
    assert record["machine"]["cores"] >= 1 and record["machine"]["packages"]["torch"]

    markdown = (tmp_path / "smoke.md").read_text()
    assert "| CPU per frame, ms |" in markdown and "## Targets" in markdown
    assert str(tmp_path) not in markdown + json.dumps(record)
    assert str(Path.home()) not in markdown + json.dumps(record)
