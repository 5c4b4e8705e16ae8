// From the correlation A to what is done with it: Oja dot, decay, norm, then gate, store or learn.
#pragma once

#include <cstdint>

#include "ghl/dtype.h"
#include "ghl/status.h"

namespace ghl {

// R_n = coefficient_n * W_n, with the coefficient <W_n, A_n> (oja), given (rows), or absent (none).
enum class Decay : int { none = 0, oja = 1, rows = 2 };

// Scope of max |H|; constant multiplies H by EpilogueParams::scale instead.
enum class Normalize : int { layer = 0, filter = 1, constant = 2 };

enum class Target : int {
  gate = 0,   // out <- |H| * sign(out) + (out - out), in place in the gradient
  delta = 1,  // out <- H
  learn = 2,  // out <- out + rate * H, in place in the weight (out == weight)
};

// A tensor [units, channels, taps]; strides in elements.
struct Filters {
  int64_t stride_unit = 0;
  int64_t stride_channel = 0;
  int64_t stride_tap = 0;
};

struct EpilogueParams {
  int64_t units = 0;
  int64_t channels = 0;
  int64_t taps = 0;

  const float* a = nullptr;
  Filters a_layout;

  const void* weight = nullptr;  // may be null where decay is none and the target is not learn
  DType weight_dtype = DType::f32;
  Filters weight_layout;

  Decay decay = Decay::oja;
  const float* row_decay = nullptr;  // [units], for Decay::rows

  Normalize normalize = Normalize::layer;
  float scale = 1.0f;

  Target target = Target::gate;
  void* out = nullptr;
  DType out_dtype = DType::f32;
  Filters out_layout;
  float rate = 0.0f;

  void* workspace = nullptr;  // epilogue_cpu_workspace(params, threads) bytes, 64-byte aligned
};

// H <- H / (max |H| + 1e-30) over the scope; a maximum that is not finite makes its scope NaN.
int64_t epilogue_cpu_workspace(const EpilogueParams& params, int threads);
Status epilogue_cpu(const EpilogueParams& params, int threads);

}  // namespace ghl
