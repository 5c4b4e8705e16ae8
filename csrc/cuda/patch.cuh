// Where the patches of a convolution lie in x: from a position to its first element, and which taps are
// inside.
#pragma once

#include <climits>
#include <string>

#include "cuda/device.cuh"
#include "ghl/correlate.h"
#include "ghl/status.h"

namespace ghl {

// Coordinates have 32 bits, which patch_grid() checks; positions and offsets have 64.
struct PatchGrid {
  int32_t in_size[3];
  int32_t out_size[3];
  int32_t kernel[3];
  int32_t stride[3];
  int32_t padding[3];
  int32_t dilation[3];
  int64_t x_stride_batch;
  int64_t x_stride[3];
};

// The element of x under the first tap, which lies outside of x where a coordinate is negative.
struct Patch {
  int64_t offset;  // without the channel's
  int32_t corner[3];
};

struct Tap {
  int64_t offset;  // from the patch's
  int32_t shift[3];
};

// 64-bit division takes four times as long as the 32-bit one, which nearly always serves.
__device__ __forceinline__ int64_t divide(int64_t n, int64_t divisor) {
  if (static_cast<uint64_t>(n | divisor) >> 32) return n / divisor;
  return static_cast<uint32_t>(n) / static_cast<uint32_t>(divisor);
}

__device__ __forceinline__ Patch patch_at(const PatchGrid& grid, int64_t item, const int32_t (&out)[3]) {
  Patch patch{item * grid.x_stride_batch, {}};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    patch.corner[i] = out[i] * grid.stride[i] - grid.padding[i];
    patch.offset += patch.corner[i] * grid.x_stride[i];
  }
  return patch;
}

// Splits a position into its coordinates, and what is left is the batch item.
__device__ __forceinline__ int64_t split_position(const PatchGrid& grid, int64_t position,
                                                  int32_t (&out)[3]) {
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    const int64_t rest = divide(position, grid.out_size[i]);
    out[i] = static_cast<int32_t>(position - rest * grid.out_size[i]);
    position = rest;
  }
  return position;
}

// Taps are counted in row-major order.
__device__ __forceinline__ Tap tap_at(const PatchGrid& grid, int64_t index) {
  Tap tap{};
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    const int64_t rest = divide(index, grid.kernel[i]);
    tap.shift[i] = static_cast<int32_t>(index - rest * grid.kernel[i]) * grid.dilation[i];
    tap.offset += tap.shift[i] * grid.x_stride[i];
    index = rest;
  }
  return tap;
}

__device__ __forceinline__ bool is_inside(const PatchGrid& grid, const Patch& patch, const Tap& tap) {
  bool inside = true;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const auto coordinate = static_cast<uint32_t>(patch.corner[i] + tap.shift[i]);
    inside &= coordinate < static_cast<uint32_t>(grid.in_size[i]);
  }
  return inside;
}

// Whether every element is a multiple of `size` elements from the start of x, channels being contiguous.
inline bool has_steps_of(int64_t size, const ConvGeometry& geometry, int64_t stride_batch,
                         const int64_t (&stride)[3]) {
  bool fits = geometry.batch == 1 || stride_batch % size == 0;
  for (int i = 0; i < 3; ++i) fits = fits && (geometry.in_size[i] == 1 || stride[i] % size == 0);
  return fits;
}

inline Status patch_grid(const std::string& what, const ConvGeometry& geometry, int64_t stride_batch,
                         const int64_t (&stride)[3], PatchGrid& grid) {
  grid.x_stride_batch = stride_batch;
  for (int i = 0; i < 3; ++i) {
    // the largest coordinate of a tap is below this
    const int64_t reach = geometry.in_size[i] + 2 * geometry.padding[i];
    const int64_t largest =
        max(max(reach, geometry.out_size[i]), max(geometry.stride[i], geometry.dilation[i]));
    if (max(largest, geometry.kernel[i]) > INT_MAX) {
      return Status::failure(what + ": a spatial dimension reaches beyond 2^31");
    }
    grid.in_size[i] = static_cast<int32_t>(geometry.in_size[i]);
    grid.out_size[i] = static_cast<int32_t>(geometry.out_size[i]);
    grid.kernel[i] = static_cast<int32_t>(geometry.kernel[i]);
    grid.stride[i] = static_cast<int32_t>(geometry.stride[i]);
    grid.padding[i] = static_cast<int32_t>(geometry.padding[i]);
    grid.dilation[i] = static_cast<int32_t>(geometry.dilation[i]);
    grid.x_stride[i] = stride[i];
  }
  return {};
}

}  // namespace ghl
