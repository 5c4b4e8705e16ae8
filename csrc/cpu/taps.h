// Taps of a 3 x 3 convolution's A by the definition, in double precision: a few of one unit and one channel.
//
// Those that are asked for are small beside their neighbors, mostly because x and y hardly meet, as with the
// gradients that a ReLU lets through: then one of them is not zero in few places, and those alone are summed.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/sizes.h"
#include "ghl/winograd.h"

namespace ghl::GHL_ISA {
namespace {

// One channel of x, or one unit of y, of elements of a dtype.
template <class T>
struct Plane {
  const T* data;
  Layout layout;
  int64_t size[2];

  Plane(const void* all, const Layout& of, int64_t index, int64_t rows, int64_t columns)
      : data(static_cast<const T*>(all) + index * of.stride_unit), layout(of), size{rows, columns} {}

  const T* at(int64_t image, int64_t row, int64_t column) const {
    return data + image * layout.stride_batch + (row * size[1] + column) * layout.stride_position;
  }
};

// Where a plane is not zero, if these places are few: at most `most`.
struct Nonzeros {
  static constexpr int kMost = 256;
  int most;
  int count = 0;  // most + 1 where they are more
  int32_t place[kMost][3];

  bool are_few() const { return count <= most; }

  template <class T>
  void find(const Plane<T>& plane, int64_t batch, int at_most) {
    most = at_most;
    for (int64_t image = 0; image < batch; ++image) {
      for (int64_t row = 0; row < plane.size[0]; ++row) {
        const T* const values = plane.at(image, row, 0);
        for (int64_t column = 0; column < plane.size[1]; ++column) {
          if (to_float(values[column * plane.layout.stride_position]) == 0.0f) continue;
          if (count++ == most) return;
          int32_t* const at = place[count - 1];
          at[0] = static_cast<int32_t>(image);
          at[1] = static_cast<int32_t>(row);
          at[2] = static_cast<int32_t>(column);
        }
      }
    }
  }
};

// The sum over the nonzeros of a of a times b so many rows and columns further.
template <class A, class B>
double sum_places(const Nonzeros& nonzeros, const Plane<A>& a, const Plane<B>& b, int64_t row_shift,
                  int64_t column_shift) {
  double sum = 0.0;
  for (int i = 0; i < nonzeros.count; ++i) {
    const int32_t (&place)[3] = nonzeros.place[i];
    const int64_t row = place[1] + row_shift, column = place[2] + column_shift;
    if (row < 0 || row >= b.size[0] || column < 0 || column >= b.size[1]) continue;
    sum += static_cast<double>(to_float(*a.at(place[0], place[1], place[2]))) *
           static_cast<double>(to_float(*b.at(place[0], row, column)));
  }
  return sum;
}

// The sum over all of y of y times x so many rows and columns further.
template <class X, class Y>
double sum_planes(const Plane<X>& x, const Plane<Y>& y, int64_t batch, int64_t row_shift,
                  int64_t column_shift) {
  const int64_t x_stride = x.layout.stride_position, y_stride = y.layout.stride_position;
  const int64_t first = max(0, -column_shift);
  const int64_t count = min(y.size[1], x.size[1] - column_shift) - first;
  double sum = 0.0;
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t row = max(0, -row_shift); row < min(y.size[0], x.size[0] - row_shift); ++row) {
      const X* const inputs = x.at(image, row + row_shift, column_shift + first);
      const Y* const outputs = y.at(image, row, first);
      for (int64_t i = 0; i < count; ++i) {
        sum += static_cast<double>(to_float(inputs[i * x_stride])) *
               static_cast<double>(to_float(outputs[i * y_stride]));
      }
    }
  }
  return sum;
}

// A unit whose taps are put: where its y is not zero, once that is asked for.
struct Unit {
  int64_t index;  // of all
  bool is_known = false;
  Nonzeros nonzeros;

  explicit Unit(int64_t unit) : index(unit) {}

  template <class Y>
  const Nonzeros& known(const Plane<Y>& y, int64_t batch) {
    if (!is_known) nonzeros.find(y, batch, Nonzeros::kMost);
    is_known = true;
    return nonzeros;
  }
};

template <class X, class Y>
void sum_again_as(const WinogradParams& params, Unit* unit, int64_t channel, uint32_t doubtful, float* taps) {
  const Plane<X> x(params.x, params.x_layout, channel, params.in_size[0], params.in_size[1]);
  const Plane<Y> y(params.y, params.y_layout, unit->index, params.out_size(0), params.out_size(1));
  const Nonzeros& of_y = unit->known(y, params.batch);
  Nonzeros of_x;  // no more than half as many, so that finding them pays
  of_x.find(x, params.batch, static_cast<int>(min(of_y.count, Nonzeros::kMost) / 2));
  for (; doubtful != 0; doubtful &= doubtful - 1) {
    const int tap = __builtin_ctz(doubtful);
    const int64_t row_shift = tap / 3 - params.padding[0], column_shift = tap % 3 - params.padding[1];
    const double sum = of_x.are_few()   ? sum_places(of_x, x, y, -row_shift, -column_shift)
                       : of_y.are_few() ? sum_places(of_y, y, x, row_shift, column_shift)
                                        : sum_planes(x, y, params.batch, row_shift, column_shift);
    taps[tap * kLanes] = static_cast<float>(sum);
  }
}

// Those of the nine taps of a channel that are doubtful, a bit each.
void sum_again(const WinogradParams& params, Unit* unit, int64_t channel, uint32_t doubtful, float* taps) {
  const bool x_is_bf16 = params.x_dtype == DType::bf16, y_is_bf16 = params.y_dtype == DType::bf16;
  const auto sum = x_is_bf16 ? (y_is_bf16 ? sum_again_as<BFloat16, BFloat16> : sum_again_as<BFloat16, float>)
                             : (y_is_bf16 ? sum_again_as<float, BFloat16> : sum_again_as<float, float>);
  sum(params, unit, channel, doubtful, taps);
}

}  // namespace
}  // namespace ghl::GHL_ISA
