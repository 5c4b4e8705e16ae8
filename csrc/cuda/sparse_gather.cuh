// Every unit adds up the patches that it won. Its entries are cut into segments of fixed length, so that a
// unit that wins everywhere is the work of many blocks; what these leave in the workspace is added in their
// order.
#pragma once

#include "cuda/dtype.cuh"
#include "cuda/patch.cuh"
#include "cuda/select.cuh"
#include "cuda/sparse_sort.cuh"
#include "cuda/sum_rows.cuh"
#include "ghl/epilogue.h"

namespace ghl {
namespace {

struct GatherParams {
  PatchGrid grid;
  const void* x;
  int64_t x_stride_channel;
  int64_t channels;  // of a group
  int64_t taps;
  bool channels_first;  // a patch is [channel, tap], else [tap, channel]: what is contiguous in x comes last

  const Win* sorted;
  const int64_t* start;
  const int64_t* segment_start;
  const int64_t* several;  // how many units have several segments, then these
  int64_t entries;
  int64_t units;
  int64_t units_per_group;
  int64_t segment_length;

  int width;  // threads along a patch, a power of two; the others take other entries of the segment
  int64_t column_blocks;
  float* a;
  Filters a_layout;
  float* activity_sum;
  float* partial;  // [rows, columns + 1], the last column for the sum of the activities
};

constexpr int kGatherThreads = 128;
constexpr int kLoads = 4;  // of x that a thread has under way
using Combine = RowSum<8, 4>;

struct Segments {
  int64_t first;  // entry of the unit
  int64_t end;
  int64_t count;
};

__device__ __forceinline__ Segments segments_of(const GatherParams& params, int64_t unit) {
  return {params.start[unit], params.start[unit + 1],
          params.segment_start[unit + 1] - params.segment_start[unit]};
}

// Row of the workspace for a segment of a unit that has several. All but a unit's last segment are whole, so
// that over all units their first entries lie at least a segment's length apart; so do those of the last
// segments, as a whole one lies between two. Hence two rows for every length of entries, and no table.
__device__ __forceinline__ float* partial_row(const GatherParams& params, const Segments& segments,
                                              int64_t segment) {
  const int64_t slot = segments.first / params.segment_length + segment;
  const int64_t row = 2 * slot + (segment == segments.count - 1);
  return params.partial + row * (params.channels * params.taps + 1);
}

// The unit of a segment, found by a warp: every step cuts the range into 32.
__device__ __forceinline__ int64_t unit_of_segment(const GatherParams& params, int64_t segment) {
  const unsigned lane = threadIdx.x % kWarp;
  int64_t low = 0, high = params.units;  // start[low] <= segment < start[high]
  while (high - low > 1) {
    const int64_t step = divide_up<int64_t>(high - low, kWarp);
    const int64_t probe = low + (lane + 1) * step;
    const bool before = probe < high && params.segment_start[probe] <= segment;
    const int64_t steps = __popc(__ballot_sync(kAllLanes, before));
    low += steps * step;
    high = min(high, low + step);
  }
  return low;
}

struct Column {
  int64_t channel;
  int64_t tap;
};

__device__ __forceinline__ Column split_column(const GatherParams& params, int64_t column) {
  const int64_t inner = params.channels_first ? params.taps : params.channels;
  const int64_t outer = divide(column, inner);
  const int64_t rest = column - outer * inner;
  return params.channels_first ? Column{outer, rest} : Column{rest, outer};
}

// Of a column of the sum: a position without a unit makes all of them NaN, as in the dense product.
__device__ __forceinline__ void store_sum(const GatherParams& params, int64_t unit, int64_t column,
                                          float sum) {
  if (params.start[params.units] != params.entries) sum = __int_as_float(0x7fffffff);
  if (column == params.channels * params.taps) {
    if (params.activity_sum) params.activity_sum[unit] = sum;
    return;
  }
  const Column at = split_column(params, column);
  params.a[unit * params.a_layout.stride_unit + at.channel * params.a_layout.stride_channel +
           at.tap * params.a_layout.stride_tap] = sum;
}

struct alignas(16) Source {
  Patch patch;  // its offset in bytes
  float activity;
};

template <class T>
__device__ __forceinline__ Source source_of(const GatherParams& params, const Win& win) {
  int32_t out[3];
  const int64_t item = split_position(params.grid, win.position, out);
  Source source{patch_at(params.grid, item, out), win.activity};
  source.patch.offset *= static_cast<int64_t>(sizeof(T));
  return source;
}

// Every tap of it is outside of x.
__device__ __forceinline__ Source no_source() { return {{0, {INT_MIN, INT_MIN, INT_MIN}}, 0.0f}; }

// What one load brings, 0 where none is made.
template <class T, int kVector>
struct Load {
  static_assert(kVector == Vector<T>::size);
  uint4 bits{};

  __device__ __forceinline__ void from(const char* address) {
    bits = __ldg(reinterpret_cast<const uint4*>(address));
  }
  __device__ __forceinline__ void add_to(float (&sum)[kVector], float factor) const {
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        sum[i] += factor * __uint_as_float(word[i]);
      } else {
        sum[2 * i] += factor * Pair<T>::low(word[i]);
        sum[2 * i + 1] += factor * Pair<T>::high(word[i]);
      }
    }
  }
};

template <class T>
struct Load<T, 1> {
  T element{};

  __device__ __forceinline__ void from(const char* address) {
    element = *reinterpret_cast<const T*>(address);
  }
  __device__ __forceinline__ void add_to(float (&sum)[1], float factor) const {
    sum[0] += factor * to_float(element);
  }
};

// Of the sources from `first` on, `ways` apart, up to the last one that exists and some of those that do not:
// without a branch before a load, so that all are under way before the first is used.
template <class T, int kVector>
__device__ __forceinline__ void add_patches(const GatherParams& params, const char* x, const Tap& tap,
                                            const Source* sources, int count, int first, int ways,
                                            float (&sum)[kVector]) {
  static_assert(kGatherThreads % kLoads == 0);
#pragma unroll 1
  for (int i = first; i < count; i += kLoads * ways) {
    Load<T, kVector> loads[kLoads];
    float activity[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const Source source = sources[i + j * ways];
      activity[j] = source.activity;
      if (is_inside(params.grid, source.patch, tap)) loads[j].from(x + source.patch.offset);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) loads[j].add_to(sum, activity[j]);
  }
}

// Adds what the ways have and writes it: to A where the unit has no other segment, else to the workspace.
template <int kVector>
__device__ __forceinline__ void store_segment(const GatherParams& params, int64_t unit,
                                              const Segments& segments, int64_t segment, int64_t block,
                                              const float (&sum)[kVector], float activity_sum) {
  __shared__ float shared[kGatherThreads * kVector];
  __shared__ float of_warp[kGatherThreads / kWarp];
  const int columns = params.width * kVector;
  const int64_t all = params.channels * params.taps;
#pragma unroll
  for (int v = 0; v < kVector; ++v) shared[threadIdx.x * kVector + v] = sum[v];
  activity_sum = warp_sum(activity_sum);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = activity_sum;
  __syncthreads();
  const auto store = [&](int64_t column, float value) {
    if (segments.count == 1) {
      store_sum(params, unit, column, value);
    } else {
      partial_row(params, segments, segment)[column] = value;
    }
  };
  for (int i = threadIdx.x; i < columns && block * columns + i < all; i += kGatherThreads) {
    float total = 0.0f;
    for (int way = i; way < kGatherThreads * kVector; way += columns) total += shared[way];
    store(block * columns + i, total);
  }
  if (block == 0 && threadIdx.x == 0) {
    float total = 0.0f;
    for (const float part : of_warp) total += part;
    store(all, total);
  }
}

// One segment and one block of a patch's columns.
template <class T, int kVector>
__global__ void __launch_bounds__(kGatherThreads, 8)
    gather_kernel(const __grid_constant__ GatherParams params) {
  __shared__ Source sources[kGatherThreads];
  const int64_t index = blockIdx.x / params.column_blocks;
  const int64_t block = blockIdx.x % params.column_blocks;
  if (index >= params.segment_start[params.units]) return;
  const int64_t unit = unit_of_segment(params, index);
  const Segments segments = segments_of(params, unit);
  const int64_t segment = index - params.segment_start[unit];
  const int64_t begin = segments.first + segment * params.segment_length;
  const int64_t end = min(begin + params.segment_length, segments.end);

  const int thread = static_cast<int>(threadIdx.x);
  const int way = thread / params.width;
  const int64_t column = (block * params.width + thread % params.width) * kVector;
  const bool in_columns = column < params.channels * params.taps;
  const Column at = in_columns ? split_column(params, column) : Column{0, 0};
  const Tap tap = tap_at(params.grid, at.tap);
  const int64_t channel = unit / params.units_per_group * params.channels + at.channel;
  const T* from = static_cast<const T*>(params.x) + channel * params.x_stride_channel + tap.offset;
  const char* x = reinterpret_cast<const char*>(from);

  float sum[kVector] = {};
  float activity_sum = 0.0f;
  for (int64_t first = begin; first < end; first += kGatherThreads) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kGatherThreads), end - first));
    const Source source = thread < count ? source_of<T>(params, params.sorted[first + thread]) : no_source();
    sources[thread] = source;
    activity_sum += source.activity;
    __syncthreads();
    if (in_columns) {
      add_patches<T, kVector>(params, x, tap, sources, count, way, kGatherThreads / params.width, sum);
    }
    __syncthreads();
  }
  store_segment<kVector>(params, unit, segments, segment, block, sum, activity_sum);
}

// The segments of units that have several: a unit and a block of columns at a time, for most units may have
// one segment.
__global__ void __launch_bounds__(Combine::threads)
    combine_kernel(const __grid_constant__ GatherParams params) {
  const int64_t columns = params.channels * params.taps + 1;
  const int64_t blocks = divide_up<int64_t>(columns, Combine::columns);
  const int64_t end = params.several[0] * blocks;
  for (int64_t i = blockIdx.x; i < end; i += gridDim.x) {
    const int64_t rank = divide(i, blocks), block = i - rank * blocks;
    const int64_t unit = params.several[1 + rank];
    const Segments segments = segments_of(params, unit);
    Combine::run(
        segments.count, block * Combine::columns, columns,
        [&](int64_t segment) -> const float* { return partial_row(params, segments, segment); },
        [&](int64_t column, float sum) { store_sum(params, unit, column, sum); });
    // what was added is read before the next sums replace it
    __syncthreads();
  }
}

}  // namespace
}  // namespace ghl
