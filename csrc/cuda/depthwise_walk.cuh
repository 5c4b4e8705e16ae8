// Stepping through positions without a division: every thread takes each `step`-th of them.
#pragma once

#include "cuda/patch.cuh"
#include "ghl/pair.h"

namespace ghl {
namespace {

// A step split into the coordinates of a position.
struct PatchStep {
  int64_t item;
  int32_t out[3];
};

struct PatchWalk {
  int64_t item;
  int32_t out[3];
};

__device__ __forceinline__ PatchWalk patch_walk(const PatchGrid& grid, int64_t position) {
  PatchWalk walk;
  walk.item = split_position(grid, position, walk.out);
  return walk;
}

__device__ __forceinline__ void advance(PatchWalk& walk, const PatchStep& step, const PatchGrid& grid) {
  int32_t carry = 0;
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    // 0 <= out - out_size + step + carry < out_size where it carries: no sum beyond 31 bits
    const int32_t next = walk.out[i] - grid.out_size[i] + (step.out[i] + carry);
    carry = next >= 0;
    walk.out[i] = carry ? next : next + grid.out_size[i];
  }
  walk.item += step.item + carry;
}

inline PatchStep patch_step(const ConvGeometry& geometry, int64_t step) {
  PatchStep result{};
  for (int i = 2; i >= 0; --i) {
    const int64_t size = geometry.out_size[i] > 0 ? geometry.out_size[i] : 1;
    result.out[i] = static_cast<int32_t>(step % size);
    step /= size;
  }
  result.item = step;
  return result;
}

// Where the rows of u or dL/du lie.
struct RowStep {
  int64_t inner;
  int64_t stride_batch;
  int64_t stride_position;
  int64_t offset;  // of a step that stays within an item
  int64_t rest;    // positions of a step that are no whole items
  int64_t carry;   // more, where the step goes on to the next item
};

struct RowWalk {
  int64_t offset;
  int64_t rest;  // position within the item
};

__device__ __forceinline__ RowWalk row_walk(const RowStep& step, int64_t position) {
  const int64_t item = divide(position, step.inner);
  const int64_t rest = position - item * step.inner;
  return {item * step.stride_batch + rest * step.stride_position, rest};
}

__device__ __forceinline__ void advance(RowWalk& walk, const RowStep& step) {
  walk.offset += step.offset;
  walk.rest += step.rest;
  if (walk.rest >= step.inner) {
    walk.rest -= step.inner;
    walk.offset += step.carry;
  }
}

inline RowStep row_step(const Responses& rows, int64_t step) {
  const int64_t items = step / rows.inner;
  const int64_t rest = step % rows.inner;
  return {rows.inner,
          rows.stride_batch,
          rows.stride_position,
          items * rows.stride_batch + rest * rows.stride_position,
          rest,
          rows.stride_batch - rows.inner * rows.stride_position};
}

}  // namespace
}  // namespace ghl
