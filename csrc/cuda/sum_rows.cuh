// The last step of every split sum: rows of a workspace added in a fixed order.
#pragma once

#include "cuda/device.cuh"

namespace ghl {

// A block of ways * kWarp threads adds columns_per_lane * kWarp columns.
template <int ways, int columns_per_lane>
struct RowSum {
  static constexpr int threads = ways * kWarp;
  static constexpr int columns = columns_per_lane * kWarp;

  // Adds row(0), ..., row(rows - 1), each the address of a row of `end` columns, in the columns from `first`
  // on, and calls store(column, sum). Way i adds the rows i, i + ways, ...; then the ways are added.
  template <class Row, class Store>
  static __device__ __forceinline__ void run(int64_t rows, int64_t first, int64_t end, Row row, Store store) {
    __shared__ float shared[ways][columns];
    const int lane = threadIdx.x % kWarp;
    const int way = threadIdx.x / kWarp;
    float sum[columns_per_lane] = {};
#pragma unroll 4
    for (int64_t r = way; r < rows; r += ways) {
      const float* from = row(r) + first;
#pragma unroll
      for (int i = 0; i < columns_per_lane; ++i) {
        const int column = lane + i * kWarp;
        if (first + column < end) sum[i] += from[column];
      }
    }
#pragma unroll
    for (int i = 0; i < columns_per_lane; ++i) shared[way][lane + i * kWarp] = sum[i];
    __syncthreads();
    for (int column = threadIdx.x; column < columns && first + column < end; column += threads) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < ways; ++i) total += shared[i][column];
      store(first + column, total);
    }
  }
};

}  // namespace ghl
