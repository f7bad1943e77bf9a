// Cascaded group attention of a value, windows in parallel.
#include "../cascaded_group_attention/plan.h"
#include "call.h"

namespace effattn::cpu {

void run_cascade(const Call& call, int step, const Parallel& parallel) {
  const BlockStep& s = call.plan.steps[step];
  const std::vector<const float*> weights = call.weights_of(s);
  const ValuePlan& in = call.plan.values[s.inputs[0]];
  CascadeParams p{};
  p.batch = call.params.batch;
  p.heads = s.heads;
  p.key_dim = s.head_dim;
  p.value_dim = s.value_dim;
  p.height = in.size.height;
  p.width = in.size.width;
  p.window_height = s.window_height;
  p.window_width = s.window_width;
  p.softmax_scale = s.scale;
  p.kernels = s.kernels.data();
  p.packed = {weights[0], weights[1], weights[2], weights[3]};
  p.bias = weights[4];
  const auto blocked = [&](int value) -> BlockedImage {
    const View view = call.whole(value, 0);
    return {view.own_row(0, 0), call.plan.image_floats, view.block_stride, view.row_stride};
  };
  const CascadeBlocks blocks{blocked(s.inputs[0]), blocked(step), s.activation};
  cascaded_group_attention(p, blocks, parallel);
}

}  // namespace effattn::cpu
