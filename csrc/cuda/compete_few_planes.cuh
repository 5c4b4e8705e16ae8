// Planes of few units of 16 bits: a lane has a quarter of the units of two positions, which are a word, and
// eight lanes beside each other read 32 bytes. No shared memory.
#pragma once

#include "cuda/compete_few.cuh"

namespace ghl {
namespace {

using ColumnLanes = Lanes<4, 8>;
constexpr int kWordsOfWarp = static_cast<int>(kWarp) / ColumnLanes::kCount;

// One of the two positions of words.
template <class T, int kElements>
struct FewColumn : RowOf<FewColumn<T, kElements>, kElements, kElements, ColumnLanes> {
  using Mask = typename RowUnits<kElements, kElements, ColumnLanes>::Mask;
  static_assert(sizeof(Mask) == sizeof(uint32_t));
  uint32_t word[kElements];
  int half;

  __device__ __forceinline__ float value(int i) const { return half_of(word[i]); }
  __device__ __forceinline__ float half_of(uint32_t pair) const { return Pair<T>::low(pair >> 16 * half); }

  // How many of this lane's elements reach a value of the dtype.
  __device__ __forceinline__ int count_reaching(float value) const { return __popc(reaching(value)); }

  // The elements that do, and those that equal it, one bit each.
  __device__ __forceinline__ Mask reaching(float value) const {
    const uint32_t pair = Pair<T>::of(value, value);
    Mask bits = 0;
#pragma unroll
    for (int i = 0; i < kElements; i += kMaskWords) {
      const uint32_t both = reaching_mask<T>(word + i, kElements - i, pair);
      bits |= (both >> 16 * half & 0xffffu) << i;
    }
    return bits;
  }
  __device__ __forceinline__ Mask equal_to(float other) const {
    return this->mask([&](float v) { return v == other; });
  }
};

// The two positions of the words of a lane.
struct PairPlace {
  int64_t item, within;
  bool exists;
};

__device__ __forceinline__ PairPlace pair_place(const CompeteParams& p, int64_t tile) {
  constexpr int kPositions = 2 * kWordsOfWarp;
  const int64_t tiles = divide_up<int64_t>(p.positions, kPositions);
  const Place place = place_among(tile, tiles);
  const int64_t within = place.within * kPositions + 2 * (lane_index() % kWordsOfWarp);
  return {place.item, within, place.item < p.batch && within < p.positions};
}

// From u in memory, which has it at hand still: from registers it would take twice as many.
template <int kElements, class T>
__device__ __forceinline__ void write_columns(const T* u, const PositionState (&at)[2],
                                              const CompeteArgs& args, T* y) {
  const CompeteParams& p = args.p;
  const int first = static_cast<int>(ColumnLanes::index()) * kElements;
  const int end = min(first + kElements, static_cast<int>(p.units));
  const T* source = u + first * p.u_layout.stride_unit;
  T* target = y + first * p.y_layout.stride_unit;
  by_competition(args, [&](const Competition& competition) {
#pragma unroll 4
    for (int unit = first; unit < end; ++unit) {
      const uint32_t pair = __ldg(reinterpret_cast<const uint32_t*>(source));
      const float low = activity_of(Pair<T>::low(pair), unit, at[0], competition);
      const float high = activity_of(Pair<T>::high(pair), unit, at[1], competition);
      *reinterpret_cast<uint32_t*>(target) = Pair<T>::rounded(low, high);
      source += p.u_layout.stride_unit;
      target += p.y_layout.stride_unit;
    }
  });
}

// The winners' own values.
template <class T, int kElements>
__device__ __forceinline__ void write_winning_columns(const uint32_t (&word)[kElements],
                                                      const PositionState (&at)[2], const CompeteArgs& args,
                                                      T* y) {
  const uint32_t threshold = Pair<T>::of(at[0].threshold, at[1].threshold);
  const uint32_t nan = (at[0].threshold != at[0].threshold ? 0x7fffu : 0u) |
                       (at[1].threshold != at[1].threshold ? 0x7fff0000u : 0u);
  const int first = static_cast<int>(ColumnLanes::index()) * kElements;
  T* target = y + first * args.p.y_layout.stride_unit;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int unit = first + i;
    if (unit >= static_cast<int>(args.p.units)) break;
    const uint32_t wins_ties = (unit <= at[0].cut ? 0xffffu : 0u) | (unit <= at[1].cut ? 0xffff0000u : 0u);
    const uint32_t wins =
        Pair<T>::above(word[i], threshold) | (Pair<T>::reaching(word[i], threshold) & wins_ties);
    *reinterpret_cast<uint32_t*>(target) = (word[i] & wins) | nan;
    target += args.p.y_layout.stride_unit;
  }
}

// Blocks of a multiprocessor at once.
template <class T, int kElements, bool kStateOnly>
constexpr int kFewPlaneBlocks = (kElements == 32   ? 2
                                 : kElements == 24 ? 3
                                                   : 4) -
                                kIsWide<T> + kStateOnly;

// kStateOnly: neither activities nor lists are asked for.
template <class T, int kElements, bool kStateOnly>
__global__ void __launch_bounds__(kCompeteThreads, (kFewPlaneBlocks<T, kElements, kStateOnly>))
    few_planes_kernel(const __grid_constant__ CompeteArgs args) {
  const CompeteParams& p = args.p;
  const int units = static_cast<int>(p.units), part = static_cast<int>(ColumnLanes::index());
  const PairPlace place = pair_place(p, static_cast<int64_t>(blockIdx.x) * kCompeteWarps + warp_index());
  const T* u = static_cast<const T*>(p.u) + offset_of(p.u_layout, {place.item, place.within});

  FewColumn<T, kElements> row;
  row.units = units;
  const T* from = u + part * kElements * p.u_layout.stride_unit;
  const int left = place.exists ? units - part * kElements : 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    row.word[i] = minus_infinities<T>();
    if (i < left) row.word[i] = __ldg(reinterpret_cast<const uint32_t*>(from));
    from += p.u_layout.stride_unit;
  }

  const uint32_t lane_top = largest_of<T>(row.word);
  const uint32_t top = ColumnLanes::fold(lane_top, [](uint32_t a, uint32_t b) { return Pair<T>::max(a, b); });
  uint32_t* const field = field_pointer(p, ColumnLanes::index());
  PositionState states[2];
#pragma unroll 1
  for (row.half = 0; row.half < 2; ++row.half) {
    const PositionState at = compete_few<T>(row, row.half_of(lane_top), row.half_of(top), args);
    const int64_t position = place.item * p.positions + place.within + row.half;
    if (field && place.exists) field[position] = field_of(at, ColumnLanes::index());
    if (!kStateOnly && (p.winner_unit || p.winner_activity)) {
      const auto read = [&](int unit) { return to_float(u[unit * p.u_layout.stride_unit + row.half]); };
      write_winners_of_few(row, args, place.exists, position, at, read);
    }
    // not by the number, which would be memory's
    states[0] = row.half == 0 ? at : states[0];
    states[1] = at;
  }
  if (kStateOnly || !p.y || !place.exists) return;
  const int64_t offset = offset_of(p.y_layout, {place.item, place.within});
  T* y = static_cast<T*>(p.y) + offset;
  if (copies_winners(competition_of(args))) {
    write_winning_columns(row.word, states, args, y);
  } else {
    write_columns<kElements>(u, states, args, y);
  }
}

template <class T, int kElements>
Status launch_few_planes(const CompeteArgs& args, Stream stream) {
  const CompeteParams& p = args.p;
  const int64_t tiles = p.batch * divide_up<int64_t>(p.positions, 2 * kWordsOfWarp);
  const auto kernel =
      wants_state_only(p) ? few_planes_kernel<T, kElements, true> : few_planes_kernel<T, kElements, false>;
  return launch("", kernel, {divide_up<int64_t>(tiles, kCompeteWarps), kCompeteThreads, 0}, stream, args);
}

}  // namespace
}  // namespace ghl
