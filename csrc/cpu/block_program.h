// Programs of effattn::block: what their text says, checked.
#pragma once

#include <string>

#include "../../kernels/cpu/block/program.h"

namespace effattn {

struct CheckedProgram {
  cpu::BlockProgram program;
  int64_t weights;  // floats of all steps
};

// Throws std::runtime_error for a text that is no program, with the line.
CheckedProgram parse_program(const std::string& text);

}  // namespace effattn
