#pragma once

namespace ghl {

// Where a CUDA launcher queues its kernels: the ordinal of the device and its cudaStream_t.
// Launchers return when the kernels are queued; they neither wait nor allocate.
struct Stream {
  int device = 0;
  void* handle = nullptr;
};

}  // namespace ghl
