// Clusters, barriers in shared memory and copies by tensor maps, for the emulated instructions of ptx_sm90.h.
// The threads of a cluster are those of one block of the host runtime; rank r has the r-th part of them.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/host/cuda_on_host.h"

namespace ghl::host {

constexpr unsigned cluster_threads = 384;       // of a block
constexpr uint32_t cluster_shared = 227 << 10;  // bytes of a block

struct Barrier {
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;    // announced and not yet copied; below zero while copies are ahead of the announcement
  uint32_t phases = 0;  // that are over
};

struct Cluster {
  unsigned char* shared = nullptr;  // of both blocks, in turn
  std::map<std::pair<unsigned, uint32_t>, Barrier> barriers;
  std::vector<std::function<void()>> copies;  // under way
  uint32_t random = 1;
  uint64_t idle = 0;  // waits in vain since anything happened
};

inline Cluster& cluster() {
  static Cluster the_cluster;
  return the_cluster;
}

inline unsigned own_rank() { return thread_index().x / cluster_threads; }
inline unsigned own_thread() { return thread_index().x % cluster_threads; }
inline unsigned own_block() {
  return block_index().x * std::max(1u, block_size().x / cluster_threads) + own_rank();
}

// Shared memory of a block begins at address 0 of the cluster's.
inline unsigned char* shared_pointer(unsigned rank, uint32_t address) {
  if (address >= cluster_shared) throw std::runtime_error("a shared address beyond the block's memory");
  return cluster().shared + rank * cluster_shared + address;
}
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_pointer(own_rank(), 0));
}

inline Barrier& barrier_at(unsigned rank, uint32_t address) {
  const auto found = cluster().barriers.find({rank, address});
  if (found == cluster().barriers.end()) throw std::runtime_error("no barrier was initialised here");
  return found->second;
}

inline void end_phase_if_complete(Barrier& barrier) {
  cluster().idle = 0;
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.expected;
  ++barrier.phases;
}

inline void arrive(unsigned rank, uint32_t address) {
  Barrier& barrier = barrier_at(rank, address);
  if (!barrier.pending) throw std::runtime_error("more arrivals at a barrier than its phase has");
  --barrier.pending;
  end_phase_if_complete(barrier);
}

inline void expect_bytes(unsigned rank, uint32_t address, int64_t bytes) {
  barrier_at(rank, address).bytes += bytes;
}

inline void complete_bytes(unsigned rank, uint32_t address, int64_t bytes) {
  Barrier& barrier = barrier_at(rank, address);
  barrier.bytes -= bytes;
  end_phase_if_complete(barrier);
}

// Lets one copy of those under way arrive, whichever.
inline void deliver() {
  Cluster& all = cluster();
  if (all.copies.empty()) return;
  all.random = all.random * 1664525u + 1013904223u;
  const size_t which = (all.random >> 8) % all.copies.size();
  const std::function<void()> copy = std::move(all.copies[which]);
  all.copies.erase(all.copies.begin() + static_cast<std::ptrdiff_t>(which));
  copy();
}

inline bool try_wait(unsigned rank, uint32_t address, uint32_t parity) {
  constexpr uint64_t kPatience = 1 << 20;
  const Barrier& barrier = barrier_at(rank, address);
  if ((barrier.phases & 1) != parity) return true;
  deliver();
  if (++cluster().idle > kPatience) throw std::runtime_error("deadlock: every wait is in vain");
  yield();
  return false;
}

// What threadIdx and blockIdx are to a thread of a cluster.
struct ClusterThread {
  struct {
    operator unsigned() const { return own_thread(); }
  } x;
};
struct ClusterBlock {
  struct {
    operator unsigned() const { return own_block(); }
  } x;
};

template <class T>
T* own_shared() {
  return reinterpret_cast<T*>(shared_pointer(own_rank(), 0));
}

}  // namespace ghl::host
