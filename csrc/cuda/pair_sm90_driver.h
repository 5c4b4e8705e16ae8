// The driver's encoders of tensor maps, looked up at run time: nothing links the driver, so that the module
// loads where there is none.
#pragma once

#include <cuda_runtime.h>

#include "cuda/pair_sm90_maps.h"

namespace ghl::sm90 {

// Null where the driver, or the entry point, is missing.
template <class Function>
Function driver_function(const char* name) {
  constexpr unsigned kVersion = 12000;  // of CUDA, that first had them
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, kVersion, cudaEnableDefault, &found);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function)
                                                                      : nullptr;
}

inline Encoders driver_encoders() {
  return {driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled"),
          driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col")};
}

}  // namespace ghl::sm90
