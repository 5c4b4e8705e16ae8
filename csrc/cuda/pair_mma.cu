// The launcher of the pair by mma.sync: how its operands lie, its plan.
#include <algorithm>

#include "cuda/pair_mma_kernel.cuh"
#include "cuda/pair_sum.h"

namespace ghl {
namespace {

Access access_of(const Responses& responses, int64_t group_units, int64_t positions, int64_t vector) {
  const bool items = responses.inner > 1;
  if (!is_aligned(responses.data) || (items && responses.stride_batch % vector)) return Access::plain;
  const int64_t row = items ? responses.stride_position : responses.stride_batch;
  if (responses.stride_unit == 1 && row % vector == 0 && group_units % vector == 0) return Access::rows;
  const bool whole = (items ? responses.inner : positions) % vector == 0;
  if (row == 1 && responses.stride_unit % vector == 0 && whole) return Access::planes;
  return Access::plain;
}

// A chunk of columns then lies in one tap, at a multiple of 16 bytes.
bool x_has_vectors(const PairParams& params, int64_t vector) {
  const ConvGeometry& geometry = params.geometry;
  bool aligned = is_aligned(params.x) && params.x_stride_channel == 1;
  aligned = aligned && params.geometry.group_channels() % vector == 0;
  aligned = aligned && (geometry.batch <= 1 || params.x_stride_batch % vector == 0);
  for (int d = 0; d < 3; ++d) {
    aligned = aligned && (geometry.in_size[d] <= 1 || params.x_stride[d] % vector == 0);
  }
  return aligned;
}

Left left_of(const Responses& responses, bool is_u, float* out, Access access, int64_t size) {
  return {static_cast<const char*>(responses.data),
          is_u,
          access,
          Divisor(std::max<int64_t>(1, responses.inner)),
          size * responses.stride_batch,
          size * responses.stride_position,
          size * responses.stride_unit,
          out};
}

int itemsize_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

PairPlan plan_of(const PairParams& params, const DeviceInfo& info) {
  const PairProblem problem{params.units / params.geometry.groups,
                            params.geometry.taps() * params.geometry.group_channels(),
                            params.geometry.groups,
                            params.geometry.positions(),
                            pair_results(params),
                            itemsize_of(params.dtype)};
  return pair_plan(problem, info.multiprocessors, info.shared_limit);
}

KernelParams kernel_params(const PairParams& params, const PairPlan& plan) {
  const int64_t groups = params.geometry.groups, units = params.units / groups;
  const int64_t size = itemsize_of(params.dtype), vector = 16 / size;
  const auto left = [&](const Responses& responses, bool is_u) {
    const Access access = access_of(responses, units, params.geometry.positions(), vector);
    return left_of(responses, is_u, is_u ? params.a : params.g, access, size);
  };
  const bool one = pair_results(params) == 1;
  // G first: its products can start while the other half's activities are computed
  const Left first = params.g ? left(params.grad, false) : left(params.u, true);
  const Left second = params.a ? left(params.u, true) : left(params.grad, false);
  return {PatchIndex(params, size),
          static_cast<const char*>(params.x),
          x_has_vectors(params, vector),
          {first, second},
          one,
          {params.activity, params.selects, params.anti, 1.0f / params.temperature, params.lift},
          {params.threshold, params.cut, params.logsumexp, params.first},
          is_plain_softmax(params),
          pair_mma_makes_state(params),
          static_cast<int32_t>(units),
          static_cast<int32_t>(params.geometry.taps() * params.geometry.group_channels()),
          static_cast<int32_t>(groups),
          params.geometry.positions(),
          static_cast<int32_t>(plan.whole_tiles),
          static_cast<int32_t>(plan.split_tiles),
          static_cast<int32_t>(plan.part_steps),
          static_cast<int32_t>(plan.unit_blocks),
          static_cast<int32_t>(plan.column_blocks),
          plan.stages,
          params.result_layout,
          static_cast<int32_t>(params.result_channels),
          static_cast<float*>(params.workspace)};
}

template <class Kind>
Status launch_kind(const PairParams& params, const PairPlan& plan, Stream stream) {
  const int itemsize = itemsize_of(params.dtype);
  const size_t shared = pair_shared_bytes(plan.wide, itemsize, plan.stages);
  const auto run = [&](auto config) {
    using C = decltype(config);
    static_assert(sizeof(Places<C::kPositions>) == kPairPlaceBytes * C::kPositions);
    static_assert(sizeof(Place) == kPairColumnBytes);
    static_assert(pair_stage_bytes(C::kColumns == kPairWide, C::kSize) ==
                  C::kTileBytes + sizeof(States<C::kPositions>));
    return launch(pair_shape(params), pair_kernel<C>, {plan.blocks(), C::kThreads, shared}, stream,
                  kernel_params(params, plan));
  };
  return plan.wide ? run(Config<Kind, true>{}) : run(Config<Kind, false>{});
}

Status launch_products(const PairParams& params, const PairPlan& plan, Stream stream) {
  if (params.dtype == DType::bf16) return launch_kind<Bf16>(params, plan, stream);
  if (params.dtype == DType::f16) return launch_kind<F16>(params, plan, stream);
  return params.tf32 ? launch_kind<Tf32>(params, plan, stream) : launch_kind<Tf32x3>(params, plan, stream);
}

}  // namespace

bool pair_mma_makes_state(const PairParams& params) {
  const int64_t vector = 16 / itemsize_of(params.dtype);
  return needs_only_softmax(params) && params.geometry.groups == 1 && params.units <= kPairHalf &&
         access_of(params.u, params.units, params.geometry.positions(), vector) == Access::rows;
}

int64_t pair_mma_workspace(const PairParams& params, const DeviceInfo& info) {
  return pair_workspace_bytes(plan_of(params, info));
}

Status pair_mma(const PairParams& params, const DeviceInfo& info, Stream stream) {
  const PairPlan plan = plan_of(params, info);
  if (plan.stages == 0)
    return Status::failure(pair_shape(params) + ": the device's shared memory is too small");
  const int step = pair_positions(itemsize_of(params.dtype));
  const int64_t positions =
      plan.parts > 1 && plan.whole_tiles == 0 ? plan.part_steps * step : params.geometry.positions();
  // less by a step, since a block rounds up to whole ones
  if (plan.blocks() > kMostBlocks || positions > std::numeric_limits<int32_t>::max() - step) {
    return Status::failure(pair_shape(params) + ": too many tiles, or positions of one of them");
  }
  if (plan.parts > 1 && !params.workspace) return Status::failure(pair_shape(params) + ": no workspace");
  const Status status = launch_products(params, plan, stream);
  if (!status.ok || plan.parts <= 1) return status;
  return pair_sum_tiles(params,
                        {plan.parts, plan.split_tiles, plan.whole_tiles, plan.unit_blocks, plan.column_blocks,
                         2 * kPairHalf, kPairHalf, pair_columns(plan.wide), params.geometry.group_channels()},
                        stream);
}

}  // namespace ghl
