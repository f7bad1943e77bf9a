// Parts of images.
#pragma once

#include "../../params/image.h"

namespace effattn::cpu {

// A batch of images whose channels lie in blocks of kWholeVectors, each pixel's next to each other.
struct BlockedImage {
  float* data;
  int64_t batch_stride, block_stride, row_stride;
};

// One image of the batch, from a channel and a token on.
inline Image channels_from(DType dtype, const Image& image, int64_t batch, int64_t channel,
                           int64_t token = 0) {
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t offset =
      batch * image.batch_stride + channel * image.channel_stride + token * image.token_stride;
  return {static_cast<char*>(image.data) + offset * size, 0, image.channel_stride, image.token_stride};
}

// The same memory, tokens and channels in each other's place: loaded as rows of tokens, its rows are
// channels.
inline Image transposed(const Image& image) {
  return {image.data, image.batch_stride, image.token_stride, image.channel_stride};
}

}  // namespace effattn::cpu
