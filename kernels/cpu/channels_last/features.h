// Images as products read their scalars: in place if they are float and either tokens or channels are
// contiguous, else converted, channels in parallel.
#pragma once

#include "../core/arena.h"
#include "../core/parallel.h"
#include "ukernels.h"

namespace effattn::cpu {

class FeaturesOf {
 public:
  FeaturesOf(DType dtype, const Image& image, int64_t batch, int64_t channels, int64_t tokens, Arena& arena)
      : dtype_(dtype),
        image_(image),
        batch_(batch),
        channels_(channels),
        tokens_(tokens),
        stride_(round_up(tokens, kWholeVectors) + kWholeVectors),  // rows in different cache sets
        in_place_(dtype == DType::kFloat32 && (image.token_stride == 1 || image.channel_stride == 1)),
        memory_(in_place_ ? nullptr : arena.floats(batch * channels * stride_)) {}

  void load(const Parallel& parallel) const {
    if (in_place_) return;
    constexpr int64_t kChannels = 32;  // that a thread converts at once
    const int64_t blocks = ceil_div(channels_, kChannels), work = 4 * kChannels * tokens_;
    const ChannelsLastUkernels& ukernels = channels_last_ukernels();
    parallel(batch_ * blocks, work, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / blocks, first = unit % blocks * kChannels;
        ukernels.load(dtype_, transposed(channels_from(dtype_, image_, b, first)),
                      min(kChannels, channels_ - first), tokens_,
                      {memory_ + (b * channels_ + first) * stride_, stride_});
      }
    });
  }

  Features of(int64_t batch) const {
    if (!in_place_) return {memory_ + batch * channels_ * stride_, 1, stride_};
    return {static_cast<const float*>(image_.data) + batch * image_.batch_stride, image_.token_stride,
            image_.channel_stride};
  }

 private:
  const DType dtype_;
  const Image image_;
  const int64_t batch_, channels_, tokens_, stride_;
  const bool in_place_;
  float* const memory_;
};

}  // namespace effattn::cpu
