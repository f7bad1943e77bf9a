// Micro-kernels on channels-last images in float: a row a token, channels in the lanes. For small images,
// whose tokens would leave lanes empty at the end of every row.
//
// Rows are padded to kWholeVectors; the padding is written, and never has a part in a result.
#pragma once

#include "../core/activation.h"
#include "../core/image.h"
#include "../core/isa.h"
#include "../core/rows.h"

namespace effattn::cpu {

// Contiguous memory to prefetch.
struct PrefetchRange {
  const float* data;
  int64_t floats;
};

// Scalars (token, channel) of any layout in which either tokens or channels are neighbours.
struct Features {
  const float* data;
  int64_t token_stride, channel_stride;
};
inline Features features_of(const Rows<const float>& tokens) { return {tokens.data, tokens.stride, 1}; }

// An image with `border` pixels of zeros around it, channels a multiple of kWholeVectors.
struct PaddedImage {
  float* data;
  int64_t height, width, channels, border;

  EFFATTN_INLINE int64_t row_floats() const { return (width + 2 * border) * channels; }
  EFFATTN_INLINE int64_t floats() const { return (height + 2 * border) * row_floats(); }
  // The pixel (y, x), from (-border, -border) on.
  EFFATTN_INLINE float* at(int64_t y, int64_t x) const {
    return data + (y + border) * row_floats() + (x + border) * channels;
  }
};

struct ChannelsLastUkernels {
  // to(i, o) = weights(o, i): of a projection, or of a depthwise convolution with a row for each of its taps.
  void (*transpose)(const float* weights, int64_t outputs, int64_t inputs, const Rows<float>& to);
  // out(t, :) = bias + sum_i in(t, i) weights(i, :)
  void (*project)(int64_t tokens, int64_t inputs, int64_t outputs, const Features& in,
                  const Rows<const float>& weights, const float* bias, const Rows<float>& out,
                  const PrefetchRange& prefetch);
  // The inside of a padded image, from the tokens of an image without a border.
  void (*fill)(const Rows<const float>& in, const PaddedImage& to);
  // out = bias + a depthwise convolution; taps: (kernel * kernel, channels), contiguous.
  void (*depthwise)(int64_t kernel, const PaddedImage& in, const float* taps, const float* bias,
                    const Rows<float>& out);
  // taps += the gradient of a depthwise convolution's taps, bias += that of its bias.
  void (*depthwise_backward)(int64_t kernel, const PaddedImage& in, const Rows<const float>& grad_out,
                             float* taps, float* bias);
  void (*add)(int64_t tokens, int64_t channels, const Rows<const float>& in,
              const Rows<float>& out);  // out += in
  void (*activate)(Activation, int64_t tokens, int64_t channels, const Rows<const float>& in,
                   const Rows<float>& out);
  // Row y of an image of out_height x out_width, upsampled bilinearly from one of height x width with
  // align_corners=False.
  void (*upsample)(int64_t channels, const Rows<const float>& in, int64_t height, int64_t width, int64_t y,
                   int64_t out_height, int64_t out_width, const Rows<float>& out);
  // The mean of every channel, and the sum of squares of what is above and below it.
  void (*moments)(int64_t tokens, int64_t channels, const Rows<const float>& in, float* mean, float* squares);
  // out = gain * in + other_gain * other + shift, a number a channel; without `other` where its data is null.
  void (*affine)(int64_t tokens, int64_t channels, const float* gain, const Rows<const float>& in,
                 const float* other_gain, const Rows<const float>& other, const float* shift,
                 const Rows<float>& out);
  // sums += grad, products += grad * (in - mean), over the tokens.
  void (*sum_gradients)(int64_t tokens, int64_t channels, const Rows<const float>& grad,
                        const Rows<const float>& in, const float* mean, float* sums, float* products);
  // The gradients of project: grad_in += grad_out weights^T, weights += in^T grad_out (a row an output), bias
  // += the sum of grad_out.
  void (*project_backward)(int64_t tokens, int64_t inputs, int64_t outputs, const Rows<const float>& in,
                           const Rows<const float>& grad_out, const Rows<const float>& weights,
                           const Rows<float>& grad_in, const Rows<float>& grad_weights, float* grad_bias);
  // To and from float.
  void (*load)(DType, const Image&, int64_t tokens, int64_t channels, const Rows<float>& to);
  void (*store)(DType, const Image&, int64_t tokens, int64_t channels, const Rows<float>& from);
};

EFFATTN_DISPATCH_TABLE(ChannelsLastUkernels, channels_last_ukernels)

}  // namespace effattn::cpu
