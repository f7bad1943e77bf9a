// Tensors (..., tokens, channels).
#pragma once

#include <cstdint>

namespace effattn {

// Strides count elements; the leading ones belong to sizes that all operands of a call have.
struct Operand {
  void* data;
  const int64_t* lead_strides;
  int64_t token_stride;
  int64_t channel_stride;
};

// Calls merged(size, dim) for the leading dimensions, outermost first, with those made one that lie behind
// each other in every operand that has data. The strides of what was merged are those of `dim`.
template <class F>
void merge_leads(const int64_t* sizes, int rank, const Operand* const* operands, int count, const F& merged) {
  int64_t size = 1;
  int last = -1;
  for (int dim = 0; dim < rank; ++dim) {
    if (sizes[dim] == 1) continue;
    bool follows = last >= 0;
    for (int i = 0; follows && i < count; ++i) {
      const int64_t* const strides = operands[i]->lead_strides;
      follows = operands[i]->data == nullptr || strides[last] == sizes[dim] * strides[dim];
    }
    if (last >= 0 && !follows) merged(size, last);
    size = follows ? size * sizes[dim] : sizes[dim];
    last = dim;
  }
  if (last >= 0) merged(size, last);
}

}  // namespace effattn
