#pragma once

#include <string>

namespace ghl {

// What a launcher returns. A status that is not ok means that no kernel ran and nothing was written;
// the binding turns it into a Python RuntimeError with this message.
struct Status {
  bool ok = true;
  std::string message;

  static Status failure(std::string message) { return {false, std::move(message)}; }
};

}  // namespace ghl
