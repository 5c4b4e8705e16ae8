// The arithmetic of the Hopper pair kernel: what lies where in shared memory, which positions, units and
// columns a block works on, and where its patches begin. Pure functions, the same on the device and in host
// tests.
//
// The result is a matrix of units and columns. Columns come in chunks of 64 or 32 channels of one tap, and a
// tile of the result holds up to 256 of them, whichever leaves the fewest empty. Positions are summed in
// stages of 32: two stages are always being multiplied, and the shorter they are, the more of the ring is
// left for copies that are under way.
#pragma once

#include <cstdint>

#include "ghl/correlate.h"

#ifdef __CUDACC__
#define GHL_HOST_DEVICE __host__ __device__
#else
#define GHL_HOST_DEVICE
#endif

namespace ghl::sm90 {

constexpr int kStages = 9;
constexpr int kStagePositions = 32;  // of a stage
constexpr int kTileUnits = 64;       // of one warpgroup
constexpr int kMostColumns = 256;    // of a tile
constexpr int kStrip = 32;           // columns; chunks and tiles are whole numbers of them
constexpr int kDepth = 16;           // positions that one wgmma sums
constexpr int kSteps = kStagePositions / kDepth;

constexpr int kConsumers = 2;  // warpgroups that multiply, each with a tile of its own
constexpr int kWarpgroup = 128;
constexpr int kWarps = 4;  // of a warpgroup
constexpr int kThreads = kWarpgroup * (kConsumers + 1);

// Accumulators of a thread, alone and in fours, for a tile of so many columns.
GHL_HOST_DEVICE constexpr int accumulators_of(int columns) { return kTileUnits * columns / kWarpgroup; }
GHL_HOST_DEVICE constexpr int quads_of(int columns) { return accumulators_of(columns) / 4; }
constexpr int kMostQuads = quads_of(kMostColumns);
constexpr int kStripQuads = quads_of(kStrip);

// Of a thread, once setmaxnreg has dealt out what the block starts with.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;

// Whether so many registers of each thread at launch are enough to deal out. With fewer, consumers would wait
// for them forever.
constexpr bool can_deal_registers(int registers) {
  return (kConsumers + 1) * registers >= kProducerRegisters + kConsumers * kConsumerRegisters;
}

constexpr int kStates = 4;  // arrays of 4-byte numbers: threshold, cut, logsumexp, first

// --- shared memory ------------------------------------------------------------------------------

constexpr int kElement = 2;  // bytes of bf16 and f16
constexpr int kInputBytes = kStagePositions * kMostColumns * kElement;
constexpr int kResponseBytes = kStagePositions * kTileUnits * kElement;
constexpr int kStateBytes = kStagePositions * 4;

// Of every array all stages follow one another, so that each begins at a multiple of what swizzling needs
// (1024).
constexpr int kInputAt = 0;
constexpr int kResponseAt = kInputAt + kStages * kInputBytes;
constexpr int kStateAt = kResponseAt + kStages * kConsumers * kResponseBytes;
constexpr int kFullAt = kStateAt + kStages * kStates * kStateBytes;
constexpr int kEmptyAt = kFullAt + kStages * 8;
constexpr int kSharedBytes = kEmptyAt + kStages * 8;

// A row of a box: one position's channels of a chunk, or its units of a warpgroup.
GHL_HOST_DEVICE constexpr int row_bytes(int columns) { return columns * kElement; }
GHL_HOST_DEVICE constexpr int chunk_bytes(int chunk) { return kStagePositions * row_bytes(chunk); }

GHL_HOST_DEVICE constexpr int input_at(int stage) { return kInputAt + stage * kInputBytes; }

GHL_HOST_DEVICE constexpr int response_at(int stage, int consumer) {
  return kResponseAt + (stage * kConsumers + consumer) * kResponseBytes;
}

GHL_HOST_DEVICE constexpr int state_at(int stage, int state) {
  return kStateAt + (stage * kStates + state) * kStateBytes;
}

GHL_HOST_DEVICE constexpr int full_at(int stage) { return kFullAt + stage * 8; }
GHL_HOST_DEVICE constexpr int empty_at(int stage) { return kEmptyAt + stage * 8; }

// Byte of an element in a box of rows of 64 or 32 elements, as a copy with CU_TENSOR_MAP_SWIZZLE_128B or _64B
// lays it down: the 16-byte pieces of a row are permuted by the row's place among eight, or by half of it.
template <int columns = kTileUnits>
GHL_HOST_DEVICE constexpr int swizzled(int row, int column) {
  constexpr int pieces = columns / 8;
  const int piece = (column / 8) ^ (row * pieces / 8 % pieces);
  return row * row_bytes(columns) + piece * 16 + column % 8 * kElement;
}

// Shared-memory descriptor of a wgmma operand whose rows are positions ("MN-major"), swizzled as above, with
// boxes of so many columns. `next` is the distance in bytes from one box to the following, 0 where there are
// no more.
GHL_HOST_DEVICE constexpr uint64_t operand_descriptor(uint32_t shared_address, int columns, uint32_t next) {
  const uint64_t swizzle = columns == 64 ? 1 : 2;  // of 128 or of 64 bytes
  const uint64_t eight_rows = static_cast<uint64_t>(8 * row_bytes(columns));
  return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | static_cast<uint64_t>(next >> 4) << 16 |
         eight_rows >> 4 << 32 | swizzle << 62;
}

// What to add to a descriptor for an operand that lies so many bytes further, and for the next wgmma's.
GHL_HOST_DEVICE constexpr uint64_t descriptor_step(int bytes) { return static_cast<uint64_t>(bytes >> 4); }
GHL_HOST_DEVICE constexpr int step_bytes(int columns) { return kDepth * row_bytes(columns); }

// --- fragments of wgmma -------------------------------------------------------------------------

// Accumulator i of a thread belongs to this unit and column of the warpgroup's tile.
GHL_HOST_DEVICE constexpr int accumulator_unit(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
GHL_HOST_DEVICE constexpr int accumulator_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// Register i (0 to 3) of the left operand holds this unit at two positions of the step, the first of which is
// this.
GHL_HOST_DEVICE constexpr int fragment_unit(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
}
GHL_HOST_DEVICE constexpr int fragment_position(int thread, int i) { return thread % 4 * 2 + i / 2 * 8; }

// The row that a thread names to ldmatrix.x4.trans for that operand: position and first of eight units.
GHL_HOST_DEVICE constexpr int ldmatrix_position(int thread) { return thread % 8 + thread % 32 / 16 * 8; }
GHL_HOST_DEVICE constexpr int ldmatrix_unit(int thread) { return thread / 32 * 16 + thread % 32 / 8 % 2 * 8; }

// --- the ring of stages -------------------------------------------------------------------------

// Where step i of a block lies: stage i % kStages, in lap i / kStages, of which the last bit tells. A wait
// returns when the barrier's phase of this parity is over; the phase before the first counts as over and has
// parity 1. Rings of other lengths are for tests.
struct Slot {
  int stage = 0;
  uint32_t lap = 0;
};

// Without a division, whose result the threads that multiply would wait for.
template <int stages = kStages>
GHL_HOST_DEVICE constexpr Slot next(Slot slot) {
  return slot.stage + 1 < stages ? Slot{slot.stage + 1, slot.lap} : Slot{0, slot.lap ^ 1};
}

// The slot so many steps further.
template <int stages = kStages>
GHL_HOST_DEVICE constexpr Slot after(Slot slot, int steps) {
  const int stage = slot.stage + steps;
  return {stage % stages, slot.lap ^ (static_cast<uint32_t>(stage / stages) & 1)};
}

GHL_HOST_DEVICE constexpr uint32_t full_parity(Slot slot) { return slot.lap; }
GHL_HOST_DEVICE constexpr uint32_t empty_parity(Slot slot) { return slot.lap ^ 1; }

// Arrivals that complete a phase: the producer's alone, with the bytes it announces; and one of each warp
// that multiplies, in every block that the stage's copies reach.
constexpr uint32_t kFullArrivals = 1;
GHL_HOST_DEVICE constexpr uint32_t empty_arrivals(int cluster, int warps = kConsumers * kWarps) {
  return static_cast<uint32_t>(cluster * warps);
}

// The block of a cluster that copies a chunk, to all of them.
GHL_HOST_DEVICE constexpr int chunk_owner(int chunk, int cluster) { return chunk % cluster; }

// Each warp of the producer copies the chunks of its number and of kWarps more, where the block owns them.
// The consumer whose responses it copies too, or -1: in a cluster they are for the warps without a chunk.
static_assert(kWarps % 2 == 0);
GHL_HOST_DEVICE constexpr int response_of(int warp, int cluster, int rank) {
  const bool is_free = cluster == 1 || chunk_owner(warp, cluster) != rank;
  const int place = warp / cluster;
  return is_free && place < kConsumers ? place : -1;
}

// --- who sums what ------------------------------------------------------------------------------

// The columns of a tile: so many chunks of so many channels.
struct TileShape {
  int32_t chunk;
  int32_t chunks;

  constexpr bool operator==(const TileShape&) const = default;
};

GHL_HOST_DEVICE constexpr int columns_of(const TileShape& shape) { return shape.chunk * shape.chunks; }

// The same where the compiler has to know it.
template <int channels, int count>
struct Tile {
  static constexpr int chunk = channels;
  static constexpr int chunks = count;
  static constexpr int columns = chunk * chunks;
};

// In order of preference: a tile that is wide reads the responses less often, and wide chunks take fewer
// copies.
constexpr TileShape kTileShapes[] = {{64, 4}, {64, 3}, {64, 2}, {64, 1}, {32, 8}, {32, 7}};

// A tile is some chunks of columns by the units of one cluster; its work is its stages. As many tiles as fill
// the device in whole waves are each summed by one cluster, all from the first position on, so that what one
// reads the others find in the L2 cache. The stages of the rest, tile after tile, are cut into segments of
// equal length, one for each cluster, so that a tile may be cut too.
struct Plan {
  int32_t cluster = 1;      // blocks
  int32_t block_units = 0;  // 64 where the consumers compute A and G, 128 where both compute one of them
  int32_t unit_groups = 0;  // tiles along the units
  TileShape tile = kTileShapes[0];
  int32_t chunks_per_tap = 0;
  int32_t chunks = 0;  // of all taps
  int32_t stages = 0;  // of a tile
  int64_t tiles = 0;
  int32_t clusters = 0;  // of the launch
  int32_t waves = 0;     // whole tiles of each cluster
  int32_t length = 0;    // of a segment, in stages: no more than a tile has
  int32_t segments = 0;
};

template <class T>
GHL_HOST_DEVICE constexpr T ceil_of(T count, T size) {
  return (count + size - 1) / size;
}

// Columns that are multiplied, the empty ones of the last chunk of a tap and of the last tile among them.
constexpr int64_t multiplied_columns(const TileShape& shape, int64_t channels, int64_t taps) {
  const int64_t chunks = taps * ceil_of<int64_t>(channels, shape.chunk);
  return ceil_of<int64_t>(chunks, shape.chunks) * columns_of(shape);
}

constexpr TileShape tile_shape(int64_t channels, int64_t taps) {
  TileShape best = kTileShapes[0];
  for (const TileShape& shape : kTileShapes) {
    // what is preferred may multiply a twentieth more
    if (20 * multiplied_columns(shape, channels, taps) < 19 * multiplied_columns(best, channels, taps)) {
      best = shape;
    }
  }
  return best;
}

constexpr Plan make_plan(int64_t units, int64_t channels, int64_t taps, int64_t positions, bool both,
                         int blocks) {
  Plan plan;
  plan.block_units = both ? kTileUnits : 2 * kTileUnits;
  // Of a cluster's blocks one may have no units; among two clusters that is too many to pay for sharing x.
  const int64_t block_groups = ceil_of<int64_t>(units, plan.block_units);
  plan.cluster = block_groups == 1 || block_groups == 3 ? 1 : 2;
  plan.unit_groups = static_cast<int32_t>(ceil_of<int64_t>(units, plan.block_units * plan.cluster));
  plan.tile = tile_shape(channels, taps);
  plan.chunks_per_tap = static_cast<int32_t>(ceil_of<int64_t>(channels, plan.tile.chunk));
  plan.chunks = static_cast<int32_t>(taps * plan.chunks_per_tap);
  plan.stages = static_cast<int32_t>(ceil_of<int64_t>(positions, kStagePositions));
  plan.tiles = static_cast<int64_t>(plan.unit_groups) * ceil_of<int64_t>(plan.chunks, plan.tile.chunks);
  const int32_t clusters = blocks / plan.cluster;
  plan.waves = static_cast<int32_t>(plan.tiles / clusters);
  const int64_t work = plan.tiles % clusters * plan.stages;
  plan.length = static_cast<int32_t>(ceil_of<int64_t>(work, clusters));
  plan.segments = work > 0 ? static_cast<int32_t>(ceil_of<int64_t>(work, plan.length)) : 0;
  plan.clusters = plan.waves > 0 ? clusters : plan.segments;
  return plan;
}

// Tiles that are not cut, by anyone, come first.
GHL_HOST_DEVICE constexpr int64_t whole_tiles(const Plan& plan) {
  return int64_t{plan.waves} * plan.clusters;
}

// The stages [begin, end) of a tile that a cluster sums in one go.
struct Piece {
  int64_t tile = 0;
  int32_t begin = 0;
  int32_t end = 0;
};

// Stages are counted from the first of the tiles that may be cut.
GHL_HOST_DEVICE constexpr int64_t segment_begin(const Plan& plan, int64_t segment) {
  return segment * plan.length;
}

GHL_HOST_DEVICE constexpr int64_t segment_end(const Plan& plan, int64_t segment) {
  const int64_t end = (segment + 1) * plan.length;
  const int64_t work = (plan.tiles - whole_tiles(plan)) * plan.stages;
  return end < work ? end : work;
}

// The piece of a cluster that has done so much: whole tiles, and then stages of its segment. False where it
// has no more.
GHL_HOST_DEVICE constexpr bool piece_after(const Plan& plan, int32_t cluster, int32_t done, Piece& piece) {
  if (done < plan.waves) {
    piece = {int64_t{done} * plan.clusters + cluster, 0, plan.stages};
    return true;
  }
  const int64_t from = segment_begin(plan, cluster) + done - plan.waves;
  const int64_t left = segment_end(plan, cluster) - from;
  if (left <= 0) return false;
  piece.tile = whole_tiles(plan) + from / plan.stages;
  piece.begin = static_cast<int32_t>(from % plan.stages);
  piece.end = left < plan.stages - piece.begin ? piece.begin + static_cast<int32_t>(left) : plan.stages;
  return true;
}

// What it has done after that piece.
GHL_HOST_DEVICE constexpr int32_t done_after(const Plan& plan, int32_t done, const Piece& piece) {
  return done + (done < plan.waves ? 1 : piece.end - piece.begin);
}

GHL_HOST_DEVICE constexpr bool is_whole(const Plan& plan, const Piece& piece) {
  return piece.begin == 0 && piece.end == plan.stages;
}

// The tile in which a segment begins.
GHL_HOST_DEVICE constexpr int64_t first_tile(const Plan& plan, int64_t segment) {
  return whole_tiles(plan) + segment_begin(plan, segment) / plan.stages;
}

// A segment cuts at most two tiles: the one it begins in, slot 0, and another that it ends in, slot 1.
constexpr int kSlots = 2;
GHL_HOST_DEVICE constexpr int slot_of(const Plan& plan, int64_t segment, int64_t tile) {
  return first_tile(plan, segment) == tile ? 0 : 1;
}

GHL_HOST_DEVICE constexpr int64_t first_segment(const Plan& plan, int64_t tile) {
  return (tile - whole_tiles(plan)) * plan.stages / plan.length;
}
GHL_HOST_DEVICE constexpr int64_t last_segment(const Plan& plan, int64_t tile) {
  return ((tile - whole_tiles(plan) + 1) * plan.stages - 1) / plan.length;
}

// The tile that is cut where a segment begins, or -1: there is none, or an earlier segment names it.
GHL_HOST_DEVICE constexpr int64_t cut_tile(const Plan& plan, int64_t segment) {
  const int64_t tile = first_tile(plan, segment);
  const bool cuts = segment_begin(plan, segment) % plan.stages != 0;
  return cuts && first_segment(plan, tile) == segment - 1 ? tile : -1;
}

// Four floats of a partial sum: index into the workspace, in units of 16 bytes.
GHL_HOST_DEVICE constexpr int64_t partial_at(int64_t block, int slot, int consumer, int quad, int thread) {
  return (((block * kSlots + slot) * kConsumers + consumer) * kMostQuads + quad) * kWarpgroup + thread;
}

constexpr int64_t kBlockWorkspace = static_cast<int64_t>(kSlots) * kConsumers * kTileUnits * kMostColumns *
                                    static_cast<int64_t>(sizeof(float));

// The first unit of a consumer. Consumers that compute A and G have the same units.
GHL_HOST_DEVICE constexpr int64_t first_unit(const Plan& plan, int64_t tile, int rank, int consumer) {
  const int64_t group = tile % plan.unit_groups;
  return (group * plan.cluster + rank) * plan.block_units +
         (plan.block_units > kTileUnits ? consumer : 0) * kTileUnits;
}

// The first chunk of columns of a tile, and how many it has.
GHL_HOST_DEVICE constexpr int32_t first_chunk(const Plan& plan, int64_t tile) {
  return static_cast<int32_t>(tile / plan.unit_groups) * plan.tile.chunks;
}
GHL_HOST_DEVICE constexpr int chunks_of(const Plan& plan, int64_t tile) {
  const int32_t left = plan.chunks - first_chunk(plan, tile);
  return left < plan.tile.chunks ? left : plan.tile.chunks;
}

struct Columns {
  int32_t tap = 0;
  int32_t channel = 0;  // the first of the chunk
};

GHL_HOST_DEVICE constexpr Columns columns_of(const Plan& plan, int32_t chunk) {
  return {chunk / plan.chunks_per_tap, chunk % plan.chunks_per_tap * plan.tile.chunk};
}

// --- patches ------------------------------------------------------------------------------------

// How x is copied: rows of a matrix, or pixels of an image by im2col in 2 or 3 spatial dimensions.
enum class Source : int { rows = 0, image = 1, volume = 2 };

// Dimensions in the order of a tensor map, width first.
struct Patches {
  int32_t out_size[3] = {1, 1, 1};
  int32_t kernel[3] = {1, 1, 1};
  int32_t stride[3] = {1, 1, 1};
  int32_t padding[3] = {0, 0, 0};
  int32_t dilation[3] = {1, 1, 1};
};

GHL_HOST_DEVICE constexpr Patches patches_of(const ConvGeometry& geometry) {
  Patches patches;
  for (int i = 0; i < 3; ++i) {
    patches.out_size[i] = static_cast<int32_t>(geometry.out_size[2 - i]);
    patches.kernel[i] = static_cast<int32_t>(geometry.kernel[2 - i]);
    patches.stride[i] = static_cast<int32_t>(geometry.stride[2 - i]);
    patches.padding[i] = static_cast<int32_t>(geometry.padding[2 - i]);
    patches.dilation[i] = static_cast<int32_t>(geometry.dilation[2 - i]);
  }
  return patches;
}

// Corners of the box that the first tap of every patch stays in: offsets from the image's first pixel, and
// from its last.
GHL_HOST_DEVICE constexpr int32_t lower_corner(const Patches& patches, int i) { return -patches.padding[i]; }
GHL_HOST_DEVICE constexpr int32_t upper_corner(const Patches& patches, int i) {
  return patches.padding[i] - (patches.kernel[i] - 1) * patches.dilation[i];
}

// Pixels that the copy finds in that box along one dimension, which must be those of the convolution's
// result.
GHL_HOST_DEVICE constexpr int64_t pixels_in_box(const Patches& patches, int i, int64_t in_size) {
  const int64_t size = in_size + upper_corner(patches, i) - lower_corner(patches, i);
  return size > 0 ? (size - 1) / patches.stride[i] + 1 : 0;
}

// A position of the convolution's result: its indices, width first, and its image.
struct Position {
  int32_t at[3] = {0, 0, 0};
  int32_t image = 0;
};

GHL_HOST_DEVICE constexpr Position position_of(const Patches& patches, int32_t index) {
  Position position;
  for (int i = 0; i < 3; ++i) {
    position.at[i] = index % patches.out_size[i];
    index /= patches.out_size[i];
  }
  position.image = index;
  return position;
}

// The position so many further, without a division: `distance` is position_of() of that number.
GHL_HOST_DEVICE constexpr Position advanced(const Patches& patches, Position position,
                                            const Position& distance) {
  int32_t carry = 0;
  for (int i = 0; i < 3; ++i) {
    position.at[i] += distance.at[i] + carry;
    carry = position.at[i] >= patches.out_size[i] ? 1 : 0;
    position.at[i] -= carry * patches.out_size[i];
  }
  position.image += distance.image + carry;
  return position;
}

// The pixel of the first tap of a position, along one dimension: where its copy begins.
GHL_HOST_DEVICE constexpr int32_t pixel_of(const Patches& patches, const Position& position, int i) {
  return position.at[i] * patches.stride[i] + lower_corner(patches, i);
}

// Distance of a tap from the first in each dimension, a byte each.
GHL_HOST_DEVICE constexpr uint32_t offsets_of(const Patches& patches, int32_t tap) {
  uint32_t offsets = 0;
  for (int i = 0; i < 3; ++i) {
    offsets |= static_cast<uint32_t>(tap % patches.kernel[i] * patches.dilation[i]) << 8 * i;
    tap /= patches.kernel[i];
  }
  return offsets;
}
GHL_HOST_DEVICE constexpr uint16_t offset_of(uint32_t offsets, int i) {
  return static_cast<uint16_t>(offsets >> 8 * i & 0xff);
}

// What a tensor map can hold (CUDA's driver manual, cuTensorMapEncodeIm2col; PTX manual, "im2col mode").
constexpr int kMaxElementStride = 8;

struct Range {
  int32_t lowest_corner;
  int32_t highest_corner;
  int32_t highest_offset;
};

GHL_HOST_DEVICE constexpr Range range_of(Source source) {
  return source == Source::volume ? Range{-16, 15, 31} : Range{-128, 127, 255};
}

GHL_HOST_DEVICE constexpr bool fits_im2col(const Patches& patches, Source source,
                                           const ConvGeometry& geometry) {
  const Range range = range_of(source);
  for (int i = 0; i < 3; ++i) {
    const bool inside = lower_corner(patches, i) >= range.lowest_corner &&
                        upper_corner(patches, i) >= range.lowest_corner &&
                        upper_corner(patches, i) <= range.highest_corner &&
                        (patches.kernel[i] - 1) * patches.dilation[i] <= range.highest_offset;
    if (!inside || patches.stride[i] > kMaxElementStride) return false;
    if (pixels_in_box(patches, i, geometry.in_size[2 - i]) != patches.out_size[i]) return false;
  }
  return true;
}

}  // namespace ghl::sm90
