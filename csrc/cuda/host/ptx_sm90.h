// The sm_90 instructions of ../ptx_sm90.cuh, computed on a CPU for a test of the Hopper kernel: a cluster
// runs as one block of the host runtime, whose threads call themselves threads of their own block
// (host/cluster.h).
//
// Copies arrive late and in any order, wgmma multiplies no earlier than its group is waited for, and reads
// its operands only then: whoever reuses a stage, or a register, too early gets a wrong result. Descriptors
// are decoded, and swizzles applied to addresses, as the PTX manual has it, without the kernel's own layout
// functions.
#pragma once

#include <deque>
#include <stdexcept>
#include <vector>

#include "cuda/host/cluster.h"
#include "cuda/host/ptx.h"

namespace ghl::host {

// A tensor map, kept in the bytes of a CUtensorMap.
struct TensorMap {
  const unsigned char* data;
  uint64_t stride[4];  // bytes, from the second dimension on
  uint32_t size[5];
  int16_t lower[3], upper[3];
  uint8_t step[5];
  uint8_t rank, element;
  uint8_t rows;     // of a box, or pixels of a column
  uint8_t columns;  // along the contiguous dimension
  bool im2col;
  uint8_t swizzle;  // bytes of the rows that it permutes, 0: none
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline TensorMap tensor_map(const CUtensorMap& map) {
  TensorMap result;
  std::memcpy(&result, &map, sizeof result);
  return result;
}

// One element of a copy, zero outside of the tensor.
inline void copy_element(const TensorMap& map, const int64_t (&at)[5], unsigned char* target) {
  const unsigned char* source = map.data + at[0] * map.element;
  bool inside = true;
  for (int i = 0; i < map.rank; ++i) {
    inside = inside && at[i] >= 0 && at[i] < map.size[i];
    if (i > 0) source += at[i] * static_cast<int64_t>(map.stride[i - 1]);
  }
  if (inside) {
    std::memcpy(target, source, map.element);
  } else {
    std::memset(target, 0, map.element);
  }
}

// Bits 4 to 6 of an address are exclusive-ored with bits 7 to 9; with rows of 64 bytes only two of them.
inline uint32_t swizzled_address(uint32_t address, uint32_t bytes) {
  const uint32_t pieces = bytes == 128 ? 0x70 : bytes == 64 ? 0x30 : 0;
  return address ^ (address >> 3 & pieces);
}

// Row of a box: at[0] is its first element.
inline void copy_row(const TensorMap& map, int64_t (&at)[5], unsigned rank, uint32_t shared, int row) {
  const int64_t first = at[0];
  for (int i = 0; i < map.columns; ++i) {
    const uint32_t address = shared + static_cast<uint32_t>((row * map.columns + i) * map.element);
    at[0] = first + i;
    copy_element(map, at, shared_pointer(rank, swizzled_address(address, map.swizzle)));
  }
  at[0] = first;
}

inline void copy_rows(const TensorMap& map, unsigned rank, uint32_t shared, int32_t c, int32_t row) {
  for (int i = 0; i < map.rows; ++i) {
    int64_t at[5] = {c, row + i};
    copy_row(map, at, rank, shared, i);
  }
}

// PTX manual, "im2col mode": pixels of the box, width first, by the traversal strides, on to the next image;
// the offsets are added to each.
inline void copy_pixels(const TensorMap& map, unsigned rank, uint32_t shared,
                        const std::vector<int32_t>& base, const std::vector<uint16_t>& offsets) {
  std::vector<int64_t> pixel(base.begin(), base.end());
  const int spatial = map.rank - 2;
  for (int row = 0; row < map.rows; ++row) {
    int64_t at[5] = {};
    for (int i = 0; i < map.rank; ++i) at[i] = pixel[i] + (i >= 1 && i <= spatial ? offsets[i - 1] : 0);
    copy_row(map, at, rank, shared, row);
    int i = 1;
    for (; i <= spatial; ++i) {
      pixel[i] += map.step[i];
      if (pixel[i] < static_cast<int64_t>(map.size[i]) + map.upper[i - 1]) break;
      pixel[i] = map.lower[i - 1];
    }
    if (i > spatial) ++pixel[spatial + 1];
  }
}

// Queues a copy for every block of the mask; each signals the bytes of its box there.
template <class Copy>
void copy_to_cluster(const CUtensorMap& encoded, uint32_t barrier, unsigned mask, Copy copy) {
  const TensorMap map = tensor_map(encoded);
  for (unsigned rank = 0; rank < 2; ++rank) {
    if (!has(mask, rank)) continue;
    cluster().copies.push_back([=] {
      copy(map, rank);
      complete_bytes(rank, barrier, static_cast<int64_t>(map.rows) * map.columns * map.element);
    });
  }
}

// A queued wgmma of one thread: 64x16 times 16 by twice as many columns as the thread has sums.
struct Product {
  float* d;
  int sums;
  const uint32_t* a;  // null: a is in shared memory
  uint64_t a_descriptor, b_descriptor;
  bool half;
};

// Of every thread of the cluster.
struct Products {
  std::deque<std::vector<Product>> groups;
  std::vector<Product> open;
};

inline Products& products(unsigned rank, unsigned thread) {
  static Products all[2][cluster_threads];
  return all[rank][thread];
}

inline float element_of(uint32_t bits, bool half) {
  const uint16_t low = static_cast<uint16_t>(bits);
  return half ? ptx::cvt_f32_f16(low) : ptx::bf16_to_float(low);
}

// Element (k, column) of an operand with contiguous columns and swizzled rows of 128 or 64 bytes: as many
// columns, then the next at the leading offset; 8 rows, then the next 8 at the stride offset.
inline float operand_element(uint64_t descriptor, uint32_t k, uint32_t column, bool half) {
  const uint64_t mode = descriptor >> 62;
  if (mode != 1 && mode != 2) throw std::runtime_error("wgmma: a descriptor of neither swizzle");
  const uint32_t bytes = mode == 1 ? 128 : 64, columns = bytes / 2;
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address =
      start + column / columns * leading + k / 8 * stride + k % 8 * bytes + column % columns * 2;
  uint16_t bits;
  std::memcpy(&bits, shared_pointer(own_rank(), swizzled_address(address, bytes)), sizeof bits);
  return element_of(bits, half);
}

// Element k of row `row` of a warp's sixteen; its registers are spread over four lanes.
inline float fragment_element(const uint32_t* const (&a)[32], int row, int k, bool half) {
  const int lane = row % 8 * 4 + k % 8 / 2;
  const uint32_t bits = a[lane][k / 8 * 2 + row / 8];
  return element_of(k % 2 ? bits >> 16 : bits, half);
}

inline void multiply(const Product& product, const uint32_t* const (&a)[32]) {
  const unsigned thread = own_thread() % 128;
  for (int i = 0; i < product.sums; ++i) {
    const int row = static_cast<int>(thread % 32 / 4) + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + static_cast<int>(thread % 4) * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float left = product.a ? fragment_element(a, row, k, product.half)
                                   : operand_element(product.a_descriptor, k,
                                                     static_cast<int>(thread / 32) * 16 + row, product.half);
      product.d[i] += left * operand_element(product.b_descriptor, k, column, product.half);
    }
  }
}

inline void finish_group() {
  Products& own = products(own_rank(), own_thread());
  for (const Product& product : own.groups.front()) {
    const auto a = exchange(~0u, product.a);
    multiply(product, a.of);
  }
  __syncwarp();  // before a lane may overwrite what another has read
  own.groups.pop_front();
}

}  // namespace ghl::host

namespace ghl::ptx {

inline uint32_t shared_address(const void* pointer) { return host::shared_address(pointer); }
inline uint32_t mapa(uint32_t shared, uint32_t rank) { return rank << 24 | shared; }

inline int32_t cluster_id() { return static_cast<int32_t>(host::block_index().x); }
inline int32_t cluster_rank() { return static_cast<int32_t>(host::own_rank()); }
inline void barrier_cluster_arrive() {}
inline void barrier_cluster_wait() { host::block_barrier(); }

template <int>
void setmaxnreg_inc() {}
template <int>
void setmaxnreg_dec() {}

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  host::cluster().barriers[{host::own_rank(), barrier}] = {arrivals, arrivals, 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  host::expect_bytes(host::own_rank(), barrier, bytes);
  host::arrive(host::own_rank(), barrier);
}
inline void mbarrier_arrive_cluster(uint32_t address) { host::arrive(address >> 24, address & 0xffffff); }
inline bool mbarrier_try_wait_parity(uint32_t barrier, uint32_t parity) {
  return host::try_wait(host::own_rank(), barrier, parity);
}

inline void prefetch_tensormap(const CUtensorMap&) {}

inline void cp_async_bulk_tensor_2d_multicast(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                              int32_t c, int32_t row, uint16_t mask) {
  host::copy_to_cluster(map, barrier, mask, [=](const host::TensorMap& tensor, unsigned rank) {
    host::copy_rows(tensor, rank, shared, c, row);
  });
}
inline void cp_async_bulk_tensor_2d(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int32_t c,
                                    int32_t row) {
  cp_async_bulk_tensor_2d_multicast(shared, map, barrier, c, row,
                                    static_cast<uint16_t>(1u << host::own_rank()));
}

inline void cp_async_bulk_tensor_4d_im2col_multicast(uint32_t shared, const CUtensorMap& map,
                                                     uint32_t barrier, int32_t c, int32_t w, int32_t h,
                                                     int32_t n, uint16_t offset_w, uint16_t offset_h,
                                                     uint16_t mask) {
  host::copy_to_cluster(map, barrier, mask, [=](const host::TensorMap& tensor, unsigned rank) {
    host::copy_pixels(tensor, rank, shared, {c, w, h, n}, {offset_w, offset_h});
  });
}
inline void cp_async_bulk_tensor_4d_im2col(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                           int32_t c, int32_t w, int32_t h, int32_t n, uint16_t offset_w,
                                           uint16_t offset_h) {
  cp_async_bulk_tensor_4d_im2col_multicast(shared, map, barrier, c, w, h, n, offset_w, offset_h,
                                           static_cast<uint16_t>(1u << host::own_rank()));
}

inline void cp_async_bulk_tensor_5d_im2col_multicast(uint32_t shared, const CUtensorMap& map,
                                                     uint32_t barrier, int32_t c, int32_t w, int32_t h,
                                                     int32_t d, int32_t n, uint16_t offset_w,
                                                     uint16_t offset_h, uint16_t offset_d, uint16_t mask) {
  host::copy_to_cluster(map, barrier, mask, [=](const host::TensorMap& tensor, unsigned rank) {
    host::copy_pixels(tensor, rank, shared, {c, w, h, d, n}, {offset_w, offset_h, offset_d});
  });
}
inline void cp_async_bulk_tensor_5d_im2col(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                           int32_t c, int32_t w, int32_t h, int32_t d, int32_t n,
                                           uint16_t offset_w, uint16_t offset_h, uint16_t offset_d) {
  cp_async_bulk_tensor_5d_im2col_multicast(shared, map, barrier, c, w, h, d, n, offset_w, offset_h, offset_d,
                                           static_cast<uint16_t>(1u << host::own_rank()));
}

inline void wgmma_fence() {}
inline void wgmma_commit_group() {
  host::Products& own = host::products(host::own_rank(), host::own_thread());
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}
template <int pending>
void wgmma_wait_group() {
  while (host::products(host::own_rank(), host::own_thread()).groups.size() > pending) host::finish_group();
}
template <class Register, int count>
void wgmma_hold(Register (&)[count]) {}

template <int count>
void queue_product(float (&d)[count], const uint32_t* a, uint64_t a_descriptor, uint64_t b, bool half) {
  host::products(host::own_rank(), host::own_thread()).open.push_back({d, count, a, a_descriptor, b, half});
}
template <int count>
void wgmma_m64k16_bf16_rs(float (&d)[count], const uint32_t* a, uint64_t b) {
  queue_product(d, a, 0, b, false);
}
template <int count>
void wgmma_m64k16_bf16_ss(float (&d)[count], uint64_t a, uint64_t b) {
  queue_product(d, nullptr, a, b, false);
}
template <int count>
void wgmma_m64k16_f16_rs(float (&d)[count], const uint32_t* a, uint64_t b) {
  queue_product(d, a, 0, b, true);
}
template <int count>
void wgmma_m64k16_f16_ss(float (&d)[count], uint64_t a, uint64_t b) {
  queue_product(d, nullptr, a, b, true);
}

}  // namespace ghl::ptx
