"""Run the daemon with many cameras, and read from outside what each of them costs it."""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.measure import Cpu, machine_busy_s, read_cpu
from benchmarks.readers import BenchmarkError, Subscriber, running
from benchmarks.scale.cameras import CameraProcess, Clip, Picture, cameras
from streamd import wire
from streamd.models import artifact
from streamd.models.spec import ModelSpec
from streamd.models.yolox import yolox_nano

START_DEADLINE_S = 120.0
RETURN_DEADLINE_S = 90.0
SETTLE_S = 5.0  # after the last stream's first message
ONE_FRAME_EACH = 0.001  # frames/s: each connection's first frame goes through the model, and no other

Mode = Literal["demux", "decode"]


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds of the machine at one moment."""

    rss_mib: float
    pss_mib: float  # pages that others map as well count in part
    own_mib: float  # anonymous pages: no file backs them
    num_threads: int
    num_descriptors: int


@dataclass(frozen=True, slots=True)
class Streams:
    """One run of the daemon with so many cameras; CPU is of the window alone."""

    mode: Mode
    picture: Picture
    kbit_s: float  # of each camera
    num_streams: int
    seconds: float
    first_message_s: float  # from the start of the process
    all_streams_s: float  # likewise, until every stream had sent one
    frames_read_per_s: float  # access units, all streams, by the daemon's own counters
    frames_decoded_per_s: float
    cpu_cores: float
    threads_cores: Mapping[str, float]  # by the first word of the threads' names
    server_cores: float
    others_cores: float
    held: Held

    @property
    def cpu_percent_per_stream(self) -> float:
        """Percent of a core."""
        return self.cpu_cores / self.num_streams * 100

    @property
    def read_share(self) -> float:
        """How much of what the cameras sent was read."""
        return self.frames_read_per_s / (self.num_streams * self.picture.fps)


@dataclass(frozen=True, slots=True)
class Return:
    """All cameras lose power for a while."""

    num_streams: int
    outage_s: float
    back_after_s: Sequence[float]  # of each stream, from when the server listens again to its next message
    cpu_cores_while_away: float
    num_threads: tuple[int, int]  # before, and after all are back
    num_descriptors: tuple[int, int]

    @property
    def median_s(self) -> float:
        return statistics.median(self.back_after_s)

    @property
    def last_s(self) -> float:
        return max(self.back_after_s)


@dataclass(frozen=True, slots=True)
class Daemon:
    """The daemon at work, with one message of every stream."""

    pid: int
    subscriber: Subscriber
    metrics: Path  # the exporter's socket
    started_at: float  # Unix s


def make_model(folder: Path) -> Path:
    """Export a network of 96x64 pixels that has learnt nothing: what it costs is not what is measured."""
    path = folder / "untrained.pt"
    spec = ModelSpec(name="untrained", task="detect", labels=("a", "b", "c"), input_size=(64, 96), colour="bgr")
    artifact.export(yolox_nano(3, input_size=spec.input_size), spec, path)
    return path


def measure_streams(model: Path, mode: Mode, clip: Clip, num_streams: int, seconds: float) -> Streams:
    """Run the daemon with so many cameras for a window of `seconds`. Raises BenchmarkError."""
    with cameras(clip, num_streams) as server, daemon(model, mode, server) as at_work:
        arrivals = [arrival.at - at_work.started_at for arrival in at_work.subscriber.arrivals]
        at_work.subscriber.collect(SETTLE_S)
        before = _Clocks.read(at_work, server)
        at_work.subscriber.collect(seconds)
        after = _Clocks.read(at_work, server)
        held = read_held(at_work.pid)
    took_s = after.at - before.at
    daemon_s, server_s = after.daemon.total_s - before.daemon.total_s, after.server_s - before.server_s
    others_s = after.machine_s - before.machine_s - daemon_s - server_s - (after.own_s - before.own_s)
    return Streams(
        mode=mode,
        picture=clip.picture,
        kbit_s=clip.kbit_s,
        num_streams=num_streams,
        seconds=took_s,
        first_message_s=min(arrivals),
        all_streams_s=max(arrivals),
        frames_read_per_s=(after.num_read - before.num_read) / took_s,
        frames_decoded_per_s=(after.num_decoded - before.num_decoded) / took_s,
        cpu_cores=daemon_s / took_s,
        threads_cores={
            group: (used_s - before.daemon.threads_s.get(group, 0.0)) / took_s
            for group, used_s in after.daemon.threads_s.items()
        },
        server_cores=server_s / took_s,
        others_cores=others_s / took_s,
        held=held,
    )


def measure_return(model: Path, clip: Clip, num_streams: int, outage_s: float) -> Return:
    """Switch all cameras off for a while and see when each is back. Raises BenchmarkError where one stays away."""
    with cameras(clip, num_streams) as server, daemon(model, "demux", server) as at_work:
        subscriber = at_work.subscriber
        subscriber.collect(SETTLE_S)
        held, cpu, began = read_held(at_work.pid), read_cpu(at_work.pid), time.monotonic()
        server.kill()
        subscriber.collect(outage_s)
        away_s = read_cpu(at_work.pid).total_s - cpu.total_s
        away_cores = away_s / (time.monotonic() - began)
        subscriber.arrivals.clear()
        subscriber.streams.clear()
        server.start()
        back_at = time.time()
        if not subscriber.collect(RETURN_DEADLINE_S, lambda: len(subscriber.streams) == num_streams):
            missing = num_streams - len(subscriber.streams)
            raise BenchmarkError(f"{missing} of {num_streams} streams were not back after {RETURN_DEADLINE_S:g} s")
        first: dict[str, float] = {}
        for arrival in subscriber.arrivals:
            first.setdefault(wire.decode(arrival.payload, "detections").stream, arrival.at - back_at)
        subscriber.collect(SETTLE_S)
        later = read_held(at_work.pid)
    return Return(
        num_streams=num_streams,
        outage_s=outage_s,
        back_after_s=sorted(first.values()),
        cpu_cores_while_away=away_cores,
        num_threads=(held.num_threads, later.num_threads),
        num_descriptors=(held.num_descriptors, later.num_descriptors),
    )


@contextmanager
def daemon(model: Path, mode: Mode, server: CameraProcess) -> Iterator[Daemon]:
    """Run the daemon; yield once every stream has sent its one message. Raises BenchmarkError."""
    with tempfile.TemporaryDirectory(prefix="streamd-scale-") as name:
        folder = Path(name)
        endpoint, metrics = f"ipc://{folder / 'results'}", folder / "metrics.sock"
        tree = {
            "defaults": {
                "frames": "key" if mode == "demux" else "all",
                "fps": ONE_FRAME_EACH,
                "stall_timeout_s": 60,  # key frames come every 10 s
            },
            "models": {"untrained": {"path": str(model), "workers": 1, "threads": 1, "max_batch": 1}},
            "streams": {name: {"url": url} for name, url in server.urls.items()},
            "publish": {"zeromq": {"bind": endpoint}},
            "metrics": {"listen": f"unix://{metrics}"},
            "control": None,
        }
        config, log = folder / "streamd.yaml", folder / "log"
        config.write_text(json.dumps(tree))  # JSON is YAML
        with Subscriber(endpoint) as subscriber:
            started_at = time.time()
            with running([sys.executable, "-m", "streamd", "run", str(config)], log) as process:
                subscriber.collect(
                    START_DEADLINE_S,
                    lambda: len(subscriber.streams) == len(server.names) or process.poll() is not None,
                )
                if len(subscriber.streams) < len(server.names) or process.poll() is not None:
                    raise BenchmarkError(
                        f"{len(subscriber.streams)} of {len(server.names)} streams sent a message; the daemon's last "
                        f"words:\n{log.read_text()[-2000:]}"
                    )
                yield Daemon(process.pid, subscriber, metrics, started_at)


def read_held(pid: int) -> Held:
    """Read from /proc what a process holds."""
    pages = _numbers(Path(f"/proc/{pid}/smaps_rollup"))
    return Held(
        rss_mib=pages["Rss"] / 1024,
        pss_mib=pages["Pss"] / 1024,
        own_mib=pages["Anonymous"] / 1024,
        num_threads=_numbers(Path(f"/proc/{pid}/status"))["Threads"],
        num_descriptors=sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
    )


def _numbers(file: Path) -> dict[str, int]:
    """Read the lines of the form `Name: 12 kB`."""
    parted = (line.partition(":") for line in file.read_text().splitlines())
    return {name: int(words[0]) for name, _, rest in parted if (words := rest.split()) and words[0].isdigit()}


@dataclass(frozen=True, slots=True)
class _Clocks:
    """All that is read at both ends of a window."""

    at: float
    daemon: Cpu
    server_s: float
    own_s: float
    machine_s: float
    num_read: float
    num_decoded: float

    @classmethod
    def read(cls, at_work: Daemon, server: CameraProcess) -> _Clocks:
        counters = _counters(at_work.metrics)
        return cls(
            at=time.monotonic(),
            daemon=read_cpu(at_work.pid),
            server_s=read_cpu(server.pid).total_s,
            own_s=time.process_time(),
            machine_s=machine_busy_s(),
            num_read=counters["streamd_stream_packets_total"],
            num_decoded=counters["streamd_stream_frames_decoded_total"],
        )


def _counters(metrics: Path) -> dict[str, float]:
    """Ask the exporter, and sum each series over the streams."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(metrics))
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums
