// Correct kernels, and each with one bug planted that a check must report.
#include <numeric>

#include "program.h"

namespace ghl {
namespace {

using program::print;
using program::Register;
using program::run;

constexpr int kThreads = 64;

enum Bug {
  none,
  missing_barrier,    // readers do not wait for the writers
  missing_wait,       // cp.async is never waited for
  late_wait,          // cp.async is waited for after the barrier that should make its bytes seen
  missing_reuse,      // a buffer is filled again while it may still be read
  load_past_end,      // of global memory, by one
  copy_past_end,      // of global memory, by one, by cp.async
  store_past_static,  // of static shared memory, by one
  store_past_dynamic  // of dynamic shared memory, by one
};

struct Sum {
  const float* numbers;  // [blocks, 64]
  float* sums;           // [blocks]
};

// The sum of 64 numbers by halving, in static shared memory.
template <Bug bug>
__global__ void reduce(const __grid_constant__ Sum params) {
  __shared__ float partial[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const float* numbers = params.numbers + kThreads * static_cast<int64_t>(blockIdx.x);
  const int from = bug == load_past_end ? thread + 1 : thread;
  const int to = bug == store_past_static ? thread + 1 : thread;
  partial[to] = numbers[from];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (bug != missing_barrier) __syncthreads();
    if (thread < half) partial[thread] += partial[thread + half];
  }
  if (thread == 0) params.sums[blockIdx.x] = partial[0];
}

// The same through dynamic shared memory, one copied float a thread, by the first thread at the end.
template <Bug bug>
__global__ void stage(const __grid_constant__ Sum params) {
  float* staged = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x);
  const float* numbers = params.numbers + kThreads * static_cast<int64_t>(blockIdx.x);
  ptx::cp_async_ca_4(staged + thread, numbers + (bug == copy_past_end ? thread + 1 : thread), 4);
  ptx::cp_async_commit_group();
  if (bug != missing_wait && bug != late_wait) ptx::cp_async_wait_group<0>();
  if (bug == store_past_dynamic) staged[thread + 1] = 0.0f;
  __syncthreads();
  if (bug == late_wait) ptx::cp_async_wait_group<0>();
  if (thread != 0) return;
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += staged[i];
  params.sums[blockIdx.x] = sum;
}

constexpr int kRows = 4;

// One block sums all rows, with one row in shared memory and the next on its way.
template <Bug bug>
__global__ void pipeline(const __grid_constant__ Sum params) {
  float* staged = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int row) {
    if (row < kRows)
      ptx::cp_async_ca_4(staged + kThreads * (row % 2) + thread, params.numbers + kThreads * row + thread, 4);
    ptx::cp_async_commit_group();
  };
  float sum = 0;
  fetch(0);
  for (int row = 0; row < kRows; ++row) {
    fetch(row + 1);
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    sum += staged[kThreads * (row % 2) + (thread + 1) % kThreads];
    if (bug != missing_reuse) __syncthreads();
  }
  sum = warp_sum(sum);
  if (thread % kWarp == 0) staged[thread] = sum;
  __syncthreads();
  if (thread == 0) params.sums[0] = staged[0] + staged[kWarp];
}

template <auto kernel, int kBlocks, size_t shared>
void sum_rows() {
  // on the heap, so that AddressSanitizer knows where the last row ends
  std::vector<float> numbers(kRows * kThreads), sums(kBlocks);
  std::iota(numbers.begin(), numbers.end(), 0.0f);
  run(kernel, {kBlocks, kThreads, shared}, Sum{numbers.data(), sums.data()});
  print("sums", sums);
}

constexpr size_t kRowBytes = kThreads * sizeof(float);

const Register kernels[] = {
    {"reduce", sum_rows<reduce<none>, kRows, 0>},
    {"reduce_missing_barrier", sum_rows<reduce<missing_barrier>, kRows, 0>},
    {"reduce_load_past_end", sum_rows<reduce<load_past_end>, kRows, 0>},
    {"reduce_store_past_static", sum_rows<reduce<store_past_static>, kRows, 0>},
    {"stage", sum_rows<stage<none>, kRows, kRowBytes>},
    {"stage_missing_wait", sum_rows<stage<missing_wait>, kRows, kRowBytes>},
    {"stage_late_wait", sum_rows<stage<late_wait>, kRows, kRowBytes>},
    {"stage_copy_past_end", sum_rows<stage<copy_past_end>, kRows, kRowBytes>},
    {"stage_store_past_dynamic", sum_rows<stage<store_past_dynamic>, kRows, kRowBytes>},
    {"pipeline", sum_rows<pipeline<none>, 1, 2 * kRowBytes>},
    {"pipeline_missing_reuse", sum_rows<pipeline<missing_reuse>, 1, 2 * kRowBytes>},
};

}  // namespace
}  // namespace ghl
