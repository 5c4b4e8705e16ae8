// Blocks, threads, barriers, shared memory, and what the runtime says of kernels that break their rules.
#include "program.h"

namespace ghl {
namespace {

using program::print;
using program::Register;
using program::run;

struct Ints {
  int* out;
};

// --- geometry -----------------------------------------------------------------------------------

const Register geometry("geometry", [] {
  std::vector<int> seen;
  host::launch({2, 3, 2}, {4, 2, 3}, 0, [&] {
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    if (thread % kWarp != host::lane()) throw std::runtime_error("lane");
    seen.push_back(static_cast<int>(block * blockDim.x * blockDim.y * blockDim.z + thread));
  });
  print("seen", seen);
});

// --- barriers -----------------------------------------------------------------------------------

// Everyone reads, across a barrier, what its neighbour wrote.
__global__ void rotate(const __grid_constant__ Ints params) {
  __shared__ int numbers[96];
  const unsigned thread = threadIdx.x;
  numbers[thread] = static_cast<int>(thread);
  for (int round = 0; round < 5; ++round) {
    __syncthreads();
    const int next = numbers[(thread + 1) % blockDim.x];
    __syncthreads();
    numbers[thread] = next;
  }
  params.out[thread] = numbers[thread];
}

const Register rotation("rotate", [] {
  std::vector<int> out(96);
  run(rotate, {1, 96, 0}, Ints{out.data()});
  print("out", out);
});

// Thread t takes part in t barriers and exits.
__global__ void leave_early(const __grid_constant__ Ints params) {
  for (unsigned round = 0; round < threadIdx.x; ++round) {
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) params.out[0] += 1;
  }
}

const Register exits("exits", [] {
  std::vector<int> out(1);
  run(leave_early, {1, 40, 0}, Ints{out.data()});
  print("out", out);
});

__global__ void count_threads(const __grid_constant__ Ints params) {
  const int thread = static_cast<int>(threadIdx.x);
  int* row = params.out + 4 * thread;
  row[0] = __syncthreads_count(thread % 3 == 0);
  row[1] = __syncthreads_or(thread == 17);
  row[2] = __syncthreads_or(0);
  row[3] = __syncthreads_and(thread < 39) + 2 * __syncthreads_and(thread < 40);
}

const Register counts("barrier_votes", [] {
  std::vector<int> out(160);
  run(count_threads, {1, 40, 0}, Ints{out.data()});
  print("out", out);
});

// Spins until another thread, which may come later, has written.
__global__ void spin(const __grid_constant__ Ints params) {
  if (threadIdx.x == blockDim.x - 1) atomicExch(params.out, 7);
  if (threadIdx.x == 0) {
    while (atomicAdd(params.out, 0) == 0) __nanosleep(20);
  }
}

const Register spinning("spin", [] {
  std::vector<int> out(1);
  run(spin, {1, 64, 0}, Ints{out.data()});
  print("out", out);
});

// --- shared memory ------------------------------------------------------------------------------

struct Floats {
  float* out;
};

__global__ void read_unwritten(const __grid_constant__ Floats params) {
  float* shared = dynamic_shared<float>();
  params.out[blockIdx.x] = shared[threadIdx.x];
  params.out[2 + blockIdx.x] = static_cast<float>(reinterpret_cast<uintptr_t>(shared) % 1024);
  __syncthreads();
  shared[threadIdx.x] = 3.0f;
}

const Register unwritten("unwritten_shared", [] {
  std::vector<float> out(4);
  run(read_unwritten, {2, 32, 128}, Floats{out.data()});
  print("out", out);
});

// Each instance of a kernel has its own.
template <int kTag>
__global__ void own_shared(const __grid_constant__ Ints params) {
  __shared__ int value;
  if (threadIdx.x == 0) value = kTag;
  __syncthreads();
  params.out[threadIdx.x] = value;
  params.out[32] = static_cast<int>(reinterpret_cast<uintptr_t>(&value) & 0x7fffffff);
}

const Register instances("instances", [] {
  std::vector<int> one(33), two(33);
  run(own_shared<1>, {1, 32, 0}, Ints{one.data()});
  run(own_shared<2>, {1, 32, 0}, Ints{two.data()});
  print("one", one);
  print("two", two);
});

// --- atomics ------------------------------------------------------------------------------------

struct Atomics {
  int* ints;
  unsigned long long* wide;
};

__global__ void update(const __grid_constant__ Atomics params) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&params.ints[0], i);
  atomicSub(&params.ints[1], i);
  atomicMax(&params.ints[2], i ^ 5);
  atomicMin(&params.ints[3], -(i ^ 9));
  atomicOr(&params.ints[4], 1 << i % 7);
  atomicAnd(&params.ints[5], ~(1 << i % 5));
  atomicXor(&params.ints[6], i);
  atomicExch(&params.ints[7], 11);
  for (int seen = params.ints[8];;) {
    const int before = atomicCAS(&params.ints[8], seen, seen + 2);
    if (before == seen) break;
    seen = before;
  }
  atomicAdd(params.wide, 1ull << 40);
  atomicMax(params.wide + 1, static_cast<unsigned long long>(i) << 33);
}

const Register atomics("atomics", [] {
  std::vector<int> ints(9);
  ints[5] = 0xff;
  std::vector<unsigned long long> wide(2);
  run(update, {3, 64, 0}, Atomics{ints.data(), wide.data()});
  print("ints", ints);
  print("wide", wide);
});

// --- schedules ----------------------------------------------------------------------------------

__global__ void note_order(const __grid_constant__ Ints params) {
  for (int round = 0; round < 2; ++round) {
    params.out[params.out[0]++ + 1] = static_cast<int>(64 * blockIdx.x + threadIdx.x);
    __syncthreads();
  }
}

const Register order("order", [] {
  std::vector<int> out(1 + 2 * 3 * 64);
  run(note_order, {3, 64, 0}, Ints{out.data()});
  print<int>("out", {out.begin() + 1, out.end()});
});

// --- broken rules -------------------------------------------------------------------------------

enum Rule {
  divergent_barrier,
  divergent_masks,
  foreign_mask,
  exited_lane,
  source_outside,
  bad_width,
  trap,
  fine
};

__global__ void break_rule(const __grid_constant__ Rule rule) {
  const unsigned lane = threadIdx.x;
  if (rule == divergent_barrier && lane < 8) __syncthreads();
  if (rule == divergent_masks) __shfl_sync(lane < 16 ? 0x0000ffffu : kAllLanes, 1, 0);
  if (rule == foreign_mask) __ballot_sync(0x0000ffffu, 1);
  if (rule == exited_lane && lane == 31) return;
  if (rule == exited_lane) __shfl_sync(kAllLanes, 1, 0);
  if (rule == source_outside && lane < 4) __shfl_sync(0xfu, 1, 9);
  if (rule == bad_width) __shfl_sync(kAllLanes, 1, 0, 12);
  if (rule == trap && lane == 5) __trap();
  __syncwarp();
  __syncthreads();
}

template <Rule rule>
void breaks() {
  run(break_rule, {2, 32, 0}, rule);
}

const Register broken[] = {
    {"divergent_barrier", breaks<divergent_barrier>},
    {"divergent_masks", breaks<divergent_masks>},
    {"foreign_mask", breaks<foreign_mask>},
    {"exited_lane", breaks<exited_lane>},
    {"source_outside", breaks<source_outside>},
    {"bad_width", breaks<bad_width>},
    {"trap", breaks<trap>},
    {"partial_warp", [] { run(break_rule, {1, 48, 0}, fine); }},
    {"too_many_threads", [] { run(break_rule, {1, 1056, 0}, fine); }},
    {"too_much_shared", [] { run(break_rule, {1, 32, 164 << 10}, fine); }},
    {"no_blocks", [] { run(break_rule, {0, 32, 0}, fine); }},
    {"too_many_blocks", [] { run(break_rule, {int64_t{1} << 31, 32, 0}, fine); }},
};

// What a failed launch leaves behind must not reach the next.
const Register recovery("recovery", [] {
  const Rule rules[] = {divergent_barrier, divergent_masks, trap, exited_lane};
  for (const Rule rule : rules) {
    if (launch("kernel", break_rule, {1, 32, 0}, Stream{}, rule).ok) throw std::runtime_error("not detected");
    std::vector<int> out(96);
    run(rotate, {1, 96, 0}, Ints{out.data()});
    print("out", out);
  }
});

}  // namespace
}  // namespace ghl
