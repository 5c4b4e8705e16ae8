// The dense correlation of rows, A = sum_p y_p x_p^T: a sum of outer products.
#pragma once

#include <cstdint>

#include "ghl/dtype.h"
#include "ghl/status.h"

namespace ghl {

// A matrix [rows, columns], columns adjacent; the stride in elements.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
};

struct OuterParams {
  int64_t rows = 0;
  int64_t units = 0;
  int64_t channels = 0;
  Rows x;  // [rows, channels]
  Rows y;  // [rows, units]

  float* a = nullptr;  // [units, channels], channels adjacent
  int64_t a_stride = 0;
  bool adds = false;  // to what a holds, which is overwritten otherwise

  void* workspace = nullptr;  // outer_cpu_workspace(params, threads) bytes, 64-byte aligned
};

int64_t outer_cpu_workspace(const OuterParams& params, int threads);
Status outer_cpu(const OuterParams& params, int threads);

}  // namespace ghl
