// Calls of launchers for tests in Python, with tensors that nobody reads.
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/pair.cuh"
#include "ghl/check_device.h"
#include "ghl/foreach.h"

namespace {

using namespace ghl;

template <class T>
T* somewhere() {
  return reinterpret_cast<T*>(uintptr_t{1} << 20);
}

const char* message_of(const Status& status) {
  static std::string message;
  message = status.message;
  return message.c_str();
}

// A linear layer that the form for sm_90 takes, of so few positions that no tile is cut.
PairParams pair_params() {
  PairParams params;
  params.geometry.batch = 32;  // one stage, which is not cut
  params.geometry.channels = 64;
  for (int i = 0; i < 3; ++i) {
    params.geometry.in_size[i] = params.geometry.out_size[i] = params.geometry.kernel[i] = 1;
    params.geometry.stride[i] = params.geometry.dilation[i] = 1;
  }
  params.dtype = DType::bf16;
  params.x = somewhere<void>();
  params.x_stride_batch = 64;
  params.x_stride_channel = 1;
  params.units = 64;
  params.u = params.grad = {somewhere<void>(), 1, 64, 0, 1};
  params.logsumexp = somewhere<float>();
  params.a = params.g = somewhere<float>();
  params.result_layout = {64, 1, 1};
  params.result_channels = 64;
  return params;
}

DeviceInfo hopper(int device) { return {90, 132, 227 << 10, device}; }

struct Nothing {};
__global__ void kernel(const Nothing) {}

}  // namespace

extern "C" {

bool sm90_takes(int device) { return pair_sm90_takes(pair_params(), hopper(device)); }

const char* sm90_pair(int device) { return message_of(pair_sm90(pair_params(), hopper(device), {device})); }

const char* check_device(int device) { return message_of(check_device_cuda(device)); }

const char* launch_kernel(int device, size_t shared) {
  return message_of(launch("a kernel", kernel, {1, 32, shared}, {device}, Nothing{}));
}

// `count` layers, layer i of i + 1 rows and 8 columns; those from `empty_from` on have no rows.
const char* learn(int count, int empty_from) {
  std::vector<ForeachLayer> layers(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    ForeachLayer& layer = layers[static_cast<size_t>(i)];
    layer.rows = i < empty_from ? i + 1 : 0;
    layer.columns = 8;
    layer.a = somewhere<float>();
    layer.weight = layer.out = somewhere<void>();
    layer.a_stride = layer.weight_stride = layer.out_stride = 8;
  }
  ForeachParams params;
  params.layers = layers.data();
  params.count = count;
  params.target = Target::learn;
  params.workspace = somewhere<float>();
  return message_of(foreach_epilogue_cuda(params, {0}));
}
}
