"""Turn results and states into numbered, encoded messages for the publishers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from streamd import charts, wire
from streamd.messages import Chart, Clock, Detections, Frame, Result, Rle, StageTimes, Status
from streamd.metrics.histogram import SECONDS, Histogram
from streamd.models.spec import ModelSpec
from streamd.publish import Outgoing


class Announcer:
    """Encode each message once and hand it to every outlet.

    Each stream's results come from one thread at a time, so its numbers need no lock.
    """

    def __init__(self, format: wire.Format, outlets: Sequence[Callable[[Outgoing], None]]) -> None:
        """An outlet must not block."""
        self._format = format
        self._outlets = outlets
        self._specs: Mapping[str, ModelSpec] = {}
        self._next_seq: dict[str, int] = {}
        self.num_objects = 0
        self._stored: Collection[str] = ()
        self._latencies: dict[tuple[str, Clock], Histogram] = {}

    def know(self, specs: Mapping[str, ModelSpec]) -> None:
        """Learn the models, by their names in the configuration, whose results come without a spec of their own."""
        self._specs = specs

    def redirect(self, format: wire.Format, outlets: Sequence[Callable[[Outgoing], None]]) -> None:
        """Encode and send otherwise from the next message on; from any thread."""
        self._format, self._outlets = format, outlets

    def store(self, streams: Collection[str]) -> None:
        """Mark the messages of these streams, and of no others, for delivery through the spool; from any thread."""
        self._stored = streams

    @property
    def num_results(self) -> int:
        return sum(self._next_seq.copy().values())

    def num_published(self, stream: str) -> int:
        """Count the results of a stream."""
        return self._next_seq.get(stream, 0)

    def latency(self, stream: str, clock: Clock) -> Histogram | None:
        """Return the times from a frame's capture, by this clock, until its result was with the publishers."""
        return self._latencies.get((stream, clock))

    def message(self, result: Result) -> wire.DetectionsMessage:
        """Number a result and describe it for the wire."""
        stream = result.frame.stream
        spec = result.spec or self._specs[result.model]
        seq = self._next_seq.get(stream, 0)
        self._next_seq[stream] = seq + 1
        self.num_objects += len(result.detections)
        return detections_message(result, seq, spec.labels, spec.weights_sha256, spec.semantic_labels)

    def result(self, result: Result) -> None:
        """Publish a result."""
        self._send(Outgoing(result.frame.stream, "detections", wire.encode(self.message(result), self._format)))
        self._measure(result.frame)

    def status(self, status: Status) -> None:
        """Publish a stream's state."""
        self._send(Outgoing(status.stream, "status", wire.encode(status_message(status), self._format)))

    def _measure(self, frame: Frame) -> None:
        key = frame.stream, frame.stamp.clock
        if key not in self._latencies:
            self._latencies[key] = Histogram(SECONDS)
        if frame.stamp.clock == "arrival":  # by the monotonic clock, which no step of the host's clock moves
            age_s = (time.monotonic_ns() - frame.stamp.arrived_ns) / 1e9
        else:
            age_s = time.time() - frame.stamp.captured_at
        self._latencies[key].observe(max(0.0, age_s))  # a camera's clock may be ahead of this machine's

    def _send(self, outgoing: Outgoing) -> None:
        if outgoing.stream in self._stored:
            outgoing = replace(outgoing, stored=True)
        for outlet in self._outlets:
            outlet(outgoing)


def detections_message(
    result: Result, seq: int, labels: Sequence[str], sha256: str, semantic_labels: Sequence[str] = ()
) -> wire.DetectionsMessage:
    """Put a result into wire form, rounded to what a detector can know: 0.01 px, 4 digits of score, 0.01 ms.

    `semantic_labels` name the segments that are no things.
    """
    frame, detections = result.frame, result.detections
    return wire.DetectionsMessage(
        schema=wire.SCHEMA,
        stream=frame.stream,
        seq=seq,
        epoch=frame.stamp.epoch,
        pts=round(frame.pts_s, 6),
        captured_at=_utc(frame.stamp.captured_at),
        clock=frame.stamp.clock,
        arrived_at=_utc(frame.stamp.arrived_at),
        width=frame.width,
        height=frame.height,
        model=wire.ModelName(name=result.model, sha256=sha256),
        objects=_objects(detections, labels),
        segments=_segments(detections, labels, semantic_labels),
        ms=_milliseconds(result.times),
        dropped=result.dropped,
    )


def status_message(status: Status) -> wire.StatusMessage:
    """Put a status into wire form."""
    return wire.StatusMessage(
        schema=wire.SCHEMA,
        stream=status.stream,
        state=str(status.state),
        reason=status.reason,
        decoder=status.decoder,
        at=_utc(status.at),
        retry_in_s=None if status.retry_in_s is None else round(status.retry_in_s, 2),
        reconnects=status.reconnects,
        frames=status.frames,
        dropped=status.dropped,
        corrupt=status.corrupt,
        error=status.error,
    )


def _objects(detections: Detections, labels: Sequence[str]) -> tuple[wire.DetectedObject, ...]:
    boxes, scores, label_ids = detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist()
    rles = (None,) * len(detections) if detections.masks is None else detections.masks
    surfaces = (None,) * len(detections) if detections.charts is None else detections.charts
    poses = (None,) * len(detections) if detections.keypoints is None else detections.keypoints.tolist()
    return tuple(
        wire.DetectedObject(
            label=labels[label_id],
            label_id=label_id,
            score=round(score, 4),
            box=(round(x1, 2), round(y1, 2), round(x2, 2), round(y2, 2)),
            mask=None if rle is None else _mask(rle),
            keypoints=None if pose is None else tuple(map(_point, pose)),
            densepose=None if chart is None else _chart(chart),
        )
        for (x1, y1, x2, y2), score, label_id, rle, pose, chart in zip(
            boxes, scores, label_ids, rles, poses, surfaces, strict=True
        )
    )


def _point(values: tuple[float, float, float]) -> wire.Point:
    x, y, score = values
    return round(x, 2), round(y, 2), min(round(score, 4), 1.0)  # a sharp peak's score may be a little above 1


def _chart(chart: Chart) -> wire.SurfaceChart:
    _, height, width = chart.planes.shape
    return wire.SurfaceChart(box=chart.box, size=(height, width), data=charts.pack(chart.planes))


def _segments(
    detections: Detections, labels: Sequence[str], semantic_labels: Sequence[str]
) -> tuple[wire.Segment, ...] | None:
    if detections.segments is None:
        return None
    return tuple(
        wire.Segment(
            label=(labels if segment.is_thing else semantic_labels)[segment.label],
            label_id=segment.label,
            thing=segment.is_thing,
            area=segment.area,
            object=segment.detection,
            mask=_mask(segment.mask),
        )
        for segment in detections.segments
    )


def _mask(rle: Rle) -> wire.Mask:
    return wire.Mask(size=(rle.height, rle.width), counts=rle.counts.decode("ascii"))


def _milliseconds(times: StageTimes) -> wire.Milliseconds:
    return wire.Milliseconds(
        decode=round(times.decode, 2),
        wait=round(times.wait, 2),
        infer=round(times.infer, 2),
        post=round(times.post, 2),
        total=round(times.total, 2),
    )


def _utc(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
