// The square of a ReLU, backward.
#include "api.h"

#include "../core/launch.h"
#include "../core/reduction.h"
#include "elements.h"

namespace effattn::cuda {
namespace {

EFFATTN_KERNEL(kSquaredReluThreads, 1) input_gradients(EFFATTN_PARAMETERS(SquaredReluParams) p) {
  with_element(p, [&](int64_t batch, int64_t channel, int64_t token) {
    const float x = element(p.x.data, p.dtype, at(p.x, batch, channel, token));
    const float grad = element(p.grad_out.data, p.dtype, at(p.grad_out, batch, channel, token));
    const float grad_x = x <= 0 ? 0 : 2 * p.scale * p.weight[channel] * x * grad;
    set_element(p.grad_x.data, p.dtype, at(p.grad_x, batch, channel, token), grad_x);
  });
}

// A block, which is a warp, a channel of an image: grad_weight (batch, channels), to be added up.
EFFATTN_KERNEL(kLanes, 1) weight_gradients(EFFATTN_PARAMETERS(SquaredReluParams) p) {
  const int64_t batch = block_index() / p.channels, channel = block_index() % p.channels;
  float sum = 0;
  for (int64_t token = lane_index(); token < p.tokens; token += kLanes) {
    const float positive = relu(element(p.x.data, p.dtype, at(p.x, batch, channel, token)));
    sum += positive * positive * element(p.grad_out.data, p.dtype, at(p.grad_out, batch, channel, token));
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) p.grad_weight[block_index()] = p.scale * sum;
}

}  // namespace

void squared_relu_backward(const SquaredReluParams& params, const Execution& execution) {
  launch(input_gradients, {blocks_of(params), kSquaredReluThreads}, execution, params);
  SquaredReluParams p = params;
  p.grad_weight = execution.workspace(params.batch * params.channels);
  launch(weight_gradients, {params.batch * params.channels, kLanes}, execution, p);
  add_up(p.grad_weight, params.grad_weight, 1, params.batch, params.channels, execution);
}

}  // namespace effattn::cuda
