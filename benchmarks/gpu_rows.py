"""What one line of the GPU's table says, and how its times are taken."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

NUM_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was measured, checked, or missing."""

    what: str
    value: float | None  # None: it could not be measured, and `note` says why
    unit: str
    to_reach: float | None = None  # None: only told
    at_least: bool = True  # False: the value must not exceed `to_reach`
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "missing"
        if self.to_reach is None:
            return ""
        met = self.value >= self.to_reach if self.at_least else self.value <= self.to_reach
        return "met" if met else "NOT MET"


def say(row: Row) -> None:
    """Hand a row over as one line of JSON, at once, so that what comes later cannot lose it."""
    print(json.dumps(asdict(row)), flush=True)


def median_ms(function: Callable[[], object], device: torch.device, num_runs: int = 20) -> float:
    """Return the median time of a call; on a GPU that of the work which it queues on the current stream."""
    for _ in range(NUM_WARM_UPS):
        function()
    return statistics.median(
        _gpu_ms(function, device) if device.type == "cuda" else _host_ms(function) for _ in range(num_runs)
    )


def _gpu_ms(function: Callable[[], object], device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    begin.record(stream)
    function()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end)


def _host_ms(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1e3
