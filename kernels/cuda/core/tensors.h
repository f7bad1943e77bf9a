// Tensors as kernels address them, made from what a params says; and the choice of a kernel's instance.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "../../params/dtype.h"
#include "../../params/operand.h"
#include "fragment.h"
#include "launch.h"

namespace effattn::cuda {

#ifndef EFFATTN_CUDA_CHANNELS
#define EFFATTN_CUDA_CHANNELS 128
#endif
constexpr int kMaxChannels = EFFATTN_CUDA_CHANNELS;  // of a head of linear attention
constexpr int kMaxGroups = 12;  // leading dimensions, after merging those that lie behind each other

// Leading dimensions, merged where all tensors of a call allow it.
struct Groups {
  static constexpr int kMax = kMaxGroups;
  int rank = 0;
  uint32_t sizes[kMax];
};

struct View {
  void* data;
  int64_t group_strides[Groups::kMax];
  int64_t token_stride, channel_stride;
  int access;
};

template <class T>
EFFATTN_DEVICE T* group_begin(const View& view, const Groups& groups, int64_t group) {
  int64_t offset = 0;
  uint32_t rest = static_cast<uint32_t>(group);
  for (int i = groups.rank - 1; i > 0; --i) {
    offset += rest % groups.sizes[i] * view.group_strides[i];
    rest /= groups.sizes[i];
  }
  if (groups.rank > 0) offset += rest * view.group_strides[0];
  return static_cast<T*>(view.data) + offset;
}

// Of a group a row a token, or a row a channel.
template <class T>
EFFATTN_DEVICE Matrix<T> by_token(const View& view, const Groups& groups, int64_t group, int tokens,
                                  int channels) {
  return {group_begin<T>(view, groups, group),
          view.token_stride,
          view.channel_stride,
          tokens,
          channels,
          view.access};
}
template <class T>
EFFATTN_DEVICE Matrix<T> by_channel(const View& view, const Groups& groups, int64_t group, int tokens,
                                    int channels) {
  return {group_begin<T>(view, groups, group),
          view.channel_stride,
          view.token_stride,
          channels,
          tokens,
          view.access};
}

// The leading dimensions of `operands` as few as there can be; their own strides are those of `views`.
void merge(const int64_t* sizes, int rank, const Operand* const* operands, View* const* views, int count,
           Groups& groups);

// 16 or 4, the bytes that the address and all strides are multiples of; else 0.
int alignment(const void* data, std::initializer_list<int64_t> strides, DType dtype);

// The bytes of one access along tokens or channels: all strides and the address must be multiples of it.
int access_of(const View& view, int rank, bool along_channels, DType dtype);

template <class F>
void with_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  return f(Float16{});
}

// With the smallest padded number of channels, as a type, that holds so many.
template <int kPadded = 16, class F>
void with_channels(int64_t channels, F f) {
  if constexpr (kPadded < kMaxChannels) {
    if (channels > kPadded) return with_channels<2 * kPadded>(channels, f);
  }
  f(std::integral_constant<int, kPadded>{});
}

}  // namespace effattn::cuda
