"""The demo is the real daemon with a real subscriber, and what it leaves behind can be looked at."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import msgspec
import pytest
from PIL import Image
from rich.console import Console

from streamd.announce import status_message
from streamd.demo import Recording, StreamRecord, clip, demo, draw_files, summary
from streamd.errors import ModelError
from tests.wire_samples import make_message, make_status


def test_the_demo_shows_what_arrives_and_leaves_a_video_and_a_contact_sheet(
    untrained_artifact: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=100)
    assert demo(str(untrained_artifact), seconds=2, out=tmp_path / "out", console=console) == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "gate" in shown and "yard" in shown and "frames/s" in shown, shown
    assert f"wrote {tmp_path}/out/annotated.mp4" in shown
    with av.open(str(tmp_path / "out" / "annotated.mp4")) as container:
        num_frames = sum(1 for _ in container.decode(video=0))
    assert 5 <= num_frames <= 60, "the clip's 10 frames a second for about 2 s"
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.width == 1440


def test_ctrl_c_ends_early_and_still_leaves_the_files(untrained_artifact: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamd", "demo", str(untrained_artifact), "--seconds", "300"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        shown = ""
        deadline = time.monotonic() + 90
        while "running" not in shown and time.monotonic() < deadline:
            shown += process.stdout.readline()
        assert "running" in shown, shown
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "wrote" in rest and (tmp_path / "out" / "annotated.mp4").stat().st_size > 0


def test_a_missing_model_is_said_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    console = Console(file=io.StringIO())
    with pytest.raises(ModelError, match=r"my_model: no such model.*use one of streamd-person, yolox_nano"):
        demo("my_model", console=console)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_repeated_clip_counts_each_frame_and_keeps_one_of_each_time() -> None:
    record = StreamRecord()
    for seq in range(3):
        record.add(make_message(seq=seq), now_s=100.0 + seq)
    assert (record.num_frames, record.num_objects, len(record.by_pts)) == (3, 6, 1)
    assert (record.first_at_s, record.last_at_s) == (100.0, 102.0)


def test_a_camera_that_gave_nothing_is_in_the_summary_and_harms_nothing(tmp_path: Path) -> None:
    recording = Recording()
    recording.add(msgspec.structs.replace(make_message(), pts=0.1, width=768, height=576), time.time())
    console = Console(file=io.StringIO(), width=100)
    console.print(summary(recording))
    rows = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(row.split()[:3] == ["yard", "0", "0"] for row in rows), rows
    video, sheet = draw_files(recording, tmp_path)
    assert video.exists() and sheet.exists()


def test_statuses_are_shown_and_not_counted() -> None:
    recording = Recording()
    recording.add(status_message(make_status("gate")), time.time())
    assert recording.num_frames == 0 and "gate" in recording.table.rows


def test_the_clip_comes_with_the_package() -> None:
    assert clip().is_file()
