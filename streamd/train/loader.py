"""Give training its batches, each a function of the seed, the epoch and the numbers of its pictures alone.

So it does not matter how many worker processes make them, nor how many were made before: a run that goes on at some
batch of an epoch gets what it would have got. Workers come from a fork server, since a process that runs threads of
torch and of CUDA must not be forked.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from streamd.datasets import pictures
from streamd.datasets.records import DataSet
from streamd.errors import ConfigError, DataError
from streamd.models.spec import ModelSpec
from streamd.train import augment, render
from streamd.train.augment import Augmentation, Sources
from streamd.train.targets import Targets, TrainBatch

CACHE_MIB = 2048  # of decoded pictures, over all workers

_BATCHES_AHEAD = 2  # of each worker
_SHARED_MEMORY = Path("/dev/shm")
# What a random number is for; keeps the streams of one (seed, epoch) apart.
_ORDER, _SIZE, _SAMPLE = range(3)


class _Key(NamedTuple):
    """What makes a sample."""

    epoch: int
    record: int  # index into DataSet.records
    size: tuple[int, int]  # of the input: height, width
    is_plain: bool


class _Sample(NamedTuple):
    image: Tensor  # [3,H,W]
    size: tuple[int, int]
    targets: Targets


class _Packed(NamedTuple):
    """A batch in few tensors: each one that a worker sends costs a file descriptor and two system calls."""

    images: Tensor
    sizes: Tensor
    fields: dict[str, Tensor]  # of all targets, one after the other
    lengths: dict[str, list[int]]  # of each target; -1 where it has none


class Samples(torch_data.Dataset["_Sample | DataError"]):
    """Make training samples; each worker process has a copy.

    An error is handed over as a value, since torch would put a traceback of the worker into its message.
    """

    def __init__(
        self, dataset: DataSet, spec: ModelSpec, augmentation: Augmentation, seed: int, cache_bytes: int
    ) -> None:
        self._dataset, self._spec, self._augmentation, self._seed = dataset, spec, augmentation, seed
        records = dataset.records
        wants_masks = spec.masks is not None
        masked = [number for number, record in enumerate(records) if record.objects.masks is not None]
        self._sources = Sources([(record.width, record.height) for record in records], masked if wants_masks else ())
        self._cache: dict[int, np.ndarray] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self._dataset.records)

    def __getitem__(self, key: _Key) -> _Sample | DataError:
        try:
            return self._make(key)
        except DataError as err:
            return err

    def _make(self, key: _Key) -> _Sample:
        random = np.random.default_rng((self._seed, key.epoch, _SAMPLE, key.record))
        spec = augment.at_size(self._spec, key.size)
        plan = augment.plan(self._augmentation, spec, self._sources, key.record, random, plain=key.is_plain)
        image, targets = render.render(plan, self._dataset, spec, self._read)
        return _Sample(image, plan.size, targets)

    def _read(self, index: int) -> np.ndarray:
        """Return a record's picture, uint8 RGB [H,W,3]; it is kept while there is room."""
        if (pixels := self._cache.get(index)) is None:
            record = self._dataset.records[index]
            pixels = pictures.read(record.file, (record.width, record.height))
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._cache[index] = pixels
        return pixels


@dataclass(slots=True)
class _Course(torch_data.Sampler[list[_Key]]):
    """The batches of one process, from one of an epoch on."""

    num_records: int
    spec: ModelSpec
    augmentation: Augmentation
    batch_size: int
    seed: int
    rank: int
    world_size: int
    num_epochs: int
    drop_last: bool
    epoch: int = 0
    first_batch: int = 0

    def __len__(self) -> int:
        whole = self.batch_size * self.world_size
        return self.num_records // whole if self.drop_last else -(-self.num_records // whole)

    def __iter__(self) -> Iterator[list[_Key]]:
        """Yield this process's part of each batch: every `world_size`-th of what all processes take together."""
        order = np.random.default_rng((self.seed, self.epoch, _ORDER)).permutation(self.num_records)
        whole = self.batch_size * self.world_size
        is_plain = 0 < self.num_epochs <= self.epoch + self.augmentation.last_epochs_plain
        for number in range(self.first_batch, len(self)):
            random = np.random.default_rng((self.seed, self.epoch, _SIZE, number))
            size = augment.input_size(self.augmentation, self.spec, random)
            own = order[number * whole : (number + 1) * whole][self.rank :: self.world_size]
            yield [_Key(self.epoch, int(index), size, is_plain) for index in own]


class Loader:
    """Iterate over the batches of an epoch. Its worker processes start with the first one and end by `close`."""

    def __init__(
        self,
        dataset: DataSet,
        spec: ModelSpec,
        augmentation: Augmentation,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        num_epochs: int = 0,
        cache: bool = False,
        cache_mib: int = CACHE_MIB,
        drop_last: bool = True,
    ) -> None:
        """Prepare to give process `rank` of `world_size` its `batch_size` images of each batch.

        - num_workers: processes that make batches; 0: whoever iterates
        - num_epochs: of the whole run, for `Augmentation.last_epochs_plain`; 0: none of its epochs is a last one
        - cache: keep decoded pictures, up to `cache_mib` over all workers of this process
        - drop_last: leave out the rest of the pictures that fills no batch; without it the last batch is shorter, and
          some processes may get one less

        Raises ConfigError where the shared memory cannot hold what the workers prepare.
        """
        self._course = _Course(
            len(dataset.records), spec, augmentation, batch_size, seed, rank, world_size, num_epochs, drop_last
        )
        if num_workers:
            _check_shared_memory(batch_size * num_workers * _BATCHES_AHEAD, spec, augmentation)
        cache_bytes = (cache_mib << 20) // max(1, num_workers) if cache else 0
        samples = Samples(dataset, spec, augmentation, seed, cache_bytes)
        self._loader: torch_data.DataLoader[_Sample | DataError] = torch_data.DataLoader(
            samples,
            batch_sampler=self._course,
            num_workers=num_workers,
            collate_fn=_pack,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=_fork_server() if num_workers else None,
            persistent_workers=num_workers > 0,
            prefetch_factor=_BATCHES_AHEAD if num_workers else None,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # its own, so that iterating leaves torch's random state as it is
        )

    def __len__(self) -> int:
        """Count the batches of a whole epoch."""
        return len(self._course)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch `iter` gives, from 0."""
        self._course.epoch = epoch

    def __iter__(self) -> Iterator[TrainBatch]:
        return self.batches(self._course.epoch)

    def batches(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """Yield the batches of an epoch, from the one that has the number `first_batch` on. Raises DataError."""
        self._course.epoch, self._course.first_batch = epoch, first_batch
        for packed in self._loader:
            if isinstance(packed, DataError):
                raise packed
            yield _unpack(packed)

    def close(self) -> None:
        """End the worker processes; a new iteration starts them again."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def _ignore_interrupt(_: int) -> None:
    """Leave Ctrl-C, which the terminal sends to workers too, to the process that finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fork_server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
    return context


def _check_shared_memory(num_images: int, spec: ModelSpec, augmentation: Augmentation) -> None:
    """Raise ConfigError where a container's small /dev/shm would kill the workers with SIGBUS."""
    if not _SHARED_MEMORY.is_dir():
        return
    height, width = (side * augmentation.multi_scale[1] for side in spec.input_size)
    needed_mib = num_images * 3 * 4 * height * width / 2**20
    free_mib = shutil.disk_usage(_SHARED_MEMORY).free / 2**20
    if free_mib < needed_mib:
        raise ConfigError(
            f"{_SHARED_MEMORY} has {free_mib:.0f} MiB free, the images that the workers prepare need "
            f"{needed_mib:.0f} MiB: give the container more (--shm-size), or take fewer workers or none (workers: 0)"
        )


_FIELDS = tuple(Targets.__dataclass_fields__)


def _pack(made: Sequence[_Sample | DataError]) -> _Packed | DataError:
    samples = [one for one in made if not isinstance(one, DataError)]
    if len(samples) < len(made):
        return next(one for one in made if isinstance(one, DataError))
    fields: dict[str, Tensor] = {}
    lengths: dict[str, list[int]] = {}
    for name in _FIELDS:
        values = [getattr(sample.targets, name) for sample in samples]
        values = [value if value is None or name != "semantic" else value[None] for value in values]
        lengths[name] = [-1 if value is None else len(value) for value in values]
        there = [value for value in values if value is not None]
        if there:
            fields[name] = torch.cat(there)
    images = torch.stack([sample.image for sample in samples])
    return _Packed(images, torch.tensor([sample.size for sample in samples], dtype=torch.float32), fields, lengths)


def _unpack(packed: _Packed) -> TrainBatch:
    columns = {}
    for name in _FIELDS:
        lengths = packed.lengths[name]
        parts = iter(packed.fields[name].split([n for n in lengths if n >= 0])) if name in packed.fields else iter(())
        column = [next(parts) if n >= 0 else None for n in lengths]
        columns[name] = [None if part is None else part[0] for part in column] if name == "semantic" else column
    rows = zip(*(columns[name] for name in _FIELDS), strict=True)
    targets = tuple(Targets(**dict(zip(_FIELDS, row, strict=True))) for row in rows)
    return TrainBatch(packed.images, packed.sizes, targets)
