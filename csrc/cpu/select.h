// The winners among the units of one group, [units][16 positions], exactly and without sorting: few are
// kept in registers by a merging network of min and max; many are found by bisection on the order of the
// floats' bit patterns.
#pragma once

#include <limits>

#include "cpu/simd.h"

namespace ghl::GHL_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Up to here the network is faster than bisection (measured; its cost grows with the winners).
constexpr int64_t kNetworkWinners = 64;

// ---- Memory that is wanted next ----

// The runs of positions of a tile, unit by unit or row by row, in pieces of one group's positions.
struct Stream {
  const char* at;  // the next piece
  int64_t piece;   // bytes
  int64_t skip;    // bytes from the end of a run to the next
};

// What is fetched while the units of a group are compared: arithmetic alone would leave the memory idle.
// The second-level cache takes it, since the group fills the first. Piece after piece of a run, so that the
// hardware sees neighbors and fetches more of them by itself than a core has buffers for.
struct Ahead {
  Stream u{};
  Stream y{};
  int64_t pieces = 0;  // of a run; none: nothing is fetched
  int64_t left = 0;    // of the run begun

  // Once a unit.
  GHL_INLINE void fetch() {
    if (pieces == 0) return;
    __builtin_prefetch(u.at, 0, 2);
    __builtin_prefetch(y.at, 1, 2);
    u.at += u.piece;
    y.at += y.piece;
    if (--left > 0) return;
    left = pieces;
    u.at += u.skip;
    y.at += y.skip;
  }
};

// ---- The extremes of the units ----

struct Extremes {
  Floats largest;
  Mask nan;  // where a unit is NaN; the largest means nothing there
};

Extremes find_extremes(const float* group, int64_t units, Ahead ahead) {
  Extremes extremes{load(group), none()};
  for (int64_t n = 0; n < units; ++n) {
    ahead.fetch();
    const Floats u = load(group + n * kLanes);
    extremes.largest = max(extremes.largest, u);
    extremes.nan = extremes.nan | is_nan(u);
  }
  return extremes;
}

Floats find_smallest(const float* group, int64_t units) {
  Floats smallest = load(group);
  for (int64_t n = 1; n < units; ++n) smallest = min(smallest, load(group + n * kLanes));
  return smallest;
}

// ---- Winners: u > threshold, and the first `ties` units with u == threshold ----

struct Selection {
  Floats threshold;  // the k-th largest
  Ints ties;         // may exceed the number of units at the threshold
};

GHL_INLINE void order(PartF& high, PartF& low) {
  const PartF larger = max(high, low);
  low = min(high, low);
  high = larger;
}

// Batcher's odd-even merge sort, descending, unrolled by the compiler. K. E. Batcher, "Sorting networks
// and their applications", AFIPS 1968.
template <int first, int count, int step, int K>
GHL_INLINE void merge_halves(PartF (&v)[K]) {
  if constexpr (2 * step < count) {
    merge_halves<first, count, 2 * step>(v);
    merge_halves<first + step, count, 2 * step>(v);
#pragma GCC unroll 64
    for (int i = first + step; i + step < first + count; i += 2 * step) order(v[i], v[i + step]);
  } else {
    order(v[first], v[first + step]);
  }
}

template <int first, int count, int K>
GHL_INLINE void sort(PartF (&v)[K]) {
  if constexpr (count > 1) {
    sort<first, count / 2>(v);
    sort<first + count / 2, count / 2>(v);
    merge_halves<first, count, 1>(v);
  }
}

// A bitonic sequence (it rises, then falls, or is a rotation of one that does) into descending order.
template <int first, int count, int K>
GHL_INLINE void sort_bitonic(PartF (&v)[K]) {
  if constexpr (count > 1) {
#pragma GCC unroll 64
    for (int i = first; i < first + count / 2; ++i) order(v[i], v[i + count / 2]);
    sort_bitonic<first, count / 2>(v);
    sort_bitonic<first + count / 2, count / 2>(v);
  }
}

// Sorts a batch of K and merges it into the K largest so far, which stay in descending order.
template <int K>
GHL_INLINE void merge_batch(PartF (&batch)[K], PartF (&top)[K]) {
  sort<0, K>(batch);
#pragma GCC unroll 64
  for (int i = 0; i < K; ++i) top[i] = max(top[i], batch[K - 1 - i]);
  sort_bitonic<0, K>(top);
}

// The K largest of one part of the lanes, in descending order, to list[K][16]; NaN to nan[16] where a unit
// is NaN (the list means nothing there).
template <int K>
void network_part(const float* group, int64_t units, float* list, float* nan, Ahead ahead) {
  PartF top[K];
  PartF batch[K];
  PartF bad = {};
#pragma GCC unroll 64
  for (int i = 0; i < K; ++i) top[i] = PartF{} - kInfinity;
  int64_t n = 0;
  for (; n + K <= units; n += K) {
#pragma GCC unroll 64
    for (int i = 0; i < K; ++i) {
      ahead.fetch();
      batch[i] = load_part(group + (n + i) * kLanes);
      bad = batch[i] == batch[i] ? bad : batch[i];
    }
    merge_batch<K>(batch, top);
  }
  if (n < units) {
    for (int i = 0; i < K; ++i) {
      batch[i] = n + i < units ? load_part(group + (n + i) * kLanes) : PartF{} - kInfinity;
      bad = batch[i] == batch[i] ? bad : batch[i];
    }
    merge_batch<K>(batch, top);
  }
#pragma GCC unroll 64
  for (int i = 0; i < K; ++i) store_part(list + i * kLanes, top[i]);
  store_part(nan, bad);
}

template <int K>
Selection select_by_network(const float* group, int64_t units, int64_t winners, const Ahead& ahead,
                            Extremes& extremes) {
  float list[K * kLanes];
  float nan[kLanes];
  for (int lane = 0; lane < kLanes; lane += kWidth) {
    network_part<K>(group + lane, units, list + lane, nan + lane, lane == 0 ? ahead : Ahead{});
  }
  extremes = {load(list), is_nan(load(nan))};
  const Floats threshold = load(list + (winners - 1) * kLanes);
  Ints above = broadcast(int32_t{0});
  for (int64_t i = 0; i < winners; ++i) above = increment(load(list + i * kLanes) > threshold, above);
  return {threshold, broadcast(static_cast<int32_t>(winners)) - above};
}

Selection select_few(const float* group, int64_t units, int64_t winners, const Ahead& ahead,
                     Extremes& extremes) {
  if (winners <= 1) return select_by_network<1>(group, units, winners, ahead, extremes);
  if (winners <= 2) return select_by_network<2>(group, units, winners, ahead, extremes);
  if (winners <= 4) return select_by_network<4>(group, units, winners, ahead, extremes);
  if (winners <= 8) return select_by_network<8>(group, units, winners, ahead, extremes);
  if (winners <= 16) return select_by_network<16>(group, units, winners, ahead, extremes);
  if (winners <= 32) return select_by_network<32>(group, units, winners, ahead, extremes);
  return select_by_network<64>(group, units, winners, ahead, extremes);
}

// Integers in the order of the floats; the low bits that are zero in every float are dropped, which
// shortens the bisection of bfloat16 to sixteen steps. -0.0 is one below 0.0, which does no harm: both
// stand for the same set of units, so the bisection never ends between them.
template <int dropped_bits>
GHL_INLINE Ints order_key(Floats u) {
  const Ints bits = float_bits(u);
  const Ints flipped = bits ^ shift_right_unsigned<1>(shift_right_signed<31>(bits));
  return shift_right_signed<dropped_bits>(flipped);
}

template <int dropped_bits>
GHL_INLINE Floats float_of_key(Ints key) {
  const Ints low_bits = broadcast(int32_t{(1 << dropped_bits) - 1});
  const Ints negative = shift_right_signed<31>(key);
  const Ints flipped = shift_left<dropped_bits>(key) | (negative & low_bits);
  return floats_from_bits(flipped ^ shift_right_unsigned<1>(negative));
}

Ints count_at_least(const float* group, int64_t units, Floats pivot) {
  Ints count = broadcast(int32_t{0});
  for (int64_t n = 0; n < units; ++n) count = increment(load(group + n * kLanes) >= pivot, count);
  return count;
}

Floats smallest_at_least(const float* group, int64_t units, Floats pivot) {
  Floats smallest = broadcast(kInfinity);
  for (int64_t n = 0; n < units; ++n) {
    const Floats u = load(group + n * kLanes);
    smallest = min(smallest, select(u >= pivot, u, broadcast(kInfinity)));
  }
  return smallest;
}

// Invariant: at least `winners` units are >= low, and `above` < winners are >= high. A lane is done when
// low and high are neighbors (low is the threshold), or as soon as exactly the winners are >= low. It then
// stays as it is while others go on; so does a lane with a NaN, for which nothing of this holds.
template <int dropped_bits>
Selection select_by_bisection(const float* group, int64_t units, int64_t winners, const Extremes& extremes) {
  const Ints one = broadcast(int32_t{1});
  const Ints wanted = broadcast(static_cast<int32_t>(winners));
  Ints low = select(extremes.nan, one, order_key<dropped_bits>(find_smallest(group, units)));
  Ints high = select(extremes.nan, one, order_key<dropped_bits>(extremes.largest)) + one;
  Ints above = broadcast(int32_t{0});
  const Mask numbers = ~extremes.nan;
  while (!all(high - low == one)) {
    const Ints middle = low + shift_right_unsigned<1>(high - low);
    const Ints count = count_at_least(group, units, float_of_key<dropped_bits>(middle));
    const Mask too_few = (wanted > count) & numbers;
    const Mask exact = wanted == count;
    low = select(too_few, low, middle);
    high = select(too_few, middle, select(exact, middle + one, high));
    above = select(too_few, count, select(exact, broadcast(int32_t{0}), above));
  }
  const Floats threshold = smallest_at_least(group, units, float_of_key<dropped_bits>(low));
  return {threshold, wanted - above};
}

// winners counts from 1; bfloat16 says that every u is a bfloat16 number.
// The extremes are found on the way: the network passes over all units anyhow, the bisection starts from
// them.
Selection select_winners(const float* group, int64_t units, int64_t winners, bool bfloat16,
                         const Ahead& ahead, Extremes& extremes) {
  Selection selection;
  if (winners <= kNetworkWinners) {
    selection = select_few(group, units, winners, ahead, extremes);
  } else {
    extremes = find_extremes(group, units, ahead);
    selection = bfloat16 ? select_by_bisection<16>(group, units, winners, extremes)
                         : select_by_bisection<0>(group, units, winners, extremes);
  }
  selection.threshold = select(extremes.nan, quiet_nan(), selection.threshold);
  return selection;
}

// Walks over the units in ascending order, which is what gives the lowest of equal units the win.
class Referee {
 public:
  GHL_INLINE explicit Referee(const Selection& selection) : selection_(selection) {}

  GHL_INLINE bool anyone_wins(Floats u) const { return any(u >= selection_.threshold); }

  // The lanes in which the next unit wins; units for which anyone_wins is false may be left out.
  GHL_INLINE Mask winners(Floats u) {
    // every unit at the threshold is counted, the ties that lose too: one addition is then all that the
    // next unit waits for
    const Mask level = u == selection_.threshold;
    tie_ = level & (selection_.ties > seen_);
    seen_ = increment(level, seen_);
    return (u > selection_.threshold) | tie_;
  }

  // The lanes in which that unit won by a tie.
  GHL_INLINE Mask ties() const { return tie_; }

 private:
  Selection selection_;
  Ints seen_ = broadcast(int32_t{0});
  Mask tie_ = none();
};

}  // namespace
}  // namespace ghl::GHL_ISA
