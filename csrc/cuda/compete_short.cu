// Competition among up to 1024 units: a warp for each position, its row in the warp's registers.
#include "cuda/compete_short.cuh"

namespace ghl {

Status launch_short(const CompeteArgs& args, const DeviceInfo& info, Stream stream) {
  return by_dtype(args.p.u_dtype, [&]<class T>(T*) {
    const int64_t units = args.p.units;
    if constexpr (sizeof(T) == 2) {
      // elements beyond the row cost as much as those of it
      if (units <= 384) return launch_elements<T, 12>(args, info, stream);
      if (units <= 512) return launch_elements<T, 16>(args, info, stream);
      return launch_elements<T, 32>(args, info, stream);
    } else {
      return units <= 512 ? launch_elements<T, 16>(args, info, stream)
                          : launch_elements<T, 32>(args, info, stream);
    }
  });
}

}  // namespace ghl
