// The kernel bodies behind the *_cpu launchers. Each is compiled once per instruction set from one
// source, into the namespace of that set; launch.cpp picks the one to call.
//
// The sources compiled per instruction set must not emit weak symbols: the linker keeps one copy of
// those, perhaps the AVX-512 one, for every caller. So all but the functions declared here has internal
// linkage, and nothing of the standard library that needs an out-of-line copy is used (no containers,
// no std::min). The build checks it (cmake/no_weak_symbols.cmake).
#pragma once

#include <cstdint>

#include "ghl/compete.h"
#include "ghl/correlate.h"
#include "ghl/epilogue.h"
#include "ghl/outer.h"
#include "ghl/winograd.h"

// Parameters arrive checked and nothing is empty. Workspaces are 64-byte aligned and of the size asked for.
#define GHL_DECLARE_KERNELS(isa)                                           \
  namespace ghl::isa {                                                     \
  int64_t compete_workspace(const CompeteParams& params, int threads);     \
  void compete(const CompeteParams& params, void* workspace, int threads); \
  int64_t correlate_workspace(const CorrelateParams& params, int threads); \
  void correlate(const CorrelateParams& params, int threads);              \
  int64_t epilogue_workspace(const EpilogueParams& params, int threads);   \
  void epilogue(const EpilogueParams& params, int threads);                \
  int64_t outer_workspace(const OuterParams& params, int threads);         \
  void outer(const OuterParams& params, int threads);                      \
  int64_t winograd_workspace(const WinogradParams& params, int threads);   \
  void winograd(const WinogradParams& params, int threads);                \
  }

GHL_DECLARE_KERNELS(baseline)
#ifdef GHL_BUILD_X86
GHL_DECLARE_KERNELS(avx2)
GHL_DECLARE_KERNELS(avx512)
#endif

#undef GHL_DECLARE_KERNELS
