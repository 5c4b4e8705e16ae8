// A row of adjacent elements, sixteen at a time: whole vectors and, at its end, the first lanes of one.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace ghl::GHL_ISA {
namespace {

// Calls body(whole, first element, lanes) for vectors of up to 16 elements; whole is a compile-time truth.
template <class Body>
GHL_INLINE void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(std::true_type{}, i, kLanes);
  if (i < end) body(std::false_type{}, i, static_cast<int>(end - i));
}

template <bool kWhole, class T>
GHL_INLINE Floats load_lanes(const T* source, int lanes, float fill = 0.0f) {
  if constexpr (kWhole) {
    return load(source);
  } else {
    return load_first(source, lanes, fill);
  }
}

template <bool kWhole, class T>
GHL_INLINE void store_lanes(T* target, Floats value, int lanes) {
  if constexpr (kWhole) {
    store(target, value);
  } else {
    store_first(target, value, lanes);
  }
}

GHL_INLINE float sum_lanes(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace ghl::GHL_ISA
