"""Two things that are compared, each in a process of its own: how memory is taken and kept is a part of both.

The parent tells one side at a time to do its work, so that they alternate on an otherwise idle machine. streamd's
process has the environment that its commands give themselves; the other has that of the user who started the benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

from benchmarks.measure import ROOT, peak_memory_mib
from streamd.allocator import take_huge_pages

OURS, THEIRS = "ours", "torchvision's"
_END_S = 60.0


class Side:
    """Drive one side's process: `python -m MODULE ARGUMENTS --side NAME`, which calls `serve`."""

    def __init__(self, name: str, module: str, arguments: Sequence[str]) -> None:
        """Start it, and return when it can work. Raises RuntimeError where it ends; its words are on stderr."""
        environment = dict(os.environ)
        if name == OURS:
            take_huge_pages(environment)
        self.name = name
        command = [sys.executable, "-m", module, *arguments, "--side", name]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.peak_mib = 0.0
        self._answer()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._process.communicate(timeout=_END_S)  # closes stdin, which ends it
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def run(self, number: int) -> list[int]:
        """Have it do its work for `number` pictures, and return what it counted; `peak_mib` is then what it holds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> list[int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process ended with {self._process.wait(_END_S)}")
        self.peak_mib, counted = json.loads(line)
        return list(counted)


def serve(run: Callable[[int], Sequence[int]], device: torch.device) -> None:
    """Be a side's process: do the work for each number that is read, until the parent closes the pipe."""
    _tell([], device)
    for line in sys.stdin:
        _tell(run(int(line)), device)


def _tell(counted: Sequence[int], device: torch.device) -> None:
    """Give what was counted, and the most memory that was held so far: the GPU's, or of the process, in MiB."""
    is_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if is_gpu else peak_memory_mib(os.getpid())
    print(json.dumps([peak, list(counted)]), flush=True)
