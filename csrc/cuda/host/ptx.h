// The sm_80 instructions of ../ptx.cuh, computed on a CPU. Fragments are those that the PTX manual draws.
#pragma once

#include <bit>

#include "cuda/host/cuda_on_host.h"

namespace ghl::ptx {

// --- conversions --------------------------------------------------------------------------------

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
  if (exponent == 31) {
    magnitude = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
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
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000) == 0x7f800000) return bits;
  return (bits + 0x1000) & ~0x1fffu;
}

inline float ex2_approx_ftz_f32(float value) {
  const float result = std::exp2(value);
  return std::fabs(result) < std::numeric_limits<float>::min() ? 0.0f : result;
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

inline void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  const host::WarpValues rows = host::exchange(~0u, reinterpret_cast<uint64_t>(row));
  const unsigned lane = host::lane();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const char* source = reinterpret_cast<const char*>(rows.of[8 * matrix + lane / 4]);
    std::memcpy(&result[matrix], source + 4 * (lane % 4), 4);
  }
  // a lane may overwrite its rows next, which the others still read
  host::exchange(~0u, 0);
}

inline void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row) {
  const host::WarpValues rows = host::exchange(~0u, reinterpret_cast<uint64_t>(row));
  const unsigned lane = host::lane();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const char* source = reinterpret_cast<const char*>(rows.of[8 * matrix + 2 * (lane % 4) + i]);
      std::memcpy(&pair[i], source + 2 * (lane / 4), 2);
    }
    std::memcpy(&result[matrix], pair, 4);
  }
  host::exchange(~0u, 0);
}

// d += a b, 16 x kDepth by kDepth x 8, from functions that give an element of a (row, k) and of b (k, column).
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
  const auto both = [](uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; };
  const host::WarpValues low_k = host::exchange(~0u, both(a[0], a[1]));
  const host::WarpValues high_k = host::exchange(~0u, both(a[2], a[3]));
  const host::WarpValues columns = host::exchange(~0u, both(b[0], b[1]));
  const auto half = [](uint64_t words, bool upper_word, bool upper_half) {
    return to_float(static_cast<uint16_t>(words >> (32 * upper_word + 16 * upper_half)));
  };
  multiply<16>(
      d,
      [&](unsigned row, unsigned k) {
        return half((k < 8 ? low_k : high_k).of[row % 8 * 4 + k % 8 / 2], row >= 8, k & 1);
      },
      [&](unsigned k, unsigned column) { return half(columns.of[4 * column + k % 8 / 2], k >= 8, k & 1); });
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<bf16_to_float>(d, a, b);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<cvt_f32_f16>(d, a, b);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto both = [](uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; };
  const host::WarpValues low_k = host::exchange(~0u, both(a[0], a[1]));
  const host::WarpValues high_k = host::exchange(~0u, both(a[2], a[3]));
  const host::WarpValues columns = host::exchange(~0u, both(b[0], b[1]));
  // the tensor core reads 19 bits of each
  const auto word = [](uint64_t words, bool upper) {
    return std::bit_cast<float>(static_cast<uint32_t>(words >> 32 * upper) & ~0x1fffu);
  };
  multiply<8>(
      d,
      [&](unsigned row, unsigned k) { return word((k < 4 ? low_k : high_k).of[row % 8 * 4 + k % 4], row >= 8); },
      [&](unsigned k, unsigned column) { return word(columns.of[4 * column + k % 4], k >= 4); });
}

}  // namespace ghl::ptx
