// The pair [y; dL/du]^T x of a layer with few columns and few units, such as the first of a network: its
// input is small, so that what has to be read is u and dL/du, once.
//
// A block has all units and all columns, in the registers of its warps for the whole launch, and a run of
// neighboring positions, 64 to a step. u and dL/du travel through a ring in shared memory, where u becomes y
// in place. x is gathered from L1 into [column][position], an element at a time: with few channels nothing
// wider is aligned. In step s a warp queues the copies of step s + 2, gathers x and makes y of step s + 1 and
// multiplies those of step s; one barrier a step. From lists of winners y is written into the ring without u.
//
// Positions l and l + 32 of a step are neighbors in shared memory, since one lane gathers both.
#include "cuda/activity.cuh"
#include "cuda/pair.cuh"
#include "cuda/pair_narrow_plan.h"
#include "cuda/pair_sum.h"

namespace ghl {
namespace {

constexpr int kPositions = kNarrowPositions;
constexpr int kLanes = static_cast<int>(kWarp);
constexpr int kVector = 8;  // units of 16 bytes
constexpr int kDepth = 16;  // positions of a product of matrices
constexpr int kFields = 4;  // of 4 bytes that a position has besides u and dL/du

struct Left {
  const char* data;
  Divisor inner;
  int64_t stride_batch;  // strides in bytes
  int64_t stride_position;
};

// A State or Winners of every position; a field is 0 where it has no data.
struct Fields {
  const char* data[kFields];
  int64_t stride;  // bytes from position to position
};

// NarrowPlan as the kernel counts with it.
struct Tiles {
  int32_t rows, half, columns;
  int32_t left_pitch, stage_bytes, x_bytes;
  int32_t threads, log_down, log_across, depths;
  int32_t steps, longer;  // steps of a block, and how many blocks have one more

  explicit Tiles(const NarrowPlan& plan)
      : rows(plan.rows()),
        half(plan.half()),
        columns(plan.columns()),
        left_pitch(narrow_left_pitch(plan.rows())),
        stage_bytes(static_cast<int32_t>(narrow_stage_bytes(plan.rows()))),
        x_bytes(plan.columns() * kNarrowColumnPitch),
        threads(plan.threads()),
        log_down(std::countr_zero(static_cast<unsigned>(plan.warps_down))),
        log_across(std::countr_zero(static_cast<unsigned>(plan.warps_across))),
        depths(plan.depths),
        steps(static_cast<int32_t>(plan.steps / plan.blocks)),
        longer(static_cast<int32_t>(plan.steps % plan.blocks)) {}
};

struct KernelParams {
  PatchIndex patches;  // offsets in bytes
  const char* x;
  int32_t channels;
  int32_t taps;

  Left left[2];    // that which A or G alone needs, or those of G and A
  int32_t u_half;  // the half of the left tile that becomes y; -1 where A is not wanted
  int32_t copied_halves;
  int32_t units;
  Competition competition;
  Fields fields;
  int32_t winners;  // of a position, in place of u; 0 where u is given
  bool state_here;
  bool plain_softmax;  // over all units

  int64_t positions;
  Tiles tiles;
  float* workspace;  // [blocks, rows, columns]
};

// kDown times 16 units by kAcross times 8 columns of a warp.
template <class Kind_, int kDown_, int kAcross_>
struct Config {
  using Kind = Kind_;
  static constexpr int kDown = kDown_;
  static constexpr int kAcross = kAcross_;
  static constexpr int kSums = kDown * kAcross * 4;
  static constexpr int kThreads = kDown == 2 ? 256 : kNarrowThreads;
  static constexpr int kTaps = kDown == 4 ? 1 : 2;  // that a lane loads before it stores them
  static constexpr int kResident = kNarrowThreads / kThreads;
};

// Where the patches of a step's positions begin. A patch has a bit for each of the kernel's depths, heights
// and widths, which is set where that lies outside of x.
struct Places {
  int64_t offset[kPositions];
  uint32_t outside[kPositions];
};

struct alignas(16) Tap {
  int64_t offset;
  uint32_t bits;   // of its depth, its height and its width
  int32_t target;  // its first column in the tile of x
};

// Where the first matrices of a thread lie in the tiles.
struct Operands {
  int32_t left;
  int32_t x;
};

struct alignas(16) State {
  float threshold;
  int32_t cut;
  float logsumexp;
  int32_t first;
};

// The list of a position; what it lacks is a unit 0 of activity 0.
struct alignas(16) Winners {
  int32_t unit[kNarrowWinners];
  float activity[kNarrowWinners];
};

static_assert(sizeof(Places) == kPositions * kNarrowPlaceBytes && sizeof(Tap) == kNarrowTapBytes &&
              sizeof(Operands) == kNarrowOperandBytes && sizeof(State) == kNarrowStateBytes &&
              sizeof(Winners) == kNarrowStateBytes);

// What is computed from a thread's index that was read by this cannot be kept from an earlier reading: it
// would take registers through the whole launch.
__device__ __forceinline__ unsigned read_thread() {
#ifdef GHL_CUDA_ON_HOST
  return threadIdx.x;
#else
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// A block, as each of its threads sees it.
struct Block {
  const KernelParams& params;
  const Tiles& tiles;
  unsigned index = read_thread();

  __device__ __forceinline__ explicit Block(const KernelParams& p) : params(p), tiles(p.tiles) {}

  __device__ __forceinline__ Block again() const {
    Block block(*this);
    block.index = read_thread();
    return block;
  }

  // of unsigned numbers: those of signed ones take more instructions
  __device__ __forceinline__ int thread() const { return static_cast<int>(index); }
  __device__ __forceinline__ int thread_modulo(unsigned n) const { return static_cast<int>(index % n); }
  __device__ __forceinline__ int lane() const { return thread_modulo(kWarp); }
  __device__ __forceinline__ int warp() const { return static_cast<int>(index / kWarp); }
  __device__ __forceinline__ int warp_across() const { return warp() & ((1 << tiles.log_across) - 1); }
  __device__ __forceinline__ int warp_down() const {
    return warp() >> tiles.log_across & ((1 << tiles.log_down) - 1);
  }
  __device__ __forceinline__ int depth() const { return warp() >> (tiles.log_across + tiles.log_down); }

  __device__ __forceinline__ char* left_tile(int step) const {
    return dynamic_shared<char>() + static_cast<unsigned>(step) % kNarrowStages * tiles.stage_bytes;
  }
  __device__ __forceinline__ State* states(int step) const {
    return reinterpret_cast<State*>(left_tile(step) + kPositions * tiles.left_pitch);
  }
  __device__ __forceinline__ char* x_tiles() const {
    return dynamic_shared<char>() + kNarrowStages * tiles.stage_bytes;
  }
  __device__ __forceinline__ char* x_tile(int step) const { return x_tiles() + (step & 1) * tiles.x_bytes; }
  __device__ __forceinline__ Places* places(int step) const {
    return reinterpret_cast<Places*>(x_tiles() + 2 * tiles.x_bytes) + (step & 1);
  }
  __device__ __forceinline__ Tap* taps() const { return reinterpret_cast<Tap*>(places(0) + 2); }
  // read in every step, which takes fewer instructions than to compute them, and no registers in between
  __device__ __forceinline__ Operands* operands() const {
    return reinterpret_cast<Operands*>(taps() + params.taps);
  }

  __device__ __forceinline__ int steps() const {
    return tiles.steps + (static_cast<int>(blockIdx.x) < tiles.longer);
  }
  __device__ __forceinline__ int64_t position_of(int step, int position) const {
    const int block = static_cast<int>(blockIdx.x);
    const int64_t first_step = int64_t{tiles.steps} * block + min(block, tiles.longer);
    return (first_step + step) * kPositions + position;
  }
};

// The position of a step whose units lie in a row of the left tile.
__device__ __forceinline__ int position_in_row(int row) { return (row >> 1) + (row & 1) * kLanes; }

// Chunks that a lane takes of a row that it shares with kRowLanes - 1 others, at most.
template <int kRowLanes>
constexpr int kRowVectors = kRowLanes == 4 ? 3 : 2;

// Of four lanes and the next four the rows are four apart, which the pitch puts into the other banks.
template <int kRowLanes>
__device__ __forceinline__ int row_of(int thread) {
  const unsigned row = static_cast<unsigned>(thread) / kRowLanes;
  return static_cast<int>(kRowLanes == 4 ? row / 8 * 8 + row % 8 / 2 + row % 2 * 4 : row);
}

// --- copies -------------------------------------------------------------------------------------

__device__ __forceinline__ void place_taps(const Block& block) {
  const KernelParams& params = block.params;
  const PatchIndex& patches = params.patches;
  for (int i = block.thread(); i < params.taps; i += block.tiles.threads) {
    uint32_t bits = 0;
    int rest = i, first_bit = 0;
    for (int d = 2; d >= 0; --d) {
      const int size = static_cast<int>(patches.kernel[d].value);
      bits |= 1u << (first_bit + rest % size);
      rest /= size;
      first_bit += size;
    }
    block.taps()[i] = {patches.column(i * patches.channels.value).offset, bits,
                       i * params.channels * kNarrowColumnPitch};
  }
}

// By the last threads: the first have more taps to gather.
__device__ __forceinline__ void place_positions(const Block& block, int step) {
  const int index = block.thread() - (block.tiles.threads - kPositions);
  if (index < 0) return;
  const PatchIndex& patches = block.params.patches;
  const int64_t position = block.position_of(step, index);
  const bool exists = position < block.params.positions;
  const Place place = patches.patch(exists ? position : 0);
  uint32_t outside = 0, bit = 1;
  for (int d = 2; d >= 0; --d) {
    const int end = place.at[d] + patches.dilation[d] * static_cast<int>(patches.kernel[d].value);
#pragma unroll 1
    for (int at = place.at[d]; at != end; at += patches.dilation[d]) {
      if (static_cast<uint32_t>(at) >= static_cast<uint32_t>(patches.in_size[d])) outside |= bit;
      bit <<= 1;
    }
  }
  block.places(step)->offset[index] = place.offset;
  block.places(step)->outside[index] = exists ? outside : ~0u;
}

// The lanes that share a row have a field each.
template <int kRowLanes>
__device__ __forceinline__ void copy_states(const Block& block, int step) {
  const KernelParams& params = block.params;
  const int field = block.thread_modulo(kRowLanes);
  if (field >= kFields) return;
  const char* source = params.fields.data[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) source = field == i ? params.fields.data[i] : source;
#pragma unroll 1
  for (int i = block.thread(); i < kPositions * kRowLanes; i += block.tiles.threads) {
    const int row = row_of<kRowLanes>(i);
    const int64_t position = block.position_of(step, position_in_row(row));
    const bool exists = source && position < params.positions;
    ptx::cp_async_ca_4(reinterpret_cast<uint32_t*>(block.states(step) + row) + field,
                       source + position * params.fields.stride, exists ? 4 : 0);
  }
}

__device__ __forceinline__ const char* row_in_memory(const Left& left, int64_t position) {
  if (left.inner.value == 1) return left.data + position * left.stride_batch;
  const int64_t item = left.inner.divide(position);
  const int64_t within = position - item * left.inner.value;
  return left.data + item * left.stride_batch + within * left.stride_position;
}

template <int kRowLanes>
__device__ __forceinline__ void copy_left(const Block& block, int step) {
  const KernelParams& params = block.params;
  const int lane_in_row = block.thread_modulo(kRowLanes), end = 2 * params.units;
#pragma unroll 1
  for (int i = block.thread(); i < kPositions * kRowLanes; i += block.tiles.threads) {
    const int row = row_of<kRowLanes>(i);
    int64_t position = block.position_of(step, position_in_row(row));
    const bool exists = position < params.positions;
    position = exists ? position : 0;
#pragma unroll 1
    for (int h = 0; h < params.copied_halves; ++h) {
      const char* source = row_in_memory(params.left[h], position);
      char* target = block.left_tile(step) + row * block.tiles.left_pitch + 2 * h * block.tiles.half;
      const int existing = exists ? end : 0;
#pragma unroll
      for (int v = 0; v < kRowVectors<kRowLanes>; ++v) {
        const int byte = 16 * (lane_in_row + v * kRowLanes);
        if (byte >= end) break;
        ptx::cp_async_cg_16(target + byte, source + byte, max(0, min(16, existing - byte)));
      }
    }
  }
}

// Of the two positions that a lane gathers.
struct Patches {
  const char* x[2];
  uint32_t outside[2];
};

__device__ __forceinline__ Patches patches_of(const Block& block, int step) {
  const Places& places = *block.places(step);
  const int low = block.lane(), high = block.lane() + kLanes;
  const char* x = block.params.x;
  return {{x + places.offset[low], x + places.offset[high]}, {places.outside[low], places.outside[high]}};
}

// The elements of both positions.
__device__ __forceinline__ uint32_t joined(uint32_t low, uint32_t high) { return high << 16 | low; }

// Channels that are contiguous, of kTaps taps before any is stored.
template <int kChannels, int kTaps>
__device__ __forceinline__ void gather_dense(const Block& block, int step) {
  const Patches patches = patches_of(block, step);
  const int count = block.params.taps, warps = block.tiles.threads / kLanes;
  char* tile = block.x_tile(step) + 4 * block.lane();
#pragma unroll 1
  for (int first = block.warp(); first < count; first += kTaps * warps) {
    uint32_t values[kTaps][2][kChannels];
    int target[kTaps];
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (first + t * warps >= count) break;
      const Tap tap = block.taps()[first + t * warps];
      target[t] = tap.target;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const bool inside = !(patches.outside[side] & tap.bits);
        const auto address = reinterpret_cast<const uint16_t*>(patches.x[side] + tap.offset);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) values[t][side][c] = inside ? address[c] : 0;
      }
    }
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (first + t * warps >= count) break;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const uint32_t both = joined(values[t][0][c], values[t][1][c]);
        *reinterpret_cast<uint32_t*>(tile + target[t] + c * kNarrowColumnPitch) = both;
      }
    }
  }
}

// Any number of channels, with any stride: two at a time.
__device__ __forceinline__ void gather_strided(const Block& block, int step) {
  const Patches patches = patches_of(block, step);
  const KernelParams& params = block.params;
  const int64_t stride = params.patches.stride_channel;
  char* tile = block.x_tile(step) + 4 * block.lane();
#pragma unroll 1
  for (int i = block.warp(); i < params.taps; i += block.tiles.threads / kLanes) {
    const Tap tap = block.taps()[i];
    const bool inside[2] = {!(patches.outside[0] & tap.bits), !(patches.outside[1] & tap.bits)};
    char* target = tile + tap.target;
#pragma unroll 1
    for (int channel = 0; channel < params.channels; channel += 2) {
      const bool has_second = channel + 1 < params.channels;
      uint32_t values[2][2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const char* address = patches.x[side] + tap.offset + channel * stride;
        const auto* second = reinterpret_cast<const uint16_t*>(address + stride);
        values[side][0] = inside[side] ? *reinterpret_cast<const uint16_t*>(address) : 0;
        values[side][1] = inside[side] && has_second ? *second : 0;
      }
      *reinterpret_cast<uint32_t*>(target) = joined(values[0][0], values[1][0]);
      target += kNarrowColumnPitch;
      if (has_second) *reinterpret_cast<uint32_t*>(target) = joined(values[0][1], values[1][1]);
      target += kNarrowColumnPitch;
    }
  }
}

template <class C>
__device__ __forceinline__ void gather_x(const Block& block, int step) {
  if (block.params.channels == 3 && block.params.patches.stride_channel == 2) {
    gather_dense<3, C::kTaps>(block, step);
  } else {
    gather_strided(block, step);
  }
}

// --- activities ---------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void load_chunk(float (&u)[kVector], const uint4& chunk) {
  using Kind = typename C::Kind;
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u[2 * i] = Kind::low(pairs[i]);
    u[2 * i + 1] = Kind::high(pairs[i]);
  }
}

template <class C>
__device__ __forceinline__ void store_chunk(char* chunk, const float (&y)[kVector]) {
  using Kind = typename C::Kind;
  *reinterpret_cast<uint4*>(chunk) = {Kind::pack(y[0], y[1]), Kind::pack(y[2], y[3]), Kind::pack(y[4], y[5]),
                                      Kind::pack(y[6], y[7])};
}

// The chunk with -infinity in place of units that do not exist.
template <class C>
__device__ __forceinline__ uint4 without_missing(uint4 chunk, int units) {
  constexpr uint32_t kLowest = C::Kind::kLowest;
  const auto kept = [&](uint32_t pair, int first) {
    const uint32_t low = first < units ? pair & 0xffffu : kLowest;
    const uint32_t high = first + 1 < units ? pair & 0xffff0000u : kLowest << 16;
    return low | high;
  };
  return {kept(chunk.x, 0), kept(chunk.y, 2), kept(chunk.z, 4), kept(chunk.w, 6)};
}

// softmax over the units of a position: kRowLanes neighboring lanes' chunks, kRowLanes apart, of which one
// may be the last of the row, and those after it missing: whatever is `elsewhere` is read in their place.
template <class C, int kRowLanes, int kVectors>
__device__ __forceinline__ void softmax_of_chunks(char* row, const char* elsewhere, int first_chunk,
                                                  int units, float scale) {
  constexpr float kLog2e = 1.4426950408889634f;
  // Where the rounding of a product with log2(e), which all units have in common, is more than a small
  // factor.
  constexpr float kFar = 1e6f;
  using Kind = typename C::Kind;
  uint4 chunks[kVectors] = {};
  uint32_t tops = Kind::kLowest << 16 | Kind::kLowest;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int chunk = first_chunk + i * kRowLanes, left = units - kVector * chunk;
    chunks[i] = *reinterpret_cast<const uint4*>(left > 0 ? row + 16 * chunk : elsewhere);
    if (left < kVector) chunks[i] = without_missing<C>(chunks[i], left);
    tops =
        Kind::max(tops, Kind::max(Kind::max(chunks[i].x, chunks[i].y), Kind::max(chunks[i].z, chunks[i].w)));
  }
  float top = warp_max<kRowLanes>(fmaxf(Kind::low(tops), Kind::high(tops)));
  float y[kVectors][kVector];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) load_chunk<C>(y[i], chunks[i]);
  if (!(fabsf(top * scale) < kFar)) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) y[i][e] -= top;
    }
    top = 0.0f;
  }
  const float slope = scale * kLog2e, offset = -top * slope;
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      y[i][e] = ptx::ex2_approx_ftz_f32(fmaf(y[i][e], slope, offset));
      sums[e % 2] += y[i][e];
    }
  }
  const float share = __fdividef(1.0f, warp_sum<kRowLanes>(sums[0] + sums[1]));
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int chunk = first_chunk + i * kRowLanes;
#pragma unroll
    for (int e = 0; e < kVector; ++e) y[i][e] *= share;
    if (kVector * chunk < units) store_chunk<C>(row + 16 * chunk, y[i]);
  }
}

template <class C, int kRowLanes>
__device__ __forceinline__ void activities_of_chunks(char* row, int first_chunk, const State& state,
                                                     const KernelParams& params) {
#pragma unroll 1
  for (int chunk = first_chunk; kVector * chunk < params.units; chunk += kRowLanes) {
    float y[kVector];
    load_chunk<C>(y, *reinterpret_cast<const uint4*>(row + 16 * chunk));
    if (params.plain_softmax) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) y[e] = softmax_of(y[e], params.competition.scale, state.logsumexp);
    } else {
      const PositionState at{state.threshold, state.cut, state.logsumexp, state.first};
#pragma unroll
      for (int e = 0; e < kVector; ++e) y[e] = activity_of(y[e], kVector * chunk + e, at, params.competition);
    }
    store_chunk<C>(row + 16 * chunk, y);
  }
}

// y of a row from its list; NaN where one of its units does not exist. Called by whole warps.
template <class C, int kRowLanes>
__device__ __forceinline__ void activities_of_winners(char* row, int lane_in_row, const Winners& list,
                                                      const KernelParams& params) {
  constexpr uint32_t kNan = 0x7fff7fff;
  const uint32_t units = static_cast<uint32_t>(params.units);
  uint32_t others = 0;
#pragma unroll
  for (int i = 0; i < kNarrowWinners; ++i) {
    if (static_cast<uint32_t>(list.unit[i]) >= units) others = kNan;
  }
#pragma unroll 1
  for (int chunk = lane_in_row; kVector * chunk < params.units; chunk += kRowLanes) {
    *reinterpret_cast<uint4*>(row + 16 * chunk) = {others, others, others, others};
  }
  __syncwarp();
  if (lane_in_row < params.winners && others == 0) {
    const auto y = static_cast<uint16_t>(C::Kind::pack(list.activity[lane_in_row], 0.0f));
    // two winners of a position that does not exist are one unit of activity 0
    if (y != 0) *reinterpret_cast<uint16_t*>(row + 2 * list.unit[lane_in_row]) = y;
  }
}

// Of a row, what this thread has copied of it.
template <class C, int kRowLanes>
__device__ __forceinline__ void activities_of_row(const Block& block, int step, char* row, int index) {
  const KernelParams& params = block.params;
  const int first_chunk = block.thread_modulo(kRowLanes), units = params.units;
  const float scale = params.competition.scale;
  const char* elsewhere = reinterpret_cast<const char*>(block.taps());
  const State* const state = block.states(step) + index;
  if (params.winners > 0) {
    const auto* list = reinterpret_cast<const Winners*>(state);
    activities_of_winners<C, kRowLanes>(row, first_chunk, *list, params);
  } else if (!params.state_here) {
    activities_of_chunks<C, kRowLanes>(row, first_chunk, *state, params);
  } else if constexpr (kRowLanes == 8) {
    softmax_of_chunks<C, 8, 2>(row, elsewhere, first_chunk, units, scale);
  } else if (units <= 32) {
    softmax_of_chunks<C, 4, 1>(row, elsewhere, first_chunk, units, scale);
  } else if (units <= 64) {
    softmax_of_chunks<C, 4, 2>(row, elsewhere, first_chunk, units, scale);
  } else if constexpr (C::kDown != 4) {  // which 65 to 96 units do not take
    softmax_of_chunks<C, 4, 3>(row, elsewhere, first_chunk, units, scale);
  }
}

// u becomes y in place, in the chunks that this thread has copied itself or would have. Beyond the positions
// x is 0, u and the states are too, and y is finite, which is all it need be.
template <class C, int kRowLanes>
__device__ __forceinline__ void make_activities(const Block& block, int step) {
  // the states of a row were copied by several lanes
  __syncwarp();
#pragma unroll 1
  for (int i = block.thread(); i < kPositions * kRowLanes; i += block.tiles.threads) {
    const int index = row_of<kRowLanes>(i);
    char* row = block.left_tile(step) + index * block.tiles.left_pitch;
    activities_of_row<C, kRowLanes>(block, step, row + 2 * block.params.u_half * block.tiles.half, index);
  }
}

// --- products -----------------------------------------------------------------------------------

template <class C>
using Sums = float[C::kDown][C::kAcross][4];

// kDepth positions.
template <class C>
__device__ __forceinline__ void multiply_16(Sums<C>& sums, const char* left, const char* x, int high) {
  uint32_t a[C::kDown][4];
#pragma unroll
  for (int i = 0; i < C::kDown; ++i) ptx::ldmatrix_x4_trans(a[i], left + 32 * i);
#pragma unroll
  for (int j = 0; j < C::kAcross; j += 2) {
    uint32_t b[4];
    // the upper lanes have no columns of their own beyond an odd number of them
    const int column = j + 1 < C::kAcross ? 8 * (j + high) : 8 * j;
    ptx::ldmatrix_x4(b, x + column * kNarrowColumnPitch);
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < C::kDown; ++i) {
      C::Kind::mma(sums[i][j], a[i], b0);
      if (j + 1 < C::kAcross) C::Kind::mma(sums[i][j + 1], a[i], b1);
    }
  }
}

template <class C>
__device__ __forceinline__ Operands operands_of(const Block& block) {
  const int low = block.lane() % 16, high = block.lane() / 16, position = kDepth * block.depth();
  const int unit = 16 * C::kDown * block.warp_down(), column = 8 * C::kAcross * block.warp_across();
  return {(position + low % 8 + 8 * high) * block.tiles.left_pitch + 2 * unit + low / 8 * 16,
          (column + low % 8) * kNarrowColumnPitch + 2 * position + low / 8 * 16};
}

template <class C>
__device__ __forceinline__ void multiply(const Block& block, Sums<C>& sums, int step) {
  const Operands operands = block.operands()[block.thread()];
  const char* left = block.left_tile(step) + operands.left;
  const char* x = block.x_tile(step) + operands.x;
  const int stride = kDepth * block.tiles.depths;
#pragma unroll 1
  for (int k = 0; k < kPositions; k += stride) {
    multiply_16<C>(sums, left, x, block.lane() / 16);
    left += stride * block.tiles.left_pitch;
    x += 2 * stride;
  }
}

// --- results ------------------------------------------------------------------------------------

// The sums of all depths in the registers of the first, always added in the same order.
template <class C>
__device__ __forceinline__ void meet(const Block& block, Sums<C>& sums) {
  float* meeting = dynamic_shared<float>() + block.thread() % (block.tiles.threads / block.tiles.depths);
#pragma unroll 1
  for (int depth = 1; depth < block.tiles.depths; ++depth) {
    __syncthreads();
    if (block.depth() == depth) {
#pragma unroll
      for (int i = 0; i < C::kSums; ++i) {
        meeting[i * kNarrowMeeting] = sums[i / 4 / C::kAcross][i / 4 % C::kAcross][i % 4];
      }
    }
    __syncthreads();
    if (block.depth() == 0) {
#pragma unroll
      for (int i = 0; i < C::kSums; ++i) {
        sums[i / 4 / C::kAcross][i / 4 % C::kAcross][i % 4] += meeting[i * kNarrowMeeting];
      }
    }
  }
}

// The whole tile, whatever of it exists, to the block's share of the workspace.
template <class C>
__device__ __forceinline__ void store_part(const Block& block, const Sums<C>& sums) {
  const int row = 16 * C::kDown * block.warp_down() + block.lane() / 4;
  const int column = 8 * C::kAcross * block.warp_across() + block.lane() % 4 * 2;
  float* out = block.params.workspace + int64_t{blockIdx.x} * (block.tiles.rows * block.tiles.columns);
  out += row * block.tiles.columns + column;
#pragma unroll
  for (int i = 0; i < 2 * C::kDown; ++i) {
#pragma unroll
    for (int j = 0; j < C::kAcross; ++j) {
      const float* pair = &sums[i / 2][j][2 * (i % 2)];
      *reinterpret_cast<float2*>(out + 8 * i * block.tiles.columns + 8 * j) = {pair[0], pair[1]};
    }
  }
}

// --- the kernel ---------------------------------------------------------------------------------

// So many units of a position are shared by four lanes, more by eight.
constexpr int kFewUnits = 96;

// Queues what step + 2 needs, and makes the operands of step + 1.
template <class C>
__device__ __forceinline__ void feed(const Block& block, int step) {
  const bool few = block.params.units <= kFewUnits;
  if (step + 2 < block.steps()) {
    few ? copy_left<4>(block.again(), step + 2) : copy_left<8>(block.again(), step + 2);
    if (!block.params.state_here) {
      few ? copy_states<4>(block.again(), step + 2) : copy_states<8>(block.again(), step + 2);
    }
    place_positions(block.again(), step + 2);
  }
  ptx::cp_async_commit_group();
  if (step + 1 < 0 || step + 1 >= block.steps()) return;
  gather_x<C>(block.again(), step + 1);
  ptx::cp_async_wait_group<1>();
  if (block.params.u_half < 0) return;
  few ? make_activities<C, 4>(block.again(), step + 1) : make_activities<C, 8>(block.again(), step + 1);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    narrow_kernel(const __grid_constant__ KernelParams params) {
  const Block block(params);
  place_taps(block);
  block.operands()[block.thread()] = operands_of<C>(block);
  Sums<C> sums = {};
  for (int step = -2; step < block.steps(); ++step) {
    // operands and places of the others are there, and nobody reads the tiles that are overwritten
    __syncthreads();
    // four warps, which are on different schedulers, feed while others multiply
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == (block.again().warp() / 4 & 1)) {
        feed<C>(block, step);
      } else if (step >= 0) {
        multiply<C>(block.again(), sums, step);
      }
    }
  }
  meet<C>(block, sums);
  if (block.depth() == 0) store_part<C>(block, sums);
}

// --- the launcher -------------------------------------------------------------------------------

bool is_in_rows(const Responses& responses) {
  const bool whole = responses.stride_batch % kVector == 0 &&
                     (responses.inner <= 1 || responses.stride_position % kVector == 0);
  return is_aligned(responses.data) && responses.stride_unit == 1 && whole;
}

Left left_of(const Responses& responses) {
  return {static_cast<const char*>(responses.data), Divisor(std::max<int64_t>(1, responses.inner)),
          2 * responses.stride_batch, 2 * responses.stride_position};
}

NarrowPlan plan_of(const PairParams& params, const DeviceInfo& info) {
  const NarrowProblem problem{params.units, params.geometry.taps(), params.result_channels,
                              params.geometry.positions(), pair_results(params)};
  return narrow_plan(problem, info.multiprocessors, info.shared_limit);
}

Fields fields_of(const PairParams& params) {
  const auto bytes = [](const auto* data) { return reinterpret_cast<const char*>(data); };
  if (params.winners == 0) {
    return {{bytes(params.threshold), bytes(params.cut), bytes(params.logsumexp), bytes(params.first)}, 4};
  }
  const auto second = [&](const auto* data) { return params.winners > 1 ? bytes(data + 1) : nullptr; };
  const int32_t* const unit = params.winner_unit;
  const float* const activity = params.winner_activity;
  return {{bytes(unit), second(unit), bytes(activity), second(activity)}, 4 * params.winners};
}

KernelParams kernel_params(const PairParams& params, const NarrowPlan& plan) {
  const Left first = left_of(params.g ? params.grad : params.u);
  const Left second = left_of(params.a ? params.u : params.grad);
  const int32_t winners = params.a ? static_cast<int32_t>(params.winners) : 0;
  return {PatchIndex(params, 2),
          static_cast<const char*>(params.x),
          static_cast<int32_t>(params.result_channels),
          static_cast<int32_t>(params.geometry.taps()),
          {first, second},
          params.a ? pair_results(params) - 1 : -1,
          pair_results(params) - (winners > 0),
          static_cast<int32_t>(params.units),
          {params.activity, params.selects, params.anti, 1.0f / params.temperature},
          fields_of(params),
          winners,
          !params.a || needs_only_softmax(params),
          params.activity == Activity::softmax && !params.selects && !params.anti,
          params.geometry.positions(),
          Tiles(plan),
          static_cast<float*>(params.workspace)};
}

template <class Kind>
Status launch_kind(const PairParams& params, const NarrowPlan& plan, Stream stream) {
  const auto run = [&](auto config) {
    using C = decltype(config);
    return launch(pair_shape(params), narrow_kernel<C>, {plan.blocks, plan.threads(), plan.shared}, stream,
                  kernel_params(params, plan));
  };
  if (plan.warp_units == 32) return run(Config<Kind, 2, 4>{});
  if (plan.warp_units == 48) return run(Config<Kind, 3, 5>{});
  return run(Config<Kind, 4, 5>{});
}

}  // namespace

bool pair_narrow_takes(const PairParams& params, const DeviceInfo& info) {
  const ConvGeometry& geometry = params.geometry;
  const int64_t bits = geometry.kernel[0] + geometry.kernel[1] + geometry.kernel[2];
  const bool small = bits <= kNarrowBits && params.units <= kNarrowUnits &&
                     params.result_channels <= kNarrowChannels &&
                     geometry.taps() * params.result_channels <= kNarrowColumns;
  const bool lists = params.winners > 0;
  const bool rows = (!params.a || lists || is_in_rows(params.u)) && (!params.g || is_in_rows(params.grad));
  return (params.a || params.g) && params.dtype != DType::f32 && geometry.groups == 1 &&
         params.winners <= kNarrowWinners && geometry.positions() > 0 && small && rows &&
         pair_sizes_fit(params) && plan_of(params, info).shared <= info.shared_limit;
}

int64_t pair_narrow_workspace(const PairParams& params, const DeviceInfo& info) {
  return narrow_workspace_bytes(plan_of(params, info));
}

Status pair_narrow(const PairParams& params, const DeviceInfo& info, Stream stream) {
  const NarrowPlan plan = plan_of(params, info);
  if (plan.steps / plan.blocks >= std::numeric_limits<int32_t>::max() / kPositions - 1) {
    return Status::failure(pair_shape(params) + ": too many positions of a block");
  }
  if (!params.workspace) return Status::failure(pair_shape(params) + ": no workspace");
  const Status status = params.dtype == DType::bf16 ? launch_kind<Bf16>(params, plan, stream)
                                                    : launch_kind<F16>(params, plan, stream);
  if (!status.ok) return status;
  return pair_sum_tiles(
      params, {plan.blocks, 1, 0, 1, 1, plan.rows(), plan.half(), plan.columns(), params.result_channels},
      stream);
}

}  // namespace ghl
