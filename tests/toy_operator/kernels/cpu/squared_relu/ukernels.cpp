#include "ukernels.h"

#include "../core/tile.h"

namespace effattn::cpu::EFFATTN_ISA {
namespace {

// Calls f with an image, a first token and a number of tokens, for all tiles of all images.
template <class F>
void for_each_tile(const SquaredReluParams& p, const F& f) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t first = 0; first < p.tokens; first += kSquaredReluTokens)
      f(b, first, min(kSquaredReluTokens, p.tokens - first));
  }
}

void forward(const SquaredReluParams& p, int64_t first, Arena arena) {
  const int64_t channels = min(kSquaredReluChannels, p.channels - first);
  const Tile x = tile(arena, kSquaredReluTokens, channels, false);
  for_each_tile(p, [&](int64_t batch, int64_t token, int64_t tokens) {
    load_image(p.dtype, channels_from(p.dtype, p.x, batch, first, token), tokens, channels, x);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Vec factor = p.scale * load_first(p.weight + first + c, min(kLanes, channels - c));
      for (int64_t t = 0; t < tokens; ++t) {
        const Vec positive = relu(load(x.row(t) + c));
        store(x.row(t) + c, factor * (positive * positive));
      }
    }
    store_image(p.dtype, channels_from(p.dtype, p.out, batch, first, token), tokens, channels, x);
  });
}

void backward(const SquaredReluParams& p, int64_t first, Arena arena) {
  const int64_t channels = min(kSquaredReluChannels, p.channels - first);
  const Tile x = tile(arena, kSquaredReluTokens, channels, false);
  const Tile grad = tile(arena, kSquaredReluTokens, channels, false);
  Vec totals[kSquaredReluChannels / kLanes] = {};
  for_each_tile(p, [&](int64_t batch, int64_t token, int64_t tokens) {
    load_image(p.dtype, channels_from(p.dtype, p.x, batch, first, token), tokens, channels, x);
    load_image(p.dtype, channels_from(p.dtype, p.grad_out, batch, first, token), tokens, channels, grad);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Vec factor = 2.0f * p.scale * load_first(p.weight + first + c, min(kLanes, channels - c));
      Vec sum{};  // of a tile: the chain of additions is no longer than that
      for (int64_t t = 0; t < tokens; ++t) {
        const Vec positive = relu(load(x.row(t) + c)), g = load(grad.row(t) + c);
        sum += positive * positive * g;
        store(x.row(t) + c, relu_gate(positive, factor * positive * g));
      }
      totals[c / kLanes] += sum;
    }
    store_image(p.dtype, channels_from(p.dtype, p.grad_x, batch, first, token), tokens, channels, x);
  });
  for (int64_t c = 0; c < channels; c += kLanes)
    store_first(p.grad_weight + first + c, p.scale * totals[c / kLanes], min(kLanes, channels - c));
}

constexpr SquaredReluUkernels kUkernels = {forward, backward};

}  // namespace

const SquaredReluUkernels& squared_relu_ukernels() { return kUkernels; }

}  // namespace effattn::cpu::EFFATTN_ISA
