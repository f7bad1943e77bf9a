// The instruction sets compiled into this library, which of them this processor runs, and which one
// is in use. The list comes from the build (csrc/build.py): one row a set, nothing repeated here.
#pragma once

#include <string>
#include <vector>

// Visible outside of the shared library; everything else is hidden.
#define EFFATTN_EXPORT __attribute__((visibility("default")))

namespace effattn::cpu {

enum class Isa {
#define EFFATTN_ROW(name, lanes, ...) name,
  EFFATTN_ISA_LIST(EFFATTN_ROW)
#undef EFFATTN_ROW
};

struct IsaInfo {
  Isa isa;
  const char* name;
  int lanes;
  bool supported;     // this processor has every instruction it needs
  bool test_only;     // never picked, only asked for by name
  const char* needs;  // what the processor must offer
};

EFFATTN_EXPORT const std::vector<IsaInfo>& compiled_isas();

// The set in use: EFFATTN_CPU_ISA if set (an unknown or unsupported name throws std::runtime_error
// that lists the choices), else the widest that this processor supports.
EFFATTN_EXPORT Isa active_isa();
EFFATTN_EXPORT const IsaInfo& info(Isa isa);

// Whether the processor is one of AMD's.
EFFATTN_EXPORT bool is_amd();

// Puts another one in use for the whole process; throws std::runtime_error as above.
EFFATTN_EXPORT void set_active_isa(const std::string& name);

}  // namespace effattn::cpu

#define EFFATTN_DECLARE(name, lanes, Table, function) \
  namespace name {                                    \
  const Table& function();                            \
  }
#define EFFATTN_CASE(name, lanes, Table, function) \
  case Isa::name:                                  \
    return name::function();

// Of a table that ukernels.cpp fills in the namespace of every instruction set: function(isa), by default of
// the one in use. Never called from ukernels.cpp.
#define EFFATTN_DISPATCH_TABLE(Table, function)                      \
  EFFATTN_ISA_LIST(EFFATTN_DECLARE, Table, function)                 \
  inline const Table& function(Isa isa = active_isa()) {             \
    switch (isa) { EFFATTN_ISA_LIST(EFFATTN_CASE, Table, function) } \
    __builtin_unreachable();                                         \
  }
