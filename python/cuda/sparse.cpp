// sparse(...) and sparse_workspace(...): ghl/sparse.h with the fields of its parameters as keyword arguments.
#include "ghl/sparse.h"

#include "cuda/module.h"

namespace ghl::binding {
namespace {

using py::literals::operator""_a;

CorrelateParams sparse_params(int64_t batch, int64_t channels, int64_t groups, const Triple& in_size,
                              const Triple& out_size, const Triple& kernel, const Triple& stride,
                              const Triple& padding, const Triple& dilation, uintptr_t winner_unit,
                              uintptr_t winner_activity, int64_t winners, uintptr_t x, int x_dtype,
                              int64_t x_stride_batch, int64_t x_stride_channel, const Triple& x_stride,
                              int64_t units, uintptr_t a, const Triple& a_layout, uintptr_t activity_sum,
                              uintptr_t workspace) {
  CorrelateParams params;
  params.geometry = geometry(batch, channels, groups, in_size, out_size, kernel, stride, padding, dilation);
  params.winner_unit = pointer<const int32_t>(winner_unit);
  params.winner_activity = pointer<const float>(winner_activity);
  params.winners = winners;
  params.x = pointer<const void>(x);
  params.x_dtype = gpu_dtype("x_dtype", x_dtype);
  params.x_stride_batch = x_stride_batch;
  params.x_stride_channel = x_stride_channel;
  copy(x_stride, params.x_stride);
  params.units = units;
  params.a = pointer<float>(a);
  params.a_stride_unit = a_layout[0];
  params.a_stride_channel = a_layout[1];
  params.a_stride_tap = a_layout[2];
  params.activity_sum = pointer<float>(activity_sum);
  params.workspace = pointer<void>(workspace);
  return params;
}

void define(py::module_& module) {
  const auto define_as = [&](const char* name, auto call) {
    define_call(module, name, sparse_params, call, "batch"_a, "channels"_a, "groups"_a, "in_size"_a,
                "out_size"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a, "winner_unit"_a,
                "winner_activity"_a, "winners"_a, "x"_a, "x_dtype"_a, "x_stride_batch"_a,
                "x_stride_channel"_a, "x_stride"_a, "units"_a, "a"_a = 0, "a_layout"_a, "activity_sum"_a = 0,
                "workspace"_a = 0);
  };
  define_as("sparse",
            [](const CorrelateParams& params, Stream stream) { queue(sparse_cuda, params, stream); });
  define_as("sparse_workspace",
            [](const CorrelateParams& params, Stream) { return sparse_cuda_workspace(params); });
}

const Registration registration(define);

}  // namespace
}  // namespace ghl::binding
