// The pair of few columns and few units: y in shared memory, from u or from lists of winners.
#pragma once

#include "cuda/pair_narrow_block.cuh"

namespace ghl {
namespace {

template <class C>
__device__ __forceinline__ void load_chunk(float (&u)[kVector], const uint4& chunk) {
  using Kind = typename C::Kind;
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u[2 * i] = Kind::low(pairs[i]);
    u[2 * i + 1] = Kind::high(pairs[i]);
  }
}

template <class C>
__device__ __forceinline__ void store_chunk(char* chunk, const float (&y)[kVector]) {
  using Kind = typename C::Kind;
  *reinterpret_cast<uint4*>(chunk) = {Kind::pack(y[0], y[1]), Kind::pack(y[2], y[3]), Kind::pack(y[4], y[5]),
                                      Kind::pack(y[6], y[7])};
}

// The chunk with -infinity in place of units that do not exist.
template <class C>
__device__ __forceinline__ uint4 without_missing(uint4 chunk, int units) {
  constexpr uint32_t kLowest = C::Kind::kLowest;
  const auto kept = [&](uint32_t pair, int first) {
    const uint32_t low = first < units ? pair & 0xffffu : kLowest;
    const uint32_t high = first + 1 < units ? pair & 0xffff0000u : kLowest << 16;
    return low | high;
  };
  return {kept(chunk.x, 0), kept(chunk.y, 2), kept(chunk.z, 4), kept(chunk.w, 6)};
}

// softmax over the units of a position: kRowLanes neighboring lanes' chunks, kRowLanes apart, of which one
// may be the last of the row, and those after it missing: whatever is `elsewhere` is read in their place.
template <class C, int kRowLanes, int kVectors>
__device__ __forceinline__ void softmax_of_chunks(char* row, const char* elsewhere, int first_chunk,
                                                  int units, const Competition& competition) {
  constexpr float kLog2e = 1.4426950408889634f;
  // Where the rounding of a product with log2(e), which all units have in common, is more than a small
  // factor.
  constexpr float kFar = 1e6f;
  using Kind = typename C::Kind;
  const float scale = competition.scale;
  uint4 chunks[kVectors] = {};
  uint32_t tops = Kind::kLowest << 16 | Kind::kLowest;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int chunk = first_chunk + i * kRowLanes, left = units - kVector * chunk;
    chunks[i] = *reinterpret_cast<const uint4*>(left > 0 ? row + 16 * chunk : elsewhere);
    if (left < kVector) chunks[i] = without_missing<C>(chunks[i], left);
    tops =
        Kind::max(tops, Kind::max(Kind::max(chunks[i].x, chunks[i].y), Kind::max(chunks[i].z, chunks[i].w)));
  }
  float top = warp_max<kRowLanes>(fmaxf(Kind::low(tops), Kind::high(tops)));
  float y[kVectors][kVector];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) load_chunk<C>(y[i], chunks[i]);
  if (!(fabsf(top * scale) < kFar)) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) y[i][e] -= top;
    }
    top = 0.0f;
  }
  const float slope = scale * kLog2e, offset = -top * slope;
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      y[i][e] = ptx::ex2_approx_ftz_f32(fmaf(y[i][e], slope, offset));
      sums[e % 2] += y[i][e];
    }
  }
  const float total = warp_sum<kRowLanes>(sums[0] + sums[1]);
  const float share = lifted<typename Kind::Element>(__fdividef(1.0f, total), competition);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int chunk = first_chunk + i * kRowLanes;
#pragma unroll
    for (int e = 0; e < kVector; ++e) y[i][e] *= share;
    if (kVector * chunk < units) store_chunk<C>(row + 16 * chunk, y[i]);
  }
}

template <class C, int kRowLanes>
__device__ __forceinline__ void activities_of_chunks(char* row, int first_chunk, const State& state,
                                                     const KernelParams& params) {
#pragma unroll 1
  for (int chunk = first_chunk; kVector * chunk < params.units; chunk += kRowLanes) {
    float y[kVector];
    load_chunk<C>(y, *reinterpret_cast<const uint4*>(row + 16 * chunk));
    if (params.plain_softmax) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) y[e] = softmax_of(y[e], params.competition.scale, state.logsumexp);
    } else {
      const PositionState at{state.threshold, state.cut, state.logsumexp, state.first};
#pragma unroll
      for (int e = 0; e < kVector; ++e) y[e] = activity_of(y[e], kVector * chunk + e, at, params.competition);
    }
#pragma unroll
    for (float& activity : y) activity = lifted<typename C::Kind::Element>(activity, params.competition);
    store_chunk<C>(row + 16 * chunk, y);
  }
}

// y of a row from its list; NaN where one of its units does not exist. Called by whole warps.
template <class C, int kRowLanes>
__device__ __forceinline__ void activities_of_winners(char* row, int lane_in_row, const Winners& list,
                                                      const KernelParams& params) {
  constexpr uint32_t kNan = 0x7fff7fff;
  const uint32_t units = static_cast<uint32_t>(params.units);
  uint32_t others = 0;
#pragma unroll
  for (int i = 0; i < kNarrowWinners; ++i) {
    if (static_cast<uint32_t>(list.unit[i]) >= units) others = kNan;
  }
#pragma unroll 1
  for (int chunk = lane_in_row; kVector * chunk < params.units; chunk += kRowLanes) {
    *reinterpret_cast<uint4*>(row + 16 * chunk) = {others, others, others, others};
  }
  __syncwarp();
  if (lane_in_row < params.winners && others == 0) {
    const auto y = static_cast<uint16_t>(C::Kind::pack(list.activity[lane_in_row], 0.0f));
    // two winners of a position that does not exist are one unit of activity 0
    if (y != 0) *reinterpret_cast<uint16_t*>(row + 2 * list.unit[lane_in_row]) = y;
  }
}

// Of a row, what this thread has copied of it.
template <class C, int kRowLanes>
__device__ __forceinline__ void activities_of_row(const Block& block, int step, char* row, int index) {
  const KernelParams& params = block.params;
  const int first_chunk = block.thread_modulo(kRowLanes), units = params.units;
  const Competition& competition = params.competition;
  const char* elsewhere = reinterpret_cast<const char*>(block.taps());
  const State* const state = block.states(step) + index;
  if (params.winners > 0) {
    const auto* list = reinterpret_cast<const Winners*>(state);
    activities_of_winners<C, kRowLanes>(row, first_chunk, *list, params);
  } else if (!params.state_here) {
    activities_of_chunks<C, kRowLanes>(row, first_chunk, *state, params);
  } else if constexpr (kRowLanes == 8) {
    softmax_of_chunks<C, 8, 2>(row, elsewhere, first_chunk, units, competition);
  } else if (units <= 32) {
    softmax_of_chunks<C, 4, 1>(row, elsewhere, first_chunk, units, competition);
  } else if (units <= 64) {
    softmax_of_chunks<C, 4, 2>(row, elsewhere, first_chunk, units, competition);
  } else if constexpr (C::kDown != 4) {  // which 65 to 96 units do not take
    softmax_of_chunks<C, 4, 3>(row, elsewhere, first_chunk, units, competition);
  }
}

// u becomes y in place, in the chunks that this thread has copied itself or would have. Beyond the positions
// x is 0, u and the states are too, and y is finite, which is all it need be.
template <class C, int kRowLanes>
__device__ __forceinline__ void make_activities(const Block& block, int step) {
  // the states of a row were copied by several lanes
  __syncwarp();
#pragma unroll 1
  for (int i = block.thread(); i < kPositions * kRowLanes; i += block.tiles.threads) {
    const int index = row_of<kRowLanes>(i);
    char* row = block.left_tile(step) + index * block.tiles.left_pitch;
    activities_of_row<C, kRowLanes>(block, step, row + 2 * block.params.u_half * block.tiles.half, index);
  }
}

}  // namespace
}  // namespace ghl
