// The competition and the sums of its activities.
#include "cuda/module.h"
#include "ghl/activity_sums.h"

namespace ghl::binding {
namespace {

using py::literals::operator""_a;

void compete(uintptr_t u, int u_dtype, const Triple& u_layout, int64_t batch, int64_t units,
             int64_t positions, int activity, int64_t winners, float temperature, bool anti, uintptr_t y,
             const Triple& y_layout, uintptr_t threshold, uintptr_t cut, uintptr_t logsumexp,
             bool keeps_infinity, uintptr_t first, uintptr_t winner_unit, uintptr_t winner_activity,
             int device, uintptr_t stream) {
  CompeteParams params;
  params.u = pointer<const void>(u);
  params.u_dtype = gpu_dtype("u_dtype", u_dtype);
  params.u_layout = layout(u_layout);
  params.batch = batch;
  params.units = units;
  params.positions = positions;
  params.activity = enumerator("activity", activity, Activity::binary);
  params.winners = winners;
  params.temperature = temperature;
  params.anti = anti;
  params.y = pointer<void>(y);
  params.y_dtype = params.u_dtype;
  params.y_layout = layout(y_layout);
  params.threshold = pointer<float>(threshold);
  params.cut = pointer<int32_t>(cut);
  params.logsumexp = pointer<float>(logsumexp);
  params.keeps_infinity = keeps_infinity;
  params.first = pointer<int32_t>(first);
  params.winner_unit = pointer<int32_t>(winner_unit);
  params.winner_activity = pointer<float>(winner_activity);
  queue(compete_cuda, params, stream_of(device, stream));
}

ActivitySumsParams activity_sums_params(uintptr_t u, int u_dtype, const Triple& u_layout, int64_t batch,
                                        int64_t units, int64_t positions, int activity, int64_t winners,
                                        float temperature, bool anti, uintptr_t threshold, uintptr_t cut,
                                        uintptr_t logsumexp, uintptr_t first, uintptr_t sum,
                                        uintptr_t workspace) {
  ActivitySumsParams params;
  params.u = pointer<const void>(u);
  params.u_dtype = gpu_dtype("u_dtype", u_dtype);
  params.u_layout = layout(u_layout);
  params.batch = batch;
  params.units = units;
  params.positions = positions;
  params.activity = enumerator("activity", activity, Activity::binary);
  params.selects = winners > 0;
  params.anti = anti;
  params.temperature = temperature;
  params.threshold = pointer<const float>(threshold);
  params.cut = pointer<const int32_t>(cut);
  params.logsumexp = pointer<const float>(logsumexp);
  params.first = pointer<const int32_t>(first);
  params.sum = pointer<float>(sum);
  params.workspace = pointer<void>(workspace);
  return params;
}

template <class... Fields>
void define_sums(py::module_& module, ActivitySumsParams (*build)(Fields...)) {
  const auto with_arguments = [&](const char* name, const auto& call, const auto&... more) {
    module.def(name, call, py::kw_only(), "u"_a, "u_dtype"_a, "u_layout"_a, "batch"_a, "units"_a,
               "positions"_a, "activity"_a, "winners"_a, "temperature"_a, "anti"_a, "threshold"_a = 0,
               "cut"_a = 0, "logsumexp"_a = 0, "first"_a = 0, "sum"_a = 0, "workspace"_a = 0, more...);
  };
  with_arguments("activity_sums_workspace",
                 [build](Fields... fields) { return activity_sums_cuda_workspace(build(fields...)); });
  with_arguments(
      "activity_sums",
      [build](Fields... fields, int device, uintptr_t stream) {
        queue(activity_sums_cuda, build(fields...), stream_of(device, stream));
      },
      "device"_a, "stream"_a);
}

void define(py::module_& module) {
  const Triple zeros{0, 0, 0};
  module.def("compete", compete, py::kw_only(), "u"_a, "u_dtype"_a, "u_layout"_a, "batch"_a, "units"_a,
             "positions"_a, "activity"_a, "winners"_a, "temperature"_a, "anti"_a, "y"_a = 0,
             "y_layout"_a = zeros, "threshold"_a = 0, "cut"_a = 0, "logsumexp"_a = 0,
             "keeps_infinity"_a = false, "first"_a = 0, "winner_unit"_a = 0, "winner_activity"_a = 0,
             "device"_a, "stream"_a);
  define_sums(module, activity_sums_params);
}

const Registration registration(define);

}  // namespace
}  // namespace ghl::binding
