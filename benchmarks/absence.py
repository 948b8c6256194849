"""How the readers behave when cameras do not: all of them away, or one of four frozen."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.measure import read_cpu
from benchmarks.readers import (
    START_DEADLINE_S,
    BenchmarkError,
    Subscriber,
    free_endpoint,
    reader,
    running,
    streamd_command,
)
from streamd import wire
from tests.rtsp import RtspServer

SETTLE_S = 3.0  # after READY: the first round of failed connections is over


@dataclass(frozen=True, slots=True)
class Idle:
    """What streamd uses while no camera answers."""

    num_streams: int
    seconds: float
    core_percent: float


@dataclass(frozen=True, slots=True)
class Frozen:
    """Frame rates before, while and after one camera is frozen: its connection is open, and nothing is sent."""

    reader: str
    num_streams: int
    phase_s: float
    others: tuple[float, float, float]  # frames/s of all other cameras together, in each phase
    slowest_other: tuple[float, float, float]
    longest_silence_s: float  # of any other camera, from the freeze on
    back_after_s: float | None  # from the thaw to the frozen camera's first message; None: it did not come back


def measure_idle(artifact: Path, num_streams: int, seconds: float) -> Idle:
    """Run streamd with cameras at an address where nobody listens."""
    nobody = free_endpoint().removeprefix("tcp://")
    streams = {f"cam{index}": f"rtsp://{nobody}/cam{index}" for index in range(num_streams)}
    with tempfile.TemporaryDirectory(prefix="streamd-benchmark-") as name:
        folder = Path(name)
        command = streamd_command(artifact, streams, free_endpoint(), folder)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.bind(str(folder / "notify"))
            with running(command, folder / "log", NOTIFY_SOCKET=str(folder / "notify")) as process:
                _wait_until_ready(process, notices, folder / "log")
                time.sleep(SETTLE_S)
                began, before = time.monotonic(), read_cpu(process.pid)
                time.sleep(seconds)
                took_s, after = time.monotonic() - began, read_cpu(process.pid)
    return Idle(num_streams, took_s, (after.total_s - before.total_s) / took_s * 100)


def measure_frozen(name: str, artifact: Path, server: RtspServer, streams: Mapping[str, str], phase_s: float) -> Frozen:
    """Freeze the first camera for `phase_s`, with as long a phase before and after."""
    frozen, *others = streams
    with reader(name, artifact, streams) as run:
        subscriber = run.subscriber
        edges = [time.time()]
        subscriber.collect(phase_s)
        server.freeze(frozen)
        try:
            edges.append(time.time())
            subscriber.collect(phase_s)
        finally:
            server.thaw(frozen)
        edges.append(time.time())
        subscriber.collect(phase_s)
        edges.append(time.time())
        times = _times_of(subscriber)
    rates = [
        [sum(begin <= at < end for at in times[other]) / (end - begin) for other in others]
        for begin, end in pairwise(edges)
    ]
    before, during, after = rates
    back = [at for at in times[frozen] if at > edges[2]]
    return Frozen(
        reader=name,
        num_streams=len(streams),
        phase_s=phase_s,
        others=(sum(before), sum(during), sum(after)),
        slowest_other=(min(before), min(during), min(after)),
        longest_silence_s=max(_longest_silence_s(times[other], edges[1], edges[3]) for other in others),
        back_after_s=min(back) - edges[2] if back else None,
    )


def _times_of(subscriber: Subscriber) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    for arrival in subscriber.arrivals:
        message = wire.decode(arrival.payload, "detections")
        times.setdefault(message.stream, []).append(arrival.at)
    return times


def _longest_silence_s(times: list[float], begin: float, end: float) -> float:
    marks = [begin, *(at for at in times if begin <= at < end), end]
    return max(later - earlier for earlier, later in pairwise(marks))


def _wait_until_ready(process: subprocess.Popen[str], notices: socket.socket, log: Path) -> None:
    """Wait for READY=1, as systemd does."""
    deadline = time.monotonic() + START_DEADLINE_S
    while process.poll() is None and (left_s := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([notices], [], [], min(left_s, 0.25))
        if readable and b"READY=1" in notices.recv(4096).split(b"\n"):
            return
    raise BenchmarkError(f"streamd did not become ready; its last words:{os.linesep}{log.read_text()[-2000:]}")
