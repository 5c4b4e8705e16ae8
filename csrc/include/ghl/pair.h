// The pair [y; dL/du]^T x: both sums of a layer from one reading of its input.
#pragma once

#include <cstdint>

#include "ghl/compete.h"
#include "ghl/correlate.h"
#include "ghl/dtype.h"
#include "ghl/epilogue.h"
#include "ghl/status.h"
#include "ghl/stream.h"

namespace ghl {

// u or dL/du as a matrix of positions and units. Element (p, n) lies at
// (p / inner) * stride_batch + (p % inner) * stride_position + n * stride_unit; strides in elements.
struct Responses {
  const void* data = nullptr;
  int64_t inner = 1;  // positions per batch item; 1 where stride_batch alone serves all positions
  int64_t stride_batch = 0;
  int64_t stride_position = 0;
  int64_t stride_unit = 1;
};

// Which kernel: mma.sync runs on sm_80 and newer; so does narrow, for few columns and few units; wgmma on
// sm_90 where it takes the shape.
enum class PairForm : int { automatic = 0, mma = 1, wgmma = 2, narrow = 3 };

// A = sum_p y_p x_p^T with y = c(u), and G = sum_p (dL/du)_p x_p^T.
struct PairParams {
  ConvGeometry geometry;     // a linear layer: batch = rows, every spatial size 1
  DType dtype = DType::f32;  // of x, u and dL/du
  bool tf32 = false;         // float32 products may take one pass of tf32

  const void* x = nullptr;  // [batch, channels, in_size...], strides in elements
  int64_t x_stride_batch = 0;
  int64_t x_stride_channel = 0;
  int64_t x_stride[3] = {0, 0, 0};

  int64_t units = 0;  // of all groups
  Responses u;
  Responses grad;

  Activity activity = Activity::softmax;
  bool selects = false;  // only winners are active
  bool anti = false;
  float temperature = 1.0f;
  // A power of two: y, and with it A, comes out so many times as large. For float16, which holds no activity
  // of a softmax below 3e-8, and few bits of those below 6e-5.
  float lift = 1.0f;
  // The state of every position, [positions], as compete_cuda writes it: those that the activity needs.
  // All null: a softmax over all units, whose state the kernel computes itself.
  const float* threshold = nullptr;
  const int32_t* cut = nullptr;
  const float* logsumexp = nullptr;
  const int32_t* first = nullptr;

  // In place of u and of a state: the winners of every position, [positions, winners]. A unit that does not
  // exist makes all activities there NaN. The narrow form alone takes them.
  const int32_t* winner_unit = nullptr;
  const float* winner_activity = nullptr;
  int64_t winners = 0;  // 0: u is given

  // [units, result_channels, taps], strides in elements; overwritten; null: not wanted. Channels of a group
  // from result_channels on are padding of x.
  float* a = nullptr;
  float* g = nullptr;
  Filters result_layout;
  int64_t result_channels = 0;

  PairForm form = PairForm::automatic;
  void* workspace = nullptr;  // pair_cuda_workspace(params, device) bytes, 256-byte aligned
};

// Whether A's activity needs a state that is not given.
inline bool lacks_state(const PairParams& params) {
  const bool softmax = params.activity == Activity::softmax;
  return params.a && params.winners == 0 &&
         ((softmax && !params.logsumexp) || (params.anti && !params.first) ||
          ((params.selects || !softmax) && !params.threshold) || (params.selects && !params.cut));
}

int64_t pair_cuda_workspace(const PairParams& params, int device);
// The form that would run.
PairForm pair_cuda_form(const PairParams& params, int device);
// Whether it computes the state itself, of which nothing is given.
bool pair_cuda_makes_state(const PairParams& params, int device);
Status pair_cuda(const PairParams& params, Stream stream);

}  // namespace ghl
