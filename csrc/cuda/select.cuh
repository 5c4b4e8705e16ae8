// The k largest of a row by one warp that has the row in its registers.
//
// The k-th largest of the 32 lanes' maxima is a lower bound of the k-th largest unit. The few units that
// reach it move to one or two a lane, where those that are too many leave, the smallest value first. Where k
// is above 32, or more than 64 units reach the bound, the threshold is bisected in the registers instead.
#pragma once

#include "cuda/device.cuh"

namespace ghl {

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7fffffff); }

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_index()) - 1; }

// Unsigned integers in the order of the floats, NaN aside; -0 and 0 are one.
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

constexpr uint32_t kKeyOfMinusInfinity = 0x007fffffu;

// Up to kWarp * kElements_ units; elements beyond the last unit are -inf and follow it, so that none wins
// before a unit. A lane holds runs of kVector_ consecutive units.
template <int kVector_, int kElements_>
struct WarpRow {
  static constexpr int kVector = kVector_;
  static constexpr int kElements = kElements_;
  // elements that are skipped together where a row is shorter
  static constexpr int kChunk = kVector < 4 ? 4 : kVector;
  static_assert(kElements % kChunk == 0 && kElements <= 32);

  float value[kElements];
  int units;

  // Ascending with the element.
  static __device__ __forceinline__ int unit(unsigned element) { return unit(element, lane_index()); }
  static __device__ __forceinline__ int unit(unsigned element, unsigned lane) {
    return static_cast<int>((element / kVector * kWarp + lane) * kVector + element % kVector);
  }

  // This lane's elements whose unit is at most `last`, which may be -1: a mask.
  static __device__ __forceinline__ uint32_t elements_up_to(int last) {
    const int run = last / kVector - static_cast<int>(lane_index());
    const int whole = (run + static_cast<int>(kWarp) - 1) >> 5;
    const int count = whole * kVector + ((run & 31) == 0 ? last % kVector + 1 : 0);
    return last < 0 || count <= 0 ? 0u : 0xffffffffu >> (32 - count);
  }

  __device__ __forceinline__ bool has_chunk(int first) const {
    return first == 0 || first * static_cast<int>(kWarp) < units;
  }

  // run(element, value), the element a constant of the compiler.
  template <class Run>
  __device__ __forceinline__ void for_each(Run run) const {
#pragma unroll
    for (int first = 0; first < kElements; first += kChunk) {
      if (!has_chunk(first)) break;
#pragma unroll
      for (int i = first; i < first + kChunk; ++i) run(i, value[i]);
    }
  }

  // The elements of which `wanted(value)` holds, one bit each.
  template <class Wanted>
  __device__ __forceinline__ uint32_t mask(Wanted wanted) const {
    uint32_t bits = 0;
    for_each([&](int i, float v) { bits |= wanted(v) ? 1u << i : 0u; });
    return bits;
  }
};

struct Cut {
  float threshold;  // the k-th largest value
  int32_t unit;     // the last unit that is among the k largest with this value
};

// A value that at least k elements of the warp reach, from the largest of each lane; k <= 32. The lane's
// number in the lowest bits makes keys distinct, so that one leaves at a time, at the price of a slightly
// lower bound.
__device__ __forceinline__ uint32_t bound_of(float lane_top, int k) {
  uint32_t key = (key_of(lane_top) & ~31u) | lane_index();
  uint32_t bound;
  if (k <= 16) {
#pragma unroll 4
    for (int i = 1; i < k; ++i) {
      if (key == __reduce_max_sync(kAllLanes, key)) key = 0;
    }
    bound = __reduce_max_sync(kAllLanes, key);
  } else {
#pragma unroll 4
    for (int i = k; i < 32; ++i) {
      if (key == __reduce_min_sync(kAllLanes, key)) key = 0xffffffffu;
    }
    bound = __reduce_min_sync(kAllLanes, key);
  }
  return max(bound & ~31u, kKeyOfMinusInfinity);
}

// Elements that the lanes can select among when they have moved to them.
constexpr int kListed = 2 * static_cast<int>(kWarp);

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
  const float floor = floor_of(low);
  float least = infinity();
  row.for_each([&](int, float v) { least = v >= floor ? fminf(least, v) : least; });
  return value_of(__reduce_min_sync(kAllLanes, key_of(least)));
}

// The unit up to which `count` of the elements in the masks lie.
template <class Row>
__device__ __forceinline__ int bisect_unit(const Row& row, uint32_t mask, int count) {
  int low = -1, high = row.units - 1;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    const int up_to = __reduce_add_sync(kAllLanes, __popc(mask & Row::elements_up_to(middle)));
    (up_to >= count ? high : low) = middle;
  }
  return high;
}

// The k-th largest of a row without NaN, 1 <= k <= units. lane_top: the largest of this lane; read: the value
// of a unit, from memory; list: kListed words of shared memory that are the warp's own.
template <int kFreeBits, class Row, class Read>
__device__ __forceinline__ Cut select_kth(const Row& row, float lane_top, int k, Read read, unsigned* list) {
  uint32_t bound = kKeyOfMinusInfinity;
  if (k <= static_cast<int>(kWarp)) {
    bound = bound_of(lane_top, k);
    const float floor = value_of(bound);
    const int listed = list_elements(row.mask([&](float v) { return v >= floor; }), list);
    const auto unit_of = [](unsigned entry) { return Row::unit(entry / kWarp, entry % kWarp); };
    if (listed <= static_cast<int>(kWarp)) return cut_of_list<1>(list, listed, k, unit_of, read);
    if (listed <= kListed) return cut_of_list<2>(list, listed, k, unit_of, read);
  }
  const float threshold = bisect_threshold<kFreeBits>(row, lane_top, bound, k);
  int above = 0;
  row.for_each([&](int, float v) { above += v > threshold; });
  above = __reduce_add_sync(kAllLanes, above);
  return {threshold, bisect_unit(row, row.mask([&](float v) { return v == threshold; }), k - above)};
}

}  // namespace ghl
