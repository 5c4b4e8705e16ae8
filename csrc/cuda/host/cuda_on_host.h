// CUDA's execution model on a CPU, so that the kernels of csrc/cuda run, and are checked by sanitizers, where
// there is no GPU. Every thread of a block is a fiber (runtime.cpp); blocks run one after the other.
//
// Modelled: blocks, warps, barriers, shuffles, votes and reductions of a warp, shared memory, integer
// atomics, and the sm_80 instructions of ptx.h, with cp.async really asynchronous: the bytes arrive when the
// thread waits for their group, not before. Not modelled: time, bank conflicts, the weakness of the memory
// model, anything between two blocks. Clusters and the instructions of sm_90: cluster.h and ptx_sm90.h.
//
// A kernel that deadlocks, names an exited lane, or reads a lane outside the mask raises std::runtime_error
// from launch(). Races show under ThreadSanitizer, which knows the fibers, or by a different schedule().
// More in docs/cuda-on-host.md.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "cuda/host/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static
// One block runs at a time, so that a static variable is that block's. It keeps what the last block left.
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace ghl::host {

// In which order the blocks of a grid run, and the threads of a block between two barriers. A kernel without
// a race gives the same result in all.
enum class Schedule { forward, reverse, random };
void schedule(Schedule order, unsigned seed = 1);

// Of a block's dynamic shared memory, as of sm_80.
constexpr size_t kSharedLimit = 163 << 10;

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

// Waits for all threads of the block that have not exited; how many of them came with a true predicate.
unsigned block_barrier(bool predicate = false);

// Lets other threads of the block run.
void yield();

// Waits until all lanes of the mask are here, then copies what each of them brought to `all`, in lane order.
// Entries of lanes outside the mask mean nothing.
constexpr size_t kMostExchanged = 24;
void exchange(unsigned mask, const void* own, size_t bytes, void* all);

// The queue behind cp.async of the calling thread.
void copy_later(void* target, const void* source, unsigned bytes, unsigned from_source);
void close_copy_group();
void wait_for_copies(unsigned groups_pending);

template <class T>
struct WarpValues {
  T of[32];
};

template <class T>
WarpValues<T> exchange(unsigned mask, const T& own) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMostExchanged);
  WarpValues<T> all;
  exchange(mask, &own, sizeof own, &all);
  return all;
}

inline bool has(unsigned mask, unsigned lane) { return mask >> lane & 1; }

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof value);
  return result;
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

// The lanes that a shuffle of this width moves values between.
struct Segment {
  explicit Segment(int width) : first(lane() & ~(static_cast<unsigned>(width) - 1)), last(first + width - 1) {
    if (width < 1 || width > 32 || width & (width - 1)) {
      throw std::runtime_error("the width of a shuffle is not a power of two up to 32");
    }
  }
  unsigned first, last;
};

// Where the source is outside of the segment a lane keeps its own value.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, bool inside) {
  const WarpValues<T> values = exchange(mask, value);
  if (!inside) return value;
  if (!has(mask, source)) throw std::runtime_error("a shuffle reads a lane that is not in its mask");
  return values.of[source];
}

// Of the lanes in the mask, folded from the lowest to the highest.
template <class T, class Fold>
T fold_lanes(unsigned mask, T value, Fold fold) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>,
                "warp reductions are of 32-bit integers");
  const WarpValues<T> values = exchange(mask, value);
  unsigned i = static_cast<unsigned>(__builtin_ctz(mask));
  T result = values.of[i];
  while (++i < 32) {
    if (has(mask, i)) result = fold(result, values.of[i]);
  }
  return result;
}

template <class T, class Next>
T atomic_update(T* address, Next next) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (
      !__atomic_compare_exchange_n(address, &seen, next(seen), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

}  // namespace ghl::host

inline constexpr ghl::host::Index<ghl::host::thread_index> threadIdx;
inline constexpr ghl::host::Index<ghl::host::block_index> blockIdx;
inline constexpr ghl::host::Index<ghl::host::block_size> blockDim;
inline constexpr ghl::host::Index<ghl::host::grid_size> gridDim;

// --- barriers -----------------------------------------------------------------------------------

inline void __syncthreads() { ghl::host::block_barrier(); }
inline int __syncthreads_count(int predicate) {
  return static_cast<int>(ghl::host::block_barrier(predicate != 0));
}
inline int __syncthreads_or(int predicate) { return ghl::host::block_barrier(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return ghl::host::block_barrier(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { ghl::host::exchange(mask, nullptr, 0, nullptr); }
// All fibers are of one processor: only the compiler could reorder.
inline void __threadfence() { std::atomic_signal_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { __threadfence(); }
inline void __nanosleep(unsigned) { ghl::host::yield(); }
[[noreturn]] inline void __trap() { throw std::runtime_error("the kernel trapped"); }

// --- warps --------------------------------------------------------------------------------------

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const ghl::host::Segment segment(width);
  return ghl::host::shuffle(mask, value, segment.first + (static_cast<unsigned>(source) & (width - 1)), true);
}

// A distance of `width` or more reaches the segments before, never those after: so does the instruction.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const unsigned source = ghl::host::lane() ^ (static_cast<unsigned>(distance) & 31);
  return ghl::host::shuffle(mask, value, source, source <= ghl::host::Segment(width).last);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = ghl::host::lane(), back = distance & 31;
  return ghl::host::shuffle(mask, value, lane - back, lane >= ghl::host::Segment(width).first + back);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned source = ghl::host::lane() + (distance & 31);
  return ghl::host::shuffle(mask, value, source, source <= ghl::host::Segment(width).last);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto votes = ghl::host::exchange(mask, predicate != 0);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (ghl::host::has(mask, i) && votes.of[i]) ballot |= 1u << i;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __activemask() {
  throw std::runtime_error("__activemask is not modelled: name the lanes instead");
}

// Compares bits, as the instruction does: equal NaN match, zeros of different signs do not.
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const auto values = ghl::host::exchange(mask, value);
  unsigned same = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (ghl::host::has(mask, i) && !std::memcmp(&values.of[i], &value, sizeof value)) same |= 1u << i;
  }
  return same;
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all) {
  *all = __match_any_sync(mask, value) == mask;
  return *all ? mask : 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  // unsigned: the sum wraps
  return ghl::host::fold_lanes(mask, value, [](T a, T b) {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  });
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
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return ghl::host::fold_lanes(mask, value, [](unsigned a, unsigned b) { return a ^ b; });
}

// --- memory -------------------------------------------------------------------------------------

// The value is not deduced, so that it converts to the type behind the address as in CUDA.
template <class T>
using Value = std::type_identity_t<T>;

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldca(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, Value<T> value) {
  *address = value;
}
template <class T>
void __stcs(T* address, Value<T> value) {
  *address = value;
}

template <class T>
T atomicAdd(T* address, Value<T> value) {
  static_assert(std::is_integral_v<T>, "sums of floats depend on the order");
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicSub(T* address, Value<T> value) {
  static_assert(std::is_integral_v<T>, "sums of floats depend on the order");
  return __atomic_fetch_sub(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicAnd(T* address, Value<T> value) {
  return __atomic_fetch_and(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* address, Value<T> value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicXor(T* address, Value<T> value) {
  return __atomic_fetch_xor(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* address, Value<T> value) {
  static_assert(std::is_integral_v<T>);
  return ghl::host::atomic_update(address, [value](T seen) { return std::max(seen, value); });
}
template <class T>
T atomicMin(T* address, Value<T> value) {
  static_assert(std::is_integral_v<T>);
  return ghl::host::atomic_update(address, [value](T seen) { return std::min(seen, value); });
}
template <class T>
T atomicExch(T* address, Value<T> value) {
  return ghl::host::atomic_update(address, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* address, Value<T> expected, Value<T> value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

#include "cuda/host/arithmetic.h"
