// One wrapper per PTX instruction of sm_90, named after it. Those of sm_80 are in ptx.cuh.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "cuda/ptx.cuh"

#ifdef GHL_CUDA_ON_HOST
#include "cuda/host/ptx_sm90.h"
#else

namespace ghl::ptx {

// --- blocks of a cluster ------------------------------------------------------------------------

// The address in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t mapa(uint32_t shared_address, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address), "r"(rank));
  return address;
}

__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// --- time ---------------------------------------------------------------------------------------

// Nanoseconds, in steps that the device chooses.
__device__ __forceinline__ uint64_t globaltimer() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// --- registers ----------------------------------------------------------------------------------

// By all warps of a warpgroup.
template <int registers>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// The cluster's number in the grid, and the block's in the cluster.
__device__ __forceinline__ int32_t cluster_id() {
  int32_t id;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}
__device__ __forceinline__ int32_t cluster_rank() {
  int32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// --- barriers in shared memory ------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and makes the phase wait for so many bytes of copies too.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// At a barrier of any block of the cluster, by an address from mapa(). Ordered within this block only: what
// arrives here has read shared memory and written none. With .cluster the compiler would wait for all of the
// thread's memory accesses (MEMBAR.GPU), and after every wait drop the L1 cache.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t cluster_address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address) : "memory");
}

// Whether the phase of this parity is over, after waiting for a time that the hardware chooses.
__device__ __forceinline__ bool mbarrier_try_wait_parity(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
      "selp.b32 %0, 1, 0, over;\n"
      "}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over != 0;
}

// --- copies by tensor maps ----------------------------------------------------------------------

// Coordinates count elements, the contiguous dimension first. What lies outside the tensor becomes zero and
// counts as bytes all the same. Those with a mask write to, and signal at, the same places in every block
// named.

__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_2d(uint32_t shared, const CUtensorMap& map,
                                                        uint32_t barrier, int32_t c, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c), "r"(row)
      : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_2d_multicast(uint32_t shared, const CUtensorMap& map,
                                                                  uint32_t barrier, int32_t c, int32_t row,
                                                                  uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c), "r"(row), "h"(mask)
      : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_4d_im2col(uint32_t shared, const CUtensorMap& map,
                                                               uint32_t barrier, int32_t c, int32_t w,
                                                               int32_t h, int32_t n, uint16_t offset_w,
                                                               uint16_t offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w), "h"(offset_h)
      : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_4d_im2col_multicast(
    uint32_t shared, const CUtensorMap& map, uint32_t barrier, int32_t c, int32_t w, int32_t h, int32_t n,
    uint16_t offset_w, uint16_t offset_h, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w), "h"(offset_h), "h"(mask)
      : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_5d_im2col(uint32_t shared, const CUtensorMap& map,
                                                               uint32_t barrier, int32_t c, int32_t w,
                                                               int32_t h, int32_t d, int32_t n,
                                                               uint16_t offset_w, uint16_t offset_h,
                                                               uint16_t offset_d) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "h"(offset_w), "h"(offset_h),
      "h"(offset_d)
      : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_5d_im2col_multicast(
    uint32_t shared, const CUtensorMap& map, uint32_t barrier, int32_t c, int32_t w, int32_t h, int32_t d,
    int32_t n, uint16_t offset_w, uint16_t offset_h, uint16_t offset_d, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10}, %11;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "h"(offset_w), "h"(offset_h),
      "h"(offset_d), "h"(mask)
      : "memory");
}

// --- matrices -----------------------------------------------------------------------------------

// Before the first wgmma, and before one that reads registers written since the last.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most `pending` of the latest groups are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The compiler takes registers that wgmma still reads or writes for free to reuse or to read; this makes it
// keep them until here.
template <class Register, int count>
__device__ __forceinline__ void wgmma_hold(Register (&registers)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<Register, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// The operands d[0] on of an assembler statement, and the list of them in its text: sixteen at a time, and
// all of them.
#define GHL_OPERANDS_16(d, i)                                                                           \
  "+f"(d[i + 0]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),       \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), \
      "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define GHL_OPERANDS_32(d) GHL_OPERANDS_16(d, 0), GHL_OPERANDS_16(d, 16)
#define GHL_OPERANDS_64(d) \
  GHL_OPERANDS_16(d, 0), GHL_OPERANDS_16(d, 16), GHL_OPERANDS_16(d, 32), GHL_OPERANDS_16(d, 48)
#define GHL_OPERANDS_96(d)                                                                       \
  GHL_OPERANDS_16(d, 0), GHL_OPERANDS_16(d, 16), GHL_OPERANDS_16(d, 32), GHL_OPERANDS_16(d, 48), \
      GHL_OPERANDS_16(d, 64), GHL_OPERANDS_16(d, 80)
#define GHL_OPERANDS_112(d)                                                                      \
  GHL_OPERANDS_16(d, 0), GHL_OPERANDS_16(d, 16), GHL_OPERANDS_16(d, 32), GHL_OPERANDS_16(d, 48), \
      GHL_OPERANDS_16(d, 64), GHL_OPERANDS_16(d, 80), GHL_OPERANDS_16(d, 96)
#define GHL_OPERANDS_128(d)                                                                      \
  GHL_OPERANDS_16(d, 0), GHL_OPERANDS_16(d, 16), GHL_OPERANDS_16(d, 32), GHL_OPERANDS_16(d, 48), \
      GHL_OPERANDS_16(d, 64), GHL_OPERANDS_16(d, 80), GHL_OPERANDS_16(d, 96), GHL_OPERANDS_16(d, 112)
#define GHL_TEXT_OF_32                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GHL_TEXT_OF_64                                                               \
  GHL_TEXT_OF_32                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GHL_TEXT_OF_96                                                               \
  GHL_TEXT_OF_64                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GHL_TEXT_OF_112 \
  GHL_TEXT_OF_96        \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define GHL_TEXT_OF_128 \
  GHL_TEXT_OF_112       \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d += a b for 64x16 a, 16xN b and float d, of which a thread has N / 2: asynchronous, by a warpgroup. b is
// in shared memory with its columns contiguous, by its descriptor; a is in registers (rs) or in shared memory
// with its rows contiguous (ss). d, and a in registers, must not be touched until the group is waited for.
// `count` is N / 2, and the others are the numbers of the operands that follow d's.
#define GHL_DEFINE_WGMMA(type, n, count, a0, a1, a2, a3, b0)                                                \
  __device__ __forceinline__ void wgmma_m64k16_##type##_rs(float (&d)[count], const uint32_t* a,            \
                                                           uint64_t b) {                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" GHL_TEXT_OF_##count \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", 1, 1, 1, 1;"                       \
                 : GHL_OPERANDS_##count(d)                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                     \
  }                                                                                                         \
  __device__ __forceinline__ void wgmma_m64k16_##type##_ss(float (&d)[count], uint64_t a, uint64_t b) {     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" GHL_TEXT_OF_##count \
                 "}, %" #a0 ", %" #a1 ", 1, 1, 1, 1, 1;"                                                    \
                 : GHL_OPERANDS_##count(d)                                                                  \
                 : "l"(a), "l"(b));                                                                         \
  }
#define GHL_DEFINE_WGMMAS(type)                             \
  GHL_DEFINE_WGMMA(type, 64, 32, 32, 33, 34, 35, 36)        \
  GHL_DEFINE_WGMMA(type, 128, 64, 64, 65, 66, 67, 68)       \
  GHL_DEFINE_WGMMA(type, 192, 96, 96, 97, 98, 99, 100)      \
  GHL_DEFINE_WGMMA(type, 224, 112, 112, 113, 114, 115, 116) \
  GHL_DEFINE_WGMMA(type, 256, 128, 128, 129, 130, 131, 132)

GHL_DEFINE_WGMMAS(bf16)
GHL_DEFINE_WGMMAS(f16)

#undef GHL_DEFINE_WGMMAS
#undef GHL_DEFINE_WGMMA
#undef GHL_OPERANDS_16
#undef GHL_OPERANDS_32
#undef GHL_TEXT_OF_32
#undef GHL_OPERANDS_64
#undef GHL_TEXT_OF_64
#undef GHL_OPERANDS_96
#undef GHL_TEXT_OF_96
#undef GHL_OPERANDS_112
#undef GHL_TEXT_OF_112
#undef GHL_OPERANDS_128
#undef GHL_TEXT_OF_128

}  // namespace ghl::ptx

#endif
