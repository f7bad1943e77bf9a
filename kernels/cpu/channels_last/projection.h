// 1x1 convolutions in blocks of outputs.
#pragma once

#include <cstddef>
#include <utility>

#include "../core/arena.h"
#include "../core/parallel.h"
#include "ukernels.h"

namespace effattn::cpu {

// A bias of `count` channels in front of zeros; all zeros if there is none.
inline void copy_bias(const float* bias, int64_t count, int64_t floats, float* to) {
  clear(to, floats);
  if (bias != nullptr) copy(to, bias, count);
}

// Rows of every image, or window, of a batch.
struct Batch {
  int64_t tokens, stride;
  float* data;

  Batch(int64_t batch, int64_t of_tokens, int64_t of_stride, Arena& arena)
      : tokens(of_tokens), stride(of_stride), data(arena.floats(batch * tokens * stride)) {}
  Rows<float> of(int64_t batch, int64_t channel = 0) const {
    return {data + batch * tokens * stride + channel, stride};
  }
};

// The weights of a 1x1 convolution: a row an output, (outputs, inputs); or packed as products read them,
// blocks of kPackedOutputs outputs, in each a row an input, padded with zeros.
struct ProjectionWeights {
  int64_t inputs, outputs;
  const float *data, *bias;  // the bias (outputs), or null
  bool packed;
};
constexpr int64_t kPackedOutputs = 32;

// What a thread projects with, and whatever else it takes for each block.
template <class TakeOwn>
struct ProjectionMemory {
  Rows<float> transposed, tile;
  float* bias;
  decltype(std::declval<TakeOwn>()(std::declval<Arena&>())) own;

  ProjectionMemory(int64_t inputs, int64_t tokens, const TakeOwn& take_own, Arena& arena)
      : transposed{arena.floats(inputs * kPackedOutputs), kPackedOutputs},
        tile{arena.floats(tokens * kPackedOutputs), kPackedOutputs},
        bias(arena.floats(kPackedOutputs)),
        own(take_own(arena)) {}
};

// The images `features(batch)`, block by block of outputs, in parallel: a block's rows of kPackedOutputs
// channels go where `where(batch, first output, a tile)` says; then `use(batch, first output, outputs, rows,
// own)`, with what `take_own(arena)` returned.
template <class Input, class Where, class TakeOwn, class Use>
void project_blocks(int64_t batch, int64_t tokens, const ProjectionWeights& weights, const Input& features,
                    const Parallel& parallel, const Where& where, const TakeOwn& take_own, const Use& use) {
  constexpr int64_t kChannels = kPackedOutputs;
  const ChannelsLastUkernels& ukernels = channels_last_ukernels();
  const int64_t inputs = weights.inputs, outputs = weights.outputs;
  const int64_t blocks = ceil_div(outputs, kChannels), work = kChannels * inputs * tokens;
  parallel(blocks * batch, work, [&](int64_t begin, int64_t end) {
    auto memory = in_thread_arena<ProjectionMemory<TakeOwn>>(inputs, tokens, take_own);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / batch * kChannels, b = unit % batch;
      const int64_t channels = min(kChannels, outputs - first);
      const float* const of_block = weights.data + first * inputs;
      if (unit == begin || b == 0) {
        if (!weights.packed) ukernels.transpose(of_block, channels, inputs, memory.transposed);
        copy_bias(weights.bias == nullptr ? nullptr : weights.bias + first, channels, kChannels, memory.bias);
      }
      const Rows<const float> matrix{weights.packed ? of_block : memory.transposed.data, kChannels};
      const int64_t next = min(first + kChannels, outputs);
      const PrefetchRange prefetch{weights.data + next * inputs,
                                   unit + 1 < end ? min(kChannels, outputs - next) * inputs : 0};
      const Rows<float> to = where(b, first, memory.tile);
      ukernels.project(tokens, inputs, kChannels, features(b), matrix, memory.bias, to, prefetch);
      use(b, first, channels, to, memory.own);
    }
  });
}

// Of so many channels, padded so that rows lie in different cache sets.
constexpr int64_t spread_stride(int64_t channels) {
  return round_up(channels, kPackedOutputs) + kWholeVectors;
}

// out = weights * in + bias.
inline void project_tokens(DType dtype, int64_t batch, const Batch& in, const ProjectionWeights& weights,
                           const Image& out, const Parallel& parallel) {
  const ChannelsLastUkernels& ukernels = channels_last_ukernels();
  project_blocks(
      batch, in.tokens, weights, [&](int64_t b) { return features_of(in.of(b)); }, parallel,
      [](int64_t, int64_t, const Rows<float>& tile) { return tile; }, [](Arena&) { return nullptr; },
      [&](int64_t b, int64_t first, int64_t channels, const Rows<float>& tile, std::nullptr_t) {
        ukernels.store(dtype, channels_from(dtype, out, b, first), in.tokens, channels, tile);
      });
}

}  // namespace effattn::cpu
