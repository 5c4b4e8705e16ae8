// Competition between the units at one position: y_p = c(u_p).
#pragma once

#include <cstdint>

#include "ghl/dtype.h"
#include "ghl/status.h"
#include "ghl/stream.h"

namespace ghl {

// Activity of a unit that may learn (HebbianRule.activity).
enum class Activity : int { softmax = 0, linear = 1, relu = 2, binary = 3 };

// A response or activity tensor seen as [batch, units, positions]; strides in elements.
// Either the unit stride is 1 (rows, channels_last) or the position stride is 1 (N, C, *spatial).
struct Layout {
  int64_t stride_batch = 0;
  int64_t stride_unit = 0;
  int64_t stride_position = 0;
};

// Any output may be null; those that are not are written in one pass over u.
// Position p of batch item b is row b * positions + p of every per-position output.
struct CompeteParams {
  const void* u = nullptr;
  DType u_dtype = DType::f32;
  Layout u_layout;
  int64_t batch = 0;
  int64_t units = 0;
  int64_t positions = 0;

  Activity activity = Activity::softmax;
  int64_t winners = 0;       // 0: every unit competes; else exactly this many win, ties to the lowest index
  float temperature = 1.0f;  // softmax(u / temperature)
  bool anti = false;         // negate the activity of every unit but the single largest

  void* y = nullptr;           // [batch, units, positions]
  DType y_dtype = DType::f32;  // any of them; on GPUs that of u
  Layout y_layout;

  // [batch * positions] log sum exp(u / temperature) over the winners; NaN where softmax is
  float* logsumexp = nullptr;
  bool keeps_infinity = false;  // a logsumexp of +inf, where softmax is NaN, is written as such; GPUs only
  float* threshold = nullptr;   // [batch * positions] the winners-th largest u (winners > 0)
  int32_t* cut = nullptr;    // [batch * positions] last unit that wins a tie at the threshold (winners > 0)
  int32_t* first = nullptr;  // [batch * positions] unit of the largest u, lowest of equals; GPUs only
  // [batch * positions, winners] ascending; the first is -1 where u holds a NaN
  int32_t* winner_unit = nullptr;
  float* winner_activity = nullptr;  // [batch * positions, winners] the activities of those units
};

Status compete_cpu(const CompeteParams& params, int threads);
Status compete_cuda(const CompeteParams& params, Stream stream);

}  // namespace ghl
