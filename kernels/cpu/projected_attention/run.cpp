// The schedule: blocks of the convolution that halves; blocks of the first projection in parallel, those of v
// with the convolution behind them; heads, or where they talk to each other blocks of queries; rows of an
// enlarged image; blocks of the last projection.
#include "plan.h"

#include "../channels_last/features.h"

namespace effattn::cpu {
namespace {

constexpr int64_t kQueries = 24;  // at least so many are worth laying out the keys for

// Rows of every image of the batch, each row in other cache sets than the one before.
struct Batch {
  float* data;
  int64_t tokens, stride;

  Batch(int64_t channels, int64_t of_tokens)
      : data(nullptr), tokens(of_tokens), stride(round_up(channels, kPackedOutputs) + kWholeVectors) {}
  int64_t floats(int64_t batch) const { return batch * tokens * stride; }
  Rows<float> of(int64_t batch, int64_t channel = 0) const {
    return {data + batch * tokens * stride + channel, stride};
  }
};

// What one thread attends to at a time.
struct Part {
  int64_t head, heads, query, queries;

  Part(const SoftmaxHeads& all, int64_t parts, int64_t part)
      : head(part), heads(1), query(0), queries(all.queries) {
    if (!all.talk()) return;
    head = 0;
    heads = all.heads;
    query = part * all.queries / parts;
    queries = (part + 1) * all.queries / parts - query;
  }
};

// A call's memory between its phases.
struct Call {
  const ProjectedAttention& p;
  const ChannelsLastPasses& passes = channels_last_passes(active_isa());
  const SoftmaxPasses& softmax = softmax_passes(active_isa());
  const FeaturesOf x;
  Batch halved, qkv, q, attended, enlarged;
  float* x_memory;

  explicit Call(const ProjectedAttention& problem)
      : p(problem),
        x(p.dtype, p.x, p.is_halved() ? 0 : p.batch, p.channels, p.x_size.tokens()),
        halved(p.channels, p.halving.kernel == 0 ? 0 : p.query_size.tokens()),
        qkv(p.qkv.outputs, p.size.tokens()),
        q(p.keys(), p.q == nullptr ? 0 : p.query_size.tokens()),
        attended(p.values(), p.query_size.tokens()),
        enlarged(p.values(), p.out_size == p.query_size ? 0 : p.out_size.tokens()) {}

  int64_t floats() const {
    return x.floats() + halved.floats(p.batch) + qkv.floats(p.batch) + q.floats(p.batch) +
           attended.floats(p.batch) + enlarged.floats(p.batch);
  }
  void lie_in(float* memory) {
    x_memory = memory;
    halved.data = x_memory + x.floats();
    qkv.data = halved.data + halved.floats(p.batch);
    q.data = qkv.data + qkv.floats(p.batch);
    attended.data = q.data + q.floats(p.batch);
    enlarged.data = attended.data + attended.floats(p.batch);
  }
  Features halved_features(int64_t batch) const { return {halved.of(batch).data, halved.stride, 1}; }

  // A block of channels of an image through a depthwise convolution; every other row and column if `halve`.
  void convolve(const Depthwise& by, int64_t channel, const Rows<float>& image, const ImageSize& size,
                bool halve, const Rows<float>& to) const {
    PaddedImage padded{nullptr, size.height, size.width, kPackedOutputs, by.kernel / 2};
    const int64_t whole_floats = halve ? size.tokens() * kPackedOutputs : 0;
    float* const whole = thread_scratch(whole_floats + padded.floats());
    padded.data = whole + whole_floats;
    clear(padded.data, padded.floats());
    passes.fill({image.data, image.stride}, padded);
    const Rows<float> all = halve ? Rows<float>{whole, kPackedOutputs} : to;
    passes.depthwise(by.kernel, padded, by.taps_of(channel), by.bias + channel, all);
    if (!halve) return;
    float* row = to.data;
    for (int64_t y = 0; y < size.height; y += 2) {
      for (int64_t x = 0; x < size.width; x += 2, row += to.stride) {
        copy(row, whole + (y * size.width + x) * kPackedOutputs, kPackedOutputs);
      }
    }
  }

  void halve(const Parallel& parallel) const {
    if (halved.tokens == 0) return;
    const int64_t blocks = ceil_div(p.channels, kPackedOutputs), tokens = p.x_size.tokens();
    const int64_t work = kPackedOutputs * tokens * p.halving.kernel * p.halving.kernel;
    parallel(p.batch * blocks, work, [&](int64_t begin, int64_t end) {
      float* const rows = thread_scratch<Purpose::kProjection>(tokens * kPackedOutputs);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / blocks, first = unit % blocks * kPackedOutputs;
        const int64_t channels = min(kPackedOutputs, p.channels - first);
        if (channels < kPackedOutputs) clear(rows, tokens * kPackedOutputs);
        passes.load(p.dtype, channels_from(p.dtype, p.x, b, first), tokens, channels, {rows, kPackedOutputs});
        convolve(p.halving, first, {rows, kPackedOutputs}, p.x_size, true, halved.of(b, first));
      }
    });
  }

  void project(const Parallel& parallel) const {
    if (p.q != nullptr) {
      project_blocks(
          p.batch, p.query_size.tokens(), *p.q, [&](int64_t b) { return halved_features(b); }, parallel,
          [&](int64_t b, int64_t first, const Rows<float>&) { return q.of(b, first); },
          [](int64_t, int64_t, int64_t, const Rows<float>&) {});
    }
    project_blocks(
        p.batch, p.size.tokens(), p.qkv,
        [&](int64_t b) { return p.is_halved() ? halved_features(b) : x.of(x_memory, b); }, parallel,
        [&](int64_t b, int64_t first, const Rows<float>&) { return qkv.of(b, first); },
        [&](int64_t b, int64_t first, int64_t, const Rows<float>& rows) {
          const int64_t channel = first - p.first_value();
          if (p.local.kernel == 0 || channel < 0) return;
          convolve(p.local, channel, rows, p.size, p.q != nullptr, attended.of(b, channel));
        });
  }

  void attend(int64_t batch, const Part& part) const {
    SoftmaxHeads heads = p.heads;
    heads.value_dim =
        p.value_stride();  // zeros behind the last are zeros in the output, which all is added to
    heads.heads = part.heads;
    heads.queries = part.queries;
    heads.bias += part.head * heads.bias_stride + part.query * heads.keys;
    const int64_t dk = p.key_stride(), dv = p.value_stride();
    const int64_t own_floats = part.heads * part.queries * dv;
    float* const own = thread_scratch(own_floats + softmax.scratch_floats(heads));
    const Rows<float> queries = p.q == nullptr ? qkv.of(batch, part.head * dk) : q.of(batch, part.head * dk);
    const Rows<float> keys = qkv.of(batch, p.first_key() + part.head * dk);
    const Rows<float> values = qkv.of(batch, p.first_value() + part.head * dv);
    const Rows<float> all = attended.of(batch, part.head * dv);
    const HeadRows<float> to{all.data + part.query * all.stride, dv, all.stride};
    const HeadRows<float> written = p.local.kernel == 0 ? to : HeadRows<float>{own, part.queries * dv, dv};
    softmax.forward(heads, {queries.data + part.query * queries.stride, dk, queries.stride},
                    {keys.data, dk, keys.stride}, {values.data, dv, values.stride}, written,
                    own + own_floats);
    for (int64_t h = 0; h < part.heads; ++h) {
      const Rows<float> rows = to.of(h);
      if (p.local.kernel != 0) passes.add(part.queries, dv, {written.of(h).data, written.stride}, rows);
      // An enlarged image is activated afterwards.
      if (p.activation != Activation::kNone && enlarged.tokens == 0) {
        passes.activate(p.activation, part.queries, dv, {rows.data, rows.stride}, rows);
      }
    }
  }

  void attend(const Parallel& parallel) const {
    const SoftmaxHeads& all = p.heads;
    const int64_t parts = all.talk() ? max(1, all.queries / kQueries) : all.heads;
    const int64_t channels = all.head_dim + all.value_dim + 20 + (all.talk() ? 2 * all.heads : 0);
    const int64_t work = all.heads * all.queries * all.keys * channels / parts;
    parallel(p.batch * parts, work, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) attend(unit / parts, Part(all, parts, unit % parts));
    });
  }

  void enlarge(const Parallel& parallel) const {
    if (enlarged.tokens == 0) return;
    const int64_t height = p.out_size.height, width = p.out_size.width;
    parallel(p.batch * height, 12 * width * p.values(), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / height, y = unit % height;
        const Rows<float> in = attended.of(b), image = enlarged.of(b);
        const Rows<float> row{image.data + y * width * image.stride, image.stride};
        passes.enlarge(p.values(), {in.data, in.stride}, p.query_size.height, p.query_size.width, y, height,
                       width, row);
        if (p.activation != Activation::kNone) {
          passes.activate(p.activation, width, p.values(), {row.data, row.stride}, row);
        }
      }
    });
  }
};

}  // namespace

void projected_attention(const ProjectedAttention& p, const Parallel& parallel) {
  if (p.batch * p.x_size.tokens() * p.out_size.tokens() * p.proj.outputs == 0) return;
  Call call(p);
  const int64_t floats = call.floats();
  const Floats large = floats > kKeptFloats ? aligned_floats(floats) : nullptr;  // kept by no thread
  call.lie_in(large ? large.get() : thread_scratch<Purpose::kBetweenThreads>(floats));
  call.x.load(call.x_memory, parallel);
  call.halve(parallel);
  call.project(parallel);
  call.attend(parallel);
  call.enlarge(parallel);
  const Batch& last = call.enlarged.tokens == 0 ? call.attended : call.enlarged;
  project_tokens(
      p.dtype, p.batch, last.tokens, p.proj, [&](int64_t b) { return last.of(b); }, p.out, parallel);
}

}  // namespace effattn::cpu
