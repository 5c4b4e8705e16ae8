// The k-sparse correlation A = sum_p y_p x_p^T, from the winners' lists alone.
#pragma once

#include <cstdint>

#include "ghl/dtype.h"
#include "ghl/status.h"

namespace ghl {

// Convolution in up to three spatial dimensions; unused leading dimensions have size, kernel,
// stride and dilation 1 and padding 0. A linear layer is batch = rows, channels = in_features
// and every spatial size 1.
struct ConvGeometry {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t groups = 1;
  int64_t in_size[3] = {1, 1, 1};
  int64_t out_size[3] = {1, 1, 1};
  int64_t kernel[3] = {1, 1, 1};
  int64_t stride[3] = {1, 1, 1};
  int64_t padding[3] = {0, 0, 0};  // zeros on both sides
  int64_t dilation[3] = {1, 1, 1};

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t positions() const { return batch * out_size[0] * out_size[1] * out_size[2]; }
  int64_t group_channels() const { return channels / groups; }
};

struct CorrelateParams {
  ConvGeometry geometry;

  // Lists as compete_cpu writes them, [batch * out positions, winners]. A row whose first unit is -1
  // makes the whole of A (and activity_sum) NaN, as a NaN in y does in the dense product; so does a
  // unit that does not exist.
  const int32_t* winner_unit = nullptr;
  const float* winner_activity = nullptr;
  int64_t winners = 0;

  const void* x = nullptr;  // [batch, channels, in_size...], strides in elements
  DType x_dtype = DType::f32;
  int64_t x_stride_batch = 0;
  int64_t x_stride_channel = 0;
  int64_t x_stride[3] = {0, 0, 0};

  int64_t units = 0;
  // [units, channels / groups, taps], taps = kernel volume in row-major order; overwritten
  float* a = nullptr;
  int64_t a_stride_unit = 0;
  int64_t a_stride_channel = 0;
  int64_t a_stride_tap = 0;

  float* activity_sum = nullptr;  // [units] sum_p y_pn, or null; overwritten

  void* workspace = nullptr;  // correlate_cpu_workspace(params, threads) bytes, 64-byte aligned
};

int64_t correlate_cpu_workspace(const CorrelateParams& params, int threads);
Status correlate_cpu(const CorrelateParams& params, int threads);

}  // namespace ghl
