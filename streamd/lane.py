"""One model on one device, with the streams that it serves and the threads that run it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from streamd.batch import Batcher
from streamd.config import ModelConfig, StreamConfig
from streamd.errors import ConfigError
from streamd.in_order import InOrder
from streamd.infer import Model, Plan, Wish, choose_plan
from streamd.messages import Detections, Frame, Result, StageTimes
from streamd.metrics.readings import LaneMeter
from streamd.models import weights
from streamd.models.spec import ModelSpec, NmsRule
from streamd.runner import Runner, Running


class Lane:
    """Turn the frames of some streams into results, in each stream's order."""

    def __init__(self, name: str, config: ModelConfig, device: str, in_order: InOrder) -> None:
        """Load the model. Raises ModelError or ConfigError.

        `in_order` is common to all lanes between which a stream may move.
        """
        self.name = name
        self.device = device  # as the configuration says it
        self.config = config
        self.model = Model(weights.resolve(config.path), device, config.precision)
        spec = self.model.spec
        self.meter = LaneMeter(name, str(self.model.device), spec.name, spec.weights_sha256)
        self.rule = _nms_rule(spec, config)
        self._wanted = _wanted_labels(spec, config)
        self._in_order = in_order
        self.batcher = Batcher(on_take=in_order.expect)

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

    def threads(self, plan: Plan) -> Mapping[str, Callable[[], None]]:
        """Give what is to run, each in a thread of its own, until the batcher is closed and empty.

        On a CPU a worker does all of a batch. On a GPU one thread queues the work and another takes the results, so
        that the GPU has its next batch while the host describes the last.
        """
        if self.model.device.type == "cpu":
            runners = [self._runner(plan) for _ in range(plan.workers)]
            return {f"infer {self.name} {index}": self._worker(runner, plan) for index, runner in enumerate(runners)}
        runner = self._runner(plan)
        begun: queue.SimpleQueue[Running | None] = queue.SimpleQueue()  # bounded by the runner's slots
        return {
            f"infer {self.name}": lambda: self._begin_all(runner, plan, begun),
            f"finish {self.name}": lambda: self._finish_all(runner, begun),
        }

    def _runner(self, plan: Plan) -> Runner:
        runner = Runner(self.model, self.rule, plan.max_batch, self._wanted)
        runner.capture()
        return runner

    def _worker(self, runner: Runner, plan: Plan) -> Callable[[], None]:
        def work() -> None:
            torch.set_num_threads(plan.threads)
            torch.set_flush_denormal(True)
            while frames := self._take(plan):
                self._complete(runner, runner.begin(frames))

        return work

    def _begin_all(self, runner: Runner, plan: Plan, begun: queue.SimpleQueue[Running | None]) -> None:
        try:
            while frames := self._take(plan):
                begun.put(runner.begin(frames))
        finally:
            begun.put(None)

    def _finish_all(self, runner: Runner, begun: queue.SimpleQueue[Running | None]) -> None:
        while (batch := begun.get()) is not None:
            self._complete(runner, batch)

    def _take(self, plan: Plan) -> Sequence[Frame]:
        frames = self.batcher.take(plan.max_batch, self.config.max_wait_ms / 1e3)
        if frames:
            self.meter.begin(frames[0], len(frames))
        return frames

    def _complete(self, runner: Runner, running: Running) -> None:
        runner.wait(running)
        inferred_ns = time.monotonic_ns()
        detections = runner.finish(running)
        results = self._results(running, detections, inferred_ns)
        for result in results:
            self.meter.waited(result.times)
        self.meter.end(running.batch.frames[0], results[0].times)
        self._in_order.complete(results)

    def _results(self, running: Running, detections: Sequence[Detections], inferred_ns: int) -> list[Result]:
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
            for frame, found in zip(running.batch.frames, detections, strict=True)
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
