"""What an error means: memory that is short passes, a GPU that is lost does not, and anything else is the model's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from streamd.device_errors import free_memory, is_device_lost, is_out_of_memory, probe
from streamd.errors import ModelError

SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
    RuntimeError("The following operation failed in the TorchScript interpreter.\nRuntimeError: CUDA out of memory."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate enough memory"),
    MemoryError(),
]
LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: While executing a kernel, the device encountered a load or store ..."),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
NEITHER = [
    RuntimeError("index 9 is out of bounds for dimension 0 with size 1"),
    torch.AcceleratorError("CUDA error: invalid configuration argument"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    ModelError("m.pt: forward failed on images of shape [8, 3, 16, 24]: expected 4 channels"),
    ZeroDivisionError(),
]


def within_a_model_error(err: Exception) -> ModelError:
    try:
        try:
            raise err
        except Exception as cause:
            raise ModelError("m.pt: forward failed") from cause
    except ModelError as outer:
        return outer


@pytest.mark.parametrize(
    ("err", "is_short", "is_lost"),
    [
        *((err, True, False) for err in SHORT),
        *((err, False, True) for err in LOST),
        *((err, False, False) for err in NEITHER),
    ],
)
def test_errors_are_told_apart_alone_and_behind_others(err: Exception, is_short: bool, is_lost: bool) -> None:
    for one in (err, within_a_model_error(err)):
        assert (is_out_of_memory(one), is_device_lost(one)) == (is_short, is_lost)


def test_what_failed_calls_held_is_let_go() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    try:
        work()
    except torch.OutOfMemoryError as err:
        assert held[0]() is not None
        free_memory(err, torch.device("cpu"))
        gc.collect()
        assert held[0]() is None


def test_a_cpu_is_always_there() -> None:
    probe(torch.device("cpu"))
