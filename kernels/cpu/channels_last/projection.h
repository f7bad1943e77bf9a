// The last 1x1 convolution of a module, from rows of tokens that all threads have written.
#pragma once

#include "ukernels.h"
#include "../core/parallel.h"
#include "../core/schedule.h"

namespace effattn::cpu {

// A bias of `count` channels in front of zeros; all zeros if there is none.
inline void copy_bias(const float* bias, int64_t count, int64_t floats, float* to) {
  clear(to, floats);
  if (bias != nullptr) copy(to, bias, count);
}

// The weights of a 1x1 convolution: a row an output, (outputs, inputs); or packed as products read them,
// blocks of kPackedOutputs outputs, in each a row an input, with zeros for outputs that there are not.
struct ProjectionWeights {
  int64_t inputs, outputs;
  const float *data, *bias;  // the bias (outputs), or null
  bool packed;
};
constexpr int64_t kPackedOutputs = 32;

// The images `features(batch)`, block by block of outputs, in parallel: a block's rows of kPackedOutputs
// channels go where `where(batch, first output, rows that nobody needs)` says; then `use(batch, first output,
// outputs, rows)`.
template <class Input, class Where, class Use>
void project_blocks(int64_t batch, int64_t tokens, const ProjectionWeights& weights, const Input& features,
                    const Parallel& parallel, const Where& where, const Use& use) {
  constexpr int64_t kChannels = kPackedOutputs;
  const ChannelsLastPasses& passes = channels_last_passes(active_isa());
  const int64_t inputs = weights.inputs, outputs = weights.outputs;
  const int64_t blocks = ceil_div(outputs, kChannels), work = kChannels * inputs * tokens;
  parallel(blocks * batch, work, [&](int64_t begin, int64_t end) {
    float* const memory = thread_scratch<Purpose::kProjection>((inputs + tokens + 1) * kChannels);
    const Rows<float> transposed{memory, kChannels}, tile{memory + inputs * kChannels, kChannels};
    float* const own_bias = tile.data + tokens * kChannels;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / batch * kChannels, b = unit % batch;
      const int64_t channels = min(kChannels, outputs - first);
      const float* const of_block = weights.data + first * inputs;
      if (unit == begin || b == 0) {
        if (!weights.packed) passes.transpose(of_block, channels, inputs, transposed);
        copy_bias(weights.bias == nullptr ? nullptr : weights.bias + first, channels, kChannels, own_bias);
      }
      const Rows<const float> matrix{weights.packed ? of_block : transposed.data, kChannels};
      const int64_t next = min(first + kChannels, outputs);
      const Coming coming{weights.data + next * inputs,
                          unit + 1 < end ? min(kChannels, outputs - next) * inputs : 0};
      const Rows<float> to = where(b, first, tile);
      passes.project(tokens, inputs, kChannels, features(b), matrix, own_bias, to, coming);
      use(b, first, channels, to);
    }
  });
}

// out = weights * rows_of(batch) + bias.
template <class RowsOf>
void project_tokens(DType dtype, int64_t batch, int64_t tokens, const ProjectionWeights& weights,
                    const RowsOf& rows_of, const Image& out, const Parallel& parallel) {
  const ChannelsLastPasses& passes = channels_last_passes(active_isa());
  project_blocks(
      batch, tokens, weights,
      [&](int64_t b) {
        const Rows<float> rows = rows_of(b);
        return Features{rows.data, rows.stride, 1};
      },
      parallel, [](int64_t, int64_t, const Rows<float>& tile) { return tile; },
      [&](int64_t b, int64_t first, int64_t channels, const Rows<float>& tile) {
        passes.store(dtype, channels_from(dtype, out, b, first), tokens, channels, tile);
      });
}

}  // namespace effattn::cpu
