// Multi-scale aggregation by tiles of pixels, in float32: what forward and backward share.
//
// A tile of pixels with its halo goes to shared memory, is convolved and mixed there. Tiles are small, so
// that several blocks share a multiprocessor: the arithmetic of 25 taps limits, not memory.
#pragma once

#include "../../params/multi_scale.h"
#include "../core/launch.h"
#include "../core/tensors.h"
#include "image_tile.h"

namespace effattn::cuda::multi_scale {

// One scale of an image, and the heads of the image itself where they are taken along.
struct Scale {
  ImageView x;
  ScaleWeights<const float> weights;
  int kernel, head_dim, heads;
  int own_heads;  // of the image itself, before those of the scale
  int chunk;      // channels that are staged at once
  int down, across;

  constexpr int tiles() const { return down * across; }
  constexpr int launch_heads() const { return own_heads + heads; }
};

template <class Tiles>
EFFATTN_DEVICE Corner corner_of(const Scale& s, int tile) {
  return {tile / s.across * Tiles::kHeight, tile % s.across * Tiles::kWidth};
}

// Shared memory of a block: what is staged, what is convolved, channels by pixels, and what is mixed, pixels
// by channels.
template <class Tiles>
struct Memory {
  float *staged, *convolved, *mixed;

  EFFATTN_DEVICE explicit Memory(const Scale& s) {
    staged = reinterpret_cast<float*>(shared_memory());
    convolved = staged + s.chunk * Tiles::staged(s.kernel);
    mixed = convolved + s.head_dim * Tiles::kByChannel;
  }
  // `mixed`: how many tiles of them.
  static constexpr int64_t bytes(int chunk, int kernel, int head_dim, int mixed) {
    return 4 * (int64_t{chunk} * Tiles::staged(kernel) + head_dim * Tiles::kByChannel +
                int64_t{mixed} * Tiles::kPixels * Tiles::kByPixel);
  }
};

// The depthwise convolution of head_dim channels of a tile, all of it there after a barrier.
template <class Tiles, int kKernel>
EFFATTN_DEVICE void convolve_head(const Scale& s, const Memory<Tiles>& memory, int64_t batch, int64_t channel,
                                  const Corner& at) {
  const int kernel = kKernel > 0 ? kKernel : s.kernel;
  for (int first = 0; first < s.head_dim; first += s.chunk) {
    const int channels = min(s.chunk, s.head_dim - first);
    stage<Tiles>(s.x, batch, channel + first, channels, at, kernel, memory.staged);
    sync_block();
    const float* const taps = s.weights.depthwise + (channel + first) * kernel * kernel;
    convolve<Tiles, kKernel, 1>(
        memory.staged, taps, channels, kernel, [&](int c, int pixel, const float (&strip)[Tiles::kStrip]) {
          const float* const biases = s.weights.depthwise_bias;
          const float bias = biases != nullptr ? biases[channel + first + c] : 0.0f;
          float* const to = memory.convolved + (first + c) * Tiles::kByChannel + pixel;
          EFFATTN_UNROLL
          for (int e = 0; e < Tiles::kStrip; ++e) to[e] = strip[e] + bias;
        });
    sync_block();
  }
}

// head_dim channels of a tile, of the scale or of the image itself; 0 outside of the image. to: pixels by
// channels.
template <class Tiles, int kKernel>
EFFATTN_DEVICE void aggregate_head(const Scale& s, const Memory<Tiles>& memory, bool is_own, int64_t batch,
                                   int64_t channel, const Corner& at, float* to) {
  if (is_own) {
    load_tile<Tiles>(s.x, batch, channel, s.head_dim, at,
                     [&](int pixel, int c, float x) { to[pixel * Tiles::kByPixel + c] = x; });
  } else {
    convolve_head<Tiles, kKernel>(s, memory, batch, channel, at);
    products(
        kPixelWarps, 1, Tiles::kPixels, s.head_dim, s.head_dim,
        [&](int, int pixel, int k) { return memory.convolved[k * Tiles::kByChannel + pixel]; },
        [&](int, int k, int c) { return s.weights.pointwise[(channel + c) * s.head_dim + k]; },
        [&](int, int pixel, int c, float x) {
          const float* const biases = s.weights.pointwise_bias;
          const float bias = biases != nullptr ? biases[channel + c] : 0.0f;
          to[pixel * Tiles::kByPixel + c] = s.x.has(row_of(at, pixel), col_of(at, pixel)) ? x + bias : 0.0f;
        });
  }
  sync_block();
}

// What a block works on: heads of the image itself come first.
struct TileCoord {
  int64_t batch, channel;
  int head, piece;
  bool is_own;

  // `pieces` of each head of each image; of a head the channels begin at q's, k's or v's.
  EFFATTN_DEVICE TileCoord(const Scale& s, int64_t pieces, int which) {
    const int64_t group = block_index() / pieces;
    piece = static_cast<int>(block_index() % pieces);
    head = static_cast<int>(group % s.launch_heads());
    batch = group / s.launch_heads();
    is_own = head < s.own_heads;
    channel = (static_cast<int64_t>(is_own ? head : head - s.own_heads) * 3 + which) * s.head_dim;
  }
};

// --- launches ---------------------------------------------------------------------------------------

constexpr int kMaxKernel = 97;  // a side of a depthwise convolution: its tile fits into shared memory

// What the launches of a call share.
struct LaunchPlan {
  const MultiScaleParams& params;
  const Execution& execution;

  LaunchPlan(const MultiScaleParams& p, const Execution& e) : params(p), execution(e) {
    require(p.head_dim <= kMaxChannels, "the kernels take heads of up to ", kMaxChannels, " channels, not ",
            p.head_dim);
    for (int i = 0; i < p.scales; ++i) {
      require(p.kernels[i] <= kMaxKernel, "the kernels take convolutions of up to ", kMaxKernel, " x ",
              kMaxKernel, ", not ", p.kernels[i]);
    }
    require(p.tokens() <= INT32_MAX / 2 && p.heads <= INT32_MAX / 6,
            "the kernels take up to 2^30 pixels and 2^28 heads, got ", p.tokens(), " and ", p.heads);
  }

  bool is_empty() const { return params.batch == 0 || params.heads == 0 || params.tokens() == 0; }
  int64_t channels() const { return 3 * params.heads * params.head_dim; }

  ImageView image_view(const Image& image) const { return image_view(image, params.dtype); }
  ImageView image_view(const Image& image, DType dtype) const {
    const bool by_channels = image.channel_stride == 1;
    // What must be a multiple of 16 bytes: the address, and every step but that of one element.
    const int64_t step = by_channels ? image.token_stride : image.channel_stride,
                  row = by_channels ? 0 : params.width;
    const bool is_aligned = alignment(image.data, {image.batch_stride, step, row}, dtype) == 16;
    return {image, dtype, static_cast<int>(params.height), static_cast<int>(params.width),
            !is_aligned || !(by_channels || image.token_stride == 1) ? 0
            : dtype == DType::kFloat32                               ? 4
                                                                     : 8};
  }
  // Of so many channels, in float32.
  ImageView new_image(int64_t channels) const {
    const int64_t tokens = params.tokens();
    return image_view({execution.workspace(params.batch * channels * tokens), channels * tokens, tokens, 1},
                      DType::kFloat32);
  }

  // f(instance, scale, index) for each scale; with the first one, or alone, the heads of the image itself, if
  // `own`. `heads`: as the kernel counts them.
  template <class F>
  void each_scale(int64_t heads, bool own, F f) const {
    for (int i = 0; i < (params.scales == 0 && own ? 1 : params.scales); ++i) {
      Scale s{};
      s.x = image_view(params.qkv);
      s.head_dim = static_cast<int>(params.head_dim);
      s.own_heads = own && i == 0 ? static_cast<int>(heads) : 0;
      s.kernel = 1;
      if (params.scales > 0) {
        s.weights = params.weights[i];
        s.kernel = static_cast<int>(params.kernels[i]);
        s.heads = static_cast<int>(heads);
      }
      with_channels(params.head_dim, [&](auto padded) {
        using Tiles = PixelTiles<padded()>;
        static_assert(bytes<padded()>(1, kMaxKernel, padded()) <= kMaxSharedBytes &&
                      8 * Tiles::staged(kMaxKernel) <= kMaxSharedBytes);
        s.down = static_cast<int>(ceil_div(params.height, Tiles::kHeight));
        s.across = static_cast<int>(ceil_div(params.width, Tiles::kWidth));
        for (s.chunk = min(Tiles::kChunk, s.head_dim); s.chunk > 1 && bytes<padded()>(s) > kMaxSharedBytes;) {
          s.chunk /= 2;
        }
        if (s.kernel == 3) return f(padded, std::integral_constant<int, 3>{}, s, i);
        if (s.kernel == 5) return f(padded, std::integral_constant<int, 5>{}, s, i);
        f(padded, std::integral_constant<int, 0>{}, s, i);
      });
    }
  }

  // What every kernel but that of the convolution's gradients finds enough.
  template <int kPadded>
  static int64_t bytes(const Scale& s) {
    return bytes<kPadded>(s.chunk, s.kernel, s.head_dim);
  }
  template <int kPadded>
  static constexpr int64_t bytes(int chunk, int kernel, int head_dim) {
    return max(Memory<PixelTiles<kPadded>>::bytes(chunk, kernel, head_dim, 2),
               max(MatrixTotal<kPadded>::kSharedBytes, 4 * kPixelThreads));
  }

  // Where the output's heads of a scale begin: those of the image itself, then those of the scales.
  static int first_head(const Scale& s, int index, int64_t heads) {
    return s.own_heads > 0 ? 0 : static_cast<int>((1 + index) * heads);
  }
};

// Of the image itself and every scale, q, k and v.
void aggregate(const LaunchPlan& plan, const ImageView& out);

}  // namespace effattn::cuda::multi_scale
