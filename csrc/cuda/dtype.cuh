// The 16-bit element types as bits, and their conversions to and from float.
#pragma once

#include "cuda/device.cuh"
#include "cuda/ptx.cuh"
#include "ghl/dtype.h"

namespace ghl {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

template <class T>
struct Element;

template <>
struct Element<float> {
  static __device__ __forceinline__ float load(float value) { return value; }
  static __device__ __forceinline__ float store(float value) { return value; }
};

template <>
struct Element<bf16> {
  static __device__ __forceinline__ float load(bf16 value) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
  }
  static __device__ __forceinline__ bf16 store(float value) { return {ptx::cvt_rn_bf16_f32(value)}; }
};

template <>
struct Element<f16> {
  static __device__ __forceinline__ float load(f16 value) { return ptx::cvt_f32_f16(value.bits); }
  static __device__ __forceinline__ f16 store(float value) { return {ptx::cvt_rn_f16_f32(value)}; }
};

template <class T>
__device__ __forceinline__ float to_float(T value) {
  return Element<T>::load(value);
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float value) {
  return Element<T>::store(value);
}

// 16 bytes of elements, moved by one instruction where the address is a multiple of 16.
template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T element[size];
};

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
  Vector<T> vector;
  __builtin_memcpy(&vector, &bits, sizeof vector);
  return vector;
}

template <class T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T>& vector) {
  uint4 bits;
  __builtin_memcpy(&bits, &vector, sizeof bits);
  *reinterpret_cast<uint4*>(address) = bits;
}

// Calls run with a null pointer of the element type, so that one switch serves every launcher.
template <class Run>
auto by_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::bf16:
      return run(static_cast<bf16*>(nullptr));
    case DType::f16:
      return run(static_cast<f16*>(nullptr));
    default:
      return run(static_cast<float*>(nullptr));
  }
}

}  // namespace ghl
