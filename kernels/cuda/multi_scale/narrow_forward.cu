// Multi-scale linear attention of narrow types, forward, of heads of up to 32 channels and scales of 3 x 3
// and 5 x 5.
//
// A block takes a tile of 16 x 8 pixels of a head, a warp a row of it. Pixels come to shared memory as they
// are, their convolution goes there in two parts of bfloat16, and from the mixing of channels on everything
// stays in the registers of the warp: the result of a product is an operand of the next. Tiles are convolved
// while the next pixels come.
#include "narrow_forward.h"

#include <type_traits>

#include "../core/launch.h"
#include "../core/narrow_tile.h"
#include "../core/reduction.h"
#include "../core/tensors.h"

namespace effattn::cuda {
namespace {

constexpr int kHeight = 8, kWidth = kTileWidth, kPixels = kWidth * kHeight;
constexpr int kWarps = kHeight, kThreads = kWarps * kLanes;
constexpr int kStrip = 8;
// Of a staged row: a vector of pixels on each side of the tile, and what keeps rows from meeting in a bank.
constexpr int kBeside = 8, kRowStride = kWidth + 2 * kBeside + 8;
constexpr int kMaxPadded = 32;
// Blocks that a scale's tiles are split into, where that can be: four for each multiprocessor of the largest
// GPUs.
constexpr int64_t kWantedBlocks = 528, kMaxParts = 64;
// Tensor cores truncate what they add up: no sum is longer than so many tiles, 16 pixels of each a warp.
constexpr int64_t kMaxTiles = 64;
// Rows of sums that each block of the queries adds up itself.
constexpr int64_t kMaxRows = 8;
// Blocks of the queries for each multiprocessor: all of them at once.
template <int kPadded>
constexpr int kQueryBlocks = kPadded <= 16 ? 3 : 2;

// One scale of an image, and the heads of the image itself where they are taken along.
struct Scale {
  ImageView x;
  ScaleWeights<const float> weights;
  int head_dim, heads, own_heads;  // own_heads: behind those of the scale, which take longest
  int first_head, all_heads;       // where the heads of the scale are in the output
  int down, across;

  constexpr int tiles() const { return down * across; }
  constexpr int launch_heads() const { return heads + own_heads; }
};

struct KvStateArgs {
  Scale scale;
  Split split;      // of tiles
  float* kv_state;  // (batch, all_heads, rows of the split, head_dim + 1, head_dim)
};

struct AttendArgs {
  Scale scale;
  int tiles, pieces;      // of a block, and of a head
  const float* kv_state;  // as KvStateArgs', to be added up over the rows
  int rows;
  float* keep;  // what they add up to, or null
  ImageView out;
  bool by_pairs;  // of neighbours
  float eps;
};

// A head of an image, and a piece of its tiles.
struct TileCoord {
  int64_t batch, channel;  // channel: the head's first one in x
  int piece, output;       // output: the head's number
  bool is_own;

  EFFATTN_DEVICE TileCoord(const Scale& s, int pieces) {
    const uint32_t index = static_cast<uint32_t>(block_index()), group = index / pieces;
    piece = static_cast<int>(index % pieces);
    batch = group / s.launch_heads();
    const int head = static_cast<int>(group % s.launch_heads());
    is_own = head >= s.heads;
    const int of_kind = is_own ? head - s.heads : head;
    output = is_own ? of_kind : s.first_head + of_kind;
    channel = int64_t{3} * of_kind * s.head_dim;
  }
};

EFFATTN_DEVICE Corner corner_of(const Scale& s, int tile) {
  return {tile / s.across * kHeight, tile % s.across * kWidth};
}

// Of a block that needs kTensors of q, k and v.
template <int kPadded, int kKernel, int kTensors>
struct Memory {
  static constexpr int kChannels = kPadded, kRows = kHeight + kKernel - 1,
                       kChannelStride = kRows * kRowStride;
  static constexpr int kTaps = static_cast<int>(round_up(kKernel * kKernel, 4));

  uint16_t* staged;  // (kPadded, kRows, kRowStride)
  SplitTile convolved;
  char* weights;
  float *taps, *tap_biases, *biases;  // (kTensors, kPadded, kTaps), (kTensors, kPadded)

  EFFATTN_DEVICE Memory()
      : staged(reinterpret_cast<uint16_t*>(shared_memory())),
        convolved(SplitTile::in(shared_memory() + kStagedBytes, kPadded, kPixels)),
        weights(shared_memory() + kStagedBytes + SplitTile::bytes(kPadded, kPixels)),
        taps(reinterpret_cast<float*>(weights + kTensors * SplitTile::bytes(kPadded, kPadded))),
        tap_biases(taps + kTensors * kPadded * kTaps),
        biases(tap_biases + kTensors * kPadded) {}

  EFFATTN_DEVICE SplitTile pointwise(int tensor) const {
    return SplitTile::in(weights + tensor * SplitTile::bytes(kPadded, kPadded), kPadded, kPadded);
  }

  static constexpr int64_t kStagedBytes = int64_t{2} * kPadded * kChannelStride;
  static constexpr int64_t kBytes =
      kStagedBytes + SplitTile::bytes(kPadded, kPixels) +
      kTensors * (SplitTile::bytes(kPadded, kPadded) + 4 * kPadded * (kTaps + 2));
};

// The weights of a head's tensors, which begin at a channel.
template <int kTensors, class Memory, int kPadded, int kKernel>
EFFATTN_DEVICE void load_weights(const Scale& s, const Memory& memory, int64_t channel) {
  const auto or_zero = [](const float* from, int64_t i, bool inside) {
    return from != nullptr && inside ? from[i] : 0.0f;
  };
  for (int tensor = 0; tensor < kTensors; ++tensor) {
    const SplitTile pointwise = memory.pointwise(tensor);
    const int64_t first = channel + tensor * s.head_dim;
    for_each_of<kThreads, kPadded * kPadded / 2>([&](int i) {
      const int row = i / (kPadded / 2), col = i % (kPadded / 2) * 2;
      const int64_t at = (first + row) * s.head_dim + col;
      pointwise.put(row, col, or_zero(s.weights.pointwise, at, row < s.head_dim && col < s.head_dim),
                    or_zero(s.weights.pointwise, at + 1, row < s.head_dim && col + 1 < s.head_dim));
    });
    for_each_of<kThreads, kPadded * Memory::kTaps>([&](int i) {
      const int c = i / Memory::kTaps, tap = i % Memory::kTaps;
      constexpr int taps = kKernel * kKernel;
      memory.taps[tensor * kPadded * Memory::kTaps + i] =
          or_zero(s.weights.depthwise, (first + c) * taps + tap, c < s.head_dim && tap < taps);
    });
    for_each_of<kThreads, kPadded>([&](int c) {
      const bool inside = c < s.head_dim;
      memory.tap_biases[tensor * kPadded + c] = or_zero(s.weights.depthwise_bias, first + c, inside);
      memory.biases[tensor * kPadded + c] = or_zero(s.weights.pointwise_bias, first + c, inside);
    });
  }
}

// The pixels of a tile and around it, as they are; zeros outside of the image. There after a wait and a
// barrier.
template <class T, class Memory, int kKernel>
EFFATTN_DEVICE void stage(const Scale& s, const Memory& memory, int64_t batch, int64_t channel,
                          const Corner& at) {
  constexpr int rows = Memory::kRows, halo = kKernel / 2, width = kWidth + 2 * halo;
  const ImageView& x = s.x;
  const T* const data = static_cast<const T*>(x.image.data);
  const bool by_channels = x.image.channel_stride == 1;
  if (x.vector != 0 && !by_channels) {
    constexpr int vectors = (kWidth + 2 * kBeside) / kVector<T>;
    const T* const of_head = data + (batch * x.image.batch_stride + channel * x.image.channel_stride);
    for_each_of<kThreads, Memory::kChannels * rows * vectors>([&](int i) {
      const int line = i / vectors, c = line / rows, right = i % vectors * kVector<T>;
      const int row = at.row - halo + line % rows, col = at.col - kBeside + right;
      const bool inside = c < s.head_dim && x.has(row, col);
      cp_async_16(memory.staged + line * kRowStride + right,
                  inside ? of_head + (c * x.image.channel_stride + (row * x.width + col)) : data, inside);
    });
  } else if (x.vector != 0 && channel % kVector<T> == 0 && s.head_dim % kVector<T> == 0) {
    const int vectors = s.head_dim / kVector<T>;
    for_each<kThreads>(rows * width * vectors, [&](int i) {
      const int c = i % vectors * kVector<T>, pixel = i / vectors, down = pixel / width,
                right = pixel % width;
      const int row = at.row - halo + down, col = at.col - halo + right;
      Packed<T, kVector<T>> packed{};
      if (x.has(row, col)) packed.template load<16>(data + x.at(batch, channel + c, row, col));
      uint16_t* const to =
          memory.staged + c * Memory::kChannelStride + down * kRowStride + kBeside - halo + right;
      EFFATTN_UNROLL
      for (int e = 0; e < kVector<T>; ++e) {
        to[e * Memory::kChannelStride] = static_cast<uint16_t>(packed.words[e / 2] >> e % 2 * 16);
      }
    });
  } else {
    for_each<kThreads>(s.head_dim * rows * width, [&](int i) {
      const int c = by_channels ? i % s.head_dim : i / (rows * width);
      const int pixel = by_channels ? i / s.head_dim : i % (rows * width);
      const int row = at.row - halo + pixel / width, col = at.col - halo + pixel % width;
      memory
          .staged[c * Memory::kChannelStride + pixel / width * kRowStride + kBeside - halo + pixel % width] =
          x.has(row, col) ? data[x.at(batch, channel + c, row, col)].bits : 0;
    });
  }
  cp_async_commit();
}

// A strip of pixels of a staged row, and two more on each side.
template <class T>
EFFATTN_DEVICE void load_strip(const uint16_t* row, float (&x)[kStrip + 4]) {
  const auto left = shared_words<Words<1>>(row - 2), right = shared_words<Words<1>>(row + kStrip);
  const auto middle = shared_words<Words<4>>(row);
  EFFATTN_UNROLL
  for (int e = 0; e < 2; ++e) {
    x[e] = half_of<T>(left.words[0], e);
    x[kStrip + 2 + e] = half_of<T>(right.words[0], e);
  }
  EFFATTN_UNROLL
  for (int e = 0; e < kStrip; ++e) x[2 + e] = half_of<T>(middle.words[e / 2], e % 2);
}

// What is staged to `convolved`, channels by pixels: convolved, or, of the image's own heads, as it is or its
// relu.
template <class T, class Memory, int kPadded, int kKernel>
EFFATTN_DEVICE void convolve(const Scale& s, const Memory& memory, int tensor, bool is_own, bool relus) {
  constexpr int halo = kKernel / 2, across = kWidth / kStrip;
  for_each_of<kThreads, kPadded * kHeight * across>([&](int item) {
    const int c = item / (kHeight * across), row = item / across % kHeight, col = item % across * kStrip;
    float total[kStrip] = {};
    if (c < s.head_dim) {
      const uint16_t* const from =
          memory.staged + c * Memory::kChannelStride + row * kRowStride + kBeside + col;
      float x[kStrip + 4];
      if (is_own) {
        load_strip<T>(from + halo * kRowStride, x);
        EFFATTN_UNROLL
        for (int e = 0; e < kStrip; ++e) total[e] = relus ? relu(x[2 + e]) : x[2 + e];
      } else {
        const float* const taps = memory.taps + (tensor * kPadded + c) * Memory::kTaps;
        const float bias = memory.tap_biases[tensor * kPadded + c];
        EFFATTN_UNROLL
        for (int e = 0; e < kStrip; ++e) total[e] = bias;
        EFFATTN_UNROLL
        for (int i = 0; i < kKernel; ++i) {
          load_strip<T>(from + i * kRowStride, x);
          EFFATTN_UNROLL
          for (int j = 0; j < kKernel; ++j) {
            const float tap = taps[i * kKernel + j];
            EFFATTN_UNROLL
            for (int e = 0; e < kStrip; ++e) total[e] += tap * x[e + j + 2 - halo];
          }
        }
      }
    }
    memory.convolved.template put_pairs<kStrip>(memory.convolved.at(c, row * kWidth + col),
                                                [&](int e) { return total[e]; });
  });
}

// A tile of a product's result, 16 x 16, as an operand of the next: its rows as rows, or its rows as the
// columns.
EFFATTN_DEVICE void as_rows(SplitOperand& to, const float (&x)[2][4]) {
  EFFATTN_UNROLL
  for (int i = 0; i < 4; ++i) to.set(i, x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
}
EFFATTN_DEVICE void as_columns(SplitOperand& to, const float (&x)[2][4]) {
  EFFATTN_UNROLL
  for (int i = 0; i < 4; ++i) to.set(i, x[i % 2][i / 2 * 2], x[i % 2][i / 2 * 2 + 1]);
}

// --- kv_state ---------------------------------------------------------------------------------------

// 16 mixed channels of a warp's row of pixels, channels by pixels; 0 outside of the image.
template <class Memory, int kPadded>
EFFATTN_DEVICE void mix_channels(const Scale& s, const Memory& memory, int tensor, int channel,
                                 const Corner& at, float (&x)[2][4]) {
  const SplitTile pointwise = memory.pointwise(tensor);
  EFFATTN_UNROLL
  for (int k = 0; k < kPadded; k += 16) {
    SplitOperand a, b;
    pointwise.template load_a<false>(a, channel, k);
    memory.convolved.template load_b<true>(b, k, warp_index() * kWidth);
    mma_m16n16k16_split(x, a, b);
  }
  const int row = at.row + warp_index();
  EFFATTN_UNROLL
  for (int j = 0; j < 2; ++j) {
    EFFATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int col = at.col + 8 * j + 2 * col_lane() + e % 2;
      const float bias = memory.biases[tensor * kPadded + channel + row_lane() + e / 2 * 8];
      x[j][e] = s.x.has(row, col) ? x[j][e] + bias : 0.0f;
    }
  }
}

// The sums of all warps of a block: f(number, sum), of those that are there. In shared memory that is free.
template <int kPadded, class F>
EFFATTN_DEVICE void each_sum(float* shared, int head_dim,
                             const float (&matrix)[kPadded / 16][kPadded / 16][2][4],
                             const float (&vector)[kPadded / 16][2][4], F f) {
  constexpr int floats = (kPadded + 1) * kPadded;
  float* const mine = shared + warp_index() * floats;
  EFFATTN_UNROLL
  for (int n = 0; n < kPadded / 8; ++n) {
    EFFATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int col = 8 * n + 2 * col_lane() + e % 2;
      EFFATTN_UNROLL
      for (int m = 0; m < kPadded / 16; ++m) {
        mine[(16 * m + row_lane() + e / 2 * 8) * kPadded + col] = matrix[m][n / 2][n % 2][e];
      }
      if (row_lane() == 0 && e < 2) mine[kPadded * kPadded + col] = vector[n / 2][n % 2][e];
    }
  }
  sync_block();
  for_each<kThreads>((head_dim + 1) * head_dim, [&](int i) {
    const int row = i / head_dim, at = (row == head_dim ? kPadded : row) * kPadded + i % head_dim;
    float total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp * floats + at];
    f(i, total);
  });
}

template <class T, int kPadded, int kKernel>
EFFATTN_KERNEL(kThreads, 2)
accumulate_kv_state_narrow(EFFATTN_PARAMETERS(KvStateArgs) p) {
  using Memory = Memory<kPadded, kKernel, 2>;
  constexpr int tiles = kPadded / 16;
  const Scale& s = p.scale;
  const Memory memory;
  const TileCoord coord(s, p.split.parts);
  const int64_t keys = coord.channel + s.head_dim;  // behind q
  const int begin = coord.piece * p.split.part_tokens, end = min(begin + p.split.part_tokens, s.tiles());
  if (begin < end) stage<T, Memory, kKernel>(s, memory, coord.batch, keys, corner_of(s, begin));
  if (!coord.is_own) load_weights<2, Memory, kPadded, kKernel>(s, memory, keys);
  float matrix[tiles][tiles][2][4] = {}, vector[tiles][2][4] = {};
  const uint32_t one = pack<BFloat16>(1, 1), ones[4] = {one, one, one, one};
  EFFATTN_NOT_UNROLLED
  for (int tile = begin; tile < end; ++tile) {
    const Corner at = corner_of(s, tile);
    const int pixel = warp_index() * kWidth;
    cp_async_wait<0>();
    sync_block();
    convolve<T, Memory, kPadded, kKernel>(s, memory, 0, coord.is_own, true);
    sync_block();
    stage<T, Memory, kKernel>(s, memory, coord.batch, keys + s.head_dim, at);
    SplitOperand key[tiles];
    EFFATTN_UNROLL
    for (int n = 0; n < tiles; ++n) {
      if (coord.is_own) {
        memory.convolved.template load_b<false>(key[n], 16 * n, pixel);
      } else {
        float x[2][4] = {};
        mix_channels<Memory, kPadded>(s, memory, 0, 16 * n, at, x);
        EFFATTN_UNROLL
        for (int e = 0; e < 8; ++e) x[e / 4][e % 4] = relu(x[e / 4][e % 4]);
        as_columns(key[n], x);
      }
    }
    cp_async_wait<0>();
    sync_block();
    convolve<T, Memory, kPadded, kKernel>(s, memory, 1, coord.is_own, false);
    sync_block();
    if (tile + 1 < end) stage<T, Memory, kKernel>(s, memory, coord.batch, keys, corner_of(s, tile + 1));
    EFFATTN_UNROLL
    for (int m = 0; m < tiles; ++m) {
      SplitOperand value;
      if (coord.is_own) {
        memory.convolved.template load_a<false>(value, 16 * m, pixel);
      } else {
        float x[2][4] = {};
        mix_channels<Memory, kPadded>(s, memory, 1, 16 * m, at, x);
        as_rows(value, x);
      }
      EFFATTN_UNROLL
      for (int n = 0; n < tiles; ++n) mma_m16n16k16_split(matrix[m][n], value, key[n]);
    }
    EFFATTN_UNROLL
    for (int n = 0; n < tiles; ++n) {
      EFFATTN_UNROLL
      for (int j = 0; j < 2; ++j) {
        mma_m16n8k16<BFloat16>(vector[n][j], ones, {key[n].parts[1][2 * j], key[n].parts[1][2 * j + 1]});
        mma_m16n8k16<BFloat16>(vector[n][j], ones, {key[n].parts[0][2 * j], key[n].parts[0][2 * j + 1]});
      }
    }
  }
  cp_async_wait<0>();
  grid_dependency_launch();
  sync_block();
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int floats = (s.head_dim + 1) * s.head_dim, cluster = p.split.cluster;
  float* const to =
      p.kv_state +
      ((coord.batch * s.all_heads + coord.output) * p.split.rows() + coord.piece / cluster) * int64_t{floats};
  if (cluster == 1) {
    each_sum<kPadded>(shared, s.head_dim, matrix, vector, [&](int i, float total) { to[i] = total; });
    return;
  }
  float* const of_block = shared + kWarps * (kPadded + 1) * kPadded;
  each_sum<kPadded>(shared, s.head_dim, matrix, vector, [&](int i, float total) { of_block[i] = total; });
  cluster_sum<kThreads>(
      cluster, floats, [&](int i) { return of_block + i; }, [&](int i, float total) { to[i] = total; });
}

// --- what uses them ---------------------------------------------------------------------------------

template <class T, int kPadded, int kKernel, bool kChannelsLast>
struct Attended {
  using OfQueries = Memory<kPadded, kKernel, 1>;
  static constexpr int kTiles = kPadded / 16;

  const AttendArgs& p;
  const OfQueries memory;
  const TileCoord coord;
  // Below S stands z in 16 rows, so that all lanes get the denominators of their pixels.
  const SplitTile state;

  EFFATTN_DEVICE explicit Attended(const AttendArgs& p)
      : p(p),
        coord(p.scale, p.pieces),
        state(SplitTile::in(shared_memory() + OfQueries::kBytes, kPadded + 16, kPadded)) {}

  EFFATTN_DEVICE void load_kv_state() const {
    const Scale& s = p.scale;
    const int floats = (s.head_dim + 1) * s.head_dim;
    const int64_t head = coord.batch * s.all_heads + coord.output;
    const float* const kv_state = p.kv_state + head * p.rows * floats;
    float* const keep = p.keep != nullptr && coord.piece == 0 ? p.keep + head * floats : nullptr;
    for_each_of<kThreads, (kPadded + 16) * kPadded / 2>([&](int i) {
      const int row = i / (kPadded / 2), col = i % (kPadded / 2) * 2, of = row < kPadded ? row : s.head_dim;
      float x[2] = {};
      EFFATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        if ((row < kPadded && row >= s.head_dim) || col + e >= s.head_dim) continue;
        const int number = of * s.head_dim + col + e;
        for (int r = 0; r < p.rows; ++r) x[e] += kv_state[r * floats + number];
        if (keep != nullptr && row <= kPadded) keep[number] = x[e];
      }
      state.put(row, col, x[0], x[1]);
    });
  }

  // Of the warp's row of pixels, relu taken.
  EFFATTN_DEVICE void load(SplitOperand (&query)[kTiles]) const {
    const int pixel = warp_index() * kWidth;
    EFFATTN_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      if (coord.is_own) {
        if (kChannelsLast) {
          memory.convolved.template load_a<true>(query[n], 16 * n, pixel);
        } else {
          memory.convolved.template load_b<true>(query[n], 16 * n, pixel);
        }
        continue;
      }
      float x[2][4] = {};
      const SplitTile pointwise = memory.pointwise(0);
      EFFATTN_UNROLL
      for (int k = 0; k < kPadded; k += 16) {
        SplitOperand a, b;
        memory.convolved.template load_a<true>(a, k, pixel);
        pointwise.template load_b<false>(b, 16 * n, k);
        mma_m16n16k16_split(x, a, b);
      }
      EFFATTN_UNROLL
      for (int e = 0; e < 8; ++e) {
        float& of = x[e / 4][e % 4];
        of = relu(of + memory.biases[16 * n + e / 4 * 8 + 2 * col_lane() + e % 2]);
      }
      if (kChannelsLast) {
        as_rows(query[n], x);
      } else {
        as_columns(query[n], x);
      }
    }
  }

  // 16 channels of the state from `row` on times queries.
  EFFATTN_DEVICE void multiply(float (&c)[2][4], const SplitOperand (&query)[kTiles], int row) const {
    EFFATTN_UNROLL
    for (int k = 0; k < kTiles; ++k) {
      SplitOperand of_state;
      if constexpr (kChannelsLast) {
        state.template load_b<false>(of_state, row, 16 * k);
        mma_m16n16k16_split(c, query[k], of_state);
      } else {
        state.template load_a<false>(of_state, row, 16 * k);
        mma_m16n16k16_split(c, of_state, query[k]);
      }
    }
  }

  EFFATTN_DEVICE void store(const SplitOperand (&query)[kTiles], const Corner& at) const {
    const int head_dim = p.scale.head_dim, image_row = at.row + warp_index();
    float denominator[2][4] = {}, inverse[2][2];
    multiply(denominator, query, kPadded);
    EFFATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      // Of pixels g and g + 8, or 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
      const float x = kChannelsLast ? denominator[0][i % 2 * 2] : denominator[i / 2][i % 2];
      inverse[i / 2][i % 2] = rcp_approx(clamp_subnormal(x + p.eps));
    }
    if (image_row >= p.out.height) return;
    // A lane has two neighbours along what is contiguous, and the same eight further on, both ways.
    const int channel = kChannelsLast ? 2 * col_lane() : row_lane();
    const int right = at.col + (kChannelsLast ? row_lane() : 2 * col_lane());
    const int64_t over_channels = p.out.image.channel_stride, over_columns = p.out.image.token_stride;
    T* const out = static_cast<T*>(p.out.image.data) +
                   p.out.at(coord.batch, int64_t{coord.output} * head_dim + channel, image_row, right);
    EFFATTN_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      float x[2][4] = {};
      multiply(x, query, 16 * m);
      EFFATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int j = i / 2, half = i % 2;
        const int channels = 16 * m + 8 * (kChannelsLast ? j : half),
                  columns = 8 * (kChannelsLast ? half : j);
        if (right + columns >= p.out.width || channel + channels >= head_dim) continue;
        const float first = x[j][2 * half] * (kChannelsLast ? inverse[0][half] : inverse[j][0]);
        const float second = x[j][2 * half + 1] * (kChannelsLast ? inverse[0][half] : inverse[j][1]);
        T* const to = out + (channels * over_channels + columns * over_columns);
        if (p.by_pairs) {
          store_words(to, Words<1>{{pack<T>(first, second)}});
          continue;
        }
        to[0] = from_float<T>(first);
        const bool has_second =
            kChannelsLast ? channel + channels + 1 < head_dim : right + columns + 1 < p.out.width;
        if (has_second) to[kChannelsLast ? over_channels : over_columns] = from_float<T>(second);
      }
    }
  }
};

template <class T, int kPadded, int kKernel, bool kChannelsLast>
EFFATTN_KERNEL(kThreads, kQueryBlocks<kPadded>)
attend_narrow_tiles(EFFATTN_PARAMETERS(AttendArgs) p) {
  using Memory = Memory<kPadded, kKernel, 1>;
  const Scale& s = p.scale;
  const Attended<T, kPadded, kKernel, kChannelsLast> attended(p);
  const TileCoord& coord = attended.coord;
  const Memory& memory = attended.memory;
  const int begin = coord.piece * p.tiles, end = min(begin + p.tiles, s.tiles());  // one at least
  stage<T, Memory, kKernel>(s, memory, coord.batch, coord.channel, corner_of(s, begin));
  if (!coord.is_own) load_weights<1, Memory, kPadded, kKernel>(s, memory, coord.channel);
  EFFATTN_NOT_UNROLLED
  for (int tile = begin; tile < end; ++tile) {
    cp_async_wait<0>();
    sync_block();
    convolve<T, Memory, kPadded, kKernel>(s, memory, 0, coord.is_own, true);
    sync_block();
    if (tile + 1 < end) {
      stage<T, Memory, kKernel>(s, memory, coord.batch, coord.channel, corner_of(s, tile + 1));
    }
    SplitOperand query[kPadded / 16];
    attended.load(query);
    if (tile == begin) {  // the first tile is convolved while the sums are still being added up
      grid_dependency_wait();
      attended.load_kv_state();
      sync_block();
    }
    attended.store(query, corner_of(s, tile));
  }
}

// --- launches ---------------------------------------------------------------------------------------

// How the tiles of a head are split: a function of the sizes alone, as everywhere.
Split split_tiles(int64_t heads, int tiles, const Gpu& gpu) {
  int64_t parts = max(1, min(min(ceil_div(kWantedBlocks, heads), kMaxParts), tiles));
  const int cluster = cluster_of(parts, gpu);
  parts = max(parts / cluster * cluster, round_up(ceil_div(tiles, kMaxTiles), cluster));
  return {static_cast<int>(ceil_div(tiles, parts)), static_cast<int>(parts), cluster};
}

}  // namespace

bool attend_narrow(const MultiScaleParams& params, const ImageView& x, const ImageView& out, float* kv_state,
                   const Execution& execution) {
  if (params.dtype == DType::kFloat32 || params.head_dim > kMaxPadded || params.scales == 0) return false;
  for (int i = 0; i < params.scales; ++i) {
    if (params.kernels[i] != 3 && params.kernels[i] != 5) return false;
  }
  Scale s{};
  s.x = x;
  s.head_dim = static_cast<int>(params.head_dim);
  s.heads = static_cast<int>(params.heads);
  s.all_heads = static_cast<int>(params.all_heads());
  s.down = static_cast<int>(ceil_div(params.height, kHeight));
  s.across = static_cast<int>(ceil_div(params.width, kWidth));
  const int64_t groups = params.batch * params.all_heads(), floats = (params.head_dim + 1) * params.head_dim;
  if (groups * s.tiles() > kMaxBlocks) return false;
  const auto each_scale = [&](auto f) {
    for (int i = 0; i < params.scales; ++i) {
      s.weights = params.weights[i];
      s.own_heads = i == 0 ? s.heads : 0;
      s.first_head = (1 + i) * s.heads;
      with_dtype(params.dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (kIsNarrow<T>) {
          const auto with_kernel = [&](auto padded) {
            if (params.kernels[i] == 3) return f(type, padded, std::integral_constant<int, 3>{});
            f(type, padded, std::integral_constant<int, 5>{});
          };
          if (s.head_dim <= 16) return with_kernel(std::integral_constant<int, 16>{});
          with_kernel(std::integral_constant<int, kMaxPadded>{});
        }
      });
    }
  };
  KvStateArgs sum{s, split_tiles(groups, s.tiles(), execution.gpu), nullptr};
  const int64_t rows = sum.split.rows();
  sum.kv_state = rows == 1 && kv_state != nullptr ? kv_state : execution.workspace(groups * rows * floats);
  each_scale([&](auto type, auto padded, auto kernel) {
    sum.scale = s;
    using Memory = Memory<padded(), kernel(), 2>;
    constexpr int64_t reduced = int64_t{4} * (kWarps + 1) * (padded() + 1) * padded();
    static_assert(reduced <= Memory::kBytes);
    launch(accumulate_kv_state_narrow<decltype(type), padded(), kernel()>,
           {params.batch * s.launch_heads() * sum.split.parts, kThreads, Memory::kBytes, sum.split.cluster},
           execution, sum);
  });
  AttendArgs a{};
  a.scale = s;
  a.kv_state = sum.kv_state;
  a.rows = static_cast<int>(rows);
  a.keep = rows > 1 ? kv_state : nullptr;
  a.out = out;
  a.eps = params.eps;
  if (rows > kMaxRows) {
    if (kv_state == nullptr) kv_state = execution.workspace(groups * floats);
    add_up(sum.kv_state, kv_state, groups, rows, floats, execution);
    a.kv_state = kv_state;
    a.rows = 1;
    a.keep = nullptr;
  }
  const Image& image = out.image;
  const bool channels_last = image.channel_stride == 1 && image.token_stride != 1;
  const bool is_even =
      channels_last ? params.head_dim % 2 == 0 : image.token_stride == 1 && out.width % 2 == 0;
  const int64_t step = channels_last ? image.token_stride : image.channel_stride;
  a.by_pairs = is_even && alignment(image.data, {image.batch_stride, step}, params.dtype) > 0;
  each_scale([&](auto type, auto padded, auto kernel) {
    using T = decltype(type);
    a.scale = s;
    // Results do not depend on it, so that it may depend on the gpu.
    const int64_t blocks = int64_t{kQueryBlocks<padded()>} * execution.gpu.multiprocessors;
    a.pieces = static_cast<int>(ceil_div(s.tiles(), ceil_div(groups * s.tiles(), blocks)));
    a.tiles = static_cast<int>(ceil_div(s.tiles(), a.pieces));
    const int64_t bytes = Memory<padded(), kernel(), 1>::kBytes + SplitTile::bytes(padded() + 16, padded());
    launch(channels_last ? attend_narrow_tiles<T, padded(), kernel(), true>
                         : attend_narrow_tiles<T, padded(), kernel(), false>,
           {params.batch * s.launch_heads() * a.pieces, kThreads, bytes, 1, true}, execution, a);
  });
  return true;
}

}  // namespace effattn::cuda
