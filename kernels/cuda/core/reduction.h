// Sums that are split over blocks, and added up in an order that depends on the sizes alone.
#pragma once

#include <initializer_list>
#include <vector>

#include "launch.h"

namespace effattn::cuda {

// How the tokens of each group are split.
struct Split {
  int part_tokens, parts;
  int cluster;  // blocks whose sums are added up by themselves
  constexpr int rows() const { return parts / cluster; }
};

// The largest cluster of up to so many blocks; 1 where there are none.
int cluster_of(int64_t blocks, const Gpu& gpu);

// `step`: tokens that a block takes at a time.
Split split_tokens(int64_t groups, int64_t tokens, int step, const Gpu& gpu);

// sums[group][i] = sum over `rows` of partial[group][row][i], all contiguous.
void add_up(const float* partial, float* sums, int64_t groups, int64_t rows, int64_t floats,
            const Execution& execution);

// Gradients of weights, which parts of a launch sum each for themselves. Pointers: a struct of pointers, of
// which those that are null stand for nothing.
template <class Pointers>
class PartialSums {
 public:
  struct Member {
    float* Pointers::* pointer;
    int64_t floats;
  };

  // `whole`: where they go in the end; without parts, zeros do.
  PartialSums(const Pointers& whole, std::initializer_list<Member> members, int64_t parts,
              const Execution& execution)
      : of_parts(whole), whole_(whole), members_(members), parts_(parts), execution_(execution) {
    for (const Member& m : members_) {
      if (whole.*m.pointer != nullptr && parts != 1)
        of_parts.*m.pointer = execution.workspace(parts * m.floats);
    }
  }
  void add_up() const {
    for (const Member& m : members_) {
      if (whole_.*m.pointer == nullptr || parts_ == 1) continue;
      cuda::add_up(of_parts.*m.pointer, whole_.*m.pointer, 1, parts_, m.floats, execution_);
    }
  }

  Pointers of_parts;  // (parts, floats) each

 private:
  const Pointers& whole_;
  std::vector<Member> members_;
  int64_t parts_;
  const Execution& execution_;
};

}  // namespace effattn::cuda
