"""Three ways from a data set's pictures to the daemon's messages about them; all end in the structs of the wire.

    eager      the network itself  --.
    artifact   infer.Model         --+--> Runner (letterbox, network, suppression, masks) --> message
    daemon     pipeline.Pipeline: streams, decoders, batches, workers, encoded messages   --> message

Pictures are read by the daemon's sources and decoders, whichever way they go, and what is found is rounded as in the
daemon's messages (0.01 px, four digits of a score): that moves AP by less than 0.00001.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import SecretStr
from torch import Tensor, nn

from streamd import wire
from streamd.announce import Announcer, detections_message
from streamd.config import Config, ModelConfig, StreamConfig
from streamd.connection import connector
from streamd.cpu_runner import TakesBatches, make_runner
from streamd.datasets.records import Record
from streamd.decode import Decoders
from streamd.errors import DataError, ModelError, SourceError
from streamd.infer import Precision, Runnable
from streamd.messages import Frame, RawOutput, Result, StageTimes, Status, StreamState
from streamd.models import artifact, rebuild
from streamd.models.contract import pack
from streamd.models.spec import ModelSpec, NmsRule
from streamd.models.weights import load_weights
from streamd.pipeline import Pipeline
from streamd.wire import DetectionsMessage

_MAX_OPEN = 16  # pictures that the pipeline reads at once: two batches
_DEADLINE_S = 5.0  # for the threads to end
_PATIENCE_S = 60.0  # a slow disk is no failure
_NOT_OVER = frozenset((StreamState.CONNECTING, StreamState.WAITING_KEYFRAME, StreamState.RUNNING))

Seen = tuple[Record, DetectionsMessage]


@dataclass(slots=True, eq=False)
class Spent:
    """Where the time went, summed over images."""

    decode_ms: float = 0.0
    infer_ms: float = 0.0
    post_ms: float = 0.0
    seconds: float = 0.0  # wall clock, from the first picture to the last message
    num_images: int = 0
    _batches: set[tuple[float, float]] = field(default_factory=set)

    def add(self, times: StageTimes) -> None:
        """Add one image, which shares its batch's times with the batch; those are told apart by their nanoseconds."""
        self.num_images += 1
        self.decode_ms += times.decode
        if (times.infer, times.post) not in self._batches:
            self._batches.add((times.infer, times.post))
            self.infer_ms += times.infer
            self.post_ms += times.post

    @contextmanager
    def clocked(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


class EagerModel:
    """A network in Python, where `infer.Model` is its artifact; the runner takes either.

    It puts the network into evaluation mode and leaves it there.
    """

    def __init__(
        self, network: nn.Module, spec: ModelSpec, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Use the network where it is: its weights must lie on `device` and be `dtype`."""
        self.network = network.eval()
        self.spec, self.device, self.dtype = spec, device, dtype

    # Not inference_mode: what a network caches in it, such as anchors, could never be trained with.
    @torch.no_grad()
    def run(self, images: Tensor, sizes: Tensor) -> RawOutput:
        """Run the network as `infer.Model.run` does. Raises ModelError."""
        try:
            output = self.network(images, sizes) if self.spec.sized else self.network(images)
        except RuntimeError as err:
            raise ModelError(f"{self.spec.name}: forward failed on images of {list(images.shape)}: {err}") from err
        return pack(output)

    @torch.no_grad()
    def masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return mask probabilities [B,N,S,S]."""
        method: Callable[..., Tensor] = self.network.masks  # type: ignore[assignment]
        return method(list(features), boxes, labels)

    @torch.no_grad()
    def keypoints(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return logits of heat maps [B,N,J,S,S]."""
        method: Callable[..., Tensor] = self.network.keypoints  # type: ignore[assignment]
        return method(list(features), boxes)

    @torch.no_grad()
    def densepose(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return the maps [B,N,C,S,S] of a `DensePoseRule`."""
        method: Callable[..., Tensor] = self.network.densepose  # type: ignore[assignment]
        return method(list(features), boxes)


def load_eager(path: Path, device: torch.device) -> EagerModel:
    """Build the network that an artifact was made from, with its weights. Raises ModelError."""
    spec = artifact.read_spec(path)
    if spec.blueprint is None:
        raise ModelError(
            f"{path}: does not say how its network was built, so it cannot be run as one; "
            "evaluate it through the artifact or the daemon, or import or export it again with this streamd"
        )
    state = artifact.read_state(path)
    network, _ = rebuild.build(spec.blueprint, state)
    load_weights(network, {name: state[name] for name in network.state_dict() if name in state})
    return EagerModel(network.to(device), spec, device)


def see(model: Runnable, records: Sequence[Record], rule: NmsRule, batch_size: int, spent: Spent) -> Iterator[Seen]:
    """Take pictures through the runner, a batch at a time.

    Raises DataError for a picture that cannot be decoded or has not the size that its annotation says.
    """
    runner = make_runner(model, rule, batch_size)
    decoders = Decoders(model.device)
    try:
        for first in range(0, len(records), batch_size):
            batch = records[first : first + batch_size]
            with spent.clocked():
                results = _run(runner, [read(record, decoders) for record in batch], model.spec.name)
            for record, result in zip(batch, results, strict=True):
                spent.add(result.times)
                labels, semantic_labels = model.spec.labels, model.spec.semantic_labels
                yield record, detections_message(result, 0, labels, model.spec.weights_sha256, semantic_labels)
    finally:
        decoders.close()


def _run(runner: TakesBatches[Any], frames: Sequence[Frame], name: str) -> list[Result]:
    begun_ns = time.monotonic_ns()
    running = runner.begin(frames)
    runner.wait(running)
    inferred_ns = time.monotonic_ns()
    detections = runner.finish(running)
    done_ns = time.monotonic_ns()
    infer_ms, post_ms = (inferred_ns - begun_ns) / 1e6, (done_ns - inferred_ns) / 1e6
    return [
        Result(
            frame=frame,
            detections=found,
            times=StageTimes(frame.decode_ms, 0.0, infer_ms, post_ms, frame.decode_ms + infer_ms + post_ms),
            dropped=0,
            model=name,
        )
        for frame, found in zip(running.frames, detections, strict=True)
    ]


def read(record: Record, decoders: Decoders) -> Frame:
    """Decode a picture as the daemon decodes files. Raises DataError."""
    try:
        connection = connector("picture", _stream(record.file), decoders)(0)
        try:
            frame = next((frame for frame in connection.frames() if frame is not None), None)
        finally:
            connection.close()
    except SourceError as err:
        raise DataError(f"{record.file}: {err}") from err
    if frame is None:
        raise DataError(f"{record.file}: holds no picture that can be decoded; replace it or take it out of the data")
    _check_size(record, frame.width, frame.height)
    return frame


def see_as_daemon(
    config: ModelConfig, name: str, records: Sequence[Record], spent: Spent
) -> Iterator[tuple[Record, DetectionsMessage]]:
    """Take pictures through the daemon's pipeline, each as a stream, and read its messages back as a subscriber does.

    They come in any order. Raises DataError as `see` does, ModelError and ConfigError.
    """
    by_stream = {f"picture-{index}": record for index, record in enumerate(records)}
    tree = Config(models={name: config}, streams={stream: _stream(one.file) for stream, one in by_stream.items()})
    events: queue.SimpleQueue[tuple[str, bytes, StageTimes] | Status | Exception] = queue.SimpleQueue()
    announcer = Announcer("json", [])

    def deliver(result: Result) -> None:
        events.put((result.frame.stream, wire.encode(announcer.message(result)), result.times))

    def note(status: Status) -> None:
        if status.state not in _NOT_OVER:
            events.put(status)

    pipeline = Pipeline(tree, deliver, note, events.put, retry=False)
    announcer.know(pipeline.specs)
    try:
        pipeline.warm_up()
        with spent.clocked():
            yield from _collect(pipeline, by_stream, events, spent)
    finally:
        pipeline.close_intake()
        pipeline.drain(_DEADLINE_S)
        pipeline.join_sources(_DEADLINE_S)


def _collect(
    pipeline: Pipeline,
    by_stream: dict[str, Record],
    events: queue.SimpleQueue[tuple[str, bytes, StageTimes] | Status | Exception],
    spent: Spent,
) -> Iterator[Seen]:
    """Keep some streams open until each has ended and given its one message."""
    waiting = iter(by_stream)
    lacking: dict[str, int] = {}  # of each open stream: whether it has to end, and whether to give its message
    while True:
        while len(lacking) < _MAX_OPEN and (stream := next(waiting, None)) is not None:
            lacking[stream] = 2
            pipeline.start([stream])
        if not lacking:
            return
        event = events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Status):
            stream = event.stream
            if event.state != StreamState.ENDED or event.frames != 1:
                reason = event.reason or f"holds {event.frames} pictures instead of one"
                raise DataError(f"{by_stream[stream].file}: {reason}")
        else:
            stream, payload, times = event
            message = wire.decode(payload, "detections")
            _check_size(by_stream[stream], message.width, message.height)
            spent.add(times)
            yield by_stream[stream], message
        lacking[stream] -= 1
        if not lacking[stream]:
            del lacking[stream]


def daemon_model(path: Path, rule: NmsRule, batch_size: int, device: str, precision: Precision) -> ModelConfig:
    """Configure a model as the daemon's user would, with these thresholds, one worker and as many threads as here."""
    return ModelConfig(
        path=str(path),
        device=device,
        precision=precision,
        score_threshold=rule.score_threshold,
        max_detections=rule.max_detections,
        max_batch=batch_size,
        workers=1,
        threads=torch.get_num_threads(),
    )


def _stream(file: Path) -> StreamConfig:
    return StreamConfig(
        url=SecretStr(f"file://{file.absolute()}"),
        pace="fast",
        corrupt_frames="publish",
        max_latency_ms=60_000,  # nobody waits for a single picture
        open_timeout_s=_PATIENCE_S,
        read_timeout_s=_PATIENCE_S,
        stall_timeout_s=_PATIENCE_S,
    )


def _check_size(record: Record, width: int, height: int) -> None:
    if (width, height) != (record.width, record.height):
        raise DataError(
            f"{record.file}: decoded upright it has {width}x{height} pixels, but its annotation says "
            f"{record.width}x{record.height}; its boxes would be compared in the wrong place"
        )
