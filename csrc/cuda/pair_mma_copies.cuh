// The pair by mma.sync: u, dL/du and x on their way into shared memory.
#pragma once

#include "cuda/pair_mma_block.cuh"

namespace ghl {
namespace {

template <class C>
__device__ __forceinline__ void place_columns(const Block<C>& block) {
  for (int i = block.thread; i < C::kColumns; i += C::kThreads) {
    const int column = block.first_column + i;
    Place place = block.params.patches.column(column);
    if (column >= block.params.columns) place.at[0] = kNowhere;
    block.columns[i] = place;
  }
}

// A warp each for x and the two halves, since a position costs several divisions.
template <class C>
__device__ __forceinline__ void place_positions(const Block<C>& block, int step) {
  const KernelParams& params = block.params;
  Places<C::kPositions>& places = block.places[step & 1];
  if (block.lane >= C::kPositions) return;
  const int warp = block.thread / static_cast<int>(kWarp);
  const bool exists = block.positions_left(step, block.lane) > 0;
  const int64_t position = exists ? block.position_of(step, block.lane) : 0;
  const int64_t group = block.group;
  if (warp == 0) {
    const Place place = params.patches.patch(position);
    const int64_t group_offset = group * params.patches.channels.value * params.patches.stride_channel;
    places.x[block.lane] = {place.offset + group_offset,
                            {exists ? place.at[0] : kNowhere, place.at[1], place.at[2]}};
  } else if (warp <= 2) {
    const Left& left = params.left[warp - 1];
    const int64_t item = left.inner.divide(position);
    const int64_t within = position - item * left.inner.value;
    places.left[warp - 1][block.lane] =
        item * left.stride_batch + within * left.stride_position + group * params.units * left.stride_unit;
  }
}

// The states travel a step ahead of the tile whose u they belong to.
template <class C>
__device__ __forceinline__ void copy_states(const Block<C>& block, int step, int stage) {
  static_assert(4 * C::kPositions <= C::kThreads);
  if (block.thread >= 4 * C::kPositions) return;
  const StatePointers& state = block.params.state;
  const int field = block.thread / C::kPositions, position = block.thread % C::kPositions;
  const void* source = state.first;
  if (field == 0) source = state.threshold;
  if (field == 1) source = state.cut;
  if (field == 2) source = state.logsumexp;
  const bool exists = source && block.positions_left(step, position) > 0;
  ptx::cp_async_ca_4(reinterpret_cast<uint32_t*>(block.states + stage) + block.thread,
                     static_cast<const char*>(source) + 4 * block.position_of(step, position),
                     exists ? 4 : 0);
}

// The element at an address, or zero.
template <class Element>
__device__ __forceinline__ Element element_at(const char* address, bool exists) {
  return exists ? *reinterpret_cast<const Element*>(address) : Element{};
}

template <class C, Access kAccess>
__device__ __forceinline__ void copy_half_by(const Block<C>& block, int h, int step, int stage) {
  using Element = typename C::Element;
  const Left& left = block.params.left[h];
  const int64_t* rows = block.places[step & 1].left[h];
  char* tile = block.tile(stage) + h * C::kHalfBytes;
#pragma unroll 1
  for (int i = 0; i < C::kHalfChunks / C::kThreads; ++i) {
    const Chunk chunk = chunk_of<C, kAccess == Access::planes>(block.thread + i * C::kThreads);
    const int unit = block.first_unit(h) + chunk.unit;
    const bool exists = block.positions_left(step, chunk.position) > 0 && unit < block.params.units;
    const char* row = left.data + rows[chunk.position];
    if constexpr (kAccess == Access::plain) {
      Vector<Element> values;
#pragma unroll
      for (int e = 0; e < C::kVector; ++e) {
        const char* address = row + (unit + e) * left.stride_unit;
        values.element[e] = element_at<Element>(address, exists && unit + e < block.params.units);
      }
      *reinterpret_cast<Vector<Element>*>(tile + chunk.offset) = values;
    } else {
      const char* source = row + (kAccess == Access::rows ? unit * C::kSize : unit * left.stride_unit);
      ptx::cp_async_cg_16(tile + chunk.offset, source, exists ? 16 : 0);
    }
  }
}

template <class C>
__device__ __forceinline__ void copy_half(const Block<C>& block, int h, int step, int stage) {
  switch (block.params.left[h].access) {
    case Access::rows:
      return copy_half_by<C, Access::rows>(block, h, step, stage);
    case Access::planes:
      return copy_half_by<C, Access::planes>(block, h, step, stage);
    default:
      return copy_half_by<C, Access::plain>(block, h, step, stage);
  }
}

template <class C>
__device__ __forceinline__ Place place_in_x(const Block<C>& block, int step, int position) {
  const auto at = block.places[step & 1].x[position];
  return {at.offset, {at.at[0], at.at[1], at.at[2]}};
}

// The columns of a chunk lie in one tap; `column` is the first.
template <class C>
__device__ __forceinline__ void copy_x_vectors(const Block<C>& block, int step, int stage,
                                               const Place& column) {
  const char* data = block.params.x + column.offset;
  const int chunk = block.thread % C::kColumnChunks;
  constexpr int kRows = C::kThreads / C::kColumnChunks;
#pragma unroll
  for (int i = 0; i < C::kPositions / kRows; ++i) {
    const int position = block.thread / C::kColumnChunks + i * kRows;
    const Place place = place_in_x(block, step, position);
    const bool inside = block.params.patches.inside(place, column);
    ptx::cp_async_cg_16(block.x_tile(stage) + C::row_chunk(position, chunk, C::kColumnChunks),
                        data + place.offset, inside ? 16 : 0);
  }
}

template <class C>
__device__ __forceinline__ void copy_x_elements(const Block<C>& block, int step, int stage) {
  using Element = typename C::Element;
  const int position = block.thread % C::kPositions;
  const Place place = place_in_x(block, step, position);
#pragma unroll 1
  for (int chunk = block.thread / C::kPositions; chunk < C::kColumnChunks;
       chunk += C::kThreads / C::kPositions) {
    Vector<Element> values;
#pragma unroll
    for (int e = 0; e < C::kVector; ++e) {
      const Place column = block.columns[chunk * C::kVector + e];
      values.element[e] = element_at<Element>(block.params.x + place.offset + column.offset,
                                              block.params.patches.inside(place, column));
    }
    const int offset = C::row_chunk(position, chunk, C::kColumnChunks);
    *reinterpret_cast<Vector<Element>*>(block.x_tile(stage) + offset) = values;
  }
}

}  // namespace
}  // namespace ghl
