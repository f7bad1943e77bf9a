#include "sums.h"

namespace effattn::cuda {
namespace {

// Blocks that the sums over tokens are split into, over all groups, at least: a few for each multiprocessor
// of the largest cards. Parts of fewer tokens are not worth a second pass.
constexpr int64_t kBlocks = 512;
constexpr int64_t kLeastTokens = 256;
constexpr int64_t kMostParts = 64;
constexpr int kMostCluster = 8;

constexpr int kThreads = 128;

struct AddUp {
  const float* partial;
  float* sums;
  int64_t floats, pieces;
  int rows;
};

EFFATTN_KERNEL(kThreads, 1) add_up_kernel(EFFATTN_PARAMETERS(AddUp) p) {
  const int64_t group = block_index() / p.pieces, i = block_index() % p.pieces * kThreads + thread_index();
  if (i >= p.floats) return;
  const float* from = p.partial + group * p.rows * p.floats + i;
  float total = 0;
  for (int row = 0; row < p.rows; ++row) total += from[row * p.floats];
  p.sums[group * p.floats + i] = total;
}

}  // namespace

Split split(int64_t groups, int64_t tokens, int step, const Card& card) {
  const int64_t wanted = smaller(ceil_div(kBlocks, larger(groups, 1)), kMostParts);
  int64_t parts = larger(1, smaller(wanted, tokens / kLeastTokens));
  const int cluster = card.has_clusters() ? static_cast<int>(smaller(parts, kMostCluster)) : 1;
  parts = round_up(parts, cluster);
  const int64_t part_tokens = larger(1, ceil_div(tokens, parts * step)) * step;
  return {static_cast<int>(part_tokens), static_cast<int>(parts), cluster};
}

void add_up(const float* partial, float* sums, int64_t groups, int64_t rows, int64_t floats,
            const Execution& execution) {
  const int64_t pieces = ceil_div(floats, kThreads);
  launch(add_up_kernel, {groups * pieces, kThreads}, execution,
         AddUp{partial, sums, floats, pieces, static_cast<int>(rows)});
}

}  // namespace effattn::cuda
