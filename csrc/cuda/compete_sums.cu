// Sums of the activities over positions: every split of the positions in a block of its own, then the splits.
//
// Lanes lie along what is contiguous. In rows a thread has a unit and goes through the positions; otherwise a
// warp has a unit, its lanes go through the positions, and their sums are added at the end.
#include "cuda/activity.cuh"
#include "cuda/device.cuh"
#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"
#include "ghl/activity_sums.h"

namespace ghl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / static_cast<int>(kWarp);
constexpr int kLeastPositions = 64;  // of a split
constexpr int kBlocks = 2048;        // about as many as fill the largest GPU

struct Plan {
  bool rows;
  int64_t unit_blocks, per_split, splits;
};

Plan plan_of(const ActivitySumsParams& p) {
  Plan plan{p.u_layout.stride_unit == 1, 0, 0, 0};
  plan.unit_blocks = divide_up<int64_t>(p.units, plan.rows ? kThreads : kWarps);
  const int64_t most = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, plan.unit_blocks));
  const int64_t positions = p.batch * p.positions;
  plan.per_split = std::max<int64_t>(kLeastPositions, divide_up(positions, most));
  plan.splits = divide_up(positions, plan.per_split);
  return plan;
}

struct SumsArgs {
  ActivitySumsParams p;
  Plan plan;
  StatePointers state;
  float* partial;  // [splits, units]
};

// The sum of the unit's activities at positions begin, begin + step, ... below end.
template <class T>
__device__ __forceinline__ float sum_of(const SumsArgs& args, int64_t unit, int64_t begin, int64_t end,
                                        int step) {
  const ActivitySumsParams& p = args.p;
  const Competition competition{p.activity, p.selects, p.anti, 1.0f / p.temperature};
  const T* u = static_cast<const T*>(p.u) + unit * p.u_layout.stride_unit;
  int64_t item = begin / p.positions, within = begin % p.positions;
  float total = 0.0f;
  for (int64_t position = begin; position < end; position += step) {
    const float value = to_float(u[item * p.u_layout.stride_batch + within * p.u_layout.stride_position]);
    total += activity_of(value, static_cast<int32_t>(unit), load_state(args.state, position), competition);
    for (within += step; within >= p.positions; within -= p.positions) ++item;
  }
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) partial_sums_kernel(const __grid_constant__ SumsArgs args) {
  const int64_t split = blockIdx.x / args.plan.unit_blocks, block = blockIdx.x % args.plan.unit_blocks;
  const int64_t begin = split * args.plan.per_split;
  const int64_t end = min(begin + args.plan.per_split, args.p.batch * args.p.positions);
  float* partial = args.partial + split * args.p.units;
  if (args.plan.rows) {
    const int64_t unit = block * kThreads + threadIdx.x;
    if (unit < args.p.units) partial[unit] = sum_of<T>(args, unit, begin, end, 1);
  } else {
    const int64_t unit = block * kWarps + threadIdx.x / kWarp;
    if (unit >= args.p.units) return;
    const float sum = warp_sum(sum_of<T>(args, unit, begin + threadIdx.x % kWarp, end, kWarp));
    if (threadIdx.x % kWarp == 0) partial[unit] = sum;
  }
}

// sum[unit] = sum of partial[split, unit]; also of no splits.
__global__ void __launch_bounds__(kThreads) add_splits_kernel(const __grid_constant__ SumsArgs args) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= args.p.units) return;
  float total = 0.0f;
#pragma unroll 4
  for (int64_t split = 0; split < args.plan.splits; ++split)
    total += args.partial[split * args.p.units + unit];
  args.p.sum[unit] = total;
}

std::string describe(const ActivitySumsParams& params) {
  return "sums of activities (" + std::to_string(params.batch) + ", " + std::to_string(params.units) + ", " +
         std::to_string(params.positions) + ")";
}

}  // namespace

int64_t activity_sums_cuda_workspace(const ActivitySumsParams& params) {
  return plan_of(params).splits * params.units * static_cast<int64_t>(sizeof(float));
}

Status activity_sums_cuda(const ActivitySumsParams& params, Stream stream) {
  if (params.units == 0) return {};
  const SumsArgs args{params,
                      plan_of(params),
                      {params.threshold, params.cut, params.logsumexp, params.first},
                      static_cast<float*>(params.workspace)};
  const Grid grid{args.plan.splits * args.plan.unit_blocks, kThreads, 0};
  Status status;
  if (grid.blocks > 0) {
    status = by_dtype(params.u_dtype,
                      [&]<class T>(T*) { return launch("", partial_sums_kernel<T>, grid, stream, args); });
  }
  if (status.ok) {
    const Grid one_each{divide_up<int64_t>(params.units, kThreads), kThreads, 0};
    status = launch("", add_splits_kernel, one_each, stream, args);
  }
  if (!status.ok) status.message = describe(params) + status.message;
  return status;
}

}  // namespace ghl
