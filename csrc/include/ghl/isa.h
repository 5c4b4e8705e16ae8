// Which instruction set the CPU kernels run with.
#pragma once

namespace ghl {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best one that this file was built with and this processor has.
Isa detected_isa();

// The one in use: detected_isa(), or what select_isa chose.
Isa selected_isa();

// Run with another one (tests compare them all). False, and no change, when this processor lacks it.
bool select_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace ghl
