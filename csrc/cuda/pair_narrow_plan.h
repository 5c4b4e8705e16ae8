// How the pair of a layer with few columns and few units is cut: pure functions of the shape and the device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace ghl {

// units, columns (taps * channels) and positions of a layer of one group.
struct NarrowProblem {
  int64_t units = 0;
  int64_t taps = 0;
  int64_t channels = 0;
  int64_t positions = 0;
  int results = 2;  // 2 for A and G, else 1
};

constexpr int kNarrowUnits = 128;
constexpr int kNarrowColumns = 160;
constexpr int kNarrowChannels = 4;
constexpr int kNarrowBits = 32;       // depths, heights and widths of the kernel together
constexpr int kNarrowPositions = 64;  // of a step
constexpr int kNarrowStages = 3;
constexpr int kNarrowWinners = 2;    // of a position in a list
constexpr int kNarrowMeeting = 128;  // threads of a depth where there are several, at most

constexpr size_t kNarrowStateBytes = 16;  // of a position
constexpr size_t kNarrowPlaceBytes = 12;
constexpr size_t kNarrowTapBytes = 16;
constexpr size_t kNarrowOperandBytes = 8;  // of a thread

// A block has all units and all columns. Its warps lie down and across this tile, and as many times as there
// are depths, each of which takes its share of the positions of a step.
struct NarrowPlan {
  int warp_units = 0;  // 32, 48 or 64
  int warp_columns = 0;
  int warps_down = 1;
  int warps_across = 1;
  int depths = 1;
  int results = 1;
  int64_t taps = 0;
  int64_t steps = 0;  // of all blocks, which have equal shares
  int64_t blocks = 0;
  size_t shared = 0;  // dynamic, of a block

  constexpr int rows() const { return warp_units * warps_down; }  // of all results
  constexpr int half() const { return rows() / results; }         // units of a result
  constexpr int columns() const { return warp_columns * warps_across; }
  constexpr int threads() const { return 32 * warps_down * warps_across * depths; }
};

// Bytes from a position to the next, or from a column to the next: an odd number of 16, so that the rows of a
// matrix lie in different banks.
constexpr int narrow_left_pitch(int rows) { return 2 * rows + 16; }
constexpr int kNarrowColumnPitch = 2 * kNarrowPositions + 16;

constexpr size_t narrow_stage_bytes(int rows) {
  return kNarrowPositions * (narrow_left_pitch(rows) + kNarrowStateBytes);
}

// The ring of u and dL/du, two tiles of x, where two steps of positions and the taps lie in x, and where a
// thread reads the tiles. When all is summed, the depths meet in the same memory.
constexpr size_t narrow_shared_bytes(const NarrowPlan& plan) {
  const size_t ring = kNarrowStages * narrow_stage_bytes(plan.rows());
  const size_t x = 2 * static_cast<size_t>(plan.columns()) * kNarrowColumnPitch;
  const size_t places = 2 * kNarrowPositions * kNarrowPlaceBytes + plan.taps * kNarrowTapBytes +
                        plan.threads() * kNarrowOperandBytes;
  const size_t sums = static_cast<size_t>(plan.warp_units) * plan.warp_columns / 32;  // of a thread
  const size_t meeting = plan.depths > 1 ? sizeof(float) * sums * kNarrowMeeting : 0;
  return std::max(ring + x + places, meeting);
}

// [blocks, rows, columns] float32
constexpr int64_t narrow_workspace_bytes(const NarrowPlan& plan) {
  return int64_t{4} * plan.blocks * plan.rows() * plan.columns();
}

// Threads that share a multiprocessor, by their registers.
constexpr int kNarrowThreads = 512;

inline NarrowPlan narrow_plan(const NarrowProblem& problem, int multiprocessors, size_t shared_limit) {
  NarrowPlan plan;
  plan.results = problem.results;
  const int64_t columns = problem.taps * problem.channels;
  const bool by_48 = problem.units > 64 && problem.units <= 96;
  plan.warp_units = by_48 ? 48 : columns <= 32 ? 32 : 64;
  plan.warp_columns = plan.warp_units == 32 ? 32 : 40;
  if (by_48) plan.warps_down = 2 * plan.results;
  while (plan.half() < problem.units) plan.warps_down *= 2;
  while (plan.columns() < columns) plan.warps_across *= 2;
  while (plan.depths < 4 && 2 * plan.threads() <= 256) plan.depths *= 2;
  plan.taps = problem.taps;
  plan.shared = narrow_shared_bytes(plan);
  // what the system takes of each block's
  constexpr size_t kReserved = 1024;
  const size_t fitting = (shared_limit + kReserved) / (plan.shared + kReserved);
  const int64_t by_threads = kNarrowThreads / plan.threads();
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(fitting, by_threads));
  // steps that a block's start and its store of the tile cost about as much as
  constexpr int64_t kFewestSteps = 4;
  plan.steps = (problem.positions + kNarrowPositions - 1) / kNarrowPositions;
  plan.blocks = std::min(multiprocessors * resident, (plan.steps + kFewestSteps - 1) / kFewestSteps);
  return plan;
}

}  // namespace ghl
