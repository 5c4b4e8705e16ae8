#pragma once

#include <string>

namespace ghl {

// What a launcher returns; the binding turns one that is not ok into a Python RuntimeError with this message.
// On a CPU nothing was written then. On a GPU the kernels queued before the one that failed do run, and what
// the operation writes is not defined.
struct Status {
  bool ok = true;
  std::string message;

  static Status failure(std::string message) { return {false, std::move(message)}; }
};

}  // namespace ghl
