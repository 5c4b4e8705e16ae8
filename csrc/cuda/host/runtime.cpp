// The fibers behind cuda_on_host.h. Compiled apart and never instrumented by ThreadSanitizer, to which it
// tells the switches and barriers itself (-DGHL_TSAN_FIBERS); AddressSanitizer is told of the stacks.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <numeric>
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
.hidden ghl_switch_stack
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
constexpr unsigned kMostThreads = 1024;

// --- what the sanitizers are told ---------------------------------------------------------------

// What happened before a release of a tag happened before what follows an acquire of it.
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

// The runtime's own memory is ordered by its switches, of which ThreadSanitizer must not judge; it would see
// memcpy, which it replaces.
void copy_unseen(void* target, const void* source, size_t bytes) {
#ifdef GHL_TSAN_FIBERS
  asm volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(bytes) : : "memory");
#else
  if (bytes) std::memcpy(target, source, bytes);
#endif
}

// --- state --------------------------------------------------------------------------------------

// The target has its bytes when a wait says so; until then it holds none of the old and none of the new.
struct Copy {
  void* target;
  unsigned bytes;
  uint64_t group;
  unsigned char staged[16];
};

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 index;
  unsigned linear = 0;
  State state = State::done;
  std::vector<Copy> copies;
  uint64_t open_group = 0;
  void* sanitizer_stack = nullptr;
  void* sanitizer_fiber = nullptr;
};

// Where the lanes of one mask wait for each other. Some may still be leaving one when others arrive at the
// next of the same mask, so there can be two.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  unsigned left = 0;
  // A tag of its own: lanes that met elsewhere are not ordered by this.
  char tag;
  alignas(8) unsigned char values[32 * kMostExchanged];

  bool complete() const { return arrived == mask; }
};

struct Warp {
  unsigned alive = 0;
  std::deque<Meeting> meetings;  // which stay where they are
};

// Two sides: a thread may leave one barrier and reach the next before another has left the first.
struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
  unsigned predicates[2] = {0, 0};
  char tag[2];
};

struct Block {
  dim3 grid, size, index;
  std::vector<Fiber> fibers;  // of the largest block so far; the first `threads` are this block's
  std::vector<Warp> warps;
  unsigned threads = 0;
  unsigned alive = 0;
  Barrier barrier;
  const std::function<void()>* body = nullptr;
  void* shared = nullptr;
  std::exception_ptr failure;
  char begin_tag, end_tag;
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

// --- switching ----------------------------------------------------------------------------------

void to_scheduler([[maybe_unused]] bool for_good) {
  Fiber& fiber = *current;
  ++scheduler.switches;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.sanitizer_stack, scheduler.sanitizer_bottom,
                                 scheduler.sanitizer_size);
#endif
#ifdef GHL_TSAN_FIBERS
  __tsan_switch_to_fiber(scheduler.sanitizer_fiber, 1);
#endif
  ghl_switch_stack(&fiber.stack_pointer, scheduler.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler.sanitizer_bottom,
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
  acquire(&block.begin_tag);
  try {
    (*block.body)();
  } catch (...) {
    block.failure = std::current_exception();
  }
  current->state = State::done;
  release(&block.end_tag);
  to_scheduler(true);
  std::abort();
}

// --- fibers -------------------------------------------------------------------------------------

// Kept for the life of the process; the page below is out of bounds.
char* new_stack() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  return static_cast<char*>(memory) + page;
}

void create(Fiber& fiber, unsigned thread) {
  fiber.linear = thread;
  fiber.stack = new_stack();
#ifdef GHL_TSAN_FIBERS
  fiber.sanitizer_fiber = __tsan_create_fiber(0);
#endif
}

// Of a failed block: what its fibers did is over before anything that follows.
void abandon(Fiber& fiber) {
  fiber.state = State::done;
#ifdef GHL_TSAN_FIBERS
  __tsan_switch_to_fiber(fiber.sanitizer_fiber, 1);
  release(&block.end_tag);
  __tsan_switch_to_fiber(scheduler.sanitizer_fiber, 1);
  __tsan_destroy_fiber(fiber.sanitizer_fiber);
  fiber.sanitizer_fiber = __tsan_create_fiber(0);
#endif
}

void start(Fiber& fiber) {
  const dim3 size = block.size;
  const unsigned thread = fiber.linear;
  fiber.index = {thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
  fiber.state = State::ready;
  fiber.copies.clear();
  fiber.open_group = 0;
#ifdef __SANITIZE_ADDRESS__
  // the frames in which it left for good, with red zones in them
  char* const bottom = fiber.stack_pointer ? static_cast<char*>(fiber.stack_pointer) : fiber.stack + kStack;
  ASAN_UNPOISON_MEMORY_REGION(bottom, static_cast<size_t>(fiber.stack + kStack - bottom));
#endif
  // as if ghl_switch_stack had left it: registers, then where it returns to, at an address that a call leaves
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (unsigned i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  block.warps[thread / 32].alive |= 1u << thread % 32;
}

// --- a block ------------------------------------------------------------------------------------

void open_barrier() {
  Barrier& barrier = block.barrier;
  barrier.arrived = 0;
  ++barrier.generation;
  barrier.predicates[barrier.generation % 2] = 0;
  for (unsigned i = 0; i < block.threads; ++i) {
    if (block.fibers[i].state == State::at_block_barrier) block.fibers[i].state = State::ready;
  }
}

void finish(const Fiber& fiber) {
  --block.alive;
  block.warps[fiber.linear / 32].alive &= ~(1u << fiber.linear % 32);
  // an exited thread no longer counts at a barrier
  if (block.alive > 0 && block.barrier.arrived == block.alive) open_barrier();
}

std::string hexadecimal(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

[[noreturn]] void deadlock() {
  const dim3 at = block.index;
  std::string what = "deadlock in block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
                     std::to_string(at.z) + "): of " + std::to_string(block.alive) + " threads " +
                     std::to_string(block.barrier.arrived) + " wait at the block's barrier";
  for (size_t i = 0; i < block.warps.size(); ++i) {
    for (const Meeting& meeting : block.warps[i].meetings) {
      if (!meeting.arrived || meeting.complete()) continue;
      what += "; of warp " + std::to_string(i) + " lanes " + hexadecimal(meeting.arrived) +
              " wait for the mask " + hexadecimal(meeting.mask);
      const unsigned gone = meeting.mask & ~block.warps[i].alive;
      if (gone) what += ", of which " + hexadecimal(gone) + " have exited";
    }
  }
  throw std::runtime_error(what);
}

void run_block(std::vector<unsigned>& order) {
  while (block.alive > 0) {
    if (scheduler.order == Schedule::random) std::shuffle(order.begin(), order.end(), scheduler.random);
    bool progress = false;
    for (const unsigned thread : order) {
      Fiber& fiber = block.fibers[thread];
      if (fiber.state != State::ready) continue;
      progress = true;
      to_fiber(fiber);
      if (block.failure) std::rethrow_exception(block.failure);
      if (fiber.state == State::done) finish(fiber);
    }
    if (!progress) deadlock();
  }
}

void begin_block() {
  block.alive = block.threads;
  block.barrier.arrived = 0;
  block.barrier.predicates[block.barrier.generation % 2] = 0;
  block.warps.resize(std::max<size_t>(block.warps.size(), (block.threads + 31) / 32));
  for (Warp& warp : block.warps) {
    warp.alive = 0;
    for (Meeting& meeting : warp.meetings) meeting.arrived = meeting.left = 0;
  }
  release(&block.begin_tag);
  for (unsigned i = 0; i < block.threads; ++i) start(block.fibers[i]);
}

void end_block() { acquire(&block.end_tag); }

// --- a grid -------------------------------------------------------------------------------------

// Filled anew for every block: what no thread of it wrote is NaN as a float and out of range as an index.
class SharedMemory {
 public:
  explicit SharedMemory(size_t asked) : asked_(asked), bytes_((asked / kAlignment + 1) * kAlignment) {
    memory_ = static_cast<char*>(std::aligned_alloc(kAlignment, bytes_));
    if (!memory_) throw std::bad_alloc();
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(memory_ + asked_, bytes_ - asked_);
#endif
  }
  ~SharedMemory() {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_);
#endif
    std::free(memory_);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void forget() { std::memset(memory_, 0xff, asked_); }
  void* data() const { return memory_; }

 private:
  static constexpr size_t kAlignment = 1024;
  size_t asked_, bytes_;
  char* memory_;
};

std::vector<unsigned> in_order(uint64_t count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (scheduler.order == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (scheduler.order == Schedule::random) std::shuffle(order.begin(), order.end(), scheduler.random);
  return order;
}

void prepare(dim3 grid, dim3 size, const std::function<void()>& body) {
  block.grid = grid;
  block.size = size;
  block.threads = size.x * size.y * size.z;
  block.body = &body;
  block.failure = nullptr;
  for (unsigned i = static_cast<unsigned>(block.fibers.size()); i < block.threads; ++i) {
    create(block.fibers.emplace_back(), i);
  }
#ifdef GHL_TSAN_FIBERS
  scheduler.sanitizer_fiber = __tsan_get_current_fiber();
#endif
}

Fiber& running() {
  if (!current) throw std::logic_error("a device function was called outside of a kernel");
  return *current;
}

}  // namespace

void schedule(Schedule order, unsigned seed) {
  scheduler.order = order;
  scheduler.random.seed(seed);
}

void launch(dim3 grid, dim3 size, size_t shared, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (!threads || threads > kMostThreads || !blocks || shared > kSharedLimit) {
    throw std::runtime_error("invalid configuration: " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads with " + std::to_string(shared) +
                             " bytes of dynamic shared memory");
  }
  SharedMemory memory(shared);
  block.shared = memory.data();
  prepare(grid, size, body);
  std::vector<unsigned> thread_order = in_order(threads);
  try {
    for (const unsigned i : in_order(blocks)) {
      block.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
      memory.forget();
      begin_block();
      run_block(thread_order);
      end_block();
    }
  } catch (...) {
    for (unsigned i = 0; i < block.threads; ++i) abandon(block.fibers[i]);
    end_block();
    current = nullptr;
    throw;
  }
  current = nullptr;
}

uint64_t switches() { return scheduler.switches; }

dim3 thread_index() { return running().index; }
dim3 block_index() { return block.index; }
dim3 block_size() { return block.size; }
dim3 grid_size() { return block.grid; }
unsigned lane() { return running().linear % 32; }
void* dynamic_shared() { return block.shared; }

void yield() {
  running();
  to_scheduler(false);
}

unsigned block_barrier(bool predicate) {
  Fiber& fiber = running();
  Barrier& barrier = block.barrier;
  const uint64_t generation = barrier.generation;
  const unsigned side = generation % 2;
  barrier.predicates[side] += predicate;
  release(&barrier.tag[side]);
  if (++barrier.arrived == block.alive) {
    open_barrier();
  } else {
    fiber.state = State::at_block_barrier;
    while (barrier.generation == generation) to_scheduler(false);
  }
  acquire(&barrier.tag[side]);
  return barrier.predicates[side];
}

namespace {

// The meeting that a lane arriving with this mask takes part in: one that waits for it, or else one that all
// have left.
Meeting& meeting_of(Warp& warp, unsigned mask) {
  Meeting* empty = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.mask != mask || meeting.complete()) continue;
    if (meeting.arrived) return meeting;
    empty = &meeting;
  }
  if (!empty) {
    empty = &warp.meetings.emplace_back();
    empty->mask = mask;
  }
  return *empty;
}

void wake(unsigned warp, unsigned mask) {
  for (unsigned i = 0; i < 32; ++i) {
    if (has(mask, i)) block.fibers[32 * warp + i].state = State::ready;
  }
}

}  // namespace

void exchange(unsigned mask, const void* own, size_t bytes, void* all) {
  Fiber& fiber = running();
  const unsigned lane = fiber.linear % 32;
  Warp& warp = block.warps[fiber.linear / 32];
  if (!has(mask, lane)) throw std::runtime_error("a lane is not in the mask that it names");
  if (mask & ~warp.alive) throw std::runtime_error("the mask names a lane that has exited or never was");
  Meeting& meeting = meeting_of(warp, mask);
  copy_unseen(meeting.values + lane * bytes, own, bytes);
  release(&meeting.tag);
  meeting.arrived |= 1u << lane;
  if (meeting.complete()) {
    wake(fiber.linear / 32, mask);
  } else {
    fiber.state = State::at_warp_barrier;
    while (!meeting.complete()) to_scheduler(false);
  }
  acquire(&meeting.tag);
  copy_unseen(all, meeting.values, 32 * bytes);
  meeting.left |= 1u << lane;
  if (meeting.left == mask) meeting.arrived = meeting.left = 0;
}

void copy_later(void* target, const void* source, unsigned bytes, unsigned from_source) {
  if (from_source > bytes) throw std::runtime_error("cp.async reads more than it writes");
  const auto misaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (misaligned(target) || misaligned(source)) throw std::runtime_error("cp.async of a misaligned address");
  Fiber& fiber = running();
  Copy& copy = fiber.copies.emplace_back();
  copy.target = target;
  copy.bytes = bytes;
  copy.group = fiber.open_group;
  std::memset(copy.staged, 0, bytes);
  if (from_source) std::memcpy(copy.staged, source, from_source);
  // The bytes may arrive any time from now on: who still reads the old ones shall find none, and the
  // sanitizers see a write here as well as at the wait.
  std::memset(target, 0xff, bytes);
}

void close_copy_group() { ++running().open_group; }

void wait_for_copies(unsigned groups_pending) {
  Fiber& fiber = running();
  const auto arrived = [&](const Copy& copy) { return copy.group + groups_pending < fiber.open_group; };
  const auto pending = std::find_if_not(fiber.copies.begin(), fiber.copies.end(), arrived);
  for (auto copy = fiber.copies.begin(); copy != pending; ++copy) {
    std::memcpy(copy->target, copy->staged, copy->bytes);
  }
  fiber.copies.erase(fiber.copies.begin(), pending);
}

}  // namespace ghl::host
