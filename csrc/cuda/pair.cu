// The launcher of the pair [y; dL/du]^T x: what it refuses, and which form runs.
#include "cuda/pair.cuh"

namespace ghl {
namespace {

bool has_wgmma([[maybe_unused]] const PairParams& params, [[maybe_unused]] const DeviceInfo& info) {
#ifdef GHL_CUDA_ON_HOST
  return false;
#else
  return info.capability == 90 && pair_sm90_takes(params, info);
#endif
}

// What an automatic choice comes to, or mma where the form that was asked for does not take the problem.
PairForm form_of(const PairParams& params, const DeviceInfo& info) {
  const auto may_be = [&](PairForm form) {
    return params.form == PairForm::automatic || params.form == form;
  };
  if (may_be(PairForm::narrow) && pair_narrow_takes(params, info)) return PairForm::narrow;
  if (may_be(PairForm::wgmma) && has_wgmma(params, info)) return PairForm::wgmma;
  return PairForm::mma;
}

bool makes_state(const PairParams& params, PairForm form) {
  if (params.form != PairForm::automatic && params.form != form) return false;
  if (form == PairForm::narrow) return needs_only_softmax(params);
  return form == PairForm::mma && pair_mma_makes_state(params);
}

Status check(const PairParams& params, PairForm form) {
  const auto failure = [&](const std::string& why) {
    return Status::failure(pair_shape(params) + ": " + why);
  };
  const bool empty = params.geometry.positions() == 0;
  const void* const a_input = params.winners > 0 ? params.winner_unit : params.u.data;
  if (!empty && ((params.a && !a_input) || (params.g && !params.grad.data))) {
    return failure("a result without its input");
  }
  if (!pair_sizes_fit(params)) return failure("sizes of 2^29 and more are not supported");
  if (params.form != PairForm::automatic && params.form != form) {
    const std::string name = params.form == PairForm::wgmma ? "wgmma" : "narrow";
    return failure("the " + name + " form does not take this shape on this device");
  }
  if (params.lift != 1.0f && (params.dtype != DType::f16 || params.winners > 0)) {
    return failure("only activities that are rounded to float16 are made larger");
  }
  if (params.winners > 0 && form != PairForm::narrow) {
    return failure("lists of winners are for the narrow form, and not in every shape");
  }
  if (!empty && lacks_state(params) && !makes_state(params, form)) {
    return failure("the state that its activity needs is missing");
  }
  return {};
}

}  // namespace

int64_t pair_cuda_workspace(const PairParams& params, int device) {
  DeviceInfo info;
  if (!device_info(device, info).ok) return 0;
  const PairForm form = form_of(params, info);
  if (form == PairForm::narrow) return pair_narrow_workspace(params, info);
#ifndef GHL_CUDA_ON_HOST
  if (form == PairForm::wgmma) return pair_sm90_workspace(params, info);
#endif
  return pair_mma_workspace(params, info);
}

PairForm pair_cuda_form(const PairParams& params, int device) {
  DeviceInfo info;
  return device_info(device, info).ok ? form_of(params, info) : PairForm::mma;
}

bool pair_cuda_makes_state(const PairParams& params, int device) {
  return makes_state(params, pair_cuda_form(params, device));
}

Status pair_cuda(const PairParams& params, Stream stream) {
  if (pair_results(params) == 0 || params.units == 0 || params.geometry.group_channels() == 0) return {};
  DeviceInfo info;
  const Status known = device_info(stream.device, info);
  if (!known.ok) return known;
  const PairForm form = form_of(params, info);
  const Status checked = check(params, form);
  if (!checked.ok) return checked;
  if (form == PairForm::narrow) return pair_narrow(params, info, stream);
#ifndef GHL_CUDA_ON_HOST
  if (form == PairForm::wgmma) return pair_sm90(params, info, stream);
#endif
  return pair_mma(params, info, stream);
}

}  // namespace ghl
