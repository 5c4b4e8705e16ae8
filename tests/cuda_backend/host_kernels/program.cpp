// program <case> [<schedule> [<seed>]]
#include "program.h"

#include <map>

namespace ghl::program {
namespace {

std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}

host::Schedule schedule_named(const std::string& name) {
  if (name == "reverse") return host::Schedule::reverse;
  if (name == "random") return host::Schedule::random;
  return host::Schedule::forward;
}

}  // namespace

Register::Register(const char* name, Case run) { cases()[name] = run; }

}  // namespace ghl::program

int main(int count, char** words) {
  using namespace ghl;
  if (count > 2) host::schedule(program::schedule_named(words[2]), count > 3 ? std::stoul(words[3]) : 1);
  try {
    program::cases().at(words[1])();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
