// The last 1x1 convolution of a module, from rows of tokens that all threads have written.
#pragma once

#include "channels_last.h"
#include "parallel.h"
#include "schedule.h"

namespace effattn::cpu {

// A bias of `count` channels in front of zeros; all zeros if there is none.
inline void copy_bias(const float* bias, int64_t count, int64_t floats, float* to) {
  clear(to, floats);
  if (bias != nullptr) copy(to, bias, count);
}

// out = weight * rows_of(batch) + bias, for weights (outputs, inputs).
template <class RowsOf>
void project_tokens(DType dtype, int64_t batch, int64_t tokens, int64_t inputs, int64_t outputs,
                    const float* weight, const float* bias, const RowsOf& rows_of, const Image& out,
                    const Parallel& parallel) {
  constexpr int64_t kChannels = 32;  // of out that a thread takes at once
  const ChannelsLastPasses& passes = channels_last_passes(active_isa());
  const int64_t blocks = ceil_div(outputs, kChannels), work = larger(1, kChannels * inputs * tokens);
  parallel(blocks * batch, larger(1, kMinWorkPerThread / work), [&](int64_t begin, int64_t end) {
    float* const memory = thread_scratch((inputs + tokens + 1) * kChannels);
    const Rows<float> transposed{memory, kChannels}, tile{memory + inputs * kChannels, kChannels};
    float* const own_bias = tile.data + tokens * kChannels;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / batch * kChannels, b = unit % batch;
      const int64_t channels = smaller(kChannels, outputs - first);
      if (unit == begin || b == 0) {
        passes.transpose(weight + first * inputs, channels, inputs, transposed);
        copy_bias(bias == nullptr ? nullptr : bias + first, channels, kChannels, own_bias);
      }
      const int64_t next = smaller(first + kChannels, outputs);
      const Coming coming{weight + next * inputs,
                          unit + 1 < end ? smaller(kChannels, outputs - next) * inputs : 0};
      const Rows<float> in = rows_of(b);
      passes.project(tokens, inputs, channels, {in.data, in.stride, 1}, {transposed.data, kChannels},
                     own_bias, tile, coming);
      passes.store(dtype, channels_from(dtype, out, b, first), tokens, channels, tile);
    }
  });
}

}  // namespace effattn::cpu
