"""Take batches of frames through one model on one device, so that no engine waits for another.

    begin    letterbox -> network, suppression -> copy to the host     queued, each step on a CUDA stream of its own
    finish   wait for the copy, make Detections

On a GPU one thread begins batches and another finishes them. Two slots hold what is on its way: while the network works
on one, the other is filled or read. Steps are joined by events, nothing waits for the whole device, and the network is
one CUDA graph for each batch size of a ladder. On a CPU `begin` returns when the work is done (see cpu_runner.py).
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch

from streamd.gpu import ops
from streamd.gpu.graph import Graph
from streamd.gpu.rle import EncodedMasks
from streamd.infer import BATCH_LADDER, Runnable
from streamd.messages import Batch, Detections, Frame, RawOutput
from streamd.models.spec import ModelSpec, NmsRule
from streamd.postprocess import (
    NUM_PLACEMENT_COLUMNS,
    Found,
    Postprocessor,
    has_room,
    object_rows,
    place,
    wanted_labels,
)

logger = logging.getLogger(__name__)

_NUM_SLOTS = 2
_ON_DEVICE = ("probabilities", "charts")  # of `Found`: large, and needed of objects alone

Compute = Callable[[], tuple[RawOutput, Found]]


class _Engine:
    """A CUDA stream for one kind of work; on a CPU, the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after(self, *events: torch.cuda.Event | None) -> Iterator[None]:
        """Queue what is launched in this context behind the events."""
        if self.stream is None:
            yield
            return
        for event in events:
            if event is not None:
                self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            yield

    def mark(self, event: torch.cuda.Event | None) -> None:
        if self.stream is not None and event is not None:
            event.record(self.stream)


class _Slot:
    """The memory of one batch on its way, and how far it has come."""

    def __init__(self, model: Runnable, max_batch: int) -> None:
        on_gpu = model.device.type == "cuda"
        self.images = torch.zeros((max_batch, 3, *model.spec.input_size), dtype=model.dtype, device=model.device)
        self.placements = torch.ones((max_batch, NUM_PLACEMENT_COLUMNS), device=model.device)
        self.filled, self.computed, self.copied = (_event() if on_gpu else None for _ in range(3))
        self.graphs: dict[int, Graph[tuple[RawOutput, Found]]] = {}
        self.host: _HostCopy | None = None  # None where results are made on the host


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A batch that was begun. `finish` takes it once."""

    begun_ns: int  # monotonic clock, ns
    batch: Batch
    slot: _Slot
    raw: RawOutput
    computed: Found  # on the device; held, since the copy may not have begun
    found: Found  # on the host once `slot.copied` has come

    @property
    def frames(self) -> tuple[Frame, ...]:
        return self.batch.frames


class Runner:
    """One model's way from frames to detections. `begin` and `finish` may be called by one thread each."""

    def __init__(
        self, model: Runnable, rule: NmsRule, max_batch: int, labels: frozenset[int] | None = None, num_slots: int = 0
    ) -> None:
        """Take memory for `num_slots` batches: by default two on a GPU, one on a CPU."""
        self._model = model
        wanted = None if labels is None else wanted_labels(labels, len(model.spec.labels)).to(model.device)
        self._postprocessor = Postprocessor(model.spec, rule, wanted, model)
        on_gpu = model.device.type == "cuda"
        self._letterbox, self._network, self._copy = (_Engine(model.device) for _ in range(3))
        self._sizes = [size for size in BATCH_LADDER if size < max_batch] + [max_batch]
        self._slots = [_Slot(model, max_batch) for _ in range(num_slots or (_NUM_SLOTS if on_gpu else 1))]
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)

    def capture(self) -> None:
        """Make the CUDA graphs, so that no later batch waits for one; nothing to do on a CPU."""
        stream = self._network.stream
        if stream is None:
            return
        for slot in self._slots:
            for size in reversed(self._sizes):
                try:
                    slot.graphs[size] = Graph(self._compute(slot, size), stream)
                except RuntimeError as err:
                    reason = str(err).partition("\n")[0]
                    logger.warning("%s: no CUDA graph for batches of %d: %s", self._model.spec.name, size, reason)
            _, found = self._compute(slot, self._sizes[-1])()
            slot.host = _HostCopy(found)
        stream.synchronize()

    def begin(self, frames: Sequence[Frame]) -> Running:
        """Queue a batch; waits for a free slot. Raises ModelError."""
        begun_ns = time.monotonic_ns()
        slot = self._free.get()
        try:
            return self._begin(frames, slot, begun_ns)
        except BaseException:
            self._free.put(slot)
            raise

    def _begin(self, frames: Sequence[Frame], slot: _Slot, begun_ns: int) -> Running:
        device = slot.images.device
        with self._letterbox.after(*(frame.picture.ready for frame in frames)):
            frames = [_on_device(frame, device) for frame in frames]
            batch = assemble(frames, self._model.spec, slot.images)
            slot.placements.copy_(_uploadable(_placements(batch, len(slot.placements)), device), non_blocking=True)
            self._letterbox.mark(slot.filled)
        with self._network.after(slot.filled):
            size = next(size for size in self._sizes if size >= len(frames)) if slot.graphs else len(frames)
            raw, computed = slot.graphs[size].replay() if size in slot.graphs else self._compute(slot, size)()
            self._network.mark(slot.computed)
        found = computed
        if slot.host is not None:
            with self._copy.after(slot.computed):
                found = slot.host.copy(computed, len(frames))
                self._copy.mark(slot.copied)
        return Running(begun_ns, batch, slot, raw, computed, found)

    def wait(self, running: Running) -> None:
        """Wait until the device has done its part of the batch."""
        if running.slot.copied is not None:
            running.slot.copied.synchronize()

    def num_senseless(self, running: Running) -> int:
        """Count the frames of which the model said nothing but NaN or infinity; after `wait`, before `finish`."""
        return len(running.batch.frames) - int(running.found.sane[: len(running.batch.frames)].sum())

    def finish(self, running: Running) -> list[Detections]:
        """Say what is in each frame of a batch, and free its slot."""
        self.wait(running)
        try:
            found = replace(running.found, masks=self._fetch_masks(running))
            with self._copy.after():
                segments = self._postprocessor.segments(running.raw, running.computed, running.batch)
            return self._postprocessor.describe(found, running.batch, segments, self._fetch_charts(running))
        finally:
            self._free.put(running.slot)

    def _fetch_masks(self, running: Running) -> EncodedMasks | None:
        """Bring the masks' characters to the host, now that it is known how many there are."""
        masks, computed = running.found.masks, running.computed
        if masks is None or computed.masks is None:
            return None
        if not has_room(masks, len(computed.table)):
            with self._copy.after():
                placements = running.slot.placements[: len(computed.table)]
                more = self._postprocessor.encode_masks(running.raw, computed.table, placements, int(masks.num_runs))
                assert more is not None
                return EncodedMasks(self._fetch(more.characters), self._fetch(more.offsets), masks.num_runs)
        return replace(masks, characters=self._fetch(computed.masks.characters[: int(masks.offsets[-1])]))

    def _fetch_charts(self, running: Running) -> torch.Tensor | None:
        """Bring the charts of the objects to the host, now that it is known which rows those are."""
        charts = running.computed.charts
        if charts is None:
            return None
        rows = _uploadable(object_rows(running.found.table), charts.device)
        with self._copy.after():
            chosen = charts.flatten(0, 1)[rows.to(charts.device, non_blocking=True)]
        return self._fetch(chosen)

    def _fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._copy.stream is None:
            return tensor
        with self._copy.after():
            on_host = _pinned(tensor).copy_(tensor, non_blocking=True)
            done = _event()
            self._copy.mark(done)
        done.synchronize()
        return on_host

    def _compute(self, slot: _Slot, size: int) -> Compute:
        images, placements = slot.images[:size], slot.placements[:size]

        def compute() -> tuple[RawOutput, Found]:
            raw = self._model.run(images, placements[:, 6:8])
            return raw, self._postprocessor.reduce(raw, placements)

        return compute


def assemble(frames: Sequence[Frame], spec: ModelSpec, images: torch.Tensor) -> Batch:
    """Letterbox and normalise frames into the first of `images` [max_batch, 3, H, W]; all lie on one device."""
    letterboxes = tuple(spec.letterbox(frame.width, frame.height) for frame in frames)
    images = images[: len(frames)]
    ops.preprocess(
        [frame.picture for frame in frames],
        letterboxes,
        images,
        colour=spec.colour,
        mean=spec.mean,
        std=spec.std,
        pad=spec.padding,
        antialias=spec.resize.antialias,
    )
    return Batch(tuple(frames), images, letterboxes)


def _on_device(frame: Frame, device: torch.device) -> Frame:
    """Bring a frame's picture to the device where it is needed; a frame that is there stays as it is."""
    picture = frame.picture
    if picture.planes[0].device == device:
        return frame
    planes = tuple(_uploadable(plane, device).to(device, non_blocking=True) for plane in picture.planes)
    return replace(frame, picture=replace(picture, planes=planes))


def _uploadable(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor of the host into pinned memory, from where a GPU can fetch it while the host goes on."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(blocking=True)  # a host thread that waits for it sleeps


def _placements(batch: Batch, num_images: int) -> torch.Tensor:
    """Say where the frames lie in a batch of so many images; frames that are not there are 0 pixels wide."""
    placements = torch.zeros(num_images, NUM_PLACEMENT_COLUMNS)
    placements[:, :2] = 1
    placements[: len(batch.frames)] = place(batch.frames, batch.letterboxes)
    return placements


class _HostCopy:
    """Pinned memory for what is copied of every batch: all of `Found` but the masks' characters."""

    def __init__(self, found: Found) -> None:
        self._tensors = {name: _pinned(tensor) for name, tensor in _per_image(found).items()}
        self._masks = found.masks and EncodedMasks(
            torch.empty(0, dtype=torch.uint8), _pinned(found.masks.offsets), _pinned(found.masks.num_runs)
        )

    def copy(self, found: Found, num_images: int) -> Found:
        """Queue the copy of the first images' results on the current stream, and return where they will be."""
        copied = {
            name: self._tensors[name][:num_images].copy_(tensor[:num_images], non_blocking=True)
            for name, tensor in _per_image(found).items()
        }
        masks = None
        if found.masks is not None and self._masks is not None:
            offsets = self._masks.offsets[: len(found.masks.offsets)]
            offsets.copy_(found.masks.offsets, non_blocking=True)
            self._masks.num_runs.copy_(found.masks.num_runs, non_blocking=True)
            masks = replace(self._masks, offsets=offsets)
        return replace(found, masks=masks, **copied)


def _per_image(found: Found) -> dict[str, torch.Tensor]:
    """Name the results that have a row for each image, but for those that stay on the device."""
    values = {field.name: getattr(found, field.name) for field in fields(found) if field.name not in _ON_DEVICE}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _pinned(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, device="cpu", pin_memory=True)
