// The pair [y; dL/du]^T x, and how it would be cut.
#include "ghl/pair.h"

#include "cuda/pair_mma_plan.h"
#include "cuda/pair_narrow_plan.h"
#include "cuda/pair_params.h"

namespace ghl::binding {
namespace {

using py::literals::operator""_a;

py::dict plan(int64_t units, int64_t columns, int64_t groups, int64_t positions, int results, int itemsize,
              int multiprocessors, size_t shared_limit) {
  const PairPlan plan =
      pair_plan({units, columns, groups, positions, results, itemsize}, multiprocessors, shared_limit);
  return py::dict("wide"_a = plan.wide, "stages"_a = plan.stages, "whole_tiles"_a = plan.whole_tiles,
                  "split_tiles"_a = plan.split_tiles, "parts"_a = plan.parts,
                  "part_steps"_a = plan.part_steps, "blocks"_a = plan.blocks(),
                  "resident"_a = pair_resident(plan.wide, itemsize),
                  "shared"_a = pair_shared_bytes(plan.wide, itemsize, plan.stages),
                  "workspace"_a = pair_workspace_bytes(plan));
}

py::dict narrow(int64_t units, int64_t taps, int64_t channels, int64_t positions, int results,
                int multiprocessors, size_t shared_limit) {
  const NarrowPlan plan =
      narrow_plan({units, taps, channels, positions, results}, multiprocessors, shared_limit);
  return py::dict("rows"_a = plan.rows(), "half"_a = plan.half(), "columns"_a = plan.columns(),
                  "threads"_a = plan.threads(), "depths"_a = plan.depths, "blocks"_a = plan.blocks,
                  "shared"_a = plan.shared, "workspace"_a = narrow_workspace_bytes(plan));
}

void define(py::module_& module) {
  define_pair_call(module, "pair",
                   [](const PairParams& params, Stream stream) { queue(pair_cuda, params, stream); });
  define_pair_call(module, "pair_workspace", [](const PairParams& params, Stream stream) {
    return pair_cuda_workspace(params, stream.device);
  });
  // the form that would run, and whether it computes the state itself
  define_pair_call(module, "pair_form", [](const PairParams& params, Stream stream) {
    return static_cast<int>(pair_cuda_form(params, stream.device));
  });
  define_pair_call(module, "pair_makes_state", [](const PairParams& params, Stream stream) {
    return pair_cuda_makes_state(params, stream.device);
  });
  module.def("narrow_plan", narrow, py::kw_only(), "units"_a, "taps"_a, "channels"_a, "positions"_a,
             "results"_a, "multiprocessors"_a, "shared_limit"_a);
  module.def("pair_plan", plan, py::kw_only(), "units"_a, "columns"_a, "groups"_a = 1, "positions"_a,
             "results"_a, "itemsize"_a, "multiprocessors"_a, "shared_limit"_a);
}

const Registration registration(define);

}  // namespace
}  // namespace ghl::binding
