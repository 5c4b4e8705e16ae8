// The pair by mma.sync: what its kernel is given, the tiles, and a block of it.
#pragma once

#include "cuda/activity.cuh"
#include "cuda/dtype.cuh"
#include "cuda/pair.cuh"
#include "cuda/pair_mma_plan.h"
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

}  // namespace
}  // namespace ghl
