"""Compiling for every architecture, and what a launch refuses; on a GPU, also where and when a kernel runs."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from cuda.core import ObjectCode

from streamd.gpu import cuda
from tests.conftest import ROOT

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
CPU = torch.device("cpu")

FILL = """
extern "C" __global__ void fill(float* out, float value, int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = value;
}
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted((ROOT / "gpu").glob("*.cu")), ids=lambda source: source.stem)
def test_a_kernel_compiles_for_every_architecture(source: Path, architecture: str) -> None:
    code = cuda.compile_source(source.stem, source.read_text(), architecture)
    assert isinstance(code, ObjectCode) and bytes(code.code).startswith(b"\x7fELF")


def test_every_kernel_has_a_launcher() -> None:
    for source in (ROOT / "gpu").glob("*.cu"):
        assert source.with_suffix(".py").exists(), f"{source.name} has no launcher"


def test_a_source_that_does_not_compile_names_its_file_and_line() -> None:
    with pytest.raises(Exception, match=r"broken\.cu\(2\): error"):
        cuda.compile_source("broken", '\nextern "C" __global__ void f() { g(); }', "sm_90")


def test_products_and_sums_are_not_fused() -> None:
    source = 'extern "C" __global__ void f(float* x) { x[0] = x[1] * x[2] + x[3]; }'
    plain = cuda.compile_source("f", source, "sm_90").code
    fused = cuda.compile_source("f", source.replace("x[1] * x[2] + x[3]", "fmaf(x[1], x[2], x[3])"), "sm_90").code
    assert plain != fused


@pytest.mark.parametrize(
    ("grid", "block"), [(1, 1), (0, 1), ((3, 2), 1024), ((1, 0, 65535), (16, 16, 4)), (2**31 - 1, (1, 1, 64))]
)
def test_a_launch_that_a_device_can_take_is_passed(grid: cuda.Extent, block: cuda.Extent) -> None:
    sizes = cuda.check_launch(CPU, grid, block, (torch.zeros(1), np.float32(1)), 48 * 1024)
    for given, size in zip((grid, block), sizes, strict=True):
        parts = (given,) if isinstance(given, int) else given
        assert size == parts + (1,) * (3 - len(parts))


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "message"),
    [
        (-1, 1, 0, "grid"),
        (2**31, 1, 0, "grid"),
        ((1, 65536), 1, 0, "grid"),
        ((), 1, 0, "grid"),
        ((1, 1, 1, 1), 1, 0, "grid"),
        (1, 0, 0, "block"),
        (1, 1025, 0, "block"),
        (1, (1, 1, 65), 0, "block"),
        (1, (32, 33), 0, "at most 1024 threads"),
        (1, 1, 48 * 1024 + 1, "shared memory"),
        (1, 1, -1, "shared memory"),
    ],
)
def test_a_launch_that_no_device_can_take_is_refused(
    grid: cuda.Extent, block: cuda.Extent, shared_bytes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cuda.check_launch(CPU, grid, block, (), shared_bytes)


@pytest.mark.parametrize("argument", [1, 1.0, True, None, [1]])
def test_a_python_number_is_no_argument_of_a_kernel(argument: Any) -> None:
    with pytest.raises(TypeError, match=rf"argument 1 of the kernel is a {type(argument).__name__}"):
        cuda.check_launch(CPU, 1, 1, (np.int32(0), argument), 0)


def test_a_tensor_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 0 of the kernel lies on meta, the kernel on cpu"):
        cuda.check_launch(CPU, 1, 1, (torch.zeros(1, device="meta"),), 0)


@pytest.fixture(scope="module")
def filler() -> cuda.Module:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    return cuda.Module(cuda.compile_source("fill", FILL, f"sm_{major}{minor}"), device)


@pytest.mark.gpu
def test_a_kernel_runs_on_the_current_stream(filler: cuda.Module) -> None:
    out, stream = torch.zeros(100, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        filler.launch("fill", 1, 128, out, np.float32(3), np.int32(100))
        done = stream.record_event()
    assert not done.query(), "the launch did not wait for the stream, or waited for the device"
    done.synchronize()
    assert (out == 3).all()


@pytest.mark.gpu
def test_a_kernel_runs_in_a_thread_that_has_not_used_the_gpu(filler: cuda.Module) -> None:
    out = torch.zeros(100, device="cuda")
    torch.cuda.synchronize()
    thread = Thread(target=filler.launch, args=("fill", 1, 128, out, np.float32(4), np.int32(100)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert (out == 4).all()


@pytest.mark.gpu
def test_a_kernel_is_captured_in_a_graph_and_replayed(filler: cuda.Module) -> None:
    out, graph = torch.zeros(100, device="cuda"), torch.cuda.CUDAGraph()
    filler.launch("fill", 1, 128, out, np.float32(0), np.int32(100))
    with torch.cuda.graph(graph):
        filler.launch("fill", 1, 128, out, np.float32(5), np.int32(100))
    assert not out.any()
    graph.replay()
    assert (out == 5).all()


@pytest.mark.gpu
def test_a_grid_without_blocks_launches_nothing(filler: cuda.Module) -> None:
    out = torch.zeros(1, device="cuda")
    filler.launch("fill", 0, 128, out, np.float32(1), np.int32(1))
    filler.launch("fill", (1, 0), 128, out, np.float32(1), np.int32(1))
    assert not out.any()
