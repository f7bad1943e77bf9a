// Head after head, each in stages over all windows in parallel, and BatchNorm's statistics between them.
#include <cmath>

#include "launch.h"

namespace effattn::cpu {
namespace {

using namespace cascade;

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

// A norm of one head, and its statistics, which are written forward and read backward.
struct HeadNorm {
  const Norm<const float>& norm;
  float *means, *variances;
  float eps;
};

HeadNorm qkv_norm(const CascadeTrainingParams& t, int64_t head) {
  const int64_t channels = 3 * t.cascade.key_dim + t.cascade.value_dim;
  float* const means = t.statistics + 2 * head * channels;
  return {t.norms[head].qkv, means, means + channels, t.qkv_eps[head]};
}
HeadNorm q_norm(const CascadeTrainingParams& t, int64_t head) {
  const int64_t outputs = 2 * t.cascade.key_dim + t.cascade.value_dim;
  const HeadNorm qkv = qkv_norm(t, head);
  return {t.norms[head].q, qkv.means + outputs, qkv.variances + outputs, t.q_eps[head]};
}

// A BatchNorm as micro-kernels apply it to rows, behind the projection (of q, k and v) or the convolution (of
// q); zeros where there is no channel.
struct BatchNorm {
  const LaunchPlan& plan;
  int parts;
  int64_t width;                          // of a row
  float *bn_gain, *shift, *mean;          // out = bn_gain * in + shift
  float *grad_gain, *slope, *grad_shift;  // grad_in = grad_gain * grad + slope * in + grad_shift

  BatchNorm(const LaunchPlan& of_call, int part_count, int64_t of_width, Arena& arena)
      : plan(of_call), parts(part_count), width(of_width) {
    for (float** const row : {&bn_gain, &shift, &mean, &grad_gain, &slope, &grad_shift}) {
      *row = arena.floats(width);
    }
  }

  void take(const HeadNorm& n) const {
    for (float* const row : {bn_gain, shift, mean}) clear(row, width);
    for_channels([&](int64_t c, int64_t o) {
      bn_gain[c] = n.norm.weight[o] / std::sqrt(n.variances[o] + n.eps);
      shift[c] = n.norm.bias[o] - n.means[o] * bn_gain[c];
      mean[c] = n.means[o];
    });
  }

  // Means and variances of all windows from the moments of each, in order.
  void combine_moments(int64_t units, const float* moments, const HeadNorm& n) const {
    std::vector<double> means(width), squares(width);
    for (int64_t u = 0; u < units; ++u) {
      const float *const other = moments + 2 * u * width, *const other_squares = other + width;
      const double share = 1.0 / static_cast<double>(u + 1);
      const double before = static_cast<double>(u * plan.tokens) * share;
      for (int64_t c = 0; c < width; ++c) {
        const double apart = other[c] - means[c];
        squares[c] += other_squares[c] + apart * apart * before;
        means[c] += apart * share;
      }
    }
    for_channels([&](int64_t c, int64_t o) {
      n.means[o] = static_cast<float>(means[c]);
      n.variances[o] = static_cast<float>(squares[c] / static_cast<double>(units * plan.tokens));
    });
    take(n);
  }

  // `count`: of the tokens.
  void take_backward(const HeadNorm& n, double count, const std::vector<Part>& all, NormSums Part::* sums,
                     const Norm<float>& gradient) const {
    for (float* const row : {grad_gain, slope, grad_shift}) clear(row, width);
    for_channels([&](int64_t c, int64_t o) {
      double grad = 0, product = 0;
      for (const Part& part : all) {
        grad += (part.*sums).grads[c];
        product += (part.*sums).products[c];
      }
      const double inverse = 1 / std::sqrt(static_cast<double>(n.variances[o]) + n.eps);
      const double gain = n.norm.weight[o] * inverse, by_input = -gain * inverse * inverse * product / count;
      grad_gain[c] = static_cast<float>(gain);
      slope[c] = static_cast<float>(by_input);
      grad_shift[c] = static_cast<float>(-gain * grad / count - by_input * n.means[o]);
      gradient.weight[o] = static_cast<float>(product * inverse);
      gradient.bias[o] = static_cast<float>(grad);
    });
  }

  void forward(int64_t channels, const Rows<float>& in, const Rows<float>& out) const {
    plan.ukernels.affine(plan.tokens, channels, bn_gain, in, nullptr, {nullptr, 0}, shift, out);
  }
  // `in`: of the norm; grad becomes its gradient.
  void backward(const Rows<float>& in, const Rows<float>& grad) const {
    plan.ukernels.affine(plan.tokens, width, grad_gain, grad, slope, in, grad_shift, grad);
  }
  void sum_gradients(const Rows<float>& grad, const Rows<float>& in, const NormSums& sums) const {
    plan.ukernels.sum_gradients(plan.tokens, width, grad, in, mean, sums.grads, sums.products);
  }

 private:
  // f(channel of a row, output)
  template <class F>
  void for_channels(const F& f) const {
    for (int part = 0; part < parts; ++part) {
      for (int64_t c = 0; c < plan.size(part); ++c) f(plan.first(part) + c, plan.first_output(part) + c);
    }
  }
};

// What all threads see in both directions: the results of the stages, of the head at hand.
struct Stages {
  const CascadeTrainingParams& t;
  const CascadeParams& p;
  const LaunchPlan& plan;
  const ChannelsLastUkernels& ukernels;
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
        units(p.batch * p.windows()),
        unit_work(plan.tokens * p.value_dim * plan.outputs()),
        weights(plan, arena),
        qkv(plan, kParts, plan.stride, arena),
        q(plan, 1, plan.dk, arena),
        projected(units, plan.tokens, plan.stride, arena),
        convolved(units, plan.tokens, plan.dk, arena),
        zeros(arena.floats(plan.stride)) {}

  // x's channels of a head, and the output of the head before.
  template <class Before>
  void project(int64_t head, int64_t unit, const Weights& of_head, const Rows<float>& feat,
               const Before& add_before) const {
    plan.load(p.x, head, unit, feat);
    if (head > 0) add_before();
    ukernels.project(plan.tokens, p.value_dim, plan.stride, features_of(feat), {of_head.qkv, plan.stride},
                     zeros, projected.of(unit), {});
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
  Batch feat, grad_q, grad_qkv, grad_feat;
  std::vector<Part> parts;

  BackwardStages(const CascadeTrainingParams& params, const LaunchPlan& of_call, int64_t part_count,
                 Arena& arena)
      : Stages(params, of_call, arena),
        backward_weights(plan, arena),
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
    parallel(m.units, m.unit_work, [&](int64_t begin, int64_t end) {
      const auto context = in_thread_arena<ForwardContext>(plan);
      for (int64_t u = begin; u < end; ++u) {
        m.project(h, u, weights[h], context.feat,
                  [&] { ukernels.add(plan.tokens, plan.d, m.outs.of(u), context.feat); });
        float* const moments = m.qkv_moments + 2 * u * plan.stride;
        ukernels.moments(plan.tokens, plan.stride, m.projected.of(u), moments, moments + plan.stride);
      }
    });
    m.qkv.combine_moments(m.units, m.qkv_moments, qkv_norm(t, h));
    parallel(m.units, m.unit_work, [&](int64_t begin, int64_t end) {
      const auto context = in_thread_arena<ForwardContext>(plan);
      clear(context.padded.data, context.padded.floats());
      for (int64_t u = begin; u < end; ++u) {
        const Rows<float> qkv = m.projected.of(u);
        m.qkv.forward(plan.stride, qkv, qkv);
        m.convolve(h, u, weights[h], qkv, context.padded);
        float* const moments = m.q_moments + 2 * u * plan.dk;
        ukernels.moments(plan.tokens, plan.dk, m.convolved.of(u), moments, moments + plan.dk);
      }
    });
    m.q.combine_moments(m.units, m.q_moments, q_norm(t, h));
    parallel(m.units, m.unit_work, [&](int64_t begin, int64_t end) {
      const auto context = in_thread_arena<ForwardContext>(plan);
      for (int64_t u = begin; u < end; ++u) {
        const Rows<float> q = m.convolved.of(u), out = m.outs.of(u);
        m.q.forward(plan.dk, q, q);
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
    m.qkv.take(qkv_norm(t, h));
    m.q.take(q_norm(t, h));
    clear_all(m.parts);

    // Forward once more, and back through the attention.
    for_units([&](const BackwardContext& context, const Part& part, int64_t u) {
      const auto& [own, qkv, q, padded, scratch] = context;
      const Rows<float> feat = m.feat.of(u), grad_q = m.grad_q.of(u);
      m.project(h, u, weights[h], feat, [&] {
        plan.load(p.out, h - 1, u, context.own);
        ukernels.add(plan.tokens, plan.d, context.own, feat);
      });
      m.qkv.forward(plan.stride, m.projected.of(u), qkv);
      m.convolve(h, u, weights[h], qkv, padded);
      m.q.forward(plan.dk, m.convolved.of(u), q);
      plan.load(p.grad_out, h, u, own);
      if (h + 1 < p.heads) ukernels.add(plan.tokens, plan.d, m.grad_feat.of(u), own);
      plan.attend_backward(h, q, qkv, own, grad_q, m.grad_qkv.of(u), part.bias, scratch);
      m.q.sum_gradients(grad_q, m.convolved.of(u), part.q);
    });
    m.q.take_backward(q_norm(t, h), count, m.parts, &Part::q, t.norm_gradients[h].q);

    // Back through the depthwise convolution and its norm.
    for_units([&](const BackwardContext& context, const Part& part, int64_t u) {
      const Rows<float> grad_q = m.grad_q.of(u), grad = m.grad_qkv.of(u);
      m.q.backward(m.convolved.of(u), grad_q);
      m.qkv.forward(plan.dk, m.projected.of(u), context.q);
      ukernels.fill(context.q, context.padded);
      ukernels.depthwise_backward(p.kernels[h], context.padded, grad_q, part.weights.taps,
                                  part.weights.tap_bias);
      ukernels.fill(grad_q, context.padded);
      ukernels.depthwise(p.kernels[h], context.padded, m.backward_weights.heads[h].flipped, m.zeros, grad);
      m.qkv.sum_gradients(grad, m.projected.of(u), part.qkv);
    });
    m.qkv.take_backward(qkv_norm(t, h), count, m.parts, &Part::qkv, t.norm_gradients[h].qkv);

    // Back through the projection and its norm.
    for_units([&](const BackwardContext&, const Part& part, int64_t u) {
      const Rows<float> grad = m.grad_qkv.of(u);
      m.qkv.backward(m.projected.of(u), grad);
      part.weights.project_backward(m.backward_weights.heads[h], m.feat.of(u), grad, m.grad_feat.of(u));
      plan.store(m.grad_feat.of(u), p.grad_x, h, u);
    });
    const Part& sums = total(m.parts);
    copy(p.grad_bias + h * pairs, sums.bias, pairs);
    sums.weights.finish(h, p.gradients[h]);
  }
}

}  // namespace effattn::cpu
