// Smallest kernels that show whether each instruction of csrc/cuda/ptx_sm90.cuh does here what the Hopper
// pair kernel takes it to do. Built as a shared library: probe_count(), probe_name(i), probe_run(i), which
// returns null or says what is wrong. For sm_90a.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cuda/pair_sm90_driver.h"
#include "cuda/pair_sm90_layout.h"
#include "cuda/ptx_sm90.cuh"

namespace {

using namespace ghl;
using namespace ghl::sm90;

constexpr int kChunk = 64;  // channels of a box that is copied
constexpr int kChunkBytes = chunk_bytes(kChunk);
constexpr int kBoxElements = kStagePositions * kChunk;
constexpr uint64_t kNanoseconds = 2'000'000'000;  // until a wait is given up

// --- device -------------------------------------------------------------------------------------

struct Probe {
  CUtensorMap map;
  CUtensorMap other;  // the right operand's, of the chunks of a tile
  Source source;
  bool multicast;
  int32_t start[5];  // coordinates of the copy, contiguous dimension first
  uint16_t offsets[3];
  uint16_t* box;   // [blocks, positions of a stage, 64] as shared memory holds it
  float* product;  // [64, columns of a tile]
  int* count;
};

__device__ void wait_or_trap(uint32_t barrier, uint32_t parity) {
  const uint64_t begin = ptx::globaltimer();
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
    if (ptx::globaltimer() - begin > kNanoseconds) __trap();
  }
}

__device__ void begin_barrier(uint32_t barrier, uint32_t arrivals) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, arrivals);
    ptx::fence_mbarrier_init();
  }
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

__device__ void copy(const Probe& probe, uint32_t target, uint32_t barrier) {
  const auto& [c, w, h, d, n] = probe.start;
  const auto& [i, j, k] = probe.offsets;
  constexpr uint16_t kBoth = 3;
  const CUtensorMap& map = probe.map;
  if (probe.source == Source::rows) {
    if (probe.multicast) {
      ptx::cp_async_bulk_tensor_2d_multicast(target, map, barrier, c, w, kBoth);
    } else {
      ptx::cp_async_bulk_tensor_2d(target, map, barrier, c, w);
    }
  } else if (probe.source == Source::image) {
    if (probe.multicast) {
      ptx::cp_async_bulk_tensor_4d_im2col_multicast(target, map, barrier, c, w, h, n, i, j, kBoth);
    } else {
      ptx::cp_async_bulk_tensor_4d_im2col(target, map, barrier, c, w, h, n, i, j);
    }
  } else if (probe.multicast) {
    ptx::cp_async_bulk_tensor_5d_im2col_multicast(target, map, barrier, c, w, h, d, n, i, j, k, kBoth);
  } else {
    ptx::cp_async_bulk_tensor_5d_im2col(target, map, barrier, c, w, h, d, n, i, j, k);
  }
}

// Every block of the cluster shows what one copy, by its first block, has left in its shared memory.
__global__ void copy_kernel(const __grid_constant__ Probe probe) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  unsigned char* const memory = dynamic_shared<unsigned char>();
  const uint32_t target = ptx::shared_address(memory), barrier = target + kChunkBytes;
  const uint32_t rank = blockIdx.x;  // one cluster is launched
  begin_barrier(barrier, 1);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(probe.map);
    ptx::mbarrier_arrive_expect_tx(barrier, kChunkBytes);
    if (rank == 0) copy(probe, target, barrier);
  }
  wait_or_trap(barrier, 0);
  for (int i = threadIdx.x; i < kBoxElements; i += blockDim.x) {
    probe.box[rank * kBoxElements + i] = reinterpret_cast<const uint16_t*>(memory)[i];
  }
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
#endif
}

template <bool half, bool from_registers, class Shape>
__global__ void __launch_bounds__(kWarpgroup) wgmma_kernel(const __grid_constant__ Probe probe) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  unsigned char* const memory = dynamic_shared<unsigned char>();
  const uint32_t left = ptx::shared_address(memory), right = left + kResponseBytes;
  const uint32_t barrier = right + kInputBytes;
  constexpr int kBytes = chunk_bytes(Shape::chunk), kAccumulators = accumulators_of(Shape::columns);
  const int thread = static_cast<int>(threadIdx.x);
  begin_barrier(barrier, 1);
  if (thread == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, kResponseBytes + Shape::chunks * kBytes);
    ptx::cp_async_bulk_tensor_2d(left, probe.map, barrier, 0, 0);
    for (int i = 0; i < Shape::chunks; ++i) {
      ptx::cp_async_bulk_tensor_2d(right + i * kBytes, probe.other, barrier, i * Shape::chunk, 0);
    }
  }
  wait_or_trap(barrier, 0);
  uint32_t a[kSteps][4];
  for (int k = 0; k < kSteps; ++k) {
    ptx::ldmatrix_x4_trans(a[k], memory + k * step_bytes(kTileUnits) +
                                     swizzled(ldmatrix_position(thread), ldmatrix_unit(thread)));
  }
  float d[kAccumulators] = {};
  const uint64_t x = operand_descriptor(right, Shape::chunk, kBytes);
  const uint64_t e = operand_descriptor(left, kTileUnits, 0);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint64_t b = x + k * descriptor_step(step_bytes(Shape::chunk));
    if constexpr (from_registers) {
      half ? ptx::wgmma_m64k16_f16_rs(d, a[k], b) : ptx::wgmma_m64k16_bf16_rs(d, a[k], b);
    } else {
      const uint64_t step = e + k * descriptor_step(step_bytes(kTileUnits));
      half ? ptx::wgmma_m64k16_f16_ss(d, step, b) : ptx::wgmma_m64k16_bf16_ss(d, step, b);
    }
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_hold(d);
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    probe.product[accumulator_unit(thread, i) * Shape::columns + accumulator_column(thread, i)] = d[i];
  }
#endif
}

// Both blocks arrive at both blocks' barriers, twice, so that a phase of either parity ends.
__global__ void arrive_kernel(const __grid_constant__ Probe probe) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint32_t barrier = ptx::shared_address(dynamic_shared<unsigned char>());
  begin_barrier(barrier, 2);
  for (uint32_t phase = 0; phase < 2; ++phase) {
    if (threadIdx.x < 2) ptx::mbarrier_arrive_cluster(ptx::mapa(barrier, threadIdx.x));
    wait_or_trap(barrier, phase);
  }
  if (threadIdx.x == 0) probe.count[blockIdx.x] = 1;
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
#endif
}

__global__ void __launch_bounds__(kThreads, 1) setmaxnreg_kernel(const __grid_constant__ Probe probe) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if (threadIdx.x / kWarpgroup == kConsumers) {
    ptx::setmaxnreg_dec<56>();
  } else {
    ptx::setmaxnreg_inc<224>();
  }
  atomicAdd(probe.count, 1);
#endif
}

// --- host ---------------------------------------------------------------------------------------

// An array on both sides: filled here, sent to the device, brought back.
template <class T>
struct Shared {
  explicit Shared(size_t count) : host(count) { cudaMalloc(&device, bytes()); }
  ~Shared() { cudaFree(device); }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  size_t bytes() const { return host.size() * sizeof(T); }
  T* send() {
    cudaMemcpy(device, host.data(), bytes(), cudaMemcpyHostToDevice);
    return device;
  }
  void bring() { cudaMemcpy(host.data(), device, bytes(), cudaMemcpyDeviceToHost); }
  T& operator[](size_t i) { return host[i]; }
  std::vector<T> host;
  T* device = nullptr;
};

std::string launch_probe(void (*kernel)(Probe), unsigned blocks, unsigned threads, size_t shared,
                         const Probe& probe) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<Probe*>(&probe)};
  cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// A small image: element (n, d, h, w, c) holds its index, so that a copy shows where it came from.
struct Image {
  int64_t n, d, h, w, c;
  int64_t count() const { return n * d * h * w * c; }
};

uint16_t element_at(const Image& image, int64_t n, int64_t d, int64_t h, int64_t w, int64_t c) {
  const bool inside = n >= 0 && n < image.n && d >= 0 && d < image.d && h >= 0 && h < image.h && w >= 0 &&
                      w < image.w && c < image.c;
  // 1 and more, for 0 is what lies outside
  return inside ? static_cast<uint16_t>(1 + (((n * image.d + d) * image.h + h) * image.w + w) * image.c + c)
                : 0;
}

std::string compare_box(const uint16_t* box, const std::function<uint16_t(int, int)>& expected) {
  for (int row = 0; row < kStagePositions; ++row) {
    for (int column = 0; column < kChunk; ++column) {
      const uint16_t found = box[swizzled(row, column) / kElement];
      if (found != expected(row, column)) {
        return "row " + std::to_string(row) + ", column " + std::to_string(column) + " holds " +
               std::to_string(found) + ", not " + std::to_string(expected(row, column));
      }
    }
  }
  return "";
}

Tensor image_tensor(const Image& image, const void* data, Source source) {
  Tensor tensor = tensor_of(data, image.c);
  if (source == Source::rows) {
    add_dimension(tensor, image.n * image.d * image.h * image.w, image.c);
    return tensor;
  }
  add_dimension(tensor, image.w, image.c);
  add_dimension(tensor, image.h, image.c * image.w);
  if (source == Source::volume) add_dimension(tensor, image.d, image.c * image.w * image.h);
  add_dimension(tensor, image.n, image.c * image.w * image.h * image.d);
  return tensor;
}

// Every size another one along every dimension, so that no two can be taken for each other. Which of an
// image's dimensions has one tap and no padding differs; of the last tap all offsets that can be are above
// zero. The copy begins at a position inside and runs past the end.
Patches probe_patches(const Image& image, Source source, int turn) {
  constexpr int32_t kKernel[3] = {3, 2, 1}, kPadding[3] = {2, 1, 0}, kDilation[3] = {2, 3, 1};
  constexpr int32_t kStride[3] = {2, 1, 3};
  Patches patches;
  const int64_t size[3] = {image.w, image.h, image.d};
  for (int i = 0; i < (source == Source::volume ? 3 : 2); ++i) {
    const int choice = (i + turn) % 3;
    patches.kernel[i] = kKernel[choice];
    patches.stride[i] = kStride[i];
    patches.padding[i] = kPadding[choice];
    patches.dilation[i] = kDilation[choice];
    patches.out_size[i] = static_cast<int32_t>(pixels_in_box(patches, i, size[i]));
  }
  return patches;
}

uint16_t patch_element(const Image& image, const Patches& patches, int32_t position, int32_t tap, int32_t c) {
  const Position at = position_of(patches, position);
  int64_t pixel[3];
  for (int i = 0; i < 3; ++i) {
    pixel[i] =
        at.at[i] * patches.stride[i] - patches.padding[i] + tap % patches.kernel[i] * patches.dilation[i];
    tap /= patches.kernel[i];
  }
  return element_at(image, at.image, pixel[2], pixel[1], pixel[0], c);
}

std::string probe_copy(Source source, bool multicast, int turn = 0) {
  const Image image = source == Source::volume ? Image{2, 8, 6, 9, 72} : Image{3, 1, 9, 11, 72};
  const int32_t first_channel = 16;
  Shared<uint16_t> x(image.count()), box(2 * kBoxElements);
  for (int64_t i = 0; i < image.count(); ++i) x[i] = static_cast<uint16_t>(1 + i);
  Probe probe{};
  probe.source = source;
  probe.multicast = multicast;
  probe.box = box.send();
  const Tensor tensor = image_tensor(image, x.send(), source);
  const Patches patches = source == Source::rows ? Patches{} : probe_patches(image, source, turn);
  const int32_t tap = patches.kernel[0] * patches.kernel[1] * patches.kernel[2] - 1;
  const int64_t positions = source == Source::rows
                                ? tensor.size[1]
                                : image.n * patches.out_size[0] * patches.out_size[1] * patches.out_size[2];
  const int32_t begin = static_cast<int32_t>(positions) - 50;
  const Status status = source == Source::rows
                            ? encode_rows(driver_encoders(), "probe", probe.map, tensor,
                                          map_type(DType::bf16), kElement, box_of_rows(kChunk))
                            : encode_patches(driver_encoders(), "probe", probe.map, tensor,
                                             map_type(DType::bf16), patches, kChunk);
  if (!status.ok) return status.message;
  const Position at = position_of(patches, begin);
  probe.start[0] = first_channel;
  for (int i = 0; i < 3; ++i) {
    probe.start[1 + i] = source == Source::rows ? begin : pixel_of(patches, at, i);
    probe.offsets[i] = offset_of(offsets_of(patches, tap), i);
  }
  probe.start[4] = at.image;
  const unsigned blocks = multicast ? 2 : 1;
  std::string wrong = launch_probe(copy_kernel, blocks, 128, kChunkBytes + 8, probe);
  box.bring();
  for (unsigned rank = 0; wrong.empty() && rank < blocks; ++rank) {
    wrong = compare_box(box.host.data() + rank * kBoxElements, [&](int row, int column) -> uint16_t {
      const int32_t c = first_channel + column;
      if (source != Source::rows) return patch_element(image, patches, begin + row, tap, c);
      const bool inside = begin + row < positions && c < image.c;
      return inside ? static_cast<uint16_t>(1 + (begin + row) * image.c + c) : 0;
    });
  }
  return wrong;
}

// Small integers, whose sums float holds exactly.
float value_at(int row, int column) { return static_cast<float>((row * 7 + column * 3) % 11 - 5); }

uint16_t bits_of(float value, bool half) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (!half) return static_cast<uint16_t>(bits >> 16);
  const uint32_t exponent = bits >> 23 & 0xff;
  return static_cast<uint16_t>(
      value == 0 ? 0 : (bits >> 16 & 0x8000) | (exponent - 112) << 10 | (bits >> 13 & 0x3ff));
}

template <bool half, bool from_registers, class Shape = Tile<64, 4>>
std::string probe_wgmma() {
  constexpr int kColumns = Shape::columns;
  Shared<uint16_t> left(kStagePositions * kTileUnits), right(kStagePositions * kColumns);
  Shared<float> product(kTileUnits * kColumns);
  for (int p = 0; p < kStagePositions; ++p) {
    for (int i = 0; i < kTileUnits; ++i) left[p * kTileUnits + i] = bits_of(value_at(p, i), half);
    for (int i = 0; i < kColumns; ++i) right[p * kColumns + i] = bits_of(value_at(i, p), half);
  }
  Probe probe{};
  probe.product = product.send();
  Tensor a = tensor_of(left.send(), kTileUnits), b = tensor_of(right.send(), kColumns);
  add_dimension(a, kStagePositions, kTileUnits);
  add_dimension(b, kStagePositions, kColumns);
  const CUtensorMapDataType type = map_type(half ? DType::f16 : DType::bf16);
  Status status =
      encode_rows(driver_encoders(), "probe", probe.map, a, type, kElement, box_of_rows(kTileUnits));
  if (status.ok) {
    status =
        encode_rows(driver_encoders(), "probe", probe.other, b, type, kElement, box_of_rows(Shape::chunk));
  }
  if (!status.ok) return status.message;
  const std::string wrong = launch_probe(wgmma_kernel<half, from_registers, Shape>, 1, kWarpgroup,
                                         kResponseBytes + kInputBytes + 8, probe);
  if (!wrong.empty()) return wrong;
  product.bring();
  for (int i = 0; i < kTileUnits * kColumns; ++i) {
    float expected = 0;
    for (int p = 0; p < kStagePositions; ++p)
      expected += value_at(p, i / kColumns) * value_at(i % kColumns, p);
    if (product[i] != expected) {
      return "element " + std::to_string(i) + " is " + std::to_string(product[i]) + ", not " +
             std::to_string(expected);
    }
  }
  return "";
}

std::string probe_count_of(void (*kernel)(Probe), unsigned blocks, unsigned threads, int expected) {
  Shared<int> count(2);
  Probe probe{};
  probe.count = count.send();
  const std::string wrong = launch_probe(kernel, blocks, threads, 1024, probe);
  count.bring();
  const int found = count[0] + count[1];
  return wrong.empty() && found != expected ? "counted " + std::to_string(found) : wrong;
}

struct Named {
  const char* name;
  std::function<std::string()> run;
};

const std::vector<Named>& probes() {
  static const std::vector<Named> all = {
      {"cp.async.bulk.tensor.2d", [] { return probe_copy(Source::rows, false); }},
      {"cp.async.bulk.tensor.2d multicast", [] { return probe_copy(Source::rows, true); }},
      {"cp.async.bulk.tensor.4d im2col", [] { return probe_copy(Source::image, false); }},
      {"cp.async.bulk.tensor.4d im2col multicast", [] { return probe_copy(Source::image, true); }},
      {"cp.async.bulk.tensor.4d im2col, turned", [] { return probe_copy(Source::image, false, 2); }},
      {"cp.async.bulk.tensor.5d im2col", [] { return probe_copy(Source::volume, false); }},
      {"cp.async.bulk.tensor.5d im2col, turned", [] { return probe_copy(Source::volume, false, 1); }},
      {"cp.async.bulk.tensor.5d im2col, turned twice", [] { return probe_copy(Source::volume, false, 2); }},
      {"cp.async.bulk.tensor.5d im2col multicast", [] { return probe_copy(Source::volume, true); }},
      {"wgmma bf16, both operands in shared memory", probe_wgmma<false, false>},
      {"wgmma bf16, one operand in registers", probe_wgmma<false, true>},
      {"wgmma f16, both operands in shared memory", probe_wgmma<true, false>},
      {"wgmma f16, one operand in registers", probe_wgmma<true, true>},
      {"wgmma bf16, 192 columns", probe_wgmma<false, true, Tile<64, 3>>},
      {"wgmma bf16, 64 columns", probe_wgmma<false, true, Tile<64, 1>>},
      {"wgmma bf16, 224 columns in rows of 64 bytes", probe_wgmma<false, true, Tile<32, 7>>},
      {"wgmma f16, 256 columns in rows of 64 bytes", probe_wgmma<true, false, Tile<32, 8>>},
      {"mbarrier.arrive of a cluster", [] { return probe_count_of(arrive_kernel, 2, 32, 2); }},
      {"setmaxnreg", [] { return probe_count_of(setmaxnreg_kernel, 1, kThreads, kThreads); }},
  };
  return all;
}

}  // namespace

extern "C" {

int probe_count() { return static_cast<int>(probes().size()); }

const char* probe_name(int index) { return probes()[index].name; }

const char* probe_run(int index) {
  static std::string message;
  message = probes()[index].run();
  return message.empty() ? nullptr : message.c_str();
}
}
