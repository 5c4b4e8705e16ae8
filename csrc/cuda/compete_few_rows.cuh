// Rows of few units: eight lanes a row, four rows a warp, and four rows ahead.
#pragma once

#include "cuda/compete_few.cuh"
#include "cuda/compete_rows.cuh"

namespace ghl {
namespace {

using RowLanes = Lanes<8>;
constexpr int kRowsOfWarp = static_cast<int>(kWarp) / RowLanes::kCount;

template <class T, int kElements>
struct FewRow : MemoryRow<T, kElements, RowLanes> {
  using Loaded = MemoryRow<T, kElements, RowLanes>;
  using Loaded::kWords;
  using typename Loaded::Mask;
  static_assert(sizeof(Mask) == sizeof(uint32_t));

  // How many of this lane's elements reach a value of the dtype.
  __device__ __forceinline__ int count_reaching(float value) const {
    if constexpr (sizeof(T) == 4) {
      return __popc(reaching(value));
    } else {
      return __popc(words_reaching(value));
    }
  }

  // The elements that do, and those that equal it, one bit each.
  __device__ __forceinline__ Mask reaching(float value) const {
    if constexpr (sizeof(T) == 4) {
      return this->mask([&](float v) { return v >= value; });
    } else {
      return in_order(words_reaching(value));
    }
  }
  __device__ __forceinline__ Mask equal_to(float value) const {
    if constexpr (sizeof(T) == 4) {
      return this->mask([&](float v) { return v == value; });
    } else {
      return in_order(words_reaching(value) & ~words_above(value));
    }
  }

 private:
  __device__ __forceinline__ uint32_t words_reaching(float value) const {
    return reaching_mask<T>(this->word, kWords, Pair<T>::of(value, value));
  }
  __device__ __forceinline__ uint32_t words_above(float value) const {
    const uint32_t pair = Pair<T>::of(value, value);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) bits |= Pair<T>::above(this->word[i], pair) & (0x00010001u << i);
    return bits;
  }

  // Of the lower halves' bits and the upper ones', as reaching_mask has them, a bit of each in turn.
  static __device__ __forceinline__ uint32_t in_order(uint32_t halves) {
    static_assert(kWords <= 8);
    halves = (halves | halves << 4) & 0x0f0f0f0fu;
    halves = (halves | halves << 2) & 0x33333333u;
    halves = (halves | halves << 1) & 0x55555555u;
    return (halves | halves >> 15) & 0xffffu;
  }
};

// Blocks of a multiprocessor at once, whose registers are enough to keep memory busy.
template <class T, int kElements, bool kStateOnly>
constexpr int kFewRowBlocks = sizeof(T) == 4   ? 3 + kStateOnly
                              : kIsWide<T>     ? 3 + kStateOnly
                              : kElements < 16 ? 4 + 2 * kStateOnly
                                               : 4 + kStateOnly;

// kStateOnly: neither activities nor lists are asked for.
template <class T, int kElements, bool kStateOnly>
__global__ void __launch_bounds__(kCompeteThreads, (kFewRowBlocks<T, kElements, kStateOnly>))
    few_rows_kernel(const __grid_constant__ CompeteArgs args) {
  const CompeteParams& p = args.p;
  const int units = static_cast<int>(p.units);
  const int64_t positions = p.batch * p.positions;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kCompeteWarps * kRowsOfWarp;
  const int64_t source_step = step * p.u_layout.stride_position;
  const auto source_of = [&](int64_t at) {
    return static_cast<const T*>(p.u) + offset_of(p.u_layout, place_of(p, at)) +
           FewRow<T, kElements>::unit(0);
  };
  uint32_t* const field = field_pointer(p, RowLanes::index());

  // the same in all lanes of the warp
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kCompeteWarps + warp_index()) * kRowsOfWarp;
  if (first >= positions) return;
  int64_t position = first + lane_index() / RowLanes::kCount;
  const T* source = source_of(position);
  FewRow<T, kElements> following;
  following.units = units;
  following.load(source, position < positions ? units : 0, args.u_vectors);
  while (true) {
    const FewRow<T, kElements> row = following;
    const T* here = source;
    const bool exists = position < positions;
    const int64_t next = position + step;
    if (first + step < positions) {
      source = p.batch == 1 ? source + source_step : source_of(next);
      following.load(source, next < positions ? units : 0, args.u_vectors);
    }
    const float lane_top = row.lane_top(), top = RowLanes::max_nan(lane_top);
    const PositionState at = compete_few<T>(row, lane_top, top, args);
    const uint32_t bits = field_of(at, RowLanes::index());
    if (field && exists) field[position] = bits;
    if constexpr (!kStateOnly) {
      if (p.winner_unit || p.winner_activity) {
        const auto read = [&](int unit) { return to_float(here[unit - row.unit(0)]); };
        write_winners_of_few(row, args, exists, position, at, read);
      }
      if (p.y && exists) {
        const int64_t offset = offset_of(p.y_layout, place_of(p, position));
        write_row(row, here, args, at, true, static_cast<T*>(p.y) + offset);
      }
    }
    first += step;
    if (first >= positions) return;
    position = next;
  }
}

template <class T, int kElements>
Status launch_few_rows(const CompeteArgs& args, const DeviceInfo& info, Stream stream) {
  const auto kernel =
      wants_state_only(args.p) ? few_rows_kernel<T, kElements, true> : few_rows_kernel<T, kElements, false>;
  return launch("", kernel, grid_over_rows(args.p, info, kRowsOfWarp), stream, args);
}

}  // namespace
}  // namespace ghl
