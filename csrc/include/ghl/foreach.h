// The epilogues of many layers in a few launches: from A to H, the gated gradient, a learned weight, or a
// whole step of SGD on the gated gradient. GPUs only; the launches do not depend on anything that a host
// copies.
#pragma once

#include <cstdint>

#include "ghl/dtype.h"
#include "ghl/epilogue.h"
#include "ghl/status.h"
#include "ghl/stream.h"

namespace ghl {

// One layer. Every matrix is [rows, columns] with contiguous columns, its rows a stride (in elements) apart;
// the order of the columns is the same in all of them, and theirs to choose.
struct ForeachLayer {
  int64_t rows = 0;
  int64_t columns = 0;

  const float* a = nullptr;
  int64_t a_stride = 0;

  const void* weight = nullptr;  // may be null for H or the gate without decay
  int64_t weight_stride = 0;

  void* out = nullptr;  // as Target says; the new weight of a step, which may be `weight` itself
  int64_t out_stride = 0;

  const void* gradient = nullptr;  // G, for a step whose layer is gated
  int64_t gradient_stride = 0;

  void* momentum = nullptr;  // for a step with momentum, updated
  int64_t momentum_stride = 0;

  const float* row_decay = nullptr;  // [rows], for Decay::rows
  const float* positions = nullptr;  // [1] P, for Normalize::constant: H / max(P, 1); null: H as it is

  Decay decay = Decay::oja;
  Normalize normalize = Normalize::layer;
  bool is_gated = true;          // a step along |H| sign(G); otherwise along -H
  bool begins_momentum = false;  // the momentum is set, not read
};

// As epilogue_cpu, for `count` layers of one dtype. A maximum that is not finite makes its scope NaN; a
// gradient that is not finite becomes NaN.
struct ForeachParams {
  const ForeachLayer* layers = nullptr;  // read by the launcher, not by the kernels
  int64_t count = 0;
  DType dtype = DType::f32;  // of weight, gradient, momentum and out; Target::delta writes float32
  Target target = Target::gate;
  float rate = 0.0f;           // of Target::learn
  float* workspace = nullptr;  // 2 * (the rows of all layers)
};

// With d = |H| sign(G) + (G - G) or -H, in float32 and rounded once into each tensor:
//   d <- -d if maximize;  d <- d + weight_decay * W
//   M <- momentum * M + gain * d, or d where momentum begins;  d <- d + momentum * M if nesterov, else M
//   W <- W - rate * d
// ForeachParams::target is not used.
struct GatedSgdParams {
  ForeachParams foreach;
  float momentum = 0.0f;
  float gain = 1.0f;  // 1 - dampening
  float weight_decay = 0.0f;
  bool nesterov = false;
  bool maximize = false;
};

Status foreach_epilogue_cuda(const ForeachParams& params, Stream stream);
Status gated_sgd_cuda(const GatedSgdParams& params, Stream stream);

}  // namespace ghl
