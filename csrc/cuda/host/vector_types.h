// CUDA's built-in vector types, as far as kernels here load and store by them.
#pragma once

#define GHL_VECTOR_TYPES(element, name)                                                           \
  struct alignas(2 * sizeof(element)) name##2 { element x, y; };                                  \
  struct alignas(sizeof(element) < 8 ? 4 * sizeof(element) : 16) name##4 { element x, y, z, w; }; \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }                          \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }

GHL_VECTOR_TYPES(unsigned char, uchar)
GHL_VECTOR_TYPES(short, short)
GHL_VECTOR_TYPES(unsigned short, ushort)
GHL_VECTOR_TYPES(int, int)
GHL_VECTOR_TYPES(unsigned, uint)
GHL_VECTOR_TYPES(long long, longlong)
GHL_VECTOR_TYPES(unsigned long long, ulonglong)
GHL_VECTOR_TYPES(float, float)
GHL_VECTOR_TYPES(double, double)

#undef GHL_VECTOR_TYPES
