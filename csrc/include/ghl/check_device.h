#pragma once

#include "ghl/status.h"

namespace ghl {

// Whether the kernels of this build run on a device: not where it is of a generation that they were not
// compiled for, nor under a driver older than the runtime. The message is CUDA's. It makes a context on the
// device.
Status check_device_cuda(int device);

}  // namespace ghl
