"""Run a TorchScript model, with the batch size, threads and workers that measure best on this machine."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from streamd.device_errors import free_memory, is_out_of_memory
from streamd.errors import ConfigError, ModelError
from streamd.gpu.graph import Graph
from streamd.messages import RawOutput
from streamd.models import artifact
from streamd.models.spec import ModelSpec
from streamd.side_by_side import SideBySide

logger = logging.getLogger(__name__)

BATCH_LADDER = (1, 2, 4, 8, 16, 32)
_WORTH_IT = 1.1  # a larger batch adds latency, so it must add this much throughput
_NUM_WARM_UPS = 1  # TorchScript specialises a graph during its first two runs; the check at loading was the first
_NUM_RUNS = 3
_NUM_REPLAYS = 20
Auto = Literal["auto"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Runnable(Protocol):
    """What a runner asks of a model."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def run(self, images: torch.Tensor, sizes: torch.Tensor) -> RawOutput:
        """Run the network on `images` [B, 3, H, W] of `sizes` [B, 2]; see `Model.run`."""
        ...

    def masks(self, features: Sequence[torch.Tensor], boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return mask probabilities [B, N, S, S]; called where the spec has masks of the kind `box`."""
        ...

    def keypoints(self, features: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        """Return logits of heat maps [B, N, J, S, S]; called where the spec has keypoints."""
        ...

    def densepose(self, features: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        """Return the maps [B, N, C, S, S] of a `DensePoseRule`; called where the spec has one."""
        ...


class Model:
    """A loaded model on one device; any number of workers may run it at once."""

    def __init__(
        self, path: Path, device: str = "auto", precision: Precision = "auto", *, frozen: Path | None = None
    ) -> None:
        """Load and optimise the artifact; `auto` is float16 on a GPU, float32 on a CPU.

        `frozen` is what `frozen_apart` gave for it, and for this dtype on a CPU.
        Raises ModelError; ConfigError where there is no such device.
        """
        self.device = find_device(device)
        self.dtype = find_dtype(self.device, precision)
        self._module, self.spec = artifact.load(path, self.device, optimized=True, dtype=self.dtype, frozen=frozen)
        self.path = path
        for _ in range(_NUM_WARM_UPS):
            self.run(*self._blank(1))

    def run(self, images: torch.Tensor, sizes: torch.Tensor) -> RawOutput:
        """Run the network on `images` [B, 3, H, W]; on a GPU this returns before the work is done.

        `sizes` [B, 2] float32: height and width, in input pixels, of the picture within each image.
        """
        try:
            with torch.inference_mode():
                return artifact.forward(self._module, self.spec, images, sizes)
        except RuntimeError as err:
            raise ModelError(
                f"{self.path}: forward failed on images of shape {list(images.shape)}: {artifact.last_line(err)}"
            ) from err

    def masks(self, features: Sequence[torch.Tensor], boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return mask probabilities [B, N, S, S] of boxes [B, N, 4] in input pixels, each for its label [B, N]."""
        with torch.inference_mode():
            return self._module.masks(list(features), boxes, labels)

    def keypoints(self, features: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        """Return logits of heat maps [B, N, J, S, S] of boxes [B, N, 4] in input pixels."""
        with torch.inference_mode():
            return self._module.keypoints(list(features), boxes)

    def densepose(self, features: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        """Return the maps [B, N, C, S, S] of a `DensePoseRule` of boxes [B, N, 4] in input pixels."""
        with torch.inference_mode():
            return self._module.densepose(list(features), boxes)

    def images_per_s(self, workers: int, threads: int, batch: int) -> float:
        """Measure throughput with so many workers at once, each with so many CPU threads."""
        images, sizes = self._blank(batch)
        if self.device.type == "cuda":
            return self._replayed_per_s(images, sizes)
        ready = threading.Barrier(workers + 1)
        failures: list[Exception] = []  # in a thread of its own, none may be lost

        def work() -> None:
            torch.set_num_threads(threads)
            side_by_side = SideBySide(threads)
            parts = side_by_side.parts(batch)
            try:
                side_by_side.each(run, parts)
                ready.wait()
                for _ in range(_NUM_RUNS):
                    side_by_side.each(run, parts)
            except threading.BrokenBarrierError:
                pass  # another worker failed
            except Exception as err:
                failures.append(err)
                ready.abort()

        def run(part: slice) -> RawOutput:
            return self.run(images[part], sizes[part])

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

    def _replayed_per_s(self, images: torch.Tensor, sizes: torch.Tensor) -> float:
        """Measure on a GPU, as a graph where that is possible."""
        stream = torch.cuda.Stream(self.device)
        try:
            run = Graph(lambda: self.run(images, sizes), stream).replay
        except (RuntimeError, ModelError):
            run = functools.partial(self.run, images, sizes)
        with torch.cuda.stream(stream):
            run()
            stream.synchronize()
            started = time.perf_counter()
            for _ in range(_NUM_REPLAYS):
                run()
            stream.synchronize()
        return len(images) * _NUM_REPLAYS / (time.perf_counter() - started)

    def _blank(self, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.zeros((num_images, 3, *self.spec.input_size), dtype=self.dtype, device=self.device)
        sizes = torch.tensor([self.spec.input_size] * num_images, dtype=torch.float32, device=self.device)
        return images, sizes


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
    for size in BATCH_LADDER[1:]:
        if size * best.workers > max(2, wish.num_streams):
            break
        try:
            larger = Plan(best.workers, best.threads, size, model.images_per_s(best.workers, best.threads, size))
        except (RuntimeError, ModelError) as err:
            if not is_out_of_memory(err):
                raise
            free_memory(err, model.device)
            logger.info("%s: no memory for batches of %d", model.spec.name, size)
            break
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


def find_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """Return what a precision means on a device."""
    return _DTYPES["fp32" if device.type == "cpu" else "fp16"] if precision == "auto" else _DTYPES[precision]


def find_device(wanted: str) -> torch.device:
    """Return the device of a name such as cuda:1; `auto` is the GPU where there is one. Raises ConfigError."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as err:
        raise ConfigError(f"device '{wanted}': no such device; use auto, cpu, cuda or cuda:N") from err
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{wanted}': torch sees no GPU here (`streamd doctor` says why); use auto or cpu")
    return device
