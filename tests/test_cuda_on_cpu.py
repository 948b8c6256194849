"""The emulator proves itself: what it computes, what it shuffles, and the mistakes that it must not let pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamd.gpu import cuda
from tests.cuda_on_cpu import EmulatedModule, KernelError

SOURCE = r"""
#include <cuda_fp16.h>

extern "C" __global__ void __launch_bounds__(256) total(const float* values, float* out, int count) {
  __shared__ float partial[8];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float value = i < count ? values[i] : 0.0f;
  for (int lanes = 16; lanes > 0; lanes >>= 1) value += __shfl_down_sync(0xffffffffu, value, lanes);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < 8; ++warp) value += partial[warp];
  atomicAdd(out, value);
}

extern "C" __global__ void reverse(const int* in, int* out) {
  extern __shared__ __align__(16) int line[];
  line[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = line[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void where(int* out) {
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

extern "C" __global__ void barriers(int* out, int limit) {
  if (threadIdx.x % 3 == 2) return;  // who has returned, no one waits for
  int* mine = out + 3 * threadIdx.x;
  mine[0] = __syncthreads_count(threadIdx.x < limit);
  mine[1] = __syncthreads_and(threadIdx.x < limit);
  mine[2] = __syncthreads_or(threadIdx.x == limit);
}

extern "C" __global__ void lanes(unsigned* ballots, int* shuffles) {
  int lane = threadIdx.x;
  if (lane == 31) return;
  if (lane < 8) {
    ballots[lane] = __ballot_sync(0xffu, lane & 1);
  } else {
    ballots[lane] = __ballot_sync(0xffffff00u, lane % 4 == 0);
    return;
  }
  int* mine = shuffles + 8 * lane;
  mine[0] = __shfl_sync(0xffu, lane * 10, 3);
  mine[1] = __shfl_up_sync(0xffu, lane, 2);
  mine[2] = __shfl_down_sync(0xffu, lane, 1, 4);
  mine[3] = __shfl_xor_sync(0xffu, lane, 5);
  mine[4] = __any_sync(0xffu, lane == 7) + 2 * __any_sync(0xffu, 0);
  mine[5] = __all_sync(0xffu, 1) + 2 * __all_sync(0xffu, lane != 7);
  mine[6] = __shfl_sync(0xffu, 1LL << 40, 0) == 1LL << 40;
  mine[7] = __shfl_sync(0xffu, lane, 6, 4);
  __syncwarp(0xffu);
}

extern "C" __global__ void atomics(int* out, unsigned long long* wide) {
  int i = threadIdx.x;
  atomicAdd(&out[0], i);
  atomicMax(&out[1], i);
  atomicMin(&out[2], i);
  atomicOr(&out[3], 1 << i % 8);
  atomicAnd(&out[4], ~(1 << i % 8));
  atomicCAS(&out[5], 0, 7);
  if (atomicExch(&out[6], 1) == 0) out[7] += 1;
  atomicAdd(wide, 1ull << 33);
}

extern "C" __global__ void bits(const unsigned* in, int* out) {
  unsigned x = in[threadIdx.x];
  int* mine = out + 6 * threadIdx.x;
  mine[0] = __popc(x);
  mine[1] = __ffs(x);
  mine[2] = __clz(x);
  mine[3] = (int)__brev(x);
  mine[4] = __ffsll((long long)x << 32);
  mine[5] = __float_as_uint(__uint_as_float(x)) == x;
}

extern "C" __global__ void halves(const float* in, __half* narrowed, const __half* all, float* widened, int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) narrowed[i] = __float2half(in[i]);
  if (i < 65536) widened[i] = __half2float(all[i]);
}

extern "C" __global__ void scale(const float4* in, float4* out, float factor, bool by_half) {
  float4 v = in[threadIdx.x];
  if (by_half) factor *= 0.5f;
  out[threadIdx.x] = make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
}

extern "C" __global__ void race(int* out) {
  __shared__ int line[64];
  line[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = line[(threadIdx.x + 1) % 64];  // without a barrier between
}

extern "C" __global__ void race_of_blocks(int* scratch, int* out) {
  if (threadIdx.x == 0) scratch[0] = blockIdx.x;
  __syncthreads();
  out[blockIdx.x] = scratch[0];
}

extern "C" __global__ void unset(int* out) {
  __shared__ int cell[32];
  out[threadIdx.x] = cell[threadIdx.x];
}

extern "C" __global__ void store(int* out, int index) { out[index] = 1; }
extern "C" __global__ void fetch(const int* in, int* out, int index) { out[0] = in[index]; }

extern "C" __global__ void write_shared(int index) {
  extern __shared__ int line[];
  line[index] = 1;
}

extern "C" __global__ void index_array(int* out, int index) {
  __shared__ int line[4];
  line[index] = 1;
  out[0] = line[index];
}

extern "C" __global__ void stuck_barrier() {
  if (threadIdx.x < 5) __syncthreads();
  else __syncwarp();
}

extern "C" __global__ void two_barriers() {
  if (threadIdx.x < 5)
    __syncthreads();
  else
    __syncthreads();
}

extern "C" __global__ void foreign_lane() { __ballot_sync(1u, 1); }
extern "C" __global__ void shift(int* out, int bits) { out[0] = 1 << bits; }
extern "C" __global__ void convert(int* out, float value) { out[0] = (int)value; }
extern "C" __global__ void clamped(int* out, float value) { out[0] = __float2int_rz(value); }
"""


class GpuModule:
    """The sample on a GPU: takes CPU tensors, as the emulator does, so that both can be held to the same results."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(self._device)
        self._module = cuda.Module(cuda.compile_source("sample", SOURCE, f"sm_{major}{minor}"), self._device)

    def launch(
        self,
        function: str,
        grid: cuda.Extent,
        block: cuda.Extent,
        *arguments: Tensor | np.generic,
        shared_bytes: int = 0,
    ) -> None:
        moved = [part.to(self._device) if isinstance(part, Tensor) else part for part in arguments]
        self._module.launch(function, grid, block, *moved, shared_bytes=shared_bytes)
        for given, result in zip(arguments, moved, strict=True):
            if isinstance(given, Tensor):
                given.copy_(torch.as_tensor(result))


SampleModule = EmulatedModule | GpuModule


@pytest.fixture(scope="module")
def emulated(emulator_folder: Path) -> EmulatedModule:
    return EmulatedModule("sample", SOURCE, emulator_folder)


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def module(request: pytest.FixtureRequest, emulator_folder: Path) -> SampleModule:
    if request.param == "emulated":
        return EmulatedModule("sample", SOURCE, emulator_folder)
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return GpuModule()


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5000])
def test_blocks_add_up_through_shuffles_shared_memory_and_atomics(module: SampleModule, count: int) -> None:
    values, out = torch.arange(count, dtype=torch.float32), torch.zeros(1)
    module.launch("total", -(-count // 256), 256, values, out, np.int32(count))
    assert out.item() == count * (count - 1) / 2


def test_dynamic_shared_memory_is_one_block_s_own(module: SampleModule) -> None:
    given, out = torch.arange(300, dtype=torch.int32), ints(300)
    module.launch("reverse", 3, 100, given, out, shared_bytes=400)
    assert torch.equal(out, given.view(3, 100).flip(1).flatten())


def test_blocks_and_threads_have_three_indices(module: SampleModule) -> None:
    out = ints(2 * 3 * 4, 5 * 2 * 3)
    module.launch("where", (2, 3, 4), (5, 2, 3), out)
    assert torch.equal(out, torch.arange(24, dtype=torch.int32)[:, None] * 1000 + torch.arange(30, dtype=torch.int32))


@pytest.mark.parametrize("limit", [0, 40, 99])
def test_barriers_count_the_threads_that_have_not_returned(module: SampleModule, limit: int) -> None:
    out = torch.full((99, 3), -1, dtype=torch.int32)
    module.launch("barriers", 1, 99, out, np.int32(limit))
    alive = [thread for thread in range(99) if thread % 3 != 2]
    below = sum(thread < limit for thread in alive)
    assert out[alive].unique(dim=0).tolist() == [[below, below == len(alive), limit in alive]]
    assert (out[2::3] == -1).all()


def test_lanes_of_a_mask_exchange_while_the_others_do_something_else(module: SampleModule) -> None:
    ballots, shuffles = ints(32), ints(32, 8)
    module.launch("lanes", 1, 32, ballots, shuffles)
    others = sum(1 << lane for lane in range(8, 31) if lane % 4 == 0)
    assert ballots.tolist() == [0b10101010] * 8 + [others] * 23 + [0]
    lane = torch.arange(8, dtype=torch.int32)
    expected = torch.stack(
        (
            torch.full_like(lane, 30),
            torch.where(lane < 2, lane, lane - 2),
            torch.where(lane % 4 < 3, lane + 1, lane),
            lane ^ 5,
            *torch.tensor([[1], [1], [1]]).expand(3, 8).int(),
            lane // 4 * 4 + 2,
        ),
        dim=1,
    )
    assert torch.equal(shuffles[:8], expected)


def test_atomics_give_the_old_value_and_lose_nothing(module: SampleModule) -> None:
    out, wide = torch.tensor([0, -1, 99, 0, 255, 0, 0, 0], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    module.launch("atomics", 2, 64, out, wide)
    assert out.tolist() == [2 * sum(range(64)), 63, 0, 255, 0, 7, 1, 1]
    assert wide.item() == 128 << 33


def test_bit_operations_know_zero_and_the_top_bit(module: SampleModule) -> None:
    values, out = torch.tensor([0, 1, 0b1100, -(2**31)], dtype=torch.int32), ints(4, 6)
    module.launch("bits", 1, 4, values, out)
    assert out.tolist() == [
        [0, 0, 32, 0, 0, 1],
        [1, 1, 31, -(2**31), 33, 1],
        [2, 3, 28, 0b0011 << 28, 35, 1],
        [1, 32, 0, 1, 64, 1],
    ]


def test_halves_are_narrowed_and_widened_as_numpy_does(module: SampleModule) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore", invalid="ignore"):
        near = every.astype(np.float32)
        midway = (near[:-1] + near[1:]) / 2
        values = np.concatenate((near, midway, rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)))
        values = values[~np.isnan(values)]
        expected = values.astype(np.float16)
    narrowed, widened = torch.zeros(len(values), dtype=torch.float16), torch.zeros(65536)
    given = torch.from_numpy(values)
    blocks = -(-len(values) // 1024)
    module.launch("halves", blocks, 1024, given, narrowed, torch.from_numpy(every), widened, np.int32(len(values)))
    np.testing.assert_array_equal(narrowed.view(torch.int16).numpy(), expected.view(np.int16))
    np.testing.assert_array_equal(widened.numpy(), near)


def test_vectors_and_scalars_of_every_kind_reach_the_kernel(module: SampleModule) -> None:
    given, out = torch.rand(7, 4), torch.zeros(9, 4)
    module.launch("scale", 1, 7, given, out[1:8], np.float32(3), np.bool_(True))
    assert torch.equal(out[1:8], given * 1.5) and not out[[0, 8]].any()


def test_threads_run_in_a_shuffled_order_so_that_a_missing_barrier_shows(emulated: EmulatedModule) -> None:
    out = ints(64)
    emulated.launch("race", 1, 64, out)
    assert not torch.equal(out, (torch.arange(64, dtype=torch.int32) + 1) % 64)


def test_blocks_take_turns_so_that_what_they_share_by_mistake_shows(emulated: EmulatedModule) -> None:
    scratch, out = ints(1), ints(20)
    emulated.launch("race_of_blocks", 20, 64, scratch, out)
    assert not torch.equal(out, torch.arange(20, dtype=torch.int32))


def test_shared_memory_begins_as_garbage(emulated: EmulatedModule) -> None:
    out = ints(32)
    emulated.launch("unset", 1, 32, out)
    assert (out == int.from_bytes(b"\xa5" * 4, "little", signed=True)).all()


MISTAKES: list[tuple[str, tuple[Any, ...], str]] = [
    ("store", (ints(5), np.int32(5)), "just outside"),
    ("store", (ints(5), np.int32(-1)), "just outside"),
    ("store", (ints(4), np.int32(4)), "outside of every tensor.*thread .*sample.cu:"),
    ("store", (ints(4), np.int32(-1024)), "outside of every tensor"),
    ("store", (ints(0), np.int32(0)), "outside of every tensor"),
    ("fetch", (ints(4), ints(1), np.int32(4)), "outside of every tensor"),
    ("index_array", (ints(1), np.int32(4)), "undefined: an index"),
    ("shift", (ints(1), np.int32(32)), "undefined: .* a shift"),
    ("convert", (ints(1), np.float32(3e9)), "undefined"),
    ("write_shared", (np.int32(2),), "dynamic shared memory was written behind its 8 bytes"),
    ("foreign_lane", (), "is not in its own mask 00000001"),
    ("stuck_barrier", (), r"deadlock: 5 threads wait at a barrier \(line \d+\), (0|27) in a warp.*\(block 0 0 0\)"),
    ("two_barriers", (), r"wait at two barriers, on lines \d+ and \d+"),
    ("store", (ints(4), np.int64(0)), r"store takes \(p, i4\), not \(p, i8\)"),
    ("store", (np.int32(0), ints(4)), r"store takes \(p, i4\), not \(i4, p\)"),
    ("store", (ints(4),), r"store takes \(p, i4\), not \(p\)"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), MISTAKES)
def test_a_mistake_is_found(emulated: EmulatedModule, function: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        emulated.launch(function, 1, 32, *arguments, shared_bytes=8)
    out, given = ints(4), torch.arange(4, dtype=torch.int32)
    emulated.launch("reverse", 1, 4, given, out, shared_bytes=16)
    assert out.tolist() == [3, 2, 1, 0], "the emulator does not work after a mistake"


def test_casts_by_name_clamp_as_the_gpu_does(module: SampleModule) -> None:
    out = ints(1)
    for value, expected in ((3e9, 2**31 - 1), (-3e9, -(2**31)), (float("nan"), 0), (-1.7, -1)):
        module.launch("clamped", 1, 1, out, np.float32(value))
        assert out.item() == expected


def test_a_view_is_passed_by_its_own_address(module: SampleModule) -> None:
    out = ints(3, 4)
    module.launch("store", 1, 1, out[1], np.int32(2))
    assert out.nonzero().tolist() == [[1, 2]]


def test_a_source_that_does_not_compile_says_where(emulator_folder: Path) -> None:
    with pytest.raises(KernelError, match=r"broken\.cu:2:"):
        EmulatedModule("broken", '\nextern "C" __global__ void f() { g(); }', emulator_folder)
