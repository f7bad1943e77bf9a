// Multi-scale aggregation and attention, backward. The aggregated image and the gradients in front of the
// mixing are written in float32: every gradient of a convolution needs its neighbours'.
#include "../core/reduction.h"
#include "../relu_linear_attention/api.h"
#include "aggregation.h"
#include "api.h"

namespace effattn::cuda {
namespace multi_scale {
namespace {

struct BackwardArgs {
  Scale scale;
  ImageView grad_out;     // of all scales
  int64_t first_channel;  // of the scale's in it
  ImageView grad_convolved;
  int64_t parts;
  int part_tiles;
  int64_t batch;
  ScaleWeights<float> sums;  // (parts, ...)
  // What has come to the gradient of qkv before, and where it goes.
  ImageView before, grad_x;
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
pointwise_backward(EFFATTN_PARAMETERS(BackwardArgs) p) {
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
    products(
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
depthwise_backward(EFFATTN_PARAMETERS(BackwardArgs) p) {
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
  ImageView from, to;
  int64_t channels, batch;
};

EFFATTN_KERNEL(kPixelThreads, 1)
copy_image(EFFATTN_PARAMETERS(Copy) p) {
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

struct Backward : LaunchPlan {
  using LaunchPlan::LaunchPlan;

  void copy(const ImageView& from, const ImageView& to, int64_t channels) const {
    const int64_t all = params.batch * channels * params.tokens();
    launch(copy_image, {ceil_div(all, kPixelThreads), kPixelThreads}, execution,
           Copy{from, to, channels, params.batch});
  }

  // `grad_out`: of the aggregation, channels of the image itself first.
  void aggregate_backward(const ImageView& grad_out) const {
    const ImageView grad_x = image_view(params.grad_qkv);
    if (params.scales == 0) copy(grad_out, grad_x, channels());
    ImageView before = grad_out;
    each_scale(3 * params.heads, false, [&](auto padded, auto kernel, const Scale& s, int index) {
      using Tiles = PixelTiles<padded()>;
      BackwardArgs b{};
      b.scale = s;
      b.grad_out = grad_out;
      b.first_channel = (1 + index) * channels();
      b.grad_convolved = new_image(channels());
      b.batch = params.batch;
      b.before = before;
      b.grad_x = index + 1 == params.scales ? grad_x : new_image(channels());
      before = b.grad_x;
      const int64_t groups = 3 * params.heads, tiles = params.batch * s.tiles();
      const Split parts = split_tokens(groups, tiles * Tiles::kPixels, Tiles::kPixels, Gpu{});
      b.parts = parts.parts;
      b.part_tiles = parts.part_tokens / Tiles::kPixels;
      const PartialSums<ScaleWeights<float>> sums = partial_sums(index, b.parts);
      b.sums = sums.of_parts;
      launch(pointwise_backward<padded(), kernel()>, {groups * b.parts, kPixelThreads, bytes<padded()>(s)},
             execution, b);
      const int64_t all = channels();
      // Of any heads: as many channels as there are rows of taps for threads.
      b.scale.chunk = static_cast<int>(min(kStagedChannels, all));
      const auto staged_twice = [&] { return int64_t{8} * b.scale.chunk * Tiles::staged(s.kernel); };
      while (b.scale.chunk > 1 && staged_twice() > kMaxSharedBytes) b.scale.chunk /= 2;
      launch(depthwise_backward<padded(), kernel()>,
             {ceil_div(all, b.scale.chunk) * b.parts, kPixelThreads, staged_twice()}, execution, b);
      sums.add_up();
    });
  }

  // In float32, of what is aggregated in it, as one params of linear attention.
  void attend_backward(const float* kv_state) const {
    const int64_t heads = params.all_heads(), all = heads * 3 * params.head_dim;
    const ImageView aggregated = new_image(all), grad_aggregated = new_image(all);
    aggregate(*this, aggregated);
    ImageView grad_out = image_view(params.grad_out);
    if (params.dtype != DType::kFloat32) {
      grad_out = new_image(heads * params.head_dim);
      copy(image_view(params.grad_out), grad_out, heads * params.head_dim);
    }
    const int64_t sizes[] = {params.batch, heads};
    const int64_t of_three[] = {aggregated.image.batch_stride,
                                3 * params.head_dim * aggregated.image.channel_stride};
    const int64_t of_one[] = {grad_out.image.batch_stride, params.head_dim * grad_out.image.channel_stride};
    LinearAttentionParams r{};
    r.dtype = DType::kFloat32;
    r.lead_rank = 2;
    r.lead_sizes = sizes;
    r.groups = params.batch * heads;
    r.queries = r.keys = params.tokens();
    r.head_dim = r.value_dim = params.head_dim;
    r.eps = params.eps;
    const auto operand = [&](const ImageView& picture, int which) {
      const Image& image = picture.image;
      float* const data = static_cast<float*>(image.data) + which * params.head_dim * image.channel_stride;
      return Operand{data, of_three, image.token_stride, image.channel_stride};
    };
    r.q = operand(aggregated, 0);
    r.k = operand(aggregated, 1);
    r.v = operand(aggregated, 2);
    r.grad_q = operand(grad_aggregated, 0);
    r.grad_k = operand(grad_aggregated, 1);
    r.grad_v = operand(grad_aggregated, 2);
    r.grad_out = {grad_out.image.data, of_one, grad_out.image.token_stride, grad_out.image.channel_stride};
    // Gradients are differences: a kv_state to 2^-16, as narrow types' forward has it, is not enough for
    // those of weights.
    float* exact = nullptr;
    if (params.dtype != DType::kFloat32) {
      exact = execution.workspace(r.groups * r.kv_state_size());
      make_kv_state(r, exact, execution);
    }
    backward(r, exact != nullptr ? exact : kv_state, execution);
    aggregate_backward(grad_aggregated);
  }

  // Of weights whose images are empty.
  void clear_gradients() const {
    for (int i = 0; i < params.scales; ++i) partial_sums(i, 0).add_up();
  }

 private:
  PartialSums<ScaleWeights<float>> partial_sums(int scale, int64_t parts) const {
    using W = ScaleWeights<float>;
    const int64_t all = channels(), taps = params.kernels[scale] * params.kernels[scale];
    return {params.gradients[scale],
            {{&W::depthwise, all * taps},
             {&W::pointwise, all * params.head_dim},
             {&W::depthwise_bias, all},
             {&W::pointwise_bias, all}},
            parts,
            execution};
  }
};

}  // namespace
}  // namespace multi_scale

void aggregate_backward(const MultiScaleParams& params, const Execution& execution) {
  const multi_scale::Backward plan(params, execution);
  if (plan.is_empty()) return plan.clear_gradients();
  plan.aggregate_backward(plan.image_view(params.grad_out));
}

void attend_backward(const MultiScaleParams& params, const float* kv_state, const Execution& execution) {
  const multi_scale::Backward plan(params, execution);
  if (plan.is_empty()) return plan.clear_gradients();
  plan.attend_backward(kv_state);
}
}  // namespace effattn::cuda
