// What the bindings of both native modules share: reading addresses, enumerators and layouts.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "ghl/compete.h"
#include "ghl/correlate.h"
#include "ghl/dtype.h"
#include "ghl/epilogue.h"
#include "ghl/status.h"

namespace ghl::binding {

namespace py = pybind11;

using Pair = std::array<int64_t, 2>;
using Triple = std::array<int64_t, 3>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class E>
E enumerator(const char* name, int value, E last) {
  if (value < 0 || value > static_cast<int>(last)) {
    throw py::value_error(std::string(name) + " must lie between 0 and " +
                          std::to_string(static_cast<int>(last)) + ", got " + std::to_string(value));
  }
  return static_cast<E>(value);
}

inline Layout layout(const Triple& t) { return {t[0], t[1], t[2]}; }
inline Filters filters(const Triple& t) { return {t[0], t[1], t[2]}; }

template <std::size_t size>
void copy(const std::array<int64_t, size>& source, int64_t (&target)[size]) {
  for (std::size_t d = 0; d < size; ++d) target[d] = source[d];
}

inline ConvGeometry geometry(int64_t batch, int64_t channels, int64_t groups, const Triple& in_size,
                             const Triple& out_size, const Triple& kernel, const Triple& stride,
                             const Triple& padding, const Triple& dilation) {
  ConvGeometry result;
  result.batch = batch;
  result.channels = channels;
  result.groups = groups;
  copy(in_size, result.in_size);
  copy(out_size, result.out_size);
  copy(kernel, result.kernel);
  copy(stride, result.stride);
  copy(padding, result.padding);
  copy(dilation, result.dilation);
  return result;
}

inline void raise_failure(const Status& status) {
  if (!status.ok) throw std::runtime_error(status.message);
}

}  // namespace ghl::binding
