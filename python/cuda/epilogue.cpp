// The epilogues of many layers: H, the gate, learning in place, and the step of SGD on gated gradients.
#include <vector>

#include "cuda/module.h"
#include "ghl/foreach.h"

namespace ghl::binding {
namespace {

using py::literals::operator""_a;

// What ghl_kernels.backends.cuda.epilogue.Layer holds, in its order: sizes, (address, stride) of the
// matrices, addresses of the vectors, then the rule.
using Fields = std::array<int64_t, 18>;

ForeachLayer layer_of(const Fields& f) {
  const auto address = [&](int i) { return static_cast<uintptr_t>(f[i]); };
  ForeachLayer layer;
  layer.rows = f[0];
  layer.columns = f[1];
  layer.a = pointer<const float>(address(2));
  layer.a_stride = f[3];
  layer.weight = pointer<const void>(address(4));
  layer.weight_stride = f[5];
  layer.out = pointer<void>(address(6));
  layer.out_stride = f[7];
  layer.gradient = pointer<const void>(address(8));
  layer.gradient_stride = f[9];
  layer.momentum = pointer<void>(address(10));
  layer.momentum_stride = f[11];
  layer.row_decay = pointer<const float>(address(12));
  layer.positions = pointer<const float>(address(13));
  layer.decay = enumerator("decay", static_cast<int>(f[14]), Decay::rows);
  layer.normalize = enumerator("normalize", static_cast<int>(f[15]), Normalize::constant);
  layer.is_gated = f[16] != 0;
  layer.begins_momentum = f[17] != 0;
  return layer;
}

std::vector<ForeachLayer> layers_of(const std::vector<Fields>& fields) {
  std::vector<ForeachLayer> layers;
  layers.reserve(fields.size());
  for (const Fields& f : fields) layers.push_back(layer_of(f));
  return layers;
}

ForeachParams params_of(const std::vector<ForeachLayer>& layers, int dtype, float rate, uintptr_t workspace) {
  ForeachParams params;
  params.layers = layers.data();
  params.count = static_cast<int64_t>(layers.size());
  params.dtype = gpu_dtype("dtype", dtype);
  params.rate = rate;
  params.workspace = pointer<float>(workspace);
  return params;
}

void foreach_epilogue(const std::vector<Fields>& fields, int dtype, int target, float rate,
                      uintptr_t workspace, int device, uintptr_t stream) {
  const std::vector<ForeachLayer> layers = layers_of(fields);
  ForeachParams params = params_of(layers, dtype, rate, workspace);
  params.target = enumerator("target", target, Target::learn);
  queue(foreach_epilogue_cuda, params, stream_of(device, stream));
}

void gated_sgd(const std::vector<Fields>& fields, int dtype, float rate, float momentum, float gain,
               float weight_decay, bool nesterov, bool maximize, uintptr_t workspace, int device,
               uintptr_t stream) {
  const std::vector<ForeachLayer> layers = layers_of(fields);
  const GatedSgdParams params{
      params_of(layers, dtype, rate, workspace), momentum, gain, weight_decay, nesterov, maximize};
  queue(gated_sgd_cuda, params, stream_of(device, stream));
}

void define(py::module_& module) {
  module.def("foreach_epilogue", foreach_epilogue, py::kw_only(), "layers"_a, "dtype"_a, "target"_a, "rate"_a,
             "workspace"_a, "device"_a, "stream"_a);
  module.def("gated_sgd", gated_sgd, py::kw_only(), "layers"_a, "dtype"_a, "rate"_a, "momentum"_a, "gain"_a,
             "weight_decay"_a, "nesterov"_a, "maximize"_a, "workspace"_a, "device"_a, "stream"_a);
}

const Registration registration(define);

}  // namespace
}  // namespace ghl::binding
