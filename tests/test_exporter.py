"""The daemon's pages: what is in them, and when each says that all is well."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from streamd.announce import Announcer
from streamd.errors import PublishError
from streamd.messages import Frame, Status, StreamState
from streamd.metrics import exporter
from streamd.metrics.collector import FAILURES, Observed
from streamd.metrics.endpoint import Endpoint
from streamd.metrics.exporter import Exporter
from streamd.metrics.gpu import GpuCollector
from streamd.metrics.health import STUCK_AFTER_S
from streamd.metrics.readings import LaneMeter, ModelReading, StreamReading
from streamd.models.spec import ModelSpec
from tests.daemon_process import DaemonProcess
from tests.fakes import NO_TIMES, FakeClock, make_frame, make_result

Labels = Mapping[str, str]
SPEC = ModelSpec(name="untrained", task="detect", labels=("a",), input_size=(64, 96), colour="bgr")


@dataclass
class FakePublisher:
    name: str = "zeromq tcp://127.0.0.1:5555"
    queue_size: int = 1000
    num_queued: int = 3
    num_sent: int = 40
    num_dropped: int = 5
    healthy: bool = True
    sending_for_s: float = 0.0


@dataclass
class FakePipeline:
    streams: list[StreamReading] = field(default_factory=list)
    lanes: list[LaneMeter] = field(default_factory=list)
    versions: list[ModelReading] = field(default_factory=list)

    def readings(self) -> list[StreamReading]:
        return self.streams

    def meters(self) -> list[LaneMeter]:
        return self.lanes

    def models(self) -> list[ModelReading]:
        return self.versions


def make_reading(stream: str, state: StreamState = StreamState.RUNNING, **counts: int) -> StreamReading:
    status = Status(stream, state, "", "software: no GPU", 0.0, None, 2, 100, 7, 1)
    return StreamReading(status, 120, {"corrupt": 1, "replaced": 6}, counts, 0.25)


def make_announcer(*frames: Frame) -> Announcer:
    announcer = Announcer("json", [])
    announcer.know({"people": SPEC})
    for frame in frames:
        announcer.result(make_result(frame))
    return announcer


@pytest.fixture
def observed() -> Observed:
    return Observed(make_announcer(), lambda: [FakePublisher()], pipeline=FakePipeline(), ready=True)


@pytest.fixture
def served(observed: Observed) -> Iterator[Exporter]:
    with Exporter("tcp://127.0.0.1:0", observed) as server:
        yield server


def get(server: Exporter, path: str) -> tuple[int, str]:
    assert server.endpoint is not None
    try:
        with urlopen(f"http://127.0.0.1:{server.endpoint.port}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as err:
        with err:
            return err.code, err.read().decode()


def scrape(server: Exporter) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    status, text = get(server, "/metrics")
    assert status == 200
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    series = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(series) == len(samples), "no series stands there twice"
    return series


def value(server: Exporter, name: str, **labels: str) -> float | None:
    return scrape(server).get((name, frozenset(labels.items())))


def test_a_stream_is_in_exactly_one_state(served: Exporter, observed: Observed) -> None:
    observed.pipeline = FakePipeline([make_reading("gate", StreamState.STALLED), make_reading("yard")])
    states = {
        dict(labels)["state"]: number
        for (name, labels), number in scrape(served).items()
        if name == "streamd_stream_state" and ("stream", "gate") in labels
    }
    assert states == {str(state): float(state == "stalled") for state in StreamState}


def test_the_counts_of_a_stream_are_there(served: Exporter, observed: Observed) -> None:
    observed.pipeline = FakePipeline([make_reading("gate", stalled=4, rejected=1)])
    observed.results = make_announcer(make_frame("gate", 0), make_frame("gate", 1))
    assert value(served, "streamd_stream_packets_total", stream="gate") == 120
    assert value(served, "streamd_stream_frames_decoded_total", stream="gate") == 100
    assert value(served, "streamd_stream_frames_dropped_total", stream="gate", reason="replaced") == 6
    assert value(served, "streamd_stream_results_total", stream="gate") == 2
    assert value(served, "streamd_stream_reconnects_total", stream="gate") == 2
    assert value(served, "streamd_stream_failures_total", stream="gate", state="stalled") == 4
    assert value(served, "streamd_stream_failures_total", stream="gate", state="rejected") == 1
    assert value(served, "streamd_stream_failures_total", stream="gate", state="not_found") == 0
    assert value(served, "streamd_stream_newest_frame_age_seconds", stream="gate") == 0.25
    assert value(served, "streamd_stream_decoder_info", stream="gate", decoder="software") == 1


def test_a_stream_that_was_removed_leaves_no_series(served: Exporter, observed: Observed) -> None:
    pipeline = FakePipeline([make_reading("gate"), make_reading("yard")])
    observed.pipeline = pipeline
    assert any(("stream", "yard") in labels for _, labels in scrape(served))
    pipeline.streams.pop()
    assert not any(("stream", "yard") in labels for _, labels in scrape(served))


def test_every_failure_that_a_stream_can_have_begins_at_nought() -> None:
    assert {"stalled", "unreachable", "unauthorized", "not_found", "failed"} <= set(FAILURES)
    assert not {"running", "ended", "connecting", "waiting_keyframe"} & set(FAILURES)


def test_latency_is_by_the_clock_that_the_capture_time_has(served: Exporter, observed: Observed) -> None:
    frame = make_frame("gate")
    by_arrival = replace(frame, stamp=replace(frame.stamp, arrived_ns=time.monotonic_ns() - 4_000_000_000))
    by_sender = replace(frame, stamp=replace(frame.stamp, clock="sender", captured_at=time.time() - 15))
    ahead = replace(frame, stamp=replace(frame.stamp, clock="sender", captured_at=time.time() + 3600))
    observed.pipeline = FakePipeline([make_reading("gate")])
    observed.results = make_announcer(by_arrival, by_sender, ahead)

    name = "streamd_stream_capture_to_publish_seconds"
    assert value(served, f"{name}_bucket", stream="gate", clock="arrival", le="2") == 0
    assert value(served, f"{name}_count", stream="gate", clock="arrival") == 1
    assert value(served, f"{name}_bucket", stream="gate", clock="sender", le="0.001") == 1, "a clock ahead counts as 0"
    assert value(served, f"{name}_bucket", stream="gate", clock="sender", le="10") == 1
    assert value(served, f"{name}_count", stream="gate", clock="sender") == 2


def test_a_model_has_its_batches_and_times(served: Exporter, observed: Observed) -> None:
    clock = FakeClock()
    meter = LaneMeter("people", "cuda:0", "yolox_s", "abc", clock)
    frames = [make_frame(seq=seq) for seq in range(3)]
    meter.begin(frames[0], 3)
    for _ in frames:
        meter.waited(replace(NO_TIMES, wait=4.0))
    meter.end(frames[0], replace(NO_TIMES, infer=30.0))
    observed.pipeline = FakePipeline(lanes=[LaneMeter("people", "cuda:0", "yolox_nano", "old"), meter])
    names = {"model": "people", "device": "cuda:0"}
    assert value(served, "streamd_model_info", **names, network="yolox_s", sha256="abc") == 1
    assert value(served, "streamd_model_batch_size_bucket", **names, le="2") == 0
    assert value(served, "streamd_model_batch_size_bucket", **names, le="4") == 1
    assert value(served, "streamd_model_queue_wait_seconds_count", **names) == 3
    assert value(served, "streamd_model_queue_wait_seconds_sum", **names) == pytest.approx(0.012)
    assert value(served, "streamd_model_inference_seconds_sum", **names) == pytest.approx(0.03)


def test_a_publisher_has_its_queue_and_losses(served: Exporter) -> None:
    names = {"publisher": "zeromq tcp://127.0.0.1:5555"}
    assert value(served, "streamd_publisher_connected", **names) == 1
    assert value(served, "streamd_publisher_queue_messages", **names) == 3
    assert value(served, "streamd_publisher_queue_limit", **names) == 1000
    assert value(served, "streamd_publisher_sent_total", **names) == 40
    assert value(served, "streamd_publisher_lost_total", **names) == 5


def test_a_spool_has_what_waits_in_it(served: Exporter, observed: Observed) -> None:
    spool = SimpleNamespace(num_entries=12, num_bytes=3400)
    observed.stored = lambda: [SimpleNamespace(name="stored redis redis://a", num_accepted=50, spool=spool)]
    names = {"publisher": "stored redis redis://a"}
    assert value(served, "streamd_spool_entries", **names) == 12
    assert value(served, "streamd_spool_bytes", **names) == 3400
    assert value(served, "streamd_spool_accepted_total", **names) == 50


def test_the_process_tells_memory_threads_and_descriptors(served: Exporter) -> None:
    series = scrape(served)
    for name in (
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_max_fds",
        "streamd_threads",
        "streamd_heap_in_use_bytes",
    ):
        assert series[name, frozenset()] > 1


def test_ready_is_said_from_ready_to_the_stop(served: Exporter, observed: Observed) -> None:
    assert get(served, "/readyz") == (200, "ready\n")
    observed.ready = False
    assert get(served, "/readyz")[0] == 503
    assert get(served, "/healthz") == (200, "ok\n"), "who starts or stops is alive"
    assert value(served, "streamd_ready") == 0


def test_a_stuck_model_and_a_stuck_publisher_are_ill(served: Exporter, observed: Observed) -> None:
    clock = FakeClock()
    meter = LaneMeter("people", "cpu", "yolox_s", "", clock)
    meter.begin(make_frame(), 1)
    observed.pipeline = FakePipeline(lanes=[meter])
    assert get(served, "/healthz")[0] == 200
    clock.advance(STUCK_AFTER_S + 1)
    observed.publishers = lambda: [FakePublisher(sending_for_s=STUCK_AFTER_S + 2)]
    status, text = get(served, "/healthz")
    assert status == 503
    assert "people" in text and "zeromq" in text


def test_a_publisher_that_is_away_is_no_illness_of_the_process(served: Exporter, observed: Observed) -> None:
    observed.publishers = lambda: [FakePublisher(healthy=False)]
    assert get(served, "/healthz")[0] == 200
    assert value(served, "streamd_publisher_connected", publisher="zeromq tcp://127.0.0.1:5555") == 0


def test_pages_are_served_while_the_models_load(served: Exporter, observed: Observed) -> None:
    observed.pipeline, observed.ready = None, False
    assert scrape(served)
    assert get(served, "/healthz")[0] == 200
    assert get(served, "/readyz")[0] == 503


def test_null_serves_nothing(observed: Observed) -> None:
    with Exporter(None, observed) as server:
        assert server.endpoint is None


def test_a_taken_port_stops_only_a_daemon_that_asked_for_it(
    served: Exporter, observed: Observed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken = served.endpoint
    assert taken is not None
    with pytest.raises(PublishError, match="taken"), Exporter(str(taken), observed):
        pass
    monkeypatch.setattr(exporter, "DEFAULT", Endpoint(taken.host, taken.port))
    with Exporter("auto", observed) as server:
        assert server.endpoint is None
    assert str(taken.port) in caplog.text and "going on" in caplog.text


def test_a_daemon_whose_own_address_is_taken_ends_with_69(served: Exporter, demo_clip: Path, tmp_path: Path) -> None:
    config = {
        "models": {"people": {"path": str(tmp_path / "none.pt")}},
        "streams": {"clip": {"url": str(demo_clip)}},
        "publish": {"zeromq": None},
        "metrics": {"listen": str(served.endpoint)},
    }
    daemon = DaemonProcess(tmp_path, config)
    with daemon._socket:
        daemon.start()
        assert daemon.wait(60) == 69
    assert "taken" in daemon.log() and "metrics.listen" in daemon.log()
    assert "Traceback" not in daemon.log()


class FakeNvml:
    """Two GPUs; the second is a MIG slice, which tells its memory and no load."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=3 << 30, total=80 << 30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        if handle == 1:
            raise self.NVMLError("not supported")
        return SimpleNamespace(gpu=25)

    def nvmlDeviceGetDecoderUtilization(self, handle: int) -> list[int]:
        if handle == 1:
            raise self.NVMLError("not supported")
        return [50, 167_000]


class NoDriver(FakeNvml):
    def nvmlInit(self) -> None:
        raise self.NVMLError("driver not loaded")


def gpu_series(nvml: FakeNvml) -> str:
    registry = CollectorRegistry()
    registry.register(GpuCollector(nvml))
    return generate_latest(registry).decode()


def test_each_gpu_tells_what_it_can() -> None:
    text = gpu_series(FakeNvml())
    assert 'streamd_gpu_memory_used_bytes{gpu="1",name="NVIDIA H100"} 3.221225472e+09' in text
    assert 'streamd_gpu_memory_total_bytes{gpu="0",name="NVIDIA H100"}' in text
    assert 'streamd_gpu_sm_load_ratio{gpu="0",name="NVIDIA H100"} 0.25' in text
    assert 'streamd_gpu_nvdec_load_ratio{gpu="0",name="NVIDIA H100"} 0.5' in text
    assert 'load_ratio{gpu="1"' not in text


def test_without_a_driver_there_are_no_gpu_series() -> None:
    assert gpu_series(NoDriver()) == ""
