// Competition of rows that fit a warp's registers: how a number of elements a lane is launched.
#pragma once

#include "cuda/compete_planes.cuh"
#include "cuda/compete_rows.cuh"

namespace ghl {
namespace {

template <class T, int kElements>
Status launch_elements(CompeteArgs args, const DeviceInfo& info, Stream stream) {
  const CompeteParams& p = args.p;
  const bool rows = are_rows(p);
  const auto whole = [&](DType dtype) { return !rows || p.units % (dtype == DType::f32 ? 4 : 8) == 0; };
  args.u_vectors = whole(p.u_dtype) && is_aligned(p.u, p.u_dtype, p.u_layout, p.batch, rows);
  args.y_vectors = p.y && whole(p.y_dtype) && is_aligned(p.y, p.y_dtype, p.y_layout, p.batch, rows);
  return rows ? launch_rows<T, kElements>(args, info, stream) : launch_planes<T, kElements>(args, stream);
}

}  // namespace
}  // namespace ghl
