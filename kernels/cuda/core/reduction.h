// Sums that are split over blocks, and added up in an order that depends on the sizes alone.
#pragma once

#include "launch.h"

namespace effattn::cuda {

// How the tokens of each group are split.
struct Split {
  int part_tokens, parts;
  int cluster;  // blocks whose sums are added up by themselves
  constexpr int rows() const { return parts / cluster; }
};

// The largest cluster of up to so many blocks; 1 where there are none.
int cluster_of(int64_t blocks, const Card& card);

// `step`: tokens that a block takes at a time.
Split split(int64_t groups, int64_t tokens, int step, const Card& card);

// sums[group][i] = sum over `rows` of partial[group][row][i], all contiguous.
void add_up(const float* partial, float* sums, int64_t groups, int64_t rows, int64_t floats,
            const Execution& execution);

}  // namespace effattn::cuda
