// Storage types. Arithmetic is always in float; these only say what lies in memory.
#pragma once

#include <cstdint>

namespace effattn {

enum class DType { kFloat32, kBFloat16, kFloat16 };

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace effattn
