// Sixteen floats at a time, in the registers of the instruction set that the file is compiled for:
// one AVX-512 register, two AVX2 or four 128-bit ones. Written once on the compiler's vector types;
// intrinsics only where these leave no way (masks, min, max) or compile badly.
//
// Everything has internal linkage and is always inlined; see kernels.h for why that matters.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "ghl/dtype.h"

#define GHL_INLINE __attribute__((always_inline)) inline

namespace ghl::GHL_ISA {
namespace {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;

using PartF __attribute__((vector_size(4 * kWidth))) = float;
using PartI __attribute__((vector_size(4 * kWidth))) = int32_t;
using PartU __attribute__((vector_size(4 * kWidth))) = uint32_t;
using PartU16 __attribute__((vector_size(2 * kWidth))) = uint16_t;

#define GHL_EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)

struct Floats {
  PartF part[kParts];
};

struct Ints {
  PartI part[kParts];
};

struct BFloat16 {
  uint16_t bits;
};

// One boolean a lane: a mask register with AVX-512, else lanes of 0 or -1.
struct Mask {
#if defined(__AVX512F__)
  __mmask16 bits;
#else
  PartI part[kParts];
#endif
};

// ---- Floats ----

GHL_INLINE Floats broadcast(float value) {
  Floats r;
  GHL_EACH_PART r.part[i] = value - PartF{};  // a sum would make 0.0 of -0.0
  return r;
}

#define GHL_FLOATS_OPERATOR(op)                       \
  GHL_INLINE Floats operator op(Floats a, Floats b) { \
    Floats r;                                         \
    GHL_EACH_PART r.part[i] = a.part[i] op b.part[i]; \
    return r;                                         \
  }                                                   \
  GHL_INLINE Floats& operator op## = (Floats & a, Floats b) { return a = a op b; }
GHL_FLOATS_OPERATOR(+)
GHL_FLOATS_OPERATOR(-)
GHL_FLOATS_OPERATOR(*)
GHL_FLOATS_OPERATOR(/)
#undef GHL_FLOATS_OPERATOR

// a * b + c: one rounding where the instruction set has a fused multiply-add, two on the baseline.
GHL_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

// max and min return b where either is NaN.
GHL_INLINE PartF max(PartF a, PartF b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

GHL_INLINE PartF min(PartF a, PartF b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

GHL_INLINE Floats max(Floats a, Floats b) {
  GHL_EACH_PART a.part[i] = max(a.part[i], b.part[i]);
  return a;
}

GHL_INLINE Floats min(Floats a, Floats b) {
  GHL_EACH_PART a.part[i] = min(a.part[i], b.part[i]);
  return a;
}

// ---- Ints ----

GHL_INLINE Ints broadcast(int32_t value) {
  Ints r;
  GHL_EACH_PART r.part[i] = PartI{} + value;
  return r;
}

#define GHL_INTS_OPERATOR(op)                         \
  GHL_INLINE Ints operator op(Ints a, Ints b) {       \
    Ints r;                                           \
    GHL_EACH_PART r.part[i] = a.part[i] op b.part[i]; \
    return r;                                         \
  }                                                   \
  GHL_INLINE Ints& operator op## = (Ints & a, Ints b) { return a = a op b; }
GHL_INTS_OPERATOR(&)
GHL_INTS_OPERATOR(|)
GHL_INTS_OPERATOR(^)
#undef GHL_INTS_OPERATOR

// Signed sums wrap around, as the hardware's do (in C++ only unsigned ones may).
GHL_INLINE Ints operator+(Ints a, Ints b) {
  Ints r;
  GHL_EACH_PART r.part[i] = (PartI)((PartU)a.part[i] + (PartU)b.part[i]);
  return r;
}

GHL_INLINE Ints operator-(Ints a, Ints b) {
  Ints r;
  GHL_EACH_PART r.part[i] = (PartI)((PartU)a.part[i] - (PartU)b.part[i]);
  return r;
}

template <int bits>
GHL_INLINE Ints shift_left(Ints a) {
  Ints r;
  GHL_EACH_PART r.part[i] = (PartI)((PartU)a.part[i] << bits);
  return r;
}

template <int bits>
GHL_INLINE Ints shift_right_signed(Ints a) {
  Ints r;
  GHL_EACH_PART r.part[i] = a.part[i] >> bits;
  return r;
}

template <int bits>
GHL_INLINE Ints shift_right_unsigned(Ints a) {
  Ints r;
  GHL_EACH_PART r.part[i] = (PartI)((PartU)a.part[i] >> bits);
  return r;
}

GHL_INLINE Ints float_bits(Floats a) {
  Ints r;
  GHL_EACH_PART r.part[i] = (PartI)a.part[i];
  return r;
}

GHL_INLINE Floats floats_from_bits(Ints a) {
  Floats r;
  GHL_EACH_PART r.part[i] = (PartF)a.part[i];
  return r;
}

// |a|
GHL_INLINE Floats magnitude(Floats a) { return floats_from_bits(float_bits(a) & broadcast(INT32_MAX)); }

// ---- Masks ----

#if defined(__AVX512F__)

GHL_INLINE Mask operator==(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_EQ_OQ)};
}
GHL_INLINE Mask operator!=(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_NEQ_UQ)};
}
GHL_INLINE Mask operator<(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_LT_OQ)};
}
GHL_INLINE Mask operator>(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_GT_OQ)};
}
GHL_INLINE Mask operator>=(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_GE_OQ)};
}
GHL_INLINE Mask operator==(Ints a, Ints b) {
  return {_mm512_cmpeq_epi32_mask((__m512i)a.part[0], (__m512i)b.part[0])};
}
GHL_INLINE Mask operator>(Ints a, Ints b) {
  return {_mm512_cmpgt_epi32_mask((__m512i)a.part[0], (__m512i)b.part[0])};
}
GHL_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits & b.bits)}; }
GHL_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
GHL_INLINE Mask operator~(Mask a) { return {static_cast<__mmask16>(~a.bits)}; }
GHL_INLINE Mask none() { return {0}; }
// Bit i is lane i.
GHL_INLINE uint32_t lane_bits(Mask mask) { return mask.bits; }

GHL_INLINE Floats select(Mask mask, Floats yes, Floats no) {
  return {_mm512_mask_blend_ps(mask.bits, no.part[0], yes.part[0])};
}

GHL_INLINE Ints select(Mask mask, Ints yes, Ints no) {
  return {(PartI)_mm512_mask_blend_epi32(mask.bits, (__m512i)no.part[0], (__m512i)yes.part[0])};
}

// count + 1 where mask.
GHL_INLINE Ints increment(Mask mask, Ints count) {
  const __m512i old = (__m512i)count.part[0];
  return {(PartI)_mm512_mask_sub_epi32(old, mask.bits, old, _mm512_set1_epi32(-1))};
}

#else

#define GHL_MASK_COMPARE(type, op)                             \
  GHL_INLINE Mask operator op(type a, type b) {                \
    Mask r;                                                    \
    GHL_EACH_PART r.part[i] = (PartI)(a.part[i] op b.part[i]); \
    return r;                                                  \
  }
GHL_MASK_COMPARE(Floats, ==)
GHL_MASK_COMPARE(Floats, !=)
GHL_MASK_COMPARE(Floats, <)
GHL_MASK_COMPARE(Floats, >)
GHL_MASK_COMPARE(Floats, >=)
GHL_MASK_COMPARE(Ints, ==)
GHL_MASK_COMPARE(Ints, >)
#undef GHL_MASK_COMPARE

#define GHL_MASK_OPERATOR(op)                         \
  GHL_INLINE Mask operator op(Mask a, Mask b) {       \
    Mask r;                                           \
    GHL_EACH_PART r.part[i] = a.part[i] op b.part[i]; \
    return r;                                         \
  }
GHL_MASK_OPERATOR(&)
GHL_MASK_OPERATOR(|)
#undef GHL_MASK_OPERATOR

GHL_INLINE Mask operator~(Mask a) {
  Mask r;
  GHL_EACH_PART r.part[i] = ~a.part[i];
  return r;
}

GHL_INLINE Mask none() {
  Mask r;
  GHL_EACH_PART r.part[i] = PartI{};
  return r;
}

// Bit i is lane i.
GHL_INLINE uint32_t lane_bits(Mask mask) {
  uint32_t bits = 0;
  GHL_EACH_PART {
#if defined(__AVX2__)
    bits |= static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask.part[i])) << (i * kWidth);
#elif defined(__SSE2__)
    bits |= static_cast<uint32_t>(_mm_movemask_ps((__m128)mask.part[i])) << (i * kWidth);
#else
    for (int lane = 0; lane < kWidth; ++lane) bits |= (mask.part[i][lane] & 1u) << (i * kWidth + lane);
#endif
  }
  return bits;
}

GHL_INLINE Ints select(Mask mask, Ints yes, Ints no) {
  Ints r;
  GHL_EACH_PART r.part[i] = (mask.part[i] & yes.part[i]) | (~mask.part[i] & no.part[i]);
  return r;
}

GHL_INLINE Floats select(Mask mask, Floats yes, Floats no) {
  return floats_from_bits(select(mask, float_bits(yes), float_bits(no)));
}

// count + 1 where mask.
GHL_INLINE Ints increment(Mask mask, Ints count) {
  GHL_EACH_PART count.part[i] -= mask.part[i];
  return count;
}

#endif

GHL_INLINE bool any(Mask mask) {
#if !defined(__AVX512F__)
  // Joining the parts first saves movemasks.
  PartI joined = mask.part[0];
  for (int i = 1; i < kParts; ++i) joined |= mask.part[i];
#if defined(__AVX2__)
  return _mm256_movemask_ps((__m256)joined) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)joined) != 0;
#else
  return lane_bits(mask) != 0;
#endif
#else
  return mask.bits != 0;
#endif
}

GHL_INLINE bool all(Mask mask) { return lane_bits(mask) == 0xffff; }
GHL_INLINE Mask is_nan(Floats a) { return a != a; }
GHL_INLINE Floats quiet_nan() { return broadcast(__builtin_nanf("")); }

// ---- Memory ----

GHL_INLINE PartF load_part(const float* source) {
  PartF r;
  std::memcpy(&r, source, sizeof(r));
  return r;
}

GHL_INLINE void store_part(float* target, PartF value) { std::memcpy(target, &value, sizeof(value)); }

GHL_INLINE PartF load_part(const BFloat16* source) {
  PartU16 half;
  std::memcpy(&half, source, sizeof(half));
  return (PartF)(__builtin_convertvector(half, PartU) << 16);
}

// Round to nearest, ties to even; a NaN stays one (its payload's top bits and the quiet bit).
GHL_INLINE void store_part(BFloat16* target, PartF value) {
  const PartU bits = (PartU)value;
  const PartU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const PartU nan = (PartU)(value != value);
  const PartU result = (nan & ((bits >> 16) | 0x40u)) | (~nan & rounded);
  const PartU16 half = __builtin_convertvector(result, PartU16);
  std::memcpy(target, &half, sizeof(half));
}

template <class T>
GHL_INLINE Floats load(const T* source) {
  Floats r;
  GHL_EACH_PART r.part[i] = load_part(source + i * kWidth);
  return r;
}

template <class T>
GHL_INLINE void store(T* target, Floats value) {
  GHL_EACH_PART store_part(target + i * kWidth, value.part[i]);
}

GHL_INLINE float to_float(float value) { return value; }
GHL_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <class T>
T from_float(float value);
template <>
GHL_INLINE float from_float<float>(float value) {
  return value;
}
template <>
GHL_INLINE BFloat16 from_float<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool nan = value != value;
  return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// The first count (0 to 16) lanes; the others are fill, and their memory is not touched.
template <class T>
GHL_INLINE Floats load_first(const T* source, int count, float fill = 0.0f) {
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane < count ? to_float(source[lane]) : fill;
  return load(lanes);
}

template <class T>
GHL_INLINE void store_first(T* target, Floats value, int count) {
  float lanes[kLanes];
  store(lanes, value);
  for (int lane = 0; lane < count; ++lane) target[lane] = from_float<T>(lanes[lane]);
}

#if defined(__AVX512F__)
template <>
GHL_INLINE Floats load_first<float>(const float* source, int count, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << count) - 1u), source)};
}

template <>
GHL_INLINE void store_first<float>(float* target, Floats value, int count) {
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1u), value.part[0]);
}
#endif

// ---- Transposition ----

// Exchanges, for all pairs of rows a distance apart, the off-diagonal blocks of that size.
template <int distance, int... lane>
GHL_INLINE void exchange_blocks(PartF (&rows)[kWidth], std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if ((i & distance) != 0) continue;
    const PartF a = rows[i];
    const PartF b = rows[i + distance];
    rows[i] = __builtin_shufflevector(a, b, ((lane & distance) != 0 ? kWidth + lane - distance : lane)...);
    rows[i + distance] =
        __builtin_shufflevector(a, b, ((lane & distance) != 0 ? kWidth + lane : lane + distance)...);
  }
}

// A square of one register's width.
GHL_INLINE void transpose(PartF (&rows)[kWidth]) {
  constexpr std::make_integer_sequence<int, kWidth> lanes;
  if constexpr (kWidth > 8) exchange_blocks<8>(rows, lanes);
  if constexpr (kWidth > 4) exchange_blocks<4>(rows, lanes);
  exchange_blocks<2>(rows, lanes);
  exchange_blocks<1>(rows, lanes);
}

// ---- Functions ----

// e^x to about 1 ulp. exp(-inf) is 0, exp(inf) is inf, NaN stays; results below 2^-126 are denormal.
GHL_INLINE Floats exp(Floats x) {
  // Outside these bounds the result is 0 or inf; inside, 2^n below is a product of two normal floats.
  x = min(broadcast(89.0f), max(broadcast(-104.0f), x));  // this order of arguments keeps NaN
  const Floats round = broadcast(12582912.0f);            // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = multiply_add(x, broadcast(1.44269504f), round);
  const Floats n = shifted - round;
  // ln 2 in two parts; n times the first is exact, so that r is good without a fused multiply-add too.
  Floats r = multiply_add(n, broadcast(-0.693359375f), x);
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  Floats p = broadcast(1.9875691500e-4f);
  p = multiply_add(p, r, broadcast(1.3981999507e-3f));
  p = multiply_add(p, r, broadcast(8.3334519073e-3f));
  p = multiply_add(p, r, broadcast(4.1665795894e-2f));
  p = multiply_add(p, r, broadcast(1.6666665459e-1f));
  p = multiply_add(p, r, broadcast(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + broadcast(1.0f);
  // p * 2^n in two factors, since 2^n alone may be out of range where the product is not.
  const Ints exponent = float_bits(shifted) - float_bits(round);
  const Ints half = shift_right_signed<1>(exponent);
  const Ints bias = broadcast(int32_t{127});
  const Floats first = floats_from_bits(shift_left<23>(half + bias));
  const Floats second = floats_from_bits(shift_left<23>(exponent - half + bias));
  return p * first * second;
}

}  // namespace
}  // namespace ghl::GHL_ISA
