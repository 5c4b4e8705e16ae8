// The pair of few columns and few units: what its kernel is given, and a block of it with its shared memory.
#pragma once

#include "cuda/activity.cuh"
#include "cuda/pair.cuh"
#include "cuda/pair_narrow_plan.h"

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

}  // namespace
}  // namespace ghl
