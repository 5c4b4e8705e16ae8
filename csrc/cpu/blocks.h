// Sums of outer products, m[unit, channel] += sum over rows of u[row, unit] * v[row, channel], of panels in
// which sixteen units (channels) are a group: u [groups, rows, 16], v [groups, rows, 16] and
// m [groups of units, groups of channels, 16 units, 16 channels].
//
// A task is a block of units by a block of channels, which one thread sums over all rows in chunks, or,
// where units and channels are few, over one of several parts of them. So the workspace does not grow with
// the batch, and the order of the sums does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace ghl::GHL_ISA {
namespace {

// Groups of a block at most: a chunk of its panels and its sums then stay in the second-level cache.
constexpr int64_t kBlockGroups = 8;

// Tasks per thread that blocks are halved for, down to a size below which the panels, which each of them
// makes anew, cost too much.
constexpr int64_t kTasksPerThread = 2;
constexpr int64_t kLeastHalved = 4;

// Accumulators of the inner loop: so many rows (units) of two registers.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif

// How units and channels are cut into blocks.
struct Blocks {
  int64_t group_units;  // of a group of the convolution
  int64_t group_channels;
  int64_t unit_lanes;  // in groups of sixteen
  int64_t channel_lanes;
  int64_t block_units;  // of a task, in groups of sixteen
  int64_t block_channels;
  int64_t unit_blocks;
  int64_t channel_blocks;
  int64_t blocks;  // of all groups of the convolution
  int64_t chunks;  // of the rows
  int64_t parts;   // of the chunks, the same number for any number of threads
  int64_t depth;   // rows of a chunk at most

  int64_t lanes_stride() const { return depth * kLanes; }  // from one group to the next, in u and in v
  int64_t components = 1;                                  // that each have their sums
  int64_t skew = 0;                                        // floats between the components' sums
  int64_t component() const { return block_units * block_channels * kLanes * kLanes + skew; }
  int64_t sums() const { return components * component(); }  // floats of a block, or of a part of one
};

// squares: parts times groups of units times groups of channels is this many at most, so that parts make
// tasks for the threads where units and channels are few, and not more sums than that.
void choose_blocks(int64_t units, int64_t channels, int64_t groups, int64_t squares, int threads,
                   Blocks* blocks) {
  blocks->group_units = units / groups;
  blocks->group_channels = channels / groups;
  blocks->unit_lanes = ceil_div(blocks->group_units, kLanes);
  blocks->channel_lanes = ceil_div(blocks->group_channels, kLanes);
  const int64_t all = groups * blocks->unit_lanes * blocks->channel_lanes;
  blocks->parts = max(1, min(squares / all, blocks->chunks));
  const auto split = [](int64_t lanes, int64_t block) { return ceil_div(lanes, ceil_div(lanes, block)); };
  blocks->block_units = split(blocks->unit_lanes, kBlockGroups);
  blocks->block_channels = split(blocks->channel_lanes, kBlockGroups);
  while (true) {
    blocks->unit_blocks = ceil_div(blocks->unit_lanes, blocks->block_units);
    blocks->channel_blocks = ceil_div(blocks->channel_lanes, blocks->block_channels);
    blocks->blocks = groups * blocks->unit_blocks * blocks->channel_blocks;
    int64_t* const larger =
        blocks->block_units >= blocks->block_channels ? &blocks->block_units : &blocks->block_channels;
    const bool enough = blocks->blocks * blocks->parts >= kTasksPerThread * threads;
    if (threads == 1 || enough || *larger < kLeastHalved) return;
    *larger = ceil_div(*larger, 2);
  }
}

struct Block {
  int64_t unit;  // of all
  int64_t unit_end;
  int64_t channel;  // of all
  int64_t channel_end;
  int64_t first_channel;  // of the group of the convolution

  int64_t unit_groups() const { return ceil_div(unit_end - unit, kLanes); }
  int64_t channel_groups() const { return ceil_div(channel_end - channel, kLanes); }
};

Block find_block(const Blocks& blocks, int64_t index) {
  const int64_t channel = index % blocks.channel_blocks * blocks.block_channels * kLanes;
  const int64_t unit = index / blocks.channel_blocks % blocks.unit_blocks * blocks.block_units * kLanes;
  const int64_t group = index / blocks.channel_blocks / blocks.unit_blocks;
  const int64_t first_unit = group * blocks.group_units;
  Block block{};
  block.first_channel = group * blocks.group_channels;
  block.channel = block.first_channel + channel;
  block.channel_end =
      block.first_channel + min(channel + blocks.block_channels * kLanes, blocks.group_channels);
  block.unit = first_unit + unit;
  block.unit_end = first_unit + min(unit + blocks.block_units * kLanes, blocks.group_units);
  return block;
}

// rows (units) by registers (of channels) of m; where it begins, m is overwritten.
template <int rows, int registers>
GHL_INLINE void multiply(const float* u, const float* const* v, int64_t depth, bool begins, float* const* m,
                         int first_row) {
  PartF sum[rows][registers] = {};
  for (int64_t i = 0; i < depth; ++i) {
    PartF inputs[registers];
#pragma GCC unroll 2
    for (int j = 0; j < registers; ++j) inputs[j] = load_part(v[j] + i * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
      for (int j = 0; j < registers; ++j) sum[row][j] += u[i * kLanes + first_row + row] * inputs[j];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
    for (int j = 0; j < registers; ++j) {
      float* const to = m[j] + (first_row + row) * kLanes;
      store_part(to, begins ? sum[row][j] : sum[row][j] + load_part(to));
    }
  }
}

// The sixteen units of a group.
template <int registers>
GHL_INLINE void multiply_group(const float* u, const float* const* v, int64_t depth, bool begins,
                               float* const* m) {
  constexpr int kRest = kLanes % kRows;
  for (int row = 0; row + kRows <= kLanes; row += kRows) {
    multiply<kRows, registers>(u, v, depth, begins, m, row);
  }
  if constexpr (kRest != 0) multiply<kRest, registers>(u, v, depth, begins, m, kLanes - kRest);
}

// Every group of units with the registers of channels from one on.
template <int registers>
void multiply_registers(const float* u, const float* v, const Blocks& blocks, const Block& block,
                        int64_t first, int64_t depth, bool begins, float* m) {
  const float* inputs[registers];
  float* sums[registers];
  for (int i = 0; i < registers; ++i) {
    const int64_t group = (first + i) / kParts;
    const int64_t lane = (first + i) % kParts * kWidth;
    inputs[i] = v + group * blocks.lanes_stride() + lane;
    sums[i] = m + group * kLanes * kLanes + lane;
  }
  for (int64_t i = 0; i < block.unit_groups(); ++i, u += blocks.lanes_stride()) {
    multiply_group<registers>(u, inputs, depth, begins, sums);
    for (float*& sum : sums) sum += blocks.block_channels * kLanes * kLanes;
  }
}

// All of the block's sums of a chunk of depth rows.
void multiply_block(const float* u, const float* v, const Blocks& blocks, const Block& block, int64_t depth,
                    bool begins, float* m) {
  const int64_t registers = block.channel_groups() * kParts;
  int64_t first = 0;
  for (; first + 2 <= registers; first += 2) {
    multiply_registers<2>(u, v, blocks, block, first, depth, begins, m);
  }
  if (first < registers) multiply_registers<1>(u, v, blocks, block, first, depth, begins, m);
}

// Sums: one for each part of each block where there are parts, otherwise one for each thread.
int64_t sums_bytes(const Blocks& blocks, int threads) {
  const int64_t count = blocks.parts > 1 ? blocks.blocks * blocks.parts : threads;
  return count * blocks.sums() * static_cast<int64_t>(sizeof(float));
}

// Sixteen sums of all parts.
GHL_INLINE Floats sum_parts(const Blocks& blocks, const float* m) {
  Floats sum = load(m);
  for (int64_t part = 1; part < blocks.parts; ++part) sum += load(m + part * blocks.sums());
  return sum;
}

// sum(worker, block, chunk, chunk_end, m) makes the sums m of chunks [chunk, chunk_end) of a block, and
// put(block, row, m) does what is to be done with those of its row-th unit (of the first part, see
// sum_parts).
template <class Sum, class Put>
void run_blocks(const Blocks& blocks, float* sums, int threads, Sum sum, Put put) {
  const int64_t tasks = blocks.blocks * blocks.parts;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t worker = 0; worker < threads; ++worker) {
    for (int64_t i = tasks * worker / threads; i < tasks * (worker + 1) / threads; ++i) {
      const Block block = find_block(blocks, i / blocks.parts);
      const int64_t part = i % blocks.parts;
      float* const m = sums + (blocks.parts > 1 ? i : worker) * blocks.sums();
      sum(worker, block, blocks.chunks * part / blocks.parts, blocks.chunks * (part + 1) / blocks.parts, m);
      if (blocks.parts > 1) continue;
      for (int64_t row = 0; row < block.unit_end - block.unit; ++row) put(block, row, m);
    }
  }
  if (blocks.parts == 1) return;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t i = 0; i < blocks.blocks; ++i) {
    for (int64_t row = 0; row < blocks.block_units * kLanes; ++row) {
      const Block block = find_block(blocks, i);
      if (row >= block.unit_end - block.unit) continue;
      put(block, row, sums + i * blocks.parts * blocks.sums());
    }
  }
}

}  // namespace
}  // namespace ghl::GHL_ISA
