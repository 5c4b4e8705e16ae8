// y = c(u) from u and the state of its position, the device function that every kernel shares.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/dtype.cuh"
#include "cuda/ptx.cuh"
#include "ghl/compete.h"

namespace ghl {

// The competition of a launch: the same in every thread, so that branches on it do not diverge.
struct Competition {
  Activity activity = Activity::softmax;
  bool selects = false;  // only winners are active
  bool anti = false;     // every unit but the single largest is negated
  float scale = 1.0f;    // 1 / temperature
  float lift = 1.0f;     // see lifted()
};

// y, or a factor of it, as a product takes it that rounds y to T.
template <class T>
__device__ __forceinline__ float lifted(float y, const Competition& competition) {
  if constexpr (std::is_same_v<T, f16>) return y * competition.lift;
  return y;
}

// u where a unit wins and 0 elsewhere.
__device__ __forceinline__ bool copies_winners(const Competition& competition) {
  return competition.activity == Activity::linear && competition.selects && !competition.anti;
}

__device__ __forceinline__ bool is_plain_softmax(const Competition& competition) {
  return competition.activity == Activity::softmax && !competition.selects && !competition.anti;
}

// What is known of a position. Where its u holds a NaN, threshold and logsumexp are NaN.
struct PositionState {
  float threshold;  // the winners-th largest u; without winners 0, or NaN, the mark of a bad position
  int32_t cut;      // last unit that wins a tie at the threshold
  float logsumexp;  // of u / temperature over the winners
  int32_t first;    // unit of the largest u
};

// The state in memory, [positions] each; a field that the competition does not need is null.
struct StatePointers {
  const float* threshold = nullptr;
  const int32_t* cut = nullptr;
  const float* logsumexp = nullptr;
  const int32_t* first = nullptr;
};

// Where a load is masked off: with the u of masked_response() the activity is then 0.
__device__ __forceinline__ PositionState no_position() { return {__int_as_float(0x7f800000), -1, 0.0f, -1}; }

__device__ __forceinline__ float masked_response(const Competition& competition) {
  return competition.activity == Activity::softmax ? __int_as_float(0xff800000) : 0.0f;
}

__device__ __forceinline__ PositionState load_state(const StatePointers& state, int64_t position) {
  PositionState at{0.0f, 0, 0.0f, 0};
  if (state.threshold) at.threshold = __ldg(state.threshold + position);
  if (state.cut) at.cut = __ldg(state.cut + position);
  if (state.logsumexp) at.logsumexp = __ldg(state.logsumexp + position);
  if (state.first) at.first = __ldg(state.first + position);
  return at;
}

// exp(u / temperature - logsumexp). Not u * (scale * log2(e)), which overflows where u / temperature does
// not.
__device__ __forceinline__ float softmax_of(float u, float scale, float logsumexp) {
  constexpr float kLog2e = 1.4426950408889634f;
  return ptx::ex2_approx_ftz_f32((u * scale - logsumexp) * kLog2e);
}

__device__ __forceinline__ float activity_of(float u, int32_t unit, const PositionState& at,
                                             const Competition& competition) {
  float y = 1.0f;
  if (competition.activity == Activity::softmax) y = softmax_of(u, competition.scale, at.logsumexp);
  if (competition.activity == Activity::linear) y = u;
  if (competition.activity == Activity::relu) y = u > 0.0f ? u : 0.0f;
  if (competition.selects) y = u > at.threshold || (u == at.threshold && unit <= at.cut) ? y : 0.0f;
  if (competition.anti) y = unit == at.first ? y : -y;
  // comparisons with NaN are false and would hide it; a logsumexp of NaN shows by itself, in the winners
  // alone
  return at.threshold != at.threshold ? __int_as_float(0x7fffffff) : y;
}

}  // namespace ghl
