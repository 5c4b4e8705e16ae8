// The pair kernel for Hopper: copies by tensor maps, wgmma, clusters that share x.
//
// A block is a warpgroup that copies stages of x and of two response tiles into shared memory, and two that
// multiply them: one computes A (y is made in registers from u), the other G; or, where
// only one of the two is wanted, both compute it for different units. Two blocks with neighbouring units form
// a cluster, and each copies half of every stage of x into both. Clusters sum whole tiles, and then equal
// segments of what is left (pair_sm90_layout.h); what a segment has of a cut tile goes to the workspace, and
// a second kernel adds those up in the order of segments.
#pragma once

#ifdef GHL_DEBUG_WAITS
#include <cstdio>
#endif

#include "cuda/activity.cuh"
#include "cuda/dtype.cuh"
#include "cuda/pair_sm90_layout.h"
#include "cuda/ptx_sm90.cuh"
#include "ghl/pair.h"

namespace ghl::sm90 {

struct Result {
  float* data;
  Filters layout;
};

// What a launch needs, all of it by value: nothing is left in memory for a captured graph to miss.
struct PairSm90 {
  CUtensorMap x;
  CUtensorMap responses[kConsumers];
  CUtensorMap states[kStates];
  bool has_state[kStates];  // in the order of StatePointers

  Plan plan;
  Source source;
  Patches patches;
  int32_t positions;
  int32_t units;
  int32_t result_channels;

  bool is_activity[kConsumers];  // the consumer computes A from u, not G
  Competition competition;
  Result result[kConsumers];
  float4* partials;
};

// --- waiting ------------------------------------------------------------------------------------

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
#ifdef GHL_DEBUG_WAITS
  constexpr uint64_t kPatience = 5'000'000'000;
  const uint64_t begin = ptx::globaltimer();
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
    if (ptx::globaltimer() - begin < kPatience) continue;
    printf("pair_sm90: block %u thread %u waits in vain at shared address %u for parity %u\n", blockIdx.x,
           threadIdx.x, barrier, parity);
    __trap();
  }
#else
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
#endif
}

__device__ __forceinline__ void wait_full(uint32_t shared, Slot slot) {
  wait(shared + full_at(slot.stage), full_parity(slot));
}

__device__ __forceinline__ void wait_empty(uint32_t shared, Slot slot) {
  wait(shared + empty_at(slot.stage), empty_parity(slot));
}

// This warp no longer reads the stage: told to every block whose copies reach it.
__device__ __forceinline__ void release(uint32_t shared, Slot slot, int cluster) {
  __syncwarp();
  const uint32_t lane = threadIdx.x % kWarp;
  if (lane < static_cast<uint32_t>(cluster)) {
    ptx::mbarrier_arrive_cluster(ptx::mapa(shared + empty_at(slot.stage), lane));
  }
}

// --- the producer -------------------------------------------------------------------------------

// A chunk that a warp copies.
struct Chunk {
  bool exists = false;
  uint32_t at = 0;  // in its stage
  int32_t channel = 0;
  uint32_t offsets = 0;
};

// Copies one chunk into this block, or into both of a cluster.
__device__ __forceinline__ void copy_chunk(const PairSm90& params, uint32_t stage, uint32_t full,
                                           const Chunk& chunk, int32_t row, const Position& position) {
  constexpr uint16_t kBoth = 3;
  const uint32_t shared = stage + chunk.at;
  const int32_t channel = chunk.channel;
  const bool multicast = params.plan.cluster > 1;
  if (params.source == Source::rows) {
    if (multicast) {
      ptx::cp_async_bulk_tensor_2d_multicast(shared, params.x, full, channel, row, kBoth);
    } else {
      ptx::cp_async_bulk_tensor_2d(shared, params.x, full, channel, row);
    }
    return;
  }
  const int32_t w = pixel_of(params.patches, position, 0), h = pixel_of(params.patches, position, 1);
  const uint16_t offset_w = offset_of(chunk.offsets, 0), offset_h = offset_of(chunk.offsets, 1);
  if (params.source == Source::image) {
    if (multicast) {
      ptx::cp_async_bulk_tensor_4d_im2col_multicast(shared, params.x, full, channel, w, h, position.image,
                                                    offset_w, offset_h, kBoth);
    } else {
      ptx::cp_async_bulk_tensor_4d_im2col(shared, params.x, full, channel, w, h, position.image, offset_w,
                                          offset_h);
    }
    return;
  }
  const int32_t d = pixel_of(params.patches, position, 2);
  const uint16_t offset_d = offset_of(chunk.offsets, 2);
  if (multicast) {
    ptx::cp_async_bulk_tensor_5d_im2col_multicast(shared, params.x, full, channel, w, h, d, position.image,
                                                  offset_w, offset_h, offset_d, kBoth);
  } else {
    ptx::cp_async_bulk_tensor_5d_im2col(shared, params.x, full, channel, w, h, d, position.image, offset_w,
                                        offset_h, offset_d);
  }
}

// What a stage of this tile brings into this block, from its own copies and the other block's.
template <class Shape>
__device__ __forceinline__ uint32_t stage_bytes(const PairSm90& params, int64_t tile) {
  uint32_t bytes = chunks_of(params.plan, tile) * chunk_bytes(Shape::chunk) + kConsumers * kResponseBytes;
#pragma unroll
  for (int i = 0; i < kStates; ++i) bytes += params.has_state[i] ? kStateBytes : 0;
  return bytes;
}

// Announces the stage, and copies the states.
__device__ __forceinline__ void open_stage(const PairSm90& params, uint32_t shared, uint32_t full, int stage,
                                           uint32_t bytes, int32_t row) {
  ptx::mbarrier_arrive_expect_tx(full, bytes);
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    if (params.has_state[i]) {
      ptx::cp_async_bulk_tensor_2d(shared + state_at(stage, i), params.states[i], full, row, 0);
    }
  }
}

template <class Shape>
__device__ __forceinline__ Chunk chunk_of(const PairSm90& params, int64_t tile, int rank, int chunk) {
  const Plan& plan = params.plan;
  if (chunk >= Shape::chunks || chunk >= chunks_of(plan, tile) || chunk_owner(chunk, plan.cluster) != rank)
    return {};
  const Columns columns = columns_of(plan, first_chunk(plan, tile) + chunk);
  return {true, static_cast<uint32_t>(chunk * chunk_bytes(Shape::chunk)), columns.channel,
          offsets_of(params.patches, columns.tap)};
}

// What one warp copies of the stages of a piece. One that copied everything would need longer for a stage
// than the tensor cores do; and since its number is known to the compiler, as all that follows from it,
// operands are in uniform registers, where these instructions want them.
template <class Shape, int warp>
__device__ __forceinline__ void produce_piece(const PairSm90& params, uint32_t shared, int rank,
                                              const Piece& piece, Slot& slot) {
  const Plan& plan = params.plan;
  const Chunk chunk = chunk_of<Shape>(params, piece.tile, rank, warp);
  const Chunk second = chunk_of<Shape>(params, piece.tile, rank, warp + kWarps);
  const int consumer = response_of(warp, plan.cluster, rank);
  if (!chunk.exists && consumer < 0) {
    // without a wait, so never to copy again: a barrier's parity tells one lap from the next, not from the
    // one after it. Tiles with fewer chunks are the last ones.
    slot = after(slot, piece.end - piece.begin);
    return;
  }
  const uint32_t bytes = stage_bytes<Shape>(params, piece.tile);
  const int32_t unit = static_cast<int32_t>(first_unit(plan, piece.tile, rank, consumer));
  const Position distance = position_of(params.patches, kStagePositions);
  int32_t row = piece.begin * kStagePositions;
  Position position = position_of(params.patches, row);
  for (int32_t i = piece.begin; i < piece.end; ++i, slot = next(slot)) {
    const uint32_t full = shared + full_at(slot.stage);
    wait_empty(shared, slot);
    if (threadIdx.x % kWarp == 0) {
      if (consumer == 0) open_stage(params, shared, full, slot.stage, bytes, row);
      if (consumer >= 0) {
        ptx::cp_async_bulk_tensor_2d(shared + response_at(slot.stage, consumer), params.responses[consumer],
                                     full, unit, row);
      }
      const uint32_t input = shared + input_at(slot.stage);
      if (chunk.exists) copy_chunk(params, input, full, chunk, row, position);
      if (second.exists) copy_chunk(params, input, full, second, row, position);
    }
    row += kStagePositions;
    position = advanced(params.patches, position, distance);
  }
}

template <class Shape, int warp>
__device__ __forceinline__ void produce(const PairSm90& params, uint32_t shared) {
  if (threadIdx.x % kWarp == 0) {
    ptx::prefetch_tensormap(params.x);
    for (const CUtensorMap& map : params.responses) ptx::prefetch_tensormap(map);
  }
  Slot slot;
  int32_t done = 0;
  for (Piece piece; piece_after(params.plan, ptx::cluster_id(), done, piece);
       done = done_after(params.plan, done, piece)) {
    produce_piece<Shape, warp>(params, shared, ptx::cluster_rank(), piece, slot);
  }
}

// The warps of the producer, each with a number that the compiler knows.
template <class Shape, int warp = 0>
__device__ __forceinline__ void produce_as(int number, const PairSm90& params, uint32_t shared) {
  if (number == warp) {
    produce<Shape, warp>(params, shared);
  } else if constexpr (warp + 1 < kWarps) {
    produce_as<Shape, warp + 1>(number, params, shared);
  }
}

// --- y in registers -----------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack(float low, float high, bf16) {
  return ptx::cvt_rn_bf16x2_f32(high, low);
}
__device__ __forceinline__ uint32_t pack(float low, float high, f16) {
  return ptx::cvt_rn_f16x2_f32(high, low);
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  return {to_float(T{static_cast<uint16_t>(bits)}), to_float(T{static_cast<uint16_t>(bits >> 16)})};
}

// The activities of a unit at `position` of the stage and the one after it.

// softmax over all units, where nothing else is asked for.
struct SoftmaxActivity {
  Competition competition;

  template <class T>
  __device__ __forceinline__ uint32_t pair(const unsigned char* states, uint32_t bits, int32_t,
                                           int position) const {
    const float2 u = unpack<T>(bits);
    const float2 logsumexp = reinterpret_cast<const float2*>(states + 2 * kStateBytes)[position / 2];
    return pack(lifted<T>(softmax_of(u.x, competition.scale, logsumexp.x), competition),
                lifted<T>(softmax_of(u.y, competition.scale, logsumexp.y), competition), T{});
  }
};

struct AnyActivity {
  Competition competition;

  template <class T>
  __device__ __forceinline__ uint32_t pair(const unsigned char* states, uint32_t bits, int32_t unit,
                                           int position) const {
    const float2 u = unpack<T>(bits);
    const float2 threshold = numbers<float2>(states, 0, position),
                 logsumexp = numbers<float2>(states, 2, position);
    const int2 cut = numbers<int2>(states, 1, position), first = numbers<int2>(states, 3, position);
    const float low = activity_of(u.x, unit, {threshold.x, cut.x, logsumexp.x, first.x}, competition);
    const float high = activity_of(u.y, unit, {threshold.y, cut.y, logsumexp.y, first.y}, competition);
    return pack(lifted<T>(low, competition), lifted<T>(high, competition), T{});
  }

  template <class Two>
  static __device__ __forceinline__ Two numbers(const unsigned char* states, int state, int position) {
    return reinterpret_cast<const Two*>(states + state * kStateBytes)[position / 2];
  }
};

// Zeros beyond the last position: u is zero there, of which an activity makes what it likes.
template <int count>
__device__ __forceinline__ void mask(uint32_t (&y)[count], int positions) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int position = i / 4 * kDepth + fragment_position(threadIdx.x, i % 4);
    if (position >= positions) y[i] = 0;
    if (position + 1 == positions) y[i] &= 0xffff;
  }
}

// Registers of the left operand of a stage.
constexpr int kFragments = 4 * kSteps;

template <class T, class Activity>
__device__ __forceinline__ void load_activity(uint32_t (&y)[kFragments], const unsigned char* base, int stage,
                                              int consumer, int32_t unit, int positions,
                                              const Activity& activity) {
  const int thread = threadIdx.x % kWarpgroup;
  const unsigned char* states = base + state_at(stage, 0);
  const unsigned char* tile = base + response_at(stage, consumer);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t u[4];
    ptx::ldmatrix_x4_trans(
        u, tile + k * step_bytes(kTileUnits) + swizzled(ldmatrix_position(thread), ldmatrix_unit(thread)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[4 * k + i] = activity.template pair<T>(states, u[i], unit + fragment_unit(thread, i),
                                               k * kDepth + fragment_position(thread, i));
    }
  }
  if (positions < kStagePositions) mask(y, positions);
}

// --- multiplying --------------------------------------------------------------------------------

// d += a b, of as many columns as there are accumulators for.
template <class T>
struct Wgmma;

template <>
struct Wgmma<bf16> {
  template <int count>
  static __device__ __forceinline__ void rs(float (&d)[count], const uint32_t* a, uint64_t b) {
    ptx::wgmma_m64k16_bf16_rs(d, a, b);
  }
  template <int count>
  static __device__ __forceinline__ void ss(float (&d)[count], uint64_t a, uint64_t b) {
    ptx::wgmma_m64k16_bf16_ss(d, a, b);
  }
};

template <>
struct Wgmma<f16> {
  template <int count>
  static __device__ __forceinline__ void rs(float (&d)[count], const uint32_t* a, uint64_t b) {
    ptx::wgmma_m64k16_f16_rs(d, a, b);
  }
  template <int count>
  static __device__ __forceinline__ void ss(float (&d)[count], uint64_t a, uint64_t b) {
    ptx::wgmma_m64k16_f16_ss(d, a, b);
  }
};

// What a warpgroup multiplies: the stages of a piece, whose slot is the next that it waits for.
template <class Shape>
struct Stages {
  uint32_t shared;
  int cluster;
  Slot& slot;
  int32_t count;

  // x as wgmma's right operand.
  __device__ __forceinline__ uint64_t input(int stage, int k) const {
    const uint64_t first = operand_descriptor(shared + input_at(0), Shape::chunk, chunk_bytes(Shape::chunk));
    return first + stage * descriptor_step(kInputBytes) + k * descriptor_step(step_bytes(Shape::chunk));
  }
};

template <class T, class Shape, int count>
__device__ __forceinline__ void queue_activity(float (&d)[count], const uint32_t (&y)[kFragments],
                                               const Stages<Shape>& stages) {
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) Wgmma<T>::rs(d, y + 4 * k, stages.input(stages.slot.stage, k));
  ptx::wgmma_commit_group();
}

// d += y^T x. The y of one stage is made while the tensor cores multiply the one before, and queued before
// they are done with it; so there are two sets of registers, for even and for odd stages.
template <class T, class Shape, int count, class Activity>
__device__ __forceinline__ void multiply_activity(float (&d)[count], const Stages<Shape>& stages,
                                                  const unsigned char* base, int consumer, int32_t unit,
                                                  int positions, const Activity& activity) {
  Slot& slot = stages.slot;
  const auto load = [&](uint32_t (&y)[kFragments]) {
    wait_full(stages.shared, slot);
    load_activity<T>(y, base, slot.stage, consumer, unit, positions, activity);
    positions -= kStagePositions;
  };
  // the products of the stage before this one are over
  const auto finish = [&](uint32_t (&y)[kFragments], Slot before) {
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_hold(y);
    release(stages.shared, before, stages.cluster);
  };
  uint32_t even[kFragments], odd[kFragments];
  Slot before = slot;
  load(even);
  queue_activity<T>(d, even, stages);
  for (int32_t left = stages.count - 1; left > 0; left -= 2) {
    slot = next(before);
    load(odd);
    queue_activity<T>(d, odd, stages);
    finish(even, before);
    before = slot;
    if (left == 1) break;
    slot = next(before);
    load(even);
    queue_activity<T>(d, even, stages);
    finish(odd, before);
    before = slot;
  }
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_hold(d);
  ptx::wgmma_hold(even);
  ptx::wgmma_hold(odd);
  release(stages.shared, before, stages.cluster);
  slot = next(before);
}

// d += e^T x for e = dL/du. The products of one stage are under way while the next are queued.
template <class T, class Shape, int accumulators>
__device__ __forceinline__ void multiply_gradient(float (&d)[accumulators], const Stages<Shape>& stages,
                                                  int consumer) {
  const uint64_t first = operand_descriptor(stages.shared + response_at(0, consumer), kTileUnits, 0);
  Slot& slot = stages.slot;
  Slot before = slot;
  for (int32_t i = 0; i < stages.count; ++i) {
    const uint64_t e = first + slot.stage * descriptor_step(kConsumers * kResponseBytes);
    wait_full(stages.shared, slot);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Wgmma<T>::ss(d, e + k * descriptor_step(step_bytes(kTileUnits)), stages.input(slot.stage, k));
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    if (i > 0) release(stages.shared, before, stages.cluster);
    before = slot;
    slot = next(slot);
  }
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_hold(d);
  release(stages.shared, before, stages.cluster);
}

// A consumer without units.
template <class Shape>
__device__ __forceinline__ void skip(const Stages<Shape>& stages) {
  for (int32_t i = 0; i < stages.count; ++i, stages.slot = next(stages.slot)) {
    wait_full(stages.shared, stages.slot);
    release(stages.shared, stages.slot, stages.cluster);
  }
}

// --- results ------------------------------------------------------------------------------------

// Where a thread's accumulators of a strip of columns go: the first of them, and which of them exist.
struct StripResult {
  float* first;
  int64_t next_channel;
  int64_t next_unit;  // the second of the thread's two units
  bool has_unit[2];
  int32_t channels;  // from the first one on
};

__device__ __forceinline__ StripResult strip_result(const PairSm90& params, int64_t tile, int rank,
                                                    int consumer, int strip, int thread) {
  const Plan& plan = params.plan;
  const Filters& layout = params.result[consumer].layout;
  const int chunk = strip * kStrip / plan.tile.chunk;
  const Columns columns = columns_of(plan, first_chunk(plan, tile) + chunk);
  const int32_t channel = columns.channel + strip * kStrip % plan.tile.chunk + accumulator_column(thread, 0);
  const int64_t unit = first_unit(plan, tile, rank, consumer) + accumulator_unit(thread, 0);
  const int64_t at =
      unit * layout.stride_unit + channel * layout.stride_channel + columns.tap * layout.stride_tap;
  const int64_t second = accumulator_unit(thread, 2) - accumulator_unit(thread, 0);
  const int32_t channels = chunk < chunks_of(plan, tile) ? params.result_channels - channel : 0;
  return {params.result[consumer].data + at,
          layout.stride_channel,
          second * layout.stride_unit,
          {unit < params.units, unit + second < params.units},
          channels};
}

// Four accumulators, of 8 channels further for each quad of the strip.
__device__ __forceinline__ void store_quad(const StripResult& result, int quad, const float4& sum) {
  const int channel = accumulator_column(0, 4 * (quad % kStripQuads));
  float* const first = result.first + channel * result.next_channel;
  float* const second = first + result.next_unit;
  const bool has_first = channel < result.channels, has_next = channel + 1 < result.channels;
  if (has_first && result.has_unit[0]) first[0] = sum.x;
  if (has_next && result.has_unit[0]) first[result.next_channel] = sum.y;
  if (has_first && result.has_unit[1]) second[0] = sum.z;
  if (has_next && result.has_unit[1]) second[result.next_channel] = sum.w;
}

template <int count>
__device__ __forceinline__ float4 quad_of(const float (&d)[count], int quad) {
  return {d[4 * quad], d[4 * quad + 1], d[4 * quad + 2], d[4 * quad + 3]};
}

template <int count>
__device__ __forceinline__ void store_piece(const PairSm90& params, const float (&d)[count], int consumer,
                                            const Piece& piece) {
  constexpr int kQuads = count / 4;
  const int segment = ptx::cluster_id(), rank = ptx::cluster_rank();
  const int thread = threadIdx.x % kWarpgroup;
  if (!is_whole(params.plan, piece)) {
    const int slot = slot_of(params.plan, segment, piece.tile);
    float4* const partials = params.partials + partial_at(blockIdx.x, slot, consumer, 0, thread);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) partials[quad * kWarpgroup] = quad_of(d, quad);
    return;
  }
#pragma unroll
  for (int strip = 0; strip < kQuads / kStripQuads; ++strip) {
    const StripResult result = strip_result(params, piece.tile, rank, consumer, strip, thread);
#pragma unroll
    for (int i = 0; i < kStripQuads; ++i) store_quad(result, i, quad_of(d, strip * kStripQuads + i));
  }
}

template <class T, class Shape>
__device__ __forceinline__ void consume_piece(const PairSm90& params, const unsigned char* base, int consumer,
                                              const Piece& piece, Slot& slot) {
  const Stages<Shape> stages{ptx::shared_address(base), params.plan.cluster, slot, piece.end - piece.begin};
  const int64_t unit = first_unit(params.plan, piece.tile, ptx::cluster_rank(), consumer);
  if (unit >= params.units) {
    skip(stages);
    return;
  }
  float d[accumulators_of(Shape::columns)];
#pragma unroll
  for (float& sum : d) sum = 0.0f;
  const Competition& competition = params.competition;
  const auto multiply = [&](const auto& activity) {
    multiply_activity<T>(d, stages, base, consumer, static_cast<int32_t>(unit),
                         params.positions - piece.begin * kStagePositions, activity);
  };
  if (!params.is_activity[consumer]) {
    multiply_gradient<T>(d, stages, consumer);
  } else if (is_plain_softmax(competition)) {
    multiply(SoftmaxActivity{competition});
  } else {
    multiply(AnyActivity{competition});
  }
  store_piece(params, d, consumer, piece);
}

// --- kernels ------------------------------------------------------------------------------------

// Barriers of the whole cluster exist before any block copies or arrives; a state that is not given is zero.
__device__ __forceinline__ void begin(const PairSm90& params, unsigned char* base) {
  const uint32_t shared = ptx::shared_address(base);
  const int cluster = params.plan.cluster;
#ifdef GHL_DEBUG_WAITS
  if (shared % 1024 != 0) __trap();  // swizzles are of addresses
#endif
  uint32_t* const states = reinterpret_cast<uint32_t*>(base + kStateAt);
  for (int i = threadIdx.x; i < kStages * kStates * kStagePositions; i += kThreads) {
    if (!params.has_state[i / kStagePositions % kStates]) states[i] = 0;
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(shared + full_at(stage), kFullArrivals);
      ptx::mbarrier_init(shared + empty_at(stage), empty_arrivals(cluster));
    }
    ptx::fence_mbarrier_init();
  }
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, 1) pair_kernel(const __grid_constant__ PairSm90 params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(GHL_CUDA_ON_HOST)
  unsigned char* const base = dynamic_shared<unsigned char>();
  const uint32_t shared = ptx::shared_address(base);
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  begin(params, base);
  if (warpgroup == kConsumers) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    produce_as<Shape>(__shfl_sync(kAllLanes, threadIdx.x / kWarp % kWarps, 0), params, shared);
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    Slot slot;
    int32_t done = 0;
    for (Piece piece; piece_after(params.plan, ptx::cluster_id(), done, piece);
         done = done_after(params.plan, done, piece)) {
      consume_piece<T, Shape>(params, base, warpgroup, piece, slot);
    }
  }
  // A block that ended would take its shared memory from under the other's copies and arrivals.
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
#endif
}

// One block adds up four accumulators of each thread of a consumer, of the tile cut where a segment begins.
__global__ void __launch_bounds__(kWarpgroup) sum_partials(const __grid_constant__ PairSm90 params) {
  const Plan& plan = params.plan;
  int64_t block = blockIdx.x;
  const int quads = quads_of(columns_of(plan.tile));
  const int quad = static_cast<int>(block % quads);
  block /= quads;
  const int consumer = static_cast<int>(block % kConsumers);
  block /= kConsumers;
  const int rank = static_cast<int>(block % plan.cluster);
  const int64_t tile = cut_tile(plan, 1 + block / plan.cluster);
  if (tile < 0 || first_unit(plan, tile, rank, consumer) >= params.units) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t last = last_segment(plan, tile);
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int64_t segment = first_segment(plan, tile); segment <= last; ++segment) {
    const int slot = slot_of(plan, segment, tile);
    const float4 part =
        params.partials[partial_at(segment * plan.cluster + rank, slot, consumer, quad, thread)];
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  store_quad(strip_result(params, tile, rank, consumer, quad / kStripQuads, thread), quad, sum);
}

}  // namespace ghl::sm90
