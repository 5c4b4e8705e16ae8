// A and G of a depthwise convolution, bound by memory: u, dL/du and x are read once, and every tap has an
// accumulator in registers. A block takes a slice of the positions; the slices are added in a fixed order.
#include <algorithm>

#include "cuda/activity.cuh"
#include "cuda/depthwise_walk.cuh"
#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"
#include "cuda/patch.cuh"
#include "cuda/sum_rows.cuh"
#include "ghl/depthwise.h"

namespace ghl {
namespace {

constexpr int kThreads = 128;
constexpr int kTaps = 9;                     // of a block; a larger kernel is the work of several
constexpr int kVector = 4;                   // units of a thread, where they are contiguous
constexpr int64_t kLeastSteps = 16;          // of a thread, which outweigh the reduction at its end
constexpr int64_t kPartialBytes = 32 << 20;  // which is read back while it is in L2
using SliceSum = RowSum<16, 1>;

// Of a multiprocessor: 168 registers a thread hold both results of kVector units, 128 those of one.
constexpr int resident_blocks(int size) { return size == 1 ? 4 : 3; }

// How a block is cut: `width` threads take neighboring units, the others other positions.
struct Plan {
  bool vectors;
  int results;
  int width;
  int64_t positions;
  int64_t taps;
  int64_t unit_blocks;
  int64_t tap_blocks;
  int64_t taps_of_block;
  int64_t slices;
  int64_t slice_length;
};

struct DepthwiseParams {
  PatchGrid grid;
  PatchStep step;
  int32_t last_corner[3];  // of a patch that lies inside x; negative where none does
  const void* x;
  int64_t x_stride_channel;
  int64_t units_per_channel;

  int first;                 // of the responses that are read: 1 where dL/du alone is
  const void* responses[2];  // u, dL/du
  int64_t stride_unit[2];
  RowStep row_step[2];
  Competition competition;
  StatePointers state;

  Plan plan;
  int64_t units;
  float* partial;  // [slices, results, taps, units]
  float* result[2];
  Filters result_layout;
};

template <class T, int size>
struct alignas(size * sizeof(T)) Elements {
  T element[size];
};

template <class T, int size>
__device__ __forceinline__ Elements<T, size> load(const T* address) {
  return *reinterpret_cast<const Elements<T, size>*>(address);
}

// Which part of the sums a block computes.
struct Share {
  int64_t tap;
  int64_t unit_block;
  int64_t slice;
};

// Blocks of the same units and positions are neighbors: they read the same u and dL/du.
__device__ __forceinline__ Share share_of_block(const Plan& plan) {
  const int64_t rest = blockIdx.x / plan.tap_blocks;
  return {(blockIdx.x % plan.tap_blocks) * plan.taps_of_block, rest % plan.unit_blocks,
          rest / plan.unit_blocks};
}

// x under the taps of a block. A slot without a tap repeats the last one: its sum is not used.
template <class T, int size>
__device__ __forceinline__ void load_taps(const DepthwiseParams& params, const T* x, const Patch& patch,
                                          const Tap (&taps)[kTaps], Elements<T, size> (&loaded)[kTaps]) {
  bool interior = true;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    interior &= patch.corner[i] >= 0 && patch.corner[i] <= params.last_corner[i];
  }
  if (interior) {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) loaded[i] = load<T, size>(x + patch.offset + taps[i].offset);
  } else {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      loaded[i] = {};
      if (is_inside(params.grid, patch, taps[i]))
        loaded[i] = load<T, size>(x + patch.offset + taps[i].offset);
    }
  }
}

// y or dL/du of one position for the units of a thread.
template <class T, int size>
__device__ __forceinline__ void factors_at(const DepthwiseParams& params, bool is_grad, int64_t offset,
                                           int64_t position, int64_t unit, float (&factor)[size]) {
  const T* from =
      static_cast<const T*>(params.responses[is_grad]) + offset + unit * params.stride_unit[is_grad];
  const Elements<T, size> loaded = load<T, size>(from);
#pragma unroll
  for (int v = 0; v < size; ++v) factor[v] = to_float(loaded.element[v]);
  if (is_grad) return;
  const PositionState at = load_state(params.state, position);
#pragma unroll
  for (int v = 0; v < size; ++v) {
    factor[v] = activity_of(factor[v], static_cast<int32_t>(unit) + v, at, params.competition);
  }
}

// Adds the sums of all threads of a block that share units, and writes them to the slice's part.
template <int size>
__device__ __forceinline__ void store_part(const DepthwiseParams& params, const Share& share, int result,
                                           int tap, float (&sum)[size]) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ float shared[kWarps][kWarp * size];
  const Plan& plan = params.plan;
  if (tap >= plan.taps_of_block || share.tap + tap >= plan.taps) return;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int v = 0; v < size; ++v) {
    for (int distance = kWarp / 2; distance >= plan.width; distance /= 2) {
      sum[v] += __shfl_xor_sync(kAllLanes, sum[v], distance);
    }
    if (lane < plan.width) shared[threadIdx.x / kWarp][lane * size + v] = sum[v];
  }
  __syncthreads();
  const int column = threadIdx.x;
  const int64_t unit = share.unit_block * plan.width * size + column;
  if (column < plan.width * size && unit < params.units) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += shared[i][column];
    const int64_t row = (share.slice * plan.results + result) * plan.taps + share.tap + tap;
    params.partial[row * params.units + unit] = total;
  }
  // before shared is written again
  __syncthreads();
}

template <class T, int size, int results>
__global__ void __launch_bounds__(kThreads, resident_blocks(size))
    depthwise_kernel(const __grid_constant__ DepthwiseParams params) {
  __shared__ Tap taps[kTaps];
  const Plan& plan = params.plan;
  const Share share = share_of_block(plan);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kTaps) {
    taps[thread] =
        tap_at(params.grid,
               min(share.tap + min(static_cast<int64_t>(thread), plan.taps_of_block - 1), plan.taps - 1));
  }
  __syncthreads();
  const int64_t unit = (share.unit_block * plan.width + thread % plan.width) * size;
  const int64_t begin = share.slice * plan.slice_length;
  const int64_t end = unit < params.units ? min(begin + plan.slice_length, plan.positions) : begin;

  const int first = results == 2 ? 0 : params.first;

  float sum[results][kTaps][size] = {};
  int64_t position = begin + thread / plan.width;
  if (position < end) {
    const T* x = static_cast<const T*>(params.x) + unit / params.units_per_channel * params.x_stride_channel;
    PatchWalk walk = patch_walk(params.grid, position);
    RowWalk rows[results];
#pragma unroll
    for (int r = 0; r < results; ++r) rows[r] = row_walk(params.row_step[first + r], position);
    for (; position < end; position += kThreads / plan.width) {
      Elements<T, size> loaded[kTaps];
      float factor[results][size];
#pragma unroll
      for (int r = 0; r < results; ++r) {
        factors_at<T, size>(params, first + r, rows[r].offset, position, unit, factor[r]);
        advance(rows[r], params.row_step[first + r]);
      }
      load_taps<T, size>(params, x, patch_at(params.grid, walk.item, walk.out), taps, loaded);
      advance(walk, params.step, params.grid);
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
#pragma unroll
        for (int v = 0; v < size; ++v) {
          const float x_tap = to_float(loaded[i].element[v]);
#pragma unroll
          for (int r = 0; r < results; ++r) sum[r][i][v] += factor[r][v] * x_tap;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < results; ++r) {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) store_part<size>(params, share, r, i, sum[r][i]);
  }
}

__global__ void __launch_bounds__(SliceSum::threads)
    sum_slices_kernel(const __grid_constant__ DepthwiseParams params) {
  const int64_t taps = params.plan.taps;
  const int64_t columns = params.plan.results * taps * params.units;
  const auto store = [&](int64_t column, float sum) {
    const int64_t row = divide(column, params.units);
    const int64_t result = divide(row, taps);
    params.result[result][(column - row * params.units) * params.result_layout.stride_unit +
                          (row - result * taps) * params.result_layout.stride_tap] = sum;
  };
  SliceSum::run(
      params.plan.slices, static_cast<int64_t>(blockIdx.x) * SliceSum::columns, columns,
      [&](int64_t slice) { return params.partial + slice * columns; }, store);
}

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

bool is_aligned(const Responses& rows, int64_t itemsize) {
  return rows.stride_unit == 1 && rows.stride_batch % kVector == 0 && rows.stride_position % kVector == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % (kVector * itemsize) == 0;
}

// Whether a thread can read kVector neighboring units, and their channels, at a time.
bool takes_vectors(const PairParams& params) {
  const int64_t itemsize = bytes_of(params.dtype);
  return params.units == params.geometry.channels && params.units % kVector == 0 &&
         params.x_stride_channel == 1 && reinterpret_cast<uintptr_t>(params.x) % (kVector * itemsize) == 0 &&
         has_steps_of(kVector, params.geometry, params.x_stride_batch, params.x_stride) &&
         (!params.a || is_aligned(params.u, itemsize)) && (!params.g || is_aligned(params.grad, itemsize));
}

// Threads along the units, a power of two. Where the units are not contiguous the positions are: all threads
// of a block then take neighboring positions of one unit.
int width_of(const PairParams& params, bool vectors) {
  const Responses& rows = params.a ? params.u : params.grad;
  if (!vectors && rows.stride_unit != 1) return 1;
  const int64_t threads = vectors ? params.units / kVector : params.units;
  int width = 1;
  while (width < static_cast<int>(kWarp) && width < threads) width *= 2;
  return width;
}

Status make_plan(const PairParams& params, int device, Plan& plan) {
  DeviceInfo info;
  const Status status = device_info(device, info);
  if (!status.ok) return status;
  plan.vectors = takes_vectors(params);
  plan.results = (params.a != nullptr) + (params.g != nullptr);
  plan.width = width_of(params, plan.vectors);
  plan.positions = params.geometry.positions();
  plan.taps = params.geometry.taps();
  plan.unit_blocks = divide_up<int64_t>(params.units, plan.width * (plan.vectors ? kVector : 1));
  plan.tap_blocks = divide_up<int64_t>(plan.taps, kTaps);
  plan.taps_of_block = divide_up(plan.taps, plan.tap_blocks);

  const int64_t at_once = kThreads / plan.width;
  const int64_t resident = resident_blocks(plan.vectors ? kVector : 1) * info.multiprocessors;
  const int64_t wanted = resident / (plan.unit_blocks * plan.tap_blocks);
  // as for both results, so that one alone is summed in the same order
  const int64_t room = kPartialBytes / (2 * 4 * plan.taps * params.units);
  const int64_t worthwhile = plan.positions / (kLeastSteps * at_once);
  const int64_t slices = std::max<int64_t>(1, std::min({wanted, room, worthwhile}));
  plan.slice_length =
      std::max<int64_t>(1, divide_up<int64_t>(divide_up(plan.positions, slices), at_once)) * at_once;
  plan.slices = std::max<int64_t>(1, divide_up(plan.positions, plan.slice_length));
  return {};
}

bool is_empty(const PairParams& params) {
  return params.units == 0 || params.geometry.taps() == 0 || !(params.a || params.g);
}

std::string describe(const PairParams& params) {
  return "depthwise correlation of " + std::to_string(params.units) + " units over " +
         std::to_string(params.geometry.taps()) + " taps at " + std::to_string(params.geometry.positions()) +
         " positions";
}

Status kernel_params(const PairParams& params, const std::string& what, DepthwiseParams& kernel) {
  const ConvGeometry& geometry = params.geometry;
  const Status status = patch_grid(what, geometry, params.x_stride_batch, params.x_stride, kernel.grid);
  if (!status.ok) return status;
  const int64_t step = kThreads / kernel.plan.width;
  kernel.step = patch_step(geometry, step);
  for (int i = 0; i < 3; ++i) {
    const int64_t last = geometry.in_size[i] - 1 - (geometry.kernel[i] - 1) * geometry.dilation[i];
    kernel.last_corner[i] = static_cast<int32_t>(std::max<int64_t>(last, -1));
  }
  kernel.x = params.x;
  kernel.x_stride_channel = params.x_stride_channel;
  kernel.units_per_channel = params.units / geometry.channels;
  const Responses* responses[2] = {&params.u, &params.grad};
  for (int i = 0; i < 2; ++i) {
    kernel.responses[i] = responses[i]->data;
    kernel.stride_unit[i] = responses[i]->stride_unit;
    kernel.row_step[i] = row_step(*responses[i], step);
  }
  kernel.competition = {params.activity, params.selects, params.anti, 1.0f / params.temperature};
  kernel.state = {params.threshold, params.cut, params.logsumexp, params.first};
  kernel.units = params.units;
  kernel.partial = static_cast<float*>(params.workspace);
  kernel.first = params.a ? 0 : 1;
  kernel.result[0] = params.a ? params.a : params.g;
  kernel.result[1] = params.g;
  kernel.result_layout = params.result_layout;
  return {};
}

template <class T, int size>
Status run(const std::string& what, const DepthwiseParams& params, Stream stream) {
  const Plan& plan = params.plan;
  const int64_t blocks = plan.tap_blocks * plan.unit_blocks * plan.slices;
  const auto kernel = plan.results == 2 ? depthwise_kernel<T, size, 2> : depthwise_kernel<T, size, 1>;
  const Status status = launch(what, kernel, {blocks, kThreads}, stream, params);
  if (!status.ok) return status;
  const int64_t columns = plan.results * plan.taps * params.units;
  return launch(what, sum_slices_kernel, {divide_up<int64_t>(columns, SliceSum::columns), SliceSum::threads},
                stream, params);
}

}  // namespace

int64_t depthwise_cuda_workspace(const PairParams& params, int device) {
  Plan plan{};
  if (is_empty(params) || !make_plan(params, device, plan).ok) return 0;
  return plan.slices * plan.results * plan.taps * params.units * static_cast<int64_t>(sizeof(float));
}

Status depthwise_cuda(const PairParams& params, Stream stream) {
  if (is_empty(params)) return {};
  const std::string what = describe(params);
  if (params.geometry.positions() > 0 && lacks_state(params))
    return Status::failure(what + ": the state that its activity needs is missing");
  if (params.winners > 0) return Status::failure(what + ": it takes no lists of winners");
  if (!params.workspace) return Status::failure(what + ": no workspace");
  DepthwiseParams kernel{};
  Status status = make_plan(params, stream.device, kernel.plan);
  if (status.ok) status = kernel_params(params, what, kernel);
  if (!status.ok) return status;
  return by_dtype(params.dtype, [&]<class T>(T*) {
    return kernel.plan.vectors ? run<T, kVector>(what, kernel, stream) : run<T, 1>(what, kernel, stream);
  });
}

}  // namespace ghl
