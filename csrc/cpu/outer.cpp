// A = sum_p y_p x_p^T of rows. Panels of x and y are copied as blocks.h multiplies them; they are read as
// they lie, since a product of a transposed matrix is one of rows.
#include "ghl/outer.h"

#include "cpu/arena.h"
#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/row.h"
#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace ghl::GHL_ISA {
namespace {

// Rows that are multiplied at once: a group's share of them stays in the first-level cache.
constexpr int64_t kDepth = 128;

// What parts make at most (blocks.h): 1 MiB of sums.
constexpr int64_t kSquares = 1024;

Blocks make_plan(const OuterParams& params, int threads) {
  Blocks plan{};
  plan.depth = min(params.rows, kDepth);
  plan.chunks = ceil_div(params.rows, plan.depth);
  choose_blocks(params.units, params.channels, 1, kSquares, threads, &plan);
  return plan;
}

// A thread's own memory.
struct Workspace {
  float* u;  // [groups of units, rows, 16]
  float* v;  // [groups of channels, rows, 16]
};

Workspace carve(const Blocks& plan, Arena* arena) {
  Workspace ws{};
  ws.u = arena->take<float>(plan.block_units * plan.lanes_stride());
  ws.v = arena->take<float>(plan.block_channels * plan.lanes_stride());
  return ws;
}

int64_t bytes_of_thread(const Blocks& plan) {
  Arena arena(nullptr);
  carve(plan, &arena);
  return arena.used();
}

// Columns [begin, end) of rows from first on.
template <class T>
void copy_panel(const T* matrix, int64_t stride, int64_t first, int64_t depth, int64_t begin, int64_t end,
                int64_t lanes_stride, float* panel) {
  for (int64_t row = 0; row < depth; ++row) {
    const T* const source = matrix + (first + row) * stride;
    float* to = panel + row * kLanes;
    for_vectors(begin, end, [&](auto whole, int64_t column, int lanes) {
      store(to, load_lanes<decltype(whole)::value>(source + column, lanes));
      to += lanes_stride;
    });
  }
}

void copy_panel(const Rows& matrix, int64_t first, int64_t depth, int64_t begin, int64_t end,
                int64_t lanes_stride, float* panel) {
  if (matrix.dtype == DType::bf16) {
    copy_panel(static_cast<const BFloat16*>(matrix.data), matrix.stride, first, depth, begin, end,
               lanes_stride, panel);
  } else {
    copy_panel(static_cast<const float*>(matrix.data), matrix.stride, first, depth, begin, end, lanes_stride,
               panel);
  }
}

// One unit of the block, the row-th.
void put_unit(const OuterParams& params, const Blocks& plan, const Block& block, int64_t row,
              const float* m) {
  m += (row / kLanes * plan.block_channels * kLanes + row % kLanes) * kLanes;
  float* const a = params.a + (block.unit + row) * params.a_stride;
  for_vectors(block.channel, block.channel_end, [&](auto whole, int64_t channel, int lanes) {
    constexpr bool kWhole = decltype(whole)::value;
    Floats sum = sum_parts(plan, m);
    if (params.adds) sum += load_lanes<kWhole>(a + channel, lanes);
    store_lanes<kWhole>(a + channel, sum, lanes);
    m += kLanes * kLanes;
  });
}

}  // namespace

int64_t outer_workspace(const OuterParams& params, int threads) {
  const Blocks plan = make_plan(params, threads);
  return threads * bytes_of_thread(plan) + sums_bytes(plan, threads);
}

void outer(const OuterParams& params, int threads) {
  const Blocks plan = make_plan(params, threads);
  const int64_t bytes = bytes_of_thread(plan);
  char* const workspace = static_cast<char*>(params.workspace);
  const auto sum = [&](int64_t worker, const Block& block, int64_t chunk, int64_t chunk_end, float* m) {
    Arena arena(workspace + worker * bytes);
    const Workspace ws = carve(plan, &arena);
    for (int64_t i = chunk; i < chunk_end; ++i) {
      const int64_t first = i * plan.depth;
      const int64_t depth = min(plan.depth, params.rows - first);
      copy_panel(params.x, first, depth, block.channel, block.channel_end, plan.lanes_stride(), ws.v);
      copy_panel(params.y, first, depth, block.unit, block.unit_end, plan.lanes_stride(), ws.u);
      multiply_block(ws.u, ws.v, plan, block, depth, i == chunk, m);
    }
  };
  const auto put = [&](const Block& block, int64_t row, const float* m) {
    put_unit(params, plan, block, row, m);
  };
  run_blocks(plan, reinterpret_cast<float*>(workspace + threads * bytes), threads, sum, put);
}

}  // namespace ghl::GHL_ISA
