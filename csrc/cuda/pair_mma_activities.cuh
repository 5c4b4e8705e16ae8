// The pair by mma.sync: u becomes y in shared memory.
#pragma once

#include "cuda/pair_mma_block.cuh"

namespace ghl {
namespace {

template <class C>
__device__ __forceinline__ void load_chunk(float (&u)[C::kVector], const char* chunk) {
  const auto values = *reinterpret_cast<const Vector<typename C::Element>*>(chunk);
#pragma unroll
  for (int e = 0; e < C::kVector; ++e) u[e] = to_float(values.element[e]);
}

template <class C>
__device__ __forceinline__ void store_chunk(char* chunk, const float (&y)[C::kVector]) {
  uint4 bits;
  if constexpr (C::kSize == 2) {
    using Kind = typename C::Kind;
    bits = {Kind::pack(y[0], y[1]), Kind::pack(y[2], y[3]), Kind::pack(y[4], y[5]), Kind::pack(y[6], y[7])};
  } else {
    bits = {__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]), __float_as_uint(y[3])};
  }
  *reinterpret_cast<uint4*>(chunk) = bits;
}

// softmax over the units of a position, which lie in the chunks of neighboring lanes.
template <class C>
__device__ __forceinline__ void softmax_of_lanes(float (&u)[C::kVector], int units_left, float scale) {
  constexpr float kLog2e = 1.4426950408889634f;
  float top = __int_as_float(0xff800000);
#pragma unroll
  for (int e = 0; e < C::kVector; ++e) {
    u[e] = e < units_left ? u[e] * scale : __int_as_float(0xff800000);
    top = fmaxf(top, u[e]);
  }
#pragma unroll
  for (int distance = C::kUnitChunks / 2; distance > 0; distance /= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
  }
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < C::kVector; ++e) {
    u[e] = ptx::ex2_approx_ftz_f32((u[e] - top) * kLog2e);
    sum += u[e];
  }
#pragma unroll
  for (int distance = C::kUnitChunks / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  const float share = __fdividef(1.0f, sum);
#pragma unroll
  for (int e = 0; e < C::kVector; ++e) u[e] *= share;
}

// u becomes y in place, in the chunks that this thread has copied itself. Beyond the positions x is 0, u and
// the states are too, and y is finite, which is all it need be.
template <class C, bool kPlanes>
__device__ __forceinline__ void make_activities_by(const Block<C>& block, int h, int stage) {
  const KernelParams& params = block.params;
  const Competition& competition = params.competition;
  const States<C::kPositions>& states = block.states[stage];
#pragma unroll 1
  for (int i = 0; i < C::kHalfChunks / C::kThreads; ++i) {
    const Chunk chunk = chunk_of<C, kPlanes>(block.thread + i * C::kThreads);
    const int unit = block.first_unit(h) + chunk.unit;
    char* address = block.tile(stage) + h * C::kHalfBytes + chunk.offset;
    float y[C::kVector];
    load_chunk<C>(y, address);
    if (!kPlanes && params.state_here) {
      softmax_of_lanes<C>(y, params.units - unit, competition.scale);
    } else if (params.plain_softmax) {
#pragma unroll
      for (int e = 0; e < C::kVector; ++e) {
        y[e] = softmax_of(y[e], competition.scale, states.logsumexp[chunk.position + (kPlanes ? e : 0)]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < C::kVector; ++e) {
        const int position = chunk.position + (kPlanes ? e : 0);
        const PositionState at{states.threshold[position], states.cut[position], states.logsumexp[position],
                               states.first[position]};
        const int in_group = unit + (kPlanes ? 0 : e);
        y[e] = activity_of(y[e], block.group * params.units + in_group, at, competition);
      }
    }
#pragma unroll
    for (float& activity : y) activity = lifted<typename C::Element>(activity, competition);
    store_chunk<C>(address, y);
  }
}

template <class C>
__device__ __forceinline__ void make_activities(const Block<C>& block, int h, int stage) {
  if (block.params.left[h].access == Access::planes) {
    make_activities_by<C, true>(block, h, stage);
  } else {
    make_activities_by<C, false>(block, h, stage);
  }
}

}  // namespace
}  // namespace ghl
