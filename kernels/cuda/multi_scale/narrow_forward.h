// The forward of narrow types on a card.
#pragma once

#include "api.h"
#include "image_tile.h"

namespace effattn::cuda {

// False, and nothing is done, for heads or scales that it does not take. `sums` as in attend().
bool attend_narrow(const MultiScaleParams& problem, const Picture& x, const Picture& out, float* sums,
                   const Execution& execution);

}  // namespace effattn::cuda
