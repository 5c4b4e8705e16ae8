// Competition of rows that fit a warp's registers: how a number of elements a lane is launched.
#pragma once

#include "cuda/compete_planes.cuh"
#include "cuda/compete_rows.cuh"

namespace ghl {
namespace {

template <class T, int kElements>
Status launch_elements(const CompeteArgs& given, const DeviceInfo& info, Stream stream) {
  const bool rows = are_rows(given.p);
  const CompeteArgs args = with_vectors(given, rows);
  return rows ? launch_rows<T, kElements>(args, info, stream) : launch_planes<T, kElements>(args, stream);
}

}  // namespace
}  // namespace ghl
