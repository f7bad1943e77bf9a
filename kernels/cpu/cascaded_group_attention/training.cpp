// Head after head, each in stages over all windows in parallel, and BatchNorm's statistics between them.
#include <cmath>

#include "launch.h"

namespace effattn::cpu {
namespace {

using namespace cascade;

// BatchNorm of one head's projection or convolution: its channels as they stand in rows, in parts.
struct NormLayout {
  int64_t width;  // of a row
  int64_t parts;  // q, k and v, or one
  int64_t first[kParts], size[kParts], first_output[kParts];

  static NormLayout of_qkv(const LaunchPlan& plan) {
    NormLayout n{plan.stride, kParts, {}, {}, {}};
    for (int part = 0; part < kParts; ++part) {
      n.first[part] = plan.first(part);
      n.size[part] = plan.size(part);
      n.first_output[part] = plan.first_output(part);
    }
    return n;
  }
  static NormLayout of_q(const LaunchPlan& plan) { return {plan.dk, 1, {0}, {plan.p.key_dim}, {0}}; }

  int64_t outputs() const { return first_output[parts - 1] + size[parts - 1]; }
  // f(channel of a row, output)
  template <class F>
  void each(const F& f) const {
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t c = 0; c < size[part]; ++c) f(first[part] + c, first_output[part] + c);
    }
  }
};

// A BatchNorm as micro-kernels apply it, and its mean; zeros where there is no channel.
struct BatchNorm {
  float *bn_gain, *shift, *mean;
  BatchNorm(const NormLayout& n, Arena& arena)
      : bn_gain(arena.floats(n.width)), shift(arena.floats(n.width)), mean(arena.floats(n.width)) {}

  void take(const NormLayout& n, const Norm<const float>& norm, const float* means, const float* variances,
            float eps) const {
    for (float* const row : {bn_gain, shift, mean}) clear(row, n.width);
    n.each([&](int64_t c, int64_t o) {
      bn_gain[c] = norm.weight[o] / std::sqrt(variances[o] + eps);
      shift[c] = norm.bias[o] - means[o] * bn_gain[c];
      mean[c] = means[o];
    });
  }
};

// Means and variances of all windows from those of each, in order.
void combine_moments(const NormLayout& n, int64_t units, int64_t tokens, const float* of_units, float* means,
                     float* variances) {
  std::vector<double> mean(n.width), squares(n.width);
  for (int64_t u = 0; u < units; ++u) {
    const float *const other = of_units + 2 * u * n.width, *const other_squares = other + n.width;
    const double share = 1.0 / static_cast<double>(u + 1), before = static_cast<double>(u * tokens) * share;
    for (int64_t c = 0; c < n.width; ++c) {
      const double apart = other[c] - mean[c];
      squares[c] += other_squares[c] + apart * apart * before;
      mean[c] += apart * share;
    }
  }
  n.each([&](int64_t c, int64_t o) {
    means[o] = static_cast<float>(mean[c]);
    variances[o] = static_cast<float>(squares[c] / static_cast<double>(units * tokens));
  });
}

// Of a part of the windows: sums of a norm's gradients and of their products with what is above the mean.
struct NormSums {
  float *grads, *products;
};

// What a part of the windows adds to a head's gradients.
struct Part : PartialSums {
  float* bias;  // on pairs of tokens
  NormSums qkv, q;
  WeightSums weights;

  Part(const LaunchPlan& plan, Arena& arena)
      : bias(take(plan.tokens * plan.tokens, arena)),
        qkv{take(plan.stride, arena), take(plan.stride, arena)},
        q{take(plan.dk, arena), take(plan.dk, arena)},
        weights(plan, plan.max_taps(), *this, arena) {}
};

// The gradient of a BatchNorm's input: bn_gain * grad + slope * input + shift. And those of its weight and
// bias.
struct NormBackward {
  float *bn_gain, *slope, *shift;
  NormBackward(const NormLayout& n, Arena& arena)
      : bn_gain(arena.floats(n.width)), slope(arena.floats(n.width)), shift(arena.floats(n.width)) {}

  void take(const NormLayout& n, const Norm<const float>& norm, const Norm<float>& gradient,
            const float* means, const float* variances, float eps, double count,
            const std::vector<Part>& parts, NormSums Part::* sums) const {
    for (float* const row : {bn_gain, slope, shift}) clear(row, n.width);
    n.each([&](int64_t c, int64_t o) {
      double grad = 0, product = 0;
      for (const Part& part : parts) {
        grad += (part.*sums).grads[c];
        product += (part.*sums).products[c];
      }
      const double inverse = 1 / std::sqrt(static_cast<double>(variances[o]) + eps);
      const double gain = norm.weight[o] * inverse, by_input = -gain * inverse * inverse * product / count;
      bn_gain[c] = static_cast<float>(gain);
      slope[c] = static_cast<float>(by_input);
      shift[c] = static_cast<float>(-gain * grad / count - by_input * means[o]);
      gradient.weight[o] = static_cast<float>(product * inverse);
      gradient.bias[o] = static_cast<float>(grad);
    });
  }
};

// A head's statistics in what the forward pass hands on.
struct Statistics {
  float *means, *variances;
  int64_t outputs;
  Statistics(const CascadeTrainingParams& t, int64_t head) {
    const int64_t of_head = 2 * t.cascade.key_dim + t.cascade.value_dim + t.cascade.key_dim;
    outputs = 2 * t.cascade.key_dim + t.cascade.value_dim;
    means = t.statistics + 2 * head * of_head;
    variances = means + of_head;
  }
  float* q_means() const { return means + outputs; }
  float* q_variances() const { return variances + outputs; }
};

// What all threads see in both directions: the results of the stages, of the head at hand.
struct Stages {
  const CascadeTrainingParams& t;
  const CascadeParams& p;
  const LaunchPlan& plan;
  const ChannelsLastUkernels& ukernels;
  const NormLayout qkv_norm, q_norm;
  const int64_t units, unit_work;
  LaidOutWeights weights;
  BatchNorm qkv, q;
  Batch projected, convolved;  // of every window, before their norms
  float* zeros;                // in place of biases

  Stages(const CascadeTrainingParams& params, const LaunchPlan& of_call, Arena& arena)
      : t(params),
        p(params.cascade),
        plan(of_call),
        ukernels(plan.ukernels),
        qkv_norm(NormLayout::of_qkv(plan)),
        q_norm(NormLayout::of_q(plan)),
        units(p.batch * p.windows()),
        unit_work(plan.tokens * p.value_dim * plan.outputs()),
        weights(plan, arena),
        qkv(qkv_norm, arena),
        q(q_norm, arena),
        projected(units, plan.tokens, plan.stride, arena),
        convolved(units, plan.tokens, plan.dk, arena),
        zeros(arena.floats(plan.stride)) {}

  void take_qkv_norm(int64_t head, const Statistics& s) const {
    qkv.take(qkv_norm, t.norms[head].qkv, s.means, s.variances, t.qkv_eps[head]);
  }
  void take_q_norm(int64_t head, const Statistics& s) const {
    q.take(q_norm, t.norms[head].q, s.q_means(), s.q_variances(), t.q_eps[head]);
  }
  // x's channels of a head, and the output of the head before.
  template <class Before>
  void project(int64_t head, int64_t unit, const Weights& of_head, const Rows<float>& feat,
               const Before& add_before) const {
    plan.load(p.x, head, unit, feat);
    if (head > 0) add_before();
    ukernels.project(plan.tokens, p.value_dim, plan.stride, features_of(feat), {of_head.qkv, plan.stride},
                     zeros, projected.of(unit), {});
  }
  void normalise(const BatchNorm& norm, int64_t channels, const Rows<float>& in,
                 const Rows<float>& out) const {
    ukernels.affine(plan.tokens, channels, norm.bn_gain, in, nullptr, {nullptr, 0}, norm.shift, out);
  }
  void convolve(int64_t head, int64_t unit, const Weights& of_head, const Rows<float>& in,
                const PaddedImage& padded) const {
    ukernels.fill(in, padded);
    ukernels.depthwise(p.kernels[head], padded, of_head.taps, zeros, convolved.of(unit));
  }
};

struct ForwardStages : Stages {
  Batch outs;
  float *qkv_moments, *q_moments;  // of every window, means and squares

  ForwardStages(const CascadeTrainingParams& params, const LaunchPlan& of_call, Arena& arena)
      : Stages(params, of_call, arena),
        outs(units, plan.tokens, plan.d, arena),
        qkv_moments(arena.floats(2 * units * plan.stride)),
        q_moments(arena.floats(2 * units * plan.dk)) {}
};

struct ForwardContext {
  Rows<float> feat;
  PaddedImage padded;
  Arena scratch;
  ForwardContext(const LaunchPlan& plan, Arena& arena)
      : feat(plan.rows(plan.d, arena)),
        padded(plan.padded(arena)),
        scratch(arena.part(plan.softmax.scratch_floats(plan.heads(0)))) {}
};

struct BackwardStages : Stages {
  BackwardWeights backward_weights;
  NormBackward qkv_backward, q_backward;
  Batch feat, grad_q, grad_qkv, grad_feat;
  std::vector<Part> parts;

  BackwardStages(const CascadeTrainingParams& params, const LaunchPlan& of_call, int64_t part_count,
                 Arena& arena)
      : Stages(params, of_call, arena),
        backward_weights(plan, arena),
        qkv_backward(qkv_norm, arena),
        q_backward(q_norm, arena),
        feat(units, plan.tokens, plan.d, arena),
        grad_q(units, plan.tokens, plan.dk, arena),
        grad_qkv(units, plan.tokens, plan.stride, arena),
        grad_feat(units, plan.tokens, plan.d, arena) {
    for (int64_t part = 0; part < part_count; ++part) parts.emplace_back(plan, arena);
  }
};

struct BackwardContext {
  Rows<float> own, qkv, q;
  PaddedImage padded;
  Arena scratch;
  BackwardContext(const LaunchPlan& plan, Arena& arena)
      : own(plan.rows(plan.d, arena)),
        qkv(plan.rows(plan.stride, arena)),
        q(plan.rows(plan.dk, arena)),
        padded(plan.padded(arena)),
        scratch(arena.part(plan.softmax.scratch_floats_backward(plan.heads(0)))) {}
};

}  // namespace

void cascade_training(const CascadeTrainingParams& t, const Parallel& parallel) {
  const CascadeParams& p = t.cascade;
  const LaunchPlan plan(p);
  const ChannelsLastUkernels& ukernels = plan.ukernels;
  if (p.batch * p.windows() * plan.tokens == 0) return;
  const InSharedArena<ForwardStages> shared(t, plan);
  const ForwardStages& m = *shared;
  clear(m.zeros, plan.stride);
  const std::vector<Weights> weights = m.weights.take(plan, parallel);

  for (int64_t h = 0; h < p.heads; ++h) {
    const Statistics statistics(t, h);
    parallel(m.units, m.unit_work, [&](int64_t begin, int64_t end) {
      const auto context = in_thread_arena<ForwardContext>(plan);
      for (int64_t u = begin; u < end; ++u) {
        m.project(h, u, weights[h], context.feat,
                  [&] { ukernels.add(plan.tokens, plan.d, m.outs.of(u), context.feat); });
        float* const moments = m.qkv_moments + 2 * u * plan.stride;
        ukernels.moments(plan.tokens, plan.stride, m.projected.of(u), moments, moments + plan.stride);
      }
    });
    combine_moments(m.qkv_norm, m.units, plan.tokens, m.qkv_moments, statistics.means, statistics.variances);
    m.take_qkv_norm(h, statistics);
    parallel(m.units, m.unit_work, [&](int64_t begin, int64_t end) {
      const auto context = in_thread_arena<ForwardContext>(plan);
      clear(context.padded.data, context.padded.floats());
      for (int64_t u = begin; u < end; ++u) {
        const Rows<float> qkv = m.projected.of(u);
        m.normalise(m.qkv, plan.stride, qkv, qkv);
        m.convolve(h, u, weights[h], qkv, context.padded);
        float* const moments = m.q_moments + 2 * u * plan.dk;
        ukernels.moments(plan.tokens, plan.dk, m.convolved.of(u), moments, moments + plan.dk);
      }
    });
    combine_moments(m.q_norm, m.units, plan.tokens, m.q_moments, statistics.q_means(),
                    statistics.q_variances());
    m.take_q_norm(h, statistics);
    parallel(m.units, m.unit_work, [&](int64_t begin, int64_t end) {
      const auto context = in_thread_arena<ForwardContext>(plan);
      for (int64_t u = begin; u < end; ++u) {
        const Rows<float> q = m.convolved.of(u), out = m.outs.of(u);
        m.normalise(m.q, plan.dk, q, q);
        plan.attend(h, q, m.projected.of(u), out, context.scratch);
        plan.store(out, p.out, h, u);
      }
    });
  }
}

void cascade_training_backward(const CascadeTrainingParams& t, const Parallel& parallel) {
  const CascadeParams& p = t.cascade;
  const LaunchPlan plan(p);
  const ChannelsLastUkernels& ukernels = plan.ukernels;
  const int64_t units = p.batch * p.windows(), pairs = plan.tokens * plan.tokens;
  if (units * plan.tokens == 0) return;
  // A function of the sizes alone.
  const int64_t part_floats = pairs + 3 * plan.stride + plan.outputs() * plan.d;
  const int64_t parts = max(1, min(min(units, kMaxSums), kMaxSumFloats / part_floats));
  const InSharedArena<BackwardStages> shared(t, plan, parts);
  const BackwardStages& m = *shared;
  clear(m.zeros, plan.stride);
  const std::vector<Weights> weights = m.weights.take(plan, parallel);
  m.backward_weights.take(plan, weights);
  const double count = static_cast<double>(units) * static_cast<double>(plan.tokens);
  // f(context, part, unit) for all units, the parts in parallel.
  const auto for_units = [&](const auto& f) {
    parallel(parts, max(kMinWorkPerThread, m.unit_work * units / parts), [&](int64_t begin, int64_t end) {
      const auto context = in_thread_arena<BackwardContext>(plan);
      clear(context.padded.data, context.padded.floats());
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t u = part * units / parts; u < (part + 1) * units / parts; ++u)
          f(context, m.parts[part], u);
      }
    });
  };

  for (int64_t h = p.heads - 1; h >= 0; --h) {
    const Statistics statistics(t, h);
    m.take_qkv_norm(h, statistics);
    m.take_q_norm(h, statistics);
    clear_all(m.parts);

    // Forward once more, and back through the attention.
    for_units([&](const BackwardContext& context, const Part& part, int64_t u) {
      const auto& [own, qkv, q, padded, scratch] = context;
      const Rows<float> feat = m.feat.of(u), grad_q = m.grad_q.of(u);
      m.project(h, u, weights[h], feat, [&] {
        plan.load(p.out, h - 1, u, context.own);
        ukernels.add(plan.tokens, plan.d, context.own, feat);
      });
      m.normalise(m.qkv, plan.stride, m.projected.of(u), qkv);
      m.convolve(h, u, weights[h], qkv, padded);
      m.normalise(m.q, plan.dk, m.convolved.of(u), q);
      plan.load(p.grad_out, h, u, own);
      if (h + 1 < p.heads) ukernels.add(plan.tokens, plan.d, m.grad_feat.of(u), own);
      plan.attend_backward(h, q, qkv, own, grad_q, m.grad_qkv.of(u), part.bias, scratch);
      ukernels.sum_gradients(plan.tokens, plan.dk, grad_q, m.convolved.of(u), m.q.mean, part.q.grads,
                             part.q.products);
    });
    m.q_backward.take(m.q_norm, t.norms[h].q, t.norm_gradients[h].q, statistics.q_means(),
                      statistics.q_variances(), t.q_eps[h], count, m.parts, &Part::q);

    // Back through the depthwise convolution and its norm.
    for_units([&](const BackwardContext& context, const Part& part, int64_t u) {
      const Rows<float> grad_q = m.grad_q.of(u), grad = m.grad_qkv.of(u);
      ukernels.affine(plan.tokens, plan.dk, m.q_backward.bn_gain, grad_q, m.q_backward.slope,
                      m.convolved.of(u), m.q_backward.shift, grad_q);
      m.normalise(m.qkv, plan.dk, m.projected.of(u), context.q);
      ukernels.fill(context.q, context.padded);
      ukernels.depthwise_backward(p.kernels[h], context.padded, grad_q, part.weights.taps,
                                  part.weights.tap_bias);
      ukernels.fill(grad_q, context.padded);
      ukernels.depthwise(p.kernels[h], context.padded, m.backward_weights.heads[h].flipped, m.zeros, grad);
      ukernels.sum_gradients(plan.tokens, plan.stride, grad, m.projected.of(u), m.qkv.mean, part.qkv.grads,
                             part.qkv.products);
    });
    m.qkv_backward.take(m.qkv_norm, t.norms[h].qkv, t.norm_gradients[h].qkv, statistics.means,
                        statistics.variances, t.qkv_eps[h], count, m.parts, &Part::qkv);

    // Back through the projection and its norm.
    for_units([&](const BackwardContext&, const Part& part, int64_t u) {
      const Rows<float> grad = m.grad_qkv.of(u);
      ukernels.affine(plan.tokens, plan.stride, m.qkv_backward.bn_gain, grad, m.qkv_backward.slope,
                      m.projected.of(u), m.qkv_backward.shift, grad);
      part.weights.project_backward(m.backward_weights.heads[h], m.feat.of(u), grad, m.grad_feat.of(u));
      plan.store(m.grad_feat.of(u), p.grad_x, h, u);
    });
    const Part& sums = total(m.parts);
    copy(p.grad_bias + h * pairs, sums.bias, pairs);
    sums.weights.finish(h, p.gradients[h]);
  }
}

}  // namespace effattn::cpu
