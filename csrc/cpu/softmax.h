// The softmax: its exponentials and sums, sixteen positions at a time or sixteen units.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"

namespace ghl::GHL_ISA {
namespace {

// exp((u - largest) / temperature)
struct Exponential {
  Floats largest;
  Floats inverse_temperature;
  GHL_INLINE Floats operator()(Floats u) const { return exp((u - largest) * inverse_temperature); }
};

// Sums over ascending units in blocks of neighbors, so that the rounding of many does not add up. The
// blocks go by the unit, not by the number of calls: units may be left out that count in no lane.
class BlockedSum {
 public:
  GHL_INLINE void add(int64_t unit, Floats value) {
    if (unit >= end_) flush(unit);
    block_ += value;
  }
  GHL_INLINE Floats total() const { return total_ + block_; }

 private:
  static constexpr int64_t kBlock = 64;
  GHL_INLINE void flush(int64_t unit) {
    total_ += block_;
    block_ = broadcast(0.0f);
    end_ = (unit / kBlock + 1) * kBlock;
  }
  Floats total_ = broadcast(0.0f);
  Floats block_ = broadcast(0.0f);
  int64_t end_ = 0;
};

// A temperature so small that its inverse overflows must not make NaN of 0 times infinity.
float invert(float temperature) {
  const float inverse = 1.0f / temperature;
  return inverse > std::numeric_limits<float>::max() ? std::numeric_limits<float>::max() : inverse;
}

// ---- One row of adjacent units ----

GHL_INLINE float largest_lane(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  float largest = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
  return largest;
}

GHL_INLINE float sum_lanes(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// The largest unit, or NaN where one is NaN.
template <class T>
float find_largest(const T* u, int64_t units) {
  const Floats least = broadcast(-std::numeric_limits<float>::infinity());
  Floats largest = least;
  Mask nan = none();
  int64_t n = 0;
  for (; n + kLanes <= units; n += kLanes) {
    const Floats value = load(u + n);
    largest = max(largest, value);
    nan = nan | is_nan(value);
  }
  if (n < units) {
    const Floats value =
        load_first(u + n, static_cast<int>(units - n), -std::numeric_limits<float>::infinity());
    largest = max(largest, value);
    nan = nan | is_nan(value);
  }
  return any(nan) ? std::numeric_limits<float>::quiet_NaN() : largest_lane(largest);
}

// y = softmax(u / temperature) unless y is null; returns the logsumexp. Scratch holds the exponentials, one a
// unit, where y is not of floats.
template <class U, class Y>
float softmax_row(const U* u, int64_t units, float inverse_temperature, Y* y, float* scratch) {
  const float largest = find_largest(u, units);
  const Exponential exponential{broadcast(largest), broadcast(inverse_temperature)};
  float* kept = scratch;
  if constexpr (std::is_same_v<Y, float>) {
    if (y != nullptr) kept = y;
  }
  BlockedSum blocks;
  int64_t n = 0;
  for (; n + kLanes <= units; n += kLanes) {
    const Floats e = exponential(load(u + n));
    blocks.add(n, e);
    if (y != nullptr) store(kept + n, e);
  }
  const int rest = static_cast<int>(units - n);
  if (rest > 0) {
    const Floats e =
        exponential(load_first(u + n, rest, -std::numeric_limits<float>::infinity()));  // e^-inf counts as 0
    blocks.add(n, e);
    if (y != nullptr) store_first(kept + n, e, rest);
  }
  const float sum = sum_lanes(blocks.total());
  if (y == nullptr) return largest * inverse_temperature + __builtin_logf(sum);
  const Floats factor = broadcast(1.0f / sum);
  for (n = 0; n + kLanes <= units; n += kLanes) store(y + n, load(kept + n) * factor);
  if (rest > 0) store_first(y + n, load_first(kept + n, rest) * factor, rest);
  return largest * inverse_temperature + __builtin_logf(sum);
}

}  // namespace
}  // namespace ghl::GHL_ISA
