// Multi-scale aggregation, and ReLU linear attention in all of its heads.
//
// A tile of pixels with its halo goes to shared memory, is convolved and mixed there, and is summed up or
// attended with at once: forward, nothing that is aggregated is written. Tiles are small, so that several
// blocks share a multiprocessor: what waits is the arithmetic of 25 taps, not memory. The backward writes the
// aggregated image and the gradients in front of the mixing, in float32: every gradient of a convolution
// needs its neighbours'.
#include "api.h"

#include <string>

#include "../core/launch.h"
#include "../core/limits.h"
#include "../core/reduction.h"
#include "../core/tensors.h"
#include "../relu_linear_attention/api.h"
#include "narrow_forward.h"

namespace effattn::cuda {
namespace {

// One scale of an image, and the heads of the image itself where they are taken along.
struct Scale {
  Picture x;
  ScaleWeights<const float> weights;
  int kernel, head_dim, heads;
  int own_heads;  // of the image itself, before those of the scale
  int chunk;      // channels that are staged at once
  int down, across;

  constexpr int tiles() const { return down * across; }
  constexpr int together() const { return own_heads + heads; }
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
    const int channels = least(s.chunk, s.head_dim - first);
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
    products<false, false>(
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
struct Place {
  int64_t batch, channel;
  int head, piece;
  bool is_own;

  // `pieces` of each head of each image; of a head the channels begin at q's, k's or v's.
  EFFATTN_DEVICE Place(const Scale& s, int64_t pieces, int which) {
    const int64_t group = block_index() / pieces;
    piece = static_cast<int>(block_index() % pieces);
    head = static_cast<int>(group % s.together());
    batch = group / s.together();
    is_own = head < s.own_heads;
    channel = (static_cast<int64_t>(is_own ? head : head - s.own_heads) * 3 + which) * s.head_dim;
  }
};

// --- attention --------------------------------------------------------------------------------------

struct Attention {
  Scale scale;
  int first_head, all_heads;  // of the output
  int parts, part_tiles;
  float* sums;  // (batch, all_heads, parts, head_dim + 1, head_dim)
  Picture out;
  float eps;
};

template <int kPadded, int kKernel>
EFFATTN_KERNEL(kPixelThreads, PixelTiles<kPadded>::kBlocks)
sum_tiles(EFFATTN_PARAMETERS(Attention) p) {
  using Tiles = PixelTiles<kPadded>;
  const Scale& s = p.scale;
  const Memory<Tiles> memory(s);
  const Place place(s, p.parts, 1);
  float* const keys = memory.mixed;
  float* const values = keys + Tiles::kPixels * Tiles::kByPixel;
  MatrixTotal<kPadded> matrix;
  VectorTotal<kPadded> vector;
  const int end = least((place.piece + 1) * p.part_tiles, s.tiles());
  for (int tile = place.piece * p.part_tiles; tile < end; ++tile) {
    const Corner at = corner_of<Tiles>(s, tile);
    aggregate_head<Tiles, kKernel>(s, memory, place.is_own, place.batch, place.channel, at, keys);
    aggregate_head<Tiles, kKernel>(s, memory, place.is_own, place.batch, place.channel + s.head_dim, at,
                                   values);
    const auto key = [&](int pixel, int c) { return relu(keys[pixel * Tiles::kByPixel + c]); };
    matrix.add(
        s.head_dim, s.head_dim, [&](int row, int pixel) { return values[pixel * Tiles::kByPixel + row]; },
        key);
    vector.add(s.head_dim, key);
    sync_block();
  }
  const int64_t group = (place.batch * p.all_heads + p.first_head + place.head) * p.parts + place.piece;
  float* const to = p.sums + group * (s.head_dim + 1) * s.head_dim;
  matrix.finish(memory.staged, s.head_dim, s.head_dim,
                [&](int r, int c, float x) { to[r * s.head_dim + c] = x; });
  vector.finish(memory.staged, s.head_dim, [&](int c, float x) { to[s.head_dim * s.head_dim + c] = x; });
}

template <int kPadded, int kKernel>
EFFATTN_KERNEL(kPixelThreads, PixelTiles<kPadded>::kBlocks)
attend_tile(EFFATTN_PARAMETERS(Attention) p) {
  using Tiles = PixelTiles<kPadded>;
  const Scale& s = p.scale;
  const Memory<Tiles> memory(s);
  const Place place(s, s.tiles(), 0);
  const Corner at = corner_of<Tiles>(s, place.piece);
  const int64_t head = place.batch * p.all_heads + p.first_head + place.head;
  const float* const sums = p.sums + head * (s.head_dim + 1) * s.head_dim;
  float* const queries = memory.mixed;
  float* const outputs = queries + Tiles::kPixels * Tiles::kByPixel;
  aggregate_head<Tiles, kKernel>(s, memory, place.is_own, place.batch, place.channel, at, queries);
  float* const inverse = memory.staged;
  for_each<kPixelThreads>(Tiles::kPixels, [&](int pixel) {
    float denominator = 0;
    for (int c = 0; c < s.head_dim; ++c) {
      denominator += relu(queries[pixel * Tiles::kByPixel + c]) * sums[s.head_dim * s.head_dim + c];
    }
    inverse[pixel] = 1 / divisible(denominator + p.eps);
  });
  sync_block();
  products<false, false>(
      kPixelWarps, 1, Tiles::kPixels, s.head_dim, s.head_dim,
      [&](int, int pixel, int k) { return relu(queries[pixel * Tiles::kByPixel + k]); },
      [&](int, int k, int c) { return sums[c * s.head_dim + k]; },
      [&](int, int pixel, int c, float x) { outputs[pixel * Tiles::kByPixel + c] = x * inverse[pixel]; });
  sync_block();
  const int64_t channel = static_cast<int64_t>(p.first_head + place.head) * s.head_dim;
  store_tile<Tiles>(p.out, place.batch, channel, s.head_dim, at,
                    [&](int pixel, int c) { return outputs[pixel * Tiles::kByPixel + c]; });
}

// --- aggregation ------------------------------------------------------------------------------------

struct Aggregation {
  Scale scale;
  int64_t first_channel;  // of the output
  Picture out;
};

// Heads are groups of head_dim channels here, q's, k's and v's alike.
template <int kPadded, int kKernel>
EFFATTN_KERNEL(kPixelThreads, PixelTiles<kPadded>::kBlocks)
aggregate_tile(EFFATTN_PARAMETERS(Aggregation) p) {
  using Tiles = PixelTiles<kPadded>;
  const Scale& s = p.scale;
  const Memory<Tiles> memory(s);
  const Place place(s, s.tiles(), 0);
  const Corner at = corner_of<Tiles>(s, place.piece);
  const int64_t from = place.channel / 3;
  aggregate_head<Tiles, kKernel>(s, memory, place.is_own, place.batch, from, at, memory.mixed);
  const int64_t to = p.first_channel + static_cast<int64_t>(place.head) * s.head_dim;
  store_tile<Tiles>(p.out, place.batch, to, s.head_dim, at,
                    [&](int pixel, int c) { return memory.mixed[pixel * Tiles::kByPixel + c]; });
}

struct AggregationBackward {
  Scale scale;
  Picture grad_out;       // of all scales
  int64_t first_channel;  // of the scale's in it
  Picture grad_convolved;
  int64_t parts;
  int part_tiles;
  int64_t batch;
  ScaleWeights<float> sums;  // (parts, ...)
  // What has come to the gradient of qkv before, and where it goes.
  Picture before, grad_x;
};

// Of a tile among those of all images.
struct TileOfBatch {
  int64_t batch;
  Corner at;
};
template <class Tiles>
EFFATTN_DEVICE TileOfBatch tile_of_batch(const Scale& s, int64_t tile) {
  return {tile / s.tiles(), corner_of<Tiles>(s, static_cast<int>(tile % s.tiles()))};
}

// Through the mixing: gradients of what is convolved, and of the weights over a part of all tiles.
template <int kPadded, int kKernel>
EFFATTN_KERNEL(kPixelThreads, PixelTiles<kPadded>::kBlocks)
pointwise_backward(EFFATTN_PARAMETERS(AggregationBackward) p) {
  using Tiles = PixelTiles<kPadded>;
  const Scale& s = p.scale;
  const Memory<Tiles> memory(s);
  const int64_t part = block_index() % p.parts, channel = block_index() / p.parts * s.head_dim;
  const int64_t channels = static_cast<int64_t>(s.heads) * s.head_dim;
  float* const grads = memory.mixed;
  float* const through = grads + Tiles::kPixels * Tiles::kByPixel;
  MatrixTotal<kPadded> matrix;
  VectorTotal<kPadded> vector;
  const int64_t end = min((part + 1) * p.part_tiles, p.batch * s.tiles());
  for (int64_t tile = part * p.part_tiles; tile < end; ++tile) {
    const TileOfBatch of = tile_of_batch<Tiles>(s, tile);
    load_tile<Tiles>(p.grad_out, of.batch, p.first_channel + channel, s.head_dim, of.at,
                     [&](int pixel, int c, float x) { grads[pixel * Tiles::kByPixel + c] = x; });
    convolve_head<Tiles, kKernel>(s, memory, of.batch, channel, of.at);
    const auto grad = [&](int c, int pixel) { return grads[pixel * Tiles::kByPixel + c]; };
    matrix.add(s.head_dim, s.head_dim, grad,
               [&](int pixel, int c) { return memory.convolved[c * Tiles::kByChannel + pixel]; });
    vector.add(s.head_dim, [&](int pixel, int c) { return grad(c, pixel); });
    products<false, false>(
        kPixelWarps, 1, Tiles::kPixels, s.head_dim, s.head_dim,
        [&](int, int pixel, int c) { return grad(c, pixel); },
        [&](int, int k, int c) { return s.weights.pointwise[(channel + k) * s.head_dim + c]; },
        [&](int, int pixel, int c, float x) { through[pixel * Tiles::kByPixel + c] = x; });
    sync_block();
    store_tile<Tiles>(p.grad_convolved, of.batch, channel, s.head_dim, of.at,
                      [&](int pixel, int c) { return through[pixel * Tiles::kByPixel + c]; });
    sync_block();  // sums of wide heads are finished where this stands
  }
  matrix.finish(memory.staged, s.head_dim, s.head_dim, [&](int r, int c, float x) {
    p.sums.pointwise[(part * channels + channel + r) * s.head_dim + c] = x;
  });
  vector.finish(memory.staged, s.head_dim, [&](int c, float x) {
    if (p.sums.pointwise_bias != nullptr) p.sums.pointwise_bias[part * channels + channel + c] = x;
  });
}

// Through the convolution: gradients of qkv, and of the taps over a part of all tiles.
template <int kPadded, int kKernel>
EFFATTN_KERNEL(kPixelThreads, PixelTiles<kPadded>::kBlocks)
depthwise_backward(EFFATTN_PARAMETERS(AggregationBackward) p) {
  using Tiles = PixelTiles<kPadded>;
  const Scale& s = p.scale;
  const int kernel = kKernel > 0 ? kKernel : s.kernel, width = Tiles::kWidth + kernel - 1, halo = kernel / 2;
  const int64_t all = static_cast<int64_t>(s.heads) * s.head_dim;
  const int64_t part = block_index() % p.parts, first = block_index() / p.parts * s.chunk;
  const int channels = static_cast<int>(min(s.chunk, all - first));
  float* const grads = reinterpret_cast<float*>(shared_memory());
  float* const pixels = grads + s.chunk * Tiles::staged(kernel);
  float* const taps = p.sums.depthwise + (part * all + first) * kernel * kernel;
  const int64_t begin = part * p.part_tiles, end = min(begin + p.part_tiles, p.batch * s.tiles());
  float bias = 0;  // of the thread's channel
  for_each<kPixelThreads>(channels * kernel, [&](int i) {
    for (int j = 0; j < kernel; ++j) taps[i * kernel + j] = 0;
  });
  for (int64_t tile = begin; tile < end; ++tile) {
    const TileOfBatch of = tile_of_batch<Tiles>(s, tile);
    stage<Tiles>(p.grad_convolved, of.batch, first, channels, of.at, kernel, grads);
    stage<Tiles>(s.x, of.batch, first, channels, of.at, kernel, pixels);
    sync_block();
    convolve<Tiles, kKernel, -1>(grads, s.weights.depthwise + first * kernel * kernel, channels, kernel,
                                 [&](int c, int pixel, const float (&strip)[Tiles::kStrip]) {
                                   const int row = row_of(of.at, pixel), col = col_of(of.at, pixel);
                                   float total[Tiles::kStrip];
                                   load_strip(p.before, of.batch, first + c, row, col, total);
                                   EFFATTN_UNROLL
                                   for (int e = 0; e < Tiles::kStrip; ++e) total[e] += strip[e];
                                   store_strip(p.grad_x, of.batch, first + c, row, col, total);
                                 });
    // A thread a row of taps: it owns them, so that they are added up in the order of the tiles.
    for_each<kPixelThreads>(channels * kernel, [&](int item) {
      const int c = item / kernel, i = item % kernel;
      const float* const grad = grads + c * Tiles::staged(kernel) + halo * width + halo;
      const float* const x = pixels + c * Tiles::staged(kernel) + i * width;
      constexpr int known = kKernel > 0 ? kKernel : 1;
      for (int j = 0; j < kernel; j += known) {
        float total[known] = {};
        for (int row = 0; row < Tiles::kHeight; ++row) {
          EFFATTN_UNROLL
          for (int col = 0; col < Tiles::kWidth; ++col) {
            EFFATTN_UNROLL
            for (int e = 0; e < known; ++e)
              total[e] += grad[row * width + col] * x[row * width + col + j + e];
          }
        }
        EFFATTN_UNROLL
        for (int e = 0; e < known; ++e) taps[item * kernel + j + e] += total[e];
      }
    });
    if (thread_index() < channels) {
      const float* const grad = grads + thread_index() * Tiles::staged(kernel) + halo * width + halo;
      for (int row = 0; row < Tiles::kHeight; ++row) {
        for (int col = 0; col < Tiles::kWidth; ++col) bias += grad[row * width + col];
      }
    }
    sync_block();
  }
  if (p.sums.depthwise_bias != nullptr && thread_index() < channels) {
    p.sums.depthwise_bias[part * all + first + thread_index()] = bias;
  }
}

struct Copy {
  Picture from, to;
  int64_t channels, batch;
};

EFFATTN_KERNEL(kPixelThreads, 1)
copy_picture(EFFATTN_PARAMETERS(Copy) p) {
  const int64_t tokens = static_cast<int64_t>(p.from.height) * p.from.width;
  const int64_t i = block_index() * kPixelThreads + thread_index();
  if (i >= p.batch * p.channels * tokens) return;
  const bool is_channels_last = p.from.image.channel_stride == 1;
  const int64_t within = i % (p.channels * tokens), batch = i / (p.channels * tokens);
  const int64_t channel = is_channels_last ? within % p.channels : within / tokens;
  const int64_t token = is_channels_last ? within / p.channels : within % tokens;
  const int row = static_cast<int>(token / p.from.width), col = static_cast<int>(token % p.from.width);
  p.to.store(batch, channel, row, col, p.from.load(batch, channel, row, col));
}

// --- launches ---------------------------------------------------------------------------------------

constexpr int kMostKernel = 97;  // a side of a depthwise convolution: its tile fits into shared memory
const std::initializer_list<Limit> kLimits = {
    {"channels", kMostChannels}, {"kernel", kMostKernel}, {"scales", MultiScaleParams::kMaxScales}};
const RegisteredOperator aggregation("multi_scale_aggregation", kLimits),
    attention("multi_scale_linear_attention", kLimits);

// What the launches of a call share.
class Call {
 public:
  Call(const MultiScaleParams& problem, const Execution& execution) : p_(problem), execution_(execution) {
    if (problem.head_dim > kMostChannels) {
      throw std::runtime_error("effattn: the kernels take heads of up to " + std::to_string(kMostChannels) +
                               " channels, not " + std::to_string(problem.head_dim));
    }
    for (int i = 0; i < problem.scales; ++i) {
      if (problem.kernels[i] > kMostKernel) {
        throw std::runtime_error("effattn: the kernels take convolutions of up to " +
                                 std::to_string(kMostKernel) + " x " + std::to_string(kMostKernel) +
                                 ", not " + std::to_string(problem.kernels[i]));
      }
    }
    if (problem.tokens() > INT32_MAX / 2 || problem.heads > INT32_MAX / 6) {
      throw std::runtime_error("effattn: the kernels take up to 2^30 pixels and 2^28 heads, got " +
                               std::to_string(problem.tokens()) + " and " + std::to_string(problem.heads));
    }
  }

  bool is_empty() const { return p_.batch == 0 || p_.heads == 0 || p_.tokens() == 0; }
  int64_t channels() const { return 3 * p_.heads * p_.head_dim; }

  Picture picture(const Image& image) const { return picture(image, p_.dtype); }
  Picture picture(const Image& image, DType dtype) const {
    const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
    const bool by_channels = image.channel_stride == 1;
    // What must be a multiple of 16 bytes: the address, and every step but that of one element.
    const int64_t steps[] = {image.batch_stride, by_channels ? image.token_stride : image.channel_stride,
                             by_channels ? 0 : p_.width};
    uint64_t all = reinterpret_cast<uintptr_t>(image.data);
    for (const int64_t step : steps) all |= static_cast<uint64_t>(step * size);
    const bool is_aligned = all % 16 == 0 && (by_channels || image.token_stride == 1);
    return {image, dtype, static_cast<int>(p_.height), static_cast<int>(p_.width),
            is_aligned ? static_cast<int>(16 / size) : 0};
  }
  // Of so many channels, in float32.
  Picture new_picture(int64_t channels) const {
    const int64_t tokens = p_.tokens();
    return picture({execution_.workspace(p_.batch * channels * tokens), channels * tokens, tokens, 1},
                   DType::kFloat32);
  }
  void copy(const Picture& from, const Picture& to, int64_t channels) const {
    const int64_t all = p_.batch * channels * p_.tokens();
    launch(copy_picture, {ceil_div(all, kPixelThreads), kPixelThreads}, execution_,
           Copy{from, to, channels, p_.batch});
  }

  // f(instance, scale, index) for each scale; with the first one, or alone, the heads of the image itself, if
  // `own`. `heads`: as the kernel counts them.
  template <class F>
  void each_scale(int64_t heads, bool own, F f) const {
    for (int i = 0; i < (p_.scales == 0 && own ? 1 : p_.scales); ++i) {
      Scale s{};
      s.x = picture(p_.qkv);
      s.head_dim = static_cast<int>(p_.head_dim);
      s.own_heads = own && i == 0 ? static_cast<int>(heads) : 0;
      s.kernel = 1;
      if (p_.scales > 0) {
        s.weights = p_.weights[i];
        s.kernel = static_cast<int>(p_.kernels[i]);
        s.heads = static_cast<int>(heads);
      }
      with_channels(p_.head_dim, [&](auto padded) {
        using Tiles = PixelTiles<padded()>;
        static_assert(bytes<padded()>(1, kMostKernel, padded()) <= kMostSharedBytes &&
                      8 * Tiles::staged(kMostKernel) <= kMostSharedBytes);
        s.down = static_cast<int>(ceil_div(p_.height, Tiles::kHeight));
        s.across = static_cast<int>(ceil_div(p_.width, Tiles::kWidth));
        for (s.chunk = least(Tiles::kChunk, s.head_dim);
             s.chunk > 1 && bytes<padded()>(s) > kMostSharedBytes;) {
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

  void attend(float* sums) const {
    Attention a{};
    a.all_heads = static_cast<int>(p_.all_heads());
    a.out = picture(p_.out);
    a.eps = p_.eps;
    const int64_t groups = p_.batch * p_.all_heads(), floats = (p_.head_dim + 1) * p_.head_dim;
    if (attend_narrow(p_, picture(p_.qkv), a.out, sums, execution_)) return;
    if (sums == nullptr) sums = execution_.workspace(groups * floats);
    each_scale(p_.heads, true, [&](auto padded, auto kernel, const Scale& s, int index) {
      // The same parts for every scale, so that all sums are added up at once.
      const Split parts = split(groups, int64_t{s.tiles()} * PixelTiles<padded()>::kPixels,
                                PixelTiles<padded()>::kPixels, Card{});
      a.scale = s;
      a.first_head = first_head(s, index, p_.heads);
      a.parts = parts.parts;
      a.part_tiles = parts.part_tokens / PixelTiles<padded()>::kPixels;
      if (a.sums == nullptr)
        a.sums = parts.parts == 1 ? sums : execution_.workspace(groups * parts.parts * floats);
      launch(sum_tiles<padded(), kernel()>,
             {p_.batch * s.together() * a.parts, kPixelThreads, bytes<padded()>(s)}, execution_, a);
    });
    if (a.parts > 1) add_up(a.sums, sums, groups, a.parts, floats, execution_);
    a.sums = sums;
    each_scale(p_.heads, true, [&](auto padded, auto kernel, const Scale& s, int index) {
      a.scale = s;
      a.first_head = first_head(s, index, p_.heads);
      launch(attend_tile<padded(), kernel()>,
             {p_.batch * s.together() * s.tiles(), kPixelThreads, bytes<padded()>(s)}, execution_, a);
    });
  }

  void aggregate(const Picture& out) const {
    each_scale(3 * p_.heads, true, [&](auto padded, auto kernel, const Scale& s, int index) {
      const Aggregation a{s, first_head(s, index, 3 * p_.heads) * p_.head_dim, out};
      launch(aggregate_tile<padded(), kernel()>,
             {p_.batch * s.together() * s.tiles(), kPixelThreads, bytes<padded()>(s)}, execution_, a);
    });
  }

  // `grad_out`: of the aggregation, channels of the image itself first.
  void aggregate_backward(const Picture& grad_out) const {
    const Picture grad_x = picture(p_.grad_qkv);
    if (p_.scales == 0) copy(grad_out, grad_x, channels());
    Picture before = grad_out;
    each_scale(3 * p_.heads, false, [&](auto padded, auto kernel, const Scale& s, int index) {
      using Tiles = PixelTiles<padded()>;
      AggregationBackward b{};
      b.scale = s;
      b.grad_out = grad_out;
      b.first_channel = (1 + index) * channels();
      b.grad_convolved = new_picture(channels());
      b.batch = p_.batch;
      b.before = before;
      b.grad_x = index + 1 == p_.scales ? grad_x : new_picture(channels());
      before = b.grad_x;
      const int64_t groups = 3 * p_.heads, tiles = p_.batch * s.tiles();
      const Split parts = split(groups, tiles * Tiles::kPixels, Tiles::kPixels, Card{});
      b.parts = parts.parts;
      b.part_tiles = parts.part_tokens / Tiles::kPixels;
      const ScaleWeights<float>& into = p_.gradients[index];
      const int64_t all = channels(), taps = int64_t{s.kernel} * s.kernel;
      const int64_t floats[] = {all * taps, all * p_.head_dim, all, all};
      float* ScaleWeights<float>::* const members[] = {
          &ScaleWeights<float>::depthwise, &ScaleWeights<float>::pointwise,
          &ScaleWeights<float>::depthwise_bias, &ScaleWeights<float>::pointwise_bias};
      for (int i = 0; i < 4; ++i) {
        float* const whole = into.*members[i];
        if (whole == nullptr) continue;
        b.sums.*members[i] = b.parts == 1 ? whole : execution_.workspace(b.parts * floats[i]);
      }
      launch(pointwise_backward<padded(), kernel()>, {groups * b.parts, kPixelThreads, bytes<padded()>(s)},
             execution_, b);
      // Of any heads: as many channels as there are rows of taps for threads.
      b.scale.chunk = static_cast<int>(min(kStagedChannels, all));
      const auto staged_twice = [&] { return int64_t{8} * b.scale.chunk * Tiles::staged(s.kernel); };
      while (b.scale.chunk > 1 && staged_twice() > kMostSharedBytes) b.scale.chunk /= 2;
      launch(depthwise_backward<padded(), kernel()>,
             {ceil_div(all, b.scale.chunk) * b.parts, kPixelThreads, staged_twice()}, execution_, b);
      for (int i = 0; i < 4 && b.parts > 1; ++i) {
        if (into.*members[i] != nullptr)
          add_up(b.sums.*members[i], into.*members[i], 1, b.parts, floats[i], execution_);
      }
    });
  }

  // In float32, of what is aggregated in it, as one problem of linear attention.
  void attend_backward(const float* sums) const {
    const int64_t heads = p_.all_heads(), all = heads * 3 * p_.head_dim;
    const Picture aggregated = new_picture(all), grad_aggregated = new_picture(all);
    aggregate(aggregated);
    Picture grad_out = picture(p_.grad_out);
    if (p_.dtype != DType::kFloat32) {
      grad_out = new_picture(heads * p_.head_dim);
      copy(picture(p_.grad_out), grad_out, heads * p_.head_dim);
    }
    const int64_t sizes[] = {p_.batch, heads};
    const int64_t of_three[] = {aggregated.image.batch_stride,
                                3 * p_.head_dim * aggregated.image.channel_stride};
    const int64_t of_one[] = {grad_out.image.batch_stride, p_.head_dim * grad_out.image.channel_stride};
    LinearAttentionParams r{};
    r.dtype = DType::kFloat32;
    r.lead_rank = 2;
    r.lead_sizes = sizes;
    r.groups = p_.batch * heads;
    r.queries = r.keys = p_.tokens();
    r.head_dim = r.value_dim = p_.head_dim;
    r.eps = p_.eps;
    const auto operand = [&](const Picture& picture, int which) {
      const Image& image = picture.image;
      float* const data = static_cast<float*>(image.data) + which * p_.head_dim * image.channel_stride;
      return Operand{data, of_three, image.token_stride, image.channel_stride};
    };
    r.q = operand(aggregated, 0);
    r.k = operand(aggregated, 1);
    r.v = operand(aggregated, 2);
    r.grad_q = operand(grad_aggregated, 0);
    r.grad_k = operand(grad_aggregated, 1);
    r.grad_v = operand(grad_aggregated, 2);
    r.grad_out = {grad_out.image.data, of_one, grad_out.image.token_stride, grad_out.image.channel_stride};
    // Gradients are differences: sums to 2^-16, as narrow types' forward has them, are not enough for those
    // of weights.
    float* exact = nullptr;
    if (p_.dtype != DType::kFloat32) {
      exact = execution_.workspace(r.groups * r.sums_size());
      sum_keys(r, exact, execution_);
    }
    backward(r, exact != nullptr ? exact : sums, execution_);
    aggregate_backward(grad_aggregated);
  }

  // Of weights whose images are empty.
  void clear_gradients() const {
    for (int i = 0; i < p_.scales; ++i) {
      const ScaleWeights<float>& g = p_.gradients[i];
      const int64_t all = channels();
      add_up(nullptr, g.depthwise, 1, 0, all * p_.kernels[i] * p_.kernels[i], execution_);
      add_up(nullptr, g.pointwise, 1, 0, all * p_.head_dim, execution_);
      if (g.depthwise_bias != nullptr) add_up(nullptr, g.depthwise_bias, 1, 0, all, execution_);
      if (g.pointwise_bias != nullptr) add_up(nullptr, g.pointwise_bias, 1, 0, all, execution_);
    }
  }

 private:
  const MultiScaleParams& p_;
  const Execution& execution_;
};

}  // namespace

void aggregate(const MultiScaleParams& problem, const Execution& execution) {
  const Call call(problem, execution);
  if (!call.is_empty()) call.aggregate(call.picture(problem.out));
}

void aggregate_backward(const MultiScaleParams& problem, const Execution& execution) {
  const Call call(problem, execution);
  if (call.is_empty()) return call.clear_gradients();
  call.aggregate_backward(call.picture(problem.grad_out));
}

void attend(const MultiScaleParams& problem, float* sums, const Execution& execution) {
  const Call call(problem, execution);
  const int64_t floats = problem.batch * problem.all_heads() * (problem.head_dim + 1) * problem.head_dim;
  if (!call.is_empty()) {
    call.attend(sums);
  } else if (sums != nullptr && floats > 0) {
    add_up(nullptr, sums, 1, 0, floats, execution);
  }
}

void attend_backward(const MultiScaleParams& problem, const float* sums, const Execution& execution) {
  const Call call(problem, execution);
  if (call.is_empty()) return call.clear_gradients();
  call.attend_backward(sums);
}

}  // namespace effattn::cuda
