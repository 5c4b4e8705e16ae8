// The arithmetic of the Hopper pair kernel, for tests in Python.
#include "cuda/pair_sm90_layout.h"

using namespace ghl::sm90;

namespace {

template <class Function>
auto of_ring(int stages, Function function) {
  switch (stages) {
    case 2:
      return function.template operator()<2>();
    case 3:
      return function.template operator()<3>();
    case 4:
      return function.template operator()<4>();
    default:
      return function.template operator()<kStages>();
  }
}

Slot slot_of_step(uint32_t step, int stages) {
  return of_ring(stages, [=]<int count>() {
    Slot slot;
    for (uint32_t i = 0; i < step; ++i) slot = next<count>(slot);
    return slot;
  });
}

Patches read_patches(const int32_t* field) {
  Patches patches;
  for (int32_t* triple :
       {patches.out_size, patches.kernel, patches.stride, patches.padding, patches.dilation}) {
    for (int i = 0; i < 3; ++i) triple[i] = *field++;
  }
  return patches;
}

}  // namespace

extern "C" {

uint32_t ring_stage(uint32_t step, int stages) {
  return static_cast<uint32_t>(slot_of_step(step, stages).stage);
}
uint32_t ring_full_parity(uint32_t step, int stages) { return full_parity(slot_of_step(step, stages)); }
uint32_t ring_empty_parity(uint32_t step, int stages) { return empty_parity(slot_of_step(step, stages)); }

// Whether a jump over so many steps leads where they do one by one.
bool ring_jumps(uint32_t step, uint32_t further, int stages) {
  return of_ring(stages, [=]<int count>() {
    const Slot one_by_one = slot_of_step(step + further, stages);
    const Slot jumped = after<count>(slot_of_step(step, stages), static_cast<int>(further));
    return jumped.stage == one_by_one.stage && jumped.lap == one_by_one.lap;
  });
}
uint32_t ring_full_arrivals() { return kFullArrivals; }
uint32_t ring_empty_arrivals(int cluster, int warps) { return empty_arrivals(cluster, warps); }

// [lower, upper] corners of each dimension, width first.
void corners(const int32_t* patches, int32_t* result) {
  for (int i = 0; i < 3; ++i) {
    result[2 * i] = lower_corner(read_patches(patches), i);
    result[2 * i + 1] = upper_corner(read_patches(patches), i);
  }
}

// Pixel and image at which the copies of stages 0, 1, ... begin: [stages, 4]; advanced from one to the next.
void stage_pixels(const int32_t* fields, int stages, int32_t* result) {
  const Patches patches = read_patches(fields);
  const Position distance = position_of(patches, kStagePositions);
  Position position = position_of(patches, 0);
  for (int stage = 0; stage < stages; ++stage) {
    for (int i = 0; i < 3; ++i) *result++ = pixel_of(patches, position, i);
    *result++ = position.image;
    position = advanced(patches, position, distance);
  }
}

void tap_offsets(const int32_t* fields, int tap, int32_t* result) {
  const uint32_t offsets = offsets_of(read_patches(fields), tap);
  for (int i = 0; i < 3; ++i) result[i] = offset_of(offsets, i);
}

// Every piece of every cluster: rows of cluster, tile, begin, end, slot (-1: whole), chunks; and the plan's
// numbers. Returns the number of rows.
int pieces(int64_t units, int64_t channels, int64_t taps, int64_t positions, bool both, int blocks,
           int64_t* numbers, int64_t* rows) {
  const Plan plan = make_plan(units, channels, taps, positions, both, blocks);
  numbers[0] = plan.cluster;
  numbers[1] = plan.tiles;
  numbers[2] = plan.stages;
  numbers[3] = plan.clusters;
  numbers[4] = plan.waves;
  int count = 0;
  for (int64_t cluster = 0; cluster < plan.clusters; ++cluster) {
    int32_t done = 0;
    for (Piece piece; piece_after(plan, static_cast<int32_t>(cluster), done, piece); ++count) {
      done = done_after(plan, done, piece);
      const int64_t slot = is_whole(plan, piece) ? -1 : slot_of(plan, cluster, piece.tile);
      const int64_t chunks = chunks_of(plan, piece.tile);
      for (const int64_t value :
           {cluster, piece.tile, int64_t{piece.begin}, int64_t{piece.end}, slot, chunks}) {
        *rows++ = value;
      }
    }
  }
  return count;
}

// The parts that the second kernel adds up for the cut at each segment: rows of tile (-1: none), segment,
// slot.
int parts(int64_t units, int64_t channels, int64_t taps, int64_t positions, bool both, int blocks,
          int64_t* rows) {
  const Plan plan = make_plan(units, channels, taps, positions, both, blocks);
  int count = 0;
  for (int64_t cut = 1; cut < plan.segments; ++cut) {
    const int64_t tile = cut_tile(plan, cut);
    if (tile < 0) continue;
    for (int64_t segment = first_segment(plan, tile); segment <= last_segment(plan, tile);
         ++segment, ++count) {
      for (const int64_t value : {tile, segment, int64_t{slot_of(plan, segment, tile)}}) *rows++ = value;
    }
  }
  return count;
}

// Columns that are multiplied, and those of a tile; by the shape that is chosen, and by each that could be.
int tile_shapes(int64_t channels, int64_t taps, int64_t* rows) {
  const TileShape chosen = tile_shape(channels, taps);
  int count = 0;
  const auto add = [&](TileShape shape) {
    *rows++ = multiplied_columns(shape, channels, taps);
    *rows++ = columns_of(shape);
    ++count;
  };
  add(chosen);
  for (const TileShape& shape : kTileShapes) add(shape);
  return count;
}

int64_t partial_index(int64_t block, int slot, int consumer, int quad, int thread) {
  return partial_at(block, slot, consumer, quad, thread);
}
int64_t block_workspace() { return kBlockWorkspace; }
int shared_bytes() { return kSharedBytes; }
int stage_positions() { return kStagePositions; }
}
