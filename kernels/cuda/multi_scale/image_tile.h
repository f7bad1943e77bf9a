// Tiles of pixels of an image, with what lies around them, in shared memory; and what blocks sum over them.
#pragma once

#include "../../params/image.h"
#include "../core/block.h"

namespace effattn::cuda {

// An image (batch, channels, height * width) of any type.
struct ImageView {
  Image image;
  DType dtype;
  int height, width;
  int vector =
      0;  // elements of 16 bytes, along channels if they are neighbours, else along columns; 0 if not aligned

  EFFATTN_DEVICE bool has(int row, int col) const {
    return static_cast<unsigned>(row) < static_cast<unsigned>(height) &&
           static_cast<unsigned>(col) < static_cast<unsigned>(width);
  }
  EFFATTN_DEVICE int64_t at(int64_t batch, int64_t channel, int row, int col) const {
    return batch * image.batch_stride + channel * image.channel_stride +
           (static_cast<int64_t>(row) * width + col) * image.token_stride;
  }
  // Outside of the image 0.
  EFFATTN_DEVICE float load(int64_t batch, int64_t channel, int row, int col) const {
    return has(row, col) ? element(image.data, dtype, at(batch, channel, row, col)) : 0.0f;
  }
  EFFATTN_DEVICE void store(int64_t batch, int64_t channel, int row, int col, float x) const {
    if (has(row, col)) set_element(image.data, dtype, at(batch, channel, row, col), x);
  }
};

// f, with a number of the image's type, if some of its channels can be had by whole vectors; whether they
// can.
template <class F>
EFFATTN_DEVICE bool by_vectors(const ImageView& x, int64_t first, int channels, F f) {
  const bool by_channels = x.image.channel_stride == 1;
  if (x.vector == 0 || (by_channels && (first % x.vector != 0 || channels % x.vector != 0))) return false;
  if (x.dtype == DType::kFloat32) {
    f(float{});
  } else if (x.dtype == DType::kBFloat16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
  return true;
}

constexpr int kStagedChannels = 32;
constexpr int kTileWidth = 16;
constexpr int kPixelWarps = 8, kPixelThreads = kPixelWarps * kLanes;

// Of heads of up to kPadded channels.
template <int kPadded>
struct PixelTiles {
  static constexpr int kWidth = kTileWidth,
                       kHeight = kPadded <= 16   ? 8
                                 : kPadded <= 64 ? 4
                                                 : 2,
                       kPixels = kWidth * kHeight;
  // Of a multiprocessor, as registers allow.
  static constexpr int kBlocks = kPadded <= 64 ? 2 : 1;
  static constexpr int kStrip = 8;  // pixels of a row that a thread convolves
  // Channels that are staged with their surroundings at once, at most.
  static constexpr int kChunk = min(kPadded, kStagedChannels);
  // Floats from one channel to the next of all pixels, and from one pixel to the next of all channels; both
  // so that the lanes of a product meet in no bank.
  static constexpr int kByChannel = kPixels + 8, kByPixel = kPadded + 8;

  // Floats of a staged channel; odd, or lanes that take a channel each would meet in one bank.
  EFFATTN_INLINE static constexpr int staged(int kernel) {
    return (kHeight + kernel - 1) * (kWidth + kernel - 1) | 1;
  }
};

// The first pixel of a tile.
struct Corner {
  int row, col;
};

EFFATTN_DEVICE int row_of(const Corner& at, int pixel) { return at.row + pixel / kTileWidth; }
EFFATTN_DEVICE int col_of(const Corner& at, int pixel) { return at.col + pixel % kTileWidth; }

// Some channels of a tile, and what a kernel x kernel convolution reads around it, element by element.
template <class Tiles>
EFFATTN_DEVICE void stage_elements(const ImageView& x, int64_t batch, int64_t first, int channels,
                                   const Corner& at, int kernel, float* to) {
  const int height = Tiles::kHeight + kernel - 1, width = Tiles::kWidth + kernel - 1, pixels = height * width;
  const int row0 = at.row - kernel / 2, col0 = at.col - kernel / 2;
  const bool is_channels_last = x.image.channel_stride == 1;  // what lies side by side is taken side by side
  for_each<kPixelThreads>(channels * pixels, [&](int i) {
    const int c = is_channels_last ? i % channels : i / pixels,
              pixel = is_channels_last ? i / channels : i % pixels;
    to[c * Tiles::staged(kernel) + pixel] =
        x.load(batch, first + c, row0 + pixel / width, col0 + pixel % width);
  });
}

// The same by vectors of channels, or of the tile's own columns; columns beside it are elements.
template <class T, class Tiles>
EFFATTN_DEVICE void stage_vectors(const ImageView& x, int64_t batch, int64_t first, int channels,
                                  const Corner& at, int kernel, float* to) {
  constexpr int vector = kVector<T>, own = Tiles::kWidth / vector;
  const int height = Tiles::kHeight + kernel - 1, width = Tiles::kWidth + kernel - 1, halo = kernel / 2;
  const T* const data = static_cast<const T*>(x.image.data);
  const auto load = [&](int64_t channel, int row, int col) {
    Packed<T, vector> packed{};
    if (x.has(row, col)) packed.template load<16>(data + x.at(batch, channel, row, col));
    return packed;
  };
  if (x.image.channel_stride == 1) {
    const int pieces = channels / vector;
    for_each<kPixelThreads>(height * width * pieces, [&](int i) {
      const int c = i % pieces * vector, pixel = i / pieces;
      const auto packed = load(first + c, at.row - halo + pixel / width, at.col - halo + pixel % width);
      EFFATTN_UNROLL
      for (int e = 0; e < vector; ++e) to[(c + e) * Tiles::staged(kernel) + pixel] = packed.get(e);
    });
    return;
  }
  const int pieces = own + kernel - 1;
  for_each<kPixelThreads>(channels * height * pieces, [&](int i) {
    const int piece = i % pieces, line = i / pieces, c = line / height, row = at.row - halo + line % height;
    float* const of_line = to + c * Tiles::staged(kernel) + line % height * width;
    if (piece < own) {
      const auto packed = load(first + c, row, at.col + piece * vector);
      EFFATTN_UNROLL
      for (int e = 0; e < vector; ++e) of_line[halo + piece * vector + e] = packed.get(e);
    } else {
      const int beside = piece - own, col = beside < halo ? beside : beside + Tiles::kWidth;
      of_line[col] = x.load(batch, first + c, row, at.col - halo + col);
    }
  });
}

template <class Tiles>
EFFATTN_DEVICE void stage(const ImageView& x, int64_t batch, int64_t first, int channels, const Corner& at,
                          int kernel, float* to) {
  const auto vectors = [&](auto type) {
    stage_vectors<decltype(type), Tiles>(x, batch, first, channels, at, kernel, to);
  };
  if (!by_vectors(x, first, channels, vectors)) {
    stage_elements<Tiles>(x, batch, first, channels, at, kernel, to);
  }
}

// Number i of the pieces of a tile, kCount elements that are neighbours in an image. Of rows of pixels the
// channels follow each other, so that lanes meet in few banks where a pixel's channels are neighbours.
template <class Tiles, int kCount>
struct PieceOfTile {
  int pixel, channel;
  bool by_channels;

  EFFATTN_DEVICE PieceOfTile(const ImageView& x, int channels, int i)
      : by_channels(x.image.channel_stride == 1) {
    if (by_channels) {
      const int pieces = channels / kCount;
      pixel = i / pieces;
      channel = i % pieces * kCount;
    } else {
      constexpr int pieces = kTileWidth / kCount;
      pixel = i / (pieces * channels) * kTileWidth + i % pieces * kCount;
      channel = i / pieces % channels;
    }
  }
  // f(pixel, channel) of element e.
  template <class F>
  EFFATTN_DEVICE auto element(int e, F f) const {
    return by_channels ? f(pixel, channel + e) : f(pixel + e, channel);
  }
};

// Some channels of a tile from an image, put(pixel, channel, x); 0 outside of the image.
template <class Tiles, class Put>
EFFATTN_DEVICE void load_tile(const ImageView& x, int64_t batch, int64_t first, int channels,
                              const Corner& at, Put put) {
  const auto vectors = [&](auto type) {
    using T = decltype(type);
    for_each<kPixelThreads>(channels * Tiles::kPixels / kVector<T>, [&](int i) {
      const PieceOfTile<Tiles, kVector<T>> piece(x, channels, i);
      const int row = row_of(at, piece.pixel), col = col_of(at, piece.pixel);
      Packed<T, kVector<T>> packed{};
      if (x.has(row, col)) {
        packed.template load<16>(static_cast<const T*>(x.image.data) +
                                 x.at(batch, first + piece.channel, row, col));
      }
      EFFATTN_UNROLL
      for (int e = 0; e < kVector<T>; ++e) {
        piece.element(e, [&](int pixel, int c) { put(pixel, c, packed.get(e)); });
      }
    });
  };
  if (by_vectors(x, first, channels, vectors)) return;
  for_each<kPixelThreads>(channels * Tiles::kPixels, [&](int i) {
    const PieceOfTile<Tiles, 1> one(x, channels, i);
    put(one.pixel, one.channel,
        x.load(batch, first + one.channel, row_of(at, one.pixel), col_of(at, one.pixel)));
  });
}

// And to an image, get(pixel, channel).
template <class Tiles, class Get>
EFFATTN_DEVICE void store_tile(const ImageView& x, int64_t batch, int64_t first, int channels,
                               const Corner& at, Get get) {
  const auto vectors = [&](auto type) {
    using T = decltype(type);
    for_each<kPixelThreads>(channels * Tiles::kPixels / kVector<T>, [&](int i) {
      const PieceOfTile<Tiles, kVector<T>> piece(x, channels, i);
      const int row = row_of(at, piece.pixel), col = col_of(at, piece.pixel);
      if (!x.has(row, col)) return;
      Packed<T, kVector<T>> packed{};
      EFFATTN_UNROLL
      for (int e = 0; e < kVector<T>; ++e) packed.set(e, piece.element(e, get));
      packed.template store<16>(static_cast<T*>(x.image.data) + x.at(batch, first + piece.channel, row, col));
    });
  };
  if (by_vectors(x, first, channels, vectors)) return;
  for_each<kPixelThreads>(channels * Tiles::kPixels, [&](int i) {
    const PieceOfTile<Tiles, 1> one(x, channels, i);
    x.store(batch, first + one.channel, row_of(at, one.pixel), col_of(at, one.pixel),
            get(one.pixel, one.channel));
  });
}

// Some pixels of a row of one channel, the first in a column that is a multiple of their number.
template <int kCount>
EFFATTN_DEVICE void load_strip(const ImageView& x, int64_t batch, int64_t channel, int row, int col,
                               float (&to)[kCount]) {
  const auto vectors = [&](auto type) {
    using T = decltype(type);
    EFFATTN_UNROLL
    for (int v = 0; v < kCount; v += kVector<T>) {
      Packed<T, kVector<T>> packed{};
      if (x.has(row, col + v)) {
        packed.template load<16>(static_cast<const T*>(x.image.data) + x.at(batch, channel, row, col + v));
      }
      EFFATTN_UNROLL
      for (int e = 0; e < kVector<T>; ++e) to[v + e] = packed.get(e);
    }
  };
  if (by_vectors(x, channel, 1, vectors)) return;
  EFFATTN_UNROLL
  for (int e = 0; e < kCount; ++e) to[e] = x.load(batch, channel, row, col + e);
}
template <int kCount>
EFFATTN_DEVICE void store_strip(const ImageView& x, int64_t batch, int64_t channel, int row, int col,
                                const float (&from)[kCount]) {
  const auto vectors = [&](auto type) {
    using T = decltype(type);
    EFFATTN_UNROLL
    for (int v = 0; v < kCount; v += kVector<T>) {
      if (!x.has(row, col + v)) continue;
      Packed<T, kVector<T>> packed{};
      EFFATTN_UNROLL
      for (int e = 0; e < kVector<T>; ++e) packed.set(e, from[v + e]);
      packed.template store<16>(static_cast<T*>(x.image.data) + x.at(batch, channel, row, col + v));
    }
  };
  if (by_vectors(x, channel, 1, vectors)) return;
  EFFATTN_UNROLL
  for (int e = 0; e < kCount; ++e) x.store(batch, channel, row, col + e, from[e]);
}

// Strips of the depthwise convolution of what is staged, with taps (channels, kernel, kernel): f(channel,
// pixel, strip). The transposed one if kSign is -1. kKernel is the size, if it is known, or 0.
template <class Tiles, int kKernel, int kSign, class F>
EFFATTN_DEVICE void convolve(const float* staged, const float* taps, int channels, int size, F f) {
  constexpr int across = Tiles::kWidth / Tiles::kStrip;
  const int kernel = kKernel > 0 ? kKernel : size, width = Tiles::kWidth + kernel - 1;
  for_each<kPixelThreads>(channels * Tiles::kHeight * across, [&](int item) {
    const int c = item / (Tiles::kHeight * across), row = item / across % Tiles::kHeight;
    const int col = item % across * Tiles::kStrip;
    const float* const of_channel = taps + c * kernel * kernel;
    const auto tap = [&](int i, int j) {
      return kSign > 0 ? of_channel[i * kernel + j] : of_channel[(kernel - 1 - i) * kernel + kernel - 1 - j];
    };
    float total[Tiles::kStrip] = {};
    EFFATTN_NOT_UNROLLED
    for (int i = 0; i < kernel; ++i) {
      const float* const line = staged + c * Tiles::staged(kernel) + (row + i) * width + col;
      if constexpr (kKernel > 0) {
        float x[Tiles::kStrip + kKernel - 1];
        EFFATTN_UNROLL
        for (int j = 0; j < Tiles::kStrip + kKernel - 1; ++j) x[j] = line[j];
        EFFATTN_UNROLL
        for (int j = 0; j < kKernel; ++j) {
          const float factor = tap(i, j);
          EFFATTN_UNROLL
          for (int e = 0; e < Tiles::kStrip; ++e) total[e] += factor * x[e + j];
        }
      } else {
        for (int j = 0; j < kernel; ++j) {
          const float factor = tap(i, j);
          EFFATTN_UNROLL
          for (int e = 0; e < Tiles::kStrip; ++e) total[e] += factor * line[e + j];
        }
      }
    }
    f(c, row * Tiles::kWidth + col, total);
  });
}

// kPadded x kPadded sums over pixels, in the registers of a block from tile to tile.
template <int kPadded>
class MatrixTotal {
  static constexpr int kAcross = kPadded / kTileCols;
  static constexpr int kTiles = kPadded / kTileRows * kAcross;
  static constexpr int kSlices = max(1, kPixelWarps / kTiles), kPerWarp = max(1, kTiles / kPixelWarps);
  static constexpr int kPixels = PixelTiles<kPadded>::kPixels / kSlices;

  float total_[kPerWarp][kTileCols / 8][4] = {};

  EFFATTN_DEVICE static int row(int i) { return tile(i) / kAcross * kTileRows; }
  EFFATTN_DEVICE static int col(int i) { return tile(i) % kAcross * kTileCols; }
  EFFATTN_DEVICE static int tile(int i) { return warp_index() % min(kTiles, kPixelWarps) + i * kPixelWarps; }
  EFFATTN_DEVICE static int slice() { return warp_index() / min(kTiles, kPixelWarps); }

 public:
  static constexpr int64_t kSharedBytes = int64_t{4} * kSlices * kPadded * kPadded;

  // Adds a(row, pixel) b(pixel, col) of a tile.
  template <class A, class B>
  EFFATTN_DEVICE void add(int rows, int cols, A a, B b) {
    const int first = slice() * kPixels;
    EFFATTN_UNROLL
    for (int i = 0; i < kPerWarp; ++i) {
      tile_product(
          total_[i], row(i), rows, col(i), cols, kPixels, [&](int r, int k) { return a(r, first + k); },
          [&](int k, int c) { return b(first + k, c); });
    }
  }

  // out(row, col, sum), through shared memory that is free.
  template <class Out>
  EFFATTN_DEVICE void finish(float* shared, int rows, int cols, Out out) {
    EFFATTN_UNROLL
    for (int i = 0; i < kPerWarp; ++i) {
      each_of_tile(total_[i], row(i), rows, col(i), cols,
                   [&](int r, int c, float x) { shared[(slice() * kPadded + r) * kPadded + c] = x; });
    }
    sync_block();
    for_each<kPixelThreads>(rows * cols, [&](int i) {
      const int r = i / cols, c = i % cols;
      float total = 0;
      for (int s = 0; s < kSlices; ++s) total += shared[(s * kPadded + r) * kPadded + c];
      out(r, c, total);
    });
    sync_block();
  }
};

// kPadded sums over pixels, likewise.
template <int kPadded>
class VectorTotal {
  static constexpr int kSlices = kPixelThreads / kPadded;

  float total_ = 0;

 public:
  template <class X>
  EFFATTN_DEVICE void add(int channels, X x) {
    const int c = thread_index() % kPadded;
    if (c >= channels) return;
    for (int pixel = thread_index() / kPadded; pixel < PixelTiles<kPadded>::kPixels; pixel += kSlices) {
      total_ += x(pixel, c);
    }
  }
  template <class Out>
  EFFATTN_DEVICE void finish(float* shared, int channels, Out out) {
    shared[thread_index()] = total_;
    sync_block();
    for_each<kPixelThreads>(channels, [&](int c) {
      float total = 0;
      for (int s = 0; s < kSlices; ++s) total += shared[s * kPadded + c];
      out(c, total);
    });
    sync_block();
  }
};

}  // namespace effattn::cuda
