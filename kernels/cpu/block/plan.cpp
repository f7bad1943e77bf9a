#include "plan.h"

#include <numeric>

#include "../core/arena.h"

namespace effattn::cpu {
namespace {

using Kind = BlockStep::Kind;
using Parts = PassPlan::Parts;

// Of a thread's second-level cache, for the values inside of a pass.
constexpr int64_t kCachedFloats = 160 << 10;
// What a pass by slices takes more than its share of the work: every thread reads what all have written.
constexpr double kCostOfSlices = 1.2;
// Multiply-adds that pass while a float comes from the third level.
constexpr double kCostOfAFloat = 8;
// A tile is at least so wide: beside it, columns of the border are made twice.
constexpr int64_t kMinTileCols = 28;

// Whether a block of the result is made of the same block of the input, or of the same group of blocks.
bool is_by_channel(const BlockStep& step) {
  switch (step.kind) {
    case Kind::kConvolution:
      return step.groups > 1;
    case Kind::kDepthwise:
    case Kind::kPoolMixer:
    case Kind::kMultiply:
    case Kind::kStore:
      return true;
    default:
      return false;
  }
}

}  // namespace

bool is_of_whole_images(const BlockStep& step) {
  switch (step.kind) {
    case Kind::kMean:
    case Kind::kUpsample:
    case Kind::kLinearAttention:
    case Kind::kAttention:
    case Kind::kCascade:
      return true;
    default:
      return false;
  }
}

std::vector<int64_t> weight_sizes(const BlockStep& step, int64_t inputs) {
  const int64_t taps = step.kernel * step.kernel, channels = round_up(step.channels, kBlock);
  switch (step.kind) {
    case Kind::kConvolution: {
      const int64_t outputs = step.groups * round_up(step.channels / step.groups, kPanel);
      return {outputs * (inputs / step.groups) * taps, outputs};
    }
    case Kind::kDepthwise:
      return {channels * taps, channels};
    case Kind::kPoolMixer:
      return {channels};
    case Kind::kLayerNorm:
      return {channels, channels};
    case Kind::kAttention: {
      std::vector<int64_t> sizes{step.heads * step.queries * step.keys};
      for (int i = 0; i < 4 && step.talking_heads; ++i) {
        sizes.push_back(i % 2 == 0 ? step.heads * step.heads : step.heads);
      }
      return sizes;
    }
    case Kind::kCascade: {
      const int64_t keys = step.key_stride(), outputs = 2 * keys + step.value_stride();
      const int64_t tokens = step.window_height * step.window_width;
      int64_t all_taps = 0;
      for (const int64_t kernel : step.kernels) all_taps += kernel * kernel;
      return {step.heads * step.value_dim * outputs, step.heads * outputs, all_taps * keys, step.heads * keys,
              step.heads * tokens * tokens};
    }
    default:
      return {};
  }
}

BlockPlan::BlockPlan(const BlockProgram& program, const BlockSize& size, int64_t batch, int threads) {
  steps.push_back({.kind = Kind::kLoad, .inputs = {}, .channels = program.channels});
  for (const BlockStep& step : program.steps) steps.push_back(step);
  const int last = static_cast<int>(steps.size()) - 1;
  steps.push_back({.kind = Kind::kStore, .inputs = {last}, .channels = steps[last].channels});
  for (const BlockStep& step : steps) {
    const BlockSize of = step.inputs.empty() ? size : result_size(step, values[step.inputs[0]].size);
    values.push_back({.size = of, .blocks = ceil_div(step.channels, kBlock)});
    if (step.kind == Kind::kConvolution || step.kind == Kind::kDepthwise) {
      ValuePlan& in = values[step.inputs[0]];
      in.border = max(in.border, step.padding);
    }
  }
  for (int first = 0; first < static_cast<int>(steps.size()); first = passes.back().last + 1) {
    add_pass(first, batch, threads);
  }
  place_whole();
  for (const ValuePlan& value : values) zero_floats = max(zero_floats, value.row_stride);
}

// Multiply-adds for a row of a step's result.
int64_t BlockPlan::work_of_row(int step) const {
  const BlockStep& s = steps[step];
  const int64_t channels = values[step].blocks * kBlock, width = values[step].size.width;
  switch (s.kind) {
    case Kind::kConvolution:
      return width * channels * s.kernel * s.kernel * steps[s.inputs[0]].channels / s.groups;
    case Kind::kDepthwise:
    case Kind::kPoolMixer:
      return 2 * width * channels * s.kernel * s.kernel;
    case Kind::kLinearAttention:
      return 4 * width * channels * s.head_dim;
    default:
      return 4 * width * channels;
  }
}

// The last step of a pass by tiles: a chain whose inner values nobody else reads, up to where it narrows.
int BlockPlan::last_of_tiles(int first) const {
  const auto narrows = [&](int step) {
    return steps[step].kind == Kind::kConvolution &&
           steps[step].channels <= steps[steps[step].inputs[0]].channels;
  };
  const int count = static_cast<int>(steps.size());
  int last = first;
  while (last + 1 < count) {
    const BlockStep& next = steps[last + 1];
    if (is_of_whole_images(next) || next.inputs[0] != last) break;
    if (narrows(last) && next.kind != Kind::kStore) break;
    ++last;
  }
  const auto is_read_outside = [&] {
    bool is_read = false;
    for (int reader = last + 1; reader < count; ++reader) {
      for_inputs(steps[reader], [&](int value) { is_read = is_read || (value >= first && value < last); });
    }
    return is_read;
  };
  while (is_read_outside()) --last;
  return last;
}

// The last step of a pass by slices: every step behind the first makes each block of the same block.
int BlockPlan::last_of_slices(int first) const {
  const int count = static_cast<int>(steps.size());
  int last = first;
  while (last + 1 < count && is_by_channel(steps[last + 1]) && steps[last + 1].inputs[0] >= first) ++last;
  // Heads, where a slice has all of what they attend to.
  if (last + 1 < count && last > first && steps[last + 1].kind == Kind::kLinearAttention) {
    bool has_all = true;
    for (const int input : steps[last + 1].inputs) has_all = has_all && input >= first;
    if (has_all) ++last;
  }
  return last;
}

void BlockPlan::add_pass(int first, int64_t batch, int threads) {
  if (is_of_whole_images(steps[first])) {
    passes.push_back({.first = first, .last = first, .parts = Parts::kWhole});
    return;
  }
  PassPlan slices = by_slices(first);
  place_local(slices);
  const PassPlan tiles = by_tiles(first, last_of_tiles(first), batch, threads);
  const bool is_cheaper =
      cost_of_tiles(tiles, batch, threads) < cost_of_slices(slices, tiles.last, batch, threads);
  if (steps[slices.last].kind == Kind::kLinearAttention && slices.local_floats > kCachedFloats) --slices.last;
  // Heads attend to what a slice has in cache.
  const bool attends = steps[slices.last].kind == Kind::kLinearAttention &&
                       slices.local_floats <= kCachedFloats && slices.units * batch >= threads;
  PassPlan pass = is_cheaper && !attends ? tiles : slices;
  if (steps[first].kind == Kind::kLayerNorm) {  // which needs all channels
    pass = is_cheaper ? tiles : by_tiles(first, first, batch, threads);
  }
  int64_t work = 0;
  for (int step = first; step <= pass.last; ++step) work += work_of_row(step) * values[step].size.height;
  pass.unit_work = max(1, work / max(1, pass.units));
  place_local(pass);
  passes.push_back(pass);
}

// Multiply-adds of the thread that has most to do, and what memory takes beside them.
double BlockPlan::cost_of_tiles(const PassPlan& pass, int64_t batch, int threads) const {
  const BlockSize& out = values[pass.last].size;
  const int64_t tiles = pass.units * max(1, batch), of_a_thread = ceil_div(tiles, threads);
  std::vector<PartSpans> spans(pass.last - pass.first + 1);
  // A thread's tiles follow each other: rows around them are made once.
  const int64_t rows = min(out.height, ceil_div(of_a_thread * pass.tile_rows, pass.across));
  spans_of_part(pass, {0, rows}, {0, min(pass.tile_cols, out.width)}, spans.data());
  double work = 0, weights = 0;
  for (int step = pass.first; step <= pass.last; ++step) {
    const ValuePlan& value = values[step];
    const auto& [own_rows, own_cols] = spans[step - pass.first];
    const double share = value.is_local
                             ? static_cast<double>(min(own_rows.end - own_rows.begin, value.size.height)) *
                                   min(own_cols.end - own_cols.begin, value.size.width)
                             : static_cast<double>(rows) * min(pass.tile_cols, out.width);
    work += share / max(1, value.size.width) * work_of_row(step);
    weights += floats_of_weights(step);
  }
  const double strips = static_cast<double>(of_a_thread) * pass.tile_rows / max(1, rows);
  return work * max(1.0, strips) + kCostOfAFloat * weights * of_a_thread;
}

double BlockPlan::cost_of_slices(const PassPlan& pass, int last, int64_t batch, int threads) const {
  double work = 0, inner = 0, weights = 0;
  for (int step = pass.first; step <= last; ++step) {
    work += work_of_row(step) * values[step].size.height;
    weights += floats_of_weights(step);
    if (step < last) inner += values[step].pixels() * values[step].blocks * kBlock;
  }
  const int64_t units = pass.units * max(1, batch);
  const double share = static_cast<double>(ceil_div(units, threads)) / units;
  const double images = max(1, batch);
  const bool is_cached = inner <= kCachedFloats * threads;
  return kCostOfSlices * work * images * share +
         kCostOfAFloat * (weights + (is_cached ? 0 : 2 * inner * images)) / threads;
}

PassPlan BlockPlan::by_slices(int first) const {
  const int last = last_of_slices(first);
  int64_t blocks = kPanelBlocks;
  for (int step = first; step <= last; ++step) {
    const BlockStep& s = steps[step];
    if (s.groups > 1) blocks = std::lcm(blocks, s.channels / s.groups / kBlock);
    if (s.kind == Kind::kLinearAttention) blocks = std::lcm(blocks, 3 * s.head_dim / kBlock);
  }
  return {.first = first,
          .last = last,
          .parts = Parts::kSlices,
          .slice_blocks = blocks,
          .units = ceil_div(values[first].blocks, blocks)};
}

// As many rows and columns as keep the inner values in cache, and as many tiles for each thread.
PassPlan BlockPlan::by_tiles(int first, int last, int64_t batch, int threads) {
  const BlockSize& out = values[last].size;
  PassPlan pass{.first = first,
                .last = last,
                .parts = Parts::kTiles,
                .tile_rows = max(1, ceil_div(out.height, ceil_div(threads, max(1, batch)))),
                .tile_cols = max(1, out.width)};
  for (place_local(pass); pass.local_floats > kCachedFloats; place_local(pass)) {
    if (pass.tile_rows > 2) {
      pass.tile_rows = ceil_div(pass.tile_rows, 2);
    } else if (pass.tile_cols >= 2 * kMinTileCols) {
      pass.tile_cols = ceil_div(pass.tile_cols, 2);
    } else {
      break;
    }
  }
  pass.across = ceil_div(out.width, pass.tile_cols);
  const int64_t strips = pass.across * max(1, batch);
  pass.down = ceil_div(out.height, pass.tile_rows);
  const int64_t even = round_up(pass.down * strips, threads) / strips;
  if (even * strips % threads == 0 && even <= out.height) pass.down = even;
  pass.tile_rows = ceil_div(out.height, pass.down);
  pass.tile_cols = ceil_div(out.width, pass.across);
  pass.units = pass.down * pass.across;
  return pass;
}

int64_t BlockPlan::floats_of_weights(int step) const {
  const BlockStep& s = steps[step];
  int64_t floats = 0;
  for (const int64_t size : weight_sizes(s, s.inputs.empty() ? 0 : steps[s.inputs[0]].channels))
    floats += size;
  return floats;
}

// Where the inner values lie in a thread's memory.
void BlockPlan::place_local(PassPlan& pass) {
  const int count = static_cast<int>(steps.size());
  for (int step = pass.first; step <= pass.last; ++step) {
    bool is_read = false;
    for (int reader = pass.last + 1; reader < count; ++reader) {
      for_inputs(steps[reader], [&](int value) { is_read = is_read || value == step; });
    }
    values[step].is_local = !is_read && steps[step].kind != Kind::kStore;
  }
  const BlockSize& out = values[pass.last].size;
  const bool is_whole = pass.parts == Parts::kSlices;
  const int64_t height = is_whole ? out.height : min(pass.tile_rows, out.height);
  const int64_t width = is_whole ? out.width : min(pass.tile_cols, out.width);
  std::vector<PartSpans> spans(pass.last - pass.first + 1);
  spans_of_part(pass, {0, height}, {0, width}, spans.data());
  pass.local_floats = 0;
  for (int step = pass.first; step <= pass.last; ++step) {
    ValuePlan& value = values[step];
    if (!value.is_local) continue;
    const auto& [rows, cols] = spans[step - pass.first];
    value.rows = max(1, rows.end - rows.begin);
    value.row_stride = max(1, cols.end - cols.begin) * kBlock;
    value.block_stride = value.rows * value.row_stride;
    value.offset = pass.local_floats;
    const int64_t blocks = is_whole ? min(pass.slice_blocks, value.blocks) : value.blocks;
    pass.local_floats += blocks * value.block_stride;
  }
}

void BlockPlan::spans_of_part(const PassPlan& pass, Span rows, Span cols, PartSpans* spans) const {
  const auto of = [&](int value) -> PartSpans& { return spans[value - pass.first]; };
  for (int step = pass.first; step <= pass.last; ++step) {
    const BlockSize& size = values[step].size;
    of(step) = values[step].is_local ? PartSpans{} : PartSpans{{0, size.height}, {0, size.width}};
  }
  of(pass.last) = {rows, cols};
  const auto widen = [](Span& span, const Span& by) {
    span = span.end == span.begin ? by : Span{min(span.begin, by.begin), max(span.end, by.end)};
  };
  for (int step = pass.last; step > pass.first; --step) {
    const auto& [own_rows, own_cols] = of(step);
    for (const int input : steps[step].inputs) {
      if (input < pass.first || !values[input].is_local) continue;
      widen(of(input).rows, input_span(steps[step], own_rows));
      widen(of(input).cols, input_span(steps[step], own_cols));
    }
    const int residual = steps[step].residual;
    if (residual < pass.first || !values[residual].is_local) continue;
    widen(of(residual).rows, own_rows);
    widen(of(residual).cols, own_cols);
  }
}

// Whole values of an image: each takes the first gap between those that live when it does.
void BlockPlan::place_whole() {
  const int count = static_cast<int>(steps.size());
  struct Life {
    int first, last;  // passes
    int64_t begin, end;
  };
  std::vector<Life> placed;
  std::vector<int> pass_of(count);
  for (int pass = 0; pass < static_cast<int>(passes.size()); ++pass) {
    for (int step = passes[pass].first; step <= passes[pass].last; ++step) pass_of[step] = pass;
  }
  for (int step = 0; step < count; ++step) {
    ValuePlan& value = values[step];
    if (value.is_local || steps[step].kind == Kind::kStore) continue;
    Life life{pass_of[step], pass_of[step], 0, 0};
    for (int reader = step + 1; reader < count; ++reader) {
      for_inputs(steps[reader], [&](int read) { life.last = read == step ? pass_of[reader] : life.last; });
    }
    value.rows = max(value.size.height, 1);
    value.row_stride = (value.size.width + 2 * value.border) * kBlock;
    // Blocks begin in different sets of a cache.
    value.block_stride = value.rows * value.row_stride + Arena::kAlignment;
    const int64_t floats = value.blocks * value.block_stride;
    for (bool is_free = false; !is_free;) {
      is_free = true;
      for (const Life& other : placed) {
        if (other.first > life.last || other.last < life.first) continue;
        if (life.begin < other.end && other.begin < life.begin + floats) {
          life.begin = other.end;
          is_free = false;
        }
      }
    }
    life.end = life.begin + floats;
    value.offset = life.begin;
    image_floats = max(image_floats, life.end);
    placed.push_back(life);
  }
}

}  // namespace effattn::cpu
