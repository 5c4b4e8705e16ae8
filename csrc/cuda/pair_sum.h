// The sum of those tiles of a pair whose positions are cut into parts.
#pragma once

#include "ghl/pair.h"
#include "ghl/stream.h"

namespace ghl {

// Every part has the same tiles, [rows, columns] of float32 each, one after the other. Tiles are counted with
// the blocks of units fastest, then those of columns, then groups.
struct PartTiles {
  int64_t parts = 1;
  int64_t tiles = 1;
  int64_t first_tile = 0;
  int64_t unit_blocks = 1;
  int64_t column_blocks = 1;
  int rows = 0;
  int half = 0;  // rows of a result where there are two
  int columns = 0;
  int64_t channels = 1;  // of a tap
};

// Adds the parts in PairParams::workspace, always in the same order, and writes A and G. The first half of a
// tile is G where both are wanted.
Status pair_sum_tiles(const PairParams& params, const PartTiles& tiles, Stream stream);

}  // namespace ghl
