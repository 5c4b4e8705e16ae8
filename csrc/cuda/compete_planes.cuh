// Planes, whose positions are contiguous, and any other strides, more slowly: they pass through a tile of
// shared memory, [units][64 bytes of positions], of which a warp then reads columns; activities are written
// from the tile with lanes along positions again.
#pragma once

#include "cuda/compete_warp.cuh"

namespace ghl {
namespace {

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

// How threads share a tile whose rows move 16 bytes at a time: kParts threads a row, kRows rows a turn. In
// the order of threads two rows of a warp would begin in the same bank.
template <class T>
struct TileThread {
  static constexpr int kParts = Tile<T>::kPositions / Vector<T>::size;
  static constexpr int kRows = kCompeteThreads / kParts;
  static constexpr int kRowWords = Tile<T>::kPitch / Tile<T>::kPair;
  static_assert(kParts == 4 && kRows == 64 && kRowWords == 17);

  // its first position, and its row of the first turn
  int first = static_cast<int>(threadIdx.x) % kParts * Vector<T>::size;
  int row = permuted(static_cast<int>(threadIdx.x) / kParts);

 private:
  // Of eight rows beside each other 0 to 3 and 16 to 19: 17 times that, and 0, 4, 8 or 12 more, are 32 banks.
  static __device__ __forceinline__ int permuted(int row) {
    return (row & 3) | (row >> 1 & 12) | (row & 4) << 2 | (row & 32);
  }
};

// As load_tile, of whole vectors. Those of several turns are loaded before the first is stored, for they wait
// for memory.
template <int kUnits, class T>
__device__ __forceinline__ void load_whole_tile(const CompeteParams& p, const T* u, T* tile) {
  constexpr int kRows = TileThread<T>::kRows, kTurns = kUnits / kRows, kAtOnce = kTurns < 8 ? kTurns : 8;
  static_assert(kUnits % kRows == 0 && kTurns % kAtOnce == 0);
  constexpr int kTargetStep = kRows * TileThread<T>::kRowWords;
  const TileThread<T> thread;
  const T* from = u + thread.row * p.u_layout.stride_unit + thread.first;
  const int64_t step = kRows * p.u_layout.stride_unit;
  // the word between rows leaves them aligned to words
  uint32_t* target = reinterpret_cast<uint32_t*>(tile + thread.row * Tile<T>::kPitch + thread.first);
  int left = static_cast<int>(p.units) - thread.row;
#pragma unroll 1
  for (int turn = 0; turn < kTurns; turn += kAtOnce) {
    uint32_t word[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (uint32_t& one : word[i]) one = minus_infinities<T>();
      if (i * kRows >= left) continue;
      const Vector<T> vector = load_vector(from + i * step);
      __builtin_memcpy(word[i], &vector, sizeof vector);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) target[i * kTargetStep + j] = word[i][j];
    }
    from += kAtOnce * step;
    target += kAtOnce * kTargetStep;
    left -= kAtOnce * kRows;
  }
}

// u of a block's positions to shared memory, and -inf from the last unit to kUnits.
template <int kUnits, class T>
__device__ __forceinline__ void load_tile(const CompeteArgs& args, const TilePlace& place, T* tile) {
  const CompeteParams& p = args.p;
  const int units = static_cast<int>(p.units);
  const T* u = static_cast<const T*>(p.u) + offset_of(p.u_layout, {place.item, place.first});
  if (args.u_vectors && place.count == Tile<T>::kPositions) return load_whole_tile<kUnits>(p, u, tile);
  // without a remainder, which would come first and alone
#pragma unroll 8
  for (int turn = 0; turn < kUnits * Tile<T>::kPositions / kCompeteThreads; ++turn) {
    const int i = turn * kCompeteThreads + static_cast<int>(threadIdx.x);
    const int unit = i / Tile<T>::kPositions, within = i % Tile<T>::kPositions;
    T value = minus_infinity<T>();
    if (unit < units && within < place.count) {
      value = u[unit * p.u_layout.stride_unit + within * p.u_layout.stride_position];
    }
    tile[unit * Tile<T>::kPitch + within] = value;
  }
}

// A thread writes the kPair positions of a word, of every kRows-th unit.
template <class T>
__device__ __forceinline__ void write_tile(const CompeteArgs& args, const TilePlace& place, const T* tile,
                                           const PositionState* states) {
  constexpr int kPair = Tile<T>::kPair, kWords = Tile<T>::kPositions / kPair,
                kRows = kCompeteThreads / kWords;
  const CompeteParams& p = args.p;
  const int first = static_cast<int>(threadIdx.x) % kWords * kPair;
  T* y = static_cast<T*>(p.y) + offset_of(p.y_layout, {place.item, place.first + first});
  PositionState at[kPair];
#pragma unroll
  for (int j = 0; j < kPair; ++j) at[j] = first + j < place.count ? states[first + j] : no_position();
  by_competition(args, [&](const Competition& competition) {
#pragma unroll(kIsBlackwell ? 1 : 2)
    for (int unit = static_cast<int>(threadIdx.x) / kWords; unit < static_cast<int>(p.units); unit += kRows) {
      struct alignas(4) Pair {
        T element[kPair];
      } pair;
#pragma unroll
      for (int j = 0; j < kPair; ++j) {
        const float u = to_float(tile[unit * Tile<T>::kPitch + first + j]);
        pair.element[j] = from_float<T>(activity_of(u, unit, at[j], competition));
      }
      T* target = y + unit * p.y_layout.stride_unit;
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
  constexpr int kRows = TileThread<T>::kRows;
  const CompeteParams& p = args.p;
  const TileThread<T> thread;
  const int first = thread.first;
  uint32_t threshold[4], nan[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = states[first + 2 * i].threshold, high = states[first + 2 * i + 1].threshold;
    threshold[i] = Pair<T>::of(low, high);
    nan[i] = (low != low ? 0x7fffu : 0u) | (high != high ? 0x7fff0000u : 0u);
  }
  const uint32_t* column = reinterpret_cast<const uint32_t*>(tile + thread.row * Tile<T>::kPitch + first);
  T* y = static_cast<T*>(p.y) + offset_of(p.y_layout, {place.item, place.first + first}) +
         thread.row * p.y_layout.stride_unit;
  const int64_t step = kRows * p.y_layout.stride_unit;
#pragma unroll 2
  for (int left = static_cast<int>(p.units) - thread.row; left > 0; left -= kRows) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = (column[i] & Pair<T>::reaching(column[i], threshold[i])) | nan[i];
    }
    *reinterpret_cast<uint4*>(y) = uint4{words[0], words[1], words[2], words[3]};
    column += kRows * TileThread<T>::kRowWords;
    y += step;
  }
}

// One of the two positions of words that hold every 32nd unit.
template <class T, int kElements>
struct TileColumn : RowOf<TileColumn<T, kElements>, 1, kElements> {
  using Units = RowUnits<1, kElements>;
  uint32_t word[kElements];
  int half;
  uint32_t bound;
  typename Units::Mask reaching;

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

// What a block has loaded.
template <class T>
struct LoadedTile {
  const CompeteArgs& args;
  const TilePlace& place;
  T* u;
  TileStates<T>& shared;
  bool marks;  // units that lose a tie become NaN in u
};

// The state and the winners' list of a position whose row the warp has.
template <bool kStateOnly, class T, class Row>
__device__ __forceinline__ void compete_column(const Row& row, float lane_top, const LoadedTile<T>& tile,
                                               int within, unsigned* list) {
  const CompeteParams& p = tile.args.p;
  const int64_t position = tile.place.item * p.positions + tile.place.first + within;
  T* column = tile.u + within;
  const auto read = [&](int unit) { return to_float(column[unit * Tile<T>::kPitch]); };
  Chosen chosen;
  const PositionState at = compete_row<T>(row, lane_top, tile.args, read, list, chosen);
  if (!kStateOnly && (p.winner_unit || p.winner_activity)) {
    write_winners(row, chosen, tile.args, position, at, list);
  }
  if (lane_index() == 0) tile.shared.state[within] = at;
  if (kStateOnly || !tile.marks || !chosen.ties || at.threshold != at.threshold) return;
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
}

// Of both positions of the words of a lane: the largest, a bound of k winners, and which elements reach it.
template <class T, int kElements>
struct PairBounds {
  static constexpr int kMasks = divide_up(kElements, kMaskWords);
  uint32_t top, bound, mask[kMasks];

  __device__ __forceinline__ PairBounds(const uint32_t (&word)[kElements], int k)
      : bound(minus_infinities<T>()), mask{} {
    constexpr int kFree = kKeyFreeBits<T>;
    uint32_t part[2], key[2];
    largest_of<T>(word, part);
    top = Pair<T>::max(part[0], part[1]);
    if (k == 0 || k > static_cast<int>(kWarp)) return;
    if (k < kManyWinners) {
      bounds_of<kFree>({Pair<T>::low(top), Pair<T>::high(top)}, k, key);
    } else {
      close_bounds_of<kFree>(
          {{Pair<T>::low(part[0]), Pair<T>::low(part[1])}, {Pair<T>::high(part[0]), Pair<T>::high(part[1])}},
          k, key);
    }
    bound = Pair<T>::of(value_above<kFree>(key[0]), value_above<kFree>(key[1]));
#pragma unroll
    for (int i = 0; i < kMasks; ++i) {
      mask[i] = reaching_mask<T>(word + i * kMaskWords, kElements - i * kMaskWords, bound);
    }
  }

  template <class Mask>
  __device__ __forceinline__ Mask reaching(int half) const {
    Mask bits = 0;
#pragma unroll
    for (int i = 0; i < kMasks; ++i) {
      bits |= static_cast<Mask>(mask[i] >> 16 * half & 0xffff) << kMaskWords * i;
    }
    return bits;
  }
};

template <int kElements, bool kStateOnly>
__device__ __forceinline__ void compete_tile(const LoadedTile<float>& tile) {
  const int warp = warp_index();
  for (int within = warp; within < tile.place.count; within += kCompeteWarps) {
    FloatColumn<kElements> row;
    row.units = static_cast<int>(tile.args.p.units);
    float top = -infinity();
#pragma unroll
    for (int first = 0; first < kElements; first += row.kChunk) {
      if (!row.has_chunk(first)) break;
#pragma unroll
      for (int i = first; i < first + row.kChunk; ++i) {
        row.element[i] = tile.u[row.unit(static_cast<unsigned>(i)) * Tile<float>::kPitch + within];
        top = ptx::max_nan_f32(top, row.element[i]);
      }
    }
    compete_column<kStateOnly>(row, top, tile, within, tile.shared.list[warp]);
  }
}

// A warp has both positions of a word.
template <int kElements, bool kStateOnly, class T>
__device__ __forceinline__ void compete_tile(const LoadedTile<T>& tile) {
  using Column = TileColumn<T, kElements>;
  constexpr int kStep = static_cast<int>(kWarp) * TileThread<T>::kRowWords;
  const int warp = warp_index(), lane = static_cast<int>(lane_index());
#pragma unroll 1
  for (int within = 2 * warp; within < tile.place.count; within += 2 * kCompeteWarps) {
    Column row;
    row.units = static_cast<int>(tile.args.p.units);
    const uint32_t* column = reinterpret_cast<const uint32_t*>(tile.u + lane * Tile<T>::kPitch + within);
#pragma unroll
    for (int i = 0; i < kElements; ++i) row.word[i] = column[i * kStep];
    const PairBounds<T, kElements> bounds(row.word, static_cast<int>(tile.args.p.winners));
#pragma unroll 1
    for (int half = 0; half < 2 && within + half < tile.place.count; ++half) {
      row.half = half;
      row.bound = key_of(Pair<T>::low(bounds.bound >> 16 * half));
      row.reaching = bounds.template reaching<typename Column::Mask>(half);
      const float top = Pair<T>::low(bounds.top >> 16 * half);
      compete_column<kStateOnly>(row, top, tile, within + half, tile.shared.list[warp]);
    }
  }
}

// Blocks of a multiprocessor at once: as many as registers and tiles leave room for. sm_80 has room for four
// tiles of 512 units.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTilesOf512 = 4;
#else
constexpr int kTilesOf512 = 5;
#endif
template <int kElements, bool kStateOnly>
constexpr int kTileBlocks = kElements == 48                 ? 2 - kIsBlackwell
                            : kElements > 16                ? 2 + kStateOnly
                            : kStateOnly && kElements == 16 ? kTilesOf512
                                                            : 4 + kStateOnly;

// Whether there would be room for one more that makes the state alone.
template <class T, int kElements>
constexpr bool kHasStateForm = kElements == 32 || (kElements < 32 && sizeof(T) == 2);

// kStateOnly: neither activities nor lists are asked for.
template <class T, int kElements, bool kStateOnly>
__global__ void __launch_bounds__(kCompeteThreads, (kTileBlocks<kElements, kStateOnly>))
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

  const bool copies = sizeof(T) == 2 && p.y && copies_winners(competition_of(args)) && args.y_vectors &&
                      place.count == Tile<T>::kPositions;
  compete_tile<kElements, kStateOnly>(LoadedTile<T>{args, place, tile, shared, copies});
  __syncthreads();
  const int within = static_cast<int>(threadIdx.x);
  if (within < place.count) {
    write_state(p, place.item * p.positions + place.first + within, shared.state[within]);
  }
  if (kStateOnly || !p.y) return;
  if constexpr (sizeof(T) == 2) {
    if (copies) return write_winning_tile(args, place, tile, shared.state);
  }
  write_tile(args, place, tile, shared.state);
}

// Dynamic shared memory of a block.
template <class T, int kElements>
constexpr size_t kTileBytes = sizeof(TileStates<T>) + kElements * kWarp * Tile<T>::kPitch * sizeof(T);

template <class T, int kElements>
Status launch_planes(const CompeteArgs& args, Stream stream) {
  const CompeteParams& p = args.p;
  const int64_t tiles = p.batch * divide_up<int64_t>(p.positions, Tile<T>::kPositions);
  auto kernel = planes_kernel<T, kElements, false>;
  if constexpr (kHasStateForm<T, kElements>) {
    if (wants_state_only(p)) kernel = planes_kernel<T, kElements, true>;
  }
  return launch("", kernel, {tiles, kCompeteThreads, kTileBytes<T, kElements>}, stream, args);
}

}  // namespace
}  // namespace ghl
