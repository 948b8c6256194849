"""What an error says about the device: memory ran out, which passes, or the GPU is lost to this process.

TorchScript turns every error into a RuntimeError that quotes it, and a ModelError may stand before that: so it is the
texts that are read, of an error and of those that it came from.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator

import torch

_OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory"),  # torch, on a GPU and on a CPU
    *("CUDA_ERROR_OUT_OF_MEMORY", "STATUS_ALLOC_FAILED"),  # the driver; cuBLAS and cuDNN
)
_OF_THE_DEVICE = ("CUDA error", "CUDA_ERROR_", "STATUS_EXECUTION_FAILED", "STATUS_INTERNAL_ERROR")
# A call that the driver refuses leaves the context as it was; after any other error each later call fails too.
_ONLY_REFUSED = ("invalid argument", "invalid configuration", "capturing", "no kernel image", "invalid device function")


def is_out_of_memory(err: BaseException) -> bool:
    """Tell whether the device, or the host, had not enough memory: the same work may succeed later, or in parts."""
    return any(
        isinstance(one, torch.OutOfMemoryError | MemoryError) or any(text in str(one) for text in _OUT_OF_MEMORY)
        for one in _chain(err)
    )


def is_device_lost(err: BaseException) -> bool:
    """Tell whether no further work on the GPU can succeed in this process: an illegal address, an Xid, a lost GPU."""
    return not is_out_of_memory(err) and any(
        (isinstance(one, torch.AcceleratorError) or any(text in str(one) for text in _OF_THE_DEVICE))
        and not any(text in str(one) for text in _ONLY_REFUSED)
        for one in _chain(err)
    )


def probe(device: torch.device) -> None:
    """Ask the driver for the device. Raises RuntimeError where it is lost, and hangs where the driver does."""
    if device.type == "cuda":
        torch.cuda.mem_get_info(device)


def free_memory(err: BaseException, device: torch.device) -> None:
    """Let go of what the calls that ended in an error held, and of what the allocator keeps for later."""
    for one in _chain(err):
        traceback.clear_frames(one.__traceback__)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _chain(err: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = err
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
