#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace effattn::cpu {
namespace {

struct Requirement {
  const char* text;
  bool met;
  bool test_only;
};

Requirement requirement(const char* name) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (is("baseline")) return {"x86-64", true, false};
  if (is("avx2")) return {"AVX2, FMA, F16C", avx2, false};
  if (is("avx2_wide")) return {"AVX2, FMA, F16C", avx2, true};
  if (is("avx512")) return {"AVX-512 F, BW, VL, DQ", avx2 && avx512, false};
#else
  if (is("neon")) return {"AArch64", true, false};
  if (is("baseline")) return {"nothing", true, false};
#endif
  return {"unknown", false, false};
}

std::atomic<int> active{-1};

Isa find(const std::string& name, const char* asked_by) {
  std::string choices;
  for (const IsaInfo& row : compiled_isas()) {
    if (name == row.name && row.supported) return row.isa;
    choices += std::string(choices.empty() ? "" : ", ") + row.name;
    if (!row.supported) choices += std::string(" (not on this processor: needs ") + row.needs + ")";
  }
  throw std::runtime_error(std::string(asked_by) + ": no instruction set '" + name +
                           "' can be used here; compiled in: " + choices);
}

}  // namespace

bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const std::vector<IsaInfo>& compiled_isas() {
  static const std::vector<IsaInfo> rows = [] {
    std::vector<IsaInfo> all;
#define EFFATTN_ROW(name, lanes, ...)                                              \
  {                                                                                \
    const Requirement need = requirement(#name);                                   \
    all.push_back({Isa::name, #name, lanes, need.met, need.test_only, need.text}); \
  }
    EFFATTN_ISA_LIST(EFFATTN_ROW)
#undef EFFATTN_ROW
    return all;
  }();
  return rows;
}

Isa active_isa() {
  int current = active.load(std::memory_order_relaxed);
  if (current >= 0) return static_cast<Isa>(current);
  Isa chosen = compiled_isas().front().isa;
  if (const char* name = std::getenv("EFFATTN_CPU_ISA"); name != nullptr && *name != '\0') {
    chosen = find(name, "EFFATTN_CPU_ISA");
  } else {
    for (const IsaInfo& row : compiled_isas()) {
      if (row.supported && !row.test_only) chosen = row.isa;  // rows go from narrow to wide
    }
  }
  active.store(static_cast<int>(chosen), std::memory_order_relaxed);
  return chosen;
}

const IsaInfo& info(Isa isa) { return compiled_isas()[static_cast<size_t>(isa)]; }

void set_active_isa(const std::string& name) {
  active.store(static_cast<int>(find(name, "set_isa")), std::memory_order_relaxed);
}

}  // namespace effattn::cpu
