// Queueing a kernel on a stream of a device, with errors as a Status.
#pragma once

#include <string>

#include "cuda/device.cuh"
#include "ghl/status.h"
#include "ghl/stream.h"

namespace ghl {

struct Grid {
  int64_t blocks = 0;  // on grid axis 0, which is the long one
  int threads = 0;
  size_t shared = 0;  // dynamic, bytes
};

constexpr int64_t kMostBlocks = 0x7fffffff;

inline Status too_many_blocks(const std::string& what, const Grid& grid) {
  return Status::failure(what + ": " + std::to_string(grid.blocks) + " blocks are more than a grid can have");
}

// What a launcher chooses its configuration by.
struct DeviceInfo {
  int capability = 0;  // 80, 90, ...
  int multiprocessors = 0;
  size_t shared_limit = 0;  // dynamic shared memory that a block may ask for, bytes
};

#ifdef GHL_CUDA_ON_HOST

inline Status device_info(int, DeviceInfo& info) {
  info = {80, 4, host::kSharedLimit};
  return {};
}

template <class Params>
Status launch(const std::string& what, void (*kernel)(Params), const Grid& grid, Stream,
              const Params& params) {
  if (grid.blocks > kMostBlocks) return too_many_blocks(what, grid);
  try {
    host::launch({static_cast<unsigned>(grid.blocks)}, {static_cast<unsigned>(grid.threads)}, grid.shared,
                 [&] { kernel(params); });
  } catch (const std::exception& error) {
    return Status::failure(what + ": " + error.what());
  }
  return {};
}

#else

inline Status cuda_status(const std::string& what, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return Status::failure(what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes a device current and puts the former one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) error_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = -1;
  cudaError_t error_;
};

inline Status device_info(int device, DeviceInfo& info) {
  int major = 0, minor = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  info = {10 * major + minor, multiprocessors, static_cast<size_t>(shared)};
  return cuda_status("device " + std::to_string(device), error);
}

constexpr size_t kSharedWithoutOptIn = 48 << 10;

// `what` names the operation and its shape, for the message of a failure.
template <class Params>
Status launch(const std::string& what, void (*kernel)(Params), const Grid& grid, Stream stream,
              const Params& params) {
  if (grid.blocks > kMostBlocks) return too_many_blocks(what, grid);
  const DeviceGuard guard(stream.device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess && grid.shared > kSharedWithoutOptIn) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(grid.shared));
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(grid.blocks)),
                             dim3(static_cast<unsigned>(grid.threads)), arguments, grid.shared,
                             static_cast<cudaStream_t>(stream.handle));
  }
  // taken, so that the next check of another library does not report it as its own
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return cuda_status(what, error);
}

#endif

}  // namespace ghl
