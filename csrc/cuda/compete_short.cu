// Competition among up to 1024 units: a warp for each position, its row in the warp's registers.
//
// Rows, whose units are contiguous, are loaded 16 bytes a lane, and a row ahead. Planes, whose positions are
// contiguous, pass through a tile of shared memory, [units][64 bytes of positions], of which a warp then
// reads columns; activities are written from the tile with lanes along positions again. The planes' kernel
// takes any other strides too, more slowly.
#include "cuda/compete.cuh"

namespace ghl {
namespace {

template <class T>
__device__ __forceinline__ T minus_infinity() {
  return from_float<T>(-infinity());
}

// The state of the position whose row this is.
template <class T, class Row, class Read>
__device__ __forceinline__ PositionState compete_row(const Row& row, const CompeteArgs& args, Read read,
                                                     unsigned* list) {
  const CompeteParams& p = args.p;
  float lane_top = -infinity();
  row.for_each([&](int, float v) { lane_top = ptx::max_nan_f32(lane_top, v); });
  if (__any_sync(kAllLanes, lane_top != lane_top)) return bad_state();

  PositionState at{0.0f, 0, 0.0f, 0};
  const bool selects = p.winners > 0;
  if (selects) {
    const Cut cut = select_kth<kKeyFreeBits<T>>(row, lane_top, static_cast<int>(p.winners), read, list);
    at.threshold = cut.threshold;
    at.cut = cut.unit;
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

// The values of a row become the activities.
template <class Row>
__device__ __forceinline__ void activate(Row& row, const PositionState& at, const CompeteArgs& args) {
  by_competition(args, [&](const Competition& competition) {
#pragma unroll
    for (int first = 0; first < Row::kElements; first += Row::kVector) {
      if (!row.has_chunk(first)) break;
      const int unit = Row::unit(first);
#pragma unroll
      for (int j = 0; j < Row::kVector; ++j) {
        row.value[first + j] = activity_of(row.value[first + j], unit + j, at, competition);
      }
    }
  });
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
__device__ __forceinline__ void write_winners(const Row& row, uint32_t winners, const CompeteArgs& args,
                                              int64_t position, const PositionState& at) {
  const bool bad = at.threshold != at.threshold;
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
      if (winners >> i & 1) write_winner(args.p, position, slot++, Row::unit(i), row.value[i], bad);
    }
  }
}

// Blocks of a multiprocessor at once: so many that the registers of a row leave room for.
template <class T, int kElements>
constexpr int kBlocksAtOnce = kElements == 16 ? (sizeof(T) == 2 ? 4 : 3) : (sizeof(T) == 2 ? 3 : 2);

// --- rows -----------------------------------------------------------------------------------------

// Two elements of a word, or the one, as floats.
__device__ __forceinline__ void unpack(uint32_t word, float* value, float*) {
  value[0] = __uint_as_float(word);
}
__device__ __forceinline__ void unpack(uint32_t word, float* value, bf16*) {
  value[0] = __uint_as_float(word << 16);
  value[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack(uint32_t word, float* value, f16*) {
  value[0] = ptx::cvt_f32_f16(static_cast<uint16_t>(word));
  value[1] = ptx::cvt_f32_f16(static_cast<uint16_t>(word >> 16));
}

// A row as it lies in memory. Words, since what takes elements apart would wait for the load.
template <class T, int kElements>
struct RawRow {
  static constexpr int kVector = Vector<T>::size;
  static constexpr int kPair = 4 / sizeof(T);
  static constexpr int kWords = kElements / kPair;
  using Row = WarpRow<kVector, kElements>;
  uint32_t word[kWords];

  __device__ __forceinline__ void load(const T* u, int units, bool vectors) {
    const T* mine = u + Row::unit(0);
    const int left = units - Row::unit(0);
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const int first = i * kPair * static_cast<int>(kWarp);
      if (vectors) {
        const uint32_t none = pair(minus_infinity<T>(), minus_infinity<T>());
        uint4 bits{none, none, none, none};
        if (first < left) bits = __ldg(reinterpret_cast<const uint4*>(mine + first));
        word[i] = bits.x;
        word[i + 1] = bits.y;
        word[i + 2] = bits.z;
        word[i + 3] = bits.w;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) word[i + j] = pair_at(mine, first + j * kPair, left);
      }
    }
  }

  __device__ __forceinline__ Row unpacked(int units) const {
    Row row;
    row.units = units;
#pragma unroll
    for (int i = 0; i < kWords; ++i) unpack(word[i], row.value + i * kPair, static_cast<T*>(nullptr));
    return row;
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

template <class Y>
__device__ __forceinline__ Vector<Y> pack(const float* y) {
  Vector<Y> vector;
#pragma unroll
  for (int i = 0; i < Vector<Y>::size; ++i) vector.element[i] = from_float<Y>(y[i]);
  return vector;
}

template <>
__device__ __forceinline__ Vector<bf16> pack<bf16>(const float* y) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = ptx::cvt_rn_bf16x2_f32(y[2 * i + 1], y[2 * i]);
  Vector<bf16> vector;
  __builtin_memcpy(&vector, words, sizeof vector);
  return vector;
}

template <class Y, class Row>
__device__ __forceinline__ void write_row(const Row& row, bool vectors, Y* y) {
  Y* mine = y + Row::unit(0);
  const int left = row.units - Row::unit(0);
#pragma unroll
  for (int i = 0; i < Row::kElements; i += Row::kVector) {
    if (!row.has_chunk(i)) break;
    const int first = i * static_cast<int>(kWarp);
    if (vectors) {
#pragma unroll
      for (int j = 0; j < Row::kVector; j += Vector<Y>::size) {
        if (first + j < left) store_vector(mine + first + j, pack<Y>(row.value + i + j));
      }
    } else {
#pragma unroll
      for (int j = 0; j < Row::kVector; ++j) {
        if (first + j < left) mine[first + j] = from_float<Y>(row.value[i + j]);
      }
    }
  }
}

template <class T, int kElements>
__global__ void __launch_bounds__(kCompeteThreads, (kBlocksAtOnce<T, kElements>))
    rows_kernel(const __grid_constant__ CompeteArgs args) {
  __shared__ unsigned listed[kCompeteWarps][kListed];
  const CompeteParams& p = args.p;
  const int units = static_cast<int>(p.units), warp = static_cast<int>(threadIdx.x / kWarp);
  const int64_t positions = p.batch * p.positions, step = static_cast<int64_t>(gridDim.x) * kCompeteWarps;
  const bool lists = p.winner_unit || p.winner_activity;
  const auto source_of = [&](int64_t position) {
    return static_cast<const T*>(p.u) + offset_of(p.u_layout, place_of(p, position));
  };

  int64_t position = static_cast<int64_t>(blockIdx.x) * kCompeteWarps + warp;
  if (position >= positions) return;
  const T* source = source_of(position);
  RawRow<T, kElements> raw;
  raw.load(source, units, args.u_vectors);
  while (true) {
    auto row = raw.unpacked(units);
    const T* here = source;
    const int64_t next = position + step;
    if (next < positions) {
      source = p.batch == 1 ? source + step * p.u_layout.stride_position : source_of(next);
      raw.load(source, units, args.u_vectors);
    }
    const auto read = [&](int unit) { return to_float(here[unit]); };
    const PositionState at = compete_row<T>(row, args, read, listed[warp]);
    if (lane_index() == 0) write_state(p, position, at);
    if (p.y || lists) {
      const uint32_t winners = lists ? winners_of(row, args, at) : 0;
      activate(row, at, args);
      if (lists) write_winners(row, winners, args, position, at);
    }
    if (p.y) {
      const int64_t offset = offset_of(p.y_layout, place_of(p, position));
      if (p.y_dtype == DType::f32) {
        write_row(row, args.y_vectors, static_cast<float*>(p.y) + offset);
      } else {
        write_row(row, args.y_vectors, static_cast<T*>(p.y) + offset);
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
  static constexpr int kChunkUnits = 128;  // columns are read in multiples of it

  static __host__ __device__ int rows(int64_t units) {
    return static_cast<int>(divide_up<int64_t>(units, kChunkUnits)) * kChunkUnits;
  }
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

template <class T>
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
  const int end = Tile<T>::rows(units) * Tile<T>::kPitch;
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

template <class T, int kElements>
__global__ void __launch_bounds__(kCompeteThreads, (kElements == 16 ? 4 : 2))
    planes_kernel(const __grid_constant__ CompeteArgs args) {
  using Row = WarpRow<1, kElements>;
  const CompeteParams& p = args.p;
  const int units = static_cast<int>(p.units), warp = static_cast<int>(threadIdx.x / kWarp);
  TileStates<T>& shared = *dynamic_shared<TileStates<T>>();
  T* tile = reinterpret_cast<T*>(&shared + 1);

  // at most the blocks of the grid
  const unsigned tiles = static_cast<unsigned>(divide_up<int64_t>(p.positions, Tile<T>::kPositions));
  TilePlace place{blockIdx.x / tiles, static_cast<int64_t>(blockIdx.x % tiles) * Tile<T>::kPositions, 0};
  place.count = static_cast<int>(min(p.positions - place.first, static_cast<int64_t>(Tile<T>::kPositions)));
  load_tile(args, place, tile);
  __syncthreads();

  for (int within = warp; within < place.count; within += kCompeteWarps) {
    const T* column = tile + within;
    const auto read = [&](int unit) { return to_float(column[unit * Tile<T>::kPitch]); };
    Row row;
    row.units = units;
#pragma unroll
    for (int first = 0; first < kElements; first += Row::kChunk) {
      if (!row.has_chunk(first)) break;
#pragma unroll
      for (int i = first; i < first + Row::kChunk; ++i) row.value[i] = read(Row::unit(i));
    }
    const int64_t position = place.item * p.positions + place.first + within;
    const PositionState at = compete_row<T>(row, args, read, shared.list[warp]);
    if (p.winner_unit || p.winner_activity) {
      const uint32_t winners = winners_of(row, args, at);
      activate(row, at, args);
      write_winners(row, winners, args, position, at);
    }
    if (lane_index() == 0) shared.state[within] = at;
  }
  __syncthreads();
  const int within = static_cast<int>(threadIdx.x);
  if (within < place.count) {
    write_state(p, place.item * p.positions + place.first + within, shared.state[within]);
  }
  if (!p.y) return;
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
    return launch(describe(p), rows_kernel<T, kElements>, {blocks, kCompeteThreads, 0}, stream, args);
  }
  const int64_t tiles = p.batch * divide_up<int64_t>(p.positions, Tile<T>::kPositions);
  const size_t tile_bytes = static_cast<size_t>(Tile<T>::rows(p.units)) * Tile<T>::kPitch * sizeof(T);
  const Grid grid{tiles, kCompeteThreads, sizeof(TileStates<T>) + tile_bytes};
  return launch(describe(p), planes_kernel<T, kElements>, grid, stream, args);
}

}  // namespace

Status launch_short(const CompeteArgs& args, Stream stream) {
  return by_dtype(args.p.u_dtype, [&]<class T>(T*) {
    return args.p.units <= 512 ? launch_elements<T, 16>(args, stream) : launch_elements<T, 32>(args, stream);
  });
}

}  // namespace ghl
