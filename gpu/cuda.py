"""Compile gpu/*.cu with NVRTC and launch its kernels where torch works.

Import this only where there are CUDA tensors: it pulls in cuda.core, which the path on a CPU does without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from cuda import core, pathfinder
from torch import Tensor

# What every device of compute capability 7.5 to 12.0 takes (CUDA C++ Programming Guide, "Compute Capabilities").
_MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
_MAX_BLOCK = (1024, 1024, 64)
_MAX_THREADS = 1024
_MAX_SHARED_BYTES = 48 * 1024

Extent = int | tuple[int, ...]


class Module:
    """The kernels of one source file, compiled for one device."""

    def __init__(self, code: core.ObjectCode, device: torch.device) -> None:
        self._code = code
        self._device = device
        self._context = core.Device(device.index)
        self._kernels: dict[str, core.Kernel] = {}

    def launch(
        self, function: str, grid: Extent, block: Extent, *arguments: Tensor | np.generic, shared_bytes: int = 0
    ) -> None:
        """Queue one kernel on torch's current stream of the device, and return at once.

        A tensor is passed as the address of its first element; its shape, type and strides are the caller's to check.
        `shared_bytes` is the dynamic shared memory of a block. A grid without blocks launches nothing.
        """
        grid, block = check_launch(self._device, grid, block, arguments, shared_bytes)
        if 0 in grid:
            return
        kernel = self._kernels.get(function)
        if kernel is None:
            kernel = self._kernels[function] = self._code.get_kernel(function)
        packed = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        config = core.LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)
        with torch.cuda.device(self._device):
            # The runtime makes a thread's context current at its first work there; the driver, which cuda.core calls,
            # does not. torch's guard puts back the context of another device.
            self._context.set_current()
            stream = core.Stream.from_handle(torch.cuda.current_stream(self._device).cuda_stream)
            core.launch(stream, config, kernel, *packed)


@cache
def load(name: str, device: torch.device) -> Module:
    """Compile gpu/<name>.cu for `device`, once a process."""
    major, minor = torch.cuda.get_device_capability(device)
    return Module(compile_source(name, source_file(name).read_text(), f"sm_{major}{minor}"), device)


def source_file(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cu")


def compile_source(name: str, source: str, architecture: str) -> core.ObjectCode:
    """Compile CUDA C++ to a cubin for an architecture such as `sm_90`; needs neither a driver nor a GPU.

    A product and a sum are rounded one after the other, as in the twins; a kernel that wants them fused calls `fmaf`.
    cuda.core's NVRTCError holds the compiler's messages.
    """
    options = core.ProgramOptions(
        name=f"{name}.cu",
        arch=architecture,
        std="c++17",
        fma=False,
        include_path=pathfinder.find_nvidia_header_directory("cudart"),  # cuda_fp16.h
    )
    return core.Program(source, "c++", options).compile("cubin")


def check_launch(
    device: torch.device, grid: Extent, block: Extent, arguments: Sequence[object], shared_bytes: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return grid and block with three sizes each, or say which part of a launch no device could take.

    TypeError for a Python number, which cuda.core would pack as eight bytes whatever the kernel expects.
    """
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            if argument.device != device:
                raise ValueError(f"argument {position} of the kernel lies on {argument.device}, the kernel on {device}")
        elif not isinstance(argument, np.generic):
            kind = type(argument).__name__
            raise TypeError(f"argument {position} of the kernel is a {kind}; pass a tensor, np.int32(...) or the like")
    if not 0 <= shared_bytes <= _MAX_SHARED_BYTES:
        raise ValueError(f"a block has 0 to {_MAX_SHARED_BYTES} bytes of shared memory, not {shared_bytes}")
    blocks, threads = _sizes("grid", grid, 0, _MAX_GRID), _sizes("block", block, 1, _MAX_BLOCK)
    if math.prod(threads) > _MAX_THREADS:
        raise ValueError(f"a block has at most {_MAX_THREADS} threads, not {threads}")
    return blocks, threads


def _sizes(what: str, extent: Extent, least: int, most: tuple[int, int, int]) -> tuple[int, int, int]:
    sizes = (extent,) if isinstance(extent, int) else extent
    fits = 1 <= len(sizes) <= 3 and all(least <= size <= limit for size, limit in zip(sizes, most, strict=False))
    if not fits:
        raise ValueError(f"the sizes of a {what} are {least} to {most} along x, y and z, not {extent}")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z
