// Runs a CUDA source as C++ on the CPU, for tests: tests/cuda_on_cpu.py puts this before a gpu/*.cu and compiles both.
#pragma once

#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <unistd.h>

#include <type_traits>
#include <utility>

#include "cuda_fibers.h"

namespace cuda_on_cpu {

constexpr size_t kWidestVector = 16;
constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

static long fault_offset;  // in the library, or 0

inline void trap(int signal, siginfo_t* info, void*) {
  // The handler, what the kernel of the system put there, the fault.
  void* frames[3] = {};
  Dl_info library;
  if (backtrace(frames, 3) == 3 && dladdr(frames[2], &library)) {
    fault_offset = static_cast<char*>(frames[2]) - static_cast<char*>(library.dli_fbase);
  }
  if (signal == SIGSEGV || signal == SIGBUS) {
    fail("read or write outside of every tensor, at %p", info->si_addr);
  }
  fail("undefined: an index outside an array, a misaligned vector, a shift too wide, an overflow, a division by 0");
}

// Return nullptr, or what went wrong.
inline const char* run_launch(const Launch& launch, uint64_t seed) {
  static char signal_stack[64 * 1024];
  stack_t alternate = {}, previous_stack;
  alternate.ss_sp = signal_stack;
  alternate.ss_size = sizeof signal_stack;
  sigaltstack(&alternate, &previous_stack);
  struct sigaction action = {}, previous[std::size(kSignals)];
  action.sa_sigaction = trap;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous[i]);

  current = launch;
  shuffle_state = seed | 1;
  running = nullptr;
  running_block = nullptr;
  fault_offset = 0;
  volatile bool has_failed = false;
  if (sigsetjmp(launch_start, 1) == 0) {
    run_grid();
  } else {
    has_failed = true;
  }
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
  return has_failed ? message : nullptr;
}

// A copy of `bytes` bytes between two pages that no one may touch. The end lies at the second page, but for rounding up
// to the widest vector; what lies between is filled with garbage that must stay.
inline char* new_guarded(const char* source, size_t bytes) {
  size_t page = size_t(sysconf(_SC_PAGESIZE)), room = (bytes + page - 1) / page * page;
  void* start = mmap(nullptr, room + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  char* first = static_cast<char*>(start) + page;
  std::memset(first, kGarbage, room);
  mprotect(start, page, PROT_NONE);
  mprotect(first + room, page, PROT_NONE);
  char* data = first + (room - bytes) / kWidestVector * kWidestVector;
  std::memcpy(data, source, bytes);
  return data;
}

// Copy back and free; return whether what lies around the copy is still as it was.
inline bool delete_guarded(char* data, char* destination, size_t bytes) {
  size_t page = size_t(sysconf(_SC_PAGESIZE)), room = (bytes + page - 1) / page * page;
  char* first = data - (room - bytes) / kWidestVector * kWidestVector;
  bool is_intact = true;
  for (char* p = first; p < first + room; ++p) {
    if ((p < data || p >= data + bytes) && static_cast<unsigned char>(*p) != kGarbage) is_intact = false;
  }
  std::memcpy(destination, data, bytes);
  munmap(first - page, room + 2 * page);
  return is_intact;
}

template <class T>
constexpr const char* type_name() {
  if constexpr (std::is_pointer_v<T>) return "p";
  if constexpr (std::is_same_v<T, bool>) return "b1";
  if constexpr (std::is_floating_point_v<T>) return sizeof(T) == 4 ? "f4" : "f8";
  constexpr const char* names[2][9] = {{"", "u1", "u2", "", "u4", "", "", "", "u8"},
                                       {"", "i1", "i2", "", "i4", "", "", "", "i8"}};
  return names[std::is_signed_v<T>][sizeof(T)];
}

template <auto function>
struct Kernel;

template <class... Parameters, void (*function)(Parameters...)>
struct Kernel<function> {
  template <size_t... i>
  static void call(void** arguments, std::index_sequence<i...>) {
    function(*static_cast<std::remove_reference_t<Parameters>*>(arguments[i])...);
  }
  static void run(void** arguments) { call(arguments, std::index_sequence_for<Parameters...>{}); }

  // The names of the parameters' types, as numpy writes them, with spaces between.
  static const char* signature() {
    static char text[512];
    int length = 0;
    ((length += std::snprintf(text + length, sizeof text - length, "%s ", type_name<std::remove_cv_t<Parameters>>())),
     ...);
    return text;
  }
};

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_KERNEL(name)                                                                                    \
  extern "C" const char* name##_signature() { return cuda_on_cpu::Kernel<name>::signature(); }                      \
  extern "C" const char* name##_launch(const unsigned* grid, const unsigned* block, size_t shared, uint64_t seed,   \
                                       void** arguments) {                                                          \
    dim3 blocks = {grid[0], grid[1], grid[2]}, threads = {block[0], block[1], block[2]};                            \
    return cuda_on_cpu::run_launch({cuda_on_cpu::Kernel<name>::run, arguments, blocks, threads, shared}, seed);     \
  }

extern "C" char* cuda_on_cpu_new(const char* source, size_t bytes) { return cuda_on_cpu::new_guarded(source, bytes); }
extern "C" bool cuda_on_cpu_delete(char* data, char* destination, size_t bytes) {
  return cuda_on_cpu::delete_guarded(data, destination, bytes);
}
extern "C" long cuda_on_cpu_fault() { return cuda_on_cpu::fault_offset; }

#include "cuda_builtins.h"
