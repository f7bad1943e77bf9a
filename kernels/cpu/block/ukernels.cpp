#include "ukernels.h"

#include "../core/activations.h"
#include "../core/tile.h"

namespace effattn::cpu::EFFATTN_ISA {
namespace {

constexpr int kVectorsOfBlock = kBlock / kLanes;

// Sums held in registers: R pixels x V vectors of outputs, beside V vectors of weights and a scalar.
#if defined(__AVX512F__)
constexpr int kMaxPixels = 14, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kMaxPixels = 6, kVectors = 4;
#else
constexpr int kMaxPixels = 6, kVectors = kVectorsOfBlock < 2 ? 1 : 2;
#endif

// In blocks of ever fewer pixels: f(a number of pixels, the first) for as few blocks as can be, all of about
// the same size, since a narrow one waits for the latency of its sums.
template <class F>
EFFATTN_INLINE void in_pixel_blocks(int64_t begin, int64_t end, int64_t max, const F& f) {
  for (int64_t left = end - begin; left > 0;) {
    const int64_t blocks = ceil_div(left, max), pixels = ceil_div(left, blocks);
    f(pixels, end - left);
    left -= pixels;
  }
}

// --- convolution ------------------------------------------------------------------------------------------

// Channels that are summed up in one go: sums of few terms, then a sum of sums, lose less to rounding than
// one long sum.
constexpr int64_t kSegmentsOfSum = 8;

template <int R, int V>
struct Sums {
  Vec of[R][V];

  // `total` takes what there is; the sums begin anew.
  EFFATTN_INLINE void move_to(float* total, bool is_first) {
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v, total += kLanes) {
        store(total, is_first ? of[r][v] : of[r][v] + load(total));
        of[r][v] = Vec{};
      }
    }
  }
  EFFATTN_INLINE void add_total(const float* total) {
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v, total += kLanes) of[r][v] = load(total) + of[r][v];
    }
  }

  // One channel: its scalars of R pixels times its weights.
  template <int Stride>
  EFFATTN_INLINE void add(const float* scalars, const float* weights) {
    Vec w[V];
    EFFATTN_UNROLL
    for (int v = 0; v < V; ++v) w[v] = load(weights + v * kLanes);
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec scalar = broadcast(scalars[r * Stride * kBlock]);
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) of[r][v] += scalar * w[v];
    }
  }
};

// The outputs of a pixel that a register block has, wherever they lie.
template <int V>
struct Outputs {
  float* out[V];
  const float* residual[V];
  bool adds;

  Outputs(const ConvolutionRow& row, int64_t pixel, int vector) : adds(row.residual[0] != nullptr) {
    for (int v = 0; v < V; ++v) {
      const int block = (vector + v) / kVectorsOfBlock, at = (vector + v) % kVectorsOfBlock * kLanes;
      out[v] = row.out[block] + pixel * kBlock + at;
      residual[v] = adds ? row.residual[block] + pixel * kBlock + at : nullptr;
    }
  }

  template <int R, class F>
  EFFATTN_INLINE void finish(const Sums<R, V>& sums, const F& f) const {
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) {
        Vec x = f(sums.of[r][v]);
        if (adds) x += load(residual[v] + r * kBlock);
        store(out[v] + r * kBlock, x);
      }
    }
  }
  // Of functions that need the registers.
  template <class F>
  EFFATTN_INLINE void finish_in_memory(int pixels, const F& f) const {
    for (int r = 0; r < pixels; ++r) {
      for (int v = 0; v < V; ++v) {
        float* const at = out[v] + r * kBlock;
        Vec x = f(load(at));
        if (adds) x += load(residual[v] + r * kBlock);
        store(at, x);
      }
    }
  }
};

// A function of its own, for the sake of its registers.
template <int R, int V, int Stride>
__attribute__((noinline)) void convolve_pixels(const ConvolutionRow& row, int64_t pixel, int vector) {
  Sums<R, V> sums;
  EFFATTN_UNROLL
  for (int v = 0; v < V; ++v) {
    const Vec bias = load(row.bias + (vector + v) * kLanes);
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r) sums.of[r][v] = bias;
  }
  const float* weights = row.weights + vector * kLanes;
  const float* const* segment = row.segments;
  const int64_t offset = pixel * Stride * kBlock;
  alignas(64) float total[R * V * kLanes];
  int64_t in_sum = 0;
  bool has_total = false;
  for (int64_t i = 0; i < row.whole; ++i, ++segment, ++in_sum) {
    if (in_sum == kSegmentsOfSum) {
      sums.move_to(total, !has_total);
      has_total = true;
      in_sum = 0;
    }
    const float* scalars = *segment + offset;
    for (int64_t c = 0; c < kBlock; c += 4) {
      EFFATTN_UNROLL
      for (int j = 0; j < 4; ++j) sums.template add<Stride>(scalars + j, weights + j * kPanel);
      scalars += 4;
      weights += 4 * kPanel;
      asm("" : "+r"(scalars), "+r"(weights));
    }
  }
  for (int64_t i = 0; i < row.partial; ++i, ++segment) {
    const float* scalars = *segment + offset;
    for (int64_t c = 0; c < row.depth; ++c, weights += kPanel)
      sums.template add<Stride>(scalars + c, weights);
  }
  if (has_total) sums.add_total(total);
  const Outputs<V> to(row, pixel, vector);
  switch (row.activation) {
    case Activation::kNone:
      return to.finish(sums, [](Vec x) { return x; });
    case Activation::kRelu:
      return to.finish(sums, [](Vec x) { return relu(x); });
    case Activation::kHardswish:
      return to.finish(sums, [](Vec x) { return hardswish(x); });
    default:
      Outputs<V> alone = to;
      alone.adds = false;
      alone.finish(sums, [](Vec x) { return x; });
      with_activation(row.activation, [&](auto f) { to.finish_in_memory(R, f); });
  }
}

using ConvolvePixels = void (*)(const ConvolutionRow&, int64_t pixel, int vector);

// By the number of pixels, from 1 on.
template <int V, int Stride, int... R>
constexpr auto convolve_table(std::integer_sequence<int, R...>) {
  struct Table {
    ConvolvePixels of[sizeof...(R)];
  };
  return Table{{convolve_pixels<R + 1, V, Stride>...}};
}

template <int V, int Stride>
void convolve_vectors(const ConvolutionRow& row, int vector) {
  static constexpr auto kTable = convolve_table<V, Stride>(std::make_integer_sequence<int, kMaxPixels>{});
  in_pixel_blocks(row.begin, row.end, kMaxPixels,
                  [&](int64_t pixels, int64_t first) { kTable.of[pixels - 1](row, first, vector); });
}

template <int Stride>
void convolve_with_stride(const ConvolutionRow& row) {
  const int vectors = static_cast<int>(row.blocks) * kVectorsOfBlock;
  int vector = 0;
  for (; vector + kVectors <= vectors; vector += kVectors) convolve_vectors<kVectors, Stride>(row, vector);
  for (; vector < vectors; ++vector) convolve_vectors<1, Stride>(row, vector);
}

void convolve(const ConvolutionRow& row) {
  row.stride == 1 ? convolve_with_stride<1>(row) : convolve_with_stride<2>(row);
}

// --- depthwise convolution --------------------------------------------------------------------------------

template <class F>
EFFATTN_INLINE void finish_pixel(const DepthwiseRow& row, int64_t at, Vec sum, const F& f) {
  Vec x = f(sum);
  if (row.residual != nullptr) x += load(row.residual + at);
  store(row.out + at, x);
}

// P neighbours, a vector of channels. A pixel that is loaded serves all the results that it has a part in.
template <int K, int Stride, int P>
__attribute__((noinline)) void depthwise_pixels(const DepthwiseRow& row, int64_t pixel, int64_t channel) {
  Vec sums[P];
  const Vec bias = load(row.bias + channel);
  EFFATTN_UNROLL
  for (int p = 0; p < P; ++p) sums[p] = bias;
  const float* taps = row.taps + channel;
  for (int i = 0; i < K; ++i, taps += K * kBlock) {
    Vec weights[K];
    EFFATTN_UNROLL
    for (int j = 0; j < K; ++j) weights[j] = load(taps + j * kBlock);
    const float* const in = row.rows[i] + pixel * Stride * kBlock + channel;
    EFFATTN_UNROLL
    for (int x = 0; x < (P - 1) * Stride + K; ++x) {
      const Vec of_pixel = in_register(load(in + x * kBlock));
      EFFATTN_UNROLL
      for (int j = 0; j < K; ++j) {
        if (const int p = (x - j) / Stride; x >= j && (x - j) % Stride == 0 && p < P) {
          sums[p] += weights[j] * of_pixel;
        }
      }
    }
  }
  const int64_t at = pixel * kBlock + channel;
  switch (row.activation) {
    case Activation::kNone:
    case Activation::kRelu:
    case Activation::kHardswish:
      break;
    default:
      return with_activation(row.activation, [&](auto f) {
        for (int p = 0; p < P; ++p) finish_pixel(row, at + p * kBlock, sums[p], f);
      });
  }
  const bool is_relu = row.activation == Activation::kRelu, is_none = row.activation == Activation::kNone;
  EFFATTN_UNROLL
  for (int p = 0; p < P; ++p) {
    finish_pixel(row, at + p * kBlock, sums[p], [&](Vec x) {
      return is_none ? x : is_relu ? relu(x) : hardswish(x);
    });
  }
}

// Kernels of any other size: a result at a time.
void depthwise_pixel(const DepthwiseRow& row, int64_t pixel, int64_t channel) {
  Vec sum = load(row.bias + channel);
  for (int64_t i = 0; i < row.kernel; ++i) {
    for (int64_t j = 0; j < row.kernel; ++j) {
      sum += load(row.taps + (i * row.kernel + j) * kBlock + channel) *
             load(row.rows[i] + (pixel * row.stride + j) * kBlock + channel);
    }
  }
  with_activation(row.activation, [&](auto f) { finish_pixel(row, pixel * kBlock + channel, sum, f); });
}

template <int K, int Stride>
void depthwise_row(const DepthwiseRow& row, int64_t channel) {
  constexpr int kPixels = kMaxPixels >= 14 ? 8 : 4;
  int64_t pixel = row.begin;
  const int64_t end = row.end;
  if (kPixels == 8 && (end - pixel) % 7 == 0) {  // widths of the networks
    for (; pixel < end; pixel += 7) depthwise_pixels<K, Stride, 7>(row, pixel, channel);
  }
  for (; pixel + kPixels <= end; pixel += kPixels) depthwise_pixels<K, Stride, kPixels>(row, pixel, channel);
  for (; pixel + 2 <= end; pixel += 2) depthwise_pixels<K, Stride, 2>(row, pixel, channel);
  for (; pixel < end; ++pixel) depthwise_pixels<K, Stride, 1>(row, pixel, channel);
}

void depthwise(const DepthwiseRow& row) {
  for (int64_t channel = 0; channel < kBlock; channel += kLanes) {
    with_kernel(
        row.kernel,
        [&](auto k) {
          row.stride == 1 ? depthwise_row<k.value, 1>(row, channel) : depthwise_row<k.value, 2>(row, channel);
        },
        [&] {
          for (int64_t pixel = row.begin; pixel < row.end; ++pixel) depthwise_pixel(row, pixel, channel);
        });
  }
}

// --- pixels -----------------------------------------------------------------------------------------------

void pool(const PoolRow& row) {
  const int64_t reach = row.kernel / 2;
  for (int64_t channel = 0; channel < kBlock; channel += kLanes) {
    const Vec factor = load(row.factor + channel);
    for (int64_t pixel = row.begin; pixel < row.end; ++pixel) {
      const int64_t first = max(pixel - reach, 0), last = min(pixel + reach, row.width - 1);
      Vec sum{};
      for (int64_t i = 0; i < row.count; ++i) {
        for (int64_t x = first; x <= last; ++x) sum += load(row.rows[i] + x * kBlock + channel);
      }
      const int64_t at = pixel * kBlock + channel;
      const Vec x = load(row.x + at), mean = sum / static_cast<float>(row.count * (last - first + 1));
      store(row.out + at, x + factor * (mean - x));
    }
  }
}

EFFATTN_INLINE float sum_of_lanes(Vec x) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

void normalize(const NormRow& row) {
  const Vec lanes = lane_numbers();
  const auto in_vectors = [&](int64_t pixel, const auto& f) {
    for (int64_t c = 0; c < row.channels; c += kLanes) {
      f(c, load(row.in[c / kBlock] + pixel * kBlock + c % kBlock));
    }
  };
  // What lies behind the last channel may be an activation's value at zero.
  const auto of_channels = [&](int64_t c, Vec x) {
    return lanes < static_cast<float>(row.channels - c) ? x : Vec{};
  };
  const float count = static_cast<float>(row.channels);
  for (int64_t pixel = row.begin; pixel < row.end; ++pixel) {
    Vec sum{}, squares{};
    in_vectors(pixel, [&](int64_t c, Vec x) { sum += of_channels(c, x); });
    const Vec mean = broadcast(sum_of_lanes(sum) / count);
    in_vectors(pixel, [&](int64_t c, Vec x) {
      const Vec distance = of_channels(c, x - mean);
      squares += distance * distance;
    });
    const Vec scale = broadcast(1.0f / __builtin_sqrtf(sum_of_lanes(squares) / count + row.eps));
    in_vectors(pixel, [&](int64_t c, Vec x) {
      store(row.out[c / kBlock] + pixel * kBlock + c % kBlock,
            (x - mean) * scale * load(row.gain + c) + load(row.bias + c));
    });
  }
}

// Calls f(offset of a vector, channel) for all vectors of the pixels.
template <class F>
EFFATTN_INLINE void each_vector(int64_t pixels, const F& f) {
  for (int64_t at = 0; at < pixels * kBlock; at += kLanes) f(at, at % kBlock);
}

void multiply(int64_t pixels, const float* in, const float* factor, float* out) {
  each_vector(pixels, [&](int64_t at, int64_t c) { store(out + at, load(in + at) * load(factor + c)); });
}

void sum(int64_t pixels, const float* in, float* total) {
  for (int64_t c = 0; c < kBlock; c += kLanes) {
    constexpr int kChains = 4;  // hide the latency of an addition
    Vec sums[kChains] = {};
    for (int64_t i = 0; i < pixels; ++i) sums[i % kChains] += load(in + i * kBlock + c);
    store(total + c, load(total + c) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
}

void activate(Activation activation, int64_t pixels, const float* in, float* out) {
  with_activation(activation, [&](auto f) {
    each_vector(pixels, [&](int64_t at, int64_t) { store(out + at, f(load(in + at))); });
  });
}

// --- tensors ----------------------------------------------------------------------------------------------

void load_pixels(DType dtype, const Image& image, int64_t pixels, int64_t channels, float* to) {
  if (channels < kBlock) clear(to, pixels * kBlock);
  load_image(dtype, image, pixels, channels, Tile{to, kBlock, false});
}

void store_pixels(DType dtype, const Image& image, int64_t pixels, int64_t channels, const float* from) {
  store_image(dtype, image, pixels, channels, Tile{const_cast<float*>(from), kBlock, false});
}

constexpr BlockUkernels kUkernels = {convolve, depthwise, pool,        normalize,   multiply,
                                     sum,      activate,  load_pixels, store_pixels};

}  // namespace

const BlockUkernels& block_ukernels() { return kUkernels; }

}  // namespace effattn::cpu::EFFATTN_ISA
