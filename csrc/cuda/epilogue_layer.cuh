// A layer as the epilogue's kernels see it: who works on which rows, and how a row is read and written.
//
// A team of 1 to kThreads threads works on a row, a chunk of 16 bytes of weights for a thread at a time.
// Which thread adds up which elements depends on the length of a row alone, so that neither the layers beside
// it nor the alignment of the tensors change a bit of the result.
#pragma once

#include "cuda/device.cuh"
#include "cuda/dtype.cuh"
#include "cuda/ptx.cuh"
#include "ghl/foreach.h"

namespace ghl {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarp;

// That many threads, each with a few loads of 16 bytes on the way, cover the latency of memory.
constexpr unsigned kBlocksPerMultiprocessor = 4;

// Of a layer: enough to occupy the largest GPU, few enough for a block to read what each of them found.
constexpr int64_t kMaxBlocks = 1024;

constexpr unsigned kChunksPerThread = 2;

struct Layer {
  ForeachLayer given;
  int64_t first_row;       // of this layer in the workspace
  int64_t rows_per_block;  // a multiple of the teams of a block
  unsigned blocks;
  unsigned lanes;   // of a team, a power of two
  bool is_aligned;  // a chunk can be moved by 16-byte instructions
};

// The layers of one launch. They travel as its argument: nothing has to be copied to the device before, and a
// CUDA graph keeps them. 4 KiB serve every driver and most networks; the 32,764 bytes that newer ones take
// would be copied at each launch, one layer or many, to save a second launch for the few networks with more
// of them.
constexpr size_t kArgumentBytes = 4096;
constexpr int kLayersPerLaunch = 24;

struct Batch {
  Layer layers[kLayersPerLaunch];
  unsigned first_block[kLayersPerLaunch];
  int count;
  float* factors;    // per row of W, what the decay multiplies it by
  unsigned* maxima;  // per block, the bits of its largest |H|
};

// --- who works on what ----------------------------------------------------------------------------

__device__ __forceinline__ int find_layer(const Batch& batch, unsigned block) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Team {
  unsigned lanes;
  unsigned rank;   // of this thread
  unsigned index;  // of this team in the block

  __device__ explicit Team(unsigned size)
      : lanes(size), rank(threadIdx.x % size), index(threadIdx.x / size) {}
  __device__ unsigned in_block() const { return kThreads / lanes; }
};

// Combines the values of each team, in an order of its own, for all of its threads. Called by whole blocks.
template <class T, class Combine>
__device__ __forceinline__ T team_reduce(const Team& team, T value, Combine combine) {
  const unsigned in_warp = team.lanes < kWarp ? team.lanes : kWarp;
  for (unsigned distance = in_warp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, static_cast<int>(distance)));
  }
  if (team.lanes <= kWarp) return value;
  __shared__ T of_warp[kWarps];
  __syncthreads();  // the results of the last call have been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  const unsigned warps = team.lanes / kWarp, first = team.index * warps;
  value = of_warp[first];
  for (unsigned warp = 1; warp < warps; ++warp) value = combine(value, of_warp[first + warp]);
  return value;
}

__device__ __forceinline__ float team_sum(const Team& team, float value) {
  return team_reduce(team, value, [](float x, float y) { return x + y; });
}

__device__ __forceinline__ unsigned team_max(const Team& team, unsigned value) {
  return team_reduce(team, value, [](unsigned x, unsigned y) { return x > y ? x : y; });
}

// --- a row ----------------------------------------------------------------------------------------

// `count` elements, then zeros. Not by the read-only path: a kernel may write to them later.
template <class T, int size>
__device__ __forceinline__ void load_chunk(const T* source, int count, bool is_aligned,
                                           float (&value)[size]) {
  if (is_aligned && count == size) {
#pragma unroll
    for (int i = 0; i < size; i += Vector<T>::size) {
      const uint4 bits = *reinterpret_cast<const uint4*>(source + i);
      Vector<T> vector;
      __builtin_memcpy(&vector, &bits, sizeof vector);
#pragma unroll
      for (int j = 0; j < Vector<T>::size; ++j) value[i + j] = to_float(vector.element[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < size; ++i) value[i] = i < count ? to_float(source[i]) : 0.0f;
  }
}

template <class T, int size>
__device__ __forceinline__ void store_chunk(T* target, int count, bool is_aligned,
                                            const float (&value)[size]) {
  if (is_aligned && count == size) {
#pragma unroll
    for (int i = 0; i < size; i += Vector<T>::size) {
      Vector<T> vector;
#pragma unroll
      for (int j = 0; j < Vector<T>::size; ++j) vector.element[j] = from_float<T>(value[i + j]);
      uint4 bits;
      __builtin_memcpy(&bits, &vector, sizeof bits);
      ptx::st_global_v4_b32(target + i, bits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (i < count) target[i] = from_float<T>(value[i]);
    }
  }
}

template <class T>
__device__ __forceinline__ const T* row_of(const void* matrix, int64_t stride, int64_t row) {
  return static_cast<const T*>(matrix) + row * stride;
}

template <class T>
__device__ __forceinline__ T* row_of(void* matrix, int64_t stride, int64_t row) {
  return static_cast<T*>(matrix) + row * stride;
}

// One row of A and of W, T being W's type; no columns for a team that is beyond the last row.
template <class T>
class Row {
 public:
  static constexpr int kChunk = Vector<T>::size;
  using Chunk = float[kChunk];

  __device__ Row(const Layer& layer, int64_t row, bool is_inside)
      : layer_(layer),
        index_(row),
        columns_(is_inside ? layer.given.columns : 0),
        a_(row_of<float>(layer.given.a, layer.given.a_stride, row)),
        weight_(row_of<T>(layer.given.weight, layer.given.weight_stride, row)) {}

  // Calls body(first column, number of columns) for the chunks of this thread.
  template <class Body>
  __device__ __forceinline__ void for_chunks(const Team& team, Body body) const {
    const int64_t step = static_cast<int64_t>(team.lanes) * kChunk;
    for (int64_t column = static_cast<int64_t>(team.rank) * kChunk; column < columns_; column += step) {
      const int64_t left = columns_ - column;
      body(column, left < kChunk ? static_cast<int>(left) : kChunk);
    }
  }

  // What the decay multiplies W by. Called by whole blocks.
  __device__ __forceinline__ float factor(const Team& team) const {
    if (layer_.given.decay == Decay::none || layer_.given.decay == Decay::rows) {
      return decays() && columns_ > 0 ? layer_.given.row_decay[index_] : 0.0f;
    }
    float dot = 0.0f;
    for_chunks(team, [&](int64_t column, int count) {
      Chunk a, w;
      load_chunk(a_ + column, count, layer_.is_aligned, a);
      load_chunk(weight_ + column, count, layer_.is_aligned, w);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) dot = __fmaf_rn(a[i], w[i], dot);
    });
    return team_sum(team, dot);
  }

  // H before the norm, with one rounding, so that every kernel gets the same; and W where it is asked for.
  template <bool with_weight>
  __device__ __forceinline__ void update(int64_t column, int count, float factor, Chunk& h, Chunk& w) const {
    load_chunk(a_ + column, count, layer_.is_aligned, h);
    if (with_weight || decays()) load_chunk(weight_ + column, count, layer_.is_aligned, w);
    if (!decays()) return;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) h[i] = __fmaf_rn(-factor, w[i], h[i]);
  }

  // Of |H|, over this thread's chunks, as an integer of the same order: NaN is the largest and cannot get
  // lost.
  __device__ __forceinline__ unsigned maximum(const Team& team, float factor) const {
    unsigned largest = 0;
    for_chunks(team, [&](int64_t column, int count) {
      Chunk h, w;
      update<false>(column, count, factor, h, w);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const unsigned bits = __float_as_uint(h[i]) & 0x7fffffffu;
        // beyond the row 0 - factor * 0, which is NaN only where all of the row is
        largest = bits > largest ? bits : largest;
      }
    });
    return largest;
  }

 private:
  __device__ __forceinline__ bool decays() const { return layer_.given.decay != Decay::none; }

  const Layer& layer_;
  int64_t index_;
  int64_t columns_;
  const float* a_;
  const T* weight_;
};

// The divisor for a maximum; NaN where that is not finite, so that its whole scope becomes NaN.
__device__ __forceinline__ float finite_scale(unsigned maximum) {
  constexpr unsigned kInfinity = 0x7f800000u, kNan = 0x7fc00000u;
  return maximum < kInfinity ? __uint_as_float(maximum) + 1e-30f : __uint_as_float(kNan);
}

}  // namespace ghl
