// The schedule: images and heads in parallel; heads that talk to each other stay in one thread.
#include "plan.h"

#include "../core/schedule.h"

namespace effattn::cpu {
namespace {

constexpr int64_t kMostParts = 8;             // into which the gradients that images share are split
constexpr int64_t kMostPartFloats = 1 << 22;  // of all parts

// A thread at work on the heads of one image that are computed together.
class Worker {
 public:
  Worker(const BiasedAttentionParams& problem, bool backward)
      : p_(problem),
        of_tiles_(channels_last_passes(active_isa())),
        passes_(softmax_passes(active_isa())),
        group_(heads_of(problem, 0)) {
    const int64_t d = round_up(group_.head_dim, kWholeVectors),
                  dv = round_up(group_.value_dim, kWholeVectors);
    rows_ = group_.heads * (group_.queries + group_.keys) * (d + dv) * (backward ? 2 : 1);
    scratch_ = backward ? passes_.scratch_floats_backward(group_) : passes_.scratch_floats(group_);
    next_ = thread_scratch(rows_ + scratch_);
  }

  static int64_t groups(const BiasedAttentionParams& p) { return p.heads.talk() ? 1 : p.heads.heads; }

  void forward(int64_t batch, int64_t group) {
    const SoftmaxHeads heads = heads_of(p_, group);
    float* const begin = next_;
    const auto q = take(p_.q, batch, group, heads.queries, heads.head_dim);
    const auto k = take(p_.k, batch, group, heads.keys, heads.head_dim);
    const auto v = take(p_.v, batch, group, heads.keys, heads.value_dim);
    const HeadRows<float> out = in_place(p_.out, heads.value_dim) ? where_it_lies(p_.out, batch, group)
                                                                  : rows(heads.queries, heads.value_dim);
    passes_.forward(heads, q, k, v, out, begin + rows_);
    give(out, p_.out, batch, group, heads.queries, heads.value_dim);
    next_ = begin;
  }

  // grad_bias and grad_mix: of all heads, added to.
  void backward(int64_t batch, int64_t group, float* grad_bias, const TalkingHeads<float>& grad_mix) {
    const SoftmaxHeads heads = heads_of(p_, group);
    float* const begin = next_;
    const auto q = take(p_.q, batch, group, heads.queries, heads.head_dim);
    const auto k = take(p_.k, batch, group, heads.keys, heads.head_dim);
    const auto v = take(p_.v, batch, group, heads.keys, heads.value_dim);
    const auto grad_out = take(p_.grad_out, batch, group, heads.queries, heads.value_dim);
    const SoftmaxGradients gradients{rows(heads.queries, heads.head_dim), rows(heads.keys, heads.head_dim),
                                     rows(heads.keys, heads.value_dim),
                                     grad_bias + group * heads.queries * heads.keys, grad_mix};
    passes_.backward(heads, q, k, v, grad_out, gradients, begin + rows_);
    give(gradients.q, p_.grad_q, batch, group, heads.queries, heads.head_dim);
    give(gradients.k, p_.grad_k, batch, group, heads.keys, heads.head_dim);
    give(gradients.v, p_.grad_v, batch, group, heads.keys, heads.value_dim);
    next_ = begin;
  }

 private:
  static SoftmaxHeads heads_of(const BiasedAttentionParams& p, int64_t group) {
    SoftmaxHeads heads = p.heads;
    if (!heads.talk()) {
      heads.heads = 1;
      heads.bias += group * heads.queries * heads.keys;
    }
    return heads;
  }

  // Float rows of whole vectors are read and written where they lie.
  bool in_place(const HeadsOperand& t, int64_t channels) const {
    return p_.dtype == DType::kFloat32 && t.channel_stride == 1 && channels % kWholeVectors == 0;
  }
  HeadRows<float> where_it_lies(const HeadsOperand& t, int64_t batch, int64_t group) const {
    return {static_cast<float*>(t.data) + batch * t.batch_stride + group * t.head_stride, t.head_stride,
            t.token_stride};
  }
  HeadRows<float> rows(int64_t tokens, int64_t channels) {
    const int64_t stride = round_up(channels, kWholeVectors);
    const HeadRows<float> all{next_, tokens * stride, stride};
    next_ += group_.heads * tokens * stride;
    return all;
  }
  // One head as an image.
  Image head(const HeadsOperand& t, int64_t batch, int64_t head) const {
    const Image heads{t.data, t.batch_stride, t.head_stride, t.token_stride};
    const Image one = channels_from(p_.dtype, heads, batch, head);
    return {one.data, 0, t.channel_stride, t.token_stride};
  }

  HeadRows<const float> take(const HeadsOperand& t, int64_t batch, int64_t group, int64_t tokens,
                             int64_t channels) {
    HeadRows<float> to;
    if (in_place(t, channels)) {
      to = where_it_lies(t, batch, group);
    } else {
      to = rows(tokens, channels);
      for (int64_t h = 0; h < group_.heads; ++h) {
        of_tiles_.load(p_.dtype, head(t, batch, group + h), tokens, channels, to.of(h));
      }
    }
    return {to.data, to.head_stride, to.stride};
  }
  void give(const HeadRows<float>& from, const HeadsOperand& t, int64_t batch, int64_t group, int64_t tokens,
            int64_t channels) const {
    for (int64_t h = 0; h < group_.heads; ++h) {
      const Image to = head(t, batch, group + h);
      if (to.data == from.of(h).data) continue;  // written where it lies
      of_tiles_.store(p_.dtype, to, tokens, channels, from.of(h));
    }
  }

  const BiasedAttentionParams& p_;
  const ChannelsLastPasses& of_tiles_;
  const SoftmaxPasses& passes_;
  const SoftmaxHeads group_;
  int64_t rows_, scratch_;
  float* next_;
};

int64_t work(const BiasedAttentionParams& p) {
  const SoftmaxHeads& heads = p.heads;
  const int64_t a_head = heads.queries * heads.keys * (heads.head_dim + heads.value_dim + 20);
  return max(1, a_head * (heads.talk() ? heads.heads : 1));
}

// Without keys there is nothing to attend to.
void clear_images(const BiasedAttentionParams& p, const HeadsOperand& t, int64_t tokens, int64_t channels) {
  const ChannelsLastPasses& passes = channels_last_passes(active_isa());
  const int64_t stride = round_up(channels, kWholeVectors);
  float* const zeros = thread_scratch(max(1, tokens * stride));
  clear(zeros, tokens * stride);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads.heads; ++h) {
      const Image all{t.data, t.batch_stride, t.head_stride, t.token_stride};
      const Image one = channels_from(p.dtype, all, b, h);
      passes.store(p.dtype, {one.data, 0, t.channel_stride, t.token_stride}, tokens, channels,
                   {zeros, stride});
    }
  }
}

}  // namespace

void biased_attention(const BiasedAttentionParams& p, const Parallel& parallel) {
  const SoftmaxHeads& heads = p.heads;
  if (p.batch * heads.heads * heads.queries * heads.value_dim == 0) return;
  if (heads.keys == 0) return clear_images(p, p.out, heads.queries, heads.value_dim);
  const int64_t groups = Worker::groups(p);
  parallel(p.batch * groups, work(p), [&](int64_t begin, int64_t end) {
    Worker worker(p, false);
    for (int64_t unit = begin; unit < end; ++unit) worker.forward(unit / groups, unit % groups);
  });
}

void biased_attention_backward(const BiasedAttentionParams& p, const Parallel& parallel) {
  const SoftmaxHeads& heads = p.heads;
  const int64_t of_bias = heads.heads * heads.queries * heads.keys;
  const int64_t of_mix = heads.talk() ? heads.heads * (heads.heads + 1) : 0;  // a matrix and its bias
  const auto clear_all = [&] {
    clear(p.grad_bias, of_bias);
    if (!heads.talk()) return;
    for (float* const matrix : {p.grad_mix.logits, p.grad_mix.weights})
      clear(matrix, heads.heads * heads.heads);
    for (float* const bias : {p.grad_mix.logits_bias, p.grad_mix.weights_bias}) clear(bias, heads.heads);
  };
  clear_all();
  if (p.batch * heads.heads == 0) return;
  if (heads.queries * heads.keys == 0) {
    clear_images(p, p.grad_q, heads.queries, heads.head_dim);
    clear_images(p, p.grad_k, heads.keys, heads.head_dim);
    return clear_images(p, p.grad_v, heads.keys, heads.value_dim);
  }
  // What all images share is summed up part by part, and parts in order: a function of the sizes alone.
  const int64_t part_floats = of_bias + 2 * of_mix;
  const int64_t parts = min(p.batch, max(1, min(kMostParts, kMostPartFloats / max(1, part_floats))));
  const Floats memory = aligned_floats(parts * part_floats);
  clear(memory.get(), parts * part_floats);
  const auto mix_of = [&](float* part) {
    const int64_t h = heads.heads;
    float* const first = part + of_bias;
    if (!heads.talk()) return TalkingHeads<float>{};
    return TalkingHeads<float>{first, first + h * h, first + of_mix, first + of_mix + h * h};
  };
  const int64_t groups = Worker::groups(p);
  parallel(parts * groups, max(kMinWorkPerThread, work(p) * p.batch / parts),
           [&](int64_t begin, int64_t end) {
             Worker worker(p, true);
             for (int64_t unit = begin; unit < end; ++unit) {
               const int64_t part = unit / groups, group = unit % groups;
               float* const sums = memory.get() + part * part_floats;
               for (int64_t b = part * p.batch / parts; b < (part + 1) * p.batch / parts; ++b) {
                 worker.backward(b, group, sums, mix_of(sums));
               }
             }
           });
  for (int64_t part = 0; part < parts; ++part) {
    float* const sums = memory.get() + part * part_floats;
    add(p.grad_bias, sums, of_bias);
    if (!heads.talk()) continue;
    const TalkingHeads<float> mix = mix_of(sums);
    add(p.grad_mix.logits, mix.logits, heads.heads * heads.heads);
    add(p.grad_mix.logits_bias, mix.logits_bias, heads.heads);
    add(p.grad_mix.weights, mix.weights, heads.heads * heads.heads);
    add(p.grad_mix.weights_bias, mix.weights_bias, heads.heads);
  }
}

}  // namespace effattn::cpu
