// The launcher of the competition: what it refuses, and which kernel runs.
#include "cuda/compete_planes.cuh"

namespace ghl {

namespace {

std::string describe(const CompeteParams& p) {
  return "competition of (" + std::to_string(p.batch) + ", " + std::to_string(p.units) + ", " +
         std::to_string(p.positions) + "), " + std::to_string(p.winners) + " winners";
}

// One batch item of all positions, where one stride leads from each to the next.
void merge_batch(CompeteParams& p) {
  const auto follows = [&](const Layout& layout) {
    return layout.stride_batch == p.positions * layout.stride_position;
  };
  if (p.positions == 1 && p.batch > 1) {
    p.u_layout.stride_position = p.u_layout.stride_batch;
    p.y_layout.stride_position = p.y_layout.stride_batch;
  } else if (!follows(p.u_layout) || (p.y && !follows(p.y_layout))) {
    return;
  }
  p.positions *= p.batch;
  p.batch = 1;
}

std::string refusal(const CompeteParams& p) {
  if (p.units >= int64_t{1} << 31) return "at most 2^31 - 1 units";
  if (p.winners < 0 || p.winners > p.units) return "winners must lie between 0 and the number of units";
  if ((p.winner_unit || p.winner_activity || p.cut) && p.winners == 0) return "winners are asked for, of 0";
  if (p.y && p.y_dtype != p.u_dtype) return "y must have u's dtype";
  return "";
}

bool takes_wide(const CompeteParams& p, const DeviceInfo& info) {
  if (p.u_dtype == DType::f32 || p.units > kWideUnits) return false;
  // some GPUs have no room for such a tile
  return are_rows(p) || kTileBytes<bf16, kWideElements> <= info.shared_limit;
}

}  // namespace

Status compete_cuda(const CompeteParams& params, Stream stream) {
  if (params.batch * params.units * params.positions == 0) return {};
  if (const std::string reason = refusal(params); !reason.empty()) {
    return Status::failure(describe(params) + ": " + reason);
  }
  DeviceInfo info;
  if (Status status = device_info(stream.device, info); !status.ok) return status;
  CompeteArgs args{params, 1.0f / params.temperature};
  merge_batch(args.p);
  const auto run = takes_few(args.p)                ? launch_few
                   : params.units <= kRegisterUnits ? launch_short
                   : takes_wide(args.p, info)       ? launch_wide
                                                    : launch_long;
  Status status = run(args, info, stream);
  // not before: naming them takes as long as queueing
  if (!status.ok) status.message = describe(params) + status.message;
  return status;
}

}  // namespace ghl
