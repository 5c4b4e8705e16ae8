// The module itself, and what it says about how it was built.
#include "cuda/module.h"

#include <vector>

#ifdef GHL_CUDA_ON_HOST
#include "cuda/host/cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include "ghl/check_device.h"

namespace ghl::binding {
namespace {

using py::literals::operator""_a;

std::vector<Define>& definitions() {
  static std::vector<Define> all;
  return all;
}

py::dict build_info() {
#ifdef GHL_CUDA_ON_HOST
  const bool on_host = true;
#else
  const bool on_host = false;
#endif
  return py::dict("compiler"_a = GHL_COMPILER, "architectures"_a = GHL_ARCHITECTURES, "on_host"_a = on_host,
                  "sanitize"_a = static_cast<bool>(GHL_SANITIZE));
}

// Why kernels of this build cannot run on a device, or an empty string.
std::string problem(int device) {
  const py::gil_scoped_release release;
  return check_device_cuda(device).message;
}

#ifdef GHL_CUDA_ON_HOST

// "forward", "reverse" or "random": the order in which the threads of a block run between two barriers.
void schedule(const std::string& order, unsigned seed) {
  if (order == "forward") return host::schedule(host::Schedule::forward, seed);
  if (order == "reverse") return host::schedule(host::Schedule::reverse, seed);
  if (order == "random") return host::schedule(host::Schedule::random, seed);
  throw py::value_error("order must be 'forward', 'reverse' or 'random', got '" + order + "'");
}

#else

// GPUs that the driver shows, or why there are none.
py::tuple device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  static_cast<void>(cudaGetLastError());
  return py::make_tuple(error == cudaSuccess ? count : 0,
                        error == cudaSuccess ? "" : std::string(cudaGetErrorString(error)));
}

#endif

}  // namespace

Registration::Registration(Define define) { definitions().push_back(define); }

}  // namespace ghl::binding

PYBIND11_MODULE(_cuda, module) {
  using namespace ghl::binding;
  using py::literals::operator""_a;
  module.doc() = "The CUDA kernels of ghl_kernels.";
  module.def("build_info", build_info);
  module.def("problem", problem, "device"_a);
#ifdef GHL_CUDA_ON_HOST
  module.def("schedule", schedule, "order"_a, "seed"_a = 1);
#else
  module.def("device_count", device_count);
#endif
  for (const Define define : definitions()) define(module);
}
