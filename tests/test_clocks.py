"""A step of the machine's clock touches no timer: the wall clock is read only to say when something was."""

from __future__ import annotations

import ast
import itertools
import random
import threading
import time
from pathlib import Path

import pytest
import torch

import streamd
from streamd.backoff import Backoff
from streamd.batch import Batcher
from streamd.config import StreamConfig
from streamd.connection import connector
from streamd.decode import Decoders
from streamd.errors import SourceError
from streamd.messages import Frame, Status
from streamd.supervisor import Connection, Policy, Supervisor
from tests.clips import write_clip

PACKAGE = Path(streamd.__file__).parent
WALL_CLOCKS = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow"}
STAMPS = {  # where the wall clock is read, and what for
    "announce.py": "the age of a frame that the camera stamped",
    "demo.py": "the same",
    "watch.py": "the same",
    "streams.py": "when something was said of a stream",
    "publish/spool.py": "the name of a file that is put aside",
    "sources/source.py": "when a packet came",
    "supervisor.py": "when a state was entered, and when a file's frame was due",
}


def wall_clock_calls(path: Path) -> list[str]:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if ast.unparse(call) in WALL_CLOCKS]


def test_the_wall_clock_is_read_for_stamps_alone() -> None:
    readers = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if wall_clock_calls(path)}
    assert readers - STAMPS.keys() == set(), "a time-out needs time.monotonic(); a stamp stands in this test's list"
    imported = [
        f"{path}: {node.module}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "time"
    ]
    assert imported == [], "import the module: names of their own would hide from the check above"


def test_a_clock_that_steps_by_an_hour_at_every_look_disturbs_no_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in real time behind two refusals: back-off, pace, read time-out, stall time-out and a batch's wait."""
    now, steps = time.time(), itertools.cycle([3600.0, -3600.0, 0.0, 7200.0])
    monkeypatch.setattr(time, "time", lambda: now + next(steps))
    clip = write_clip(tmp_path / "clip.mp4", 20)
    config = StreamConfig.model_validate({"url": str(clip), "pace": "realtime", "stall_timeout_s": 2})
    decoders = Decoders(torch.device("cpu"))
    open_file = connector("gate", config, decoders)
    refusals = iter([SourceError("gone", "unreachable")] * 2)
    batcher = Batcher()
    batcher.add("gate", lossless=True)
    batcher.add("silent")
    statuses: list[Status] = []
    taken: list[Frame] = []

    def connect(first_seq: int) -> Connection:
        for refusal in refusals:
            raise refusal
        return open_file(first_seq)

    def take() -> None:
        while frames := batcher.take(2, 0.01):
            taken.extend(frames)

    supervisor = Supervisor(
        "gate",
        Policy(realtime=True, stall_timeout_s=2),
        connect,
        batcher.offer,
        statuses.append,
        Backoff(0.05, rng=random.Random(0)),
    )
    threads = [threading.Thread(target=supervisor.run), threading.Thread(target=take)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    threads[0].join(30)
    batcher.close()
    threads[1].join(30)
    decoders.close()
    assert not any(thread.is_alive() for thread in threads)
    assert [frame.seq for frame in taken] == list(range(20)) and {frame.stamp.epoch for frame in taken} == {0}
    assert time.monotonic() - began >= 19 / 25, "the file keeps its pace"
    assert statuses[-1].reason == "the file came to its end"
    assert max(abs(status.at - now) for status in statuses) >= 3600, "the clock did step"
