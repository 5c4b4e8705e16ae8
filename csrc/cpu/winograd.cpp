// A = sum_p y_p x_p^T of a 3 x 3 convolution by F(3 x 3, 2 x 2) (Lavin and Gray, arXiv 1509.09308, for
// weight gradients): a tile of 2 x 2 positions of y meets the 4 x 4 inputs under it in 16 products, whose
// sums over all tiles make the nine taps.
//
//   1. Tiles of x and y are transformed, sixteen channels (units) a vector: V = B d B^T, U = G g G^T.
//      1-d: B d = (d0 - d2, d1 + d2, d2 - d1, d3 - d1) and G g = (g0, g0 + g1, g0 - g1, g1).
//   2. For each of the 16 components, M += U^T V: a matrix product over the tiles.
//   3. A = C M C^T with C m = (m0 + s, (m1 - m2) / 2, m3 + s), s = (m1 + m2) / 2.
//   4. The error of a tap is in proportion to the products of its neighbors, too. One that is small beside
//      them is summed again by the definition, so that its sign, which gates a weight, is that of its own
//      products.
#include "ghl/winograd.h"

#include <limits>

#include "cpu/arena.h"
#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/sizes.h"
#include "cpu/taps.h"
#include "cpu/window.h"

namespace ghl::GHL_ISA {
namespace {

constexpr int kComponents = 16;
constexpr int kTaps = 9;

// A tap below this share of what it is the sum of is summed again: well above the rounding of a component,
// below what more than a few taps in ten thousand are where x and y are dense.
constexpr float kDoubtful = 64 * std::numeric_limits<float>::epsilon();

// Tiles that are multiplied at once: a group's share of them, for one component, stays in the first-level
// cache.
constexpr int64_t kDepth = 64;

// What parts make at most (blocks.h): 1 MiB of sums.
constexpr int64_t kSquares = 64;

// The distance between components would often be a whole number of pages, and is one line more: sixteen
// streams that shared a set of the cache would evict each other.
constexpr int64_t kSkew = 16;

// The rows of blocks.h are tiles here.
struct Plan : Blocks {
  int64_t rows_of_tiles;  // of an image
  int64_t pieces;         // that a row of tiles is cut into
  int64_t piece;          // tiles of a piece
  int64_t strips;         // pieces of the whole batch
  int64_t chunk_strips;   // of a chunk

  int64_t u_component;  // strides in floats
  int64_t v_component;
  int64_t window;  // floats of the padded copy that tiles are cut from
};

void choose_chunks(const WinogradParams& params, Plan* plan) {
  const int64_t row = ceil_div(params.out_size(1), 2);
  plan->rows_of_tiles = ceil_div(params.out_size(0), 2);
  plan->pieces = ceil_div(row, kDepth);
  plan->piece = ceil_div(row, plan->pieces);
  plan->strips = params.batch * plan->rows_of_tiles * plan->pieces;
  plan->chunk_strips = plan->pieces > 1 ? 1 : min(plan->strips, max(1, kDepth / plan->piece));
  plan->chunks = ceil_div(plan->strips, plan->chunk_strips);
  plan->depth = plan->chunk_strips * plan->piece;
  const int64_t tile_rows = plan->pieces > 1 ? 1 : min(plan->rows_of_tiles, plan->chunk_strips);
  plan->window = (2 * tile_rows + 2) * (2 * plan->piece + 2) * kLanes;
}

Plan make_plan(const WinogradParams& params, int threads) {
  Plan plan{};
  plan.components = kComponents;
  plan.skew = kSkew;
  choose_chunks(params, &plan);
  choose_blocks(params.units, params.channels, params.groups, kSquares, threads, &plan);
  plan.u_component = plan.block_units * plan.lanes_stride() + kSkew;
  plan.v_component = plan.block_channels * plan.lanes_stride() + kSkew;
  return plan;
}

// A thread's own memory.
struct Workspace {
  float* window;  // [rows, columns, 16]
  float* u;       // [16 components, groups of units, tiles, 16]
  float* v;       // [16 components, groups of channels, tiles, 16]
};

Workspace carve(const Plan& plan, Arena* arena) {
  Workspace ws{};
  ws.window = arena->take<float>(plan.window);
  ws.u = arena->take<float>(kComponents * plan.u_component);
  ws.v = arena->take<float>(kComponents * plan.v_component);
  return ws;
}

int64_t bytes_of_thread(const Plan& plan) {
  Arena arena(nullptr);
  carve(plan, &arena);
  return arena.used();
}

// ---- Tiles ----

// Rows [row, row_end) of one image's tiles, columns [column, column_end), which are tiles [tile, ...) of
// the chunk.
struct Segment {
  int64_t image;
  int64_t row;
  int64_t row_end;
  int64_t column;
  int64_t column_end;
  int64_t tile;
};

// The segment at strip, of strips before end; moves strip and tile past it.
Segment next_segment(const Plan& plan, int64_t end, int64_t* strip, int64_t* tile) {
  const int64_t row = *strip / plan.pieces;
  const int64_t piece = *strip % plan.pieces;
  Segment segment{};
  segment.image = row / plan.rows_of_tiles;
  segment.row = row % plan.rows_of_tiles;
  segment.tile = *tile;
  const int64_t rows = plan.pieces > 1 ? 1 : min(end - *strip, plan.rows_of_tiles - segment.row);
  segment.row_end = segment.row + rows;
  segment.column = piece * plan.piece;
  segment.column_end = segment.column + plan.piece;
  *strip += rows;
  *tile += rows * plan.piece;
  return segment;
}

// ---- Transforms ----

struct Four {
  Floats at[4];
};

// G g of two positions.
struct OfY {
  static constexpr int kSize = 2;
  static GHL_INLINE Four transform(const Floats (&g)[2]) { return {g[0], g[0] + g[1], g[0] - g[1], g[1]}; }
};

// B d of four inputs.
struct OfX {
  static constexpr int kSize = 4;
  static GHL_INLINE Four transform(const Floats (&d)[4]) {
    return {d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]};
  }
};

// A column of a tile, transformed.
template <class Side>
GHL_INLINE Four transform_column(const float* window, int64_t row_stride) {
  Floats column[Side::kSize];
#pragma GCC unroll 4
  for (int i = 0; i < Side::kSize; ++i) column[i] = load(window + i * row_stride);
  return Side::transform(column);
}

// One row of tiles: neighbors are two columns apart and share what they overlap in.
template <class Side>
void transform_tiles(const float* window, int64_t row_stride, int64_t tiles, float* out, int64_t component) {
  constexpr int kKept = Side::kSize - 2;
  Four columns[Side::kSize];
#pragma GCC unroll 2
  for (int i = 0; i < kKept; ++i) columns[i] = transform_column<Side>(window + i * kLanes, row_stride);
  window += kKept * kLanes;
  for (int64_t tile = 0; tile < tiles; ++tile, window += 2 * kLanes, out += kLanes) {
    columns[kKept] = transform_column<Side>(window, row_stride);
    columns[kKept + 1] = transform_column<Side>(window + kLanes, row_stride);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Floats row[Side::kSize];
#pragma GCC unroll 4
      for (int j = 0; j < Side::kSize; ++j) row[j] = columns[j].at[i];
      const Four components = Side::transform(row);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store(out + (i * 4 + j) * component, components.at[j]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kKept; ++i) columns[i] = columns[i + 2];
  }
}

// x or y as transforms see it.
struct Operand {
  const void* data;
  DType dtype;
  Layout layout;
  int64_t size[2];
  int64_t padding[2];
};

template <class Side, class T>
void transform_segment(const Operand& operand, const Plan& plan, const Segment& segment, int64_t first,
                       int count, float* window, float* out, int64_t component) {
  const Layout& layout = operand.layout;
  const int64_t tiles = segment.column_end - segment.column;
  const int64_t rows = segment.row_end - segment.row;
  View view{operand.size[0], operand.size[1], 0, 0, 2 * rows + Side::kSize - 2, 2 * tiles + Side::kSize - 2};
  view.row = 2 * segment.row - operand.padding[0];
  view.column = 2 * segment.column - operand.padding[1];
  const T* const source =
      static_cast<const T*>(operand.data) + segment.image * layout.stride_batch + first * layout.stride_unit;
  fill_window(source, layout, count, view, window);
  const int64_t row_stride = view.columns * kLanes;
  for (int64_t row = 0; row < rows; ++row) {
    transform_tiles<Side>(window + 2 * row * row_stride, row_stride, tiles,
                          out + (segment.tile + row * plan.piece) * kLanes, component);
  }
}

// Channels (units) [begin, end) of the chunk of strips, sixteen at a time; returns the chunk's tiles.
template <class Side>
int64_t transform_chunk(const Operand& operand, const Plan& plan, int64_t first_strip, int64_t begin,
                        int64_t end, float* window, float* out, int64_t component) {
  const int64_t end_strip = min(first_strip + plan.chunk_strips, plan.strips);
  int64_t tile = 0;
  for (int64_t strip = first_strip; strip < end_strip;) {
    const Segment segment = next_segment(plan, end_strip, &strip, &tile);
    float* group = out;
    for (int64_t first = begin; first < end; first += kLanes, group += plan.lanes_stride()) {
      const int count = static_cast<int>(min(kLanes, end - first));
      if (operand.dtype == DType::bf16) {
        transform_segment<Side, BFloat16>(operand, plan, segment, first, count, window, group, component);
      } else {
        transform_segment<Side, float>(operand, plan, segment, first, count, window, group, component);
      }
    }
  }
  return tile;
}

// ---- A ----

struct Three {
  Floats at[3];
};

// C m
GHL_INLINE Three transform_back(const Floats (&m)[4]) {
  const Floats half = broadcast(0.5f);
  const Floats sum = (m[1] + m[2]) * half;
  return {m[0] + sum, (m[1] - m[2]) * half, m[3] + sum};
}

// The same of magnitudes.
GHL_INLINE Three bound_back(const Floats (&m)[4]) {
  const Floats sum = (magnitude(m[1]) + magnitude(m[2])) * broadcast(0.5f);
  return {magnitude(m[0]) + sum, sum, magnitude(m[3]) + sum};
}

// The nine taps of one unit and sixteen channels: from channel on, of which count exist.
void put_taps(const WinogradParams& params, const Plan& plan, const float* m, Unit* unit, int64_t channel,
              int count, float* a) {
  Three rows[4];
  Three bounds[4];
  for (int i = 0; i < 4; ++i) {
    Floats components[4];
    for (Floats& component : components) {
      component = sum_parts(plan, m);
      m += plan.component();
    }
    rows[i] = transform_back(components);
    bounds[i] = bound_back(components);
  }
  alignas(64) float taps[kTaps][kLanes];
  uint32_t doubtful[kTaps], any = 0;
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Three column = transform_back({rows[0].at[j], rows[1].at[j], rows[2].at[j], rows[3].at[j]});
    const Three bound = bound_back({bounds[0].at[j], bounds[1].at[j], bounds[2].at[j], bounds[3].at[j]});
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      store(taps[3 * i + j], column.at[i]);
      doubtful[3 * i + j] = lane_bits(magnitude(column.at[i]) < bound.at[i] * broadcast(kDoubtful));
      any |= doubtful[3 * i + j];
    }
  }
  for (any &= (1u << count) - 1u; any != 0; any &= any - 1) {
    const int lane = __builtin_ctz(any);
    uint32_t of_lane = 0;
    for (int tap = 0; tap < kTaps; ++tap) of_lane |= (doubtful[tap] >> lane & 1u) << tap;
    sum_again(params, unit, channel + lane, of_lane, taps[0] + lane);
  }
  const Filters& layout = params.a_layout;
  for (int lane = 0; lane < count; ++lane) {
    for (int tap = 0; tap < kTaps; ++tap) {
      a[lane * layout.stride_channel + tap * layout.stride_tap] = taps[tap][lane];
    }
  }
}

// ---- Blocks ----

// M of the block's tiles in chunks [chunk, chunk_end).
void sum_chunks(const WinogradParams& params, const Plan& plan, const Block& block, int64_t chunk,
                int64_t chunk_end, const Workspace& ws, float* m) {
  const Operand x{params.x,
                  params.x_dtype,
                  params.x_layout,
                  {params.in_size[0], params.in_size[1]},
                  {params.padding[0], params.padding[1]}};
  const Operand y{
      params.y, params.y_dtype, params.y_layout, {params.out_size(0), params.out_size(1)}, {0, 0}};
  for (int64_t i = chunk; i < chunk_end; ++i) {
    const int64_t strip = i * plan.chunk_strips;
    transform_chunk<OfX>(x, plan, strip, block.channel, block.channel_end, ws.window, ws.v, plan.v_component);
    const int64_t tiles =
        transform_chunk<OfY>(y, plan, strip, block.unit, block.unit_end, ws.window, ws.u, plan.u_component);
    for (int component = 0; component < kComponents; ++component) {
      multiply_block(ws.u + component * plan.u_component, ws.v + component * plan.v_component, plan, block,
                     tiles, i == chunk, m + component * plan.component());
    }
  }
}

// One unit of the block, the row-th.
void put_unit(const WinogradParams& params, const Plan& plan, const Block& block, int64_t row,
              const float* m) {
  const Filters& layout = params.a_layout;
  m += (row / kLanes * plan.block_channels * kLanes + row % kLanes) * kLanes;
  float* const a = params.a + (block.unit + row) * layout.stride_unit;
  Unit unit(block.unit + row);
  for (int64_t channel = block.channel; channel < block.channel_end; channel += kLanes) {
    put_taps(params, plan, m + (channel - block.channel) * kLanes, &unit, channel,
             static_cast<int>(min(kLanes, block.channel_end - channel)),
             a + (channel - block.first_channel) * layout.stride_channel);
  }
}

}  // namespace

int64_t winograd_workspace(const WinogradParams& params, int threads) {
  const Plan plan = make_plan(params, threads);
  return threads * bytes_of_thread(plan) + sums_bytes(plan, threads);
}

void winograd(const WinogradParams& params, int threads) {
  const Plan plan = make_plan(params, threads);
  const int64_t bytes = bytes_of_thread(plan);
  char* const workspace = static_cast<char*>(params.workspace);
  const auto sum = [&](int64_t worker, const Block& block, int64_t chunk, int64_t chunk_end, float* m) {
    Arena arena(workspace + worker * bytes);
    sum_chunks(params, plan, block, chunk, chunk_end, carve(plan, &arena), m);
  };
  const auto put = [&](const Block& block, int64_t row, const float* m) {
    put_unit(params, plan, block, row, m);
  };
  run_blocks(plan, reinterpret_cast<float*>(workspace + threads * bytes), threads, sum, put);
}

}  // namespace ghl::GHL_ISA
