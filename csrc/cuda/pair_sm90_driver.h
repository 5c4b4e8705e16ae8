// The driver's functions for tensor maps, looked up at run time: nothing links the driver, so that the module
// loads where there is none.
#pragma once

#include <cuda_runtime.h>

#include "cuda/pair_sm90_maps.h"

namespace ghl::sm90 {

// Null where the driver, or the entry point, is missing.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  constexpr unsigned kVersion = 12000;  // of CUDA, that has them all
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, kVersion, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function)
                                                                      : nullptr;
}

inline Encoders driver_encoders() {
  return {driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled"),
          driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col"),
          driver_function<PFN_cuGetErrorString_v6000>("cuGetErrorString")};
}

}  // namespace ghl::sm90
