// The fields of PairParams as keyword arguments, for the pair and for depthwise convolutions.
#pragma once

#include "cuda/module.h"
#include "ghl/pair.h"

namespace ghl::binding {

using Quadruple = std::array<int64_t, 4>;

inline Responses responses(uintptr_t data, const Quadruple& layout) {
  return {pointer<const void>(data), layout[0], layout[1], layout[2], layout[3]};
}

inline PairParams pair_params(int64_t batch, int64_t channels, int64_t groups, const Triple& in_size,
                              const Triple& out_size, const Triple& kernel, const Triple& stride,
                              const Triple& padding, const Triple& dilation, int dtype, bool tf32,
                              uintptr_t x, int64_t x_stride_batch, int64_t x_stride_channel,
                              const Triple& x_stride, int64_t units, uintptr_t u, const Quadruple& u_layout,
                              uintptr_t grad, const Quadruple& grad_layout, int activity, bool selects,
                              bool anti, float temperature, float lift, uintptr_t threshold, uintptr_t cut,
                              uintptr_t logsumexp, uintptr_t first, uintptr_t winner_unit,
                              uintptr_t winner_activity, int64_t winners, uintptr_t a, uintptr_t g,
                              const Triple& result_layout, int64_t result_channels, uintptr_t workspace,
                              int form) {
  PairParams params;
  params.geometry = geometry(batch, channels, groups, in_size, out_size, kernel, stride, padding, dilation);
  params.dtype = gpu_dtype("dtype", dtype);
  params.tf32 = tf32;
  params.x = pointer<const void>(x);
  params.x_stride_batch = x_stride_batch;
  params.x_stride_channel = x_stride_channel;
  copy(x_stride, params.x_stride);
  params.units = units;
  params.u = responses(u, u_layout);
  params.grad = responses(grad, grad_layout);
  params.activity = enumerator("activity", activity, Activity::binary);
  params.selects = selects;
  params.anti = anti;
  params.temperature = temperature;
  params.lift = lift;
  params.threshold = pointer<const float>(threshold);
  params.cut = pointer<const int32_t>(cut);
  params.logsumexp = pointer<const float>(logsumexp);
  params.first = pointer<const int32_t>(first);
  params.winner_unit = pointer<const int32_t>(winner_unit);
  params.winner_activity = pointer<const float>(winner_activity);
  params.winners = winners;
  params.a = pointer<float>(a);
  params.g = pointer<float>(g);
  params.result_layout = filters(result_layout);
  params.result_channels = result_channels;
  params.workspace = pointer<void>(workspace);
  params.form = enumerator("form", form, PairForm::narrow);
  return params;
}

template <class Call>
void define_pair_call(py::module_& module, const char* name, Call call) {
  using py::literals::operator""_a;
  const Triple zeros{0, 0, 0};
  const Triple ones{1, 1, 1};
  const Quadruple no_layout{1, 0, 0, 1};
  define_call(module, name, pair_params, call, "batch"_a, "channels"_a, "groups"_a = 1, "in_size"_a = ones,
              "out_size"_a = ones, "kernel"_a = ones, "stride"_a = ones, "padding"_a = zeros,
              "dilation"_a = ones, "dtype"_a, "tf32"_a = false, "x"_a, "x_stride_batch"_a,
              "x_stride_channel"_a, "x_stride"_a = zeros, "units"_a, "u"_a = 0, "u_layout"_a = no_layout,
              "grad"_a = 0, "grad_layout"_a = no_layout, "activity"_a = 0, "selects"_a = false,
              "anti"_a = false, "temperature"_a = 1.0f, "lift"_a = 1.0f, "threshold"_a = 0, "cut"_a = 0,
              "logsumexp"_a = 0, "first"_a = 0, "winner_unit"_a = 0, "winner_activity"_a = 0, "winners"_a = 0,
              "a"_a = 0, "g"_a = 0, "result_layout"_a, "result_channels"_a = 1, "workspace"_a = 0,
              "form"_a = 0);
}

}  // namespace ghl::binding
