// A program of small kernels, one chosen by its name on the command line. It prints what they computed, one
// named row of numbers a line; what launch() raises goes to stderr, with exit status 1.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"

namespace ghl::program {

using Case = void (*)();

// Registers a case before main().
struct Register {
  Register(const char* name, Case run);
};

template <class T>
void print(const std::string& name, const std::vector<T>& row) {
  std::printf("%s:", name.c_str());
  for (const T value : row) std::printf(" %.17g", static_cast<double>(value));
  std::printf("\n");
}

template <class Params>
void run(void (*kernel)(Params), const Grid& grid, const Params& params) {
  const Status status = launch("kernel", kernel, grid, Stream{}, params);
  if (!status.ok) throw std::runtime_error(status.message);
}

}  // namespace ghl::program
