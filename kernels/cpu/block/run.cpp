// Pass after pass, the parts of each in parallel.
#include <optional>
#include <vector>

#include "../core/image.h"
#include "linear_heads.h"

namespace effattn::cpu {
namespace {

using Kind = BlockStep::Kind;
using Parts = PassPlan::Parts;

// A thread at work on the parts of a pass.
struct PassMemory {
  float* local;
  std::optional<LinearAttention::Memory> attention;
  PassMemory(const PassPlan& pass, const LinearAttention* of_pass, Arena& arena)
      : local(arena.floats(pass.local_floats)) {
    if (of_pass != nullptr) attention.emplace(of_pass->schedule(1), arena);
  }
};

class PassContext {
 public:
  PassContext(const Call& call, const PassPlan& pass)
      : call_(call),
        plan_(call.plan),
        pass_(pass),
        attention_(attention_of(call, pass)),
        memory_(in_thread_arena<PassMemory>(pass, attention_ ? &*attention_ : nullptr)),
        spans_(pass.last - pass.first + 1),
        made_(spans_.size()) {}

  // A part of an image: of all its blocks of channels, or of those of a slice.
  void run(int64_t image, const Span& blocks, const Span& rows, const Span& cols, bool follows) {
    image_ = image;
    blocks_ = blocks;
    plan_.spans_of_part(pass_, rows, cols, spans_.data());
    for (int step = pass_.first; step <= pass_.last; ++step) {
      const PartSpans& own = spans_[step - pass_.first];
      const ValuePlan& value = plan_.values[step];
      int64_t& made = made_[step - pass_.first];
      Span to_make = clipped(own.rows, value.size.height);
      if (follows && value.is_local) to_make.begin = max(to_make.begin, made);
      made = to_make.end;
      make(step, to_make, clipped(own.cols, value.size.width));
    }
  }

 private:
  View view(int value) const {
    if (value < pass_.first || !plan_.values[value].is_local) return call_.whole(value, image_);
    const ValuePlan& v = plan_.values[value];
    return {memory_.local + v.offset,
            call_.memory.zeros,
            blocks_.begin,
            v.rows,
            v.size.height,
            v.row_stride,
            v.block_stride,
            spans_[value - pass_.first].cols};
  }

  Span blocks_of(int value) const { return {blocks_.begin, min(blocks_.end, plan_.values[value].blocks)}; }

  void make(int index, const Span& rows, const Span& cols) {
    if (rows.begin >= rows.end || cols.begin >= cols.end) return;
    const BlockStep& step = plan_.steps[index];
    if (step.kind == Kind::kStore) return store(step, rows, cols);
    if (step.kind == Kind::kLinearAttention) return attend(step, view(index));
    const View out = view(index);
    switch (step.kind) {
      case Kind::kConvolution:
        convolve(step, blocks_of(index), rows, cols, out);
        break;
      case Kind::kDepthwise:
        depthwise(step, blocks_of(index), rows, cols, out);
        break;
      case Kind::kPoolMixer:
        pool(step, blocks_of(index), rows, cols, out);
        break;
      case Kind::kLayerNorm:
        normalize(step, rows, cols, out);
        break;
      case Kind::kMultiply:
        multiply(step, blocks_of(index), rows, cols, out);
        break;
      default:
        load(blocks_of(index), rows, cols, out);
    }
    out.clear_border(blocks_of(index), rows, cols, plan_.values[index].size.width);
  }

  Image pixels_of(const Image& image, int64_t block, int64_t y, int64_t x, int64_t width) const {
    return channels_from(call_.params.dtype, image, image_, block * kBlock, y * width + x);
  }

  void load(const Span& blocks, const Span& rows, const Span& cols, const View& out) const {
    const int64_t width = call_.params.size.width, channels = plan_.steps[0].channels;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        call_.ukernels.load(call_.params.dtype, pixels_of(call_.params.x, block, y, cols.begin, width),
                            cols.end - cols.begin, min(kBlock, channels - block * kBlock),
                            out.own_row(block, y) + cols.begin * kBlock);
      }
    }
  }

  void store(const BlockStep& step, const Span& rows, const Span& cols) const {
    const int value = step.inputs[0];
    const View in = view(value);
    const Span blocks = blocks_of(value);
    const int64_t width = plan_.values[value].size.width;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        call_.ukernels.store(call_.params.dtype, pixels_of(call_.params.out, block, y, cols.begin, width),
                             cols.end - cols.begin, min(kBlock, step.channels - block * kBlock),
                             in.row(block, y) + cols.begin * kBlock);
      }
    }
  }

  void convolve(const BlockStep& step, const Span& blocks, const Span& rows, const Span& cols,
                const View& out) {
    const View in = view(step.inputs[0]);
    const View residual = step.residual == BlockStep::kNone ? View{} : view(step.residual);
    const int64_t inputs = plan_.steps[step.inputs[0]].channels / step.groups;
    const int64_t taps = step.kernel * step.kernel;
    const int64_t group_blocks = ceil_div(step.channels / step.groups, kBlock);
    const int64_t panels = ceil_div(group_blocks, kPanelBlocks);  // of a group
    const std::vector<const float*> weights = call_.weights_of(step);
    ConvolutionRow row{};
    row.whole = inputs / kBlock * taps;
    row.depth = inputs % kBlock;
    row.partial = row.depth == 0 ? 0 : taps;
    row.begin = cols.begin;
    row.end = cols.end;
    row.stride = step.stride;
    row.activation = step.activation;
    segments_.resize(row.whole + row.partial);
    row.segments = segments_.data();
    for (int64_t block = blocks.begin; block < blocks.end; block += row.blocks) {
      const int64_t group = block / group_blocks, in_group = block % group_blocks;
      const int64_t panel = group * panels + in_group / kPanelBlocks;
      row.blocks = min(kPanelBlocks, group_blocks - in_group);
      row.weights = weights[0] + panel * kPanel * inputs * taps;
      row.bias = weights[1] + panel * kPanel;
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        find_segments(step, in, group * inputs / kBlock, y);
        for (int64_t b = 0; b < row.blocks; ++b) {
          row.out[b] = out.own_row(block + b, y);
          if (residual.data != nullptr) row.residual[b] = residual.row(block + b, y);
        }
        call_.ukernels.convolve(row);
      }
    }
  }

  void find_segments(const BlockStep& step, const View& in, int64_t first_block, int64_t y) {
    const float** segment = segments_.data();
    const float** const end = segment + segments_.size();
    for (int64_t block = first_block; segment < end; ++block) {
      for (int64_t i = 0; i < step.kernel; ++i) {
        const float* pixel = in.row(block, y * step.stride - step.padding + i) - step.padding * kBlock;
        for (int64_t j = 0; j < step.kernel; ++j, pixel += kBlock) *segment++ = pixel;
      }
    }
  }

  void depthwise(const BlockStep& step, const Span& blocks, const Span& rows, const Span& cols,
                 const View& out) {
    const View in = view(step.inputs[0]);
    const View residual = step.residual == BlockStep::kNone ? View{} : view(step.residual);
    segments_.resize(step.kernel);
    const std::vector<const float*> weights = call_.weights_of(step);
    DepthwiseRow row{};
    row.rows = segments_.data();
    row.kernel = step.kernel;
    row.begin = cols.begin;
    row.end = cols.end;
    row.stride = step.stride;
    row.activation = step.activation;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      row.taps = weights[0] + block * step.kernel * step.kernel * kBlock;
      row.bias = weights[1] + block * kBlock;
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        for (int64_t i = 0; i < step.kernel; ++i) {
          segments_[i] = in.row(block, y * step.stride - step.padding + i) - step.padding * kBlock;
        }
        row.out = out.own_row(block, y);
        row.residual = residual.data == nullptr ? nullptr : residual.row(block, y);
        call_.ukernels.depthwise(row);
      }
    }
  }

  static std::optional<LinearAttention> attention_of(const Call& call, const PassPlan& pass) {
    if (call.plan.steps[pass.last].kind != Kind::kLinearAttention) return std::nullopt;
    return LinearAttention(call.plan, pass.last);
  }

  // The heads of a slice.
  void attend(const BlockStep& step, const View& out) const {
    const int64_t blocks = attention_->blocks();
    const int64_t first = blocks_.begin / blocks, last = min(blocks_.end / blocks, attention_->heads());
    for (size_t input = 0; input < step.inputs.size(); ++input) {
      const View in = view(step.inputs[input]);
      for (int64_t head = first; head < last; ++head) {
        attention_->attend(in, head, out, static_cast<int64_t>(input), *memory_.attention);
      }
    }
  }

  void pool(const BlockStep& step, const Span& blocks, const Span& rows, const Span& cols, const View& out) {
    const View in = view(step.inputs[0]);
    const ValuePlan& value = plan_.values[step.inputs[0]];
    const float* const factors = call_.weights_of(step)[0];
    PoolRow row{};
    row.kernel = step.kernel;
    row.begin = cols.begin;
    row.end = cols.end;
    row.width = value.size.width;
    segments_.resize(step.kernel);
    row.rows = segments_.data();
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      row.factor = factors + block * kBlock;
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        const Span around = clipped({y - step.padding, y + step.padding + 1}, value.size.height);
        row.count = around.end - around.begin;
        for (int64_t i = 0; i < row.count; ++i) segments_[i] = in.row(block, around.begin + i);
        row.x = in.row(block, y);
        row.out = out.own_row(block, y);
        call_.ukernels.pool(row);
      }
    }
  }

  void normalize(const BlockStep& step, const Span& rows, const Span& cols, const View& out) {
    const View in = view(step.inputs[0]);
    const std::vector<const float*> weights = call_.weights_of(step);
    const int64_t blocks = ceil_div(step.channels, kBlock);
    std::vector<float*> results(blocks);
    segments_.resize(blocks);
    const NormRow row{segments_.data(), results.data(), step.channels, weights[0],
                      weights[1],       step.eps,       cols.begin,    cols.end};
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      for (int64_t block = 0; block < blocks; ++block) {
        segments_[block] = in.row(block, y);
        results[block] = out.own_row(block, y);
      }
      call_.ukernels.normalize(row);
    }
  }

  void multiply(const BlockStep& step, const Span& blocks, const Span& rows, const Span& cols,
                const View& out) const {
    const View in = view(step.inputs[0]), factor = view(step.inputs[1]);
    const int64_t first = cols.begin * kBlock;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        call_.ukernels.multiply(cols.end - cols.begin, in.row(block, y) + first, factor.row(block, 0),
                                out.own_row(block, y) + first);
      }
    }
  }

  const Call& call_;
  const BlockPlan& plan_;
  const PassPlan& pass_;
  const std::optional<LinearAttention> attention_;
  const PassMemory memory_;
  std::vector<PartSpans> spans_;
  std::vector<int64_t> made_;  // of a local value, rows up to here
  std::vector<const float*> segments_;
  int64_t image_ = 0;
  Span blocks_{};
};

void run_slices(const Call& call, const PassPlan& pass, const Parallel& parallel) {
  const int64_t batch = call.params.batch;
  const BlockSize& out = call.plan.values[pass.last].size;
  parallel(pass.units * batch, pass.unit_work, [&](int64_t begin, int64_t end) {
    PassContext context(call, pass);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / batch * pass.slice_blocks;  // the images of a slice share its weights
      context.run(unit % batch, {first, first + pass.slice_blocks}, {0, out.height}, {0, out.width}, false);
    }
  });
}

void run_tiles(const Call& call, const PassPlan& pass, const Parallel& parallel) {
  const BlockSize& out = call.plan.values[pass.last].size;
  parallel(pass.units * call.params.batch, pass.unit_work, [&](int64_t begin, int64_t end) {
    PassContext context(call, pass);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t down = unit % pass.down, strip = unit / pass.down;
      context.run(strip / pass.across, {0, INT64_MAX}, part_of(out.height, pass.down, down),
                  part_of(out.width, pass.across, strip % pass.across), unit > begin && down > 0);
    }
  });
}

void clear_border(const Call& call, int step) {
  const ValuePlan& value = call.plan.values[step];
  for (int64_t image = 0; image < call.params.batch; ++image) {
    call.whole(step, image)
        .clear_border({0, value.blocks}, {0, value.size.height}, {0, value.size.width}, value.size.width);
  }
}

void run_whole(const Call& call, int step, const Parallel& parallel) {
  switch (call.plan.steps[step].kind) {
    case Kind::kMean:
      return run_mean(call, step, parallel);
    case Kind::kUpsample:
      return run_upsample(call, step, parallel);
    case Kind::kLinearAttention:
      return run_linear_attention(call, step, parallel);
    case Kind::kAttention:
      return run_attention(call, step, parallel);
    default:
      return run_cascade(call, step, parallel);
  }
}

}  // namespace

void run_block(const BlockPlan& plan, const BlockParams& params, const Parallel& parallel) {
  const InSharedArena<CallMemory> memory(plan, params.batch);
  clear(memory->zeros, plan.zero_floats);
  const Call call{plan, params, *memory};
  for (const PassPlan& pass : plan.passes) {
    if (is_of_whole_images(plan.steps[pass.last])) clear_border(call, pass.last);
    switch (pass.parts) {
      case Parts::kSlices:
        run_slices(call, pass, parallel);
        break;
      case Parts::kTiles:
        run_tiles(call, pass, parallel);
        break;
      case Parts::kWhole:
        run_whole(call, pass.first, parallel);
    }
  }
}

}  // namespace effattn::cpu
