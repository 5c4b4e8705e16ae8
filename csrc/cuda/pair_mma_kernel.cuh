// The pair [y; dL/du]^T x by cp.async, ldmatrix and mma.sync: sm_80 and newer.
//
// An implicit matrix product: rows are units, columns the elements of a patch, the summed dimension the
// positions. A block multiplies a left tile of two halves of 64 units by a tile of x, 64 bytes of positions
// at a step. The halves are dL/du and y of the same units, or two runs of units where one result is wanted;
// which is which only decides what is loaded and where the sums go.
//
// Tiles travel through a ring in shared memory. In step s a thread queues the copies of step s + stages - 1,
// multiplies tile s, and turns the u that it copied itself for step s + 1 into y, in place; one barrier a
// step.
#pragma once

#include "cuda/pair_mma_activities.cuh"
#include "cuda/pair_mma_copies.cuh"

namespace ghl {
namespace {

// --- products -----------------------------------------------------------------------------------

template <class C>
using Sums = float[4][C::kWarpColumns / 8][4];

// 16 positions from k on.
template <class C>
__device__ __forceinline__ void multiply_16_bits(const Block<C>& block, Sums<C>& sums, int stage, int k) {
  const char* left = block.tile(stage) + block.half * C::kHalfBytes;
  const char* x = block.x_tile(stage);
  const int low = block.lane % 16, high = block.lane / 16;
  uint32_t a[4][4];
  if (block.params.left[block.half].access == Access::planes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::ldmatrix_x4(a[i], left + C::plane_chunk(16 * i + low, k / C::kVector + high));
    }
  } else {
    const int position = k + low % 8 + 8 * high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::ldmatrix_x4_trans(a[i], left + C::row_chunk(position, 2 * i + low / 8, C::kUnitChunks));
    }
  }
#pragma unroll
  for (int j = 0; j < C::kWarpColumns / 16; ++j) {
    uint32_t b[4];
    const int chunk = (block.warp_column + 16 * j) / C::kVector + high;
    ptx::ldmatrix_x4_trans(b, x + C::row_chunk(k + low, chunk, C::kColumnChunks));
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      C::Kind::mma(sums[i][2 * j], a[i], b0);
      C::Kind::mma(sums[i][2 * j + 1], a[i], b1);
    }
  }
}

// An element and what rounding it to tf32 leaves.
template <bool kExact>
__device__ __forceinline__ void load_tf32(uint32_t& rounded, uint32_t& rest, const char* address) {
  const float value = *reinterpret_cast<const float*>(address);
  rounded = ptx::cvt_rna_tf32_f32(value);
  if constexpr (kExact) rest = ptx::cvt_rna_tf32_f32(value - __uint_as_float(rounded));
}

// 8 positions from k on, and kRows times 16 units from `first` on.
template <class C, int kRows>
__device__ __forceinline__ void multiply_32_bits(const Block<C>& block, Sums<C>& sums, int stage, int k,
                                                 int first) {
  constexpr bool kExact = C::Kind::kExact;
  const char* left = block.tile(stage) + block.half * C::kHalfBytes;
  const char* x = block.x_tile(stage);
  const int row = block.lane / 4, in_four = block.lane % 4;
  const bool is_plane = block.params.left[block.half].access == Access::planes;
  uint32_t a[kRows][4], a_rest[kRows][4];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int unit = 16 * (first + i) + row + 8 * (r % 2), position = k + in_four + 4 * (r / 2);
      const int offset = is_plane ? C::plane_chunk(unit, position / 4) + position % 4 * 4
                                  : C::row_chunk(position, unit / 4, C::kUnitChunks) + unit % 4 * 4;
      load_tf32<kExact>(a[i][r], a_rest[i][r], left + offset);
    }
  }
#pragma unroll
  for (int j = 0; j < C::kWarpColumns / 8; ++j) {
    uint32_t b[2], b_rest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = k + in_four + 4 * r, column = block.warp_column + 8 * j + row;
      const int offset = C::row_chunk(position, column / 4, C::kColumnChunks) + column % 4 * 4;
      load_tf32<kExact>(b[r], b_rest[r], x + offset);
    }
    if constexpr (kExact) {
      // the small products first
#pragma unroll
      for (int i = 0; i < kRows; ++i) ptx::mma_m16n8k8_tf32(sums[first + i][j], a_rest[i], b);
#pragma unroll
      for (int i = 0; i < kRows; ++i) ptx::mma_m16n8k8_tf32(sums[first + i][j], a[i], b_rest);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) ptx::mma_m16n8k8_tf32(sums[first + i][j], a[i], b);
  }
}

template <class C>
__device__ __forceinline__ void multiply(const Block<C>& block, Sums<C>& sums, int stage) {
  constexpr int kDepth = C::kPositions / 2;
  if constexpr (C::kSize == 2) {
#pragma unroll
    for (int k = 0; k < C::kPositions; k += kDepth) multiply_16_bits<C>(block, sums, stage, k);
  } else {
    // fewer fragments at a time where their rests need registers too
    constexpr int kRows = C::Kind::kExact ? 2 : 4;
#pragma unroll 1
    for (int k = 0; k < C::kPositions; k += kDepth) {
#pragma unroll
      for (int first = 0; first < 4; first += kRows) {
        multiply_32_bits<C, kRows>(block, sums, stage, k, first);
      }
    }
  }
}

// --- results ------------------------------------------------------------------------------------

// The whole tile, whatever of it exists, to the block's share of the workspace.
template <class C>
__device__ __forceinline__ void store_part(const Block<C>& block, const Sums<C>& sums) {
  const int row = block.half * kPairHalf + block.lane / 4;
  const int column = block.warp_column + block.lane % 4 * 2;
  float* out = block.share + row * C::kColumns + column;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < C::kWarpColumns / 8; ++j) {
      const float* pair = &sums[i / 2][j][2 * (i % 2)];
      *reinterpret_cast<float2*>(out + 8 * i * C::kColumns + 8 * j) = {pair[0], pair[1]};
    }
  }
}

template <class C>
__device__ __forceinline__ void store_result(const Block<C>& block, const Sums<C>& sums) {
  const KernelParams& params = block.params;
  const Filters& layout = params.result_layout;
  const int rows_left = params.units - block.first_unit(block.half) - block.lane / 4;
  const int64_t unit = int64_t{block.group} * params.units + params.units - rows_left;
  float* out = params.left[block.half].out + unit * layout.stride_unit;
  const int first_column = block.first_column + block.warp_column + block.lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < C::kWarpColumns / 8; ++j) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int column = first_column + 8 * j + side;
      const int64_t tap = params.patches.channels.divide(column);
      const int64_t channel = column - tap * params.patches.channels.value;
      if (column >= params.columns || channel >= params.result_channels) continue;
      float* address = out + channel * layout.stride_channel + tap * layout.stride_tap;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (8 * i < rows_left) *address = sums[i / 2][j][2 * (i % 2) + side];
        address += 8 * layout.stride_unit;
      }
    }
  }
}

// --- the kernel ---------------------------------------------------------------------------------

__device__ __forceinline__ void wait_for_all_but(int groups) {
  static_assert(kPairFewestStages == 3 && kPairMostStages == 5);
  if (groups == 1) return ptx::cp_async_wait_group<1>();
  if (groups == 2) return ptx::cp_async_wait_group<2>();
  ptx::cp_async_wait_group<3>();
}

// Queues what step + stages - 1 and step + stages need, and makes the activities of step + 1.
template <class C>
__device__ __forceinline__ void feed(const Block<C>& block, const Place& column, int step, int stage) {
  const KernelParams& params = block.params;
  const int steps = block.steps(), stages = params.stages;
  const int queued = step + stages - 1, into = stage == 0 ? stages - 1 : stage - 1;
  if (queued >= 0 && queued < steps) {
    if (params.x_vectors) {
      copy_x_vectors(block, queued, into, column);
    } else {
      copy_x_elements(block, queued, into);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (block.has_units(h)) copy_half(block, h, queued, into);
    }
  }
  if (step + stages < steps) {
    place_positions(block, step + stages);
    copy_states(block, step + stages, stage);
  }
  ptx::cp_async_commit_group();
  wait_for_all_but(stages - 2);
  if (step + 1 < 0 || step + 1 >= steps) return;
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    if (params.left[h].is_u && block.has_units(h)) {
      make_activities(block, h, stage + 1 == stages ? 0 : stage + 1);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    pair_kernel(const __grid_constant__ KernelParams params) {
  const Block<C> block(params);
  place_columns(block);
  __syncthreads();
  const Place column = block.columns[block.thread % C::kColumnChunks * C::kVector];
  const bool busy = block.has_units(block.half) && block.first_column + block.warp_column < params.columns;
  Sums<C> sums = {};
  int stage = 0;
  for (int step = -params.stages; step < block.steps(); ++step) {
    // tiles, places and states of the others are there, and nobody reads the tile that is overwritten
    __syncthreads();
    // one half's warps multiply while the other's, on the same schedulers, copy and make activities
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == block.half) {
        feed(block, column, step, stage);
      } else if (step >= 0 && busy) {
        multiply(block, sums, stage);
      }
    }
    stage = stage + 1 == params.stages ? 0 : stage + 1;
  }
  if (!busy) return;
  if (block.share) {
    store_part(block, sums);
  } else {
    store_result(block, sums);
  }
}

}  // namespace
}  // namespace ghl
