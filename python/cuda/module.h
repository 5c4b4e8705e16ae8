// ghl_kernels._cuda: every family of kernels registers what it defines, from a file of its own.
#pragma once

#include "binding.h"
#include "ghl/stream.h"

namespace ghl::binding {

using Define = void (*)(py::module_&);

// A static object of it in each file.
struct Registration {
  explicit Registration(Define define);
};

inline DType gpu_dtype(const char* name, int value) { return enumerator(name, value, DType::f16); }

inline Stream stream_of(int device, uintptr_t handle) { return {device, pointer<void>(handle)}; }

// A function name(build(fields...), stream), as a launcher and the query of its workspace both are.
template <class Call, class Params, class... Fields, class... Arguments>
void define_call(py::module_& module, const char* name, Params (*build)(Fields...), Call call,
                 const Arguments&... arguments) {
  module.def(
      name,
      [build, call](Fields... fields, int device, uintptr_t stream) {
        return call(build(fields...), stream_of(device, stream));
      },
      py::kw_only(), arguments..., py::arg("device"), py::arg("stream"));
}

// Queues the kernels of a launcher without holding the interpreter's lock.
template <class Params>
void queue(Status (*launcher)(const Params&, Stream), const Params& params, Stream stream) {
  Status status;
  {
    const py::gil_scoped_release release;
    status = launcher(params, stream);
  }
  raise_failure(status);
}

}  // namespace ghl::binding
