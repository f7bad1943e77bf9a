#include "plan.h"

#include <numeric>

#include "../core/arena.h"

namespace effattn::cpu {
namespace {

using Kind = BlockStep::Kind;
using Parts = PassPlan::Parts;

// Of a thread's second-level cache, for the values inside of a pass.
constexpr int64_t kCachedFloats = 96 << 10;
// A tile is at least so wide: beside it, columns of the border are made twice.
constexpr int64_t kMinTileCols = 28;
constexpr int64_t kMaxTileRows = 8;

// Whether a part of the result is made of a part of the input.
bool is_local(const BlockStep& step) {
  switch (step.kind) {
    case Kind::kMean:
    case Kind::kUpsample:
    case Kind::kLinearAttention:
    case Kind::kAttention:
    case Kind::kCascade:
      return false;
    default:
      return true;
  }
}
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
      return {step.heads * step.value_dim * outputs, step.heads * outputs, all_taps * keys,
              step.heads * keys, step.heads * tokens * tokens};
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
    if (!step.inputs.empty()) {
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
    if (!is_local(next) || next.inputs[0] != last) break;
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
  return last;
}

void BlockPlan::add_pass(int first, int64_t batch, int threads) {
  PassPlan pass{.first = first, .last = first};
  if (!is_local(steps[first])) {
    pass.parts = Parts::kWhole;
    passes.push_back(pass);
    return;
  }
  const int of_tiles = last_of_tiles(first), of_slices = last_of_slices(first);
  int64_t inner = 0;
  for (int step = first; step < of_tiles; ++step) {
    inner += values[step].pixels() * values[step].blocks * kBlock;
  }
  int64_t slice = kPanelBlocks;
  for (int step = first; step <= of_slices; ++step) {
    const BlockStep& s = steps[step];
    if (s.groups > 1) slice = std::lcm(slice, s.channels / s.groups / kBlock);
  }
  const int64_t slices = ceil_div(values[first].blocks, slice);
  const int64_t rows = values[of_tiles].size.height;
  const bool has_few_slices = slices * batch < 2 * threads && rows >= 4;
  const bool needs_all_channels = steps[first].kind == Kind::kLayerNorm;
  const bool by_tiles = inner > kCachedFloats * threads || has_few_slices || needs_all_channels;
  pass.parts = by_tiles ? Parts::kTiles : Parts::kSlices;
  pass.last = pass.parts == Parts::kTiles ? of_tiles : of_slices;
  int64_t work = 0;
  for (int step = first; step <= pass.last; ++step) work += work_of_row(step) * values[step].size.height;
  if (pass.parts == Parts::kSlices) {
    pass.slice_blocks = slice;
    pass.units = slices;
  }
  place_local(pass);
  const BlockSize& out = values[pass.last].size;
  if (pass.parts == Parts::kTiles) {
    // Enough parts for every thread, and rows that follow each other for as long as can be.
    pass.tile_rows = max(1, min(pass.tile_rows, ceil_div(out.height * batch, 2 * threads)));
    place_local(pass);
    pass.units = ceil_div(out.height, pass.tile_rows) * ceil_div(out.width, pass.tile_cols);
  }
  pass.unit_work = max(1, work / max(1, pass.units));
  passes.push_back(pass);
}

// Sizes of the tile, and where the inner values lie in a thread's memory.
void BlockPlan::place_local(PassPlan& pass) {
  const int count = static_cast<int>(steps.size());
  for (int step = pass.first; step <= pass.last; ++step) {
    bool is_read = false;
    for (int reader = pass.last + 1; reader < count; ++reader) {
      for_inputs(steps[reader], [&](int value) { is_read = is_read || value == step; });
    }
    values[step].is_local = !is_read && steps[step].kind != Kind::kStore;
  }
  const auto place = [&](int64_t tile_rows, int64_t tile_cols) {
    const BlockSize& out = values[pass.last].size;
    std::vector<PartSpans> spans(pass.last - pass.first + 1);
    spans_of_part(pass, {0, min(tile_rows, out.height)}, {0, min(tile_cols, out.width)}, spans.data());
    int64_t floats = 0;
    for (int step = pass.first; step <= pass.last; ++step) {
      ValuePlan& value = values[step];
      if (!value.is_local) continue;
      const auto& [rows, cols] = spans[step - pass.first];
      value.rows = max(1, rows.end - rows.begin);
      value.row_stride = max(1, cols.end - cols.begin) * kBlock;
      value.block_stride = value.rows * value.row_stride;
      value.offset = floats;
      const bool by_slices = pass.parts == Parts::kSlices;
      floats += (by_slices ? min(pass.slice_blocks, value.blocks) : value.blocks) * value.block_stride;
    }
    return floats;
  };
  const BlockSize& out = values[pass.last].size;
  if (pass.parts == Parts::kSlices) {
    pass.local_floats = place(out.height, out.width);
    return;
  }
  if (pass.tile_rows == 0) {
    pass.tile_rows = max(1, min(kMaxTileRows, out.height));
    pass.tile_cols = max(1, out.width);
    while (place(pass.tile_rows, pass.tile_cols) > kCachedFloats) {
      if (pass.tile_rows > 2) {
        pass.tile_rows /= 2;
      } else if (pass.tile_cols >= 2 * kMinTileCols) {
        pass.tile_cols = ceil_div(pass.tile_cols, 2);
      } else {
        break;
      }
    }
  }
  pass.local_floats = place(pass.tile_rows, pass.tile_cols);
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
