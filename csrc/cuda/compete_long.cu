// Competition among more units than a warp's registers hold: a block for each position, its row in shared
// memory where it fits, else read again from memory.
//
// Every warp has a run of consecutive units. Each finds a value that its share of the k winners reaches, the
// least of which is a bound; the units above it are listed, in order, and the first warp selects among them
// in its registers. Where they are too many for the list, the threshold is found by its digits (radix
// selection).
#include "cuda/compete.cuh"

namespace ghl {
namespace {

constexpr int kSurvivors = static_cast<int>(kRegisterUnits);
constexpr int kSurvivorsOfWarp = 256;
constexpr int kDigits = 256;

// Sums and lists of a block. Every function below ends with a barrier, or leaves it to its caller by name.
struct alignas(16) Workspace {
  float value[kCompeteWarps][kSurvivorsOfWarp];
  int unit[kCompeteWarps][kSurvivorsOfWarp];
  float list_value[kSurvivors];
  int list_unit[kSurvivors];
  unsigned list[kListed];
  int count[kCompeteWarps];
  uint32_t key[kCompeteWarps];
  float part[kCompeteWarps];
  int histogram[kDigits];
  uint32_t digit;
  int remaining;
  PositionState state;
};

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / kWarp); }

// A position's row, and the run of this warp in it: units [begin, end).
template <class T>
struct LongRow {
  const T* u;
  int64_t stride;
  int units, begin, end;

  __device__ __forceinline__ LongRow(const T* row, int64_t unit_stride, int count)
      : u(row), stride(unit_stride), units(count) {
    begin = static_cast<int>(static_cast<int64_t>(units) * warp_index() / kCompeteWarps);
    end = static_cast<int>(static_cast<int64_t>(units) * (warp_index() + 1) / kCompeteWarps);
  }

  __device__ __forceinline__ float operator[](int unit) const { return to_float(u[unit * stride]); }

  // run(unit, value) for the units of this lane.
  template <class Run>
  __device__ __forceinline__ void for_each(Run run) const {
#pragma unroll 4
    for (int unit = begin + static_cast<int>(lane_index()); unit < end; unit += static_cast<int>(kWarp)) {
      run(unit, (*this)[unit]);
    }
  }

  // run(unit, is there one, value) in step with the other lanes.
  template <class Run>
  __device__ __forceinline__ void for_each_together(Run run) const {
    for (int first = begin; first < end; first += static_cast<int>(kWarp)) {
      const int unit = first + static_cast<int>(lane_index());
      run(unit, unit < end, unit < end ? (*this)[unit] : 0.0f);
    }
  }
};

// The sum over the block, in the same order in every thread.
__device__ __forceinline__ float block_sum(float value, Workspace& at) {
  const float sum = warp_sum(value);
  if (lane_index() == 0) at.part[warp_index()] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < kCompeteWarps; ++i) total += at.part[i];
  __syncthreads();
  return total;
}

// Of the calling warp's count: the sum over the warps before it, and over all.
struct Prefix {
  int before, total;
};

__device__ __forceinline__ Prefix prefix_of(int warp_count, Workspace& at) {
  if (lane_index() == 0) at.count[warp_index()] = warp_count;
  __syncthreads();
  Prefix prefix{0, 0};
  for (int i = 0; i < kCompeteWarps; ++i) {
    if (i < warp_index()) prefix.before += at.count[i];
    prefix.total += at.count[i];
  }
  __syncthreads();
  return prefix;
}

__device__ __forceinline__ uint32_t block_min(uint32_t warp_key, Workspace& at) {
  if (lane_index() == 0) at.key[warp_index()] = warp_key;
  __syncthreads();
  uint32_t least = at.key[0];
  for (int i = 1; i < kCompeteWarps; ++i) least = min(least, at.key[i]);
  __syncthreads();
  return least;
}

// The units that reach the bound, in order, in at.list_*. Their number; above kSurvivors, the list is
// incomplete.
template <class T>
__device__ __forceinline__ int list_survivors(const LongRow<T>& row, float bound, Workspace& at) {
  int listed = 0;
  row.for_each_together([&](int unit, bool here, float v) {
    const bool passes = here && v >= bound;
    const unsigned lanes = __ballot_sync(kAllLanes, passes);
    const int slot = listed + __popc(lanes & lanes_below());
    if (passes && slot < kSurvivorsOfWarp) {
      at.value[warp_index()][slot] = v;
      at.unit[warp_index()][slot] = unit;
    }
    listed += __popc(lanes);
  });
  const bool overflows = __syncthreads_or(listed > kSurvivorsOfWarp);
  const Prefix prefix = prefix_of(listed, at);
  if (overflows || prefix.total > kSurvivors) return kSurvivors + 1;
  for (int i = static_cast<int>(lane_index()); i < listed; i += static_cast<int>(kWarp)) {
    at.list_value[prefix.before + i] = at.value[warp_index()][i];
    at.list_unit[prefix.before + i] = at.unit[warp_index()][i];
  }
  __syncthreads();
  return prefix.total;
}

// The k-th largest of the list, by the first warp; into at.state. The caller's barrier makes it known.
template <class T>
__device__ __forceinline__ void select_listed(int listed, int k, Workspace& at) {
  using Row = WarpRow<1, kSurvivors / static_cast<int>(kWarp)>;
  Row row;
  row.units = listed;
  float lane_top = -infinity();
#pragma unroll
  for (int i = 0; i < Row::kElements; ++i) {
    const int entry = Row::unit(i);
    row.element[i] = entry < listed ? at.list_value[entry] : -infinity();
    lane_top = fmaxf(lane_top, row.element[i]);
  }
  const auto read = [&](int entry) { return at.list_value[entry]; };
  const Cut cut = select_kth<kKeyFreeBits<T>>(row, lane_top, k, read, at.list);
  if (lane_index() != 0) return;
  at.state.threshold = cut.threshold;
  at.state.cut = at.list_unit[cut.unit];
}

// The digit of the key that has the `remaining`-th largest of those counted, and how many remain to be found
// in it. By one warp: the lanes have eight digits each, the first lane the largest.
__device__ __forceinline__ void find_digit(int remaining, Workspace& at) {
  constexpr int kEach = kDigits / static_cast<int>(kWarp);
  const int lane = static_cast<int>(lane_index()), last = kDigits - 1 - lane * kEach;
  int sum = 0;
  for (int i = 0; i < kEach; ++i) sum += at.histogram[last - i];
  int through = sum;
  for (int distance = 1; distance < static_cast<int>(kWarp); distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, through, static_cast<unsigned>(distance));
    if (lane >= distance) through += other;
  }
  int left = remaining - (through - sum);
  if (left <= 0 || left > sum) return;
  int digit = last;
  for (; left > at.histogram[digit]; --digit) left -= at.histogram[digit];
  at.digit = static_cast<uint32_t>(digit);
  at.remaining = left;
}

// The k-th largest by its digits, from the highest; and how many of its equals win.
template <class T>
__device__ __forceinline__ float radix_threshold(const LongRow<T>& row, int k, int& winners_of_equals,
                                                 Workspace& at) {
  uint32_t prefix = 0;
  int remaining = k, shift = 32;
  while (shift > kKeyFreeBits<T>) {
    shift -= 8;
    at.histogram[threadIdx.x] = 0;
    __syncthreads();
    row.for_each([&](int, float v) {
      const uint32_t digits = key_of(v) >> shift;
      if (digits >> 8 == prefix) atomicAdd(&at.histogram[digits & (kDigits - 1)], 1);
    });
    __syncthreads();
    if (warp_index() == 0) find_digit(remaining, at);
    __syncthreads();
    prefix = prefix << 8 | at.digit;
    remaining = at.remaining;
  }
  winners_of_equals = remaining;
  // the lowest bits of the keys of a narrower dtype are zeros, or ones below zero
  const uint32_t rest = (1u << shift) - 1;
  return value_of(prefix << shift | (prefix << shift >> 31 ? 0u : rest));
}

// The unit that is the `count`-th to equal the threshold; into at.state.
template <class T>
__device__ __forceinline__ void find_cut(const LongRow<T>& row, float threshold, int count, Workspace& at) {
  int equal = 0;
  row.for_each([&](int, float v) { equal += v == threshold; });
  equal = __reduce_add_sync(kAllLanes, equal);
  int seen = prefix_of(equal, at).before;
  if (seen < count && count <= seen + equal) {
    row.for_each_together([&](int unit, bool here, float v) {
      const bool tied = here && v == threshold;
      const unsigned lanes = __ballot_sync(kAllLanes, tied);
      if (tied && seen + __popc(lanes & lanes_below()) + 1 == count) at.state.cut = unit;
      seen += __popc(lanes);
    });
  }
  if (threadIdx.x == 0) at.state.threshold = threshold;
}

template <class T>
__device__ __forceinline__ void select_long(const LongRow<T>& row, float lane_top, int k, Workspace& at) {
  const int share = divide_up(k, kCompeteWarps);
  int listed = kSurvivors + 1;
  if (share <= static_cast<int>(kWarp)) {
    listed = list_survivors(row, value_of(block_min(bound_of(lane_top, share), at)), at);
  }
  if (listed <= kSurvivors) {
    if (warp_index() == 0) select_listed<T>(listed, k, at);
  } else {
    int winners_of_equals;
    const float threshold = radix_threshold(row, k, winners_of_equals, at);
    find_cut(row, threshold, winners_of_equals, at);
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ PositionState compete_long(const LongRow<T>& row, const CompeteArgs& args,
                                                      Workspace& at) {
  const CompeteParams& p = args.p;
  float lane_top = -infinity();
  row.for_each([&](int, float v) { lane_top = ptx::max_nan_f32(lane_top, v); });
  if (__syncthreads_or(lane_top != lane_top)) return bad_state();

  PositionState state{0.0f, 0, 0.0f, 0};
  if (p.winners > 0) {
    select_long(row, lane_top, static_cast<int>(p.winners), at);
    state.threshold = at.state.threshold;
    state.cut = at.state.cut;
  }
  if (p.activity != Activity::softmax && !p.anti) return state;
  const float top = value_of(~block_min(~key_of(warp_max(lane_top)), at));
  if (p.activity == Activity::softmax) {
    const ExponentialSum sum(args.scale, top);
    const bool selects = p.winners > 0;
    float total = 0.0f;
    row.for_each([&](int unit, float v) {
      if (!selects || is_winner(v, unit, state)) total += sum.term(v);
    });
    state.logsumexp = sum.logarithm(block_sum(total, at), p.keeps_infinity);
  }
  if (p.anti) {
    uint32_t first = 0x7fffffff;
    row.for_each([&](int unit, float v) {
      if (v == top) first = min(first, static_cast<uint32_t>(unit));
    });
    state.first = static_cast<int>(block_min(__reduce_min_sync(kAllLanes, first), at));
  }
  return state;
}

template <class T>
__device__ __forceinline__ void write_winners(const LongRow<T>& row, const CompeteArgs& args,
                                              int64_t position, const PositionState& state, Workspace& at) {
  const CompeteParams& p = args.p;
  const Competition competition = competition_of(args);
  const bool bad = state.threshold != state.threshold;
  const auto wins = [&](int unit, float v) { return bad ? unit < p.winners : is_winner(v, unit, state); };
  int count = 0;
  row.for_each([&](int unit, float v) { count += wins(unit, v); });
  int listed = prefix_of(__reduce_add_sync(kAllLanes, count), at).before;
  row.for_each_together([&](int unit, bool here, float v) {
    const bool winner = here && wins(unit, v);
    const unsigned lanes = __ballot_sync(kAllLanes, winner);
    const int rank = listed + __popc(lanes & lanes_below());
    if (winner) write_winner(p, position, rank, unit, activity_of(v, unit, state, competition), bad);
    listed += __popc(lanes);
  });
}

// Positions of a block: their rows share sectors of 32 bytes where positions are contiguous.
template <class T>
__host__ __device__ __forceinline__ int positions_of_block(const CompeteArgs& args) {
  return args.stages && args.p.u_layout.stride_unit != 1 ? static_cast<int>(32 / sizeof(T)) : 1;
}

// Staged columns are a word further apart than the positions need, so that a column meets no bank twice.
template <class T>
__host__ __device__ __forceinline__ int staged_pitch(const CompeteArgs& args) {
  const int positions = positions_of_block<T>(args);
  return positions == 1 ? 1 : positions + static_cast<int>(4 / sizeof(T));
}

// u of a block's positions to shared memory.
template <class T>
__device__ __forceinline__ void stage(const CompeteArgs& args, const T* u, int count, T* staged) {
  const CompeteParams& p = args.p;
  const int units = static_cast<int>(p.units), pitch = staged_pitch<T>(args);
  const int positions = positions_of_block<T>(args);
  if (args.u_vectors && positions == 1) {
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < units / Vector<T>::size; i += kCompeteThreads) {
      store_vector(staged + i * Vector<T>::size, load_vector(u + i * Vector<T>::size));
    }
  } else {
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < units * positions; i += kCompeteThreads) {
      const int unit = i / positions, within = i % positions;
      if (within >= count) continue;
      staged[unit * pitch + within] = u[unit * p.u_layout.stride_unit + within * p.u_layout.stride_position];
    }
  }
}

template <class T>
__device__ __forceinline__ void write_long(const LongRow<T>& row, const CompeteArgs& args,
                                           const PositionState& state, T* y) {
  by_competition(args, [&](const Competition& competition) {
    row.for_each([&](int unit, float v) {
      y[unit * args.p.y_layout.stride_unit] = from_float<T>(activity_of(v, unit, state, competition));
    });
  });
}

template <class T>
__global__ void __launch_bounds__(kCompeteThreads, 4) long_kernel(const __grid_constant__ CompeteArgs args) {
  const CompeteParams& p = args.p;
  Workspace& workspace = *dynamic_shared<Workspace>();
  const int units = static_cast<int>(p.units), positions = positions_of_block<T>(args);
  // at most those of the grid
  const unsigned blocks = static_cast<unsigned>(divide_up<int64_t>(p.positions, positions));
  const Place place{blockIdx.x / blocks, static_cast<int64_t>(blockIdx.x % blocks) * positions};
  const int count = static_cast<int>(min(p.positions - place.within, static_cast<int64_t>(positions)));
  const T* u = static_cast<const T*>(p.u) + offset_of(p.u_layout, place);
  T* staged = reinterpret_cast<T*>(&workspace + 1);
  if (args.stages) stage(args, u, count, staged);
  __syncthreads();

  for (int i = 0; i < count; ++i) {
    const T* source = args.stages ? staged + i : u + i * p.u_layout.stride_position;
    const LongRow<T> row(source, args.stages ? staged_pitch<T>(args) : p.u_layout.stride_unit, units);
    const int64_t position = place.item * p.positions + place.within + i;
    const PositionState state = compete_long(row, args, workspace);
    if (threadIdx.x == 0) write_state(p, position, state);
    if (p.winner_unit || p.winner_activity) write_winners(row, args, position, state, workspace);
    if (p.y) {
      const int64_t offset = offset_of(p.y_layout, {place.item, place.within + i});
      write_long(row, args, state, static_cast<T*>(p.y) + offset);
    }
    // the next position's state may not replace one that is still read
    __syncthreads();
  }
}

}  // namespace

Status launch_long(const CompeteArgs& given, const DeviceInfo& info, Stream stream) {
  return by_dtype(given.p.u_dtype, [&]<class T>(T*) {
    CompeteArgs args = given;
    args.stages = true;
    args.u_vectors = args.p.units % Vector<T>::size == 0 &&
                     is_aligned(args.p.u, args.p.u_dtype, args.p.u_layout, args.p.batch, true);
    size_t shared = sizeof(Workspace) + static_cast<size_t>(args.p.units) * staged_pitch<T>(args) * sizeof(T);
    if (shared > info.shared_limit) {
      args.stages = false;
      shared = sizeof(Workspace);
    }
    const int64_t blocks = args.p.batch * divide_up<int64_t>(args.p.positions, positions_of_block<T>(args));
    return launch("", long_kernel<T>, {blocks, kCompeteThreads, shared}, stream, args);
  });
}

}  // namespace ghl
