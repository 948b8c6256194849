"""Run one reader as a child process and note from outside what it does: streamd, or the naive reader."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zmq

from benchmarks.measure import ROOT, Cpu, machine_busy_s, peak_memory_mib, read_cpu

START_DEADLINE_S = 90.0  # until every stream has sent its first message
STOP_DEADLINE_S = 15.0
WARM_UP_S = 3.0  # after every stream's first message: caches fill, and torch.jit has seen each batch size
COSTS_FILE = "costs.jsonl"
GRACE_S = 2.0  # after the window, for messages of frames that were sent within it


class BenchmarkError(Exception):
    """A run failed, so that there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A detections message, unread, and when it came."""

    at: float  # Unix s
    payload: bytes


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of a reader; times are Unix seconds, CPU is of the window alone."""

    reader: str
    started_at: float
    window: tuple[float, float]
    arrivals: Sequence[Arrival]  # from the start to some time after the window
    cpu_s: float
    threads_s: Mapping[str, float]
    server_cpu_s: float
    subscriber_cpu_s: float
    others_cpu_s: float  # of everybody else on the machine, and what the hypervisor kept
    settings: str  # how streamd chose to run the model, from its log; empty for the naive reader
    peak_memory_mib: float


class Subscriber:
    """Note when each message arrives. Nothing is parsed while a run lasts, because that would take CPU from it."""

    def __init__(self, endpoint: str) -> None:
        self.arrivals: list[Arrival] = []
        self.streams: set[bytes] = set()  # topics that a message has come from
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)  # ms; it connects before the reader binds
        self._socket.subscribe(b"streamd/")
        self._socket.connect(endpoint)

    def collect(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Note what arrives for so long, or until `until` holds after a message; return whether it did."""
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            if not self._socket.poll(round(min(left_s, 0.25) * 1e3)):
                if until():
                    return True
                continue
            topic, payload = self._socket.recv_multipart()
            now = time.time()
            if topic.endswith(b"/detections"):
                self.arrivals.append(Arrival(now, payload))
                self.streams.add(topic)
                if until():
                    return True
        return False

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def free_endpoint() -> str:
    """Name a ZeroMQ address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def streamd_command(artifact: Path, streams: Mapping[str, str], endpoint: str, folder: Path) -> list[str]:
    """Write a configuration that says nothing but what it must, and return the command that runs it."""
    config = folder / "streamd.yaml"
    tree = {
        "models": {"detector": {"path": str(artifact)}},
        "streams": {name: {"url": url} for name, url in streams.items()},
        "publish": {"zeromq": {"bind": endpoint}},
    }
    config.write_text(json.dumps(tree, indent=2))  # JSON is YAML
    return [sys.executable, "-m", "streamd", "run", str(config)]


def costs_command(artifact: Path, streams: Mapping[str, str], endpoint: str, folder: Path) -> list[str]:
    """Return the command that runs streamd with a stopwatch at each stage, which writes into folder/COSTS_FILE."""
    config = streamd_command(artifact, streams, endpoint, folder)[-1]
    return [sys.executable, "-m", "benchmarks.stage_costs", config, str(folder / COSTS_FILE)]


def naive_command(artifact: Path, streams: Mapping[str, str], endpoint: str, folder: Path) -> list[str]:
    """Return the command that runs the naive reader."""
    cameras = [f"{name}={url}" for name, url in streams.items()]
    return [sys.executable, "-m", "benchmarks.naive", str(artifact), endpoint, *cameras]


COMMANDS = {"streamd": streamd_command, "streamd with costs": costs_command, "naive": naive_command}


@contextmanager
def running(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a process group of its own, which does not outlive the block; its words go to `log`."""
    with log.open("w") as words:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@dataclass(frozen=True, slots=True)
class Run:
    """A reader at work, and who listens to it."""

    process: subprocess.Popen[str]
    subscriber: Subscriber
    started_at: float  # Unix s
    folder: Path  # of its files; goes with it


@contextmanager
def reader(name: str, artifact: Path, streams: Mapping[str, str]) -> Iterator[Run]:
    """Run a reader; yield it once every stream has sent a message and the warm-up is over."""
    endpoint = free_endpoint()
    with tempfile.TemporaryDirectory(prefix="streamd-benchmark-") as folder, Subscriber(endpoint) as subscriber:
        log = Path(folder) / "log"
        command = COMMANDS[name](artifact, streams, endpoint, Path(folder))
        started_at = time.time()
        with running(command, log) as process:
            wait_for_streams(process, subscriber, len(streams), log)
            subscriber.collect(WARM_UP_S)
            yield Run(process, subscriber, started_at, Path(folder))


def wait_for_streams(process: subprocess.Popen[str], subscriber: Subscriber, num_streams: int, log: Path) -> None:
    """Return when every stream has sent a message. Raises BenchmarkError with the process's last words."""

    def done() -> bool:
        return len(subscriber.streams) == num_streams or process.poll() is not None

    if not subscriber.collect(START_DEADLINE_S, done) or process.poll() is not None:
        why = "it ended" if process.poll() is not None else f"{START_DEADLINE_S:.0f} s were over"
        raise BenchmarkError(
            f"reader: {why} before all {num_streams} streams had sent a message "
            f"({len(subscriber.streams)} had); its last words:\n{log.read_text()[-2000:]}"
        )


def observe(name: str, artifact: Path, streams: Mapping[str, str], server_pid: int, seconds: float) -> Observation:
    """Run a reader through its start, its warm-up and a window of `seconds`."""
    with reader(name, artifact, streams) as run:
        before = Reading.take(run.process.pid, server_pid)
        run.subscriber.collect(seconds)
        after = Reading.take(run.process.pid, server_pid)
        run.subscriber.collect(GRACE_S)
        peak_mib = peak_memory_mib(run.process.pid)
        settings = chosen_settings((run.folder / "log").read_text())
    cpu_s = after.reader.total_s - before.reader.total_s
    server_cpu_s = after.server.total_s - before.server.total_s
    subscriber_cpu_s = after.subscriber_s - before.subscriber_s
    return Observation(
        reader=name,
        started_at=run.started_at,
        window=(before.at, after.at),
        arrivals=tuple(run.subscriber.arrivals),
        cpu_s=cpu_s,
        threads_s={
            group: used_s - before.reader.threads_s.get(group, 0.0) for group, used_s in after.reader.threads_s.items()
        },
        server_cpu_s=server_cpu_s,
        subscriber_cpu_s=subscriber_cpu_s,
        others_cpu_s=after.machine_s - before.machine_s - cpu_s - server_cpu_s - subscriber_cpu_s,
        settings=settings,
        peak_memory_mib=peak_mib,
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """All the clocks at one moment."""

    at: float
    reader: Cpu
    server: Cpu
    subscriber_s: float
    machine_s: float

    @classmethod
    def take(cls, reader_pid: int, server_pid: int) -> Reading:
        return cls(time.time(), read_cpu(reader_pid), read_cpu(server_pid), time.process_time(), machine_busy_s())


def chosen_settings(log: str) -> str:
    """Find in streamd's log the workers, threads and batch size that it chose."""
    return next((line.rpartition(": ")[2] for line in log.splitlines() if "worker(s) of" in line), "")


@dataclass(frozen=True, slots=True)
class StageCosts:
    """CPU milliseconds of a processed frame, by stage."""

    stages_ms: Mapping[str, float]
    total_ms: float

    @property
    def other_share(self) -> float:
        """What is neither decode nor the model's forward."""
        return 1 - (self.stages_ms["decode"] + self.stages_ms["forward"]) / self.total_ms


def observe_costs(artifact: Path, streams: Mapping[str, str], seconds: float) -> StageCosts:
    """Run streamd with a stopwatch at each stage for `seconds`, after its warm-up."""
    with reader("streamd with costs", artifact, streams) as run:
        began = time.time()
        run.subscriber.collect(max(seconds, 4.0))
        snapshots = [json.loads(line) for line in (run.folder / COSTS_FILE).read_text().splitlines()]
    first = next(snapshot for snapshot in snapshots if snapshot["at"] >= began)
    last = snapshots[-1]
    per_frame_ms = 1e3 / max(1, last["frames"] - first["frames"])
    stages_ms = {
        stage: (used_s - first["stages_s"][stage]) * per_frame_ms for stage, used_s in last["stages_s"].items()
    }
    return StageCosts(stages_ms, (last["process_s"] - first["process_s"]) * per_frame_ms)
