// Depthwise k x k convolution of one channel and its gradient, on rows of float between zeros.
#pragma once

#include "tile.h"

namespace effattn::cpu::EFFATTN_ISA {

// Rows of one channel with zeros around them. Column x of the image stands at data[row * stride + border +
// x]; whole vectors may be read from any of k neighbouring columns on.
struct PaddedRows {
  float* data;
  int64_t border, stride;

  static int64_t stride_of(int64_t width, int64_t border) { return round_up(width, kLanes) + 2 * border; }
  static int64_t floats(int64_t rows, int64_t width, int64_t border) {
    return rows * stride_of(width, border);
  }

  // Clears the memory; fill() never writes the borders.
  PaddedRows(float* memory, int64_t rows, int64_t width, int64_t border_width)
      : data(memory), border(border_width), stride(stride_of(width, border_width)) {
    for (int64_t i = 0; i < rows * stride; ++i) data[i] = 0.0f;
  }

  // Takes `rows` rows of a plane from row `first` on; what lies outside of the image is zero.
  void fill(const float* plane, int64_t first, int64_t rows, int64_t height, int64_t width) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* const to = data + r * stride + border;
      if (const int64_t y = first + r; y < 0 || y >= height) {
        for (int64_t x = 0; x < width; x += kLanes) store(to + x, Vec{});
      } else {
        const float* const from = plane + y * width;
        int64_t x = 0;
        for (; x + kLanes <= width; x += kLanes) store(to + x, load(from + x));
        if (x < width) store(to + x, load_first(from + x, width - x));
      }
    }
  }
};

// Enough sums under way to hide the latency of an addition, few enough for the registers.
constexpr int kDepthwiseRows = 8;

// out[y][x] = start + sum_ij weights[i][j] in[y + i][x + j] for R rows and V vectors of columns; `start` is
// the bias, or with Add what stands there. A row that is loaded serves all the results that it has a part in.
template <int K, int R, int V, bool Add>
__attribute__((noinline)) void depthwise_block(float* out, int64_t out_stride, const float* in,
                                               int64_t in_stride, const float* weights, float bias,
                                               int64_t cols) {
  constexpr int kChains = kDepthwiseRows / (R * V) < K ? kDepthwiseRows / (R * V) : K;
  Vec acc[kChains][R][V] = {};
  EFFATTN_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFATTN_UNROLL
    for (int v = 0; v < V; ++v) {
      const float* const at = out + r * out_stride + v * kLanes;
      acc[0][r][v] = Add ? load_first(at, min(cols - v * kLanes, kLanes)) : broadcast(bias);
    }
  }
  const auto column_of_weights = [&](int j, Vec(&sums)[R][V]) __attribute__((always_inline)) {
    Vec column[K];
    EFFATTN_UNROLL
    for (int i = 0; i < K; ++i) column[i] = broadcast(weights[i * K + j]);
    const float* at = in + j;
    EFFATTN_UNROLL
    for (int row = 0; row < R + K - 1; ++row, at += in_stride) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) {
        const Vec line = in_register(load(at + v * kLanes));
        EFFATTN_UNROLL
        for (int i = 0; i < K; ++i) {
          if (const int r = row - i; r >= 0 && r < R) sums[r][v] += column[i] * line;
        }
      }
    }
  };
  if constexpr (kChains == 1) {
    for (int j = 0; j < K; ++j) column_of_weights(j, acc[0]);
  } else {
    EFFATTN_UNROLL
    for (int j = 0; j < K; ++j) column_of_weights(j, acc[j % kChains]);
  }
  EFFATTN_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFATTN_UNROLL
    for (int v = 0; v < V; ++v) {
      Vec total = acc[0][r][v];
      EFFATTN_UNROLL
      for (int c = 1; c < kChains; ++c) total += acc[c][r][v];
      store_first(out + r * out_stride + v * kLanes, total, min(cols - v * kLanes, kLanes));
    }
  }
}

template <int K, int R, bool Add>
inline void depthwise_rows(int64_t row, int64_t rows, float* out, int64_t out_stride, const float* in,
                           int64_t in_stride, const float* weights, float bias, int64_t width) {
  constexpr int V = kDepthwiseRows / R < 2 ? 1 : 2;
  for (; row + R <= rows; row += R) {
    float* const to = out + row * out_stride;
    const float* const from = in + row * in_stride;
    int64_t x = 0;
    for (; x + (V - 1) * kLanes < width; x += V * kLanes) {
      depthwise_block<K, R, V, Add>(to + x, out_stride, from + x, in_stride, weights, bias, width - x);
    }
    if (x < width) {
      depthwise_block<K, R, 1, Add>(to + x, out_stride, from + x, in_stride, weights, bias, width - x);
    }
  }
  if constexpr (R > 1) {
    depthwise_rows<K, R / 2, Add>(row, rows, out, out_stride, in, in_stride, weights, bias, width);
  }
}

// Kernels of any other size: a result at a time.
template <bool Add>
inline void depthwise_any(int64_t kernel, int64_t rows, float* out, int64_t out_stride, const float* in,
                          int64_t in_stride, const float* weights, float bias, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t x = 0; x < width; x += kLanes) {
      float* const to = out + row * out_stride + x;
      Vec acc = Add ? load_first(to, width - x) : broadcast(bias);
      for (int64_t i = 0; i < kernel; ++i) {
        for (int64_t j = 0; j < kernel; ++j) {
          acc += broadcast(weights[i * kernel + j]) * load(in + (row + i) * in_stride + x + j);
        }
      }
      store_first(to, acc, width - x);
    }
  }
}

// Convolves the rows that `in` holds into `rows` rows of out, or adds to what stands there.
template <bool Add>
inline void depthwise(int64_t kernel, int64_t rows, float* out, int64_t out_stride, const PaddedRows& in,
                      const float* weights, float bias, int64_t width) {
  with_kernel(
      kernel,
      [&](auto k) {
        depthwise_rows<k.value, kDepthwiseRows, Add>(0, rows, out, out_stride, in.data, in.stride, weights,
                                                     bias, width);
      },
      [&] { depthwise_any<Add>(kernel, rows, out, out_stride, in.data, in.stride, weights, bias, width); });
}

// --- the gradient of the weights ----------------------------------------------------------------------

// sums[i][j] += sum_yx grad[y][x] in[y + i][x + j], a vector of lane sums each, for R rows.
template <int K, int R>
__attribute__((noinline)) void depthwise_weight_block(Vec* sums, const float* grad, int64_t grad_stride,
                                                      const float* in, int64_t in_stride, int64_t width) {
  for (int j = 0; j < K; ++j) {
    Vec acc[K] = {};
    for (int64_t x = 0; x < width; x += kLanes) {
      Vec g[R];
      EFFATTN_UNROLL
      for (int r = 0; r < R; ++r) g[r] = load_first(grad + r * grad_stride + x, min(width - x, kLanes));
      const float* at = in + x + j;
      EFFATTN_UNROLL
      for (int row = 0; row < R + K - 1; ++row, at += in_stride) {
        const Vec line = load(at);
        EFFATTN_UNROLL
        for (int i = 0; i < K; ++i) {
          if (const int r = row - i; r >= 0 && r < R) acc[i] += g[r] * line;
        }
      }
    }
    EFFATTN_UNROLL
    for (int i = 0; i < K; ++i) sums[i * K + j] += acc[i];
  }
}

template <int K, int R = 4>
inline void depthwise_weight_rows(int64_t row, int64_t rows, Vec* sums, const float* grad,
                                  int64_t grad_stride, const float* in, int64_t in_stride, int64_t width) {
  for (; row + R <= rows; row += R) {
    depthwise_weight_block<K, R>(sums, grad + row * grad_stride, grad_stride, in + row * in_stride, in_stride,
                                 width);
  }
  if constexpr (R > 1) {
    depthwise_weight_rows<K, R / 2>(row, rows, sums, grad, grad_stride, in, in_stride, width);
  }
}

inline void depthwise_weight_any(int64_t kernel, int64_t rows, Vec* sums, const float* grad,
                                 int64_t grad_stride, const float* in, int64_t in_stride, int64_t width) {
  for (int64_t i = 0; i < kernel; ++i) {
    for (int64_t j = 0; j < kernel; ++j) {
      Vec acc = {};
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t x = 0; x < width; x += kLanes) {
          acc +=
              load_first(grad + row * grad_stride + x, width - x) * load(in + (row + i) * in_stride + x + j);
        }
      }
      sums[i * kernel + j] += acc;
    }
  }
}

inline void depthwise_weight_gradient(int64_t kernel, int64_t rows, Vec* sums, const float* grad,
                                      int64_t grad_stride, const PaddedRows& in, int64_t width) {
  with_kernel(
      kernel,
      [&](auto k) {
        depthwise_weight_rows<k.value>(0, rows, sums, grad, grad_stride, in.data, in.stride, width);
      },
      [&] { depthwise_weight_any(kernel, rows, sums, grad, grad_stride, in.data, in.stride, width); });
}

}  // namespace effattn::cpu::EFFATTN_ISA
