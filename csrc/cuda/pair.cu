// The pair [y; dL/du]^T x by cp.async, ldmatrix and mma.sync: sm_80 and newer.
//
// An implicit matrix product: rows are units, columns the elements of a patch, the summed dimension the
// positions. A block multiplies a left tile of two halves of 64 units by a tile of x, 64 bytes of positions
// at a step. The halves are dL/du and y of the same units, or two runs of units where one result is wanted;
// which is which only decides what is loaded and where the sums go.
//
// Tiles travel through a ring in shared memory. In step s a thread queues the copies of step s + stages - 1,
// multiplies tile s, and turns the u that it copied itself for step s + 1 into y, in place; one barrier a
// step.
#include <algorithm>
#include <type_traits>

#include "cuda/activity.cuh"
#include "cuda/dtype.cuh"
#include "cuda/pair.cuh"
#include "cuda/pair_plan.h"
#include "cuda/pair_sum.h"
#include "cuda/ptx.cuh"

namespace ghl {
namespace {

// How a half of the left tile is copied and lies in shared memory.
enum class Access : int {
  rows = 0,    // units are contiguous: 16 bytes at a time, [position][unit]
  planes = 1,  // positions are contiguous: 16 bytes at a time, [unit][position]
  plain = 2,   // an element at a time, [position][unit]
};

struct Left {
  const char* data;
  bool is_u;
  Access access;
  Divisor inner;
  int64_t stride_batch;  // strides in bytes
  int64_t stride_position;
  int64_t stride_unit;
  float* out;
};

struct KernelParams {
  PatchIndex patches;  // offsets in bytes
  const char* x;
  bool x_vectors;  // x is copied 16 bytes at a time

  Left left[2];
  bool one_result;  // the halves are neighboring units
  Competition competition;
  StatePointers state;
  bool plain_softmax;  // over all units
  bool state_here;     // over the units of a half, from them alone

  int32_t units;    // of a group
  int32_t columns;  // of a group
  int32_t groups;
  int64_t positions;
  int32_t whole_tiles;  // the first ones, each with all positions
  int32_t split_tiles;  // the others, with a part each
  int32_t part_steps;
  int32_t unit_blocks;
  int32_t column_blocks;
  int32_t stages;

  Filters result_layout;
  int32_t result_channels;
  float* workspace;  // [parts, split tiles, 2 halves, columns of a tile]
};

// --- element types ------------------------------------------------------------------------------

struct Tf32 {
  using Element = float;
  static constexpr bool kExact = false;
};

// float32 as a sum of two tf32: three products, all but the smallest.
struct Tf32x3 {
  using Element = float;
  static constexpr bool kExact = true;
};

// --- tiles --------------------------------------------------------------------------------------

template <class Kind_, bool kWide>
struct Config {
  using Kind = Kind_;
  using Element = typename Kind::Element;
  static constexpr int kSize = sizeof(Element);
  static constexpr int kVector = 16 / kSize;
  static constexpr int kPositions = pair_positions(kSize);
  static constexpr int kColumns = pair_columns(kWide);
  static constexpr int kWarpColumns = kWide ? 64 : 32;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = 2 * kWarpsAcross * static_cast<int>(kWarp);
  static constexpr int kResident = pair_resident(kWide, kSize);

  static constexpr int kUnitChunks = kPairHalf / kVector;       // chunks of 16 bytes in a row of a half
  static constexpr int kPositionChunks = kPositions / kVector;  // and in a plane
  static constexpr int kColumnChunks = kColumns / kVector;
  static constexpr int kHalfChunks = kPositions * kUnitChunks;
  static constexpr int kHalfBytes = 16 * kHalfChunks;
  static constexpr int kTileBytes = 2 * kHalfBytes + 16 * kPositions * kColumnChunks;
  static_assert(kHalfChunks % kThreads == 0 && kThreads % kColumnChunks == 0 && kThreads % kPositions == 0);

  // Chunks are permuted within their row, so that the lanes of one load touch all banks.
  static __device__ __forceinline__ int twist(int position) {
    return kSize == 2 ? position & 7 : (position & 3) << 1;
  }
  static __device__ __forceinline__ int row_chunk(int position, int chunk, int chunks_in_row) {
    return 16 * (position * chunks_in_row + (chunk ^ twist(position)));
  }
  static __device__ __forceinline__ int plane_chunk(int unit, int chunk) {
    return 16 * (unit * kPositionChunks + (chunk ^ (unit >> 1 & (kPositionChunks - 1))));
  }
};

// Where the positions of a step begin, in bytes: in x, and in what the halves are read from.
template <int kPositions>
struct Places {
  struct alignas(16) InX {
    int64_t offset;
    int32_t at[3];
  };
  InX x[kPositions];
  int64_t left[2][kPositions];
};

template <int kPositions>
struct States {
  float threshold[kPositions];
  int32_t cut[kPositions];
  float logsumexp[kPositions];
  int32_t first[kPositions];
};

// Where a chunk of a half lies, in the tile and in shared memory.
struct Chunk {
  int position;
  int unit;
  int offset;
};

template <class C, bool kPlanes>
__device__ __forceinline__ Chunk chunk_of(int index) {
  if constexpr (kPlanes) {
    const int unit = index / C::kPositionChunks, chunk = index % C::kPositionChunks;
    return {chunk * C::kVector, unit, C::plane_chunk(unit, chunk)};
  } else {
    const int position = index / C::kUnitChunks, chunk = index % C::kUnitChunks;
    return {position, chunk * C::kVector, C::row_chunk(position, chunk, C::kUnitChunks)};
  }
}

// A block, as each of its threads sees it.
template <class C>
struct Block {
  using Element = typename C::Element;

  const KernelParams& params;
  char* tiles;
  States<C::kPositions>* states;
  Places<C::kPositions>* places;  // of an even and of an odd step
  Place* columns;

  int thread, lane;
  int half;         // of the left tile, that the warp multiplies
  int warp_column;  // the first of its columns in the tile
  int group, unit_block, first_column;
  float* share;  // of the workspace, where the tile is split
  int64_t begin;
  int count;  // of positions

  __device__ __forceinline__ explicit Block(const KernelParams& p) : params(p) {
    tiles = dynamic_shared<char>();
    states = reinterpret_cast<States<C::kPositions>*>(tiles + params.stages * C::kTileBytes);
    places = reinterpret_cast<Places<C::kPositions>*>(states + params.stages);
    columns = reinterpret_cast<Place*>(places + 2);
    thread = static_cast<int>(threadIdx.x);
    lane = thread % static_cast<int>(kWarp);
    const int warp = thread / static_cast<int>(kWarp);
    half = warp / C::kWarpsAcross;
    warp_column = warp % C::kWarpsAcross * C::kWarpColumns;
    const unsigned whole = params.whole_tiles, rest = blockIdx.x - whole;
    const bool is_whole = blockIdx.x < whole;
    // blocks of one part are neighbors: they read the same x, u and dL/du while these are in L2
    unsigned tile = is_whole ? blockIdx.x : whole + rest % params.split_tiles;
    unit_block = static_cast<int>(tile % params.unit_blocks);
    tile /= params.unit_blocks;
    first_column = static_cast<int>(tile % params.column_blocks) * C::kColumns;
    group = static_cast<int>(tile / params.column_blocks);
    share = is_whole ? nullptr : params.workspace + int64_t{rest} * (2 * kPairHalf * C::kColumns);
    const int64_t length = int64_t{params.part_steps} * C::kPositions;
    begin = is_whole ? 0 : rest / params.split_tiles * length;
    count = static_cast<int>(is_whole ? params.positions : min(length, params.positions - begin));
  }

  __device__ __forceinline__ int first_unit(int h) const {
    return params.one_result ? (2 * unit_block + h) * kPairHalf : unit_block * kPairHalf;
  }
  __device__ __forceinline__ bool has_units(int h) const { return first_unit(h) < params.units; }
  __device__ __forceinline__ char* tile(int stage) const { return tiles + stage * C::kTileBytes; }
  __device__ __forceinline__ char* x_tile(int stage) const { return tile(stage) + 2 * C::kHalfBytes; }
  __device__ __forceinline__ int steps() const { return divide_up(count, C::kPositions); }
  // Positions of the block from one of a step on; 0 or less where it is none.
  __device__ __forceinline__ int positions_left(int step, int position) const {
    return count - step * C::kPositions - position;
  }
  __device__ __forceinline__ int64_t position_of(int step, int position) const {
    return begin + step * C::kPositions + position;
  }
};

// --- copies -------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void place_columns(const Block<C>& block) {
  for (int i = block.thread; i < C::kColumns; i += C::kThreads) {
    const int column = block.first_column + i;
    Place place = block.params.patches.column(column);
    if (column >= block.params.columns) place.at[0] = kNowhere;
    block.columns[i] = place;
  }
}

// A warp each for x and the two halves, since a position costs several divisions.
template <class C>
__device__ __forceinline__ void place_positions(const Block<C>& block, int step) {
  const KernelParams& params = block.params;
  Places<C::kPositions>& places = block.places[step & 1];
  if (block.lane >= C::kPositions) return;
  const int warp = block.thread / static_cast<int>(kWarp);
  const bool exists = block.positions_left(step, block.lane) > 0;
  const int64_t position = exists ? block.position_of(step, block.lane) : 0;
  const int64_t group = block.group;
  if (warp == 0) {
    const Place place = params.patches.patch(position);
    const int64_t group_offset = group * params.patches.channels.value * params.patches.stride_channel;
    places.x[block.lane] = {place.offset + group_offset,
                            {exists ? place.at[0] : kNowhere, place.at[1], place.at[2]}};
  } else if (warp <= 2) {
    const Left& left = params.left[warp - 1];
    const int64_t item = left.inner.divide(position);
    const int64_t within = position - item * left.inner.value;
    places.left[warp - 1][block.lane] =
        item * left.stride_batch + within * left.stride_position + group * params.units * left.stride_unit;
  }
}

// The states travel a step ahead of the tile whose u they belong to.
template <class C>
__device__ __forceinline__ void copy_states(const Block<C>& block, int step, int stage) {
  static_assert(4 * C::kPositions <= C::kThreads);
  if (block.thread >= 4 * C::kPositions) return;
  const StatePointers& state = block.params.state;
  const int field = block.thread / C::kPositions, position = block.thread % C::kPositions;
  const void* source = state.first;
  if (field == 0) source = state.threshold;
  if (field == 1) source = state.cut;
  if (field == 2) source = state.logsumexp;
  const bool exists = source && block.positions_left(step, position) > 0;
  ptx::cp_async_ca_4(reinterpret_cast<uint32_t*>(block.states + stage) + block.thread,
                     static_cast<const char*>(source) + 4 * block.position_of(step, position),
                     exists ? 4 : 0);
}

// The element at an address, or zero.
template <class Element>
__device__ __forceinline__ Element element_at(const char* address, bool exists) {
  return exists ? *reinterpret_cast<const Element*>(address) : Element{};
}

template <class C, Access kAccess>
__device__ __forceinline__ void copy_half_by(const Block<C>& block, int h, int step, int stage) {
  using Element = typename C::Element;
  const Left& left = block.params.left[h];
  const int64_t* rows = block.places[step & 1].left[h];
  char* tile = block.tile(stage) + h * C::kHalfBytes;
#pragma unroll 1
  for (int i = 0; i < C::kHalfChunks / C::kThreads; ++i) {
    const Chunk chunk = chunk_of<C, kAccess == Access::planes>(block.thread + i * C::kThreads);
    const int unit = block.first_unit(h) + chunk.unit;
    const bool exists = block.positions_left(step, chunk.position) > 0 && unit < block.params.units;
    const char* row = left.data + rows[chunk.position];
    if constexpr (kAccess == Access::plain) {
      Vector<Element> values;
#pragma unroll
      for (int e = 0; e < C::kVector; ++e) {
        const char* address = row + (unit + e) * left.stride_unit;
        values.element[e] = element_at<Element>(address, exists && unit + e < block.params.units);
      }
      *reinterpret_cast<Vector<Element>*>(tile + chunk.offset) = values;
    } else {
      const char* source = row + (kAccess == Access::rows ? unit * C::kSize : unit * left.stride_unit);
      ptx::cp_async_cg_16(tile + chunk.offset, source, exists ? 16 : 0);
    }
  }
}

template <class C>
__device__ __forceinline__ void copy_half(const Block<C>& block, int h, int step, int stage) {
  switch (block.params.left[h].access) {
    case Access::rows:
      return copy_half_by<C, Access::rows>(block, h, step, stage);
    case Access::planes:
      return copy_half_by<C, Access::planes>(block, h, step, stage);
    default:
      return copy_half_by<C, Access::plain>(block, h, step, stage);
  }
}

template <class C>
__device__ __forceinline__ Place place_in_x(const Block<C>& block, int step, int position) {
  const auto at = block.places[step & 1].x[position];
  return {at.offset, {at.at[0], at.at[1], at.at[2]}};
}

// The columns of a chunk lie in one tap; `column` is the first.
template <class C>
__device__ __forceinline__ void copy_x_vectors(const Block<C>& block, int step, int stage,
                                               const Place& column) {
  const char* data = block.params.x + column.offset;
  const int chunk = block.thread % C::kColumnChunks;
  constexpr int kRows = C::kThreads / C::kColumnChunks;
#pragma unroll
  for (int i = 0; i < C::kPositions / kRows; ++i) {
    const int position = block.thread / C::kColumnChunks + i * kRows;
    const Place place = place_in_x(block, step, position);
    const bool inside = block.params.patches.inside(place, column);
    ptx::cp_async_cg_16(block.x_tile(stage) + C::row_chunk(position, chunk, C::kColumnChunks),
                        data + place.offset, inside ? 16 : 0);
  }
}

template <class C>
__device__ __forceinline__ void copy_x_elements(const Block<C>& block, int step, int stage) {
  using Element = typename C::Element;
  const int position = block.thread % C::kPositions;
  const Place place = place_in_x(block, step, position);
#pragma unroll 1
  for (int chunk = block.thread / C::kPositions; chunk < C::kColumnChunks;
       chunk += C::kThreads / C::kPositions) {
    Vector<Element> values;
#pragma unroll
    for (int e = 0; e < C::kVector; ++e) {
      const Place column = block.columns[chunk * C::kVector + e];
      values.element[e] = element_at<Element>(block.params.x + place.offset + column.offset,
                                              block.params.patches.inside(place, column));
    }
    const int offset = C::row_chunk(position, chunk, C::kColumnChunks);
    *reinterpret_cast<Vector<Element>*>(block.x_tile(stage) + offset) = values;
  }
}

// --- activities ---------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void load_chunk(float (&u)[C::kVector], const char* chunk) {
  const auto values = *reinterpret_cast<const Vector<typename C::Element>*>(chunk);
#pragma unroll
  for (int e = 0; e < C::kVector; ++e) u[e] = to_float(values.element[e]);
}

template <class C>
__device__ __forceinline__ void store_chunk(char* chunk, const float (&y)[C::kVector]) {
  uint4 bits;
  if constexpr (C::kSize == 2) {
    using Kind = typename C::Kind;
    bits = {Kind::pack(y[0], y[1]), Kind::pack(y[2], y[3]), Kind::pack(y[4], y[5]), Kind::pack(y[6], y[7])};
  } else {
    bits = {__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]), __float_as_uint(y[3])};
  }
  *reinterpret_cast<uint4*>(chunk) = bits;
}

// softmax over the units of a position, which lie in the chunks of neighboring lanes.
template <class C>
__device__ __forceinline__ void softmax_of_lanes(float (&u)[C::kVector], int units_left, float scale) {
  constexpr float kLog2e = 1.4426950408889634f;
  float top = __int_as_float(0xff800000);
#pragma unroll
  for (int e = 0; e < C::kVector; ++e) {
    u[e] = e < units_left ? u[e] * scale : __int_as_float(0xff800000);
    top = fmaxf(top, u[e]);
  }
#pragma unroll
  for (int distance = C::kUnitChunks / 2; distance > 0; distance /= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
  }
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < C::kVector; ++e) {
    u[e] = ptx::ex2_approx_ftz_f32((u[e] - top) * kLog2e);
    sum += u[e];
  }
#pragma unroll
  for (int distance = C::kUnitChunks / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  const float share = __fdividef(1.0f, sum);
#pragma unroll
  for (int e = 0; e < C::kVector; ++e) u[e] *= share;
}

// u becomes y in place, in the chunks that this thread has copied itself. Beyond the positions x is 0, u and
// the states are too, and y is finite, which is all it need be.
template <class C, bool kPlanes>
__device__ __forceinline__ void make_activities_by(const Block<C>& block, int h, int stage) {
  const KernelParams& params = block.params;
  const Competition& competition = params.competition;
  const States<C::kPositions>& states = block.states[stage];
#pragma unroll 1
  for (int i = 0; i < C::kHalfChunks / C::kThreads; ++i) {
    const Chunk chunk = chunk_of<C, kPlanes>(block.thread + i * C::kThreads);
    const int unit = block.first_unit(h) + chunk.unit;
    char* address = block.tile(stage) + h * C::kHalfBytes + chunk.offset;
    float y[C::kVector];
    load_chunk<C>(y, address);
    if (!kPlanes && params.state_here) {
      softmax_of_lanes<C>(y, params.units - unit, competition.scale);
    } else if (params.plain_softmax) {
#pragma unroll
      for (int e = 0; e < C::kVector; ++e) {
        y[e] = softmax_of(y[e], competition.scale, states.logsumexp[chunk.position + (kPlanes ? e : 0)]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < C::kVector; ++e) {
        const int position = chunk.position + (kPlanes ? e : 0);
        const PositionState at{states.threshold[position], states.cut[position], states.logsumexp[position],
                               states.first[position]};
        const int in_group = unit + (kPlanes ? 0 : e);
        y[e] = activity_of(y[e], block.group * params.units + in_group, at, competition);
      }
    }
    store_chunk<C>(address, y);
  }
}

template <class C>
__device__ __forceinline__ void make_activities(const Block<C>& block, int h, int stage) {
  if (block.params.left[h].access == Access::planes) {
    make_activities_by<C, true>(block, h, stage);
  } else {
    make_activities_by<C, false>(block, h, stage);
  }
}

// --- products -----------------------------------------------------------------------------------

template <class C>
using Sums = float[4][C::kWarpColumns / 8][4];

// 16 positions from k on.
template <class C>
__device__ __forceinline__ void multiply_16_bits(const Block<C>& block, Sums<C>& sums, int stage, int k) {
  const char* left = block.tile(stage) + block.half * C::kHalfBytes;
  const char* x = block.x_tile(stage);
  const int low = block.lane % 16, high = block.lane / 16;
  uint32_t a[4][4];
  if (block.params.left[block.half].access == Access::planes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::ldmatrix_x4(a[i], left + C::plane_chunk(16 * i + low, k / C::kVector + high));
    }
  } else {
    const int position = k + low % 8 + 8 * high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::ldmatrix_x4_trans(a[i], left + C::row_chunk(position, 2 * i + low / 8, C::kUnitChunks));
    }
  }
#pragma unroll
  for (int j = 0; j < C::kWarpColumns / 16; ++j) {
    uint32_t b[4];
    const int chunk = (block.warp_column + 16 * j) / C::kVector + high;
    ptx::ldmatrix_x4_trans(b, x + C::row_chunk(k + low, chunk, C::kColumnChunks));
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      C::Kind::mma(sums[i][2 * j], a[i], b0);
      C::Kind::mma(sums[i][2 * j + 1], a[i], b1);
    }
  }
}

// An element and what rounding it to tf32 leaves.
template <bool kExact>
__device__ __forceinline__ void load_tf32(uint32_t& rounded, uint32_t& rest, const char* address) {
  const float value = *reinterpret_cast<const float*>(address);
  rounded = ptx::cvt_rna_tf32_f32(value);
  if constexpr (kExact) rest = ptx::cvt_rna_tf32_f32(value - __uint_as_float(rounded));
}

// 8 positions from k on, and kRows times 16 units from `first` on.
template <class C, int kRows>
__device__ __forceinline__ void multiply_32_bits(const Block<C>& block, Sums<C>& sums, int stage, int k,
                                                 int first) {
  constexpr bool kExact = C::Kind::kExact;
  const char* left = block.tile(stage) + block.half * C::kHalfBytes;
  const char* x = block.x_tile(stage);
  const int row = block.lane / 4, in_four = block.lane % 4;
  const bool is_plane = block.params.left[block.half].access == Access::planes;
  uint32_t a[kRows][4], a_rest[kRows][4];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int unit = 16 * (first + i) + row + 8 * (r % 2), position = k + in_four + 4 * (r / 2);
      const int offset = is_plane ? C::plane_chunk(unit, position / 4) + position % 4 * 4
                                  : C::row_chunk(position, unit / 4, C::kUnitChunks) + unit % 4 * 4;
      load_tf32<kExact>(a[i][r], a_rest[i][r], left + offset);
    }
  }
#pragma unroll
  for (int j = 0; j < C::kWarpColumns / 8; ++j) {
    uint32_t b[2], b_rest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = k + in_four + 4 * r, column = block.warp_column + 8 * j + row;
      const int offset = C::row_chunk(position, column / 4, C::kColumnChunks) + column % 4 * 4;
      load_tf32<kExact>(b[r], b_rest[r], x + offset);
    }
    if constexpr (kExact) {
      // the small products first
#pragma unroll
      for (int i = 0; i < kRows; ++i) ptx::mma_m16n8k8_tf32(sums[first + i][j], a_rest[i], b);
#pragma unroll
      for (int i = 0; i < kRows; ++i) ptx::mma_m16n8k8_tf32(sums[first + i][j], a[i], b_rest);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) ptx::mma_m16n8k8_tf32(sums[first + i][j], a[i], b);
  }
}

template <class C>
__device__ __forceinline__ void multiply(const Block<C>& block, Sums<C>& sums, int stage) {
  constexpr int kDepth = C::kPositions / 2;
  if constexpr (C::kSize == 2) {
#pragma unroll
    for (int k = 0; k < C::kPositions; k += kDepth) multiply_16_bits<C>(block, sums, stage, k);
  } else {
    // fewer fragments at a time where their rests need registers too
    constexpr int kRows = C::Kind::kExact ? 2 : 4;
#pragma unroll 1
    for (int k = 0; k < C::kPositions; k += kDepth) {
#pragma unroll
      for (int first = 0; first < 4; first += kRows) {
        multiply_32_bits<C, kRows>(block, sums, stage, k, first);
      }
    }
  }
}

// --- results ------------------------------------------------------------------------------------

// The whole tile, whatever of it exists, to the block's share of the workspace.
template <class C>
__device__ __forceinline__ void store_part(const Block<C>& block, const Sums<C>& sums) {
  const int row = block.half * kPairHalf + block.lane / 4;
  const int column = block.warp_column + block.lane % 4 * 2;
  float* out = block.share + row * C::kColumns + column;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < C::kWarpColumns / 8; ++j) {
      const float* pair = &sums[i / 2][j][2 * (i % 2)];
      *reinterpret_cast<float2*>(out + 8 * i * C::kColumns + 8 * j) = {pair[0], pair[1]};
    }
  }
}

template <class C>
__device__ __forceinline__ void store_result(const Block<C>& block, const Sums<C>& sums) {
  const KernelParams& params = block.params;
  const Filters& layout = params.result_layout;
  const int rows_left = params.units - block.first_unit(block.half) - block.lane / 4;
  const int64_t unit = int64_t{block.group} * params.units + params.units - rows_left;
  float* out = params.left[block.half].out + unit * layout.stride_unit;
  const int first_column = block.first_column + block.warp_column + block.lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < C::kWarpColumns / 8; ++j) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int column = first_column + 8 * j + side;
      const int64_t tap = params.patches.channels.divide(column);
      const int64_t channel = column - tap * params.patches.channels.value;
      if (column >= params.columns || channel >= params.result_channels) continue;
      float* address = out + channel * layout.stride_channel + tap * layout.stride_tap;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (8 * i < rows_left) *address = sums[i / 2][j][2 * (i % 2) + side];
        address += 8 * layout.stride_unit;
      }
    }
  }
}

// --- the kernel ---------------------------------------------------------------------------------

__device__ __forceinline__ void wait_for_all_but(int groups) {
  static_assert(kPairFewestStages == 3 && kPairMostStages == 5);
  if (groups == 1) return ptx::cp_async_wait_group<1>();
  if (groups == 2) return ptx::cp_async_wait_group<2>();
  ptx::cp_async_wait_group<3>();
}

// Queues what step + stages - 1 and step + stages need, and makes the activities of step + 1.
template <class C>
__device__ __forceinline__ void feed(const Block<C>& block, const Place& column, int step, int stage) {
  const KernelParams& params = block.params;
  const int steps = block.steps(), stages = params.stages;
  const int queued = step + stages - 1, into = stage == 0 ? stages - 1 : stage - 1;
  if (queued >= 0 && queued < steps) {
    if (params.x_vectors) {
      copy_x_vectors(block, queued, into, column);
    } else {
      copy_x_elements(block, queued, into);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (block.has_units(h)) copy_half(block, h, queued, into);
    }
  }
  if (step + stages < steps) {
    place_positions(block, step + stages);
    copy_states(block, step + stages, stage);
  }
  ptx::cp_async_commit_group();
  wait_for_all_but(stages - 2);
  if (step + 1 < 0 || step + 1 >= steps) return;
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    if (params.left[h].is_u && block.has_units(h)) {
      make_activities(block, h, stage + 1 == stages ? 0 : stage + 1);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    pair_kernel(const __grid_constant__ KernelParams params) {
  const Block<C> block(params);
  place_columns(block);
  __syncthreads();
  const Place column = block.columns[block.thread % C::kColumnChunks * C::kVector];
  const bool busy = block.has_units(block.half) && block.first_column + block.warp_column < params.columns;
  Sums<C> sums = {};
  int stage = 0;
  for (int step = -params.stages; step < block.steps(); ++step) {
    // tiles, places and states of the others are there, and nobody reads the tile that is overwritten
    __syncthreads();
    // one half's warps multiply while the other's, on the same schedulers, copy and make activities
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == block.half) {
        feed(block, column, step, stage);
      } else if (step >= 0 && busy) {
        multiply(block, sums, stage);
      }
    }
    stage = stage + 1 == params.stages ? 0 : stage + 1;
  }
  if (!busy) return;
  if (block.share) {
    store_part(block, sums);
  } else {
    store_result(block, sums);
  }
}

// --- the launcher -------------------------------------------------------------------------------

Access access_of(const Responses& responses, int64_t group_units, int64_t positions, int64_t vector) {
  const bool items = responses.inner > 1;
  if (!is_aligned(responses.data) || (items && responses.stride_batch % vector)) return Access::plain;
  const int64_t row = items ? responses.stride_position : responses.stride_batch;
  if (responses.stride_unit == 1 && row % vector == 0 && group_units % vector == 0) return Access::rows;
  const bool whole = (items ? responses.inner : positions) % vector == 0;
  if (row == 1 && responses.stride_unit % vector == 0 && whole) return Access::planes;
  return Access::plain;
}

// A chunk of columns then lies in one tap, at a multiple of 16 bytes.
bool x_has_vectors(const PairParams& params, int64_t vector) {
  const ConvGeometry& geometry = params.geometry;
  bool aligned = is_aligned(params.x) && params.x_stride_channel == 1;
  aligned = aligned && params.geometry.group_channels() % vector == 0;
  aligned = aligned && (geometry.batch <= 1 || params.x_stride_batch % vector == 0);
  for (int d = 0; d < 3; ++d) {
    aligned = aligned && (geometry.in_size[d] <= 1 || params.x_stride[d] % vector == 0);
  }
  return aligned;
}

Left left_of(const Responses& responses, bool is_u, float* out, Access access, int64_t size) {
  return {static_cast<const char*>(responses.data),
          is_u,
          access,
          Divisor(std::max<int64_t>(1, responses.inner)),
          size * responses.stride_batch,
          size * responses.stride_position,
          size * responses.stride_unit,
          out};
}

int itemsize_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

PairPlan plan_of(const PairParams& params, const DeviceInfo& info) {
  const PairProblem problem{params.units / params.geometry.groups,
                            params.geometry.taps() * params.geometry.group_channels(),
                            params.geometry.groups,
                            params.geometry.positions(),
                            pair_results(params),
                            itemsize_of(params.dtype)};
  return pair_plan(problem, info.multiprocessors, info.shared_limit);
}

// Whether the kernel computes the state itself, which it can where a half holds all units of a position, in
// neighboring lanes.
bool makes_state(const PairParams& params) {
  const int64_t vector = 16 / itemsize_of(params.dtype);
  return needs_only_softmax(params) && params.geometry.groups == 1 && params.units <= kPairHalf &&
         access_of(params.u, params.units, params.geometry.positions(), vector) == Access::rows;
}

KernelParams kernel_params(const PairParams& params, const PairPlan& plan) {
  const int64_t groups = params.geometry.groups, units = params.units / groups;
  const int64_t size = itemsize_of(params.dtype), vector = 16 / size;
  const auto left = [&](const Responses& responses, bool is_u) {
    const Access access = access_of(responses, units, params.geometry.positions(), vector);
    return left_of(responses, is_u, is_u ? params.a : params.g, access, size);
  };
  const bool one = pair_results(params) == 1;
  // G first: its products can start while the other half's activities are computed
  const Left first = params.g ? left(params.grad, false) : left(params.u, true);
  const Left second = params.a ? left(params.u, true) : left(params.grad, false);
  return {PatchIndex(params, size),
          static_cast<const char*>(params.x),
          x_has_vectors(params, vector),
          {first, second},
          one,
          {params.activity, params.selects, params.anti, 1.0f / params.temperature},
          {params.threshold, params.cut, params.logsumexp, params.first},
          params.activity == Activity::softmax && !params.selects && !params.anti,
          makes_state(params),
          static_cast<int32_t>(units),
          static_cast<int32_t>(params.geometry.taps() * params.geometry.group_channels()),
          static_cast<int32_t>(groups),
          params.geometry.positions(),
          static_cast<int32_t>(plan.whole_tiles),
          static_cast<int32_t>(plan.split_tiles),
          static_cast<int32_t>(plan.part_steps),
          static_cast<int32_t>(plan.unit_blocks),
          static_cast<int32_t>(plan.column_blocks),
          plan.stages,
          params.result_layout,
          static_cast<int32_t>(params.result_channels),
          static_cast<float*>(params.workspace)};
}

template <class Kind>
Status launch_kind(const PairParams& params, const PairPlan& plan, Stream stream) {
  const int itemsize = itemsize_of(params.dtype);
  const size_t shared = pair_shared_bytes(plan.wide, itemsize, plan.stages);
  const auto run = [&](auto config) {
    using C = decltype(config);
    static_assert(sizeof(Places<C::kPositions>) == kPairPlaceBytes * C::kPositions);
    static_assert(sizeof(Place) == kPairColumnBytes);
    static_assert(pair_stage_bytes(C::kColumns == kPairWide, C::kSize) ==
                  C::kTileBytes + sizeof(States<C::kPositions>));
    return launch(pair_shape(params), pair_kernel<C>, {plan.blocks(), C::kThreads, shared}, stream,
                  kernel_params(params, plan));
  };
  return plan.wide ? run(Config<Kind, true>{}) : run(Config<Kind, false>{});
}

Status launch_products(const PairParams& params, const PairPlan& plan, Stream stream) {
  if (params.dtype == DType::bf16) return launch_kind<Bf16>(params, plan, stream);
  if (params.dtype == DType::f16) return launch_kind<F16>(params, plan, stream);
  return params.tf32 ? launch_kind<Tf32>(params, plan, stream) : launch_kind<Tf32x3>(params, plan, stream);
}

Status pair_mma(const PairParams& params, const DeviceInfo& info, Stream stream) {
  const PairPlan plan = plan_of(params, info);
  if (plan.stages == 0)
    return Status::failure(pair_shape(params) + ": the device's shared memory is too small");
  const int64_t positions = plan.parts > 1 && plan.whole_tiles == 0
                                ? plan.part_steps * pair_positions(itemsize_of(params.dtype))
                                : params.geometry.positions();
  if (plan.blocks() > kMostBlocks || positions > std::numeric_limits<int32_t>::max()) {
    return Status::failure(pair_shape(params) + ": too many tiles, or positions of one of them");
  }
  if (plan.parts > 1 && !params.workspace) return Status::failure(pair_shape(params) + ": no workspace");
  const Status status = launch_products(params, plan, stream);
  if (!status.ok || plan.parts <= 1) return status;
  return pair_sum_tiles(params,
                        {plan.parts, plan.split_tiles, plan.whole_tiles, plan.unit_blocks, plan.column_blocks,
                         2 * kPairHalf, kPairHalf, pair_columns(plan.wide), params.geometry.group_channels()},
                        stream);
}

bool has_wgmma([[maybe_unused]] const PairParams& params, [[maybe_unused]] const DeviceInfo& info) {
#ifdef GHL_CUDA_ON_HOST
  return false;
#else
  return info.capability == 90 && pair_sm90_takes(params, info);
#endif
}

// What an automatic choice comes to, or mma where the form that was asked for does not take the problem.
PairForm form_of(const PairParams& params, const DeviceInfo& info) {
  const auto may_be = [&](PairForm form) {
    return params.form == PairForm::automatic || params.form == form;
  };
  if (may_be(PairForm::narrow) && pair_narrow_takes(params, info)) return PairForm::narrow;
  if (may_be(PairForm::wgmma) && has_wgmma(params, info)) return PairForm::wgmma;
  return PairForm::mma;
}

bool makes_state(const PairParams& params, PairForm form) {
  if (params.form != PairForm::automatic && params.form != form) return false;
  if (form == PairForm::narrow) return needs_only_softmax(params);
  return form == PairForm::mma && makes_state(params);
}

Status check(const PairParams& params, PairForm form) {
  const auto failure = [&](const std::string& why) {
    return Status::failure(pair_shape(params) + ": " + why);
  };
  const bool empty = params.geometry.positions() == 0;
  const void* const a_input = params.winners > 0 ? params.winner_unit : params.u.data;
  if (!empty && ((params.a && !a_input) || (params.g && !params.grad.data))) {
    return failure("a result without its input");
  }
  if (!pair_sizes_fit(params)) return failure("sizes of 2^29 and more are not supported");
  if (params.form != PairForm::automatic && params.form != form) {
    const std::string name = params.form == PairForm::wgmma ? "wgmma" : "narrow";
    return failure("the " + name + " form does not take this shape on this device");
  }
  if (params.winners > 0 && form != PairForm::narrow) {
    return failure("lists of winners are for the narrow form, and not in every shape");
  }
  if (!empty && lacks_state(params) && !makes_state(params, form)) {
    return failure("the state that its activity needs is missing");
  }
  return {};
}

}  // namespace

int64_t pair_cuda_workspace(const PairParams& params, int device) {
  DeviceInfo info;
  if (!device_info(device, info).ok) return 0;
  const PairForm form = form_of(params, info);
  if (form == PairForm::narrow) return pair_narrow_workspace(params, info);
#ifndef GHL_CUDA_ON_HOST
  if (form == PairForm::wgmma) return pair_sm90_workspace(params, info);
#endif
  return pair_workspace_bytes(plan_of(params, info));
}

PairForm pair_cuda_form(const PairParams& params, int device) {
  DeviceInfo info;
  return device_info(device, info).ok ? form_of(params, info) : PairForm::mma;
}

bool pair_cuda_makes_state(const PairParams& params, int device) {
  return makes_state(params, pair_cuda_form(params, device));
}

Status pair_cuda(const PairParams& params, Stream stream) {
  if (pair_results(params) == 0 || params.units == 0 || params.geometry.group_channels() == 0) return {};
  DeviceInfo info;
  const Status known = device_info(stream.device, info);
  if (!known.ok) return known;
  const PairForm form = form_of(params, info);
  const Status checked = check(params, form);
  if (!checked.ok) return checked;
  if (form == PairForm::narrow) return pair_narrow(params, info, stream);
#ifndef GHL_CUDA_ON_HOST
  if (form == PairForm::wgmma) return pair_sm90(params, info, stream);
#endif
  return pair_mma(params, info, stream);
}

}  // namespace ghl
