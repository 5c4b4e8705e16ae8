// The pair for Hopper: launching. A host that emulates CUDA has no such kernel; tests/cuda_backend runs it
// with twins of its instructions.
#ifndef GHL_CUDA_ON_HOST

#include "cuda/pair.cuh"
#include "cuda/pair_sm90_driver.h"
#include "cuda/pair_sm90_maps.h"

namespace ghl {
namespace {

using namespace sm90;

Status launch_clusters(const std::string& what, void (*kernel)(PairSm90), Stream stream,
                       const PairSm90& params) {
  const DeviceGuard guard(stream.device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(params.plan.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(params.plan.segments * params.plan.cluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = static_cast<cudaStream_t>(stream.handle);
    config.attrs = &attribute;
    config.numAttrs = 1;
    void* arguments[] = {const_cast<PairSm90*>(&params)};
    error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  }
  // taken, so that the next check of another library does not report it as its own
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return cuda_status(what, error);
}

}  // namespace

bool pair_sm90_takes(const PairParams& params, const DeviceInfo& info) { return sm90::takes(params, info); }

int64_t pair_sm90_workspace(const PairParams& params, const DeviceInfo& info) {
  return sm90::workspace_bytes(params, info);
}

Status pair_sm90(const PairParams& from, const DeviceInfo& info, Stream stream) {
  const std::string what = describe(from);
  const Plan plan = plan_of(from, info);
  if (cuts_tiles(plan) && !from.workspace) return Status::failure(what + ": no workspace");
  PairSm90 params = kernel_params(from, plan);
  static const Encoders encoders = driver_encoders();
  Status status = encode_maps(encoders, what, from, params);
  if (!status.ok) return status;
  status =
      launch_clusters(what, from.dtype == DType::bf16 ? pair_kernel<bf16> : pair_kernel<f16>, stream, params);
  if (!status.ok || !cuts_tiles(plan)) return status;
  return launch(what, sum_partials, {partial_sum_blocks(plan), kWarpgroup}, stream, params);
}

}  // namespace ghl

#endif
