#pragma once

#include <cstdint>

namespace ghl {

// Element types that the native kernels read and write, f16 only on GPUs. Sums are always float.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace ghl
