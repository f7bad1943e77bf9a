// Blocks of the convolution that halves; blocks of the first projection in parallel, those of v with the
// convolution behind them; heads, or with talking heads blocks of queries; rows of an upsampled image; blocks
// of the last projection.
#include "plan.h"

#include "../channels_last/features.h"
#include "../softmax_attention/ukernels.h"

namespace effattn::cpu {
namespace {

constexpr int64_t kMinQueries = 24;  // so many are worth laying out the keys for

// What a thread convolves a block of channels with.
struct ConvolutionMemory {
  PaddedImage padded;
  Rows<float> whole;  // of a result of which every other row and column is taken
  ConvolutionMemory(const ImageSize& size, const Depthwise& by, bool halves, Arena& arena)
      : padded{nullptr, size.height, size.width, kPackedOutputs, by.kernel / 2},
        whole{nullptr, kPackedOutputs} {
    padded.data = by.kernel == 0 ? nullptr : arena.floats(padded.floats());
    if (halves) whole.data = arena.floats(size.tokens() * kPackedOutputs);
  }
};

struct HalvingMemory : ConvolutionMemory {
  Rows<float> rows;
  HalvingMemory(const ImageSize& size, const Depthwise& by, Arena& arena)
      : ConvolutionMemory(size, by, true, arena),
        rows{arena.floats(size.tokens() * kPackedOutputs), kPackedOutputs} {}
};

// What one thread attends to at a time.
struct Part {
  int64_t head, heads, query, queries;

  Part(const SoftmaxHeads& all, int64_t parts, int64_t part)
      : head(part), heads(1), query(0), queries(all.queries) {
    if (!all.talking()) return;
    head = 0;
    heads = all.heads;
    query = part * all.queries / parts;
    queries = (part + 1) * all.queries / parts - query;
  }
};

struct AttentionMemory {
  float* own;
  Arena scratch;
  AttentionMemory(int64_t own_floats, int64_t scratch_floats, Arena& arena)
      : own(arena.floats(own_floats)), scratch(arena.part(scratch_floats)) {}
};

// A call, and its memory between stages.
struct Stages {
  const ProjectedAttentionParams& p;
  const ChannelsLastUkernels& ukernels = channels_last_ukernels();
  const SoftmaxUkernels& softmax = softmax_ukernels();
  FeaturesOf x;
  Batch halved, qkv, q, attended, upsampled;

  Stages(const ProjectedAttentionParams& params, Arena& arena)
      : p(params),
        x(p.dtype, p.x, p.is_halved() ? 0 : p.batch, p.channels, p.x_size.tokens(), arena),
        halved(p.batch, p.halving.kernel == 0 ? 0 : p.query_size.tokens(), spread_stride(p.channels), arena),
        qkv(p.batch, p.size.tokens(), spread_stride(p.qkv.outputs), arena),
        q(p.batch, p.q == nullptr ? 0 : p.query_size.tokens(), spread_stride(p.keys()), arena),
        attended(p.batch, p.query_size.tokens(), spread_stride(p.values()), arena),
        upsampled(p.batch, p.out_size == p.query_size ? 0 : p.out_size.tokens(), spread_stride(p.values()),
                  arena) {}

  // A block of channels of an image through a depthwise convolution.
  void convolve(const Depthwise& by, int64_t channel, const Rows<float>& image,
                const ConvolutionMemory& memory, const Rows<float>& to) const {
    const auto& [padded, whole] = memory;
    const bool halves = whole.data != nullptr;
    ukernels.fill(image, padded);
    ukernels.depthwise(by.kernel, padded, by.taps_of(channel), by.bias + channel, halves ? whole : to);
    if (!halves) return;
    float* row = to.data;
    for (int64_t y = 0; y < padded.height; y += 2) {
      for (int64_t x = 0; x < padded.width; x += 2, row += to.stride) {
        copy(row, whole.row(y * padded.width + x), kPackedOutputs);
      }
    }
  }

  void halve(const Parallel& parallel) const {
    if (halved.tokens == 0) return;
    const int64_t blocks = ceil_div(p.channels, kPackedOutputs), tokens = p.x_size.tokens();
    const int64_t work = kPackedOutputs * tokens * p.halving.kernel * p.halving.kernel;
    parallel(p.batch * blocks, work, [&](int64_t begin, int64_t end) {
      const auto memory = in_thread_arena<HalvingMemory>(p.x_size, p.halving);
      clear(memory.padded.data, memory.padded.floats());
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / blocks, first = unit % blocks * kPackedOutputs;
        const int64_t channels = min(kPackedOutputs, p.channels - first);
        if (channels < kPackedOutputs) clear(memory.rows.data, tokens * kPackedOutputs);
        ukernels.load(p.dtype, channels_from(p.dtype, p.x, b, first), tokens, channels, memory.rows);
        convolve(p.halving, first, memory.rows, memory, halved.of(b, first));
      }
    });
  }

  void project(const Parallel& parallel) const {
    const auto halved_features = [&](int64_t b) { return features_of(halved.of(b)); };
    if (p.q != nullptr) {
      project_blocks(
          p.batch, p.query_size.tokens(), *p.q, halved_features, parallel,
          [&](int64_t b, int64_t first, const Rows<float>&) { return q.of(b, first); },
          [](Arena&) { return nullptr; },
          [](int64_t, int64_t, int64_t, const Rows<float>&, std::nullptr_t) {});
    }
    project_blocks(
        p.batch, p.size.tokens(), p.qkv,
        [&](int64_t b) { return p.is_halved() ? halved_features(b) : x.of(b); }, parallel,
        [&](int64_t b, int64_t first, const Rows<float>&) { return qkv.of(b, first); },
        [&](Arena& arena) {
          const ConvolutionMemory memory(p.size, p.local, p.q != nullptr, arena);
          if (memory.padded.data != nullptr) clear(memory.padded.data, memory.padded.floats());
          return memory;
        },
        [&](int64_t b, int64_t first, int64_t, const Rows<float>& rows, const ConvolutionMemory& memory) {
          const int64_t channel = first - p.first_value();
          if (p.local.kernel == 0 || channel < 0) return;
          convolve(p.local, channel, rows, memory, attended.of(b, channel));
        });
  }

  void attend(int64_t batch, const Part& part) const {
    SoftmaxHeads heads = p.heads;
    heads.value_dim = p.value_stride();  // the padding is zero in the output
    heads.heads = part.heads;
    heads.queries = part.queries;
    heads.bias += part.head * heads.bias_stride + part.query * heads.keys;
    const int64_t dk = p.key_stride(), dv = p.value_stride();
    const bool adds = p.local.kernel != 0;  // to the convolution of v
    const auto memory = in_thread_arena<AttentionMemory>(adds ? part.heads * part.queries * dv : 0,
                                                         softmax.scratch_floats(heads));
    const Rows<float> queries = p.q == nullptr ? qkv.of(batch, part.head * dk) : q.of(batch, part.head * dk);
    const Rows<float> keys = qkv.of(batch, p.first_key() + part.head * dk);
    const Rows<float> values = qkv.of(batch, p.first_value() + part.head * dv);
    const Rows<float> to = attended.of(batch, part.head * dv).from(part.query);
    const HeadRows<float> out{to.data, dv, to.stride};
    const HeadRows<float> written = adds ? HeadRows<float>{memory.own, part.queries * dv, dv} : out;
    softmax.forward(heads, {queries.row(part.query), dk, queries.stride}, {keys.data, dk, keys.stride},
                    {values.data, dv, values.stride}, written, memory.scratch);
    for (int64_t h = 0; h < part.heads; ++h) {
      if (adds) ukernels.add(part.queries, dv, written.of(h), out.of(h));
      // An upsampled image is activated afterwards.
      if (p.activation != Activation::kNone && upsampled.tokens == 0) {
        ukernels.activate(p.activation, part.queries, dv, out.of(h), out.of(h));
      }
    }
  }

  void attend(const Parallel& parallel) const {
    const SoftmaxHeads& all = p.heads;
    const int64_t parts = all.talking() ? max(1, all.queries / kMinQueries) : all.heads;
    const int64_t channels = all.head_dim + all.value_dim + 20 + (all.talking() ? 2 * all.heads : 0);
    const int64_t work = all.heads * all.queries * all.keys * channels / parts;
    parallel(p.batch * parts, work, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) attend(unit / parts, Part(all, parts, unit % parts));
    });
  }

  void upsample(const Parallel& parallel) const {
    if (upsampled.tokens == 0) return;
    const int64_t height = p.out_size.height, width = p.out_size.width;
    parallel(p.batch * height, 12 * width * p.values(), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / height, y = unit % height;
        const Rows<float> row = upsampled.of(b).from(y * width);
        ukernels.upsample(p.values(), attended.of(b), p.query_size.height, p.query_size.width, y, height,
                          width, row);
        if (p.activation != Activation::kNone) ukernels.activate(p.activation, width, p.values(), row, row);
      }
    });
  }
};

}  // namespace

void projected_attention(const ProjectedAttentionParams& p, const Parallel& parallel) {
  if (p.batch * p.x_size.tokens() * p.out_size.tokens() * p.proj.outputs == 0) return;
  const InSharedArena<Stages> shared(p);
  const Stages& stages = *shared;
  stages.x.load(parallel);
  stages.halve(parallel);
  stages.project(parallel);
  stages.attend(parallel);
  stages.upsample(parallel);
  const Batch& last = stages.upsampled.tokens == 0 ? stages.attended : stages.upsampled;
  project_tokens(p.dtype, p.batch, last, p.proj, p.out, parallel);
}

}  // namespace effattn::cpu
