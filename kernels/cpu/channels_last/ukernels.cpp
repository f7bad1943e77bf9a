#include "ukernels.h"

#include "../core/activations.h"
#include "../core/product.h"

namespace effattn::cpu::EFFATTN_ISA {
namespace {

void transpose_weights(const float* weights, int64_t outputs, int64_t inputs, const Rows<float>& to) {
  load_tile<false>(Tile{to.data, to.stride, false}, Place<const float>{weights, 1, inputs}, inputs, outputs);
}

void project(int64_t tokens, int64_t inputs, int64_t outputs, const Features& in,
             const Rows<const float>& weights, const float* bias, const Rows<float>& out,
             const PrefetchRange& next) {
  const Vectors<> vectors{weights.data, weights.stride};
  const StorePadded<Biased<false>> edge{out.data, out.stride, {bias}};
  PrefetchQueue prefetch;
  prefetch.add(Place<const float>{next.data, 1, next.floats}, next.floats, 1);
  if (kRows == 8 && tokens % 8 != 0 && tokens % 7 == 0 && in.token_stride != 1) {  // windows of 7x7
    return product<7>(tokens, outputs, StepsAdjacent<true>{in.data, in.token_stride}, vectors, inputs, edge,
                      prefetch);
  }
  if (in.token_stride == 1) {
    product(tokens, outputs, RowsAdjacent{in.data, in.channel_stride}, vectors, inputs, edge, prefetch);
  } else if (inputs >= 64) {
    product(tokens, outputs, StepsAdjacent<true>{in.data, in.token_stride}, vectors, inputs, edge, prefetch);
  } else {
    product(tokens, outputs, StepsAdjacent<false>{in.data, in.token_stride}, vectors, inputs, edge, prefetch);
  }
}

void fill(const Rows<const float>& in, const PaddedImage& to) {
  const float* row = in.data;
  for (int64_t y = 0; y < to.height; ++y) {
    float* pixel = to.at(y, 0);
    for (int64_t x = 0; x < to.width; ++x, row += in.stride, pixel += to.channels) {
      for (int64_t c = 0; c < to.channels; c += kLanes) store(pixel + c, load(row + c));
    }
  }
}

// P neighbours in a row of the image, a vector of channels. A pixel that is loaded serves all the results
// that it has a part in.
template <int K, int P>
__attribute__((noinline)) void depthwise_pixels(float* out, int64_t out_stride, const float* in,
                                                int64_t row_floats, int64_t channels, const float* taps,
                                                const float* bias) {
  Vec acc[P];
  EFFATTN_UNROLL
  for (int p = 0; p < P; ++p) acc[p] = load(bias);
  for (int i = 0; i < K; ++i, in += row_floats) {
    Vec weights[K];
    EFFATTN_UNROLL
    for (int j = 0; j < K; ++j, taps += channels) weights[j] = load(taps);
    const float* at = in;
    EFFATTN_UNROLL
    for (int x = 0; x < P + K - 1; ++x, at += channels) {
      const Vec pixel = in_register(load(at));
      EFFATTN_UNROLL
      for (int j = 0; j < K; ++j) {
        if (const int p = x - j; p >= 0 && p < P) acc[p] += weights[j] * pixel;
      }
    }
  }
  EFFATTN_UNROLL
  for (int p = 0; p < P; ++p, out += out_stride) store(out, acc[p]);
}

template <int K, int P>
inline void depthwise_row(int64_t x, int64_t y, const PaddedImage& in, const float* taps, const float* bias,
                          const Rows<float>& out) {
  for (; x + P <= in.width; x += P) {
    for (int64_t c = 0; c < in.channels; c += kLanes) {
      depthwise_pixels<K, P>(out.data + (y * in.width + x) * out.stride + c, out.stride,
                             in.at(y - K / 2, x - K / 2) + c, in.row_floats(), in.channels, taps + c,
                             bias + c);
    }
  }
  if constexpr (P > 1) depthwise_row<K, P / 2>(x, y, in, taps, bias, out);
}

// Enough sums under way to hide the latency of an addition; widths of the networks are multiples of 7 and 8.
template <int K>
void depthwise_image(const PaddedImage& in, const float* taps, const float* bias, const Rows<float>& out) {
  for (int64_t y = 0; y < in.height; ++y) {
    if (in.width % 7 == 0) {
      depthwise_row<K, 7>(0, y, in, taps, bias, out);
    } else {
      depthwise_row<K, 8>(0, y, in, taps, bias, out);
    }
  }
}

// Kernels of any other size: a result at a time.
void depthwise_any(int64_t kernel, const PaddedImage& in, const float* taps, const float* bias,
                   const Rows<float>& out) {
  const int64_t border = kernel / 2;
  for (int64_t y = 0; y < in.height; ++y) {
    for (int64_t x = 0; x < in.width; ++x) {
      for (int64_t c = 0; c < in.channels; c += kLanes) {
        Vec acc = load(bias + c);
        for (int64_t i = 0; i < kernel; ++i) {
          for (int64_t j = 0; j < kernel; ++j) {
            acc += load(taps + (i * kernel + j) * in.channels + c) *
                   load(in.at(y + i - border, x + j - border) + c);
          }
        }
        store(out.data + (y * in.width + x) * out.stride + c, acc);
      }
    }
  }
}

void depthwise(int64_t kernel, const PaddedImage& in, const float* taps, const float* bias,
               const Rows<float>& out) {
  with_kernel(
      kernel, [&](auto k) { depthwise_image<k.value>(in, taps, bias, out); },
      [&] { depthwise_any(kernel, in, taps, bias, out); });
}

// --- backward -------------------------------------------------------------------------------------------

// A row of K taps at a time: the pixels under them follow each other.
template <int K>
void depthwise_taps(const PaddedImage& in, const Rows<const float>& grad_out, float* taps) {
  for (int64_t c = 0; c < in.channels; c += kLanes) {
    for (int i = 0; i < K; ++i) {
      Vec acc[K] = {};
      const float* grad = grad_out.data + c;
      for (int64_t y = 0; y < in.height; ++y) {
        const float* at = in.at(y + i - K / 2, -(K / 2)) + c;
        for (int64_t x = 0; x < in.width; ++x, at += in.channels, grad += grad_out.stride) {
          const Vec g = load(grad);
          EFFATTN_UNROLL
          for (int j = 0; j < K; ++j) acc[j] += g * load(at + j * in.channels);
        }
      }
      EFFATTN_UNROLL
      for (int j = 0; j < K; ++j) {
        float* const to = taps + (i * K + j) * in.channels + c;
        store(to, load(to) + acc[j]);
      }
    }
  }
}

void depthwise_taps_any(int64_t kernel, const PaddedImage& in, const Rows<const float>& grad_out,
                        float* taps) {
  for (int64_t c = 0; c < in.channels; c += kLanes) {
    for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
      Vec acc = {};
      for (int64_t y = 0; y < in.height; ++y) {
        const float* at = in.at(y + tap / kernel - kernel / 2, tap % kernel - kernel / 2) + c;
        const float* grad = grad_out.data + y * in.width * grad_out.stride + c;
        for (int64_t x = 0; x < in.width; ++x, at += in.channels, grad += grad_out.stride) {
          acc += load(grad) * load(at);
        }
      }
      store(taps + tap * in.channels + c, load(taps + tap * in.channels + c) + acc);
    }
  }
}

// The sum of term(row) over tokens, for a vector of channels.
template <class Term>
EFFATTN_INLINE Vec sum_over_tokens(int64_t tokens, const Rows<const float>& rows, int64_t channel,
                                   const Term& term) {
  constexpr int kChains = 4;  // hide the latency of an addition
  Vec totals[kChains] = {};
  for (int64_t t = 0; t < tokens; ++t) totals[t % kChains] += term(load(rows.row(t) + channel));
  return (totals[0] + totals[1]) + (totals[2] + totals[3]);
}

void add_columns(int64_t tokens, int64_t channels, const Rows<const float>& rows, float* to) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    store(to + c, load(to + c) + sum_over_tokens(tokens, rows, c, [](Vec x) { return x; }));
  }
}

void depthwise_backward(int64_t kernel, const PaddedImage& in, const Rows<const float>& grad_out, float* taps,
                        float* bias) {
  add_columns(in.height * in.width, in.channels, grad_out, bias);
  with_kernel(
      kernel, [&](auto k) { depthwise_taps<k.value>(in, grad_out, taps); },
      [&] { depthwise_taps_any(kernel, in, grad_out, taps); });
}

void project_backward(int64_t tokens, int64_t inputs, int64_t outputs, const Rows<const float>& in,
                      const Rows<const float>& grad_out, const Rows<const float>& weights,
                      const Rows<float>& grad_in, const Rows<float>& grad_weights, float* grad_bias) {
  product(tokens, inputs, StepsAdjacent<true>{grad_out.data, grad_out.stride},
          Vectors<>{weights.data, weights.stride}, outputs, AddTo{grad_in.data, grad_in.stride});
  product(outputs, inputs, RowsAdjacent{grad_out.data, grad_out.stride}, Vectors<>{in.data, in.stride},
          tokens, AddTo{grad_weights.data, grad_weights.stride});
  add_columns(tokens, outputs, grad_out, grad_bias);
}

// --- rows -----------------------------------------------------------------------------------------------

void add_rows(int64_t tokens, int64_t channels, const Rows<const float>& in, const Rows<float>& out) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* const to = out.row(t);
    for (int64_t c = 0; c < channels; c += kLanes) store(to + c, load(to + c) + load(in.row(t) + c));
  }
}

template <class F>
void each_vector(int64_t tokens, int64_t channels, const Rows<const float>& in, const Rows<float>& out,
                 const F& f) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < channels; c += kLanes) store(out.row(t) + c, f(load(in.row(t) + c)));
  }
}

void activate(Activation activation, int64_t tokens, int64_t channels, const Rows<const float>& in,
              const Rows<float>& out) {
  with_activation(activation, [&](auto f) { each_vector(tokens, channels, in, out, f); });
}

// The two source pixels of a bilinear interpolation along one axis.
struct Interpolation {
  int64_t first, second;
  float weight;  // of the second

  Interpolation(int64_t at, int64_t size, int64_t out_size) {
    const float exact =
        (static_cast<float>(at) + 0.5f) * static_cast<float>(size) / static_cast<float>(out_size) - 0.5f;
    const float inside = exact > 0.0f ? exact : 0.0f;
    first = min(static_cast<int64_t>(inside), size - 1);
    second = min(first + 1, size - 1);
    weight = inside - static_cast<float>(first);
  }
};

void upsample(int64_t channels, const Rows<const float>& in, int64_t height, int64_t width, int64_t y,
              int64_t out_height, int64_t out_width, const Rows<float>& out) {
  const Interpolation down(y, height, out_height);
  for (int64_t x = 0; x < out_width; ++x) {
    const Interpolation across(x, width, out_width);
    const float* const corners[] = {in.data + (down.first * width + across.first) * in.stride,
                                    in.data + (down.first * width + across.second) * in.stride,
                                    in.data + (down.second * width + across.first) * in.stride,
                                    in.data + (down.second * width + across.second) * in.stride};
    const Vec right = broadcast(across.weight), left = broadcast(1.0f - across.weight);
    const Vec bottom = broadcast(down.weight), top = broadcast(1.0f - down.weight);
    float* const to = out.data + x * out.stride;
    for (int64_t c = 0; c < channels; c += kLanes) {
      store(to + c, top * (left * load(corners[0] + c) + right * load(corners[1] + c)) +
                        bottom * (left * load(corners[2] + c) + right * load(corners[3] + c)));
    }
  }
}

// --- BatchNorm in training ------------------------------------------------------------------------------

void moments(int64_t tokens, int64_t channels, const Rows<const float>& in, float* mean, float* squares) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Vec middle =
        sum_over_tokens(tokens, in, c, [](Vec x) { return x; }) * (1.0f / static_cast<float>(tokens));
    store(mean + c, middle);
    store(squares + c, sum_over_tokens(tokens, in, c, [&](Vec x) { return (x - middle) * (x - middle); }));
  }
}

void affine(int64_t tokens, int64_t channels, const float* gain, const Rows<const float>& in,
            const float* other_gain, const Rows<const float>& other, const float* shift,
            const Rows<float>& out) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Vec factor = load(gain + c), term = load(shift + c);
    if (other.data == nullptr) {
      for (int64_t t = 0; t < tokens; ++t) {
        store(out.row(t) + c, factor * load(in.row(t) + c) + term);
      }
      continue;
    }
    const Vec second = load(other_gain + c);
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec sum = second * load(other.row(t) + c) + term;
      store(out.row(t) + c, factor * load(in.row(t) + c) + sum);
    }
  }
}

void sum_gradients(int64_t tokens, int64_t channels, const Rows<const float>& grad,
                   const Rows<const float>& in, const float* mean, float* sums, float* products) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    constexpr int kChains = 2;
    const Vec middle = load(mean + c);
    Vec total[kChains] = {}, product[kChains] = {};
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec g = load(grad.row(t) + c);
      total[t % kChains] += g;
      product[t % kChains] += g * (load(in.row(t) + c) - middle);
    }
    store(sums + c, load(sums + c) + (total[0] + total[1]));
    store(products + c, load(products + c) + (product[0] + product[1]));
  }
}

void load_rows(DType dtype, const Image& image, int64_t tokens, int64_t channels, const Rows<float>& to) {
  load_image(dtype, image, tokens, channels, Tile{to.data, to.stride, false});
}

void store_rows(DType dtype, const Image& image, int64_t tokens, int64_t channels, const Rows<float>& from) {
  store_image(dtype, image, tokens, channels, Tile{from.data, from.stride, false});
}

constexpr ChannelsLastUkernels kUkernels = {
    transpose_weights, project, fill,   depthwise,     depthwise_backward, add_rows,  activate,
    upsample,          moments, affine, sum_gradients, project_backward,   load_rows, store_rows};

}  // namespace

const ChannelsLastUkernels& channels_last_ukernels() { return kUkernels; }

}  // namespace effattn::cpu::EFFATTN_ISA
