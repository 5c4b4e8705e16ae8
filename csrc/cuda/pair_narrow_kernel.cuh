// The pair [y; dL/du]^T x of a layer with few columns and few units, such as the first of a network: its
// input is small, so that what has to be read is u and dL/du, once.
//
// A block has all units and all columns, in the registers of its warps for the whole launch, and a run of
// neighboring positions, 64 to a step. u and dL/du travel through a ring in shared memory, where u becomes y
// in place. x is gathered from L1 into [column][position], an element at a time: with few channels nothing
// wider is aligned. In step s a warp queues the copies of step s + 2, gathers x and makes y of step s + 1 and
// multiplies those of step s; one barrier a step. From lists of winners y is written into the ring without u.
//
// Positions l and l + 32 of a step are neighbors in shared memory, since one lane gathers both.
#pragma once

#include "cuda/pair_narrow_activities.cuh"
#include "cuda/pair_narrow_copies.cuh"

namespace ghl {
namespace {

// --- products -----------------------------------------------------------------------------------

template <class C>
using Sums = float[C::kDown][C::kAcross][4];

// kDepth positions.
template <class C>
__device__ __forceinline__ void multiply_16(Sums<C>& sums, const char* left, const char* x, int high) {
  uint32_t a[C::kDown][4];
#pragma unroll
  for (int i = 0; i < C::kDown; ++i) ptx::ldmatrix_x4_trans(a[i], left + 32 * i);
#pragma unroll
  for (int j = 0; j < C::kAcross; j += 2) {
    uint32_t b[4];
    // the upper lanes have no columns of their own beyond an odd number of them
    const int column = j + 1 < C::kAcross ? 8 * (j + high) : 8 * j;
    ptx::ldmatrix_x4(b, x + column * kNarrowColumnPitch);
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < C::kDown; ++i) {
      C::Kind::mma(sums[i][j], a[i], b0);
      if (j + 1 < C::kAcross) C::Kind::mma(sums[i][j + 1], a[i], b1);
    }
  }
}

template <class C>
__device__ __forceinline__ Operands operands_of(const Block& block) {
  const int low = block.lane() % 16, high = block.lane() / 16, position = kDepth * block.depth();
  const int unit = 16 * C::kDown * block.warp_down(), column = 8 * C::kAcross * block.warp_across();
  return {(position + low % 8 + 8 * high) * block.tiles.left_pitch + 2 * unit + low / 8 * 16,
          (column + low % 8) * kNarrowColumnPitch + 2 * position + low / 8 * 16};
}

template <class C>
__device__ __forceinline__ void multiply(const Block& block, Sums<C>& sums, int step) {
  const Operands operands = block.operands()[block.thread()];
  const char* left = block.left_tile(step) + operands.left;
  const char* x = block.x_tile(step) + operands.x;
  const int stride = kDepth * block.tiles.depths;
#pragma unroll 1
  for (int k = 0; k < kPositions; k += stride) {
    multiply_16<C>(sums, left, x, block.lane() / 16);
    left += stride * block.tiles.left_pitch;
    x += 2 * stride;
  }
}

// --- results ------------------------------------------------------------------------------------

// The sums of all depths in the registers of the first, always added in the same order.
template <class C>
__device__ __forceinline__ void meet(const Block& block, Sums<C>& sums) {
  float* meeting = dynamic_shared<float>() + block.thread() % (block.tiles.threads / block.tiles.depths);
#pragma unroll 1
  for (int depth = 1; depth < block.tiles.depths; ++depth) {
    __syncthreads();
    if (block.depth() == depth) {
#pragma unroll
      for (int i = 0; i < C::kSums; ++i) {
        meeting[i * kNarrowMeeting] = sums[i / 4 / C::kAcross][i / 4 % C::kAcross][i % 4];
      }
    }
    __syncthreads();
    if (block.depth() == 0) {
#pragma unroll
      for (int i = 0; i < C::kSums; ++i) {
        sums[i / 4 / C::kAcross][i / 4 % C::kAcross][i % 4] += meeting[i * kNarrowMeeting];
      }
    }
  }
}

// The whole tile, whatever of it exists, to the block's share of the workspace.
template <class C>
__device__ __forceinline__ void store_part(const Block& block, const Sums<C>& sums) {
  const int row = 16 * C::kDown * block.warp_down() + block.lane() / 4;
  const int column = 8 * C::kAcross * block.warp_across() + block.lane() % 4 * 2;
  float* out = block.params.workspace + int64_t{blockIdx.x} * (block.tiles.rows * block.tiles.columns);
  out += row * block.tiles.columns + column;
#pragma unroll
  for (int i = 0; i < 2 * C::kDown; ++i) {
#pragma unroll
    for (int j = 0; j < C::kAcross; ++j) {
      const float* pair = &sums[i / 2][j][2 * (i % 2)];
      *reinterpret_cast<float2*>(out + 8 * i * block.tiles.columns + 8 * j) = {pair[0], pair[1]};
    }
  }
}

// --- the kernel ---------------------------------------------------------------------------------

// So many units of a position are shared by four lanes, more by eight.
constexpr int kFewUnits = 96;

// Queues what step + 2 needs, and makes the operands of step + 1.
template <class C>
__device__ __forceinline__ void feed(const Block& block, int step) {
  const bool few = block.params.units <= kFewUnits;
  if (step + 2 < block.steps()) {
    few ? copy_left<4>(block.again(), step + 2) : copy_left<8>(block.again(), step + 2);
    if (!block.params.state_here) {
      few ? copy_states<4>(block.again(), step + 2) : copy_states<8>(block.again(), step + 2);
    }
    place_positions(block.again(), step + 2);
  }
  ptx::cp_async_commit_group();
  if (step + 1 < 0 || step + 1 >= block.steps()) return;
  gather_x<C>(block.again(), step + 1);
  ptx::cp_async_wait_group<1>();
  if (block.params.u_half < 0) return;
  few ? make_activities<C, 4>(block.again(), step + 1) : make_activities<C, 8>(block.again(), step + 1);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    narrow_kernel(const __grid_constant__ KernelParams params) {
  const Block block(params);
  place_taps(block);
  block.operands()[block.thread()] = operands_of<C>(block);
  Sums<C> sums = {};
  for (int step = -2; step < block.steps(); ++step) {
    // operands and places of the others are there, and nobody reads the tiles that are overwritten
    __syncthreads();
    // four warps, which are on different schedulers, feed while others multiply
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == (block.again().warp() / 4 & 1)) {
        feed<C>(block, step);
      } else if (step >= 0) {
        multiply<C>(block.again(), sums, step);
      }
    }
  }
  meet<C>(block, sums);
  if (block.depth() == 0) store_part<C>(block, sums);
}

}  // namespace
}  // namespace ghl
