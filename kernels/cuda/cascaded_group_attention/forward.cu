// Cascaded group attention, forward; of narrow types in small windows in small_windows.cu.
#include "api.h"

#include "../core/limits.h"
#include "heads.h"

namespace effattn::cuda {
namespace {

const RegisteredOperator registered("cascaded_group_attention", {{"heads", cascade::kMaxHeads}});

}  // namespace

void cascaded_group_attention(const CascadeParams& params, const Execution& execution) {
  using namespace cascade;
  Cascade p = cascade_of(params);
  if (p.windows == 0 || p.value_dim == 0) return;
  p.out = params.out;
  if (cascade_of_small_windows(p, execution)) return;
  const int64_t enough = ceil_div(p.windows, execution.gpu.multiprocessors);
  p.windows_per_block = static_cast<int>(max(1, min(enough, kTokens / p.tokens())));
  const int64_t shared = plan_memory(p, false, execution);
  launch(cga_forward<false>, {ceil_div(p.windows, p.windows_per_block), kThreads, shared}, execution, p);
}

}  // namespace effattn::cuda
