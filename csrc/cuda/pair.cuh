// What the forms of the pair [y; dL/du]^T x share: element types, where a patch lies in x, and the contract
// between pair.cu, which chooses among them, and pair_mma.cu, pair_narrow.cu and pair_sm90.cu.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>
#include <string>

#include "cuda/device.cuh"
#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "ghl/pair.h"

namespace ghl {

// The form for every shape, by mma.sync.
int64_t pair_mma_workspace(const PairParams& params, const DeviceInfo& info);  // bytes
Status pair_mma(const PairParams& params, const DeviceInfo& info, Stream stream);
// Whether its kernel computes the state itself, which it can where a half of its tile holds all units of a
// position, in neighboring lanes.
bool pair_mma_makes_state(const PairParams& params);

// The form for sm_90 (wgmma and TMA). pair_cuda calls it on devices of capability 90 where it takes the
// problem, unless PairParams::form says otherwise.
#ifndef GHL_CUDA_ON_HOST
bool pair_sm90_takes(const PairParams& params, const DeviceInfo& info);
int64_t pair_sm90_workspace(const PairParams& params, const DeviceInfo& info);  // bytes
Status pair_sm90(const PairParams& params, const DeviceInfo& info, Stream stream);
#endif

// The form for few columns and few units of 16 bits, sm_80 and newer.
bool pair_narrow_takes(const PairParams& params, const DeviceInfo& info);
int64_t pair_narrow_workspace(const PairParams& params, const DeviceInfo& info);  // bytes
Status pair_narrow(const PairParams& params, const DeviceInfo& info, Stream stream);

// Whether A's activity is a softmax over all units of a position.
inline bool is_plain_softmax(const PairParams& params) {
  return params.activity == Activity::softmax && !params.selects && !params.anti;
}

// Whether its state, which a kernel that sees all units can compute itself, is not given.
inline bool needs_only_softmax(const PairParams& params) {
  const bool given = params.threshold || params.cut || params.logsumexp || params.first || params.winners > 0;
  return !given && is_plain_softmax(params);
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline int pair_results(const PairParams& params) { return (params.a != nullptr) + (params.g != nullptr); }

// For the message of a failure.
std::string pair_shape(const PairParams& params);

// Pairs of elements are packed with the first one in the lower half.
struct Bf16 {
  using Element = bf16;
  static constexpr uint32_t kLowest = 0xff80;  // -infinity
  static __device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return ptx::max_nan_bf16x2(a, b); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return ptx::cvt_rn_bf16x2_f32(high, low);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
};

struct F16 {
  using Element = f16;
  static constexpr uint32_t kLowest = 0xfc00;
  static __device__ __forceinline__ float low(uint32_t pair) {
    return ptx::cvt_f32_f16(static_cast<uint16_t>(pair));
  }
  static __device__ __forceinline__ float high(uint32_t pair) {
    return ptx::cvt_f32_f16(static_cast<uint16_t>(pair >> 16));
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return ptx::max_nan_f16x2(a, b); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return ptx::cvt_rn_f16x2_f32(high, low);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_f16(d, a, b);
  }
};

// Division of 0 <= n < 2^63 by a number that is known before the launch: a multiplication and a shift.
// Source: Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
struct Divisor {
  int64_t value = 1;
  uint64_t multiplier = uint64_t{1} << 63;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(divisor) {
    shift = std::bit_width(static_cast<uint64_t>(divisor - 1));
    const unsigned __int128 scale = static_cast<unsigned __int128>(1) << (63 + shift);
    multiplier = static_cast<uint64_t>((scale + divisor - 1) / divisor);
  }

  __device__ __forceinline__ int64_t divide(int64_t n) const {
    return static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n) << 1, multiplier) >> shift);
  }
};

// Coordinates and element offset in x: of a patch's first tap, or of a column of a patch relative to it.
struct Place {
  int64_t offset;
  int32_t at[3];
};

// No column brings such a coordinate into x.
constexpr int32_t kNowhere = std::numeric_limits<int32_t>::min() / 2;

// Patches of x in three dimensions; position = (item, depth, height, width), column = (tap, channel).
struct PatchIndex {
  Divisor out[3];
  Divisor kernel[3];
  Divisor channels;  // of a group
  int32_t in_size[3];
  int32_t step[3];
  int32_t padding[3];
  int32_t dilation[3];
  int64_t stride_batch;
  int64_t stride_channel;
  int64_t stride[3];

  // Offsets come out in elements times `scale`. pair_sizes_fit must hold.
  explicit PatchIndex(const PairParams& params, int64_t scale = 1)
      : channels(std::max<int64_t>(1, params.geometry.group_channels())),
        stride_batch(scale * params.x_stride_batch),
        stride_channel(scale * params.x_stride_channel) {
    const ConvGeometry& geometry = params.geometry;
    for (int d = 0; d < 3; ++d) {
      out[d] = Divisor(std::max<int64_t>(1, geometry.out_size[d]));
      kernel[d] = Divisor(geometry.kernel[d]);
      in_size[d] = static_cast<int32_t>(geometry.in_size[d]);
      step[d] = static_cast<int32_t>(geometry.stride[d]);
      padding[d] = static_cast<int32_t>(geometry.padding[d]);
      // of a kernel of size 1 it means nothing, and may be of any size
      dilation[d] = geometry.kernel[d] > 1 ? static_cast<int32_t>(geometry.dilation[d]) : 1;
      // of a dimension of size 1 it means nothing, and its multiples need not be aligned
      stride[d] = in_size[d] > 1 ? scale * params.x_stride[d] : 0;
    }
  }

  // Channel 0 of the first tap of a patch.
  __device__ __forceinline__ Place patch(int64_t position) const {
    Place place{0, {0, 0, 0}};
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      const int64_t rest = out[d].divide(position);
      place.at[d] = static_cast<int32_t>(position - rest * out[d].value) * step[d] - padding[d];
      place.offset += place.at[d] * stride[d];
      position = rest;
    }
    place.offset += position * stride_batch;
    return place;
  }

  __device__ __forceinline__ Place column(int64_t index) const {
    int64_t tap = channels.divide(index);
    Place place{(index - tap * channels.value) * stride_channel, {0, 0, 0}};
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      const int64_t rest = kernel[d].divide(tap);
      place.at[d] = static_cast<int32_t>(tap - rest * kernel[d].value) * dilation[d];
      place.offset += place.at[d] * stride[d];
      tap = rest;
    }
    return place;
  }

  // Whether a column of a patch lies in x and not in the zeros around it.
  __device__ __forceinline__ bool inside(const Place& patch_place, const Place& column_place) const {
    bool is_inside = true;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const uint32_t at = static_cast<uint32_t>(patch_place.at[d] + column_place.at[d]);
      is_inside = is_inside && at < static_cast<uint32_t>(in_size[d]);
    }
    return is_inside;
  }
};

// Whether coordinates, units and columns of a group fit the 32 bits that kernels count them in.
inline bool pair_sizes_fit(const PairParams& params) {
  constexpr int64_t kMost = int64_t{1} << 29;
  const ConvGeometry& geometry = params.geometry;
  bool fit = params.units < kMost && params.geometry.taps() * params.geometry.group_channels() < kMost;
  for (int d = 0; d < 3; ++d) {
    const int64_t reach = geometry.dilation[d] * (geometry.kernel[d] - 1);
    fit = fit && geometry.in_size[d] + 2 * geometry.padding[d] + reach < kMost;
  }
  return fit;
}

}  // namespace ghl
