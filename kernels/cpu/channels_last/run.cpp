// Which instruction set's passes a call takes.
#include "ukernels.h"

namespace effattn::cpu {

const ChannelsLastPasses& channels_last_passes(Isa isa) {
  switch (isa) {
#define EFFATTN_ROW(name, lanes) \
  case Isa::name:                \
    return name::channels_last_passes();
    EFFATTN_ISA_LIST(EFFATTN_ROW)
#undef EFFATTN_ROW
  }
  __builtin_unreachable();
}

}  // namespace effattn::cpu
