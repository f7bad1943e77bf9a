// A call of a program: its memory, and values as steps see them.
#pragma once

#include "../core/arena.h"
#include "plan.h"

namespace effattn::cpu {

// A value as steps see it.
struct View {
  float* data;  // of the first block that is kept
  const float* zeros;
  int64_t first_block, rows, height, row_stride, block_stride;
  Span cols;  // that are kept

  // Pixel 0 of a row; of a row outside of the image, zeros.
  const float* row(int64_t block, int64_t y) const {
    return y < 0 || y >= height ? zeros - cols.begin * kBlock : own_row(block, y);
  }
  float* own_row(int64_t block, int64_t y) const {
    return data + (block - first_block) * block_stride + (y % rows) * row_stride - cols.begin * kBlock;
  }
  // Zeros beside what was made of an image of a width, where that reaches its sides.
  void clear_border(const Span& blocks, const Span& of_rows, const Span& made, int64_t width) const {
    const int64_t left = made.begin == 0 ? max(0, -cols.begin) : 0;
    const int64_t right = made.end == width ? max(0, cols.end - width) : 0;
    if (left + right == 0) return;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      for (int64_t y = of_rows.begin; y < of_rows.end; ++y) {
        clear(own_row(block, y) - left * kBlock, left * kBlock);
        clear(own_row(block, y) + width * kBlock, right * kBlock);
      }
    }
  }
};

struct CallMemory {
  float *images, *zeros;
  CallMemory(const BlockPlan& plan, int64_t batch, Arena& arena)
      : images(arena.floats(batch * plan.image_floats)), zeros(arena.floats(plan.zero_floats)) {}
};

struct Call {
  const BlockPlan& plan;
  const BlockParams& params;
  const CallMemory& memory;
  const BlockUkernels& ukernels = block_ukernels();

  // In the order of weight_sizes.
  std::vector<const float*> weights_of(const BlockStep& step) const {
    const float* next = params.weights + step.weights;
    std::vector<const float*> found;
    for (const int64_t size :
         weight_sizes(step, step.inputs.empty() ? 0 : plan.steps[step.inputs[0]].channels)) {
      found.push_back(next);
      next += size;
    }
    return found;
  }

  View whole(int value, int64_t image) const {
    const ValuePlan& v = plan.values[value];
    return {memory.images + image * plan.image_floats + v.offset,
            memory.zeros,
            0,
            v.rows,
            v.size.height,
            v.row_stride,
            v.block_stride,
            {-v.border, v.size.width + v.border}};
  }
};

// Steps whose results are made of whole images; what lies beside the results is not theirs.
void run_mean(const Call& call, int step, const Parallel& parallel);
void run_upsample(const Call& call, int step, const Parallel& parallel);
void run_linear_attention(const Call& call, int step, const Parallel& parallel);
void run_attention(const Call& call, int step, const Parallel& parallel);
void run_cascade(const Call& call, int step, const Parallel& parallel);

}  // namespace effattn::cpu
