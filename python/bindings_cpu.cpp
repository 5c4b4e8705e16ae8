// ghl_kernels._cpu: the launchers of csrc with the fields of their parameter structs as keyword
// arguments. No logic lives here; ghl_kernels/_cpu.pyi documents the signatures.
#include "binding.h"
#include "ghl/isa.h"
#include "ghl/outer.h"
#include "ghl/winograd.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

using ghl::binding::copy;
using ghl::binding::enumerator;
using ghl::binding::filters;
using ghl::binding::geometry;
using ghl::binding::layout;
using ghl::binding::Pair;
using ghl::binding::pointer;
using ghl::binding::Triple;

ghl::DType dtype(const char* name, int value) { return enumerator(name, value, ghl::DType::bf16); }

template <class Params>
void run(ghl::Status (*launcher)(const Params&, int), const Params& params, int threads) {
  ghl::Status status;
  {
    const py::gil_scoped_release release;
    status = launcher(params, threads);
  }
  ghl::binding::raise_failure(status);
}

void compete(uintptr_t u, int u_dtype, const Triple& u_layout, int64_t batch, int64_t units,
             int64_t positions, int activity, int64_t winners, float temperature, bool anti, uintptr_t y,
             int y_dtype, const Triple& y_layout, uintptr_t logsumexp, uintptr_t threshold, uintptr_t cut,
             uintptr_t winner_unit, uintptr_t winner_activity, int threads) {
  ghl::CompeteParams params;
  params.u = pointer<const void>(u);
  params.u_dtype = dtype("u_dtype", u_dtype);
  params.u_layout = layout(u_layout);
  params.batch = batch;
  params.units = units;
  params.positions = positions;
  params.activity = enumerator("activity", activity, ghl::Activity::binary);
  params.winners = winners;
  params.temperature = temperature;
  params.anti = anti;
  params.y = pointer<void>(y);
  params.y_dtype = dtype("y_dtype", y_dtype);
  params.y_layout = layout(y_layout);
  params.logsumexp = pointer<float>(logsumexp);
  params.threshold = pointer<float>(threshold);
  params.cut = pointer<int32_t>(cut);
  params.winner_unit = pointer<int32_t>(winner_unit);
  params.winner_activity = pointer<float>(winner_activity);
  run(ghl::compete_cpu, params, threads);
}

ghl::CorrelateParams correlate_params(int64_t batch, int64_t channels, int64_t groups, const Triple& in_size,
                                      const Triple& out_size, const Triple& kernel, const Triple& stride,
                                      const Triple& padding, const Triple& dilation, uintptr_t winner_unit,
                                      uintptr_t winner_activity, int64_t winners, uintptr_t x, int x_dtype,
                                      int64_t x_stride_batch, int64_t x_stride_channel,
                                      const Triple& x_stride, int64_t units, uintptr_t a,
                                      int64_t a_stride_unit, int64_t a_stride_channel, int64_t a_stride_tap,
                                      uintptr_t activity_sum, uintptr_t workspace) {
  ghl::CorrelateParams params;
  params.geometry = geometry(batch, channels, groups, in_size, out_size, kernel, stride, padding, dilation);
  params.winner_unit = pointer<const int32_t>(winner_unit);
  params.winner_activity = pointer<const float>(winner_activity);
  params.winners = winners;
  params.x = pointer<const void>(x);
  params.x_dtype = dtype("x_dtype", x_dtype);
  params.x_stride_batch = x_stride_batch;
  params.x_stride_channel = x_stride_channel;
  copy(x_stride, params.x_stride);
  params.units = units;
  params.a = pointer<float>(a);
  params.a_stride_unit = a_stride_unit;
  params.a_stride_channel = a_stride_channel;
  params.a_stride_tap = a_stride_tap;
  params.activity_sum = pointer<float>(activity_sum);
  params.workspace = pointer<void>(workspace);
  return params;
}

ghl::EpilogueParams epilogue_params(int64_t units, int64_t channels, int64_t taps, uintptr_t a,
                                    const Triple& a_layout, uintptr_t weight, int weight_dtype,
                                    const Triple& weight_layout, int decay, uintptr_t row_decay,
                                    int normalize, float scale, int target, uintptr_t out, int out_dtype,
                                    const Triple& out_layout, float rate, uintptr_t workspace) {
  ghl::EpilogueParams params;
  params.units = units;
  params.channels = channels;
  params.taps = taps;
  params.a = pointer<const float>(a);
  params.a_layout = filters(a_layout);
  params.weight = pointer<const void>(weight);
  params.weight_dtype = dtype("weight_dtype", weight_dtype);
  params.weight_layout = filters(weight_layout);
  params.decay = enumerator("decay", decay, ghl::Decay::rows);
  params.row_decay = pointer<const float>(row_decay);
  params.normalize = enumerator("normalize", normalize, ghl::Normalize::constant);
  params.scale = scale;
  params.target = enumerator("target", target, ghl::Target::learn);
  params.out = pointer<void>(out);
  params.out_dtype = dtype("out_dtype", out_dtype);
  params.out_layout = filters(out_layout);
  params.rate = rate;
  params.workspace = pointer<void>(workspace);
  return params;
}

ghl::OuterParams outer_params(int64_t rows, int64_t units, int64_t channels, uintptr_t x, int x_dtype,
                              int64_t x_stride, uintptr_t y, int y_dtype, int64_t y_stride, uintptr_t a,
                              int64_t a_stride, bool adds, uintptr_t workspace) {
  ghl::OuterParams params;
  params.rows = rows;
  params.units = units;
  params.channels = channels;
  params.x = {pointer<const void>(x), dtype("x_dtype", x_dtype), x_stride};
  params.y = {pointer<const void>(y), dtype("y_dtype", y_dtype), y_stride};
  params.a = pointer<float>(a);
  params.a_stride = a_stride;
  params.adds = adds;
  params.workspace = pointer<void>(workspace);
  return params;
}

ghl::WinogradParams winograd_params(int64_t batch, int64_t channels, int64_t units, int64_t groups,
                                    const Pair& in_size, const Pair& padding, uintptr_t x, int x_dtype,
                                    const Triple& x_layout, uintptr_t y, int y_dtype, const Triple& y_layout,
                                    uintptr_t a, const Triple& a_layout, uintptr_t workspace) {
  ghl::WinogradParams params;
  params.batch = batch;
  params.channels = channels;
  params.units = units;
  params.groups = groups;
  copy(in_size, params.in_size);
  copy(padding, params.padding);
  params.x = pointer<const void>(x);
  params.x_dtype = dtype("x_dtype", x_dtype);
  params.x_layout = layout(x_layout);
  params.y = pointer<const void>(y);
  params.y_dtype = dtype("y_dtype", y_dtype);
  params.y_layout = layout(y_layout);
  params.a = pointer<float>(a);
  params.a_layout = filters(a_layout);
  params.workspace = pointer<void>(workspace);
  return params;
}

// The launcher and its workspace query take the same arguments: name(build(fields...), threads).
template <class Call, class Params, class... Fields, class... Arguments>
void define(py::module_& module, const char* name, Params (*build)(Fields...), Call call,
            const Arguments&... arguments) {
  module.def(
      name, [build, call](Fields... fields, int threads) { return call(build(fields...), threads); },
      py::kw_only(), arguments..., "threads"_a);
}

void define_correlate(py::module_& module) {
  const Triple zeros{0, 0, 0};
  const Triple ones{1, 1, 1};
  const auto define_as = [&](const char* name, auto call) {
    define(module, name, correlate_params, call, "batch"_a, "channels"_a, "groups"_a = 1, "in_size"_a = ones,
           "out_size"_a = ones, "kernel"_a = ones, "stride"_a = ones, "padding"_a = zeros,
           "dilation"_a = ones, "winner_unit"_a = 0, "winner_activity"_a = 0, "winners"_a, "x"_a = 0,
           "x_dtype"_a, "x_stride_batch"_a, "x_stride_channel"_a, "x_stride"_a = zeros, "units"_a, "a"_a = 0,
           "a_stride_unit"_a, "a_stride_channel"_a, "a_stride_tap"_a, "activity_sum"_a = 0,
           "workspace"_a = 0);
  };
  define_as("correlate", [](const ghl::CorrelateParams& params, int threads) {
    run(ghl::correlate_cpu, params, threads);
  });
  define_as("correlate_workspace", ghl::correlate_cpu_workspace);
}

void define_epilogue(py::module_& module) {
  const Triple zeros{0, 0, 0};
  const auto define_as = [&](const char* name, auto call) {
    define(module, name, epilogue_params, call, "units"_a, "channels"_a, "taps"_a, "a"_a = 0, "a_layout"_a,
           "weight"_a = 0, "weight_dtype"_a = 0, "weight_layout"_a = zeros, "decay"_a, "row_decay"_a = 0,
           "normalize"_a, "scale"_a = 1.0f, "target"_a, "out"_a = 0, "out_dtype"_a = 0, "out_layout"_a,
           "rate"_a = 0.0f, "workspace"_a = 0);
  };
  define_as("epilogue",
            [](const ghl::EpilogueParams& params, int threads) { run(ghl::epilogue_cpu, params, threads); });
  define_as("epilogue_workspace", ghl::epilogue_cpu_workspace);
}

void define_outer(py::module_& module) {
  const auto define_as = [&](const char* name, auto call) {
    define(module, name, outer_params, call, "rows"_a, "units"_a, "channels"_a, "x"_a = 0, "x_dtype"_a = 0,
           "x_stride"_a, "y"_a = 0, "y_dtype"_a = 0, "y_stride"_a, "a"_a = 0, "a_stride"_a, "adds"_a = false,
           "workspace"_a = 0);
  };
  define_as("outer",
            [](const ghl::OuterParams& params, int threads) { run(ghl::outer_cpu, params, threads); });
  define_as("outer_workspace", ghl::outer_cpu_workspace);
}

void define_winograd(py::module_& module) {
  const auto define_as = [&](const char* name, auto call) {
    define(module, name, winograd_params, call, "batch"_a, "channels"_a, "units"_a, "groups"_a = 1,
           "in_size"_a, "padding"_a, "x"_a = 0, "x_dtype"_a = 0, "x_layout"_a, "y"_a = 0, "y_dtype"_a = 0,
           "y_layout"_a, "a"_a = 0, "a_layout"_a, "workspace"_a = 0);
  };
  define_as("winograd",
            [](const ghl::WinogradParams& params, int threads) { run(ghl::winograd_cpu, params, threads); });
  define_as("winograd_workspace", ghl::winograd_cpu_workspace);
}

constexpr ghl::Isa kIsas[] = {
    ghl::Isa::baseline,
#ifdef GHL_BUILD_X86
    ghl::Isa::avx2,
    ghl::Isa::avx512,
#endif
};

void select_isa(const std::string& name) {
  for (const ghl::Isa isa : kIsas) {
    if (name != ghl::isa_name(isa)) continue;
    if (!ghl::select_isa(isa)) throw std::runtime_error("this processor has no " + name);
    return;
  }
  throw py::value_error("unknown instruction set '" + name + "'; see build_info()[\"isas\"]");
}

py::dict build_info() {
  py::list isas;
  for (const ghl::Isa isa : kIsas) isas.append(ghl::isa_name(isa));
#ifdef _OPENMP
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
  return py::dict("compiler"_a = GHL_COMPILER, "flags"_a = GHL_FLAGS, "isas"_a = isas, "openmp"_a = openmp,
                  "sanitize"_a = static_cast<bool>(GHL_SANITIZE));
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The native CPU kernels of ghl_kernels.";
  const Triple zeros{0, 0, 0};
  module.def("compete", compete, py::kw_only(), "u"_a, "u_dtype"_a, "u_layout"_a, "batch"_a, "units"_a,
             "positions"_a, "activity"_a, "winners"_a = 0, "temperature"_a = 1.0f, "anti"_a = false,
             "y"_a = 0, "y_dtype"_a = 0, "y_layout"_a = zeros, "logsumexp"_a = 0, "threshold"_a = 0,
             "cut"_a = 0, "winner_unit"_a = 0, "winner_activity"_a = 0, "threads"_a);
  define_correlate(module);
  define_epilogue(module);
  define_outer(module);
  define_winograd(module);
  module.def("detected_isa", [] { return ghl::isa_name(ghl::detected_isa()); });
  module.def("selected_isa", [] { return ghl::isa_name(ghl::selected_isa()); });
  module.def("select_isa", select_isa, "name"_a);
  module.def("build_info", build_info);
}
