// From the sums to the weights, for many layers: decay, norm, then gate, store, learn, or a step of SGD.
//
// The norm of a layer takes two kernels: `reduce` leaves the decay factor of every row and the largest |H| of
// every block, `apply` makes H again and uses it. The other norms end with the row, and `apply` does them
// alone.
#include <algorithm>
#include <string>

#include "cuda/device.cuh"
#include "cuda/dtype.cuh"
#include "cuda/epilogue_layer.cuh"
#include "cuda/launch.cuh"
#include "ghl/foreach.h"

namespace ghl {
namespace {

// Calls body(row, whether it is one, team) for this block's rows, as many at a time as the block has teams.
template <class Body>
__device__ __forceinline__ void for_rows(const Layer& layer, unsigned block, Body body) {
  const Team team(layer.lanes);
  const int64_t begin = block * layer.rows_per_block;
  const int64_t end = min(begin + layer.rows_per_block, layer.given.rows);
  for (int64_t row = begin; row < end; row += team.in_block()) {
    const int64_t mine = row + team.index;
    body(mine < end ? mine : begin, mine < end, team);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    reduce(const __grid_constant__ Batch batch) {
  const int index = find_layer(batch, blockIdx.x);
  const Layer& layer = batch.layers[index];
  if (layer.given.normalize != Normalize::layer) return;
  const unsigned block = blockIdx.x - batch.first_block[index];
  unsigned largest = 0;
  for_rows(layer, block, [&](int64_t index_of_row, bool is_inside, const Team& team) {
    const Row<T> row(layer, index_of_row, is_inside);
    const float factor = row.factor(team);
    if (is_inside && team.rank == 0) batch.factors[layer.first_row + index_of_row] = factor;
    const unsigned maximum = row.maximum(team, factor);
    largest = maximum > largest ? maximum : largest;
  });
  largest = team_max(Team(kThreads), largest);
  if (threadIdx.x == 0) batch.maxima[layer.first_row + block] = largest;
}

// What all rows of a layer are divided by. Called by whole blocks.
__device__ __forceinline__ float layer_divisor(const Batch& batch, const Layer& layer) {
  if (layer.given.normalize == Normalize::layer) {
    unsigned largest = 0;
    for (unsigned i = threadIdx.x; i < layer.blocks; i += kThreads) {
      const unsigned maximum = batch.maxima[layer.first_row + i];
      largest = maximum > largest ? maximum : largest;
    }
    return finite_scale(team_max(Team(kThreads), largest));
  }
  if (layer.given.positions == nullptr) return 1.0f;
  const float positions = *layer.given.positions;
  return positions < 1.0f ? 1.0f : positions;  // not fmaxf, which would hide a NaN
}

// --- what becomes of H ------------------------------------------------------------------------------

__device__ __forceinline__ float gated(float h, float g) {
  const float sign = g > 0.0f ? 1.0f : (g < 0.0f ? -1.0f : 0.0f);
  return fabsf(h) * sign + (g - g);
}

// What all kinds of use say: which tensors they need, and what is written where h, w, g and m are.
struct Store {
  template <class T>
  using Out = float;
  static constexpr bool kWeight = false, kGradient = false, kMomentum = false;

  __device__ float operator()(const ForeachLayer&, float h, float, float, float&) const { return h; }
};

struct Gate {
  template <class T>
  using Out = T;
  static constexpr bool kWeight = false, kGradient = true, kMomentum = false;

  __device__ float operator()(const ForeachLayer&, float h, float, float g, float&) const {
    return gated(h, g);
  }
};

struct Learn {
  template <class T>
  using Out = T;
  static constexpr bool kWeight = true, kGradient = false, kMomentum = false;
  float rate;

  __device__ float operator()(const ForeachLayer&, float h, float w, float, float&) const {
    return __fmaf_rn(rate, h, w);
  }
};

struct Sgd {
  template <class T>
  using Out = T;
  static constexpr bool kWeight = true, kGradient = true, kMomentum = true;
  float rate, momentum, gain, weight_decay;
  bool nesterov, maximize;

  __device__ float operator()(const ForeachLayer& layer, float h, float w, float g, float& m) const {
    float d = layer.is_gated ? gated(h, g) : -h;
    if (maximize) d = -d;
    if (weight_decay != 0.0f) d = __fmaf_rn(weight_decay, w, d);
    if (layer.momentum != nullptr) {
      m = layer.begins_momentum ? d : __fmaf_rn(momentum, m, gain * d);
      d = nesterov ? __fmaf_rn(momentum, m, d) : m;
    }
    return __fmaf_rn(-rate, d, w);
  }
};

template <class Use>
struct ApplyParams {
  Batch batch;
  Use use;
};

template <class T, class Use>
__device__ __forceinline__ void write_row(const Layer& layer, const Use& use, const Row<T>& row,
                                          int64_t index, float factor, float divisor, const Team& team) {
  constexpr int kChunk = Row<T>::kChunk;
  const ForeachLayer& given = layer.given;
  auto* const out = row_of<typename Use::template Out<T>>(given.out, given.out_stride, index);
  const T* const gradient = row_of<T>(given.gradient, given.gradient_stride, index);
  T* const momentum = row_of<T>(given.momentum, given.momentum_stride, index);
  row.for_chunks(team, [&](int64_t column, int count) {
    float h[kChunk], w[kChunk] = {}, g[kChunk] = {}, m[kChunk] = {};
    row.template update<Use::kWeight>(column, count, factor, h, w);
    if (Use::kGradient && given.is_gated) load_chunk(gradient + column, count, layer.is_aligned, g);
    if (Use::kMomentum && given.momentum != nullptr && !given.begins_momentum) {
      load_chunk(momentum + column, count, layer.is_aligned, m);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) h[i] = use(given, h[i] / divisor, w[i], g[i], m[i]);
    store_chunk(out + column, count, layer.is_aligned, h);
    if (Use::kMomentum && given.momentum != nullptr) {
      store_chunk(momentum + column, count, layer.is_aligned, m);
    }
  });
}

template <class T, class Use>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    apply(const __grid_constant__ ApplyParams<Use> params) {
  const Batch& batch = params.batch;
  const int index = find_layer(batch, blockIdx.x);
  const Layer& layer = batch.layers[index];
  const Normalize normalize = layer.given.normalize;
  const float divisor_of_all = layer_divisor(batch, layer);
  const unsigned block = blockIdx.x - batch.first_block[index];
  for_rows(layer, block, [&](int64_t index_of_row, bool is_inside, const Team& team) {
    const Row<T> row(layer, index_of_row, is_inside);
    const float factor =
        normalize == Normalize::layer ? batch.factors[layer.first_row + index_of_row] : row.factor(team);
    float divisor = divisor_of_all;
    if (normalize == Normalize::filter) divisor = finite_scale(team_max(team, row.maximum(team, factor)));
    write_row(layer, params.use, row, index_of_row, factor, divisor, team);
  });
}

// --- launching ----------------------------------------------------------------------------------------

// A matrix whose chunks all begin at a multiple of 16 bytes, or one that is not there.
template <class T>
bool is_aligned(const void* matrix, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && (rows == 1 || stride % Vector<T>::size == 0);
}

template <class T, class Out>
Layer planned(const ForeachLayer& given, int64_t first_row) {
  const int64_t rows = given.rows;
  Layer layer{};
  layer.given = given;
  layer.first_row = first_row;
  layer.is_aligned = is_aligned<float>(given.a, given.a_stride, rows) &&
                     is_aligned<T>(given.weight, given.weight_stride, rows) &&
                     is_aligned<Out>(given.out, given.out_stride, rows) &&
                     is_aligned<T>(given.gradient, given.gradient_stride, rows) &&
                     is_aligned<T>(given.momentum, given.momentum_stride, rows);
  const int64_t chunks = divide_up<int64_t>(given.columns, Row<T>::kChunk);
  layer.lanes = 1;
  while (layer.lanes < kThreads && layer.lanes * kChunksPerThread < chunks) layer.lanes *= 2;
  const int64_t teams = kThreads / layer.lanes;
  layer.rows_per_block = divide_up(divide_up(rows, teams), kMaxBlocks) * teams;
  layer.blocks = static_cast<unsigned>(divide_up(rows, layer.rows_per_block));
  return layer;
}

// "gate_ of [64, 576], [10, 64]"
std::string describe(const char* name, const Batch& batch) {
  std::string what = name;
  for (int i = 0; i < batch.count; ++i) {
    const ForeachLayer& given = batch.layers[i].given;
    what += std::string(i == 0 ? " of [" : ", [") + std::to_string(given.rows) + ", " +
            std::to_string(given.columns) + "]";
  }
  return what;
}

template <class T, class Use>
Status launch_batch(const char* name, const ApplyParams<Use>& params, Stream stream) {
  static_assert(sizeof params <= kArgumentBytes);
  const Batch& batch = params.batch;
  const int last = batch.count - 1;
  const Grid grid{batch.first_block[last] + batch.layers[last].blocks, kThreads, 0};
  const bool reduces = std::any_of(batch.layers, batch.layers + batch.count, [](const Layer& layer) {
    return layer.given.normalize == Normalize::layer;
  });
  if (reduces && !batch.factors) return Status::failure(describe(name, batch) + ": no workspace");
  Status status;
  if (reduces) status = launch("", reduce<T>, grid, stream, batch);
  if (status.ok) status = launch("", apply<T, Use>, grid, stream, params);
  // not before: naming many layers takes longer than queueing them
  if (!status.ok) status.message = describe(name, batch) + status.message;
  return status;
}

template <class T, class Use>
Status run(const char* name, const ForeachParams& params, const Use& use, Stream stream) {
  if (params.count == 0) return {};
  int64_t rows = 0;
  for (int64_t i = 0; i < params.count; ++i) rows += params.layers[i].rows;
  ApplyParams<Use> next{{}, use};
  Batch& batch = next.batch;
  batch.factors = params.workspace;
  batch.maxima = reinterpret_cast<unsigned*>(params.workspace + rows);
  int64_t first_row = 0;
  unsigned blocks = 0;
  for (int64_t i = 0; i < params.count; ++i) {
    const ForeachLayer& given = params.layers[i];
    if (given.rows > 0 && given.columns > 0) {
      const Layer layer = planned<T, typename Use::template Out<T>>(given, first_row);
      batch.first_block[batch.count] = blocks;
      batch.layers[batch.count++] = layer;
      blocks += layer.blocks;
      first_row += given.rows;
    }
    if (batch.count == kLayersPerLaunch || (batch.count > 0 && i + 1 == params.count)) {
      const Status status = launch_batch<T>(name, next, stream);
      if (!status.ok) return status;
      batch.count = 0;
      blocks = 0;
    }
  }
  return {};
}

}  // namespace

Status foreach_epilogue_cuda(const ForeachParams& params, Stream stream) {
  return by_dtype(params.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    switch (params.target) {
      case Target::gate:
        return run<T>("gate_", params, Gate{}, stream);
      case Target::learn:
        return run<T>("learn_", params, Learn{params.rate}, stream);
      default:
        return run<T>("delta", params, Store{}, stream);
    }
  });
}

Status gated_sgd_cuda(const GatedSgdParams& params, Stream stream) {
  const Sgd use{params.foreach.rate, params.momentum, params.gain,
                params.weight_decay, params.nesterov, params.maximize};
  return by_dtype(params.foreach.dtype, [&](auto* element) {
    return run<std::remove_pointer_t<decltype(element)>>("gated_sgd_", params.foreach, use, stream);
  });
}

}  // namespace ghl
