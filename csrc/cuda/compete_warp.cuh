// A position by one warp that has its row in registers: the state, and the winners' lists.
#pragma once

#include "cuda/compete.cuh"

namespace ghl {

// Compiled for sm_100 most kernels that do more than the state need some more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kIsBlackwell = true;
#else
constexpr bool kIsBlackwell = false;
#endif
namespace {

template <class T>
__device__ __forceinline__ T minus_infinity() {
  return from_float<T>(-infinity());
}

// A word of them.
template <class T>
__device__ __forceinline__ uint32_t minus_infinities() {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(-infinity());
  } else {
    return Pair<T>::of(-infinity(), -infinity());
  }
}

// As a value that the compiler knows to be the same in all lanes, so that it makes no code for some of them
// to leave a loop that the others are in.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarp), 0);
}

// A field of the state to each of the first lanes: where it is written, which may be nowhere, and its bits.
__device__ __forceinline__ uint32_t* field_pointer(const CompeteParams& p, unsigned lane) {
  void* const field = lane == 0   ? static_cast<void*>(p.threshold)
                      : lane == 1 ? static_cast<void*>(p.cut)
                      : lane == 2 ? static_cast<void*>(p.logsumexp)
                      : lane == 3 ? static_cast<void*>(p.first)
                                  : nullptr;
  return static_cast<uint32_t*>(field);
}

__device__ __forceinline__ uint32_t field_of(const PositionState& at, unsigned lane) {
  const uint32_t even = lane & 2 ? __float_as_uint(at.logsumexp) : __float_as_uint(at.threshold);
  const uint32_t odd = static_cast<uint32_t>(lane & 2 ? at.first : at.cut);
  return lane & 1 ? odd : even;
}

// What the state has beside the threshold and the cut, of a row without NaN whose largest is `top`. wins(i,
// v) tells it of an element.
template <class Row, class Wins>
__device__ __forceinline__ void complete_state(const Row& row, float top, const CompeteArgs& args,
                                               PositionState& at, Wins wins) {
  const CompeteParams& p = args.p;
  const bool selects = p.winners > 0;
  if (p.activity == Activity::softmax) {
    const ExponentialSum sum(args.scale, top);
    float total = 0.0f;
    if (selects) {
      row.for_each([&](int i, float v) { total += wins(i, v) ? sum.term(v) : 0.0f; });
    } else {
      row.for_each([&](int, float v) { total += sum.term(v); });
    }
    at.logsumexp = sum.logarithm(Row::Lanes::sum(total), p.keeps_infinity);
  }
  if (p.anti) {
    const auto mask = row.mask([&](float v) { return v == top; });
    const int unit = mask ? Row::unit(static_cast<unsigned>(lowest_of(mask))) : 0x7fffffff;
    at.first = Row::Lanes::min(unit);
  }
}

// The state of the position whose row this is, and its winners. lane_top: the largest of this lane, or NaN.
template <class T, class Row, class Read>
__device__ __forceinline__ PositionState compete_row(const Row& row, float lane_top, const CompeteArgs& args,
                                                     Read read, unsigned* list, Chosen& chosen) {
  const CompeteParams& p = args.p;
  chosen = none_chosen();
  if (__any_sync(kAllLanes, lane_top != lane_top)) return bad_state();

  PositionState at{0.0f, 0, 0.0f, 0};
  if (p.winners > 0) {
    chosen = row.choose(lane_top, static_cast<int>(p.winners), read, list);
    at.threshold = chosen.threshold;
    at.cut = chosen.cut;
  }
  if (p.activity != Activity::softmax && !p.anti) return at;
  const auto wins = [&](int i, float v) { return is_winner(v, Row::unit(i), at); };
  complete_state(row, warp_max(lane_top), args, at, wins);
  return at;
}

template <class Row>
__device__ __forceinline__ typename Row::Mask winners_of(const Row& row, const CompeteArgs& args,
                                                         const PositionState& at) {
  if (at.threshold != at.threshold) return Row::elements_up_to(static_cast<int>(args.p.winners) - 1);
  const auto above = row.mask([&](float v) { return v > at.threshold; });
  return above | (row.mask([&](float v) { return v == at.threshold; }) & Row::elements_up_to(at.cut));
}

// The winners and their activities in ascending order: runs follow each other in the order of lanes.
template <class Row>
__device__ __forceinline__ void write_winners_of_row(const Row& row, const CompeteArgs& args,
                                                     int64_t position, const PositionState& at) {
  const bool bad = at.threshold != at.threshold;
  const auto winners = winners_of(row, args, at);
  const Competition competition = competition_of(args);
  int listed = 0;
#pragma unroll
  for (int first = 0; first < Row::kElements; first += Row::kVector) {
    if (!row.has_chunk(first)) break;
    int slot = listed;
#pragma unroll
    for (int i = first; i < first + Row::kVector; ++i) {
      const unsigned lanes = __ballot_sync(kAllLanes, winners >> i & 1);
      slot += __popc(lanes & lanes_below());
      listed += __popc(lanes);
    }
#pragma unroll
    for (int i = first; i < first + Row::kVector; ++i) {
      if (winners >> i & 1) {
        const int unit = Row::unit(i);
        write_winner(args.p, position, slot++, unit, activity_of(row.value(i), unit, at, competition), bad);
      }
    }
  }
}

template <class Row>
__device__ __forceinline__ void write_winners(const Row& row, const Chosen& chosen, const CompeteArgs& args,
                                              int64_t position, const PositionState& at, unsigned* list) {
  if (!chosen.listed) return write_winners_of_row(row, args, position, at);
  // the winners' units in any order, then what lies above all
  const int k = static_cast<int>(args.p.winners);
  int before = 0;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const unsigned winners = __ballot_sync(kAllLanes, chosen.wins(i));
    if (chosen.wins(i))
      list[before + __popc(winners & lanes_below())] = static_cast<unsigned>(chosen.unit[i]);
    before += __popc(winners);
  }
  if (lane_index() < 3) list[k + static_cast<int>(lane_index())] = ~0u;
  __syncwarp();
  int rank[kMine] = {};
  for (int i = 0; i < k; i += 4) {
    const uint4 units = *reinterpret_cast<const uint4*>(list + i);
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const unsigned unit = static_cast<unsigned>(chosen.unit[j]);
      rank[j] += (units.x < unit) + (units.y < unit) + (units.z < unit) + (units.w < unit);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    if (!chosen.wins(i)) continue;
    const float y = activity_of(chosen.value[i], chosen.unit[i], at, competition_of(args));
    write_winner(args.p, position, rank[i], chosen.unit[i], y, false);
  }
}

}  // namespace
}  // namespace ghl
