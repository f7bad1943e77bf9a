#include "ukernels.h"

#include "../core/depthwise.h"
#include "../core/dots.h"
#include "../core/product.h"

namespace effattn::cpu::EFFATTN_ISA {
namespace {

using Weights = ScaleWeights<const float>;
using Gradients = ScaleWeights<float>;
using In = Plane<const float>;
using Out = Plane<float>;

int64_t scratch_floats(const MultiScaleParams& p, int64_t rows) {
  int64_t kernel = 1;
  for (int s = 0; s < p.scales; ++s) kernel = max(kernel, p.kernels[s]);
  const int64_t d = padded(p.head_dim);
  const int64_t pieces[] = {
      2 * PaddedRows::floats(rows + kernel - 1, p.width, kernel / 2),  // of the input and of a gradient
      kernel * kernel * (1 + kLanes),                                  // flipped weights; sums of lanes
      d * (p.head_dim + 16),                                           // transposed weights
  };
  int64_t total = 4 * Arena::kMaxOverhead;
  for (const int64_t piece : pieces) total += piece;
  return total;
}

// --- forward --------------------------------------------------------------------------------------------

float bias_of(const float* biases, int64_t channel) { return biases == nullptr ? 0.0f : biases[channel]; }

void convolve(const MultiScaleParams& p, int64_t kernel, const Weights& branch, int64_t first, int64_t rows,
              const In& in, const Out& mixed, Arena arena) {
  const int64_t border = kernel / 2, padded_rows = rows + 2 * border;
  const int64_t line_floats = PaddedRows::floats(padded_rows, p.width, border);
  // Two, one filled while the other is read: a load right behind the store of a part of it has to wait.
  const PaddedRows lines[] = {{arena.floats(line_floats), padded_rows, p.width, border},
                              {arena.floats(line_floats), padded_rows, p.width, border}};
  const auto fill = [&](int64_t c) {
    lines[c % 2].fill(in.row(c), first - border, padded_rows, p.height, p.width);
  };
  fill(0);
  for (int64_t c = 0; c < p.head_dim; ++c) {
    if (c + 1 < p.head_dim) fill(c + 1);
    float* const row = mixed.data + c * mixed.stride;
    // Products take whole vectors; what memory happens to hold there may be subnormal, and very slow.
    store(row + rows * p.width, Vec{});
    depthwise<false>(kernel, rows, row, p.width, lines[c % 2], branch.depthwise + c * kernel * kernel,
                     bias_of(branch.depthwise_bias, c), p.width);
  }
}

// Calls f with where a product goes, at a bias for each row or at zero.
template <class F>
void with_edge(float* out, int64_t row_stride, const float* biases, const F& f) {
  if (biases == nullptr) {
    f(WriteTo{out, row_stride});
  } else {
    f(StorePadded<Biased<true>>{out, row_stride, {biases}});
  }
}

void pointwise(const MultiScaleParams& p, const Weights& branch, int64_t tokens, const In& mixed,
               const Out& out, Arena arena) {
  const int64_t d = p.head_dim;
  const Tile by_input = tile(arena, d, d, false);  // a row an input: a step's scalars lie side by side
  load_tile<false>(by_input, Place<const float>{branch.pointwise, 1, d}, d, d);
  const RowsAdjacent weights{by_input.data, by_input.row_stride};
  const Vectors<> vectors{mixed.data, mixed.stride};
  with_edge(out.data, out.stride, branch.pointwise_bias,
            [&](const auto& edge) { product(d, tokens, weights, vectors, d, edge); });
}

// --- backward -------------------------------------------------------------------------------------------

void pointwise_backward(const MultiScaleParams& p, const Weights& branch, const Gradients& gradients,
                        int64_t tokens, const In& mixed, const In& grad_out, const Out& grad_mixed) {
  const int64_t d = p.head_dim;
  product(d, tokens, RowsAdjacent{branch.pointwise, d}, Vectors<>{grad_out.data, grad_out.stride}, d,
          WriteTo{grad_mixed.data, grad_mixed.stride});
  dot_rows(gradients.pointwise, d, grad_out, mixed, d, d, tokens);
  if (gradients.pointwise_bias != nullptr) {
    for (int64_t c = 0; c < d; ++c) {
      gradients.pointwise_bias[c] += sum_of_row(grad_out.data + c * grad_out.stride, tokens);
    }
  }
}

void depthwise_backward(const MultiScaleParams& p, int64_t kernel, int64_t rows_at_once,
                        const Weights& branch, const Gradients& gradients, const In& in, const In& grad_mixed,
                        const Out& grad_in, Arena arena) {
  const int64_t border = kernel / 2, size = kernel * kernel, padded_rows = rows_at_once + 2 * border;
  const int64_t line_floats = PaddedRows::floats(padded_rows, p.width, border);
  const PaddedRows inputs(arena.floats(line_floats), padded_rows, p.width, border);
  const PaddedRows grads(arena.floats(line_floats), padded_rows, p.width, border);
  float* const flipped = arena.floats(size);
  Vec* const sums = reinterpret_cast<Vec*>(arena.floats(size * kLanes));
  for (int64_t c = 0; c < p.head_dim; ++c) {
    for (int64_t i = 0; i < size; ++i) {
      flipped[i] = branch.depthwise[c * size + size - 1 - i];
      sums[i] = Vec{};
    }
    const float* const in_plane = in.row(c);
    const float* const grad_plane = grad_mixed.data + c * grad_mixed.stride;
    for (int64_t first = 0; first < p.height; first += rows_at_once) {
      const int64_t rows = min(rows_at_once, p.height - first);
      grads.fill(grad_plane, first - border, rows + 2 * border, p.height, p.width);
      depthwise<true>(kernel, rows, grad_in.data + c * grad_in.stride + first * p.width, p.width, grads,
                      flipped, 0.0f, p.width);
      inputs.fill(in_plane, first - border, rows + 2 * border, p.height, p.width);
      depthwise_weight_gradient(kernel, rows, sums, grad_plane + first * p.width, p.width, inputs, p.width);
    }
    for (int64_t i = 0; i < size; ++i) gradients.depthwise[c * size + i] += sum_of_lanes(sums[i]);
    if (gradients.depthwise_bias != nullptr) {
      gradients.depthwise_bias[c] += sum_of_row(grad_plane, p.tokens());
    }
  }
}

constexpr MultiScaleUkernels kUkernels = {scratch_floats, convolve, pointwise, pointwise_backward,
                                          depthwise_backward};

}  // namespace

const MultiScaleUkernels& multi_scale_ukernels() { return kUkernels; }

}  // namespace effattn::cpu::EFFATTN_ISA
