// The pair [y; dL/du]^T x with the fields of its parameters as keyword arguments, and how it would be cut.
#include "ghl/pair.h"

#include "cuda/module.h"
#include "cuda/pair_plan.h"

namespace ghl::binding {
namespace {

using py::literals::operator""_a;
using Quadruple = std::array<int64_t, 4>;

Responses responses(uintptr_t data, const Quadruple& layout) {
  return {pointer<const void>(data), layout[0], layout[1], layout[2], layout[3]};
}

PairParams pair_params(int64_t batch, int64_t channels, int64_t groups, const Triple& in_size,
                       const Triple& out_size, const Triple& kernel, const Triple& stride,
                       const Triple& padding, const Triple& dilation, int dtype, bool tf32, uintptr_t x,
                       int64_t x_stride_batch, int64_t x_stride_channel, const Triple& x_stride,
                       int64_t units, uintptr_t u, const Quadruple& u_layout, uintptr_t grad,
                       const Quadruple& grad_layout, int activity, bool selects, bool anti, float temperature,
                       uintptr_t threshold, uintptr_t cut, uintptr_t logsumexp, uintptr_t first, uintptr_t a,
                       uintptr_t g, const Triple& result_layout, int64_t result_channels, uintptr_t workspace,
                       int form) {
  PairParams params;
  params.geometry.batch = batch;
  params.geometry.channels = channels;
  params.geometry.groups = groups;
  copy(in_size, params.geometry.in_size);
  copy(out_size, params.geometry.out_size);
  copy(kernel, params.geometry.kernel);
  copy(stride, params.geometry.stride);
  copy(padding, params.geometry.padding);
  copy(dilation, params.geometry.dilation);
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
  params.threshold = pointer<const float>(threshold);
  params.cut = pointer<const int32_t>(cut);
  params.logsumexp = pointer<const float>(logsumexp);
  params.first = pointer<const int32_t>(first);
  params.a = pointer<float>(a);
  params.g = pointer<float>(g);
  params.result_layout = filters(result_layout);
  params.result_channels = result_channels;
  params.workspace = pointer<void>(workspace);
  params.form = enumerator("form", form, PairForm::wgmma);
  return params;
}

// The launcher and its workspace query take the same arguments: name(build(fields...), stream).
template <class Call, class... Fields, class... Arguments>
void define_as(py::module_& module, const char* name, Call call, PairParams (*build)(Fields...),
               const Arguments&... arguments) {
  module.def(
      name,
      [build, call](Fields... fields, int device, uintptr_t stream) {
        return call(build(fields...), stream_of(device, stream));
      },
      py::kw_only(), arguments..., "device"_a, "stream"_a);
}

py::dict plan(int64_t units, int64_t columns, int64_t groups, int64_t positions, int results, int itemsize,
              int multiprocessors, size_t shared_limit) {
  const PairPlan plan =
      pair_plan({units, columns, groups, positions, results, itemsize}, multiprocessors, shared_limit);
  return py::dict("wide"_a = plan.wide, "stages"_a = plan.stages, "whole_tiles"_a = plan.whole_tiles,
                  "split_tiles"_a = plan.split_tiles, "parts"_a = plan.parts,
                  "part_steps"_a = plan.part_steps, "blocks"_a = plan.blocks(),
                  "resident"_a = pair_resident(plan.wide, itemsize),
                  "shared"_a = pair_shared_bytes(plan.wide, itemsize, plan.stages),
                  "workspace"_a = pair_workspace_bytes(plan));
}

void define(py::module_& module) {
  const Triple zeros{0, 0, 0};
  const Triple ones{1, 1, 1};
  const Quadruple no_layout{1, 0, 0, 1};
  const auto define_call = [&](const char* name, auto call) {
    define_as(module, name, call, pair_params, "batch"_a, "channels"_a, "groups"_a = 1, "in_size"_a = ones,
              "out_size"_a = ones, "kernel"_a = ones, "stride"_a = ones, "padding"_a = zeros,
              "dilation"_a = ones, "dtype"_a, "tf32"_a = false, "x"_a, "x_stride_batch"_a,
              "x_stride_channel"_a, "x_stride"_a = zeros, "units"_a, "u"_a = 0, "u_layout"_a = no_layout,
              "grad"_a = 0, "grad_layout"_a = no_layout, "activity"_a = 0, "selects"_a = false,
              "anti"_a = false, "temperature"_a = 1.0f, "threshold"_a = 0, "cut"_a = 0, "logsumexp"_a = 0,
              "first"_a = 0, "a"_a = 0, "g"_a = 0, "result_layout"_a, "result_channels"_a, "workspace"_a = 0,
              "form"_a = 0);
  };
  define_call("pair", [](const PairParams& params, Stream stream) { queue(pair_cuda, params, stream); });
  define_call("pair_workspace", [](const PairParams& params, Stream stream) {
    return pair_cuda_workspace(params, stream.device);
  });
  module.def("pair_plan", plan, py::kw_only(), "units"_a, "columns"_a, "groups"_a = 1, "positions"_a,
             "results"_a, "itemsize"_a, "multiprocessors"_a, "shared_limit"_a);
}

const Registration registration(define);

}  // namespace
}  // namespace ghl::binding
