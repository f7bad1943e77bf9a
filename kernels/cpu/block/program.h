// A block of a network for inference, or several in a row: a short program of steps, each of which makes one
// image of others. Weights are packed for the micro-kernels (ukernels.h).
#pragma once

#include <cstdint>
#include <vector>

#include "../../params/image.h"
#include "../core/activation.h"
#include "../core/isa.h"
#include "../core/parallel.h"

namespace effattn::cpu {

struct BlockStep {
  // kLoad and kStore are the first and the last step, from and to a tensor; the plan adds them.
  enum class Kind { kLoad, kConvolution, kDepthwise, kLinearAttention, kStore };
  static constexpr int kNone = -1;

  Kind kind;
  // Of a linear attention one a scale, with q, k and v of each head in turn; else one.
  std::vector<int> inputs;
  int residual = kNone;
  int64_t channels;  // of the result
  // Of a convolution; where its weights and its bias begin.
  int64_t weight = 0, bias = 0;
  int64_t kernel = 1, stride = 1, padding = 0, groups = 1;
  Activation activation = Activation::kNone;
  // Of an attention.
  int64_t head_dim = 0;
  float eps = 0.0f;
};

// Value 0 is x, value i + 1 the result of step i; the last is the result. It is right: csrc has checked it.
struct BlockProgram {
  int64_t channels;  // of x
  std::vector<BlockStep> steps;

  int64_t channels_of(int value) const { return value == 0 ? channels : steps[value - 1].channels; }
};

// Weights of a step: of a convolution (groups, panels, inputs and taps of a group, kPanel) and (groups, panels,
// kPanel), of a depthwise one (blocks, taps, kBlock) and (blocks, kBlock).
struct WeightSizes {
  int64_t weight, bias;
};
EFFATTN_EXPORT WeightSizes weight_sizes(const BlockStep& step, int64_t inputs);

struct BlockSize {
  int64_t height, width;
};

// Of a step's result, or not positive where the image is too small.
inline BlockSize result_size(const BlockStep& step, const BlockSize& in) {
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
