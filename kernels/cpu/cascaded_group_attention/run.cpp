// The schedule: windows in parallel, each from its input through all heads; then, if asked for, the
// projection.
#include "plan.h"

#include <utility>

#include "window.h"

namespace effattn::cpu {
namespace {

using namespace cascade;

// All that the forward pass of a thread works in.
struct Forward {
  Tokens tokens;
  float *out, *scratch;
  PaddedImage padded;

  Forward(const Layout& of, Pieces& memory)
      : tokens(of, memory),
        out(memory.floats(of.tokens * of.d)),
        scratch(memory.floats(softmax_passes(active_isa()).scratch_floats(of.softmax(0)))),
        padded(of.padded(nullptr)) {
    padded.data = memory.floats(padded.floats());
  }
};

int64_t work_of_a_window(const Layout& of) {
  int64_t work = 0;
  for (int64_t h = 0; h < of.p.heads; ++h) {
    work += of.p.value_dim * of.outputs() + of.taps(h) * of.p.key_dim +
            of.tokens * (of.p.key_dim + of.p.value_dim + 20);
  }
  return max(1, work * of.tokens);
}

}  // namespace

void cascaded_group_attention(const Problem& p, const ProjectionWeights* projection,
                              const Parallel& parallel) {
  const int64_t outputs = projection == nullptr ? p.channels() : projection->outputs;
  if (p.batch * p.height * p.width * outputs == 0) return;
  const Layout of(p);
  const int64_t tokens = p.height * p.width, windows = p.windows();
  const int64_t row_floats = round_up(p.channels(), kWholeVectors) + kWholeVectors;
  const int64_t attended = projection == nullptr ? 0 : p.batch * tokens * row_floats;
  const bool packed = p.weights == nullptr;
  const auto lay_out_weights = [&](Pieces& memory) {
    return packed ? std::vector<LaidOut>() : lay_out(of, memory);
  };
  const auto lay_out_work = [&](Pieces& memory) { return Forward(of, memory); };
  const int64_t floats = attended + floats_of(lay_out_weights), own_floats = floats_of(lay_out_work);
  const Floats large = floats > kKeptFloats ? aligned_floats(floats) : nullptr;  // kept by no thread
  float* const between = large ? large.get() : thread_scratch<Purpose::kBetweenThreads>(floats);
  const auto rows_of = [&](int64_t batch) {
    return Rows<float>{between + batch * tokens * row_floats, row_floats};
  };
  const Worker worker(of);
  Pieces shared(between + attended, Pieces::Holds::kNothing);
  const std::vector<Weights> weights =
      packed ? packed_weights(of) : taken(of, lay_out_weights(shared), parallel);

  parallel(p.batch * windows, work_of_a_window(of), [&](int64_t begin, int64_t end) {
    Pieces pieces(thread_scratch(own_floats), Pieces::Holds::kNothing);
    const Forward own = lay_out_work(pieces);
    clear(own.padded.data, own.padded.floats());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t batch = unit / windows, window = unit % windows;
      for (int64_t h = 0; h < p.heads; ++h) {
        worker.load(p.x, batch, h, window, own.tokens.feat);
        worker.forward(h, weights[h], own.tokens, h == 0 ? nullptr : own.out, own.padded, own.out,
                       own.scratch);
        if (projection == nullptr) {
          worker.store(own.out, p.out, batch, h, window);
          continue;
        }
        const Rows<float> rows = rows_of(batch);
        worker.for_runs(window, [&](int64_t token, int64_t of_image, int64_t count) {
          worker.passes.activate(Activation::kRelu, count, p.value_dim, {own.out + token * of.d, of.d},
                                 {rows.data + of_image * rows.stride + h * p.value_dim, rows.stride});
        });
      }
    }
  });
  if (projection == nullptr) return;
  project_tokens(p.dtype, p.batch, tokens, *projection, rows_of, p.out, parallel);
}

namespace {

// The gradients of a head's weights, laid out as the passes add to them.
struct WeightSums {
  float *qkv, *bias, *taps, *tap_bias;

  WeightSums(const Layout& of, int64_t head, Pieces& memory)
      : qkv(memory.floats(of.outputs() * of.d)),
        bias(memory.floats(of.stride)),
        taps(memory.floats(of.taps(head) * of.dk)),
        tap_bias(memory.floats(of.dk)) {}

  void finish(const Layout& of, int64_t head, const HeadWeights<float>& to) const {
    const Problem& p = of.p;
    for (int64_t o = 0; o < of.outputs(); ++o) copy(to.qkv + o * p.value_dim, qkv + o * of.d, p.value_dim);
    for (int part = 0; part < kParts && to.qkv_bias != nullptr; ++part) {
      copy(to.qkv_bias + of.first_output(part), bias + of.first(part), of.size(part));
    }
    for (int64_t c = 0; c < p.key_dim; ++c) {
      for (int64_t tap = 0; tap < of.taps(head); ++tap) {
        to.depthwise[c * of.taps(head) + tap] = taps[tap * of.dk + c];
      }
    }
    if (to.depthwise_bias != nullptr) copy(to.depthwise_bias, tap_bias, p.key_dim);
  }
};

// The sums of all heads, and of their biases on pairs of tokens.
struct Sums {
  std::vector<WeightSums> weights;
  float* bias;

  Sums(const Layout& of, Pieces& memory) {
    for (int64_t h = 0; h < of.p.heads; ++h) weights.emplace_back(of, h, memory);
    bias = memory.floats(of.p.heads * of.tokens * of.tokens);
  }
};

std::vector<BackwardWeights> all_backward_weights(const Layout& of, Pieces& memory) {
  std::vector<BackwardWeights> all;
  for (int64_t h = 0; h < of.p.heads; ++h) all.emplace_back(of, h, memory);
  return all;
}

// All that the backward pass of a thread works in: every head's tokens, since the last head comes first.
struct Backward {
  std::vector<Tokens> tokens;
  float *out, *grad_out, *grad_q, *grad_qkv, *grad_feat, *zeros, *scratch;
  PaddedImage padded;

  Backward(const Layout& of, Pieces& memory) : padded(of.padded(nullptr)) {
    for (int64_t h = 0; h < of.p.heads; ++h) tokens.emplace_back(of, memory);
    out = memory.floats(of.tokens * of.d);
    grad_out = memory.floats(of.tokens * of.d);
    grad_q = memory.floats(of.tokens * of.dk);
    grad_qkv = memory.floats(of.tokens * of.stride);
    grad_feat = memory.floats(of.tokens * of.d);
    zeros = memory.floats(of.dk);
    const SoftmaxPasses& softmax = softmax_passes(active_isa());
    const SoftmaxHeads heads = of.softmax(0);
    scratch = memory.floats(max(softmax.scratch_floats(heads), softmax.scratch_floats_backward(heads)));
    padded.data = memory.floats(padded.floats());
  }
};

void backward_of_window(const Worker& worker, const std::vector<Weights>& weights,
                        const std::vector<BackwardWeights>& of_backward, const Backward& own,
                        const Sums& sums, int64_t batch, int64_t window) {
  const Layout& of = worker.of;
  const Problem& p = worker.p;
  for (int64_t h = 0; h < p.heads; ++h) {
    worker.load(p.x, batch, h, window, own.tokens[h].feat);
    worker.forward(h, weights[h], own.tokens[h], h == 0 ? nullptr : own.out, own.padded, own.out,
                   own.scratch);
  }
  for (int64_t h = p.heads - 1; h >= 0; --h) {
    const Tokens& t = own.tokens[h];
    worker.load(p.grad_out, batch, h, window, own.grad_out);
    if (h + 1 < p.heads) worker.passes.add(of.tokens, of.d, {own.grad_feat, of.d}, {own.grad_out, of.d});
    worker.softmax.backward(of.softmax(h), {t.q, 0, of.dk}, {t.qkv + of.first(1), 0, of.stride},
                            {t.qkv + of.first(2), 0, of.stride}, {own.grad_out, 0, of.d},
                            {{own.grad_q, 0, of.dk},
                             {own.grad_qkv + of.first(1), 0, of.stride},
                             {own.grad_qkv + of.first(2), 0, of.stride},
                             sums.bias + h * of.tokens * of.tokens,
                             {}},
                            own.scratch);
    const WeightSums& into = sums.weights[h];
    worker.passes.fill({t.qkv, of.stride}, own.padded);
    worker.passes.depthwise_backward(p.kernels[h], own.padded, {own.grad_q, of.dk}, into.taps, into.tap_bias);
    worker.passes.fill({own.grad_q, of.dk}, own.padded);
    worker.passes.depthwise(p.kernels[h], own.padded, of_backward[h].flipped, own.zeros,
                            {own.grad_qkv, of.stride});
    clear(own.grad_feat, of.tokens * of.d);
    for (int part = 0; part < kParts; ++part) {
      const int64_t row = of.first_output(part) * of.d;
      worker.passes.project_backward(of.tokens, p.value_dim, of.size(part), {t.feat, of.d},
                                     {own.grad_qkv + of.first(part), of.stride},
                                     {of_backward[h].rows + row, of.d}, {own.grad_feat, of.d},
                                     {into.qkv + row, of.d}, into.bias + of.first(part));
    }
    worker.store(own.grad_feat, p.grad_x, batch, h, window);
  }
}

}  // namespace

void cascaded_group_attention_backward(const Problem& p, const Parallel& parallel) {
  const Layout of(p);
  const auto lay_out_sums = [&](Pieces& memory) { return Sums(of, memory); };
  const int64_t floats = floats_of(lay_out_sums), windows = p.windows();
  const int64_t units = p.batch * p.height * p.width * p.channels() == 0 ? 0 : p.batch * windows;
  // What all windows share is summed up part by part, and parts in order: a function of the sizes alone.
  const int64_t parts = max(1, min(min(units, kMostSums), kMostSumFloats / max(1, floats)));
  const Floats memory = aligned_floats(parts * floats);
  clear(memory.get(), parts * floats);
  if (units > 0) {
    const auto lay_out_weights = [&](Pieces& pieces) {
      return std::pair{lay_out(of, pieces), all_backward_weights(of, pieces)};
    };
    const auto lay_out_work = [&](Pieces& pieces) { return Backward(of, pieces); };
    const int64_t own_floats = floats_of(lay_out_work);
    const Floats between = aligned_floats(floats_of(lay_out_weights));
    Pieces shared(between.get(), Pieces::Holds::kNothing);
    const auto [laid_out, backward_weights] = lay_out_weights(shared);
    const std::vector<Weights> weights = taken(of, laid_out, parallel);
    for (int64_t h = 0; h < p.heads; ++h) backward_weights[h].take(of, h, weights[h]);
    const Worker worker(of);
    parallel(parts, max(kMinWorkPerThread, work_of_a_window(of) * p.batch * p.windows() / parts),
             [&](int64_t begin, int64_t end) {
               Pieces pieces(thread_scratch(own_floats), Pieces::Holds::kNothing);
               const Backward own = lay_out_work(pieces);
               clear(own.padded.data, own.padded.floats());
               clear(own.zeros, of.dk);
               for (int64_t part = begin; part < end; ++part) {
                 Pieces of_part(memory.get() + part * floats);
                 const Sums sums = lay_out_sums(of_part);
                 for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
                   backward_of_window(worker, weights, backward_weights, own, sums, unit / windows,
                                      unit % windows);
                 }
               }
             });
  }
  for (int64_t part = 1; part < parts; ++part) add(memory.get(), memory.get() + part * floats, floats);
  Pieces first(memory.get());
  const Sums sums(of, first);
  for (int64_t h = 0; h < p.heads; ++h) sums.weights[h].finish(of, h, p.gradients[h]);
  copy(p.grad_bias, sums.bias, p.heads * of.tokens * of.tokens);
}

}  // namespace effattn::cpu
