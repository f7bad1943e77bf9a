// The schedule: head after head, each in passes over all windows in parallel, and BatchNorm's statistics
// between them.
#include "training.h"

#include <cmath>

#include "window.h"

namespace effattn::cpu {
namespace {

using namespace cascade;

// What lies between the passes: rows of every window, a window after the other.
struct Windows {
  float* data;
  int64_t tokens, stride;
  Rows<float> of(int64_t unit) const { return {data + unit * tokens * stride, stride}; }
};

Rows<const float> read(const Rows<float>& rows) { return {rows.data, rows.stride}; }

// BatchNorm of one head's projection or convolution: its channels as they stand in rows, in parts.
struct NormLayout {
  int64_t width;  // of a row
  int64_t parts;  // q, k and v, or one
  int64_t first[kParts], size[kParts], first_output[kParts];

  static NormLayout of_qkv(const Layout& of) {
    NormLayout n{of.stride, kParts, {}, {}, {}};
    for (int part = 0; part < kParts; ++part) {
      n.first[part] = of.first(part);
      n.size[part] = of.size(part);
      n.first_output[part] = of.first_output(part);
    }
    return n;
  }
  static NormLayout of_q(const Layout& of) { return {of.dk, 1, {0}, {of.p.key_dim}, {0}}; }

  int64_t outputs() const { return first_output[parts - 1] + size[parts - 1]; }
  // f(channel of a row, output)
  template <class F>
  void each(const F& f) const {
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t c = 0; c < size[part]; ++c) f(first[part] + c, first_output[part] + c);
    }
  }
};

// A BatchNorm as the passes apply it: scale and shift, and its mean; zeros where there is no channel.
struct Applied {
  float *scale, *shift, *mean;
  Applied(const NormLayout& n, Pieces& memory)
      : scale(memory.floats(n.width)), shift(memory.floats(n.width)), mean(memory.floats(n.width)) {}

  void take(const NormLayout& n, const Norm<const float>& norm, const float* means, const float* variances,
            float eps) const {
    for (float* const row : {scale, shift, mean}) clear(row, n.width);
    n.each([&](int64_t c, int64_t o) {
      scale[c] = norm.weight[o] / std::sqrt(variances[o] + eps);
      shift[c] = norm.bias[o] - means[o] * scale[c];
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

// The gradient of a BatchNorm's input: by * grad + other_by * input + shift. And those of its weight and
// bias.
struct NormBackward {
  float *by, *other_by, *shift;
  NormBackward(const NormLayout& n, Pieces& memory)
      : by(memory.floats(n.width)), other_by(memory.floats(n.width)), shift(memory.floats(n.width)) {}

  // sums: of every part, rows of sums of gradients and of their products with what is above the mean.
  void take(const NormLayout& n, const Norm<const float>& norm, const Norm<float>& gradient,
            const float* means, const float* variances, float eps, double count, const float* sums,
            int64_t parts, int64_t part_stride) const {
    for (float* const row : {by, other_by, shift}) clear(row, n.width);
    n.each([&](int64_t c, int64_t o) {
      double grad = 0, product = 0;
      for (int64_t part = 0; part < parts; ++part) {
        grad += sums[part * part_stride + c];
        product += sums[part * part_stride + n.width + c];
      }
      const double inverse = 1 / std::sqrt(static_cast<double>(variances[o]) + eps);
      const double scale = norm.weight[o] * inverse, slope = -scale * inverse * inverse * product / count;
      by[c] = static_cast<float>(scale);
      other_by[c] = static_cast<float>(slope);
      shift[c] = static_cast<float>(-scale * grad / count - slope * means[o]);
      gradient.weight[o] = static_cast<float>(product * inverse);
      gradient.bias[o] = static_cast<float>(grad);
    });
  }
};

// A head's statistics in what the forward pass hands on.
struct Statistics {
  float *means, *variances;
  int64_t outputs;
  Statistics(const CascadeTraining& t, int64_t head) {
    const int64_t of_head = 2 * t.cascade.key_dim + t.cascade.value_dim + t.cascade.key_dim;
    outputs = 2 * t.cascade.key_dim + t.cascade.value_dim;
    means = t.statistics + 2 * head * of_head;
    variances = means + of_head;
  }
  float* q_means() const { return means + outputs; }
  float* q_variances() const { return variances + outputs; }
};

// What both directions have: the memory between passes, and the passes of the forward direction.
struct Training {
  const CascadeTraining& t;
  const Problem& p;
  const Layout& of;
  const Worker worker;
  const ChannelsLastPasses& passes;
  const NormLayout qkv_norm, q_norm;
  const int64_t units, unit_work;
  Windows projected, convolved;  // of the head at hand, before their norms
  float* zeros;                  // in place of biases

  Training(const CascadeTraining& problem, const Layout& layout, Pieces& memory)
      : t(problem),
        p(layout.p),
        of(layout),
        worker(layout),
        passes(worker.passes),
        qkv_norm(NormLayout::of_qkv(layout)),
        q_norm(NormLayout::of_q(layout)),
        units(p.batch * p.windows()),
        unit_work(of.tokens * p.value_dim * of.outputs()),
        projected{memory.floats(units * of.tokens * of.stride), of.tokens, of.stride},
        convolved{memory.floats(units * of.tokens * of.dk), of.tokens, of.dk},
        zeros(memory.floats(of.stride)) {}

  int64_t batch(int64_t unit) const { return unit / p.windows(); }
  int64_t window(int64_t unit) const { return unit % p.windows(); }

  // x's channels of a head, and the output of the head before.
  template <class Before>
  void project(int64_t head, int64_t unit, const Weights& weights, float* feat,
               const Before& add_before) const {
    worker.load(p.x, batch(unit), head, window(unit), feat);
    if (head > 0) add_before(feat);
    passes.project(of.tokens, p.value_dim, of.stride, {feat, of.d, 1}, {weights.qkv, of.stride}, zeros,
                   projected.of(unit), {});
  }
  void normalise(const Applied& norm, int64_t channels, const Rows<float>& in, const Rows<float>& out) const {
    passes.affine(of.tokens, channels, norm.scale, read(in), nullptr, {nullptr, 0}, norm.shift, out);
  }
  void convolve(int64_t head, int64_t unit, const Weights& weights, const Rows<float>& q,
                const PaddedImage& padded) const {
    passes.fill(read(q), padded);
    passes.depthwise(p.kernels[head], padded, weights.taps, zeros, convolved.of(unit));
  }
};

}  // namespace

void cascade_training(const CascadeTraining& t, const Parallel& parallel) {
  const Problem& p = t.cascade;
  const Layout of(p);
  const int64_t units = p.batch * p.windows();
  if (units * of.tokens == 0) return;
  struct Memory {
    std::vector<LaidOut> laid_out;
    Training training;
    Applied qkv, q;
    Windows outs;
    float *qkv_moments, *q_moments;
    Memory(const CascadeTraining& problem, const Layout& layout, Pieces& memory)
        : laid_out(lay_out(layout, memory)),
          training(problem, layout, memory),
          qkv(training.qkv_norm, memory),
          q(training.q_norm, memory),
          outs{memory.floats(training.units * layout.tokens * layout.d), layout.tokens, layout.d},
          qkv_moments(memory.floats(2 * training.units * layout.stride)),
          q_moments(memory.floats(2 * training.units * layout.dk)) {}
  };
  const auto lay_out_all = [&](Pieces& memory) { return Memory(t, of, memory); };
  const Floats floats = aligned_floats(floats_of(lay_out_all));
  Pieces pieces(floats.get(), Pieces::Holds::kNothing);
  const Memory m = lay_out_all(pieces);
  const Training& training = m.training;
  clear(training.zeros, of.stride);
  const std::vector<Weights> weights = taken(of, m.laid_out, parallel);
  const int64_t padded_floats = of.padded(nullptr).floats();

  for (int64_t h = 0; h < p.heads; ++h) {
    const Statistics statistics(t, h);
    parallel(units, training.unit_work, [&](int64_t begin, int64_t end) {
      float* const feat = thread_scratch(of.tokens * of.d);
      for (int64_t u = begin; u < end; ++u) {
        training.project(h, u, weights[h], feat, [&](float* to) {
          training.passes.add(of.tokens, of.d, read(m.outs.of(u)), {to, of.d});
        });
        float* const moments = m.qkv_moments + 2 * u * of.stride;
        training.passes.moments(of.tokens, of.stride, read(training.projected.of(u)), moments,
                                moments + of.stride);
      }
    });
    combine_moments(training.qkv_norm, units, of.tokens, m.qkv_moments, statistics.means,
                    statistics.variances);
    m.qkv.take(training.qkv_norm, t.norms[h].qkv, statistics.means, statistics.variances, t.qkv_eps[h]);
    parallel(units, training.unit_work, [&](int64_t begin, int64_t end) {
      PaddedImage padded = of.padded(thread_scratch(padded_floats));
      clear(padded.data, padded_floats);
      for (int64_t u = begin; u < end; ++u) {
        const Rows<float> qkv = training.projected.of(u);
        training.normalise(m.qkv, of.stride, qkv, qkv);
        training.convolve(h, u, weights[h], qkv, padded);
        float* const moments = m.q_moments + 2 * u * of.dk;
        training.passes.moments(of.tokens, of.dk, read(training.convolved.of(u)), moments, moments + of.dk);
      }
    });
    combine_moments(training.q_norm, units, of.tokens, m.q_moments, statistics.q_means(),
                    statistics.q_variances());
    m.q.take(training.q_norm, t.norms[h].q, statistics.q_means(), statistics.q_variances(), t.q_eps[h]);
    parallel(units, training.unit_work, [&](int64_t begin, int64_t end) {
      const SoftmaxHeads heads = of.softmax(h);
      float* const scratch = thread_scratch(training.worker.softmax.scratch_floats(heads));
      for (int64_t u = begin; u < end; ++u) {
        const Rows<float> qkv = training.projected.of(u), q = training.convolved.of(u), out = m.outs.of(u);
        training.normalise(m.q, of.dk, q, q);
        training.worker.softmax.forward(heads, {q.data, 0, of.dk}, {qkv.data + of.first(1), 0, of.stride},
                                        {qkv.data + of.first(2), 0, of.stride}, {out.data, 0, of.d}, scratch);
        training.worker.store(out.data, p.out, training.batch(u), h, training.window(u));
      }
    });
  }
}

void cascade_training_backward(const CascadeTraining& t, const Parallel& parallel) {
  const Problem& p = t.cascade;
  const Layout of(p);
  const int64_t units = p.batch * p.windows(), pairs = of.tokens * of.tokens;
  if (units * of.tokens == 0) return;
  // What all windows share is summed up part by part, and parts in order: a function of the sizes alone.
  const int64_t part_floats = pairs + 3 * of.stride + of.outputs() * of.d;
  const int64_t parts = max(1, min(min(units, kMostSums), kMostSumFloats / part_floats));
  struct Memory {
    std::vector<LaidOut> laid_out;
    std::vector<BackwardWeights> backward_weights;
    Training training;
    Applied qkv, q;
    NormBackward qkv_backward, q_backward;
    Windows feat, grad_q, grad_qkv, grad_feat;
    float *bias_sums, *norm_sums, *weight_sums;  // of every part
    int64_t norm_floats, weight_floats;
    Memory(const CascadeTraining& problem, const Layout& layout, int64_t of_parts, Pieces& memory)
        : laid_out(lay_out(layout, memory)),
          training(problem, layout, memory),
          qkv(training.qkv_norm, memory),
          q(training.q_norm, memory),
          qkv_backward(training.qkv_norm, memory),
          q_backward(training.q_norm, memory),
          feat{memory.floats(training.units * layout.tokens * layout.d), layout.tokens, layout.d},
          grad_q{memory.floats(training.units * layout.tokens * layout.dk), layout.tokens, layout.dk},
          grad_qkv{memory.floats(training.units * layout.tokens * layout.stride), layout.tokens,
                   layout.stride},
          grad_feat{memory.floats(training.units * layout.tokens * layout.d), layout.tokens, layout.d} {
      for (int64_t h = 0; h < layout.p.heads; ++h) backward_weights.emplace_back(layout, h, memory);
      bias_sums = memory.floats(of_parts * layout.tokens * layout.tokens);
      norm_floats = 2 * layout.stride;
      norm_sums = memory.floats(of_parts * norm_floats);
      weight_floats = layout.outputs() * layout.d + layout.stride +
                      layout.largest_kernel * layout.largest_kernel * layout.dk + layout.dk;
      weight_floats = round_up(weight_floats, kWholeVectors);
      weight_sums = memory.floats(of_parts * weight_floats);
    }
  };
  const auto lay_out_all = [&](Pieces& memory) { return Memory(t, of, parts, memory); };
  const Floats floats = aligned_floats(floats_of(lay_out_all));
  Pieces pieces(floats.get(), Pieces::Holds::kNothing);
  const Memory m = lay_out_all(pieces);
  const Training& training = m.training;
  const ChannelsLastPasses& passes = training.passes;
  clear(training.zeros, of.stride);
  const std::vector<Weights> weights = taken(of, m.laid_out, parallel);
  for (int64_t h = 0; h < p.heads; ++h) m.backward_weights[h].take(of, h, weights[h]);
  const int64_t padded_floats = of.padded(nullptr).floats(), window_floats = of.tokens * of.d;
  const double count = static_cast<double>(units) * static_cast<double>(of.tokens);
  const auto for_parts = [&](const auto& f) {
    parallel(parts, max(kMinWorkPerThread, training.unit_work * units / parts),
             [&](int64_t begin, int64_t end) {
               for (int64_t part = begin; part < end; ++part)
                 f(part, part * units / parts, (part + 1) * units / parts);
             });
  };
  const auto total = [&](float* sums, int64_t size, int64_t stride) {
    for (int64_t part = 1; part < parts; ++part) add(sums, sums + part * stride, size);
  };

  for (int64_t h = p.heads - 1; h >= 0; --h) {
    const Statistics statistics(t, h);
    m.qkv.take(training.qkv_norm, t.norms[h].qkv, statistics.means, statistics.variances, t.qkv_eps[h]);
    m.q.take(training.q_norm, t.norms[h].q, statistics.q_means(), statistics.q_variances(), t.q_eps[h]);

    // Forward once more, and back through the attention.
    clear(m.bias_sums, parts * pairs);
    clear(m.norm_sums, parts * m.norm_floats);
    for_parts([&](int64_t part, int64_t begin, int64_t end) {
      const SoftmaxHeads heads = of.softmax(h);
      float* const own = thread_scratch(window_floats + of.tokens * (of.stride + of.dk) + padded_floats +
                                        training.worker.softmax.scratch_floats_backward(heads));
      const Rows<float> qkv{own + window_floats, of.stride}, q{qkv.data + of.tokens * of.stride, of.dk};
      PaddedImage padded = of.padded(q.data + of.tokens * of.dk);
      float* const scratch = padded.data + padded_floats;
      clear(padded.data, padded_floats);
      float* const sums = m.norm_sums + part * m.norm_floats;
      for (int64_t u = begin; u < end; ++u) {
        training.project(h, u, weights[h], m.feat.of(u).data, [&](float* to) {
          training.worker.load(p.out, training.batch(u), h - 1, training.window(u), own);
          passes.add(of.tokens, of.d, {own, of.d}, {to, of.d});
        });
        training.normalise(m.qkv, of.stride, training.projected.of(u), qkv);
        training.convolve(h, u, weights[h], qkv, padded);
        training.normalise(m.q, of.dk, training.convolved.of(u), q);
        training.worker.load(p.grad_out, training.batch(u), h, training.window(u), own);
        if (h + 1 < p.heads) passes.add(of.tokens, of.d, read(m.grad_feat.of(u)), {own, of.d});
        const Rows<float> grad_q = m.grad_q.of(u), grad = m.grad_qkv.of(u);
        const SoftmaxGradients gradients{{grad_q.data, 0, of.dk},
                                         {grad.data + of.first(1), 0, of.stride},
                                         {grad.data + of.first(2), 0, of.stride},
                                         m.bias_sums + part * pairs,
                                         {}};
        training.worker.softmax.backward(heads, {q.data, 0, of.dk}, {qkv.data + of.first(1), 0, of.stride},
                                         {qkv.data + of.first(2), 0, of.stride}, {own, 0, of.d}, gradients,
                                         scratch);
        passes.sum_gradients(of.tokens, of.dk, read(grad_q), read(training.convolved.of(u)), m.q.mean, sums,
                             sums + of.dk);
      }
    });
    total(m.bias_sums, pairs, pairs);
    copy(p.grad_bias + h * pairs, m.bias_sums, pairs);
    m.q_backward.take(training.q_norm, t.norms[h].q, t.norm_gradients[h].q, statistics.q_means(),
                      statistics.q_variances(), t.q_eps[h], count, m.norm_sums, parts, m.norm_floats);

    // Back through the depthwise convolution and its norm.
    clear(m.norm_sums, parts * m.norm_floats);
    clear(m.weight_sums, parts * m.weight_floats);
    for_parts([&](int64_t part, int64_t begin, int64_t end) {
      float* const q = thread_scratch(of.tokens * of.dk + padded_floats);
      PaddedImage padded = of.padded(q + of.tokens * of.dk);
      clear(padded.data, padded_floats);
      float* const sums = m.norm_sums + part * m.norm_floats;
      float* const taps = m.weight_sums + part * m.weight_floats + of.outputs() * of.d + of.stride;
      float* const tap_bias = taps + of.taps(h) * of.dk;
      for (int64_t u = begin; u < end; ++u) {
        const Rows<float> grad_q = m.grad_q.of(u), grad = m.grad_qkv.of(u);
        passes.affine(of.tokens, of.dk, m.q_backward.by, read(grad_q), m.q_backward.other_by,
                      read(training.convolved.of(u)), m.q_backward.shift, grad_q);
        training.normalise(m.qkv, of.dk, training.projected.of(u), {q, of.dk});
        passes.fill({q, of.dk}, padded);
        passes.depthwise_backward(p.kernels[h], padded, read(grad_q), taps, tap_bias);
        passes.fill(read(grad_q), padded);
        passes.depthwise(p.kernels[h], padded, m.backward_weights[h].flipped, training.zeros, grad);
        passes.sum_gradients(of.tokens, of.stride, read(grad), read(training.projected.of(u)), m.qkv.mean,
                             sums, sums + of.stride);
      }
    });
    m.qkv_backward.take(training.qkv_norm, t.norms[h].qkv, t.norm_gradients[h].qkv, statistics.means,
                        statistics.variances, t.qkv_eps[h], count, m.norm_sums, parts, m.norm_floats);

    // Back through the projection and its norm.
    for_parts([&](int64_t part, int64_t begin, int64_t end) {
      float* const own_weights = m.weight_sums + part * m.weight_floats;
      for (int64_t u = begin; u < end; ++u) {
        const Rows<float> grad = m.grad_qkv.of(u), grad_feat = m.grad_feat.of(u);
        passes.affine(of.tokens, of.stride, m.qkv_backward.by, read(grad), m.qkv_backward.other_by,
                      read(training.projected.of(u)), m.qkv_backward.shift, grad);
        clear(grad_feat.data, window_floats);
        for (int of_part = 0; of_part < kParts; ++of_part) {
          const int64_t row = of.first_output(of_part) * of.d;
          passes.project_backward(
              of.tokens, p.value_dim, of.size(of_part), read(m.feat.of(u)),
              {grad.data + of.first(of_part), of.stride}, {m.backward_weights[h].rows + row, of.d}, grad_feat,
              {own_weights + row, of.d}, own_weights + of.outputs() * of.d + of.first(of_part));
        }
        training.worker.store(grad_feat.data, p.grad_x, training.batch(u), h, training.window(u));
      }
    });
    total(m.weight_sums, m.weight_floats, m.weight_floats);
    const HeadWeights<float>& to = p.gradients[h];
    for (int64_t o = 0; o < of.outputs(); ++o)
      copy(to.qkv + o * p.value_dim, m.weight_sums + o * of.d, p.value_dim);
    const float* const taps = m.weight_sums + of.outputs() * of.d + of.stride;
    for (int64_t c = 0; c < p.key_dim; ++c) {
      for (int64_t tap = 0; tap < of.taps(h); ++tap)
        to.depthwise[c * of.taps(h) + tap] = taps[tap * of.dk + c];
    }
  }
}

}  // namespace effattn::cpu
