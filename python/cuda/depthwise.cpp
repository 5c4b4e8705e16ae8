// depthwise(...) and depthwise_workspace(...): ghl/depthwise.h with the fields of its parameters as keyword
// arguments.
#include "ghl/depthwise.h"

#include "cuda/module.h"

namespace ghl::binding {
namespace {

using py::literals::operator""_a;
using Quadruple = std::array<int64_t, 4>;

Responses responses(uintptr_t data, const Quadruple& layout) {
  return {pointer<const void>(data), layout[0], layout[1], layout[2], layout[3]};
}

PairParams depthwise_params(int64_t batch, int64_t channels, int64_t groups, const Triple& in_size,
                            const Triple& out_size, const Triple& kernel, const Triple& stride,
                            const Triple& padding, const Triple& dilation, int dtype, uintptr_t x,
                            int64_t x_stride_batch, int64_t x_stride_channel, const Triple& x_stride,
                            int64_t units, uintptr_t u, const Quadruple& u_layout, uintptr_t grad,
                            const Quadruple& grad_layout, int activity, bool selects, bool anti,
                            float temperature, uintptr_t threshold, uintptr_t cut, uintptr_t logsumexp,
                            uintptr_t first, uintptr_t a, uintptr_t g, const Triple& result_layout,
                            uintptr_t workspace) {
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
  params.result_channels = 1;
  params.workspace = pointer<void>(workspace);
  return params;
}

// The launcher and its workspace query take the same arguments.
template <class Call, class... Fields>
void define_as(py::module_& module, const char* name, PairParams (*build)(Fields...), Call call) {
  module.def(
      name,
      [build, call](Fields... fields, int device, uintptr_t stream) {
        return call(build(fields...), stream_of(device, stream));
      },
      py::kw_only(), "batch"_a, "channels"_a, "groups"_a, "in_size"_a, "out_size"_a, "kernel"_a, "stride"_a,
      "padding"_a, "dilation"_a, "dtype"_a, "x"_a, "x_stride_batch"_a, "x_stride_channel"_a, "x_stride"_a,
      "units"_a, "u"_a, "u_layout"_a, "grad"_a, "grad_layout"_a, "activity"_a, "selects"_a, "anti"_a,
      "temperature"_a, "threshold"_a, "cut"_a, "logsumexp"_a, "first"_a, "a"_a = 0, "g"_a = 0,
      "result_layout"_a, "workspace"_a = 0, "device"_a, "stream"_a);
}

void define(py::module_& module) {
  define_as(module, "depthwise", depthwise_params,
            [](const PairParams& params, Stream stream) { queue(depthwise_cuda, params, stream); });
  define_as(module, "depthwise_workspace", depthwise_params, [](const PairParams& params, Stream stream) {
    return depthwise_cuda_workspace(params, stream.device);
  });
}

const Registration registration(define);

}  // namespace
}  // namespace ghl::binding
