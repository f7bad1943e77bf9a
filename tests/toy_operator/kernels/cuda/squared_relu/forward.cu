// The square of a ReLU, forward.
#include "api.h"

#include "../core/launch.h"
#include "../core/limits.h"
#include "elements.h"

namespace effattn::cuda {
namespace {

const RegisteredOperator registered("squared_relu", {});

EFFATTN_KERNEL(kSquaredReluThreads, 1) activate(EFFATTN_PARAMETERS(SquaredReluParams) p) {
  with_element(p, [&](int64_t batch, int64_t channel, int64_t token) {
    const float positive = relu(element(p.x.data, p.dtype, at(p.x, batch, channel, token)));
    const float out = p.scale * p.weight[channel] * (positive * positive);
    set_element(p.out.data, p.dtype, at(p.out, batch, channel, token), out);
  });
}

}  // namespace

void squared_relu(const SquaredReluParams& params, const Execution& execution) {
  launch(activate, {blocks_of(params), kSquaredReluThreads}, execution, params);
}

}  // namespace effattn::cuda
