// The sm_80 instructions of ../ptx.cuh, computed on a CPU. Fragments are those that the PTX manual draws.
#pragma once

#include <bit>
#include <functional>

#include "cuda/host/cuda_on_host.h"

namespace ghl::ptx {

// --- conversions --------------------------------------------------------------------------------

// Conversions give this one for every NaN.
constexpr uint32_t kNan = 0x7fffffff;

inline uint16_t cvt_rn_bf16_f32(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  return static_cast<uint32_t>(cvt_rn_bf16_f32(high)) << 16 | cvt_rn_bf16_f32(low);
}

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline float cvt_f32_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  float magnitude;
  if (exponent == 31 && mantissa) return std::bit_cast<float>(kNan);
  if (exponent == 31) {
    magnitude = std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t cvt_rn_f16_f32(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value != value) return 0x7fff;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude == 0.0f) return sign;
  // the spacing of halves at this magnitude; nearbyint rounds ties to even
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // a sum, not an or: 2048 steps carry into the exponent
  return static_cast<uint16_t>(sign + (exponent + 14) * 1024 + steps);
}

inline uint32_t cvt_rn_f16x2_f32(float high, float low) {
  return static_cast<uint32_t>(cvt_rn_f16_f32(high)) << 16 | cvt_rn_f16_f32(low);
}

inline uint32_t cvt_rna_tf32_f32(float value) {
  if (value != value) return kNan;
  // ties away from zero, so that infinity stays itself
  return (std::bit_cast<uint32_t>(value) + 0x1000) & ~0x1fffu;
}

inline float ex2_approx_ftz_f32(float value) {
  const float result = std::exp2(value);
  return std::fabs(result) < std::numeric_limits<float>::min() ? 0.0f : result;
}

inline float max_nan_f32(float a, float b) {
  return a != a || b != b ? std::numeric_limits<float>::quiet_NaN() : std::fmax(a, b);
}

// Of two 16-bit floats each, widened by `to_float`: the bits of the larger ones, NaN where either is.
template <class ToFloat>
uint32_t max_nan_x2(uint32_t a, uint32_t b, ToFloat to_float) {
  uint32_t result = 0;
  for (unsigned shift = 0; shift < 32; shift += 16) {
    const uint16_t one = static_cast<uint16_t>(a >> shift), other = static_cast<uint16_t>(b >> shift);
    const float x = to_float(one), y = to_float(other);
    uint32_t larger = x > y || (x == y && !std::signbit(x)) ? one : other;
    if (x != x || y != y) larger = 0x7fff;
    result |= larger << shift;
  }
  return result;
}

inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) { return max_nan_x2(a, b, bf16_to_float); }
inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) { return max_nan_x2(a, b, cvt_f32_f16); }

// 0xffff in the halves where `holds` of the two floats.
template <class ToFloat, class Holds>
uint32_t set_x2(uint32_t a, uint32_t b, ToFloat to_float, Holds holds) {
  uint32_t result = 0;
  for (unsigned shift = 0; shift < 32; shift += 16) {
    const float x = to_float(static_cast<uint16_t>(a >> shift)),
                y = to_float(static_cast<uint16_t>(b >> shift));
    if (holds(x, y)) result |= 0xffffu << shift;
  }
  return result;
}

inline uint32_t set_ge_u32_bf16x2(uint32_t a, uint32_t b) {
  return set_x2(a, b, bf16_to_float, std::greater_equal<float>());
}
inline uint32_t set_gt_u32_bf16x2(uint32_t a, uint32_t b) {
  return set_x2(a, b, bf16_to_float, std::greater<float>());
}
inline uint32_t set_ge_u32_f16x2(uint32_t a, uint32_t b) {
  return set_x2(a, b, cvt_f32_f16, std::greater_equal<float>());
}
inline uint32_t set_gt_u32_f16x2(uint32_t a, uint32_t b) {
  return set_x2(a, b, cvt_f32_f16, std::greater<float>());
}

// --- memory -------------------------------------------------------------------------------------

inline void st_global_v4_b32(void* address, uint4 bits) {
  if (reinterpret_cast<uintptr_t>(address) % 16) throw std::runtime_error("a misaligned store of 16 bytes");
  std::memcpy(address, &bits, sizeof bits);
}

// --- asynchronous copies ------------------------------------------------------------------------

inline void cp_async_cg_16(void* shared, const void* source, uint32_t bytes) {
  host::copy_later(shared, source, 16, bytes);
}

inline void cp_async_ca_4(void* shared, const void* source, uint32_t bytes) {
  host::copy_later(shared, source, 4, bytes);
}

inline void cp_async_commit_group() { host::close_copy_group(); }

template <int pending>
void cp_async_wait_group() {
  host::wait_for_copies(pending);
}

// --- matrices -----------------------------------------------------------------------------------

// Where each lane's row begins.
using Rows = host::WarpValues<const char*>;

inline Rows matrix_rows(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix of a misaligned row");
  return host::exchange(~0u, static_cast<const char*>(row));
}

inline void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  const Rows rows = matrix_rows(row);
  const unsigned lane = host::lane();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    std::memcpy(&result[matrix], rows.of[8 * matrix + lane / 4] + 4 * (lane % 4), 4);
  }
  // a lane may overwrite its rows next, which the others still read
  __syncwarp();
}

inline void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row) {
  const Rows rows = matrix_rows(row);
  const unsigned lane = host::lane();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      std::memcpy(&pair[i], rows.of[8 * matrix + 2 * (lane % 4) + i] + 2 * (lane / 4), 2);
    }
    std::memcpy(&result[matrix], pair, 4);
  }
  __syncwarp();
}

// A lane's registers of both factors.
struct Fragments {
  uint32_t a[4], b[2];
};

inline host::WarpValues<Fragments> fragments(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  return host::exchange(~0u, Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
}

// d += a b, 16 x kDepth by kDepth x 8, from functions that give an element of a (row, k) and of b (k,
// column). The order of the sum, and that every step of it is rounded, differ from the tensor core's.
template <int kDepth, class A, class B>
void multiply(float (&d)[4], A a, B b) {
  const unsigned group = host::lane() / 4, in_group = host::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + 8 * (i / 2), column = 2 * in_group + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < kDepth; ++k) sum += a(row, k) * b(k, column);
    d[i] += sum;
  }
}

template <float (*to_float)(uint16_t)>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto lanes = fragments(a, b);
  const auto half = [](uint32_t word, unsigned k) {
    return to_float(static_cast<uint16_t>(word >> 16 * (k % 2)));
  };
  multiply<16>(
      d,
      [&](unsigned row, unsigned k) {
        return half(lanes.of[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k);
      },
      [&](unsigned k, unsigned column) { return half(lanes.of[4 * column + k % 8 / 2].b[k / 8], k); });
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<bf16_to_float>(d, a, b);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<cvt_f32_f16>(d, a, b);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto lanes = fragments(a, b);
  // the tensor core reads 19 bits of each
  const auto number = [](uint32_t word) { return std::bit_cast<float>(word & ~0x1fffu); };
  multiply<8>(
      d,
      [&](unsigned row, unsigned k) { return number(lanes.of[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); },
      [&](unsigned k, unsigned column) { return number(lanes.of[4 * column + k % 4].b[k / 4]); });
}

}  // namespace ghl::ptx
