// The public launchers: check the parameters once more (the Python side has, with better messages),
// leave on empty sizes, run the kernel of the selected instruction set.
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>

#include "cpu/kernels.h"
#include "ghl/isa.h"

namespace ghl {
namespace {

#ifdef GHL_BUILD_X86
#define GHL_DISPATCH(call)  \
  switch (selected_isa()) { \
    case Isa::avx512:       \
      return avx512::call;  \
    case Isa::avx2:         \
      return avx2::call;    \
    case Isa::baseline:     \
      break;                \
  }                         \
  return baseline::call
#else
#define GHL_DISPATCH(call) return baseline::call
#endif

void run_compete(const CompeteParams& params, void* workspace, int threads) {
  GHL_DISPATCH(compete(params, workspace, threads));
}
void run_correlate(const CorrelateParams& params, int threads) { GHL_DISPATCH(correlate(params, threads)); }
void run_epilogue(const EpilogueParams& params, int threads) { GHL_DISPATCH(epilogue(params, threads)); }
void run_outer(const OuterParams& params, int threads) { GHL_DISPATCH(outer(params, threads)); }
void run_winograd(const WinogradParams& params, int threads) { GHL_DISPATCH(winograd(params, threads)); }

int64_t size_compete(const CompeteParams& params, int threads) {
  GHL_DISPATCH(compete_workspace(params, threads));
}
int64_t size_correlate(const CorrelateParams& params, int threads) {
  GHL_DISPATCH(correlate_workspace(params, threads));
}
int64_t size_epilogue(const EpilogueParams& params, int threads) {
  GHL_DISPATCH(epilogue_workspace(params, threads));
}
int64_t size_outer(const OuterParams& params, int threads) { GHL_DISPATCH(outer_workspace(params, threads)); }
int64_t size_winograd(const WinogradParams& params, int threads) {
  GHL_DISPATCH(winograd_workspace(params, threads));
}

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

bool aligned(const void* pointer, DType dtype) { return aligned(pointer, element_size(dtype)); }

// Empty when the parameters are in order, else what is wrong.
using Problem = std::string;

// The two layouts the kernels read: along units or along positions.
bool unit_stride_somewhere(const Layout& layout, int64_t units, int64_t positions) {
  return layout.stride_unit == 1 || layout.stride_position == 1 || units == 1 || positions == 1;
}

Problem check_workspace(const void* workspace, int64_t size) {
  if (!aligned(workspace, 64)) return "the workspace is not aligned to 64 bytes";
  if (workspace == nullptr && size > 0) return "the workspace is null";
  return {};
}

bool empty(const CompeteParams& p) { return p.batch == 0 || p.units == 0 || p.positions == 0; }

Problem check_sizes(const CompeteParams& p, int threads) {
  if (threads < 1) return "threads must be at least 1";
  if (p.batch < 0 || p.units < 0 || p.positions < 0) return "a size is negative";
  if (p.units > kMaxInt32) return "more than 2^31 - 1 units";
  if (p.winners < 0 || p.winners > p.units) return "winners must lie between 0 and the number of units";
  if (p.winners == 0 && (p.threshold || p.cut || p.winner_unit || p.winner_activity)) {
    return "threshold, cut and the winner lists need winners > 0";
  }
  if (!(p.temperature > 0.0f) || p.temperature > std::numeric_limits<float>::max()) {
    return "the temperature must be finite and above 0";
  }
  return {};
}

Problem check_memory(const CompeteParams& p) {
  if (p.u == nullptr) return "u is null";
  if (!aligned(p.u, p.u_dtype) || !aligned(p.y, p.y_dtype)) return "a tensor is not aligned to its elements";
  if (!unit_stride_somewhere(p.u_layout, p.units, p.positions)) {
    return "u needs stride 1 along the units or along the positions";
  }
  if (p.y != nullptr && !unit_stride_somewhere(p.y_layout, p.units, p.positions)) {
    return "y needs stride 1 along the units or along the positions";
  }
  return {};
}

bool empty(const CorrelateParams& p) { return p.units == 0 || p.geometry.channels == 0; }

bool spatial_sizes_fit(const ConvGeometry& g) {
  for (int d = 0; d < 3; ++d) {
    if (g.in_size[d] < 0 || g.out_size[d] < 0 || g.kernel[d] < 1) return false;
    if (g.stride[d] < 1 || g.dilation[d] < 1 || g.padding[d] < 0) return false;
    // The last tap of the last output position must lie within the padded input.
    const int64_t last = (g.out_size[d] - 1) * g.stride[d] + (g.kernel[d] - 1) * g.dilation[d];
    if (g.out_size[d] > 0 && last >= g.in_size[d] + 2 * g.padding[d]) return false;
  }
  return true;
}

Problem check_sizes(const CorrelateParams& p, int threads) {
  const ConvGeometry& g = p.geometry;
  if (threads < 1) return "threads must be at least 1";
  if (g.batch < 0 || g.channels < 0 || p.units < 0) return "a size is negative";
  if (p.units > kMaxInt32) return "more than 2^31 - 1 units";
  if (g.groups < 1 || g.channels % g.groups != 0 || p.units % g.groups != 0) {
    return "the groups must divide the channels and the units";
  }
  if (!spatial_sizes_fit(g)) return "the input, output and kernel sizes do not fit";
  if (p.winners < 1 || (p.units > 0 && p.winners > p.units)) {
    return "winners must lie between 1 and the number of units";
  }
  return {};
}

Problem check_memory(const CorrelateParams& p, int threads) {
  if (p.a == nullptr || !aligned(p.a, 4)) return "a is null or not aligned";
  if (p.geometry.positions() > 0) {
    if (p.winner_unit == nullptr || p.winner_activity == nullptr) return "a winner list is null";
    if (p.x == nullptr || !aligned(p.x, p.x_dtype)) return "x is null or not aligned";
  }
  return check_workspace(p.workspace, size_correlate(p, threads));
}

bool empty(const EpilogueParams& p) { return p.units == 0 || p.channels == 0 || p.taps == 0; }

Problem check_sizes(const EpilogueParams& p, int threads) {
  if (threads < 1) return "threads must be at least 1";
  if (p.units < 0 || p.channels < 0 || p.taps < 0) return "a size is negative";
  return {};
}

Problem check_memory(const EpilogueParams& p, int threads) {
  if (p.a == nullptr || !aligned(p.a, 4)) return "a is null or not aligned";
  if (p.out == nullptr || !aligned(p.out, p.out_dtype)) return "out is null or not aligned";
  if (p.weight == nullptr && p.decay != Decay::none) return "the decay needs the weight";
  if (p.weight != nullptr && !aligned(p.weight, p.weight_dtype)) return "the weight is not aligned";
  if (p.row_decay == nullptr && p.decay == Decay::rows) return "row_decay is null";
  if (p.target == Target::learn && p.weight != p.out) return "to learn, out must be the weight";
  return check_workspace(p.workspace, size_epilogue(p, threads));
}

bool empty(const OuterParams& p) { return p.units == 0 || p.channels == 0; }

Problem check_sizes(const OuterParams& p, int threads) {
  if (threads < 1) return "threads must be at least 1";
  if (p.rows < 1 || p.channels < 0 || p.units < 0) return "there must be a row, and no size be negative";
  return {};
}

Problem check_memory(const OuterParams& p, int threads) {
  if (p.x.data == nullptr || p.y.data == nullptr || p.a == nullptr) return "a tensor is null";
  if (!aligned(p.x.data, p.x.dtype) || !aligned(p.y.data, p.y.dtype) || !aligned(p.a, 4)) {
    return "a tensor is not aligned to its elements";
  }
  return check_workspace(p.workspace, size_outer(p, threads));
}

bool empty(const WinogradParams& p) { return p.units == 0 || p.channels == 0; }

Problem check_sizes(const WinogradParams& p, int threads) {
  if (threads < 1) return "threads must be at least 1";
  if (p.batch < 1 || p.channels < 0 || p.units < 0) return "there must be an image, and no size be negative";
  if (p.groups < 1 || p.channels % p.groups != 0 || p.units % p.groups != 0) {
    return "the groups must divide the channels and the units";
  }
  for (int d = 0; d < 2; ++d) {
    if (p.in_size[d] < 1 || p.padding[d] < 0 || p.out_size(d) < 1) {
      return "the planes must hold a position, and the padded ones a patch";
    }
  }
  return {};
}

Problem check_memory(const WinogradParams& p, int threads) {
  if (p.x == nullptr || p.y == nullptr || p.a == nullptr) return "a tensor is null";
  if (!aligned(p.x, p.x_dtype) || !aligned(p.y, p.y_dtype) || !aligned(p.a, 4)) {
    return "a tensor is not aligned to its elements";
  }
  return check_workspace(p.workspace, size_winograd(p, threads));
}

Status failure(const char* launcher, const Problem& problem) {
  return Status::failure(std::string(launcher) + ": " + problem);
}

// What the launchers of kernels with a workspace have in common.
template <class Params>
int64_t workspace(int64_t (*size)(const Params&, int), const Params& params, int threads) {
  if (!check_sizes(params, threads).empty() || empty(params)) return 0;
  return size(params, threads);
}

template <class Params>
Status launch(const char* name, void (*run)(const Params&, int), const Params& params, int threads) {
  if (const Problem problem = check_sizes(params, threads); !problem.empty()) return failure(name, problem);
  if (empty(params)) return {};
  if (const Problem problem = check_memory(params, threads); !problem.empty()) return failure(name, problem);
  run(params, threads);
  return {};
}

}  // namespace

Status compete_cpu(const CompeteParams& params, int threads) {
  if (const Problem problem = check_sizes(params, threads); !problem.empty())
    return failure("compete", problem);
  if (empty(params)) return {};
  if (const Problem problem = check_memory(params); !problem.empty()) return failure("compete", problem);
  const auto size = static_cast<std::size_t>(size_compete(params, threads));
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, size), &std::free);
  if (workspace == nullptr) return failure("compete", "no memory for " + std::to_string(size) + " bytes");
  run_compete(params, workspace.get(), threads);
  return {};
}

int64_t correlate_cpu_workspace(const CorrelateParams& params, int threads) {
  return workspace(size_correlate, params, threads);
}
Status correlate_cpu(const CorrelateParams& params, int threads) {
  return launch("correlate", run_correlate, params, threads);
}

int64_t epilogue_cpu_workspace(const EpilogueParams& params, int threads) {
  return workspace(size_epilogue, params, threads);
}
Status epilogue_cpu(const EpilogueParams& params, int threads) {
  return launch("epilogue", run_epilogue, params, threads);
}

int64_t outer_cpu_workspace(const OuterParams& params, int threads) {
  return workspace(size_outer, params, threads);
}
Status outer_cpu(const OuterParams& params, int threads) {
  return launch("outer", run_outer, params, threads);
}

int64_t winograd_cpu_workspace(const WinogradParams& params, int threads) {
  return workspace(size_winograd, params, threads);
}
Status winograd_cpu(const WinogradParams& params, int threads) {
  return launch("winograd", run_winograd, params, threads);
}

}  // namespace ghl
