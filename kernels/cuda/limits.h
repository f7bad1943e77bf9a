// What the kernels take, at most. The library tells callers, who may have other kernels for the rest.
#pragma once

namespace effattn::cuda {

constexpr int kMostChannels = 128;  // of a head of linear attention
constexpr int kMostKernel = 97;     // a side of a depthwise convolution: its tile fits into shared memory
constexpr int kMostHeads = 64;      // of a cascade: a launch's parameters have room for their weights
constexpr int kMostGroups = 12;     // leading dimensions, after merging those that lie behind each other

}  // namespace effattn::cuda
