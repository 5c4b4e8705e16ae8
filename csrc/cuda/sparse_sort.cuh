// The winners' lists, which come by position, sorted by unit: a stable counting sort.
//
// The entries are cut into slices. Every slice counts its entries of each bin; the counts are summed first
// over the slices of a bin, then over the bins; and every slice writes its entries, in order, where those
// sums say. A bin is a unit, and one more takes the entries whose unit does not exist.
#pragma once

#include "cuda/device.cuh"
#include "cuda/patch.cuh"

namespace ghl {
namespace {

struct Win {
  int64_t position;
  float activity;
};

struct SortParams {
  const int32_t* unit;    // [entries]
  const float* activity;  // [entries]
  int64_t entries;
  int64_t winners;  // of a position
  int64_t units;
  int64_t slices;
  int64_t slice_length;    // entries
  int64_t segment_length;  // entries

  int64_t* count;          // [slices, units + 1], then how many of the bin lie in earlier slices
  int64_t* start;          // [units + 1] where a bin begins
  int64_t* segment_start;  // [units + 1] segments of the units before; each unit has one at least
  int64_t* several;        // [units + 1] how many units have several segments, then these
  Win* sorted;             // [entries]
};

// Bins that a block holds in shared memory; with more units every slice is read several times.
constexpr int64_t kBins = 4096;
constexpr int kCountThreads = 128;
constexpr int kScanThreads = 512;

struct Share {
  int64_t slice;
  int64_t begin, end;  // entries
  int64_t first_bin;
  int bins;
};

__device__ __forceinline__ Share share_of_block(const SortParams& params) {
  const int64_t chunks = divide_up(params.units + 1, kBins);
  const int64_t slice = blockIdx.x / chunks;
  const int64_t first_bin = blockIdx.x % chunks * kBins;
  const int64_t begin = slice * params.slice_length;
  const int64_t end = min(begin + params.slice_length, params.entries);
  return {slice, begin, end, first_bin, static_cast<int>(min(kBins, params.units + 1 - first_bin))};
}

// Of an entry's bin among those of the block; outside [0, bins) it is another block's.
__device__ __forceinline__ int64_t local_bin(const SortParams& params, const Share& share, int64_t entry) {
  const int64_t unit = params.unit[entry];
  return (unit >= 0 && unit < params.units ? unit : params.units) - share.first_bin;
}

__global__ void __launch_bounds__(kCountThreads) count_kernel(const __grid_constant__ SortParams params) {
  auto* count = dynamic_shared<uint32_t>();
  const Share share = share_of_block(params);
  for (int bin = threadIdx.x; bin < share.bins; bin += kCountThreads) count[bin] = 0;
  __syncthreads();
#pragma unroll 4
  for (int64_t entry = share.begin + threadIdx.x; entry < share.end; entry += kCountThreads) {
    const int64_t bin = local_bin(params, share, entry);
    if (bin >= 0 && bin < share.bins) atomicAdd(count + bin, 1u);
  }
  __syncthreads();
  int64_t* row = params.count + share.slice * (params.units + 1) + share.first_bin;
  for (int bin = threadIdx.x; bin < share.bins; bin += kCountThreads) row[bin] = count[bin];
}

// Lanes are bins and warps are runs of slices.
__global__ void __launch_bounds__(kScanThreads)
    scan_slices_kernel(const __grid_constant__ SortParams params) {
  constexpr int kWarps = kScanThreads / kWarp;
  __shared__ int64_t total_of[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t bins = params.units + 1;
  const int64_t bin = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t run = divide_up<int64_t>(params.slices, kWarps);
  const int64_t begin = min(warp * run, params.slices);
  const int64_t end = bin < bins ? min(begin + run, params.slices) : begin;

  int64_t total = 0;
#pragma unroll 8
  for (int64_t slice = begin; slice < end; ++slice) total += params.count[slice * bins + bin];
  total_of[warp][lane] = total;
  __syncthreads();
  int64_t before = 0;
  for (int i = 0; i < warp; ++i) before += total_of[i][lane];
#pragma unroll 8
  for (int64_t slice = begin; slice < end; ++slice) {
    int64_t& count = params.count[slice * bins + bin];
    const int64_t here = count;
    count = before;
    before += here;
  }
  if (warp == kWarps - 1 && bin < bins) params.start[bin] = before;
}

struct Prefix {
  int64_t entries;
  int64_t segments;
  int64_t several;  // units that have several segments
};

__device__ __forceinline__ Prefix operator+(const Prefix& a, const Prefix& b) {
  return {a.entries + b.entries, a.segments + b.segments, a.several + b.several};
}

__device__ __forceinline__ Prefix inclusive_scan_of_warp(Prefix value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = 1; distance < static_cast<int>(kWarp); distance *= 2) {
    const Prefix other{__shfl_up_sync(kAllLanes, value.entries, distance),
                       __shfl_up_sync(kAllLanes, value.segments, distance),
                       __shfl_up_sync(kAllLanes, value.several, distance)};
    if (lane >= distance) value = value + other;
  }
  return value;
}

// One block: params.start holds the entries of each bin and becomes their exclusive sum.
__global__ void __launch_bounds__(kScanThreads) scan_bins_kernel(const __grid_constant__ SortParams params) {
  constexpr int kWarps = kScanThreads / kWarp;
  __shared__ Prefix of_warp[kWarps];
  const int warp = threadIdx.x / kWarp;
  Prefix before{0, 0, 0};
  for (int64_t first = 0; first <= params.units; first += kScanThreads) {
    const int64_t bin = first + threadIdx.x;
    const int64_t entries = bin <= params.units ? params.start[bin] : 0;
    const int64_t segments = max(divide_up(entries, params.segment_length), int64_t{1});
    const bool several = bin < params.units && segments > 1;
    const Prefix own{entries, segments, several};
    const Prefix inclusive = inclusive_scan_of_warp(own);
    if (threadIdx.x % kWarp == kWarp - 1) of_warp[warp] = inclusive;
    __syncthreads();
    Prefix sum = before;
    for (int i = 0; i < kWarps; ++i) {
      if (i == warp) sum = sum + inclusive;
      if (i < warp) sum = sum + of_warp[i];
      before = before + of_warp[i];
    }
    if (bin <= params.units) {
      params.start[bin] = sum.entries - own.entries;
      params.segment_start[bin] = sum.segments - own.segments;
    }
    if (several) params.several[sum.several] = bin;
    // before of_warp is written again
    __syncthreads();
  }
  if (threadIdx.x == 0) params.several[0] = before.several;
}

// Turns of place_kernel whose entries are loaded at once.
constexpr int kTurns = 4;

// One warp a slice: what keeps its entries in order is that it takes 32 at a time.
__global__ void __launch_bounds__(kWarp) place_kernel(const __grid_constant__ SortParams params) {
  auto* cursor = dynamic_shared<int64_t>();
  const unsigned lane = threadIdx.x;
  const Share share = share_of_block(params);
  const int64_t* earlier = params.count + share.slice * (params.units + 1) + share.first_bin;
#pragma unroll 8
  for (int bin = lane; bin < share.bins; bin += kWarp) {
    cursor[bin] = params.start[share.first_bin + bin] + earlier[bin];
  }
  __syncwarp();
  for (int64_t first = share.begin; first < share.end; first += kTurns * kWarp) {
    int bin[kTurns];
    float activity[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t entry = first + turn * kWarp + lane;
      const int64_t found = entry < share.end ? local_bin(params, share, entry) : -1;
      bin[turn] = found >= 0 && found < share.bins ? static_cast<int>(found) : -1;
      activity[turn] = entry < share.end ? params.activity[entry] : 0.0f;
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t entry = first + turn * kWarp + lane;
      const unsigned peers = __match_any_sync(kAllLanes, bin[turn]);
      const int rank = __popc(peers & ((1u << lane) - 1));
      if (bin[turn] >= 0) {
        params.sorted[cursor[bin[turn]] + rank] = {divide(entry, params.winners), activity[turn]};
      }
      __syncwarp();
      if (bin[turn] >= 0 && rank == 0) cursor[bin[turn]] += __popc(peers);
      __syncwarp();
    }
  }
}

}  // namespace
}  // namespace ghl
