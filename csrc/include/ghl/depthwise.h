// The pair of ghl/pair.h where a group has a single channel, so that there are no matrices to multiply:
//   A[n, tap] = sum_p y_pn x[patch p, channel n / (units / channels), tap], G alike from dL/du.
#pragma once

#include <cstdint>

#include "ghl/pair.h"
#include "ghl/status.h"
#include "ghl/stream.h"

namespace ghl {

// Bytes of PairParams::workspace, aligned to 16. It depends on the sizes, the results and the device.
int64_t depthwise_cuda_workspace(const PairParams& params, int device);

// As pair_cuda, with groups = channels and result_channels = 1; tf32 and form have no meaning. A result is
// wanted where its pointer is not null, and A then needs the state. Without positions A and G become 0.
// Spatial sizes with padding are below 2^31.
Status depthwise_cuda(const PairParams& params, Stream stream);

}  // namespace ghl
