#include "plan.h"

#include "ukernels.h"

namespace effattn::cpu {
namespace {

void for_all_channels(const SquaredReluParams& p, const Parallel& parallel, int64_t tiles,
                      void (*ukernel)(const SquaredReluParams&, int64_t, Arena)) {
  const int64_t floats = tiles * (kSquaredReluTokens * kSquaredReluChannels + Arena::kMaxOverhead);
  parallel(ceil_div(p.channels, kSquaredReluChannels), p.batch * p.tokens * kSquaredReluChannels,
           [&](int64_t begin, int64_t end) {
             const Arena arena = thread_arena(floats);
             for (int64_t i = begin; i < end; ++i) ukernel(p, i * kSquaredReluChannels, arena);
           });
}

}  // namespace

void squared_relu(const SquaredReluParams& params, const Parallel& parallel) {
  for_all_channels(params, parallel, 1, squared_relu_ukernels().forward);
}

void squared_relu_backward(const SquaredReluParams& params, const Parallel& parallel) {
  for_all_channels(params, parallel, 2, squared_relu_ukernels().backward);
}

}  // namespace effattn::cpu
