// Which kernels a competition is given to.
#include "cuda/compete.cuh"

namespace {

const char* competition = "none";

ghl::Status runs(const char* which) {
  competition = which;
  return {};
}

}  // namespace

namespace ghl {

// In place of those with kernels. What the first of them takes lies beside its kernels.
bool takes_few(const CompeteParams& params) { return params.units <= 128; }
Status launch_few(const CompeteArgs&, const DeviceInfo&, Stream) { return runs("few"); }
Status launch_short(const CompeteArgs&, const DeviceInfo&, Stream) { return runs("short"); }
Status launch_wide(const CompeteArgs&, const DeviceInfo&, Stream) { return runs("wide"); }
Status launch_long(const CompeteArgs&, const DeviceInfo&, Stream) { return runs("long"); }

}  // namespace ghl

// Of the state of 32 positions, of u in rows or in planes.
extern "C" const char* compete(int device, int dtype, int units, bool rows) {
  ghl::CompeteParams params;
  params.u_dtype = static_cast<ghl::DType>(dtype);
  params.u_layout = rows ? ghl::Layout{0, 1, units} : ghl::Layout{0, 32, 1};
  params.batch = 1;
  params.units = units;
  params.positions = 32;
  competition = "none";
  return ghl::compete_cuda(params, {device}).ok ? competition : "failed";
}
