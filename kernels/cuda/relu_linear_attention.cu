// ReLU linear attention, forward and backward: a kernel for the sums over tokens, and three for what uses
// them.
//
// Tiles go from memory into registers in the order in which tensor cores take them (fragment.h): nothing of
// q, k and v passes through shared memory, warps wait for nobody, and each tensor is read once.
#include "relu_linear_attention.h"

#include "sums.h"
#include "tensors.h"

namespace effattn::cuda {
namespace {

// --- sums over tokens -------------------------------------------------------------------------------

// A warp sums kChunk x kChunk of them over 32 tokens at a time, 16 of float32: more would not fit into
// registers.
template <int kPadded>
struct SumTiles {
  static constexpr int kChunk = least(kPadded, 32);
  static constexpr int kAcross = kPadded / kChunk, kChunks = kAcross * kAcross;
  static constexpr int kWarps = kPadded <= 32 ? 4 : 8;
  static constexpr int kAtOnce = least(kChunks, kWarps), kSlices = kWarps / kAtOnce;
  static constexpr int kTokens = 32, kThreads = kWarps * kLanes;
  static constexpr int kFloats = (kPadded + 1) * kPadded;  // of a slice: the matrix, and below it the vector
  static constexpr int64_t kSharedBytes = int64_t{4} * kSlices * kFloats;
};

struct SumTokens {
  Groups groups;
  View k, v;
  const float* scales;  // of each token two, of k in the matrix and in the vector, or null
  float* sums;          // (groups, parts / cluster, value_dim + 1, head_dim)
  int tokens, head_dim, value_dim;
  Split split;
};

template <class T, int kPadded, bool kTokenMajor>
using ChannelFragment = Fragment<T, SumTiles<kPadded>::kChunk / 8, kVector<T>,
                                 kTokenMajor ? least(kVector<T>, SumTiles<kPadded>::kChunk / 8) : 1,
                                 kTokenMajor ? 1 : kVector<T>, kTokenMajor>;

// sum v relu(k)^T and sum relu(k) over a part of the tokens, in `shared`, whole after a barrier.
template <class T, int kPadded, bool kTokenMajor, bool kScaled>
EFFATTN_DEVICE void sum_part(const SumTokens& p, int64_t group, int part, float* shared) {
  using Tiles = SumTiles<kPadded>;
  using Piece = ChannelFragment<T, kPadded, kTokenMajor>;
  constexpr int rows = Tiles::kChunk / 8, cols = Piece::kColRegisters;
  const Matrix<const T> k = by_channel<const T>(p.k, p.groups, group, p.tokens, p.head_dim);
  const Matrix<const T> v = by_channel<const T>(p.v, p.groups, group, p.tokens, p.value_dim);
  const int begin = part * p.split.part_tokens, end = least(begin + p.split.part_tokens, p.tokens);
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
            multiply<Piece::kExact, Piece::kExact && !kScaled>(tile[i][j], a, b);
          }
        }
      }
      EFFATTN_UNROLL
      for (int i = 0; i < rows / 2; ++i) {
        EFFATTN_UNROLL
        for (int j = 0; j < rows; ++j) {
          EFFATTN_UNROLL
          for (int e = 0; e < 4; ++e) total[i][j][e] += tile[i][j][e];
        }
      }
    }
    constexpr int neighbours = kTokenMajor ? least(kVector<T>, rows) : 1;
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

// Where number i of a group's sums stands in shared memory.
template <int kPadded>
EFFATTN_DEVICE int shared_place(int i, int head_dim, int value_dim) {
  const int row = i / head_dim, col = i % head_dim;
  return (row == value_dim ? kPadded : row) * kPadded + col;
}

// The slices of a block's sums, f(number, where it stands in the first slice, sum).
template <int kPadded, class F>
EFFATTN_DEVICE void each_sum(float* shared, int head_dim, int value_dim, F f) {
  using Tiles = SumTiles<kPadded>;
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
  sync_cluster();
  const int step = SumTiles<kPadded>::kThreads;
  for (int i = cluster_rank() * step + thread_index(); i < (value_dim + 1) * head_dim; i += cluster * step) {
    const float* const at = shared + shared_place<kPadded>(i, head_dim, value_dim);
    float total = 0;
    for (int rank = 0; rank < cluster; ++rank) total += of_cluster(at, rank);
    f(i, total);
  }
  sync_cluster();  // nobody may leave while others read
}

template <class T, int kPadded, bool kTokenMajor, bool kScaled>
EFFATTN_KERNEL(SumTiles<kPadded>::kThreads, 1)
sum_tokens(EFFATTN_PARAMETERS(SumTokens) p) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int64_t group = block_index() / p.split.parts;
  const int part = static_cast<int>(block_index() % p.split.parts), cluster = p.split.cluster;
  sum_part<T, kPadded, kTokenMajor, kScaled>(p, group, part, shared);
  sync_block();
  float* const to = p.sums + (group * p.split.rows() + part / cluster) * (p.value_dim + 1) * p.head_dim;
  if (cluster == 1) {
    each_sum<kPadded>(shared, p.head_dim, p.value_dim, [&](int i, float*, float total) { to[i] = total; });
  } else {
    each_sum_of_cluster<kPadded>(shared, cluster, p.head_dim, p.value_dim,
                                 [&](int i, float total) { to[i] = total; });
  }
}

// --- what uses the sums, a token a row --------------------------------------------------------------

// Rows of a tile are tokens: vectors of them in channel-major, so many in token-major that registers suffice.
template <class T, int kPadded, bool kTokenMajor, int kMostRows = 8, int kMostAtATime = 8>
struct TokenTiles {
  static constexpr int kWarps = SumTiles<kPadded>::kWarps, kThreads = kWarps * kLanes;
  static constexpr int kWantedRows = kPadded <= 32 ? kVector<T> : most(2, kVector<T> * 32 / kPadded);
  static constexpr int kRows = kTokenMajor ? least(kWantedRows, kMostRows) : kWantedRows;
  static constexpr int kCols = kPadded / 4;
  static constexpr int kTokens = kWarps * 8 * kRows;  // of a block
  static constexpr int kRowVector = kTokenMajor ? 1 : least(kVector<T>, kRows);
  // Two columns at least are neighbours: so the registers of a result are those of an operand.
  static constexpr int kColVector = kTokenMajor ? least(kVector<T>, kCols) : 2;
  // A result with all its channels, and what is loaded at a time: less of it where the result takes all
  // registers.
  static constexpr int kAtATime = least(kCols, kPadded > 64 && sizeof(T) == 4 ? 4 : kMostAtATime);
  using Piece = Fragment<T, kRows, kCols, kRowVector, kColVector, !kTokenMajor>;
  using Chunk = Fragment<T, kRows, kAtATime, kRowVector, kColVector, !kTokenMajor>;

  // Of the sums in shared memory: rows lie so far apart that lanes meet in few banks.
  static constexpr int kStride = kPadded + 8;
  static constexpr int64_t kSharedBytes = int64_t{4} * (kPadded + 1) * kStride;
};

struct Sums {
  const float* data;  // shared
  int stride, vector_row;

  EFFATTN_DEVICE float operator()(int value, int channel) const { return data[value * stride + channel]; }
  EFFATTN_DEVICE float vector(int channel) const { return (*this)(vector_row, channel); }
};

// The sums of a group to shared memory, number i by get(i), with zeros behind the last row and column.
template <class Tiles, int kPadded, class F>
EFFATTN_DEVICE Sums place_sums(float* shared, int head_dim, int value_dim, F get) {
  for (int i = thread_index(); i < (kPadded + 1) * kPadded; i += Tiles::kThreads) {
    const int row = i / kPadded, col = i % kPadded;
    const bool inside = col < head_dim && (row < value_dim || row == kPadded);
    shared[row * Tiles::kStride + col] =
        inside ? get((row == kPadded ? value_dim : row) * head_dim + col) : 0.0f;
  }
  sync_block();
  return {shared, Tiles::kStride, kPadded};
}
template <class Tiles, int kPadded>
EFFATTN_DEVICE Sums load_sums(const float* all, int64_t group, int head_dim, int value_dim) {
  const float* const sums = all + group * (value_dim + 1) * head_dim;
  return place_sums<Tiles, kPadded>(reinterpret_cast<float*>(shared_memory()), head_dim, value_dim,
                                    [&](int i) { return sums[i]; });
}

// out += x m, where m(k, n) is what channel k of x gives to channel n of out.
template <class Piece, class Chunk, class M>
EFFATTN_DEVICE void multiply_add(Piece& out, const Chunk& x, M m) {
  // What of x is split in two parts for a product is so for all of them, and then done with.
  EFFATTN_UNROLL
  for (int s = 0; s < Chunk::kColRegisters; s += 2) {
    EFFATTN_UNROLL
    for (int j = 0; j < Piece::kColRegisters; j += 2) {
      const int n = Piece::col_of(j + row_lane() % 2, row_lane() / 2);
      const float b[2] = {m(Chunk::col(s), n), m(Chunk::col(s + 1), n)};
      EFFATTN_UNROLL
      for (int i = 0; i < Piece::kRowRegisters; i += 2) {
        const float a[4] = {x.x[i][s], x.x[i + 1][s], x.x[i][s + 1], x.x[i + 1][s + 1]};
        float c[4] = {out.x[i][j], out.x[i][j + 1], out.x[i + 1][j], out.x[i + 1][j + 1]};
        multiply<Chunk::kExact, false>(c, a, b);
        out.x[i][j] = c[0];
        out.x[i][j + 1] = c[1];
        out.x[i + 1][j] = c[2];
        out.x[i + 1][j + 1] = c[3];
      }
    }
  }
}

struct Queries {
  Groups groups;
  View q, grad_out, out;  // out: of the backward grad_q
  const float* sums;
  float* scales;  // backward: of each token two, by what the gradients of the sums take it
  int tokens, head_dim, value_dim;
  int64_t tiles;
  float eps;
};

// The tile of tokens of a warp in a launch over all groups.
template <class Tiles>
struct Place {
  int64_t group;
  int token;

  EFFATTN_DEVICE explicit Place(int64_t tiles)
      : group(block_index() / tiles),
        token(static_cast<int>(block_index() % tiles) * Tiles::kTokens +
              warp_index() * Tiles::Piece::kAllRows) {}
};

// The output of a warp's tile of queries.
template <class T, int kPadded, bool kTokenMajor>
EFFATTN_DEVICE void attend_tile(const Queries& p, const Sums& sums, int64_t group, int token) {
  using Tiles = TokenTiles<T, kPadded, kTokenMajor>;
  using Chunk = typename Tiles::Chunk;
  const Matrix<const T> q = by_token<const T>(p.q, p.groups, group, p.tokens, p.head_dim);
  typename Tiles::Piece out;
  out.clear();
  float inverse[Tiles::kRows] = {};
  EFFATTN_NOT_UNROLLED
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    Chunk query;
    query.load(q, token, first);
    query.relu();
    query.each([&](float& x, int r, int c) { inverse[r] += x * sums.vector(first + Chunk::col(c)); });
    multiply_add(out, query, [&](int k, int n) { return sums(n, first + k); });
  }
  EFFATTN_UNROLL
  for (int r = 0; r < Tiles::kRows; ++r) inverse[r] = 1 / divisible(sum_of_cols(inverse[r]) + p.eps);
  out.each([&](float& x, int r, int) { x *= inverse[r]; });
  out.store(by_token<T>(p.out, p.groups, group, p.tokens, p.value_dim), token, 0);
}

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((TokenTiles<T, kPadded, kTokenMajor>::kThreads), 1)
attend(EFFATTN_PARAMETERS(Queries) p) {
  using Tiles = TokenTiles<T, kPadded, kTokenMajor>;
  const Place<Tiles> at(p.tiles);
  const Sums sums = load_sums<Tiles, kPadded>(p.sums, at.group, p.head_dim, p.value_dim);
  attend_tile<T, kPadded, kTokenMajor>(p, sums, at.group, at.token);
}

// All of it for a group in one cluster, where its tokens are few: a launch less, or two.
struct AtOnce {
  SumTokens keys;
  Queries queries;  // of the same groups
  float* sums;      // to keep, or null
};

template <class T, int kPadded, bool kTokenMajor>
struct AtOnceTiles : TokenTiles<T, kPadded, kTokenMajor> {
  using Tokens = TokenTiles<T, kPadded, kTokenMajor>;
  using Sums = SumTiles<kPadded>;
  // Where a block's share of the cluster's sums stands, behind the slices of its own; behind it all of them.
  static constexpr int kShare = Sums::kSlices * Sums::kFloats, kAll = kShare + Sums::kFloats;
  static constexpr int64_t kSharedBytes = 4 * kAll + Tokens::kSharedBytes;
};

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((TokenTiles<T, kPadded, kTokenMajor>::kThreads), 1)
attend_at_once(EFFATTN_PARAMETERS(AtOnce) p) {
  using Tiles = AtOnceTiles<T, kPadded, kTokenMajor>;
  float* const shared = reinterpret_cast<float*>(shared_memory());
  float* const share = shared + Tiles::kShare;
  const SumTokens& keys = p.keys;
  const int cluster = keys.split.cluster, rank = cluster_rank();
  const int64_t group = block_index() / cluster;
  sum_part<T, kPadded, kTokenMajor, false>(keys, group, rank, shared);
  sync_block();
  const auto keep = [&](int i, float total) {
    share[i] = total;
    if (p.sums != nullptr) p.sums[group * (keys.value_dim + 1) * keys.head_dim + i] = total;
  };
  if (cluster == 1) {
    each_sum<kPadded>(shared, keys.head_dim, keys.value_dim,
                      [&](int i, float*, float total) { keep(i, total); });
    sync_block();
  } else {
    each_sum_of_cluster<kPadded>(shared, cluster, keys.head_dim, keys.value_dim, keep);
  }
  const Sums sums = place_sums<Tiles, kPadded>(
      shared + Tiles::kAll, keys.head_dim, keys.value_dim,
      [&](int i) { return cluster == 1 ? share[i] : of_cluster(share + i, i / Tiles::kThreads % cluster); });
  for (int64_t tile = rank; tile < p.queries.tiles; tile += cluster) {
    const int token = static_cast<int>(tile) * Tiles::kTokens + warp_index() * Tiles::Piece::kAllRows;
    attend_tile<T, kPadded, kTokenMajor>(p.queries, sums, group, token);
  }
  if (cluster > 1) sync_cluster();
}

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((TokenTiles<T, kPadded, kTokenMajor>::kThreads), 1)
query_gradients(EFFATTN_PARAMETERS(Queries) p) {
  using Tiles = TokenTiles<T, kPadded, kTokenMajor>;
  using Chunk = typename Tiles::Chunk;
  const Place<Tiles> at(p.tiles);
  const Sums sums = load_sums<Tiles, kPadded>(p.sums, at.group, p.head_dim, p.value_dim);
  const Matrix<const T> q = by_token<const T>(p.q, p.groups, at.group, p.tokens, p.head_dim);
  const Matrix<const T> grad_out = by_token<const T>(p.grad_out, p.groups, at.group, p.tokens, p.value_dim);
  typename Tiles::Piece of_sums;
  of_sums.clear();
  EFFATTN_NOT_UNROLLED
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    Chunk grad;
    grad.load(grad_out, at.token, first);
    multiply_add(of_sums, grad, [&](int k, int n) { return sums(first + k, n); });
  }
  float inverse[Tiles::kRows] = {}, along[Tiles::kRows] = {};
  Chunk query;
  EFFATTN_UNROLL
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    query.load(q, at.token, first);
    query.relu();
    query.each([&](float& x, int r, int c) {
      inverse[r] += x * sums.vector(first + Chunk::col(c));
      along[r] += x * of_sums.x[r][first / 4 + c];
    });
  }
  EFFATTN_UNROLL
  for (int r = 0; r < Tiles::kRows; ++r) {
    inverse[r] = 1 / divisible(sum_of_cols(inverse[r]) + p.eps);
    // -grad . out, with out = relu(q) . sums / denominator
    along[r] = -sum_of_cols(along[r]) * inverse[r];
  }
  EFFATTN_UNROLL
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    if (kPadded > Chunk::kAllCols) {  // or it is there still
      query.load(q, at.token, first);
      query.relu();
    }
    // The gate is relu's, which lets NaN through.
    query.each([&](float& x, int r, int c) {
      float& grad = of_sums.x[r][first / 4 + c];
      grad = x <= 0 ? 0.0f : (grad + along[r] * sums.vector(first + Chunk::col(c))) * inverse[r];
    });
  }
  of_sums.store(by_token<T>(p.out, p.groups, at.group, p.tokens, p.head_dim), at.token, 0);
  if (col_lane() != 0) return;
  EFFATTN_UNROLL
  for (int r = 0; r < Tiles::kRows; ++r) {
    const int token = at.token + Chunk::row(r);
    if (token >= p.tokens) continue;
    float* const scales = p.scales + 2 * (at.group * p.tokens + token);
    scales[0] = inverse[r];
    scales[1] = along[r] * inverse[r];
  }
}

struct Keys {
  Groups groups;
  View k, v, grad_k, grad_v;
  const float* grad_sums;
  int tokens, head_dim, value_dim;
  int64_t tiles;
};

template <class T, int kPadded, bool kTokenMajor>
using KeyTiles = TokenTiles<T, kPadded, kTokenMajor, 4, kTokenMajor ? 8 : 4>;

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((KeyTiles<T, kPadded, kTokenMajor>::kThreads), 1)
key_gradients(EFFATTN_PARAMETERS(Keys) p) {
  using Tiles = KeyTiles<T, kPadded, kTokenMajor>;
  using Chunk = typename Tiles::Chunk;
  const Place<Tiles> at(p.tiles);
  const Sums grads = load_sums<Tiles, kPadded>(p.grad_sums, at.group, p.head_dim, p.value_dim);
  const Matrix<const T> k = by_token<const T>(p.k, p.groups, at.group, p.tokens, p.head_dim);
  const Matrix<const T> v = by_token<const T>(p.v, p.groups, at.group, p.tokens, p.value_dim);
  typename Tiles::Piece out;
  Chunk chunk;
  out.each([&](float& x, int, int c) { x = grads.vector(Tiles::Piece::col(c)); });
  EFFATTN_NOT_UNROLLED
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    chunk.load(v, at.token, first);
    multiply_add(out, chunk, [&](int k, int n) { return grads(first + k, n); });
  }
  EFFATTN_UNROLL
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    chunk.load(k, at.token, first);
    chunk.each([&](float& x, int r, int c) {
      if (x <= 0) out.x[r][first / 4 + c] = 0;
    });
  }
  out.store(by_token<T>(p.grad_k, p.groups, at.group, p.tokens, p.head_dim), at.token, 0);
  out.clear();
  EFFATTN_NOT_UNROLLED
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    chunk.load(k, at.token, first);
    chunk.relu();
    multiply_add(out, chunk, [&](int k, int n) { return grads(n, first + k); });
  }
  out.store(by_token<T>(p.grad_v, p.groups, at.group, p.tokens, p.value_dim), at.token, 0);
}

// --- launches ---------------------------------------------------------------------------------------

// When a cluster does all of a group: its blocks are more while they have so many tokens each and the launch
// has fewer blocks than this, and have no more tokens than that. By argument, not by measurement.
constexpr int64_t kTokensAtOnce = 256, kBlocksAtOnce = 256, kMostTokensAtOnce = 512;
constexpr int kMostAtOnce = 64;  // channels: the sums stand three times in shared memory

// What the launches of a call share.
class Call {
 public:
  Call(const ReluLinearAttention& problem, const Execution& execution) : p_(problem), execution_(execution) {
    const int64_t most = larger(problem.head_dim, problem.value_dim);
    if (most > kMostChannels) {
      throw std::runtime_error("effattn: the kernels take heads of up to " + std::to_string(kMostChannels) +
                               " channels, not " + std::to_string(most));
    }
    for (const int64_t tokens : {problem.queries, problem.keys}) {
      if (tokens > INT32_MAX / 2) {
        throw std::runtime_error("effattn: the kernels take up to 2^30 tokens, not " +
                                 std::to_string(tokens));
      }
    }
    // The memory order of the first tensor is that of the others, where one can be said to be.
    const Operand& first = problem.queries > 0 ? problem.q : problem.k;
    token_major_ = first.channel_stride == 1 && (first.token_stride != 1 || problem.head_dim == 1);
  }

  // Points views at operands; all tensors of a launch have the same groups.
  template <int kCount>
  Groups take(const Operand* const (&operands)[kCount], View* const (&views)[kCount]) const {
    Groups groups;
    merge(p_.lead_sizes, p_.lead_rank, operands, views, kCount, groups);
    for (View* view : views) view->access = access_of(*view, groups.rank, token_major_, p_.dtype);
    return groups;
  }

  // Fills `sums` with those over the tokens of k and v.
  void sum_over(const Operand& k, const Operand& v, int64_t tokens, const float* scales, float* sums) const {
    SumTokens s = keys(tokens);
    s.groups = take({&k, &v}, {&s.k, &s.v});
    s.scales = scales;
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      using Tiles = SumTiles<padded()>;
      s.split = split(p_.groups, tokens, Tiles::kTokens * Tiles::kSlices, execution_.card);
      const int64_t rows = s.split.rows();
      s.sums = rows == 1 ? sums : execution_.workspace(p_.groups * rows * p_.sums_size());
      const auto kernel = scales == nullptr ? sum_tokens<T, padded(), token_major(), false>
                                            : sum_tokens<T, padded(), token_major(), true>;
      const Grid grid{p_.groups * s.split.parts, Tiles::kThreads, Tiles::kSharedBytes, s.split.cluster};
      launch(kernel, grid, execution_, s);
      if (rows > 1) add_up(s.sums, sums, p_.groups, rows, p_.sums_size(), execution_);
    });
  }

  // Whether a group's tokens are few enough for one cluster, and how large that is; 0 if not.
  int cluster_at_once() const {
    const int64_t tokens = larger(p_.queries, p_.keys);
    if (larger(p_.head_dim, p_.value_dim) > kMostAtOnce) return 0;
    const int64_t blocks = smaller(ceil_div(tokens, kTokensAtOnce), ceil_div(kBlocksAtOnce, p_.groups));
    const int cluster = cluster_of(blocks, execution_.card);
    return tokens <= kMostTokensAtOnce * cluster ? cluster : 0;
  }

  void attend_at_once_to(int cluster, float* sums) const {
    AtOnce s{keys(p_.keys), queries(nullptr), sums};
    s.keys.groups = s.queries.groups =
        take({&p_.k, &p_.v, &p_.q, &p_.out}, {&s.keys.k, &s.keys.v, &s.queries.q, &s.queries.out});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      if constexpr (padded() <= kMostAtOnce) {
        using Tiles = AtOnceTiles<T, padded(), token_major()>;
        // Whole tiles: what a warp loads at a time is of one part.
        const int64_t part = round_up(ceil_div(p_.keys, cluster), SumTiles<padded()>::kTokens);
        s.keys.split = {static_cast<int>(part), cluster, cluster};
        s.queries.tiles = ceil_div(p_.queries, Tiles::kTokens);
        launch(attend_at_once<T, padded(), token_major()>,
               {p_.groups * cluster, Tiles::kThreads, Tiles::kSharedBytes, cluster}, execution_, s);
      }
    });
  }

  void attend_to(const float* sums) const {
    Queries s = queries(sums);
    s.groups = take({&p_.q, &p_.out}, {&s.q, &s.out});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      launch_tiles<TokenTiles<T, padded(), token_major()>>(attend<T, padded(), token_major()>, s);
    });
  }

  void gradients_of_queries(const float* sums, float* scales) const {
    Queries s = queries(sums);
    s.scales = scales;
    s.groups = take({&p_.q, &p_.grad_out, &p_.grad_q}, {&s.q, &s.grad_out, &s.out});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      launch_tiles<TokenTiles<T, padded(), token_major()>>(query_gradients<T, padded(), token_major()>, s);
    });
  }

  void gradients_of_keys(const float* grad_sums) const {
    Keys s{};
    s.grad_sums = grad_sums;
    s.tokens = static_cast<int>(p_.keys);
    s.head_dim = static_cast<int>(p_.head_dim);
    s.value_dim = static_cast<int>(p_.value_dim);
    s.groups = take({&p_.k, &p_.v, &p_.grad_k, &p_.grad_v}, {&s.k, &s.v, &s.grad_k, &s.grad_v});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      launch_tiles<KeyTiles<T, padded(), token_major()>>(key_gradients<T, padded(), token_major()>, s);
    });
  }

 private:
  template <class F>
  void with_instance(F f) const {
    with_dtype(p_.dtype, [&](auto type) {
      with_channels(larger(p_.head_dim, p_.value_dim), [&](auto padded) {
        if (token_major_) {
          f(type, padded, std::true_type{});
        } else {
          f(type, padded, std::false_type{});
        }
      });
    });
  }

  SumTokens keys(int64_t tokens) const {
    SumTokens s{};
    s.tokens = static_cast<int>(tokens);
    s.head_dim = static_cast<int>(p_.head_dim);
    s.value_dim = static_cast<int>(p_.value_dim);
    return s;
  }

  Queries queries(const float* sums) const {
    Queries s{};
    s.sums = sums;
    s.tokens = static_cast<int>(p_.queries);
    s.head_dim = static_cast<int>(p_.head_dim);
    s.value_dim = static_cast<int>(p_.value_dim);
    s.eps = p_.eps;
    return s;
  }

  template <class Tiles, class Kernel, class Parameters>
  void launch_tiles(Kernel kernel, Parameters& s) const {
    s.tiles = ceil_div(s.tokens, Tiles::kTokens);
    launch(kernel, {p_.groups * s.tiles, Tiles::kThreads, Tiles::kSharedBytes}, execution_, s);
  }

  const ReluLinearAttention& p_;
  const Execution& execution_;
  bool token_major_;
};

}  // namespace

void forward(const ReluLinearAttention& problem, float* sums, const Execution& execution) {
  if (problem.groups == 0) return;
  const Call call(problem, execution);
  if (const int cluster = call.cluster_at_once(); cluster > 0) return call.attend_at_once_to(cluster, sums);
  if (sums == nullptr) sums = execution.workspace(problem.groups * problem.sums_size());
  call.sum_over(problem.k, problem.v, problem.keys, nullptr, sums);
  call.attend_to(sums);
}

void backward(const ReluLinearAttention& problem, const float* sums, const Execution& execution) {
  if (problem.groups == 0) return;
  const Call call(problem, execution);
  float* const scales = execution.workspace(problem.groups * problem.queries * 2);
  float* const grad_sums = execution.workspace(problem.groups * problem.sums_size());
  call.gradients_of_queries(sums, scales);
  call.sum_over(problem.q, problem.grad_out, problem.queries, scales, grad_sums);
  call.gradients_of_keys(grad_sums);
}

}  // namespace effattn::cuda
