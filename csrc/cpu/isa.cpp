#include "ghl/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace ghl {
namespace {

Isa detect() {
#ifdef GHL_BUILD_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : Isa::avx2;
  }
#endif
  return Isa::baseline;
}

// GHL_CPU_ISA may lower the choice, never raise it; other values are ignored.
Isa initial() {
  const char* wanted = std::getenv("GHL_CPU_ISA");
  if (wanted != nullptr) {
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa < detected_isa()) return isa;
    }
  }
  return detected_isa();
}

std::atomic<Isa>& selection() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa selected_isa() { return selection().load(std::memory_order_relaxed); }

bool select_isa(Isa isa) {
  if (isa < Isa::baseline || isa > detected_isa()) return false;
  selection().store(isa, std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "unknown";
}

}  // namespace ghl
