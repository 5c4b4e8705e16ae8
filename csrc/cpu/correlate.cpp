// The k-sparse correlation A[n, c, tap] = sum over the positions p that unit n wins of
// activity(p, n) * x[patch p, c, tap].
//
//   1. The lists, which come by position, are sorted by unit (a stable counting sort). A winner becomes
//      the offset of its patch and its activity.
//   2. A block of input channels is copied to floats in channels_last order with its zero padding, so
//      that a patch is a base offset plus a fixed table of tap offsets: no bounds, no patch matrix, and
//      a block small enough to stay in cache while every unit gathers from it.
//   3. A tile is up to kMaxTile vectors of one unit's row. One thread sums a tile in registers over the
//      unit's whole list, in list order: no atomics, and the same bits for any number of threads.
#include "ghl/correlate.h"

#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace ghl::GHL_ISA {
namespace {

// Winners summed in registers before they join the second-level sum: the rounding error of a long list
// then grows with count / kFlush, not with count.
constexpr int64_t kFlush = 256;

// Accumulators of a tile: more amortize the reading of the list better, as long as they stay in registers.
constexpr int kMaxTile = 12 / kParts;

// Vectors that a unit's row of a block is cut to: one pass over the list then serves all taps, and the
// block is small. Measured: 16 channels are best from 9 taps on, 64 to 128 for a single tap.
constexpr int64_t kBlockVectors = 8;

// Reads of an input element up to which it is cheaper to read x in place, where that can be done, than to
// copy it to where it stays in cache.
constexpr int64_t kDirectReads = 16;

// Size a block is cut to, over the batch and over groups: it should stay in a core's second-level cache,
// or a short way outside.
constexpr int64_t kBlockBytes = 1 << 20;

// Below this many multiply-adds a thread, starting it costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 15;

// Parts of the work per thread: enough that a slow core is made up for by the others.
constexpr int64_t kPartsPerThread = 8;

// kLanes consecutive elements of a unit's row of a block, [tap, channel] in row-major order.
struct RowVector {
  int64_t x_offset;    // from the patch's first element
  int64_t row_index;   // of lane 0
  int64_t lane_begin;  // lanes before this one belong to the vector before
  int64_t lane_end;
};

struct Plan {
  ConvGeometry geometry;
  int64_t x_stride[3];
  int64_t taps;
  int64_t positions;  // output positions of one batch item
  int64_t group_channels;
  int64_t group_units;

  bool direct;             // the inner loop reads x itself: rows of floats without padding
  int64_t block_channels;  // channels of a block, the same for all: the last one overlaps the one before
  int64_t block_groups;    // groups of a block, more than one only where it holds all their channels
  int64_t block_images;    // batch items of a block
  int64_t extent[3];       // padded input that the patches touch
  int64_t image_stride;    // strides of what the inner loop reads, in floats
  int64_t view_stride[3];
  int64_t group_stride;

  int64_t run;  // consecutive floats of a patch: a kernel row, or one tap where the row has gaps
  int64_t vectors;
  int64_t tile;  // vectors of a tile
  int64_t tiles;
};

// A stride over a dimension that the kernel does not extend in is a stride of x: the copy then leaves
// out what no patch reads.
void fold_strides(ConvGeometry* geometry, int64_t* x_stride) {
  for (int d = 0; d < 3; ++d) {
    if (geometry->kernel[d] != 1 || geometry->padding[d] != 0) continue;
    x_stride[d] *= geometry->stride[d];
    geometry->in_size[d] = geometry->out_size[d];
    geometry->stride[d] = 1;
    geometry->dilation[d] = 1;
  }
}

void choose_block(const CorrelateParams& params, Plan* plan) {
  const ConvGeometry& g = plan->geometry;
  const bool padded = g.padding[0] != 0 || g.padding[1] != 0 || g.padding[2] != 0;
  plan->direct = params.x_dtype == DType::f32 && params.x_stride_channel == 1 && !padded &&
                 plan->group_channels >= kLanes && params.winners * plan->taps <= kDirectReads * g.groups;
  const int64_t blocks = ceil_div(plan->group_channels, kLanes * max(1, kBlockVectors / plan->taps));
  plan->block_channels = plan->group_channels;
  if (blocks > 1) {
    plan->block_channels = ceil_div(ceil_div(plan->group_channels, blocks), kLanes) * kLanes;
  }
  for (int d = 0; d < 3; ++d) {
    plan->extent[d] = (g.out_size[d] - 1) * g.stride[d] + (g.kernel[d] - 1) * g.dilation[d] + 1;
  }
  if (plan->direct) {
    plan->image_stride = params.x_stride_batch;
    for (int d = 0; d < 3; ++d) plan->view_stride[d] = plan->x_stride[d];
    plan->group_stride = plan->group_channels;
    plan->block_groups = blocks > 1 ? 1 : g.groups;
    plan->block_images = g.batch;
    return;
  }
  plan->view_stride[2] = plan->block_channels;
  plan->view_stride[1] = plan->extent[2] * plan->view_stride[2];
  plan->view_stride[0] = plan->extent[1] * plan->view_stride[1];
  plan->image_stride = plan->extent[0] * plan->view_stride[0];
  const int64_t image_bytes = plan->image_stride * static_cast<int64_t>(sizeof(float));
  plan->block_images = max(1, min(g.batch, kBlockBytes / image_bytes));
  plan->group_stride = plan->block_images * plan->image_stride;
  const int64_t group_bytes = plan->block_images * image_bytes;
  plan->block_groups = blocks > 1 ? 1 : max(1, min(g.groups, kBlockBytes / group_bytes));
}

Plan make_plan(const CorrelateParams& params) {
  Plan plan{};
  plan.geometry = params.geometry;
  for (int d = 0; d < 3; ++d) plan.x_stride[d] = params.x_stride[d];
  fold_strides(&plan.geometry, plan.x_stride);
  const ConvGeometry& g = plan.geometry;
  plan.taps = g.taps();
  plan.positions = g.out_size[0] * g.out_size[1] * g.out_size[2];
  plan.group_channels = g.group_channels();
  plan.group_units = params.units / g.groups;
  choose_block(params, &plan);

  const bool row_is_contiguous = g.dilation[2] * plan.view_stride[2] == plan.block_channels;
  const int64_t run_taps = row_is_contiguous ? g.kernel[2] : 1;
  plan.run = run_taps * plan.block_channels;
  plan.vectors = plan.taps / run_taps * ceil_div(plan.run, kLanes);
  plan.tiles = ceil_div(plan.vectors, kMaxTile);
  plan.tile = ceil_div(plan.vectors, plan.tiles);
  return plan;
}

int useful_threads(const CorrelateParams& params, const Plan& plan, int threads) {
  const int64_t entries = plan.geometry.batch * plan.positions * params.winners;
  return static_cast<int>(min(threads, 1 + entries * plan.taps * plan.group_channels / kWorkPerThread));
}

// Everything the kernel keeps, carved from the caller's workspace.
struct Workspace {
  int64_t* cursor;      // [slices, units] where the slice's next winner goes; counts before that
  int64_t* unit_begin;  // [units + 1]
  int64_t* offset;      // [entries] of the winner's patch in the view
  float* activity;      // [entries]
  RowVector* row;       // [vectors]
  float* block;         // [block groups, block images, extent..., block channels] and a vector of slack
  int64_t bytes;
};

Workspace carve(const CorrelateParams& params, const Plan& plan, int slices, void* base) {
  const int64_t entries = plan.geometry.batch * plan.positions * params.winners;
  Arena arena(base);
  Workspace ws{};
  ws.cursor = arena.take<int64_t>(slices * params.units);
  ws.unit_begin = arena.take<int64_t>(params.units + 1);
  ws.offset = arena.take<int64_t>(entries);
  ws.activity = arena.take<float>(entries);
  ws.row = arena.take<RowVector>(plan.vectors);
  ws.block = arena.take<float>(plan.direct ? 0 : plan.block_groups * plan.group_stride + kLanes);
  ws.bytes = arena.used();
  return ws;
}

// Counts the winners of output rows [begin, end) by unit; false if one of them is a NaN position, whose
// units are negative, or names a unit that does not exist.
bool count_winners(const CorrelateParams& params, int64_t begin, int64_t end, int64_t* count) {
  for (int64_t n = 0; n < params.units; ++n) count[n] = 0;
  for (int64_t p = begin; p < end; ++p) {
    const int32_t* unit = params.winner_unit + p * params.winners;
    for (int64_t i = 0; i < params.winners; ++i) {
      if (unit[i] < 0 || unit[i] >= params.units) return false;
      ++count[unit[i]];
    }
  }
  return true;
}

// Places the winners of output rows [begin, end) behind those of the slices before.
void place_winners(const CorrelateParams& params, const Plan& plan, int64_t begin, int64_t end,
                   int64_t* cursor, const Workspace& ws) {
  const ConvGeometry& g = plan.geometry;
  const int64_t width = g.out_size[2];
  const int64_t step = g.stride[2] * plan.view_stride[2];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t h = row % g.out_size[1];
    const int64_t d = row / g.out_size[1] % g.out_size[0];
    const int64_t b = row / g.out_size[1] / g.out_size[0];
    int64_t offset =
        b * plan.image_stride + d * g.stride[0] * plan.view_stride[0] + h * g.stride[1] * plan.view_stride[1];
    const int32_t* unit = params.winner_unit + row * width * params.winners;
    const float* activity = params.winner_activity + row * width * params.winners;
    for (int64_t w = 0; w < width; ++w, offset += step) {
      for (int64_t i = 0; i < params.winners; ++i, ++unit, ++activity) {
        const int64_t slot = cursor[*unit]++;
        ws.offset[slot] = offset;
        ws.activity[slot] = *activity;
      }
    }
  }
}

// Stable in position whatever the number of slices, so the sums do not depend on it. False if a position
// is NaN.
bool sort_winners(const CorrelateParams& params, const Plan& plan, int slices, const Workspace& ws) {
  const ConvGeometry& g = plan.geometry;
  const int64_t rows = g.batch * g.out_size[0] * g.out_size[1];
  const int64_t width = g.out_size[2];
  bool valid = true;
#pragma omp parallel for num_threads(slices) schedule(static, 1) reduction(&& : valid)
  for (int s = 0; s < slices; ++s) {
    valid = valid && count_winners(params, rows * s / slices * width, rows * (s + 1) / slices * width,
                                   ws.cursor + s * params.units);
  }
  if (!valid) return false;
  int64_t total = 0;
  for (int64_t n = 0; n < params.units; ++n) {
    ws.unit_begin[n] = total;
    for (int s = 0; s < slices; ++s) {
      int64_t* slot = ws.cursor + s * params.units + n;
      const int64_t count = *slot;
      *slot = total;
      total += count;
    }
  }
  ws.unit_begin[params.units] = total;
#pragma omp parallel for num_threads(slices) schedule(static, 1)
  for (int s = 0; s < slices; ++s) {
    place_winners(params, plan, rows * s / slices, rows * (s + 1) / slices, ws.cursor + s * params.units, ws);
  }
  return true;
}

// A run that is not whole vectors ends with one that overlaps the vector before, or, if it is shorter
// than a vector, with one that reads past the run (the block has that much slack).
void make_rows(const Plan& plan, RowVector* row) {
  const ConvGeometry& g = plan.geometry;
  for (int64_t begin = 0; begin < plan.taps * plan.block_channels; begin += plan.run) {
    const int64_t tap = begin / plan.block_channels;
    const int64_t w = tap % g.kernel[2];
    const int64_t h = tap / g.kernel[2] % g.kernel[1];
    const int64_t d = tap / g.kernel[2] / g.kernel[1];
    const int64_t run_offset = d * g.dilation[0] * plan.view_stride[0] +
                               h * g.dilation[1] * plan.view_stride[1] +
                               w * g.dilation[2] * plan.view_stride[2];
    for (int64_t i = 0; i < plan.run; i += kLanes) {
      const int64_t at = max(0, min(i, plan.run - kLanes));
      *row++ = {run_offset + at, begin + at, i - at, min(int64_t{kLanes}, plan.run - at)};
    }
  }
}

// What a block holds: groups [group, group + groups), their channels from channel on, images likewise.
struct Block {
  int64_t group;
  int64_t groups;
  int64_t channel;
  int64_t image;
  int64_t images;
};

// width positions of the block's channels, to [position, channel].
template <class T>
void copy_positions(const T* x, int64_t stride_channel, int64_t stride_w, int64_t channels, int64_t width,
                    float* out) {
  if (stride_channel == 1) {
    for (int64_t w = 0; w < width; ++w, x += stride_w, out += channels) {
      for (int64_t c = 0; c < channels; ++c) out[c] = to_float(x[c]);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t w = 0; w < width; ++w)
      out[w * channels + c] = to_float(x[c * stride_channel + w * stride_w]);
  }
}

void zero(float* begin, float* end) {
  while (begin < end) *begin++ = 0.0f;
}

// One padded row of the block. x points at the block's first channel of the image.
template <class T>
void copy_row(const CorrelateParams& params, const Plan& plan, const T* x, int64_t d, int64_t h, float* out) {
  constexpr int64_t kStrip = 32;  // positions whose channels all stay in L1 while they are transposed
  const ConvGeometry& g = plan.geometry;
  const int64_t channels = plan.block_channels;
  float* const end = out + plan.view_stride[1];
  const bool inside = d >= 0 && d < g.in_size[0] && h >= 0 && h < g.in_size[1];
  if (!inside) return zero(out, end);
  x += d * plan.x_stride[0] + h * plan.x_stride[1];
  const int64_t width = max(0, min(g.in_size[2], plan.extent[2] - g.padding[2]));
  float* const first = out + min(g.padding[2], plan.extent[2]) * channels;
  zero(out, first);
  for (int64_t w = 0; w < width; w += kStrip) {
    copy_positions(x + w * plan.x_stride[2], params.x_stride_channel, plan.x_stride[2], channels,
                   min(kStrip, width - w), first + w * channels);
  }
  zero(first + width * channels, end);
}

template <class T>
void copy_block(const CorrelateParams& params, const Plan& plan, const Block& block, float* out,
                int threads) {
  const ConvGeometry& g = plan.geometry;
  const T* const x = static_cast<const T*>(params.x);
#pragma omp parallel for collapse(4) num_threads(threads) schedule(static)
  for (int64_t i = 0; i < block.groups; ++i) {
    for (int64_t b = 0; b < block.images; ++b) {
      for (int64_t d = 0; d < plan.extent[0]; ++d) {
        for (int64_t h = 0; h < plan.extent[1]; ++h) {
          const int64_t channel = (block.group + i) * plan.group_channels + block.channel;
          copy_row(params, plan,
                   x + (block.image + b) * params.x_stride_batch + channel * params.x_stride_channel,
                   d - g.padding[0], h - g.padding[1],
                   out + i * plan.group_stride + b * plan.image_stride + d * plan.view_stride[0] +
                       h * plan.view_stride[1]);
        }
      }
    }
  }
}

// One unit's winners in a block, whose first image is at offset origin.
struct List {
  const int64_t* offset;
  const float* activity;
  int64_t count;
  int64_t origin;
};

int64_t first_at_or_after(const int64_t* offset, int64_t count, int64_t bound) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (offset[middle] < bound) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

List list_of(const Plan& plan, const Workspace& ws, const Block& block, int64_t unit) {
  const int64_t begin = ws.unit_begin[unit];
  List list{ws.offset + begin, ws.activity + begin, ws.unit_begin[unit + 1] - begin, 0};
  if (block.images == plan.geometry.batch) return list;
  list.origin = block.image * plan.image_stride;
  const int64_t first = first_at_or_after(list.offset, list.count, list.origin);
  list.count =
      first_at_or_after(list.offset, list.count, list.origin + block.images * plan.image_stride) - first;
  list.offset += first;
  list.activity += first;
  return list;
}

// sum[v] = sum over the list of activity * x[offset + row[v].x_offset].
template <int V>
void sum_tile(const float* x, const List& list, const RowVector* row, Floats* sum) {
  const float* base[V];
  for (int v = 0; v < V; ++v) base[v] = x + row[v].x_offset;
  Floats total[V] = {};
  for (int64_t begin = 0; begin < list.count; begin += kFlush) {
    const int64_t end = min(list.count, begin + kFlush);
    Floats acc[V] = {};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = list.offset[i] - list.origin;
      const Floats activity = broadcast(list.activity[i]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[v] = multiply_add(activity, load(base[v] + offset), acc[v]);
    }
    for (int v = 0; v < V; ++v) total[v] += acc[v];
  }
  for (int v = 0; v < V; ++v) sum[v] = total[v];
}

template <int V = kMaxTile>
void sum_tile(int64_t vectors, const float* x, const List& list, const RowVector* row, Floats* sum) {
  if (vectors == V) return sum_tile<V>(x, list, row, sum);
  if constexpr (V > 1) sum_tile<V - 1>(vectors, x, list, row, sum);
}

// Writes the lanes of one vector to a, which points at the unit's element (block.channel, tap 0); adds to
// what the batch items before have left there if this is not the block of the first.
void write_vector(const CorrelateParams& params, const Plan& plan, const RowVector& row, bool add,
                  const Floats& sum, float* a) {
  float lanes[kLanes];
  store(lanes, sum);
  int64_t tap = (row.row_index + row.lane_begin) / plan.block_channels;
  int64_t channel = (row.row_index + row.lane_begin) % plan.block_channels;
  for (int64_t lane = row.lane_begin; lane < row.lane_end; ++tap, channel = 0) {
    float* out = a + tap * params.a_stride_tap + channel * params.a_stride_channel;
    const int64_t end = min(row.lane_end, lane + plan.block_channels - channel);
    for (; lane < end; ++lane, out += params.a_stride_channel) *out = add ? *out + lanes[lane] : lanes[lane];
  }
}

// A tile of a unit: the least that one thread does.
struct Item {
  int64_t unit;
  int64_t tile;
};

// Cost of an item beside its list, in winners.
constexpr int64_t kItemCost = 8;

// Work of the units [first, unit), for one tile.
int64_t work_before(const Workspace& ws, int64_t first, int64_t unit) {
  return ws.unit_begin[unit] - ws.unit_begin[first] + (unit - first) * kItemCost;
}

// The item of units [first, last) in which the work up to it exceeds work.
Item item_at(const Plan& plan, const Workspace& ws, int64_t first, int64_t last, int64_t work) {
  int64_t low = first;
  int64_t high = last;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (work_before(ws, first, middle + 1) * plan.tiles <= work) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == last) return {last, 0};
  const int64_t rest = work - work_before(ws, first, low) * plan.tiles;
  return {low, rest / (work_before(ws, low, low + 1))};
}

void sum_item(const CorrelateParams& params, const Plan& plan, const Workspace& ws, const Block& block,
              const float* x, const List& list, const Item& item) {
  const int64_t begin = item.tile * plan.tile;
  const int64_t count = min(plan.tile, plan.vectors - begin);
  Floats sum[kMaxTile];
  sum_tile(count, x, list, ws.row + begin, sum);
  float* const a = params.a + item.unit * params.a_stride_unit + block.channel * params.a_stride_channel;
  for (int64_t v = 0; v < count; ++v)
    write_vector(params, plan, ws.row[begin + v], block.image > 0, sum[v], a);
}

// x points at the first element of the block.
void sum_block(const CorrelateParams& params, const Plan& plan, const Workspace& ws, const Block& block,
               const float* x, int threads) {
  const int64_t first = block.group * plan.group_units;
  const int64_t last = first + block.groups * plan.group_units;
  const int64_t work = work_before(ws, first, last) * plan.tiles;
  const int64_t parts = min(threads == 1 ? 1 : threads * kPartsPerThread, (last - first) * plan.tiles);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t part = 0; part < parts; ++part) {
    Item item = item_at(plan, ws, first, last, work * part / parts);
    const Item end = item_at(plan, ws, first, last, work * (part + 1) / parts);
    while (item.unit < end.unit || (item.unit == end.unit && item.tile < end.tile)) {
      const float* const plane = x + (item.unit - first) / plan.group_units * plan.group_stride;
      const List list = list_of(plan, ws, block, item.unit);
      const int64_t tiles = item.unit == end.unit ? end.tile : plan.tiles;
      for (; item.tile < tiles; ++item.tile) sum_item(params, plan, ws, block, plane, list, item);
      if (item.tile == plan.tiles) item = {item.unit + 1, 0};
    }
  }
}

void correlate_block(const CorrelateParams& params, const Plan& plan, const Workspace& ws, const Block& block,
                     int threads) {
  if (plan.direct) {
    const int64_t channel = block.group * plan.group_channels + block.channel;
    return sum_block(params, plan, ws, block, static_cast<const float*>(params.x) + channel, threads);
  }
  if (params.x_dtype == DType::f32) {
    copy_block<float>(params, plan, block, ws.block, threads);
  } else {
    copy_block<BFloat16>(params, plan, block, ws.block, threads);
  }
  sum_block(params, plan, ws, block, ws.block, threads);
}

bool no_positions(const ConvGeometry& g) {
  return g.batch == 0 || g.out_size[0] == 0 || g.out_size[1] == 0 || g.out_size[2] == 0;
}

void fill(const CorrelateParams& params, float value) {
  const ConvGeometry& g = params.geometry;
  const int64_t taps = g.taps();
  for (int64_t n = 0; n < params.units; ++n) {
    if (params.activity_sum != nullptr) params.activity_sum[n] = value;
    for (int64_t c = 0; c < g.group_channels(); ++c) {
      float* const a = params.a + n * params.a_stride_unit + c * params.a_stride_channel;
      for (int64_t t = 0; t < taps; ++t) a[t * params.a_stride_tap] = value;
    }
  }
}

float sum_list(const float* activity, int64_t count) {
  Floats total = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    total += load_first(activity + i, static_cast<int>(min(int64_t{kLanes}, count - i)));
  }
  float lanes[kLanes];
  store(lanes, total);
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

void sum_activities(const CorrelateParams& params, const Workspace& ws, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < params.units; ++n) {
    params.activity_sum[n] =
        sum_list(ws.activity + ws.unit_begin[n], ws.unit_begin[n + 1] - ws.unit_begin[n]);
  }
}

}  // namespace

int64_t correlate_workspace(const CorrelateParams& params, int threads) {
  if (no_positions(params.geometry)) return 0;
  return carve(params, make_plan(params), threads, nullptr).bytes;
}

void correlate(const CorrelateParams& params, int threads) {
  if (no_positions(params.geometry)) return fill(params, 0.0f);
  const Plan plan = make_plan(params);
  threads = useful_threads(params, plan, threads);
  const Workspace ws = carve(params, plan, threads, params.workspace);
  if (!sort_winners(params, plan, threads, ws)) return fill(params, __builtin_nanf(""));
  if (params.activity_sum != nullptr) sum_activities(params, ws, threads);
  make_rows(plan, ws.row);
  const ConvGeometry& g = plan.geometry;
  for (int64_t group = 0; group < g.groups; group += plan.block_groups) {
    const int64_t groups = min(plan.block_groups, g.groups - group);
    for (int64_t next = 0; next < plan.group_channels; next += plan.block_channels) {
      const int64_t channel = min(next, plan.group_channels - plan.block_channels);
      for (int64_t image = 0; image < g.batch; image += plan.block_images) {
        const int64_t images = min(plan.block_images, g.batch - image);
        correlate_block(params, plan, ws, {group, groups, channel, image, images}, threads);
      }
    }
  }
}

}  // namespace ghl::GHL_ISA
