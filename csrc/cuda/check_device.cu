// One kernel answers for all: they are compiled for the same devices.
#include "cuda/launch.cuh"
#include "ghl/check_device.h"

namespace ghl {

#ifdef GHL_CUDA_ON_HOST

Status check_device_cuda(int) { return {}; }

#else

namespace {

__global__ void nothing() {}

}  // namespace

Status check_device_cuda(int device) {
  const DeviceGuard guard(device);
  cudaError_t error = guard.error();
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, nothing);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return cuda_status("device " + std::to_string(device), error);
}

#endif

}  // namespace ghl
