// The sum of those tiles of a pair whose positions are cut into parts.
#pragma once

#include "cuda/pair_plan.h"
#include "ghl/pair.h"

namespace ghl {

// Adds the parts in PairParams::workspace, always in the same order, and writes A and G. The first half of a
// tile is G where both are wanted.
Status pair_sum_tiles(const PairParams& params, const PairPlan& plan, Stream stream);

}  // namespace ghl
