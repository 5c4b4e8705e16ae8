// The Hopper pair kernel on a CPU: the same source, from the problem's parameters to the results, with twins
// of its instructions (csrc/cuda/host/ptx_sm90.h) and of the driver's encoders of tensor maps.
#include "cuda/activity.cuh"
#include "cuda/device.cuh"
#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"

// From here on a kernel's threads are those of a block of a cluster.
inline constexpr ghl::host::ClusterThread cluster_thread;
inline constexpr ghl::host::ClusterBlock cluster_block;
#define threadIdx cluster_thread
#define blockIdx cluster_block
#define dynamic_shared host::own_shared

#include "cuda/pair_sm90_maps.h"

namespace {

using namespace ghl;

bool is_multiple(uint64_t value, uint64_t of) { return value % of == 0; }

uint64_t element_of(CUtensorMapDataType type) {
  return type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? 2 : 4;
}

// What both encoders require of a tensor.
bool is_valid(CUtensorMapDataType type, cuuint32_t rank, const void* data, const cuuint64_t* size,
              const cuuint64_t* stride) {
  if (!is_multiple(reinterpret_cast<uintptr_t>(data), 16)) return false;
  uint64_t step = element_of(type);  // of the dimension before
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (size[i] == 0 || size[i] > uint64_t{1} << 32) return false;
    if (i == 0) continue;
    const uint64_t next = stride[i - 1];
    if (!is_multiple(next, 16) || next >= uint64_t{1} << 40) return false;
    if (!is_multiple(next, step) || next / step < size[i - 1]) return false;
    step = next;
  }
  return true;
}

host::TensorMap describe_tensor(CUtensorMapDataType type, cuuint32_t rank, const void* data,
                                const cuuint64_t* size, const cuuint64_t* stride,
                                CUtensorMapSwizzle swizzle) {
  host::TensorMap map{};
  map.data = static_cast<const unsigned char*>(data);
  map.rank = static_cast<uint8_t>(rank);
  map.element = static_cast<uint8_t>(element_of(type));
  map.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 0;
  for (cuuint32_t i = 0; i < rank; ++i) {
    map.size[i] = static_cast<uint32_t>(size[i]);
    if (i > 0) map.stride[i - 1] = stride[i - 1];
  }
  return map;
}

CUresult encode_tiled(CUtensorMap* result, CUtensorMapDataType type, cuuint32_t rank, void* data,
                      const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                      const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  host::TensorMap map = describe_tensor(type, rank, data, size, stride, swizzle);
  const bool fits = !map.swizzle || box[0] * map.element <= map.swizzle;
  if (rank != 2 || box[0] * map.element % 16 != 0 || box[0] > 128 || box[1] > 128 || !fits ||
      !is_valid(type, rank, data, size, stride)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  map.columns = static_cast<uint8_t>(box[0]);
  map.rows = static_cast<uint8_t>(box[1]);
  std::memcpy(result, &map, sizeof map);
  return CUDA_SUCCESS;
}

CUresult encode_im2col(CUtensorMap* result, CUtensorMapDataType type, cuuint32_t rank, void* data,
                       const cuuint64_t* size, const cuuint64_t* stride, const int* lower, const int* upper,
                       cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* step, CUtensorMapInterleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  host::TensorMap map = describe_tensor(type, rank, data, size, stride, swizzle);
  const int reach = rank == 5 ? 16 : rank == 4 ? 128 : 0;
  bool valid = reach > 0 && channels * map.element <= map.swizzle && pixels <= 128 &&
               is_valid(type, rank, data, size, stride);
  for (cuuint32_t i = 0; valid && i < rank - 2; ++i) {
    valid = lower[i] >= -reach && lower[i] < reach && upper[i] >= -reach && upper[i] < reach;
    valid = valid && static_cast<int64_t>(size[i + 1]) + upper[i] - lower[i] > 0;
    valid = valid && step[i + 1] >= 1 && step[i + 1] <= 8;
    map.lower[i] = static_cast<int16_t>(lower[i]);
    map.upper[i] = static_cast<int16_t>(upper[i]);
    map.step[i + 1] = static_cast<uint8_t>(step[i + 1]);
  }
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  map.columns = static_cast<uint8_t>(channels);
  map.rows = static_cast<uint8_t>(pixels);
  map.im2col = true;
  std::memcpy(result, &map, sizeof map);
  return CUDA_SUCCESS;
}

// The kernel of the plan's tile.
template <class T, size_t... places>
void run_kernel(const sm90::PairSm90& params, std::index_sequence<places...>) {
  using namespace sm90;
  const auto run_if = [&]<size_t place>() {
    constexpr TileShape shape = kTileShapes[place];
    if (params.plan.tile == shape) pair_kernel<T, Tile<shape.chunk, shape.chunks>>(params);
  };
  (run_if.template operator()<places>(), ...);
}

template <class T>
void run_kernel(const sm90::PairSm90& params) {
  run_kernel<T>(params, std::make_index_sequence<std::size(sm90::kTileShapes)>());
}

template <class Body>
void launch_blocks(int64_t blocks, int64_t threads, const Body& body) {
  host::launch({static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, 0, body);
}

Status run(const PairParams& from, const DeviceInfo& info, uint32_t seed) {
  using namespace sm90;
  static std::vector<unsigned char> memory(2 * host::cluster_shared + 1024);
  // what a block finds in shared memory is another's: here NaN
  std::fill(memory.begin(), memory.end(), 0xff);
  void* start = memory.data();
  size_t space = memory.size();
  host::cluster().shared =
      static_cast<unsigned char*>(std::align(1024, 2 * host::cluster_shared, start, space));
  host::cluster().random = seed;
  host::cluster().copies.clear();
  const Plan plan = plan_of(from, info);
  PairSm90 params = kernel_params(from, plan);
  Status status = encode_maps({encode_tiled, encode_im2col}, "test", from, params);
  if (!status.ok) return status;
  launch_blocks(plan.clusters, plan.cluster * kThreads,
                [&] { from.dtype == DType::bf16 ? run_kernel<bf16>(params) : run_kernel<f16>(params); });
  if (!host::cluster().copies.empty()) return Status::failure("copies are under way after the last block");
  if (cuts_tiles(plan)) launch_blocks(partial_sum_blocks(plan), kWarpgroup, [&] { sum_partials(params); });
  return {};
}

// The fields of a problem in this order.
PairParams read_params(const int64_t* field) {
  PairParams params;
  ConvGeometry& geometry = params.geometry;
  const auto pointer = [&] { return reinterpret_cast<void*>(*field++); };
  geometry.batch = *field++;
  geometry.channels = *field++;
  geometry.groups = *field++;
  for (int64_t* triple : {geometry.in_size, geometry.out_size, geometry.kernel, geometry.stride,
                          geometry.padding, geometry.dilation}) {
    for (int i = 0; i < 3; ++i) triple[i] = *field++;
  }
  params.dtype = static_cast<DType>(*field++);
  params.x = pointer();
  params.x_stride_batch = *field++;
  params.x_stride_channel = *field++;
  for (int64_t& stride : params.x_stride) stride = *field++;
  params.units = *field++;
  for (Responses* responses : {&params.u, &params.grad}) {
    responses->data = pointer();
    responses->inner = *field++;
    responses->stride_batch = *field++;
    responses->stride_position = *field++;
    responses->stride_unit = *field++;
  }
  params.activity = static_cast<Activity>(*field++);
  params.selects = *field++ != 0;
  params.anti = *field++ != 0;
  params.threshold = static_cast<const float*>(pointer());
  params.cut = static_cast<const int32_t*>(pointer());
  params.logsumexp = static_cast<const float*>(pointer());
  params.first = static_cast<const int32_t*>(pointer());
  params.a = static_cast<float*>(pointer());
  params.g = static_cast<float*>(pointer());
  params.result_layout = {field[0], field[1], field[2]};
  params.result_channels = field[3];
  return params;
}

DeviceInfo device_with(int64_t multiprocessors) { return {90, static_cast<int>(multiprocessors), 227 << 10}; }

}  // namespace

extern "C" {

bool takes(const int64_t* fields, int64_t multiprocessors) {
  return sm90::takes(read_params(fields), device_with(multiprocessors));
}

// Bytes of the workspace, blocks of a cluster, stages of a tile, tiles, segments.
void plan(const int64_t* fields, int64_t multiprocessors, int64_t* result) {
  const PairParams params = read_params(fields);
  const DeviceInfo info = device_with(multiprocessors);
  const sm90::Plan made = sm90::plan_of(params, info);
  result[0] = sm90::workspace_bytes(params, info);
  result[1] = made.cluster;
  result[2] = made.stages;
  result[3] = made.tiles;
  result[4] = made.segments;
}

// Null, or what went wrong.
const char* pair(const int64_t* fields, double temperature, int64_t multiprocessors, void* workspace,
                 int64_t schedule, int64_t seed) {
  static std::string message;
  PairParams params = read_params(fields);
  params.temperature = static_cast<float>(temperature);
  params.workspace = workspace;
  host::schedule(static_cast<host::Schedule>(schedule), static_cast<unsigned>(seed));
  try {
    const Status status = run(params, device_with(multiprocessors), static_cast<uint32_t>(seed));
    message = status.message;
    return status.ok ? nullptr : message.c_str();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
}
