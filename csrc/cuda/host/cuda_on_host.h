// CUDA's execution model on a CPU, so that the kernels of csrc/cuda run, and are checked by sanitizers, where
// there is no GPU. Every thread of a block is a fiber (runtime.cpp); blocks run one after the other.
//
// Modelled: blocks, warps, barriers, shuffles, votes and reductions of a warp (all lanes of the mask must
// arrive, and agree on it), shared memory, integer atomics, and the sm_80 instructions of ptx.h, with cp.async
// really asynchronous: the bytes arrive when the thread waits for their group, not before.
// Not modelled: time, bank conflicts, the weakness of the memory model, clusters, anything between two blocks.
//
// A kernel that deadlocks, names an exited lane, or whose lanes disagree on a mask raises std::runtime_error
// from launch(). Races show under ThreadSanitizer, which knows the fibers, or by a different schedule().
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __constant__ static
// One block runs at a time, so that a static variable is that block's.
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace ghl::host {

// In which order threads run between two barriers. A kernel without a race gives the same result in all.
enum class Schedule { forward, reverse, random };
void schedule(Schedule order, unsigned seed = 1);

// Runs the body once for each thread of each block, and rethrows what one of them throws.
void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body);

// Fiber switches since the process began.
uint64_t switches();

// Of the calling thread.
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned lane();
void* dynamic_shared();

void block_barrier();

// Waits until all lanes of the mask are here, then gives each what every lane brought.
struct WarpValues {
  uint64_t of[32];
};
WarpValues exchange(unsigned mask, uint64_t value);

// The queue behind cp.async of the calling thread.
void copy_later(void* target, const void* source, unsigned bytes, unsigned from_source);
void close_copy_group();
void wait_for_copies(unsigned groups_pending);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// threadIdx and its like are read as variables, so each is an object that asks when it is converted.
template <dim3 (*read)()>
struct Index {
  struct X {
    operator unsigned() const { return read().x; }
  };
  struct Y {
    operator unsigned() const { return read().y; }
  };
  struct Z {
    operator unsigned() const { return read().z; }
  };
  [[no_unique_address]] X x;
  [[no_unique_address]] Y y;
  [[no_unique_address]] Z z;
};

template <class T>
T shuffle_from(unsigned mask, T value, unsigned source, unsigned width, bool inside) {
  const WarpValues values = exchange(mask, to_bits(value));
  const unsigned segment = lane() & ~(width - 1);
  return inside ? from_bits<T>(values.of[segment | (source & (width - 1))]) : value;
}

// Of the lanes in the mask, folded from the lowest to the highest.
template <class T, class Fold>
T fold_lanes(unsigned mask, T value, Fold fold) {
  const WarpValues values = exchange(mask, to_bits(value));
  bool first = true;
  T result{};
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const T other = from_bits<T>(values.of[i]);
    result = first ? other : fold(result, other);
    first = false;
  }
  return result;
}

}  // namespace ghl::host

inline constexpr ghl::host::Index<ghl::host::thread_index> threadIdx;
inline constexpr ghl::host::Index<ghl::host::block_index> blockIdx;
inline constexpr ghl::host::Index<ghl::host::block_size> blockDim;
inline constexpr ghl::host::Index<ghl::host::grid_size> gridDim;

// --- barriers -----------------------------------------------------------------------------------

inline void __syncthreads() { ghl::host::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { ghl::host::exchange(mask, 0); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { __threadfence(); }
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { throw std::runtime_error("the kernel trapped"); }

// --- warps --------------------------------------------------------------------------------------

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return ghl::host::shuffle_from(mask, value, static_cast<unsigned>(source), static_cast<unsigned>(width),
                                 true);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const unsigned in_segment = ghl::host::lane() & (static_cast<unsigned>(width) - 1);
  const unsigned source = in_segment ^ static_cast<unsigned>(distance);
  return ghl::host::shuffle_from(mask, value, source, static_cast<unsigned>(width),
                                 source < static_cast<unsigned>(width));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned in_segment = ghl::host::lane() & (static_cast<unsigned>(width) - 1);
  return ghl::host::shuffle_from(mask, value, in_segment - distance, static_cast<unsigned>(width),
                                 in_segment >= distance);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned in_segment = ghl::host::lane() & (static_cast<unsigned>(width) - 1);
  return ghl::host::shuffle_from(mask, value, in_segment + distance, static_cast<unsigned>(width),
                                 in_segment + distance < static_cast<unsigned>(width));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const ghl::host::WarpValues values = ghl::host::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1) votes |= static_cast<unsigned>(values.of[i]) << i;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __activemask() {
  throw std::runtime_error("__activemask is not modelled: name the lanes instead");
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const ghl::host::WarpValues values = ghl::host::exchange(mask, ghl::host::to_bits(value));
  unsigned same = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && values.of[i] == ghl::host::to_bits(value)) same |= 1u << i;
  }
  return same;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return ghl::host::fold_lanes(mask, value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return ghl::host::fold_lanes(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return ghl::host::fold_lanes(mask, value, [](T a, T b) { return std::max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return ghl::host::fold_lanes(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return ghl::host::fold_lanes(mask, value, [](unsigned a, unsigned b) { return a & b; });
}

inline int __syncthreads_or(int predicate) {
  static int any;
  __syncthreads();
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  if (predicate) __atomic_store_n(&any, 1, __ATOMIC_RELAXED);
  __syncthreads();
  return any;
}

// --- bits, arithmetic, memory ---------------------------------------------------------------------

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned __float_as_uint(float value) { return ghl::host::from_bits<unsigned>(ghl::host::to_bits(value)); }
inline int __float_as_int(float value) { return ghl::host::from_bits<int>(ghl::host::to_bits(value)); }
inline float __uint_as_float(unsigned bits) { return ghl::host::from_bits<float>(bits); }
inline float __int_as_float(int bits) { return ghl::host::from_bits<float>(static_cast<unsigned>(bits)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }

using std::isfinite;
using std::isnan;
using std::max;
using std::min;

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::numeric_limits<T>::is_integer, "sums of floats depend on the order");
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* address, T value) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (seen < value &&
         !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <class T>
T atomicMin(T* address, T value) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < seen &&
         !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <class T>
T atomicExch(T* address, T value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
