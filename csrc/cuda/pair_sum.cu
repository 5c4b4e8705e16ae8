#include <algorithm>

#include "cuda/pair.cuh"
#include "cuda/pair_sum.h"

namespace ghl {
namespace {

constexpr int kThreads = 256;
constexpr int kMostTeams = 8;

struct SumParams {
  const float* parts;
  int32_t number;
  int64_t elements;  // of a part
  int32_t teams;     // that share an element, each with every teams-th part
  int32_t first_tile;
  int32_t unit_blocks;
  int32_t column_blocks;
  int32_t tile_rows;
  int32_t tile_half;
  int32_t tile_columns;
  bool one_result;
  int32_t units;    // of a group
  int32_t columns;  // of a group
  Divisor channels;
  float* out[2];  // of the halves
  Filters layout;
  int64_t result_channels;
};

// Where an element of the tiles belongs; null where the tile reaches beyond the result.
__device__ __forceinline__ float* target_of(const SumParams& params, int64_t element) {
  const int tile_size = params.tile_rows * params.tile_columns;
  const int in_tile = static_cast<int>(element % tile_size);
  const int row = in_tile / params.tile_columns, half = row / params.tile_half;
  const int tile = params.first_tile + static_cast<int>(element / tile_size);
  const int unit_block = tile % params.unit_blocks;
  const int column_block = tile / params.unit_blocks % params.column_blocks;
  const int64_t group = tile / params.unit_blocks / params.column_blocks;
  // the halves of one result are neighboring units
  const int unit = params.one_result ? unit_block * params.tile_rows + row
                                     : unit_block * params.tile_half + row % params.tile_half;
  const int column = column_block * params.tile_columns + in_tile % params.tile_columns;
  const int64_t tap = params.channels.divide(column);
  const int64_t channel = column - tap * params.channels.value;
  if (unit >= params.units || column >= params.columns || channel >= params.result_channels) return nullptr;
  const Filters& layout = params.layout;
  return params.out[half] + (group * params.units + unit) * layout.stride_unit +
         channel * layout.stride_channel + tap * layout.stride_tap;
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumParams params) {
  __shared__ float sums[kThreads];
  const int width = kThreads / params.teams;  // elements of a block
  const int thread = static_cast<int>(threadIdx.x);
  const int team = thread / width;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * width + thread % width;
  float* const target = target_of(params, element);
  // the others have no products either: warps without units or columns leave their share of a part unwritten
  const int parts = target ? params.number : 0;
  float sum = 0.0f;
#pragma unroll 8
  for (int part = team; part < parts; part += params.teams) {
    sum += __ldg(params.parts + part * params.elements + element);
  }
  sums[thread] = sum;
  __syncthreads();
  if (team != 0 || !target) return;
  for (int other = 1; other < params.teams; ++other) sum += sums[other * width + thread];
  *target = sum;
}

}  // namespace

Status pair_sum_tiles(const PairParams& params, const PartTiles& tiles, Stream stream) {
  const int64_t elements = tiles.tiles * tiles.rows * tiles.columns;
  int teams = 1;
  while (teams < kMostTeams && 16 * teams <= tiles.parts) teams *= 2;
  const SumParams sum{static_cast<const float*>(params.workspace),
                      static_cast<int32_t>(tiles.parts),
                      elements,
                      teams,
                      static_cast<int32_t>(tiles.first_tile),
                      static_cast<int32_t>(tiles.unit_blocks),
                      static_cast<int32_t>(tiles.column_blocks),
                      tiles.rows,
                      tiles.half,
                      tiles.columns,
                      pair_results(params) == 1,
                      static_cast<int32_t>(params.units / params.geometry.groups),
                      static_cast<int32_t>(params.geometry.taps() * tiles.channels),
                      Divisor(tiles.channels),
                      {params.g ? params.g : params.a, params.a ? params.a : params.g},
                      params.result_layout,
                      params.result_channels};
  const Grid grid{elements * teams / kThreads, kThreads, 0};
  return launch(pair_shape(params) + ", sum of the parts", sum_kernel, grid, stream, sum);
}

std::string pair_shape(const PairParams& params) {
  const ConvGeometry& geometry = params.geometry;
  const char* dtype = params.dtype == DType::bf16  ? "bfloat16"
                      : params.dtype == DType::f16 ? "float16"
                                                   : "float32";
  const char* results = pair_results(params) == 2 ? "A and G" : params.a ? "A" : "G";
  return std::string(results) + " of " + std::to_string(params.units) + " units over " +
         std::to_string(params.geometry.taps()) + " taps of " +
         std::to_string(params.geometry.group_channels()) + " channels in " +
         std::to_string(geometry.groups) + " groups at " + std::to_string(params.geometry.positions()) +
         " positions, " + dtype;
}

}  // namespace ghl
