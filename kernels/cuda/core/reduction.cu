#include "reduction.h"

namespace effattn::cuda {
namespace {

// Blocks that the sums over tokens are split into, over all groups, at least: a few for each multiprocessor
// of the largest GPUs. Parts of fewer tokens are not worth a second pass.
constexpr int64_t kBlocks = 2048;
constexpr int64_t kMinTokens = 256;
constexpr int64_t kMaxParts = 64;
constexpr int kMaxCluster = 8;

constexpr int kThreads = 128;
// Of more rows than these, parts are added up by themselves first.
constexpr int64_t kMaxRows = 64;

struct AddUp {
  const float* partial;
  float* sums;
  int64_t floats, pieces, rows, part_rows, parts;
};

EFFATTN_KERNEL(kThreads, 1) add_up_kernel(EFFATTN_PARAMETERS(AddUp) p) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t part = block_index() / p.pieces, i = block_index() % p.pieces * kThreads + thread_index();
  if (i >= p.floats) return;
  const int64_t group = part / p.parts, begin = part % p.parts * p.part_rows;
  const float* from = p.partial + (group * p.rows + begin) * p.floats + i;
  float total = 0;
  for (int64_t row = 0; row < min(p.part_rows, p.rows - begin); ++row) total += from[row * p.floats];
  p.sums[part * p.floats + i] = total;
}

}  // namespace

int cluster_of(int64_t blocks, const Gpu& gpu) {
  int cluster = 1;
  while (gpu.has_clusters() && cluster < kMaxCluster && 2 * cluster <= blocks) cluster *= 2;
  return cluster;
}

Split split_tokens(int64_t groups, int64_t tokens, int step, const Gpu& gpu) {
  const int64_t wanted = min(ceil_div(kBlocks, max(groups, 1)), kMaxParts);
  int64_t parts = max(1, min(wanted, tokens / kMinTokens));
  const int cluster = cluster_of(parts, gpu);
  parts = round_up(parts, cluster);
  const int64_t part_tokens = max(1, ceil_div(tokens, parts * step)) * step;
  return {static_cast<int>(part_tokens), static_cast<int>(parts), cluster};
}

void add_up(const float* partial, float* sums, int64_t groups, int64_t rows, int64_t floats,
            const Execution& execution) {
  const int64_t pieces = ceil_div(floats, kThreads);
  int64_t parts = 1;
  while (rows > kMaxRows * parts && parts * parts < rows) ++parts;
  const int64_t part_rows = ceil_div(rows, parts);
  parts = max(1, ceil_div(rows, max(1, part_rows)));
  float* const to = parts == 1 ? sums : execution.workspace(groups * parts * floats);
  const bool is_dependent = rows > 0;  // no rows: a call of its own, that clears
  launch(add_up_kernel, {groups * parts * pieces, kThreads, 0, 1, is_dependent}, execution,
         AddUp{partial, to, floats, pieces, rows, part_rows, parts});
  if (parts > 1) add_up(to, sums, groups, parts, floats, execution);
}

}  // namespace effattn::cuda
