// What every lane gets from shuffles, votes, matches and reductions.
#include "program.h"

namespace ghl {
namespace {

using program::Register;

// Runs `get` in every lane and prints what each got.
template <class Get>
void lanes(const std::string& name, Get get) {
  std::vector<double> got(kWarp);
  host::launch({1}, {2 * kWarp}, 0, [&] {
    const unsigned lane = threadIdx.x % kWarp;
    // another warp at the same time, with other values
    const int base = threadIdx.x < kWarp ? 100 : 900;
    const double value = static_cast<double>(get(static_cast<int>(lane), base + static_cast<int>(lane)));
    if (threadIdx.x < kWarp) got[lane] = value;
  });
  program::print(name, got);
}

const Register shuffles("shuffles", [] {
  for (int width = 1; width <= 32; width *= 2) {
    for (int argument = 0; argument < 32; ++argument) {
      const std::string suffix = " " + std::to_string(width) + " " + std::to_string(argument);
      const unsigned distance = static_cast<unsigned>(argument);
      lanes("idx" + suffix, [&](int, int value) { return __shfl_sync(kAllLanes, value, argument, width); });
      lanes("xor" + suffix,
            [&](int, int value) { return __shfl_xor_sync(kAllLanes, value, argument, width); });
      lanes("up" + suffix, [&](int, int value) { return __shfl_up_sync(kAllLanes, value, distance, width); });
      lanes("down" + suffix,
            [&](int, int value) { return __shfl_down_sync(kAllLanes, value, distance, width); });
    }
  }
});

const Register types("types", [] {
  lanes("float",
        [](int, int value) { return __shfl_xor_sync(kAllLanes, 0.5f + static_cast<float>(value), 1); });
  lanes("double", [](int, int value) { return __shfl_xor_sync(kAllLanes, 1e15 + value, 1) - 1e15; });
  lanes("wide", [](int, int value) { return __shfl_xor_sync(kAllLanes, (1ll << 40) + value, 1); });
  lanes("own source", [](int lane, int value) { return __shfl_sync(kAllLanes, value, 3 * lane + 40); });
});

const Register votes("votes", [] {
  constexpr unsigned kOdd = 0xaaaaaaaau;
  lanes("ballot", [](int lane, int) { return __ballot_sync(kAllLanes, lane % 3 ? 8 : 0); });
  lanes("odd ballot", [](int lane, int) { return lane % 2 ? __ballot_sync(kOdd, lane < 6) : 0; });
  lanes("any",
        [](int lane, int) { return __any_sync(kAllLanes, lane == 30) + 2 * __any_sync(kAllLanes, 0); });
  lanes("all", [](int lane, int) { return __all_sync(kAllLanes, lane < 31) + 2 * __all_sync(kAllLanes, 4); });
  lanes("match any", [](int lane, int) { return __match_any_sync(kAllLanes, lane * lane % 7); });
  lanes("match all", [](int lane, int) {
    int all = 0, some = 0;
    const unsigned mask = __match_all_sync(kAllLanes, 5, &all);
    return static_cast<double>(mask) + all + __match_all_sync(kAllLanes, lane / 31, &some) + some;
  });
});

const Register reductions("reductions", [] {
  constexpr unsigned kSome = 0x00ff0ff0u;
  const auto in = [](int lane) { return host::has(kSome, static_cast<unsigned>(lane)); };
  lanes("add", [&](int lane, int value) { return in(lane) ? __reduce_add_sync(kSome, value) : 0; });
  lanes("min", [&](int lane, int value) { return in(lane) ? __reduce_min_sync(kSome, 110 - value) : 0; });
  lanes("max", [&](int lane, int value) { return in(lane) ? __reduce_max_sync(kSome, 110 - value) : 0; });
  lanes("wrap", [&](int, int) { return __reduce_add_sync(kAllLanes, 0x7fffffff); });
  lanes("or", [](int lane, int) { return __reduce_or_sync(kAllLanes, lane < 5 ? 1u << lane : 0); });
  lanes("and", [](int lane, int) { return __reduce_and_sync(kAllLanes, ~(1u << lane / 4)); });
  lanes("xor",
        [](int lane, int) { return __reduce_xor_sync(kAllLanes, static_cast<unsigned>(lane * lane)); });
  lanes("warp_sum", [](int, int value) { return warp_sum(static_cast<float>(value)); });
  lanes("warp_max", [](int lane, int value) {
    return warp_max(lane == 4 ? __int_as_float(0x7fffffff) : static_cast<float>(-value));
  });
});

// Halves, and then quarters, of a warp meet on their own, in other numbers than each other.
const Register divergence("divergence", [] {
  lanes("halves", [](int lane, int value) {
    const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    for (int round = 0; round < (lane < 16 ? 3 : 8); ++round) value += __shfl_xor_sync(mask, value, 1);
    return __shfl_xor_sync(kAllLanes, value, 16);
  });
  // the first lanes meet twice more before the last have read what all brought
  lanes("overtaking", [](int lane, int value) {
    const int before = __shfl_sync(kAllLanes, value, lane ^ 31);
    int sum = 0;
    if (lane < 2) {
      sum += __shfl_sync(3u, -value, 0);
      sum += __shfl_sync(3u, -value, 1);
    }
    return before + sum;
  });
  // each waits for the next one's meeting: legal, since no two lanes wait for each other
  lanes("chain", [](int lane, int value) {
    if (lane > 0) value += __shfl_sync(3u << (lane - 1), value, lane - 1);
    if (lane < 31) __shfl_sync(3u << lane, value, lane);
    return value;
  });
});

}  // namespace
}  // namespace ghl
