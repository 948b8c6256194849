"""Decode the chunks of many streams together with DALI: one thread and one pipeline for each kind of chunk and GPU."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from streamd.decode.gop import GopError
from streamd.threads import name_thread

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

logger = logging.getLogger(__name__)

Kind = Literal["videos", "images"]

_MAX_BYTES = 4 << 30  # of decoded RGB in one batch: 690 frames of 1080p
_CLOSE_DEADLINE_S = 5.0


class Runner(Protocol):
    """What decodes a batch."""

    max_batch: int

    def decode(self, samples: Sequence[bytes]) -> list[torch.Tensor]:
        """Return the frames of each sample [F, H, W, 3] uint8. Raises RuntimeError where one of them is bad."""
        ...


class DaliRunner:
    """Run a DALI pipeline, which is made anew after an error: DALI says that it is no longer valid then.

    On a GPU the frames are whole in the order of its default stream, which torch and FFmpeg's decoder use too.
    """

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.max_batch = {"videos": 16, "images": 64}[kind]
        self._kind = kind
        self._device = device
        self._pipeline: Pipeline | None = None

    def decode(self, samples: Sequence[bytes]) -> list[torch.Tensor]:
        try:
            pipeline = self._pipeline or self._build()
            pipeline.feed_input("encoded", [np.frombuffer(sample, np.uint8) for sample in samples])
            (decoded,) = pipeline.run(self._stream())
        except RuntimeError:
            self._pipeline = None
            raise
        self._pipeline = pipeline
        frames = [from_dlpack(decoded[index]) for index in range(len(samples))]
        return [picture[None] for picture in frames] if self._kind == "images" else frames

    def _build(self) -> Pipeline:
        from nvidia.dali import fn, types  # here: it takes half a second and few machines need it
        from nvidia.dali.pipeline import Pipeline

        on_gpu = self._device.type == "cuda"
        placement = {"device": "mixed", "affine": False} if on_gpu else {"device": "cpu"}
        pipeline = Pipeline(
            batch_size=self.max_batch,
            num_threads=8 if on_gpu else 1,  # an H100 has seven decoders
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,  # no batch waits behind another
            exec_dynamic=True,  # outputs then belong to whoever holds them, and batches may differ in size
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", device="cpu", dtype=types.DALIDataType.UINT8, ndim=1)
            if self._kind == "videos":
                decoded = fn.decoders.video(encoded, pad_mode="none", **placement)
            else:  # upright they are made later, as the frames of every decoder are
                decoded = fn.decoders.image(encoded, adjust_orientation=False, **placement)
            pipeline.set_outputs(decoded)
        pipeline.build()
        return pipeline

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.default_stream(self._device) if self._device.type == "cuda" else None


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What became of a chunk."""

    frames: torch.Tensor  # [F, H, W, 3] uint8 RGB, stored upright or not
    ms_per_frame: float


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    sample: bytes
    num_bytes: int
    future: Future[Decoded] = field(default_factory=Future)


class DaliService:
    """Gather the chunks of many streams into batches. Safe to use from any thread; close it when all are done.

    A batch that fails is decoded again chunk by chunk, so that a bad one spoils no other.
    """

    def __init__(self, name: str, runner: Runner, max_wait_s: float = 0.003) -> None:
        """`max_wait_s`: how long the first chunk waits for others. The thread starts with the first chunk."""
        self._name = name
        self._runner = runner
        self._max_wait_s = max_wait_s
        self._came = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._thread: threading.Thread | None = None
        self._closed_by = ""  # why no more is taken

    def submit(self, sample: bytes, num_bytes: int) -> Future[Decoded]:
        """Queue a chunk of `num_bytes` of decoded frames; its future gets GopError where it cannot be decoded."""
        job = _Job(sample, num_bytes)
        with self._came:
            if self._closed_by:
                job.future.set_exception(GopError(self._closed_by))
                return job.future
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._came.notify()
        return job.future

    def close(self) -> None:
        """Refuse what waits and what comes, and end the thread after the batch in its hands."""
        self._close("DALI was shut down")
        if self._thread is not None:
            self._thread.join(_CLOSE_DEADLINE_S)

    def _close(self, reason: str) -> None:
        with self._came:
            self._closed_by = self._closed_by or reason
            jobs, self._jobs = self._jobs, deque()
            self._came.notify_all()
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(GopError(reason))

    def _run(self) -> None:
        name_thread(self._name)
        batch: list[_Job] = []
        try:
            while batch := self._take():
                self._decode(batch)
        except Exception as err:  # the streams must hear of it, and go on without DALI
            logger.exception("%s crashed", self._name)
            reason = f"DALI crashed: {type(err).__name__}: {err}"
            self._close(reason)
            for job in batch:
                if not job.future.done():
                    job.future.set_exception(GopError(reason))

    def _take(self) -> list[_Job]:
        """Wait for chunks, then a little longer for more. Empty: closed."""
        with self._came:
            while not self._closed_by:
                self._came.wait_for(lambda: self._jobs or self._closed_by)
                self._came.wait_for(self._is_full, self._max_wait_s)
                if batch := self._pick():
                    return batch
            return []

    def _is_full(self) -> bool:
        return len(self._jobs) >= self._runner.max_batch or bool(self._closed_by)

    def _pick(self) -> list[_Job]:
        """Take the oldest chunks, within the bounds of a batch; those whose streams have ended are left out."""
        batch: list[_Job] = []
        num_bytes = 0
        while self._jobs and len(batch) < self._runner.max_batch:
            num_bytes += self._jobs[0].num_bytes
            if batch and num_bytes > _MAX_BYTES:
                break
            job = self._jobs.popleft()
            if job.future.set_running_or_notify_cancel():
                batch.append(job)
        return batch

    def _decode(self, batch: Sequence[_Job]) -> None:
        started = time.perf_counter()
        try:
            frames = self._runner.decode([job.sample for job in batch])
        except RuntimeError as err:  # which of them it was, DALI does not say
            if len(batch) > 1:
                for job in batch:
                    self._decode([job])
            else:
                batch[0].future.set_exception(GopError(f"DALI cannot decode it: {_gist(err)}"))
            return
        ms = (time.perf_counter() - started) * 1e3 / sum(map(len, frames))
        for job, decoded in zip(batch, frames, strict=True):
            job.future.set_result(Decoded(decoded, ms))


def _gist(err: RuntimeError) -> str:
    """Pick the one line of DALI's report that says what went wrong."""
    lines = str(err).rpartition("encountered:")[2].split("\n")
    return next((line.strip() for line in lines if line.strip()), type(err).__name__)
