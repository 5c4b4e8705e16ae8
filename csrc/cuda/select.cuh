// The k largest of a row by one warp that has the row in its registers.
//
// The k-th largest of the 32 lanes' maxima is a lower bound of the k-th largest unit. The few units that
// reach it move to one or two a lane, where those that are too many leave, the smallest value first. Where k
// is above 32, or more than 64 units reach the bound, the threshold is bisected in the registers instead.
// Rows of 16 bits are compared two elements at a time, and move only where a lane has more than two; where k
// is not far below 32, their bound is the k-th largest of the maxima of 64 halves of lanes.
#pragma once

#include <bit>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/dtype.cuh"

namespace ghl {

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7fffffff); }

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_index()) - 1; }

// The lanes that share a row: a warp's, or every kStride-th of a part of it. All lanes of the warp call every
// function together, each for its own row.
template <int kCount_, int kStride = 1>
struct Lanes {
  static constexpr int kCount = kCount_;
  static constexpr int kCountBits = std::countr_zero(static_cast<unsigned>(kCount));
  static constexpr bool kWhole = kCount == static_cast<int>(kWarp);
  static_assert(!kWhole || kStride == 1);

  static __device__ __forceinline__ unsigned index() { return lane_index() / kStride % kCount; }

  template <class T, class Fold>
  static __device__ __forceinline__ T fold(T value, Fold of) {
#pragma unroll
    for (int distance = kCount / 2; distance > 0; distance /= 2) {
      value = of(value, __shfl_xor_sync(kAllLanes, value, distance * kStride));
    }
    return value;
  }

  static __device__ __forceinline__ uint32_t max(uint32_t value) {
    if constexpr (kWhole) {
      return __reduce_max_sync(kAllLanes, value);
    } else {
      return fold(value, [](uint32_t a, uint32_t b) { return ::max(a, b); });
    }
  }
  static __device__ __forceinline__ uint32_t min(uint32_t value) {
    if constexpr (kWhole) {
      return __reduce_min_sync(kAllLanes, value);
    } else {
      return fold(value, [](uint32_t a, uint32_t b) { return ::min(a, b); });
    }
  }
  static __device__ __forceinline__ int min(int value) {
    if constexpr (kWhole) {
      return __reduce_min_sync(kAllLanes, value);
    } else {
      return fold(value, [](int a, int b) { return ::min(a, b); });
    }
  }
  static __device__ __forceinline__ int sum(int value) {
    if constexpr (kWhole) {
      return __reduce_add_sync(kAllLanes, value);
    } else {
      return fold(value, [](int a, int b) { return a + b; });
    }
  }
  static __device__ __forceinline__ float sum(float value) {
    return fold(value, [](float a, float b) { return a + b; });
  }
  // NaN where any is.
  static __device__ __forceinline__ float max_nan(float value) {
    return fold(value, [](float a, float b) { return ptx::max_nan_f32(a, b); });
  }

  // What the lanes before this one have, and it has itself.
  static __device__ __forceinline__ uint32_t inclusive_sum(uint32_t value) {
#pragma unroll
    for (int distance = 1; distance < kCount; distance *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(distance * kStride));
      if (static_cast<int>(index()) >= distance) value += before;
    }
    return value;
  }
  // What the last lane has.
  static __device__ __forceinline__ uint32_t last(uint32_t value) {
    return __shfl_sync(kAllLanes, value, static_cast<int>(lane_index() | (kCount - 1) * kStride));
  }

  // Whether a row of the warp is in a state that all its lanes agree on.
  static __device__ __forceinline__ bool in_any_row(bool state) {
    return kWhole ? state : __any_sync(kAllLanes, state) != 0;
  }
  static __device__ __forceinline__ bool in_every_row(bool state) {
    return kWhole ? state : __all_sync(kAllLanes, state) != 0;
  }
};

using WarpLanes = Lanes<static_cast<int>(kWarp)>;

// Unsigned integers in the order of the floats, NaN aside; -0 and 0 are one.
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

constexpr uint32_t kKeyOfMinusInfinity = 0x007fffffu;

// Of masks with a bit for each element of a lane.
__device__ __forceinline__ int count_of(uint32_t mask) { return __popc(mask); }
__device__ __forceinline__ int count_of(uint64_t mask) { return __popcll(mask); }
__device__ __forceinline__ int lowest_of(uint32_t mask) { return __ffs(static_cast<int>(mask)) - 1; }
__device__ __forceinline__ int lowest_of(uint64_t mask) { return __ffsll(static_cast<int64_t>(mask)) - 1; }
__device__ __forceinline__ int highest_of(uint32_t mask) { return 31 - __clz(static_cast<int>(mask)); }
__device__ __forceinline__ int highest_of(uint64_t mask) { return 63 - __clzll(static_cast<int64_t>(mask)); }

// Where the up to kElements_ units a lane of a row lie: a lane holds runs of kVector_ consecutive units.
// Elements beyond the last unit are -inf and follow it, so that none wins before a unit.
template <int kVector_, int kElements_, class Lanes_ = WarpLanes>
struct RowUnits {
  using Lanes = Lanes_;
  static constexpr int kVector = kVector_;
  static constexpr int kElements = kElements_;
  // elements that are skipped together where a row is shorter
  static constexpr int kChunk = kVector < 4 ? 4 : kVector;
  static_assert(kElements % kChunk == 0 && kElements <= 64);
  using Mask = std::conditional_t<(kElements > 32), uint64_t, uint32_t>;

  int units;

  // Ascending with the element.
  static __device__ __forceinline__ int unit(unsigned element) { return unit(element, Lanes::index()); }
  static __device__ __forceinline__ int unit(unsigned element, unsigned lane) {
    return static_cast<int>((element / kVector * Lanes::kCount + lane) * kVector + element % kVector);
  }

  // This lane's elements whose unit is at most `last`, which may be -1: a mask.
  static __device__ __forceinline__ Mask elements_up_to(int last) {
    const int run = last / kVector - static_cast<int>(Lanes::index());
    // may be negative
    const int whole = (run + Lanes::kCount - 1) >> Lanes::kCountBits;
    const int count = whole * kVector + ((run & (Lanes::kCount - 1)) == 0 ? last % kVector + 1 : 0);
    constexpr int kBits = 8 * sizeof(Mask);
    return last < 0 || count <= 0 ? Mask{0} : ~Mask{0} >> (kBits - count);
  }

  __device__ __forceinline__ bool has_chunk(int first) const {
    return first == 0 || first * Lanes::kCount < units;
  }
};

// What every form of a row has, from its `value(element)`.
template <class Row, int kVector, int kElements, class Lanes = WarpLanes>
struct RowOf : RowUnits<kVector, kElements, Lanes> {
  using Units = RowUnits<kVector, kElements, Lanes>;
  using typename Units::Mask;

  // run(element, value), the element a constant of the compiler.
  template <class Run>
  __device__ __forceinline__ void for_each(Run run) const {
#pragma unroll
    for (int first = 0; first < kElements; first += Units::kChunk) {
      if (!this->has_chunk(first)) break;
#pragma unroll
      for (int i = first; i < first + Units::kChunk; ++i) run(i, static_cast<const Row*>(this)->value(i));
    }
  }

  // The elements of which `wanted(value)` holds, one bit each.
  template <class Wanted>
  __device__ __forceinline__ Mask mask(Wanted wanted) const {
    Mask bits = 0;
    for_each([&](int i, float v) { bits |= wanted(v) ? Mask{1} << i : Mask{0}; });
    return bits;
  }
};

template <int kVector, int kElements>
struct WarpRow : RowOf<WarpRow<kVector, kElements>, kVector, kElements> {
  float element[kElements];

  __device__ __forceinline__ float value(int i) const { return element[i]; }
};

struct Cut {
  float threshold;  // the k-th largest value
  int32_t unit;     // the last unit that is among the k largest with this value
};

// The value of a key without its lowest bits, which are alike in all values of the dtype.
template <int kFreeBits>
__device__ __forceinline__ float value_above(uint32_t key) {
  return __uint_as_float(__float_as_uint(value_of(key)) & ~((1u << kFreeBits) - 1));
}

// A value that at least k elements of the row reach, from the largest of each of its lanes, which are no
// fewer than k. The lane's number in the lowest bits makes keys distinct, so that one leaves at a time, at
// the price of a slightly lower bound where they are not free. Of several rows, whose reductions need not
// wait for each other.
template <int kFreeBits, class Lanes = WarpLanes, int kRows>
__device__ __forceinline__ void bounds_of(const float (&lane_top)[kRows], int k, uint32_t (&bound)[kRows]) {
  constexpr uint32_t kLowest = kFreeBits < 5 ? 31u : (1u << kFreeBits) - 1;
  uint32_t key[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) key[row] = (key_of(lane_top[row]) & ~kLowest) | Lanes::index();
  if (k <= Lanes::kCount / 2) {
#pragma unroll 4
    for (int i = 1; i < k; ++i) {
#pragma unroll
      for (uint32_t& one : key) one = one == Lanes::max(one) ? 0 : one;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) bound[row] = Lanes::max(key[row]);
  } else {
#pragma unroll 4
    for (int i = k; i < Lanes::kCount; ++i) {
#pragma unroll
      for (uint32_t& one : key) one = one == Lanes::min(one) ? ~0u : one;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) bound[row] = Lanes::min(key[row]);
  }
#pragma unroll
  for (uint32_t& one : bound) one = max(one & ~kLowest, kKeyOfMinusInfinity);
}

template <int kFreeBits = 0, class Lanes = WarpLanes>
__device__ __forceinline__ uint32_t bound_of(float lane_top, int k) {
  uint32_t bound[1];
  bounds_of<kFreeBits, Lanes>({lane_top}, k, bound);
  return bound[0];
}

// Elements that the lanes can select among when they have moved to them.
constexpr int kListed = 2 * static_cast<int>(kWarp);

// A bound of -inf is reached by all elements, those beyond the last unit too. They must be too many to be
// listed, for what is listed is read from memory.
template <class Row>
constexpr bool kLeavesList = Row::kElements * static_cast<int>(kWarp) > kListed;

// The k-th largest of the first `count` entries of a list, kEach a lane. unit_of(entry) is its unit,
// read(unit) the value.
template <int kEach, class Unit, class Read>
__device__ __forceinline__ Cut cut_of_list(const unsigned* list, int count, int k, Unit unit_of, Read read) {
  uint32_t key[kEach];
  int unit[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int entry = i * static_cast<int>(kWarp) + static_cast<int>(lane_index());
    unit[i] = unit_of(entry < count ? list[entry] : 0);
    key[i] = entry < count ? key_of(read(unit[i])) : 0xffffffffu;
  }
  // before the next row's list
  __syncwarp();

  uint32_t smallest;
  int kept = count;
  while (true) {
    uint32_t least = key[0];
    for (int i = 1; i < kEach; ++i) least = min(least, key[i]);
    smallest = __reduce_min_sync(kAllLanes, least);
    int equal = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) equal += __popc(__ballot_sync(kAllLanes, key[i] == smallest));
    if (kept - equal < k) break;
    kept -= equal;
#pragma unroll
    for (int i = 0; i < kEach; ++i) key[i] = key[i] == smallest ? 0xffffffffu : key[i];
  }

  // of the equal ones the highest units leave
  int last = -1;
#pragma unroll 1
  for (; kept >= k; --kept) {
    int highest = -1;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (key[i] == smallest) highest = max(highest, unit[i]);
    }
    last = __reduce_max_sync(kAllLanes, highest);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (unit[i] == last) key[i] = 0xffffffffu;
    }
  }
  return {value_of(smallest), last};
}

// The elements of the masks, as element * kWarp + lane, into the list of the warp unless they are more than
// kListed; their number.
__device__ __forceinline__ int list_elements(uint32_t mask, unsigned* list) {
  const int count = __popc(mask);
  int through = count;
#pragma unroll
  for (int distance = 1; distance < static_cast<int>(kWarp); distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, through, static_cast<unsigned>(distance));
    if (static_cast<int>(lane_index()) >= distance) through += before;
  }
  const int total = __shfl_sync(kAllLanes, through, static_cast<int>(kWarp) - 1);
  if (total > kListed) return total;
#pragma unroll 1
  for (unsigned* slot = list + through - count; mask != 0; mask &= mask - 1) {
    *slot++ = static_cast<unsigned>(__ffs(static_cast<int>(mask)) - 1) * kWarp + lane_index();
  }
  __syncwarp();
  return total;
}

// The smallest of the row's elements that reach a value.
template <class Row>
__device__ __forceinline__ float least_reaching(const Row& row, float floor) {
  float least = infinity();
  row.for_each([&](int, float v) { least = v >= floor ? fminf(least, v) : least; });
  return value_of(Row::Lanes::min(key_of(least)));
}

// The k-th largest by halving the range of keys, whose lowest kFreeBits are alike in all values of the dtype.
template <int kFreeBits, class Row>
__device__ __forceinline__ float bisect_threshold(const Row& row, float lane_top, uint32_t bound, int k) {
  const auto floor_of = [](uint32_t key) { return value_of(max(key << kFreeBits, kKeyOfMinusInfinity)); };
  // at least k elements reach low, fewer reach high
  uint32_t low = bound >> kFreeBits;
  uint32_t high = (__reduce_max_sync(kAllLanes, key_of(lane_top)) >> kFreeBits) + 1;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const float floor = floor_of(middle);
    int count = 0;
    row.for_each([&](int, float v) { count += v >= floor; });
    count = __reduce_add_sync(kAllLanes, count);
    (count >= k ? low : high) = middle;
    if (count == k) break;
  }
  return least_reaching(row, floor_of(low));
}

// The unit up to which `count` of the elements in the masks lie.
template <class Row>
__device__ __forceinline__ int bisect_unit(const Row& row, typename Row::Mask mask, int count) {
  int low = -1, high = row.units - 1;
  while (Row::Lanes::in_any_row(high - low > 1)) {
    const int middle = low + (high - low) / 2;
    const int up_to = Row::Lanes::sum(count_of(mask & Row::elements_up_to(middle)));
    (up_to >= count ? high : low) = middle;
  }
  return high;
}

// The k-th largest by bisection; at least k elements reach the value of the bound.
template <int kFreeBits, class Row>
__device__ __forceinline__ Cut select_in_row(const Row& row, float lane_top, uint32_t bound, int k) {
  const float threshold = bisect_threshold<kFreeBits>(row, lane_top, bound, k);
  int above = 0;
  row.for_each([&](int, float v) { above += v > threshold; });
  above = __reduce_add_sync(kAllLanes, above);
  return {threshold, bisect_unit(row, row.mask([&](float v) { return v == threshold; }), k - above)};
}

// The k-th largest of a row without NaN, 1 <= k <= units. lane_top: the largest of this lane; read: the value
// of a unit, from memory; list: kListed words of shared memory that are the warp's own.
template <int kFreeBits, class Row, class Read>
__device__ __forceinline__ Cut select_kth(const Row& row, float lane_top, int k, Read read, unsigned* list) {
  static_assert(kLeavesList<Row> && sizeof(typename Row::Mask) == sizeof(uint32_t));
  uint32_t bound = kKeyOfMinusInfinity;
  if (k <= static_cast<int>(kWarp)) {
    bound = bound_of(lane_top, k);
    const float floor = value_of(bound);
    const int listed = list_elements(row.mask([&](float v) { return v >= floor; }), list);
    const auto unit_of = [](unsigned entry) { return Row::unit(entry / kWarp, entry % kWarp); };
    if (listed <= static_cast<int>(kWarp)) return cut_of_list<1>(list, listed, k, unit_of, read);
    if (listed <= kListed) return cut_of_list<2>(list, listed, k, unit_of, read);
  }
  return select_in_row<kFreeBits>(row, lane_top, bound, k);
}

// --- rows of 16-bit elements ----------------------------------------------------------------------

// Two elements of a word at once.
template <class T>
struct Pair;

template <>
struct Pair<bf16> {
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return ptx::max_nan_bf16x2(a, b); }
  static __device__ __forceinline__ float low(uint32_t word) { return __uint_as_float(word << 16); }
  static __device__ __forceinline__ float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  // of two values of the dtype
  static __device__ __forceinline__ uint32_t of(float low, float high) {
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
  }
  // of any two values
  static __device__ __forceinline__ uint32_t rounded(float low, float high) {
    return ptx::cvt_rn_bf16x2_f32(high, low);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static __device__ __forceinline__ uint32_t reaching(uint32_t a, uint32_t b) {
    return (low(a) >= low(b) ? 0xffffu : 0) | (high(a) >= high(b) ? 0xffff0000u : 0);
  }
  static __device__ __forceinline__ uint32_t above(uint32_t a, uint32_t b) {
    return (low(a) > low(b) ? 0xffffu : 0) | (high(a) > high(b) ? 0xffff0000u : 0);
  }
#else
  static __device__ __forceinline__ uint32_t reaching(uint32_t a, uint32_t b) {
    return ptx::set_ge_u32_bf16x2(a, b);
  }
  static __device__ __forceinline__ uint32_t above(uint32_t a, uint32_t b) {
    return ptx::set_gt_u32_bf16x2(a, b);
  }
#endif
};

template <>
struct Pair<f16> {
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return ptx::max_nan_f16x2(a, b); }
  static __device__ __forceinline__ float low(uint32_t word) {
    return ptx::cvt_f32_f16(static_cast<uint16_t>(word));
  }
  static __device__ __forceinline__ float high(uint32_t word) {
    return ptx::cvt_f32_f16(static_cast<uint16_t>(word >> 16));
  }
  static __device__ __forceinline__ uint32_t of(float low, float high) {
    return ptx::cvt_rn_f16x2_f32(high, low);
  }
  static __device__ __forceinline__ uint32_t rounded(float low, float high) { return of(low, high); }
  static __device__ __forceinline__ uint32_t reaching(uint32_t a, uint32_t b) {
    return ptx::set_ge_u32_f16x2(a, b);
  }
  static __device__ __forceinline__ uint32_t above(uint32_t a, uint32_t b) {
    return ptx::set_gt_u32_f16x2(a, b);
  }
};

// The larger of each half of the words, apart of the even and of the odd words; NaN where any is.
template <class T, int kWords>
__device__ __forceinline__ void largest_of(const uint32_t (&word)[kWords], uint32_t (&largest)[2]) {
  // several at a time, for they wait for each other
  constexpr int kAtOnce = 4;
  static_assert(kWords >= kAtOnce);
  uint32_t most[kAtOnce];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    most[i % kAtOnce] = i < kAtOnce ? word[i] : Pair<T>::max(most[i % kAtOnce], word[i]);
  }
  largest[0] = Pair<T>::max(most[0], most[2]);
  largest[1] = Pair<T>::max(most[1], most[3]);
}

template <class T, int kWords>
__device__ __forceinline__ uint32_t largest_of(const uint32_t (&word)[kWords]) {
  uint32_t largest[2];
  largest_of<T>(word, largest);
  return Pair<T>::max(largest[0], largest[1]);
}

// From this k on the maxima of lanes would let more than kListed units pass in every tenth row or more.
constexpr int kManyWinners = 27;

// As bounds_of, from two maxima of each lane.
template <int kFreeBits, int kRows>
__device__ __forceinline__ void close_bounds_of(const float (&half_top)[kRows][2], int k,
                                                uint32_t (&bound)[kRows]) {
  static_assert(kFreeBits >= 6);
  constexpr uint32_t kLowest = (1u << kFreeBits) - 1;
  uint32_t key[kRows][2];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (unsigned half = 0; half < 2; ++half) {
      key[row][half] = (key_of(half_top[row][half]) & ~kLowest) | (half * kWarp + lane_index());
    }
  }
#pragma unroll 2
  for (int i = 1; i < k; ++i) {
#pragma unroll
    for (auto& [low, high] : key) {
      const uint32_t top = __reduce_max_sync(kAllLanes, max(low, high));
      low = low == top ? 0 : low;
      high = high == top ? 0 : high;
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const uint32_t top = __reduce_max_sync(kAllLanes, max(key[row][0], key[row][1]));
    bound[row] = max(top & ~kLowest, kKeyOfMinusInfinity);
  }
}

// Words whose elements a mask of 32 bits has.
constexpr int kMaskWords = 16;

// Which of the first `words` words reach the bound, or of kMaskWords: a bit each, of the lower halves from
// bit 0, of the upper from 16.
template <class T>
__device__ __forceinline__ uint32_t reaching_mask(const uint32_t* word, int words, uint32_t bound) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kMaskWords; ++i) {
    if (i < words) bits |= Pair<T>::reaching(word[i], bound) & (0x00010001u << i);
  }
  return bits;
}

// Elements of a lane that selection looks at.
constexpr int kMine = kListed / static_cast<int>(kWarp);

// The k largest of a position.
struct Chosen {
  float threshold;
  int32_t cut;
  bool listed;  // every winner is in a lane, below
  bool ties;    // some unit may equal the threshold and not win
  // this lane's
  uint32_t key[kMine];  // ~0 unless it wins
  int unit[kMine];
  float value[kMine];

  __device__ __forceinline__ bool wins(int i) const { return key[i] != ~0u; }
};

__device__ __forceinline__ Chosen none_chosen() {
  return {0.0f, 0, false, true, {~0u, ~0u}, {0, 0}, {0.0f, 0.0f}};
}

// All above the threshold, and its equals up to the cut, wherever they are.
__device__ __forceinline__ Chosen chosen_by(const Cut& cut) {
  Chosen chosen = none_chosen();
  chosen.threshold = cut.threshold;
  chosen.cut = cut.unit;
  return chosen;
}

// The bits of the masks into the list of the warp, as bit * kWarp + lane, unless they are more than kListed;
// their number. Lanes have few bits each.
template <class Mask>
__device__ __forceinline__ int list_bits(Mask mask, unsigned* list) {
  int listed = 0, next;
  unsigned lanes = __ballot_sync(kAllLanes, mask != 0);
#pragma unroll 1
  do {
    next = listed + __popc(lanes);
    if (mask != 0) {
      const unsigned bit = static_cast<unsigned>(highest_of(mask));
      list[listed + __popc(lanes & lanes_below())] = bit * kWarp + lane_index();
      mask ^= Mask{1} << bit;
    }
    listed = next;
    lanes = __ballot_sync(kAllLanes, mask != 0);
  } while (lanes != 0 && listed + __popc(lanes) <= kListed);
  __syncwarp();
  return lanes != 0 ? kListed + 1 : listed;
}

// The k-th largest of `count` units, of which this lane has those that are not negative. Keys end with the
// unit, so that they are distinct and the lowest of equal ones is the greatest.
template <int kFreeBits, class Read>
__device__ __forceinline__ Chosen choose_among(const int (&unit)[kMine], int count, int k, Read read) {
  Chosen chosen;
  constexpr uint32_t kLowest = (1u << kFreeBits) - 1;
  uint32_t key[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    chosen.unit[i] = unit[i];
    chosen.value[i] = 0.0f;
    key[i] = ~0u;
    if (unit[i] >= 0) {
      chosen.value[i] = read(unit[i]);
      key[i] = (key_of(chosen.value[i]) | kLowest) - static_cast<uint32_t>(unit[i]);
    }
  }
  uint32_t left = 0;
#pragma unroll 1
  for (int more = count - k; more > 0; --more) {
    left = __reduce_min_sync(kAllLanes, min(key[0], key[1]));
#pragma unroll
    for (int i = 0; i < kMine; ++i) key[i] = key[i] == left ? ~0u : key[i];
  }
  const uint32_t last = __reduce_min_sync(kAllLanes, min(key[0], key[1]));
  chosen.threshold = value_above<kFreeBits>(last);
  chosen.cut = static_cast<int32_t>(~last & kLowest);
  chosen.listed = true;
  chosen.ties = ((left ^ last) & ~kLowest) == 0;
#pragma unroll
  for (int i = 0; i < kMine; ++i) chosen.key[i] = key[i];
  return chosen;
}

// Of the row of a position without NaN. unit_of(bit, lane) is the unit of a bit of the mask, which has those
// that reach the bound, where k is at most kWarp; read as of select_kth.
template <int kFreeBits, class Row, class Unit, class Read>
__device__ __forceinline__ Chosen choose(const Row& row, float lane_top, uint32_t bound,
                                         typename Row::Mask mask, int k, Unit unit_of, Read read,
                                         unsigned* list) {
  static_assert(kMine == 2 && kLeavesList<Row>);
  constexpr unsigned kBits = 8 * sizeof(mask);
  int count = kListed + 1;
  if (k <= static_cast<int>(kWarp)) {
    // mostly no lane has more than kMine
    int unit[kMine];
    typename Row::Mask rest = mask;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const unsigned bit = static_cast<unsigned>(highest_of(rest));
      unit[i] = rest != 0 ? unit_of(bit, lane_index()) : -1;
      rest &= ~(typename Row::Mask{1} << bit % kBits);
    }
    if (!__any_sync(kAllLanes, rest != 0)) {
      count = __reduce_add_sync(kAllLanes, count_of(mask));
    } else {
      count = list_bits(mask, list);
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int entry = i * static_cast<int>(kWarp) + static_cast<int>(lane_index());
        unit[i] = entry < count && count <= kListed ? unit_of(list[entry] / kWarp, list[entry] % kWarp) : -1;
      }
      // before the next row's list
      __syncwarp();
    }
    if (count <= kListed) return choose_among<kFreeBits>(unit, count, k, read);
  }
  return chosen_by(select_in_row<kFreeBits>(row, lane_top, bound, k));
}

}  // namespace ghl
