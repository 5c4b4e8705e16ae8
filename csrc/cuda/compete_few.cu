// Competition among up to 128 units: several positions a warp.
#include "cuda/compete_few_planes.cuh"
#include "cuda/compete_few_rows.cuh"

namespace ghl {
namespace {

// Whether the two positions of a word always lie beside each other, at a multiple of their size.
bool are_pairs(const void* data, const Layout& layout, const CompeteParams& p) {
  return layout.stride_position == 1 && layout.stride_unit % 2 == 0 && p.positions % 2 == 0 &&
         (p.batch == 1 || layout.stride_batch % 2 == 0) && reinterpret_cast<uintptr_t>(data) % 4 == 0;
}

}  // namespace

bool takes_few(const CompeteParams& p) {
  if (p.units > kFewUnits) return false;
  if (are_rows(p)) return true;
  return p.u_dtype != DType::f32 && are_pairs(p.u, p.u_layout, p) && (!p.y || are_pairs(p.y, p.y_layout, p));
}

Status launch_few(const CompeteArgs& given, const DeviceInfo& info, Stream stream) {
  const bool rows = are_rows(given.p);
  const CompeteArgs args = with_vectors(given, rows);
  const int64_t units = args.p.units;
  return by_dtype(args.p.u_dtype, [&]<class T>(T*) {
    if constexpr (sizeof(T) == 4) {
      return launch_few_rows<T, 16>(args, info, stream);
    } else if (rows) {
      // elements beyond the row cost as much as those of it
      if (units <= 64) return launch_few_rows<T, 8>(args, info, stream);
      if (units <= 96) return launch_few_rows<T, 12>(args, info, stream);
      return launch_few_rows<T, 16>(args, info, stream);
    } else {
      if (units <= 64) return launch_few_planes<T, 16>(args, stream);
      if (units <= 96) return launch_few_planes<T, 24>(args, stream);
      return launch_few_planes<T, 32>(args, stream);
    }
  });
}

}  // namespace ghl
