"""Run gpu/*.cu on the CPU: compiled by g++ behind cuda_on_cpu.h, launched as `streamd.gpu.cuda` launches."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from streamd.gpu import cuda

_HEADERS = [Path(__file__).with_name(name) for name in ("cuda_on_cpu.h", "cuda_fibers.h", "cuda_builtins.h")]
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
_DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w\s]+?)\s*\b(\w+)\s*\[\s*\]\s*;")
_UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow"
# Without -ffp-contract=off g++ would fuse a product and a sum where the machine can; NVRTC is told --fmad=false.
_FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"),
    *(f"-fsanitize={_UNDEFINED}", "-fsanitize-undefined-trap-on-error"),
]


class KernelError(Exception):
    """A kernel did what CUDA leaves undefined, or never ends. The message says which thread, and where if known."""


class EmulatedModule:
    """The kernels of one source file, compiled for this CPU; the interface of `cuda.Module`."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        self._name = name
        self._path = _build(name, source, folder)
        self._num_launches = 0

    @cached_property
    def _library(self) -> ctypes.CDLL:
        library = ctypes.CDLL(str(self._path))
        library.cuda_on_cpu_new.restype = ctypes.c_void_p
        library.cuda_on_cpu_new.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        library.cuda_on_cpu_delete.restype = ctypes.c_bool
        library.cuda_on_cpu_delete.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        library.cuda_on_cpu_fault.restype = ctypes.c_long
        return library

    def launch(
        self,
        function: str,
        grid: cuda.Extent,
        block: cuda.Extent,
        *arguments: Tensor | np.generic,
        shared_bytes: int = 0,
    ) -> None:
        """Run one kernel to its end. Raise KernelError where the kernel or its arguments are wrong."""
        blocks, threads = cuda.check_launch(torch.device("cpu"), grid, block, arguments, shared_bytes)
        self._check_types(function, arguments)
        if 0 in blocks:
            return
        with _guarded(self._library, arguments) as addresses:
            self._run(function, blocks, threads, shared_bytes, addresses)

    def _check_types(self, function: str, arguments: tuple[Tensor | np.generic, ...]) -> None:
        signature = getattr(self._library, f"{function}_signature")
        signature.restype = ctypes.c_char_p
        expected = signature().decode().split()
        given = ["p" if isinstance(argument, Tensor) else argument.dtype.str[1:] for argument in arguments]
        if given != expected:
            raise KernelError(f"{function} takes ({', '.join(expected)}), not ({', '.join(given)})")

    def _run(
        self,
        function: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: list[np.generic],
    ) -> None:
        launch = getattr(self._library, f"{function}_launch")
        launch.restype = ctypes.c_char_p
        cells = [np.atleast_1d(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
        self._num_launches += 1
        error = launch(
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_size_t(shared_bytes),
            ctypes.c_uint64(0x9E3779B97F4A7C15 * self._num_launches % 2**64),
            pointers,
        )
        if error:
            raise KernelError(f"{function}: {error.decode()}{self._place_of_fault()}")

    def _place_of_fault(self) -> str:
        offset = self._library.cuda_on_cpu_fault()
        if not offset or shutil.which("addr2line") is None:
            return ""
        command = ["addr2line", "-i", "-s", "-e", str(self._path), hex(offset)]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
        return ", at " + next((line for line in lines if line.startswith(f"{self._name}.cu")), "an unknown line")


@contextmanager
def _guarded(library: ctypes.CDLL, arguments: tuple[Tensor | np.generic, ...]) -> Iterator[list[np.generic]]:
    """Copy what the tensors view between forbidden pages, and give the kernel's arguments; copy back at the end."""
    storages = {
        argument.untyped_storage().data_ptr(): argument.untyped_storage()
        for argument in arguments
        if isinstance(argument, Tensor) and argument.untyped_storage().nbytes()
    }
    copies = {start: library.cuda_on_cpu_new(start, storage.nbytes()) for start, storage in storages.items()}

    def address(tensor: Tensor) -> np.uint64:
        start = tensor.untyped_storage().data_ptr()
        return np.uint64(copies[start] + tensor.data_ptr() - start if start in copies else 0)

    spoilt = 0
    try:
        yield [address(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
    finally:
        for start, storage in storages.items():
            spoilt += not library.cuda_on_cpu_delete(copies[start], start, storage.nbytes())
    if spoilt:
        raise KernelError(f"the kernel wrote just outside {spoilt} of its {len(storages)} tensors")


def _build(name: str, source: str, folder: Path) -> Path:
    """Compile a CUDA source to a library in `folder`, or find the one that is there."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing: it runs the CUDA sources on the CPU")
    source = _DYNAMIC_SHARED.sub(r"\1* const \2 = reinterpret_cast<\1*>(cuda_on_cpu::dynamic_shared);", source)
    kernels = "\n".join(f"CUDA_ON_CPU_KERNEL({kernel})" for kernel in _KERNEL.findall(source))
    # Kernels find cuda_fp16.h in the folder: empty, since cuda_builtins.h holds what they may use of it.
    text = f'#include "cuda_on_cpu.h"\n#line 1 "{name}.cu"\n{source}\n{kernels}\n'
    parts = [text, *(header.read_text() for header in _HEADERS), *_FLAGS]
    path = folder / f"{name}-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        (folder / "cuda_fp16.h").touch()
        unit = path.with_suffix(".cc")
        unit.write_text(text)
        command = [compiler, *_FLAGS, f"-I{_HEADERS[0].parent}", f"-I{folder}", str(unit), "-o", str(path), "-ldl"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise KernelError(f"g++ does not compile {name}.cu:\n{built.stderr}")
    return path


@contextmanager
def emulated_cuda(folder: Path) -> Iterator[None]:
    """Let `cuda.load` emulate for the CPU, building in `folder`, and let torch's new memory begin as NaN or maximum."""
    modules: dict[str, EmulatedModule] = {}
    real = cuda.load

    def load(name: str, device: torch.device) -> cuda.Module | EmulatedModule:
        if device.type != "cpu":
            return real(name, device)
        if name not in modules:
            modules[name] = EmulatedModule(name, cuda.source_file(name).read_text(), folder)
        return modules[name]

    mode = torch.get_deterministic_debug_mode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "load", load)
        torch.set_deterministic_debug_mode("error")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
