// Smallest kernels that show whether each instruction of csrc/cuda/ptx.cuh does here what the kernels take it
// to do. Built as a shared library: probe_count(), probe_name(i), probe_run(i), which returns null or says
// what is wrong. For sm_80 and newer; with GHL_CUDA_ON_HOST it runs on the twins of the instructions, which
// shows that what the probes expect is what the kernels were tested with.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace {

using namespace ghl;

// --- device -------------------------------------------------------------------------------------

struct Probe {
  const uint32_t* in;
  uint32_t* out;
};

__device__ float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__device__ uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

constexpr int kLane16 = 4;  // words
constexpr uint32_t kOld = 0xabababab;

// Lane i copies its first i % 17 bytes of 16, or i % 5 of 4, over old ones; what is missing has to be zeros.
template <int words>
__global__ void copy_kernel(const __grid_constant__ Probe probe) {
  uint32_t* const own = dynamic_shared<uint32_t>() + threadIdx.x * words;
  const uint32_t* const source = probe.in + threadIdx.x * words;
  for (int i = 0; i < words; ++i) own[i] = kOld;
  if constexpr (words == kLane16) {
    ptx::cp_async_cg_16(own, source, threadIdx.x % 17);
  } else {
    ptx::cp_async_ca_4(own, source, threadIdx.x % 5);
  }
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  for (int i = 0; i < words; ++i) probe.out[threadIdx.x * words + i] = own[i];
}

// The first of two groups has to be there while the second may be under way.
__global__ void groups_kernel(const __grid_constant__ Probe probe) {
  uint32_t* const own = dynamic_shared<uint32_t>() + threadIdx.x * 2;
  for (int i = 0; i < 2; ++i) {
    ptx::cp_async_ca_4(own + i, probe.in + threadIdx.x * 2 + i, 4);
    ptx::cp_async_commit_group();
  }
  ptx::cp_async_wait_group<1>();
  probe.out[threadIdx.x * 2] = own[0];
  ptx::cp_async_wait_group<0>();
  probe.out[threadIdx.x * 2 + 1] = own[1];
}

template <bool transposed>
__global__ void ldmatrix_kernel(const __grid_constant__ Probe probe) {
  uint32_t* const rows = dynamic_shared<uint32_t>();
  for (int i = 0; i < 4; ++i) rows[threadIdx.x * 4 + i] = probe.in[threadIdx.x * 4 + i];
  __syncthreads();
  uint32_t result[4];
  if constexpr (transposed) {
    ptx::ldmatrix_x4_trans(result, rows + threadIdx.x * 4);
  } else {
    ptx::ldmatrix_x4(result, rows + threadIdx.x * 4);
  }
  for (int i = 0; i < 4; ++i) probe.out[threadIdx.x * 4 + i] = result[i];
}

enum class Product { bf16, f16, tf32 };

// in: of every lane the four registers of a, the two of b and the four of d, as floats.
template <Product product>
__global__ void mma_kernel(const __grid_constant__ Probe probe) {
  const uint32_t* const own = probe.in + threadIdx.x * 10;
  const uint32_t a[4] = {own[0], own[1], own[2], own[3]}, b[2] = {own[4], own[5]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = as_float(own[6 + i]);
  if constexpr (product == Product::bf16) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  } else if constexpr (product == Product::f16) {
    ptx::mma_m16n8k16_f16(d, a, b);
  } else {
    ptx::mma_m16n8k8_tf32(d, a, b);
  }
  for (int i = 0; i < 4; ++i) probe.out[threadIdx.x * 4 + i] = as_bits(d[i]);
}

enum class Conversion { bf16, bf16x2, f16, f16x2, from_f16, tf32, exp2, max_nan };

// A lane takes two words, the second of which most conversions leave alone.
template <Conversion conversion>
__global__ void convert_kernel(const __grid_constant__ Probe probe) {
  const uint32_t bits = probe.in[threadIdx.x * 2];
  const float first = as_float(bits), second = as_float(probe.in[threadIdx.x * 2 + 1]);
  uint32_t& result = probe.out[threadIdx.x];
  if constexpr (conversion == Conversion::bf16) result = ptx::cvt_rn_bf16_f32(first);
  if constexpr (conversion == Conversion::bf16x2) result = ptx::cvt_rn_bf16x2_f32(first, second);
  if constexpr (conversion == Conversion::f16) result = ptx::cvt_rn_f16_f32(first);
  if constexpr (conversion == Conversion::f16x2) result = ptx::cvt_rn_f16x2_f32(first, second);
  if constexpr (conversion == Conversion::tf32) result = ptx::cvt_rna_tf32_f32(first);
  if constexpr (conversion == Conversion::from_f16) {
    result = as_bits(ptx::cvt_f32_f16(static_cast<uint16_t>(bits)));
  }
  if constexpr (conversion == Conversion::exp2) result = as_bits(ptx::ex2_approx_ftz_f32(first));
  if constexpr (conversion == Conversion::max_nan) result = as_bits(ptx::max_nan_f32(first, second));
}

__global__ void store_kernel(const __grid_constant__ Probe probe) {
  const uint32_t* const own = probe.in + threadIdx.x * 4;
  ptx::st_global_v4_b32(probe.out + threadIdx.x * 4, uint4{own[0], own[1], own[2], own[3]});
}

// --- host ---------------------------------------------------------------------------------------

using Words = std::vector<uint32_t>;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

#ifdef GHL_CUDA_ON_HOST

std::string run(void (*kernel)(Probe), const Words& in, Words& out) {
  const Status status = launch("probe", kernel, {1, 32, 4096}, {}, Probe{in.data(), out.data()});
  return status.ok ? "" : status.message;
}

#else

std::string run(void (*kernel)(Probe), const Words& in, Words& out) {
  const size_t in_bytes = in.size() * sizeof(uint32_t), out_bytes = out.size() * sizeof(uint32_t);
  uint32_t *source = nullptr, *target = nullptr;
  cudaMalloc(&source, in_bytes);
  cudaMalloc(&target, out_bytes);
  cudaMemcpy(source, in.data(), in_bytes, cudaMemcpyHostToDevice);
  cudaMemcpy(target, out.data(), out_bytes, cudaMemcpyHostToDevice);
  const Status status = launch("probe", kernel, {1, 32, 4096}, {}, Probe{source, target});
  const cudaError_t error = cudaMemcpy(out.data(), target, out_bytes, cudaMemcpyDeviceToHost);
  cudaFree(source);
  cudaFree(target);
  if (!status.ok) return status.message;
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

#endif

std::string compare(const Words& found, const Words& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool both_nan = std::isnan(float_of(found[i])) && std::isnan(float_of(expected[i]));
    if (found[i] != expected[i] && !both_nan) {
      char text[80];
      std::snprintf(text, sizeof text, "word %zu is %08x, not %08x", i, found[i], expected[i]);
      return text;
    }
  }
  return "";
}

std::string check(void (*kernel)(Probe), const Words& in, const Words& expected) {
  Words out(expected.size(), kOld);
  const std::string wrong = run(kernel, in, out);
  return wrong.empty() ? compare(out, expected) : wrong;
}

Words counted(size_t words) {
  Words in(words);
  for (size_t i = 0; i < words; ++i) in[i] = static_cast<uint32_t>(0x01020304u + i * 0x04040404u);
  return in;
}

template <int words>
std::string probe_copy() {
  const Words in = counted(32 * words);
  Words expected(in.size(), 0);
  for (size_t lane = 0; lane < 32; ++lane) {
    const size_t bytes = lane % (words * 4 + 1);
    std::memcpy(&expected[lane * words], &in[lane * words], bytes);
  }
  return check(copy_kernel<words>, in, expected);
}

template <bool transposed>
std::string probe_ldmatrix() {
  Words in(32 * 4), expected(32 * 4);
  const auto element = [](int matrix, int row, int column) {
    return static_cast<uint32_t>(matrix * 1000 + row * 10 + column);
  };
  for (int i = 0; i < 32 * 4; ++i) {
    const int matrix = i / 32, row = i / 4 % 8, column = i % 4 * 2;
    in[i] = element(matrix, row, column) | element(matrix, row, column + 1) << 16;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      expected[lane * 4 + i] = transposed ? element(i, column, row) | element(i, column + 1, row) << 16
                                          : element(i, row, column) | element(i, row, column + 1) << 16;
    }
  }
  return check(ldmatrix_kernel<transposed>, in, expected);
}

// Small integers, whose sums every format holds exactly.
float value_at(int row, int column) { return static_cast<float>((row * 7 + column * 3) % 11 - 5); }

uint32_t half_bits(float value) {
  const uint32_t bits = bits_of(value);
  return value == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits >> 23 & 0xff) - 112) << 10 | (bits >> 13 & 0x3ff);
}

// One register of an operand, which holds two neighbours along k in 16 bits.
template <Product product>
uint32_t operand(const std::function<float(int)>& at, int k) {
  if constexpr (product == Product::tf32) return bits_of(at(k));
  if constexpr (product == Product::f16) return half_bits(at(k)) | half_bits(at(k + 1)) << 16;
  return bits_of(at(k)) >> 16 | (bits_of(at(k + 1)) & 0xffff0000u);
}

template <Product product>
std::string probe_mma() {
  constexpr bool wide = product == Product::tf32;
  constexpr int depth = wide ? 8 : 16, half = depth / 2;
  const auto a = [](int row, int k) { return value_at(row, k); };
  const auto b = [](int k, int column) { return value_at(column + 3, k); };
  Words in, expected;
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, k = lane % 4 * (wide ? 1 : 2), column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const auto row = [&](int at) { return a(group + i % 2 * 8, at); };
      in.push_back(operand<product>(row, k + i / 2 * half));
    }
    for (int i = 0; i < 2; ++i) {
      in.push_back(operand<product>([&](int at) { return b(at, group); }, k + i * half));
    }
    for (int i = 0; i < 4; ++i) {
      const int row = group + i / 2 * 8, at = column + i % 2;
      float sum = value_at(row, at + 5);
      in.push_back(bits_of(sum));
      for (int step = 0; step < depth; ++step) sum += a(row, step) * b(step, at);
      expected.push_back(bits_of(sum));
    }
  }
  return check(mma_kernel<product>, in, expected);
}

struct Converted {
  uint32_t first, second, result;
};

template <Conversion conversion>
std::string probe_convert(const std::vector<Converted>& values) {
  Words in(64, 0), expected(32);
  for (size_t i = 0; i < 32; ++i) {
    const Converted& value = values[i % values.size()];
    in[2 * i] = value.first;
    in[2 * i + 1] = value.second;
    expected[i] = value.result;
  }
  return check(convert_kernel<conversion>, in, expected);
}

constexpr uint32_t kOne = 0x3f800000, kInfinity = 0x7f800000, kNan = 0x7fc00000, kMinus = 0x80000000;

// To nearest, ties to even: one and half a step, a step and a half, and a little more than half.
std::string probe_bf16() {
  return probe_convert<Conversion::bf16>({{kOne, 0, 0x3f80},
                                          {0x3f808000, 0, 0x3f80},
                                          {0x3f818000, 0, 0x3f82},
                                          {0x3f808001, 0, 0x3f81},
                                          {kInfinity, 0, 0x7f80},
                                          {0x7f7fffff, 0, 0x7f80},
                                          {kMinus, 0, 0x8000}});
}

std::string probe_f16() {
  return probe_convert<Conversion::f16>({{kOne, 0, 0x3c00},
                                         {0x3f801000, 0, 0x3c00},
                                         {0x3f803000, 0, 0x3c02},
                                         {0x3f801001, 0, 0x3c01},
                                         {0x33800000, 0, 0x0001},
                                         {0x477ff000, 0, 0x7c00},
                                         {kMinus, 0, 0x8000}});
}

// Ties away from zero, and nothing left in the 13 bits that tf32 lacks: kernels subtract the result.
std::string probe_tf32() {
  return probe_convert<Conversion::tf32>({{kOne, 0, kOne},
                                          {0x3f801000, 0, 0x3f802000},
                                          {0xbf801000, 0, 0xbf802000},
                                          {0x3f800fff, 0, kOne},
                                          {0x3f801fff, 0, 0x3f802000},
                                          {kInfinity, 0, kInfinity}});
}

std::string probe_exp2() {
  Words in(64), out(32, kOld);
  const float special[] = {0.0f, 1.0f, -126.0f, -127.0f, -150.0f, -std::numeric_limits<float>::infinity()};
  for (int i = 0; i < 32; ++i) in[2 * i] = bits_of(i < 6 ? special[i] : -0.37f * static_cast<float>(i));
  const std::string wrong = run(convert_kernel<Conversion::exp2>, in, out);
  if (!wrong.empty()) return wrong;
  for (int i = 0; i < 32; ++i) {
    const double exact = std::exp2(static_cast<double>(float_of(in[2 * i])));
    const double expected = exact < std::numeric_limits<float>::min() ? 0.0 : exact;
    const double found = float_of(out[i]);
    if (!(std::fabs(found - expected) <= std::ldexp(expected, -22))) {
      return "2^" + std::to_string(float_of(in[2 * i])) + " is " + std::to_string(found);
    }
  }
  return "";
}

std::string probe_max_nan() {
  return probe_convert<Conversion::max_nan>(
      {{kOne, kNan, kNan}, {kNan, kOne, kNan}, {kOne, 0x40000000, 0x40000000}, {kOne, kMinus | kOne, kOne}});
}

struct Named {
  const char* name;
  std::function<std::string()> run;
};

const std::vector<Named>& probes() {
  static const std::vector<Named> all = {
      {"cp.async.cg 16, every number of bytes", probe_copy<kLane16>},
      {"cp.async.ca 4, every number of bytes", probe_copy<1>},
      {"cp.async.wait_group", [] { return check(groups_kernel, counted(64), counted(64)); }},
      {"ldmatrix.x4", probe_ldmatrix<false>},
      {"ldmatrix.x4.trans", probe_ldmatrix<true>},
      {"mma.m16n8k16 bf16", probe_mma<Product::bf16>},
      {"mma.m16n8k16 f16", probe_mma<Product::f16>},
      {"mma.m16n8k8 tf32", probe_mma<Product::tf32>},
      {"cvt.rn.bf16.f32", probe_bf16},
      {"cvt.rn.bf16x2.f32",
       [] { return probe_convert<Conversion::bf16x2>({{kOne, 0x40000000, 0x3f804000}}); }},
      {"cvt.rn.f16.f32", probe_f16},
      {"cvt.rn.f16x2.f32", [] { return probe_convert<Conversion::f16x2>({{kOne, 0x40000000, 0x3c004000}}); }},
      {"cvt.f32.f16",
       [] { return probe_convert<Conversion::from_f16>({{0x3c00, 0, kOne}, {1, 0, 0x33800000}}); }},
      {"cvt.rna.tf32.f32", probe_tf32},
      {"ex2.approx.ftz.f32", probe_exp2},
      {"max.NaN.f32", probe_max_nan},
      {"st.global.v4.b32", [] { return check(store_kernel, counted(128), counted(128)); }},
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
