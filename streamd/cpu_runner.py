"""Take batches of frames through one model on a CPU: the frames side by side, not one operator after another.

Of large pictures only as many are in memory at once as there are threads.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch

from streamd.infer import Runnable
from streamd.messages import Detections, Frame
from streamd.models.spec import NmsRule
from streamd.runner import Runner
from streamd.side_by_side import SideBySide


class HasFrames(Protocol):
    """A batch that was begun."""

    @property
    def begun_ns(self) -> int: ...

    @property
    def frames(self) -> tuple[Frame, ...]: ...


Begun = TypeVar("Begun", bound=HasFrames)


class TakesBatches(Protocol[Begun]):
    """What `Runner` and `CpuRunner` have in common."""

    def begin(self, frames: Sequence[Frame]) -> Begun: ...

    def wait(self, running: Begun) -> None: ...

    def num_senseless(self, running: Begun) -> int: ...

    def finish(self, running: Begun) -> list[Detections]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """A batch that was begun, and is finished already."""

    begun_ns: int  # monotonic clock, ns
    frames: tuple[Frame, ...]
    detections: list[Detections]
    num_senseless: int


class CpuRunner:
    """One model's way from frames to detections on a CPU; used by one thread."""

    def __init__(
        self,
        model: Runnable,
        rule: NmsRule,
        max_batch: int,
        labels: frozenset[int] | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        """Use so many threads, by default as many as torch does in the calling thread."""
        self._side_by_side = SideBySide(threads or torch.get_num_threads())
        self._idle: queue.SimpleQueue[Runner] = queue.SimpleQueue()
        for _ in range(min(self._side_by_side.threads, max_batch)):
            self._idle.put(Runner(model, rule, max_batch if self._side_by_side.threads == 1 else 1, labels))

    def begin(self, frames: Sequence[Frame]) -> Done:
        """Take a batch all the way. Raises ModelError."""
        begun_ns = time.monotonic_ns()
        parts = [frames[part] for part in self._side_by_side.parts(len(frames))]
        seen = self._side_by_side.each(self._see, parts)
        detections = list(chain.from_iterable(found for found, _ in seen))
        return Done(begun_ns, tuple(frames), detections, sum(number for _, number in seen))

    def wait(self, running: Done) -> None:
        """Do nothing: the batch is done."""

    def num_senseless(self, running: Done) -> int:
        """Count the frames of which the model said nothing but NaN or infinity."""
        return running.num_senseless

    def finish(self, running: Done) -> list[Detections]:
        """Say what is in each frame of a batch."""
        return running.detections

    def _see(self, frames: Sequence[Frame]) -> tuple[list[Detections], int]:
        runner = self._idle.get()
        try:
            running = runner.begin(frames)
            number = runner.num_senseless(running)
            return runner.finish(running), number
        finally:
            self._idle.put(runner)


def make_runner(model: Runnable, rule: NmsRule, max_batch: int) -> TakesBatches[Any]:
    """Make what is fastest for one batch at a time on the model's device."""
    if model.device.type == "cpu":
        return CpuRunner(model, rule, max_batch)
    return Runner(model, rule, max_batch, num_slots=1)
