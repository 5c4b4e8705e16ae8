// What the kernels of the competition share: their argument, where positions lie, what is written.
#pragma once

#include "cuda/activity.cuh"
#include "cuda/device.cuh"
#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"
#include "cuda/select.cuh"
#include "ghl/compete.h"

namespace ghl {

constexpr int kCompeteThreads = 256;
constexpr int kCompeteWarps = kCompeteThreads / static_cast<int>(kWarp);

// Units of the longest row of which a warp has several at once.
constexpr int64_t kFewUnits = 128;
// Units of the longest row that a warp holds in registers; of 16-bit elements in two a register.
constexpr int64_t kRegisterUnits = 1024;
constexpr int64_t kWideUnits = 1536;
constexpr int kWideElements = static_cast<int>(kWideUnits / kWarp);  // of a lane

struct CompeteArgs {
  CompeteParams p;
  float scale = 1.0f;  // 1 / temperature
  bool u_vectors =
      false;  // runs of u, along units or positions as the kernel has them, move 16 bytes at once
  bool y_vectors = false;
  bool stages = false;  // long rows: u fits shared memory
};

// Whether every run, of units in rows and of positions in planes, begins at a multiple of 16 bytes.
inline bool is_aligned(const void* data, DType dtype, const Layout& layout, int64_t batch, bool rows) {
  const int64_t size = dtype == DType::f32 ? 4 : 8;
  if ((rows ? layout.stride_unit : layout.stride_position) != 1) return false;
  const int64_t step = rows ? layout.stride_position : layout.stride_unit;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && step % size == 0 &&
         (batch == 1 || layout.stride_batch % size == 0);
}

inline bool are_rows(const CompeteParams& p) {
  return p.u_layout.stride_unit == 1 && (!p.y || p.y_layout.stride_unit == 1);
}

inline CompeteArgs with_vectors(CompeteArgs args, bool rows) {
  const CompeteParams& p = args.p;
  const bool whole = !rows || p.units % (p.u_dtype == DType::f32 ? 4 : 8) == 0;
  args.u_vectors = whole && is_aligned(p.u, p.u_dtype, p.u_layout, p.batch, rows);
  args.y_vectors = p.y && whole && is_aligned(p.y, p.u_dtype, p.y_layout, p.batch, rows);
  return args;
}

inline bool wants_state_only(const CompeteParams& p) { return !p.y && !p.winner_unit && !p.winner_activity; }

// Whether launch_few can run them.
bool takes_few(const CompeteParams& p);

// Their failures do not say what failed.
Status launch_few(const CompeteArgs& args, const DeviceInfo& info, Stream stream);
Status launch_short(const CompeteArgs& args, const DeviceInfo& info, Stream stream);
Status launch_wide(const CompeteArgs& args, const DeviceInfo& info, Stream stream);
Status launch_long(const CompeteArgs& args, const DeviceInfo& info, Stream stream);

// Lowest bits that are alike in the key_of of every value of the dtype.
template <class T>
constexpr int kKeyFreeBits = 0;
template <>
inline constexpr int kKeyFreeBits<bf16> = 16;
template <>
inline constexpr int kKeyFreeBits<f16> = 13;

__device__ __forceinline__ Competition competition_of(const CompeteArgs& args) {
  return {args.p.activity, args.p.winners > 0, args.p.anti, args.scale};
}

// Calls run(competition) with one whose activity the compiler knows where it is a common one, so that the
// loop over the units has no branch on it.
template <class Run>
__device__ __forceinline__ void by_competition(const CompeteArgs& args, Run run) {
  const Competition competition = competition_of(args);
  if (copies_winners(competition)) {
    run(Competition{Activity::linear, true, false, 1.0f});
  } else if (is_plain_softmax(competition)) {
    run(Competition{Activity::softmax, false, false, args.scale});
  } else {
    run(competition);
  }
}

// A position by its number in the batch. A division takes as long as several units.
struct Place {
  int64_t item;
  int64_t within;
};

__device__ __forceinline__ Place place_among(int64_t position, int64_t of_item) {
  if ((position | of_item) >> 32 == 0) {
    const uint32_t short_position = static_cast<uint32_t>(position), inner = static_cast<uint32_t>(of_item);
    return {short_position / inner, short_position % inner};
  }
  return {position / of_item, position % of_item};
}

__device__ __forceinline__ Place place_of(const CompeteParams& p, int64_t position) {
  if (p.batch == 1) return {0, position};
  return place_among(position, p.positions);
}

__device__ __forceinline__ int64_t offset_of(const Layout& layout, const Place& at) {
  return at.item * layout.stride_batch + at.within * layout.stride_position;
}

__device__ __forceinline__ PositionState bad_state() { return {quiet_nan(), -1, quiet_nan(), 0}; }

__device__ __forceinline__ void write_state(const CompeteParams& p, int64_t position,
                                            const PositionState& at) {
  if (p.threshold) p.threshold[position] = at.threshold;
  if (p.cut) p.cut[position] = at.cut;
  if (p.logsumexp) p.logsumexp[position] = at.logsumexp;
  if (p.first) p.first[position] = at.first;
}

// Entry `rank` of a position's list. A bad position lists its first units, as -1 and what follows.
__device__ __forceinline__ void write_winner(const CompeteParams& p, int64_t position, int rank, int unit,
                                             float y, bool bad) {
  const int64_t slot = position * p.winners + rank;
  if (p.winner_unit) p.winner_unit[slot] = bad && rank == 0 ? -1 : unit;
  if (p.winner_activity) p.winner_activity[slot] = y;
}

__device__ __forceinline__ bool is_winner(float u, int unit, const PositionState& at) {
  return u > at.threshold || (u == at.threshold && unit <= at.cut);
}

// sum exp(u / temperature), in parts, relative to the largest u.
struct ExponentialSum {
  float scale;
  float shift;

  // An infinite largest u must not be subtracted from itself.
  __device__ __forceinline__ ExponentialSum(float inverse_temperature, float largest)
      : scale(inverse_temperature) {
    const float top = largest * scale;
    shift = fabsf(top) < infinity() ? top : 0.0f;
  }

  __device__ __forceinline__ float term(float u) const { return softmax_of(u, scale, shift); }

  __device__ __forceinline__ float logarithm(float total, bool keeps_infinity) const {
    const float result = shift + logf(total);
    return result == infinity() && !keeps_infinity ? quiet_nan() : result;
  }
};

}  // namespace ghl
