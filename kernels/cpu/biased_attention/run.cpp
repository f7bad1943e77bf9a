// Images and heads in parallel; talking heads stay in one thread.
#include "plan.h"

#include <vector>

#include "../channels_last/ukernels.h"
#include "../softmax_attention/ukernels.h"

namespace effattn::cpu {
namespace {

constexpr int64_t kMaxParts = 8;             // into which the gradients that images share are split
constexpr int64_t kMaxPartFloats = 1 << 22;  // of all parts

// One head of one image.
Image head_of(DType dtype, const HeadsOperand& t, int64_t batch, int64_t head) {
  const Image heads{t.data, t.batch_stride, t.head_stride, t.token_stride};
  return {channels_from(dtype, heads, batch, head).data, 0, t.channel_stride, t.token_stride};
}

int64_t groups_of(const BiasedAttentionParams& p) { return p.heads.talking() ? 1 : p.heads.heads; }

// The heads of one image that are computed together.
SoftmaxHeads heads_of(const BiasedAttentionParams& p, int64_t group) {
  SoftmaxHeads heads = p.heads;
  if (!heads.talking()) {
    heads.heads = 1;
    heads.bias += group * heads.queries * heads.keys;
  }
  return heads;
}

// A thread at work on the heads of one image that are computed together.
class ThreadContext {
 public:
  ThreadContext(const BiasedAttentionParams& params, bool backward, Arena& arena)
      : p_(params), group_(heads_of(params, 0)) {
    const int64_t queries = group_.queries, keys = group_.keys, d = group_.head_dim, dv = group_.value_dim;
    q_ = rows(queries, d, arena);
    k_ = rows(keys, d, arena);
    v_ = rows(keys, dv, arena);
    out_ = rows(queries, dv, arena);
    if (backward) {
      grad_q_ = rows(queries, d, arena);
      grad_k_ = rows(keys, d, arena);
      grad_v_ = rows(keys, dv, arena);
    }
    scratch_ =
        arena.part(backward ? softmax_.scratch_floats_backward(group_) : softmax_.scratch_floats(group_));
  }

  void forward(int64_t batch, int64_t group) const {
    const HeadRows<float> out = in_place(p_.out, group_.value_dim) ? rows_of(p_.out, batch, group) : out_;
    softmax_.forward(heads_of(p_, group), load(p_.q, batch, group, group_.queries, group_.head_dim, q_),
                     load(p_.k, batch, group, group_.keys, group_.head_dim, k_),
                     load(p_.v, batch, group, group_.keys, group_.value_dim, v_), out, scratch_);
    store(out, p_.out, batch, group, group_.queries, group_.value_dim);
  }

  // grad_bias and grad_mix: of all heads, added to.
  void backward(int64_t batch, int64_t group, float* grad_bias, const TalkingHeads<float>& grad_mix) const {
    softmax_.backward(heads_of(p_, group), load(p_.q, batch, group, group_.queries, group_.head_dim, q_),
                      load(p_.k, batch, group, group_.keys, group_.head_dim, k_),
                      load(p_.v, batch, group, group_.keys, group_.value_dim, v_),
                      load(p_.grad_out, batch, group, group_.queries, group_.value_dim, out_),
                      {grad_q_, grad_k_, grad_v_, grad_bias + group * group_.queries * group_.keys, grad_mix},
                      scratch_);
    store(grad_q_, p_.grad_q, batch, group, group_.queries, group_.head_dim);
    store(grad_k_, p_.grad_k, batch, group, group_.keys, group_.head_dim);
    store(grad_v_, p_.grad_v, batch, group, group_.keys, group_.value_dim);
  }

 private:
  HeadRows<float> rows(int64_t tokens, int64_t channels, Arena& arena) const {
    const int64_t stride = round_up(channels, kWholeVectors);
    return {arena.floats(group_.heads * tokens * stride), tokens * stride, stride};
  }
  // Float rows of whole vectors are read and written in place.
  bool in_place(const HeadsOperand& t, int64_t channels) const {
    return p_.dtype == DType::kFloat32 && t.channel_stride == 1 && channels % kWholeVectors == 0;
  }
  HeadRows<float> rows_of(const HeadsOperand& t, int64_t batch, int64_t group) const {
    return {static_cast<float*>(t.data) + batch * t.batch_stride + group * t.head_stride, t.head_stride,
            t.token_stride};
  }
  HeadRows<const float> load(const HeadsOperand& t, int64_t batch, int64_t group, int64_t tokens,
                             int64_t channels, const HeadRows<float>& converted) const {
    if (in_place(t, channels)) return rows_of(t, batch, group);
    for (int64_t h = 0; h < group_.heads; ++h) {
      images_.load(p_.dtype, head_of(p_.dtype, t, batch, group + h), tokens, channels, converted.of(h));
    }
    return converted;
  }
  void store(const HeadRows<float>& from, const HeadsOperand& t, int64_t batch, int64_t group, int64_t tokens,
             int64_t channels) const {
    for (int64_t h = 0; h < group_.heads; ++h) {
      const Image to = head_of(p_.dtype, t, batch, group + h);
      if (to.data == from.of(h).data) continue;  // written in place
      images_.store(p_.dtype, to, tokens, channels, from.of(h));
    }
  }

  const BiasedAttentionParams& p_;
  const ChannelsLastUkernels& images_ = channels_last_ukernels();
  const SoftmaxUkernels& softmax_ = softmax_ukernels();
  const SoftmaxHeads group_;
  HeadRows<float> q_, k_, v_, out_, grad_q_, grad_k_, grad_v_;
  Arena scratch_;
};

int64_t work(const BiasedAttentionParams& p) {
  const SoftmaxHeads& heads = p.heads;
  const int64_t a_head = heads.queries * heads.keys * (heads.head_dim + heads.value_dim + 20);
  return max(1, a_head * (heads.talking() ? heads.heads : 1));
}

// Without keys there is nothing to attend to.
void clear_images(const BiasedAttentionParams& p, const HeadsOperand& t, int64_t tokens, int64_t channels) {
  const int64_t stride = round_up(channels, kWholeVectors);
  Arena arena = thread_arena(tokens * stride + Arena::kMaxOverhead);
  float* const zeros = arena.floats(tokens * stride);
  clear(zeros, tokens * stride);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads.heads; ++h) {
      channels_last_ukernels().store(p.dtype, head_of(p.dtype, t, b, h), tokens, channels, {zeros, stride});
    }
  }
}

// The gradients that images share, of a part of the images.
struct SharedGradients : PartialSums {
  float* bias;
  TalkingHeads<float> mix{};

  SharedGradients(const SoftmaxHeads& heads, Arena& arena)
      : bias(take(heads.heads * heads.queries * heads.keys, arena)) {
    if (!heads.talking()) return;
    const int64_t square = heads.heads * heads.heads;
    mix.logits = take(square, arena);
    mix.logits_bias = take(heads.heads, arena);
    mix.weights = take(square, arena);
    mix.weights_bias = take(heads.heads, arena);
  }
  void write(const BiasedAttentionParams& p) const {
    const int64_t heads = p.heads.heads, square = heads * heads;
    copy(p.grad_bias, bias, heads * p.heads.queries * p.heads.keys);
    if (!p.heads.talking()) return;
    copy(p.grad_mix.logits, mix.logits, square);
    copy(p.grad_mix.logits_bias, mix.logits_bias, heads);
    copy(p.grad_mix.weights, mix.weights, square);
    copy(p.grad_mix.weights_bias, mix.weights_bias, heads);
  }
};

struct SharedMemory {
  std::vector<SharedGradients> parts;
  SharedMemory(const SoftmaxHeads& heads, int64_t count, Arena& arena) {
    for (int64_t part = 0; part < count; ++part) parts.emplace_back(heads, arena);
  }
};

}  // namespace

void biased_attention(const BiasedAttentionParams& p, const Parallel& parallel) {
  const SoftmaxHeads& heads = p.heads;
  if (p.batch * heads.heads * heads.queries * heads.value_dim == 0) return;
  if (heads.keys == 0) return clear_images(p, p.out, heads.queries, heads.value_dim);
  const int64_t groups = groups_of(p);
  parallel(p.batch * groups, work(p), [&](int64_t begin, int64_t end) {
    const auto context = in_thread_arena<ThreadContext>(p, false);
    for (int64_t unit = begin; unit < end; ++unit) context.forward(unit / groups, unit % groups);
  });
}

void biased_attention_backward(const BiasedAttentionParams& p, const Parallel& parallel) {
  const SoftmaxHeads& heads = p.heads;
  const bool empty = p.batch * heads.heads * heads.queries * heads.keys == 0;
  // A function of the sizes alone.
  const int64_t part_floats =
      heads.heads * heads.queries * heads.keys + (heads.talking() ? 2 * heads.heads * (heads.heads + 1) : 0);
  const int64_t parts = max(1, min(p.batch, max(1, min(kMaxParts, kMaxPartFloats / max(1, part_floats)))));
  const InSharedArena<SharedMemory> shared(heads, parts);
  clear_all(shared->parts);
  if (empty && p.batch * heads.heads > 0) {
    clear_images(p, p.grad_q, heads.queries, heads.head_dim);
    clear_images(p, p.grad_k, heads.keys, heads.head_dim);
    clear_images(p, p.grad_v, heads.keys, heads.value_dim);
  }
  const int64_t groups = groups_of(p);
  parallel(empty ? 0 : parts * groups, max(kMinWorkPerThread, work(p) * p.batch / parts),
           [&](int64_t begin, int64_t end) {
             const auto context = in_thread_arena<ThreadContext>(p, true);
             for (int64_t unit = begin; unit < end; ++unit) {
               const int64_t part = unit / groups, group = unit % groups;
               for (int64_t b = part * p.batch / parts; b < (part + 1) * p.batch / parts; ++b) {
                 context.backward(b, group, shared->parts[part].bias, shared->parts[part].mix);
               }
             }
           });
  total(shared->parts).write(p);
}

}  // namespace effattn::cpu
