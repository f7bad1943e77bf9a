#include "ukernels.h"

#include "../core/dots.h"
#include "../core/product.h"

namespace effattn::cpu::EFFATTN_ISA {
namespace {

using In = HeadRows<const float>;

// Logits of a block of queries, all heads together.
constexpr int64_t kBlockFloats = 32768;
constexpr int64_t kMinQueries = 8;

int64_t block_queries(const SoftmaxHeads& p) {
  const int64_t row = max(1, p.heads * round_up(p.keys, kWholeVectors));
  return min(max(1, p.queries), max(kMinQueries, kBlockFloats / row));
}

// Rows of pairs (query, key): all heads of a block, padded with keys that nobody has.
struct Pairs {
  float* data;
  int64_t queries, stride;

  float* of(int64_t head) const { return data + head * queries * stride; }
  int64_t head_stride() const { return queries * stride; }
};

Pairs pairs(const SoftmaxHeads& p, Arena& arena) {
  const int64_t queries = block_queries(p), stride = round_up(p.keys, kWholeVectors);
  return {arena.floats(p.heads * queries * stride), queries, stride};
}

// A matrix (channel, key) a head: keys in the lanes, zeros behind the last.
Pairs transposed(const SoftmaxHeads& p, int64_t channels, Arena& arena) {
  const int64_t stride = round_up(p.keys, kWholeVectors);
  return {arena.floats(p.heads * channels * stride), channels, stride};
}

void transpose_keys(const In& rows, const SoftmaxHeads& p, const Pairs& to) {
  const int64_t channels = to.queries, stride = to.stride, keys = p.keys;
  for (int64_t h = 0; h < p.heads; ++h) {
    const auto of_head = rows.of(h);
    load_tile<false>(Tile{to.of(h), stride, true}, Place<const float>{of_head.data, of_head.stride, 1}, keys,
                     channels);
    if (stride == padded(keys)) continue;
    for (int64_t c = 0; c < channels; ++c) {  // the tile is padded to this instruction set's vectors alone
      for (int64_t at = padded(keys); at < stride; at += kLanes) store(to.of(h) + c * stride + at, Vec{});
    }
  }
}

// Raw logits, later mixed weights; with talking heads the softmax of mixed logits is kept beside them.
struct ForwardMemory {
  Pairs keys, raw, softmax;
  int64_t inverse_stride;
  float* inverse;  // of the sums of rows, a head each

  ForwardMemory(const SoftmaxHeads& p, Arena& arena)
      : keys(transposed(p, p.head_dim, arena)),
        raw(pairs(p, arena)),
        softmax(p.talking() ? pairs(p, arena) : raw),
        inverse_stride(round_up(block_queries(p), 16)),
        inverse(arena.floats(p.heads * inverse_stride)) {}
};

struct BackwardMemory : ForwardMemory {
  Pairs values, grad, weights, mixed_grad;

  BackwardMemory(const SoftmaxHeads& p, Arena& arena)
      : ForwardMemory(p, arena),
        values(transposed(p, p.value_dim, arena)),
        grad(pairs(p, arena)),
        weights(p.talking() ? pairs(p, arena) : raw),
        mixed_grad(p.talking() ? pairs(p, arena) : grad) {}
};

template <class Memory>
int64_t scratch_floats(const SoftmaxHeads& p) {
  return floats_of<Memory>(p);
}

// --- where products go ------------------------------------------------------------------------------

// acc * softmax_scale + bias, into a row that is longer than the bias's.
struct WriteLogits {
  float* data;
  int64_t row_stride;
  const float* bias;
  int64_t keys;
  float softmax_scale;

  struct Row : RowPointer<float> {
    RowPointer<const float> bias;
    int64_t keys;  // from here on
    float softmax_scale;
    EFFATTN_INLINE Vec start(int) const { return Vec{}; }
    template <bool Whole>
    EFFATTN_INLINE void finish(int v, Vec acc) const {
      const float* const from = bias.at + v * kLanes;
      store(this->at + v * kLanes,
            acc * softmax_scale + (Whole ? load(from) : load_first(from, keys - v * kLanes)));
    }
    EFFATTN_INLINE void next_row() {
      RowPointer<float>::next_row();
      bias.next_row();
    }
  };
  EFFATTN_INLINE Row at(int64_t row, int64_t col) const {
    return {{data + row * row_stride + col, row_stride},
            {bias + row * keys + col, keys},
            keys - col,
            softmax_scale};
  }
  EFFATTN_INLINE bool whole(int64_t end) const { return end <= keys; }
};

// Times softmax_scale, written or added to what stands there.
template <bool Add>
struct SoftmaxScaled {
  float softmax_scale;

  struct Row : NoEpilogue::Row {
    float softmax_scale;
    EFFATTN_INLINE Vec operator()(int, Vec acc, const float* to) const {
      return Add ? load(to) + acc * softmax_scale : acc * softmax_scale;
    }
  };
  EFFATTN_INLINE Row at(int64_t, int64_t) const { return {{}, softmax_scale}; }
};

// --- rows of logits -----------------------------------------------------------------------------------

// Lane i of the result is the maximum over the lanes of rows[i].
Vec max_of_lanes(Vec (&rows)[kLanes]) {
  transpose(rows);
  Vec top = rows[0];
  EFFATTN_UNROLL
  for (int i = 1; i < kLanes; ++i) top = rows[i] > top ? rows[i] : top;
  return top;
}

// Rows become e^(x - the row's maximum), 0 behind the last key; `inverse`: one over their sums, room for a
// whole vector behind the last. A row with a NaN is all NaN, as it is with an infinity.
void softmax_rows(float* data, int64_t stride, int64_t rows, int64_t keys, float* inverse) {
  const int64_t last = (keys - 1) / kLanes * kLanes, end = padded(keys);
  const Vec in_use =
      broadcast(static_cast<float>(keys - last)) - lane_numbers();  // above 0 up to the last key
  const float infinity = __builtin_inff();
  Vec group[kLanes];
  float tops[kLanes];
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = min(kLanes, rows - first);
    float* const block = data + first * stride;
    for (int64_t i = 0; i < kLanes; ++i) {
      Vec top = {};
      if (i < count) {
        float* const row = block + i * stride;
        top = in_use > 0.0f ? load(row + last) : broadcast(-infinity);
        store(row + last, top);
        for (int64_t at = 0; at < last; at += kLanes) {
          const Vec x = load(row + at);
          top = x > top ? x : top;
        }
      }
      group[i] = top;
    }
    store(tops, max_of_lanes(group));
    for (int64_t i = 0; i < kLanes; ++i) {
      Vec total = {};
      if (i < count) {
        const Vec top = broadcast(tops[i]);
        float* const row = block + i * stride;
        for (int64_t at = 0; at < end; at += kLanes) {
          const Vec e = exp_of_negative(load(row + at) - top);
          store(row + at, e);
          total += e;
        }
        for (int64_t at = end; at < stride; at += kLanes) store(row + at, Vec{});
      }
      group[i] = total;
    }
    store(inverse + first, 1.0f / sum_lanes(group));
  }
}

void scale_rows(float* data, int64_t stride, int64_t rows, const float* factors) {
  for (int64_t r = 0; r < rows; ++r, data += stride) {
    const Vec factor = broadcast(factors[r]);
    for (int64_t at = 0; at < stride; at += kLanes) store(data + at, load(data + at) * factor);
  }
}

// grad: of the softmax's output, becomes that of its input: weights (grad - sum weights grad), row by row.
void softmax_backward_rows(const float* weights, float* grad, int64_t stride, int64_t rows) {
  Vec group[kLanes];
  float dots[kLanes];
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = min(kLanes, rows - first), offset = first * stride;
    for (int64_t i = 0; i < kLanes; ++i) {
      Vec total = {};
      for (int64_t at = 0; at < (i < count ? stride : 0); at += kLanes) {
        total += load(weights + offset + i * stride + at) * load(grad + offset + i * stride + at);
      }
      group[i] = total;
    }
    store(dots, sum_lanes(group));
    for (int64_t i = 0; i < count; ++i) {
      const Vec dot = broadcast(dots[i]);
      float* const row = grad + offset + i * stride;
      for (int64_t at = 0; at < stride; at += kLanes) {
        store(row + at, load(weights + offset + i * stride + at) * (load(row + at) - dot));
      }
    }
  }
}

// --- talking heads --------------------------------------------------------------------------------------

// to_g = bias_g + sum_h matrix(g, h) from_h over a block's pairs.
void mix_heads(const float* matrix, const float* bias, int64_t heads, int64_t rows, const Pairs& from,
               const Pairs& to) {
  product(heads, rows * from.stride, StepsAdjacent<false>{matrix, heads},
          Vectors<>{from.data, from.head_stride()}, heads,
          StorePadded<Biased<true>>{to.data, to.head_stride(), {bias}});
}

// to_h = sum_g matrix(g, h) from_g
void mix_heads_back(const float* matrix, int64_t heads, int64_t rows, const Pairs& from, const Pairs& to) {
  product(heads, rows * from.stride, RowsAdjacent{matrix, heads}, Vectors<>{from.data, from.head_stride()},
          heads, WriteTo{to.data, to.head_stride()});
}

// matrix(g, h) += sum over pairs of grad_g x_h; bias(g) += sum of grad_g over the pairs that there are.
void add_mix_gradients(float* matrix, float* bias, int64_t heads, int64_t rows, int64_t keys,
                       const Pairs& grad, const Pairs& x) {
  dot_rows(matrix, heads, Rows<const float>{grad.data, grad.head_stride()},
           Rows<const float>{x.data, x.head_stride()}, heads, heads, rows * x.stride);
  for (int64_t g = 0; g < heads; ++g) {
    for (int64_t r = 0; r < rows; ++r) bias[g] += sum_of_row(grad.of(g) + r * grad.stride, keys);
  }
}

// --- the micro-kernels ------------------------------------------------------------------------------------

void logits(const SoftmaxHeads& p, const In& q, const Pairs& keys, int64_t first, int64_t rows,
            const Pairs& to) {
  for (int64_t h = 0; h < p.heads; ++h) {
    const auto of_head = q.of(h);
    product(rows, p.keys, StepsAdjacent<false>{of_head.data + first * of_head.stride, of_head.stride},
            Vectors<>{keys.of(h), keys.stride}, p.head_dim,
            WriteLogits{to.of(h), to.stride, p.bias + h * p.bias_stride + first * p.keys, p.keys,
                        p.softmax_scale});
    // Up to a whole number of this instruction set's vectors the product has written.
    for (int64_t r = 0; r < rows && padded(p.keys) < to.stride; ++r) {
      for (int64_t at = padded(p.keys); at < to.stride; at += kLanes)
        store(to.of(h) + r * to.stride + at, Vec{});
    }
  }
}

// The softmax of a block of queries; the sums of its rows are one if it is normalised, else their inverses
// are in memory.inverse.
void softmax_of_logits(const SoftmaxHeads& p, const In& q, const ForwardMemory& memory, int64_t first,
                       int64_t rows, bool normalised) {
  const Pairs& softmax = memory.softmax;
  logits(p, q, memory.keys, first, rows, memory.raw);
  if (p.talking()) mix_heads(p.mix.logits, p.mix.logits_bias, p.heads, rows, memory.raw, softmax);
  for (int64_t h = 0; h < p.heads; ++h) {
    float* const inverse = memory.inverse + h * memory.inverse_stride;
    softmax_rows(softmax.of(h), softmax.stride, rows, p.keys, inverse);
    if (normalised) scale_rows(softmax.of(h), softmax.stride, rows, inverse);
  }
}

void times_values(const SoftmaxHeads& p, const Pairs& weights, const In& v, int64_t first, int64_t rows,
                  const float* factors, int64_t factors_stride, const HeadRows<float>& out) {
  for (int64_t h = 0; h < p.heads; ++h) {
    const auto to = out.of(h);
    product(rows, p.value_dim, StepsAdjacent<true>{weights.of(h), weights.stride},
            Vectors<>{v.of(h).data, v.of(h).stride}, p.keys,
            StorePadded<Scaled<true>>{to.row(first), to.stride, {factors + h * factors_stride}});
  }
}

void forward(const SoftmaxHeads& p, const In& q, const In& k, const In& v, const HeadRows<float>& out,
             Arena arena) {
  const ForwardMemory memory(p, arena);
  const int64_t block = block_queries(p);
  transpose_keys(k, p, memory.keys);
  for (int64_t first = 0; first < p.queries; first += block) {
    const int64_t rows = min(block, p.queries - first);
    softmax_of_logits(p, q, memory, first, rows, p.talking());
    if (p.talking()) {
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t r = 0; r < rows; ++r) memory.inverse[h * memory.inverse_stride + r] = 1.0f;
      }
      mix_heads(p.mix.weights, p.mix.weights_bias, p.heads, rows, memory.softmax, memory.raw);
    }
    times_values(p, memory.raw, v, first, rows, memory.inverse, memory.inverse_stride, out);
  }
}

void clear_rows(const HeadRows<float>& rows, int64_t heads, int64_t tokens, int64_t channels) {
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < tokens; ++t) {
      float* const row = rows.of(h).data + t * rows.stride;
      for (int64_t c = 0; c < channels; c += kLanes) store(row + c, Vec{});
    }
  }
}

void backward(const SoftmaxHeads& p, const In& q, const In& k, const In& v, const In& grad_out,
              const SoftmaxGradients& to, Arena arena) {
  const BackwardMemory memory(p, arena);
  const Pairs &values = memory.values, &softmax = memory.softmax, &weights = memory.weights,
              &grad = memory.grad, &mixed_grad = memory.mixed_grad;
  const int64_t block = block_queries(p);
  transpose_keys(k, p, memory.keys);
  transpose_keys(v, p, values);
  clear_rows(to.k, p.heads, p.keys, p.head_dim);
  clear_rows(to.v, p.heads, p.keys, p.value_dim);
  for (int64_t first = 0; first < p.queries; first += block) {
    const int64_t rows = min(block, p.queries - first);
    softmax_of_logits(p, q, memory, first, rows, true);
    if (p.talking()) mix_heads(p.mix.weights, p.mix.weights_bias, p.heads, rows, softmax, weights);

    // Of the weights that values are multiplied with, then of the softmax's output, then of its input.
    for (int64_t h = 0; h < p.heads; ++h) {
      const auto of_head = grad_out.of(h);
      product(rows, values.stride, StepsAdjacent<true>{of_head.data + first * of_head.stride, of_head.stride},
              Vectors<>{values.of(h), values.stride}, p.value_dim,
              WriteTo{mixed_grad.of(h), mixed_grad.stride});
      const auto into = to.v.of(h);
      product(p.keys, p.value_dim, RowsAdjacent{weights.of(h), weights.stride},
              Vectors<>{of_head.data + first * of_head.stride, of_head.stride}, rows,
              AddTo{into.data, into.stride});
    }
    if (p.talking()) {
      add_mix_gradients(to.mix.weights, to.mix.weights_bias, p.heads, rows, p.keys, mixed_grad, softmax);
      mix_heads_back(p.mix.weights, p.heads, rows, mixed_grad, grad);
    }
    for (int64_t h = 0; h < p.heads; ++h) softmax_backward_rows(softmax.of(h), grad.of(h), grad.stride, rows);
    if (p.talking()) {
      add_mix_gradients(to.mix.logits, to.mix.logits_bias, p.heads, rows, p.keys, grad, memory.raw);
      mix_heads_back(p.mix.logits, p.heads, rows, grad, mixed_grad);
    }

    for (int64_t h = 0; h < p.heads; ++h) {
      const float* const of_logits = mixed_grad.of(h);
      for (int64_t r = 0; r < rows; ++r) {
        float* const into = to.bias + (h * p.queries + first + r) * p.keys;
        const float* const row = of_logits + r * mixed_grad.stride;
        int64_t at = 0;
        for (; at + kLanes <= p.keys; at += kLanes) store(into + at, load(into + at) + load(row + at));
        if (at < p.keys) {
          store_first(into + at, load_first(into + at, p.keys - at) + load(row + at), p.keys - at);
        }
      }
      const auto grad_q = to.q.of(h), grad_k = to.k.of(h);
      const auto from_q = q.of(h), from_k = k.of(h);
      product(rows, p.head_dim, StepsAdjacent<true>{of_logits, mixed_grad.stride},
              Vectors<>{from_k.data, from_k.stride}, p.keys,
              StorePadded<SoftmaxScaled<false>>{grad_q.row(first), grad_q.stride, {p.softmax_scale}});
      product(p.keys, p.head_dim, RowsAdjacent{of_logits, mixed_grad.stride},
              Vectors<>{from_q.data + first * from_q.stride, from_q.stride}, rows,
              StorePadded<SoftmaxScaled<true>>{grad_k.data, grad_k.stride, {p.softmax_scale}});
    }
  }
}

constexpr SoftmaxUkernels kUkernels = {scratch_floats<ForwardMemory>, scratch_floats<BackwardMemory>, forward,
                                       backward};

}  // namespace

const SoftmaxUkernels& softmax_ukernels() { return kUkernels; }

}  // namespace effattn::cpu::EFFATTN_ISA
