// The schedule: windows in parallel, each from its input through all heads; then, if asked for, the
// projection.
#include "cascaded_group_attention.h"

#include <utility>
#include <vector>

#include "project_tokens.h"

namespace effattn::cpu {
namespace {

using Problem = CascadedGroupAttention;

constexpr int kParts = 3;                    // q, k and v
constexpr int64_t kMostSums = 16;            // into which the gradients of the weights are split
constexpr int64_t kMostSumFloats = 1 << 22;  // of all of them

// Where the channels of q, k and v stand in a row, and the floats of pieces that every head has.
struct Layout {
  const Problem& p;
  int64_t d, dk, stride, tokens, border, largest_kernel;

  explicit Layout(const Problem& problem)
      : p(problem),
        d(round_up(p.value_dim, kWholeVectors)),
        dk(round_up(p.key_dim, kWholeVectors)),
        stride(2 * dk + d),
        tokens(p.window_tokens()),
        border(0),
        largest_kernel(1) {
    for (int64_t h = 0; h < p.heads; ++h) largest_kernel = larger(largest_kernel, p.kernels[h]);
    border = largest_kernel / 2;
  }

  int64_t outputs() const { return 2 * p.key_dim + p.value_dim; }
  int64_t first(int part) const { return part * dk; }
  int64_t first_output(int part) const { return part * p.key_dim; }
  int64_t size(int part) const { return part < 2 ? p.key_dim : p.value_dim; }
  bool is_padded() const { return d != p.value_dim || dk != p.key_dim; }
  int64_t taps(int64_t head) const { return p.kernels[head] * p.kernels[head]; }
  PaddedImage padded(float* memory) const { return {memory, p.window_height, p.window_width, dk, border}; }

  SoftmaxHeads softmax(int64_t head) const {
    return {
        1, tokens, tokens, p.key_dim, p.value_dim, p.scale, p.bias + head * tokens * tokens, tokens * tokens,
        {}};
  }
};

// Memory in pieces of whole vectors, in order; without memory it counts.
class Pieces {
 public:
  explicit Pieces(float* memory) : memory_(memory) {}
  float* floats(int64_t count) {
    float* const piece = memory_ == nullptr ? nullptr : memory_ + taken_;
    taken_ += round_up(count, kWholeVectors);
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  float* memory_;
  int64_t taken_ = 0;
};

// The weights of a head as the passes read them.
struct Weights {
  const float *qkv, *bias, *taps, *tap_bias;
};

std::vector<Weights> packed_weights(const Layout& of) {
  std::vector<Weights> all;
  const PackedHeads& from = of.p.packed;
  int64_t tap = 0;
  for (int64_t h = 0; h < of.p.heads; tap += of.taps(h++)) {
    all.push_back({from.qkv + h * of.p.value_dim * of.stride, from.qkv_bias + h * of.stride,
                   from.taps + tap * of.dk, from.tap_bias + h * of.dk});
  }
  return all;
}

// The same, laid out once a call for all threads.
struct LaidOut {
  float *qkv, *bias, *taps, *tap_bias;

  LaidOut(const Layout& of, int64_t head, Pieces& memory)
      : qkv(memory.floats(of.p.value_dim * of.stride)),
        bias(memory.floats(of.stride)),
        taps(memory.floats(of.taps(head) * of.dk)),
        tap_bias(memory.floats(of.dk)) {}

  void take(const Layout& of, int64_t head, const ChannelsLastPasses& passes) const {
    const HeadWeights<const float>& from = of.p.weights[head];
    if (of.is_padded()) clear(qkv, of.p.value_dim * of.stride);
    for (int part = 0; part < kParts; ++part) {
      const int64_t row = of.first_output(part), width = part < 2 ? of.dk : of.d;
      passes.transpose(from.qkv + row * of.p.value_dim, of.size(part), of.p.value_dim,
                       {qkv + of.first(part), of.stride});
      copy_bias(from.qkv_bias == nullptr ? nullptr : from.qkv_bias + row, of.size(part), width,
                bias + of.first(part));
    }
    if (of.is_padded()) clear(taps, of.taps(head) * of.dk);
    passes.transpose(from.depthwise, of.p.key_dim, of.taps(head), {taps, of.dk});
    copy_bias(from.depthwise_bias, of.p.key_dim, of.dk, tap_bias);
  }
};

// Of all heads; without memory it counts.
std::vector<LaidOut> lay_out(const Layout& of, Pieces& memory) {
  std::vector<LaidOut> all;
  for (int64_t h = 0; h < of.p.heads; ++h) all.emplace_back(of, h, memory);
  return all;
}

// What a layout takes of memory.
template <class Make>
int64_t floats_of(const Make& lay_out) {
  Pieces counted(nullptr);
  lay_out(counted);
  return counted.taken();
}

// What a head makes of a window's tokens.
struct Tokens {
  float *feat, *qkv, *q;

  Tokens(const Layout& of, Pieces& memory)
      : feat(memory.floats(of.tokens * of.d)),
        qkv(memory.floats(of.tokens * of.stride)),
        q(memory.floats(of.tokens * of.dk)) {}
};

// A thread at work on one window after the other.
struct Worker {
  const Layout& of;
  const Problem& p;
  const ChannelsLastPasses& passes;
  const SoftmaxPasses& softmax;

  explicit Worker(const Layout& layout)
      : of(layout),
        p(layout.p),
        passes(channels_last_passes(active_isa())),
        softmax(softmax_passes(active_isa())) {}

  // The part of a window that lies in the image.
  struct Inside {
    int64_t y, x, rows, cols;
  };
  Inside inside(int64_t window) const {
    const int64_t y = window / p.windows_across() * p.window_height;
    const int64_t x = window % p.windows_across() * p.window_width;
    return {y, x, smaller(p.window_height, p.height - y), smaller(p.window_width, p.width - x)};
  }

  // Calls f(token of the window, token of the image, tokens) for the runs of tokens inside.
  template <class F>
  void for_runs(int64_t window, const F& f) const {
    const Inside in = inside(window);
    if (p.window_width == p.width) return f(0, in.y * p.width, in.rows * in.cols);
    for (int64_t y = 0; y < in.rows; ++y) f(y * p.window_width, (in.y + y) * p.width + in.x, in.cols);
  }

  void load(const Image& image, int64_t batch, int64_t head, int64_t window, float* to) const {
    const Inside in = inside(window);
    if (in.rows * in.cols < of.tokens) clear(to, of.tokens * of.d);
    for_runs(window, [&](int64_t token, int64_t of_image, int64_t count) {
      passes.load(p.dtype, channels_from(p.dtype, image, batch, head * p.value_dim, of_image), count,
                  p.value_dim, {to + token * of.d, of.d});
    });
  }
  void store(const float* from, const Image& image, int64_t batch, int64_t head, int64_t window) const {
    for_runs(window, [&](int64_t token, int64_t of_image, int64_t count) {
      passes.store(p.dtype, channels_from(p.dtype, image, batch, head * p.value_dim, of_image), count,
                   p.value_dim, {const_cast<float*>(from) + token * of.d, of.d});
    });
  }

  // From feat, which holds x's channels, to the head's output; `before`: the output of the head before, or
  // null.
  void forward(int64_t head, const Weights& weights, const Tokens& t, const float* before,
               const PaddedImage& padded, float* out, float* scratch) const {
    if (before != nullptr) passes.add(of.tokens, of.d, {before, of.d}, {t.feat, of.d});
    passes.project(of.tokens, p.value_dim, of.stride, {t.feat, of.d, 1}, {weights.qkv, of.stride},
                   weights.bias, {t.qkv, of.stride}, {});
    passes.fill({t.qkv, of.stride}, padded);
    passes.depthwise(p.kernels[head], padded, weights.taps, weights.tap_bias, {t.q, of.dk});
    softmax.forward(of.softmax(head), {t.q, 0, of.dk}, {t.qkv + of.first(1), 0, of.stride},
                    {t.qkv + of.first(2), 0, of.stride}, {out, 0, of.d}, scratch);
  }
};

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
  return larger(1, work * of.tokens);
}

// Fills what was laid out, in parallel. A head's weights are few; what is gained must be worth waking threads
// for.
std::vector<Weights> taken(const Layout& of, const std::vector<LaidOut>& laid_out, const Parallel& parallel) {
  const ChannelsLastPasses& passes = channels_last_passes(active_isa());
  const int64_t work = 4 * of.p.value_dim * of.outputs();  // a shuffle a float or so
  parallel(of.p.heads, larger(1, kMinWorkPerThread / larger(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) laid_out[h].take(of, h, passes);
  });
  std::vector<Weights> all;
  for (const LaidOut& head : laid_out) all.push_back({head.qkv, head.bias, head.taps, head.tap_bias});
  return all;
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
  Pieces shared(between + attended);
  const std::vector<Weights> weights =
      packed ? packed_weights(of) : taken(of, lay_out_weights(shared), parallel);

  parallel(p.batch * windows, larger(1, kMinWorkPerThread / work_of_a_window(of)),
           [&](int64_t begin, int64_t end) {
             Pieces pieces(thread_scratch(own_floats));
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
                   worker.passes.activate(
                       Activation::kRelu, count, p.value_dim, {own.out + token * of.d, of.d},
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

// The weights of a head as only the backward pass reads them.
struct BackwardWeights {
  float *flipped, *rows;

  BackwardWeights(const Layout& of, int64_t head, Pieces& memory)
      : flipped(memory.floats(of.taps(head) * of.dk)), rows(memory.floats(of.outputs() * of.d)) {}

  void take(const Layout& of, int64_t head, const Weights& weights) const {
    const int64_t taps = of.taps(head), inputs = of.p.value_dim;
    for (int64_t tap = 0; tap < taps; ++tap) {
      copy(flipped + tap * of.dk, weights.taps + (taps - 1 - tap) * of.dk, of.dk);
    }
    if (of.is_padded()) clear(rows, of.outputs() * of.d);
    for (int64_t o = 0; o < of.outputs(); ++o) {
      copy(rows + o * of.d, of.p.weights[head].qkv + o * inputs, inputs);
    }
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
    scratch = memory.floats(larger(softmax.scratch_floats(heads), softmax.scratch_floats_backward(heads)));
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
  const int64_t parts = larger(1, smaller(smaller(units, kMostSums), kMostSumFloats / larger(1, floats)));
  const Floats memory = aligned_floats(parts * floats);
  clear(memory.get(), parts * floats);
  if (units > 0) {
    const auto lay_out_weights = [&](Pieces& pieces) {
      return std::pair{lay_out(of, pieces), all_backward_weights(of, pieces)};
    };
    const auto lay_out_work = [&](Pieces& pieces) { return Backward(of, pieces); };
    const int64_t own_floats = floats_of(lay_out_work);
    const Floats between = aligned_floats(floats_of(lay_out_weights));
    Pieces shared(between.get());
    const auto [laid_out, backward_weights] = lay_out_weights(shared);
    const std::vector<Weights> weights = taken(of, laid_out, parallel);
    for (int64_t h = 0; h < p.heads; ++h) backward_weights[h].take(of, h, weights[h]);
    const Worker worker(of);
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
      Pieces pieces(thread_scratch(own_floats));
      const Backward own = lay_out_work(pieces);
      clear(own.padded.data, own.padded.floats());
      clear(own.zeros, of.dk);
      for (int64_t part = begin; part < end; ++part) {
        Pieces of_part(memory.get() + part * floats);
        const Sums sums = lay_out_sums(of_part);
        for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
          backward_of_window(worker, weights, backward_weights, own, sums, unit / windows, unit % windows);
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
