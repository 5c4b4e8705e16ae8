// A from the winners' lists: sort by unit, gather by segments, combine. The work is k / N of the dense
// product's.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sparse_gather.cuh"
#include "cuda/sparse_sort.cuh"
#include "ghl/sparse.h"

namespace ghl {
namespace {

// Entries of a segment, where the bound on the workspace allows it: so few that there are enough blocks for
// the largest GPU to be busy to the end, so many that beginning and ending one is little of its work.
constexpr int64_t kShortestSegment = 64;
constexpr int64_t kLongestSegment = 256;
constexpr int64_t kBlocks = 3072;
constexpr int64_t kPartialBytes = 32 << 20;  // which is read back while it is in L2
constexpr int64_t kCombineBlocks = 1024;
constexpr int64_t kSliceLength = 1024;  // entries, and at least one for two bins of its table of counts
constexpr int64_t kMaxSlices = 1024;
constexpr int64_t kAlignment = 256;

struct Plan {
  int64_t entries;
  int64_t channels;  // of a group
  int64_t taps;
  int64_t slices;
  int64_t slice_length;
  int64_t segment_length;
  int64_t segments;  // no more than these
  int64_t partial_rows;
};

Plan make_plan(const CorrelateParams& params) {
  Plan plan{};
  plan.entries = params.geometry.positions() * params.winners;
  plan.channels = params.geometry.group_channels();
  plan.taps = params.geometry.taps();
  const int64_t least = std::max(kSliceLength, (params.units + 1) / 2);
  plan.slices = std::clamp<int64_t>(plan.entries / least, 1, kMaxSlices);
  plan.slice_length = divide_up(plan.entries, plan.slices);
  plan.slices = std::max<int64_t>(1, plan.slice_length ? divide_up(plan.entries, plan.slice_length) : 1);

  const int64_t row_bytes = 4 * (plan.channels * plan.taps + 1);
  const int64_t pairs_of_rows = std::max<int64_t>(2, kPartialBytes / (2 * row_bytes));
  const int64_t column_blocks = divide_up<int64_t>(plan.channels * plan.taps, kGatherThreads * 8);
  const auto whole_warps = [](int64_t entries) { return divide_up<int64_t>(entries, kWarp) * kWarp; };
  plan.segment_length = std::max(
      std::clamp(whole_warps(plan.entries * column_blocks / kBlocks), kShortestSegment, kLongestSegment),
      whole_warps(plan.entries / pairs_of_rows + 1));
  plan.segments = params.units + plan.entries / plan.segment_length;
  plan.partial_rows = 2 * (plan.entries / plan.segment_length + 1);
  return plan;
}

struct Workspace {
  int64_t* count;
  int64_t* start;
  int64_t* segment_start;
  int64_t* several;
  Win* sorted;
  float* partial;
  int64_t bytes;
};

Workspace carve(const CorrelateParams& params, const Plan& plan) {
  int64_t used = 0;
  const auto take = [&]<class T>(T*& part, int64_t count) {
    part = reinterpret_cast<T*>(static_cast<char*>(params.workspace) + used);
    used += divide_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
  };
  Workspace workspace{};
  take(workspace.count, plan.slices * (params.units + 1));
  take(workspace.start, params.units + 1);
  take(workspace.segment_start, params.units + 1);
  take(workspace.several, params.units + 1);
  take(workspace.sorted, plan.entries);
  take(workspace.partial, plan.partial_rows * (plan.channels * plan.taps + 1));
  workspace.bytes = used;
  return workspace;
}

// Threads along a patch of so many loads: the most that leave no more than a quarter without one.
int width_of(int64_t loads) {
  int width = kGatherThreads;
  while (width > 8 && 4 * loads < 3 * width * divide_up<int64_t>(loads, width)) width /= 2;
  return width;
}

Status sort(const std::string& what, const SortParams& params, Stream stream) {
  const int64_t bins = params.units + 1;
  const int64_t blocks = params.slices * divide_up(bins, kBins);
  const auto table = static_cast<size_t>(std::min(bins, kBins));
  Status status =
      launch(what, count_kernel, {blocks, kCountThreads, table * sizeof(uint32_t)}, stream, params);
  if (status.ok) {
    status =
        launch(what, scan_slices_kernel, {divide_up<int64_t>(bins, kWarp), kScanThreads}, stream, params);
  }
  if (status.ok) status = launch(what, scan_bins_kernel, {1, kScanThreads}, stream, params);
  if (status.ok)
    status = launch(what, place_kernel, {blocks, kWarp, table * sizeof(int64_t)}, stream, params);
  return status;
}

template <class T, int kVector>
Status gather(const std::string& what, const Plan& plan, GatherParams params, Stream stream) {
  const int64_t columns = plan.channels * plan.taps;
  params.width = width_of(columns / kVector);
  params.column_blocks = std::max<int64_t>(1, divide_up<int64_t>(columns, params.width * kVector));
  Status status = launch(what, gather_kernel<T, kVector>,
                         {plan.segments * params.column_blocks, kGatherThreads}, stream, params);
  if (!status.ok) return status;
  const int64_t split_units = std::min(params.units, plan.entries / plan.segment_length);
  const int64_t blocks = split_units * divide_up<int64_t>(columns + 1, Combine::columns);
  if (blocks == 0) return status;
  return launch(what, combine_kernel, {std::min(blocks, kCombineBlocks), Combine::threads}, stream, params);
}

template <class T>
bool is_aligned(const CorrelateParams& params, const Plan& plan) {
  constexpr int64_t size = Vector<T>::size;
  return reinterpret_cast<uintptr_t>(params.x) % 16 == 0 && params.x_stride_channel == 1 &&
         plan.channels % size == 0 &&
         has_steps_of(size, params.geometry, params.x_stride_batch, params.x_stride);
}

std::string describe(const CorrelateParams& params, const Plan& plan) {
  return "sparse correlation of " + std::to_string(params.units) + " units of " +
         std::to_string(plan.channels * plan.taps) + " inputs with " + std::to_string(plan.entries) +
         " winners";
}

}  // namespace

int64_t sparse_cuda_workspace(const CorrelateParams& params) {
  return carve(params, make_plan(params)).bytes;
}

Status sparse_cuda(const CorrelateParams& params, Stream stream) {
  if (params.units == 0) return {};
  const Plan plan = make_plan(params);
  const Workspace workspace = carve(params, plan);
  const std::string what = describe(params, plan);
  if (!params.workspace) return Status::failure(what + ": no workspace");

  GatherParams gathered{};
  Status status = patch_grid(what, params.geometry, params.x_stride_batch, params.x_stride, gathered.grid);
  if (!status.ok) return status;
  gathered.x = params.x;
  gathered.x_stride_channel = params.x_stride_channel;
  gathered.channels = plan.channels;
  gathered.taps = plan.taps;
  gathered.channels_first = params.x_stride_channel != 1;
  gathered.sorted = workspace.sorted;
  gathered.start = workspace.start;
  gathered.segment_start = workspace.segment_start;
  gathered.several = workspace.several;
  gathered.entries = plan.entries;
  gathered.units = params.units;
  gathered.units_per_group = params.units / params.geometry.groups;
  gathered.segment_length = plan.segment_length;
  gathered.a = params.a;
  gathered.a_layout = {params.a_stride_unit, params.a_stride_channel, params.a_stride_tap};
  gathered.activity_sum = params.activity_sum;
  gathered.partial = workspace.partial;

  status = sort(what,
                {params.winner_unit, params.winner_activity, plan.entries, params.winners, params.units,
                 plan.slices, plan.slice_length, plan.segment_length, workspace.count, workspace.start,
                 workspace.segment_start, workspace.several, workspace.sorted},
                stream);
  if (!status.ok) return status;
  return by_dtype(params.x_dtype, [&]<class T>(T*) {
    if (is_aligned<T>(params, plan)) return gather<T, Vector<T>::size>(what, plan, gathered, stream);
    return gather<T, 1>(what, plan, gathered, stream);
  });
}

}  // namespace ghl
