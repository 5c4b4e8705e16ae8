// The fibers behind cuda_on_host.h. Compiled apart and never instrumented by ThreadSanitizer, to which it tells
// the switches and barriers itself; AddressSanitizer is told of the stacks.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "cuda/host/cuda_on_host.h"

#ifndef __x86_64__
#error "switching fibers is written for x86-64"
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef GHL_TSAN_FIBERS
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

// Saves the callee-saved registers on the stack that it leaves, whose pointer it stores.
extern "C" void ghl_switch_stack(void** leave, void* enter);
asm(R"(
.text
.globl ghl_switch_stack
.type ghl_switch_stack, @function
ghl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ghl_switch_stack, .-ghl_switch_stack
)");

namespace ghl::host {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kSavedRegisters = 6;
// The order of the release and acquire that ThreadSanitizer sees at a barrier needs an address; two, since a
// thread may leave one barrier and reach the next before another has left the first.
using Tag = char[2];

void release(void* tag) {
#ifdef GHL_TSAN_FIBERS
  __tsan_release(tag);
#else
  static_cast<void>(tag);
#endif
}

void acquire(void* tag) {
#ifdef GHL_TSAN_FIBERS
  __tsan_acquire(tag);
#else
  static_cast<void>(tag);
#endif
}

struct Copy {
  void* target;
  const void* source;
  unsigned bytes, from_source;
};

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 index;
  unsigned linear = 0;
  State state = State::ready;
  std::deque<std::vector<Copy>> copy_groups{1};  // the last one is open
  void* sanitizer_stack = nullptr;
  void* sanitizer_fiber = nullptr;
};

struct Warp {
  unsigned alive = 0;
  unsigned needed = 0;
  unsigned arrived = 0;
  uint64_t generation = 0;
  WarpValues values[2];
  Tag tag;
};

struct Block {
  dim3 grid, size, index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  const std::function<void()>* body = nullptr;
  void* shared = nullptr;
  unsigned alive = 0;
  unsigned at_barrier = 0;
  uint64_t barrier_generation = 0;
  Tag barrier_tag;
  char exit_tag;
  std::exception_ptr failure;
};

struct Scheduler {
  Schedule order = Schedule::forward;
  std::mt19937 random;
  uint64_t switches = 0;
  void* stack_pointer = nullptr;
  const void* sanitizer_bottom = nullptr;
  size_t sanitizer_size = 0;
  void* sanitizer_stack = nullptr;
  void* sanitizer_fiber = nullptr;
};

Scheduler scheduler;
Block block;
Fiber* current = nullptr;

void to_scheduler([[maybe_unused]] bool for_good) {
  [[maybe_unused]] Fiber* fiber = current;
  ++scheduler.switches;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber->sanitizer_stack, scheduler.sanitizer_bottom,
                                 scheduler.sanitizer_size);
#endif
#ifdef GHL_TSAN_FIBERS
  __tsan_switch_to_fiber(scheduler.sanitizer_fiber, 1);
#endif
  ghl_switch_stack(&fiber->stack_pointer, scheduler.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber->sanitizer_stack, &scheduler.sanitizer_bottom,
                                  &scheduler.sanitizer_size);
#endif
}

void to_fiber(Fiber& fiber) {
  current = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler.sanitizer_stack, fiber.stack, kStack);
#endif
#ifdef GHL_TSAN_FIBERS
  __tsan_switch_to_fiber(fiber.sanitizer_fiber, 1);
#endif
  ghl_switch_stack(&scheduler.stack_pointer, fiber.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler.sanitizer_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.sanitizer_bottom, &scheduler.sanitizer_size);
#endif
  try {
    (*block.body)();
  } catch (...) {
    block.failure = std::current_exception();
  }
  current->state = State::done;
  release(&block.exit_tag);
  to_scheduler(true);
  std::abort();
}

// Kept for the life of the process; the page below each is out of bounds.
char* stack_of(unsigned thread) {
  static std::vector<char*> stacks;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory) + page);
  }
  return stacks[thread];
}

void start(Fiber& fiber, unsigned thread) {
  const dim3 size = block.size;
  fiber.linear = thread;
  fiber.index = {thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
  fiber.stack = stack_of(thread);
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack);
#endif
#ifdef GHL_TSAN_FIBERS
  fiber.sanitizer_fiber = __tsan_create_fiber(0);
#endif
  // as if ghl_switch_stack had left it: registers, then where it returns to, at an address that a call leaves
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (unsigned i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  block.warps[thread / 32].alive |= 1u << thread % 32;
}

void open_barrier() {
  block.at_barrier = 0;
  ++block.barrier_generation;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::at_block_barrier) fiber.state = State::ready;
  }
}

void finish(Fiber& fiber) {
  --block.alive;
  block.warps[fiber.linear / 32].alive &= ~(1u << fiber.linear % 32);
  // an exited thread no longer counts at a barrier
  if (block.alive > 0 && block.at_barrier == block.alive) open_barrier();
}

[[noreturn]] void deadlock() {
  unsigned waiting = 0;
  for (const Fiber& fiber : block.fibers) waiting += fiber.state == State::at_warp_barrier;
  const dim3 at = block.index;
  throw std::runtime_error("deadlock in block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
                           std::to_string(at.z) + "): " + std::to_string(block.at_barrier) +
                           " threads wait at a block's barrier, " + std::to_string(waiting) +
                           " at a warp's, " + std::to_string(block.alive) + " have not exited");
}

void run_block(std::vector<unsigned>& order) {
  unsigned done = 0;
  while (done < block.fibers.size()) {
    if (scheduler.order == Schedule::random) std::shuffle(order.begin(), order.end(), scheduler.random);
    bool progress = false;
    for (const unsigned thread : order) {
      Fiber& fiber = block.fibers[thread];
      if (fiber.state != State::ready) continue;
      progress = true;
      to_fiber(fiber);
      if (block.failure) std::rethrow_exception(block.failure);
      if (fiber.state != State::done) continue;
      ++done;
      finish(fiber);
    }
    if (!progress) deadlock();
  }
}

void begin_block(unsigned threads) {
  block.fibers.assign(threads, Fiber());
  block.warps.assign((threads + 31) / 32, Warp());
  block.alive = threads;
  block.at_barrier = 0;
  for (unsigned i = 0; i < threads; ++i) start(block.fibers[i], i);
}

void end_block() {
  acquire(&block.exit_tag);
#ifdef GHL_TSAN_FIBERS
  for (const Fiber& fiber : block.fibers) __tsan_destroy_fiber(fiber.sanitizer_fiber);
#endif
}

// What no thread wrote is NaN as a float and out of range as an index.
struct SharedMemory {
  explicit SharedMemory(size_t size) : bytes((size + 1024) / 1024 * 1024), data(std::aligned_alloc(1024, bytes)) {}
  ~SharedMemory() { std::free(data); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  void forget() { std::memset(data, 0xff, bytes); }
  size_t bytes;
  void* data;
};

}  // namespace

void schedule(Schedule order, unsigned seed) {
  scheduler.order = order;
  scheduler.random.seed(seed);
}

void launch(dim3 grid, dim3 size, size_t shared, const std::function<void()>& body) {
  SharedMemory memory(shared);
  block.grid = grid;
  block.size = size;
  block.body = &body;
  block.shared = memory.data;
  block.failure = nullptr;
#ifdef GHL_TSAN_FIBERS
  scheduler.sanitizer_fiber = __tsan_get_current_fiber();
#endif
  const unsigned threads = size.x * size.y * size.z;
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = scheduler.order == Schedule::reverse ? threads - 1 - i : i;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = {x, y, z};
        memory.forget();
        begin_block(threads);
        run_block(order);
        end_block();
      }
    }
  }
}

uint64_t switches() { return scheduler.switches; }

dim3 thread_index() { return current->index; }
dim3 block_index() { return block.index; }
dim3 block_size() { return block.size; }
dim3 grid_size() { return block.grid; }
unsigned lane() { return current->linear % 32; }
void* dynamic_shared() { return block.shared; }

void block_barrier() {
  const uint64_t generation = block.barrier_generation;
  release(&block.barrier_tag[generation % 2]);
  if (++block.at_barrier == block.alive) {
    open_barrier();
  } else {
    current->state = State::at_block_barrier;
    while (block.barrier_generation == generation) to_scheduler(false);
  }
  acquire(&block.barrier_tag[generation % 2]);
}

WarpValues exchange(unsigned mask, uint64_t value) {
  Warp& warp = block.warps[current->linear / 32];
  const unsigned lane = current->linear % 32;
  if (!(mask >> lane & 1)) throw std::runtime_error("a lane is not in the mask that it names");
  if (mask & ~warp.alive) throw std::runtime_error("the mask names a lane that has exited or never was");
  if (!warp.arrived) warp.needed = mask;
  if (warp.needed != mask) throw std::runtime_error("lanes of a warp disagree on the mask");
  const uint64_t generation = warp.generation;
  warp.values[generation % 2].of[lane] = value;
  warp.arrived |= 1u << lane;
  release(&warp.tag[generation % 2]);
  if (warp.arrived == warp.needed) {
    warp.arrived = 0;
    ++warp.generation;
    const size_t first = current->linear / 32 * 32;
    for (size_t i = first; i < std::min(first + 32, block.fibers.size()); ++i) {
      if (block.fibers[i].state == State::at_warp_barrier) block.fibers[i].state = State::ready;
    }
  } else {
    current->state = State::at_warp_barrier;
    while (warp.generation == generation) to_scheduler(false);
  }
  acquire(&warp.tag[generation % 2]);
  return warp.values[generation % 2];
}

void copy_later(void* target, const void* source, unsigned bytes, unsigned from_source) {
  if (from_source > bytes) throw std::runtime_error("cp.async reads more than it writes");
  const auto misaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (misaligned(target) || misaligned(source)) throw std::runtime_error("cp.async of a misaligned address");
  current->copy_groups.back().push_back({target, source, bytes, from_source});
}

void close_copy_group() { current->copy_groups.emplace_back(); }

void wait_for_copies(unsigned groups_pending) {
  auto& groups = current->copy_groups;
  while (groups.size() > groups_pending + 1) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.target, 0, copy.bytes);
      if (copy.from_source) std::memcpy(copy.target, copy.source, copy.from_source);
    }
    groups.pop_front();
  }
}

}  // namespace ghl::host
