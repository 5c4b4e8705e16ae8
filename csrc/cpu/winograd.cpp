// A = sum_p y_p x_p^T of a 3 x 3 convolution by F(3 x 3, 2 x 2) (Lavin and Gray, arXiv 1509.09308, for
// weight gradients): a tile of 2 x 2 positions of y meets the 4 x 4 inputs under it in 16 products, whose
// sums over all tiles make the nine taps.
//
//   1. Tiles of x and y are transformed, sixteen channels (units) a vector: V = B d B^T, U = G g G^T.
//      1-d: B d = (d0 - d2, d1 + d2, d2 - d1, d3 - d1) and G g = (g0, g0 + g1, g0 - g1, g1).
//   2. For each of the 16 components, M += U^T V: a matrix product over the tiles.
//   3. A = C M C^T with C m = (m0 + s, (m1 - m2) / 2, m3 + s), s = (m1 + m2) / 2.
//   4. The error of a tap is in proportion to the products of its neighbors, too. One that is small beside
//   them
//      is summed again by the definition, so that its sign, which gates a weight, is that of its own
//      products.
//
// A task is a block of units by a block of channels, which one thread sums over all tiles in chunks, or,
// where units and channels are few, over one of several parts of them. So the workspace does not grow with
// the batch, and the order of the sums does not depend on the number of threads.
#include "ghl/winograd.h"

#include <limits>

#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/sizes.h"
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

// Groups (of sixteen units or channels) of a block at most: for one component, U, V and M of a task then
// stay in the second-level cache.
constexpr int64_t kBlockGroups = 8;

// Tasks per thread that blocks are halved for, down to a size below which the transforms, which each of them
// repeats, cost too much.
constexpr int64_t kTasksPerThread = 2;
constexpr int64_t kLeastHalved = 4;

// The tiles are divided into so many parts that parts times squares (sixteen units by sixteen channels) are
// this many at most: tasks for the threads where units and channels make few, and 1 MiB of sums.
constexpr int64_t kSquares = 64;

// Accumulators of the inner loop: so many rows (units) of two registers.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif

// The distance between components would often be a whole number of pages, and is one line more: sixteen
// streams that shared a set of the cache would evict each other.
constexpr int64_t kSkew = 16;

struct Plan {
  int64_t group_units;  // of a group of the convolution
  int64_t group_channels;
  int64_t unit_lanes;  // in groups of sixteen
  int64_t channel_lanes;
  int64_t block_units;  // of a task, in groups of sixteen
  int64_t block_channels;
  int64_t unit_blocks;
  int64_t channel_blocks;
  int64_t blocks;  // of all groups of the convolution
  int64_t parts;   // of the chunks, the same number for any number of threads

  int64_t rows_of_tiles;  // of an image
  int64_t pieces;         // that a row of tiles is cut into
  int64_t piece;          // tiles of a piece
  int64_t strips;         // pieces of the whole batch
  int64_t chunk_strips;   // of a chunk
  int64_t chunks;
  int64_t depth;  // tiles of a chunk at most

  int64_t u_component;  // strides in floats
  int64_t v_component;
  int64_t m_component;
  int64_t lanes_stride;  // from one group of sixteen to the next, in u and in v
  int64_t window;        // floats of the padded copy that tiles are cut from
};

void choose_blocks(Plan* plan, int64_t groups, int threads) {
  const auto split = [](int64_t lanes, int64_t block) { return ceil_div(lanes, ceil_div(lanes, block)); };
  plan->block_units = split(plan->unit_lanes, kBlockGroups);
  plan->block_channels = split(plan->channel_lanes, kBlockGroups);
  while (true) {
    plan->unit_blocks = ceil_div(plan->unit_lanes, plan->block_units);
    plan->channel_blocks = ceil_div(plan->channel_lanes, plan->block_channels);
    plan->blocks = groups * plan->unit_blocks * plan->channel_blocks;
    int64_t* const larger =
        plan->block_units >= plan->block_channels ? &plan->block_units : &plan->block_channels;
    const bool enough = plan->blocks * plan->parts >= kTasksPerThread * threads;
    if (threads == 1 || enough || *larger < kLeastHalved) return;
    *larger = ceil_div(*larger, 2);
  }
}

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
  plan.group_units = params.units / params.groups;
  plan.group_channels = params.channels / params.groups;
  plan.unit_lanes = ceil_div(plan.group_units, kLanes);
  plan.channel_lanes = ceil_div(plan.group_channels, kLanes);
  choose_chunks(params, &plan);
  const int64_t squares = params.groups * plan.unit_lanes * plan.channel_lanes;
  plan.parts = max(1, min(kSquares / squares, plan.chunks));
  choose_blocks(&plan, params.groups, threads);
  plan.lanes_stride = plan.depth * kLanes;
  plan.u_component = plan.block_units * plan.lanes_stride + kSkew;
  plan.v_component = plan.block_channels * plan.lanes_stride + kSkew;
  plan.m_component = plan.block_units * plan.block_channels * kLanes * kLanes + kSkew;
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

// [16 components, groups of units, groups of channels, 16 units, 16 channels]: one for each part of each
// block where there are parts, which are summed at the end, otherwise one for each thread.
int64_t sums_floats(const Plan& plan) { return kComponents * plan.m_component; }
int64_t sums_count(const Plan& plan, int threads) {
  return plan.parts > 1 ? plan.blocks * plan.parts : threads;
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
    for (int64_t first = begin; first < end; first += kLanes, group += plan.lanes_stride) {
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

// ---- Products ----

// rows (units) by registers (of channels) of M: m (+)= sum over the tiles of u[tile, row] * v[tile].
template <int rows, int registers>
GHL_INLINE void multiply(const float* u, const float* const* v, int64_t tiles, bool begins, float* const* m,
                         int first_row) {
  PartF sum[rows][registers] = {};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    PartF inputs[registers];
#pragma GCC unroll 2
    for (int i = 0; i < registers; ++i) inputs[i] = load_part(v[i] + tile * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
      for (int i = 0; i < registers; ++i) sum[row][i] += u[tile * kLanes + first_row + row] * inputs[i];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
    for (int i = 0; i < registers; ++i) {
      float* const to = m[i] + (first_row + row) * kLanes;
      store_part(to, begins ? sum[row][i] : sum[row][i] + load_part(to));
    }
  }
}

// The sixteen units of a group.
template <int registers>
GHL_INLINE void multiply_group(const float* u, const float* const* v, int64_t tiles, bool begins,
                               float* const* m) {
  constexpr int kRest = kLanes % kRows;
  for (int row = 0; row + kRows <= kLanes; row += kRows) {
    multiply<kRows, registers>(u, v, tiles, begins, m, row);
  }
  if constexpr (kRest != 0) multiply<kRest, registers>(u, v, tiles, begins, m, kLanes - kRest);
}

// Every group of units with the registers of channels from one on.
template <int registers>
void multiply_registers(const float* u, const float* v, const Plan& plan, int64_t unit_groups, int64_t first,
                        int64_t tiles, bool begins, float* m) {
  const float* inputs[registers];
  float* sums[registers];
  for (int i = 0; i < registers; ++i) {
    const int64_t group = (first + i) / kParts;
    const int64_t lane = (first + i) % kParts * kWidth;
    inputs[i] = v + group * plan.lanes_stride + lane;
    sums[i] = m + group * kLanes * kLanes + lane;
  }
  for (int64_t i = 0; i < unit_groups; ++i, u += plan.lanes_stride) {
    multiply_group<registers>(u, inputs, tiles, begins, sums);
    for (float*& sum : sums) sum += plan.block_channels * kLanes * kLanes;
  }
}

void multiply_component(const float* u, const float* v, const Plan& plan, int64_t unit_groups,
                        int64_t channel_groups, int64_t tiles, bool begins, float* m) {
  const int64_t registers = channel_groups * kParts;
  int64_t first = 0;
  for (; first + 2 <= registers; first += 2) {
    multiply_registers<2>(u, v, plan, unit_groups, first, tiles, begins, m);
  }
  if (first < registers) multiply_registers<1>(u, v, plan, unit_groups, first, tiles, begins, m);
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

// One tap by the definition, in double precision.
struct Tap {
  int64_t unit;     // of all
  int64_t channel;  // of all
  int64_t row;      // of the kernel
  int64_t column;
};

template <class X, class Y>
float sum_tap(const WinogradParams& params, const Tap& tap) {
  const int64_t row_shift = tap.row - params.padding[0];
  const int64_t column_shift = tap.column - params.padding[1];
  const int64_t first = max(0, -column_shift);
  const int64_t end = min(params.out_size(1), params.in_size[1] - column_shift);
  double sum = 0.0;
  for (int64_t image = 0; image < params.batch; ++image) {
    const X* const x = static_cast<const X*>(params.x) + image * params.x_layout.stride_batch +
                       tap.channel * params.x_layout.stride_unit;
    const Y* const y = static_cast<const Y*>(params.y) + image * params.y_layout.stride_batch +
                       tap.unit * params.y_layout.stride_unit;
    for (int64_t row = max(0, -row_shift); row < min(params.out_size(0), params.in_size[0] - row_shift);
         ++row) {
      const X* const inputs = x + (row + row_shift) * params.in_size[1] * params.x_layout.stride_position;
      const Y* const outputs = y + row * params.out_size(1) * params.y_layout.stride_position;
      for (int64_t column = first; column < end; ++column) {
        sum +=
            static_cast<double>(to_float(inputs[(column + column_shift) * params.x_layout.stride_position])) *
            static_cast<double>(to_float(outputs[column * params.y_layout.stride_position]));
      }
    }
  }
  return static_cast<float>(sum);
}

float sum_tap(const WinogradParams& params, const Tap& tap) {
  const bool x_is_bf16 = params.x_dtype == DType::bf16;
  if (params.y_dtype == DType::bf16) {
    return x_is_bf16 ? sum_tap<BFloat16, BFloat16>(params, tap) : sum_tap<float, BFloat16>(params, tap);
  }
  return x_is_bf16 ? sum_tap<BFloat16, float>(params, tap) : sum_tap<float, float>(params, tap);
}

// A component of all parts.
GHL_INLINE Floats sum_parts(const float* m, const Plan& plan) {
  Floats sum = load(m);
  for (int64_t part = 1; part < plan.parts; ++part) sum += load(m + part * sums_floats(plan));
  return sum;
}

// The nine taps of one unit and sixteen channels: from channel on, of which count exist.
void put_taps(const WinogradParams& params, const Plan& plan, const float* m, int64_t unit, int64_t channel,
              int count, float* a) {
  Three rows[4];
  Three bounds[4];
  for (int i = 0; i < 4; ++i) {
    Floats components[4];
    for (Floats& component : components) {
      component = sum_parts(m, plan);
      m += plan.m_component;
    }
    rows[i] = transform_back(components);
    bounds[i] = bound_back(components);
  }
  alignas(64) float taps[kTaps][kLanes];
  uint32_t doubtful[kTaps];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Three column = transform_back({rows[0].at[j], rows[1].at[j], rows[2].at[j], rows[3].at[j]});
    const Three bound = bound_back({bounds[0].at[j], bounds[1].at[j], bounds[2].at[j], bounds[3].at[j]});
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      store(taps[3 * i + j], column.at[i]);
      doubtful[3 * i + j] = lane_bits(magnitude(column.at[i]) < bound.at[i] * broadcast(kDoubtful));
    }
  }
  for (int tap = 0; tap < kTaps; ++tap) {
    for (uint32_t bits = doubtful[tap] & ((1u << count) - 1u); bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      taps[tap][lane] = sum_tap(params, {unit, channel + lane, tap / 3, tap % 3});
    }
  }
  const Filters& layout = params.a_layout;
  for (int lane = 0; lane < count; ++lane) {
    for (int tap = 0; tap < kTaps; ++tap) {
      a[lane * layout.stride_channel + tap * layout.stride_tap] = taps[tap][lane];
    }
  }
}

// ---- Blocks ----

struct Block {
  int64_t unit;  // of all
  int64_t unit_end;
  int64_t channel;  // of all
  int64_t channel_end;
  int64_t first_channel;  // of the group of the convolution
};

Block find_block(const Plan& plan, int64_t index) {
  const int64_t channel = index % plan.channel_blocks * plan.block_channels * kLanes;
  const int64_t unit = index / plan.channel_blocks % plan.unit_blocks * plan.block_units * kLanes;
  const int64_t group = index / plan.channel_blocks / plan.unit_blocks;
  const int64_t first_unit = group * plan.group_units;
  Block block{};
  block.first_channel = group * plan.group_channels;
  block.channel = block.first_channel + channel;
  block.channel_end = block.first_channel + min(channel + plan.block_channels * kLanes, plan.group_channels);
  block.unit = first_unit + unit;
  block.unit_end = first_unit + min(unit + plan.block_units * kLanes, plan.group_units);
  return block;
}

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
  const int64_t unit_groups = ceil_div(block.unit_end - block.unit, kLanes);
  const int64_t channel_groups = ceil_div(block.channel_end - block.channel, kLanes);
  for (int64_t i = chunk; i < chunk_end; ++i) {
    const int64_t strip = i * plan.chunk_strips;
    transform_chunk<OfX>(x, plan, strip, block.channel, block.channel_end, ws.window, ws.v, plan.v_component);
    const int64_t tiles =
        transform_chunk<OfY>(y, plan, strip, block.unit, block.unit_end, ws.window, ws.u, plan.u_component);
    for (int component = 0; component < kComponents; ++component) {
      multiply_component(ws.u + component * plan.u_component, ws.v + component * plan.v_component, plan,
                         unit_groups, channel_groups, tiles, i == chunk, m + component * plan.m_component);
    }
  }
}

// One unit of the block, the row-th.
void put_unit(const WinogradParams& params, const Plan& plan, const Block& block, int64_t row,
              const float* m) {
  const Filters& layout = params.a_layout;
  m += (row / kLanes * plan.block_channels * kLanes + row % kLanes) * kLanes;
  float* const a = params.a + (block.unit + row) * layout.stride_unit;
  for (int64_t channel = block.channel; channel < block.channel_end; channel += kLanes) {
    put_taps(params, plan, m + (channel - block.channel) * kLanes, block.unit + row, channel,
             static_cast<int>(min(kLanes, block.channel_end - channel)),
             a + (channel - block.first_channel) * layout.stride_channel);
  }
}

}  // namespace

int64_t winograd_workspace(const WinogradParams& params, int threads) {
  const Plan plan = make_plan(params, threads);
  const int64_t sums = sums_count(plan, threads) * sums_floats(plan) * static_cast<int64_t>(sizeof(float));
  return threads * bytes_of_thread(plan) + sums;
}

void winograd(const WinogradParams& params, int threads) {
  const Plan plan = make_plan(params, threads);
  const int64_t tasks = plan.blocks * plan.parts;
  const int64_t bytes = bytes_of_thread(plan);
  char* const workspace = static_cast<char*>(params.workspace);
  float* const sums = reinterpret_cast<float*>(workspace + threads * bytes);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t worker = 0; worker < threads; ++worker) {
    Arena arena(workspace + worker * bytes);
    const Workspace ws = carve(plan, &arena);
    for (int64_t i = tasks * worker / threads; i < tasks * (worker + 1) / threads; ++i) {
      const Block block = find_block(plan, i / plan.parts);
      const int64_t part = i % plan.parts;
      float* const m = sums + (plan.parts > 1 ? i : worker) * sums_floats(plan);
      sum_chunks(params, plan, block, plan.chunks * part / plan.parts, plan.chunks * (part + 1) / plan.parts,
                 ws, m);
      if (plan.parts > 1) continue;
      for (int64_t row = 0; row < block.unit_end - block.unit; ++row) {
        put_unit(params, plan, block, row, m);
      }
    }
  }
  if (plan.parts == 1) return;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t i = 0; i < plan.blocks; ++i) {
    for (int64_t row = 0; row < plan.block_units * kLanes; ++row) {
      const Block block = find_block(plan, i);
      if (row >= block.unit_end - block.unit) continue;
      put_unit(params, plan, block, row, sums + i * plan.parts * sums_floats(plan));
    }
  }
}

}  // namespace ghl::GHL_ISA
