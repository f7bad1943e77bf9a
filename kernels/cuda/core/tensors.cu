#include "tensors.h"

namespace effattn::cuda {

void merge(const int64_t* sizes, int rank, const Operand* const* operands, View* const* views, int count,
           Groups& groups) {
  groups.rank = 0;
  merge_leads(sizes, rank, operands, count, [&](int64_t size, int dim) {
    require(groups.rank < Groups::kMax, "the leading dimensions must be ", Groups::kMax,
            " at most after merging those that lie behind each other; call contiguous()");
    groups.sizes[groups.rank] = static_cast<uint32_t>(size);
    for (int i = 0; i < count; ++i) views[i]->group_strides[groups.rank] = operands[i]->lead_strides[dim];
    ++groups.rank;
  });
  for (int i = 0; i < count; ++i) {
    views[i]->data = operands[i]->data;
    views[i]->token_stride = operands[i]->token_stride;
    views[i]->channel_stride = operands[i]->channel_stride;
  }
}

int alignment(const void* data, std::initializer_list<int64_t> strides, DType dtype) {
  int64_t all = 0;
  for (const int64_t stride : strides) all |= stride;
  const uint64_t bits =
      reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(all * (dtype == DType::kFloat32 ? 4 : 2));
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 0;
}

int access_of(const View& view, int rank, bool along_channels, DType dtype) {
  if ((along_channels ? view.channel_stride : view.token_stride) != 1) return 0;
  int64_t all = along_channels ? view.token_stride : view.channel_stride;
  for (int i = 0; i < rank; ++i) all |= view.group_strides[i];
  return alignment(view.data, {all}, dtype);
}

}  // namespace effattn::cuda
