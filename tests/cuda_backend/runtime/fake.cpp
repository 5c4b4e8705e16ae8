// The functions of CUDA's runtime that launchers call, on devices that do not exist: each call is answered as
// the test set it up, and those that matter are written down.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

struct Fake {
  std::map<std::string, int> set;  // by the test
  std::set<int> contexts;          // devices that have one
  int current = 0;
  bool has_current = false;  // a context, of this thread
  std::string calls;

  int value(const char* name) { return set[name]; }
  void write(const std::string& call) { calls += call + "\n"; }
};

Fake fake;

std::string number(long long value) { return std::to_string(value); }

CUresult encode(const char* how) {
  fake.write(how + std::string(fake.has_current ? " on " + number(fake.current) : " without a context"));
  return static_cast<CUresult>(fake.value("encode_error"));
}

CUresult encode_tiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                      const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                      CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return encode("tiled");
}

CUresult encode_im2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                       const cuuint64_t*, const int*, const int*, cuuint32_t, cuuint32_t, const cuuint32_t*,
                       CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill) {
  return encode("im2col");
}

CUresult error_string(CUresult, const char** text) {
  *text = "the driver's text";
  return CUDA_SUCCESS;
}

cudaError_t error_of(const char* name) { return static_cast<cudaError_t>(fake.value(name)); }

}  // namespace

extern "C" {

void fake_set(const char* name, int value) { fake.set[name] = value; }
const char* fake_calls() { return fake.calls.c_str(); }
bool fake_has_context(int device) { return fake.contexts.count(device) != 0; }
int fake_current() { return fake.current; }

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = fake.current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  fake.current = device;
  fake.has_current = true;
  fake.contexts.insert(device);
  return error_of("set_device_error");
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = fake.value("attribute");
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  fake.write("attributes on " + number(fake.current));
  *attributes = {};
  attributes->numRegs = fake.value("registers");
  attributes->sharedSizeBytes = static_cast<size_t>(fake.value("static_shared"));
  return error_of("function_error");
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  fake.write("shared " + number(value));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t shared, cudaStream_t) {
  fake.write("launch on " + number(fake.current) + " with " + number(static_cast<long long>(shared)));
  return error_of("launch_error");
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  fake.write("clusters on " + number(fake.current) + " with " +
             number(static_cast<long long>(config->dynamicSmemBytes)));
  return error_of("launch_error");
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const std::string wanted = name;
  *function = wanted == "cuGetErrorString"         ? reinterpret_cast<void*>(error_string)
              : wanted == "cuTensorMapEncodeTiled" ? reinterpret_cast<void*>(encode_tiled)
                                                   : reinterpret_cast<void*>(encode_im2col);
  const bool missing = fake.value("no_encoders") && wanted != "cuGetErrorString";
  *found = missing ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorFake";
}
const char* cudaGetErrorString(cudaError_t) { return "the runtime's text"; }

}  // extern "C"
