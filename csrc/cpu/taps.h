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

struct Tap {
  int64_t unit;     // of all
  int64_t channel;  // of all
  int64_t row;      // of the kernel
  int64_t column;
};

// One channel of x, or one unit of y.
struct Plane {
  const void* data;
  DType dtype;
  Layout layout;
  int64_t size[2];

  template <class T>
  const T* at(int64_t image, int64_t row, int64_t column) const {
    return static_cast<const T*>(data) + image * layout.stride_batch +
           (row * size[1] + column) * layout.stride_position;
  }
};

Plane plane_of(const void* data, DType dtype, const Layout& layout, int64_t index, int64_t rows,
               int64_t columns) {
  const int64_t size = dtype == DType::bf16 ? sizeof(BFloat16) : sizeof(float);
  const auto* bytes = static_cast<const char*>(data) + index * layout.stride_unit * size;
  return {bytes, dtype, layout, {rows, columns}};
}

Plane x_plane(const WinogradParams& params, int64_t channel) {
  return plane_of(params.x, params.x_dtype, params.x_layout, channel, params.in_size[0], params.in_size[1]);
}

Plane y_plane(const WinogradParams& params, int64_t unit) {
  return plane_of(params.y, params.y_dtype, params.y_layout, unit, params.out_size(0), params.out_size(1));
}

// Where a plane is not zero, if these places are few: at most `most`.
struct Nonzeros {
  static constexpr int kMost = 256;
  int most;
  int count = 0;  // most + 1 where they are more
  int32_t place[kMost][3];

  bool are_few() const { return count <= most; }

  template <class T>
  void find(const Plane& plane, int64_t batch) {
    for (int64_t image = 0; image < batch; ++image) {
      for (int64_t row = 0; row < plane.size[0]; ++row) {
        const T* const values = plane.at<T>(image, row, 0);
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

void find_nonzeros(const Plane& plane, int64_t batch, int most, Nonzeros* nonzeros) {
  nonzeros->most = most;
  if (plane.dtype == DType::bf16) return nonzeros->find<BFloat16>(plane, batch);
  nonzeros->find<float>(plane, batch);
}

// The sum over the nonzeros of a of a times b so many rows and columns further.
template <class A, class B>
double sum_places(const Nonzeros& nonzeros, const Plane& a, const Plane& b, int64_t row_shift,
                  int64_t column_shift) {
  double sum = 0.0;
  for (int i = 0; i < nonzeros.count; ++i) {
    const int32_t (&place)[3] = nonzeros.place[i];
    const int64_t row = place[1] + row_shift, column = place[2] + column_shift;
    if (row < 0 || row >= b.size[0] || column < 0 || column >= b.size[1]) continue;
    sum += static_cast<double>(to_float(*a.at<A>(place[0], place[1], place[2]))) *
           static_cast<double>(to_float(*b.at<B>(place[0], row, column)));
  }
  return sum;
}

// The sum over all of y of y times x so many rows and columns further.
template <class X, class Y>
double sum_planes(const Plane& x, const Plane& y, int64_t batch, int64_t row_shift, int64_t column_shift) {
  const int64_t x_stride = x.layout.stride_position, y_stride = y.layout.stride_position;
  const int64_t first = max(0, -column_shift);
  const int64_t count = min(y.size[1], x.size[1] - column_shift) - first;
  double sum = 0.0;
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t row = max(0, -row_shift); row < min(y.size[0], x.size[0] - row_shift); ++row) {
      const X* const inputs = x.at<X>(image, row + row_shift, column_shift + first);
      const Y* const outputs = y.at<Y>(image, row, first);
      for (int64_t i = 0; i < count; ++i) {
        sum += static_cast<double>(to_float(inputs[i * x_stride])) *
               static_cast<double>(to_float(outputs[i * y_stride]));
      }
    }
  }
  return sum;
}

template <class X, class Y>
float sum_tap(const WinogradParams& params, const Tap& tap, const Nonzeros& of_y, const Nonzeros& of_x) {
  const Plane x = x_plane(params, tap.channel), y = y_plane(params, tap.unit);
  const int64_t row_shift = tap.row - params.padding[0], column_shift = tap.column - params.padding[1];
  const double sum = of_x.are_few()   ? sum_places<X, Y>(of_x, x, y, -row_shift, -column_shift)
                     : of_y.are_few() ? sum_places<Y, X>(of_y, y, x, row_shift, column_shift)
                                      : sum_planes<X, Y>(x, y, params.batch, row_shift, column_shift);
  return static_cast<float>(sum);
}

float sum_tap(const WinogradParams& params, const Tap& tap, const Nonzeros& of_y, const Nonzeros& of_x) {
  const bool x_is_bf16 = params.x_dtype == DType::bf16;
  if (params.y_dtype == DType::bf16) {
    return x_is_bf16 ? sum_tap<BFloat16, BFloat16>(params, tap, of_y, of_x)
                     : sum_tap<float, BFloat16>(params, tap, of_y, of_x);
  }
  return x_is_bf16 ? sum_tap<BFloat16, float>(params, tap, of_y, of_x)
                   : sum_tap<float, float>(params, tap, of_y, of_x);
}

// A unit whose taps are put: where its y is not zero, once that is asked for.
struct Unit {
  const WinogradParams& params;
  int64_t index;  // of all
  bool is_known = false;
  Nonzeros nonzeros;

  Unit(const WinogradParams& of, int64_t unit) : params(of), index(unit) {}

  const Nonzeros& known() {
    if (!is_known) find_nonzeros(y_plane(params, index), params.batch, Nonzeros::kMost, &nonzeros);
    is_known = true;
    return nonzeros;
  }
};

// Those of the nine taps of a channel that are doubtful, a bit each.
void sum_again(const WinogradParams& params, Unit* unit, int64_t channel, uint32_t doubtful, float* taps) {
  const Nonzeros& of_y = unit->known();
  Nonzeros of_x;  // no more than half as many, so that finding them pays
  find_nonzeros(x_plane(params, channel), params.batch,
                static_cast<int>(min(of_y.count, Nonzeros::kMost) / 2), &of_x);
  for (; doubtful != 0; doubtful &= doubtful - 1) {
    const int tap = __builtin_ctz(doubtful);
    taps[tap * kLanes] = sum_tap(params, {unit->index, channel, tap / 3, tap % 3}, of_y, of_x);
  }
}

}  // namespace
}  // namespace ghl::GHL_ISA
