// Competition, sixteen positions at a time: the lanes of a vector are positions, and the loops run over
// the units. Tiles of positions are copied to a float buffer in that order, whatever their layout and
// dtype, compete there, and are copied out, or written at once where that is as good. Lanes never meet, so no
// result depends on the number of threads or on how positions are grouped. Only a softmax over rows of units
// needs no tile: there the lanes are units.
#include <limits>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/select.h"
#include "cpu/simd.h"
#include "cpu/sizes.h"
#include "cpu/softmax.h"

namespace ghl::GHL_ISA {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// More groups in a tile make longer runs of positions in memory. The second-level cache holds the tile, the
// next one's u and y.
constexpr int64_t kTileBytes = 128 * 1024;
constexpr int64_t kMaxGroups = 4;

// What is worth counting on of a first-level data cache.
constexpr int64_t kFirstLevelBytes = 32 * 1024;

// Planes that a tile is read ahead of: their stride is out of the hardware prefetchers' reach.
// A prefetch past the end does nothing.
constexpr int64_t kAhead = 8;

// ---- Tiles: [groups][units][16 positions] ----

struct Plan {
  int64_t rows;  // positions of the whole batch
  int64_t group_bytes;
  int64_t groups_per_tile;
  int64_t tiles;
};

Plan make_plan(const CompeteParams& params) {
  Plan plan;
  plan.rows = params.batch * params.positions;
  plan.group_bytes = params.units * kLanes * static_cast<int64_t>(sizeof(float));
  plan.groups_per_tile = min(max(kTileBytes / plan.group_bytes, 1), kMaxGroups);
  plan.tiles = ceil_div(plan.rows, plan.groups_per_tile * kLanes);
  return plan;
}

// The addresses of a group's sixteen positions. Lanes past the end repeat the last position, so that
// loads need no mask; only count lanes are stored.
template <class T>
struct Lanes {
  T* at[kLanes];
  int count;
  bool adjacent;  // one run in memory
};

template <class T>
Lanes<T> find_lanes(T* base, const Layout& layout, const CompeteParams& params, int64_t first, int64_t rows) {
  Lanes<T> lanes;
  lanes.count = static_cast<int>(min(rows - first, kLanes));
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t row = first + min(lane, lanes.count - 1);
    lanes.at[lane] =
        base + row / params.positions * layout.stride_batch + row % params.positions * layout.stride_position;
  }
  lanes.adjacent = lanes.count == kLanes && layout.stride_position == 1 &&
                   first % params.positions + kLanes <= params.positions;
  return lanes;
}

// Stride 1 along the units: squares of one register's width, transposed.
template <class T>
void load_rows(const Lanes<const T>& lanes, int64_t units, float* group) {
  int64_t n = 0;
  for (; n + kWidth <= units; n += kWidth) {
    for (int lane = 0; lane < kLanes; lane += kWidth) {
      PartF square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) square[i] = load_part(lanes.at[lane + i] + n);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store_part(group + (n + i) * kLanes + lane, square[i]);
    }
  }
  for (; n < units; ++n) {
    for (int lane = 0; lane < kLanes; ++lane) group[n * kLanes + lane] = to_float(lanes.at[lane][n]);
  }
}

template <class T>
void store_rows(const float* group, int64_t units, const Lanes<T>& lanes) {
  int64_t n = 0;
  for (; n + kWidth <= units; n += kWidth) {
    for (int lane = 0; lane < lanes.count; lane += kWidth) {
      PartF square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) square[i] = load_part(group + (n + i) * kLanes + lane);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (lane + i < lanes.count) store_part(lanes.at[lane + i] + n, square[i]);
      }
    }
  }
  for (; n < units; ++n) {
    for (int lane = 0; lane < lanes.count; ++lane) {
      lanes.at[lane][n] = from_float<T>(group[n * kLanes + lane]);
    }
  }
}

template <class T>
void load_group(const Lanes<const T>& lanes, int64_t stride_unit, int64_t units, float* group) {
  if (lanes.adjacent) {
    for (int64_t n = 0; n < units; ++n) store(group + n * kLanes, load(lanes.at[0] + n * stride_unit));
  } else if (stride_unit == 1) {
    load_rows(lanes, units, group);
  } else {
    for (int64_t n = 0; n < units; ++n) {
      for (int lane = 0; lane < kLanes; ++lane) {
        group[n * kLanes + lane] = to_float(lanes.at[lane][n * stride_unit]);
      }
    }
  }
}

template <class T>
void store_group(const float* group, int64_t units, const Lanes<T>& lanes, int64_t stride_unit) {
  if (lanes.adjacent) {
    for (int64_t n = 0; n < units; ++n) store(lanes.at[0] + n * stride_unit, load(group + n * kLanes));
  } else if (stride_unit == 1) {
    store_rows(group, units, lanes);
  } else {
    for (int64_t n = 0; n < units; ++n) {
      for (int lane = 0; lane < lanes.count; ++lane) {
        lanes.at[lane][n * stride_unit] = from_float<T>(group[n * kLanes + lane]);
      }
    }
  }
}

// ---- Activities ----

struct Softmax {
  Exponential exponential;
  Floats inverse_sum;
  GHL_INLINE Floats operator()(Floats u) const { return exponential(u) * inverse_sum; }
};
struct Linear {
  GHL_INLINE Floats operator()(Floats u) const { return u; }
};
struct Relu {
  GHL_INLINE Floats operator()(Floats u) const { return max(u, broadcast(0.0f)); }
};
struct Binary {
  GHL_INLINE Floats operator()(Floats) const { return broadcast(1.0f); }
};

// Negates the activity of every unit but the first that equals the largest.
class Negation {
 public:
  GHL_INLINE Negation(bool on, Floats largest) : on_(on), largest_(largest), found_(none()) {}

  GHL_INLINE Floats operator()(Floats u, Floats activity) {
    if (!on_) return activity;
    const Mask best = (u == largest_) & ~found_;
    found_ = found_ | best;
    return select(best, activity, broadcast(0.0f) - activity);
  }

 private:
  bool on_;
  Floats largest_;
  Mask found_;
};

// ---- One group: what is asked for ----

struct Group {
  const CompeteParams& params;
  float* data;  // [units][16]
  float* y;     // where the activities go: the output itself where its lanes are adjacent floats, else data
  int64_t y_stride;  // between units
  int64_t first;     // row of the first lane
  int count;         // lanes that are rows
  Extremes extremes;
  Selection selection;  // with winners > 0
};

template <class T>
GHL_INLINE void put(T* output, const Group& group, const T (&lanes)[kLanes]) {
  for (int lane = 0; lane < group.count; ++lane) output[group.first + lane] = lanes[lane];
}

void put_floats(float* output, const Group& group, Floats value) {
  if (output == nullptr) return;
  float lanes[kLanes];
  store(lanes, value);
  put(output, group, lanes);
}

// The winners of each lane in ascending order of units, to the lists of the parameters.
class WinnerLists {
 public:
  explicit WinnerLists(const Group& group) : group_(group) {
    const CompeteParams& params = group.params;
    if (params.winner_unit == nullptr && params.winner_activity == nullptr) return;
    lanes_ = (1u << group.count) - 1u;
    const uint32_t nan = lane_bits(group.extremes.nan) & lanes_;
    for (int lane = 0; lane < group.count; ++lane) {
      filled_[lane] = (group.first + lane) * params.winners;
      if ((nan >> lane & 1u) != 0) put_nan(filled_[lane]);
    }
  }

  GHL_INLINE void add(int64_t unit, Mask winners, Floats activity) {
    uint32_t bits = lane_bits(winners) & lanes_;
    if (bits == 0) return;
    float activities[kLanes];
    store(activities, activity);
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      const int64_t slot = filled_[lane]++;
      if (group_.params.winner_unit) group_.params.winner_unit[slot] = static_cast<int32_t>(unit);
      if (group_.params.winner_activity) group_.params.winner_activity[slot] = activities[lane];
    }
  }

 private:
  void put_nan(int64_t slot) {
    for (int64_t i = slot; i < slot + group_.params.winners; ++i) {
      if (group_.params.winner_unit) group_.params.winner_unit[i] = -1;
      if (group_.params.winner_activity) group_.params.winner_activity[i] = kNaN;
    }
  }

  const Group& group_;
  uint32_t lanes_ = 0;  // the lanes to list; none when no list is wanted
  int64_t filled_[kLanes];
};

template <class Activity>
void activate_winners(const Group& group, Activity activity) {
  Referee referee(group.selection);
  Negation negate(group.params.anti, group.extremes.largest);
  const Floats losers = select(group.extremes.nan, quiet_nan(), broadcast(0.0f));
  for (int64_t n = 0; n < group.params.units; ++n) {
    const Floats u = load(group.data + n * kLanes);
    store(group.y + n * group.y_stride, select(referee.winners(u), negate(u, activity(u)), losers));
  }
}

// Most units win nowhere when the winners are few: passing over them is worth a branch here, where each
// winner costs a few scalar stores, and not above.
template <class Activity>
void list_winners(const Group& group, Activity activity) {
  WinnerLists lists(group);
  Referee referee(group.selection);
  Negation negate(group.params.anti, group.extremes.largest);
  for (int64_t n = 0; n < group.params.units; ++n) {
    const Floats u = load(group.data + n * kLanes);
    if (referee.anyone_wins(u)) lists.add(n, referee.winners(u), negate(u, activity(u)));
  }
}

template <class Activity>
void activate_all(const Group& group, Activity activity) {
  Negation negate(group.params.anti, group.extremes.largest);
  for (int64_t n = 0; n < group.params.units; ++n) {
    const Floats u = load(group.data + n * kLanes);
    store(group.y + n * group.y_stride, select(group.extremes.nan, quiet_nan(), negate(u, activity(u))));
  }
}

template <class Activity>
void activate(const Group& group, Activity activity) {
  const CompeteParams& params = group.params;
  if (params.winner_unit != nullptr || params.winner_activity != nullptr) list_winners(group, activity);
  if (params.y == nullptr) return;
  if (params.winners > 0) {
    activate_winners(group, activity);
  } else {
    activate_all(group, activity);
  }
}

// sum exp((u - largest) / temperature) over the winners.
Floats sum_winners(const Group& group, const Exponential& exponential) {
  BlockedSum<16> sum;
  Referee referee(group.selection);
  for (int64_t n = 0; n < group.params.units; ++n) {
    const Floats u = load(group.data + n * kLanes);
    if (referee.anyone_wins(u)) sum.add(n, select(referee.winners(u), exponential(u), broadcast(0.0f)));
  }
  return sum.total();
}

// The same over all units.
Floats sum_all(const Group& group, const Exponential& exponential) {
  BlockedSum<16> sum;
  for (int64_t n = 0; n < group.params.units; ++n) sum.add(n, exponential(load(group.data + n * kLanes)));
  return sum.total();
}

// The same, leaving the (perhaps negated) exponentials in the group, so that none is computed twice.
Floats sum_and_keep(const Group& group, const Exponential& exponential) {
  BlockedSum<16> sum;
  Negation negate(group.params.anti, group.extremes.largest);
  for (int64_t n = 0; n < group.params.units; ++n) {
    const Floats u = load(group.data + n * kLanes);
    const Floats e = exponential(u);
    sum.add(n, e);
    store(group.data + n * kLanes, negate(u, e));
  }
  return sum.total();
}

void scale(const Group& group, Floats factor) {
  for (int64_t n = 0; n < group.params.units; ++n) {
    store(group.y + n * group.y_stride, load(group.data + n * kLanes) * factor);
  }
}

void put_cut(const Group& group) {
  Ints cut = broadcast(int32_t{-1});
  Referee referee(group.selection);
  for (int64_t n = 0; n < group.params.units; ++n) {
    const Floats u = load(group.data + n * kLanes);
    if (!referee.anyone_wins(u)) continue;
    referee.winners(u);
    cut = select(referee.ties(), broadcast(static_cast<int32_t>(n)), cut);
  }
  int32_t lanes[kLanes];
  std::memcpy(lanes, &cut, sizeof(lanes));
  put(group.params.cut, group, lanes);
}

void put_logsumexp(const Group& group, const Exponential& exponential, Floats sum) {
  if (group.params.logsumexp == nullptr) return;
  float logs[kLanes];
  store(logs, sum);
  for (int lane = 0; lane < group.count; ++lane) logs[lane] = __builtin_logf(logs[lane]);
  put_floats(group.params.logsumexp, group,
             multiply_add(exponential.largest, exponential.inverse_temperature, load(logs)));
}

void compete_softmax(const Group& group, const Exponential& exponential) {
  const bool in_place = group.params.winners == 0 && group.params.y != nullptr;
  Floats sum = in_place                    ? sum_and_keep(group, exponential)
               : group.params.winners == 0 ? sum_all(group, exponential)
                                           : sum_winners(group, exponential);
  sum = select(group.extremes.nan, quiet_nan(), sum);
  put_logsumexp(group, exponential, sum);
  const Floats inverse_sum = broadcast(1.0f) / sum;
  if (in_place) {
    scale(group, inverse_sum);
  } else if (group.params.winners > 0) {
    activate(group, Softmax{exponential, inverse_sum});
  }
}

void compete_group(const Group& group) {
  const CompeteParams& params = group.params;
  if (params.threshold != nullptr) put_floats(params.threshold, group, group.selection.threshold);
  if (params.cut != nullptr) put_cut(group);

  const Exponential exponential{group.extremes.largest, broadcast(invert(params.temperature))};
  if (params.activity == Activity::softmax) return compete_softmax(group, exponential);
  if (params.logsumexp != nullptr) {
    const Floats sum = params.winners > 0 ? sum_winners(group, exponential) : sum_all(group, exponential);
    put_logsumexp(group, exponential, select(group.extremes.nan, quiet_nan(), sum));
  }
  switch (params.activity) {
    case Activity::softmax:
      break;
    case Activity::linear:
      return activate(group, Linear{});
    case Activity::relu:
      return activate(group, Relu{});
    case Activity::binary:
      return activate(group, Binary{});
  }
}

// The groups of a tile from row on, at most groups_per_tile.
int64_t groups_from(const Plan& plan, int64_t first) {
  return min(ceil_div(plan.rows - first, kLanes), plan.groups_per_tile);
}

// Whether the positions of all groups of a full tile lie in one run of memory.
bool is_one_run(const CompeteParams& params, const Plan& plan, const Layout& layout, int64_t first) {
  const int64_t positions = plan.groups_per_tile * kLanes;
  return layout.stride_position == 1 && first % params.positions + positions <= params.positions;
}

int64_t offset_of(int64_t row, const Layout& layout, const CompeteParams& params) {
  return row / params.positions * layout.stride_batch + row % params.positions * layout.stride_position;
}

// The pieces of the tile at row, from one of them on.
Stream find_stream(const void* data, DType dtype, const Layout& layout, const CompeteParams& params,
                   const Plan& plan, int64_t row, int64_t first_piece) {
  const int64_t size = dtype == DType::bf16 ? 2 : 4;
  const int64_t piece = kLanes * size;
  const int64_t whole = piece * plan.groups_per_tile;
  const int64_t run = layout.stride_unit == 1 ? whole : layout.stride_unit * size;
  const char* tile = static_cast<const char*>(data) + offset_of(row, layout, params) * size;
  return {tile + first_piece / plan.groups_per_tile * run + first_piece % plan.groups_per_tile * piece, piece,
          run - whole};
}

// While group g of the tile at first competes: its share of the next tile's u, and of the y that the next
// tile writes or, where a group writes a run of its own, the group itself.
Ahead look_ahead(const CompeteParams& params, const Plan& plan, int64_t first, int64_t g) {
  // The hardware follows rows by itself; where the group takes the first-level cache's buffers, more
  // fetches would only delay it.
  if (params.u_layout.stride_unit == 1 && plan.group_bytes > kFirstLevelBytes) return {};
  const int64_t after = first + plan.groups_per_tile * kLanes;
  const int64_t next = after < plan.rows ? after : first;
  const int64_t piece = g * params.units;
  Ahead ahead;
  ahead.pieces = plan.groups_per_tile;
  ahead.left = ahead.pieces - piece % ahead.pieces;
  ahead.u = find_stream(params.u, params.u_dtype, params.u_layout, params, plan, next, piece);
  ahead.y = ahead.u;
  if (params.y == nullptr) return ahead;
  const bool is_alone = params.y_layout.stride_unit == 1 || plan.groups_per_tile == 1;
  ahead.y =
      find_stream(params.y, params.y_dtype, params.y_layout, params, plan, is_alone ? first : next, piece);
  return ahead;
}

template <class T>
void load_tile(const CompeteParams& params, const Plan& plan, int64_t first, float* tile) {
  const T* u = static_cast<const T*>(params.u);
  const Layout& layout = params.u_layout;
  if (is_one_run(params, plan, layout, first)) {
    // unit by unit, so that each visit to a plane takes several lines of it
    const T* run = u + offset_of(first, layout, params);
    for (int64_t n = 0; n < params.units; ++n, run += layout.stride_unit) {
      const T* ahead = run + kAhead * layout.stride_unit;
      for (int64_t g = 0; g < plan.groups_per_tile; ++g) {
        __builtin_prefetch(ahead + g * kLanes);
        store(tile + (g * params.units + n) * kLanes, load(run + g * kLanes));
      }
    }
    return;
  }
  for (int64_t g = 0; g < groups_from(plan, first); ++g) {
    const auto lanes = find_lanes(u, layout, params, first + g * kLanes, plan.rows);
    load_group(lanes, layout.stride_unit, params.units, tile + g * params.units * kLanes);
  }
}

// Competes and writes y: at once where the lanes of y are adjacent floats, otherwise through the group's
// data.
template <class T>
void compete_to(Group& group, int64_t rows) {
  const CompeteParams& params = group.params;
  const Layout& layout = params.y_layout;
  const auto lanes = find_lanes(static_cast<T*>(params.y), layout, params, group.first, rows);
  if constexpr (std::is_same_v<T, float>) {
    if (lanes.adjacent) {
      group.y = lanes.at[0];
      group.y_stride = layout.stride_unit;
      return compete_group(group);
    }
  }
  compete_group(group);
  store_group(group.data, params.units, lanes, layout.stride_unit);
}

void compete_tile(const CompeteParams& params, const Plan& plan, int64_t first, float* tile) {
  const bool is_bf16 = params.u_dtype == DType::bf16;
  if (is_bf16) {
    load_tile<BFloat16>(params, plan, first, tile);
  } else {
    load_tile<float>(params, plan, first, tile);
  }
  for (int64_t g = 0; g < groups_from(plan, first); ++g) {
    const int64_t row = first + g * kLanes;
    float* data = tile + g * params.units * kLanes;
    const int count = static_cast<int>(min(plan.rows - row, kLanes));
    Group group{params, data, data, kLanes, row, count, {}, {}};
    const Ahead ahead = look_ahead(params, plan, first, g);
    if (params.winners > 0) {
      group.selection = select_winners(data, params.units, params.winners, is_bf16, ahead, group.extremes);
    } else {
      group.extremes = find_extremes(data, params.units, ahead);
    }
    if (params.y == nullptr) {
      compete_group(group);
    } else if (params.y_dtype == DType::bf16) {
      compete_to<BFloat16>(group, plan.rows);
    } else {
      compete_to<float>(group, plan.rows);
    }
  }
}

// ---- Rows ----

bool is_softmax_of_rows(const CompeteParams& params) {
  const bool rows_of_units =
      params.u_layout.stride_unit == 1 && (params.y == nullptr || params.y_layout.stride_unit == 1);
  return params.activity == Activity::softmax && params.winners == 0 && !params.anti && rows_of_units;
}

template <class U, class Y>
void compete_row(const CompeteParams& params, int64_t row, float* scratch) {
  const U* const u = static_cast<const U*>(params.u) + offset_of(row, params.u_layout, params);
  Y* const y =
      params.y == nullptr ? nullptr : static_cast<Y*>(params.y) + offset_of(row, params.y_layout, params);
  const float logsumexp = softmax_row(u, params.units, invert(params.temperature), y, scratch);
  if (params.logsumexp != nullptr) params.logsumexp[row] = logsumexp;
}

template <class U>
void compete_row(const CompeteParams& params, int64_t row, float* scratch) {
  if (params.y != nullptr && params.y_dtype == DType::bf16) {
    compete_row<U, BFloat16>(params, row, scratch);
  } else {
    compete_row<U, float>(params, row, scratch);
  }
}

void compete_rows(const CompeteParams& params, float* workspace, int threads) {
  const int64_t rows = params.batch * params.positions;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t share = 0; share < threads; ++share) {
    float* const scratch = workspace + share * params.units;
    for (int64_t row = rows * share / threads; row < rows * (share + 1) / threads; ++row) {
      if (params.u_dtype == DType::bf16) {
        compete_row<BFloat16>(params, row, scratch);
      } else {
        compete_row<float>(params, row, scratch);
      }
    }
  }
}

}  // namespace

int64_t compete_workspace(const CompeteParams& params, int threads) {
  const Plan plan = make_plan(params);
  return threads * plan.groups_per_tile * params.units * kLanes * static_cast<int64_t>(sizeof(float));
}

void compete(const CompeteParams& params, void* workspace, int threads) {
  if (is_softmax_of_rows(params)) return compete_rows(params, static_cast<float*>(workspace), threads);
  const Plan plan = make_plan(params);
  const int64_t tile_size = plan.groups_per_tile * params.units * kLanes;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t share = 0; share < threads; ++share) {
    float* tile = static_cast<float*>(workspace) + share * tile_size;
    for (int64_t i = plan.tiles * share / threads; i < plan.tiles * (share + 1) / threads; ++i) {
      compete_tile(params, plan, i * plan.groups_per_tile * kLanes, tile);
    }
  }
}

}  // namespace ghl::GHL_ISA
