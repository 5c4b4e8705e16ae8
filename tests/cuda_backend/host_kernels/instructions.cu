// The host twins of the PTX wrappers and of CUDA's arithmetic functions.
#include "program.h"

namespace ghl {
namespace {

using program::print;
using program::Register;
using program::run;

// --- conversions: raw results on stdout, to be compared in Python -------------------------------

template <class T>
void write(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

std::vector<uint32_t> read_words() {
  std::vector<uint32_t> words;
  for (uint32_t word; std::fread(&word, sizeof word, 1, stdin) == 1;) words.push_back(word);
  return words;
}

template <auto convert>
void convert_words() {
  std::vector<uint32_t> results;
  for (const uint32_t word : read_words()) {
    const auto result = convert(__uint_as_float(word));
    if constexpr (sizeof result == 4) {
      results.push_back(host::bits_as<uint32_t>(result));
    } else {
      results.push_back(result);
    }
  }
  write(results);
}

// Both halves at once must be the halves one by one.
template <auto pair, auto one>
uint32_t packed(float value) {
  const uint32_t both = pair(value, -2.5f);
  if ((both & 0xffff) != one(-2.5f)) throw std::runtime_error("the lower half");
  return both >> 16;
}

template <class T>
uint32_t round_trip(float value) {
  return from_float<T>(to_float(from_float<T>(value))).bits;
}

uint32_t from_half(float word) {
  return __float_as_uint(ptx::cvt_f32_f16(static_cast<uint16_t>(__float_as_uint(word))));
}

const Register conversions[] = {
    {"bf16", convert_words<ptx::cvt_rn_bf16_f32>},
    {"bf16x2", convert_words<packed<ptx::cvt_rn_bf16x2_f32, ptx::cvt_rn_bf16_f32>>},
    {"bf16_trip", convert_words<round_trip<bf16>>},
    {"f16", convert_words<ptx::cvt_rn_f16_f32>},
    {"f16x2", convert_words<packed<ptx::cvt_rn_f16x2_f32, ptx::cvt_rn_f16_f32>>},
    {"f16_trip", convert_words<round_trip<f16>>},
    {"from_f16", convert_words<from_half>},
    {"tf32", convert_words<ptx::cvt_rna_tf32_f32>},
    {"ex2", convert_words<ptx::ex2_approx_ftz_f32>},
    {"int_rn", convert_words<__float2int_rn>},
    {"int_rz", convert_words<__float2int_rz>},
    {"int_rd", convert_words<__float2int_rd>},
    {"int_ru", convert_words<__float2int_ru>},
    {"uint_rn", convert_words<__float2uint_rn>},
};

const Register bits("bits", [] {
  print<double>("brev", {1.0 * __brev(0xa0000000u), 1.0 * __brev(0x00000012u)});
  print<double>("clz", {1.0 * __clz(0), 1.0 * __clz(1), 1.0 * __clz(-1), 1.0 * __clzll(1), 1.0 * __clzll(0)});
  print<double>("ffs", {1.0 * __ffs(0), 1.0 * __ffs(8), 1.0 * __ffsll(1ll << 40)});
  print<double>("popc", {1.0 * __popc(0xff0fu), 1.0 * __popcll(~0ull)});
  print<double>("perm",
                {1.0 * __byte_perm(0x33221100u, 0x77665544u, 0x7531), 1.0 * __byte_perm(0x80u, 0, 0x0818)});
  print<double>("funnel",
                {1.0 * __funnelshift_l(0x80000001u, 0x2u, 1), 1.0 * __funnelshift_r(0x10u, 0x3u, 36)});
  print<double>("high", {1.0 * __umulhi(~0u, ~0u), 1.0 * __mulhi(-1, 1),
                         1.0 * static_cast<double>(__umul64hi(1ull << 63, 6))});
  const float nan = __int_as_float(0x7fffffff);
  print<double>("max", {max(nan, 1.0f), min(1.0f, nan), max(2, 3) + 0.0, ptx::max_nan_f32(1.0f, nan)});
  print<double>("pairs", {1.0 * ptx::max_nan_bf16x2(0x80003f80, 0x00007fc1),
                          1.0 * ptx::max_nan_f16x2(0x3c00c000, 0x4000bc00),
                          1.0 * ptx::set_ge_u32_bf16x2(0x80003f80, 0x00004000),
                          1.0 * ptx::set_gt_u32_bf16x2(0x80004000, 0x00003f80),
                          1.0 * ptx::set_ge_u32_f16x2(0x7e003c00, 0x7e003c00),
                          1.0 * ptx::set_gt_u32_f16x2(0x3c000001, 0x3c000000)});
});

// --- cp.async -----------------------------------------------------------------------------------

struct Copies {
  const float* source;
  float* out;
};

// Two groups of 16 bytes and an open one, seen after the issue and after each wait; then 4 bytes, some zeros.
__global__ void watch_copies(const __grid_constant__ Copies params) {
  float* shared = dynamic_shared<float>();
  for (int i = 0; i < 16; ++i) shared[i] = -1.0f;
  float* out = params.out;
  const auto look = [&] {
    for (int i = 0; i < 12; ++i) *out++ = shared[i];
  };
  ptx::cp_async_cg_16(shared, params.source, 16);
  ptx::cp_async_commit_group();
  ptx::cp_async_cg_16(shared + 4, params.source + 4, 8);
  ptx::cp_async_commit_group();
  ptx::cp_async_cg_16(shared + 8, nullptr, 0);
  look();
  ptx::cp_async_wait_group<1>();
  look();
  ptx::cp_async_wait_group<0>();
  look();
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  look();
  ptx::cp_async_ca_4(shared, params.source + 1, 4);
  ptx::cp_async_ca_4(shared + 1, params.source + 1, 2);
  ptx::cp_async_ca_4(shared + 2, params.source + 1, 0);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  look();
}

const Register copies("copies", [] {
  alignas(16) static const float source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<float> out(60);
  run(watch_copies, {1, 1, 64}, Copies{source, out.data()});
  for (int row = 0; row < 5; ++row) {
    print<float>("row" + std::to_string(row), {out.begin() + 12 * row, out.begin() + 12 * (row + 1)});
  }
});

__global__ void misaligned_copy(const __grid_constant__ Copies params) {
  ptx::cp_async_cg_16(dynamic_shared<float>(), params.source + 1, 16);
}

__global__ void misaligned_matrix(const __grid_constant__ Copies) {
  uint32_t result[4];
  ptx::ldmatrix_x4(result, dynamic_shared<float>() + 1);
}

const Register misaligned[] = {
    {"misaligned_copy",
     [] {
       alignas(16) static const float source[8] = {};
       run(misaligned_copy, {1, 1, 64}, Copies{source, nullptr});
     }},
    {"misaligned_matrix", [] { run(misaligned_matrix, {1, 32, 64}, Copies{}); }},
};

// --- matrices -----------------------------------------------------------------------------------

struct Halves {
  float* out;
};

// Four 8x8 matrices of the numbers 0 to 255, their rows 48 bytes apart.
__global__ void load_matrices(const __grid_constant__ Halves params) {
  uint16_t* shared = dynamic_shared<uint16_t>();
  const unsigned lane = threadIdx.x;
  for (unsigned column = 0; column < 8; ++column)
    shared[24 * lane + column] = static_cast<uint16_t>(8 * lane + column);
  __syncwarp();
  uint32_t straight[4], transposed[4];
  ptx::ldmatrix_x4(straight, shared + 24 * lane);
  ptx::ldmatrix_x4_trans(transposed, shared + 24 * lane);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned at = (matrix * 32 + lane) * 2 + half;
      params.out[at] = static_cast<float>(straight[matrix] >> 16 * half & 0xffff);
      params.out[256 + at] = static_cast<float>(transposed[matrix] >> 16 * half & 0xffff);
    }
  }
}

const Register matrices("matrices", [] {
  std::vector<float> out(512);
  run(load_matrices, {1, 32, 32 * 48}, Halves{out.data()});
  print<float>("straight", {out.begin(), out.begin() + 256});
  print<float>("transposed", {out.begin() + 256, out.end()});
});

// a [16, k] and b [k, 8] row by row; d [16, 8] = d + a b.
struct Product {
  const float* a;
  const float* b;
  float* d;
};

// From the tables of the PTX manual: which (row, k) of a, (k, column) of b and (row, column) of d a lane
// holds.
__device__ void load_sums(const float* d, float (&sums)[4]) {
  const unsigned group = threadIdx.x / 4, pair = threadIdx.x % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) sums[i] = d[(group + (i < 2 ? 0 : 8)) * 8 + pair + (i & 1)];
}

__device__ void store_sums(float* d, const float (&sums)[4]) {
  const unsigned group = threadIdx.x / 4, pair = threadIdx.x % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) d[(group + (i < 2 ? 0 : 8)) * 8 + pair + (i & 1)] = sums[i];
}

template <class T, auto mma>
__global__ void multiply_halves(const __grid_constant__ Product params) {
  const unsigned group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  const auto pack = [](float low, float high) {
    return static_cast<uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
  };
  uint32_t a[4], b[2];
  float sums[4];
  for (unsigned i = 0; i < 8; i += 2) {
    const unsigned row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
    const float* at = params.a + row * 16 + in_group * 2 + (i < 4 ? 0 : 8);
    a[i / 2] = pack(at[0], at[1]);
  }
  for (unsigned i = 0; i < 4; i += 2) {
    const float* at = params.b + (in_group * 2 + (i < 2 ? 0 : 8)) * 8 + group;
    b[i / 2] = pack(at[0], at[8]);
  }
  load_sums(params.d, sums);
  mma(sums, a, b);
  store_sums(params.d, sums);
}

__global__ void multiply_tf32(const __grid_constant__ Product params) {
  const unsigned group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  uint32_t a[4], b[2];
  float sums[4];
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = i == 0 || i == 2 ? group : group + 8;
    a[i] = __float_as_uint(params.a[row * 8 + in_group + (i < 2 ? 0 : 4)]);
  }
  for (unsigned i = 0; i < 2; ++i)
    b[i] = __float_as_uint(params.b[(in_group + (i == 0 ? 0 : 4)) * 8 + group]);
  load_sums(params.d, sums);
  ptx::mma_m16n8k8_tf32(sums, a, b);
  store_sums(params.d, sums);
}

template <auto kernel, int kDepth>
void product() {
  std::vector<float> a(16 * kDepth), b(kDepth * 8), d(16 * 8);
  for (std::vector<float>* matrix : {&a, &b, &d}) {
    if (std::fread(matrix->data(), sizeof(float), matrix->size(), stdin) != matrix->size()) {
      throw std::runtime_error("short input");
    }
  }
  run(kernel, {1, 32, 0}, Product{a.data(), b.data(), d.data()});
  write(d);
}

const Register products[] = {
    {"mma_bf16", product<multiply_halves<bf16, ptx::mma_m16n8k16_bf16>, 16>},
    {"mma_f16", product<multiply_halves<f16, ptx::mma_m16n8k16_f16>, 16>},
    {"mma_tf32", product<multiply_tf32, 8>},
};

}  // namespace
}  // namespace ghl
