// Compiled with the declarations of an old runtime, never run.
#include "cuda/activity.cuh"
#include "cuda/device.cuh"
#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"

#define dynamic_shared host::own_shared

#include "cuda/pair_sm90_driver.h"

bool has_encoders() { return ghl::sm90::driver_encoders().tiled != nullptr; }
