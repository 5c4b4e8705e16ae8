// A workspace, taken piece by piece, each on a line of its own. On null it only counts.
#pragma once

#include <cstdint>

#include "cpu/sizes.h"

namespace ghl::GHL_ISA {
namespace {

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* const begin = base_ == nullptr ? nullptr : base_ + used_;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(begin);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace ghl::GHL_ISA
