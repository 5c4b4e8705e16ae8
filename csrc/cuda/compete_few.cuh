// Competition among few units, too few for a warp a position: lanes share a warp among several positions,
// whose rows they hold in registers. All positions of a warp take the same steps, as many as the slowest
// needs.
#pragma once

#include "cuda/compete_warp.cuh"

namespace ghl {
namespace {

// Values of a dtype as integers in their order, NaN aside; -0 and 0 are one.
template <class T>
struct Ordered {
  static __device__ __forceinline__ uint32_t key(float value) {
    const float positive_zero = value + 0.0f;
    const uint32_t bits = Pair<T>::of(positive_zero, positive_zero) & 0xffffu;
    return bits ^ (bits >> 15 ? 0xffffu : 0x8000u);
  }
  static __device__ __forceinline__ float value(uint32_t key) {
    return to_float(T{static_cast<uint16_t>(key ^ (key >> 15 ? 0x8000u : 0xffffu))});
  }
};

template <>
struct Ordered<float> {
  static __device__ __forceinline__ uint32_t key(float value) { return key_of(value); }
  static __device__ __forceinline__ float value(uint32_t key) { return value_of(key); }
};

// Compiled for sm_80 what looks at bfloat16 takes more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class T>
constexpr bool kIsWide = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kIsWide = false;
#endif

// The k-th largest of a row, 1 <= k <= units, whose largest is `top`, and `lane_top` that of this lane. Of a
// row with a NaN anything.
template <class T, class Row>
__device__ __forceinline__ Cut select_of_few(const Row& row, float lane_top, float top, int k) {
  using Lanes = typename Row::Lanes;
  constexpr int kFree = kKeyFreeBits<T>;
  // of 32 bits it takes too long to try all
  constexpr bool kStopsEarly = sizeof(T) == 4;
  // at least k elements reach low, fewer reach high, and so many
  uint32_t high = Ordered<T>::key(top) + 1;
  uint32_t low = high - 1;
  int above = 0;
  if (k > 1) {
    const float bound =
        k <= Lanes::kCount ? value_above<kFree>(bound_of<kFree, Lanes>(lane_top, k)) : -infinity();
    low = Ordered<T>::key(bound);
    while (Lanes::in_any_row(high - low > 1)) {
      // low itself where this row is done
      const uint32_t middle = low + (high - low) / 2;
      const int count = Lanes::sum(row.count_reaching(Ordered<T>::value(middle)));
      if (count >= k) {
        low = middle;
        if (kStopsEarly && count == k) high = low + 1;
      } else {
        high = middle;
        above = count;
      }
    }
  }
  float threshold = Ordered<T>::value(low);
  if (kStopsEarly) threshold = least_reaching(row, threshold);
  const auto equal = row.equal_to(threshold);
  int ties = k - above;
  // where it stopped early more units may be above
  if (kStopsEarly) ties = min(ties, Lanes::sum(count_of(equal)));
  if (Lanes::in_every_row(ties == 1)) {
    const int lowest = equal ? Row::unit(static_cast<unsigned>(lowest_of(equal))) : row.units - 1;
    return {threshold, Lanes::min(lowest)};
  }
  return {threshold, bisect_unit(row, equal, ties)};
}

// The elements that win, one bit each.
template <class Row>
__device__ __forceinline__ typename Row::Mask winners_of_few(const Row& row, const PositionState& at) {
  return row.reaching(at.threshold) & (~row.equal_to(at.threshold) | Row::elements_up_to(at.cut));
}

// The state of the position whose row this is.
template <class T, class Row>
__device__ __forceinline__ PositionState compete_few(const Row& row, float lane_top, float top,
                                                     const CompeteArgs& args) {
  PositionState at{0.0f, 0, 0.0f, 0};
  if (args.p.winners > 0) {
    const Cut cut = select_of_few<T>(row, lane_top, top, static_cast<int>(args.p.winners));
    at.threshold = cut.threshold;
    at.cut = cut.unit;
  }
  // found in the loop over them it would be a branch for each
  const bool needs_winners = args.p.winners > 0 && args.p.activity == Activity::softmax;
  const auto winners = needs_winners ? winners_of_few(row, at) : typename Row::Mask{0};
  complete_state(row, top, args, at, [&](int i, float) { return (winners >> i & 1) != 0; });
  return top == top ? at : bad_state();
}

// The winners and their activities in ascending order. read(unit) is a value of the row, from memory.
template <class Row, class Read>
__device__ __forceinline__ void write_winners_of_few(const Row& row, const CompeteArgs& args, bool exists,
                                                     int64_t position, const PositionState& at, Read read) {
  using Mask = typename Row::Mask;
  constexpr int kRuns = Row::kElements / Row::kVector;
  static_assert(kRuns <= 4 && Row::kElements * Row::Lanes::kCount < 256 && sizeof(Mask) == sizeof(uint32_t));
  const bool bad = at.threshold != at.threshold;
  const Competition competition = competition_of(args);
  if (args.p.winners == 1) {
    if (!exists || Row::Lanes::index() != 0) return;
    write_winner(args.p, position, 0, at.cut, activity_of(at.threshold, at.cut, at, competition), bad);
    return;
  }
  Mask winners = bad ? Row::elements_up_to(static_cast<int>(args.p.winners) - 1) : winners_of_few(row, at);
  if (!exists) winners = 0;

  // of each run a byte
  uint32_t count = 0;
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    constexpr Mask kAll = ~Mask{0} >> (32 - Row::kVector);
    count |= static_cast<uint32_t>(__popc(winners >> run * Row::kVector & kAll)) << 8 * run;
  }
  const uint32_t through = Row::Lanes::inclusive_sum(count);
  // every byte and those below
  const uint32_t earlier_runs = Row::Lanes::last(through) * 0x01010100u;
  uint32_t rank = through - count + earlier_runs;
#pragma unroll 1
  for (; winners != 0; winners &= winners - 1) {
    const unsigned element = static_cast<unsigned>(lowest_of(winners));
    const unsigned byte = 8 * (element / Row::kVector);
    const int unit = Row::unit(element);
    const float y = activity_of(read(unit), unit, at, competition);
    write_winner(args.p, position, static_cast<int>(rank >> byte & 0xff), unit, y, bad);
    rank += 1u << byte;
  }
}

}  // namespace
}  // namespace ghl
