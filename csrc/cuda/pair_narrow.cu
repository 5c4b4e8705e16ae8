// The launcher of the pair of few columns and few units: which shapes it takes, its plan.
#include <algorithm>

#include "cuda/pair_narrow_kernel.cuh"
#include "cuda/pair_sum.h"

namespace ghl {
namespace {

bool is_in_rows(const Responses& responses) {
  const bool whole = responses.stride_batch % kVector == 0 &&
                     (responses.inner <= 1 || responses.stride_position % kVector == 0);
  return is_aligned(responses.data) && responses.stride_unit == 1 && whole;
}

Left left_of(const Responses& responses) {
  return {static_cast<const char*>(responses.data), Divisor(std::max<int64_t>(1, responses.inner)),
          2 * responses.stride_batch, 2 * responses.stride_position};
}

NarrowPlan plan_of(const PairParams& params, const DeviceInfo& info) {
  const NarrowProblem problem{params.units, params.geometry.taps(), params.result_channels,
                              params.geometry.positions(), pair_results(params)};
  return narrow_plan(problem, info.multiprocessors, info.shared_limit);
}

Fields fields_of(const PairParams& params) {
  const auto bytes = [](const auto* data) { return reinterpret_cast<const char*>(data); };
  if (params.winners == 0) {
    return {{bytes(params.threshold), bytes(params.cut), bytes(params.logsumexp), bytes(params.first)}, 4};
  }
  const auto second = [&](const auto* data) { return params.winners > 1 ? bytes(data + 1) : nullptr; };
  const int32_t* const unit = params.winner_unit;
  const float* const activity = params.winner_activity;
  return {{bytes(unit), second(unit), bytes(activity), second(activity)}, 4 * params.winners};
}

KernelParams kernel_params(const PairParams& params, const NarrowPlan& plan) {
  const Left first = left_of(params.g ? params.grad : params.u);
  const Left second = left_of(params.a ? params.u : params.grad);
  const int32_t winners = params.a ? static_cast<int32_t>(params.winners) : 0;
  return {PatchIndex(params, 2),
          static_cast<const char*>(params.x),
          static_cast<int32_t>(params.result_channels),
          static_cast<int32_t>(params.geometry.taps()),
          {first, second},
          params.a ? pair_results(params) - 1 : -1,
          pair_results(params) - (winners > 0),
          static_cast<int32_t>(params.units),
          {params.activity, params.selects, params.anti, 1.0f / params.temperature, params.lift},
          fields_of(params),
          winners,
          !params.a || needs_only_softmax(params),
          is_plain_softmax(params),
          params.geometry.positions(),
          Tiles(plan),
          static_cast<float*>(params.workspace)};
}

template <class Kind>
Status launch_kind(const PairParams& params, const NarrowPlan& plan, Stream stream) {
  const auto run = [&](auto config) {
    using C = decltype(config);
    return launch(pair_shape(params), narrow_kernel<C>, {plan.blocks, plan.threads(), plan.shared}, stream,
                  kernel_params(params, plan));
  };
  if (plan.warp_units == 32) return run(Config<Kind, 2, 4>{});
  if (plan.warp_units == 48) return run(Config<Kind, 3, 5>{});
  return run(Config<Kind, 4, 5>{});
}

}  // namespace

bool pair_narrow_takes(const PairParams& params, const DeviceInfo& info) {
  const ConvGeometry& geometry = params.geometry;
  const int64_t bits = geometry.kernel[0] + geometry.kernel[1] + geometry.kernel[2];
  const bool small = bits <= kNarrowBits && params.units <= kNarrowUnits &&
                     params.result_channels <= kNarrowChannels &&
                     geometry.taps() * params.result_channels <= kNarrowColumns;
  const bool lists = params.winners > 0;
  const bool rows = (!params.a || lists || is_in_rows(params.u)) && (!params.g || is_in_rows(params.grad));
  return (params.a || params.g) && params.dtype != DType::f32 && geometry.groups == 1 &&
         params.winners <= kNarrowWinners && geometry.positions() > 0 && small && rows &&
         pair_sizes_fit(params) && plan_of(params, info).shared <= info.shared_limit;
}

int64_t pair_narrow_workspace(const PairParams& params, const DeviceInfo& info) {
  return narrow_workspace_bytes(plan_of(params, info));
}

Status pair_narrow(const PairParams& params, const DeviceInfo& info, Stream stream) {
  const NarrowPlan plan = plan_of(params, info);
  if (plan.steps / plan.blocks >= std::numeric_limits<int32_t>::max() / kPositions - 1) {
    return Status::failure(pair_shape(params) + ": too many positions of a block");
  }
  if (!params.workspace) return Status::failure(pair_shape(params) + ": no workspace");
  const Status status = params.dtype == DType::bf16 ? launch_kind<Bf16>(params, plan, stream)
                                                    : launch_kind<F16>(params, plan, stream);
  if (!status.ok) return status;
  return pair_sum_tiles(
      params, {plan.blocks, 1, 0, 1, 1, plan.rows(), plan.half(), plan.columns(), params.result_channels},
      stream);
}

}  // namespace ghl
