// Windows in parallel, each from its input through all heads; then, if asked for, the projection.
#include "launch.h"

namespace effattn::cpu {
namespace {

using namespace cascade;

// What a head makes of a window's tokens.
struct Tokens {
  Rows<float> feat, qkv, q;

  Tokens(const LaunchPlan& plan, Arena& arena)
      : feat(plan.rows(plan.d, arena)), qkv(plan.rows(plan.stride, arena)), q(plan.rows(plan.dk, arena)) {}
};

// A thread at work on one window after the other.
struct ThreadContext {
  const LaunchPlan& plan;
  Rows<float> out;
  PaddedImage padded;
  Arena scratch;

  ThreadContext(const LaunchPlan& of_call, int64_t scratch_floats, Arena& arena)
      : plan(of_call),
        out(plan.rows(plan.d, arena)),
        padded(plan.padded(arena)),
        scratch(arena.part(scratch_floats)) {}

  // `out` becomes the head's output; until then it is that of the head before.
  template <class X>
  void forward(const X& x, int64_t unit, int64_t h, const Weights& weights, const Tokens& t) const {
    const CascadeParams& p = plan.p;
    plan.load(x, h, unit, t.feat);
    if (h > 0) plan.ukernels.add(plan.tokens, plan.d, out, t.feat);
    plan.ukernels.project(plan.tokens, p.value_dim, plan.stride, features_of(t.feat),
                          {weights.qkv, plan.stride}, weights.bias, t.qkv, {});
    plan.ukernels.fill(t.qkv, padded);
    plan.ukernels.depthwise(p.kernels[h], padded, weights.taps, weights.tap_bias, t.q);
    plan.attend(h, t.q, t.qkv, out, scratch);
  }
};

struct ForwardContext : ThreadContext {
  Tokens tokens;
  ForwardContext(const LaunchPlan& of_call, Arena& arena)
      : ThreadContext(of_call, of_call.softmax.scratch_floats(of_call.heads(0)), arena),
        tokens(of_call, arena) {}
};

// The weights, and the input of the projection.
struct SharedMemory {
  LaidOutWeights weights;
  Batch attended;

  SharedMemory(const LaunchPlan& plan, bool projects, Arena& arena)
      : weights(plan, arena),
        attended(projects ? plan.p.batch : 0, plan.p.height * plan.p.width, spread_stride(plan.p.channels()),
                 arena) {}
};

int64_t work_of_a_window(const LaunchPlan& plan) {
  int64_t work = 0;
  for (int64_t h = 0; h < plan.p.heads; ++h) {
    work += plan.p.value_dim * plan.outputs() + plan.taps(h) * plan.p.key_dim +
            plan.tokens * (plan.p.key_dim + plan.p.value_dim + 20);
  }
  return max(1, work * plan.tokens);
}

}  // namespace

int64_t packed_floats(const CascadeParams& p) { return floats_of<PackedMemory>(LaunchPlan(p)); }

PackedHeads pack(const CascadeParams& p, float* memory) {
  const LaunchPlan plan(p);
  Arena arena(memory, packed_floats(p));
  const PackedMemory to(plan, arena);
  int64_t tap = 0;
  for (int64_t h = 0; h < p.heads; tap += plan.taps(h++)) {
    lay_out(plan, h,
            {to.qkv + h * p.value_dim * plan.stride, to.bias + h * plan.stride, to.taps + tap * plan.dk,
             to.tap_bias + h * plan.dk});
  }
  return {to.qkv, to.bias, to.taps, to.tap_bias};
}

void cascaded_group_attention(const CascadeParams& p, const ProjectionWeights* projection,
                              const Parallel& parallel) {
  const int64_t outputs = projection == nullptr ? p.channels() : projection->outputs;
  if (p.batch * p.height * p.width * outputs == 0) return;
  const LaunchPlan plan(p);
  const InSharedArena<SharedMemory> shared(plan, projection != nullptr);
  const std::vector<Weights> weights = shared->weights.take(plan, parallel);

  parallel(p.batch * p.windows(), work_of_a_window(plan), [&](int64_t begin, int64_t end) {
    const auto context = in_thread_arena<ForwardContext>(plan);
    clear(context.padded.data, context.padded.floats());
    for (int64_t unit = begin; unit < end; ++unit) {
      for (int64_t h = 0; h < p.heads; ++h) {
        context.forward(p.x, unit, h, weights[h], context.tokens);
        if (projection == nullptr) {
          plan.store(context.out, p.out, h, unit);
          continue;
        }
        const Rows<float> attended = shared->attended.of(unit / p.windows());
        plan.for_runs(unit % p.windows(), [&](int64_t token, int64_t of_image, int64_t count) {
          plan.ukernels.activate(Activation::kRelu, count, p.value_dim, context.out.from(token),
                                 attended.from(of_image, h * p.value_dim));
        });
      }
    }
  });
  if (projection == nullptr) return;
  project_tokens(p.dtype, p.batch, shared->attended, *projection, p.out, parallel);
}

void cascaded_group_attention(const CascadeParams& p, const CascadeBlocks& blocks, const Parallel& parallel) {
  const LaunchPlan plan(p);
  const std::vector<Weights> weights = plan.packed_weights();
  parallel(p.batch * p.windows(), work_of_a_window(plan), [&](int64_t begin, int64_t end) {
    const auto context = in_thread_arena<ForwardContext>(plan);
    clear(context.padded.data, context.padded.floats());
    const Rows<float>& activated = context.tokens.feat;  // free once the head is done
    for (int64_t unit = begin; unit < end; ++unit) {
      for (int64_t h = 0; h < p.heads; ++h) {
        context.forward(blocks.x, unit, h, weights[h], context.tokens);
        plan.ukernels.activate(blocks.activation, plan.tokens, plan.d, context.out, activated);
        plan.store(activated, blocks.out, h, unit);
      }
    }
  });
}

namespace {

// The gradients of all heads' weights, and of their biases on pairs of tokens.
struct Sums : PartialSums {
  std::vector<WeightSums> weights;
  float* bias;

  Sums(const LaunchPlan& plan, Arena& arena) {
    for (int64_t h = 0; h < plan.p.heads; ++h) weights.emplace_back(plan, plan.taps(h), *this, arena);
    bias = take(plan.p.heads * plan.tokens * plan.tokens, arena);
  }
};

struct SharedBackward {
  LaidOutWeights weights;
  BackwardWeights backward_weights;
  std::vector<Sums> parts;

  SharedBackward(const LaunchPlan& plan, int64_t part_count, Arena& arena)
      : weights(plan, arena), backward_weights(plan, arena) {
    for (int64_t part = 0; part < part_count; ++part) parts.emplace_back(plan, arena);
  }
};

// Every head's tokens, since the last head comes first.
struct BackwardContext : ThreadContext {
  std::vector<Tokens> tokens;
  Rows<float> grad_out, grad_q, grad_qkv, grad_feat;
  float* zeros;

  BackwardContext(const LaunchPlan& of_call, Arena& arena)
      : ThreadContext(of_call,
                      max(of_call.softmax.scratch_floats(of_call.heads(0)),
                          of_call.softmax.scratch_floats_backward(of_call.heads(0))),
                      arena),
        grad_out(plan.rows(plan.d, arena)),
        grad_q(plan.rows(plan.dk, arena)),
        grad_qkv(plan.rows(plan.stride, arena)),
        grad_feat(plan.rows(plan.d, arena)),
        zeros(arena.floats(plan.dk)) {
    for (int64_t h = 0; h < plan.p.heads; ++h) tokens.emplace_back(plan, arena);
  }

  void backward(int64_t unit, const std::vector<Weights>& weights, const BackwardWeights& backward_weights,
                const Sums& sums) const {
    const CascadeParams& p = plan.p;
    const ChannelsLastUkernels& ukernels = plan.ukernels;
    for (int64_t h = 0; h < p.heads; ++h) forward(p.x, unit, h, weights[h], tokens[h]);
    for (int64_t h = p.heads - 1; h >= 0; --h) {
      const Tokens& t = tokens[h];
      const WeightSums& into = sums.weights[h];
      plan.load(p.grad_out, h, unit, grad_out);
      if (h + 1 < p.heads) ukernels.add(plan.tokens, plan.d, grad_feat, grad_out);
      plan.attend_backward(h, t.q, t.qkv, grad_out, grad_q, grad_qkv,
                           sums.bias + h * plan.tokens * plan.tokens, scratch);
      ukernels.fill(t.qkv, padded);
      ukernels.depthwise_backward(p.kernels[h], padded, grad_q, into.taps, into.tap_bias);
      ukernels.fill(grad_q, padded);
      ukernels.depthwise(p.kernels[h], padded, backward_weights.heads[h].flipped, zeros, grad_qkv);
      into.project_backward(backward_weights.heads[h], t.feat, grad_qkv, grad_feat);
      plan.store(grad_feat, p.grad_x, h, unit);
    }
  }
};

}  // namespace

void cascaded_group_attention_backward(const CascadeParams& p, const Parallel& parallel) {
  const LaunchPlan plan(p);
  const int64_t units = p.height * p.width * p.channels() == 0 ? 0 : p.batch * p.windows();
  // A function of the sizes alone.
  const int64_t parts = max(1, min(min(units, kMaxSums), kMaxSumFloats / max(1, floats_of<Sums>(plan))));
  const InSharedArena<SharedBackward> shared(plan, parts);
  clear_all(shared->parts);
  if (units > 0) {
    const std::vector<Weights> weights = shared->weights.take(plan, parallel);
    shared->backward_weights.take(plan, weights);
    parallel(parts, max(kMinWorkPerThread, work_of_a_window(plan) * units / parts),
             [&](int64_t begin, int64_t end) {
               const auto context = in_thread_arena<BackwardContext>(plan);
               clear(context.padded.data, context.padded.floats());
               clear(context.zeros, plan.dk);
               for (int64_t part = begin; part < end; ++part) {
                 for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
                   context.backward(unit, weights, shared->backward_weights, shared->parts[part]);
                 }
               }
             });
  }
  const Sums& sums = total(shared->parts);
  for (int64_t h = 0; h < p.heads; ++h) sums.weights[h].finish(h, p.gradients[h]);
  copy(p.grad_bias, sums.bias, p.heads * plan.tokens * plan.tokens);
}

}  // namespace effattn::cpu
