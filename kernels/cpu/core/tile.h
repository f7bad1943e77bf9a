// Tiles: blocks of tokens x channels in float, kept in cache, and the way in and out of tensors of
// any dtype and any strides. What float32 tensors can do without them is read in place.
#pragma once

#include <type_traits>

#include "arena.h"
#include "image.h"
#include "simd.h"

namespace effattn::cpu::EFFATTN_ISA {

EFFATTN_INLINE int64_t padded(int64_t n) { return round_up(n, kLanes); }

// A tile is a row-major float matrix. Token-major: a row a token, its columns channels.
// Channel-major: a row a channel, its columns tokens. Columns are padded to whole vectors.
struct Tile {
  float* data;
  int64_t row_stride;
  bool channel_major;

  EFFATTN_INLINE float* row(int64_t r) const { return data + r * row_stride; }
  EFFATTN_INLINE int64_t token_stride() const { return channel_major ? 1 : row_stride; }
  EFFATTN_INLINE int64_t channel_stride() const { return channel_major ? row_stride : 1; }
};

// Channel-major rows are a cache line longer than the power of two that they mostly are, so that they do not
// share cache sets.
inline Tile tile(Arena& arena, int64_t tokens, int64_t channels, bool channel_major) {
  const int64_t rows = channel_major ? channels : tokens;
  const int64_t stride = padded(channel_major ? tokens : channels) + (channel_major ? Arena::kAlignment : 0);
  return {arena.floats(rows * stride), stride, channel_major};
}

// Where a block of tokens lies in a tensor: element strides, already offset to group and token.
template <class T>
struct Place {
  T* data;
  int64_t token_stride;
  int64_t channel_stride;

  EFFATTN_INLINE operator Place<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, token_stride, channel_stride};
  }
};

template <bool Relu>
EFFATTN_INLINE Vec activate(Vec x) {
  if constexpr (Relu) return relu(x);
  return x;
}

// kLanes x kLanes elements, transposed. A function of its own, for the sake of its registers.
template <bool Relu, class T>
__attribute__((noinline)) void load_block_transposed(float* to, int64_t to_stride, const T* from,
                                                     int64_t from_stride) {
  Vec block[kLanes];
  load_transposed(block, from, from_stride);
  EFFATTN_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    store(to, activate<Relu>(block[i]));
    to += to_stride;
  }
}

// Fills `tile` with `tokens` x `channels` of `from`, relu'd if asked; columns are zero up to a whole
// vector. Memory that runs along the tile's rows is converted straight; memory that runs across them
// is transposed in registers; anything else is gathered.
template <bool Relu, class T>
inline void load_tile(const Tile& tile, Place<const T> from, int64_t tokens, int64_t channels) {
  int64_t rows = tile.channel_major ? channels : tokens;
  int64_t cols = tile.channel_major ? tokens : channels;
  const int64_t row_step = tile.channel_major ? from.channel_stride : from.token_stride;
  const int64_t col_step = tile.channel_major ? from.token_stride : from.channel_stride;
  if (col_step == 1 && row_step == cols && tile.row_stride == cols) {  // no gaps: one long row
    cols *= rows;
    rows = 1;
  }
  if (col_step == 1 || cols == 1) {
    int64_t done = 0;
    if (cols < 4 * kLanes) {  // short rows: down a column of vectors, for the loop's sake
      for (; done + kLanes <= cols; done += kLanes) {
        const T* src = from.data + done;
        float* dst = tile.data + done;
        for (int64_t r = 0; r < rows; ++r, src += row_step, dst += tile.row_stride) {
          store(dst, activate<Relu>(load(src)));
        }
      }
    }
    for (int64_t r = 0; r < rows && done < cols; ++r) {
      const T* src = from.data + r * row_step;
      float* dst = tile.row(r);
      int64_t c = done;
      for (; c + 4 * kLanes <= cols; c += 4 * kLanes) {
        EFFATTN_UNROLL
        for (int i = 0; i < 4 * kLanes; i += kLanes) store(dst + c + i, activate<Relu>(load(src + c + i)));
      }
      for (; c + kLanes <= cols; c += kLanes) store(dst + c, activate<Relu>(load(src + c)));
      if (c < cols) store(dst + c, activate<Relu>(load_first(src + c, cols - c)));
    }
  } else if (row_step == 1 || rows == 1) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      const T* src = from.data + c * col_step;
      float* const dst = tile.data + c;
      if (c + kLanes <= cols && rows >= kLanes) {
        int64_t r = 0;
        for (; r + kLanes <= rows; r += kLanes) {
          load_block_transposed<Relu>(dst + r * tile.row_stride, tile.row_stride, src + r, col_step);
        }
        // What is left of the rows goes with some that are done already.
        if (r < rows) {
          r = rows - kLanes;
          load_block_transposed<Relu>(dst + r * tile.row_stride, tile.row_stride, src + r, col_step);
        }
      } else {
        const int64_t block_cols = min(kLanes, cols - c);
        for (int64_t r = 0; r < rows; r += kLanes) {
          const int64_t block_rows = min(kLanes, rows - r);
          Vec block[kLanes];
          for (int i = 0; i < kLanes; ++i) {
            block[i] =
                i < block_cols ? activate<Relu>(load_first(src + r + i * col_step, block_rows)) : Vec{};
          }
          transpose(block);
          for (int64_t i = 0; i < block_rows; ++i) store(dst + (r + i) * tile.row_stride, block[i]);
        }
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      float* dst = tile.row(r);
      const int64_t end = padded(cols);
      for (int64_t c = 0; c < end; c += kLanes) {
        float lanes[kLanes] = {};
        for (int64_t i = 0; i < kLanes && c + i < cols; ++i) {
          lanes[i] = load_one(from.data + r * row_step + (c + i) * col_step);
        }
        store(dst + c, activate<Relu>(load(lanes)));
      }
    }
  }
}

// The way back: rounds `tokens` x `channels` of `tile` to T. The same three cases.
template <class T>
inline void store_tile(const Tile& tile, Place<T> to, int64_t tokens, int64_t channels) {
  const int64_t rows = tile.channel_major ? channels : tokens;
  const int64_t cols = tile.channel_major ? tokens : channels;
  const int64_t row_step = tile.channel_major ? to.channel_stride : to.token_stride;
  const int64_t col_step = tile.channel_major ? to.token_stride : to.channel_stride;
  if (col_step == 1 || cols == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      T* dst = to.data + r * row_step;
      const float* src = tile.row(r);
      int64_t c = 0;
      for (; c + kLanes <= cols; c += kLanes) store(dst + c, load(src + c));
      if (c < cols) store_first(dst + c, load(src + c), cols - c);
    }
  } else if (row_step == 1 || rows == 1) {
    Vec block[kLanes];
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t block_cols = min(kLanes, cols - c);
      for (int64_t r = 0; r < rows; r += kLanes) {
        const int64_t block_rows = min(kLanes, rows - r);
        EFFATTN_UNROLL
        for (int i = 0; i < kLanes; ++i) block[i] = i < block_rows ? load(tile.row(r + i) + c) : Vec{};
        transpose(block);
        T* dst = to.data + r + c * col_step;
        for (int64_t i = 0; i < block_cols; ++i) store_first(dst + i * col_step, block[i], block_rows);
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) store_one(to.data + r * row_step + c * col_step, tile.row(r)[c]);
    }
  }
}

// --- dispatch, images -------------------------------------------------------------------------------------

// The dispatch over storage types: f(T{}).
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

// The dispatch over sizes of depthwise kernels: f(std::integral_constant) for those that are unrolled, else
// any().
template <class F, class Any>
void with_kernel(int64_t kernel, const F& f, const Any& any) {
  switch (kernel) {
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
    default:
      return any();
  }
}

inline void load_image(DType dtype, const Image& image, int64_t tokens, int64_t channels, const Tile& to) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    load_tile<false>(to,
                     Place<const T>{static_cast<T*>(image.data), image.token_stride, image.channel_stride},
                     tokens, channels);
  });
}

inline void store_image(DType dtype, const Image& image, int64_t tokens, int64_t channels, const Tile& from) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    store_tile(from, Place<T>{static_cast<T*>(image.data), image.token_stride, image.channel_stride}, tokens,
               channels);
  });
}

}  // namespace effattn::cpu::EFFATTN_ISA
