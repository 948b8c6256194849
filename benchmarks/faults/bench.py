"""One real daemon, healthy cameras that nothing may touch (witnesses), a Redis, and room for a stream at fault."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.faults.listener import Listener
from benchmarks.faults.victim import Victim
from benchmarks.measure import ROOT, Usage, read_usage
from benchmarks.readers import free_endpoint
from streamd.control_client import ask
from streamd.control_messages import AddRequest, Answer, RemoveRequest, Request
from streamd.models import artifact
from streamd.models.spec import ModelSpec
from streamd.models.yolox import yolox_nano
from tests.daemon_process import DaemonProcess
from tests.redis_server import RedisServer
from tests.rtsp import RtspServer, encode_clip
from tests.rtsp_faults import Camera
from tests.rtsp_server import CameraServer

CLIP = ROOT / "configs" / "media" / "pedestrians.mp4"
SIZE, FPS, GOP = (320, 240), 10, 10
# Frames/s. With one rate for all it would be chance, at each connect and for as long as it holds, whether two cameras
# always have a frame at the same moment, and that is most of a p99; so, each second has every way in which they meet.
WITNESS_FPS = {"witness0": 8, "witness1": 9, "witness2": 11, "witness3": 12}
WITNESSES = tuple(WITNESS_FPS)
STORED = WITNESSES[0]  # also reaches Redis at least once
TIMEOUT_S = 2.0  # open, read and stall time-outs: shorter than the defaults, so that a row takes less long
PATIENT = {"read_timeout_s": 30.0, "stall_timeout_s": 30.0}  # witnesses: an overloaded machine is no fault of a camera
RESTING_AFTER_S = 2.0
ANSWER_S = 60.0
MAX_LEN = 100_000  # entries that Redis keeps: more than a row can miss
SMALL_DISK_MB = 16
ISOLATE = (
    'mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf'
    f' && mount -t tmpfs -o size={SMALL_DISK_MB}m tmpfs "$3" && shift 3 && exec "$@"'
)


class Bench:
    """What a row works with. Made by `running_bench`."""

    def __init__(
        self,
        folder: Path,
        daemon: DaemonProcess,
        listener: Listener,
        redis: RedisServer,
        cameras: CameraServer,
        config: Mapping[str, Any],
        is_isolated: bool,
    ) -> None:
        self.folder = folder
        self.daemon = daemon
        self.listener = listener
        self.redis = redis
        self.cameras = cameras
        self.config = config  # as in the daemon's file
        self.is_isolated = is_isolated
        self.resting = Usage(0, 0, 0)  # what the daemon holds when all is well and nothing is done
        self.quiet_s = 0.0  # how long `rest` waits
        self.rests: list[tuple[float, float]] = []  # Unix s: when it did
        self.clip = folder / "clip.mp4"
        self.hosts = folder / "hosts"

    @property
    def small_disk(self) -> Path:
        """The daemon's own file system for the spool, seen from outside."""
        return Path(f"/proc/{self.daemon.pid}/root{self.folder / 'spool'}")

    def ask(self, request: Request) -> Answer:
        """Ask over the control socket. Raises ConfigError where the daemon refuses."""
        return ask(self.folder / "control.sock", request, ANSWER_S)

    def usage(self) -> Usage:
        return read_usage(self.daemon.pid)

    def log_since(self, offset: int) -> str:
        """Return the daemon's log from this byte on."""
        with self.daemon.log_path.open("rb") as log:
            log.seek(offset)
            return log.read().decode()

    def log_size(self) -> int:
        return self.daemon.log_path.stat().st_size

    def metrics_text(self) -> str:
        with urllib.request.urlopen(f"{self.config['metrics']['listen'].replace('tcp', 'http')}/metrics") as page:
            text: str = page.read().decode()
        return text

    def metric(self, name: str, **labels: str) -> float:
        """Sum the samples of a series that have these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def camera(self, *cameras: Camera, name: str = "cam") -> str:
        """Serve a camera of this name from now on, of several the next one to each connection; return its URL."""
        self.cameras.set(name, cameras)
        return self.cameras.url(name)

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return a file of the bench's folder, which `make` writes where it is not there yet."""
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    def rest(self) -> None:
        """Wait, in a row that needs many streams, when all of them are well.

        What follows is held against this time, instead of against the time before the row.
        """
        began = time.time()
        time.sleep(self.quiet_s)
        self.rests.append((began, time.time()))

    @contextmanager
    def stream(self, url: str, name: str = "victim", **settings: Any) -> Iterator[Victim]:
        """Add a stream for the length of the block."""
        victim = Victim(self, name)
        self.ask(AddRequest(name=name, settings={"url": url, **settings}))
        try:
            yield victim
        finally:
            self.ask(RemoveRequest(name=name))


@contextmanager
def running_bench(regulars: Sequence[str] = ()) -> Iterator[Bench]:
    """Start everything; yield once every witness delivers.

    `regulars` are names of more streams that stay, from cameras that `Bench.cameras` serves.
    """
    with tempfile.TemporaryDirectory(prefix="streamd-faults-") as name, ExitStack() as stack:
        folder = Path(name)
        clip = encode_clip(CLIP, folder / "clip.mp4", fps=FPS, size=SIZE, gop=GOP)
        model = tiny_artifact(folder / "tiny.pt")
        clips = {
            witness: encode_clip(CLIP, folder / f"{witness}.mp4", fps=fps, size=SIZE, gop=GOP)
            for witness, fps in WITNESS_FPS.items()
        }
        cameras = stack.enter_context(RtspServer(clips))
        faulty = stack.enter_context(CameraServer({}))
        redis = stack.enter_context(RedisServer(durable_in=_made(folder / "redis")))
        streams: dict[str, dict[str, Any]] = {
            witness: {"url": cameras.url(witness), **PATIENT} for witness in WITNESSES
        }
        streams[STORED]["delivery"] = "stored"
        for regular in regulars:
            faulty.set(regular, Camera(clip))
            streams[regular] = {"url": faulty.url(regular)}
        config = make_config(folder, model, streams, redis.url)
        prefix = _isolation(folder)
        daemon = stack.enter_context(DaemonProcess(folder, config, prefix=prefix))
        stack.enter_context(daemon.read_notifications())
        listener = stack.enter_context(Listener(config["publish"]["zeromq"]["bind"]))
        bench = Bench(folder, daemon, listener, redis, faulty, config, bool(prefix))
        for witness in WITNESSES:
            Victim(bench, witness).delivers(FPS, within_s=30.0)
        for first in (bench.clip, CLIP):  # what the first stream of a size costs is not the first row's
            with bench.stream(bench.camera(Camera(first))) as stream:
                stream.delivers(2 * FPS)
        time.sleep(RESTING_AFTER_S)
        bench.resting = bench.usage()
        yield bench


def step_back() -> None:
    """Leave the cores to the daemon, the witnesses' server and the receiver wherever they want them (SCHED_IDLE).

    Of this process, with the cameras at fault, and of all that it starts from now on: what they take is not the fault's
    doing, and real cameras have cores of their own.
    """
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


def make_config(folder: Path, model: Path, streams: Mapping[str, Any], redis_url: str) -> dict[str, Any]:
    """Write down a daemon that uses little of the machine."""
    timeouts = {key: TIMEOUT_S for key in ("open_timeout_s", "read_timeout_s", "stall_timeout_s")}
    return {
        "models": {
            "tiny": {"path": str(model), "workers": 1, "threads": 1, "max_batch": 4, "max_detections": 4},
        },
        "defaults": timeouts,
        "streams": dict(streams),
        "publish": {
            "zeromq": {"bind": free_endpoint()},
            "redis": {"url": redis_url, "max_len": MAX_LEN},
            "spool": {"path": str(_made(folder / "spool") / "spool.sqlite")},
        },
        "metrics": {"listen": free_endpoint(), "log_interval_s": 10},
        "control": {"path": str(folder / "control.sock")},
    }


def tiny_artifact(path: Path) -> Path:
    """Export a network that has learned nothing and costs next to nothing."""
    spec = ModelSpec(name="tiny", task="detect", labels=("a", "b", "c"), input_size=(64, 96), colour="bgr")
    artifact.export(yolox_nano(3, input_size=spec.input_size), spec, path)
    return path


def _isolation(folder: Path) -> tuple[str, ...]:
    """Return a command that gives the daemon its own names of hosts and a small disk; empty where it is not allowed."""
    hosts, resolv, spool = folder / "hosts", folder / "resolv.conf", folder / "spool"
    hosts.write_text("127.0.0.1 localhost\n")
    resolv.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    command = ("unshare", "--mount", "sh", "-c", ISOLATE, "sh", str(hosts), str(resolv), str(spool))
    if os.geteuid() != 0 or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        return ()
    return command


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
