// Images of a call as its kernels address them: an element a thread, neighbours in memory by neighbours.
#pragma once

#include "../../params/squared_relu.h"
#include "../core/block.h"

namespace effattn::cuda {

constexpr int kSquaredReluThreads = 256;

EFFATTN_DEVICE int64_t at(const Image& image, int64_t batch, int64_t channel, int64_t token) {
  return batch * image.batch_stride + channel * image.channel_stride + token * image.token_stride;
}

// f(batch, channel, token) of the thread's element, if there is one.
template <class F>
EFFATTN_DEVICE void with_element(const SquaredReluParams& p, F f) {
  const int64_t of_image = p.channels * p.tokens;
  const int64_t i = block_index() * kSquaredReluThreads + thread_index(), within = i % of_image;
  if (i >= p.batch * of_image) return;
  const bool by_channel = p.x.channel_stride == 1;
  f(i / of_image, by_channel ? within % p.channels : within / p.tokens,
    by_channel ? within / p.channels : within % p.tokens);
}

inline int64_t blocks_of(const SquaredReluParams& p) {
  return ceil_div(p.batch * p.channels * p.tokens, kSquaredReluThreads);
}

}  // namespace effattn::cuda
