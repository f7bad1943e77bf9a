// The forward of narrow types on a gpu.
#pragma once

#include "api.h"
#include "image_tile.h"

namespace effattn::cuda {

// False, and nothing is done, for heads or scales that it does not take. `kv_state` as in attend().
bool attend_narrow(const MultiScaleParams& params, const ImageView& x, const ImageView& out, float* kv_state,
                   const Execution& execution);

}  // namespace effattn::cuda
