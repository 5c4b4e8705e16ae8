// Whole numbers: sizes and bounds. Not those of the standard library, see kernels.h.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace ghl::GHL_ISA {
namespace {

GHL_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
GHL_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
GHL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace ghl::GHL_ISA
