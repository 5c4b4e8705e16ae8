// The pair for Hopper: launching. A host that emulates CUDA has no such kernel; tests/cuda_backend runs it
// with twins of its instructions.
#ifndef GHL_CUDA_ON_HOST

#include <algorithm>
#include <iterator>
#include <utility>

#include "cuda/pair.cuh"
#include "cuda/pair_sm90_driver.h"
#include "cuda/pair_sm90_maps.h"

namespace ghl {
namespace {

using namespace sm90;

using Kernel = void (*)(PairSm90);

const void* address_of(Kernel kernel) { return reinterpret_cast<const void*>(kernel); }

const Encoders& encoders() {
  static const Encoders found = driver_encoders();
  return found;
}

// By the place of its tile's shape in kTileShapes.
template <class T, size_t... places>
Kernel kernel_of(TileShape shape, std::index_sequence<places...>) {
  constexpr Kernel kKernels[] = {
      pair_kernel<T, Tile<kTileShapes[places].chunk, kTileShapes[places].chunks>>...};
  const auto* found = std::find(std::begin(kTileShapes), std::end(kTileShapes), shape);
  return kKernels[found - std::begin(kTileShapes)];
}

Kernel kernel_of(DType dtype, TileShape shape) {
  constexpr std::make_index_sequence<std::size(kTileShapes)> kPlaces;
  return dtype == DType::bf16 ? kernel_of<bf16>(shape, kPlaces) : kernel_of<f16>(shape, kPlaces);
}

// A build without 90a-real has the kernel's name on such a device too, with nothing in it.
bool has_body(Kernel kernel) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, address_of(kernel));
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error == cudaSuccess && can_deal_registers(attributes.numRegs);
}

bool runs_on(int device) {
  static Answers<int, bool> answers;
  bool runs = false;
  answers.get(device, runs, [&](bool& it_does) {
    const DeviceGuard guard(device);
    // one kernel speaks for all: they are compiled together
    it_does = guard.error() == cudaSuccess && encoders().tiled && encoders().im2col &&
              has_body(kernel_of(DType::bf16, kTileShapes[0]));
    return cudaSuccess;
  });
  return runs;
}

// The stream's device is current.
Status launch_clusters(const std::string& what, Kernel kernel, Stream stream, const PairSm90& params) {
  cudaError_t error = allow_shared(address_of(kernel), stream.device);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(params.plan.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(params.plan.clusters * params.plan.cluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = static_cast<cudaStream_t>(stream.handle);
    config.attrs = &attribute;
    config.numAttrs = 1;
    void* arguments[] = {const_cast<PairSm90*>(&params)};
    error = cudaLaunchKernelExC(&config, address_of(kernel), arguments);
  }
  // taken, so that the next check of another library does not report it as its own
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return cuda_status(what, error);
}

}  // namespace

bool pair_sm90_takes(const PairParams& params, const DeviceInfo& info) {
  return sm90::takes(params, info) && runs_on(info.device);
}

int64_t pair_sm90_workspace(const PairParams& params, const DeviceInfo& info) {
  return sm90::workspace_bytes(params, info);
}

Status pair_sm90(const PairParams& from, const DeviceInfo& info, Stream stream) {
  const std::string what = describe(from);
  const Plan plan = plan_of(from, info);
  if (cuts_tiles(plan) && !from.workspace) return Status::failure(what + ": no workspace");
  PairSm90 params = kernel_params(from, plan);
  // before the maps, since a driver encodes them only where a context is current
  const DeviceGuard guard(stream.device);
  Status status = cuda_status(what, guard.error());
  if (status.ok) status = encode_maps(encoders(), what, from, params);
  if (!status.ok) return status;
  status = launch_clusters(what, kernel_of(from.dtype, plan.tile), stream, params);
  if (!status.ok || !cuts_tiles(plan)) return status;
  return launch(what, sum_partials, {partial_sum_blocks(plan), kWarpgroup}, stream, params);
}

}  // namespace ghl

#endif
