// The dense correlation A = sum_p y_p x_p^T of a 3 x 3 convolution with fewer multiplications: Winograd's
// minimal filtering F(3 x 3, 2 x 2), 16 multiplications where 36 are the definition's.
#pragma once

#include <cstdint>

#include "ghl/compete.h"
#include "ghl/dtype.h"
#include "ghl/epilogue.h"
#include "ghl/status.h"

namespace ghl {

// Stride 1, dilation 1. Position p of a plane is row * width + column.
struct WinogradParams {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t units = 0;
  int64_t groups = 1;
  int64_t in_size[2] = {0, 0};
  int64_t padding[2] = {0, 0};  // zeros on both sides; the output is in_size + 2 * padding - 2 high and wide

  const void* x = nullptr;  // [batch, channels, in_size]
  DType x_dtype = DType::f32;
  Layout x_layout;

  const void* y = nullptr;  // [batch, units, out_size]
  DType y_dtype = DType::f32;
  Layout y_layout;

  float* a = nullptr;  // [units, channels / groups, 3 x 3]; overwritten
  Filters a_layout;

  void* workspace = nullptr;  // winograd_cpu_workspace(params, threads) bytes, 64-byte aligned

  int64_t out_size(int d) const { return in_size[d] + 2 * padding[d] - 2; }
};

int64_t winograd_cpu_workspace(const WinogradParams& params, int threads);
Status winograd_cpu(const WinogradParams& params, int threads);

}  // namespace ghl
