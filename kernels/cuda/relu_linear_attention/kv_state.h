// The kv_state of linear attention, S and z below it, as sums over tokens.
//
// Tiles go from memory into registers in the order in which tensor cores take them (fragment.h): nothing of
// k and v passes through shared memory, warps wait for nobody, and each tensor is read once.
#pragma once

#include "../core/block.h"
#include "../core/reduction.h"
#include "../core/tensors.h"

namespace effattn::cuda::linear_attention {

// A warp sums kChunk x kChunk of them over 32 tokens at a time, 16 of float32: more would not fit into
// registers.
template <int kPadded>
struct KvStateTiles {
  static constexpr int kChunk = min(kPadded, 32);
  static constexpr int kAcross = kPadded / kChunk, kChunks = kAcross * kAcross;
  static constexpr int kWarps = kPadded <= 32 ? 4 : 8;
  static constexpr int kAtOnce = min(kChunks, kWarps), kSlices = kWarps / kAtOnce;
  static constexpr int kTokens = 32, kThreads = kWarps * kLanes;
  static constexpr int kFloats = (kPadded + 1) * kPadded;  // of a slice: the matrix, and below it the vector
  static constexpr int64_t kSharedBytes = int64_t{4} * kSlices * kFloats;
};

struct KvStateArgs {
  Groups groups;
  View k, v;
  const float* scales;  // of each token two, of k in S and in z, or null
  float* kv_state;      // (groups, parts / cluster, value_dim + 1, head_dim)
  int tokens, head_dim, value_dim;
  Split split;
};

// Some channels by tokens. Of: Fragment or PackedFragment.
template <template <class, int, int, int, int, bool> class Of, class T, int kPadded, bool kTokenMajor>
using ChannelFragment = Of<T, KvStateTiles<kPadded>::kChunk / 8, kVector<T>,
                           kTokenMajor ? min(kVector<T>, KvStateTiles<kPadded>::kChunk / 8) : 1,
                           kTokenMajor ? 1 : kVector<T>, kTokenMajor>;

// Steps of tokens after which narrow types' sums leave the registers: tensor cores round towards zero, and a
// longer chain of sums would fall behind. Even, as the loop is.
constexpr int kStepsOfChain = 32;

// sum v relu(k)^T and sum relu(k) of a narrow type over the tokens of a part that are a warp's, for some
// channels of each. The next tokens are asked for before these are used.
template <class T, int kPadded, bool kTokenMajor, int kAccess, bool kPrefetches>
EFFATTN_DEVICE void accumulate_chunk(const Matrix<const T>& k, const Matrix<const T>& v, int first_k,
                                     int first_v, int begin, int end, int step, float* matrix,
                                     float* vector) {
  using Tiles = KvStateTiles<kPadded>;
  constexpr int rows = Tiles::kChunk / 8;
  using Piece = ChannelFragment<PackedFragment, T, kPadded, kTokenMajor>;
  struct Tokens {
    Piece key, value;

    EFFATTN_DEVICE void load(const Matrix<const T>& k, const Matrix<const T>& v, int first_k, int first_v,
                             int token) {
      key.template load_by<kAccess>(k, first_k, token);
      value.template load_by<kAccess>(v, first_v, token);
    }
  };
  const uint32_t one = pack<T>(1, 1), ones[2] = {one, one};
  // By channels of k, then of v; behind these the sum of k, in every column.
  float total[rows / 2][rows + 1][4];
  const auto add = [&](Tokens& now) {
    EFFATTN_UNROLL
    for (int s = 0; s < Piece::kColRegisters / 2; s += 2) {
      EFFATTN_UNROLL
      for (int i = 0; i < rows / 2; ++i) {
        uint32_t a[4];
        EFFATTN_UNROLL
        for (int e = 0; e < 4; ++e) a[e] = relu_pair<T>(now.key.pair(2 * i + e % 2, s + e / 2));
        EFFATTN_UNROLL
        for (int j = 0; j < rows; ++j) {
          const uint32_t b[2] = {now.value.pair(j, s), now.value.pair(j, s + 1)};
          mma_m16n8k16<T>(total[i][j], a, b);
        }
        mma_m16n8k16<T>(total[i][rows], a, ones);
      }
    }
  };
  Tokens even, odd;
  if (kPrefetches && begin < end) even.load(k, v, first_k, first_v, begin);
  int token = begin;
  do {
    each_register(total, [](float& x) { x = 0; });
    const bool is_first = token == begin;
    const int chain_end = min(end, token + kStepsOfChain * step);
    EFFATTN_NOT_UNROLLED
    while (token < chain_end) {
      if constexpr (kPrefetches) {
        if (token + step < end) odd.load(k, v, first_k, first_v, token + step);
        add(even);
        token += step;
        if (token >= chain_end) break;
        if (token + step < end) even.load(k, v, first_k, first_v, token + step);
        add(odd);
      } else {
        even.load(k, v, first_k, first_v, token);
        add(even);
      }
      token += step;
    }
    constexpr int neighbours = kTokenMajor ? min(kVector<T>, rows) : 1;
    EFFATTN_UNROLL
    for (int i = 0; i < rows / 2; ++i) {
      EFFATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int col = first_k + Piece::row(2 * i + e / 2);
        EFFATTN_UNROLL
        for (int j = 0; j < rows; ++j) {
          float& sum = matrix[(first_v + position<neighbours, 8>(j, 2 * col_lane() + e % 2)) * kPadded + col];
          sum = total[i][j][e] + (is_first ? 0.0f : sum);
        }
        if (first_v == 0 && col_lane() == 0 && e % 2 == 0) {
          vector[col] = total[i][rows][e] + (is_first ? 0.0f : vector[col]);
        }
      }
    }
  } while (token < end);
}

// sum v relu(k)^T and sum relu(k) over a part of the tokens, in `shared`, whole after a barrier.
template <class T, int kPadded, bool kTokenMajor, bool kVectors>
EFFATTN_DEVICE void accumulate_part_narrow(const KvStateArgs& p, int64_t group, int part, float* shared) {
  using Tiles = KvStateTiles<kPadded>;
  const Matrix<const T> k = by_channel<const T>(p.k, p.groups, group, p.tokens, p.head_dim);
  const Matrix<const T> v = by_channel<const T>(p.v, p.groups, group, p.tokens, p.value_dim);
  const int slice = warp_index() / Tiles::kAtOnce;
  float* const matrix = shared + slice * Tiles::kFloats;
  const int begin = part * p.split.part_tokens + slice * Tiles::kTokens,
            end = min((part + 1) * p.split.part_tokens, p.tokens);
  using Piece = ChannelFragment<PackedFragment, T, kPadded, kTokenMajor>;
  const int access = min(Piece::access(k), Piece::access(v));
  for (int chunk = warp_index() % Tiles::kAtOnce; chunk < Tiles::kChunks; chunk += Tiles::kAtOnce) {
    const int first_v = chunk / Tiles::kAcross * Tiles::kChunk,
              first_k = chunk % Tiles::kAcross * Tiles::kChunk;
    const auto sum = [&](auto bytes) {
      accumulate_chunk<T, kPadded, kTokenMajor, bytes(), kVectors>(k, v, first_k, first_v, begin, end,
                                                                   Tiles::kSlices * Tiles::kTokens, matrix,
                                                                   matrix + kPadded * kPadded);
    };
    with_access(kVectors ? 16 : access, sum);
  }
}

// The same of float32, and of any type with scales, whose products with k are no numbers of a narrow type.
template <class T, int kPadded, bool kTokenMajor, bool kScaled>
EFFATTN_DEVICE void accumulate_part_float(const KvStateArgs& p, int64_t group, int part, float* shared) {
  using Tiles = KvStateTiles<kPadded>;
  using Piece = ChannelFragment<Fragment, T, kPadded, kTokenMajor>;
  constexpr int rows = Tiles::kChunk / 8, cols = Piece::kColRegisters;
  const Matrix<const T> k = by_channel<const T>(p.k, p.groups, group, p.tokens, p.head_dim);
  const Matrix<const T> v = by_channel<const T>(p.v, p.groups, group, p.tokens, p.value_dim);
  const int begin = part * p.split.part_tokens, end = min(begin + p.split.part_tokens, p.tokens);
  const int slice = warp_index() / Tiles::kAtOnce;
  float* const mine = shared + slice * Tiles::kFloats;
  for (int chunk = warp_index() % Tiles::kAtOnce; chunk < Tiles::kChunks; chunk += Tiles::kAtOnce) {
    const int first_v = chunk / Tiles::kAcross * Tiles::kChunk,
              first_k = chunk % Tiles::kAcross * Tiles::kChunk;
    float total[rows / 2][rows][4] = {}, keys[rows] = {};
    for (int token = begin + slice * Piece::kAllCols; token < end;
         token += Tiles::kSlices * Piece::kAllCols) {
      Piece key, value;
      key.load(k, first_k, token);
      value.load(v, first_v, token);
      key.relu();
      float of_matrix[cols], of_vector[cols];
      if constexpr (kScaled) {
        EFFATTN_UNROLL
        for (int c = 0; c < cols; ++c) {
          const int at = token + Piece::col(c);
          const Words<2> two =
              at < p.tokens ? load_words<Words<2>>(p.scales + 2 * (group * p.tokens + at)) : Words<2>{};
          of_matrix[c] = float_of(two.words[0]);
          of_vector[c] = float_of(two.words[1]);
        }
      }
      key.each([&](float& x, int r, int c) {
        keys[r] += kScaled ? x * of_vector[c] : x;
        // Not of v: where k is zero its scale may be so large that v times it is infinite.
        if constexpr (kScaled) x *= of_matrix[c];
      });
      // From zero, since tensor cores round towards it: a long sum would fall behind.
      float tile[rows / 2][rows][4] = {};
      EFFATTN_UNROLL
      for (int s = 0; s < cols; s += 2) {
        EFFATTN_UNROLL
        for (int j = 0; j < rows; ++j) {
          const float b[2] = {key.x[j][s], key.x[j][s + 1]};
          EFFATTN_UNROLL
          for (int i = 0; i < rows / 2; ++i) {
            const float a[4] = {value.x[2 * i][s], value.x[2 * i + 1][s], value.x[2 * i][s + 1],
                                value.x[2 * i + 1][s + 1]};
            mma_m16n8k8_float<Piece::kExact>(tile[i][j], a, b);
          }
        }
      }
      add_registers(total, tile);
    }
    constexpr int neighbours = kTokenMajor ? min(kVector<T>, rows) : 1;
    EFFATTN_UNROLL
    for (int j = 0; j < rows; ++j) {
      EFFATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int col = first_k + position<neighbours, 8>(j, 2 * col_lane() + e);
        EFFATTN_UNROLL
        for (int r = 0; r < rows; ++r) {
          mine[(first_v + Piece::row(r)) * kPadded + col] = total[r / 2][j][r % 2 * 2 + e];
        }
      }
      const float sum = sum_of_cols(keys[j]);
      if (first_v == 0 && col_lane() == 0) mine[kPadded * kPadded + first_k + Piece::row(j)] = sum;
    }
  }
}

enum class Variant { kPlain, kVectors, kScaled };

template <class T, int kPadded, bool kTokenMajor, Variant kVariant>
EFFATTN_DEVICE void accumulate_part(const KvStateArgs& p, int64_t group, int part, float* shared) {
  if constexpr (kIsNarrow<T> && kVariant != Variant::kScaled) {
    accumulate_part_narrow<T, kPadded, kTokenMajor, kVariant == Variant::kVectors>(p, group, part, shared);
  } else {
    accumulate_part_float<T, kPadded, kTokenMajor, kVariant == Variant::kScaled>(p, group, part, shared);
  }
}

// Where number i of a group's sums stands in shared memory.
template <int kPadded>
EFFATTN_DEVICE int shared_place(int i, int head_dim, int value_dim) {
  const int row = i / head_dim, col = i % head_dim;
  return (row == value_dim ? kPadded : row) * kPadded + col;
}

// The slices of a block's sums, f(number, where it stands in the first slice, sum).
template <int kPadded, class F>
EFFATTN_DEVICE void each_sum(float* shared, int head_dim, int value_dim, F f) {
  using Tiles = KvStateTiles<kPadded>;
  for (int i = thread_index(); i < (value_dim + 1) * head_dim; i += Tiles::kThreads) {
    float* const at = shared + shared_place<kPadded>(i, head_dim, value_dim);
    float total = *at;
    for (int slice = 1; slice < Tiles::kSlices; ++slice) total += at[slice * Tiles::kFloats];
    f(i, at, total);
  }
}

// The sums of all blocks of a cluster: f(number, sum), each in one of the blocks.
template <int kPadded, class F>
EFFATTN_DEVICE void each_sum_of_cluster(float* shared, int cluster, int head_dim, int value_dim, F f) {
  each_sum<kPadded>(shared, head_dim, value_dim, [](int, float* at, float total) { *at = total; });
  cluster_sum<KvStateTiles<kPadded>::kThreads>(
      cluster, (value_dim + 1) * head_dim,
      [&](int i) { return shared + shared_place<kPadded>(i, head_dim, value_dim); }, f);
}

template <class T, int kPadded, bool kTokenMajor, Variant kVariant>
EFFATTN_KERNEL(KvStateTiles<kPadded>::kThreads, 1)
accumulate_kv_state(EFFATTN_PARAMETERS(KvStateArgs) p) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int64_t group = block_index() / p.split.parts;
  const int part = static_cast<int>(block_index() % p.split.parts), cluster = p.split.cluster;
  accumulate_part<T, kPadded, kTokenMajor, kVariant>(p, group, part, shared);
  grid_dependency_launch();
  sync_block();
  float* const to = p.kv_state + (group * p.split.rows() + part / cluster) * (p.value_dim + 1) * p.head_dim;
  if (cluster == 1) {
    each_sum<kPadded>(shared, p.head_dim, p.value_dim, [&](int i, float*, float total) { to[i] = total; });
  } else {
    each_sum_of_cluster<kPadded>(shared, cluster, p.head_dim, p.value_dim,
                                 [&](int i, float total) { to[i] = total; });
  }
}

}  // namespace effattn::cuda::linear_attention
