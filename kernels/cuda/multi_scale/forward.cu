// Multi-scale aggregation, and ReLU linear attention in all of its heads, forward: nothing that is aggregated
// is written, but summed up or attended with at once. Of narrow types in narrow_forward.cu.
#include "../core/limits.h"
#include "../core/reduction.h"
#include "aggregation.h"
#include "api.h"
#include "narrow_forward.h"

namespace effattn::cuda {
namespace multi_scale {
namespace {

const std::initializer_list<Limit> kLimits = {
    {"channels", kMaxChannels}, {"kernel", kMaxKernel}, {"scales", MultiScaleParams::kMaxScales}};
const RegisteredOperator aggregation("multi_scale_aggregation", kLimits),
    attention("multi_scale_linear_attention", kLimits);

// --- attention --------------------------------------------------------------------------------------

struct AttentionArgs {
  Scale scale;
  int first_head, all_heads;  // of the output
  int parts, part_tiles;
  float* kv_state;  // (batch, all_heads, parts, head_dim + 1, head_dim)
  ImageView out;
  float eps;
};

template <int kPadded, int kKernel>
EFFATTN_KERNEL(kPixelThreads, PixelTiles<kPadded>::kBlocks)
accumulate_kv_state_tiles(EFFATTN_PARAMETERS(AttentionArgs) p) {
  using Tiles = PixelTiles<kPadded>;
  const Scale& s = p.scale;
  const Memory<Tiles> memory(s);
  const TileCoord coord(s, p.parts, 1);
  float* const keys = memory.mixed;
  float* const values = keys + Tiles::kPixels * Tiles::kByPixel;
  MatrixTotal<kPadded> matrix;
  VectorTotal<kPadded> vector;
  const int end = min((coord.piece + 1) * p.part_tiles, s.tiles());
  for (int tile = coord.piece * p.part_tiles; tile < end; ++tile) {
    const Corner at = corner_of<Tiles>(s, tile);
    aggregate_head<Tiles, kKernel>(s, memory, coord.is_own, coord.batch, coord.channel, at, keys);
    aggregate_head<Tiles, kKernel>(s, memory, coord.is_own, coord.batch, coord.channel + s.head_dim, at,
                                   values);
    const auto key = [&](int pixel, int c) { return relu(keys[pixel * Tiles::kByPixel + c]); };
    matrix.add(
        s.head_dim, s.head_dim, [&](int row, int pixel) { return values[pixel * Tiles::kByPixel + row]; },
        key);
    vector.add(s.head_dim, key);
    sync_block();
  }
  const int64_t group = (coord.batch * p.all_heads + p.first_head + coord.head) * p.parts + coord.piece;
  float* const to = p.kv_state + group * (s.head_dim + 1) * s.head_dim;
  matrix.finish(memory.staged, s.head_dim, s.head_dim,
                [&](int r, int c, float x) { to[r * s.head_dim + c] = x; });
  vector.finish(memory.staged, s.head_dim, [&](int c, float x) { to[s.head_dim * s.head_dim + c] = x; });
}

template <int kPadded, int kKernel>
EFFATTN_KERNEL(kPixelThreads, PixelTiles<kPadded>::kBlocks)
attend_tile(EFFATTN_PARAMETERS(AttentionArgs) p) {
  using Tiles = PixelTiles<kPadded>;
  const Scale& s = p.scale;
  const Memory<Tiles> memory(s);
  const TileCoord coord(s, s.tiles(), 0);
  const Corner at = corner_of<Tiles>(s, coord.piece);
  const int64_t head = coord.batch * p.all_heads + p.first_head + coord.head;
  const float* const kv_state = p.kv_state + head * (s.head_dim + 1) * s.head_dim;
  float* const queries = memory.mixed;
  float* const outputs = queries + Tiles::kPixels * Tiles::kByPixel;
  aggregate_head<Tiles, kKernel>(s, memory, coord.is_own, coord.batch, coord.channel, at, queries);
  float* const inverse = memory.staged;
  for_each<kPixelThreads>(Tiles::kPixels, [&](int pixel) {
    float denominator = 0;
    for (int c = 0; c < s.head_dim; ++c) {
      denominator += relu(queries[pixel * Tiles::kByPixel + c]) * kv_state[s.head_dim * s.head_dim + c];
    }
    inverse[pixel] = 1 / clamp_subnormal(denominator + p.eps);
  });
  sync_block();
  products(
      kPixelWarps, 1, Tiles::kPixels, s.head_dim, s.head_dim,
      [&](int, int pixel, int k) { return relu(queries[pixel * Tiles::kByPixel + k]); },
      [&](int, int k, int c) { return kv_state[c * s.head_dim + k]; },
      [&](int, int pixel, int c, float x) { outputs[pixel * Tiles::kByPixel + c] = x * inverse[pixel]; });
  sync_block();
  const int64_t channel = static_cast<int64_t>(p.first_head + coord.head) * s.head_dim;
  store_tile<Tiles>(p.out, coord.batch, channel, s.head_dim, at,
                    [&](int pixel, int c) { return outputs[pixel * Tiles::kByPixel + c]; });
}

// --- aggregation ------------------------------------------------------------------------------------

struct AggregationArgs {
  Scale scale;
  int64_t first_channel;  // of the output
  ImageView out;
};

// Heads are groups of head_dim channels here, q's, k's and v's alike.
template <int kPadded, int kKernel>
EFFATTN_KERNEL(kPixelThreads, PixelTiles<kPadded>::kBlocks)
aggregate_tile(EFFATTN_PARAMETERS(AggregationArgs) p) {
  using Tiles = PixelTiles<kPadded>;
  const Scale& s = p.scale;
  const Memory<Tiles> memory(s);
  const TileCoord coord(s, s.tiles(), 0);
  const Corner at = corner_of<Tiles>(s, coord.piece);
  const int64_t from = coord.channel / 3;
  aggregate_head<Tiles, kKernel>(s, memory, coord.is_own, coord.batch, from, at, memory.mixed);
  const int64_t to = p.first_channel + static_cast<int64_t>(coord.head) * s.head_dim;
  store_tile<Tiles>(p.out, coord.batch, to, s.head_dim, at,
                    [&](int pixel, int c) { return memory.mixed[pixel * Tiles::kByPixel + c]; });
}

// --- launches ---------------------------------------------------------------------------------------

struct Forward : LaunchPlan {
  using LaunchPlan::LaunchPlan;

  void attend(float* kv_state) const {
    AttentionArgs a{};
    a.all_heads = static_cast<int>(params.all_heads());
    a.out = image_view(params.out);
    a.eps = params.eps;
    const int64_t groups = params.batch * params.all_heads(),
                  floats = (params.head_dim + 1) * params.head_dim;
    if (attend_narrow(params, image_view(params.qkv), a.out, kv_state, execution)) return;
    if (kv_state == nullptr) kv_state = execution.workspace(groups * floats);
    each_scale(params.heads, true, [&](auto padded, auto kernel, const Scale& s, int index) {
      // The same parts for every scale, so that all kv_states are added up at once.
      const Split parts = split_tokens(groups, int64_t{s.tiles()} * PixelTiles<padded()>::kPixels,
                                       PixelTiles<padded()>::kPixels, Gpu{});
      a.scale = s;
      a.first_head = first_head(s, index, params.heads);
      a.parts = parts.parts;
      a.part_tiles = parts.part_tokens / PixelTiles<padded()>::kPixels;
      if (a.kv_state == nullptr)
        a.kv_state = parts.parts == 1 ? kv_state : execution.workspace(groups * parts.parts * floats);
      launch(accumulate_kv_state_tiles<padded(), kernel()>,
             {params.batch * s.launch_heads() * a.parts, kPixelThreads, bytes<padded()>(s)}, execution, a);
    });
    if (a.parts > 1) add_up(a.kv_state, kv_state, groups, a.parts, floats, execution);
    a.kv_state = kv_state;
    each_scale(params.heads, true, [&](auto padded, auto kernel, const Scale& s, int index) {
      a.scale = s;
      a.first_head = first_head(s, index, params.heads);
      launch(attend_tile<padded(), kernel()>,
             {params.batch * s.launch_heads() * s.tiles(), kPixelThreads, bytes<padded()>(s)}, execution, a);
    });
  }
};

}  // namespace

void aggregate(const LaunchPlan& plan, const ImageView& out) {
  const int64_t heads = 3 * plan.params.heads;
  plan.each_scale(heads, true, [&](auto padded, auto kernel, const Scale& s, int index) {
    const AggregationArgs a{s, plan.first_head(s, index, heads) * plan.params.head_dim, out};
    launch(aggregate_tile<padded(), kernel()>,
           {plan.params.batch * s.launch_heads() * s.tiles(), kPixelThreads, plan.bytes<padded()>(s)},
           plan.execution, a);
  });
}

}  // namespace multi_scale

void aggregate(const MultiScaleParams& params, const Execution& execution) {
  const multi_scale::LaunchPlan plan(params, execution);
  if (!plan.is_empty()) multi_scale::aggregate(plan, plan.image_view(params.out));
}

void attend(const MultiScaleParams& params, float* kv_state, const Execution& execution) {
  const multi_scale::Forward plan(params, execution);
  const int64_t floats = params.batch * params.all_heads() * (params.head_dim + 1) * params.head_dim;
  if (!plan.is_empty()) {
    plan.attend(kv_state);
  } else if (kv_state != nullptr && floats > 0) {
    add_up(nullptr, kv_state, 1, 0, floats, execution);
  }
}

}  // namespace effattn::cuda
