// Sums of the activities over positions, sum_p y_pn, which instar's decay needs.
#pragma once

#include <cstdint>

#include "ghl/compete.h"
#include "ghl/dtype.h"
#include "ghl/status.h"
#include "ghl/stream.h"

namespace ghl {

// y is made from u and the state of its position, as compete_cuda wrote it. The order of the additions
// depends on the shape alone.
struct ActivitySumsParams {
  const void* u = nullptr;
  DType u_dtype = DType::f32;
  Layout u_layout;
  int64_t batch = 0;
  int64_t units = 0;
  int64_t positions = 0;

  Activity activity = Activity::softmax;
  bool selects = false;  // only winners are active
  bool anti = false;
  float temperature = 1.0f;

  // [batch * positions] each; null where the competition does not need it
  const float* threshold = nullptr;
  const int32_t* cut = nullptr;
  const float* logsumexp = nullptr;
  const int32_t* first = nullptr;

  float* sum = nullptr;       // [units]
  void* workspace = nullptr;  // activity_sums_cuda_workspace(params) bytes
};

int64_t activity_sums_cuda_workspace(const ActivitySumsParams& params);
Status activity_sums_cuda(const ActivitySumsParams& params, Stream stream);

}  // namespace ghl
