// Queueing a kernel on a stream of a device, with errors as a Status.
#pragma once

#ifndef GHL_CUDA_ON_HOST
#include <map>
#include <mutex>
#include <utility>
#endif
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
  int device = 0;
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

// Makes a device and its context current, and puts the former device back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device), previous_(device) {
    error_ = cudaGetDevice(&previous_);
    // also where it is the device already: a thread of which nobody asked more has no context yet
    if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    // only then: it makes a context on a device that nobody may have used
    if (error_ == cudaSuccess && previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int device_;
  int previous_;
  cudaError_t error_;
};

// Answers of CUDA that do not change, each asked for once: its functions take longer than what they are
// asked before.
template <class Key, class Value>
class Answers {
 public:
  // ask(value) stores the answer; one that fails is not kept.
  template <class Ask>
  cudaError_t get(const Key& key, Value& value, Ask ask) {
    const std::lock_guard lock(mutex_);
    if (const auto known = answers_.find(key); known != answers_.end()) {
      value = known->second;
      return cudaSuccess;
    }
    const cudaError_t error = ask(value);
    if (error == cudaSuccess) answers_.emplace(key, value);
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> answers_;
};

inline cudaError_t ask_device(int device, DeviceInfo& info) {
  int major = 0, minor = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  info = {10 * major + minor, multiprocessors, static_cast<size_t>(shared), device};
  return error;
}

inline Status device_info(int device, DeviceInfo& info) {
  static Answers<int, DeviceInfo> answers;
  const cudaError_t error = answers.get(device, info, [&](DeviceInfo& to) { return ask_device(device, to); });
  return error == cudaSuccess ? Status{} : cuda_status("device " + std::to_string(device), error);
}

constexpr size_t kSharedWithoutOptIn = 48 << 10;

// Lets a kernel have all the dynamic shared memory of the current device. Always all of it: another thread
// may be between this and its own launch of the kernel, and must not find a smaller limit than it set.
inline cudaError_t allow_shared(const void* kernel, int device) {
  static Answers<std::pair<const void*, int>, int> answers;
  int limit = 0;
  return answers.get({kernel, device}, limit, [&](int& most) {
    cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaFuncAttributes attributes{};
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    most -= static_cast<int>(attributes.sharedSizeBytes);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  });
}

// `what` names the operation and its shape, for the message of a failure.
template <class Params>
Status launch(const std::string& what, void (*kernel)(Params), const Grid& grid, Stream stream,
              const Params& params) {
  if (grid.blocks > kMostBlocks) return too_many_blocks(what, grid);
  const DeviceGuard guard(stream.device);
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = guard.error();
  if (error == cudaSuccess && grid.shared > kSharedWithoutOptIn) {
    error = allow_shared(function, stream.device);
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid.blocks)),
                             dim3(static_cast<unsigned>(grid.threads)), arguments, grid.shared,
                             static_cast<cudaStream_t>(stream.handle));
  }
  // taken, so that the next check of another library does not report it as its own
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return cuda_status(what, error);
}

#endif

}  // namespace ghl
