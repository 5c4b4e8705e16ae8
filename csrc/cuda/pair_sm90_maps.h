// From a problem to the parameters of its launch: which problems the Hopper kernel takes, and the tensor maps
// of their tensors. Host code that needs the driver's types but not the driver.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <array>
#include <optional>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/pair_sm90_kernel.cuh"

namespace ghl::sm90 {

// --- tensor maps --------------------------------------------------------------------------------

constexpr int64_t kAlignment = 16;  // bytes, of addresses and strides
constexpr int64_t kMaxStride = int64_t{1} << 40;
constexpr int64_t kMaxCoordinate = int64_t{1} << 30;
constexpr int64_t kMaxSize = int64_t{1}
                             << 20;  // of an image, a kernel, a stride: their products are coordinates

// A tensor as a map sees it: up to five dimensions, the contiguous one first.
struct Tensor {
  const void* data = nullptr;
  int rank = 0;
  std::array<int64_t, 5> size{};
  std::array<int64_t, 5> stride{};  // elements; of the first dimension 1
};

inline void add_dimension(Tensor& tensor, int64_t size, int64_t stride) {
  tensor.size[tensor.rank] = size;
  tensor.stride[tensor.rank] = stride;
  ++tensor.rank;
}

// Elements that one step along a dimension must pass: all of the dimension before.
inline int64_t extent_before(const Tensor& tensor, int i) {
  return tensor.size[i - 1] * tensor.stride[i - 1];
}

// Dimensions of size 1 have no stride to speak of, so they get one that a map accepts: that of the next
// longer dimension, or where there is none what the dimensions before take up.
inline Tensor with_strides_of_ones(Tensor tensor) {
  constexpr int64_t kStep = kAlignment / kElement;
  for (int i = 1; i < tensor.rank; ++i) {
    if (tensor.size[i] != 1) continue;
    int next = i;
    while (next < tensor.rank && tensor.size[next] == 1) ++next;
    tensor.stride[i] =
        next < tensor.rank ? tensor.stride[next] : ceil_of(extent_before(tensor, i), kStep) * kStep;
  }
  return tensor;
}

inline Tensor tensor_of(const void* data, int64_t contiguous) { return {data, 1, {contiguous}, {1}}; }

// The manual's rules for cuTensorMapEncodeTiled and Im2col. By its formula for strides a dimension lies whole
// within a step of the next one, in as many steps of its own as you like: no overlaps, no permutations.
inline bool fits_map(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.data) % kAlignment != 0) return false;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.size[i] < 1 || tensor.size[i] > kMaxCoordinate) return false;
    if (i == 0) continue;
    const int64_t stride = tensor.stride[i], bytes = stride * kElement;
    if (bytes % kAlignment != 0 || bytes >= kMaxStride) return false;
    if (stride < extent_before(tensor, i) || stride % tensor.stride[i - 1] != 0) return false;
  }
  return true;
}

// Distance between the rows of positions, or nothing where x is not a matrix with a row for each position.
inline std::optional<int64_t> row_stride(const PairParams& params) {
  const ConvGeometry& geometry = params.geometry;
  int64_t rows = 1, stride = 0;
  for (int i = 2; i >= -1; --i) {
    const int64_t size = i < 0 ? geometry.batch : geometry.in_size[i];
    const int64_t next = i < 0 ? params.x_stride_batch : params.x_stride[i];
    if (i >= 0 && (geometry.kernel[i] != 1 || geometry.stride[i] != 1 || geometry.padding[i] != 0)) return {};
    if (size == 1) continue;
    if (rows > 1 && next != stride * rows) return {};
    if (rows == 1) stride = next;
    rows *= size;
  }
  return stride;
}

inline bool is_flat(const ConvGeometry& geometry) {
  return geometry.in_size[0] == 1 && geometry.out_size[0] == 1 && geometry.kernel[0] == 1 &&
         geometry.padding[0] == 0;
}

inline Source source_of(const PairParams& params) {
  if (row_stride(params)) return Source::rows;
  return is_flat(params.geometry) ? Source::image : Source::volume;
}

inline Tensor input_tensor(const PairParams& params, Source source) {
  const ConvGeometry& geometry = params.geometry;
  Tensor tensor = tensor_of(params.x, geometry.channels);
  if (source == Source::rows) {
    add_dimension(tensor, geometry.positions(), *row_stride(params));
    return with_strides_of_ones(tensor);
  }
  for (int i = 2; i >= (source == Source::volume ? 0 : 1); --i) {
    add_dimension(tensor, geometry.in_size[i], params.x_stride[i]);
  }
  add_dimension(tensor, geometry.batch, params.x_stride_batch);
  return with_strides_of_ones(tensor);
}

inline bool is_matrix(const Responses& responses) {
  return responses.inner == 1 || responses.stride_batch == responses.inner * responses.stride_position;
}

inline Tensor response_tensor(const PairParams& params, const Responses& responses) {
  Tensor tensor = tensor_of(responses.data, params.units);
  add_dimension(tensor, params.geometry.positions(),
                responses.inner == 1 ? responses.stride_batch : responses.stride_position);
  return with_strides_of_ones(tensor);
}

inline CUtensorMapDataType map_type(DType dtype) {
  return dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

struct MapShape {
  std::array<cuuint64_t, 5> size{};
  std::array<cuuint64_t, 4> stride{};  // bytes, without the first dimension
};

inline MapShape map_shape(const Tensor& tensor, int64_t element) {
  MapShape shape;
  for (int i = 0; i < tensor.rank; ++i) {
    shape.size[i] = static_cast<cuuint64_t>(tensor.size[i]);
    if (i > 0) shape.stride[i - 1] = static_cast<cuuint64_t>(tensor.stride[i] * element);
  }
  return shape;
}

// The driver's functions, each null where it lacks it.
struct Encoders {
  PFN_cuTensorMapEncodeTiled_v12000 tiled = nullptr;
  PFN_cuTensorMapEncodeIm2col_v12000 im2col = nullptr;
  PFN_cuGetErrorString_v6000 error_string = nullptr;
};

inline Status map_status(const Encoders& encoders, const std::string& what, CUresult result) {
  if (result == CUDA_SUCCESS) return {};
  const char* text = nullptr;
  if (encoders.error_string) encoders.error_string(result, &text);
  return Status::failure(what + ": no tensor map: the driver's error " +
                         std::to_string(static_cast<int>(result)) + (text ? std::string(": ") + text : ""));
}

inline CUtensorMapSwizzle swizzle_of(int columns) {
  return row_bytes(columns) == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
}

// A matrix in boxes: so many columns, of whose rows the swizzle is given too, by so many rows.
struct Box {
  cuuint32_t columns;
  cuuint32_t rows;
  CUtensorMapSwizzle swizzle;
};

inline Box box_of_rows(int columns) {
  return {static_cast<cuuint32_t>(columns), kStagePositions, swizzle_of(columns)};
}

inline Status encode_rows(const Encoders& encoders, const std::string& what, CUtensorMap& map,
                          const Tensor& tensor, CUtensorMapDataType type, int64_t element, const Box& of) {
  if (!encoders.tiled) return Status::failure(what + ": the driver has no cuTensorMapEncodeTiled");
  const MapShape shape = map_shape(tensor, element);
  const cuuint32_t box[2] = {of.columns, of.rows}, steps[2] = {1, 1};
  return map_status(encoders, what,
                    encoders.tiled(&map, type, 2, const_cast<void*>(tensor.data), shape.size.data(),
                                   shape.stride.data(), box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, of.swizzle,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

inline Status encode_patches(const Encoders& encoders, const std::string& what, CUtensorMap& map,
                             const Tensor& tensor, CUtensorMapDataType type, const Patches& patches,
                             int chunk) {
  if (!encoders.im2col) return Status::failure(what + ": the driver has no cuTensorMapEncodeIm2col");
  const MapShape shape = map_shape(tensor, kElement);
  int lower[3], upper[3];
  cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < tensor.rank - 2; ++i) {
    lower[i] = lower_corner(patches, i);
    upper[i] = upper_corner(patches, i);
    steps[1 + i] = static_cast<cuuint32_t>(patches.stride[i]);
  }
  return map_status(
      encoders, what,
      encoders.im2col(&map, type, static_cast<cuuint32_t>(tensor.rank), const_cast<void*>(tensor.data),
                      shape.size.data(), shape.stride.data(), lower, upper, static_cast<cuuint32_t>(chunk),
                      kStagePositions, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(chunk),
                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

// --- problems ----------------------------------------------------------------------------------

inline bool wants_a(const PairParams& params) { return params.u.data && params.a; }
inline bool wants_g(const PairParams& params) { return params.grad.data && params.g; }

inline Plan plan_of(const PairParams& params, const DeviceInfo& info) {
  const bool both = wants_a(params) && wants_g(params);
  return make_plan(params.units, params.geometry.channels, params.geometry.taps(),
                   params.geometry.positions(), both, info.multiprocessors);
}

// The state of positions, in the order of StatePointers.
inline std::array<const void*, kStates> states_of(const PairParams& params) {
  return {params.threshold, params.cut, params.logsumexp, params.first};
}

inline bool is_aligned(const PairParams& params) {
  for (const void* state : states_of(params)) {
    if (reinterpret_cast<uintptr_t>(state) % kAlignment != 0) return false;
  }
  return true;
}

inline bool takes_responses(const PairParams& params, const Responses& responses) {
  if (!responses.data) return true;
  return responses.stride_unit == 1 && is_matrix(responses) && fits_map(response_tensor(params, responses));
}

inline bool takes_input(const PairParams& params) {
  const ConvGeometry& geometry = params.geometry;
  const Source source = source_of(params);
  if (params.x_stride_channel != 1 && geometry.channels != 1) return false;
  if (!fits_map(input_tensor(params, source))) return false;
  return source == Source::rows || fits_im2col(patches_of(geometry), source, geometry);
}

// With fewer, most of a chunk, and so of the work, would be for nothing.
constexpr int64_t kLeastChannels = kStrip;

inline bool is_small_enough(const PairParams& params) {
  const ConvGeometry& geometry = params.geometry;
  for (int i = 0; i < 3; ++i) {
    for (const int64_t value : {geometry.in_size[i], geometry.out_size[i], geometry.kernel[i],
                                geometry.stride[i], geometry.padding[i], geometry.dilation[i]}) {
      if (value > kMaxSize) return false;
    }
  }
  return geometry.positions() <= kMaxCoordinate && params.units <= kMaxCoordinate &&
         geometry.channels * geometry.taps() <= kMaxCoordinate;
}

inline std::string describe(const PairParams& params) {
  return "pair of " + std::to_string(params.units) + " units, " + std::to_string(params.geometry.channels) +
         " channels, " + std::to_string(params.geometry.taps()) + " taps and " +
         std::to_string(params.geometry.positions()) + " positions (sm_90)";
}

inline Status encode_maps(const Encoders& encoders, const std::string& what, const PairParams& from,
                          PairSm90& params) {
  const CUtensorMapDataType type = map_type(from.dtype);
  const Tensor x = input_tensor(from, params.source);
  const int chunk = params.plan.tile.chunk;
  Status status = params.source == Source::rows
                      ? encode_rows(encoders, what, params.x, x, type, kElement, box_of_rows(chunk))
                      : encode_patches(encoders, what, params.x, x, type, params.patches, chunk);
  for (int i = 0; status.ok && i < kConsumers; ++i) {
    const Tensor responses = response_tensor(from, params.is_activity[i] ? from.u : from.grad);
    status =
        encode_rows(encoders, what, params.responses[i], responses, type, kElement, box_of_rows(kTileUnits));
  }
  const std::array<const void*, kStates> states = states_of(from);
  for (int i = 0; status.ok && i < kStates; ++i) {
    params.has_state[i] = wants_a(from) && states[i];
    if (!params.has_state[i]) continue;
    Tensor numbers = tensor_of(states[i], params.positions);
    add_dimension(numbers, 1, 0);
    numbers = with_strides_of_ones(numbers);
    const bool is_index = i % 2 == 1;
    status = encode_rows(encoders, what, params.states[i], numbers,
                         is_index ? CU_TENSOR_MAP_DATA_TYPE_INT32 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                         sizeof(float), {kStagePositions, 1, CU_TENSOR_MAP_SWIZZLE_NONE});
  }
  return status;
}

inline PairSm90 kernel_params(const PairParams& from, const Plan& plan) {
  PairSm90 params{};
  params.plan = plan;
  params.source = source_of(from);
  params.patches = patches_of(from.geometry);
  params.positions = static_cast<int32_t>(from.geometry.positions());
  params.units = static_cast<int32_t>(from.units);
  params.result_channels = static_cast<int32_t>(from.result_channels);
  params.competition = {from.activity, from.selects, from.anti, 1.0f / from.temperature, from.lift};
  params.is_activity[0] = wants_a(from);
  params.is_activity[1] = !wants_g(from);
  for (int i = 0; i < kConsumers; ++i) {
    params.result[i] = {params.is_activity[i] ? from.a : from.g, from.result_layout};
  }
  params.partials = static_cast<float4*>(from.workspace);
  return params;
}

inline bool cuts_tiles(const Plan& plan) { return plan.segments > 1 && plan.length % plan.stages != 0; }

inline int64_t partial_sum_blocks(const Plan& plan) {
  return (plan.segments - 1) * plan.cluster * kConsumers * quads_of(columns_of(plan.tile));
}

inline bool takes(const PairParams& params, const DeviceInfo& info) {
  const ConvGeometry& geometry = params.geometry;
  if (info.capability != 90 || info.shared_limit < kSharedBytes || info.multiprocessors < 2) return false;
  if (params.dtype == DType::f32 || geometry.groups != 1) return false;
  if (!wants_a(params) && !wants_g(params)) return false;
  if (params.units < 1 || geometry.positions() < 1 || !is_small_enough(params)) return false;
  if (geometry.channels < kLeastChannels || lacks_state(params) || !is_aligned(params)) return false;
  return takes_input(params) && takes_responses(params, params.u) && takes_responses(params, params.grad);
}

inline int64_t workspace_bytes(const PairParams& params, const DeviceInfo& info) {
  const Plan plan = plan_of(params, info);
  return cuts_tiles(plan) ? plan.segments * plan.cluster * kBlockWorkspace : 0;
}

}  // namespace ghl::sm90
