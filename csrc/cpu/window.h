// Padded copies of parts of planes, sixteen channels a vector: [rows, columns, 16] floats from images of
// either layout, zeros where a part leaves its plane.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/sizes.h"
#include "ghl/compete.h"

namespace ghl::GHL_ISA {
namespace {

// A plane's part that is copied: rows and columns may lie outside the plane, where there are zeros.
struct View {
  int64_t height;  // of the plane
  int64_t width;
  int64_t row;
  int64_t column;
  int64_t rows;
  int64_t columns;
};

void zero(float* begin, int64_t floats) {
  for (int64_t i = 0; i < floats; ++i) begin[i] = 0.0f;
}

// Up to sixteen positions of sixteen planes, to rows of sixteen.
template <class T>
GHL_INLINE void transpose_positions(const T* source, int64_t stride_unit, float (&out)[kLanes * kLanes]) {
  for (int lane = 0; lane < kLanes; lane += kWidth) {
    for (int position = 0; position < kLanes; position += kWidth) {
      PartF square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) square[i] = load_part(source + (lane + i) * stride_unit + position);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store_part(out + (position + i) * kLanes + lane, square[i]);
    }
  }
}

// Where a plane's positions go, in their order; those outside the window's columns go nowhere.
class Places {
 public:
  GHL_INLINE Places(const View& view, int64_t row, float* window)
      : to_(window + (row - view.row) * view.columns * kLanes),
        row_stride_(view.columns * kLanes),
        width_(view.width),
        first_(view.column),
        begin_(max(0, view.column)),
        end_(view.column + view.columns) {}

  GHL_INLINE void put(Floats value) {
    if (column_ >= begin_ && column_ < end_) store(to_ + (column_ - first_) * kLanes, value);
    if (++column_ < width_) return;
    column_ = 0;
    to_ += row_stride_;
  }

 private:
  float* to_;  // the row's first column in the window
  int64_t row_stride_;
  int64_t width_;
  int64_t first_;
  int64_t begin_;
  int64_t end_;
  int64_t column_ = 0;
};

// Planes of which positions are adjacent: sixteen positions of sixteen planes at a time, however they lie in
// rows. The last sixteen overlap those before.
template <class T>
void copy_planes(const T* source, int64_t stride_unit, const View& view, int64_t row, int64_t row_end,
                 float* window) {
  const int64_t end = row_end * view.width;
  alignas(64) float square[kLanes * kLanes];
  Places places(view, row, window);
  for (int64_t first = row * view.width; first < end; first += kLanes) {
    const int64_t at = min(first, view.height * view.width - kLanes);
    transpose_positions(source + at, stride_unit, square);
    for (int64_t i = first; i < min(first + kLanes, end); ++i) places.put(load(square + (i - at) * kLanes));
  }
}

// Everything else, one position at a time; of the sixteen, count exist.
template <class T>
void copy_positions(const T* source, const Layout& layout, int count, const View& view, int64_t row,
                    int64_t row_end, float* window) {
  Places places(view, row, window);
  for (int64_t position = row * view.width; position < row_end * view.width; ++position) {
    const T* const from = source + position * layout.stride_position;
    if (layout.stride_unit == 1) {
      places.put(count == kLanes ? load(from) : load_first(from, count));
      continue;
    }
    float lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = lane < count ? to_float(from[lane * layout.stride_unit]) : 0.0f;
    }
    places.put(load(lanes));
  }
}

// source: position 0 of the first of count channels (units) of an image.
template <class T>
void fill_window(const T* source, const Layout& layout, int count, const View& view, float* window) {
  const int64_t row = max(0, view.row);
  const int64_t row_end = min(view.height, view.row + view.rows);
  const bool padded = view.row < 0 || view.row + view.rows > view.height || view.column < 0 ||
                      view.column + view.columns > view.width;
  if (padded) zero(window, view.rows * view.columns * kLanes);
  const bool whole = count == kLanes && view.height * view.width >= kLanes;
  if (layout.stride_position == 1 && layout.stride_unit != 1 && whole) {
    copy_planes(source, layout.stride_unit, view, row, row_end, window);
  } else {
    copy_positions(source, layout, count, view, row, row_end, window);
  }
}

}  // namespace
}  // namespace ghl::GHL_ISA
