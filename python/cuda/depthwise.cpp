// depthwise(...) and depthwise_workspace(...) of ghl/depthwise.h.
#include "ghl/depthwise.h"

#include "cuda/pair_params.h"

namespace ghl::binding {
namespace {

void define(py::module_& module) {
  define_pair_call(module, "depthwise",
                   [](const PairParams& params, Stream stream) { queue(depthwise_cuda, params, stream); });
  define_pair_call(module, "depthwise_workspace", [](const PairParams& params, Stream stream) {
    return depthwise_cuda_workspace(params, stream.device);
  });
}

const Registration registration(define);

}  // namespace
}  // namespace ghl::binding
