// Cascaded group attention as its kernels are given it.
#pragma once

#include "../../params/cascaded_group_attention.h"
#include "../core/block.h"
#include "../core/execution.h"

namespace effattn::cuda::cascade {

constexpr int kMaxHeads = 64;  // a launch's parameters have room for their weights

struct Cascade {
  DType dtype;
  Image x, out, grad_out, grad_x;
  int64_t windows;  // of all images
  int heads, key_dim, value_dim, height, width, window_height, window_width, down, across;
  float scale;
  const float* bias;
  HeadWeights<const float> weights[kMaxHeads];
  int kernels[kMaxHeads];

  int windows_per_block;
  int rows;  // queries whose logits are there at once
  // Where a block's rows of a window's tokens are that do not fit into shared memory, or null; of the
  // backward, where those of every head of every window are.
  float *feats, *qkvs, *qs, *logits;
  // Backward: of every window the gradient of a head's output and the softmax, of every head the rest.
  float *grads, *softmaxes, *grad_logits, *grad_qs, *grad_qkvs;

  constexpr int tokens() const { return window_height * window_width; }
  constexpr int outputs() const { return 2 * key_dim + value_dim; }
  // Floats of a token's row.
  constexpr int feat_stride() const { return shared_stride(value_dim); }
  constexpr int qkv_stride() const { return shared_stride(outputs()); }
  constexpr int q_stride() const { return shared_stride(key_dim); }
  constexpr int logit_stride() const { return shared_stride(tokens()); }
};

// Where the tokens of a window lie in an image.
struct Window {
  int64_t batch;
  int row, col;

  EFFATTN_DEVICE Window(const Cascade& p, int64_t window) {
    const int64_t of_image = static_cast<int64_t>(p.down) * p.across;
    const int within = static_cast<int>(window % of_image);
    batch = window / of_image;
    row = within / p.across * p.window_height;
    col = within % p.across * p.window_width;
  }
  // Of a token; negative outside of the image.
  EFFATTN_DEVICE int64_t pixel(const Cascade& p, int token) const {
    const int at_row = row + token / p.window_width, at_col = col + token % p.window_width;
    return at_row < p.height && at_col < p.width ? static_cast<int64_t>(at_row) * p.width + at_col : -1;
  }
};

// total + the convolution of a channel of a window at a token, of which `x` has one every `stride` floats;
// its transpose if kSign is -1.
template <int kSign>
EFFATTN_DEVICE float convolved(const Cascade& p, int kernel, const float* taps, const float* x, int stride,
                               int token, float total = 0) {
  const int row = token / p.window_width, col = token % p.window_width;
  for (int i = 0; i < kernel; ++i) {
    const int at_row = row + kSign * (i - kernel / 2);
    if (at_row < 0 || at_row >= p.window_height) continue;
    for (int j = 0; j < kernel; ++j) {
      const int at_col = col + kSign * (j - kernel / 2);
      if (at_col < 0 || at_col >= p.window_width) continue;
      total += taps[i * kernel + j] * x[(at_row * p.window_width + at_col) * stride];
    }
  }
  return total;
}

// The forward of narrow types in small windows; false, and nothing is done, where it does not fit.
bool cascade_of_small_windows(Cascade& p, const Execution& execution);

}  // namespace effattn::cuda::cascade
