// Competition among up to 1024 units: a warp for each position, its row in the warp's registers.
//
// Rows, whose units are contiguous, are loaded 16 bytes a lane, and a row ahead. Planes, whose positions are
// contiguous, pass through a tile of shared memory, [units][64 bytes of positions], of which a warp then
// reads columns; activities are written from the tile with lanes along positions again. The planes' kernel
// takes any other strides too, more slowly.
#include <type_traits>

#include "cuda/compete.cuh"

namespace ghl {
namespace {

template <class T>
__device__ __forceinline__ T minus_infinity() {
  return from_float<T>(-infinity());
}

// As a value that the compiler knows to be the same in all lanes, so that it makes no code for some of them
// to leave a loop that the others are in.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarp), 0);
}

// Whether a y of u's dtype is u where a unit wins and 0 elsewhere.
__device__ __forceinline__ bool copies_winners(const CompeteParams& p) {
  return p.activity == Activity::linear && p.winners > 0 && !p.anti;
}

// The state of the position whose row this is, and its winners. lane_top: the largest of this lane, or NaN.
template <class T, class Row, class Read>
__device__ __forceinline__ PositionState compete_row(const Row& row, float lane_top, const CompeteArgs& args,
                                                     Read read, unsigned* list, Chosen& chosen) {
  const CompeteParams& p = args.p;
  chosen = none_chosen();
  if (__any_sync(kAllLanes, lane_top != lane_top)) return bad_state();

  PositionState at{0.0f, 0, 0.0f, 0};
  const bool selects = p.winners > 0;
  if (selects) {
    chosen = row.choose(lane_top, static_cast<int>(p.winners), read, list);
    at.threshold = chosen.threshold;
    at.cut = chosen.cut;
  }
  if (p.activity != Activity::softmax && !p.anti) return at;
  const float top = warp_max(lane_top);
  if (p.activity == Activity::softmax) {
    const ExponentialSum sum(args.scale, top);
    float total = 0.0f;
    if (selects) {
      row.for_each([&](int i, float v) { total += is_winner(v, Row::unit(i), at) ? sum.term(v) : 0.0f; });
    } else {
      row.for_each([&](int, float v) { total += sum.term(v); });
    }
    at.logsumexp = sum.logarithm(warp_sum(total), p.keeps_infinity);
  }
  if (p.anti) {
    const uint32_t mask = row.mask([&](float v) { return v == top; });
    const int unit = mask ? Row::unit(__ffs(static_cast<int>(mask)) - 1) : 0x7fffffff;
    at.first = __reduce_min_sync(kAllLanes, unit);
  }
  return at;
}

template <class Row>
__device__ __forceinline__ uint32_t winners_of(const Row& row, const CompeteArgs& args,
                                               const PositionState& at) {
  if (at.threshold != at.threshold) return Row::elements_up_to(static_cast<int>(args.p.winners) - 1);
  const uint32_t above = row.mask([&](float v) { return v > at.threshold; });
  return above | (row.mask([&](float v) { return v == at.threshold; }) & Row::elements_up_to(at.cut));
}

// The winners and their activities in ascending order: runs follow each other in the order of lanes.
template <class Row>
__device__ __forceinline__ void write_winners_of_row(const Row& row, const CompeteArgs& args,
                                                     int64_t position, const PositionState& at) {
  const bool bad = at.threshold != at.threshold;
  const uint32_t winners = winners_of(row, args, at);
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

// --- rows -----------------------------------------------------------------------------------------

constexpr int kRun = 4;  // consecutive units of a lane

// Two elements of a word, or the one, as floats.
template <class T>
constexpr int kPairOf = static_cast<int>(4 / sizeof(T));

// A row of 16-bit elements, or of float: words as they lie in memory.
template <class T, int kElements>
struct MemoryRow : RowOf<MemoryRow<T, kElements>, kRun, kElements> {
  using Units = RowUnits<kRun, kElements>;
  static constexpr int kPair = kPairOf<T>;
  static constexpr int kWords = kElements / kPair;
  static constexpr int kRunWords = kRun / kPair;
  uint32_t word[kWords];

  // mine: this lane's first unit
  __device__ __forceinline__ void load(const T* mine, bool vectors) {
    const int left = this->units - Units::unit(0);
    const uint32_t none = pair(minus_infinity<T>(), minus_infinity<T>());
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kWords; i += kRunWords) {
        const int first = i * kPair * static_cast<int>(kWarp);
        using Run = std::conditional_t<kRunWords == 2, uint2, uint4>;
#pragma unroll
        for (int j = 0; j < kRunWords; ++j) word[i + j] = none;
        if (first < left) {
          const Run bits = __ldg(reinterpret_cast<const Run*>(mine + first));
          __builtin_memcpy(word + i, &bits, sizeof bits);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int first = i / kRunWords * kRunWords * kPair * static_cast<int>(kWarp) + i % kRunWords * kPair;
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
      uint32_t bound = kKeyOfMinusInfinity, mask = 0;
      if (k <= static_cast<int>(kWarp)) {
        bound = bound_of<kKeyFreeBits<T>>(lane_top, k);
        const float floor = value_above<kKeyFreeBits<T>>(bound);
        mask = reaching_mask<T, kWords>(word, Pair<T>::of(floor, floor));
      }
      const auto unit_of = [](unsigned bit, unsigned lane) {
        // element bit % 16 * 2 + bit / 16
        return static_cast<int>((bit & 14u) * (kRun * kWarp / 2) + lane * kRun + (bit & 1u) * 2 + bit / 16);
      };
      return ghl::choose<kKeyFreeBits<T>>(*this, lane_top, bound, mask, k, unit_of, read, list);
    }
  }

 private:
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
template <class Y>
__device__ __forceinline__ void write_run(Y* y, const float (&value)[kRun], int left, bool vectors) {
  if (vectors) {
    if (left <= 0) return;
    if constexpr (sizeof(Y) == 4) {
      *reinterpret_cast<float4*>(y) = float4{value[0], value[1], value[2], value[3]};
    } else {
      *reinterpret_cast<uint2*>(y) =
          uint2{Pair<Y>::rounded(value[0], value[1]), Pair<Y>::rounded(value[2], value[3])};
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j < left) y[j] = from_float<Y>(value[j]);
    }
  }
}

template <class Y, class Row>
__device__ __forceinline__ void write_row(const Row& row, const PositionState& at, const CompeteArgs& args,
                                          Y* y) {
  by_competition(args, [&](const Competition& competition) {
#pragma unroll
    for (int first = 0; first < Row::kElements; first += kRun) {
      if (!row.has_chunk(first)) break;
      const int unit = Row::unit(first);
      float value[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) value[j] = activity_of(row.value(first + j), unit + j, at, competition);
      write_run(y + unit, value, row.units - unit, args.y_vectors);
    }
  });
}

// The winners' own values, in u's dtype of 16 bits and by whole runs; `ties` unless every unit that equals
// the threshold wins.
template <class T, int kElements>
__device__ __forceinline__ void write_winning_words(const MemoryRow<T, kElements>& row,
                                                    const PositionState& at, bool ties, T* y) {
  using Row = MemoryRow<T, kElements>;
  const uint32_t threshold = Pair<T>::of(at.threshold, at.threshold);
  const uint32_t nan = at.threshold != at.threshold ? 0x7fff7fffu : 0u;
  uint32_t words[Row::kWords];
  if (!ties) {
#pragma unroll
    for (int i = 0; i < Row::kWords; ++i) {
      words[i] = (row.word[i] & Pair<T>::reaching(row.word[i], threshold)) | nan;
    }
  } else {
#pragma unroll
    for (int i = 0; i < Row::kWords; ++i) {
      const int after = at.cut - Row::unit(2 * i);
      const uint32_t wins_ties = after > 0 ? 0xffffffffu : after == 0 ? 0xffffu : 0u;
      const uint32_t wins =
          Pair<T>::above(row.word[i], threshold) | (Pair<T>::reaching(row.word[i], threshold) & wins_ties);
      words[i] = (row.word[i] & wins) | nan;
    }
  }
#pragma unroll
  for (int i = 0; i < Row::kWords; i += 2) {
    const int unit = Row::unit(2 * i);
    if (unit < row.units) *reinterpret_cast<uint2*>(y + unit) = uint2{words[i], words[i + 1]};
  }
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

// Blocks of a multiprocessor at once: so many that the registers of a row leave room for. Compiled for sm_100
// the kernels that do more than the state need some more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kIsBlackwell = true;
#else
constexpr bool kIsBlackwell = false;
#endif
template <class T, int kElements, bool kStateOnly>
constexpr int kRowBlocks = sizeof(T) == 4    ? (kElements == 16 ? 3 : 2)
                           : kElements == 32 ? 2
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
  following.load(source, args.u_vectors);
  while (true) {
    const MemoryRow<T, kElements> row = following;
    const T* here = source;
    const float lane_top = row.lane_top();
    const int64_t next = position + step;
    if (next < positions) {
      source = p.batch == 1 ? source + source_step : source_of(next);
      following.load(source, args.u_vectors);
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
      if (p.y_dtype == DType::f32) {
        write_row(row, at, args, static_cast<float*>(p.y) + offset);
      } else if constexpr (sizeof(T) == 2) {
        T* y = static_cast<T*>(p.y) + offset;
        if (copies_winners(p) && args.y_vectors) {
          write_winning_words(row, at, chosen.ties, y);
        } else {
          write_row(row, at, args, y);
        }
      }
    }
    if (next >= positions) return;
    position = next;
  }
}

// --- planes ---------------------------------------------------------------------------------------

// A tile has 64 bytes of positions for every unit, and a word between so that columns meet no bank twice.
template <class T>
struct Tile {
  static constexpr int kPositions = 64 / sizeof(T);
  static constexpr int kPair = 4 / sizeof(T);  // positions of a word
  static constexpr int kPitch = kPositions + kPair;
};

// Shared memory of planes_kernel before the tile.
template <class T>
struct TileStates {
  PositionState state[Tile<T>::kPositions];
  unsigned list[kCompeteWarps][kListed];
};

struct TilePlace {
  int64_t item, first;
  int count;
};

// u of a block's positions to shared memory, and -inf from the last unit to kUnits.
template <int kUnits, class T>
__device__ __forceinline__ void load_tile(const CompeteArgs& args, const TilePlace& place, T* tile) {
  const CompeteParams& p = args.p;
  const int units = static_cast<int>(p.units);
  const T* u = static_cast<const T*>(p.u) + offset_of(p.u_layout, {place.item, place.first});
  if (args.u_vectors && place.count == Tile<T>::kPositions) {
    constexpr int kParts = Tile<T>::kPositions / Vector<T>::size;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < units * kParts; i += kCompeteThreads) {
      const int unit = i / kParts, first = i % kParts * Vector<T>::size;
      const Vector<T> vector = load_vector(u + unit * p.u_layout.stride_unit + first);
      // the word between rows leaves them aligned to words
      uint32_t words[4];
      __builtin_memcpy(words, &vector, sizeof words);
      uint32_t* target = reinterpret_cast<uint32_t*>(tile + unit * Tile<T>::kPitch + first);
#pragma unroll
      for (int j = 0; j < 4; ++j) target[j] = words[j];
    }
  } else {
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < units * Tile<T>::kPositions; i += kCompeteThreads) {
      const int unit = i / Tile<T>::kPositions, within = i % Tile<T>::kPositions;
      if (within >= place.count) continue;
      tile[unit * Tile<T>::kPitch + within] =
          u[unit * p.u_layout.stride_unit + within * p.u_layout.stride_position];
    }
  }
  const int end = kUnits * Tile<T>::kPitch;
  for (int i = units * Tile<T>::kPitch + static_cast<int>(threadIdx.x); i < end; i += kCompeteThreads) {
    tile[i] = minus_infinity<T>();
  }
}

// A thread writes the kPair positions of a word, of every kRows-th unit.
template <class Y, class T>
__device__ __forceinline__ void write_tile(const CompeteArgs& args, const TilePlace& place, const T* tile,
                                           const PositionState* states) {
  constexpr int kPair = Tile<T>::kPair, kWords = Tile<T>::kPositions / kPair,
                kRows = kCompeteThreads / kWords;
  const CompeteParams& p = args.p;
  const int first = static_cast<int>(threadIdx.x) % kWords * kPair;
  Y* y = static_cast<Y*>(p.y) + offset_of(p.y_layout, {place.item, place.first + first});
  PositionState at[kPair];
#pragma unroll
  for (int j = 0; j < kPair; ++j) at[j] = first + j < place.count ? states[first + j] : no_position();
  by_competition(args, [&](const Competition& competition) {
#pragma unroll 2
    for (int unit = static_cast<int>(threadIdx.x) / kWords; unit < static_cast<int>(p.units); unit += kRows) {
      struct alignas(kPair * sizeof(Y)) Pair {
        Y element[kPair];
      } pair;
#pragma unroll
      for (int j = 0; j < kPair; ++j) {
        const float u = to_float(tile[unit * Tile<T>::kPitch + first + j]);
        pair.element[j] = from_float<Y>(activity_of(u, unit, at[j], competition));
      }
      Y* target = y + unit * p.y_layout.stride_unit;
      if (args.y_vectors && place.count == Tile<T>::kPositions) {
        *reinterpret_cast<Pair*>(target) = pair;
      } else {
#pragma unroll
        for (int j = 0; j < kPair; ++j) {
          if (first + j < place.count) target[j * p.y_layout.stride_position] = pair.element[j];
        }
      }
    }
  });
}

// The winners' own values, of whole tiles whose units that lose a tie were made NaN: a thread writes 16 bytes
// of positions of every kRows-th unit.
template <class T>
__device__ __forceinline__ void write_winning_tile(const CompeteArgs& args, const TilePlace& place,
                                                   const T* tile, const PositionState* states) {
  constexpr int kParts = Tile<T>::kPositions / Vector<T>::size, kRows = kCompeteThreads / kParts;
  const CompeteParams& p = args.p;
  const int first = static_cast<int>(threadIdx.x) % kParts * Vector<T>::size;
  uint32_t threshold[4], nan[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = states[first + 2 * i].threshold, high = states[first + 2 * i + 1].threshold;
    threshold[i] = Pair<T>::of(low, high);
    nan[i] = (low != low ? 0x7fffu : 0u) | (high != high ? 0x7fff0000u : 0u);
  }
  const int unit = static_cast<int>(threadIdx.x) / kParts;
  const uint32_t* column = reinterpret_cast<const uint32_t*>(tile + unit * Tile<T>::kPitch + first);
  T* y = static_cast<T*>(p.y) + offset_of(p.y_layout, {place.item, place.first + first}) +
         unit * p.y_layout.stride_unit;
  const int64_t step = kRows * p.y_layout.stride_unit;
#pragma unroll 2
  for (int left = static_cast<int>(p.units) - unit; left > 0; left -= kRows) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = (column[i] & Pair<T>::reaching(column[i], threshold[i])) | nan[i];
    }
    *reinterpret_cast<uint4*>(y) = uint4{words[0], words[1], words[2], words[3]};
    column += kRows * Tile<T>::kPitch / Tile<T>::kPair;
    y += step;
  }
}

// One of the two positions of words that hold every 32nd unit.
template <class T, int kElements>
struct TileColumn : RowOf<TileColumn<T, kElements>, 1, kElements> {
  using Units = RowUnits<1, kElements>;
  uint32_t word[kElements];
  int half;
  uint32_t bound, reaching;

  __device__ __forceinline__ float value(int i) const { return Pair<T>::low(word[i] >> 16 * half); }

  template <class Read>
  __device__ __forceinline__ Chosen choose(float lane_top, int k, Read read, unsigned* list) const {
    const auto unit_of = [](unsigned bit, unsigned lane) { return Units::unit(bit, lane); };
    return ghl::choose<kKeyFreeBits<T>>(*this, lane_top, bound, reaching, k, unit_of, read, list);
  }
};

template <int kElements>
struct FloatColumn : RowOf<FloatColumn<kElements>, 1, kElements> {
  using Units = RowUnits<1, kElements>;
  float element[kElements];

  __device__ __forceinline__ float value(int i) const { return element[i]; }

  template <class Read>
  __device__ __forceinline__ Chosen choose(float lane_top, int k, Read read, unsigned* list) const {
    return chosen_by(select_kth<0>(*this, lane_top, k, read, list));
  }
};

// The state and the lists of the positions of a tile. `marks`: units that lose a tie become NaN.
template <class T, int kElements>
__device__ __forceinline__ void compete_tile(const CompeteArgs& args, const TilePlace& place, T* tile,
                                             bool marks, TileStates<T>& shared) {
  const CompeteParams& p = args.p;
  const int warp = warp_index(), lane = static_cast<int>(lane_index());
  unsigned* list = shared.list[warp];
  const auto finish = [&](const auto& row, float lane_top, int within) {
    T* column = tile + within;
    const auto read = [&](int unit) { return to_float(column[unit * Tile<T>::kPitch]); };
    const int64_t position = place.item * p.positions + place.first + within;
    Chosen chosen;
    const PositionState at = compete_row<T>(row, lane_top, args, read, list, chosen);
    if (p.winner_unit || p.winner_activity) write_winners(row, chosen, args, position, at, list);
    if (lane == 0) shared.state[within] = at;
    if (!marks || !chosen.ties || at.threshold != at.threshold) return;
    const T nan = from_float<T>(quiet_nan());
    if (chosen.listed) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        if (chosen.unit[i] >= 0 && !chosen.wins(i) && chosen.value[i] == at.threshold) {
          column[chosen.unit[i] * Tile<T>::kPitch] = nan;
        }
      }
    } else {
      row.for_each([&](int i, float v) {
        const int unit = row.unit(static_cast<unsigned>(i));
        if (v == at.threshold && unit > at.cut) column[unit * Tile<T>::kPitch] = nan;
      });
    }
  };

  if constexpr (sizeof(T) == 4) {
    for (int within = warp; within < place.count; within += kCompeteWarps) {
      FloatColumn<kElements> row;
      row.units = static_cast<int>(p.units);
      float top = -infinity();
#pragma unroll
      for (int first = 0; first < kElements; first += row.kChunk) {
        if (!row.has_chunk(first)) break;
#pragma unroll
        for (int i = first; i < first + row.kChunk; ++i) {
          row.element[i] = tile[row.unit(static_cast<unsigned>(i)) * Tile<T>::kPitch + within];
          top = ptx::max_nan_f32(top, row.element[i]);
        }
      }
      finish(row, top, within);
    }
  } else {
    constexpr int kMaskWords = 16, kMasks = divide_up(kElements, kMaskWords);
    const int k = static_cast<int>(p.winners);
#pragma unroll 1
    for (int within = 2 * warp; within < place.count; within += 2 * kCompeteWarps) {
      TileColumn<T, kElements> row;
      row.units = static_cast<int>(p.units);
      const uint32_t* column = reinterpret_cast<const uint32_t*>(tile + lane * Tile<T>::kPitch + within);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        row.word[i] = column[i * static_cast<int>(kWarp) * Tile<T>::kPitch / Tile<T>::kPair];
      }
      const uint32_t top = largest_of<T>(row.word);
      const float tops[2] = {Pair<T>::low(top), Pair<T>::high(top)};
      uint32_t bounds[2] = {kKeyOfMinusInfinity, kKeyOfMinusInfinity}, masks[kMasks] = {};
      if (k > 0 && k <= static_cast<int>(kWarp)) {
        constexpr int kFree = kKeyFreeBits<T>;
        bounds_of<kFree>(tops, k, bounds);
        const uint32_t bound = Pair<T>::of(value_above<kFree>(bounds[0]), value_above<kFree>(bounds[1]));
        masks[0] = reaching_mask<T, (kElements < kMaskWords ? kElements : kMaskWords)>(row.word, bound);
        if constexpr (kMasks == 2) {
          masks[1] = reaching_mask<T, kElements - kMaskWords>(row.word + kMaskWords, bound);
        }
      }
#pragma unroll 1
      for (int half = 0; half < 2 && within + half < place.count; ++half) {
        row.half = half;
        row.bound = half ? bounds[1] : bounds[0];
        row.reaching = masks[0] >> 16 * half & 0xffff;
        if constexpr (kMasks == 2) row.reaching |= masks[1] >> 16 * half << 16;
        finish(row, half ? tops[1] : tops[0], within + half);
      }
    }
  }
}

template <class T, int kElements>
constexpr int kTileBlocks = kElements <= 16 ? 4 : 2;

template <class T, int kElements>
__global__ void __launch_bounds__(kCompeteThreads, (kTileBlocks<T, kElements>))
    planes_kernel(const __grid_constant__ CompeteArgs args) {
  const CompeteParams& p = args.p;
  TileStates<T>& shared = *dynamic_shared<TileStates<T>>();
  T* tile = reinterpret_cast<T*>(&shared + 1);

  // at most the blocks of the grid
  const unsigned tiles = static_cast<unsigned>(divide_up<int64_t>(p.positions, Tile<T>::kPositions));
  TilePlace place{blockIdx.x / tiles, static_cast<int64_t>(blockIdx.x % tiles) * Tile<T>::kPositions, 0};
  place.count = static_cast<int>(min(p.positions - place.first, static_cast<int64_t>(Tile<T>::kPositions)));
  load_tile<kElements* static_cast<int>(kWarp)>(args, place, tile);
  __syncthreads();

  const bool copies = sizeof(T) == 2 && p.y && p.y_dtype != DType::f32 && copies_winners(p) &&
                      args.y_vectors && place.count == Tile<T>::kPositions;
  compete_tile<T, kElements>(args, place, tile, copies, shared);
  __syncthreads();
  const int within = static_cast<int>(threadIdx.x);
  if (within < place.count) {
    write_state(p, place.item * p.positions + place.first + within, shared.state[within]);
  }
  if (!p.y) return;
  if constexpr (sizeof(T) == 2) {
    if (copies) return write_winning_tile(args, place, tile, shared.state);
  }
  if (p.y_dtype == DType::f32) {
    write_tile<float>(args, place, tile, shared.state);
  } else {
    write_tile<T>(args, place, tile, shared.state);
  }
}

// --- launch ---------------------------------------------------------------------------------------

// Blocks of rows_kernel on a multiprocessor, several times what it holds at once, so that none waits for the
// last.
constexpr int kBlocksEach = 32;

template <class T, int kElements>
Status launch_elements(CompeteArgs args, Stream stream) {
  const CompeteParams& p = args.p;
  const bool rows = p.u_layout.stride_unit == 1 && (!p.y || p.y_layout.stride_unit == 1);
  const auto whole = [&](DType dtype) { return !rows || p.units % (dtype == DType::f32 ? 4 : 8) == 0; };
  args.u_vectors = whole(p.u_dtype) && is_aligned(p.u, p.u_dtype, p.u_layout, p.batch, rows);
  args.y_vectors = p.y && whole(p.y_dtype) && is_aligned(p.y, p.y_dtype, p.y_layout, p.batch, rows);
  if (rows) {
    DeviceInfo info;
    if (Status status = device_info(stream.device, info); !status.ok) return status;
    const int64_t blocks = std::min<int64_t>(divide_up<int64_t>(p.batch * p.positions, kCompeteWarps),
                                             static_cast<int64_t>(info.multiprocessors) * kBlocksEach);
    const bool state_only = !p.y && !p.winner_unit && !p.winner_activity;
    const auto kernel = state_only ? rows_kernel<T, kElements, true> : rows_kernel<T, kElements, false>;
    return launch(describe(p), kernel, {blocks, kCompeteThreads, 0}, stream, args);
  }
  const int64_t tiles = p.batch * divide_up<int64_t>(p.positions, Tile<T>::kPositions);
  const size_t tile_bytes = kElements * kWarp * Tile<T>::kPitch * sizeof(T);
  const Grid grid{tiles, kCompeteThreads, sizeof(TileStates<T>) + tile_bytes};
  return launch(describe(p), planes_kernel<T, kElements>, grid, stream, args);
}

}  // namespace

Status launch_short(const CompeteArgs& args, Stream stream) {
  return by_dtype(args.p.u_dtype, [&]<class T>(T*) {
    const int64_t units = args.p.units;
    if constexpr (sizeof(T) == 2) {
      // elements beyond the row cost as much as those of it
      if (units <= 384) return launch_elements<T, 12>(args, stream);
      if (units <= 512) return launch_elements<T, 16>(args, stream);
      return launch_elements<T, 32>(args, stream);
    } else {
      return units <= 512 ? launch_elements<T, 16>(args, stream) : launch_elements<T, 32>(args, stream);
    }
  });
}

}  // namespace ghl
