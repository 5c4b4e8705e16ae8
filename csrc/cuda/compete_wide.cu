// Competition among 1025 to 1536 units of 16 bits: the kernels of shorter rows, with more elements a lane.
#include "cuda/compete_short.cuh"

namespace ghl {

Status launch_wide(const CompeteArgs& args, const DeviceInfo& info, Stream stream) {
  if (args.p.u_dtype == DType::f16) return launch_elements<f16, kWideElements>(args, info, stream);
  return launch_elements<bf16, kWideElements>(args, info, stream);
}

}  // namespace ghl
