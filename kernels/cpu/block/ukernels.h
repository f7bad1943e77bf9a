// Micro-kernels on images whose channels lie in blocks: [block][row][pixel][kBlock], a pixel of a block one
// cache line. Scalars of a product and the pixels of a depthwise convolution then follow each other at a
// constant distance, and blocks of channels can be worked on one by one.
//
// Every result is made of the same operations in the same order wherever a row is cut, so that tiles and
// threads change no bit.
#pragma once

#include "../../params/image.h"
#include "../core/activation.h"
#include "../core/isa.h"
#include "../core/rows.h"

namespace effattn::cpu {

constexpr int64_t kBlock = kWholeVectors;  // channels
constexpr int64_t kPanelBlocks = 2;        // of outputs, whose weights lie together
constexpr int64_t kPanel = kPanelBlocks * kBlock;

// Pixels [begin, end) of a row of the output, in one or both blocks of a panel:
//
//   out(x, o) = activation(bias(o) + sum over segments and channels of in(stride x, c) w(c, o)) + residual
struct ConvolutionRow {
  // Where pixel 0 of each segment lies, a segment being a block of inputs under one tap. In the first
  // `whole` all channels have a part, in the `partial` behind them the first `depth`.
  const float* const* segments;
  int64_t whole, partial, depth;
  const float *weights, *bias;  // (channels of all segments, kPanel), (kPanel)
  // Pixel 0 of each block; without a residual null.
  float* out[kPanelBlocks];
  const float* residual[kPanelBlocks];
  int64_t blocks;              // 1 or kPanelBlocks
  int64_t begin, end, stride;  // 1 or 2
  Activation activation;
};

// The same of a depthwise convolution, in one block.
struct DepthwiseRow {
  const float* const* rows;  // of the input, each pointing to the pixel under the first tap of out's pixel 0
  int64_t kernel;
  const float *taps, *bias;  // (kernel * kernel, kBlock), (kBlock)
  float* out;
  const float* residual;  // or null
  int64_t begin, end, stride;
  Activation activation;
};

// out = x + factor (mean of the pixels around x that lie in the image - x)
struct PoolRow {
  const float* const* rows;  // of the input, those that lie in the image; pixel 0 of each
  int64_t count, kernel;     // of these, and of all
  const float *x, *factor;   // pixel 0 of the middle row, (kBlock)
  float* out;
  int64_t begin, end, width;
};

// out = (x - mean) / sqrt(variance + eps) gain + bias, of all channels of each pixel
struct NormRow {
  const float* const* in;  // pixel 0 of every block
  float* const* out;
  int64_t channels;
  const float *gain, *bias;  // (blocks, kBlock)
  float eps;
  int64_t begin, end;
};

struct BlockUkernels {
  void (*convolve)(const ConvolutionRow&);
  void (*depthwise)(const DepthwiseRow&);
  void (*pool)(const PoolRow&);
  void (*normalize)(const NormRow&);
  // Pixels of a block.
  void (*multiply)(int64_t pixels, const float* in, const float* factor, float* out);
  void (*sum)(int64_t pixels, const float* in, float* total);  // total += in
  void (*activate)(Activation, int64_t pixels, const float* in, float* out);
  // Neighbouring pixels of a block, to and from a tensor; channels behind the last become zero.
  void (*load)(DType, const Image&, int64_t pixels, int64_t channels, float* to);
  void (*store)(DType, const Image&, int64_t pixels, int64_t channels, const float* from);
};

EFFATTN_DISPATCH_TABLE(BlockUkernels, block_ukernels)

}  // namespace effattn::cpu
