// A block of a network for inference, or several in a row: a short program of steps, each of which makes one
// image of others. Weights are packed for the micro-kernels (ukernels.h).
#pragma once

#include <cstdint>
#include <vector>

#include "../../params/image.h"
#include "../core/activation.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "../core/rows.h"

namespace effattn::cpu {

struct BlockStep {
  enum class Kind {
    kLoad,  // from and to a tensor: the first and the last step, which the plan adds
    kStore,
    kConvolution,
    kDepthwise,
    kPoolMixer,        // x + factor (mean around x - x)
    kLayerNorm,        // over the channels of a pixel
    kMean,             // of an image, which leaves one pixel
    kMultiply,         // by one pixel
    kUpsample,         // bilinearly, by two
    kLinearAttention,  // of ReLU; inputs: one a scale, with q, k and v of each head in turn
    kAttention,  // softmax with a bias; inputs: [q of all heads | k], [v]; or q, k and v apart, or all in one
    kCascade,    // cascaded group attention
  };
  static constexpr int kNone = -1;

  Kind kind;
  std::vector<int> inputs;
  int64_t channels = 0;  // of the result
  int64_t weights = 0;   // where its weights begin (weight_sizes)
  int64_t kernel = 1, stride = 1, padding = 0, groups = 1;
  Activation activation = Activation::kNone;
  int residual = kNone;  // added behind the activation
  int addend = kNone;    // of an attention: added in front of it
  float eps = 0.0f;      // of a norm, or of linear attention
  // Of attentions.
  int64_t heads = 0, head_dim = 0, value_dim = 0;
  int64_t queries = 0, keys = 0;  // that a bias was made for
  bool talking_heads = false;
  float scale = 0.0f;
  std::vector<int64_t> kernels;  // of a cascade, a head each
  int64_t window_height = 0, window_width = 0;

  // Channels of a head's q and k, and of its v, as values have them.
  int64_t key_stride() const { return round_up(head_dim, kWholeVectors); }
  int64_t value_stride() const { return round_up(value_dim, kWholeVectors); }
};

// Value 0 is x, value i + 1 the result of step i; the last is the result. It is right: csrc has checked it.
struct BlockProgram {
  int64_t channels;  // of x
  std::vector<BlockStep> steps;

  int64_t channels_of(int value) const { return value == 0 ? channels : steps[value - 1].channels; }
};

// Floats of a step's weights, which lie one behind the other:
//
//   convolution  (groups, panels, inputs and taps of a group, kPanel), (groups, panels, kPanel)
//   depthwise    (blocks, taps, kBlock), (blocks, kBlock)
//   pool mixer   (blocks, kBlock)
//   layer norm   (blocks, kBlock), (blocks, kBlock)
//   attention    (heads, queries, keys); with talking heads four more (params/softmax_heads.h)
//   cascade      those of PackedHeads, (heads, window tokens, window tokens)
EFFATTN_EXPORT std::vector<int64_t> weight_sizes(const BlockStep& step, int64_t inputs);

struct BlockSize {
  int64_t height, width;
};

// Of a step's result, or not positive where the image is too small.
inline BlockSize result_size(const BlockStep& step, const BlockSize& in) {
  if (step.kind == BlockStep::Kind::kMean) return {1, 1};
  if (step.kind == BlockStep::Kind::kUpsample) return {2 * in.height, 2 * in.width};
  if (step.kind != BlockStep::Kind::kConvolution && step.kind != BlockStep::Kind::kDepthwise) return in;
  const auto side = [&](int64_t n) {
    const int64_t room = n + 2 * step.padding - step.kernel;
    return room < 0 ? 0 : room / step.stride + 1;
  };
  return {side(in.height), side(in.width)};
}

// Of every value.
inline std::vector<BlockSize> sizes_of(const BlockProgram& program, const BlockSize& x) {
  std::vector<BlockSize> sizes{x};
  for (const BlockStep& step : program.steps) sizes.push_back(result_size(step, sizes[step.inputs[0]]));
  return sizes;
}

struct BlockParams {
  DType dtype;
  int64_t batch;
  BlockSize size;
  const float* weights;  // of all steps, one behind the other
  Image x, out;
};

// What a call does for given sizes (plan.h), made once for many calls.
class BlockPlan;
EFFATTN_EXPORT void run_block(const BlockPlan& plan, const BlockParams& params, const Parallel& parallel);

}  // namespace effattn::cpu
