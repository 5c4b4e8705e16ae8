// The pair [y; dL/du]^T x, and how it would be cut.
#include "ghl/pair.h"

#include "cuda/pair_params.h"
#include "cuda/pair_plan.h"

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

void define(py::module_& module) {
  define_pair_call(module, "pair",
                   [](const PairParams& params, Stream stream) { queue(pair_cuda, params, stream); });
  define_pair_call(module, "pair_workspace", [](const PairParams& params, Stream stream) {
    return pair_cuda_workspace(params, stream.device);
  });
  module.def("pair_plan", plan, py::kw_only(), "units"_a, "columns"_a, "groups"_a = 1, "positions"_a,
             "results"_a, "itemsize"_a, "multiprocessors"_a, "shared_limit"_a);
}

const Registration registration(define);

}  // namespace
}  // namespace ghl::binding
