"""Streams come and go beside one that stays: nothing is kept of them, and the one that stays does not notice."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamd.changes import difference
from streamd.config import Config
from streamd.messages import Result, Status
from streamd.pipeline import Pipeline
from tests.clips import write_clip
from tests.redis_server import free_port
from tests.rtsp_faults import Bitstream, Camera
from tests.rtsp_server import CameraServer, black_hole
from tests.waiting import wait_until

WITHIN_S = 30.0
NUM_CYCLES = 60


@dataclass(frozen=True)
class Usage:
    """What this process holds."""

    threads: int
    descriptors: int
    objects: Mapping[str, int]  # of streamd and FFmpeg, by type
    memory_mib: float


def usage() -> Usage:
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    ours = Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).partition(".")[0] in ("streamd", "av"))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Usage(
        threads=len(os.listdir("/proc/self/task")),
        descriptors=len(os.listdir("/proc/self/fd")),
        objects=ours,
        memory_mib=pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20),
    )


class Site:
    """A pipeline whose streams are changed while it runs."""

    def __init__(self, model: Path, urls: Mapping[str, str]) -> None:
        self._model = model
        self.urls = dict(urls)
        self._config = self._make_config()
        self.results: dict[str, list[tuple[int, int]]] = defaultdict(list)  # epoch and seq
        self.states: dict[str, str] = {}
        self.crashes: list[Exception] = []
        self.in_hand = threading.Event()  # a batch is
        self.go_on = threading.Event()
        self.go_on.set()
        self.pipeline = Pipeline(self._config, self._deliver, self._note, self.crashes.append)

    def _make_config(self) -> Config:
        limits = {"open_timeout_s": 2, "read_timeout_s": 20, "stall_timeout_s": 20}
        return Config.model_validate(
            {
                "models": {"m": {"path": str(self._model), "workers": 1, "threads": 1, "max_batch": 2}},
                "streams": {name: {"url": url} | limits for name, url in self.urls.items()},
            }
        )

    def _deliver(self, result: Result) -> None:
        self.in_hand.set()
        assert self.go_on.wait(WITHIN_S)
        self.results[result.frame.stream].append((result.frame.stamp.epoch, result.frame.seq))

    def _note(self, status: Status) -> None:
        self.states[status.stream] = str(status.state)

    def change(self, **urls: str | None) -> None:
        """Add streams, and remove those of no URL."""
        for name, url in urls.items():
            if url is None:
                del self.urls[name]
            else:
                self.urls[name] = url
        config = self._make_config()
        changes = difference(self._config, config)
        self.pipeline.apply(self.pipeline.prepare(config, changes), changes)
        self._config = config


@contextmanager
def running(model: Path, **urls: str) -> Iterator[Site]:
    site = Site(model, urls)
    site.pipeline.warm_up()
    site.pipeline.start()
    try:
        yield site
    finally:
        site.go_on.set()
        site.pipeline.close_intake()
        assert site.pipeline.drain(WITHIN_S) == [] and site.pipeline.join_sources(WITHIN_S) == []
    assert site.crashes == []


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CameraServer]:
    clip = write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 50, gop=25)
    with CameraServer({"gate": Camera(clip)}) as server:
        yield server


def test_streams_that_come_and_go_leave_nothing_behind(untrained_artifact: Path, cameras: CameraServer) -> None:
    """They are removed while they run, connect, wait to try again, and hang in opening; names come twice or once."""
    url, nobody = cameras.url("gate"), f"rtsp://127.0.0.1:{free_port()}/gate"
    with black_hole() as port, running(untrained_artifact, steady=url) as site:

        def cycle(index: int) -> None:
            name = f"guest{index % 40}"
            kind = index % 4
            hangs = index % 20 == 3
            site.results.pop(name, None)
            site.states.pop(name, None)
            site.change(**{name: (url, url, nobody, f"rtsp://127.0.0.1:{port}/gate" if hangs else url)[kind]})
            if kind == 0:
                wait_until(lambda: bool(site.results[name]), f"{name} runs")
            elif kind == 2:
                wait_until(lambda: site.states.get(name) == "unreachable", f"{name} is away")
            site.change(**{name: None})

        for index in range(NUM_CYCLES // 3):
            cycle(index)
        wait_until(lambda: cameras.num_playing() == 1, "the server has let the guests go")
        before = usage()
        for index in range(NUM_CYCLES // 3, NUM_CYCLES):
            cycle(index)
        wait_until(lambda: cameras.num_playing() == 1, "the server has let the guests go")
        wait_until(lambda: usage().threads <= before.threads, "threads have ended")
        after = usage()
        steady = site.results["steady"]
    assert after.descriptors <= before.descriptors
    per_name = {"Timeline"}
    grown = {kind: num - before.objects[kind] for kind, num in after.objects.items() if kind not in per_name}
    assert {kind: num for kind, num in grown.items() if num > NUM_CYCLES // 6} == {}, "objects of each stream are kept"
    assert after.memory_mib - before.memory_mib < 16
    assert {epoch for epoch, _ in steady} == {0}
    assert [seq for _, seq in steady] == sorted(seq for _, seq in steady)


def test_one_url_may_be_two_streams(untrained_artifact: Path, cameras: CameraServer) -> None:
    url = cameras.url("gate")
    with running(untrained_artifact, one=url, two=url) as site:
        wait_until(lambda: min(len(site.results[name]) for name in ("one", "two")) >= 5, "both deliver")


def test_a_stream_is_added_and_another_one_removed_while_a_batch_is_in_hand(
    untrained_artifact: Path, cameras: CameraServer
) -> None:
    url = cameras.url("gate")
    with running(untrained_artifact, one=url, two=url) as site:
        wait_until(lambda: bool(site.results["one"] and site.results["two"]), "both deliver")
        site.go_on.clear()
        site.in_hand.clear()
        assert site.in_hand.wait(WITHIN_S)
        site.change(three=url, two=None)
        num_before = len(site.results["two"])
        site.go_on.set()
        wait_until(lambda: len(site.results["three"]) >= 5, "the new one delivers")
        num_then = len(site.results["one"])
        wait_until(lambda: len(site.results["one"]) > num_then, "the old one goes on")
        assert len(site.results["two"]) <= num_before + 2, "what was in the batch is still delivered, and no more"


def test_a_stream_that_waits_to_reconnect_is_removed_at_once_and_may_come_again(
    untrained_artifact: Path, cameras: CameraServer
) -> None:
    nobody = f"rtsp://127.0.0.1:{free_port()}/gate"
    with running(untrained_artifact, steady=cameras.url("gate"), away=nobody) as site:
        wait_until(lambda: site.states.get("away") == "unreachable", "it is away")
        threads = [thread for thread in threading.enumerate() if thread.name == "stream away"]
        site.change(away=None)
        assert len(threads) == 1 and not threads[0].is_alive()
        site.change(away=cameras.url("gate"))
        wait_until(lambda: bool(site.results["away"]), "it came again")


def test_cameras_that_all_reboot_at_once_are_all_back_within_fifteen_seconds(
    untrained_artifact: Path, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 50, gop=25)
    names = [f"cam{index}" for index in range(16)]
    slow = Bitstream(speed=0.2)
    with (
        CameraServer({name: Camera(clip, bitstream=slow) for name in names}) as server,
        running(untrained_artifact, **{name: server.url(name) for name in names}) as site,
    ):
        wait_until(lambda: set(site.results) == {*names}, "all deliver")
        server.refuse()
        server.hang_up()
        wait_until(lambda: {*site.states.values()} <= {"unreachable", "connecting"}, "all are away")
        time.sleep(3)
        num_before = len(server.events(what="DESCRIBE"))
        site.results.clear()
        server.accept()
        back_at = time.monotonic()
        wait_until(lambda: set(site.results) == {*names}, "all deliver again")
        took_s = time.monotonic() - back_at
        knocks_s = [event.at_s for event in server.events(what="DESCRIBE")[num_before:]]
    assert took_s <= 15
    assert len(knocks_s) == 16 and max(knocks_s) - min(knocks_s) > 0.5, "they came one after the other"
