"""The data path: streams into models into results. The only file that knows all the stages.

Supervisor threads --Frame--> Batcher --frames--> workers: assemble, run, postprocess --Result--> deliver
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PRIO_PROCESS, setpriority
from typing import Any

import torch

from streamd.allocator import keep_freed_memory
from streamd.batch import Assembler, Batcher
from streamd.config import Config, ModelConfig, StreamConfig
from streamd.decode import Choice, choose_decoder
from streamd.errors import ConfigError, SourceError
from streamd.in_order import InOrder
from streamd.infer import Model, Plan, Wish, choose_plan
from streamd.messages import Batch, Frame, RawOutput, Result, StageTimes, Status, StreamState
from streamd.models import weights
from streamd.models.spec import ModelSpec, NmsRule
from streamd.postprocess import postprocess
from streamd.redact import register_url
from streamd.sources import Source, SourceOptions, Timeline, open_source
from streamd.supervisor import Policy, Supervisor
from streamd.thread_names import name_thread

logger = logging.getLogger(__name__)

_DECODER_NICENESS = 5  # stream threads yield to the model's: a late frame costs one frame, a late model costs all


class Connection:
    """An open source with its decoder, as a supervisor drives it."""

    def __init__(self, source: Source, choice: Choice, stream: str, first_seq: int) -> None:
        self.decoder = str(choice)
        self._source = source
        self._decoder = choice.make(stream, source.video, first_seq)

    def frames(self) -> Iterator[Frame | None]:
        """Yield each decoded frame, and None for a packet that completed none; begins at a key frame."""
        waiting = True
        for packet in self._source.packets():
            waiting = waiting and not packet.keyframe
            decoded = None
            if not waiting:
                for decoded in self._decoder.decode(packet):
                    yield decoded
            if decoded is None:
                yield None
        yield from self._decoder.flush()

    def close(self) -> None:
        self._decoder.close()
        self._source.close()


def connector(stream: str, config: StreamConfig) -> Callable[[int], Connection]:
    """Make the function that connects a stream; its timeline lasts over all of its connections.

    Raises ConfigError where the wanted decoder cannot work here.
    """
    timeline = Timeline()
    register_url(config.url.get_secret_value())
    choice = choose_decoder(config.decoder)
    options = SourceOptions(
        url=config.url.get_secret_value(),
        transport=config.transport,
        open_timeout_s=config.open_timeout_s,
        read_timeout_s=config.read_timeout_s,
    )

    def connect(first_seq: int) -> Connection:
        source = open_source(options, timeline)
        return Connection(source, choice, stream, first_seq)

    return connect


def first_frame(stream: str, config: StreamConfig) -> tuple[Frame, str]:
    """Connect a stream and return its first frame and its decoder. Raises SourceError, or ConfigError."""
    connection = connector(stream, config)(0)
    deadline = time.monotonic() + config.open_timeout_s + config.stall_timeout_s
    try:
        for frame in connection.frames():
            if frame is not None and not frame.corrupt:
                return frame, connection.decoder
            if time.monotonic() > deadline:
                raise SourceError("packets come, but no frame that can be decoded", "waiting_keyframe")
        raise SourceError("holds no frame that can be decoded", permanent=True)
    finally:
        connection.close()


class Lane:
    """One model with the streams that it serves and the workers that run it."""

    def __init__(self, name: str, config: ModelConfig, deliver: Callable[[Result], None]) -> None:
        """Load the model. Raises ModelError or ConfigError."""
        self.name = name
        self.config = config
        self.model = Model(weights.resolve(config.path), config.device)
        self.rule = _nms_rule(self.model.spec, config)
        self._wanted = _wanted_labels(self.model.spec, config)
        self._in_order = InOrder(deliver)
        self.batcher = Batcher(on_take=self._in_order.expect)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def plan(self, streams: Mapping[str, StreamConfig]) -> Plan:
        """Warm the model up and choose how to run it for these streams."""
        config = self.config
        fast_files = any(stream.pace == "fast" for stream in streams.values())
        return choose_plan(
            self.model,
            Wish(
                max_batch=config.max_batch,
                workers=config.workers,
                threads=config.threads,
                budget_ms=min(stream.max_latency_ms for stream in streams.values()),
                num_streams=8 if fast_files else len(streams),
            ),
        )

    def work(self, plan: Plan) -> None:
        """Be a worker's thread: return when the batcher is closed and empty."""
        torch.set_num_threads(plan.threads)
        torch.set_flush_denormal(True)
        assembler = Assembler(self.spec, plan.max_batch, self.model.device, torch.float32)
        max_wait_s = self.config.max_wait_ms / 1e3
        while frames := self.batcher.take(plan.max_batch, max_wait_s):
            taken_ns = time.monotonic_ns()
            batch = assembler.assemble(frames)
            raw = self.model.run(batch)
            inferred_ns = time.monotonic_ns()
            self._in_order.complete(self._results(batch, raw, taken_ns, inferred_ns))

    def _results(self, batch: Batch, raw: RawOutput, taken_ns: int, inferred_ns: int) -> list[Result]:
        detections = postprocess(raw, batch, self.spec, self.rule, self._wanted)
        done_ns = time.monotonic_ns()
        return [
            Result(
                frame=frame,
                detections=found,
                times=_stage_times(frame, taken_ns, inferred_ns, done_ns),
                dropped=self.batcher.num_dropped(frame.stream),
                model=self.name,
            )
            for frame, found in zip(batch.frames, detections, strict=True)
        ]


@dataclass(slots=True)
class _Stream:
    supervisor: Supervisor
    lane: Lane
    thread: threading.Thread


class Pipeline:
    """All the threads between the cameras and the publishers.

    `warm_up`, `start`, then `close_intake`, `drain` and `join_sources`: in this order, each once, by one thread.
    """

    def __init__(
        self,
        config: Config,
        deliver: Callable[[Result], None],
        on_status: Callable[[Status], None] = lambda status: None,
        on_crash: Callable[[Exception], None] = lambda err: None,
        on_end: Callable[[], None] = lambda: None,
        *,
        retry: bool = True,
    ) -> None:
        """Load the models. Raises ModelError or ConfigError.

        `deliver` gets each stream's results in order, from worker threads, and must not block for long.
        `on_crash` hears of an error that is a bug and ends the daemon, `on_end` that the last stream ended.
        Without `retry` a stream that fails ends, and its last status says why.
        """
        self._config = config
        self._on_status = on_status
        self._on_crash = on_crash
        self._on_end = on_end
        keep_freed_memory()
        self._retry = retry
        self._ending = threading.Lock()
        self._num_ended = 0
        used = dict.fromkeys(config.model_of(stream) for stream in config.streams)
        self.lanes = {name: Lane(name, config.models[name], deliver) for name in used}
        self._workers: list[threading.Thread] = []
        self._streams = {name: self._make_stream(name) for name in config.streams}

    @property
    def num_running(self) -> int:
        """Count the streams that deliver frames."""
        return sum(stream.supervisor.status.state == StreamState.RUNNING for stream in self._streams.values())

    def statuses(self) -> list[Status]:
        """Describe every stream as it is now."""
        return [self._complete(stream.supervisor.status) for stream in self._streams.values()]

    def warm_up(self) -> None:
        """Run each model until its settings are chosen, then start its workers."""
        for lane in self.lanes.values():
            served = {name: self._config.streams[name] for name, stream in self._streams.items() if stream.lane is lane}
            plan = lane.plan(served)
            logger.info("model %s: %s on %s: %s", lane.name, lane.spec.name, lane.model.device, plan)
            for index in range(plan.workers):
                worker = threading.Thread(
                    target=self._guarded, args=(lane.work, plan), name=f"infer {lane.name} {index}", daemon=True
                )
                worker.start()
                self._workers.append(worker)

    def start(self, names: Iterable[str] | None = None) -> None:
        """Start these streams, each once; all of them by default."""
        for name in self._streams if names is None else names:
            self._streams[name].thread.start()

    def close_intake(self) -> None:
        """Ask the streams to end and take no more frames; what waits is still processed."""
        for stream in self._streams.values():
            stream.supervisor.stop()
        for lane in self.lanes.values():
            lane.batcher.close()

    def drain(self, deadline_s: float) -> list[str]:
        """Let the workers finish what waits; return those that did not end in time."""
        return _join(self._workers, deadline_s)

    def join_sources(self, deadline_s: float) -> list[str]:
        """Wait for the streams' threads; return those that did not end in time (a camera that hangs in a read)."""
        return _join([stream.thread for stream in self._streams.values()], deadline_s)

    def _make_stream(self, name: str) -> _Stream:
        config = self._config.streams[name]
        lane = self.lanes[self._config.model_of(name)]
        lane.batcher.add(name, lossless=config.is_file and config.pace == "fast")
        supervisor = Supervisor(
            stream=name,
            policy=Policy(
                fps=config.fps,
                realtime=config.is_file and config.pace == "realtime",
                loop=config.loop,
                drop_corrupt=config.corrupt_frames == "drop",
                retry=self._retry,
                stall_timeout_s=config.stall_timeout_s,
            ),
            connect=connector(name, config),
            hand_over=lane.batcher.offer,
            on_status=lambda status: self._on_status(self._complete(status)),
        )
        # Daemon threads only so that a camera that hangs in FFmpeg cannot keep a stopped process alive.
        thread = threading.Thread(
            target=self._guarded, args=(self._run_stream, supervisor), name=f"stream {name}", daemon=True
        )
        return _Stream(supervisor, lane, thread)

    def _run_stream(self, supervisor: Supervisor) -> None:
        with suppress(OSError):  # not allowed in some containers; then they compete
            setpriority(PRIO_PROCESS, threading.get_native_id(), _DECODER_NICENESS)
        supervisor.run()
        with self._ending:
            self._num_ended += 1
            is_last = self._num_ended == len(self._streams)
        if is_last:
            self._on_end()

    def _complete(self, status: Status) -> Status:
        """Add the frames that were dropped behind the supervisor's back."""
        replaced = self._streams[status.stream].lane.batcher.num_dropped(status.stream)
        return replace(status, dropped=status.dropped + replaced)

    def _guarded(self, target: Callable[[Any], None], argument: Any) -> None:
        """Be the top of a thread: what nobody expected ends the daemon, with a trace, instead of one thread."""
        name_thread(threading.current_thread().name)
        try:
            target(argument)
        except Exception as err:
            logger.exception("%s crashed", threading.current_thread().name)
            self._on_crash(err)


def _join(threads: list[threading.Thread], deadline_s: float) -> list[str]:
    deadline = time.monotonic() + deadline_s
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, deadline - time.monotonic()))
    return [thread.name for thread in threads if thread.is_alive()]


def _stage_times(frame: Frame, taken_ns: int, inferred_ns: int, done_ns: int) -> StageTimes:
    arrived_ns = frame.stamp.arrived_ns
    return StageTimes(
        decode=frame.decode_ms,
        wait=max(0.0, (taken_ns - arrived_ns) / 1e6 - frame.decode_ms),
        infer=(inferred_ns - taken_ns) / 1e6,
        post=(done_ns - inferred_ns) / 1e6,
        total=(done_ns - arrived_ns) / 1e6,
    )


def _nms_rule(spec: ModelSpec, config: ModelConfig) -> NmsRule:
    """Take the model's own thresholds where the configuration is silent."""
    rule = spec.nms
    return NmsRule(
        score_threshold=rule.score_threshold if config.score_threshold is None else config.score_threshold,
        iou_threshold=rule.iou_threshold if config.iou_threshold is None else config.iou_threshold,
        max_detections=rule.max_detections if config.max_detections is None else config.max_detections,
        multi_label=rule.multi_label,
    )


def _wanted_labels(spec: ModelSpec, config: ModelConfig) -> frozenset[int] | None:
    """Translate label names to indices. Raises ConfigError for a label that the model does not know."""
    if config.labels is None:
        return None
    unknown = [label for label in config.labels if label not in spec.labels]
    if unknown:
        raise ConfigError(
            f"labels: the model {spec.name} knows no '{unknown[0]}'; its labels are {', '.join(spec.labels[:20])}"
            + (", ..." if len(spec.labels) > 20 else "")
        )
    return frozenset(spec.labels.index(label) for label in config.labels)
