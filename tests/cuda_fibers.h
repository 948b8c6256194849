// The threads of a grid as fibers of one OS thread, with barriers and warp collectives; part of cuda_on_cpu.h.
//
// A fiber runs until it returns or waits for others. What CUDA leaves open is made hostile: blocks, warps and lanes run
// in a shuffled order, a warp runs from barrier to barrier before the next one moves, some blocks take turns at their
// barriers, shared memory begins as garbage, and who reads a lane that takes no part reads garbage.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

struct dim3 {
  unsigned x, y, z;
};

// All static shared memory lies in one section, so that it can be filled with garbage and put away.
extern "C" char __start_cuda_shared[] __attribute__((weak));
extern "C" char __stop_cuda_shared[] __attribute__((weak));

namespace cuda_on_cpu {

constexpr int kGarbage = 0xA5;
constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxSharedBytes = 48 * 1024;
constexpr size_t kMaxResidentBlocks = 3;

enum class State { kReady, kAtBarrier, kAtCollective, kReturned };
enum class Barrier { kPlain, kCount, kAnd, kOr };
enum class Collective { kSync, kBallot, kShuffle };

struct Fiber {
  dim3 thread;
  unsigned rank;  // in its block
  State state;
  int line;  // of the source, where it waits
  // At a barrier: what all do, and the predicate, then the result.
  Barrier barrier;
  int predicate;
  // At a collective: what the lanes of `mask` do, and the value that this one brings; then the values of all.
  Collective collective;
  unsigned mask;
  uint64_t value;
  uint64_t values[kWarp];
  // Where it goes on; before it has begun, `entry`.
  bool has_begun;
  jmp_buf registers;
  ucontext_t entry;
};

struct Block {
  dim3 index;
  bool is_done;
  std::vector<Fiber> fibers;
  std::vector<char> shared;  // static, then dynamic, while another block runs
};

struct Launch {
  void (*kernel)(void**);
  void** arguments;
  dim3 grid, block;
  size_t shared_bytes;
};

static Launch current;
static Fiber* running;
static Block* running_block;  // its shared memory is in place
static std::vector<Block> resident;
static jmp_buf scheduler;
static ucontext_t scheduler_entry;
static sigjmp_buf launch_start;
static char message[1024];
static uint64_t shuffle_state;
alignas(128) static unsigned char dynamic_shared[kMaxSharedBytes + 128];

// End the launch, from wherever it is.
[[noreturn]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  size_t length = size_t(std::vsnprintf(message, sizeof message, format, arguments));
  va_end(arguments);
  char* end = message + std::min(length, sizeof message);
  size_t room = size_t(message + sizeof message - end);
  dim3 block = running_block ? running_block->index : dim3{}, thread = running ? running->thread : dim3{};
  if (running) {
    std::snprintf(end, room, " (block %u %u %u, thread %u %u %u)", block.x, block.y, block.z, thread.x, thread.y,
                  thread.z);
  } else if (running_block) {
    std::snprintf(end, room, " (block %u %u %u)", block.x, block.y, block.z);
  }
  siglongjmp(launch_start, 1);
}

inline uint64_t random_bits() {  // xorshift64, Marsaglia 2003
  shuffle_state ^= shuffle_state << 13;
  shuffle_state ^= shuffle_state >> 7;
  return shuffle_state ^= shuffle_state << 17;
}

inline std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    unsigned j = unsigned(random_bits() % (i + 1));
    order[i] = order[j];
    order[j] = i;
  }
  return order;
}

inline dim3 place_in(dim3 size, unsigned rank) {
  return {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
}

// Let the scheduler run others; it comes back here once `state` is kReady again.
__attribute__((noinline)) inline void suspend(State state, int line) {
  running->state = state;
  running->line = line;
  if (_setjmp(running->registers) == 0) _longjmp(scheduler, 1);
}

// A fiber serves one thread of a block after the other.
inline void fiber_main() {
  for (;;) {
    current.kernel(current.arguments);
    suspend(State::kReturned, 0);
  }
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.has_begun) _longjmp(fiber.registers, 1);
    fiber.has_begun = true;
    swapcontext(&scheduler_entry, &fiber.entry);
  }
  running = nullptr;
}

// Stacks live as long as the process: tests launch thousands of times.
inline char* stack_of(size_t number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for the stack of a thread");
    mprotect(stack, 4096, PROT_NONE);
    stacks.push_back(static_cast<char*>(stack));
  }
  return stacks[number];
}

inline void make_fibers(std::vector<Fiber>& fibers, size_t first_stack) {
  fibers.assign(current.block.x * current.block.y * current.block.z, Fiber{});
  for (Fiber& fiber : fibers) {
    fiber.rank = unsigned(&fiber - fibers.data());
    fiber.thread = place_in(current.block, fiber.rank);
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = stack_of(first_stack + fiber.rank);
    fiber.entry.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.entry, fiber_main, 0);
  }
}

inline int block_barrier(Barrier barrier, int predicate, int line) {
  running->barrier = barrier;
  running->predicate = predicate != 0;
  suspend(State::kAtBarrier, line);
  return running->predicate;
}

// Let go all threads of a block if each that has not returned waits at the same barrier.
inline bool release_barrier(std::vector<Fiber>& fibers) {
  const Fiber* first = nullptr;
  int count = 0, waiting = 0;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::kReturned) continue;
    if (fiber.state != State::kAtBarrier) return false;
    if (!first) first = &fiber;
    if (fiber.line != first->line || fiber.barrier != first->barrier) {
      fail("threads of one block wait at two barriers, on lines %d and %d", first->line, fiber.line);
    }
    count += fiber.predicate;
    ++waiting;
  }
  if (!first) return false;
  Barrier barrier = first->barrier;
  int result = barrier == Barrier::kAnd ? count == waiting : barrier == Barrier::kOr ? count > 0 : count;
  for (Fiber& fiber : fibers) {
    if (fiber.state != State::kAtBarrier) continue;
    fiber.predicate = result;
    fiber.state = State::kReady;
  }
  return true;
}

inline const uint64_t* exchange(Collective collective, unsigned mask, uint64_t value, int line) {
  unsigned lane = running->rank % kWarp;
  if (!(mask >> lane & 1)) fail("line %d: lane %u is not in its own mask %08x", line, lane, mask);
  running->collective = collective;
  running->mask = mask;
  running->value = value;
  suspend(State::kAtCollective, line);
  return running->values;
}

// Let go the lanes of the caller's mask if each of them that has not returned waits in the same collective.
inline bool release_collective(Fiber* warp, unsigned num_lanes, const Fiber& caller) {
  uint64_t values[kWarp], ballot = 0;
  std::memset(values, kGarbage, sizeof values);
  unsigned waiting = 0;
  for (unsigned lane = 0; lane < num_lanes; ++lane) {
    const Fiber& fiber = warp[lane];
    if (!(caller.mask >> lane & 1) || fiber.state == State::kReturned) continue;
    if (fiber.state != State::kAtCollective) return false;
    if (fiber.mask != caller.mask || fiber.collective != caller.collective) return false;
    waiting |= 1u << lane;
    values[lane] = fiber.value;
    ballot |= uint64_t{fiber.value != 0} << lane;
  }
  if (caller.collective == Collective::kBallot) std::fill(values, values + kWarp, ballot);
  for (unsigned lane = 0; lane < num_lanes; ++lane) {
    if (!(waiting >> lane & 1)) continue;
    std::copy(values, values + kWarp, warp[lane].values);
    warp[lane].state = State::kReady;
  }
  return true;
}

// Run one warp as far as it comes alone, so that it is far ahead of the others.
inline void run_warp(Fiber* warp, unsigned num_lanes) {
  for (bool has_moved = true; has_moved;) {
    has_moved = false;
    for (unsigned lane : shuffled(num_lanes)) {
      if (warp[lane].state != State::kReady) continue;
      resume(warp[lane]);
      has_moved = true;
    }
    for (unsigned lane = 0; lane < num_lanes; ++lane) {
      if (warp[lane].state == State::kAtCollective && release_collective(warp, num_lanes, warp[lane])) has_moved = true;
    }
  }
}

[[noreturn]] inline void report_deadlock(const std::vector<Fiber>& fibers) {
  unsigned at_barrier = 0, at_collective = 0;
  Fiber barrier = {}, collective = {};
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::kAtBarrier) ++at_barrier, barrier = fiber;
    if (fiber.state == State::kAtCollective) ++at_collective, collective = fiber;
  }
  fail("deadlock: %u threads wait at a barrier (line %d), %u in a warp collective (line %d, mask %08x)", at_barrier,
       barrier.line, at_collective, collective.line, collective.mask);
}

// Put the shared memory of one block away and that of another in its place.
inline void switch_to(Block& block) {
  if (running_block == &block) return;
  size_t static_bytes = size_t(__stop_cuda_shared - __start_cuda_shared);
  if (running_block) {
    std::copy_n(__start_cuda_shared, static_bytes, running_block->shared.data());
    std::copy_n(dynamic_shared, current.shared_bytes, running_block->shared.data() + static_bytes);
  }
  block.shared.resize(static_bytes + current.shared_bytes, char(kGarbage));
  std::copy_n(block.shared.data(), static_bytes, __start_cuda_shared);
  std::copy_n(block.shared.data() + static_bytes, current.shared_bytes, dynamic_shared);
  running_block = &block;
}

inline void begin(Block& block, unsigned rank) {
  switch_to(block);
  block.index = place_in(current.grid, rank);
  std::fill(__start_cuda_shared, __stop_cuda_shared, char(kGarbage));
  std::fill_n(dynamic_shared, current.shared_bytes, static_cast<unsigned char>(kGarbage));
  for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
}

// Run a block to its next barrier; return whether there was one.
inline bool step(Block& block) {
  switch_to(block);
  std::vector<Fiber>& fibers = block.fibers;
  unsigned num_threads = unsigned(fibers.size());
  for (unsigned warp : shuffled((num_threads + kWarp - 1) / kWarp)) {
    run_warp(&fibers[warp * kWarp], std::min(kWarp, num_threads - warp * kWarp));
  }
  unsigned char* rest = dynamic_shared + current.shared_bytes;  // a byte at least; all that follow must equal it
  if (*rest != kGarbage || std::memcmp(rest, rest + 1, sizeof dynamic_shared - current.shared_bytes - 1) != 0) {
    fail("dynamic shared memory was written behind its %zu bytes", current.shared_bytes);
  }
  if (release_barrier(fibers)) return true;
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::kReturned) report_deadlock(fibers);
  }
  return false;
}

inline void run_grid() {
  std::vector<unsigned> order = shuffled(current.grid.x * current.grid.y * current.grid.z);
  size_t next = 0, num_running = std::min(kMaxResidentBlocks, order.size());
  std::memset(dynamic_shared, kGarbage, sizeof dynamic_shared);
  resident.assign(num_running, Block{});
  for (Block& block : resident) {
    make_fibers(block.fibers, next * 1024);
    begin(block, order[next++]);
  }
  while (num_running > 0) {
    Block& block = resident[random_bits() % resident.size()];
    if (block.is_done || step(block)) continue;
    if (next < order.size()) {
      begin(block, order[next++]);
    } else {
      block.is_done = true;
      --num_running;
    }
  }
}

}  // namespace cuda_on_cpu
