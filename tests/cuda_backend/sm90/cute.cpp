// The shared-memory layouts, descriptors and register fragments of the Hopper pair kernel against CuTe's.
// Prints what differs and counts it in the exit status.
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "cuda/pair_sm90_layout.h"

using namespace cute;
namespace sm90 = ghl::sm90;

namespace {

int differences = 0;

void expect(const char* what, long at, long ours, long theirs) {
  if (ours == theirs) return;
  ++differences;
  std::printf("%s %ld: %ld, CuTe has %ld\n", what, at, ours, theirs);
}

template <int chunk>
using Atom = std::conditional_t<chunk == 64, GMMA::Layout_MN_SW128_Atom<bfloat16_t>,
                                GMMA::Layout_MN_SW64_Atom<bfloat16_t>>;

// A tile of contiguous columns by a stage's positions, its chunks one after the other.
template <int chunk, class Columns>
auto tile_layout(Columns columns) {
  return tile_to_shape(Atom<chunk>{}, make_shape(columns, Int<sm90::kStagePositions>{}), Step<_2, _1>{});
}

// Elements of the tile where the copies of its chunks lay them, and the offset of every wgmma step.
template <int chunk, class Columns>
void check_tile(const char* what, Columns columns) {
  constexpr uint32_t next = Columns::value > chunk ? sm90::chunk_bytes(chunk) : 0;
  alignas(1024) static bfloat16_t memory[256 * 64];
  const auto tile = make_tensor(make_smem_ptr(memory), tile_layout<chunk>(columns));
  for (int row = 0; row < sm90::kStagePositions; ++row) {
    for (int column = 0; column < columns; ++column) {
      const int ours = column / chunk * sm90::chunk_bytes(chunk) + sm90::swizzled<chunk>(row, column % chunk);
      expect(what, row * 1000 + column, ours,
             static_cast<long>(&tile(column, row) - memory) * sm90::kElement);
    }
  }
  for (int step = 0; step < sm90::kSteps; ++step) {
    const auto operand = local_tile(tile, make_shape(columns, Int<sm90::kDepth>{}), make_coord(0, step));
    // on a host CuTe knows no shared address: compared by the distance from the tile
    auto theirs = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(operand);
    theirs.bitfield.start_address_ = 0;
    const uint64_t ours = sm90::operand_descriptor(0, chunk, next);
    expect(what, step, static_cast<long>(ours >> 32), static_cast<long>(theirs.desc_ >> 32));
    expect(what, step, static_cast<long>(ours & 0xffffffff), static_cast<long>(theirs.desc_ & 0xffffffff));
    const long distance = static_cast<long>(raw_pointer_cast(operand.data()) - memory) * sm90::kElement;
    const uint64_t stepped =
        sm90::operand_descriptor(0x4000, chunk, next) + step * sm90::descriptor_step(sm90::step_bytes(chunk));
    expect(
        what, step, static_cast<long>(stepped),
        static_cast<long>(sm90::operand_descriptor(static_cast<uint32_t>(0x4000 + distance), chunk, next)));
  }
}

void check_accumulators() {
  const GMMA::CLayout_64x256 theirs;
  for (int thread = 0; thread < sm90::kWarpgroup; ++thread) {
    for (int i = 0; i < sm90::accumulators_of(sm90::kMostColumns); ++i) {
      const int ours =
          sm90::accumulator_unit(thread, i) + sm90::kTileUnits * sm90::accumulator_column(thread, i);
      expect("accumulator", thread * 1000 + i, ours, theirs(thread, i));
    }
  }
}

void check_left_operand() {
  const GMMA::ALayout_64x16 theirs;
  for (int thread = 0; thread < sm90::kWarpgroup; ++thread) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int position = sm90::fragment_position(thread, i) + half;
        const int ours = sm90::fragment_unit(thread, i) + sm90::kTileUnits * position;
        expect("left operand", thread * 1000 + 2 * i + half, ours, theirs(thread, 2 * i + half));
      }
    }
  }
}

// ldmatrix gives register i of lane l the row l / 4 of matrix i, transposed the column; rows are named by
// lanes 8 i on.
void check_ldmatrix() {
  for (int thread = 0; thread < sm90::kWarpgroup; ++thread) {
    for (int i = 0; i < 4; ++i) {
      const int first = thread / 32 * 32 + 8 * i;  // that names row 0 of the matrix
      const int unit = sm90::ldmatrix_unit(first) + thread % 32 / 4;
      const int position = sm90::ldmatrix_position(first) + thread % 4 * 2;
      expect("ldmatrix unit", thread * 10 + i, unit, sm90::fragment_unit(thread, i));
      expect("ldmatrix position", thread * 10 + i, position, sm90::fragment_position(thread, i));
    }
  }
}

}  // namespace

int main() {
  check_tile<64>("x", Int<256>{});
  check_tile<64>("narrow x", Int<128>{});
  check_tile<32>("x of narrow chunks", Int<256>{});
  check_tile<32>("narrow x of narrow chunks", Int<224>{});
  check_tile<64>("responses", Int<sm90::kTileUnits>{});
  check_accumulators();
  check_left_operand();
  check_ldmatrix();
  return differences > 100 ? 100 : differences;
}
