// The k-sparse correlation A = sum_p y_p x_p^T on a GPU: the parameters and the formula of ghl/correlate.h.
#pragma once

#include <cstdint>

#include "ghl/correlate.h"
#include "ghl/status.h"
#include "ghl/stream.h"

namespace ghl {

// Bytes of CorrelateParams::workspace, aligned to 16. It depends on the sizes alone.
int64_t sparse_cuda_workspace(const CorrelateParams& params);

// Without positions or winners A and activity_sum become 0. Spatial sizes with padding are below 2^31.
Status sparse_cuda(const CorrelateParams& params, Stream stream);

}  // namespace ghl
