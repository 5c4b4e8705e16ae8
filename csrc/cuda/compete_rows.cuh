// Rows, whose units are contiguous: a warp loads one 16 bytes a lane, and a row ahead.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/compete_warp.cuh"

namespace ghl {
namespace {

constexpr int kRun = 4;  // consecutive units of a lane

// Two elements of a word, or the one, as floats.
template <class T>
constexpr int kPairOf = static_cast<int>(4 / sizeof(T));

// A row of 16-bit elements, or of float: words as they lie in memory.
template <class T, int kElements, class Lanes = WarpLanes>
struct MemoryRow : RowOf<MemoryRow<T, kElements, Lanes>, kRun, kElements, Lanes> {
  using Units = RowUnits<kRun, kElements, Lanes>;
  static constexpr int kPair = kPairOf<T>;
  static constexpr int kWords = kElements / kPair;
  static constexpr int kRunWords = kRun / kPair;
  uint32_t word[kWords];

  // mine: this lane's first unit; end: that of the row, or 0 for a row of -inf
  __device__ __forceinline__ void load(const T* mine, int end, bool vectors) {
    const int left = end - Units::unit(0);
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kWords; i += kRunWords) {
        const int first = i * kPair * Lanes::kCount;
        using Run = std::conditional_t<kRunWords == 2, uint2, uint4>;
#pragma unroll
        for (int j = 0; j < kRunWords; ++j) word[i + j] = minus_infinities<T>();
        if (first < left) {
          const Run bits = __ldg(reinterpret_cast<const Run*>(mine + first));
          __builtin_memcpy(word + i, &bits, sizeof bits);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int first = i / kRunWords * kRunWords * kPair * Lanes::kCount + i % kRunWords * kPair;
        word[i] = pair_at(mine, first, left);
      }
    }
  }

  __device__ __forceinline__ float value(int i) const {
    if constexpr (kPair == 1) {
      return __uint_as_float(word[i]);
    } else {
      return i % 2 == 0 ? Pair<T>::low(word[i / 2]) : Pair<T>::high(word[i / 2]);
    }
  }

  // NaN where any is.
  __device__ __forceinline__ float lane_top() const {
    if constexpr (kPair == 1) {
      float top = -infinity();
      this->for_each([&](int, float v) { top = ptx::max_nan_f32(top, v); });
      return top;
    } else {
      const uint32_t top = largest_of<T>(word);
      return ptx::max_nan_f32(Pair<T>::low(top), Pair<T>::high(top));
    }
  }

  template <class Read>
  __device__ __forceinline__ Chosen choose(float lane_top, int k, Read read, unsigned* list) const {
    if constexpr (kPair == 1) {
      return chosen_by(select_kth<kKeyFreeBits<T>>(*this, lane_top, k, read, list));
    } else {
      uint32_t bound = kKeyOfMinusInfinity;
      typename Units::Mask mask = 0;
      if (k <= static_cast<int>(kWarp)) {
        bound = bound_for(lane_top, k);
        const float floor = value_above<kKeyFreeBits<T>>(bound);
#pragma unroll
        for (int i = 0; i < kWords; i += kMaskWords) {
          const uint32_t bits = reaching_mask<T>(word + i, kWords - i, Pair<T>::of(floor, floor));
          mask |= static_cast<typename Units::Mask>(bits) << 2 * i;
        }
      }
      const auto unit_of = [](unsigned bit, unsigned lane) {
        const unsigned before = kWords > kMaskWords ? bit / (2 * kMaskWords) * kMaskWords : 0;
        return Units::unit(2 * (before + bit % kMaskWords) + bit / kMaskWords % 2, lane);
      };
      return ghl::choose<kKeyFreeBits<T>>(*this, lane_top, bound, mask, k, unit_of, read, list);
    }
  }

 private:
  __device__ __forceinline__ uint32_t bound_for(float lane_top, int k) const {
    if (k < kManyWinners) return bound_of<kKeyFreeBits<T>>(lane_top, k);
    const uint32_t top = largest_of<T>(word);
    uint32_t bound[1];
    close_bounds_of<kKeyFreeBits<T>>({{Pair<T>::low(top), Pair<T>::high(top)}}, k, bound);
    return bound[0];
  }

  static __device__ __forceinline__ uint32_t pair(T low, T high) {
    const T both[2] = {low, high};
    uint32_t bits;
    __builtin_memcpy(&bits, both, sizeof bits);
    return bits;
  }

  static __device__ __forceinline__ uint32_t pair_at(const T* u, int at, int end) {
    const T low = at < end ? u[at] : minus_infinity<T>();
    return pair(low, kPair > 1 && at + 1 < end ? u[at + 1] : minus_infinity<T>());
  }
};

// A run of y, from its first unit on, of which `left` are in the row.
template <class T>
__device__ __forceinline__ void write_run(T* y, const float (&value)[kRun], int left, bool vectors) {
  if (vectors) {
    if (left <= 0) return;
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(y) = float4{value[0], value[1], value[2], value[3]};
    } else {
      *reinterpret_cast<uint2*>(y) =
          uint2{Pair<T>::rounded(value[0], value[1]), Pair<T>::rounded(value[2], value[3])};
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j < left) y[j] = from_float<T>(value[j]);
    }
  }
}

// From registers: long code, for a competition that the compiler knows.
template <class Row, class T>
__device__ __forceinline__ void write_kept_row(const Row& row, const PositionState& at,
                                               const Competition& competition, bool vectors, T* y) {
#pragma unroll
  for (int first = 0; first < Row::kElements; first += kRun) {
    if (!row.has_chunk(first)) break;
    const int unit = Row::unit(first);
    float value[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) value[j] = activity_of(row.value(first + j), unit + j, at, competition);
    write_run(y + unit, value, row.units - unit, vectors);
  }
}

// From u in memory, which has it at hand still: short code, for any competition. mine: as of MemoryRow::load.
template <class Row, class T>
__device__ __forceinline__ void write_read_row(const Row& row, const T* mine, const PositionState& at,
                                               const Competition& competition, bool vectors, T* y) {
#pragma unroll 1
  for (int first = 0; first < Row::kElements && row.has_chunk(first); first += kRun) {
    const int unit = Row::unit(first);
    const T* from = mine + (unit - Row::unit(0));
    float value[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      value[j] = unit + j < row.units ? activity_of(to_float(from[j]), unit + j, at, competition) : 0.0f;
    }
    write_run(y + unit, value, row.units - unit, vectors);
  }
}

// Winners' own values of 16 bits are words; of floats, some rows leave no registers.
template <class Row, class T>
constexpr bool kKeepsWinners = sizeof(T) == 4 && !(kIsBlackwell && Row::kElements > 16);

template <class Row, class T>
__device__ __forceinline__ void write_activities(const Row& row, const T* mine, const PositionState& at,
                                                 const CompeteArgs& args, T* y) {
  const Competition competition = competition_of(args);
  if (is_plain_softmax(competition)) {
    write_kept_row(row, at, Competition{Activity::softmax, false, false, args.scale}, args.y_vectors, y);
  } else if (kKeepsWinners<Row, T> && copies_winners(competition)) {
    write_kept_row(row, at, Competition{Activity::linear, true, false, 1.0f}, args.y_vectors, y);
  } else {
    write_read_row(row, mine, at, competition, args.y_vectors, y);
  }
}

// The winners' own values, of 16 bits and by whole runs; `ties` unless every unit that equals
// the threshold wins.
template <class Row, class T>
__device__ __forceinline__ void write_winning_words(const Row& row, const PositionState& at, bool ties,
                                                    T* y) {
  const uint32_t threshold = Pair<T>::of(at.threshold, at.threshold);
  const uint32_t nan = at.threshold != at.threshold ? 0x7fff7fffu : 0u;
  // wins(i, unit): the halves of word i that win, its first element being that unit
  const auto write = [&](auto wins) {
#pragma unroll
    for (int i = 0; i < Row::kWords; i += 2) {
      const int unit = Row::unit(2 * i);
      if (unit >= row.units) continue;
      const uint32_t low = (row.word[i] & wins(i, unit)) | nan;
      const uint32_t high = (row.word[i + 1] & wins(i + 1, unit + 2)) | nan;
      *reinterpret_cast<uint2*>(y + unit) = uint2{low, high};
    }
  };
  if (!ties) {
    write([&](int i, int) { return Pair<T>::reaching(row.word[i], threshold); });
  } else {
    write([&](int i, int unit) {
      const int after = at.cut - unit;
      const uint32_t wins_ties = after > 0 ? 0xffffffffu : after == 0 ? 0xffffu : 0u;
      return Pair<T>::above(row.word[i], threshold) | (Pair<T>::reaching(row.word[i], threshold) & wins_ties);
    });
  }
}

template <class Row, class T>
__device__ __forceinline__ void write_row(const Row& row, const T* mine, const CompeteArgs& args,
                                          const PositionState& at, bool ties, T* y) {
  if constexpr (sizeof(T) == 2) {
    if (copies_winners(competition_of(args)) && args.y_vectors) return write_winning_words(row, at, ties, y);
  }
  write_activities(row, mine, at, args, y);
}

// Blocks of a multiprocessor at once: so many that the registers of a row leave room for.
template <class T, int kElements, bool kStateOnly>
constexpr int kRowBlocks = sizeof(T) == 4    ? (kElements == 16 ? 3 : 2)
                           : kElements == 48 ? 2 - (kIsBlackwell && !kStateOnly)
                           : kElements == 32 ? 2 + (kStateOnly && !kIsBlackwell)
                                             : (kElements == 12 ? 4 : 3) + (kStateOnly ? 1 : -kIsBlackwell);

// kStateOnly: neither activities nor lists are asked for.
template <class T, int kElements, bool kStateOnly>
__global__ void __launch_bounds__(kCompeteThreads, (kRowBlocks<T, kElements, kStateOnly>))
    rows_kernel(const __grid_constant__ CompeteArgs args) {
  __shared__ __align__(16) unsigned listed[kCompeteWarps][kListed];
  const CompeteParams& p = args.p;
  const int units = static_cast<int>(p.units), warp = warp_index();
  const int64_t positions = p.batch * p.positions, step = static_cast<int64_t>(gridDim.x) * kCompeteWarps;
  const auto source_of = [&](int64_t position) {
    return static_cast<const T*>(p.u) + offset_of(p.u_layout, place_of(p, position)) +
           MemoryRow<T, kElements>::unit(0);
  };
  uint32_t* const field = field_pointer(p, lane_index());
  const int64_t source_step = step * p.u_layout.stride_position;

  int64_t position = static_cast<int64_t>(blockIdx.x) * kCompeteWarps + warp;
  if (position >= positions) return;
  const T* source = source_of(position);
  MemoryRow<T, kElements> following;
  following.units = units;
  following.load(source, units, args.u_vectors);
  while (true) {
    const MemoryRow<T, kElements> row = following;
    const T* here = source;
    const float lane_top = row.lane_top();
    const int64_t next = position + step;
    if (next < positions) {
      source = p.batch == 1 ? source + source_step : source_of(next);
      following.load(source, units, args.u_vectors);
    }
    const auto read = [&](int unit) { return to_float(here[unit - row.unit(0)]); };
    Chosen chosen;
    const PositionState at = compete_row<T>(row, lane_top, args, read, listed[warp], chosen);
    // null or not: as a condition that the loop does not change, it would make two loops that lanes divide
    // into
    const uint32_t bits = field_of(at, lane_index());
    if (reinterpret_cast<uintptr_t>(field) > static_cast<uintptr_t>(position)) field[position] = bits;
    if (kStateOnly) {
      if (next >= positions) return;
      position = next;
      continue;
    }
    if (p.winner_unit || p.winner_activity) write_winners(row, chosen, args, position, at, listed[warp]);
    if (p.y) {
      const int64_t offset = offset_of(p.y_layout, place_of(p, position));
      write_row(row, here, args, at, chosen.ties, static_cast<T*>(p.y) + offset);
    }
    if (next >= positions) return;
    position = next;
  }
}

// Of a kernel whose warps take so many rows at a time, and go on until there are none.
inline Grid grid_over_rows(const CompeteParams& p, const DeviceInfo& info, int rows_of_warp) {
  // on a multiprocessor, several times what it holds at once, so that none waits for the last
  constexpr int kBlocksEach = 32;
  const int64_t needed = divide_up<int64_t>(p.batch * p.positions, kCompeteWarps * rows_of_warp);
  return {std::min<int64_t>(needed, static_cast<int64_t>(info.multiprocessors) * kBlocksEach),
          kCompeteThreads, 0};
}

template <class T, int kElements>
Status launch_rows(const CompeteArgs& args, const DeviceInfo& info, Stream stream) {
  const auto kernel =
      wants_state_only(args.p) ? rows_kernel<T, kElements, true> : rows_kernel<T, kElements, false>;
  return launch("", kernel, grid_over_rows(args.p, info, 1), stream, args);
}

}  // namespace
}  // namespace ghl
