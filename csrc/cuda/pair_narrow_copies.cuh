// The pair of few columns and few units: u, dL/du, states and patches of x on their way into shared memory.
#pragma once

#include "cuda/pair_narrow_block.cuh"

namespace ghl {
namespace {

__device__ __forceinline__ void place_taps(const Block& block) {
  const KernelParams& params = block.params;
  const PatchIndex& patches = params.patches;
  for (int i = block.thread(); i < params.taps; i += block.tiles.threads) {
    uint32_t bits = 0;
    int rest = i, first_bit = 0;
    for (int d = 2; d >= 0; --d) {
      const int size = static_cast<int>(patches.kernel[d].value);
      bits |= 1u << (first_bit + rest % size);
      rest /= size;
      first_bit += size;
    }
    block.taps()[i] = {patches.column(i * patches.channels.value).offset, bits,
                       i * params.channels * kNarrowColumnPitch};
  }
}

// By the last threads: the first have more taps to gather.
__device__ __forceinline__ void place_positions(const Block& block, int step) {
  const int index = block.thread() - (block.tiles.threads - kPositions);
  if (index < 0) return;
  const PatchIndex& patches = block.params.patches;
  const int64_t position = block.position_of(step, index);
  const bool exists = position < block.params.positions;
  const Place place = patches.patch(exists ? position : 0);
  uint32_t outside = 0, bit = 1;
  for (int d = 2; d >= 0; --d) {
    const int end = place.at[d] + patches.dilation[d] * static_cast<int>(patches.kernel[d].value);
#pragma unroll 1
    for (int at = place.at[d]; at != end; at += patches.dilation[d]) {
      if (static_cast<uint32_t>(at) >= static_cast<uint32_t>(patches.in_size[d])) outside |= bit;
      bit <<= 1;
    }
  }
  block.places(step)->offset[index] = place.offset;
  block.places(step)->outside[index] = exists ? outside : ~0u;
}

// The lanes that share a row have a field each.
template <int kRowLanes>
__device__ __forceinline__ void copy_states(const Block& block, int step) {
  const KernelParams& params = block.params;
  const int field = block.thread_modulo(kRowLanes);
  if (field >= kFields) return;
  const char* source = params.fields.data[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) source = field == i ? params.fields.data[i] : source;
#pragma unroll 1
  for (int i = block.thread(); i < kPositions * kRowLanes; i += block.tiles.threads) {
    const int row = row_of<kRowLanes>(i);
    const int64_t position = block.position_of(step, position_in_row(row));
    const bool exists = source && position < params.positions;
    ptx::cp_async_ca_4(reinterpret_cast<uint32_t*>(block.states(step) + row) + field,
                       source + position * params.fields.stride, exists ? 4 : 0);
  }
}

__device__ __forceinline__ const char* row_in_memory(const Left& left, int64_t position) {
  if (left.inner.value == 1) return left.data + position * left.stride_batch;
  const int64_t item = left.inner.divide(position);
  const int64_t within = position - item * left.inner.value;
  return left.data + item * left.stride_batch + within * left.stride_position;
}

template <int kRowLanes>
__device__ __forceinline__ void copy_left(const Block& block, int step) {
  const KernelParams& params = block.params;
  const int lane_in_row = block.thread_modulo(kRowLanes), end = 2 * params.units;
#pragma unroll 1
  for (int i = block.thread(); i < kPositions * kRowLanes; i += block.tiles.threads) {
    const int row = row_of<kRowLanes>(i);
    int64_t position = block.position_of(step, position_in_row(row));
    const bool exists = position < params.positions;
    position = exists ? position : 0;
#pragma unroll 1
    for (int h = 0; h < params.copied_halves; ++h) {
      const char* source = row_in_memory(params.left[h], position);
      char* target = block.left_tile(step) + row * block.tiles.left_pitch + 2 * h * block.tiles.half;
      const int existing = exists ? end : 0;
#pragma unroll
      for (int v = 0; v < kRowVectors<kRowLanes>; ++v) {
        const int byte = 16 * (lane_in_row + v * kRowLanes);
        if (byte >= end) break;
        ptx::cp_async_cg_16(target + byte, source + byte, max(0, min(16, existing - byte)));
      }
    }
  }
}

// Of the two positions that a lane gathers.
struct Patches {
  const char* x[2];
  uint32_t outside[2];
};

__device__ __forceinline__ Patches patches_of(const Block& block, int step) {
  const Places& places = *block.places(step);
  const int low = block.lane(), high = block.lane() + kLanes;
  const char* x = block.params.x;
  return {{x + places.offset[low], x + places.offset[high]}, {places.outside[low], places.outside[high]}};
}

// The elements of both positions.
__device__ __forceinline__ uint32_t joined(uint32_t low, uint32_t high) { return high << 16 | low; }

// Channels that are contiguous, of kTaps taps before any is stored.
template <int kChannels, int kTaps>
__device__ __forceinline__ void gather_dense(const Block& block, int step) {
  const Patches patches = patches_of(block, step);
  const int count = block.params.taps, warps = block.tiles.threads / kLanes;
  char* tile = block.x_tile(step) + 4 * block.lane();
#pragma unroll 1
  for (int first = block.warp(); first < count; first += kTaps * warps) {
    uint32_t values[kTaps][2][kChannels];
    int target[kTaps];
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (first + t * warps >= count) break;
      const Tap tap = block.taps()[first + t * warps];
      target[t] = tap.target;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const bool inside = !(patches.outside[side] & tap.bits);
        const auto address = reinterpret_cast<const uint16_t*>(patches.x[side] + tap.offset);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) values[t][side][c] = inside ? address[c] : 0;
      }
    }
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (first + t * warps >= count) break;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const uint32_t both = joined(values[t][0][c], values[t][1][c]);
        *reinterpret_cast<uint32_t*>(tile + target[t] + c * kNarrowColumnPitch) = both;
      }
    }
  }
}

// Any number of channels, with any stride: two at a time.
__device__ __forceinline__ void gather_strided(const Block& block, int step) {
  const Patches patches = patches_of(block, step);
  const KernelParams& params = block.params;
  const int64_t stride = params.patches.stride_channel;
  char* tile = block.x_tile(step) + 4 * block.lane();
#pragma unroll 1
  for (int i = block.warp(); i < params.taps; i += block.tiles.threads / kLanes) {
    const Tap tap = block.taps()[i];
    const bool inside[2] = {!(patches.outside[0] & tap.bits), !(patches.outside[1] & tap.bits)};
    char* target = tile + tap.target;
#pragma unroll 1
    for (int channel = 0; channel < params.channels; channel += 2) {
      const bool has_second = channel + 1 < params.channels;
      uint32_t values[2][2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const char* address = patches.x[side] + tap.offset + channel * stride;
        const auto* second = reinterpret_cast<const uint16_t*>(address + stride);
        values[side][0] = inside[side] ? *reinterpret_cast<const uint16_t*>(address) : 0;
        values[side][1] = inside[side] && has_second ? *second : 0;
      }
      *reinterpret_cast<uint32_t*>(target) = joined(values[0][0], values[1][0]);
      target += kNarrowColumnPitch;
      if (has_second) *reinterpret_cast<uint32_t*>(target) = joined(values[0][1], values[1][1]);
      target += kNarrowColumnPitch;
    }
  }
}

template <class C>
__device__ __forceinline__ void gather_x(const Block& block, int step) {
  if (block.params.channels == 3 && block.params.patches.stride_channel == 2) {
    gather_dense<3, C::kTaps>(block, step);
  } else {
    gather_strided(block, step);
  }
}

}  // namespace
}  // namespace ghl
