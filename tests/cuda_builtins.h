// What a CUDA source finds without an include, and cuda_fp16.h; part of cuda_on_cpu.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Dynamic shared memory (`extern __shared__`) is rewritten by cuda_on_cpu.py.
#define __shared__ __attribute__((section("cuda_shared"))) static

#define threadIdx (cuda_on_cpu::running->thread)
#define blockIdx (cuda_on_cpu::running_block->index)
#define blockDim (cuda_on_cpu::current.block)
#define gridDim (cuda_on_cpu::current.grid)

constexpr int warpSize = 32;

#define CUDA_ON_CPU_VECTORS(type, name)                                                                   \
  struct __align__(2 * sizeof(type)) name##2 { type x, y; };                                              \
  struct name##3 { type x, y, z; };                                                                       \
  struct __align__(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; };           \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                        \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                             \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(signed char, char)
CUDA_ON_CPU_VECTORS(unsigned char, uchar)
CUDA_ON_CPU_VECTORS(short, short)
CUDA_ON_CPU_VECTORS(unsigned short, ushort)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(long long, longlong)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)

// CUDA's own, since std::min(float, float) treats NaN otherwise.
#define CUDA_ON_CPU_MIN_MAX(type)                                  \
  inline type min(type a, type b) { return b < a ? b : a; }        \
  inline type max(type a, type b) { return a < b ? b : a; }
CUDA_ON_CPU_MIN_MAX(int)
CUDA_ON_CPU_MIN_MAX(unsigned)
CUDA_ON_CPU_MIN_MAX(long)
CUDA_ON_CPU_MIN_MAX(unsigned long)
CUDA_ON_CPU_MIN_MAX(long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_on_cpu::block_barrier(cuda_on_cpu::Barrier::kPlain, 0, line);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::Barrier::kCount, predicate, line);
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::Barrier::kAnd, predicate, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::Barrier::kOr, predicate, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  cuda_on_cpu::exchange(cuda_on_cpu::Collective::kSync, mask, 0, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return unsigned(cuda_on_cpu::exchange(cuda_on_cpu::Collective::kBallot, mask, predicate != 0, line)[0]);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, !predicate, line) == 0;
}

namespace cuda_on_cpu {

// Exchange `value`, then read the lane that `source(lane, first, width)` names; a lane outside its own part of `width`
// lanes keeps its own value.
template <class T, class Source>
T shuffle(unsigned mask, T value, int width, int line, Source source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* values = exchange(Collective::kShuffle, mask, bits, line);
  int lane = int(running->rank % kWarp), first = lane / width * width;
  int from = source(lane, first, width);
  if (from < first || from >= first + width) from = lane;
  std::memcpy(&value, &values[from], sizeof value);
  return value;
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// CUDA's casts clamp and turn NaN into zero.
template <class Integer>
Integer clamped(double value) {
  if (std::isnan(value)) return 0;
  constexpr double least = std::numeric_limits<Integer>::min(), most = std::numeric_limits<Integer>::max();
  return value <= least ? std::numeric_limits<Integer>::min()
         : value >= most ? std::numeric_limits<Integer>::max()
                         : Integer(value);
}

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, width, line,
                              [=](int, int first, int) { return first + (from & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, width, line, [=](int lane, int, int) { return lane - int(delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, width, line, [=](int lane, int, int) { return lane + int(delta); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, width, line, [=](int lane, int, int) { return lane ^ lanes; });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t{a} * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned choice = selector >> (4 * i) & 15, byte = unsigned(bytes >> (8 * (choice & 7))) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

template <class T>
T __ldg(const T* address) { return *address; }
template <class T>
T __ldcs(const T* address) { return *address; }
template <class T>
void __stcs(T* address, T value) { *address = value; }

// One thread runs at a time, so a plain read and write is atomic.
#define CUDA_ON_CPU_ATOMIC(name, result)                                       \
  template <class T>                                                           \
  T name(T* address, std::common_type_t<T> value) {                            \
    T old = *address;                                                          \
    *address = result;                                                         \
    return old;                                                                \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, T(old + value))
CUDA_ON_CPU_ATOMIC(atomicSub, T(old - value))
CUDA_ON_CPU_ATOMIC(atomicMin, value < old ? value : old)
CUDA_ON_CPU_ATOMIC(atomicMax, value > old ? value : old)
CUDA_ON_CPU_ATOMIC(atomicAnd, old & value)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicExch, value)
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  T old = *address;
  if (old == expected) *address = value;
  return old;
}

inline int __float_as_int(float x) { return cuda_on_cpu::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::bits_as<double>(x); }
inline int __float2int_rn(float x) { return cuda_on_cpu::clamped<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return cuda_on_cpu::clamped<int>(std::trunc(x)); }
inline int __float2int_rd(float x) { return cuda_on_cpu::clamped<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return cuda_on_cpu::clamped<int>(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) { return cuda_on_cpu::clamped<unsigned>(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return cuda_on_cpu::clamped<unsigned>(std::trunc(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? fminf(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// IEEE 754 binary16; conversions round to the nearest, ties to even.
struct __align__(2) __half { uint16_t bits; };
struct __align__(4) __half2 { __half x, y; };
using half = __half;
using half2 = __half2;

inline float __half2float(__half value) {
  unsigned sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;  // 112: the difference of the exponents' biases
  return __uint_as_float(sign | __float_as_uint(scaled));
}
inline __half __float2half_rn(float value) {
  unsigned sign = __float_as_uint(value) >> 16 & 0x8000u;
  float magnitude = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00u)};  // halfway to the first power of two that is too large
  // Adding a number whose last bit weighs what the result's last bit weighs makes the hardware round there.
  int exponent = max(std::ilogb(magnitude), -14);
  float rounder = std::ldexp(1.5f, exponent + 13);
  if (magnitude != 0) magnitude = (magnitude + rounder) - rounder;
  return {uint16_t(sign | __float_as_uint(magnitude * 0x1p-112f) >> 13)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
