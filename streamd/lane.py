"""One model on one device, with the streams that it serves and the threads that run it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamd.batch import Batcher
from streamd.batch_limit import BatchLimit
from streamd.config import ModelConfig, StreamConfig
from streamd.cpu_runner import Begun, CpuRunner, HasFrames, TakesBatches
from streamd.device_errors import free_memory, is_device_lost, is_out_of_memory
from streamd.errors import ConfigError, ModelError
from streamd.in_order import InOrder
from streamd.infer import Plan, Wish, choose_plan
from streamd.messages import Detections, Frame, Result, StageTimes
from streamd.metrics.readings import LaneMeter
from streamd.model_file import ModelFile
from streamd.models.spec import ModelSpec, NmsRule
from streamd.runner import Runner

logger = logging.getLogger(__name__)

_Begun = tuple[Begun, Sequence[Frame]]


@dataclass(frozen=True, slots=True, eq=False)
class Fallback:
    """Who sees to the frames of a lane that fails."""

    lane: Lane  # of the version before, on the same device
    on_failure: Callable[[Lane, Exception], None]  # hears once that this lane gives up, and why, in a worker's thread


class Lane:
    """Turn the frames of some streams into results, in each stream's order.

    No frame is lost to a model that fails. Where memory runs out, smaller batches are tried. On probation, any other
    error makes the lane give up: its frames, those of the failed batch too, go to its fallback. Else the error comes
    out of the worker.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        device: str,
        in_order: InOrder,
        file: ModelFile,
        *,
        beside: bool = False,
    ) -> None:
        """Load the model, `beside` others that are at work or not. Raises ModelError or ConfigError.

        `in_order` is common to all lanes between which a stream may move.
        """
        self.name = name
        self.device = device  # as the configuration says it
        self.config = config
        self.file = file
        self.model = file.load(device, config.precision, beside=beside)
        spec = self.model.spec
        self.meter = LaneMeter(name, str(self.model.device), spec.name, spec.weights_sha256)
        self.rule = _nms_rule(spec, config)
        self.tap: Callable[[Result], None] | None = None  # sees each result; must not block
        self._wanted = _wanted_labels(spec, config)
        self._in_order = in_order
        self._limit = BatchLimit(1)
        self._fallback: Fallback | None = None
        self._has_given_up = threading.Event()
        self._is_closed = threading.Event()
        self.batcher = batcher = Batcher(on_take=in_order.expect)
        self.meter.neglected_for_s = lambda: batcher.neglected_for_s

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def has_given_up(self) -> bool:
        """Tell whether all frames go to the fallback."""
        return self._has_given_up.is_set()

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

    def threads(self, plan: Plan) -> Mapping[str, Callable[[], None]]:
        """Give what is to run, each in a thread of its own, until the lane is closed and nothing waits.

        On a CPU a worker does all of a batch. On a GPU one thread queues the work and another takes the results, so
        that the GPU has its next batch while the host describes the last. Raises ModelError where memory is short.
        """
        num_runners = plan.workers if self.model.device.type == "cpu" else 1
        runners, plan = self._runners(plan, num_runners)
        self._limit = BatchLimit(plan.max_batch)
        self.meter.batch_limit = plan.max_batch
        if self.model.device.type == "cpu":
            return {f"infer {self.name} {index}": self._worker(runner, plan) for index, runner in enumerate(runners)}
        begun: queue.SimpleQueue[_Begun[Any] | None] = queue.SimpleQueue()  # bounded by the runner's slots
        return {
            f"infer {self.name}": lambda: self._begin_all(runners[0], begun),
            f"finish {self.name}": lambda: self._finish_all(runners[0], begun),
        }

    def trial_runner(self) -> Runner:
        """Make a runner for single frames beside those at work."""
        return Runner(self.model, self.rule, 1, self._wanted, num_slots=1)

    def rely_on(self, fallback: Fallback | None) -> None:
        """Begin a probation, or end it."""
        self._fallback = fallback

    def close(self) -> None:
        """Take no more frames; the workers end when nothing waits."""
        self._is_closed.set()
        self.batcher.close()

    def _runners(self, plan: Plan, num_runners: int) -> tuple[list[TakesBatches[Any]], Plan]:
        """Make the runners, for smaller batches where the planned ones do not fit into memory."""
        while True:
            try:
                return [self._runner(plan) for _ in range(num_runners)], plan
            except (RuntimeError, ModelError) as err:
                if not is_out_of_memory(err):
                    raise
                if plan.max_batch == 1:
                    raise ModelError(f"{self.file.path}: not enough memory on {self.model.device}: {err}") from err
                free_memory(err, self.model.device)
            plan = replace(plan, max_batch=plan.max_batch // 2)
            logger.warning("model %s: memory is short: batches of at most %d frames", self.name, plan.max_batch)

    def _runner(self, plan: Plan) -> TakesBatches[Any]:
        if self.model.device.type == "cpu":
            return CpuRunner(self.model, self.rule, plan.max_batch, self._wanted, threads=plan.threads)
        runner = Runner(self.model, self.rule, plan.max_batch, self._wanted)
        runner.capture()
        return runner

    def _worker(self, runner: TakesBatches[Any], plan: Plan) -> Callable[[], None]:
        def work() -> None:
            torch.set_num_threads(plan.threads)
            torch.set_flush_denormal(True)
            while frames := self._take():
                if running := self._begin(runner, frames):
                    self._finish(runner, running, frames)

        return work

    def _begin_all(self, runner: TakesBatches[Begun], begun: queue.SimpleQueue[_Begun[Begun] | None]) -> None:
        try:
            while frames := self._take():
                if running := self._begin(runner, frames):
                    begun.put((running, frames))
        finally:
            begun.put(None)

    def _finish_all(self, runner: TakesBatches[Begun], begun: queue.SimpleQueue[_Begun[Begun] | None]) -> None:
        while (batch := begun.get()) is not None:
            self._finish(runner, *batch)

    def _take(self) -> Sequence[Frame]:
        self.meter.batch_limit = self._limit.now
        frames = self.batcher.take(self.meter.batch_limit, self.config.max_wait_ms / 1e3)
        if frames:
            self.meter.begin(frames[0], len(frames))
        return frames

    def _begin(self, runner: TakesBatches[Begun], frames: Sequence[Frame]) -> Begun | None:
        """Begin a batch; None where its frames go elsewhere, or are taken again."""
        if self._pass_on(frames):
            return None
        try:
            return runner.begin(frames)
        except Exception as err:
            self._recover(err, frames)
            return None

    def _finish(self, runner: TakesBatches[Begun], running: Begun, frames: Sequence[Frame]) -> None:
        try:
            runner.wait(running)
            inferred_ns = time.monotonic_ns()
            num_senseless = runner.num_senseless(running)
            detections = runner.finish(running)
            if num_senseless == len(frames) and self._fallback:
                raise ModelError(f"{self.file.path}: gives nothing but NaN and infinity")
        except Exception as err:
            self._recover(err, frames)
            return
        if self._pass_on(frames):  # or the versions would alternate
            return
        self._limit.sufficed()
        self._note_senseless(num_senseless, frames[0])
        results = self._results(running, detections, inferred_ns)
        for result in results:
            self.meter.waited(result.times)
            if self.tap:
                self.tap(result)
        self.meter.end(frames[0], results[0].times)
        self._in_order.complete(results)

    def _recover(self, err: Exception, frames: Sequence[Frame]) -> None:
        """Have a failed batch's frames taken again, here or by the fallback. Raises what cannot be recovered from."""
        if is_device_lost(err):
            raise err
        if fallback := self._fallback:
            if not self._has_given_up.is_set():
                self._has_given_up.set()
                fallback.on_failure(self, err)
            if self._pass_on(frames):
                return
        pause_s = self._limit.ran_out(len(frames)) if is_out_of_memory(err) else None
        if pause_s is None:
            raise err
        self.meter.num_out_of_memory += 1
        logger.warning(
            "model %s on %s: out of memory with %d frame(s) in a batch; at most %d for now",
            *(self.name, self.model.device, len(frames), self._limit.now),
        )
        free_memory(err, self.model.device)
        self._is_closed.wait(pause_s)
        self.meter.abandon(frames[0])
        self.batcher.readmit(frames, {}, by_taker=True)

    def _pass_on(self, frames: Sequence[Frame]) -> bool:
        """Give the frames to the fallback, if this lane has given up."""
        fallback = self._fallback
        if fallback is None or not self._has_given_up.is_set():
            return False
        dropped = {frame.stream: self.batcher.num_dropped(frame.stream) for frame in frames}
        is_taken = fallback.lane.batcher.readmit(frames, dropped)
        if is_taken:
            self.meter.abandon(frames[0])
        return is_taken

    def _note_senseless(self, num_frames: int, first: Frame) -> None:
        if num_frames and not self.meter.num_senseless:  # the counter says how often
            logger.error("%s: model %s gives nothing but NaN and infinity", first.stream, self.name)
        self.meter.num_senseless += num_frames

    def _results(self, running: HasFrames, detections: Sequence[Detections], inferred_ns: int) -> list[Result]:
        done_ns = time.monotonic_ns()
        return [
            Result(
                frame=frame,
                detections=found,
                times=_stage_times(frame, running.begun_ns, inferred_ns, done_ns),
                dropped=self.batcher.num_dropped(frame.stream),
                model=self.name,
                spec=self.spec,
            )
            for frame, found in zip(running.frames, detections, strict=True)
        ]


def devices(config: ModelConfig) -> list[str]:
    """List where a model is to run: `auto` is every GPU, or else the CPU."""
    if config.device == "auto" and torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [config.device]


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
