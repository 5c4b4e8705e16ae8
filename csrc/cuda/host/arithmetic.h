// CUDA's functions of bits, integers and floating-point numbers. Included by cuda_on_host.h.
// Where CUDA approximates (__expf and its like) the result here is the C library's, closer to the truth.
#pragma once

namespace ghl::host {

// As float -> integer conversions do: past the range the nearest end of it. NaN is 0, in 64 bits 1 << 63.
template <class To>
To saturate(double rounded) {
  if (std::isnan(rounded)) return sizeof(To) < 8 ? To{0} : static_cast<To>(uint64_t{1} << 63);
  if (rounded <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (rounded >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(rounded);
}

// Keeps the compiler from contracting a product and a sum into one rounding.
template <class T>
T rounded(T value) {
  asm("" : "+x"(value));
  return value;
}

template <class T>
T reverse_bits(T bits) {
  T reversed = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); ++i) reversed |= (bits >> i & 1) << (8 * sizeof(T) - 1 - i);
  return reversed;
}

}  // namespace ghl::host

// --- bits ---------------------------------------------------------------------------------------

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline int __clzll(long long bits) {
  return bits ? __builtin_clzll(static_cast<unsigned long long>(bits)) : 64;
}
inline unsigned __brev(unsigned bits) { return ghl::host::reverse_bits(bits); }
inline unsigned long long __brevll(unsigned long long bits) { return ghl::host::reverse_bits(bits); }

// Byte i of the result is the byte of {b, a} that nibble i of the selector names; its upper bit spreads the
// sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

inline unsigned __float_as_uint(float value) { return ghl::host::bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return ghl::host::bits_as<int>(value); }
inline float __uint_as_float(unsigned bits) { return ghl::host::bits_as<float>(bits); }
inline float __int_as_float(int bits) { return ghl::host::bits_as<float>(bits); }
inline long long __double_as_longlong(double value) { return ghl::host::bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return ghl::host::bits_as<double>(bits); }

// --- integers -----------------------------------------------------------------------------------

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}

using std::max;
using std::min;
// Unlike std::max, CUDA's gives the number where one of the two is NaN.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }

// --- floating point -----------------------------------------------------------------------------

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

inline float __fadd_rn(float a, float b) { return ghl::host::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return ghl::host::rounded(a - b); }
inline float __fmul_rn(float a, float b) { return ghl::host::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return ghl::host::rounded(a / b); }
inline float __frcp_rn(float value) { return ghl::host::rounded(1.0f / value); }
inline float __fsqrt_rn(float value) { return std::sqrt(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return ghl::host::rounded(a + b); }
inline double __dsub_rn(double a, double b) { return ghl::host::rounded(a - b); }
inline double __dmul_rn(double a, double b) { return ghl::host::rounded(a * b); }
inline double __ddiv_rn(double a, double b) { return ghl::host::rounded(a / b); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

namespace ghl {
// Not in the global namespace, where newer C libraries have one.
inline float rsqrtf(float value) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value))); }
}  // namespace ghl
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __log2f(float value) { return std::log2(value); }
inline float __saturatef(float value) { return std::fmin(std::fmax(value, 0.0f), 1.0f); }

inline int __float2int_rn(float value) { return ghl::host::saturate<int>(std::nearbyint(value)); }
inline int __float2int_rz(float value) { return ghl::host::saturate<int>(std::trunc(value)); }
inline int __float2int_rd(float value) { return ghl::host::saturate<int>(std::floor(value)); }
inline int __float2int_ru(float value) { return ghl::host::saturate<int>(std::ceil(value)); }
inline unsigned __float2uint_rn(float value) { return ghl::host::saturate<unsigned>(std::nearbyint(value)); }
inline unsigned __float2uint_rz(float value) { return ghl::host::saturate<unsigned>(std::trunc(value)); }
inline long long __float2ll_rn(float value) { return ghl::host::saturate<long long>(std::nearbyint(value)); }
inline long long __float2ll_rz(float value) { return ghl::host::saturate<long long>(std::trunc(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }
inline float __ll2float_rn(long long value) { return static_cast<float>(value); }
inline float __ull2float_rn(unsigned long long value) { return static_cast<float>(value); }
inline float __double2float_rn(double value) { return static_cast<float>(value); }
