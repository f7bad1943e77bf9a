// The mean of an image, and its upsampling.
#include "../channels_last/ukernels.h"
#include "call.h"

namespace effattn::cpu {

void run_mean(const Call& call, int step, const Parallel& parallel) {
  const int input = call.plan.steps[step].inputs[0];
  const ValuePlan& in = call.plan.values[input];
  parallel(call.params.batch * in.blocks, in.pixels() * kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / in.blocks, block = unit % in.blocks;
      const View from = call.whole(input, image);
      float* const mean = call.whole(step, image).own_row(block, 0);
      clear(mean, kBlock);
      for (int64_t y = 0; y < in.size.height; ++y) call.ukernels.sum(in.size.width, from.row(block, y), mean);
      for (int64_t c = 0; c < kBlock; ++c) mean[c] /= static_cast<float>(in.pixels());
    }
  });
}

namespace {

// A block of an image without the border beside its rows.
struct DensePixels {
  float* data;
  DensePixels(const ValuePlan& value, Arena& arena)
      : data(value.border == 0 ? nullptr : arena.floats(value.pixels() * kBlock)) {}

  Rows<const float> of(const View& view, int64_t block, const BlockSize& size) const {
    if (data == nullptr) return {view.row(block, 0), kBlock};
    for (int64_t y = 0; y < size.height; ++y) {
      copy(data + y * size.width * kBlock, view.row(block, y), size.width * kBlock);
    }
    return {data, kBlock};
  }
};

}  // namespace

void run_upsample(const Call& call, int step, const Parallel& parallel) {
  const BlockStep& s = call.plan.steps[step];
  const ValuePlan &in = call.plan.values[s.inputs[0]], &out = call.plan.values[step];
  const ChannelsLastUkernels& ukernels = channels_last_ukernels();
  parallel(call.params.batch * in.blocks, 12 * out.pixels() * kBlock, [&](int64_t begin, int64_t end) {
    const auto dense = in_thread_arena<DensePixels>(in);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / in.blocks, block = unit % in.blocks;
      const View to = call.whole(step, image);
      const Rows<const float> from = dense.of(call.whole(s.inputs[0], image), block, in.size);
      for (int64_t y = 0; y < out.size.height; ++y) {
        float* const row = to.own_row(block, y);
        ukernels.upsample(kBlock, from, in.size.height, in.size.width, y, out.size.height, out.size.width,
                          {row, kBlock});
        call.ukernels.activate(s.activation, out.size.width, row, row);
      }
    }
  });
}

}  // namespace effattn::cpu
