"""The processes of one run, as torchrun starts them; a run without torchrun is one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from streamd.infer import find_device

_TIMEOUT = timedelta(hours=2)  # the first process evaluates while the others wait


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many this one is, and the device that it trains on."""

    rank: int
    count: int
    device: torch.device
    was_restarted: bool  # by torchrun, after one of them failed

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any_of(self, flag: bool) -> bool:
        """Tell all processes whether one of them says so."""
        if self.count == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def mean_of(self, values: torch.Tensor) -> torch.Tensor:
        """Average a tensor over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
            values = values / self.count
        return values

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def join(wanted_device: str) -> Iterator[Processes]:
    """Meet the other processes, and leave them at the end. Raises ConfigError."""
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(wanted_device, int(os.environ.get("LOCAL_RANK", "0")))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if count > 1:
        # torchrun keeps one store over its restarts: a new process would find the address of one that was killed.
        store = PrefixStore(f"start {restarts}", next(rendezvous("env://", timeout=_TIMEOUT))[0])
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_TIMEOUT)
    try:
        yield Processes(rank, count, device, restarts > 0)
    finally:
        if count > 1:
            dist.destroy_process_group()


def _device(wanted: str, local_rank: int) -> torch.device:
    device = find_device(wanted)
    if device.type == "cpu":
        return device
    if wanted in ("auto", "cuda"):
        device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


class StopSignal:
    """Remember SIGINT and SIGTERM while a run is in its loop; a second one ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
