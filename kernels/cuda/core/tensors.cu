#include "tensors.h"

namespace effattn::cuda {

void merge(const int64_t* sizes, int rank, const Operand* const* operands, View* const* views, int count,
           Groups& groups) {
  groups.rank = 0;
  for (int dim = 0; dim < rank; ++dim) {
    if (sizes[dim] == 1) continue;
    const int last = groups.rank - 1;
    bool follows = last >= 0;
    for (int i = 0; follows && i < count; ++i) {
      follows = views[i]->group_strides[last] == sizes[dim] * operands[i]->lead_strides[dim];
    }
    if (follows) {
      groups.sizes[last] *= static_cast<uint32_t>(sizes[dim]);
    } else {
      if (groups.rank == Groups::kMost) {
        throw std::runtime_error(
            "effattn: the leading dimensions must be " + std::to_string(Groups::kMost) +
            " at most after merging those that lie behind each other; call contiguous()");
      }
      groups.sizes[groups.rank++] = static_cast<uint32_t>(sizes[dim]);
    }
    for (int i = 0; i < count; ++i) views[i]->group_strides[groups.rank - 1] = operands[i]->lead_strides[dim];
  }
  for (int i = 0; i < count; ++i) {
    views[i]->data = operands[i]->data;
    views[i]->token_stride = operands[i]->token_stride;
    views[i]->channel_stride = operands[i]->channel_stride;
  }
}

int access_of(const View& view, int rank, bool along_channels, DType dtype) {
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  if ((along_channels ? view.channel_stride : view.token_stride) != 1) return 0;
  uint64_t all = reinterpret_cast<uintptr_t>(view.data);
  all |= static_cast<uint64_t>((along_channels ? view.token_stride : view.channel_stride) * size);
  for (int i = 0; i < rank; ++i) all |= static_cast<uint64_t>(view.group_strides[i] * size);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 0;
}

}  // namespace effattn::cuda
