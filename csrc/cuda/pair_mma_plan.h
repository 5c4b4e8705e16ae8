// How the pair [y; dL/du]^T x is cut into tiles and parts: pure functions of the shape and the device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace ghl {

// units and columns (taps * channels) are those of one group.
struct PairProblem {
  int64_t units = 0;
  int64_t columns = 0;
  int64_t groups = 1;
  int64_t positions = 0;
  int results = 2;  // 2 for A and G, else 1
  int itemsize = 2;
};

// A block multiplies a left tile of two halves by a tile of x. The halves are y and dL/du of the same units
// where both results are wanted, else two runs of units of the one that is.
constexpr int kPairHalf = 64;   // units
constexpr int kPairWide = 256;  // columns of x
constexpr int kPairNarrow = 64;

// Positions of a step: 64 bytes of each row of a half.
constexpr int pair_positions(int itemsize) { return 64 / itemsize; }

constexpr int pair_columns(bool wide) { return wide ? kPairWide : kPairNarrow; }

// Dynamic shared memory of a block: the ring of tiles, the ring of states (four words a position), where the
// columns lie in x, and where two steps of positions lie.
constexpr size_t kPairColumnBytes = 24;
constexpr size_t kPairPlaceBytes = 48;

constexpr size_t pair_stage_bytes(bool wide, int itemsize) {
  const int positions = pair_positions(itemsize);
  return static_cast<size_t>(positions) *
         ((2 * kPairHalf + pair_columns(wide)) * itemsize + 4 * sizeof(float));
}

constexpr size_t pair_shared_bytes(bool wide, int itemsize, int stages) {
  return stages * pair_stage_bytes(wide, itemsize) + pair_columns(wide) * kPairColumnBytes +
         2 * pair_positions(itemsize) * kPairPlaceBytes;
}

// Tiles are counted with the blocks of units fastest, then those of columns, then groups. As many as fill the
// device in whole waves are each summed by one block; the positions of the others are cut into parts.
struct PairPlan {
  bool wide = true;
  int stages = 0;  // 0: not even the shortest ring fits
  int64_t unit_blocks = 0;
  int64_t column_blocks = 0;
  int64_t whole_tiles = 0;
  int64_t split_tiles = 0;
  int64_t parts = 1;
  int64_t part_steps = 0;  // of every part but the last, which may have fewer
  int64_t blocks() const { return whole_tiles + split_tiles * parts; }
};

constexpr int kPairFewestStages = 3;
constexpr int kPairMostStages = 5;
constexpr int64_t kPairWorkspaceBytes = 32 << 20;  // of all parts; it is read back while it is in L2

// Blocks that share a multiprocessor, by registers and shared memory.
constexpr int pair_resident(bool wide, int itemsize) { return wide ? 1 : itemsize == 2 ? 3 : 2; }

constexpr int64_t pair_tile_bytes(bool wide) {
  return int64_t{2} * kPairHalf * pair_columns(wide) * sizeof(float);
}

// [parts, split_tiles, 2 halves of units, columns] float32
constexpr int64_t pair_workspace_bytes(const PairPlan& plan) {
  return plan.parts > 1 ? plan.parts * plan.split_tiles * pair_tile_bytes(plan.wide) : 0;
}

// Parts whose blocks fill the device in the fewest, fullest waves.
inline int64_t pair_parts(int64_t tiles, int64_t steps, int64_t resident, bool wide) {
  // steps that a block's start and its store of the tile cost about as much as
  constexpr int64_t kFixed = 8;
  const int64_t fitting = kPairWorkspaceBytes / (std::max<int64_t>(1, tiles) * pair_tile_bytes(wide));
  const int64_t most = std::max<int64_t>(1, std::min({steps / kFixed, fitting, 4 * resident}));
  int64_t best = 1;
  double least = 0;
  for (int64_t parts = 1; parts <= most; ++parts) {
    const int64_t waves = (tiles * parts + resident - 1) / resident;
    const int64_t length = (steps + parts - 1) / parts;
    // a part also costs a pass over its share of the workspace, a fraction of a step
    const double cost = static_cast<double>(waves * (length + kFixed)) + static_cast<double>(parts) / 16;
    if (parts == 1 || cost < least) {
      best = parts;
      least = cost;
    }
  }
  return best;
}

inline PairPlan pair_plan(const PairProblem& problem, int multiprocessors, size_t shared_limit) {
  const auto blocks_of = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
  PairPlan plan;
  const int64_t wide_columns = blocks_of(problem.columns, kPairWide) * kPairWide;
  // narrow where at least half of the wide tiles would be empty
  plan.wide = 2 * blocks_of(problem.columns, kPairNarrow) * kPairNarrow > wide_columns;
  const int most_stages = plan.wide ? kPairMostStages : kPairFewestStages;
  for (int stages = kPairFewestStages; stages <= most_stages; ++stages) {
    if (pair_shared_bytes(plan.wide, problem.itemsize, stages) <= shared_limit) plan.stages = stages;
  }
  plan.unit_blocks = blocks_of(problem.units, (problem.results == 2 ? 1 : 2) * kPairHalf);
  plan.column_blocks = blocks_of(problem.columns, pair_columns(plan.wide));
  const int64_t tiles = plan.unit_blocks * plan.column_blocks * problem.groups;
  const int64_t steps = blocks_of(problem.positions, pair_positions(problem.itemsize));
  const int64_t resident = int64_t{multiprocessors} * pair_resident(plan.wide, problem.itemsize);
  plan.split_tiles = tiles % resident;
  const int64_t parts = pair_parts(plan.split_tiles, steps, resident, plan.wide);
  plan.part_steps = blocks_of(steps, parts);
  plan.parts = plan.part_steps ? blocks_of(steps, plan.part_steps) : 1;
  if (plan.parts == 1) plan.split_tiles = 0;
  plan.whole_tiles = tiles - plan.split_tiles;
  return plan;
}

}  // namespace ghl
