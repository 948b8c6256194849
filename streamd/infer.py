"""Run a TorchScript model, with the batch size, threads and workers that measure best on this machine."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from streamd.errors import ConfigError, ModelError
from streamd.messages import Batch, RawOutput
from streamd.models import artifact

logger = logging.getLogger(__name__)

_BATCH_LADDER = (2, 4, 8, 16, 32)
_WORTH_IT = 1.1  # a larger batch adds latency, so it must add this much throughput
_NUM_WARM_UPS = 1  # TorchScript specialises a graph during its first two runs; the check at loading was the first
_NUM_RUNS = 3
_OUTPUTS = tuple(output.name for output in fields(RawOutput))
Auto = Literal["auto"]


class Model:
    """A loaded model on one device; any number of workers may run it at once."""

    def __init__(self, path: Path, device: str = "auto") -> None:
        """Load and optimise the artifact. Raises ModelError; ConfigError where there is no such device."""
        self.device = _device(device)
        self._module, self.spec = artifact.load(path, self.device, optimized=True)
        self.path = path
        for _ in range(_NUM_WARM_UPS):
            self._run_to_end(self._blank(1))

    def run(self, batch: Batch) -> RawOutput:
        """Run the network on `batch.images`; on a GPU this returns before the work is done."""
        return self._forward(batch.images)

    def _forward(self, images: torch.Tensor) -> RawOutput:
        try:
            with torch.inference_mode():
                output = self._module(images)
            return RawOutput(**{name: output[name] for name in _OUTPUTS if name in output})
        except RuntimeError as err:
            raise ModelError(f"{self.path}: forward failed on images of shape {list(images.shape)}: {err}") from err

    def images_per_s(self, workers: int, threads: int, batch: int) -> float:
        """Measure throughput with so many workers at once, each with so many CPU threads."""
        images = self._blank(batch)
        ready = threading.Barrier(workers + 1)
        failures: list[Exception] = []  # in a thread of its own, none may be lost

        def work() -> None:
            torch.set_num_threads(threads)
            try:
                self._run_to_end(images)
                ready.wait()
                for _ in range(_NUM_RUNS):
                    self._run_to_end(images)
            except threading.BrokenBarrierError:
                pass  # another worker failed
            except Exception as err:
                failures.append(err)
                ready.abort()

        measured = [threading.Thread(target=work, name=f"warm-up {i}") for i in range(workers)]
        for thread in measured:
            thread.start()
        with suppress(threading.BrokenBarrierError):
            ready.wait()
        started = time.perf_counter()
        for thread in measured:
            thread.join()
        if failures:
            raise failures[0]
        return workers * batch * _NUM_RUNS / (time.perf_counter() - started)

    def _blank(self, num_images: int) -> torch.Tensor:
        return torch.zeros((num_images, 3, *self.spec.input_size), device=self.device)

    def _run_to_end(self, images: torch.Tensor) -> None:
        self._forward(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the configuration says of how a model is run."""

    max_batch: int | Auto = "auto"
    workers: int | Auto = "auto"
    threads: int | Auto = "auto"
    budget_ms: float = 200.0  # the strictest `max_latency_ms` of the model's streams
    num_streams: int = 1  # a larger batch than this would only wait


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is run."""

    workers: int
    threads: int  # CPU threads of each worker
    max_batch: int
    images_per_s: float  # measured at warm-up with full batches

    @property
    def batch_ms(self) -> float:
        """How long one full batch takes while all workers are busy."""
        return self.workers * self.max_batch / self.images_per_s * 1e3

    def fits(self, budget_ms: float) -> bool:
        """Tell whether a frame that comes just after a batch began is done within the budget."""
        return 2 * self.batch_ms <= budget_ms

    def __str__(self) -> str:
        return (
            f"{self.workers} worker(s) of {self.threads} thread(s), batches of up to {self.max_batch}, "
            f"measured {self.images_per_s:.1f} images/s, {self.batch_ms:.0f} ms a batch"
        )


def choose_plan(model: Model, wish: Wish) -> Plan:
    """Measure on the idle machine: the fewest threads a worker with which a batch fits the latency budget, then the
    largest batch that fits it and pays.

    Several one-thread workers beat one worker of several threads on a CPU: they have no barrier at which a decoder's
    preemption of one thread stops the others. Where nothing fits the budget, the shortest batch is taken.
    """
    plans = []
    for workers, threads in _layouts(model, wish):
        first = wish.max_batch if wish.max_batch != "auto" else 1
        plans.append(Plan(workers, threads, first, model.images_per_s(workers, threads, first)))
        logger.debug("%s: %s", model.spec.name, plans[-1])
        if plans[-1].fits(wish.budget_ms):
            break
    best = min(plans, key=lambda plan: (not plan.fits(wish.budget_ms), plan.batch_ms))
    if wish.max_batch != "auto" or not best.fits(wish.budget_ms):
        return best
    for size in _BATCH_LADDER:
        if size * best.workers > max(2, wish.num_streams):
            break
        larger = Plan(best.workers, best.threads, size, model.images_per_s(best.workers, best.threads, size))
        logger.debug("%s: %s", model.spec.name, larger)
        if not larger.fits(wish.budget_ms) or larger.images_per_s < best.images_per_s * _WORTH_IT:
            break
        best = larger
    return best


def _layouts(model: Model, wish: Wish) -> Sequence[tuple[int, int]]:
    """List the (workers, threads) worth measuring, those with fewer barriers first."""
    if model.device.type == "cuda":
        return [(1 if wish.workers == "auto" else wish.workers, 1)]
    cores = len(os.sched_getaffinity(0))
    if wish.workers != "auto":
        return [(wish.workers, max(1, cores // wish.workers) if wish.threads == "auto" else wish.threads)]
    if wish.threads != "auto":
        return [(max(1, cores // wish.threads), wish.threads)]
    threads = sorted({1, min(4, cores), cores})
    return [(max(1, cores // count), count) for count in threads]


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{wanted}': torch sees no GPU here (`streamd doctor` says why); use auto or cpu")
    return device
