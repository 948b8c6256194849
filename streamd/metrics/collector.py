"""Turn what the stages have counted into Prometheus series, when a scrape asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from streamd import __version__
from streamd.allocator import heap_in_use
from streamd.messages import Clock, StreamState
from streamd.metrics.health import STUCK_AFTER_S, stuck_loops
from streamd.metrics.histogram import Histogram
from streamd.metrics.readings import LaneMeter, ModelReading, StreamReading
from streamd.publish import Counted

# There from the first scrape with 0, or `increase` would not see the first one happen.
FAILURES = tuple(
    state
    for state in StreamState
    if state not in (StreamState.CONNECTING, StreamState.WAITING_KEYFRAME, StreamState.RUNNING, StreamState.ENDED)
)


class SpoolView(Protocol):
    """The part of a spool that is counted; nothing of it may wait for the disk."""

    @property
    def num_entries(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class StoredView(Protocol):
    """The part of a publisher with a spool that is counted beside the rest."""

    @property
    def name(self) -> str: ...
    @property
    def num_accepted(self) -> int: ...
    @property
    def spool(self) -> SpoolView: ...


class Results(Protocol):
    """The part of an announcer that is counted."""

    def num_published(self, stream: str) -> int: ...
    def latency(self, stream: str, clock: Clock) -> Histogram | None: ...


class Pipeline(Protocol):
    """The part of a pipeline that is counted."""

    def readings(self) -> list[StreamReading]: ...
    def meters(self) -> list[LaneMeter]: ...
    def models(self) -> list[ModelReading]: ...


@dataclass(slots=True)
class Observed:
    """What is looked at: by functions, since a reload replaces it."""

    results: Results
    publishers: Callable[[], Sequence[Counted]]
    stored: Callable[[], Sequence[StoredView]] = tuple  # the publishers that have a spool
    pipeline: Pipeline | None = field(default=None)  # None while the models load
    ready: bool = False  # from READY=1 until the daemon stops
    stuck_after_s: float = STUCK_AFTER_S

    def stuck(self) -> list[str]:
        """Name the loops that hang: what /healthz says, and what a watchdog goes by."""
        meters = self.pipeline.meters() if self.pipeline else []
        return list(stuck_loops(meters, self.publishers(), self.stuck_after_s))


class DaemonCollector(Collector):
    """Read the daemon's counts; nothing is kept here, so a stream or model that is gone leaves no series behind."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def collect(self) -> Iterator[Metric]:
        observed = self._observed
        yield from _process(observed.ready)
        if observed.pipeline:
            yield from _streams(observed.pipeline.readings(), observed.results)
            yield from _models(observed.pipeline.meters())
            yield from _versions(observed.pipeline.models())
        yield from _publishers(observed.publishers())
        yield from _spools(observed.stored())


def _process(ready: bool) -> Iterator[Metric]:
    yield _gauge("build_info", "Always 1; which version runs", ["version"], [([__version__], 1)])
    yield _gauge("ready", "1 from READY=1 until the daemon stops", [], [([], ready)])
    yield _gauge("threads", "Threads of the process", [], [([], len(os.listdir("/proc/self/task")))])
    if (in_use := heap_in_use()) is not None:
        yield _gauge("heap_in_use_bytes", "Allocated by malloc and not freed", [], [([], in_use)])


def _streams(readings: list[StreamReading], results: Results) -> Iterator[Metric]:
    named = [(reading.status.stream, reading) for reading in readings]
    yield _gauge(
        "stream_state",
        "1 for the state that the stream is in, 0 for the others",
        ["stream", "state"],
        (([name, state], reading.status.state == state) for name, reading in named for state in StreamState),
    )
    yield _gauge(
        "stream_decoder_info",
        "Always 1; which decoder is at work",
        ["stream", "decoder"],
        (([name, of.status.decoder.partition(":")[0]], 1) for name, of in named if of.status.decoder),
    )
    yield _gauge(
        "stream_newest_frame_age_seconds",
        "Since the newest frame was decoded; absent before the first",
        ["stream"],
        (([name], of.newest_age_s) for name, of in named if of.newest_age_s is not None),
    )
    yield _counter("stream_packets", "Access units read", ["stream"], (([name], of.num_packets) for name, of in named))
    yield _counter(
        "stream_frames_decoded", "Frames decoded", ["stream"], (([name], of.status.frames) for name, of in named)
    )
    yield _counter(
        "stream_frames_dropped",
        "Frames decoded but not processed: corrupt, late (a repeated or backward time), thinned (over `fps`), "
        "replaced (by a newer one before the model was free)",
        ["stream", "reason"],
        (([name, reason], count) for name, of in named for reason, count in of.num_dropped.items()),
    )
    yield _counter(
        "stream_results",
        "Frames processed, and their results handed to the publishers",
        ["stream"],
        (([name], results.num_published(name)) for name, _ in named),
    )
    yield _counter(
        "stream_reconnects",
        "Connections after the first",
        ["stream"],
        (([name], of.status.reconnects) for name, of in named),
    )
    yield _counter(
        "stream_failures",
        "Failed tries and lost connections, by the state that the stream entered",
        ["stream", "state"],
        (
            ([name, state], of.num_failures.get(state, 0))
            for name, of in named
            for state in dict.fromkeys([*FAILURES, *of.num_failures])
        ),
    )
    yield _histogram(
        "stream_capture_to_publish_seconds",
        "From a frame's capture until its result is with the publishers; clock says whose time the capture has",
        ["stream", "clock"],
        (
            ([name, clock], latency)
            for name, _ in named
            for clock in get_args(Clock)
            if (latency := results.latency(name, clock))
        ),
    )


def _models(meters: list[LaneMeter]) -> Iterator[Metric]:
    # While a reload replaces a model, two of one name may be there: the newer one counts.
    named = list({(meter.model, meter.device): meter for meter in meters}.items())
    labels = ["model", "device"]
    yield _gauge(
        "model_info",
        "Always 1; which weights run",
        [*labels, "network", "sha256"],
        (([*name, meter.network, meter.sha256], 1) for name, meter in named),
    )
    yield _gauge(
        "model_busy_seconds",
        "How long the oldest batch has been in hand; 0 when idle",
        labels,
        ((name, meter.busy_for_s) for name, meter in named),
    )
    yield _histogram("model_batch_size", "Frames of a batch", labels, ((name, of.batch_sizes) for name, of in named))
    yield _histogram(
        "model_queue_wait_seconds",
        "From decoded to taken by a batch, of each frame",
        labels,
        ((name, meter.queue_waits) for name, meter in named),
    )
    yield _histogram(
        "model_inference_seconds",
        "Letterbox, model and suppression, of each batch",
        labels,
        ((name, meter.inferences) for name, meter in named),
    )
    yield _gauge(
        "model_batch_limit",
        "Most frames of a batch now; less than planned after memory ran out",
        labels,
        ((name, of.batch_limit) for name, of in named),
    )
    yield _counter(
        "model_out_of_memory",
        "Batches for which memory ran out; their frames were tried again",
        labels,
        ((name, of.num_out_of_memory) for name, of in named),
    )
    yield _counter(
        "model_senseless_results",
        "Frames of which the model said nothing but NaN or infinity",
        labels,
        ((name, of.num_senseless) for name, of in named),
    )


def _versions(models: list[ModelReading]) -> Iterator[Metric]:
    yield _gauge(
        "model_on_probation",
        "1 while the version before stands by in memory",
        ["model"],
        (([of.model], of.on_probation) for of in models),
    )
    yield _counter(
        "model_swaps",
        "What became of new versions: live, refused, rolled_back",
        ["model", "outcome"],
        (([of.model, outcome], count) for of in models for outcome, count in of.num_outcomes.items()),
    )


def _publishers(publishers: Sequence[Counted]) -> Iterator[Metric]:
    named = [([publisher.name], publisher) for publisher in publishers]
    labels = ["publisher"]
    yield _gauge("publisher_connected", "1 while sends succeed", labels, ((name, of.healthy) for name, of in named))
    yield _gauge(
        "publisher_queue_messages", "Messages that wait", labels, ((name, of.num_queued) for name, of in named)
    )
    yield _gauge(
        "publisher_queue_limit", "The most messages that wait", labels, ((name, of.queue_size) for name, of in named)
    )
    yield _gauge(
        "publisher_sending_seconds",
        "How long the send under way has taken; 0 when none is",
        labels,
        ((name, of.sending_for_s) for name, of in named),
    )
    yield _counter("publisher_sent", "Messages sent", labels, ((name, of.num_sent) for name, of in named))
    yield _counter(
        "publisher_lost",
        "Messages lost to a full queue, to a failing sink, or left over at the stop",
        labels,
        ((name, of.num_dropped) for name, of in named),
    )


def _spools(stored: Sequence[StoredView]) -> Iterator[Metric]:
    named = [([publisher.name], publisher) for publisher in stored]
    labels = ["publisher"]
    yield _gauge(
        "spool_entries", "Entries on disk, not confirmed", labels, ((name, of.spool.num_entries) for name, of in named)
    )
    yield _gauge("spool_bytes", "Bytes of these, about", labels, ((name, of.spool.num_bytes) for name, of in named))
    yield _counter("spool_accepted", "Entries written to disk", labels, ((name, of.num_accepted) for name, of in named))


_Samples = Iterable[tuple[Sequence[str], float]]


def _gauge(name: str, text: str, labels: Sequence[str], samples: _Samples) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"streamd_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: Sequence[str], samples: _Samples) -> CounterMetricFamily:
    """Make a counter; its samples are called `streamd_<name>_total`."""
    family = CounterMetricFamily(f"streamd_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _histogram(
    name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], Histogram]]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"streamd_{name}", text, labels=labels)
    for values, histogram in samples:
        buckets, total = histogram.read()
        family.add_metric(values, buckets, total)
    return family
