// Images.
#pragma once

#include "dtype.h"
#include "sizes.h"

namespace effattn {

// A tensor (batch, channels, height * width); strides count elements.
struct Image {
  void* data;
  int64_t batch_stride, channel_stride, token_stride;
};

}  // namespace effattn
