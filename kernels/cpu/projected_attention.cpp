// The schedule: blocks of the first projection in parallel, those of v with the convolution behind them;
// heads, or where they talk to each other blocks of queries; blocks of the last projection.
#include "projected_attention.h"

#include "features.h"

namespace effattn::cpu {
namespace {

constexpr int64_t kQueries = 24;  // at least so many are worth laying out the keys for

struct Part {
  int64_t head, heads, query, queries;
};

// What one thread attends to at a time.
Part part_of(const SoftmaxHeads& all, int64_t parts, int64_t part) {
  if (!all.talk()) return {part, 1, 0, all.queries};
  const int64_t first = part * all.queries / parts, end = (part + 1) * all.queries / parts;
  return {0, all.heads, first, end - first};
}

}  // namespace

void projected_attention(const ProjectedAttention& p, const Parallel& parallel) {
  const SoftmaxHeads& all = p.heads;
  const int64_t tokens = all.queries;
  if (p.batch * tokens == 0) return;
  const ChannelsLastPasses& passes = channels_last_passes(active_isa());
  const SoftmaxPasses& softmax = softmax_passes(active_isa());
  const auto grain = [](int64_t work) { return larger(1, kMinWorkPerThread / larger(1, work)); };

  const FeaturesOf x(p.dtype, p.x, p.batch, p.qkv.inputs, tokens);
  // Rows of whole blocks, each in other cache sets than the one before.
  const int64_t row = round_up(p.qkv.outputs, kPackedOutputs) + kWholeVectors;
  const int64_t out_row = round_up(p.values(), kPackedOutputs) + kWholeVectors;
  const int64_t floats = x.floats() + p.batch * tokens * (row + out_row);
  const Floats large = floats > kKeptFloats ? aligned_floats(floats) : nullptr;  // kept by no thread
  float* const memory = large ? large.get() : thread_scratch<Purpose::kBetweenThreads>(floats);
  const auto qkv_of = [&](int64_t batch) {
    return Rows<float>{memory + x.floats() + batch * tokens * row, row};
  };
  const auto out_of = [&](int64_t batch) {
    return Rows<float>{memory + x.floats() + p.batch * tokens * row + batch * tokens * out_row, out_row};
  };
  x.load(memory, parallel);

  const PaddedImage shape{nullptr, p.height, p.width, kPackedOutputs, p.kernel / 2};
  project_blocks(
      p.batch, tokens, p.qkv, [&](int64_t b) { return x.of(memory, b); }, parallel,
      [&](int64_t b, int64_t first, const Rows<float>&) {
        const Rows<float> rows = qkv_of(b);
        return Rows<float>{rows.data + first, rows.stride};
      },
      [&](int64_t b, int64_t first, int64_t, const Rows<float>& projected) {
        const int64_t channel = first - p.first_value();
        if (p.kernel == 0 || channel < 0) return;
        PaddedImage padded = shape;
        padded.data = thread_scratch(padded.floats());
        clear(padded.data, padded.floats());
        passes.fill({projected.data, projected.stride}, padded);
        const Rows<float> out = out_of(b);
        passes.depthwise(p.kernel, padded, p.taps + channel * p.kernel * p.kernel, p.tap_bias + channel,
                         {out.data + channel, out.stride});
      });

  const int64_t parts = all.talk() ? larger(1, tokens / kQueries) : all.heads;
  const int64_t pairs = all.heads * tokens * tokens;
  const int64_t talk = all.talk() ? 2 * all.heads : 0;
  const int64_t work = pairs * (all.head_dim + all.value_dim + 20 + talk) / larger(1, parts);
  parallel(p.batch * parts, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / parts;
      const Part part = part_of(all, parts, unit % parts);
      SoftmaxHeads heads = all;
      heads.heads = part.heads;
      heads.queries = part.queries;
      heads.bias += part.head * all.bias_stride + part.query * tokens;
      const int64_t own_floats = part.heads * part.queries * p.value_stride();
      float* const own = thread_scratch(own_floats + softmax.scratch_floats(heads));
      const Rows<float> qkv = qkv_of(b), out = out_of(b);
      const float* const q = qkv.data + part.query * qkv.stride + part.head * p.key_stride();
      const float* const k = qkv.data + (all.heads + part.head) * p.key_stride();
      const float* const v = qkv.data + p.first_value() + part.head * p.value_stride();
      const Rows<float> to{out.data + part.query * out.stride + part.head * p.value_stride(), out.stride};
      const HeadRows<float> written =
          p.kernel == 0 ? HeadRows<float>{to.data, p.value_stride(), to.stride}
                        : HeadRows<float>{own, part.queries * p.value_stride(), p.value_stride()};
      softmax.forward(heads, {q, p.key_stride(), qkv.stride}, {k, p.key_stride(), qkv.stride},
                      {v, p.value_stride(), qkv.stride}, written, own + own_floats);
      for (int64_t h = 0; h < part.heads && p.kernel != 0; ++h) {
        passes.add(part.queries, p.value_stride(), {written.of(h).data, written.stride},
                   {to.data + h * p.value_stride(), to.stride});
      }
    }
  });

  if (p.proj != nullptr) {
    return project_tokens(p.dtype, p.batch, tokens, *p.proj, out_of, p.out, parallel);
  }
  parallel(p.batch * all.heads, grain(tokens * all.value_dim), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / all.heads, head = unit % all.heads;
      const Rows<float> rows = out_of(b);
      passes.store(p.dtype, channels_from(p.dtype, p.out, b, head * all.value_dim), tokens, all.value_dim,
                   {rows.data + head * p.value_stride(), rows.stride});
    }
  });
}

}  // namespace effattn::cpu
