// From the correlation A to the gated gradient, the local update or the new weight, row by row:
//
//   coefficient_n = <W_n, A_n>    H = A - coefficient_n W_n    H <- H / (max |H| + 1e-30)
//
// A norm over the layer takes two passes over the weights: the coefficients and the maximum, then H again
// and the target. Everything else takes one, with the row in L1 after its first reading.
#include "ghl/epilogue.h"

#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/row.h"
#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace ghl::GHL_ISA {
namespace {

// Elements of a dot product summed in registers before they join the second-level sum.
constexpr int64_t kFlush = 256;

// Below this many weights a thread, starting it costs more than it saves.
constexpr int64_t kWeightsPerThread = 8192;

constexpr float kEpsilon = 1e-30f;

// A unit's weights in the order they are worked on, [outer, inner]: channels and taps, or, where out is
// channels_last, taps and channels.
struct RowShape {
  int64_t outer;
  int64_t inner;
  bool taps_inner;

  int64_t size() const { return outer * inner; }
};

struct RowLayout {
  int64_t stride_unit;
  int64_t stride_outer;
  int64_t stride_inner;
};

RowLayout layout_of(const Filters& filters, const RowShape& shape) {
  if (shape.taps_inner) return {filters.stride_unit, filters.stride_channel, filters.stride_tap};
  return {filters.stride_unit, filters.stride_tap, filters.stride_channel};
}

bool is_contiguous(const RowLayout& layout, const RowShape& shape) {
  return (shape.inner == 1 || layout.stride_inner == 1) &&
         (shape.outer == 1 || layout.stride_outer == shape.inner);
}

RowShape shape_of(const EpilogueParams& params) {
  const RowShape channels_last{params.taps, params.channels, false};
  if (is_contiguous(layout_of(params.out_layout, channels_last), channels_last)) return channels_last;
  return {params.channels, params.taps, true};
}

template <class T>
void gather(const T* source, const RowLayout& layout, const RowShape& shape, T* row) {
  for (int64_t o = 0; o < shape.outer; ++o) {
    for (int64_t i = 0; i < shape.inner; ++i)
      *row++ = source[o * layout.stride_outer + i * layout.stride_inner];
  }
}

template <class T>
void scatter(const T* row, const RowLayout& layout, const RowShape& shape, T* target) {
  for (int64_t o = 0; o < shape.outer; ++o) {
    for (int64_t i = 0; i < shape.inner; ++i)
      target[o * layout.stride_outer + i * layout.stride_inner] = *row++;
  }
}

// The rows of one tensor: used in place where they are contiguous, else through a buffer.
template <class T>
class Rows {
 public:
  Rows(const void* data, const Filters& filters, const RowShape& shape)
      : data_(static_cast<const T*>(data)), layout_(layout_of(filters, shape)), shape_(shape) {}

  bool in_place() const { return is_contiguous(layout_, shape_); }
  const T* at(int64_t unit) const { return data_ + unit * layout_.stride_unit; }

  const T* read(int64_t unit, float* buffer) const {
    if (in_place()) return at(unit);
    gather(at(unit), layout_, shape_, reinterpret_cast<T*>(buffer));
    return reinterpret_cast<T*>(buffer);
  }
  void write(int64_t unit, const T* row) const {
    if (!in_place()) scatter(row, layout_, shape_, const_cast<T*>(at(unit)));
  }

 private:
  const T* data_;
  RowLayout layout_;
  RowShape shape_;
};

template <>
class Rows<void> {
 public:
  Rows(const void*, const Filters&, const RowShape&) {}
  const void* read(int64_t, float*) const { return nullptr; }
};

// Everything the kernel keeps, carved from the caller's workspace.
struct Workspace {
  float* coefficient;  // [units]
  int32_t* maximum;    // [slices] bits of the largest |H|
  float* buffer;       // [slices, 3, row] for the rows of A, W and out that are not contiguous
  int64_t buffer_stride;
  int64_t bytes;
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Workspace carve(const EpilogueParams& params, int slices, void* base) {
  char* const begin = static_cast<char*>(base);
  const int64_t coefficients = aligned(params.units * static_cast<int64_t>(sizeof(float)));
  const int64_t maxima = aligned(slices * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t row = aligned(params.channels * params.taps * static_cast<int64_t>(sizeof(float)));
  Workspace ws{};
  ws.bytes = coefficients + maxima + 3 * slices * row;
  ws.buffer_stride = row / static_cast<int64_t>(sizeof(float));
  if (base == nullptr) return ws;
  ws.coefficient = reinterpret_cast<float*>(begin);
  ws.maximum = reinterpret_cast<int32_t*>(begin + coefficients);
  ws.buffer = reinterpret_cast<float*>(begin + coefficients + maxima);
  return ws;
}

// ---- One row ----

template <class W>
float dot(const float* a, const W* weight, int64_t size) {
  Floats total = {};
  for (int64_t begin = 0; begin < size; begin += kFlush) {
    Floats sum = {};
    for_vectors(begin, min(size, begin + kFlush), [&](auto whole, int64_t i, int lanes) {
      sum = multiply_add(load_lanes<whole>(a + i, lanes), load_lanes<whole>(weight + i, lanes), sum);
    });
    total += sum;
  }
  return sum_lanes(total);
}

// H before its norm. W is void where there is no decay.
template <bool kWhole, class W>
GHL_INLINE Floats local_update(const float* a, const W* weight, float coefficient, int64_t i, int lanes) {
  const Floats correlation = load_lanes<kWhole>(a + i, lanes);
  if constexpr (std::is_void_v<W>) {
    return correlation;
  } else {
    return multiply_add(broadcast(-coefficient), load_lanes<kWhole>(weight + i, lanes), correlation);
  }
}

// The largest |H| as bits: as integers, infinities and NaN lie above all numbers, so none is lost.
template <class W>
int32_t max_magnitude(const float* a, const W* weight, float coefficient, int64_t size) {
  Ints largest = broadcast(int32_t{0});
  for_vectors(0, size, [&](auto whole, int64_t i, int lanes) {
    const Ints bits = float_bits(magnitude(local_update<whole>(a, weight, coefficient, i, lanes)));
    largest = select(bits > largest, bits, largest);
  });
  int32_t lane[kLanes];
  std::memcpy(lane, &largest, sizeof(lane));
  int32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result = lane[i] > result ? lane[i] : result;
  return result;
}

float divisor(int32_t max_bits) {
  constexpr int32_t kInfinity = 0x7f800000;
  if (max_bits >= kInfinity) return __builtin_nanf("");
  float largest;
  std::memcpy(&largest, &max_bits, sizeof(largest));
  return largest + kEpsilon;
}

// sign(0) is 0, and what is not finite becomes NaN.
GHL_INLINE Floats gated(Floats update, Floats gradient) {
  const Floats zero = broadcast(0.0f);
  const Floats sign =
      select(gradient > zero, broadcast(1.0f), select(gradient < zero, broadcast(-1.0f), zero));
  return multiply_add(magnitude(update), sign, gradient - gradient);
}

template <Target kTarget, class W, class Out>
void write_row(const float* a, const W* weight, float coefficient, float scale, float norm, float rate,
               int64_t size, Out* out) {
  for_vectors(0, size, [&](auto whole, int64_t i, int lanes) {
    const Floats raw = local_update<whole>(a, weight, coefficient, i, lanes);
    const Floats update = raw * broadcast(scale) / broadcast(norm);
    Floats result = update;
    if constexpr (kTarget == Target::gate) result = gated(update, load_lanes<whole>(out + i, lanes));
    if constexpr (kTarget == Target::learn) {
      result = multiply_add(broadcast(rate), update, load_lanes<whole>(out + i, lanes));
    }
    store_lanes<whole>(out + i, result, lanes);
  });
}

// ---- All rows ----

template <Target kTarget, class W, class Out>
class Epilogue {
 public:
  Epilogue(const EpilogueParams& params, const Workspace& ws)
      : params_(params),
        ws_(ws),
        shape_(shape_of(params)),
        a_(params.a, params.a_layout, shape_),
        weight_(params.weight, params.weight_layout, shape_),
        out_(params.out, params.out_layout, shape_) {}

  void run(int threads) const {
    if (params_.normalize == Normalize::layer) {
      const float norm = divisor(measure(threads));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
      for (int slice = 0; slice < threads; ++slice) {
        // Backwards: the rows measured last are still in cache.
        for (int64_t n = end_of(slice, threads); n-- > end_of(slice - 1, threads);) {
          finish(n, read(n, slice), ws_.coefficient[n], norm, slice);
        }
      }
      return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int slice = 0; slice < threads; ++slice) {
      for (int64_t n = end_of(slice - 1, threads); n < end_of(slice, threads); ++n) {
        const Row row = read(n, slice);
        const float decay = coefficient(n, row);
        const bool filter = params_.normalize == Normalize::filter;
        const float norm = filter ? divisor(max_magnitude(row.a, row.weight, decay, shape_.size())) : 1.0f;
        finish(n, row, decay, norm, slice);
      }
    }
  }

 private:
  struct Row {
    const float* a;
    const W* weight;
  };

  int64_t end_of(int slice, int slices) const { return params_.units * (slice + 1) / slices; }
  float* buffer(int slice, int which) const { return ws_.buffer + (3 * slice + which) * ws_.buffer_stride; }

  Row read(int64_t n, int slice) const {
    return {a_.read(n, buffer(slice, 0)), weight_.read(n, buffer(slice, 1))};
  }

  float coefficient(int64_t n, const Row& row) const {
    if constexpr (std::is_void_v<W>) {
      return 0.0f;
    } else {
      return params_.decay == Decay::oja ? dot(row.a, row.weight, shape_.size()) : params_.row_decay[n];
    }
  }

  // Keeps the coefficients; returns the bits of the layer's largest |H|.
  int32_t measure(int threads) const {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int slice = 0; slice < threads; ++slice) {
      int32_t largest = 0;
      for (int64_t n = end_of(slice - 1, threads); n < end_of(slice, threads); ++n) {
        const Row row = read(n, slice);
        ws_.coefficient[n] = coefficient(n, row);
        const int32_t bits = max_magnitude(row.a, row.weight, ws_.coefficient[n], shape_.size());
        largest = bits > largest ? bits : largest;
      }
      ws_.maximum[slice] = largest;
    }
    int32_t largest = 0;
    for (int slice = 0; slice < threads; ++slice) {
      largest = ws_.maximum[slice] > largest ? ws_.maximum[slice] : largest;
    }
    return largest;
  }

  void finish(int64_t n, const Row& row, float decay, float norm, int slice) const {
    const float scale = params_.normalize == Normalize::constant ? params_.scale : 1.0f;
    Out* const out = const_cast<Out*>(out_.read(n, buffer(slice, 2)));
    write_row<kTarget>(row.a, row.weight, decay, scale, norm, params_.rate, shape_.size(), out);
    out_.write(n, out);
  }

  const EpilogueParams& params_;
  const Workspace& ws_;
  const RowShape shape_;
  const Rows<float> a_;
  const Rows<W> weight_;
  const Rows<Out> out_;
};

template <class W, class Out>
void run_target(const EpilogueParams& params, const Workspace& ws, int threads) {
  switch (params.target) {
    case Target::gate:
      return Epilogue<Target::gate, W, Out>(params, ws).run(threads);
    case Target::delta:
      return Epilogue<Target::delta, W, Out>(params, ws).run(threads);
    case Target::learn:
      return Epilogue<Target::learn, W, Out>(params, ws).run(threads);
  }
}

template <class W>
void run_out(const EpilogueParams& params, const Workspace& ws, int threads) {
  if (params.out_dtype == DType::f32) return run_target<W, float>(params, ws, threads);
  run_target<W, BFloat16>(params, ws, threads);
}

}  // namespace

int64_t epilogue_workspace(const EpilogueParams& params, int threads) {
  return carve(params, threads, nullptr).bytes;
}

void epilogue(const EpilogueParams& params, int threads) {
  const Workspace ws = carve(params, threads, params.workspace);
  const int64_t weights = params.units * params.channels * params.taps;
  const int used = static_cast<int>(min(threads, 1 + weights / kWeightsPerThread));
  if (params.decay == Decay::none) return run_out<void>(params, ws, used);
  if (params.weight_dtype == DType::f32) return run_out<float>(params, ws, used);
  run_out<BFloat16>(params, ws, used);
}

}  // namespace ghl::GHL_ISA
