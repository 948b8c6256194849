"""The process ends in time, even if a call hangs that holds the interpreter's lock."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

HANGS = """
import ctypes, threading
from streamd.hard_end import end_within, no_end_after
hang = lambda: ctypes.PyDLL(None).sleep(600)  # as a driver's call would that keeps the lock
"""


def run(program: str) -> tuple[int, str, float]:
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS + program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr, time.monotonic() - started_s


def test_a_process_that_hangs_ends_with_1_and_says_where() -> None:
    code, said, took_s = run("end_within(0.5)\nthreading.Thread(target=hang, daemon=True).start()\nprint()")
    assert code == 1
    assert took_s < 60, "it would have slept for ten minutes"
    assert "Timeout" in said and "<lambda>" in said


def test_what_ends_in_time_is_left_alone() -> None:
    code, said, _ = run("with no_end_after():\n    end_within(0.3)\nimport time\ntime.sleep(0.6)")
    assert (code, said) == (0, "")


DAEMON = """
import sys, time, torch
from pathlib import Path
from streamd import cli, daemon
from streamd.lane import Lane

daemon.SHUTDOWN_DEADLINE_S, daemon._HARD_END_S, cli._LEAVE_S = 2.0, 1.0, 1.0
how, threads = sys.argv[2], Lane.threads
hung = threading.Event()

def threads_of_a_gpu_that_gets_lost(lane, plan):
    run, left = lane.model.run, iter(range(10))

    def lost(images, sizes):
        if next(left, None) is not None:
            return run(images, sizes)
        if how == "hangs" and not hung.is_set():
            hung.set()
            ctypes.CDLL(None).sleep(600)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    made = threads(lane, plan)
    lane.model.run = lost
    return made

def hangs_as_well(device):
    if hung.is_set():
        ctypes.CDLL(None).sleep(600)

from streamd import pipeline
Lane.threads, pipeline.probe, daemon._STATUS_INTERVAL_S = threads_of_a_gpu_that_gets_lost, hangs_as_well, 0.1
cli.run(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_lost_gpu_ends_the_daemon_with_1_so_that_systemd_starts_it_again(
    how: str, tmp_path: Path, untrained_artifact: Path, demo_clip: Path
) -> None:
    config = {
        "models": {"m": {"path": str(untrained_artifact), "workers": 2, "threads": 1, "max_batch": 1}},
        "streams": {"gate": {"url": str(demo_clip), "loop": True}},
        "publish": {"zeromq": None},
        "metrics": {"listen": None},
        "control": None,
    }
    path = tmp_path / "streamd.yaml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-c", HANGS + DAEMON, str(path), how], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "an illegal memory access" in done.stderr
    if how == "raises":
        assert "stopping: the GPU is lost to this process" in done.stderr
