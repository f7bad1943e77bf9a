// The square of a ReLU, times a weight a channel:
//
//   out_c = scale weight_c relu(x_c)^2
#pragma once

#include <cstdint>

#include "image.h"

namespace effattn {

struct SquaredReluParams {
  DType dtype;
  int64_t batch, channels, tokens;
  float scale;
  const float* weight;  // (channels)
  Image x;
  Image out;               // forward
  Image grad_out, grad_x;  // backward; grad_out is read only
  float* grad_weight;      // (channels)
};

}  // namespace effattn
