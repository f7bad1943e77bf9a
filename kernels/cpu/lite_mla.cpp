// The schedule: heads in parallel, from x to the output of the attention; then rows of the last projection.
#include "lite_mla.h"

#include "multi_scale_worker.h"

namespace effattn::cpu {
namespace {

constexpr int64_t kRowsOfOut = 16;    // channels of out that a thread takes at once
constexpr int64_t kChannelsOfX = 32;  // channels of x that a thread converts at once

// One head as a problem of its own: its channels of qkv stand in `qkv`, its output in a part of `out`.
MultiScale one_head(const MultiScale& p, int64_t head, const Plane<float>& qkv, const Plane<float>& out) {
  MultiScale one = p;
  one.dtype = DType::kFloat32;
  one.batch = one.heads = 1;
  one.out_heads = p.heads;
  for (int s = 0; s < p.scales; ++s) {
    one.weights[s] = of_group(p.weights[s], p.kernels[s], p.head_dim, 3 * head);
  }
  one.qkv = {qkv.data, 0, qkv.stride, 1};
  one.out = {out.data + head * p.head_dim * out.stride, 0, out.stride, 1};
  return one;
}

}  // namespace

void lite_mla(const LiteMLA& problem, const Parallel& parallel) {
  const MultiScale& p = problem.attention;
  const int64_t tokens = p.tokens(), d = p.head_dim, attended = p.all_heads() * d;
  if (p.batch * tokens * problem.out_channels == 0) return;
  const MultiScalePasses& passes = multi_scale_passes(active_isa());
  const int64_t stride = row_stride(tokens);
  const auto work = [&](int64_t outputs, int64_t inputs) { return larger(1, outputs * inputs * tokens); };
  const auto grain = [&](int64_t unit_work) { return larger(1, kMinWorkPerThread / unit_work); };

  const bool in_place = is_plane(p, problem.x) && tokens >= passes.lanes;
  const int64_t x_floats = in_place ? 0 : p.batch * problem.in_channels * stride;
  const int64_t floats = x_floats + p.batch * attended * stride;
  const Floats large = floats > kKeptFloats ? aligned_floats(floats) : nullptr;  // kept by no thread
  float* const memory = large ? large.get() : thread_scratch<Purpose::kBetweenThreads>(floats);
  float* const own_x = memory;
  const auto attended_of = [&](int64_t batch) {
    return Plane<float>{memory + x_floats + batch * attended * stride, stride};
  };
  if (!in_place) {
    const int64_t blocks = ceil_div(problem.in_channels, kChannelsOfX);
    parallel(p.batch * blocks, grain(work(kChannelsOfX, 4)), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t batch = unit / blocks, first = unit % blocks * kChannelsOfX;
        passes.load(p.dtype, channels_from(p, problem.x, batch, first), 0, tokens,
                    smaller(kChannelsOfX, problem.in_channels - first),
                    {own_x + (batch * problem.in_channels + first) * stride, stride});
      }
    });
  }

  const int64_t head_work = work(3 * d, problem.in_channels) + aggregation_work(p, 3 * d);
  parallel(p.batch * p.heads, grain(head_work), [&](int64_t begin, int64_t end) {
    const Plane<float> qkv{thread_scratch<Purpose::kProjection>(3 * d * stride), stride};
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t batch = unit / p.heads, head = unit % p.heads;
      const int64_t row = 3 * head * d;
      const Image image = channels_from(p, problem.x, batch, 0);
      const Plane<const float> x =
          in_place ? Plane<const float>{static_cast<const float*>(image.data), image.channel_stride}
                   : Plane<const float>{own_x + batch * problem.in_channels * stride, stride};
      passes.project(problem.qkv_weight + row * problem.in_channels,
                     problem.qkv_bias == nullptr ? nullptr : problem.qkv_bias + row, 3 * d,
                     problem.in_channels, tokens, x, !in_place, qkv);
      const Plane<float> out = attended_of(batch);
      for (int64_t s = 0; s <= p.scales; ++s) {
        for (int64_t c = 0; c < d; ++c) {
          float* const end_of_row = out.data + ((s * p.heads + head) * d + c) * stride + tokens;
          clear(end_of_row, kPadding / 2);  // the last projection takes whole vectors
        }
      }
      attend(one_head(p, head, qkv, out), nullptr, {1, nullptr});
    }
  });

  const int64_t blocks = ceil_div(problem.out_channels, kRowsOfOut);
  parallel(p.batch * blocks, grain(work(kRowsOfOut, attended)), [&](int64_t begin, int64_t end) {
    const Plane<float> tile{thread_scratch(kRowsOfOut * stride), stride};
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t batch = unit / blocks, row = unit % blocks * kRowsOfOut;
      const int64_t rows = smaller(kRowsOfOut, problem.out_channels - row);
      const Plane<float> in = attended_of(batch);
      passes.project(problem.proj_weight + row * attended,
                     problem.proj_bias == nullptr ? nullptr : problem.proj_bias + row, rows, attended, tokens,
                     {in.data, in.stride}, true, tile);
      passes.store(p.dtype, channels_from(p, problem.out, batch, row), 0, tokens, rows, tile);
    }
  });
}

}  // namespace effattn::cpu
