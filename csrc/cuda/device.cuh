// What every kernel includes: CUDA itself under nvcc, or its twin that runs the same source on a CPU.
#pragma once

#ifdef GHL_CUDA_ON_HOST
#include "cuda/host/cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace ghl {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Dynamic shared memory of the block, aligned to 1024 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef GHL_CUDA_ON_HOST
  return static_cast<T*>(host::dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char ghl_dynamic_shared[];
  return reinterpret_cast<T*>(ghl_dynamic_shared);
#endif
}

// Of a warp, or of each kLanes neighboring lanes of it.
template <int kLanes = static_cast<int>(kWarp), class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Keeps NaN out, as fmaxf does; a kernel that must not hide one tests for it apart.
template <int kLanes = static_cast<int>(kWarp)>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

template <class T>
__host__ __device__ constexpr T divide_up(T count, T size) {
  return (count + size - 1) / size;
}

}  // namespace ghl
