// The softmax: its exponentials and sums, sixteen positions at a time or sixteen units.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/row.h"
#include "cpu/simd.h"

namespace ghl::GHL_ISA {
namespace {

// exp((u - largest) / temperature)
struct Exponential {
  Floats largest;
  Floats inverse_temperature;
  GHL_INLINE Floats operator()(Floats u) const { return exp((u - largest) * inverse_temperature); }
};

// Sums over ascending units in blocks of kBlock neighbors, whose sums are added without loss, so that the
// rounding of many small terms does not add up. The blocks go by the unit, not by the number of calls: units
// may be left out that count in no lane.
template <int64_t kBlock>
class BlockedSum {
 public:
  GHL_INLINE void add(int64_t unit, Floats value) {
    if (unit >= end_) flush(unit);
    block_ += value;
  }
  GHL_INLINE Floats total() const { return total_ + (lost_ + block_); }

 private:
  // What a sum of floats loses is a float, too (Knuth's two-sum).
  GHL_INLINE void flush(int64_t unit) {
    const Floats sum = total_ + block_, added = sum - total_;
    lost_ += (total_ - (sum - added)) + (block_ - added);
    total_ = sum;
    block_ = broadcast(0.0f);
    end_ = (unit / kBlock + 1) * kBlock;
  }
  Floats total_ = broadcast(0.0f);
  Floats lost_ = broadcast(0.0f);
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

constexpr float kLeast = -std::numeric_limits<float>::infinity();  // of the lanes past a row's end

// The largest unit, or NaN where one is NaN.
template <class T>
float find_largest(const T* u, int64_t units) {
  Floats largest = broadcast(kLeast);
  Mask nan = none();
  for_vectors(0, units, [&](auto whole, int64_t n, int lanes) {
    const Floats value = load_lanes<whole>(u + n, lanes, kLeast);
    largest = max(largest, value);
    nan = nan | is_nan(value);
  });
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
  BlockedSum<256> blocks;  // sixteen vectors
  for_vectors(0, units, [&](auto whole, int64_t n, int lanes) {
    const Floats e = exponential(load_lanes<whole>(u + n, lanes, kLeast));  // e^-inf counts as 0
    blocks.add(n, e);
    if (y != nullptr) store_lanes<whole>(kept + n, e, lanes);
  });
  const float sum = sum_lanes(blocks.total());
  if (y != nullptr) {
    const Floats factor = broadcast(1.0f / sum);
    for_vectors(0, units, [&](auto whole, int64_t n, int lanes) {
      store_lanes<whole>(y + n, load_lanes<whole>(kept + n, lanes) * factor, lanes);
    });
  }
  return largest * inverse_temperature + __builtin_logf(sum);
}

}  // namespace
}  // namespace ghl::GHL_ISA
